"""Who takes part in `bench.peers`: ours, the libraries as their users build them, and those of `baselines`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_triton import UlyssesGroup, ulysses_attention
from ulysses_triton.case import Case
from ulysses_triton.errors import GroupError, OptionError

from . import baselines

EXCHANGES = {"cpu": ("shm", "torch"), "cuda": ("symm", "nccl", "torch")}  # of ours, between ranks of one host

Attention = Callable[..., Tensor]
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """Causal attention of `[B, S, h, D]` by PyTorch's SDPA, whatever the other arguments a layer passes."""
    parts = (x.transpose(1, 2) for x in (q, k, v))
    grouped = k.size(2) < q.size(2)
    return torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=grouped).transpose(1, 2)


class _Identity(torch.autograd.Function):
    """q for the output; in backward its gradient for those of q, k and v: every exchange takes place, nothing else."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.kv_heads = k.size(2)
        return q.view_as(q)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dkv = dout[:, :, : ctx.kv_heads]
        return dout, dkv, dkv


def identity(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    return _Identity.apply(q, k, v)


class Contestant(NamedTuple):
    """A layer under test: q, k, v of this rank's tokens to the output, `[B, L, H, D]`, or `[L, B, H, D]`."""

    name: str
    layer: Layer
    kind: str = "comparator"  # or "ours", or "library"
    tokens_first: bool = False
    group: UlyssesGroup | None = None  # of ours
    formula: Callable[[Case], int] | None = None  # bytes that a rank sends, forward and backward
    zigzag: int = 1  # over how many parts the sequence is dealt: the first and last block, the second and last but one
    around: Callable[[], AbstractContextManager[None]] = nullcontext  # what forward and backward run in

    def run(self, leaves: Sequence[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
        """out, dq, dk, dv."""
        with self.around():
            out = self.layer(*leaves)
            return out, *torch.autograd.grad(out, leaves, dout)

    def given(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Contiguous tensors in the layout that it is made for."""
        return [(x.transpose(0, 1) if self.tokens_first else x).contiguous() for x in shards]

    def order(self, tokens: int) -> Tensor:
        """Positions of the sequence in the order of the shards."""
        if self.zigzag == 1:
            return torch.arange(tokens)
        blocks = torch.arange(tokens).unflatten(0, (2 * self.zigzag, -1))
        return torch.stack((blocks[: self.zigzag], blocks.flip(0)[: self.zigzag]), 1).flatten()


def groups(device: str = "cpu") -> tuple[dict[str, UlyssesGroup], str]:
    """A group for each exchange that there is on this machine, and the name of the default's."""
    with UlyssesGroup() as group:
        default = group.exchange.name
    found = {}
    for name in EXCHANGES[device]:
        try:
            found[name] = UlyssesGroup(exchange=name)
        except (GroupError, OptionError):  # on every rank alike
            continue
    return found, default


def contestants(
    part: str, mine: dict[str, UlyssesGroup], peers: Sequence[str], device: str = "cpu"
) -> list[Contestant]:
    """Ours over every exchange; as it is shipped, and with the callable of the peers to compare exchanges; the peers.

    A peer that cannot be built is one that raises when it is called.
    """
    attend = identity if part == "exchange" else sdpa
    shipped = "aten" if device == "cpu" else "auto"
    found = []
    for name, group in mine.items():
        ours: dict[str, str | Attention] = {} if part == "exchange" else {f"ours {name}": shipped}
        if part != "scaling":
            ours[f"ours {name}, {attend.__name__}"] = attend
        for title, attention in ours.items():
            layer = _ours(group, attention)
            found.append(Contestant(title, layer, "ours", group=group, formula=baselines.ulysses_bytes))
    for name in peers:
        _, parts, build = PEERS[name]
        if part in parts:
            try:
                found += build(attend, device)
            except Exception as error:
                found.append(Contestant(name, _raising(error), "library"))
    return found


def _raising(error: Exception) -> Layer:
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise error

    return layer


def _ours(group: UlyssesGroup, attend: str | Attention) -> Layer:
    return lambda q, k, v: ulysses_attention(q, k, v, group, causal=True, attention=attend)  # type: ignore[return-value]


def _deepspeed(attend: Attention, device: str) -> list[Contestant]:
    import deepspeed.comm
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles C++ for reductions, not used here
    deepspeed.comm.init_distributed("nccl" if device == "cuda" else "gloo", auto_mpi_discovery=False)
    from deepspeed.sequence.layer import DistributedAttention

    def local(*qkv: Tensor) -> Tensor:  # [S, B, h, D]
        return attend(*(x.transpose(0, 1) for x in qkv)).transpose(0, 1)

    layer = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=0)
    return [
        Contestant(
            "deepspeed", lambda q, k, v: layer(q, k, v, 1), "library", tokens_first=True,
            formula=baselines.ulysses_bytes,
        )
    ]  # fmt: skip


def _yunchang(attend: Attention, device: str) -> list[Contestant]:
    from yunchang.kernels import AttnType
    from yunchang.ulysses.attn_layer import UlyssesAttention

    layer = UlyssesAttention(dist.group.WORLD, attn_type=AttnType.TORCH_FLASH)
    layer.attn_fn = attend
    return [
        Contestant("yunchang", lambda q, k, v: layer(q, k, v, causal=True), "library", formula=baselines.ulysses_bytes)
    ]


def _usp(attend: Attention, device: str) -> list[Contestant]:
    """yunchang's USP: a ring of two, each of Ulysses over half of the ranks; Ulysses alone where ranks are odd.

    Its rings need a kernel that gives an LSE and has a backward: flash-attn on GPUs; its choice for CPUs has neither
    a kernel there nor any backward, so PyTorch's flash kernel for CPUs is put in its place.
    """
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.kernels import AttnType
    from yunchang.ring import ring_flash_attn, zigzag_ring_flash_attn

    ranks = dist.get_world_size()
    rings = 2 if ranks % 2 == 0 else 1
    set_seq_parallel_pg(ranks // rings, rings, dist.get_rank(), ranks)
    if device == "cpu":
        for module in (ring_flash_attn, zigzag_ring_flash_attn):
            module.select_flash_attn_impl = _block_kernel
    kind = AttnType.FA if device == "cuda" else AttnType.TORCH_FLASH

    def usp(ring: str, zigzag: int) -> Contestant:
        layer = LongContextAttention(ring_impl_type=ring, attn_type=kind)
        return Contestant(f"USP {ring}", lambda q, k, v: layer(q, k, v, causal=True), "library", zigzag=zigzag)

    return [usp("basic", 1), usp("zigzag", rings)]


def _block_kernel(attn_type: object, stage: str, attn_processor: object = None) -> Callable[..., Any]:
    """What `select_flash_attn_impl` of yunchang gives: tensors are [B, L, h, D], an LSE is [B, h, L]."""

    def forward(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, **_: object
    ) -> tuple[Tensor, Tensor]:
        out, lse = baselines.attend(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
        return out.transpose(1, 2), lse.squeeze(-1)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
        dropout_p: float, softmax_scale: float, causal: bool, *_: object, **more: object,
    ) -> None:  # fmt: skip
        given = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        grads = baselines.attend_backward(*given, lse.unsqueeze(-1), causal=causal)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad.transpose(1, 2))

    return forward if stage == "fwd-only" else backward


def _context_parallel(attend: Attention, device: str) -> list[Contestant]:
    """PyTorch's ring: inside it, SDPA is one over shards that `context_parallel` dealt, here by a tensor of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    ranks = dist.get_world_size()
    mesh = init_device_mesh(device, (ranks,))

    def around() -> AbstractContextManager[None]:
        return context_parallel(mesh, buffers=[torch.zeros(2 * ranks, device=device)], buffer_seq_dims=[0])

    return [Contestant("torch context_parallel", sdpa, "library", zigzag=ranks, around=around)]


def _megatron(attend: Attention, device: str) -> list[Contestant]:
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return baselines.megatron(q, k, v, attend)

    return [Contestant("megatron", layer, formula=baselines.megatron_bytes)]


def _ring(attend: Attention, device: str) -> list[Contestant]:
    return [Contestant("ring", baselines.ring, formula=baselines.ring_bytes)]


def _ring_self_attention(attend: Attention, device: str) -> list[Contestant]:
    layer, formula = baselines.ring_self_attention, baselines.ring_self_attention_bytes
    return [Contestant("ring self-attention", layer, formula=formula)]


class Peer(NamedTuple):
    """The package that it needs, and where it takes part: a ring moves and attends at once, so it has no exchange."""

    package: str | None
    parts: tuple[str, ...]
    build: Callable[[Attention, str], list[Contestant]]


PARTS = ("attention", "exchange", "scaling")
WHOLE = ("attention", "scaling")
PEERS = {
    "deepspeed": Peer("deepspeed", PARTS, _deepspeed),
    "yunchang": Peer("yunchang", PARTS, _yunchang),
    "usp": Peer("yunchang", WHOLE, _usp),
    "context_parallel": Peer(None, WHOLE, _context_parallel),
    "megatron": Peer(None, PARTS, _megatron),
    "ring": Peer(None, WHOLE, _ring),
    "ring_self_attention": Peer(None, WHOLE, _ring_self_attention),
}


def missing(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]
