"""What the attention of a rank's piece is given besides its rows: options, and lists of a block mask's tiles."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cuts import Piece
from .kernels._blocks import combine, lists, within
from .kernels._views import Blocks, HeadMap, Options, Part
from .placement import Placement
from .spec import Problem

if TYPE_CHECKING:
    from .executor import Inputs

Lists = Sequence[Sequence[Blocks]]  # of every chunk's pieces


def piece_options(problem: Problem, inputs: Inputs, piece: Piece, keys: int) -> Options:
    """The options of a piece whose k and v hold the first `keys` keys; without block lists."""
    p, whole = problem, piece.tokens == problem.seq and keys == problem.kv_seq
    sinks, slopes = (_of_heads(given, piece, p) for given in (inputs.sinks, inputs.slopes))
    return Options(
        scale=p.scale,
        causal=p.causal,
        heads=HeadMap(p.heads // p.kv_heads, piece.q_start),
        window=p.window,
        softcap=p.softcap,
        documents=inputs.documents,
        sinks=sinks,
        slopes=slopes,
        dropout=inputs.dropout,
        predicate=inputs.predicate,
        part=None if whole else Part(piece.start, p.seq, p.kv_seq),
    )


def _of_heads(given: Tensor | None, piece: Piece, problem: Problem) -> Tensor | None:
    """A copy of a piece's heads of what is given for all, in the precision of the statistics."""
    dtype = torch.float64 if problem.dtype == "float64" else torch.float32
    return None if given is None else given[piece.q_start : piece.q_stop].to(dtype, copy=True)


def block_lists(
    problem: Problem, inputs: Inputs, placement: Placement, rank: int
) -> tuple[Sequence[Tensor], Hashable, Callable[[], Lists]]:
    """The tiles that a block mask and all other masks leave a rank's pieces: for `Memo.get`, as they cost a pass."""
    p, status = problem, inputs.blocks
    assert status is not None
    pieces = tuple(chunk.pieces[rank] for chunk in placement.chunks)
    documents = () if inputs.documents is None else inputs.documents

    def make() -> Lists:
        share = placement.shares[rank]
        mine = status if status.size(1) == 1 else status[:, share.q_start : share.q_stop]
        masks = Options(1.0, p.causal, HeadMap(1, 0), window=p.window, documents=inputs.documents)
        left = combine(mine, masks, p.seq, p.kv_seq)  # [1 or B, 1 or hq, n_q, n_k]
        return [[_lists(p, left, share.q_start, piece) for piece in of_chunk] for of_chunk in pieces]

    return (status, *documents), (pieces, p.bounds, p.seq, p.kv_seq), make


def _lists(problem: Problem, left: Tensor, first: int, piece: Piece) -> Blocks:
    if left.size(1) > 1:
        left = left[:, piece.q_start - first : piece.q_stop - first]
    if piece.tokens < problem.seq:
        left = within(left, range(piece.start, piece.stop))
    return lists(left, HeadMap(problem.heads // problem.kv_heads, piece.q_start), piece.q_heads, piece.kv_heads)
