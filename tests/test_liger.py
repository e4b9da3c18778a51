"""Liger's kernels in transformers models over shards, and its loss: in Triton's interpreter, against plain PyTorch."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ulysses_triton import UlyssesGroup, shard_sequence
from ulysses_triton.errors import DtypeError, OptionError, ShapeError
from ulysses_triton.integrations.transformers import enable

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel: pip install --no-deps liger-kernel"
)
VOCABULARY, TOKENS, IGNORED = 47, 12, -100


def let_liger_run() -> None:
    """Floats as arguments and two functions of libdevice, which Triton's interpreter does not have.

    Called before Liger is imported.
    """
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt
    if convert.__module__ == __name__:
        return

    def converted(x: Any) -> Any:
        if isinstance(x, float):
            return tl.tensor(interpreter.TensorHandle(np.array([x], dtype=np.float32), tl.float32), tl.float32)
        return convert(x)

    interpreter._implicit_cvt = converted
    libdevice.rsqrt = lambda x: tl.rsqrt(x)
    libdevice.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


# ---- models


def model(name: str) -> Any:
    import transformers

    torch.manual_seed(2)
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 8}),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM, {"head_dim": 8, "sliding_window": 6}),
    }
    config, kind, more = kinds[name]
    return kind(
        config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_attention_heads=4,
            num_hidden_layers=2 if name == "gemma2" else 1,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
            attn_implementation="eager", use_cache=False, **more,
        )
    )  # fmt: skip


def with_liger(name: str) -> Any:
    let_liger_run()
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    found = model(name)
    _apply_liger_kernel_to_instance(model=found)  # what `use_liger_kernel=True` of TrainingArguments does
    return found


def batch() -> dict[str, Tensor]:
    """Two packed rows, with labels that are for the most part in the first half."""
    ids = torch.randint(2, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(4))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((5, 7), (8, 4))])
    labels = torch.where((torch.arange(TOKENS) < 7) & (positions > 0), ids, IGNORED)
    shifted = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "shift_labels": shifted}


def step(found: Any, inputs: dict[str, Tensor], count: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss, all gradients, and the logits of evaluation."""
    found.train()
    output = found(**inputs, num_items_in_batch=count)
    output.loss.backward()
    found.eval()
    with torch.no_grad():
        logits = found(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"]).logits
    return output.loss.detach(), {n: p.grad for n, p in found.named_parameters()}, logits


def on_ranks(ctx: Any, names: list[str], liger_first: bool) -> list[Any]:
    let_liger_run()
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    group, results = UlyssesGroup(ctx.group), []
    for name in names:
        found = with_liger(name) if liger_first else model(name)
        enable(found, group)
        if not liger_first:
            _apply_liger_kernel_to_instance(model=found)
        parts = {key: shard_sequence(x, group) for key, x in batch().items()}
        count = (batch()["shift_labels"] != IGNORED).sum()
        results.append(step(found, parts, count))
        with pytest.raises(OptionError, match="shift them before sharding"):
            found.train()(input_ids=parts["input_ids"], labels=parts["labels"])
    return results


def on_one(name: str) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """transformers' own layers and loss in fp64, with a mask of pairs of one document."""
    found, inputs = model(name).double(), batch()
    return step(found, inputs, (inputs["shift_labels"] != IGNORED).sum())


def check(parts: list[Any], name: str) -> None:
    loss, grads, logits = on_one(name)
    assert apart(sum(part[0] for part in parts), loss) <= 1e-5
    assert apart(torch.cat([part[2] for part in parts], 1), logits) <= 1e-5
    for key, grad in grads.items():
        assert apart(sum(part[1][key] for part in parts), grad) <= 1e-5, key


def apart(found: Any, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_a_model_with_liger_over_shards(pool: Any) -> None:
    """The loss on ranks with few labels or none, and norms of q and k whose backward writes into its input."""
    check([its[0] for its in pool.run(2, on_ranks, ["qwen3"], True)], "qwen3")


@pytest.mark.slow
@pytest.mark.parametrize("liger_first", [True, False])
def test_models_with_liger_over_shards(pool: Any, liger_first: bool) -> None:
    names = ["llama", "qwen3", "gemma2"]
    found = pool.run(4, on_ranks, names, liger_first)
    for number, name in enumerate(names):
        check([its[number] for its in found], name)


# ---- the loss alone


def head(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 9, 8), torch.randn(VOCABULARY, 8), torch.randn(VOCABULARY)
    labels = torch.randint(VOCABULARY, (2, 9))
    labels[0, 2:7] = IGNORED
    return (hidden.to(dtype), labels, weight.to(dtype), bias.to(dtype))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [True, False])
def test_the_loss_is_the_sum_of_cross_entropies(biased: bool, softcap: float | None) -> None:
    let_liger_run()
    from ulysses_triton.integrations.liger import loss_sum

    hidden, labels, weight, bias = head()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)[: 2 + biased]]
    (loss_sum(hidden, labels, *leaves[1:], softcap=softcap) * 0.3).backward()
    wide = [x.detach().double().requires_grad_() for x in leaves]
    logits = functional.linear(*wide)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (expected * 0.3).backward()
    with torch.no_grad():
        assert apart(loss_sum(hidden, labels, *leaves[1:], softcap=softcap), expected) <= 1e-6
    for x, y in zip(leaves, wide, strict=True):
        assert apart(x.grad, y.grad) <= 2e-6


def test_the_loss_of_no_labels_is_zero() -> None:
    let_liger_run()
    from ulysses_triton.integrations.liger import loss_sum

    hidden, labels, weight, _ = head()
    hidden.requires_grad_()
    loss = loss_sum(hidden, torch.full_like(labels, IGNORED), weight.requires_grad_())
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_what_the_loss_would_get_wrong_is_refused() -> None:
    let_liger_run()
    from ulysses_triton.integrations.liger import loss_sum

    hidden, labels, weight, bias = head()
    with pytest.raises(ShapeError, match="do not fit"):
        loss_sum(hidden, labels[:, 1:], weight)
    with pytest.raises(DtypeError, match="fp64"):
        loss_sum(hidden.double(), labels, weight.double())
    with pytest.raises(OptionError, match="weight and bias need a gradient, but hidden does not"):
        loss_sum(hidden, labels, weight.requires_grad_(), bias.requires_grad_())
