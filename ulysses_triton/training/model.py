"""A decoder-only language model whose attention runs over a sharded sequence.

Everything but attention works on each token alone, so a rank applies it to its own shard; `ulysses_qkv_attention` is
the only place where ranks meet. Pre-norm blocks: x + attention(norm(x)), then x + swiglu(norm(x)).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .. import UlyssesGroup, ulysses_qkv_attention
from ..shard import IGNORE_INDEX
from .config import ModelConfig, TrainConfig
from .offload import HostOffload
from .tiles import loss_sum, tile_tokens

Q_GAIN = 4.0  # normalised queries and keys alone cannot tell one key among thousands from the others


class Attention(nn.Module):
    """Causal grouped-query attention with QK-norm and RoPE, both applied inside the op."""

    def __init__(self, config: ModelConfig, group: UlyssesGroup, recompute: str | None) -> None:
        super().__init__()
        self.config, self.group, self.recompute = config, group, recompute
        self.window = None if config.window is None else (config.window - 1, 0)
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.kv_heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.q_norm = nn.Parameter(torch.full((config.head_dim,), Q_GAIN))
        self.k_norm = nn.Parameter(torch.ones(config.head_dim))

    def forward(
        self,
        x: torch.Tensor,  # [B, L, width]
        rope: tuple[torch.Tensor, torch.Tensor],
        lens: Sequence[int] | None,
    ) -> torch.Tensor:
        attended = ulysses_qkv_attention(
            self.qkv(x),
            self.group,
            heads=self.config.heads,
            kv_heads=self.config.kv_heads,
            rope=rope,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            norm_eps=self.config.norm_eps,
            causal=True,
            window=self.window,
            lens=lens,
            recompute=self.recompute,
        )  # [B, L, heads, head_dim]
        assert isinstance(attended, torch.Tensor)  # a pair only with `return_lse`
        if self.config.zero_attention:
            attended = attended * 0
        return self.out(attended.flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up as one projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


class Block(nn.Module):
    """One layer. With `checkpoint` it keeps only its input for backward, with `offload` in host memory.

    The recomputation is inside the module, so that FSDP's hooks, which gather the parameters, are around it.
    """

    def __init__(self, config: TrainConfig, group: UlyssesGroup, offload: HostOffload | None) -> None:
        super().__init__()
        assert isinstance(config.model, ModelConfig)
        shape = config.model
        self.checkpoint = offload.checkpoint if offload else checkpoint if config.checkpoint_activations else None
        self.attention_norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.attention = Attention(shape, group, config.recompute)
        self.feed_forward_norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.feed_forward = SwiGLU(shape)
        if config.tile is not None:
            tile_tokens(self.feed_forward, config.tile)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], lens: Sequence[int] | None
    ) -> torch.Tensor:
        if self.checkpoint and torch.is_grad_enabled():
            return self.checkpoint(
                self._forward, x, rope, lens, use_reentrant=False, preserve_rng_state=False
            )  # no random numbers here
        return self._forward(x, rope, lens)

    def _forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], lens: Sequence[int] | None
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rope, lens)
        return x + self.feed_forward(self.feed_forward_norm(x))


class LanguageModel(nn.Module):
    """Tokens in, the sum of the losses of the tokens that follow out, for this rank's shard of every sequence."""

    def __init__(self, config: TrainConfig, group: UlyssesGroup) -> None:
        super().__init__()
        assert isinstance(config.model, ModelConfig)
        self.config, self.tile = config.model, config.tile
        shape = config.model
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        offload = HostOffload() if config.offload else None
        self.layers = nn.ModuleList(Block(config, group, offload) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fan-in initialisation. (Smaller output projections, once tried, learnt more slowly.)"""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(
        self, tokens: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor, lens: Sequence[int] | None = None
    ) -> torch.Tensor:
        """The summed loss, fp32, of `tokens` [B, L] with `labels` [B, L], at `positions` [L] of the whole sequence.

        `lens` gives every rank's L where they differ.
        """
        rope = rope_tables(positions, self.config)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, rope, lens)
        if self.tile is not None:
            return loss_sum(self.norm(x), labels, self.head.weight, tile=self.tile)
        return cross_entropy_sum(self.head(self.norm(x)), labels)


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of the losses, fp32, of `labels` [B, L] under `logits` [B, L, vocabulary]."""
    return functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX
    )


def rope_tables(positions: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [L, head_dim / 2] for tokens at `positions` [L] (Su et al., RoFormer, section 3.4)."""
    half = torch.arange(config.head_dim // 2, device=positions.device, dtype=torch.float64)
    frequencies = config.rope_base ** (-2.0 * half / config.head_dim)
    angles = positions.to(torch.float64)[:, None] * frequencies  # fp64: positions reach millions
    return angles.cos().float(), angles.sin().float()
