"""What a training step holds at most, plainly and with checkpoints, loss and MLPs over tiles, and offload.

    python -m bench.memory [--tokens N] [--width N] [--layers N] [--vocabulary N] [--tile N] [--out FOLDER]

from the root of the repository; on the GPU if there is one. Gradients are held against those of the plain step, or with
offload, which changes no bit, of the step before. Prints a table and writes a record. Exit status: 0 all gradients are
right, 1 some are not.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import _memory, _record
from ._session import Session, verdict


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=(__doc__ or "").splitlines()[0])
    for name in ("tokens", "width", "layers", "vocabulary", "tile"):
        parser.add_argument(f"--{name}", type=int, default=getattr(_memory.Step, name))
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the record; $OUT if set, or else bench/results")
    asked = vars(parser.parse_args(argv))
    out = asked.pop("out") or _record.default_folder()
    size = _memory.Step(**asked)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = _record.environment(device, dry=False)
    print(f"{about['device']['name']}; {', '.join(f'{name} {value:,}' for name, value in asked.items())}; fp32\n")
    print(
        "| a step | peak, MiB | in host memory, MiB | s | gradients off by | |\n|---|---|---|---|---|---|", flush=True
    )
    cases = []
    for case in _memory.records(Session(device, dry=False), size):
        cases.append(case)
        print(_row(case), flush=True)
    path = _record.write(out, "memory", about | {"sizes": dataclasses.asdict(size), "cases": cases})
    print(f"\nrecord: {path}")
    return 0 if all(case["ok"] for case in cases) else 1


def _row(case: dict[str, object]) -> str:
    peak, host, seconds = (case.get(name) for name in ("peak_bytes", "host_bytes", "seconds"))
    if peak is None:
        return f"| {case['case']} | | | | | {verdict(case)} |"
    off = case["errors"].get("gradients", {}).get("error", 0.0)
    return (
        f"| {case['case']} | {peak / 2**20:,.0f} | {host / 2**20:,.0f} | {seconds:.1f} | {off:.1e} | {verdict(case)} |"
    )


if __name__ == "__main__":
    sys.exit(main())
