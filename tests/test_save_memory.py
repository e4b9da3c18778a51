"""`save_memory` of transformers models: the same loss and gradients as without, on ranks that share a sequence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ulysses_triton import OptionError, UlyssesGroup, shard_sequence
from ulysses_triton.integrations.memory import mlps_of, restore_memory, save_memory
from ulysses_triton.integrations.transformers import enable
from ulysses_triton.training.tiles import Tiled

TOKENS, VOCABULARY = 37, 50
TINY = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def build(name: str) -> Any:
    import transformers

    torch.manual_seed(0)
    kind, options = {
        "llama": ("Llama", {}),
        "gemma2": ("Gemma2", {"final_logit_softcapping": 3.0, "sliding_window": 9}),  # ties the head to the embedding
        "granite": ("Granite", {"logits_scaling": 0.5}),
        "cohere": ("Cohere", {"logit_scale": 3.0}),
        "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    }[name]
    config = getattr(transformers, f"{kind}Config")(**TINY | options)
    config._attn_implementation = "eager"
    return getattr(transformers, f"{kind}ForCausalLM")(config).train()


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (2, TOKENS))
    labels = torch.where(torch.rand(2, TOKENS) < 0.2, -100, ids)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    return {"input_ids": ids, "labels": labels, "shift_labels": shifted}


def step(model: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    """The loss and all gradients."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Of the whole gradient, and of the loss, relative."""
    assert len(found) == len(expected) > 3
    apart = torch.stack([(a.double() - b.double()).norm() for a, b in zip(found[1:], expected[1:], strict=True)]).norm()
    scale = torch.stack([b.double().norm() for b in expected[1:]]).norm()
    return max(float(apart / scale), float((found[0] - expected[0]).abs() / expected[0].abs()))


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere", "qwen3_moe"])
def test_one_process(name: str) -> None:
    """With the model's own scaled or capped logits; the labels shifted by the model, and counted by it."""
    model, batch = build(name), inputs()
    whole = step(model, {key: value for key, value in batch.items() if key != "shift_labels"})
    counted = step(model, batch | {"num_items_in_batch": 100})
    save_memory(model, tile=16, offload=True)
    assert len(mlps_of(model)) == 3 and all(isinstance(mlp.forward, Tiled) for mlp in mlps_of(model))
    for _ in range(2):
        assert error(step(model, {key: value for key, value in batch.items() if key != "shift_labels"}), whole) <= 1e-6
    assert error(step(model, batch | {"num_items_in_batch": torch.tensor(100)}), counted) <= 1e-6
    assert model(**batch).logits is None
    restore_memory(model)
    assert torch.equal(torch.stack(step(model, batch)[:1]), torch.stack(whole[:1]))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert model(**batch).logits is not None
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_in_evaluation_logits_are_there() -> None:
    model, batch = build("llama").eval(), inputs()
    with torch.no_grad():
        expected = model(**batch)
        save_memory(model, tile=16)
        found = model(**batch)
    assert torch.allclose(found.logits, expected.logits, atol=1e-6) and torch.allclose(found.loss, expected.loss)


def test_a_copy_of_a_model_saves_memory_by_itself() -> None:
    model, batch = build("llama"), inputs()
    expected = step(model, batch)
    save_memory(model, tile=16, offload=True)
    other = copy.deepcopy(model)
    for p in model.parameters():
        p.data.zero_()
    assert error(step(other, batch), expected) <= 1e-6


def test_checkpointing_that_is_turned_on_later_goes_to_host_memory() -> None:
    """As the Trainer does."""
    model, batch = build("llama"), inputs()
    expected = step(model, batch)
    save_memory(model, tile=None, offload=True)
    model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    calls = [layer._gradient_checkpointing_func for layer in model.model.layers]
    assert all(call.func.__self__ is calls[0].func.__self__ for call in calls)
    offload, before = calls[0].func.__self__, []
    offload.min_bytes = 1
    model.model.norm.register_forward_hook(lambda *_: before.append(offload.host_bytes))
    assert error(step(model, batch), expected) <= 1e-6
    assert before == [3 * 2 * TOKENS * 32 * 4]


def test_lora() -> None:
    import peft

    model = peft.get_peft_model(
        build("llama"), peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj", "lm_head"], init_lora_weights=False)
    )
    expected = step(model, inputs())
    save_memory(model, tile=16, offload=True)
    assert len(expected) == 1 + 2 * (3 + 3 + 1)
    assert error(step(model, inputs()), expected) <= 1e-6


def test_what_does_not_fit_is_refused_by_name() -> None:
    import transformers

    model = build("gpt_oss")
    save_memory(model, tile=16)
    with pytest.raises(OptionError, match="GptOssMLP .* returned a tuple"):
        step(model, inputs())
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=50,
            hidden_size=32,
            ffn_dim=48,
            num_attention_heads=4,
            num_hidden_layers=1,
            word_embed_proj_dim=32,
        )
    )
    with pytest.raises(OptionError, match="OPTForCausalLM has no MLP"):
        save_memory(opt)
    model = build("qwen3_moe")
    save_memory(model, tile=16)
    with pytest.raises(OptionError, match="does not take output_router_logits"):
        model(**inputs(), output_router_logits=True)
    model = build("llama")
    model.loss_function = lambda *args, **kwargs: torch.zeros(())
    with pytest.raises(OptionError, match="a loss of another library"):
        save_memory(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


# ---- ranks


def on_rank(ctx: Any, name: str, sharded: bool) -> Any:
    group = UlyssesGroup(ctx.group)
    lens = (12, 1, 20, 4) if ctx.size == 4 else (20, 17)
    batch: dict[str, Any] = {key: shard_sequence(value, group, lens=lens) for key, value in inputs().items()}
    batch |= {"num_items_in_batch": 100, "ulysses_lens": lens}
    found = []
    for saves in (False, True):
        model = build(name)
        enable(model, group)
        if saves:
            save_memory(model, tile=8, offload=True)
        if sharded:
            mesh = DeviceMesh.from_group(ctx.group, "cpu")
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        own = step(model, batch)
        if sharded:
            own = [own[0], *(p.full_tensor() for p in own[1:])]
        found.append(own)
    group.close()
    return found


@pytest.mark.parametrize(
    ("name", "ranks", "sharded"),
    [
        ("gemma2", 2, False),
        ("llama", 2, True),  # FSDP2
        pytest.param("gemma2", 4, True, marks=pytest.mark.slow),
        pytest.param("llama", 4, False, marks=pytest.mark.slow),
    ],
)
def test_ranks_that_share_a_sequence(pool: Any, name: str, ranks: int, sharded: bool) -> None:
    model = build(name).double()
    truth = step(model, inputs() | {"num_items_in_batch": 100})
    answers = pool.run(ranks, on_rank, name, sharded)
    for plain, saved in answers:
        assert error(saved, plain) <= 1e-6
    for way in (0, 1):
        total = [sum(parts) for parts in zip(*(answer[way] for answer in answers), strict=True)]
        if sharded:  # each rank has the mean of all
            total = [total[0], *answers[0][way][1:]]
            total[1:] = [x * ranks for x in total[1:]]
        assert error(total, truth) <= 1e-5
