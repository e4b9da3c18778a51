"""Our layer against DeepSpeed, yunchang's Ulysses and USP, PyTorch's context parallel, Megatron's way, and rings.

    make peers                                     # from the root of the repository; under 10 minutes
    make peers ARGS="--part exchange --seq 32768"

puts the libraries into a virtual environment of their own, .venv-peers, the first time, and then runs
`python -m bench.peers` there. Ranks are processes: with `--device cuda`, the default where there are several GPUs, one
per GPU over NCCL (this was never run), else on CPUs of this host over gloo, one thread each.

All contestants get the same tensors, one sequence, causal, in the layout and order each is made for, and the same local
attention, PyTorch's flash kernel, ours also as it is shipped. There are three parts: `attention`, a whole layer;
`exchange`, with an identity in attention's place, which gives q for the output, and the output's gradient for those of
q, k and v, so that all messages travel; and `scaling`, whole layers of ever more tokens on ever more ranks. Megatron's
way and the rings are our own and described in `bench/baselines.py`; a ring moves while it attends, so it has no part in
`exchange`.

What is wrong against fp64 or raises is said, and not timed. The rest takes turns within one run, in the same
processes, each time in another order; a time is forward + backward of the slowest rank.
Counted on rank 0, forward + backward: collectives of the data (or hops), messages of control, copies (`aten::copy_`
and `aten::cat`; one-sided they are the transfer) and their bytes, bytes for other ranks by what is handed over, by the
method's formula and by what TCP sockets sent (shared memory has none), bytes that backward keeps beside the inputs,
and in `scaling` the peaks of live tensors and of resident memory. `others` is how many cores other programs kept busy
meanwhile: 0 if the machine was quiet.

    python -m bench.peers --quick               # toy sizes: the checks are real, the times mean nothing

Exit status: 0 all contestants of ours are right, 1 one is not, 2 it could not run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ulysses_triton.case import Case

from . import _record
from ._contestants import PARTS, PEERS, missing
from ._peer_tables import scaling, show, targets
from ._peers import Asked, serve, variables

# Tokens of the whole sequence by part and dtype, if nothing is said. In fp32 USP's rings are wrong.
SEQ = {"attention": {"fp32": [2048, 8192], "bf16": [2048]}, "exchange": {"fp32": [2048, 8192, 32768]}}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    asked = _arguments(argv)
    packages = {name: package for name in asked.peers if (package := PEERS[name].package)}
    absent = missing(list(dict.fromkeys(packages.values())))
    about = _record.environment(torch.device(asked.device), dry=asked.quick)
    about["versions"] |= _versions(name for name in dict.fromkeys(packages.values()) if name not in absent)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    print(f"{about['device']['name']}, {about['cpus']} CPUs, load {about['load'][0]:.2f}; {versions}; "
          f"commit {about['commit']}, sources {about['sources']}")  # fmt: skip
    for name in absent:
        print(f"{name} is not installed here: `make peers` runs this where it is")
    if asked.quick:
        print("QUICK: toy sizes, the times mean nothing")
    records: list[dict[str, Any]] = []
    path, failure = None, None
    peers = tuple(name for name in asked.peers if packages.get(name) not in absent)
    for tables in _runs(asked):
        told = Asked(tuple(tables), peers, asked.repeat, asked.seconds, asked.device)
        try:
            for fresh in _run(told):
                records += fresh
                print(f"\n== {fresh[0]['part']}: {fresh[0]['case']}\n{show(fresh)}", flush=True)
                path = _record.write(asked.out, "peers", about | {"cases": records})
        except RankError as error:
            failure = error
            print(f"bench.peers: with {told.ranks} ranks: {error}", file=sys.stderr)
    print(f"\n{scaling(records)}\n== targets\n{targets(records)}")
    if path:
        print(f"record: {path}")
    if failure:
        return 2
    return 0 if all(r["ok"] for r in records if r["ours"]) else 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    lines = (__doc__ or "").splitlines()
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=lines[0])
    many = {"type": _numbers, "metavar": "N[,N]"}
    parser.add_argument("--part", default=PARTS, type=_names(PARTS), metavar="NAME[,NAME]", help=", ".join(PARTS))
    parser.add_argument("--peers", default=PEERS, type=_names(PEERS), metavar="NAME[,NAME]", help=", ".join(PEERS))
    parser.add_argument("--seq", help="tokens of the whole sequence, but in `scaling`", **many)
    parser.add_argument("--ranks", help="how many processes, but in `scaling`; default 4, or all GPUs", **many)
    parser.add_argument("--scaling", help="how many processes in `scaling`; default 1,2,4,8", **many)
    parser.add_argument("--per-rank", default=1024, type=int, metavar="N", help="tokens of a rank in `scaling`")
    parser.add_argument("--heads", default=8, type=int, metavar="N", help="query heads")
    parser.add_argument("--kv-heads", default=[8], **many)
    parser.add_argument("--dim", default=64, type=int, metavar="N", help="of a head")
    known = ("fp32", "bf16", "fp16")
    parser.add_argument("--dtype", type=_names(known), metavar="NAME[,NAME]", help="default fp32, or bf16 on GPUs")
    parser.add_argument("--device", default="cuda" if gpus > 1 else "cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--repeat", default=25, type=int, metavar="N", help="times at most (3 at least, 1 where it is slow)"
    )
    parser.add_argument("--seconds", default=20.0, type=float, metavar="N", help="about this long for a table")
    parser.add_argument("--quick", action="store_true", help="256 tokens on 2 ranks, to see that it runs")
    parser.add_argument(
        "--out", default=None, type=Path, metavar="FOLDER", help="for records; else $OUT or bench/results"
    )
    found = parser.parse_args(argv)
    on_gpus = found.device == "cuda"
    found.dtype = found.dtype or (["bf16"] if on_gpus else None)
    found.ranks = found.ranks or [gpus if on_gpus else 4]
    found.scaling = found.scaling or [n for n in (1, 2, 4, 8) if not on_gpus or n <= gpus]
    if found.quick:
        found.seq, found.ranks, found.scaling, found.per_rank, found.repeat = [256], [2], [1, 2], 128, 3
    found.out = found.out or _record.default_folder()
    for ranks in {*found.ranks, *found.scaling}:
        if ranks < (2 if ranks in found.ranks else 1) or found.heads % ranks or (on_gpus and ranks > gpus):
            parser.error(
                f"{ranks} ranks for {found.heads} heads{f' and {gpus} GPUs' * on_gpus}: at least 2 (1 in `scaling`), a "
                "divisor of the heads, and on GPUs at most one each"
            )
    for tokens in found.seq or ():
        for ranks in found.ranks:
            if tokens % ranks:
                parser.error(f"{ranks} ranks do not divide {tokens} tokens")
    for kv_heads in found.kv_heads:
        if found.heads % kv_heads:
            parser.error(f"--kv-heads {kv_heads} does not divide --heads {found.heads}")
    return found


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        asked = [name for name in text.split(",") if name]
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; there are {', '.join(known)}")
        return asked

    return names


def _versions(names: Iterable[str]) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in names}


def _runs(asked: argparse.Namespace) -> Iterator[list[tuple[str, Case]]]:
    """The tables of each set of processes. Scaling has new ones, whose memory nothing else has touched."""

    def cases(part: str, ranks: int, by_dtype: dict[str, list[int]]) -> Iterator[tuple[str, Case]]:
        for dtype, lengths in by_dtype.items():
            for kv_heads in asked.kv_heads:
                for tokens in lengths:
                    yield part, Case(
                        tokens=tokens, heads=asked.heads, kv_heads=kv_heads, head_dim=asked.dim, value_dim=asked.dim,
                        dtype=dtype, ranks=ranks,
                    )  # fmt: skip

    parts = [part for part in asked.part if part != "scaling"]
    for ranks in asked.ranks if parts else ():
        yield [table for part in parts for table in cases(part, ranks, _lengths(asked, part))]
    for ranks in asked.scaling if "scaling" in asked.part else ():
        yield list(cases("scaling", ranks, {dtype: [asked.per_rank * ranks] for dtype in asked.dtype or ["fp32"]}))


def _lengths(asked: argparse.Namespace, part: str) -> dict[str, list[int]]:
    """Tokens to measure, by dtype."""
    dtypes = asked.dtype or list(SEQ[part])
    return {dtype: asked.seq or SEQ[part].get(dtype, SEQ[part]["fp32"]) for dtype in dtypes}


class RankError(Exception):
    """A rank ended before all was measured."""


def _run(asked: Asked) -> Iterator[list[dict[str, Any]]]:
    """Start the ranks, and pass on what they find; ends them all."""
    ranks = asked.ranks
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    try:
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=serve, args=(rank, store.port, asked, theirs), daemon=True)
            with mock.patch.dict(os.environ, variables(rank, ranks, store.port, asked.device)):
                os.environ.pop("TRITON_INTERPRET", None)  # it would put the kernels in the place of PyTorch's
                process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        waiting = list(pipes)
        while waiting:
            for pipe in connection.wait(waiting):
                rank = pipes.index(pipe)
                try:
                    said = pipe.recv()
                except EOFError:
                    processes[rank].join()
                    raise RankError(f"rank {rank} ended with exit code {processes[rank].exitcode}") from None
                if isinstance(said, str):
                    raise RankError(f"rank {rank} failed:\n{said}")
                if said is None:
                    waiting.remove(pipe)
                else:
                    yield said
    finally:
        for process in processes:
            process.kill()
            process.join()


if __name__ == "__main__":
    sys.exit(main())
