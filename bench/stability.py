"""Whether training over more ranks is the same training: losses and gradient norms by step, in fp32 and bf16.

    python -m bench.stability                   # from the root of the repository; some minutes on 2 cores
    python -m bench.stability --stage 3x64x2 --ranks 1,2 --dtype fp32

It runs `ulysses-triton train` on ranks of this machine, with the same weights and sequences for every number of them,
and compares each run with that on one rank in the same dtype: the largest difference of a step's loss in nats per byte,
and of its gradient's norm as a share of the norm, over the first 20 steps and over all. Rounding differs between the
runs, as sums over shards are taken in another order, and training makes differences grow: how far is what this shows. A
bf16 run beside the fp32 one shows what the dtype alone does. Exit status: 0 when all runs end with finite losses.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import _record

EARLY, LATE = 20, 50  # steps: before differences grow, and those that the loss at the end is a mean over


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m bench.stability", description=lines[0])
    parser.add_argument("--ranks", default="1,2,4", metavar="N[,N]", help="default: %(default)s")
    parser.add_argument("--dtype", default="fp32,bf16", metavar="NAME[,NAME]", help="default: %(default)s")
    parser.add_argument("--stage", default="200x512x2", metavar="STEPSxLENGTHxBATCH", help="default: %(default)s")
    parser.add_argument(
        "--out", default=None, type=Path, metavar="FOLDER", help="for the record; else $OUT or bench/results"
    )
    asked = parser.parse_args(argv)
    about = _record.environment(torch.device("cpu"), dry=False)
    cases: list[dict[str, Any]] = []
    whole: dict[tuple[int, str], dict[str, list[float]]] = {}
    for dtype in asked.dtype.split(","):
        for ranks in sorted(map(int, asked.ranks.split(","))):
            said = f"{ranks} rank{'s' * (ranks > 1)}"
            found = whole[ranks, dtype] = train(ranks, dtype, asked.stage)
            cases.append({"case": f"{dtype} on {said}", "ranks": ranks, "dtype": dtype, "ok": True, **found})
            print(f"{dtype} on {said}: loss {end(found):.4f} at the end, {found['seconds']:.0f} s", flush=True)
    for case in cases:
        one, fp32 = whole.get((1, case["dtype"])), whole.get((case["ranks"], "fp32"))
        if one and case["ranks"] > 1:
            case["from_one_rank"] = apart(case, one)
        if fp32 and case["dtype"] != "fp32":
            case["from_fp32"] = apart(case, fp32)
    path = _record.write(
        asked.out or _record.default_folder(), "stability", about | {"stage": asked.stage, "cases": cases}
    )
    print(f"\n{_record.table(HEADER, rows(cases))}\nrecord: {path}")
    return 0


def train(ranks: int, dtype: str, stage: str) -> dict[str, Any]:
    """One run of the training command: by step its losses and gradient norms, and its loss on what was held out."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        options = ["--ranks", str(ranks), "--dtype", dtype, "--stage", stage, "--out", str(run), "--threads", "1"]
        command = [sys.executable, "-m", "ulysses_triton.cli", "train", *options, "--checkpoint-every", "0"]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(command, cwd=_record.ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"bench.stability: `{' '.join(command)}` failed:\n{done.stderr}")
        with (run / "metrics.csv").open(newline="") as stream:
            steps = list(csv.DictReader(stream))
        summary = json.loads((run / "summary.json").read_text())
    return {
        "losses": [float(step["loss"]) for step in steps],
        "gradient_norms": [float(step["gradient_norm"]) for step in steps],
        "held_out_loss": summary["held_out_loss"],
        "seconds": summary["seconds"],
    }


def apart(run: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How far two runs are apart: by step, and the largest of the first steps and of all.

    Losses in nats per byte; gradient norms as a share of the other run's.
    """
    losses = [abs(mine - its) for mine, its in zip(run["losses"], other["losses"], strict=True)]
    norms = [abs(mine - its) / its for mine, its in zip(run["gradient_norms"], other["gradient_norms"], strict=True)]
    return {
        "loss": max(losses), "loss_early": max(losses[:EARLY]), "losses": losses,
        "gradient_norm": max(norms), "gradient_norm_early": max(norms[:EARLY]),
        "end": abs(end(run) - end(other)), "held_out": abs(run["held_out_loss"] - other["held_out_loss"]),
    }  # fmt: skip


def end(run: dict[str, Any]) -> float:
    """The training loss at the end: the mean of the last steps, as one sequence is easier than another."""
    last = run["losses"][-LATE:]
    return sum(last) / len(last)


HEADER = ("", "loss at the end", "held out", f"loss, first {EARLY} steps", "all steps", "at the end",
          f"gradient norm, first {EARLY} steps", "all steps")  # fmt: skip


def rows(cases: Sequence[dict[str, Any]]) -> list[tuple[object, ...]]:
    """A line per run, and one per comparison of it."""
    keys = ("loss_early", "loss", "end", "gradient_norm_early", "gradient_norm")
    lines: list[tuple[object, ...]] = []
    for case in cases:
        lines.append((case["case"], end(case), case["held_out_loss"], *[None] * len(keys)))
        for name, against in (("from_one_rank", "one rank"), ("from_fp32", "fp32")):
            if name in case:
                lines.append((f"- its difference from {against}", None, None, *(case[name][key] for key in keys)))
    return lines


if __name__ == "__main__":
    sys.exit(main())
