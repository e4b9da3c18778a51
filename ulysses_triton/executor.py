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
from .kernels._views import Documents, Dropout, HeadGrads, Options, ORows, Predicate, Span, Transform
from .layout import workspace
from .local import choose
from .messages import Message, Section, inbound, outbound
from .pieces import block_lists, piece_options
from .placement import Heads, place
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
    asked = (inputs.sinks, inputs.slopes if slopes else None)
    run.head_grads = HeadGrads(*(x if x is None else x.new_zeros(x.shape, dtype=run.stat_dtype) for x in asked))
    run.all(schedule.of_backward(problem))
    return SmallGrads(*run.norm_grads(), *run.head_grads)


def exchange_in(problem: Problem, group: UlyssesGroup, inputs: Inputs) -> list[Tensor]:
    """The inbound half alone, for a callable: the received rows `[tokens, B, row]` of each section."""
    run = _Run(problem, group, inputs)
    run.saved = torch.empty(0, dtype=torch.uint8, device=run.device)
    run.all(schedule.IN)
    received = zip(run.received["exchange_in", 0], run.chunks[0].qkv, strict=True)
    return [layout.tidied(rows, s.tokens(group.rank), problem.batch, s.rows[group.rank]) for rows, s in received]


def exchange_in_backward(
    problem: Problem, group: UlyssesGroup, inputs: Inputs, grads: Inputs, rows: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the received rows, sent back, summed over the ranks that shared a kv head, and un-transformed."""
    run = _Run(problem, group, inputs)
    sections = run.chunks[0].qkv
    run.chunks = (run.chunks[0]._replace(grad_qkv=sections, sent=run.chunks[0].held),)
    run.grads = grads
    run.send_rows(sections, rows[: len(sections)])
    run.all(schedule.IN_BACKWARD)
    return run.norm_grads()


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

    out: Tensor | None = None
    user_lse: Tensor
    saved: Tensor
    grads: Inputs
    dout: Tensor
    dlse: Tensor | None
    head_grads: HeadGrads
    dqkv: Tensor  # [B, L, (Hq + 2 Hkv) D], where it is projected from x
    do: tuple[Tensor, Tensor | None]  # of a chunk whose output is projected: gradients of O and LSE
    sums: tuple[Tensor, Tensor] | None = None  # dk and dv of the kv head that the next piece works with, too

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
        self.norm_shares: list[Tensor | None] = [None, None]  # [Hq, D] and [Hkv, D]: what each head adds
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
            "unpack_grad": self._unpack_grad,
            "project_grad": lambda _: self._project_grad(),
        }
        recorder = self.group.recorder
        with torch.autocast(self.device.type, enabled=False):  # which would round the reference's products
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
        chunk = self.chunks[c]
        by_rank = layout.qkv_rows(self.problem, self.rank, chunk, sections, chunk.held, hop.blocks, heads)
        self.local.pack(q, k, v, [rows for of_rank in by_rank for rows in of_rank], self.inputs.transform)

    def _attend(self, c: int) -> None:
        p = self.problem
        kept = self.saved[self.space.outputs[c]].view(self.dtype)
        spans = self._out_spans(c, kept if kept.numel() else None)  # what is kept is what travels
        if self.group.exchange.one_sided and kept.numel():
            spans[0] += layout.spans(p, self.rank, self.chunks[c].out[0], [kept], ("o", "stat"))
        for n, (q, k, v) in enumerate(self._qkv(c)):
            lse = self._head_lse(c, n) if p.grad else None
            self.local.attend_forward(q, k, v, spans[n], lse, self._options(c, n, len(k)))
        self._drop_read(c)

    def _out_spans(self, c: int, send: Tensor | None) -> list[list[Span]]:
        """Open the hop of a chunk's output; where each piece's results go: at the peers, in `send`, in new buffers."""
        if self.group.exchange.one_sided:
            return self._straight_out(c)
        chunk, sections = self.chunks[c], self.chunks[c].out
        receive = [self._take(sum(message.receive)) for message in self._messages(outbound, sections)]
        hop = self._open("exchange_out", c, outbound, sections, receive, None if send is None else [send])
        blocks = hop.blocks if send is None else [[send]]
        mine = zip(chunk.pieces[self.rank], sections, blocks, strict=False)
        return [layout.spans(self.problem, self.rank, section, into, ("o", "stat")) for _, section, into in mine]

    def _straight_out(self, c: int) -> list[list[Span]]:
        """Where each piece's results go at each rank, in their final layout; who comes first offers mine to the peers.

        One result holds all heads, or where the output is projected those of a chunk.
        """
        p, chunk, heads = self.problem, self.chunks[c], self._result_heads(c)
        offer, written = (c, [chunk]) if p.projects_out else (0, self.chunks)
        if ("exchange_out", offer) not in self.hops:
            results = self._new_results(c)
            none = (0,) * p.ranks  # nobody sends blocks: rows are written where they belong
            nothing = Message(none, none, none, lambda a, b: 0)
            with self._step("exchange_out", offer):
                hop = self.group.exchange.open([nothing] * 2, results, [None] * 2)
            others = [rank for rank in range(p.ranks) if rank != self.rank]
            sent = sum(part.results(self.rank, rank) for part in written for rank in others) * p.result_size
            self.hops["exchange_out", offer] = self._watched("exchange_out", offer, hop, sent)
        peers = self.hops["exchange_out", offer].peers
        assert peers is not None
        found = []
        for piece, section in zip(chunk.pieces[self.rank], chunk.out, strict=False):
            first = heads.index(piece.q_start)
            mine = slice(first, first + piece.q_heads)
            spans, start = [], 0
            for rank, (n, o, lse) in enumerate(zip(p.lens, *peers, strict=True)):
                token, tokens = section.overlap(self.rank, rank)
                at = slice(token, token + tokens)
                o = o.view(p.batch, n, len(heads), p.value_dim).transpose(0, 1)[at, :, mine]
                lse = lse.view(p.batch, n, len(heads)).transpose(0, 1)[at, :, mine] if p.return_lse else None
                spans.append(Span(start, (o, lse)))
                start += tokens
            found.append(spans)
        return found

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
        out, lse = self._new_results(c) if p.projects_out or self.out is None else (self.out, self.user_lse)
        rows = []
        for b in [c] if p.projects_out or p.recompute else range(len(self.chunks)):
            rows += self._o_rows(b, self.chunks[b].out, self._arrived("exchange_out", b, self.chunks[b].out))
            del self.received["exchange_out", b]
        self.local.unpack(rows, out, lse if p.return_lse else None)

    def _o_rows(
        self, c: int, sections: Sequence[Section], blocks: Sequence[Sequence[Tensor]], name: str = "o"
    ) -> list[ORows]:
        chunk, heads = self.chunks[c], self._result_heads(c)
        return list(layout.o_rows(self.problem, self.rank, chunk, sections, blocks, heads, name))

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
        receive = [self._take(sum(message.receive)) for message in self._messages(inbound, sections)]
        hop = self._open("exchange_grad_in", c, inbound, sections, receive)
        dout, dlse, out = self.dout, self.dlse, self.out
        if self.problem.projects_out:
            (dout, dlse), out = self.do, self._kept_result(c)
        rows = self._o_rows(c, sections, hop.blocks)
        self.local.pack_grad(dout, out if self.problem.sends_delta else None, dlse, rows)
        if self.problem.sends_output:
            self.local.pack_grad(out, None, None, self._o_rows(c, sections, hop.blocks, "again"))

    def _attend_backward(self, c: int) -> None:
        p, chunk, rank = self.problem, self.chunks[c], self.rank
        sections = chunk.grad_qkv
        receive = [self._take(sum(message.receive)) for message in self._messages(outbound, sections)]
        hop = self._open("exchange_grad_out", c, outbound, sections, receive)
        arrived = zip(chunk.grad_out, self.received.pop(("exchange_grad_in", c)), strict=True)
        grads = [layout.fields(p, section.rows[rank], rows, section.tokens(rank)) for section, rows in arrived]
        for n, (piece, (q, k, v)) in enumerate(zip(chunk.pieces[rank], self._qkv(c), strict=True)):
            extra = self._kept_o(c) if self.local.keeps_output else grads[n]["again" if p.sends_output else "stat"]
            dq = layout.spans(p, rank, sections[n], hop.blocks[n], ("q",))
            start = self.sums
            if piece.last:
                self.sums, first = None, chunk.sent[rank].start
                heads = slice(piece.kv_start - first, piece.kv_stop - first)
                dkv = layout.spans(p, rank, sections[-1], hop.blocks[-1], ("k", "v"), heads)
            else:
                self.sums = dk, dv = self._new_sums(len(k))
                dkv = [Span(0, (dk.permute(2, 1, 0, 3), dv.permute(2, 1, 0, 3)))]
            mine = HeadGrads(*(None if x is None else x.new_empty(piece.q_heads) for x in self.head_grads))
            lse, options = self._head_lse(c, n), self._options(c, n, len(k))
            self.local.attend_backward(q, k, v, grads[n]["o"], lse, extra, dq, dkv, options, mine, start)
            for total, part in zip(self.head_grads, mine, strict=True):
                if total is not None and part is not None:
                    total[piece.q_start : piece.q_stop] += part
        self._drop_read(c)

    def _kept_o(self, c: int) -> Tensor:
        """O of a chunk in head layout, as forward kept it."""
        kept = self.saved[self.space.outputs[c]].view(self.dtype)
        return layout.fields(self.problem, self.chunks[c].out[0].rows[self.rank], kept, self.problem.seq)["o"]

    def _new_sums(self, keys: int) -> tuple[Tensor, Tensor]:
        """dk and dv of one kv head."""
        p = self.problem
        shape = (1, p.batch, keys)
        dk, dv = (self._new(*shape, n, dtype=self.stat_dtype) for n in (p.head_dim, p.value_dim))
        return dk, dv

    def _unpack_grad(self, c: int) -> None:
        """All gradients at once; with `recompute` those of the heads that are whole now that chunk c is there."""
        transform, by_chunk = self.inputs.transform, self.problem.recompute
        normed = transform is not None and (transform.q_norm is not None or transform.k_norm is not None)
        arrived = []
        for b, chunk in enumerate(self.chunks):
            if ("exchange_grad_out", b) in self.received and (b <= c or not by_chunk):
                blocks = self._arrived("exchange_grad_out", b, chunk.grad_qkv)
                arrived.append(layout.qkv_rows(self.problem, self.rank, chunk, chunk.grad_qkv, chunk.sent, blocks))
        by_rank = zip(*arrived, strict=True)  # so that shares of a sum come in the order of the ranks
        shares = self.local.unpack_grad_heads(
            [rows for of_rank in by_rank for of_chunk in of_rank for rows in of_chunk],
            self.whole[0] if normed else None,
            self.whole[1] if normed else None,
            *self.grads[:3],
            transform,
            self.placement.returns[c].heads if by_chunk else None,
        )
        for n, share in enumerate(shares):
            before = self.norm_shares[n]
            self.norm_shares[n] = share if before is None or share is None else before.add_(share)
        for b in self.placement.returns[c].done if by_chunk else range(len(self.chunks)):
            del self.received["exchange_grad_out", b]

    def norm_grads(self) -> tuple[Tensor | None, Tensor | None]:
        dq_norm, dk_norm = (None if shares is None else shares.sum(0) for shares in self.norm_shares)
        return dq_norm, dk_norm

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
        messages = self._messages(direction, sections)
        with self._step(name, c):
            hop = self.group.exchange.open(messages, receive, send or [None] * len(receive))
        sent = sum(sum(m.send) - m.send[self.rank] for m in messages) * self.problem.item_size
        self.hops[name, c], self.received[name, c] = self._watched(name, c, hop, sent), receive
        return hop

    def _watched(self, name: str, c: int, hop: Hop, sent: int) -> Hop:
        """The hop, or inside `trace()` one that notes its times and the bytes sent to other ranks."""
        recorder = self.group.recorder
        return hop if recorder is None else recorder.hop(self.group, name, c, hop, sent, self.device)

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
            for start, (view, _) in (span for of_piece in spans for span in of_piece):
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

    def _drop_read(self, c: int) -> None:
        """Let go of the received rows that nothing reads after chunk c."""
        for b in self.placement.last_reads(self.rank, c):
            self.received.pop(("exchange_in", b), None)

    def _take(self, elements: int) -> Tensor:
        return self._new(elements)

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.group.pool.take(shape, dtype or self.dtype, self.device)

    def _head_lse(self, c: int, n: int) -> Tensor:
        """`[hq, B, tokens]` of a piece."""
        piece = self.chunks[c].pieces[self.rank][n]
        kept = self.saved[self.space.lse[c][n]].view(self.stat_dtype)
        return kept.view(piece.q_heads, self.problem.batch, piece.tokens)

    def _qkv(self, c: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """q, k and v of a chunk's pieces: views of the received rows, k and v perhaps of an earlier chunk's."""
        own, found = self._rows_in(c), []
        for views, piece in zip(own, self.chunks[c].pieces[self.rank], strict=False):
            carried = (own if piece.holder == c else self._rows_in(piece.holder))[-1]
            first = self.chunks[piece.holder].held[self.rank].start
            heads = slice(piece.kv_start - first, piece.kv_stop - first)
            found.append((views["q"], carried["k"][:, :, heads], carried["v"][:, :, heads]))
        return found

    def _rows_in(self, c: int) -> list[dict[str, Tensor]]:
        received = self.received.get(("exchange_in", c))
        if received is None:
            received = [self.saved[region].view(self.dtype) for region in self.space.sections[c]]
        return layout.views_of_rows(self.problem, self.rank, received, c)

    def _options(self, c: int, n: int, keys: int) -> Options:
        """Of a piece, whose k and v hold the first `keys` keys."""
        found = piece_options(self.problem, self.inputs, self.chunks[c].pieces[self.rank][n], keys)
        if self.inputs.blocks is None:
            return found
        lists = self.group.memo.get(*block_lists(self.problem, self.inputs, self.placement, self.rank))
        return found._replace(blocks=lists[c][n])
