"""How much work each tile of queries is, where documents or a block mask weigh on it: what the placement's cuts follow.

Only what the host knows counts, so that the sizes of messages never wait for a GPU: offsets given as ints or in a CPU
tensor, and a block mask, whose lists of tiles are made on the host's demand anyway. Otherwise the bounds of the causal
mask and the window alone say what a query costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from .call import Call, describe
from .cuts import QUERY_TILE, cuts, pairs, takes_pieces
from .group import UlyssesGroup
from .kernels._blocks import BLOCK, combine
from .kernels._views import Documents, HeadMap, Options
from .packed import Offsets
from .spec import Problem


def weighed_cuts(group: UlyssesGroup, call: Call, q_offsets: Offsets | None, k_offsets: Offsets | None) -> list[int]:
    """Where ranks' work ends in the queries of all heads, or nothing where the bounds alone say so."""
    given = [x for x in (q_offsets, k_offsets) if x is not None]
    on_host = bool(given) and not any(isinstance(x, Tensor) and x.is_cuda for x in given)
    assert call.q is not None
    heads = call.heads if call.fused else call.q.size(2)
    if heads % group.size == 0 or (call.blocks is None and not on_host):
        return []
    problem, inputs = describe(group, call)
    if not takes_pieces(problem):
        return []
    if call.blocks is not None:
        tensors: Sequence[Tensor] = (call.blocks, *(inputs.documents or ()))
        numbers: tuple[object, ...] = ()
        status, documents = call.blocks, inputs.documents
        make = lambda: block_work(problem, status, documents)  # noqa: E731
    else:
        tensors = [x for x in given if isinstance(x, Tensor)]
        numbers = tuple(None if isinstance(x, Tensor) else tuple(x) for x in given)
        make = lambda: _document_work(problem, given)  # noqa: E731
    key = ("work", numbers, problem.bounds, problem.seq, problem.kv_seq)
    return list(cuts(problem, group.memo.get(tensors, key, make)))


def _document_work(problem: Problem, given: Sequence[Offsets]) -> tuple[int, ...]:
    offsets = [[int(n) for n in x] for x in given]
    return document_work(problem.seq, offsets[0], offsets[-1], problem.bounds)


def document_work(
    seq: int, q_offsets: Sequence[int], k_offsets: Sequence[int], bounds: tuple[int, int]
) -> tuple[int, ...]:
    """The pairs that the first 0, 1, 2... tiles of queries of one head attend, each in its own document.

    Example: tiles of 256 and documents of 300 and 212 tokens, not causal: 0, 256 * 300, 300^2 + 212^2.
    """
    work, done, end = [0], 0, min(QUERY_TILE, seq)
    for (start, stop), (k_start, k_stop) in zip(pairwise(q_offsets), pairwise(k_offsets), strict=True):
        while start < end <= stop:
            work.append(done + pairs(end - start, k_stop - k_start, *bounds))
            end = min(end + QUERY_TILE, seq) if end < seq else seq + 1
        done += pairs(stop - start, k_stop - k_start, *bounds)
    return tuple(work)


def block_work(problem: Problem, status: Tensor, documents: Documents | None) -> tuple[int, ...]:
    """The blocks that all masks leave the first 0, 1, 2... tiles of queries, of one head or of all in order."""
    masks = Options(1.0, problem.causal, HeadMap(1, 0), window=problem.window, documents=documents)
    left = combine(status, masks, problem.seq, problem.kv_seq) > 0  # [1 or B, 1 or Hq, n_q, n_k]
    of_blocks = left.sum((0, 3), dtype=torch.int64)  # [1 or Hq, n_q]
    each = QUERY_TILE // BLOCK
    of_tiles = pad(of_blocks, (0, -of_blocks.size(1) % each)).unflatten(1, (-1, each)).sum(-1)
    return tuple(accumulate(of_tiles.flatten().tolist(), initial=0))
