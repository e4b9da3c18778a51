"""Times of attention, forward and backward, against other kernels on the same tensors in the same run.

TFLOP/s count two matrix products in forward and five in backward over the attended pairs, whatever a kernel computes
besides. Peers read the same rows through views; their backward computes delta itself, which ours gets from pack_grad.
Slopes of ALiBi get no gradient, which peers do not know. All are timed in turn, call by call, so that the clock of the
device is the same for all.

At the timed size the check takes some query rows of every head, and a gradient of the output that is zero in all
others; every element must at least have been written. A peer must come near our result before it is timed.
"""

from __future__ import annotations

import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from ulysses_triton import truth
from ulysses_triton.kernels._views import Options, Span

from . import _check
from ._check import Findings, Found
from ._data import Attention, Memory
from ._measure import Timing
from ._record import ratio, table
from ._roofline import GPUS
from ._session import Session, milliseconds, verdict

TOKENS = 16384  # of all sequences of a case together, where one is not longer
HEADS = ((128, 16), (64, 32), (256, 8))  # head dims and query heads
NEAR = 2e-2  # how far a peer's results may be from ours: it is the same attention, in this precision
SCORES = 1 << 27  # in fp64 at once, of a check at a timed size
FLEX_SECONDS = 90.0  # after so much time in its compilations, no other is begun
RUNS = (0, 1, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 5, 6)  # packed: seven documents, as many tokens as the runs say


def cases(*, dry: bool) -> list[Attention]:
    """What is timed, the telling ones first."""
    if dry:
        case = Attention(40, hq=2, D=16, dtype="fp16")
        return [case, replace(case, causal=False), replace(case, documents=RUNS)]

    def at(S: int, D: int = 128, group: int = 4, **options: Any) -> Attention:
        return Attention(S, B=max(1, TOKENS // S), hq=dict(HEADS)[D], group=group, D=D, **options)

    return [
        *(at(8192, D, causal=causal) for D in (128, 64) for causal in (True, False)),
        at(16384, window=(4096, 0)),
        at(16384, documents=RUNS),
        *(at(8192, 256, causal=causal) for causal in (True, False)),
        *(at(S, causal=causal) for S in (32768, 2048) for causal in (True, False)),
        at(8192, group=1),
        at(8192, group=8),
        at(8192, alibi=True),
        at(8192, dropout=0.1),
        at(131072),
        *(at(S, causal=causal) for S in (16384, 4096) for causal in (True, False)),
        *(at(S, D, causal=causal) for S in (2048, 32768) for D in (64, 256) for causal in (True, False)),
        *(at(8192, D, group) for D in (64, 256) for group in (1, 8)),
        *(
            at(16384, D, **{name: value})
            for D in (64, 256)
            for name, value in (("window", (4096, 0)), ("documents", RUNS))
        ),
        at(65536),
        *(at(131072, D) for D in (64, 256)),
        at(131072, causal=False),
    ]


def flops(case: Attention) -> tuple[float, float]:
    """Of forward and backward."""
    each = 2.0 * attended(case) * case.hq
    return each * (case.D + case.value_dim), each * (3 * case.D + 2 * case.value_dim)


def attended(case: Attention) -> int:
    """The pairs of a head, in all sequences, for equal numbers of queries and keys and documents in one piece."""
    back, forth = (min(n, case.S) for n in case.bounds)
    lengths = [case.S] * case.B
    if case.documents:
        ids = case.ids(case.S, torch.device("cpu"))
        lengths = [n for row in ids for n in row.unique(return_counts=True)[1].tolist()]

    def pairs(n: int) -> int:
        i = torch.arange(n)
        return int(((i + forth).clamp(max=n - 1) - (i - back).clamp(min=0) + 1).sum())

    return sum(map(pairs, lengths))


class Rows(NamedTuple):
    """One attention as it lies between two exchanges: views `[S, B, heads, dim]` of rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    do: Tensor
    lse: Tensor
    delta: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    options: Options


def rows_of(case: Attention, device: torch.device) -> Rows:
    memory = Memory(device, seed=2)
    S, B, dtype, options = case.S, case.B, case.torch_dtype, case.options(device)
    heads = ((case.hq, case.D), (case.hkv, case.D), (case.hkv, case.value_dim))
    q, k, v = memory.filled(S, B, *heads, dtype=dtype)
    (o,) = memory.rows(S, B, (case.hq, case.value_dim), dtype=dtype)
    (do,) = memory.filled(S, B, (case.hq, case.value_dim), dtype=dtype)
    dq, dk, dv = memory.rows(S, B, *heads, dtype=dtype)
    lse = memory.nan(case.hq, B, S, dtype=torch.float32)
    delta = memory.nan(S, B, case.hq, dtype=torch.float32)
    return Rows(q, k, v, o, do, lse, delta, dq, dk, dv, options)


def run(session: Session) -> Iterator[list[dict[str, Any]]]:
    wanted = cases(dry=session.dry)
    if not session.is_late:
        _compile(session, wanted)
    peers = Peers(session)
    for case in session.in_time(wanted):
        yield _records(session, case, rows_of(case, session.device), peers)


def _compile(session: Session, wanted: list[Attention]) -> None:
    """Kernels of all kinds at once, on short sequences: their compilation is most of the time of a first call."""
    if session.dry:
        return
    new = (case for case in wanted if str(case) not in session.done)
    kinds = {(case.D, case.flags): replace(case, S=256, B=1, hq=case.group) for case in new}

    def build(case: Attention) -> None:
        try:
            for call in _calls(session, case, rows_of(case, session.device)):
                call()
        except Exception:  # the check of the case will say so
            pass

    with session.threads() as threads:
        list(threads.map(build, kinds.values()))


def _records(session: Session, case: Attention, rows: Rows, peers: Peers) -> list[dict[str, Any]]:
    forward, backward = _calls(session, case, rows)
    ours, right = session.gate("attend_forward", str(case), partial(_check_forward, case, rows, forward))
    records = [ours | sizes(case)]
    if right:
        theirs = peers.forward(case, rows)
        records[0] |= _times(session, flops(case)[0], forward, theirs)
        rows.delta.copy_((rows.do.float() * rows.o.float()).sum(-1))
        ours, right = session.gate("attend_backward", str(case), partial(_check_backward, case, rows, backward))
        records.append(ours | sizes(case))
        if right:
            backward()
            records[1] |= _times(session, flops(case)[1], backward, peers.backward(case, rows, theirs))
    return records


def _calls(session: Session, case: Attention, r: Rows) -> tuple[Callable[[], None], Callable[[], None]]:
    kernels = session.kernels
    out, dq, dkv = [Span(0, (r.o, None))], [Span(0, (r.dq,))], [Span(0, (r.dk, r.dv))]
    return (
        lambda: kernels.attend_forward(r.q, r.k, r.v, out, r.lse, r.options),
        lambda: kernels.attend_backward(r.q, r.k, r.v, r.do, r.lse, r.delta, dq, dkv, r.options),
    )


def sizes(case: Attention) -> dict[str, Any]:
    return {
        "tokens": case.S, "batch": case.B, "heads": case.hq, "kv_heads": case.hkv, "head_dim": case.D,
        "options": list(case.flags), "dtype": case.dtype,
    }  # fmt: skip


def _times(session: Session, work: float, call: Callable[[], None], peers: dict[str, Call | str]) -> dict[str, Any]:
    """Ours and the peers that can be called, in turn; of the others, why not."""
    try:
        timings = session.stopwatch.time_all({"ours": call} | {n: peer for n, peer in peers.items() if callable(peer)})
    except Exception as error:  # one that had been ready; nobody knows which
        peers = {n: _reason(error) if callable(peer) else peer for n, peer in peers.items()}
        timings = session.stopwatch.time_all({"ours": call})

    def said(timing: Timing) -> dict[str, Any]:
        return {"ms": milliseconds(timing), "tflop_per_s": timing.rate(work) / 1e3}

    ours = said(timings["ours"])
    peak = peak_tflop_per_s(session.device)
    return ours | {
        "flops": work,
        "share_of_matmul": ours["tflop_per_s"] / session.ceilings["matmul_tflop_per_s"],
        "share_of_peak": ours["tflop_per_s"] / peak if peak else None,
        "peers": {n: {"unavailable": peer} if isinstance(peer, str) else said(timings[n]) for n, peer in peers.items()},
    }


def peak_tflop_per_s(device: torch.device) -> float | None:
    """Of dense products in bf16, where `GPUS` knows the device: its architecture and its number of processors."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    gpu = GPUS.get(f"sm_{found.major}{found.minor}")
    if gpu is None or gpu.processors != found.multi_processor_count:
        return None
    return gpu.processors * gpu.clock * gpu.flops[2] / 1e3


# -- checks


def _check_forward(case: Attention, r: Rows, forward: Callable[[], None]) -> Findings:
    forward()
    rows = _sample(case, r)
    expected, limits = _truth(case, r, rows)
    lse = r.lse.permute(2, 1, 0)
    found = {"unwritten": Found(float(r.o.isnan().sum() + r.lse.isnan().sum()), 0.0)}
    found |= {n: _found(x[rows], expected[n], limits[n]) for n, x in (("out", r.o), ("lse", lse))}
    return found


def _check_backward(case: Attention, r: Rows, backward: Callable[[], None]) -> Findings:
    rows = _sample(case, r)
    expected, limits = _truth(case, r, rows)
    do, delta = r.do.clone(), r.delta.clone()
    r.do.zero_()
    r.delta.zero_()
    r.do[rows] = do[rows]
    r.delta[rows] = (expected["out"] * do[rows].double()).sum(-1).float()
    backward()
    r.do.copy_(do)
    r.delta.copy_(delta)
    elsewhere = r.dq.clone()
    elsewhere[rows] = 0
    found = {"dq elsewhere": Found(float((elsewhere != 0).sum()), 0.0)}  # NaN counts
    found["unwritten"] = Found(float(sum(x.isnan().sum() for x in (r.dq[rows], r.dk, r.dv))), 0.0)
    results = {"dq": r.dq[rows], "dk": r.dk, "dv": r.dv}
    return found | {n: _found(x, expected[n], limits[n]) for n, x in results.items()}


def _sample(case: Attention, r: Rows) -> Tensor:
    """Positions of up to 128 query rows, odd steps apart so that they lie at all places in tiles."""
    most = min(128, SCORES // (case.S * case.B * case.hq))
    return torch.arange(0, case.S, case.S // most | 1, device=r.q.device)


def _truth(case: Attention, r: Rows, rows: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    tensors = (r.q[rows], r.k, r.v, r.do[rows])
    return _check.exact(case, r.options, tensors, None, rows), _check.limits(case, r.options, tensors, rows)


def _found(result: Tensor, exact: Tensor, limit: float) -> Found:
    return Found(truth.relative_error(result, exact), limit)


# -- peers

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of [B, S, h, D], as ours


class Unavailable(Exception):
    """Why a peer does not do a case."""


def _require(case: Attention, *known: str) -> None:
    unknown = set(case.flags) - {"causal", "dense", *known}
    if unknown:
        raise Unavailable(f"knows no {', '.join(sorted(unknown))}")


def _sdpa(backend: SDPBackend, case: Attention, _: Rows) -> Attend:
    _require(case, "dropout")
    also = {"enable_gqa": True} if case.group > 1 else {}

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(
                q, k, v, is_causal=case.causal, scale=case.factor, dropout_p=case.dropout, **also
            )
        return out.transpose(1, 2)

    return attend


def _flash_attention(module: str, known: tuple[str, ...], case: Attention, rows: Rows) -> Attend:
    """FlashAttention's own packages, which differ in what they know and are called much alike."""
    library = importlib.import_module(module)
    _require(case, *known)
    nothing = None if module.endswith("cute") else -1
    said: dict[str, Any] = {"softmax_scale": case.factor, "causal": case.causal}
    if case.window is not None:
        said["window_size"] = tuple(nothing if n < 0 else n for n in case.window)
    if case.alibi:
        said["alibi_slopes"] = rows.options.slopes
    if case.dropout:
        said["dropout_p"] = case.dropout
    if not case.documents:
        return lambda q, k, v: _first(library.flash_attn_func(q, k, v, **said))
    lengths = case.ids(case.S, rows.q.device)[0].unique_consecutive(return_counts=True)[1]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    said |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    said |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), int(lengths.max()))
    return lambda q, k, v: _first(library.flash_attn_varlen_func(q[0], k[0], v[0], **said))[None]


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]  # with the LSE behind it


def _flex(case: Attention, rows: Rows, *, compiled: bool) -> Attend:
    _require(case, "window", "documents", "alibi")
    back, forth = (min(n, case.S) for n in case.bounds)
    device, slopes = rows.q.device, rows.options.slopes
    ids = case.ids(case.S, device) if case.documents else None

    def kept(b: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        bounded = (i - j <= back) & (j - i <= forth)
        return bounded if ids is None else bounded & (ids[b, i] == ids[b, j])

    def score(x: Tensor, _: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return x - slopes[h] * (i - j).abs()

    mask = None
    if case.flags != ("dense",):
        mask = create_block_mask(kept, case.B if case.documents else None, None, case.S, case.S, device=device)
    function = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    also = {"score_mod": None if slopes is None else score, "block_mask": mask}

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        return function(q, k, v, scale=case.factor, enable_gqa=case.group > 1, **also).transpose(1, 2)

    return attend


Call = Callable[[], object]


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"no module {error.name}"
    return f"{type(error).__name__}: {error}".removeprefix("Unavailable: ").splitlines()[0][:200]


class Peers:
    """All other kernels, made ready for one case after the other: what calls each, or the reason why it cannot be."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.kinds: dict[str, Callable[[Attention, Rows], Attend]] = {
            "flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
            "cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
            "flex": self._flex_of_kind,
            "fa2": partial(_flash_attention, "flash_attn", ("window", "documents", "alibi", "dropout")),
            "fa3": partial(_flash_attention, "flash_attn_interface", ("window", "documents")),
            "fa4": partial(_flash_attention, "flash_attn.cute", ("window", "documents")),
        }
        self.spent: dict[str, float] = defaultdict(float)  # seconds, for the most part in compilation
        self.flexed: dict[tuple[object, ...], Attention] = {}
        self.graphs: dict[str, tuple[Tensor, list[Tensor]]] = {}  # of this case: the output and its leaves

    def forward(self, case: Attention, r: Rows) -> dict[str, Call | str]:
        """With gradients to come, so that all of them write an LSE as ours does."""
        self.graphs = {}

        def ready(name: str) -> Call | str:
            leaves = [x.transpose(0, 1).detach().requires_grad_() for x in r[:3]]
            attend = self.kinds[name](case, r)
            out = attend(*leaves)
            self._hold(case, {"out": (out, r.o)})
            self.graphs[name] = out, leaves
            return partial(attend, *leaves)

        return {name: self._reason_or(ready, name) for name in self.kinds}

    def backward(self, case: Attention, r: Rows, forward: dict[str, Call | str]) -> dict[str, Call | str]:
        """Of those that are ready in `forward`."""

        def ready(name: str) -> Call | str:
            said = forward[name]
            if isinstance(said, str):
                return said
            out, leaves = self.graphs[name]
            call = partial(torch.autograd.grad, out, leaves, r.do.transpose(0, 1), retain_graph=True)
            self._hold(case, dict(zip(("dq", "dk", "dv"), zip(call(), (r.dq, r.dk, r.dv), strict=True), strict=True)))
            return call

        return {name: self._reason_or(ready, name) for name in forward}

    def _hold(self, case: Attention, results: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Theirs `[B, S, h, D]` against ours; under dropout each drops pairs of its own choice."""
        for name, (theirs, ours) in results.items():
            error = truth.relative_error(theirs.detach().transpose(0, 1), ours)
            if error > NEAR and not case.dropout:
                raise Unavailable(f"wrong: {name} is {error:.1e} from ours")

    def _reason_or(self, ready: Callable[[str], Call | str], name: str) -> Call | str:
        begin = time.monotonic()
        try:
            return ready(name)
        except Exception as error:  # a peer that fails is left out, for whatever reason
            return _reason(error)
        finally:
            self.spent[name] += time.monotonic() - begin

    def _flex_of_kind(self, case: Attention, rows: Rows) -> Attend:
        """FlexAttention, compiled for one case of each kind, as long as there is time for it."""
        first = self.flexed.setdefault((case.D, case.flags), case)
        if first != case:
            raise Unavailable(f"compiled for one case of this kind only: {first}")
        if self.session.dry:
            return _flex(case, rows, compiled=False)
        if self.spent["flex"] > FLEX_SECONDS:
            raise Unavailable(f"{self.spent['flex']:.0f} s went into its compilation, and there is no more time for it")
        torch.compiler.reset()  # it gives up after some recompilations
        importlib.import_module("torch._functorch.config").donated_buffer = False  # or a backward could run only once
        return _flex(case, rows, compiled=True)


def show(records: list[dict[str, Any]]) -> str:
    """Rates, and in the columns of the peers how many times theirs ours is."""
    names = list(dict.fromkeys(name for r in records for name, p in r.get("peers", {}).items() if "ms" in p))

    def line(r: dict[str, Any]) -> tuple[object, ...]:
        ratios = [f"{x:.2f}" if (x := ratio(r, name)) else None for name in names]
        rate, peak = r.get("tflop_per_s"), r.get("share_of_peak")
        return r["case"], r["kernel"], r.get("ms", {}).get("p50"), rate, peak, *ratios, verdict(r)

    header = ("case", "kernel", "ms p50", "TFLOP/s", "of peak", *(f"/ {n}" for n in names), "check")
    missing = dict.fromkeys(
        f"{name}: {p['unavailable']}" for r in records for name, p in r.get("peers", {}).items() if name not in names
    )
    return "\n".join([table(header, map(line, records)), *missing])
