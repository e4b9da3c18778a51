"""`python -m bench.peers`: what it reads off its records, its checks, and a smallest run of ours through all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ulysses_triton import UlyssesGroup
from ulysses_triton.case import Case, draw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benches are in no package that is installed

from bench import _contestants, _peer_tables, _peers, peers  # noqa: E402

sys.path.remove(str(ROOT))  # where `kernels` would pass for another project's package

CASE = Case(tokens=64, heads=4, kv_heads=4, head_dim=16, value_dim=16, ranks=2)


def record(contestant: str, p50: float | None, **more: Any) -> dict[str, Any]:
    ours = contestant.startswith("ours")
    found = {
        "part": "attention", "case": "c", "contestant": contestant, "ours": ours, "ok": True, "tokens": 2048,
        "ranks": 4, "heads": 8, "kv_heads": 8, "head_dim": 64, "dtype": "fp32", "copies": 8, "copied_bytes": 2000,
        "wire_bytes": 500, "saved_bytes": 1000, "collectives": 4 if ours else 8,
    } | ({"default": True, "exchange": "torch"} if ours else {})  # fmt: skip
    if p50 is not None:
        found |= {"ms": {"p20": p50 - 1, "p50": p50, "p80": p50 + 1, "repeats": 5}, "others_cores": 0.0}
    return found | more


def test_targets_are_held_to_the_faster_peer_of_the_same_table():
    records = [
        record("ours torch", 90.0),
        record("ours torch, sdpa", 500.0),  # what is not shipped is not held
        record("deepspeed", 120.0),
        record("yunchang", 100.0, saved_bytes=900),
        record("ours torch", 10.0, case="other"),
        record("yunchang", 5.0, case="other", ranks=2),
    ]
    text = _peer_tables.targets(records)
    every, short, collectives, saved = (
        next(line for line in text.splitlines() if line.startswith(start))
        for start in ("with attention, 4 ranks: ", "with attention, 4 ranks, 2,048", "collectives", "saved")
    )
    assert "NOT MET" in every and "1 of 2" in every and " 2  " in every  # 10 / 5
    assert "NOT MET" in short and "0 of 2" in short
    assert "met  2 of 2" in collectives
    assert "NOT MET" in saved and "1 of 2" in saved and "1.111" in saved


def test_targets_of_the_exchange_want_their_one_size():
    sizes = {"part": "exchange", "tokens": 32768, "case": "32k"}
    records = [
        record("ours shm, identity", 45.0, exchange="shm", **sizes),
        record("ours torch, identity", 95.0, default=False, **sizes),
        record("deepspeed", 100.0, **sizes),
        record("ours torch, identity", 300.0, part="exchange", case="2k"),
        record("deepspeed", 100.0, part="exchange", case="2k"),
    ]
    default, torch_only = _peer_tables.targets(records).splitlines()[1:3]
    # `identity` is how the exchange alone is measured, so it counts as what is shipped there
    assert "met  1 of 1" in default and "0.45" in default
    assert "NOT MET  0 of 1" in torch_only and "0.95" in torch_only
    assert _peer_tables.targets(records[:2]).splitlines()[1].split("deepspeed")[1].split()[:2] == ["not", "measured"]


def test_a_table_says_what_is_wrong_and_what_cannot():
    wrong = {"dk": {"error": 0.5, "allowed": 2e-6, "ok": False}}
    text = _peer_tables.show(
        [
            record("ours torch", 50.0),
            record("deepspeed", None, ok=False, cannot="AssertionError: 2 kv heads\nand more"),
            record("yunchang", None, ok=False, errors=wrong),
        ]
    )
    assert "\ndeepspeed cannot: AssertionError: 2 kv heads\n" in text
    assert text.endswith("yunchang is WRONG: dk 5.0e-01 > 2.0e-06")
    assert "of fastest peer" in text and _peer_tables.fastest_peer([record("ours torch", 50.0)]) is None


def test_a_wrong_result_is_found():
    """Tokens of the output that changed places, or a gradient off at one of the keys, exceed what is allowed."""
    inputs = draw(CASE, torch.device("cpu"))
    some = inputs.zero_but(_peers.checked_rows(CASE))
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    for part, attend, given in (("attention", _contestants.sdpa, some), ("exchange", _contestants.identity, inputs)):
        out = attend(*leaves)
        grads = torch.autograd.grad(out, leaves, given.dout)
        right = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))
        assert all(e["ok"] for e in _peers.check(CASE, part, given, right).values())
        swapped = right | {"out": right["out"].flip(1)}
        assert not _peers.check(CASE, part, given, swapped)["out"]["ok"]
        off = right | {"dk": right["dk"] + torch.eye(64)[5][:, None, None]}
        assert not _peers.check(CASE, part, given, off)["dk"]["ok"]


def raising(q, k, v):
    raise ValueError("no such heads")


def measure(ctx: Any, part: str) -> list[dict[str, Any]]:
    """`measured` on a rank, with a contestant that raises and one that is wrong beside ours."""
    with UlyssesGroup(exchange="torch") as group:
        contestants = _contestants.contestants(part, {"torch": group}, ())
        contestants.append(_contestants.Contestant("raising", raising))
        contestants.append(_contestants.Contestant("wrong", lambda q, k, v: v + 0 * (q + k)))
        asked = _peers.Asked(((part, CASE),), (), repeat=3, seconds=1.0)
        return _peers.measured(CASE, part, contestants, "torch", asked)


@pytest.mark.parametrize("part", _contestants.PARTS)
def test_what_is_wrong_or_raises_is_not_timed(pool, part):
    records, _ = pool.fresh(2, measure, part)
    found = {r["contestant"]: r for r in records}
    assert found["raising"]["cannot"] == "ValueError: no such heads"
    assert not found["wrong"]["ok"] and not found["wrong"]["errors"]["out"]["ok"]
    assert not any("ms" in found[name] for name in ("raising", "wrong"))
    for name in set(found) - {"raising", "wrong"}:
        assert found[name]["ok"] and found[name]["ms"]["repeats"] == 3, found[name]
        for key in ("live_bytes", "rss_bytes"):
            assert (found[name][key] is not None) == (part == "scaling")


ROW = 4 * 16 * 4  # bytes of a token of one of q, k, v, O


def test_the_smallest_run_measures_ours_and_says_what_to_install(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "OUT"} | {"PYTHONPATH": str(ROOT)}
    absent = "import sys; sys.modules['deepspeed'] = sys.modules['yunchang'] = None; from bench import peers; "
    options = ["--quick", "--heads", "4", "--kv-heads", "1", "--dim", "16", "--out", str(tmp_path)]
    options += ["--part", "attention,exchange"]
    done = subprocess.run(
        [sys.executable, "-c", f"{absent}sys.exit(peers.main({options}))"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deepspeed is not installed here: `make peers`" in done.stdout and "QUICK" in done.stdout
    assert not done.stderr
    (path,) = tmp_path.glob("dry-run-peers-*.json")
    whole = json.loads(path.read_text())
    assert whole["cpus"] and whole["load"] and whole["commit"]
    cases = [r for r in whole["cases"] if r["dtype"] == "fp32"]
    assert {(r["part"], r["kv_heads"]) for r in cases} == {("attention", 1), ("exchange", 1)}
    assert {r["dtype"] for r in whole["cases"] if r["part"] == "attention"} == {"fp32", "bf16"}
    assert sum(r["default"] for r in cases if r["part"] == "exchange" and r["ours"]) == 1
    for r in cases:
        if r["contestant"] == "torch context_parallel":
            assert "scaled_dot_product" in r["cannot"]  # PyTorch has no kernel for it here
            continue
        assert r["ok"] and r["ms"]["repeats"] == 3 and r["ms"]["p20"] <= r["ms"]["p50"] <= r["ms"]["p80"], r
        assert r["wire_bytes"] == r["formula_bytes"], r
        assert r["live_bytes"] is r["rss_bytes"] is None
        if r["ours"]:
            assert r["collectives"] == 4 and r["others_cores"] >= 0
            kv_rows = 2 * ROW * 2 // 4  # of the four that q has: the one kv head goes to both ranks
            assert r["wire_bytes"] == 256 // 2 // 2 * (2 * ROW + kv_rows) * 2  # half of a rank's, and back
            assert (r["saved_bytes"] > 0) == (r["part"] == "attention")


def test_a_table_of_scaling():
    sizes = {"part": "scaling", "tokens": 4096, "formula_bytes": None}
    records = [
        record("ours torch", 50.0, **sizes | {"tokens": 2048, "ranks": 2, "wire_bytes": 3_000_000}),
        record("ring", 40.0, **sizes | {"tokens": 2048, "ranks": 2, "wire_bytes": 5_000_000}),
        record("ours torch", 60.0, **sizes),
        record("ring", None, **sizes | {"wire_bytes": None}),
    ]
    lines = _peer_tables.scaling(records).splitlines()
    assert lines[0] == "== scaling: 1,024 tokens on each rank, 8 query and 8 kv heads of 64, fp32"
    assert [line.split() for line in lines[2:4]] == [["ours", "torch", "3", "0.0005"], ["ring", "5", "-"]]


def test_what_cannot_be_is_refused(capsys):
    for options in (["--ranks", "3"], ["--kv-heads", "3"], ["--ranks", "1"], ["--peers", "nobody"], ["--seq", "31"]):
        with pytest.raises(SystemExit) as ended:
            peers.main(options)
        assert ended.value.code == 2
    assert "--kv-heads 3 does not divide --heads 8" in capsys.readouterr().err
