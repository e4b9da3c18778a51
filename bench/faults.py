"""What the others see when something happens to one rank of three, and how soon: every fault over every exchange.

    python -m bench.faults                          # deadline 5 s; some minutes
    python -m bench.faults --deadline 2 --exchanges shm

The ranks are processes of this machine over "shm" and "torch", and threads over "virtual". A rank that another one
waits for in vain is found at the deadline; what the connections, the agreement or a last word tell is found at once.
Exit status 1 if a survivor does not raise, or later than 2 s after the deadline.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

from ulysses_triton import run_virtual

from . import _faults, _record
from ._faults import FAULTS, LOST, RANKS, Seen

WHENS = (("forward", 1), ("backward", 2))  # with as many chunks
ALLOWED = 2.0  # seconds after the deadline


def _rank(
    rank: int, port: int, exchange: str, fault: str, when: str, chunks: int, seconds: float, end: Connection
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    end.send(_faults.on_process(rank, exchange, fault, when, chunks, seconds))
    end.poll(None)  # not the end of this process is what the others see


def _on_processes(exchange: str, fault: str, when: str, chunks: int, seconds: float) -> list[Seen]:
    """What the survivors saw; none of those that did not answer."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench._faults"])
    processes, ends = [], []
    for rank in range(RANKS):
        ours, theirs = context.Pipe()
        arguments = (rank, store.port, exchange, fault, when, chunks, seconds, theirs)
        processes.append(context.Process(target=_rank, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()
        ends.append(ours)
    seen = []
    waiting = [end for rank, end in enumerate(ends) if rank != LOST]
    while waiting and (ready := wait(waiting, timeout=seconds + 60)):
        for end in ready:
            waiting.remove(end)
            try:
                found, works = end.recv()
            except EOFError:
                continue
            if works:
                seen.append(found)
    for process in processes:
        process.kill()
        process.join()
    return seen


def _on_threads(fault: str, when: str, chunks: int, seconds: float) -> list[Seen]:
    seen = run_virtual(RANKS, lambda g: _faults.happen(g, fault, when), chunks=chunks, timeout=seconds)
    return [found for rank, found in enumerate(seen) if rank != LOST]


def _why_not(seen: list[Seen], limit: float) -> str:
    """What is wrong with what the survivors of a fault saw; empty where nothing is."""
    counts = {
        "without an answer, or a new group that works": len(WHENS) * (RANKS - 1) - len(seen),
        "without an error": sum(not found.kind for found in seen),
        f"after more than {limit:g} s: {max((found.seconds for found in seen), default=0):.2f}": sum(
            found.seconds > limit for found in seen
        ),
    }
    return "; ".join(f"{count} {what}" for what, count in counts.items() if count)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__.split("\n\n")[0])
    parser.add_argument("--deadline", type=float, default=5.0, help="seconds (default: %(default)g)")
    parser.add_argument("--exchanges", default="shm,torch,virtual", help="default: %(default)s")
    parser.add_argument(
        "--out", default=None, type=Path, metavar="FOLDER", help="for the record; else $OUT or bench/results"
    )
    chosen = parser.parse_args()
    about = _record.environment(torch.device("cpu"), dry=False)
    exchanges = chosen.exchanges.split(",")
    print(f"Seconds until a survivor raises, p50 and max over survivors, forward and backward; deadline "
          f"{chosen.deadline:g} s\n")  # fmt: skip
    print("| one rank of three | " + " | ".join(exchanges) + " | error |\n|" + "---|" * (len(exchanges) + 2))
    records = []
    for fault, what in FAULTS.items():
        cells, kinds = [], set()
        for exchange in exchanges:
            if exchange == "virtual" and ("killed" in fault or "stopped" in fault):
                cells.append("-")
                continue
            seen = []
            for when, chunks in WHENS:
                case = (fault, when, chunks, chosen.deadline)
                seen += _on_threads(*case) if exchange == "virtual" else _on_processes(exchange, *case)
            kinds |= {found.kind or "nothing" for found in seen}
            why_not = _why_not(seen, chosen.deadline + ALLOWED)
            seconds = [found.seconds for found in seen]
            records.append({"case": what, "exchange": exchange, "ok": not why_not, "why_not": why_not,
                            "seconds": sorted(seconds), "errors": sorted({found.kind for found in seen})})  # fmt: skip
            cells.append(f"**{why_not}**" if why_not else f"{statistics.median(seconds):.2f}, {max(seconds):.2f}")
        print(f"| {what} | " + " | ".join(cells) + f" | {', '.join(sorted(kinds))} |", flush=True)
    about |= {"deadline": chosen.deadline, "ranks": RANKS, "exchanges": exchanges, "cases": records}
    print(f"record: {_record.write(chosen.out or _record.default_folder(), 'faults', about)}")
    return 0 if all(record["ok"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
