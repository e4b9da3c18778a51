"""Liger's fused linear cross-entropy as the sum that `token_mean` takes.

Its kernels for norms, MLPs, rotary embeddings and the loss of transformers models need nothing from here: they work on
each token by itself, so `apply_liger_kernel_to_...` and `enable` go onto one model in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DtypeError, OptionError, ShapeError
from ..shard import IGNORE_INDEX


def loss_sum(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """The sum of the tokens' cross entropies, from what a model's head is given; made for `token_mean`.

    Logits are `hidden weight^T + bias`, with a softcap `softcap * tanh(logits / softcap)`; Liger makes them in parts of
    about the size of hidden, and all gradients in forward: backward can run once. Sums are fp32.

    Args:
        hidden: `[..., E]`, fp32, bf16 or fp16, which needs a gradient where weight or bias need one.
        labels: int64 `[...]`, shifted before sharding.
        weight: `[V, E]`, and bias `[V]`, of the same dtype.
        ignore_index: the label that does not count.

    Returns a 0-dim fp32 tensor. Raises ShapeError, DtypeError or OptionError for what does not fit or is not installed.
    """
    try:
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction
    except ImportError as error:
        raise OptionError("Liger's loss needs the package liger-kernel: pip install 'ulysses-triton[liger]'") from error
    if hidden.shape[:-1] != labels.shape or weight.shape[1:] != hidden.shape[-1:]:
        raise ShapeError(
            f"hidden {list(hidden.shape)}, labels {list(labels.shape)} and weight {list(weight.shape)} do not fit; "
            f"expected [..., E], [...] and [V, E]"
        )
    if hidden.dtype == torch.float64:
        raise DtypeError("Liger's loss sums in fp32, hidden is fp64: take cross_entropy for it")
    trained = [name for name, x in (("weight", weight), ("bias", bias)) if x is not None and x.requires_grad]
    if torch.is_grad_enabled() and trained and not hidden.requires_grad:
        raise OptionError(
            f"{' and '.join(trained)} need a gradient, but hidden does not, and Liger's loss then makes none: take "
            f"cross_entropy to train a head alone"
        )
    loss: Tensor = LigerFusedLinearCrossEntropyFunction.apply(
        hidden.reshape(-1, hidden.size(-1)), weight, labels.reshape(-1), bias, None, ignore_index, 0.0, 0.0, "sum",
        softcap, False, torch.float32,
    )[0]  # fmt: skip
    return loss
