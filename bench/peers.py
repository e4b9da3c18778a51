"""Our layer against DeepSpeed's `DistributedAttention` and yunchang's `UlyssesAttention`, on CPU ranks of this host.

    make peers ARGS="--seq 2048,8192,32768 --ranks 4 --kv-heads 8"

from the root of the repository: it puts the peers into a virtual environment of their own, .venv-peers, the first time,
and then runs `python -m bench.peers` there, here with the defaults. Ranks are processes that meet over gloo, one thread
each. All contestants get the same tensors, one sequence, causal, in the layout each is made for (DeepSpeed
`[L, 1, H, D]`, its default and the one with fewest copies; the others `[1, L, H, D]`), and the same local attention:
PyTorch's flash kernel for CPUs, by a function around `scaled_dot_product_attention`; ours also runs as it is shipped,
where `attention="aten"` calls that kernel itself. The part `exchange` has an identity in attention's place: it gives q
for the output, and the output's gradient for those of q, k and v, so that all messages travel.

What is wrong against fp64 or raises is said, and not timed. The rest takes turns within one run, in the same processes;
a time is forward + backward of the slowest rank. Counted on rank 0, forward + backward: collectives of the data (or
hops of a one-sided exchange), messages of control, copies (`aten::copy_` and `aten::cat`; one-sided they are the
transfer) and their bytes, bytes for other ranks, and the bytes that backward keeps beside the inputs. `others` is how
many cores other programs kept busy meanwhile: 0 if the machine was quiet. Without peers it measures ours alone.

    python -m bench.peers --quick               # toy sizes: the checks are real, the times mean nothing

Exit status: 0 all contestants of ours are right, 1 one is not, 2 it could not run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from ulysses_triton.case import Case

from . import _record
from ._peers import PARTS, PEERS, Asked, missing, serve, variables
from ._session import verdict


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    asked = _arguments(argv)
    absent = missing(asked.peers)
    about = _record.environment(torch.device("cpu"), dry=asked.quick)
    about["versions"] |= _versions(name for name in asked.peers if name not in absent)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    about |= {"cpus": os.cpu_count(), "load": os.getloadavg()}
    print(f"{about['device']['name']}, {about['cpus']} CPUs, load {about['load'][0]:.2f}; {versions}; "
          f"commit {about['commit']}, sources {about['sources']}")  # fmt: skip
    for name in absent:
        print(f"{name} is not installed here: `make peers` runs this where it is")
    if asked.quick:
        print("QUICK: toy sizes, the times mean nothing")
    records: list[dict[str, Any]] = []
    path, failure = None, None
    peers = tuple(name for name in asked.peers if name not in absent)
    for ranks in asked.ranks:
        told = Asked(tuple(_cases(asked, ranks)), tuple(asked.part), peers, asked.repeat, asked.seconds)
        try:
            for fresh in _run(told):
                records += fresh
                print(f"\n== {fresh[0]['part']}: {fresh[0]['case']}\n{show(fresh)}", flush=True)
                path = _record.write(asked.out, "peers", about | {"cases": records})
        except RankError as error:
            failure = error
            print(f"bench.peers: with {ranks} ranks: {error}", file=sys.stderr)
    print(f"\n== targets\n{targets(records)}")
    if path:
        print(f"record: {path}")
    if failure:
        return 2
    return 0 if all(r["ok"] for r in records if r["ours"]) else 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=lines[0])
    many = {"type": _numbers, "metavar": "N[,N]"}
    parser.add_argument("--seq", default=[2048, 8192, 32768], help="tokens of the whole sequence", **many)
    parser.add_argument("--ranks", default=[4], help="how many processes", **many)
    parser.add_argument("--heads", default=8, type=int, metavar="N", help="query heads")
    parser.add_argument("--kv-heads", default=[8], **many)
    parser.add_argument("--dim", default=64, type=int, metavar="N", help="of a head")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--part", default=PARTS, type=_names(PARTS), metavar="NAME[,NAME]", help=", ".join(PARTS))
    parser.add_argument("--peers", default=PEERS, type=_names(PEERS), metavar="NAME[,NAME]", help=", ".join(PEERS))
    parser.add_argument("--repeat", default=25, type=int, metavar="N", help="times at most (3 at least)")
    parser.add_argument("--seconds", default=30.0, type=float, metavar="N", help="about this long for a table")
    parser.add_argument("--quick", action="store_true", help="256 tokens on 2 ranks, to see that it runs")
    parser.add_argument(
        "--out", default=None, type=Path, metavar="FOLDER", help="for records; else $OUT or bench/results"
    )
    found = parser.parse_args(argv)
    if found.quick:
        found.seq, found.ranks, found.repeat = [256], [2], 3
    found.out = found.out or _record.default_folder()
    for ranks in found.ranks:
        for tokens in found.seq:
            if ranks < 2 or found.heads % ranks or tokens % ranks:
                parser.error(
                    f"{ranks} ranks for {found.heads} heads and {tokens} tokens: at least 2, and a divisor of both"
                )
    for kv_heads in found.kv_heads:
        if found.heads % kv_heads:
            parser.error(f"--kv-heads {kv_heads} does not divide --heads {found.heads}")
    return found


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
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


def _cases(asked: argparse.Namespace, ranks: int) -> Iterator[Case]:
    for kv_heads in asked.kv_heads:
        for tokens in asked.seq:
            yield Case(
                tokens=tokens, heads=asked.heads, kv_heads=kv_heads, head_dim=asked.dim, value_dim=asked.dim,
                dtype=asked.dtype, ranks=ranks,
            )  # fmt: skip


class RankError(Exception):
    """A rank ended before all was measured."""


def _run(asked: Asked) -> Iterator[list[dict[str, Any]]]:
    """Start the ranks, and pass on what they find; ends them all."""
    ranks = asked.cases[0].ranks
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    try:
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=serve, args=(rank, store.port, asked, theirs), daemon=True)
            with mock.patch.dict(os.environ, variables(rank, ranks, store.port)):
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


# ---- what the records say


def fastest_peer(records: Sequence[dict[str, Any]]) -> float | None:
    """The lowest median among the peers of one table."""
    return min((r["ms"]["p50"] for r in records if not r["ours"] and "ms" in r), default=None)


def show(records: Sequence[dict[str, Any]]) -> str:
    """A line per contestant of one case and part."""
    best = fastest_peer(records)

    def line(r: dict[str, Any]) -> tuple[object, ...]:
        ms = r.get("ms", {})
        times = [ms.get(name) for name in ("p20", "p50", "p80")]
        ratio = ms["p50"] / best if best and ms else None
        sizes = [r.get(key) for key in ("copied_bytes", "wire_bytes", "saved_bytes")]
        megabytes = [None if size is None else size / 1e6 for size in sizes]
        counts = [r.get(key) for key in ("collectives", "control_messages", "copies")]
        said = "cannot" if "cannot" in r else verdict({"refused": "", **r})
        name = f"{r['contestant']} (default)" if r.get("default") else r["contestant"]
        return name, *times, ratio, *counts, *megabytes, ms.get("repeats"), f" {said}"

    header = ("", "p20 ms", "p50", "p80", "of faster peer", "collectives", "control", "copies")
    header += ("copied MB", "sent MB", "saved MB", "repeats", " check")
    text = _record.table(header, map(line, records))
    lines = [f"others: {r['others_cores']:.2f} cores busy with other programs" for r in records if "ms" in r][:1]
    lines += [f"{r['contestant']} cannot: {r['cannot'].splitlines()[0]}" for r in records if "cannot" in r]
    return "\n".join([text, *lines])


class Target(NamedTuple):
    """A ratio of ours to a peer that may not be exceeded, in cases that fit."""

    text: str
    ours: Callable[[dict[str, Any]], bool]
    theirs: Callable[[Sequence[dict[str, Any]]], float | None]
    value: Callable[[dict[str, Any]], float | None]
    most: float
    fits: Callable[[dict[str, Any]], bool] = lambda r: True


def _p50(r: dict[str, Any]) -> float | None:
    return r["ms"]["p50"] if "ms" in r else None


def _of(name: str, key: Callable[[dict[str, Any]], float | None]) -> Callable[[Sequence[dict[str, Any]]], float | None]:
    return lambda records: next((key(r) for r in records if r["contestant"] == name), None)


def _least_saved(records: Sequence[dict[str, Any]]) -> float | None:
    return min((r["saved_bytes"] for r in records if not r["ours"] and r["ok"]), default=None)


def _shipped(r: dict[str, Any]) -> bool:
    """Ours by the default exchange, as a user gets it."""
    return bool(r.get("default")) and not r["contestant"].endswith(", sdpa")


def _exchange_of_32k(r: dict[str, Any]) -> bool:
    sizes = [r[key] for key in ("part", "tokens", "ranks", "heads", "kv_heads", "head_dim", "dtype")]
    return sizes == ["exchange", 32768, 4, 8, 8, 64, "fp32"]


def _with_attention(r: dict[str, Any]) -> bool:
    return r["part"] == "attention" and r["ranks"] == 4 and r["dtype"] == "fp32"


TARGETS = (
    Target("exchange alone, 32,768 tokens, 4 ranks: default <= 0.5 x deepspeed", _shipped,
           _of("deepspeed", _p50), _p50, 0.5, _exchange_of_32k),
    Target("exchange alone, 32,768 tokens, 4 ranks: torch <= 0.9 x deepspeed", lambda r: r.get("exchange") == "torch",
           _of("deepspeed", _p50), _p50, 0.9, _exchange_of_32k),
    Target("with attention, 4 ranks: default <= 1 x faster peer", _shipped, fastest_peer, _p50, 1.0, _with_attention),
    Target("with attention, 4 ranks, 2,048 tokens: default <= 0.85 x faster peer", _shipped, fastest_peer, _p50, 0.85,
           lambda r: _with_attention(r) and r["tokens"] == 2048),
    Target("collectives: ours <= 0.5 x deepspeed", lambda r: r["ours"],
           _of("deepspeed", lambda r: r.get("collectives")), lambda r: r.get("collectives"), 0.5),
    Target("saved bytes: ours <= 1 x least of the peers", _shipped, _least_saved, lambda r: r.get("saved_bytes"), 1.0,
           lambda r: r["part"] == "attention"),
)  # fmt: skip


def targets(records: Sequence[dict[str, Any]]) -> str:
    """A line per target: in how many cases it is met, and the highest ratio."""
    by_table = [list(table) for _, table in groupby(records, lambda r: (r["part"], r["case"]))]

    def ratios(target: Target) -> Iterator[tuple[float, str]]:
        for table in by_table:
            theirs = target.theirs(table)
            for r in table:
                if theirs and target.ours(r) and target.fits(r) and (own := target.value(r)) is not None:
                    yield own / theirs, r["case"]

    def line(target: Target) -> tuple[object, ...]:
        found = list(ratios(target))
        if not found:
            return target.text, "not measured", None, None, None
        met = sum(x <= target.most for x, _ in found)
        worst, case = max(found)
        return target.text, "met" if met == len(found) else "NOT MET", f"{met} of {len(found)}", worst, case

    return _record.table(("target", "", "cases", "highest", "at"), map(line, TARGETS))


if __name__ == "__main__":
    sys.exit(main())
