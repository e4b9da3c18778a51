"""Whether a model finds in thousands of tokens what it is asked for, its sequences sharded over ranks: by depth.

    python -m bench.retrieval                   # from the root of the repository; ten minutes on 2 cores
    python -m bench.retrieval --quick           # a few steps, to see that it runs: it learns nothing

A model of two attention layers trains on needles in random filler (`_retrieval` says how they look) on 4 ranks of this
machine, over the default exchange, from short sequences to long ones. Then it is asked for ten needles of each of a
number of new sequences, one in each tenth. A value told is right or wrong; by guessing one of 64 is right. The record
has all counts, with 95% intervals (Wilson's), and the training losses. Exit status: 0, whatever it learnt.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from . import _record
from ._retrieval import KINDS, Asked, Stage, serve

STAGES = (
    Stage(80, 64, 32, 16),
    Stage(30, 256, 16, 32),
    Stage(30, 1024, 4, 32),
    Stage(20, 2048, 2, 32),
    Stage(20, 4096, 1, 32),
    Stage(20, 8192, 1, 32),
)
EXAMINED = ((512, 50), (2048, 50), (8192, 50), (16384, 10))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m bench.retrieval", description=lines[0])
    parser.add_argument("--ranks", default=4, type=int, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", default=0, type=int, metavar="N", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a few steps at 128 tokens")
    parser.add_argument(
        "--out", default=None, type=Path, metavar="FOLDER", help="for the record; else $OUT or bench/results"
    )
    given = parser.parse_args(argv)
    asked = Asked(given.ranks, STAGES, EXAMINED, seed=given.seed)
    if given.quick:
        asked = Asked(given.ranks, (Stage(3, 64, 2, 4), Stage(2, 128, 1, 4)), ((128, 2),), seed=given.seed, width=32)
    about = _record.environment(torch.device("cpu"), dry=given.quick)
    began = time.perf_counter()
    found = run(asked)
    cases = [
        {"case": f"{exam['length']} tokens, {part * 10}-{part * 10 + 10}% deep", "tokens": exam["length"], "part": part,
         "ok": True, "right": right, "questions": exam["sequences"], "interval": interval(right, exam["sequences"])}
        for exam in found["examined"] for part, right in enumerate(exam["right"])
    ]  # fmt: skip
    shape = {key: getattr(asked, key) for key in ("ranks", "layers", "width", "heads", "lr", "seed", "needles")}
    stages = [stage._asdict() for stage in asked.stages]
    about |= shape | {"chance": 1 / KINDS, "stages": stages, "seconds": time.perf_counter() - began}
    rows = [
        (f"{exam['length']} tokens", *(f"{right}/{exam['sequences']}" for right in exam["right"]))
        for exam in found["examined"]
    ]
    header = ("right of asked, by depth", *(f"{part * 10}-{part * 10 + 10}%" for part in range(asked.needles)))
    print(f"\n{_record.table(header, rows)}")
    losses = [step["loss"] for step in found["steps"]]
    path = _record.write(given.out or _record.default_folder(), "retrieval", about | {"cases": cases, "losses": losses})
    print(f"record: {path}")
    return 0


def run(asked: Asked) -> dict[str, list[dict[str, float]]]:
    """Train and examine on ranks of this machine: what `steps` and what `examined` measured."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"GLOO_SOCKET_IFNAME": "lo"}):
        os.environ.pop("TRITON_INTERPRET", None)  # it would put the kernels in the place of PyTorch's
        path = Path(folder, "found.json")
        spawn(serve, (store.port, asked, str(path)), nprocs=asked.ranks)
        return json.loads(path.read_text())


def interval(right: int, of: int) -> tuple[float, float]:
    """The 95% interval of a share, as Wilson (1927) has it: also for none and for all."""
    z = 1.959964
    middle, spread = right + z * z / 2, z * math.sqrt(right * (of - right) / of + z * z / 4)
    return (middle - spread) / (of + z * z), (middle + spread) / (of + z * z)


if __name__ == "__main__":
    sys.exit(main())
