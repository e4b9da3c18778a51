"""Runs the steps of a schedule for one layer on one rank: buffers, kernels and the exchange, put together.

`forward` and `backward` are what the op calls. What is computed is the kernels', which heads are whose is the
placement's, where they lie is the layout's, and in which order is the schedule's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from . import layout, projection, schedule
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
    Span,
    Transform,
)
from .layout import workspace
from .local import choose
from .placement import Heads, Message, Section, inbound, outbound, place
from .projection import Projection, split_qkv
from .schedule import Which
from .spec import Problem


class Inputs(NamedTuple):
    """A call's tensors: q `[B, L, Hq, D]`, k `[B, Lk, Hkv, D]`, v `[B, Lk, Hkv, Dv]`, any strides, dense last dim.

    Where they are projected from x in the layer, only their shapes and dtype mean anything. From `sinks` to `dropout`
    all is of the whole sequence and all heads, and equal on every rank.
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
    projection: Projection = Projection()


class SmallGrads(NamedTuple):
    """This rank's shares of the gradients of what every rank is given whole; their sum over the ranks is the gradient.

    None for what was not given or not asked for.
    """

    q_norm: Tensor | None = None  # [D]
    k_norm: Tensor | None = None  # [D]
    sinks: Tensor | None = None  # [Hq], zero for other ranks' heads
    slopes: Tensor | None = None  # [Hq]


def forward(problem: Problem, group: UlyssesGroup, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one layer: (out `[B, L, Hq, Dv]`, LSE `[B, L, Hq]` or empty, workspace bytes or empty).

    Where the output is projected out is `[B, L, E2]`.
    """
    run = _Run(problem, group, inputs)
    run.saved = group.pool.take((run.space.size,), torch.uint8, inputs.q.device)
    run.all(schedule.of(problem, group.exchange.one_sided))
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
    their gradient. With projections the gradients of q, k and v are no one's, and those of `grads.projection` are made.
    """
    run = _Run(problem, group, inputs)
    run.saved, run.out, run.dout, run.dlse = saved, out, dout, dlse
    run.grads = run.with_own_qkv(grads) if problem.projects else grads
    mine = run.placement.shares[group.rank]
    asked = (inputs.sinks, inputs.slopes if slopes else None)
    run.head_grads = HeadGrads(*(run.per_head(given, mine.q_start, mine.q_stop) for given in asked))
    run.all(schedule.of_backward(problem))
    return SmallGrads(*run.norm_grads, *map(run.of_all_heads, run.head_grads))


def exchange_in(problem: Problem, group: UlyssesGroup, inputs: Inputs) -> list[Tensor]:
    """The inbound half alone, for a callable: the received rows `[tokens, B, row]` of each section."""
    run = _Run(problem, group, inputs)
    run.saved = torch.empty(0, dtype=torch.uint8, device=run.device)
    run.all(schedule.IN)
    received = zip(run.received["exchange_in", 0], run.chunks[0].qkv, strict=True)
    return [layout.tidied(rows, sum(s.lens), problem.batch, s.rows[group.rank]) for rows, s in received]


def exchange_in_backward(
    problem: Problem, group: UlyssesGroup, inputs: Inputs, grads: Inputs, rows: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the received rows, sent back, summed over the ranks that shared a kv head, and un-transformed."""
    run = _Run(problem, group, inputs)
    sections = run.chunks[0].qkv
    run.chunks = (run.chunks[0]._replace(grad_qkv=sections),)
    run.grads = grads
    run.send_rows(sections, rows[: len(sections)])
    run.all(schedule.IN_BACKWARD)
    return run.norm_grads


def exchange_out(problem: Problem, group: UlyssesGroup, inputs: Inputs, o: Tensor) -> Tensor:
    """The outbound half alone: O `[S, B, hq, Dv]` in head layout to out `[B, L, Hq, Dv]`."""
    run = _Run(problem, group, inputs)
    run.send_output(o)
    run.all(schedule.out(group.exchange.one_sided))
    assert run.out is not None
    return run.out


def exchange_out_backward(problem: Problem, group: UlyssesGroup, inputs: Inputs, dout: Tensor) -> Tensor:
    """The gradient of O in head layout, rows `[S, B, row]`."""
    run = _Run(problem, group, inputs)
    run.dout, run.out, run.dlse = dout, None, None
    run.all(schedule.OUT_BACKWARD)
    row = run.chunks[0].out[0].rows[group.rank]
    return run.received["exchange_grad_in", 0][0].view(problem.seq, problem.batch, row.width)


class _Run:
    """One pass over a schedule: what the steps hand to each other. Steps of a chunk get its number."""

    out: Tensor | None
    user_lse: Tensor
    saved: Tensor
    grads: Inputs
    dout: Tensor
    dlse: Tensor | None
    norm_grads: tuple[Tensor | None, Tensor | None]
    head_grads: HeadGrads
    dqkv: Tensor  # [B, L, (Hq + 2 Hkv) D], where it is projected from x
    do: tuple[Tensor, Tensor | None]  # of a chunk whose output is projected: gradients of O and LSE
    sums: tuple[Tensor, Tensor] | None = None  # dk and dv of the kv head that the next chunk works with, too

    def __init__(self, problem: Problem, group: UlyssesGroup, inputs: Inputs) -> None:
        self.problem, self.group, self.inputs, self.rank = problem, group, inputs, group.rank
        self.placement = place(problem)
        self.chunks = self.placement.chunks
        self.local = choose(problem)
        self.space = workspace(problem, group.rank)
        self.device, self.dtype = inputs.q.device, inputs.q.dtype
        self.stat_dtype = layout.stat_dtype(problem)
        self.hops: dict[Which, Hop] = {}  # opened and not yet finished
        self.received: dict[Which, list[Tensor]] = {}
        self.around = inputs.projection
        self.whole: Sequence[Tensor] = inputs[:3]  # q, k and v of all heads
        self.projected: dict[int, tuple[Sequence[Tensor], Heads]] = {}  # of a chunk's heads, until packed
        self.results: dict[int, tuple[Tensor, Tensor]] = {}  # O and LSE of a chunk, until its output is projected
        group.note(self.local, self.placement)

    def all(self, steps: Sequence[schedule.Step]) -> None:
        """Run `steps`: an exchange starts where it stands and is finished ahead of the first step that waits for it."""
        actions: dict[str, Callable[[int], None]] = {
            "project": self._project,
            "project_raw": lambda _: self._project_raw(),
            "pack": self._pack,
            "attend": self._attend,
            "unpack": self._unpack,
            "project_out": self._project_out,
            "project_out_grad": self._project_out_grad,
            "project_out_weight_grad": lambda _: self._project_out_weight_grad(),
            "pack_grad": self._pack_grad,
            "attend_backward": self._attend_backward,
            "unpack_grad": lambda _: self._unpack_grad(),
            "project_grad": lambda _: self._project_grad(),
        }
        recorder = self.group.recorder
        for step in steps:
            for awaited in step.after:
                if awaited in self.hops:
                    self._finish(*awaited)
            if step.stream == "exchange":
                self._start(*step.which)
            elif recorder is None:
                actions[step.name](step.chunk)
            else:
                with recorder.step(self.group, step, self.device):
                    actions[step.name](step.chunk)
        for under_way in list(self.hops):
            self._finish(*under_way)

    # -- forward

    def _pack(self, c: int) -> None:
        sections = self.chunks[c].qkv
        kept = [self.saved[region].view(self.dtype) for region in self.space.sections[c]]
        receive = [
            mine if mine.numel() else self._take(sum(message.receive))
            for mine, message in zip(kept, self._messages(inbound, sections), strict=True)
        ]
        hop = self._open("exchange_in", c, inbound, sections, receive)
        (q, k, v), heads = self.projected.pop(c, (self.whole, None))
        rows = layout.qkv_rows(self.problem, self.rank, self.chunks[c], sections, hop.blocks, heads)
        self.local.pack(q, k, v, list(rows), self.inputs.transform)

    def _attend(self, c: int) -> None:
        p = self.problem
        kept = self.saved[self.space.outputs[c]].view(self.dtype)
        spans = self._out_spans(c, kept if kept.numel() else None)  # what is kept is what travels
        if self.group.exchange.one_sided and kept.numel():
            spans += layout.spans(p, self.rank, self.chunks[c].out[0], [kept], ("o", "stat"))
        lse = self._head_lse(c) if p.grad else None
        self.local.attend_forward(*self._qkv(c), spans, lse, self._options(c))

    def _out_spans(self, c: int, send: Tensor | None) -> list[Span]:
        """Open the hop of a chunk's output, and where its results go: at the peers, in `send` or in a new buffer."""
        if self.group.exchange.one_sided:
            return self._straight_out(c)
        sections = self.chunks[c].out
        receive = [self._take(sum(message.receive)) for message in self._messages(outbound, sections)]
        hop = self._open("exchange_out", c, outbound, sections, receive, [send])
        blocks = hop.blocks[0] if send is None else [send]
        return layout.spans(self.problem, self.rank, sections[0], blocks, ("o", "stat"))

    def _straight_out(self, c: int) -> list[Span]:
        """Where a chunk's results go at each rank, in their final layout; whoever comes first offers mine to the peers.

        One result holds all heads, or where the output is projected those of a chunk.
        """
        p, share, heads = self.problem, self.chunks[c].shares[self.rank], self._result_heads(c)
        offer, written = (c, share) if p.projects_out else (0, self.placement.shares[self.rank])
        if ("exchange_out", offer) not in self.hops:
            results = self._new_results(c)
            none = (0,) * p.ranks  # nobody sends blocks: rows are written where they belong
            nothing = Message(none, none, none, lambda a, b: 0)
            with self._step("exchange_out", offer):
                hop = self.group.exchange.open([nothing] * 2, results, [None] * 2)
            part = written.q_heads / len(heads)
            self.hops["exchange_out", offer] = self._watched("exchange_out", offer, hop, hop.peers, part)
        peers = self.hops["exchange_out", offer].peers
        assert peers is not None
        first = heads.index(share.q_start)
        mine = slice(first, first + share.q_heads)
        return [
            Span(
                start,
                (
                    o.view(p.batch, n, len(heads), p.value_dim).transpose(0, 1)[:, :, mine],
                    lse.view(p.batch, n, len(heads)).transpose(0, 1)[:, :, mine] if p.return_lse else None,
                ),
            )
            for start, n, o, lse in zip(layout.starts(p.lens), p.lens, *peers, strict=True)
        ]

    def _result_heads(self, c: int) -> Sequence[int]:
        """The model's heads in the result of a chunk: its own where they are projected, else those of all chunks."""
        return self.chunks[c].heads.q if self.problem.projects_out else range(self.problem.heads)

    def _new_results(self, c: int) -> list[Tensor]:
        """O of this rank's tokens and their LSE, or empty."""
        p = self.problem
        shape = (p.batch, p.lens[self.rank], len(self._result_heads(c)), p.value_dim)
        out = self._kept_result(c) if p.projects_out and p.grad else self._new(*shape)
        lse = self._new(*shape[:3] if p.return_lse else (0,), dtype=self.stat_dtype)
        if p.projects_out:
            self.results[c] = out, lse
        else:
            self.out, self.user_lse = out, lse
        return [out, lse]

    def _unpack(self, c: int) -> None:
        p = self.problem
        out, lse = self._new_results(c)
        rows = [
            row
            for b in ([c] if p.projects_out else range(len(self.chunks)))
            for row in self._o_rows(b, self.chunks[b].out, self._arrived("exchange_out", b, self.chunks[b].out)[0])
        ]
        self.local.unpack(rows, out, lse if p.return_lse else None)

    def _o_rows(self, c: int, sections: Sequence[Section], blocks: Sequence[Tensor]) -> list[ORows]:
        chunk, heads = self.chunks[c], self._result_heads(c)
        return list(layout.o_rows(self.problem, self.rank, chunk, sections[0], blocks, heads))

    # -- projections

    def _project(self, c: int) -> None:
        heads = self.chunks[c].heads
        self.projected[c] = projection.qkv(self.problem, self.around, heads, self._new), heads

    def _project_raw(self) -> None:
        """As they come ahead of QK-norm, q and k of all heads; and v where they are exchanged again."""
        p = self.problem
        heads = Heads(tuple(range(p.heads)), tuple(range(p.kv_heads)))
        self.whole = projection.qkv(p, self.around, heads, self._new, values=p.recompute)

    def _project_out(self, c: int) -> None:
        p, heads, shape = self.problem, self.chunks[c].heads.q, (self.problem.batch, self.problem.lens[self.rank])
        o, lse = self.results.pop(c)
        if c == 0:
            assert p.out_features is not None
            self.out = self._new(*shape, p.out_features)
            self.user_lse = self._new(*(*shape, p.heads) if p.return_lse else (0,), dtype=self.stat_dtype)
        assert self.out is not None
        projection.fold(self.out, o, self.around, heads, first=c == 0)
        if p.return_lse:
            projection.put(self.user_lse, lse, projection.channels(heads))

    def _project_out_grad(self, c: int) -> None:
        heads = self.chunks[c].heads.q
        do = projection.output_grad(self.dout, self.around, heads, self._new(*self._kept_result(c).shape))
        self.do = do, None if self.dlse is None else projection.picked(self.dlse, projection.channels(heads))

    def _project_out_weight_grad(self) -> None:
        outputs = [(self._kept_result(c), chunk.heads.q) for c, chunk in enumerate(self.chunks)]
        projection.out_weight_grads(self.dout, outputs, self.grads.projection)

    def _project_grad(self) -> None:
        projection.input_grads(self.dqkv, self.around, self.grads.projection)

    def _kept_result(self, c: int) -> Tensor:
        """O of a chunk's heads, as forward kept it."""
        p = self.problem
        kept = self.saved[self.space.results[c]].view(self.dtype)
        return kept.view(p.batch, p.lens[self.rank], len(self.chunks[c].heads.q), p.value_dim)

    def with_own_qkv(self, grads: Inputs) -> Inputs:
        """`grads` with a place of their own for those of q, k and v."""
        p = self.problem
        self.dqkv = self._new(p.batch, p.lens[self.rank], (p.heads + 2 * p.kv_heads) * p.head_dim)
        return Inputs(*split_qkv(self.dqkv, p.heads, p.kv_heads), None, projection=grads.projection)

    # -- backward

    def _pack_grad(self, c: int) -> None:
        sections = self.chunks[c].grad_out
        message = self._messages(inbound, sections)[0]
        hop = self._open("exchange_grad_in", c, inbound, sections, [self._take(sum(message.receive))])
        dout, dlse, out = self.dout, self.dlse, self.out
        if self.problem.projects_out:
            (dout, dlse), out = self.do, self._kept_result(c)
        rows = self._o_rows(c, sections, hop.blocks[0])
        self.local.pack_grad(dout, out if self.problem.sends_delta else None, dlse, rows)

    def _attend_backward(self, c: int) -> None:
        p, chunk, rank = self.problem, self.chunks[c], self.rank
        (received,) = self.received["exchange_grad_in", c]
        views = layout.fields(p, chunk.grad_out[0].rows[rank], received, p.seq)
        if self.local.keeps_output:
            kept = self.saved[self.space.outputs[c]].view(self.dtype)
            extra = layout.fields(p, chunk.out[0].rows[rank], kept, p.seq)["o"]
        else:
            extra = views["stat"]
        sections = chunk.grad_qkv
        receive = [self._take(sum(message.receive)) for message in self._messages(outbound, sections)]
        hop = self._open("exchange_grad_out", c, outbound, sections, receive)
        dq = layout.spans(p, rank, sections[0], hop.blocks[0], ("q",))
        start = self.sums
        if chunk.senders[rank] == c:
            self.sums = None
            dkv = layout.spans(p, rank, sections[-1], hop.blocks[-1], ("k", "v"))
        else:
            self.sums = dk, dv = self._new_sums(chunk.shares[rank].kv_heads)
            dkv = [Span(0, (dk.permute(2, 1, 0, 3), dv.permute(2, 1, 0, 3)))]
        lse, options = self._head_lse(c), self._options(c)
        heads = HeadGrads(*(self._part(c, grad) for grad in self.head_grads))
        self.local.attend_backward(*self._qkv(c), views["o"], lse, extra, dq, dkv, options, heads, start)

    def _new_sums(self, kv_heads: int) -> tuple[Tensor, Tensor]:
        p = self.problem
        shape = (kv_heads, p.batch, p.kv_seq)
        dk, dv = (self._new(*shape, n, dtype=self.stat_dtype) for n in (p.head_dim, p.value_dim))
        return dk, dv

    def _unpack_grad(self) -> None:
        transform = self.inputs.transform
        normed = transform is not None and (transform.q_norm is not None or transform.k_norm is not None)
        by_chunk = []
        for c, chunk in enumerate(self.chunks):
            blocks = self._arrived("exchange_grad_out", c, chunk.grad_qkv)
            by_chunk.append(layout.qkv_rows(self.problem, self.rank, chunk, chunk.grad_qkv, blocks))
        by_rank = zip(*by_chunk, strict=True)  # so that shares of a sum come in the order of the ranks
        self.norm_grads = self.local.unpack_grad(
            [rows for of_rank in by_rank for rows in of_rank],
            self.whole[0] if normed else None,
            self.whole[1] if normed else None,
            *self.grads[:3],
            transform,
        )

    # -- exchange

    def _messages(
        self, direction: Callable[[Section, int, int], Message], sections: Sequence[Section]
    ) -> list[Message]:
        return [direction(section, self.problem.batch, self.rank) for section in sections]

    def _open(
        self,
        name: str,
        c: int,
        direction: Callable[[Section, int, int], Message],
        sections: Sequence[Section],
        receive: list[Tensor],
        send: Sequence[Tensor | None] | None = None,
    ) -> Hop:
        with self._step(name, c):
            hop = self.group.exchange.open(self._messages(direction, sections), receive, send or [None] * len(receive))
        self.hops[name, c], self.received[name, c] = self._watched(name, c, hop, hop.blocks), receive
        return hop

    def _watched(self, name: str, c: int, hop: Hop, into: Sequence[Sequence[Tensor]] | None, part: float = 1) -> Hop:
        """The hop, or inside `trace()` one that notes its times; this rank writes `part` of what `into` names."""
        recorder = self.group.recorder
        return hop if recorder is None else recorder.hop(self.group, name, c, hop, into or (), part, self.device)

    def send_rows(self, sections: Sequence[Section], rows: Sequence[Tensor]) -> None:
        """Open the hop of gradients that lie in rows already; only a one-sided exchange needs them copied."""
        receive = [self._take(sum(message.receive)) for message in self._messages(outbound, sections)]
        one_sided = self.group.exchange.one_sided
        flat = None if one_sided else [part.contiguous().view(-1) for part in rows]
        hop = self._open("exchange_grad_out", 0, outbound, sections, receive, flat)
        if one_sided:
            for part, section, blocks in zip(rows, sections, hop.blocks, strict=True):
                for block, mine in zip(blocks, part.split(section.lens), strict=True):
                    block.view(mine.shape).copy_(mine)

    def send_output(self, o: Tensor) -> None:
        """Open the hop of a callable's output `[S, B, hq, Dv]`, and copy that unless it travels as it lies."""
        sections = self.chunks[0].out
        as_it_lies = o.is_contiguous() and o.size(2) * o.size(3) == sections[0].rows[self.rank].width
        spans = self._out_spans(0, o.view(-1) if as_it_lies else None)
        if self.group.exchange.one_sided or not as_it_lies:
            for start, (view, _) in spans:
                assert view is not None
                view.copy_(o[start : start + len(view)])

    def _start(self, name: str, c: int) -> None:
        self.group.counts[name] += 1
        with self._step(name, c):
            self.hops[name, c].start()

    def _finish(self, name: str, c: int) -> None:
        with self._step(name, c):
            self.hops.pop((name, c)).finish()

    def _step(self, name: str, c: int) -> AbstractContextManager[None]:
        return self.group.step(name if len(self.chunks) == 1 else f"{name} of chunk {c}")

    def _arrived(self, name: str, c: int, sections: Sequence[Section]) -> list[Sequence[Tensor]]:
        """What came in an outbound hop: of every section, one block per rank that sent it."""
        received = zip(self._messages(outbound, sections), self.received[name, c], strict=True)
        return [torch.split(buffer, list(message.receive)) for message, buffer in received]

    # -- a rank's heads

    def _take(self, elements: int) -> Tensor:
        return self._new(elements)

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.group.pool.take(shape, dtype or self.dtype, self.device)

    def per_head(self, given: Tensor | None, start: int, stop: int) -> Tensor | None:
        """A copy of some heads of what is given for all, in the precision of the statistics."""
        return None if given is None else given[start:stop].to(self.stat_dtype, copy=True)

    def of_all_heads(self, mine: Tensor | None) -> Tensor | None:
        """`[Hq]` with zeros for the heads of other ranks."""
        share = self.placement.shares[self.rank]
        padding = (share.q_start, self.problem.heads - share.q_stop)
        return None if mine is None else torch.nn.functional.pad(mine, padding)

    def _part(self, c: int, mine: Tensor | None) -> Tensor | None:
        """A chunk's heads of what there is for all of this rank's."""
        share, first = self.chunks[c].shares[self.rank], self.placement.shares[self.rank].q_start
        return None if mine is None else mine[share.q_start - first : share.q_stop - first]

    def _head_lse(self, c: int) -> Tensor:
        """`[hq, B, S]` of a chunk's heads."""
        p, share, mine = self.problem, self.chunks[c].shares[self.rank], self.placement.shares[self.rank]
        every = self.saved[self.space.lse].view(self.stat_dtype).view(mine.q_heads, p.batch, p.seq)
        return every[share.q_start - mine.q_start : share.q_stop - mine.q_start]

    def _qkv(self, c: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of a chunk's heads over the whole sequence: views of the received rows."""
        own, holder = self._rows_in(c), self.chunks[c].holders[self.rank]
        carried = own if holder == c else self._rows_in(holder)
        return own["q"], carried["k"], carried["v"]

    def _rows_in(self, c: int) -> dict[str, Tensor]:
        received = self.received.get(("exchange_in", c))
        if received is None:
            received = [self.saved[region].view(self.dtype) for region in self.space.sections[c]]
        return layout.views_of_rows(self.problem, self.rank, received, c)

    def _options(self, c: int) -> Options:
        p, given, share = self.problem, self.inputs, self.chunks[c].shares[self.rank]
        found = Options(
            scale=p.scale,
            causal=p.causal,
            heads=HeadMap(self.placement.group, share.q_start),
            window=p.window,
            softcap=p.softcap,
            documents=given.documents,
            sinks=self.per_head(given.sinks, share.q_start, share.q_stop),
            slopes=self.per_head(given.slopes, share.q_start, share.q_stop),
            dropout=given.dropout,
            predicate=given.predicate,
        )
        if given.blocks is None:
            return found
        tables = () if given.documents is None else given.documents
        key = (self.placement.shares[self.rank], len(self.chunks), p.bounds, p.seq, p.kv_seq)
        return found._replace(blocks=self.group.memo.get((given.blocks, *tables), key, lambda: self._lists(found))[c])

    def _lists(self, options: Options) -> list[Blocks]:
        """Of every chunk, the tiles that a block mask and all other masks leave this rank's heads."""
        status, mine = self.inputs.blocks, self.placement.shares[self.rank]
        assert status is not None
        status = status if status.size(1) == 1 else status[:, mine.q_start : mine.q_stop]
        left = combine(status, options, self.problem.seq, self.problem.kv_seq)  # [1 or B, 1 or hq, n_q, n_k]
        return [
            lists(
                left if left.size(1) == 1 else left[:, share.q_start - mine.q_start : share.q_stop - mine.q_start],
                HeadMap(self.placement.group, share.q_start),
                share.q_heads,
                share.kv_heads,
            )
            for share in (chunk.shares[self.rank] for chunk in self.chunks)
        ]
