"""`ulysses-triton verify`: it holds, it notices an op that does not, and wrong use has an exit status of its own."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch

from ulysses_triton import UlyssesGroup, cli, truth, verify
from ulysses_triton.case import Case, Layer, draw, exact

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--tokens 45 --heads 4 --kv-heads 2 --head-dim 16 --repeats 1".split()
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1", "--standalone")

# The command, with rows that arrive from another rank off by a little.
BROKEN = """
import sys
from ulysses_triton import cli, executor

right = executor.forward

def wrong(*arguments):
    out, *others = right(*arguments)
    out[:, -1] *= 1.001
    return out, *others

executor.forward = wrong
sys.exit(cli.main(["verify", *sys.argv[1:]]))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "WORLD_SIZE")}
    environment = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def table(text: str) -> dict[str, tuple[float, float, bool]]:
    lines = re.findall(r"^(\w+) +(\S+) +(\S+)  (yes|NO)$", text, re.MULTILINE)
    return {name: (float(error), float(allowed), ok == "yes") for name, error, allowed, ok in lines}


def test_it_holds_on_two_ranks() -> None:
    options = ["--dtype", "bf16", "--uneven", "--rope", "--qk-norm", "--recompute", "--window", "30", "-1", "--alibi"]
    options += ["--documents", "4", "--softcap", "9", "--sinks", "--dropout", "0.2"]
    process = run(*TORCHRUN, "-m", "ulysses_triton.cli", "verify", *SMALL, *options)
    assert process.returncode == 0, process.stdout + process.stderr
    found = table(process.stdout)
    assert list(found) == ["out", "dq", "dk", "dv", "dq_norm", "dk_norm", "dsinks", "dslopes"]
    assert all(0 < error <= allowed and ok for error, allowed, ok in found.values())
    assert "in shards of 15, 30" in process.stdout and "all 45 query rows" in process.stdout
    assert "this library, 2 ranks" in process.stdout and "one device" in process.stdout
    options = "window (30, -1), softcap 9.0, 4 documents, sinks, ALiBi, dropout 0.2"
    assert f"SDPA is timed without {options}, QK-norm and RoPE" in process.stdout
    assert "exchange: shm" in process.stdout and process.stdout.count("It holds.") == 1


def test_a_wrong_op_does_not_hold() -> None:
    """Ranks leave with 1; torchrun may end the other one first."""
    process = run(*TORCHRUN, "--no-python", sys.executable, "-c", BROKEN, *SMALL)
    assert process.returncode == 1
    found = table(process.stdout)
    assert not found["out"][2] and found["dv"][2]
    assert "It does NOT hold." in process.stdout and "SDPA" not in process.stdout
    assert set(re.findall(r"exitcode *: (-?\d+)", process.stderr)) in ({"1"}, {"1", "-15"}), process.stderr


OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": (9, 2), "causal": False},
    "softcap": {"softcap": 1.5},
    "documents": {"documents": 5},
    "documents of two": {"documents": 5, "batch": 2, "causal": False},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "dropout": {"dropout": 0.3},
    "all": {
        "window": (20, -1), "softcap": 5.0, "documents": 4, "sinks": True, "alibi": True, "dropout": 0.2, "rope": True,
        "uneven": True, "dtype": "bf16",
    },
}  # fmt: skip


def verdicts(group: UlyssesGroup, options: dict[str, Any]) -> dict[str, list[verify.Row]]:
    """Of the op, and of the op without each of the options in turn, as if it did not know it."""
    case = Case(45, heads=4, head_dim=16, value_dim=16, attention="reference", ranks=group.size, **options)
    inputs, rows = draw(case, torch.device("cpu")), torch.arange(case.tokens)
    layers = {"right": Layer(case, inputs, group)}
    off = {"window": None, "softcap": None, "documents": 0, "dropout": 0.0}
    for name in options.keys() & off.keys():
        layers[name] = Layer(replace(case, **{name: off[name]}), inputs._replace(ids=None), group)
    for name, given in {"sinks": inputs.sinks, "slopes": inputs.slopes}.items():
        if given is not None:
            layers[name] = Layer(case, inputs._replace(**{name: given + 0.5}), group)
    return {n: verify.compare(case, group.rank, layer.results(), inputs, rows) for n, layer in layers.items()}


def verdicts_on_process(ctx: Any, options: dict[str, Any]) -> dict[str, list[verify.Row]]:
    with UlyssesGroup() as group:
        return verdicts(group, options)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_options_hold_and_their_absence_is_noticed(pool: Any, options: dict[str, Any], ranks: int) -> None:
    found = pool.fresh(ranks, verdicts_on_process, options)
    assert all(verdict == found[0] for verdict in found)
    for name, verdict in found[0].items():
        said = {row.name: row.ok for row in verdict}
        assert all(said.values()) if name == "right" else not said["out"] and not said["dv"], (name, verdict)
        assert ("dsinks" in said, "dslopes" in said) == ("sinks" in options, "alibi" in options)


def test_documents_have_one_that_is_empty_and_one_of_a_token() -> None:
    for seed, count in ((0, 3), (1, 4), (2, 9)):
        offsets = Case(30, documents=count, seed=seed).offsets(0)
        lengths = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
        assert len(lengths) == count and sum(lengths) == 30 and 0 in lengths and 1 in lengths and min(lengths) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--heads", "3"], "cannot share 2 kv heads"),
        (["--head-dim", "257"], "from 1 to 256"),
        (["--tokens", "0"], "--tokens 0; it must be at least 1"),
        (["--value-dim", "24", "--rope"], "equal --head-dim and --value-dim"),
        (["--rows", "0"], "--rows 0"),
        (["--dtype", "int8"], "invalid choice"),
        (["--documents", "2"], "--documents 2; it must be at least 3"),
        (["--window", "-2", "0"], "window = (-2, 0)"),
        (["--dropout", "1"], "dropout_p = 1.0"),
        (["--sinks", "--attention", "aten"], "does not know sinks"),
    ],
    ids=["heads", "head-dim", "tokens", "rope", "rows", "dtype", "documents", "window", "dropout", "aten"],
)
def test_wrong_use_is_2(options: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(["verify", *SMALL, *options])
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2 and reason in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", *SMALL, "--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("attention", ["reference", "aten"])
@pytest.mark.parametrize("options", [[], ["--no-causal"], ["--rope"], ["--rows", "7"]], ids=" ".join)
def test_one_rank_holds(attention: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", *SMALL, "--attention", attention, *options]) == 0
    said = capsys.readouterr().out
    assert len(table(said)) == 4 and f"attention: {attention}" in said
    assert ("drawn at random" in said) is ("--rows" in options)


def test_fp64_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", *SMALL, "--dtype", "fp64", "--rope", "--qk-norm"]) == 0
    assert all(allowed == 1e-13 for _, allowed, _ in table(capsys.readouterr().out).values())


def test_rows_that_were_not_drawn_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in dq of a row outside of the sample shows all the same, because it must be zero there."""
    case = Case(40, 1, 4, 2, 16, 16)
    inputs, rows = draw(case, torch.device("cpu")), torch.tensor([0, 11, 39])
    some = inputs.zero_but(rows)
    everything = exact(case, some, torch.arange(40))
    right = {name: x.clone() for name, x in everything.items()}
    assert all(row.ok for row in verify.compare(case, 0, right, some, rows))
    right["dq"][0, 20, 1, 3] = 1e-3
    right["out"][0, 5, 0, 0] = math.nan
    assert {row.name for row in verify.compare(case, 0, right, some, rows) if not row.ok} == {"dq", "out"}


EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window softcap": {"window": (7, 2), "softcap": 1.5},
    "documents dropout": {"documents": torch.tensor([[0] * 9 + [2] * 21, [1] * 29 + [4]]), "dropout": (0.3, 9 << 33)},
    "sinks slopes": {
        "sinks": torch.tensor([0.5, -1, 2, 0]),
        "slopes": torch.tensor([0.5, 0.1, 0.02, 0]),
        "softcap": 3.0,
    },
}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=list(EXTRAS))
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "dense"])
def test_truth_is_the_oracle(causal: bool, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In many small blocks, against scores all at once and autograd."""
    monkeypatch.setattr(truth, "BLOCK_BYTES", 8 * 2 * 30 * 7)
    q, k, v, dout = (torch.randn(2, 30, h, 8, dtype=torch.float64).requires_grad_() for h in (4, 2, 2, 4))
    ids = extra.get("documents")
    ids = None if ids is None else (ids, ids)
    kept = oracle.allowed(30, 30, causal=causal, window=extra.get("window"), documents=ids).unsqueeze(-3)
    sinks, slopes = (extra[n].double().requires_grad_() if n in extra else None for n in ("sinks", "slopes"))
    p, seed = extra.get("dropout", (0.0, 0))
    out, lse = oracle.attention(
        q, k, v, kept=kept.expand(2, 4, 30, 30), scale=0.3, softcap=extra.get("softcap"), sinks=sinks,
        bias=None if slopes is None else -slopes[:, None, None] * oracle.distances(30, 30),
        stay=oracle.stays(p, seed, 2, range(4), 30, 30) if p else None, p=p,
    )  # fmt: skip
    dlse = torch.randn_like(lse)
    leaves = [x for x in (q, k, v, sinks, slopes) if x is not None]
    grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    options = {"causal": causal, "scale": 0.3, **extra}
    found = truth.attention(*(x.detach() for x in (q, k, v, dout)), dlse=dlse, **options)
    found = found._replace(dsinks=found.dsinks.sum((0, 1)), dslopes=found.dslopes.sum((0, 1)))
    for got, want in zip(found, (out, lse, *grads), strict=sinks is not None):
        assert truth.relative_error(got, want.detach()) < 1e-14
    rows = torch.tensor([3, 4, 29])
    some = truth.attention(
        q.detach()[:, rows], k.detach(), v.detach(), dout.detach()[:, rows], rows=rows, **options
    )  # fmt: skip
    assert truth.relative_error(some.out, out.detach()[:, rows]) < 1e-14


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_rotation_is_the_oracle(interleaved: bool) -> None:
    x, angles = torch.randn(2, 9, 3, 16, dtype=torch.float64), torch.rand(9, 6, dtype=torch.float64)
    got = truth.rotate(x, angles, interleaved=interleaved)
    assert truth.relative_error(got, oracle.rope(x, angles, interleaved)) < 1e-15
