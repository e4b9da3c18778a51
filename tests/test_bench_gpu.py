"""`python -m bench.gpu`: its dry run goes through all of it, its records are whole, and it refuses what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ulysses_triton.kernels import _config, attend_forward, pack

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benches are in no package that is installed

from bench import _attend, _check, _exchange, _layer, _measure, _move, gpu  # noqa: E402
from bench._data import Attention, Kernels, Movement  # noqa: E402
from bench._record import commit, targets  # noqa: E402
from bench._session import Session  # noqa: E402

sys.path.remove(str(ROOT))  # where `kernels` would pass for another project's package

PARTS = ("check", "move", "attend", "layer", "exchange", "memory")
DRY_RUN = """
import sys

for name in ("hypothesis", "matplotlib", "platformdirs", "pytest", "tqdm"):  # not on every machine with a GPU
    sys.modules[name] = None

from bench import gpu

sys.exit(gpu.main(["--interpret", "--out", sys.argv[1]]))
"""

interpreted = pytest.mark.skipif(not _config.INTERPRET, reason="a dry run is for Triton's interpreter")


def start(*arguments: str, interpret: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "OUT")}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"TRITON_INTERPRET": interpret} if interpret else {})
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return {record["part"]: record for record in found}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("records")
    results = ROOT / "bench" / "results"
    before = sorted(results.glob("*")) if results.exists() else []
    process = start("-c", DRY_RUN, str(folder))
    assert process.returncode == 0, process.stdout + process.stderr[-4000:]
    assert (sorted(results.glob("*")) if results.exists() else []) == before
    return process.stdout, records(folder)


def test_dry_run_makes_a_record_of_every_part(dry_run) -> None:
    said, found = dry_run
    assert tuple(part for part in PARTS if part in found) == PARTS and "DRY RUN" in said
    for record in found.values():
        assert record["dry_run"] is True and record["skipped"] == []
        assert record["device"]["type"] == "cpu" and record["device"]["name"]
        assert record["versions"]["torch"] == torch.__version__ and record["versions"]["triton"]
        assert record["commit"] == commit() and record["sources"] and record["date"].startswith("20")
        assert record["cases"] and all(case["ok"] for case in record["cases"])


def test_dry_run_checks_every_kernel(dry_run) -> None:
    cases = dry_run[1]["check"]["cases"]
    assert {case["kernel"] for case in cases} == {*Kernels._fields, "layer"}
    for case in cases:
        assert case["errors"] and all(x["error"] <= x["allowed"] for x in case["errors"].values())


def test_dry_run_times_every_kernel(dry_run) -> None:
    _, found = dry_run
    timed = [*found["move"]["cases"], *found["attend"]["cases"]]
    assert {case["kernel"] for case in timed} == set(Kernels._fields)
    for case in timed:
        assert case["errors"] and 0 < case["ms"]["p20"] <= case["ms"]["p50"] <= case["ms"]["p80"]
    for case in found["move"]["cases"]:
        assert case["bytes"] > 0 and case["gb_per_s"] > 0 and case["share_of_copy"] > 0
    for case in found["attend"]["cases"]:
        assert case["flops"] > 0 and case["tflop_per_s"] > 0
        assert set(case["peers"]) == {"flash", "cudnn", "flex", "fa2", "fa3", "fa4"}
        assert "unavailable" in case["peers"]["cudnn"]
    assert [case["ranks"] for case in found["layer"]["cases"]] == [2, 4]
    for case in found["layer"]["cases"]:
        assert set(case["ms"]) == set(case["sdpa_ms"]) == {"forward", "backward"}
        assert list(case["phases_ms"]) == [
            "pack", "exchange_in", "attend", "exchange_out", "pack_grad", "exchange_grad_in", "attend_backward",
            "exchange_grad_out", "unpack_grad",
        ]  # fmt: skip
        assert all(time > 0 for time in case["phases_ms"].values())


def test_dry_run_exchanges_between_processes(dry_run) -> None:
    layer, overlap = dry_run[1]["exchange"]["cases"]
    assert layer["case"] == "torch on 2 ranks" and set(layer["errors"]) == {"out", "dq", "dk", "dv"}
    assert overlap["overlap"]["bytes"] > 0 and all(f"C = {n}" in overlap["overlap"] for n in _exchange.CHUNKS)


def test_an_exchange_that_fails_is_a_record() -> None:
    """And the parts after it go on."""
    session = Session(torch.device("cpu"), dry=True)
    work = _exchange.Work("telepathy", 2)
    record = session.judge(
        "exchange", str(work), lambda: _exchange._check(session, work, _exchange.layer(work, dry=True))
    )
    assert not record["ok"]
    assert "rank 0: exit status 1" in record["failure"] and "OptionError: exchange = 'telepathy'" in record["failure"]


def test_dry_run_ends_with_the_targets(dry_run) -> None:
    lines = dry_run[0].partition("== targets\n")[2].splitlines()
    assert len(lines) == 7 and lines[1].startswith("pack and unpack >= 0.9 x copy")
    assert [line for line in lines if "x fa2" in line and "not measured" in line]


def test_cases_have_names_of_their_own() -> None:
    for dry in (True, False):
        everything: list[Sequence[object]] = [
            [*_check.checks(dry=dry), *_layer.checks(dry=dry)], _attend.cases(dry=dry), _layer.cases(dry=dry),
            _move.DRY if dry else _move.TIMED, _exchange.works(dry=dry),
        ]  # fmt: skip
        for cases in everything:
            assert len(set(map(str, cases))) == len(cases)


def test_every_option_is_checked() -> None:
    flags = {name for extra in _check.EXTRAS for name in Attention(100, **extra).flags}
    assert flags >= {"causal", "dense", "window", "documents", "sinks", "alibi", "dropout", "predicate", "blocks"}
    names = {str(check) for check in _check.checks(dry=False)}
    assert any("D 100-33" in name and "attend_backward bf16" in name for name in names)


def test_cases_of_attention_are_those_asked_for() -> None:
    cases = _attend.cases(dry=False)
    assert {case.D for case in cases} == {64, 128, 256}
    assert {case.S for case in cases if case.D == 128 and case.causal} == {2048 << i for i in range(7)}
    assert {case.group for case in cases} >= {1, 8}
    assert {name for case in cases for name in case.flags} == {
        "causal", "dense", "window", "documents", "alibi", "dropout",
    }  # fmt: skip
    for case in cases:
        assert case.S * case.B == max(16384, case.S) and case.hq * case.D == 2048 and case.hq % case.group == 0
    assert cases[0] == Attention(8192, B=2, hq=16, group=4)  # what is looked at first, timed first


@pytest.mark.parametrize(
    "case",
    [
        Attention(30, B=2),
        Attention(30, causal=False),
        Attention(30, window=(7, 0)),
        Attention(30, B=2, causal=False, window=(-1, 4)),
        Attention(48, documents=_attend.RUNS),
        Attention(48, documents=_attend.RUNS, causal=False, window=(2, 5)),
    ],
    ids=str,
)
def test_operations_are_those_of_the_attended_pairs(case: Attention) -> None:
    kept = _check.pairs_of(case, torch.arange(case.S)).kept
    assert _attend.attended(case) == kept.expand(case.B, 1, -1, -1).sum()


def on_cpu() -> Session:
    return Session(torch.device("cpu"), dry=True)


def ready(case: Attention) -> _attend.Rows:
    """Rows with their truth in them instead of a kernel's results."""
    rows = _attend.rows_of(case, torch.device("cpu"))
    found = _check.exact(case, rows.options, (rows.q, rows.k, rows.v, rows.do), None, torch.arange(case.S))
    for to, name in ((rows.o, "out"), (rows.dq, "dq"), (rows.dk, "dk"), (rows.dv, "dv")):
        to.copy_(found[name])
    return rows


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    "mask", [{}, {"causal": False}, {"window": (9, 0)}, {"documents": _attend.RUNS}, {"alibi": True}]
)
def test_flex_attention_is_asked_the_same(mask: dict[str, Any]) -> None:
    case = Attention(48, B=2, D=16, dtype="fp32", **mask)
    rows = ready(case)
    attend = _attend._flex(case, rows, compiled=False)
    out = attend(*(x.transpose(0, 1) for x in rows[:3])).transpose(0, 1)
    assert (out - rows.o).norm() <= 1e-5 * rows.o.norm()


class FlashAttention(ModuleType):
    """A stand-in with that package's calls."""

    @staticmethod
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, **_: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)

    @classmethod
    def flash_attn_varlen_func(
        cls, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, **options: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        parts = zip(*(x.tensor_split(cu_seqlens_q[1:-1].long()) for x in (q, k, v)), strict=True)
        return torch.cat([cls.flash_attn_func(*(x[None] for x in part), **options)[0] for part in parts]), None


@pytest.mark.parametrize("mask", [{}, {"causal": False}, {"documents": _attend.RUNS}])
def test_packages_that_are_there_are_asked_the_same(mask: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", FlashAttention("flash_attn"))
    case = Attention(48, D=16, dtype="fp32", **mask)
    rows, peers = ready(case), _attend.Peers(on_cpu())
    forward = peers.forward(case, rows)
    backward = peers.backward(case, rows, forward)
    assert callable(forward["fa2"]) and callable(backward["fa2"])
    assert forward["fa3"] == backward["fa3"] == "no module flash_attn_interface"
    assert case.documents == () or forward["flash"] == "knows no documents"


def test_a_peer_that_is_wrong_or_fails_is_left_out() -> None:
    def fails(*_: object) -> Tensor:
        raise RuntimeError("no kernel image\nfor this device")

    case = Attention(48, D=16, dtype="fp32")
    rows, peers = ready(case), _attend.Peers(on_cpu())
    peers.kinds = {"zeros": lambda *_: lambda q, k, v: q * 0, "fails": lambda *_: fails}
    forward = peers.forward(case, rows)
    assert forward == {"zeros": "wrong: out is 1.0e+00 from ours", "fails": "RuntimeError: no kernel image"}
    assert peers.backward(case, rows, forward) == forward


def test_a_peer_that_fails_late_does_not_end_the_run() -> None:
    def fails() -> object:
        raise RuntimeError("out of memory")

    session = on_cpu()
    session.ceilings["matmul_tflop_per_s"] = 1.0
    found = _attend._times(session, 1.0, lambda: None, {"a": fails, "b": lambda: None, "c": "not there"})
    failed = {"unavailable": "RuntimeError: out of memory"}
    assert found["ms"] and found["peers"] == {"a": failed, "b": failed, "c": {"unavailable": "not there"}}


class Event:
    """Of a device whose clock is the number of calls made so far."""

    calls: list[str] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = len(self.calls)

    def elapsed_time(self, end: Event) -> float:
        return float(end.at - self.at)


@pytest.mark.parametrize("slow", [False, True])
def test_calls_are_timed_in_turn(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_measure, "COLD_BYTES", 8)
    monkeypatch.setattr(_measure, "SLOW", 0.0 if slow else 9.0)
    monkeypatch.setattr(_measure, "SECONDS", 0.0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(Event, "calls", [])
    stopwatch = _measure.Stopwatch(torch.device("cpu"), dry=False)
    found = stopwatch.time_all({"a": lambda: Event.calls.append("a"), "b": lambda: Event.calls.append("b")})
    repeats, warm_up = (3, 2) if slow else (7, 4)
    assert Event.calls == ["a"] * warm_up + ["b"] * warm_up + ["a", "b"] * repeats
    assert found == dict.fromkeys("ab", _measure.Timing(1.0, 1.0, 1.0, repeats))


@interpreted
def test_what_was_done_is_recorded_when_a_run_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (Movement(L, 1, 2, 1, 16, 16, 1, "fp16") for L in (8, 16))
    monkeypatch.setattr(_move, "DRY", (first, second))
    monkeypatch.setattr(gpu, "WRITE_EVERY", 0.0)

    def cut_off(q: Tensor, *others: Any) -> None:
        if q.size(1) == second.L:
            raise KeyboardInterrupt
        pack.pack(q, *others)

    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--interpret", "--part", "move", "--out", str(tmp_path)], Kernels(pack=cut_off))
    assert [case["case"] for case in records(tmp_path)["move"]["cases"]] == [str(first)] * 4


@interpreted
def test_a_run_goes_on_where_another_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (Movement(L, 1, 2, 1, 16, 16, 1, "fp16") for L in (8, 16, 24))
    calls: list[int] = []

    def counted(q: Tensor, *others: Any) -> None:
        calls.append(q.size(1))
        pack.pack(q, *others)

    def run(cases: tuple[Movement, ...], place: str, *more: str) -> dict[str, Any]:
        monkeypatch.setattr(_move, "DRY", cases)
        folder = tmp_path / place
        arguments = ["--interpret", "--part", "move", "--out", str(folder), *more]
        assert gpu.main(arguments, Kernels(pack=counted)) == 0
        return records(folder)["move"]

    run((first,), "a")
    calls.clear()
    found = run((first, second), "b", "--resume", str(tmp_path / "a"))
    assert set(calls) == {16}
    assert [case["case"] for case in found["cases"]] == [str(first)] * 4 + [str(second)] * 4
    calls.clear()
    run((first, second), "c", "--resume", str(tmp_path / "b"))
    assert calls == []
    (path,) = (tmp_path / "b").glob("*.json")
    record = json.loads(path.read_text())
    record["cases"][0]["ok"] = False  # a case with any fault is run again
    path.write_text(json.dumps(record))
    run((first, second, third), "d", "--resume", str(tmp_path / "b"))
    assert set(calls) == {8, 24}
    calls.clear()
    path.write_text(json.dumps(record | {"sources": "others"}))
    run((first,), "e", "--resume", str(tmp_path / "b"))
    assert set(calls) == {8}


def test_targets_are_held_against_every_case() -> None:
    def attention(kernel: str, case: str, ms: float, **peers: float) -> dict[str, Any]:
        theirs = {name: {"ms": {"p50": time}} for name, time in peers.items()} | {"fa2": {"unavailable": "no module"}}
        return {"kernel": kernel, "case": case, "ms": {"p50": ms}, "peers": theirs}

    text = targets(
        [
            {"kernel": "pack", "case": "p", "ms": {"p50": 1.0}, "share_of_copy": 0.95},
            {"kernel": "unpack", "case": "u", "ms": {"p50": 1.0}, "share_of_copy": 0.92},
            {"kernel": "pack_grad", "case": "g", "ms": {"p50": 1.0}, "share_of_copy": 0.5},  # has no target
            attention("attend_forward", "small", 2.0, flex=2.4, cudnn=1.0),
            attention("attend_forward", "large", 2.0, flex=2.0, cudnn=2.0),
            attention("attend_backward", "small", 2.0, cudnn=1.8),
            {"kernel": "attend_forward", "case": "refused", "ok": False},
        ]
    )
    lines = [line.split("  ") for line in text.splitlines()]
    found = {line[0]: [cell.strip() for cell in line[1:] if cell.strip()] for line in lines[1:]}
    assert found == {
        "pack and unpack >= 0.9 x copy": ["met", "2 of 2", "0.92", "0.935", "u"],
        "attend_forward >= 1.1 x flex": ["not met", "1 of 2", "1", "1.1", "large"],
        "attend_forward >= 1.3 x flash": ["not measured", "-", "-", "-", "-"],
        "attend_forward >= 1 x cudnn": ["not met", "1 of 2", "0.5", "0.75", "small"],
        "attend_backward >= 1.2 x fa2": ["not measured", "-", "-", "-", "-"],
        "attend_backward >= 0.9 x cudnn": ["met", "1 of 1", "0.9", "0.9", "small"],
    }


@interpreted
def test_a_wrong_kernel_is_not_timed(tmp_path: Path) -> None:
    """One that leaves out the last token, and one with another scale."""

    def without_the_last_token(q, k, v, rows, transform=None) -> None:
        pack.pack(q, k, v, rows, transform)
        rows[-1].q[-1] = float("nan")

    def with_another_scale(*args) -> None:
        *tensors, options = args
        attend_forward.attend_forward(*tensors, options._replace(scale=options.scale * 1.05))

    kernels = Kernels(pack=without_the_last_token, attend_forward=with_another_scale)
    assert gpu.main(["--interpret", "--part", "attend,move", "--out", str(tmp_path)], kernels) == 1
    found = records(tmp_path)
    assert set(found) == {"move", "attend"}
    for case in [*found["move"]["cases"], *found["attend"]["cases"]]:
        wrong = case["kernel"] in ("pack", "attend_forward")
        assert case["ok"] is not wrong and ("ms" in case) is not wrong and ("refused" in case) is wrong, case
    packs = [case for case in found["move"]["cases"] if case["kernel"] == "pack"]
    assert packs[0]["errors"]["q"]["error"] > 0 and packs[1]["refused"].startswith("wrong at: fp16")


@interpreted
def test_a_kernel_that_fails_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such instruction")

    assert gpu.main(["--interpret", "--part", "move", "--out", str(tmp_path)], Kernels(unpack=broken)) == 1
    assert "WRONG: unpack" in capsys.readouterr().out
    (unpack,) = [case for case in records(tmp_path)["move"]["cases"] if case["kernel"] == "unpack"]
    assert "no such instruction" in unpack["failure"]


@interpreted
def test_cases_past_the_budget_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--interpret", "--part", "check,attend", "--seconds", "0", "--out", str(tmp_path)]) == 0
    for record in records(tmp_path).values():
        assert record["cases"] == [] and len(record["skipped"]) >= 2
    assert "skipped, out of time" in capsys.readouterr().out


def test_parts_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()] == list(PARTS)
    with pytest.raises(SystemExit) as error:
        gpu.main(["--part", "move,fly"])
    assert error.value.code == 2 and "no part fly; there are check, move" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    process = start("-m", "bench.gpu")
    assert process.returncode == 2 and process.stdout == "" and len(process.stderr.splitlines()) == 1
    assert "no GPU" in process.stderr


def test_commit_is_read_without_git(tmp_path: Path) -> None:
    assert commit(tmp_path) == "unknown"
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text("# pack-refs\nabc123 refs/heads/main\n")
    assert commit(tmp_path) == "abc123"
    (git / "refs" / "heads" / "main").write_text("def456\n")
    assert commit(tmp_path) == "def456"
