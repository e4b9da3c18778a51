"""What users call in place of a local attention function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import halves, op
from .call import Call, describe
from .errors import DeviceError, DtypeError, OptionError, ShapeError, UlyssesError
from .executor import views_of_rows
from .group import Groupish, UlyssesGroup, resolve
from .placement import place

Attention = str | Callable[..., Tensor]


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
            sequence-parallel group: with None all ranks would share one sequence. Its size must divide Hq.
        causal: token i of the whole sequence attends to tokens `0..i` (aligned at token 0 when keys differ in length).
        scale: the softmax scale; None for `1 / sqrt(D)`.
        window: `(left, right)` in tokens: token i of the whole sequence attends to tokens `i - left .. i + right` only;
            -1 for no bound on that side, and with `causal` right counts as 0. Aligned at token 0 also when keys differ
            in length (flash-attn aligns at the end). A token that no key is left for gets zeros, and an LSE of -inf.
        softcap: scores are `softcap * tanh(scale q k^T / softcap)`, ahead of the mask (Gemma 2, Gemma Team 2024,
            https://arxiv.org/abs/2408.00118, section 2); None for none.
        lens: every rank's L in tokens, when they differ. kv_lens: every rank's Lk, when keys have lengths of their own.
        attention: "auto"; "triton" or "aten" (PyTorch's kernel) to insist on one; or a callable
            `attention(q, k, v, causal=..., scale=...)`, and `window=`, `softcap=` where they are given, that gets
            `[B, S, h, D]` views of the whole sequence with this rank's heads (fewer for k and v under GQA) and returns
            `[B, S, h, Dv]`.
        recompute: "exchange" saves only the inputs for backward (beside the output) and exchanges again; None saves the
            exchanged q, k and v.
        return_lse: also return the log-sum-exp of the scores, `[B, L, Hq]`, natural log, fp32 (fp64 for fp64).

    Returns:
        `[B, L, Hq, Dv]`, or (that, LSE). Differentiable in q, k, v, through both results.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: for what is wrong with the call, on every rank, also when only
            one rank's is. ExchangeError: when a peer died or did not come before the group's deadline.
    """
    own = resolve(group)
    with _told_to_peers(own):
        _check_tensors(own, q=q, k=k, v=v)
    return _attend(
        own, (q, k, v), causal=causal, scale=scale, window=window, softcap=softcap, lens=lens, kv_lens=kv_lens,
        attention=attention, recompute=recompute, return_lse=return_lse,
    )  # fmt: skip


def ulysses_qkv_attention(
    qkv: Tensor,
    group: Groupish = None,
    *,
    heads: int,
    kv_heads: int,
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
    lens: Sequence[int] | None = None,
    attention: Attention = "auto",
    recompute: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ulysses_attention` on a fused projection's own output, with QK-norm and RoPE applied on the way out.

    Args:
        qkv: `[B, L, (heads + 2 kv_heads) D]`: all query heads, then all key heads, then all value heads.
        group: as for `ulysses_attention`, like every argument that is not listed here.
        heads, kv_heads: Hq and Hkv of the model.
        rope: (cos, sin) of this rank's own tokens, each `[L, R/2]` (a column per channel pair) or `[L, R]` (one per
            channel), or with a leading B. The first R channels of q and k rotate, after the norm (RoFormer, Su et al.
            2021, section 3.2).
        rope_interleaved: pairs are channels (2i, 2i + 1); otherwise (i, i + R/2), as in Llama.
        rope_dim: R, where the width fits both readings; without it a width of D/2 or D means R = D, another width R.
        q_norm, k_norm: `[D]` weights of an RMS norm over each head of q and of k.
        norm_eps: added to the mean square.

    Returns:
        `[B, L, heads, D]`, or (that, LSE). Differentiable in qkv and both weights.

    Raises:
        As `ulysses_attention`.
    """
    own = resolve(group)
    with _told_to_peers(own):
        _check_tensors(own, qkv=qkv)
        cos, sin = (None, None) if rope is None else rope
        optional = {"rope cos": cos, "rope sin": sin, "q_norm": q_norm, "k_norm": k_norm}
        _check_tensors(own, **{name: tensor for name, tensor in optional.items() if tensor is not None})
    return _attend(
        own, (qkv, None, None), (cos, sin, q_norm, k_norm), heads=heads, kv_heads=kv_heads,
        rope_interleaved=rope_interleaved, rope_dim=rope_dim or 0, norm_eps=norm_eps, causal=causal, scale=scale,
        window=window, softcap=softcap, lens=lens, attention=attention, recompute=recompute, return_lse=return_lse,
    )  # fmt: skip


class _told_to_peers:
    """When this rank cannot make the call, let the peers know in the agreement, so that all raise."""

    def __init__(self, group: UlyssesGroup) -> None:
        self.group = group

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UlyssesError):
            self.group.refuse(error)


def _check_tensors(group: UlyssesGroup, **tensors: object) -> None:
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
    *,
    heads: int = 0,
    kv_heads: int = 0,
    lens: Sequence[int] | None,
    kv_lens: Sequence[int] | None = None,
    causal: bool,
    scale: float | None,
    window: tuple[int, int] | None,
    softcap: float | None,
    rope_interleaved: bool = False,
    rope_dim: int = 0,
    norm_eps: float = 1e-6,
    attention: Attention,
    recompute: str | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    with _told_to_peers(group):
        if recompute not in (None, "exchange"):
            raise OptionError(f'recompute = {recompute!r}; it must be None or "exchange"')
        if not isinstance(attention, str) and not callable(attention):
            raise OptionError(f"attention is a {type(attention).__name__}; it must be a name or a callable")
        if callable(attention) and (return_lse or recompute):
            raise OptionError("a callable attention goes with neither return_lse nor recompute: they are the kernels'")
        if window is not None and not _two_ints(window):
            raise OptionError(f"window = {window!r}; it must be two ints, (left, right) in tokens, or None")
        if softcap is not None and (isinstance(softcap, bool) or not isinstance(softcap, (int, float))):
            raise OptionError(f"softcap is a {type(softcap).__name__}; it must be a number above 0, or None")
        parts = heads + 2 * kv_heads if qkv[1] is None else 1
        if qkv[0].dim() == 0 or parts < 1:
            raise ShapeError(f"q has shape {list(qkv[0].shape)}, with heads = {heads} and kv_heads = {kv_heads}")
        head_dim = qkv[0].size(-1) // parts
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (*qkv, *transform[2:]) if t is not None)
    call = Call(
        *qkv,
        *transform,
        group=group.name,
        heads=heads,
        kv_heads=kv_heads,
        lens=[int(n) for n in lens] if lens is not None else [],
        kv_lens=[int(n) for n in kv_lens] if kv_lens is not None else [],
        causal=causal,
        scale=float(scale if scale is not None else max(head_dim, 1) ** -0.5),
        window=list(window or ()),
        softcap=None if softcap is None else float(softcap),
        rope_interleaved=rope_interleaved,
        rope_dim=rope_dim,
        norm_eps=norm_eps,
        attention=attention if isinstance(attention, str) else "callable",
        recompute=recompute is not None,
        return_lse=return_lse,
        grad=grad,
        abi=op.ABI,
    )
    if not isinstance(attention, str):
        return _around(group, attention, call)
    out, lse, _ = op.attention(*call)
    return (out, lse) if return_lse else out


def _two_ints(window: object) -> bool:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) for n in window)


def _around(group: UlyssesGroup, attention: Callable[..., Tensor], call: Call) -> Tensor:
    """A callable between the two halves of the exchange."""
    rows, kv_rows = halves.exchange_in(*call)
    problem, _ = describe(group, call)
    received = [rows, kv_rows] if problem.cross else [rows]
    q, k, v = (view.transpose(0, 1) for view in views_of_rows(problem, group.rank, received))
    index = place(problem).kv_head_of(group.rank)
    if len(index) % k.size(2) or index != [h // (len(index) // k.size(2)) for h in range(len(index))]:
        k, v = k[:, :, index], v[:, :, index]  # query heads that begin inside a kv group: one kv head for each
    given = {"window": problem.window, "softcap": problem.softcap}
    options = {name: value for name, value in given.items() if value is not None}
    try:
        out = attention(q, k, v, causal=problem.causal, scale=problem.scale, **options)
        expected = (*q.shape[:3], v.size(3))
        if not isinstance(out, Tensor) or out.shape != expected or out.dtype != q.dtype:
            got = f"{list(out.shape)} {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
            raise ShapeError(f"the attention callable returned {got}; expected {list(expected)} {q.dtype}")
    except Exception as error:
        group.refuse(error if isinstance(error, UlyssesError) else OptionError(f"the attention callable: {error}"))
        raise
    return halves.exchange_out(
        out.transpose(0, 1),
        group.name,
        problem.heads,
        problem.kv_heads,
        problem.head_dim,
        list(problem.lens),
        problem.causal,
    )
