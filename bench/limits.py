"""Which head counts, on how many ranks, our layer and its rivals take, and what they do with those they do not.

    make limits                                 # from the root of the repository; some minutes
    make limits ARGS="--heads 28 --kv-heads 4 --ranks 8"

The rivals' environment is that of `make peers`. Every cell is a run of its own: ranks are processes of this machine
that meet over gloo, with one thread each; forward and backward of a causal layer in fp32, one sequence, held against
single-device attention in fp64. "right" and "wrong" come with the largest relative error of out, dq, dk and dv. What
raises or dies (its process ends) has its message below the table. Where a rank has neither result nor error at the
deadline, it hangs, and the message is that of those which raised. "a, then b" are two layers of one process, made
together, used in turn.

DeepSpeed is `DistributedAttention`, with the mesh that `deepspeed.initialize` makes and with nothing but the group that
it is given; ALST is its `UlyssesSPAttentionHF` for transformers, which accelerate and the Trainer of transformers use.
yunchang is `UlyssesAttention`. Without rivals installed it shows ours alone. Exit status: 1 if ours is wrong, hangs or
dies.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
import torch.distributed as dist

from ulysses_triton import truth
from ulysses_triton.case import Case, draw, exact

from . import _record
from ._contestants import missing
from ._limits import MODULES, NAMES, tell

Row = TypeVar("Row")

START = 300.0  # seconds that processes may take to import everything and to meet


def _case(heads: int, kv_heads: int, ranks: int, tokens: int = 256) -> Case:
    return Case(tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=16, value_dim=16, ranks=ranks)


TABLE = (
    (_case(8, 8, 4),),  # fits everywhere
    (_case(6, 6, 4),),
    (_case(8, 2, 4),),
    (_case(8, 1, 8),),
    (_case(3, 3, 4),),
    (_case(28, 4, 8),),
    (_case(8, 8, 4, tokens=62),),
    (_case(40, 40, 16),),
    (_case(12, 6, 4),),
    (_case(8, 8, 4), _case(4, 4, 4)),
    (_case(8, 8, 4), _case(6, 6, 4)),
)


class Silent:
    """A rank that said nothing by the deadline."""


class Ended:
    """A rank whose process ended."""


class Found(NamedTuple):
    """What became of one contestant's run: `verdict` is "right", "wrong", "raises", "hangs" or "dies"."""

    verdict: str
    error: float | None = None  # of what is right or wrong; infinite for another shape
    message: str = ""

    @property
    def fine(self) -> bool:
        return self.verdict in ("right", "raises")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    asked = _arguments(argv)
    needs = {name: [module.partition(".")[0] for module in modules] for name, modules in MODULES.items()}
    names = [name for name, packages in needs.items() if not missing(packages)]
    about = _record.environment(torch.device("cpu"), dry=False)
    packages = dict.fromkeys(package for name in names for package in needs[name])
    about["versions"] |= {package: version(package) for package in packages}
    print(f"{_record.versions(about)}; commit {about['commit']}, sources {about['sources']}")
    for name in needs:
        if name not in names:
            print(f"{name} is not installed here: `make limits` runs this where it is")
    rows = [(title(cases), cases) for cases in ([(asked.case,)] if asked.case else TABLE)]
    about["deadline"] = asked.deadline
    return show("", names, rows, lambda name, cases: attempt(name, cases, asked.deadline), "limits", about, asked.out)


def show(
    corner: str, names: Sequence[str], rows: Sequence[tuple[str, Row]], run: Callable[[str, Row], Found],
    part: str, about: dict[str, Any], folder: Path | None,
) -> int:  # fmt: skip
    """Run every contestant on every row; print the table and its messages, write the record of `part`.

    Returns the exit status, 1 if ours fails.
    """
    print(f"\n|{f' {corner}' if corner else ''} | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}", flush=True)
    messages: list[str] = []
    records = []
    for said, row in rows:
        found = {name: run(name, row) for name in names}
        records += [{"case": said, "contestant": name, "ok": x.fine, **x._asdict()} for name, x in found.items()]
        print(f"| {said} | {' | '.join(cell(x, messages) for x in found.values())} |", flush=True)
    print()
    for number, message in enumerate(messages, 1):
        print(f"{number}. {message}")
    print(f"record: {_record.write(folder or _record.default_folder(), part, about | {'cases': records})}")
    return 0 if all(record["ok"] for record in records if record["contestant"] == "ours") else 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m bench.limits", description=lines[0])
    parser.add_argument("--heads", type=int, metavar="N", help="query heads: this layer alone in place of the table")
    parser.add_argument("--kv-heads", type=int, metavar="N", help="as many as --heads, if not given")
    parser.add_argument("--ranks", default=4, type=int, metavar="N", help="for --heads (default: %(default)s)")
    parser.add_argument("--seq", default=256, type=int, metavar="N", help="tokens for --heads (default: %(default)s)")
    parser.add_argument("--deadline", default=30.0, type=float, metavar="N", help="seconds (default: %(default)g)")
    parser.add_argument(
        "--out", default=None, type=Path, metavar="FOLDER", help="for the record; else $OUT or bench/results"
    )
    found = parser.parse_args(argv)
    found.case = _case(found.heads, found.kv_heads or found.heads, found.ranks, found.seq) if found.heads else None
    return found


def title(cases: Sequence[Case]) -> str:
    def heads(case: Case) -> str:
        if case.kv_heads == case.heads:
            return f"{case.heads} heads"
        return f"{case.heads} heads, {case.kv_heads} kv"

    tokens = f", {cases[0].tokens} tokens" if cases[0].tokens % cases[0].ranks else ""
    return f"{', then '.join(map(heads, cases))}{tokens} / {cases[0].ranks} ranks"


def cell(found: Found, messages: list[str]) -> str:
    """A cell of the table; a message that is new joins the others."""
    text = found.verdict if found.fine else f"**{found.verdict}**"
    if found.error is not None:
        text += f", {found.error:.0e}"
    if found.message:
        if found.message not in messages:
            messages.append(found.message)
        text += f" ({messages.index(found.message) + 1})"
    return text


def attempt(name: str, cases: Sequence[Case], deadline: float) -> Found:
    """Run a contestant's layers on ranks of their own, and judge what these have said by the deadline, in seconds."""
    modules = ["bench._limits", *(module for modules in MODULES.values() for module in modules)]
    said = told(tell, (name, cases), cases[0].ranks, modules, deadline)
    return said if isinstance(said, Found) else judge(cases, said)


def told(
    tell: Callable[..., None], given: tuple[object, ...], ranks: int, modules: Sequence[str], deadline: float
) -> list[Any] | Found:
    """What every rank of a run says by the deadline, in seconds; why it says nothing, if a process ended.

    Args:
        tell: what ranks do, as `_limits.tell`: called with (rank, port, *given, pipe, path for stderr).
        modules: what the first run imports for all, as it takes long.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*modules])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    with tempfile.TemporaryDirectory() as folder:
        stderr = [Path(folder, f"{rank}.txt") for rank in range(ranks)]
        try:
            for rank, path in enumerate(stderr):
                ours, theirs = context.Pipe()
                arguments = (rank, store.port, *given, theirs, path)
                processes.append(context.Process(target=tell, args=arguments, daemon=True))
                with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):  # DeepSpeed reads it as it is imported
                    os.environ.pop("TRITON_INTERPRET", None)  # it would put the kernels in the place of PyTorch's
                    processes[-1].start()
                theirs.close()
                pipes.append(ours)
            if any(said is not None for said in _hear(pipes, START)):
                raise RuntimeError(f"{given[0]}: ranks did not begin: {''.join(path.read_text() for path in stderr)}")
            heard = _hear(pipes, deadline)
        finally:
            for process in processes:
                process.kill()
                process.join()
        if Ended in heard:
            (why, *_) = [path.read_text() for path, said in zip(stderr, heard, strict=True) if said is Ended]
            return Found("dies", message=_short(why.partition("what():")[2] or why))
    return heard


def _hear(pipes: Sequence[connection.Connection], seconds: float) -> list[Any]:
    """One answer of each rank: `Silent` where there is none in time, `Ended` where there will be none."""
    heard: list[Any] = [Silent] * len(pipes)
    waiting, end = list(pipes), time.monotonic() + seconds
    while waiting and (ready := connection.wait(waiting, timeout=max(0.0, end - time.monotonic()))):
        for pipe in ready:
            waiting.remove(pipe)
            try:
                heard[pipes.index(pipe)] = pipe.recv()
            except EOFError:
                heard[pipes.index(pipe)] = Ended
    return heard


def judge(cases: Sequence[Case], heard: Sequence[Any]) -> Found:
    """The verdict on what the ranks said: an error, `Silent`, or arrays of every case's out, dq, dk, dv."""
    if failure := failed(heard):
        return failure
    worst = max(_error(case, [said[i] for said in heard]) for i, case in enumerate(cases))
    return Found("right" if worst <= truth.allowed(cases[0].torch_dtype, 0.0) else "wrong", worst)


def failed(heard: Sequence[Any]) -> Found | None:
    """What became of a run in which not every rank has results."""
    errors = [said for said in heard if isinstance(said, str)]
    message = _short(errors[0]) if errors else ""
    if Silent in heard:
        return Found("hangs", message=f"{len(errors)} of {len(heard)} ranks: {message}" if message else "")
    return Found("raises", message=message) if errors else None


def _short(text: str) -> str:
    return textwrap.shorten(re.sub(r"/\S+/", "", text), 300)  # of a path, its last part


def _error(case: Case, results: Sequence[Sequence[Any]]) -> float:
    """The largest relative error of one case's results: by rank, arrays of out, dq, dk and dv."""
    expected = exact(case, draw(case, torch.device("cpu")), torch.arange(case.tokens))
    worst = 0.0
    for i, name in enumerate(NAMES):
        shards = [torch.from_numpy(said[i]) for said in results]
        if any(x.shape != expected[name][:, case.shard(rank)].shape for rank, x in enumerate(shards)):
            return math.inf
        worst = max(worst, truth.relative_error(torch.cat(shards, 1), expected[name]))
    return worst


if __name__ == "__main__":
    sys.exit(main())
