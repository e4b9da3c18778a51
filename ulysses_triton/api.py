"""What users call in place of a local attention function."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import chunk_cache, cost, masks, op
from .balance import weighed_cuts
from .call import Call, describe
from .callables import by_callable
from .errors import DeviceError, DtypeError, OptionError, ShapeError, UlyssesError
from .group import Groupish, UlyssesGroup, resolve, told_to_peers
from .packed import Offsets, kept_tables
from .packed import check as check_packing
from .packed import tables as packed_tables
from .projection import Projection

Attention = str | Callable[..., Tensor]
NO_PROJECTION = Projection()


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Groupish = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    segment_ids: Tensor | None = None,
    cu_seqlens: Offsets | None = None,
    cu_seqlens_k: Offsets | None = None,
    mask: Any = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    lens: Sequence[int] | None = None,
    kv_lens: Sequence[int] | None = None,
    attention: Attention = "auto",
    recompute: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a sequence that is sharded across the ranks of `group`, as if one device held all of it.

    Every rank of the group makes the same call with its own tokens, in rank order; one exchange turns sequence shards
    into head shards, each rank attends over the whole sequence for its heads, a second exchange turns the result back
    (DeepSpeed-Ulysses, Jacobs et al. 2023, https://arxiv.org/abs/2309.14509, section 3).

    Args:
        q: `[B, L, Hq, D]`, this rank's L tokens; any strides with a dense last dim; fp32, bf16, fp16, or fp64 on a CPU.
        k: `[B, Lk, Hkv, D]`; Hkv divides Hq, query head h attends to kv head `h // (Hq / Hkv)`.
        v: `[B, Lk, Hkv, Dv]`. D and Dv are at most 256.
        group: a `ProcessGroup`, a 1-D `DeviceMesh`, a `UlyssesGroup`, or None for the default group (one rank, plain
            attention, when `torch.distributed` is not initialised). With data-parallel ranks in the job pass the
            sequence-parallel group: with None all ranks would share one sequence.
        causal: token i of the whole sequence attends to tokens `0..i` (aligned at token 0 when keys differ in length).
        scale: the softmax scale; None for `1 / sqrt(D)`.
        window: `(left, right)` in tokens: token i of the whole sequence attends to tokens `i - left .. i + right` only;
            -1 for no bound on that side, and with `causal` right counts as 0. Aligned at token 0 also when keys differ
            in length (flash-attn aligns at the end). A token that no key is left for gets zeros, and an LSE of -inf.
        softcap: scores are `softcap * tanh(scale q k^T / softcap)`, ahead of the mask (Gemma 2, Gemma Team 2024,
            https://arxiv.org/abs/2408.00118, section 2); None for none.
        sinks: `[Hq]` of the whole model, a score per head that no value lies behind (gpt-oss, OpenAI 2025; attention
            sinks: Xiao et al. 2023, https://arxiv.org/abs/2309.17453); the LSE counts it. Its gradient is this rank's
            share: the sum over the ranks is the gradient, as for any replicated parameter.
        alibi_slopes: `[Hq]` of the whole model: scores lose `slope * |i - j|` (ALiBi, Press et al. 2022,
            https://arxiv.org/abs/2108.12409, section 3), after the softcap. The gradient is a share likewise.
        segment_ids: int `[B, L]`, the document of each of this rank's own tokens: tokens attend only tokens of their
            own document, wherever it lies; negative is padding, with zeros as output and gradients. Gathered once for
            as long as it is the same tensor, so pass the same one to all layers.
        cu_seqlens: offsets `[documents + 1]` in the whole sequence, from 0 to S, equal on all ranks, as ints or a
            tensor: the same for a batch of 1. A tensor on a GPU is read once; ints and a CPU tensor also weigh on where
            heads are cut that the ranks do not divide. Documents may be empty. With
            `cu_seqlens_k` keys have documents of their own lengths; causal and window then count from the beginning of
            every document.
        mask: a predicate under `masks.register` that says which pairs are attended; or `(predicate, *tensors)` with
            tensors that it captured, equal on all ranks; or a `masks.block_mask` of one, whose empty tiles cost
            nothing. It goes on top of all other masks.
        dropout_p: the probability with which a pair's weight is dropped; the others grow by `1 / (1 - p)`. Which ones
            are dropped follows from the seed and the pair's batch, head and positions: the same for any number of
            ranks.
        dropout_seed: an int from 0, equal on all ranks; None for rank 0's draw from PyTorch's default CPU generator.
        lens: every rank's L in tokens, when they differ. kv_lens: every rank's Lk, when keys have lengths of their own.
        attention: "auto"; "triton" or "aten" (PyTorch's kernel) to insist on one; or a callable
            `attention(q, k, v, causal=..., scale=...)` that gets `[B, S, h, D]` views of the whole sequence with this
            rank's heads (fewer for k and v under GQA) and returns `[B, S, h, Dv]`. Where they are given it also gets
            `window=`, `softcap=`, `cu_seqlens=`, `cu_seqlens_k=`, `segment_ids=` as `[B, S]` (numbered anew),
            and `sinks=` and `alibi_slopes=` of its heads.
        recompute: "exchange" saves only the inputs for backward (beside the output) and exchanges again; None saves the
            exchanged q, k and v.
        return_lse: also return the log-sum-exp of the scores, `[B, L, Hq]`, natural log, fp32 (fp64 for fp64).

    Returns:
        `[B, L, Hq, Dv]`, or (that, LSE). Differentiable in q, k, v, sinks and slopes, through both results.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: for what is wrong with the call, on every rank, also when only
            one rank's is. ExchangeError: when a peer died or did not come before the group's deadline.
    """
    own = resolve(group)
    with told_to_peers(own):
        check_tensors(own, q=q, k=k, v=v)
    return _attend(
        own, (q, k, v), causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks, slopes=alibi_slopes,
        packing=(segment_ids, cu_seqlens, cu_seqlens_k), mask=mask, dropout=(dropout_p, dropout_seed), lens=lens,
        kv_lens=kv_lens, attention=attention, recompute=recompute, return_lse=return_lse,
    )  # fmt: skip


def ulysses_qkv_attention(
    qkv: Tensor,
    group: Groupish = None,
    *,
    heads: int,
    kv_heads: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    out_weight: Tensor | None = None,
    out_bias: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    rope_interleaved: bool = False,
    rope_dim: int | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    segment_ids: Tensor | None = None,
    cu_seqlens: Offsets | None = None,
    mask: Any = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    lens: Sequence[int] | None = None,
    attention: Attention = "auto",
    recompute: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ulysses_attention` on a fused projection's own output, with QK-norm and RoPE applied on the way out.

    It can do the projections, too. In a group with `chunks` the next chunk is then projected while the rows of the one
    before travel, and so is the output of the one before. It is what `F.linear` around the call computes, but for
    the order of sums: matrix products of other sizes may round otherwise, and C chunks add up C of them to the output.
    It keeps x and not qkv for backward. Around a callable `attention` it is `F.linear` itself.

    Args:
        qkv: `[B, L, (heads + 2 kv_heads) D]`: all query heads, then all key heads, then all value heads. With `weight`
            the layer's input x, `[B, L, E]`.
        group: as for `ulysses_attention`, like every argument that is not listed here.
        heads, kv_heads: Hq and Hkv of the model.
        weight, bias: `[(heads + 2 kv_heads) D, E]` and `[(heads + 2 kv_heads) D]`, as `nn.Linear` has them: qkv is
            `F.linear(x, weight, bias)`. Gradients of these four are this rank's share, as that of sinks.
        out_weight, out_bias: `[E2, heads D]` and `[E2]`, the output projection. All four have x's (or qkv's) dtype, as
            the call does not follow autocast.
        rope: (cos, sin) of this rank's own tokens, each `[L, R/2]` (a column per channel pair) or `[L, R]` (one per
            channel), or with a leading B. The first R channels of q and k rotate, after the norm (RoFormer, Su et al.
            2021, section 3.2).
        rope_interleaved: pairs are channels (2i, 2i + 1); otherwise (i, i + R/2), as in Llama.
        rope_dim: R, where the width fits both readings; without it a width of D/2 or D means R = D, another width R.
        q_norm, k_norm: `[D]` weights of an RMS norm over each head of q and of k.
        norm_eps: added to the mean square.

    Returns:
        `[B, L, heads, D]`, with `out_weight` `[B, L, E2]`, or (that, LSE). Differentiable in qkv or x, norm weights,
        projections, sinks and slopes.

    Raises:
        As `ulysses_attention`.
    """
    own = resolve(group)
    with told_to_peers(own):
        check_tensors(own, qkv=qkv)
        cos, sin = (None, None) if rope is None else rope
        around = Projection(None, weight, bias, out_weight, out_bias)
        optional = {"rope cos": cos, "rope sin": sin, "q_norm": q_norm, "k_norm": k_norm, **around._asdict()}
        check_tensors(own, **{name: tensor for name, tensor in optional.items() if tensor is not None})
    return _attend(
        own, (qkv, None, None), (cos, sin, q_norm, k_norm), around, heads=heads, kv_heads=kv_heads,
        rope_interleaved=rope_interleaved, rope_dim=rope_dim or 0, norm_eps=norm_eps, causal=causal, scale=scale,
        window=window, softcap=softcap, sinks=sinks, slopes=alibi_slopes, packing=(segment_ids, cu_seqlens, None),
        mask=mask, dropout=(dropout_p, dropout_seed), lens=lens, attention=attention, recompute=recompute,
        return_lse=return_lse,
    )  # fmt: skip


def check_tensors(group: UlyssesGroup, **tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"{name} is a {type(tensor).__name__}; it must be a tensor")
        if tensor.device.type not in group.devices:
            raise DeviceError(
                f"{name} is on {tensor.device}, but group {group.name!r} carries tensors on "
                f"{' and '.join(sorted(group.devices))}: move it, or use a process group whose backend carries it"
            )


def _attend(
    group: UlyssesGroup,
    qkv: tuple[Tensor, Tensor | None, Tensor | None],
    transform: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] = (None,) * 4,
    around: Projection = NO_PROJECTION,  # its x is q
    *,
    heads: int = 0,
    kv_heads: int = 0,
    lens: Sequence[int] | None,
    kv_lens: Sequence[int] | None = None,
    causal: bool,
    scale: float | None,
    window: tuple[int, int] | None,
    softcap: float | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    packing: tuple[Any, Any, Any],
    mask: Any,
    dropout: tuple[float, int | None],
    rope_interleaved: bool = False,
    rope_dim: int = 0,
    norm_eps: float = 1e-6,
    attention: Attention,
    recompute: str | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    p, seed = dropout
    p, scale, softcap, norm_eps = (_constant(x) for x in (p, scale, softcap, norm_eps))
    with told_to_peers(group):
        if recompute not in (None, "exchange"):
            raise OptionError(f'recompute = {recompute!r}; it must be None or "exchange"')
        if not isinstance(attention, str) and not callable(attention):
            raise OptionError(f"attention is a {type(attention).__name__}; it must be a name or a callable")
        if attention == "callable":  # a problem's name for all callables
            raise OptionError('attention = "callable"; it must be "auto", "triton", "aten" or the callable itself')
        if callable(attention) and (return_lse or recompute):
            raise OptionError("a callable attention goes with neither return_lse nor recompute: they are the kernels'")
        if callable(attention) and (mask is not None or p):
            raise OptionError("a callable attention goes with neither mask nor dropout_p: let the callable do it")
        check_numbers(window, softcap=softcap, dropout_p=p)
        if seed is not None and not _is_int(seed):
            raise OptionError(f"dropout_seed is a {type(seed).__name__}; it must be an int or None")
        per_head = {"sinks": sinks, "alibi_slopes": slopes}
        check_tensors(group, **{name: tensor for name, tensor in per_head.items() if tensor is not None})
        parts = heads + 2 * kv_heads if qkv[1] is None else 1
        if any(t is not None and t.dim() < 3 for t in qkv) or parts < 1:
            raise ShapeError(f"q has shape {list(qkv[0].shape)}, with heads = {heads} and kv_heads = {kv_heads}")
        width = qkv[0].size(-1) if around.weight is None else around.weight.size(0) if around.weight.dim() else 0
        head_dim = width // parts
        predicate, captured, blocks = ("", (), None) if mask is None else masks.parse(mask)
        keys = qkv[0] if qkv[1] is None else qkv[1]
        check_packing(*packing, qkv[0].shape, kv_lens is None and keys.shape[1:2] == qkv[0].shape[1:2])
        all_lens = _all_lens(group, "lens", lens, qkv[0])
        all_kv_lens = _all_lens(group, "kv_lens", kv_lens if kv_lens is not None else lens, keys)
        if isinstance(mask, masks.BlockMask) and (mask.q_len, mask.kv_len) != (sum(all_lens), sum(all_kv_lens)):
            raise ShapeError(
                f"the block mask is for {mask.q_len} queries and {mask.kv_len} keys; the whole sequence has "
                f"{sum(all_lens)} and {sum(all_kv_lens)}"
            )
    tables = _documents(group, packing, all_lens, all_kv_lens, qkv[0])
    leaves = (*qkv, *transform[2:], sinks, slopes, *around)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in leaves if t is not None)
    call = Call(
        *qkv,
        *transform,
        sinks=sinks,
        slopes=slopes,
        weight=around.weight,
        bias=around.bias,
        out_weight=around.out_weight,
        out_bias=around.out_bias,
        q_documents=tables[0],
        k_documents=tables[1],
        blocks=blocks,
        seed=torch.randint(2**63 - 1, (), dtype=torch.int64) if p and seed is None else None,
        captured=list(captured),
        group=group.name,
        heads=heads,
        kv_heads=kv_heads,
        lens=[int(n) for n in lens] if lens is not None else [],
        kv_lens=[int(n) for n in kv_lens] if kv_lens is not None else [],
        causal=causal,
        scale=float(scale if scale is not None else max(head_dim, 1) ** -0.5),
        window=list(window or ()),
        softcap=None if softcap is None else float(softcap),
        dropout_p=float(p),
        dropout_seed=seed,
        predicate=predicate,
        rope_interleaved=rope_interleaved,
        rope_dim=rope_dim,
        norm_eps=norm_eps,
        attention=attention if isinstance(attention, str) else "callable",
        chunks=1 if group.chunks == "auto" else int(group.chunks),
        cuts=[],
        recompute=recompute is not None,
        return_lse=return_lse,
        grad=grad,
        abi=op.ABI,
    )
    if not isinstance(attention, str):
        return by_callable(group, attention, call, packing)
    if group.chunks == "auto" and qkv[0].is_cuda and not torch.compiler.is_compiling():
        call = call._replace(chunks=_best_chunks(group, call))
    if not torch.compiler.is_compiling():
        with told_to_peers(group):
            call = call._replace(cuts=weighed_cuts(group, call, *packing[1:]))
    out, lse, _ = op.attention(*call)
    return (out, lse) if return_lse else out


def _documents(
    group: UlyssesGroup, packing: tuple[Any, Any, Any], lens: Sequence[int], kv_lens: Sequence[int], like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    segment_ids, q_offsets, k_offsets = packing
    if segment_ids is None and q_offsets is None:
        return None, None
    if not torch.compiler.is_compiling():
        return kept_tables(group, segment_ids, q_offsets, k_offsets, lens, kv_lens, like.device)
    q, k = (x if x is None or isinstance(x, Tensor) else torch.tensor(list(x)) for x in (q_offsets, k_offsets))
    found: tuple[Tensor, Tensor] = packed_tables(segment_ids, q, k, group.name, lens, kv_lens, str(like.device))
    return found


def _all_lens(group: UlyssesGroup, name: str, lens: Sequence[int] | None, own: Tensor) -> list[int]:
    """All ranks' lengths: those given, or this rank's for all; the op checks them."""
    if lens is not None and len(lens) != group.size:
        raise ShapeError(f"{name} = {list(lens)} has {len(lens)} entries; the group has {group.size} ranks")
    return [own.size(1)] * group.size if lens is None else [int(n) for n in lens]


def _constant(x: Any) -> Any:
    """The value of a float that is a symbol in a graph of dynamic shapes, where a value is compiled for anyway.

    Layers share such a symbol, and a checkpointed one cannot compute with what another one has made of it.
    """
    if not torch.compiler.is_compiling() or not isinstance(x, float):
        return x
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # slow to import

    return guard_scalar(x)


def check_numbers(window: object, **numbers: object) -> None:
    """Raise OptionError where `window` is not two ints, or where another one is not a number."""
    if window is not None and not _two_ints(window):
        raise OptionError(f"window = {window!r}; it must be two ints, (left, right) in tokens, or None")
    for name, number in numbers.items():
        if number is not None and not _is_number(number):
            raise OptionError(f"{name} is a {type(number).__name__}; it must be a number")


def _is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: object) -> bool:
    return isinstance(x, float) or _is_int(x)


def _two_ints(window: object) -> bool:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        return False
    return all(map(_is_int, window))


def _best_chunks(group: UlyssesGroup, call: Call) -> int:
    """As many chunks as were measured to be fastest on this GPU, or else as the cost model finds.

    One where that knows neither the GPU nor what the call asks.
    """
    assert call.q is not None
    try:
        problem, _ = describe(group, call)
    except UlyssesError:
        return 1  # the op says what is wrong, on all ranks
    gpu = torch.cuda.get_device_name(call.q.device)
    one_host = group.size <= int(os.environ.get("LOCAL_WORLD_SIZE", group.size))
    key = chunk_cache.key_of(problem, group.exchange.name, one_host)
    measured = None if key is None else chunk_cache.lookup(gpu, key)
    if measured is not None:
        return measured
    machine = cost.machine_of(gpu, one_host)
    return 1 if machine is None else cost.best_chunks(problem, machine, one_sided=group.exchange.one_sided)
