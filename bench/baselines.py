"""What the literature compares with: causal attention over a sharded sequence by other ways, on torch.distributed.

    megatron(q, k, v)               # all-gather the sequence, attend for a share of the heads, reduce-scatter
    ring(q, k, v)                   # blocks of k and v go round, softmax is merged block by block
    ring_self_attention(q, k, v)    # blocks of k go round for whole rows of scores, then blocks of v

Each takes q `[B, L, Hq, D]` and k, v `[B, L, Hkv, D]`, a rank's L = S / P tokens of the sequence in order, and gives
`[B, L, Hq, D]`, with gradients; over gloo and NCCL, on the whole world. Beside each is what a rank sends to others in
forward and backward, in bytes, with e bytes for an element. That of Ulysses is there to compare: with L tokens on every
rank it stays below 4 (Hq + Hkv) D x L x e whatever P, where the others grow with P - 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ulysses_triton.case import Case

_aten = torch.ops.aten

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _elements(case: Case, heads: int) -> int:
    """Of a rank's tokens, so many heads of each."""
    return case.batch * (case.tokens // case.ranks) * heads * case.head_dim


def ulysses_bytes(case: Case) -> int:
    """(P - 1) / P x 4 (Hq + Hkv) D x L x e: q, k, v and O trade places once in forward; dO, dq, dk and dv in backward.

    Where there are more ranks than kv heads, a head goes to all ranks that share it.
    """
    heads = case.heads + max(case.kv_heads, case.ranks)
    return 4 * _elements(case, heads) // case.ranks * (case.ranks - 1) * case.torch_dtype.itemsize


# ---- Megatron's sequence parallelism (Korthikanti et al. 2022)


def megatron_bytes(case: Case) -> int:
    """(P - 1) x 4 (Hq + Hkv) D x L x e: P times what Ulysses sends.

    An all-gather sends a rank's part to P - 1 others, a reduce-scatter what is theirs of its sums: (P - 1) / P x S
    tokens each, whatever P. Forward gathers q, k, v, of (Hq + 2 Hkv) D, and scatters O, of Hq D; backward gathers dO
    and scatters dq, dk and dv. Megatron itself gathers the hidden states of a block, of h = Hq D, in place of q, k and
    v, which each rank projects for its heads: (P - 1) x 4 h x L x e, half of this where Hkv = Hq, P / 2 times Ulysses.
    """
    return 4 * _elements(case, case.heads + case.kv_heads) * (case.ranks - 1) * case.torch_dtype.itemsize


def megatron(q: Tensor, k: Tensor, v: Tensor, attend: Attention) -> Tensor:
    """Gather all tokens, `attend` for the rank's heads, scatter the sum of what ranks have: their heads, 0 elsewhere.

    All contestants begin with q, k and v and end with O, so those are gathered and scattered here, where Megatron has
    projections in between.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    heads, kv_heads = q.size(2), k.size(2)
    if heads % ranks:
        raise ValueError(f"{ranks} ranks do not divide {heads} query heads, which tensor parallelism needs")
    whole = _Gather.apply(torch.cat((q, k, v), 2))  # [B, S, Hq + 2 Hkv, D]
    all_q, all_k, all_v = whole.split((heads, kv_heads, kv_heads), 2)
    first, end = rank * heads // ranks, (rank + 1) * heads // ranks
    group = heads // kv_heads
    mine = slice(first // group, (end - 1) // group + 1)
    out = attend(all_q[:, :, first:end], all_k[:, :, mine], all_v[:, :, mine])
    return _Scatter.apply(F.pad(out, (0, 0, first, heads - end)))


def _gathered(x: Tensor) -> Tensor:
    """[B, L, ...] of all ranks as [B, S, ...]."""
    x, (rank, ranks) = x.contiguous(), (dist.get_rank(), dist.get_world_size())
    parts = x.new_empty(ranks, *x.shape)
    if x.is_cuda:
        dist.all_gather(list(parts), x)
    else:  # gloo's own all-gather takes twice as long
        parts[rank] = x
        hops = [dist.P2POp(dist.isend, x, (rank + n) % ranks) for n in range(1, ranks)]
        hops += [dist.P2POp(dist.irecv, parts[rank - n], (rank - n) % ranks) for n in range(1, ranks)]
        for work in dist.batch_isend_irecv(hops) if hops else ():
            work.wait()
    return parts.transpose(0, 1).flatten(1, 2)


def _scattered(x: Tensor) -> Tensor:
    """The sum over ranks of [B, S, ...], of which each gets its tokens."""
    parts = x.unflatten(1, (dist.get_world_size(), -1)).transpose(0, 1).contiguous()
    if x.is_cuda:
        out = torch.empty_like(parts[0])
        dist.reduce_scatter(out, list(parts))
        return out
    received = torch.empty_like(parts)  # gloo's own reduce-scatter is an all-reduce, of twice the bytes
    dist.all_to_all_single(received, parts)
    return received.sum(0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _gathered(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _scattered(grad)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _scattered(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _gathered(grad)


# ---- ring attention (Liu et al. 2023)


def ring_bytes(case: Case) -> int:
    """(P - 1) x 2 Hkv D x L x (2 e + max(e, 4)): k and v in forward; k, v, and in fp32 or wider dk, dv in backward."""
    size = case.torch_dtype.itemsize
    return (case.ranks - 1) * 2 * _elements(case, case.kv_heads) * (2 * size + max(size, 4))


def ring(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each rank attends to the block of k and v that is there, while the next arrives; causal ones skip later blocks.

    The tokens of a rank are in a row, as in the paper, so the last rank has the most to do and the others wait.
    """
    return _Ring.apply(q, k, v)


class _Ring(torch.autograd.Function):
    """Heads come before tokens inside; an LSE is [B, H, L, 1]. Blocks are k and v, [2, B, Hkv, L, D], one message."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = lse = None
        for step, (_, (ks, vs)) in enumerate(_blocks(_stacked(k, v))):
            if step > dist.get_rank():  # causal: none of these keys is before the queries
                continue
            part, part_lse = attend(q.transpose(1, 2), ks, vs, causal=step == 0)
            if out is None or lse is None:
                out, lse = part, part_lse
            else:
                both = torch.logaddexp(lse, part_lse)
                out = out * (lse - both).exp() + part * (part_lse - both).exp()
                lse = both
        assert out is not None
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of dk and dv follow their block, from the rank after its own round to its own."""
        q, k, v, out, lse = ctx.saved_tensors
        dq = torch.zeros_like(q.transpose(1, 2), dtype=_wide(q))
        own, going = torch.zeros(2, *k.transpose(1, 2).shape, dtype=_wide(k), device=k.device), None
        for step, (_, (ks, vs)) in enumerate(_blocks(_stacked(k, v))):
            sums = own if step == 0 else torch.zeros_like(own)
            if step <= dist.get_rank():
                parts = attend_backward(grad.transpose(1, 2), q.transpose(1, 2), ks, vs, out, lse, causal=step == 0)
                dq += parts[0]
                sums[0] += parts[1]
                sums[1] += parts[2]
            if step > 0:
                if going is not None:
                    sums += going.arrived()
                going = _Hop(sums)
        if going is not None:
            own += going.arrived()
        dk, dv = own.to(k.dtype).transpose(2, 3)
        return dq.to(q.dtype).transpose(1, 2), dk, dv


class _Hop:
    """A tensor on its way to the next rank, while another comes from the one before."""

    def __init__(self, block: Tensor) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.sent, self.received = block, torch.empty_like(block)
        self.works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.sent, (rank + 1) % ranks),
                dist.P2POp(dist.irecv, self.received, (rank - 1) % ranks),
            ]
        )

    def arrived(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


def _blocks(block: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every rank's block with the rank it is of, this one's first, backwards; the next comes while one is worked on."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(ranks):
        coming = _Hop(block) if step < ranks - 1 else None
        yield (rank - step) % ranks, block
        if coming is not None:
            block = coming.arrived()


def _wide(x: Tensor) -> torch.dtype:
    """What sums over blocks are kept in."""
    return torch.promote_types(x.dtype, torch.float32)


def _stacked(k: Tensor, v: Tensor) -> Tensor:
    return torch.stack((k.transpose(1, 2), v.transpose(1, 2)))


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and LSE by PyTorch's flash kernel, in fp32 at least; it knows no grouped heads."""
    group = q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    flash = _aten._scaled_dot_product_flash_attention
    kernel = flash if q.is_cuda else _aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(q, k, v, 0.0, causal)[:2]
    return out.to(lse.dtype), lse.unsqueeze(-1)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of these keys alone: out and the LSE are those of all keys."""
    group = q.size(1) // k.size(1)
    keys, values = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    given = (grad, q, keys, values, out.to(q.dtype), lse.squeeze(-1).contiguous())
    if q.is_cuda:
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout
        lens = (None, None, q.size(2), k.size(2))
        grads = _aten._scaled_dot_product_flash_attention_backward(*given, *lens, 0.0, causal, unused, unused)
    else:
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, causal)
    dq, dk, dv = grads
    if group > 1:
        dk, dv = (x.unflatten(1, (-1, group)).sum(2, dtype=lse.dtype) for x in (dk, dv))
    return dq, dk, dv


# ---- ring self-attention of ColossalAI (Li et al. 2021)


def ring_self_attention_bytes(case: Case) -> int:
    """(P - 1) x 8 Hkv D x L x e: k and v round in forward and again in backward; dk and dv of all S tokens all-reduced.

    An all-reduce in a ring sends 2 (P - 1) / P of what it sums.
    """
    return 8 * _elements(case, case.kv_heads) * (case.ranks - 1) * case.torch_dtype.itemsize


def ring_self_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys go round until a rank has its rows of scores whole, L x S for every head; then values. It skips nothing.

    Raises MemoryError where the scores of all ranks, three of a kind in backward, exceed this machine; GPUs say it
    themselves.
    """
    (batch, length, heads, dim), kv_heads, ranks = q.shape, k.size(2), dist.get_world_size()
    need = ranks * 3 * batch * heads * length * length * ranks * _wide(q).itemsize
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not q.is_cuda and need > 0.7 * room:
        raise MemoryError(f"scores need {need / 1e9:.1f} GB on {ranks} ranks of a machine of {room / 1e9:.1f} GB")
    keys = torch.arange(length * ranks, device=q.device)
    later = keys > keys[dist.get_rank() * length :][:length, None]  # [L, S]
    rows = (q.to(_wide(q)) * dim**-0.5).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, Hkv, Hq / Hkv, L, D]
    scores = _RingQK.apply(rows.flatten(2, 3), k.transpose(1, 2)).unflatten(2, (-1, length))
    weights = scores.masked_fill_(later, float("-inf")).softmax(-1).to(v.dtype).flatten(2, 3)
    out = _RingAV.apply(weights, v.transpose(1, 2))
    return out.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _columns(rank: int, length: int) -> slice:
    return slice(rank * length, (rank + 1) * length)


def _own_of_sum(whole: Tensor) -> Tensor:
    """This rank's tokens of the sum over ranks of [B, H, S, D]."""
    dist.all_reduce(whole)
    length = whole.size(2) // dist.get_world_size()
    return whole[:, :, _columns(dist.get_rank(), length)]


class _RingQK(torch.autograd.Function):
    """q [B, H, R, D] against the keys of all ranks, of k [B, H, L, D] each: scores [B, H, R, S], of q's dtype."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        length = k.size(2)
        scores = q.new_empty(*q.shape[:3], length * dist.get_world_size())
        for rank, block in _blocks(k.contiguous()):
            scores[..., _columns(rank, length)] = q @ block.to(q.dtype).mT
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ctx.saved_tensors
        dk = _own_of_sum((grad.mT @ q).to(k.dtype))
        dq = torch.zeros_like(q)
        for rank, block in _blocks(k.contiguous()):
            dq += grad[..., _columns(rank, k.size(2))] @ block.to(q.dtype)
        return dq, dk


class _RingAV(torch.autograd.Function):
    """Weights [B, H, R, S] of the values of all ranks, of v [B, H, L, D] each: [B, H, R, D]."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(weights, v)
        out = v.new_zeros(*weights.shape[:3], v.size(3), dtype=_wide(v))
        for rank, block in _blocks(v.contiguous()):
            out += weights[..., _columns(rank, v.size(2))] @ block
        return out.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weights, v = ctx.saved_tensors
        dv = _own_of_sum(weights.mT @ grad)
        dweights = torch.empty_like(weights)
        for rank, block in _blocks(v.contiguous()):
            dweights[..., _columns(rank, v.size(2))] = grad @ block.mT
        return dweights, dv
