"""`python -m bench.limits`: what it makes of what ranks say, its table, and a smallest run of ours."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ulysses_triton.case import Case, draw, exact

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benches are in no package that is installed

from bench import _limits, limits  # noqa: E402

sys.path.remove(str(ROOT))  # where `kernels` would pass for another project's package

CASE = Case(tokens=9, heads=3, kv_heads=1, head_dim=4, value_dim=4, ranks=2)


def right() -> list[list[torch.Tensor]]:
    """By rank: out, dq, dk, dv."""
    whole = exact(CASE, draw(CASE, torch.device("cpu")), torch.arange(CASE.tokens))
    return [[whole[name][:, CASE.shard(rank)] for name in _limits.NAMES] for rank in range(CASE.ranks)]


def said(results: list[list[torch.Tensor]]) -> list[Any]:
    return [[[x.contiguous().numpy() for x in of_rank]] for of_rank in results]


def test_results_are_held_against_the_truth_by_shape_and_by_value():
    found = limits.judge((CASE,), said(right()))
    assert found.verdict == "right" and found.error < 1e-6 and found.fine
    results = right()
    results[1][2] = -results[1][2]
    found = limits.judge((CASE,), said(results))
    assert found.verdict == "wrong" and 0.1 < found.error < math.inf and not found.fine
    results[0][0] = results[0][0][:, :, :2]
    assert limits.judge((CASE,), said(results)) == ("wrong", math.inf, "")
    both = [x + y for x, y in zip(said(right()), said(results), strict=True)]
    assert limits.judge((CASE, CASE), both).verdict == "wrong"


def test_silence_and_errors_are_told_apart():
    (fine, _), silent = said(right()), limits.Silent
    assert limits.judge((CASE,), [fine, "E: 3 %\n 2 in /a/b.cc:4"]) == ("raises", None, "E: 3 % 2 in b.cc:4")
    assert limits.judge((CASE,), [silent, "E: 3 % 2"]) == ("hangs", None, "1 of 2 ranks: E: 3 % 2")
    assert limits.judge((CASE,), [silent, fine]) == ("hangs", None, "")


def test_cells_share_their_messages():
    messages: list[str] = []
    refused = limits.Found("raises", message="no")
    cells = [limits.cell(x, messages) for x in (refused, limits.Found("hangs", message="so"), refused)]
    assert cells == ["raises (1)", "**hangs** (2)", "raises (1)"] and messages == ["no", "so"]
    assert limits.cell(limits.Found("right", 2.4e-7), messages) == "right, 2e-07"
    titles = {limits.title(x) for x in limits.TABLE}
    assert titles >= {"3 heads / 4 ranks", "8 heads, 2 kv / 4 ranks", "8 heads, then 6 heads / 4 ranks"}
    assert "8 heads, 62 tokens / 4 ranks" in titles and len(titles) == len(limits.TABLE)


def test_the_smallest_run_shows_ours_and_says_what_to_install(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OUT": str(tmp_path)}
    absent = "import sys; sys.modules |= dict.fromkeys(['deepspeed', 'transformers', 'yunchang']); "
    options = ["--heads", "3", "--kv-heads", "1", "--ranks", "3", "--seq", "2"]
    done = subprocess.run(
        [sys.executable, "-c", f"{absent}from bench import limits; sys.exit(limits.main({options}))"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deepspeed ALST is not installed here: `make limits`" in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("| 3 heads, 1 kv, 2 tokens / 3 ranks |"))
    assert row.split("|")[2].strip().startswith("right, ")
    (path,) = tmp_path.iterdir()
    (case,) = json.loads(path.read_text())["cases"]
    assert (case["contestant"], case["verdict"], case["ok"]) == ("ours", "right", True) and case["error"] < 1e-6


def _refuse(cases):
    """Rank 1 refuses what rank 0 begins: its C++ ends it, or it leaves rank 0 waiting."""
    if torch.distributed.get_rank() == 1:
        if cases[0].tokens == 1:
            os.write(2, b"terminate called after throwing\n  what():  [/x/y.cc:3] no such size\n")
            os.abort()
        raise ValueError("no such heads")
    torch.distributed.barrier()


def _tell(*arguments):
    _limits.BUILDERS["half"], _limits.MODULES["half"] = _refuse, ()
    _limits.tell(*arguments)


def test_who_hangs_or_dies_is_found(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(limits, "tell", _tell)
    spawn = multiprocessing.get_context("spawn")  # the one server of this process belongs to the pool
    monkeypatch.setattr(limits.multiprocessing, "get_context", lambda name: spawn)
    assert limits.attempt("half", (CASE,), 1.0) == ("hangs", None, "1 of 2 ranks: ValueError: no such heads")
    one = dataclasses.replace(CASE, tokens=1)
    assert limits.attempt("half", (one,), 1.0) == ("dies", None, "[y.cc:3] no such size")
