"""Where things lie: heads in rows as views, and what a forward keeps for its backward in one buffer.

Pure functions of the problem and the rank. Rows are flat buffers or blocks of them, laid out as the placement says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .kernels._views import ORows, QKVRows, Span
from .local import choose
from .messages import Field, Row, Section, round_up
from .placement import Chunk, Heads, place
from .spec import Problem

_ALIGN = 64  # bytes between the regions of a workspace


class Workspace(NamedTuple):
    """What forward keeps for backward, as byte ranges of one buffer; O in head layout is for aten only."""

    sections: tuple[tuple[slice, ...], ...]  # of every chunk
    lse: tuple[tuple[slice, ...], ...]  # of every chunk's pieces
    outputs: tuple[slice, ...]  # of every chunk
    results: tuple[slice, ...]  # of every chunk: O of its heads on all ranks, where the output is projected
    size: int


def workspace(problem: Problem, rank: int) -> Workspace:
    """The workspace of a problem on one rank. Ranges that backward does not need are empty."""
    placement, local = place(problem), choose(problem)
    stop = 0

    def region(size: int) -> slice:
        nonlocal stop
        start = round_up(stop, _ALIGN)
        stop = start + size
        return slice(start, stop)

    grad = problem.grad and problem.attention != "callable"  # around a callable, autograd itself keeps the rows
    row = problem.batch * problem.item_size * grad
    sections = tuple(
        tuple(region(s.tokens(rank) * s.rows[rank].width * row * (not problem.recompute)) for s in chunk.qkv)
        for chunk in placement.chunks
    )
    lse = tuple(
        tuple(region(piece.q_heads * piece.tokens * problem.stat_width * row) for piece in chunk.pieces[rank])
        for chunk in placement.chunks
    )
    outputs = tuple(
        region(problem.seq * chunk.out[0].rows[rank].width * row * local.keeps_output) for chunk in placement.chunks
    )
    tokens = problem.lens[rank] * problem.value_dim
    results = tuple(region(tokens * len(chunk.heads.q) * row * problem.projects_out) for chunk in placement.chunks)
    return Workspace(sections, lse, outputs, results, stop)


def stat_dtype(problem: Problem) -> torch.dtype:
    """Of the LSE, delta and all sums."""
    return torch.float64 if problem.dtype == "float64" else torch.float32


Split: TypeAlias = Callable[[Tensor, list[int]], Sequence[Tensor]]


def split(rows: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Autograd joins these in one pass, where each slice would cost its own; unsafe: a callable may write to its q."""
    return torch.unsafe_split_with_sizes(rows, sizes, -1)


def fields(problem: Problem, row: Row, flat: Tensor, tokens: int, split: Split = split) -> dict[str, Tensor]:
    """The fields of rows as `[tokens, batch, heads, dim]`, an LSE or delta as `[tokens, batch, heads]`.

    Wide ones are fp32 over the bits of the row.
    """
    rows = flat.reshape(tokens, problem.batch, row.width)
    sizes = [field.size for field in row.fields]
    parts = split(rows, [*sizes, row.width - sum(sizes)])
    return {f.name: _field(part, f, stat_dtype(problem)) for f, part in zip(row.fields, parts, strict=False)}


def _field(part: Tensor, field: Field, wide: torch.dtype) -> Tensor:
    if field.width > 1 and part.numel() == 0:  # whose strides say nothing
        part = part.new_empty((*part.shape[:2], field.heads * field.stride), dtype=wide)
    elif field.width > 1:
        part = part.view(wide)
    if field.name == "stat":
        return part
    heads = part.view(*part.shape[:2], field.heads, field.stride)
    return heads if field.dim == field.stride else heads[..., : field.dim]  # autograd copies for a slice of all


def views_of_rows(
    problem: Problem, rank: int, received: Sequence[Tensor], chunk: int = 0, split: Split = split
) -> list[dict[str, Tensor]]:
    """Of every section of a chunk that a rank received: q `[n, B, h, D]` of a piece; in the last one k and v.

    k is `[m, B, hkv, D]` and v `[m, B, hkv, Dv]`; they are missing where another chunk has them.
    """
    sections = place(problem).chunks[chunk].qkv
    return [
        fields(problem, section.rows[rank], rows, section.tokens(rank), split)
        for rows, section in zip(received, sections, strict=True)
    ]


def o_of_rows(problem: Problem, rank: int, rows: Tensor) -> Tensor:
    """O (or its gradient) `[S, B, hq, Dv]` of a rank's heads, in rows `[S, B, row]` in head layout."""
    return fields(problem, place(problem).chunks[0].out[0].rows[rank], rows, problem.seq)["o"]


def qkv_rows(
    problem: Problem,
    rank: int,
    chunk: Chunk,
    sections: Sequence[Section],
    carried: Sequence[range],
    blocks: Sequence[Sequence[Tensor]],
    heads: Heads | None = None,
) -> list[list[QKVRows]]:
    """Of every rank its blocks of my tokens in each section, as q, k and v (or their gradients).

    `carried` are the kv heads in every rank's rows. Heads are numbered as in the model, or as in `heads` where only
    these lie on the other side.
    """
    found = []
    for owner, pieces in enumerate(chunk.pieces):
        of_owner: list[QKVRows] = []
        for number, (section, of_ranks) in enumerate(zip(sections, blocks, strict=True)):
            first, tokens = section.overlap(owner, rank)
            views = fields(problem, section.rows[owner], of_ranks[owner], tokens)
            if not any(view.size(2) for view in views.values()):
                continue
            nothing = of_ranks[owner].new_empty(0)
            q, k, v = (
                views[name] if name in views else nothing.view(0, problem.batch, 0, dim)
                for name, dim in (("q", problem.head_dim), ("k", problem.head_dim), ("v", problem.value_dim))
            )
            q_head = pieces[number].q_start if q.size(2) else 0
            kv_head = carried[owner].start if k.size(2) else 0
            if heads is not None:
                q_head = heads.q.index(q_head) if q.size(2) else 0
                kv_head = heads.kv.index(kv_head) if k.size(2) else 0
            of_owner.append(QKVRows(q, k, v, q_head, kv_head, first, first))
        found.append(of_owner)
    return found


def o_rows(
    problem: Problem,
    rank: int,
    chunk: Chunk,
    sections: Sequence[Section],
    blocks: Sequence[Sequence[Tensor]],
    heads: Sequence[int],
    name: str = "o",
) -> Iterator[ORows]:
    """Every rank's blocks of my tokens, as O (or its gradient) and LSE (or delta), numbered as they lie in `heads`.

    `name` is that of their field for O: "again" where O travels beside its gradient.
    """
    for owner, pieces in enumerate(chunk.pieces):
        for piece, section, of_ranks in zip(pieces, sections, blocks, strict=False):
            first, tokens = section.overlap(owner, rank)
            views = fields(problem, section.rows[owner], of_ranks[owner], tokens)
            yield ORows(views[name], views.get("stat"), heads.index(piece.q_start), first)


def spans(
    problem: Problem,
    rank: int,
    section: Section,
    blocks: Sequence[Tensor],
    names: tuple[str, ...],
    heads: slice = slice(None),
) -> list[Span]:
    """Where a rank's results for its tokens of a section go: a block per rank, or one block with all of them."""
    lens = [section.overlap(rank, r)[1] for r in range(problem.ranks)] if len(blocks) > 1 else [section.tokens(rank)]
    found = []
    for block, start, n in zip(blocks, starts(lens), lens, strict=True):
        views = fields(problem, section.rows[rank], block, n)
        found.append(Span(start, tuple(views[name][:, :, heads] if name in views else None for name in names)))
    return found


def starts(lens: Sequence[int]) -> list[int]:
    return [sum(lens[:rank]) for rank in range(len(lens))]


def tidied(flat: Tensor, tokens: int, batch: int, row: Row) -> Tensor:
    """Rows as `[tokens, batch, row]`, with zeros where nobody wrote: the results of an op say the same every time."""
    rows = flat.view(tokens, batch, row.width)
    stop = 0
    for field in row.fields:
        stop = field.offset + field.size
        rows[..., field.offset : stop].unflatten(-1, (field.heads, field.stride))[..., field.dim :].zero_()
    rows[..., stop:].zero_()
    return rows
