"""Block masks: which blocks of 128 x 128 pairs hold any attended pair, and the lists of them that kernels walk.

The *status* of a block is 0 when no pair of it is attended (it costs nothing), 2 when all are (nothing is asked of the
pairs), and 1 otherwise. It comes from the user's predicate, evaluated on all pairs; `combine` adds what the other masks
take away, and `lists` orders the blocks that are left by query block and by key block.

Worked example, with blocks of 4 and S = Sk = 10, so 3 x 3 blocks, the last ones of 2: the predicate `kv_pos < 8` of one
head has the status [[2, 2, 0], [2, 2, 0], [2, 2, 0]]. A causal mask takes all of the blocks above the diagonal and a
part of those on it: [[1, 0, 0], [2, 1, 0], [2, 2, 0]]. In the lists

    q_rows = [0, 1, 1], [1, 2, 3], [3, 3, 5]        q_tiles = 0 | 1, 0 | 0, 1
    k_rows = [0, 1, 3], [3, 4, 5], [5, 5, 5]        k_tiles = 0, 1, 2 | 1, 2

query block 1 has the partial key block q_tiles[1:2] = 1 and the full one q_tiles[2:3] = 0; key block 0 is partial for
query block 0 and full for 1 and 2. Were there a second head, the entries of its query blocks would be 3, 4 and 5.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._predicate import evaluate
from ._views import Blocks, HeadMap, Options, Predicate

BLOCK = 128
EMPTY, PARTIAL, FULL = 0, 1, 2

PAIRS = 1 << 22  # evaluated at once


def status(
    predicate: Predicate, batch: int, heads: int, S: int, Sk: int, device: torch.device, *, block: int = BLOCK
) -> Tensor:  # fmt: skip
    """uint8 `[batch, heads, n_q, n_k]` of what the predicate alone leaves of S queries x Sk keys."""
    predicate = predicate._replace(captured=tuple(x.to(device) for x in predicate.captured))
    n_q, n_k = -(-S // block), -(-Sk // block)
    step = max(1, PAIRS // (heads * block * block)) * block  # keys at once
    head = torch.arange(heads, device=device)[:, None, None]
    result = torch.empty(batch, heads, n_q, n_k, dtype=torch.uint8, device=device)
    for b in range(batch):
        for m in range(n_q):
            q_pos = torch.arange(m * block, min(m * block + block, S), device=device)[:, None]
            for start in range(0, Sk, step):
                kv_pos = torch.arange(start, min(start + step, Sk), device=device)
                kept = evaluate(predicate, b, head, q_pos, kv_pos)  # [heads, queries, keys]
                first = start // block
                result[b, :, m, first : first + step // block] = _status_of(kept, block)
    return result


def _status_of(kept: Tensor, block: int) -> Tensor:
    """`kept` [heads, queries of one block, keys] -> [heads, key blocks]."""
    beyond = -kept.shape[-1] % block
    some = pad(kept, (0, beyond)).unflatten(-1, (-1, block)).any(-1).any(1)
    all_ = pad(kept, (0, beyond), value=True).unflatten(-1, (-1, block)).all(-1).all(1)
    return some.to(torch.uint8) + all_.to(torch.uint8)


def combine(status: Tensor | None, options: Options, S: int, Sk: int, *, block: int = BLOCK) -> Tensor:
    """uint8 `[1 or B, 1 or H, n_q, n_k]`: `status`, or all full, under the bounds and documents of the options as well.

    These leave each query one interval of keys. In a document of several runs, the interval holds keys of others too:
    a block in it is partial.
    """
    device = options.documents.q.device if options.documents else status.device if status is not None else None
    left, right = options.bounds
    if options.documents:
        number, low, high, high_of_run, place = options.documents.q.long()  # each [B, S]
    else:
        place = torch.arange(S, device=device)[None]
        number, low, high = torch.zeros_like(place), torch.zeros_like(place), torch.full_like(place, Sk)
        high_of_run = high
    if left >= 0:
        low = low.maximum(place - left)
    if right >= 0:
        high, high_of_run = high.minimum(place + right + 1), high_of_run.minimum(place + right + 1)
    high, high_of_run = (x.where(number >= 0, 0) for x in (high, high_of_run))

    n_k = -(-Sk // block)
    touched = _touched(low, high, n_k, block)
    begin = torch.arange(n_k, device=device) * block
    end = begin + block  # past the last key, so that no block beyond it is full: kernels load those without a mask
    beyond = -S % block  # queries that do not exist take nothing away
    last_low = pad(low, (0, beyond)).unflatten(-1, (-1, block)).amax(-1, keepdim=True)  # [B, n_q, 1]
    first_high = pad(high_of_run, (0, beyond), value=Sk).unflatten(-1, (-1, block)).amin(-1, keepdim=True)
    whole = (last_low <= begin) & (first_high >= end)
    bounds = touched.to(torch.uint8) + whole.to(torch.uint8)  # [B, n_q, n_k]; what is whole is touched
    return bounds[:, None] if status is None else bounds[:, None].minimum(status)


def _touched(low: Tensor, high: Tensor, n_k: int, block: int) -> Tensor:
    """Whether the keys low .. high - 1 of any query of a block meet a key block: [B, S] -> bool [B, n_q, n_k]."""
    beyond = -low.shape[-1] % block
    first, last = low // block, (high - 1) // block
    some = (low < high).int()
    first, last = first.where(low < high, 0), last.where(low < high, 0)
    # Every interval counts +1 from its first key block on and -1 behind its last one.
    change = torch.zeros(len(low), (low.shape[-1] + beyond) // block, n_k + 1, dtype=torch.int32, device=low.device)
    for place, sign in ((first, 1), (last + 1, -1)):
        places, counts = (pad(x, (0, beyond)).unflatten(-1, (-1, block)) for x in (place, sign * some))
        change.scatter_add_(-1, places, counts)
    return change.cumsum(-1)[..., :n_k] > 0


def within(status: Tensor, queries: range, *, block: int = BLOCK) -> Tensor:
    """`status` of some queries, a `Part`: the blocks of all others are empty."""
    begin = torch.arange(status.size(2), device=status.device)[:, None] * block
    return status * ((begin >= queries.start) & (begin < queries.stop))


def lists(status: Tensor, heads: HeadMap, hq: int, hkv: int) -> Blocks:
    """The blocks that are not empty in both orders; `status` [1 or B, 1 or hq, n_q, n_k] is of the local heads."""
    B, _, n_q, n_k = status.shape
    b, h, m, n = status.nonzero(as_tuple=True)
    full = status[b, h, m, n] == FULL
    q_rows, q_tiles = _lists((b * status.shape[1] + h) * n_q + m, full, n, B * status.shape[1] * n_q, n_k)

    status = status.expand(B, hq, n_q, n_k)
    b, h, m, n = status.nonzero(as_tuple=True)
    full = status[b, h, m, n] == FULL
    row = (b * hkv + (h + heads.offset) // heads.group) * n_k + n
    k_rows, k_tiles = _lists(row, full, h * n_q + m, B * hkv * n_k, hq * n_q)
    return Blocks(q_rows.view(B, -1, n_q, 3), q_tiles, k_rows.view(B, hkv, n_k, 3), k_tiles)


def _lists(row: Tensor, full: Tensor, entry: Tensor, rows: int, entries: int) -> tuple[Tensor, Tensor]:
    """Entries (numbers below `entries`) by row, partial before full, ascending: int32 [rows, 3] and [all]."""
    if max(len(row), entries) >= 2**31:
        raise ValueError(f"a block mask with {len(row)} blocks in rows of up to {entries}; its lists count in int32")
    part = row * 2 + full
    counts = torch.bincount(part, minlength=2 * rows).view(rows, 2)
    ends = counts.flatten().cumsum(0).view(rows, 2)
    bounds = torch.cat((ends[:, :1] - counts[:, :1], ends), -1)
    tiles = (part * entries + entry).sort().values % max(entries, 1)
    return bounds.int(), tiles.int()
