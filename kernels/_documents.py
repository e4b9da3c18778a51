"""Documents: from a number per token to what the kernels ask of them.

Tokens with equal numbers are one document, wherever they lie; a negative number is padding. Everything is computed on
the device of the numbers without asking the host, once per batch of tokens.

Worked example: queries and keys numbered `7 7 7 4 4 -1`. Token 3 (document 4) meets the tokens 3 and 4 of the other
side: first 3, one past the last 5, one run, so 5 again; its place among them is 3. Were the keys `4 4 7 7 7`, it would
meet 0 and 1 and its place would be 0: causal, it attends key 0 only, and query 4 attends both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._views import Documents


def documents(q_ids: Tensor, k_ids: Tensor | None = None) -> Documents:
    """`Documents` of the numbers of all queries, int `[B, S]`, and all keys, `[B, Sk]`; None where both are equal."""
    other = q_ids if k_ids is None else k_ids
    q_first, k_first = _first(q_ids), _first(other)
    q_side, k_side = _side(q_ids, other, q_first), _side(other, q_ids, k_first)
    q_side[0] = q_side[1].where(q_side[1] < q_side[2], -1)  # documents are told apart by their first key
    k_side[0] = k_first.where(other >= 0, -2)
    return Documents(q_side, k_side)


def _side(ids: Tensor, other: Tensor, own_first: Tensor) -> Tensor:
    """`[5, B, tokens]` int32 as in `Documents`, its first plane yet to be filled."""
    ordered, order = other.sort(dim=1, stable=True)
    begin = torch.searchsorted(ordered, ids)
    end = torch.searchsorted(ordered, ids, right=True)
    met = (begin < end) & (ids >= 0)
    order = order if other.size(1) else order.new_zeros(len(ids), 1)
    top = order.size(1) - 1
    first = order.gather(1, begin.clamp(max=top)).where(met, 0)
    stop = (order.gather(1, (end - 1).clamp(0, top)) + 1).where(met, 0)
    run_stop = stop.where(stop - first == end - begin, first)
    spot = torch.arange(ids.size(1), device=ids.device) + (first - own_first).where(met, 0)
    return torch.stack((first, first, stop, run_stop, spot)).to(torch.int32)


def _first(ids: Tensor) -> Tensor:
    """The first token of each token's document."""
    ordered, order = ids.sort(dim=1, stable=True)
    return order.gather(1, torch.searchsorted(ordered, ids))
