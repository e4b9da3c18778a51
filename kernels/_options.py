"""Options as kernel arguments: run-time values, pointers, and one constexpr of flags, for forward and backward alike.

Tables of documents and blocks and captured tensors come as tuples, empty where there are none; the lengths, the bounds
of the window, the seed and all else that changes from call to call are run-time numbers.
"""

from __future__ import annotations

from typing import Any

from . import _dropout
from ._mask import Flags
from ._scores import scales
from ._views import Options

NUMBERS = ["S", "Sk", "start", "n_rows", "n_keys", "first_head", "left", "right", "seed_low", "seed_high", "threshold",
           "stride_rb", "stride_rh"]  # fmt: skip


def flags(options: Options) -> Flags:
    left, right = options.bounds
    window = left >= 0 or right > 0
    return Flags(
        causal=right == 0 and not window,
        window=window,
        documents=options.documents is not None,
        blocks=options.blocks is not None,
        predicate=options.predicate is not None,
        softcap=options.softcap is not None,
        alibi=options.slopes is not None,
        dropout=options.dropout is not None,
        part=options.part is not None,
    )


def arguments(options: Options, n_rows: int, n_keys: int, *, keys: bool = False) -> dict[str, Any]:
    """The arguments that say which attention it is, for a kernel that holds query tiles, or with `keys` key tiles.

    q has `n_rows` rows and k `n_keys`. A side of the window without a bound gets one that no pair reaches.
    """
    S, Sk = options.lengths(n_rows, n_keys)
    part = (None, None, None) if options.part is None else (options.queries(n_rows).start, n_rows, n_keys)
    left, right = options.bounds
    blocks, predicate = options.blocks, options.predicate
    lists = () if blocks is None else blocks[2:] if keys else blocks[:2]
    rows, heads, tiles = lists[0].shape[:3] if lists else (1, 1, 1)
    return {
        **scales(options),
        **_dropout.arguments(options.dropout),
        "S": S,
        "Sk": Sk,
        **dict(zip(("start", "n_rows", "n_keys"), part, strict=True)),
        "group": options.heads.group,
        "offset": options.heads.offset,
        "first_head": options.heads.first,
        "left": S + Sk if left < 0 else min(left, S + Sk),
        "right": S + Sk if right < 0 else min(right, S + Sk),
        "documents": options.documents or (),
        "blocks": lists,
        "stride_rb": heads * tiles if rows > 1 else 0,
        "stride_rh": tiles if heads > 1 else 0,
        "captured": predicate.captured if predicate else (),
        "slopes_ptr": options.slopes,
        "keep_scale": 1.0 if options.dropout is None else 1 / (1 - options.dropout.p),
        "HAS": flags(options),
        "PREDICATE": predicate.function if predicate else None,
    }
