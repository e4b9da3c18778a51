"""Runs the steps of a schedule for one layer on one rank: buffers, views, kernels and the exchange, put together.

`forward` and `backward` are what the op calls. Everything here is about where things lie; what is computed is the
kernels', which heads are whose is the placement's, and in which order is the schedule's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import schedule
from .exchange.base import Hop
from .group import UlyssesGroup
from .kernels._blocks import combine, lists
from .kernels._views import (
    Blocks,
    Documents,
    Dropout,
    HeadGrads,
    HeadMap,
    Options,
    ORows,
    Predicate,
    QKVRows,
    Span,
    Transform,
)
from .local import choose
from .placement import Field, Message, Placement, Row, Section, inbound, outbound, place, round_up
from .spec import Problem

_ALIGN = 64  # bytes between the regions of a workspace


class Inputs(NamedTuple):
    """A call's tensors: q `[B, L, Hq, D]`, k `[B, Lk, Hkv, D]`, v `[B, Lk, Hkv, Dv]`, any strides, dense last dim.

    What follows is of the whole sequence and all heads, and equal on every rank.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    transform: Transform | None
    sinks: Tensor | None = None  # [Hq]
    slopes: Tensor | None = None  # [Hq]
    documents: Documents | None = None
    predicate: Predicate | None = None
    blocks: Tensor | None = None  # status of a block mask
    dropout: Dropout | None = None


class SmallGrads(NamedTuple):
    """This rank's shares of the gradients of what every rank is given whole; their sum over the ranks is the gradient.

    None for what was not given or not asked for.
    """

    q_norm: Tensor | None = None  # [D]
    k_norm: Tensor | None = None  # [D]
    sinks: Tensor | None = None  # [Hq], zero for other ranks' heads
    slopes: Tensor | None = None  # [Hq]


class Workspace(NamedTuple):
    """What forward keeps for backward, as byte ranges of one buffer; O in head layout is for aten only."""

    sections: tuple[slice, ...]
    lse: slice
    output: slice
    size: int


def workspace(problem: Problem, rank: int) -> Workspace:
    """The workspace of a problem on one rank. Ranges that backward does not need are empty."""
    placement, local = place(problem), choose(problem)
    share = placement.shares[rank]
    stop = 0

    def region(size: int) -> slice:
        nonlocal stop
        start = round_up(stop, _ALIGN)
        stop = start + size
        return slice(start, stop)

    grad = problem.grad and problem.attention != "callable"  # around a callable, autograd itself keeps the rows
    keep_rows = grad and not problem.recompute
    sections = tuple(
        region(sum(s.lens) * problem.batch * s.rows[rank].width * problem.item_size * keep_rows) for s in placement.qkv
    )
    stat_size = problem.item_size * problem.stat_width
    lse = region(share.q_heads * problem.batch * problem.seq * stat_size * grad)
    out = placement.out[0].rows[rank].width * problem.batch * problem.seq * problem.item_size
    output = region(out * (grad and local.keeps_output))
    return Workspace(sections, lse, output, stop)


def forward(problem: Problem, group: UlyssesGroup, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one layer: (out `[B, L, Hq, Dv]`, LSE `[B, L, Hq]` or empty, workspace bytes or empty)."""
    run = _Run(problem, group, inputs)
    run.saved = group.pool.take((run.space.size,), torch.uint8, inputs.q.device)
    run.all(schedule.forward(group.exchange.one_sided))
    assert run.out is not None
    return run.out, run.user_lse, run.saved


def backward(
    problem: Problem,
    group: UlyssesGroup,
    inputs: Inputs,
    grads: Inputs,
    saved: Tensor,
    out: Tensor | None,
    dout: Tensor,
    dlse: Tensor | None,
    slopes: bool = False,
) -> SmallGrads:
    """Gradients of one layer into `grads` (tensors like the inputs), and those of norm weights, sinks and slopes.

    q, k and v of `inputs` matter only where they are raw (QK-norm) or exchanged again (`recompute`); `slopes` asks for
    their gradient.
    """
    run = _Run(problem, group, inputs)
    run.saved, run.grads, run.out, run.dout, run.dlse = saved, grads, out, dout, dlse
    run.head_grads = HeadGrads(run.per_head(inputs.sinks), run.per_head(inputs.slopes if slopes else None))
    run.all(schedule.backward(problem.recompute))
    return SmallGrads(*run.norm_grads, *map(run.of_all_heads, run.head_grads))


def exchange_in(problem: Problem, group: UlyssesGroup, inputs: Inputs) -> list[Tensor]:
    """The inbound half alone, for a callable: the received rows `[tokens, B, row]` of each section."""
    run = _Run(problem, group, inputs)
    run.saved = torch.empty(0, dtype=torch.uint8, device=run.device)
    run.all(schedule.IN)
    sections, rank = run.placement.qkv, group.rank
    received = zip(run.received["exchange_in"], sections, strict=True)
    return [_tidied(rows, sum(s.lens), problem.batch, s.rows[rank]) for rows, s in received]


def exchange_in_backward(
    problem: Problem, group: UlyssesGroup, inputs: Inputs, grads: Inputs, rows: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the received rows, sent back, summed over the ranks that shared a kv head, and un-transformed."""
    run = _Run(problem, group, inputs)
    run.placement = replace(run.placement, grad_qkv=run.placement.qkv)
    run.grads = grads
    sections = run.placement.grad_qkv
    run.send("exchange_grad_out", outbound, sections, rows[: len(sections)])
    run.all(schedule.IN_BACKWARD)
    return run.norm_grads


def exchange_out(problem: Problem, group: UlyssesGroup, inputs: Inputs, rows: Tensor) -> Tensor:
    """The outbound half alone: rows `[S, B, row]` of O in head layout to out `[B, L, Hq, Dv]`."""
    run = _Run(problem, group, inputs)
    run.send("exchange_out", outbound, run.placement.out, [rows])
    run.all(schedule.OUT)
    assert run.out is not None
    return run.out


def exchange_out_backward(problem: Problem, group: UlyssesGroup, inputs: Inputs, dout: Tensor) -> Tensor:
    """The gradient of O in head layout, rows `[S, B, row]`."""
    run = _Run(problem, group, inputs)
    run.dout, run.out, run.dlse = dout, None, None
    run.all(schedule.OUT_BACKWARD)
    row = run.placement.out[0].rows[group.rank]
    return run.received["exchange_grad_in"][0].view(problem.seq, problem.batch, row.width)


def views_of_rows(problem: Problem, rank: int, received: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q `[S, B, hq, D]`, k `[Sk, B, hkv, D]` and v `[Sk, B, hkv, Dv]` of a rank's heads, in the rows it received."""
    views: dict[str, Tensor] = {}
    for rows, section in zip(received, place(problem).qkv, strict=True):
        views |= _view(rows, sum(section.lens), problem.batch, section.rows[rank], torch.float32)
    return views["q"], views["k"], views["v"]


def o_of_rows(problem: Problem, rank: int, rows: Tensor) -> Tensor:
    """O (or its gradient) `[S, B, hq, Dv]` of a rank's heads, in rows `[S, B, row]` in head layout."""
    return _view(rows, problem.seq, problem.batch, place(problem).out[0].rows[rank], torch.float32)["o"]


class _Run:
    """One pass over a schedule: what the steps hand to each other."""

    out: Tensor | None
    user_lse: Tensor
    saved: Tensor
    grads: Inputs
    dout: Tensor
    dlse: Tensor | None
    norm_grads: tuple[Tensor | None, Tensor | None]
    head_grads: HeadGrads

    def __init__(self, problem: Problem, group: UlyssesGroup, inputs: Inputs) -> None:
        self.problem, self.group, self.inputs = problem, group, inputs
        self.placement: Placement = place(problem)
        self.local = choose(problem)
        self.share = self.placement.shares[group.rank]
        self.space = workspace(problem, group.rank)
        self.device, self.dtype = inputs.q.device, inputs.q.dtype
        self.stat_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.hops: dict[str, Hop] = {}
        self.received: dict[str, list[Tensor]] = {}
        group.note(self.local, self.placement)

    def all(self, steps: Sequence[schedule.Step]) -> None:
        actions: dict[str, Callable[[], None]] = {
            "pack": self._pack,
            "attend": self._attend,
            "unpack": self._unpack,
            "pack_grad": self._pack_grad,
            "attend_backward": self._attend_backward,
            "unpack_grad": self._unpack_grad,
        }
        recorder = self.group.recorder
        for step in steps:
            if step.stream == "exchange":
                self._finish(step.name)
            elif recorder is None:
                actions[step.name]()
            else:
                with recorder.step(self.group, step, self.device):
                    actions[step.name]()

    # -- forward

    def _pack(self) -> None:
        sections = self.placement.qkv
        kept = [self.saved[region].view(self.dtype) for region in self.space.sections]
        receive = [
            mine if mine.numel() else self._take(sum(message.receive))
            for mine, message in zip(kept, self._messages(inbound, sections), strict=True)
        ]
        hop = self._open("exchange_in", inbound, sections, receive)
        self.local.pack(*self.inputs[:3], self._qkv_rows(hop.blocks, sections), self.inputs.transform)

    def _attend(self) -> None:
        p, rank = self.problem, self.group.rank
        section = self.placement.out[0]
        head_lse = self._head_lse(self.saved) if p.grad else None
        kept = self.saved[self.space.output].view(self.dtype)
        if self.group.exchange.one_sided:
            spans = self._straight_out(section)
            if kept.numel():
                spans.append(Span(0, (_view(kept, p.seq, p.batch, section.rows[rank], self.stat_dtype)["o"], None)))
        else:
            send = kept if kept.numel() else self._take(p.seq * p.batch * section.rows[rank].width)
            message = self._messages(outbound, [section])[0]
            self._open("exchange_out", outbound, [section], [self._take(sum(message.receive))], [send])
            views = _view(send, p.seq, p.batch, section.rows[rank], self.stat_dtype)
            spans = [Span(0, (views["o"], views["stat"].squeeze(-1) if p.return_lse else None))]
        self.local.attend_forward(*self._qkv(), spans, head_lse, self._options())

    def _straight_out(self, section: Section) -> list[Span]:
        """Allocate the results and offer them to the peers; where each rank's tokens go, in their final layout."""
        p, share = self.problem, self.share
        tokens = p.lens[self.group.rank]
        self.out = self.group.pool.take((p.batch, tokens, p.heads, p.value_dim), self.dtype, self.device)
        lse_shape = (p.batch, tokens, p.heads) if p.return_lse else (0,)
        self.user_lse = self.group.pool.take(lse_shape, self.stat_dtype, self.device)
        nothing = Message(*[(0,) * p.ranks] * 3)  # nobody sends blocks: rows are written where they belong
        with self.group.step("exchange_out"):
            hop = self.group.exchange.open([nothing, nothing], [self.out, self.user_lse], [None, None])
        self._remember(
            "exchange_out", self._watched("exchange_out", hop, hop.peers, share.q_heads / p.heads), [self.out]
        )
        assert hop.peers is not None
        heads = slice(share.q_start, share.q_stop)
        return [
            Span(
                start,
                (
                    o.view(p.batch, n, p.heads, p.value_dim).transpose(0, 1)[:, :, heads],
                    lse.view(p.batch, n, p.heads).transpose(0, 1)[:, :, heads] if p.return_lse else None,
                ),
            )
            for start, n, o, lse in zip(_starts(p.lens), p.lens, *hop.peers, strict=True)
        ]

    def _unpack(self) -> None:
        p = self.problem
        shape = (p.batch, p.lens[self.group.rank], p.heads, p.value_dim)
        self.out = self.group.pool.take(shape, self.dtype, self.device)
        lse_shape = shape[:3] if p.return_lse else (0,)
        self.user_lse = self.group.pool.take(lse_shape, self.stat_dtype, self.device)
        rows = self._o_rows(self._blocks("exchange_out", self.placement.out), self.placement.out[0])
        self.local.unpack(rows, self.out, self.user_lse if p.return_lse else None)

    # -- backward

    def _pack_grad(self) -> None:
        sections = self.placement.grad_out
        message = self._messages(inbound, sections)[0]
        hop = self._open("exchange_grad_in", inbound, sections, [self._take(sum(message.receive))])
        rows = self._o_rows(hop.blocks[0], sections[0])
        self.local.pack_grad(self.dout, self.out if self.problem.sends_delta else None, self.dlse, rows)

    def _attend_backward(self) -> None:
        p, rank = self.problem, self.group.rank
        (received,), section = self.received["exchange_grad_in"], self.placement.grad_out[0]
        views = _view(received, p.seq, p.batch, section.rows[rank], self.stat_dtype)
        if self.local.keeps_output:
            kept = self.saved[self.space.output].view(self.dtype)
            extra = _view(kept, p.seq, p.batch, self.placement.out[0].rows[rank], self.stat_dtype)["o"]
        else:
            extra = views["stat"].squeeze(-1)
        sections = self.placement.grad_qkv
        messages = self._messages(outbound, sections)
        receive = [self._take(sum(message.receive)) for message in messages]
        one_sided = self.group.exchange.one_sided
        send = None if one_sided else [self._take(sum(message.send)) for message in messages]
        hop = self._open("exchange_grad_out", outbound, sections, receive, send)
        blocks = hop.blocks if send is None else [[buffer] for buffer in send]
        dq = self._spans(blocks[0], sections[0], ("q",))
        dkv = self._spans(blocks[-1], sections[-1], ("k", "v"))
        lse = self._head_lse(self.saved)
        self.local.attend_backward(*self._qkv(), views["o"], lse, extra, dq, dkv, self._options(), self.head_grads)

    def _unpack_grad(self) -> None:
        transform = self.inputs.transform
        normed = transform is not None and (transform.q_norm is not None or transform.k_norm is not None)
        sections = self.placement.grad_qkv
        blocks = [self._blocks("exchange_grad_out", sections, m) for m in range(len(sections))]
        self.norm_grads = self.local.unpack_grad(
            self._qkv_rows(blocks, sections),
            self.inputs.q if normed else None,
            self.inputs.k if normed else None,
            *self.grads[:3],
            transform,
        )

    # -- exchange

    def _messages(
        self, direction: Callable[[Section, int, int], Message], sections: Sequence[Section]
    ) -> list[Message]:
        return [direction(section, self.problem.batch, self.group.rank) for section in sections]

    def _open(
        self,
        name: str,
        direction: Callable[[Section, int, int], Message],
        sections: Sequence[Section],
        receive: list[Tensor],
        send: Sequence[Tensor | None] | None = None,
    ) -> Hop:
        with self.group.step(name):
            hop = self.group.exchange.open(self._messages(direction, sections), receive, send or [None] * len(receive))
        self._remember(name, self._watched(name, hop, hop.blocks), receive)
        return hop

    def send(
        self,
        name: str,
        direction: Callable[[Section, int, int], Message],
        sections: Sequence[Section],
        rows: Sequence[Tensor],
    ) -> None:
        """Open a hop for rows that lie in head layout already; only a one-sided exchange needs them copied."""
        flat = [part.contiguous().view(-1) for part in rows]
        messages = self._messages(direction, sections)
        hop = self._open(name, direction, sections, [self._take(sum(message.receive)) for message in messages], flat)
        if self.group.exchange.one_sided:
            for part, blocks, message in zip(flat, hop.blocks, messages, strict=True):
                for block, mine in zip(blocks, torch.split(part, list(message.send)), strict=True):
                    block.copy_(mine)

    def _watched(self, name: str, hop: Hop, into: Sequence[Sequence[Tensor]] | None, part: float = 1.0) -> Hop:
        """The hop, or inside `trace()` one that notes its times; this rank writes `part` of what `into` names."""
        recorder = self.group.recorder
        return hop if recorder is None else recorder.hop(self.group, name, 0, hop, into or (), part, self.device)

    def _remember(self, name: str, hop: Hop, receive: list[Tensor]) -> None:
        self.hops[name], self.received[name] = hop, receive

    def _finish(self, name: str) -> None:
        self.group.counts[name] += 1
        with self.group.step(name):
            self.hops[name].start()
            self.hops[name].finish()

    # -- views

    def _take(self, elements: int) -> Tensor:
        return self.group.pool.take((elements,), self.dtype, self.device)

    def per_head(self, given: Tensor | None) -> Tensor | None:
        """A copy of this rank's heads of what is given for all, in the precision of the statistics."""
        mine = slice(self.share.q_start, self.share.q_stop)
        return None if given is None else given[mine].to(self.stat_dtype, copy=True)

    def of_all_heads(self, mine: Tensor | None) -> Tensor | None:
        """`[Hq]` with zeros for the heads of other ranks."""
        after = self.problem.heads - self.share.q_stop
        return None if mine is None else torch.nn.functional.pad(mine, (self.share.q_start, after))

    def _options(self) -> Options:
        p, given = self.problem, self.inputs
        found = Options(
            scale=p.scale,
            causal=p.causal,
            heads=HeadMap(self.placement.group, self.share.q_start),
            window=p.window,
            softcap=p.softcap,
            documents=given.documents,
            sinks=self.per_head(given.sinks),
            slopes=self.per_head(given.slopes),
            dropout=given.dropout,
            predicate=given.predicate,
        )
        if given.blocks is None:
            return found
        tables = () if given.documents is None else given.documents
        key = (self.share, p.bounds, p.seq, p.kv_seq)
        return found._replace(blocks=self.group.memo.get((given.blocks, *tables), key, lambda: self._lists(found)))

    def _lists(self, options: Options) -> Blocks:
        """The tiles that a block mask and all other masks leave this rank's heads."""
        status, share = self.inputs.blocks, self.share
        assert status is not None
        mine = status if status.size(1) == 1 else status[:, share.q_start : share.q_stop]
        left = combine(mine, options, self.problem.seq, self.problem.kv_seq)
        return lists(left, options.heads, share.q_heads, share.kv_heads)

    def _head_lse(self, saved: Tensor) -> Tensor:
        p = self.problem
        return saved[self.space.lse].view(self.stat_dtype).view(self.share.q_heads, p.batch, p.seq)

    def _qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of this rank's heads over the whole sequence: views of the received rows."""
        received = self.received.get("exchange_in")
        if received is None:
            received = [self.saved[region].view(self.dtype) for region in self.space.sections]
        return views_of_rows(self.problem, self.group.rank, received)

    def _blocks(self, name: str, sections: Sequence[Section], m: int = 0) -> Sequence[Tensor]:
        """What arrived in an outbound hop, one block per rank that sent it."""
        message = outbound(sections[m], self.problem.batch, self.group.rank)
        return torch.split(self.received[name][m], list(message.receive))

    def _qkv_rows(self, blocks: Sequence[Sequence[Tensor]], sections: Sequence[Section]) -> list[QKVRows]:
        """Every rank's block of my tokens, as q, k and v (or their gradients)."""
        rows = []
        for rank, share in enumerate(self.placement.shares):
            views: dict[str, Tensor] = {}
            for block, section in zip(blocks, sections, strict=True):
                tokens = section.lens[self.group.rank]
                views |= _view(block[rank], tokens, self.problem.batch, section.rows[rank], self.stat_dtype)
            rows.append(QKVRows(views["q"], views["k"], views["v"], share.q_start, share.kv_start))
        return rows

    def _o_rows(self, blocks: Sequence[Tensor], section: Section) -> list[ORows]:
        """Every rank's block of my tokens, as O (or its gradient) and LSE (or delta)."""
        rows = []
        for rank, share in enumerate(self.placement.shares):
            tokens = section.lens[self.group.rank]
            views = _view(blocks[rank], tokens, self.problem.batch, section.rows[rank], self.stat_dtype)
            stat = views["stat"].squeeze(-1) if "stat" in views else None
            rows.append(ORows(views["o"], stat, share.q_start))
        return rows

    def _spans(self, blocks: Sequence[Tensor], section: Section, names: tuple[str, ...]) -> list[Span]:
        """Where the gradients of every token go: a block per rank, or one block with all of them."""
        lens = section.lens if len(blocks) > 1 else (sum(section.lens),)
        row = section.rows[self.group.rank]
        spans = []
        for block, start, n in zip(blocks, _starts(lens), lens, strict=True):
            views = _view(block, n, self.problem.batch, row, self.stat_dtype)
            spans.append(Span(start, tuple(views[name] for name in names)))
        return spans


def _starts(lens: Sequence[int]) -> list[int]:
    return [sum(lens[:rank]) for rank in range(len(lens))]


def _view(flat: Tensor, tokens: int, batch: int, row: Row, stat_dtype: torch.dtype) -> dict[str, Tensor]:
    """The fields of rows as `[tokens, batch, heads, dim]`; wide ones as fp32 over the bits of the row."""
    rows = flat.reshape(tokens, batch, row.width)
    return {field.name: _field(rows, field, stat_dtype) for field in row.fields}


def _tidied(flat: Tensor, tokens: int, batch: int, row: Row) -> Tensor:
    """Rows as `[tokens, batch, row]`, with zeros where nobody wrote: the results of an op say the same every time."""
    rows = flat.view(tokens, batch, row.width)
    stop = 0
    for field in row.fields:
        stop = field.offset + field.size
        rows[..., field.offset : stop].unflatten(-1, (field.heads, field.stride))[..., field.dim :].zero_()
    rows[..., stop:].zero_()
    return rows


def _field(rows: Tensor, field: Field, stat_dtype: torch.dtype) -> Tensor:
    part = rows[:, :, field.offset : field.offset + field.size]
    if field.width > 1:
        part = part.view(stat_dtype)
    heads = part.unflatten(-1, (field.heads, field.stride))
    return heads if field.dim == field.stride else heads[..., : field.dim]  # autograd copies for a slice of all
