"""`ulysses-triton timeline`: where the time of a layer goes, predicted, and with `--trace` also traced here."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

import torch
import torch.distributed as dist

from . import cost
from .case import DTYPES, Case, Layer, draw
from .errors import OptionError
from .group import UlyssesGroup, run_virtual
from .local import choose
from .placement import chunk_count
from .timeline import Timeline
from .timeline_svg import draw as draw_svg
from .tracing import trace

_WARM_UPS = 2  # layers run and left out of the trace

_DESCRIPTION = """\
Predict when each step of a layer runs on each rank of a machine, and how much of the exchanges would be waited for.
With --trace the layer also runs here, and both timelines are drawn in one picture: on the ranks of torchrun, or on
virtual ranks (threads of this process), one warm layer is traced.

    ulysses-triton timeline --seq 131072 --heads 64 --kv-heads 8 --dim 128 --ranks 8 --machine h100 --svg layer.svg
    torchrun --nproc-per-node 4 -m ulysses_triton.cli timeline --trace --seq 8192 --svg layer.svg
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `timeline` with the command's subparsers."""
    parser = commands.add_parser(
        "timeline",
        help="where the time of a layer goes: predicted, and traced",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)

    def number(name: str, text: str, default: int) -> None:
        parser.add_argument(name, help=f"{text} (default: {default})", type=int, metavar="N", default=default)

    number("--seq", "length of the whole sequence", 8192)
    number("--batch", "sequences", 1)
    number("--heads", "query heads", 8)
    number("--kv-heads", "key/value heads", 2)
    number("--dim", "channels of a head", 64)
    parser.add_argument("--ranks", type=int, metavar="P", help="(default: 4, or those of torchrun)")
    parser.add_argument("--dtype", choices=[name for name in DTYPES if name != "fp64"], help="(default: bf16, or fp32 "
                        "with --trace on a CPU)")  # fmt: skip
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True, help="causal mask")
    parser.add_argument("--uneven", action="store_true", help="shards in the proportions 1 : 2 : 3 ...")
    parser.add_argument("--backward", action="store_true", help="forward and backward (default: forward)")
    parser.add_argument("--one-sided", action="store_true", help="predict for ranks that write to each other's memory; "
                        "with --trace it is as the exchange is")  # fmt: skip
    number("--chunks", "chunks that a rank's heads go in, 0 for the best prediction", 1)
    parser.add_argument("--machine", choices=["cpu", *cost.MACHINES], help="what to predict for (default: h100, or cpu "
                        "with --trace on a CPU)")  # fmt: skip
    parser.add_argument("--trace", action="store_true", help="run the layer here, too")
    parser.add_argument("--json", metavar="FILE", help="write the timeline for Perfetto; with --trace the traced one")
    parser.add_argument("--svg", metavar="FILE", help="draw the timeline; with --trace both")
    parser.add_argument("--debug", help="print the traceback of an error", action="store_true")


def command(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    under_torchrun = "WORLD_SIZE" in os.environ
    ranks = int(os.environ["WORLD_SIZE"]) if under_torchrun else arguments.ranks or 4
    if under_torchrun and arguments.ranks not in (None, ranks):
        raise OptionError(f"--ranks {arguments.ranks} differs from the {ranks} ranks that torchrun started")
    if under_torchrun and not arguments.trace:
        raise OptionError("a prediction needs no ranks: leave torchrun out, or pass --trace")
    on_cpu = arguments.machine == "cpu" or (arguments.trace and not torch.cuda.is_available())
    case = Case(
        tokens=arguments.seq, batch=arguments.batch, heads=arguments.heads, kv_heads=arguments.kv_heads,
        head_dim=arguments.dim, value_dim=arguments.dim, dtype=arguments.dtype or ("fp32" if on_cpu else "bf16"),
        causal=arguments.causal, uneven=arguments.uneven, ranks=ranks,
    )  # fmt: skip
    case.check("cpu" if on_cpu else "cuda")
    machine = cost.cpu(min(1.0, (os.cpu_count() or 1) / ranks)) if on_cpu else cost.MACHINES["h100"]
    machine = cost.MACHINES.get(arguments.machine, machine)
    problem = case.problem("cpu" if on_cpu else "cuda")
    problem = replace(problem, attention=choose(problem).name, grad=arguments.backward)
    chunks = arguments.chunks or cost.best_chunks(problem, machine, one_sided=arguments.one_sided)
    problem = replace(problem, chunks=chunk_count(problem, chunks))
    one_sided, traced = arguments.one_sided, None
    if arguments.trace:
        one_sided, traced = _traced(case, chunks, arguments.backward, under_torchrun)
    timelines = {f"predicted for {machine.name}": cost.timeline(problem, machine, one_sided=one_sided)}
    if traced is not None:
        timelines[f"traced on {case.ranks} {'ranks' if under_torchrun else 'virtual ranks'}"] = traced
    if os.environ.get("RANK", "0") == "0":
        print(f"{case}; chunks: {problem.chunks}\n\n{_table(timelines)}", flush=True)
        if arguments.json:
            list(timelines.values())[-1].write(arguments.json)
        if arguments.svg:
            draw_svg(arguments.svg, timelines)
    return 0


def _traced(case: Case, chunks: int, backward: bool, under_torchrun: bool) -> tuple[bool, Timeline]:
    """Whether the exchange is one-sided, and the events of the last layer that ran."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    inputs = draw(case, torch.device(device))

    def work(group: UlyssesGroup) -> bool:
        layer = Layer(case, inputs, group)
        for _ in range(_WARM_UPS + 1):
            out = layer.forward()
            if backward:
                layer.backward(out)
        return group.exchange.one_sided

    if under_torchrun:
        if torch.cuda.is_available():
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        with UlyssesGroup(chunks=chunks) as group:
            with trace() as t:
                one_sided = work(group)
            whole = t.gather(group)
        dist.destroy_process_group()
    else:
        with trace() as t:
            one_sided = run_virtual(case.ranks, work, chunks=chunks)[0]
        whole = t
    first = max(e.call for e in whole.events) - backward
    return one_sided, Timeline(e for e in whole.events if e.call >= first)


def _table(timelines: dict[str, Timeline]) -> str:
    """Milliseconds of the steps, a column per timeline: means over the ranks."""
    names = list(dict.fromkeys(name for t in timelines.values() for name in t.steps()))
    lines = [f"{'ms, mean over the ranks':26}" + "".join(f"{name:>30}" for name in timelines)]
    rows = {name: [t.steps().get(name, 0.0) for t in timelines.values()] for name in names}
    rows["busy"] = [t.busy() for t in timelines.values()]
    rows["exchanging"] = [t.exchanging() for t in timelines.values()]
    rows["exposed"] = [t.exposed() for t in timelines.values()]
    rows["from first to last"] = [t.seconds() for t in timelines.values()]
    lines += [f"{name:26}" + "".join(f"{value * 1e3:30.3f}" for value in values) for name, values in rows.items()]
    sent = "".join(f"{t.sent() / 1e6:30.3f}" for t in timelines.values())
    return "\n".join([*lines, f"{'MB to other ranks, in all':26}{sent}"])
