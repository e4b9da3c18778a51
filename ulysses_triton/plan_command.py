"""`ulysses-triton plan`: how to train a model on sequences of a length, and what it would take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from .errors import OptionError
from .planner import hardware, models, published, report
from .planner.network import FatTree, Stragglers, simulate
from .planner.plan import plan
from .planner.setup import CHECKPOINTS, Setup

Number = TypeVar("Number", int, float)

_DESCRIPTION = """\
Predict how to train a decoder on long sequences: how many ranks share one, in how many chunks, over which exchange,
the time of a step by phase, the memory of a GPU by term, the longest sequence that fits, and where the all-to-all
becomes the bottleneck. Nothing is run, and no GPU was measured for it: rates are datasheets' or reported.

    ulysses-triton plan --model llama-3-8b --seq 1048576 --gpu h100 --gpus 64
    ulysses-triton plan --model path/to/config.json --seq 262144 --gpus 1024 --simulate --oversubscription 2
    ulysses-triton plan --published     # what papers measured, and what is predicted for it
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `plan` with the command's subparsers."""
    parser = commands.add_parser(
        "plan",
        help="predict degrees, memory and time of training on long sequences",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)

    def number(name: str, text: str, default: int | float | None, kind: type = int) -> None:
        shown = text if default is None else f"{text} (default: {default})"
        parser.add_argument(name, help=shown, type=kind, metavar="N", default=default)

    parser.add_argument("--model", default="llama-3-8b", metavar="NAME", help="a Transformers config.json, or one of "
                        f"{', '.join(models.PRESETS)} (default: llama-3-8b)")  # fmt: skip
    number("--seq", "tokens of a sequence", 131072)
    parser.add_argument("--gpu", choices=hardware.NAMES, default="h100", help="(default: h100)")
    number("--gpus", "how many", 8)
    number("--node", "GPUs of a node", 8)
    number("--between", "GB/s of a GPU's network, in place of what is known of it", None, float)
    number("--inside", "GB/s of a GPU's links inside a node, likewise", None, float)
    number("--host-memory", "GB of a node's host", 2000, float)
    number("--batch", "sequences of a step (default: one for each row of ranks)", None)
    number("--zero", "ZeRO's stage; 3 is FSDP", 3)
    parser.add_argument("--checkpoint", choices=[*CHECKPOINTS, "any"], default="any", help="activations: keep all, "
                        "keep layers' inputs, keep those on the host (default: whichever is fastest)")  # fmt: skip
    parser.add_argument("--offload-optimizer", action="store_true", help="gradients and optimiser on the host")
    parser.add_argument("--tiled-mlp", action="store_true", help="MLP in tiles of tokens")
    parser.add_argument("--tiled-loss", action=argparse.BooleanOptionalAction, default=True, help="loss in tiles")
    parser.add_argument("--recompute-exchange", action="store_true", help='recompute="exchange"')
    parser.add_argument("--bytes", default="2,2,12", metavar="N,N,N", help="of a weight while it computes, of a "
                        "gradient and of the optimiser's states for one (default: 2,2,12)")  # fmt: skip
    parser.add_argument("--simulate", action="store_true", help="walk through the step rank by rank over a fat tree")
    number("--leaf", "nodes at a leaf switch", 16)
    number("--pod", "leaves of a pod; 0: two levels", 0)
    number("--oversubscription", "how much narrower a leaf's up-links are", 1.0, float)
    number("--core-oversubscription", "a pod's, besides", 1.0, float)
    number("--jitter", "relative spread of the time of a rank's layers", 0.0, float)
    parser.add_argument("--stragglers", default="0,1", metavar="SHARE,FACTOR", help="slow ranks (default: 0,1)")
    number("--seed", "of the stragglers", 0)
    parser.add_argument("--json", action="store_true", help="print one JSON object, of seconds and bytes")
    parser.add_argument("--plots", metavar="FOLDER", help="draw four SVG pictures there")
    parser.add_argument("--published", action="store_true", help="print published numbers beside predictions, and end")
    parser.add_argument("--debug", help="print the traceback of an error", action="store_true")


def command(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if arguments.published:
        print(published.table())
        return 0
    model = models.find(arguments.model)
    if arguments.plots:
        from .planner import plots

        plots.require_matplotlib()
    between, inside = (None if speed is None else speed * 1e9 for speed in (arguments.between, arguments.inside))
    cluster = hardware.cluster(arguments.gpu, arguments.gpus, arguments.node, between, inside)
    cluster = replace(cluster, host_memory=arguments.host_memory * 1e9)
    item, grad, states = _numbers("--bytes", arguments.bytes, 3, int)
    given = Setup(
        arguments.seq, 1, arguments.gpus, None, zero=arguments.zero, offload_optimizer=arguments.offload_optimizer,
        tiled_logits=arguments.tiled_loss, tiled_mlp=arguments.tiled_mlp, item=item, grad=grad, states=states,
        recompute_exchange=arguments.recompute_exchange,
    )  # fmt: skip
    if arguments.batch is not None:
        given = replace(given, rows=1, batch=arguments.batch)
    kinds = CHECKPOINTS if arguments.checkpoint == "any" else (arguments.checkpoint,)
    found = plan(model, cluster, given, kinds)
    tree = FatTree(arguments.leaf, arguments.pod, arguments.oversubscription, arguments.core_oversubscription)
    share, slow = _numbers("--stragglers", arguments.stragglers, 2, float)
    stragglers = Stragglers(arguments.jitter, share, slow, arguments.seed)
    simulation = simulate(model, found.best.setup, cluster, tree, stragglers) if arguments.simulate else None
    if arguments.json:
        print(json.dumps(report.as_json(found, simulation), indent=1))
    else:
        print(report.page(found, simulation))
    if arguments.plots:
        paths = plots.draw(found, tree, stragglers, Path(arguments.plots))
        if not arguments.json:
            print(f"\ndrawn: {', '.join(map(str, paths))}")
    return 0


def _numbers(option: str, text: str, count: int, kind: Callable[[str], Number]) -> list[Number]:
    """So many numbers with commas between them."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count:
        raise OptionError(f"{option} {text!r} is not {count} numbers with commas between them")
    return found
