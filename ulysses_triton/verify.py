"""`ulysses-triton verify`: the op on a user's machine against attention on one device, and how long both take.

Every rank draws the same whole sequence, runs the op on its shard and holds its part of the results against fp64;
errors are then added up over the ranks, so that all come to the same verdict. A sequence too long to compute in fp64 is
held at query rows drawn at random: the gradient of the output is zero in all others, so that dq, dk, dv and the norms'
gradients are still checked whole.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import truth
from .case import DTYPES, PER_HEAD, SHARES, Case, Inputs, Layer, Results, comparable, draw, exact, peer
from .errors import ExchangeError, OptionError
from .group import UlyssesGroup
from .spec import ATTENTIONS

AT_ROWS = ("out", "dq")  # results that are held at the sampled query rows
_FLOPS = {"cpu": 1e11, "cuda": 1e13}  # of the fp64 computation, over all ranks of a CPU or on each GPU: some seconds

_DESCRIPTION = """\
Run the attention of this library on shards of a random sequence, forward and backward, and hold the output and all
gradients against attention on one device in fp64. fp32 may be 2e-6 off (relative, by norm); bf16 and fp16 twice as far
as PyTorch's scaled_dot_product_attention is in that dtype, or 2e-4. Where it cannot do an option (softcap, sinks,
ALiBi, dropout), that is its error without. The gradients of sinks and slopes, sums over all queries that may nearly
cancel, may be off by 4 times what dq may, relative to the norm of what the queries contribute.

Under torchrun the sequence is sharded over its ranks; alone, one rank holds all of it:

    torchrun --nproc-per-node 4 -m ulysses_triton.cli verify --tokens 8192 --heads 16 --kv-heads 4

Exit status: 0 it holds, 1 it does not, 2 wrong use; the same on every rank.
"""


class Row(NamedTuple):
    """A line of the verdict."""

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


def compare(case: Case, rank: int, results: Results, inputs: Inputs, rows: Tensor) -> list[Row]:
    """This rank's results against fp64, with the errors of all ranks added up: the same list on every rank."""
    expected = exact(case, inputs, rows)
    peers, expected_of_peer = {}, {}
    if case.torch_dtype in (torch.bfloat16, torch.float16) and rank == 0:
        plain = comparable(case)
        peers = peer(plain, inputs)
        expected_of_peer = expected if plain == case else exact(plain, inputs, rows)
    part = case.shard(rank)
    here = (rows >= part.start) & (rows < part.stop)
    local = rows[here] - part.start
    sums = torch.zeros(len(expected), 4, dtype=torch.float64)  # of squares: difference, exact; the same of the peer
    for i, (name, want) in enumerate(expected.items()):
        got = results[name]
        if name in SHARES:
            total = _added(got.double())
            pairs = [(total, want.sum((0, 1)) if name in PER_HEAD else want)] if rank == 0 else []
        elif name in AT_ROWS:
            pairs = [(got[:, local], want[:, here])]
        else:
            pairs = [(got, want[:, part])]
        if name == "dq" and len(rows) < case.tokens:
            rest = got.clone()
            rest[:, local] = 0
            pairs.append((rest, torch.zeros_like(rest)))
        if name == "out" and not got.isfinite().all():
            sums[i, 0] = torch.inf
        for x, y in pairs:
            sums[i, :2] += torch.tensor(truth.squares(x, y), dtype=torch.float64)
        if name in PER_HEAD and rank == 0:
            sums[i, 1] = want.square().sum()
        if peers:
            held = name if name in peers else "dq"  # PyTorch has no gradients of sinks and slopes
            theirs = peers[held][:, rows] if held in AT_ROWS else peers[held]
            sums[i, 2:] = torch.tensor(truth.squares(theirs, expected_of_peer[held]), dtype=torch.float64)
    sums = _added(sums)
    found = []
    for name, line in zip(expected, sums.tolist(), strict=True):
        allowed = truth.allowed(case.torch_dtype, truth.relative(line[2:]))
        few = 4 if name in PER_HEAD else 1  # a number per head: luck does not average out
        found.append(Row(name, truth.relative(line[:2]), few * allowed))
    return found


def _added(x: Tensor) -> Tensor:
    """The sum over the ranks, on every rank."""
    total = x.cpu()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.to(x.device)


def sampled(case: Case, device: torch.device, count: int | None) -> Tensor:
    """Positions of the query rows to compare: all, or as many as take some seconds, with the first and the last."""
    if count is None:
        ranks = case.ranks if device.type == "cpu" else 1  # that share the processor
        each = 5 * (case.head_dim + case.value_dim) * case.tokens * case.heads * case.batch * ranks
        count = max(64, int(_FLOPS[device.type] / each))
    if count >= case.tokens:
        return torch.arange(case.tokens, device=device)
    order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(case.seed))[:count]
    ends = torch.tensor([0, case.tokens - 1])
    return torch.cat((order, ends)).unique().to(device)


def _together() -> None:
    """Return when every rank has come here."""
    _added(torch.zeros(1))


class Times(NamedTuple):
    """Milliseconds, medians."""

    forward: float
    backward: float


def timed(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], object], repeats: int, *, alone: bool = False
) -> Times:
    """Time both passes, by the slowest rank of each repeat (`alone`: of this process only), after one warm-up."""

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    shared = dist.is_initialized() and not alone
    seconds = torch.zeros(repeats + 1, 2)
    for i in range(repeats + 1):
        if shared:
            _together()
        begin = now()
        out = forward()
        middle = now()
        if shared:
            _together()
        again = now()
        backward(out)
        seconds[i] = torch.tensor((middle - begin, now() - again))
    if shared:
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return Times(*(statistics.median(column) * 1e3 for column in seconds[1:].T.tolist()))


def time_sdpa(case: Case, inputs: Inputs, repeats: int) -> Times | None:
    """PyTorch's attention, causal or dense, over the whole sequence on this device; None if it does not fit."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    try:
        return timed(
            lambda: truth.sdpa(leaves[0], leaves[1], leaves[2], causal=case.causal, scale=case.scale),
            lambda out: torch.autograd.grad(out, leaves, inputs.dout),
            repeats,
            alone=True,
        )
    except torch.OutOfMemoryError:
        return None


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `verify` with the command's subparsers."""
    parser = commands.add_parser(
        "verify",
        help="hold the op against attention on one device, on this machine",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)

    def number(name: str, text: str, default: int | None) -> None:
        said = f"{text} (default: {default})" if default is not None else text
        parser.add_argument(name, help=said, type=int, metavar="N", default=default)

    number("--tokens", "length of the whole sequence", Case.tokens)
    number("--batch", "sequences", Case.batch)
    number("--heads", "query heads", Case.heads)
    number("--kv-heads", "key/value heads", Case.kv_heads)
    number("--head-dim", "channels of a head of q and k", Case.head_dim)
    number("--value-dim", "channels of a head of v (default: as --head-dim)", None)
    parser.add_argument("--dtype", choices=DTYPES, default=Case.dtype, help="(default: %(default)s)")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=Case.causal, help="causal mask")
    parser.add_argument(
        "--window", nargs=2, type=int, metavar=("LEFT", "RIGHT"), help="keys that a query attends, in tokens; -1: all"
    )
    parser.add_argument("--softcap", type=float, metavar="X", help="softcap of the scores")
    number("--documents", "pack N documents of random lengths, one empty and one a single token", Case.documents)
    parser.add_argument("--sinks", action="store_true", help="a learned sink per head")
    parser.add_argument("--alibi", action="store_true", help="ALiBi with learned slopes")
    parser.add_argument(
        "--dropout", type=float, metavar="P", default=Case.dropout, help="drop pairs with this probability"
    )
    parser.add_argument("--uneven", action="store_true", help="shards in the proportions 1 : 2 : 3 ...")
    parser.add_argument("--recompute", action="store_true", help="exchange q, k and v again in backward")
    parser.add_argument(
        "--attention", choices=[a for a in ATTENTIONS if a != "callable"], default=Case.attention,
        help="local attention (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--rope", action="store_true", help="RoPE in the op, on a fused projection")
    parser.add_argument("--qk-norm", action="store_true", help="QK-norm in the op, on a fused projection")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="GPUs if there are any")
    parser.add_argument("--exchange", default="auto", help="as `UlyssesGroup(exchange=...)` (default: auto)")
    number("--rows", "query rows to hold against fp64 (default: all that take some seconds)", None)
    number("--repeats", "how often to time each pass; 0 for no timing", 10)
    number("--seed", "of the random sequence", Case.seed)
    parser.add_argument("--debug", help="print the traceback of an error", action="store_true")


def command(arguments: argparse.Namespace) -> int:
    """Run the command on this rank; returns the exit status."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    case = Case(
        tokens=arguments.tokens,
        batch=arguments.batch,
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        value_dim=arguments.head_dim if arguments.value_dim is None else arguments.value_dim,
        dtype=arguments.dtype,
        causal=arguments.causal,
        window=None if arguments.window is None else tuple(arguments.window),
        softcap=arguments.softcap,
        documents=arguments.documents,
        sinks=arguments.sinks,
        alibi=arguments.alibi,
        dropout=arguments.dropout,
        uneven=arguments.uneven,
        recompute=arguments.recompute,
        attention=arguments.attention,
        rope=arguments.rope,
        qk_norm=arguments.qk_norm,
        ranks=ranks,
        seed=arguments.seed,
    )
    if arguments.repeats < 0:
        raise OptionError(f"--repeats {arguments.repeats}; it must be at least 0")
    if arguments.rows is not None and arguments.rows < 1:
        raise OptionError(f"--rows {arguments.rows}; it must be at least 1")
    device = _device(arguments.device)
    case.check(device.type)
    with joined(device), UlyssesGroup(exchange=arguments.exchange) as group:
        try:
            return _verify(case, group, device, arguments.rows, arguments.repeats)
        except ExchangeError as error:
            print(f"ulysses-triton verify: rank {group.rank}: {error}", file=sys.stderr, flush=True)
            return 1


def _device(asked: str) -> torch.device:
    """This rank's device."""
    gpus = 0 if asked == "cpu" else torch.cuda.device_count()
    if asked == "cuda" and not gpus:
        raise OptionError("--device cuda, but PyTorch finds no GPU here")
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus and local_ranks > gpus:
        raise OptionError(f"{local_ranks} ranks need a GPU each and there are {gpus}; start fewer, or use --device cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpus else torch.device("cpu")


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """The default process group under torchrun; alone there is none."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    yield
    dist.destroy_process_group()


def _verify(case: Case, group: UlyssesGroup, device: torch.device, count: int | None, repeats: int) -> int:
    inputs = draw(case, device)
    rows = sampled(case, device, count)
    checked = inputs if len(rows) == case.tokens else inputs.zero_but(rows)
    found = compare(case, group.rank, Layer(case, checked, group).results(), checked, rows)
    holds = all(row.ok for row in found)
    if group.rank == 0:
        print(_verdict(case, device, found, rows), flush=True)
    if repeats and holds:
        layer = Layer(case, inputs, group)
        ours = timed(layer.forward, layer.backward, repeats)
        if group.rank == 0:
            print(_timings(case, ours, time_sdpa(case, inputs, repeats), repeats))
        _together()
    if group.rank == 0:
        print(f"\n{group.explain()}\n\n{'It holds.' if holds else 'It does NOT hold.'}", flush=True)
    return 0 if holds else 1


def _verdict(case: Case, device: torch.device, found: list[Row], rows: Tensor) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    what = f"all {case.tokens} query rows"
    if len(rows) < case.tokens:
        what = (
            f"{len(rows)} of {case.tokens} query rows, drawn at random; the output's gradient is zero in the others, "
            "so the gradients are what these rows contribute, for all tokens"
        )
    lines = [f"{case}; on {name}, torch {torch.__version__}", f"held against fp64: {what}", ""]
    lines.append(f"{'name':8} {'error':>9} {'allowed':>9}  ok")
    lines += [f"{r.name:8} {r.error:9.1e} {r.allowed:9.1e}  {'yes' if r.ok else 'NO'}" for r in found]
    return "\n".join(lines)


def _timings(case: Case, ours: Times, sdpa: Times | None, repeats: int) -> str:
    ranks = f"{case.ranks} rank{'s' * (case.ranks > 1)}"
    lines = ["", f"{f'ms, median of {repeats}':28} {'forward':>9} {'backward':>9}"]
    for name, t in ((f"this library, {ranks}", ours), ("PyTorch's SDPA, one device", sdpa)):
        numbers = "does not fit into memory" if t is None else f"{t.forward:9.2f} {t.backward:9.2f}"
        lines.append(f"{name:28} {numbers}")
    if sdpa is None:
        return "\n".join(lines)
    without = [*case.options, *["QK-norm and RoPE"] * case.fused]
    lines += [f"SDPA is timed without {', '.join(without)}"] * bool(without)
    lines += ["SDPA's time includes repeating the kv heads"] * (case.heads > case.kv_heads)
    return "\n".join(lines)
