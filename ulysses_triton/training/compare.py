"""A run beside the same run on one rank: same data, same initial weights, nothing sharded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from . import plot, run_directory
from .config import TrainConfig

ONE_RANK = "one-rank"  # the folder of the second run, inside that of the first
EARLY_STEPS = 20  # rounding alone separates two runs in time, however exact both are


def on_one_rank(config: TrainConfig) -> TrainConfig:
    """The run to compare `config` with."""
    return dataclasses.replace(config, out=str(Path(config.out, ONE_RANK)), ranks=1, data_parallel=1)


def summarise(config: TrainConfig) -> None:
    """Draw both runs to `compare.png` in the folder of `config` and print how far apart they are."""
    sharded, alone = Path(config.out), Path(on_one_rank(config).out)
    pairs = list(zip(run_directory.read_metrics(sharded), run_directory.read_metrics(alone), strict=True))
    apart = [abs(mine.loss - other.loss) for mine, other in pairs]
    summaries = [run_directory.read_summary(run) for run in (sharded, alone)]
    plot.plot_loss(
        {f"{config.ranks} ranks": [mine for mine, _ in pairs], "one rank": [other for _, other in pairs]},
        sharded / "compare.png",
        references={
            plot.REFERENCES[name]: summaries[0][name]
            for name in ("bigram_entropy", "token_entropy")
            if name in summaries[0]
        },
        unit=config.unit,
    )
    early = apart[:EARLY_STEPS]
    held_out = ""
    if config.held_out:
        mine, other = (summary["held_out_loss"] for summary in summaries)
        held_out = f"; held out {mine:.3f} on {config.ranks} ranks, {other:.3f} on one"
    print(
        f"{'compared':<16}losses at most {max(early):.1e} apart over the first {len(early)} steps, "
        f"{max(apart):.1e} over all {len(apart)}{held_out}",
        flush=True,
    )
    print(f"{'written':<16}{sharded}/compare.png", flush=True)
