"""The command `ulysses-triton`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

import torch

from . import verify
from .errors import OptionError, UlyssesError
from .training import data, launch, loop, report, run_directory
from .training.config import ModelConfig, TrainConfig

CPU_RANKS = 4

_TRAIN_DESCRIPTION = """\
Train a small decoder-only byte-level language model (RMSNorm, RoPE, grouped-query attention, SwiGLU, QK-norm)
with every sequence sharded over ranks: processes that this command starts (gloo on CPU, one per GPU otherwise),
or those of torchrun.

The default run takes 2 to 3 minutes on 2 CPU cores. In that time the loss falls from 5.5 to about 2.5 nats per
byte, near what the byte before tells of the next (2.4): it shows that training over shards works, not yet what
contexts of 8,192 bytes are good for.

The run directory receives config.json, metrics.csv (one line per step) and loss.png.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 if a rank died or what is verified does not hold, 2 for a mistake
    in what was asked, 130 on Ctrl-C.

    In a process that torchrun started it does not return: it ends the process with that status.
    """
    arguments = _parser().parse_args(argv)
    try:
        status = arguments.command(arguments) or 0
    except KeyboardInterrupt:
        print("ulysses-triton: interrupted; all ranks were stopped", file=sys.stderr)
        status = 130
    except UlyssesError as error:
        _print_error(error, debug=arguments.debug)
        status = 1 if isinstance(error, launch.RankError) else 2
    except Exception:
        if not launch.under_torchrun():
            raise
        traceback.print_exc()  # and leave below: destructors could wait for the other ranks
        status = 1
    if launch.under_torchrun():
        launch.leave(status)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ulysses-triton", description="Exact sequence-parallel attention: commands to try it out."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_train(commands)
    verify.add_command(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    model = ModelConfig()
    parser = commands.add_parser(
        "train",
        help="train a small language model over sharded sequences",
        description=_TRAIN_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_train)

    def option(name: str, help: str, **settings: object) -> None:
        if settings.get("default") is not None:
            help += " (default: %(default)s)"
        parser.add_argument(name, help=help, **settings)  # type: ignore[arg-type]

    option(
        "--text",
        "files and folders to train on (default: the Python standard library's source)",
        nargs="+",
        metavar="PATH",
        default=None,
    )
    option("--out", "run directory, new or empty (default: runs/<time>)", metavar="DIR")
    option(
        "--ranks", f"ranks that share each sequence (default: one per GPU; {CPU_RANKS} on CPU)", type=int, metavar="P"
    )
    option(
        "--device",
        "where ranks compute: GPUs if there are any, or as said",
        choices=("auto", "cpu", "cuda"),
        default="auto",
    )
    option("--threads", "CPU threads of each rank (default: cores / ranks)", type=int, metavar="N")
    option(
        "--sequence-length",
        "bytes per sequence, over all ranks",
        type=int,
        default=TrainConfig.sequence_length,
        metavar="S",
    )
    option("--batch", "sequences per step", type=int, default=TrainConfig.batch, metavar="B")
    option("--steps", "updates", type=int, default=TrainConfig.steps, metavar="N")
    option(
        "--lr",
        "peak learning rate of AdamW; it warms up, then falls along a cosine",
        type=float,
        default=TrainConfig.lr,
    )
    option("--seed", "of the initial weights and of the order of the text", type=int, default=TrainConfig.seed)
    option("--layers", "transformer blocks", type=int, default=model.layers, metavar="N")
    option(
        "--width",
        "channels of the residual stream; SwiGLU has three times as many",
        type=int,
        default=model.width,
        metavar="N",
    )
    option("--heads", "query heads", type=int, default=model.heads, metavar="N")
    option("--kv-heads", "key/value heads", type=int, default=model.kv_heads, metavar="N")
    option("--head-dim", "channels of a head", type=int, default=model.head_dim, metavar="N")
    option("--debug", "print the traceback of an error", action="store_true")


def _train(arguments: argparse.Namespace) -> None:
    config = _train_config(arguments)
    if launch.under_torchrun():
        launch.run_as_torchrun_rank(loop.run, config)
        return
    report.require_ready(config)
    data.split_text(data.read_text(config.text).content, config.sequence_length)
    launch.run_on_own_ranks(loop.run, config)


def _train_config(arguments: argparse.Namespace) -> TrainConfig:
    gpus = 0 if arguments.device == "cpu" else torch.cuda.device_count()
    if arguments.device == "cuda" and not gpus:
        raise OptionError("--device cuda, but PyTorch finds no GPU here")
    torchrun = launch.under_torchrun()
    ranks = arguments.ranks
    if ranks is None:
        ranks = launch.torchrun_ranks() if torchrun else gpus or CPU_RANKS
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) if torchrun else ranks
    if gpus and local_ranks > gpus:
        raise OptionError(
            f"{local_ranks} ranks need a GPU each and there are {gpus}; use --ranks {gpus} or --device cpu"
        )
    return TrainConfig(
        out=run_directory.fresh_path() if arguments.out is None else arguments.out,
        ranks=ranks,
        text=tuple(arguments.text or ()),
        sequence_length=arguments.sequence_length,
        batch=arguments.batch,
        steps=arguments.steps,
        lr=arguments.lr,
        seed=arguments.seed,
        threads=launch.cores_per_rank(max(1, local_ranks)) if arguments.threads is None else arguments.threads,
        device="cuda" if gpus else "cpu",
        model=ModelConfig(
            layers=arguments.layers,
            width=arguments.width,
            heads=arguments.heads,
            kv_heads=arguments.kv_heads,
            head_dim=arguments.head_dim,
            hidden=3 * arguments.width,
        ),
    )


def _print_error(error: UlyssesError, *, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    elif isinstance(error, launch.RankError) and error.__cause__ is not None:
        print(error.__cause__, file=sys.stderr)  # nobody foresaw it, so its traceback is worth having
    rank = f"rank {os.environ['RANK']}: " if launch.under_torchrun() else ""
    print(f"ulysses-triton: error: {rank}{' '.join(str(error).split())}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
