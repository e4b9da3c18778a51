"""Hugging Face models over shards against the same models on one process, with a dense attention written here.

The reference is no path of transformers: `dense` below attends with a mask of pairs that each case writes down itself,
from its documents, its padding and the layer's window.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from transformers import AttentionInterface  # noqa: E402

from ulysses_triton import (  # noqa: E402
    GroupError,
    OptionError,
    ShapeError,
    UlyssesError,
    UlyssesGroup,
    run_virtual,
    shard_lens,
    shard_sequence,
)
from ulysses_triton.integrations.transformers import disable, enable  # noqa: E402

TOLERANCE = 1e-5
VOCABULARY = 50
WINDOW = 6
TINY = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TINY | options))


def mistral(**options: Any) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**TINY | {"sliding_window": WINDOW} | options))


def qwen3(**options: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**TINY | options))


def qwen3_window(**options: Any) -> Any:
    alternating = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    return qwen3(**alternating | options)


def gemma2(**options: Any) -> Any:
    """Softcap of the scores, an alternating window and a scale of its own."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    own = {"sliding_window": WINDOW, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 4}
    return Gemma2ForCausalLM(Gemma2Config(**TINY | own | options))


def gemma3(**options: Any) -> Any:
    """QK-norm, an alternating window, and RoPE of another base for layers that have one."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    own = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(**TINY | own | options))


def gpt_oss(**options: Any) -> Any:
    """Sinks, an alternating window and experts."""
    from transformers import GptOssConfig, GptOssForCausalLM

    own = {"sliding_window": WINDOW, "num_local_experts": 3, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**TINY | own | options))


def bert(**options: Any) -> Any:
    """Not causal, with learned positions."""
    from transformers import BertConfig, BertForMaskedLM

    small = {name: n for name, n in TINY.items() if name not in ("head_dim", "num_key_value_heads")}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(**small | dropout | options))


MODELS = {f.__name__: f for f in (llama, mistral, qwen3, qwen3_window, gemma2, gemma3, gpt_oss, bert)}


@dataclass(frozen=True)
class Case:
    """A model, and the batch it is given."""

    model: str
    input: str  # plain, packed, rows (a packing of its own in each row), offsets, left, right, both
    tokens: int = 30
    batch: int = 2
    lens: tuple[int, ...] | None = None
    rows: tuple[tuple[int, ...], ...] = ()  # the lengths of each row's documents, negative for padding; else by `input`

    def build(self) -> Any:
        torch.manual_seed(0)
        model = MODELS[self.model]()
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name or "sinks" in name:  # which begin as ones and zeros
                p.data += 0.1 * torch.randn_like(p)
        return model

    def documents(self) -> torch.Tensor:
        """`[B, S]`, -1 for padding."""
        lengths: Any = self.rows or {
            "packed": [(7, 1, 12, self.tokens - 20)] * self.batch,
            "offsets": [(7, 1, 12, self.tokens - 20)],
            "rows": [(8, 8, self.tokens - 16), (3, self.tokens - 3)],
            "left": [(-9, self.tokens - 9), (self.tokens,)],
            "right": [(self.tokens - 17, -17), (self.tokens,)],
            "both": [(-3, self.tokens - 5, -2), (self.tokens - 1, -1)],
        }.get(self.input, [(self.tokens,)] * self.batch)
        rows = [sum([[number if n > 0 else -1] * abs(n) for number, n in enumerate(row)], []) for row in lengths]
        return torch.tensor(rows)

    def inputs(self) -> dict[str, torch.Tensor]:
        """What a process that has the whole sequence gives the model; of a rank's part all but offsets is a part."""
        ids = self.documents()
        generator = torch.Generator().manual_seed(1)
        made = {"input_ids": torch.randint(3, VOCABULARY, ids.shape, generator=generator)}
        if self.input in ("packed", "rows", "drawn"):
            made["position_ids"] = torch.stack([torch.cat([torch.arange(int(n)) for n in runs(row)]) for row in ids])
            if self.input == "packed":
                made["position_ids"] = made["position_ids"][:1]
        if self.input == "offsets":
            made["cu_seq_lens_q"] = torch.tensor([0, *runs(ids[0])]).cumsum(0).int()
        if self.input in ("left", "right", "both", "drawn") and (ids < 0).any():
            made["attention_mask"] = (ids >= 0).long()
        return made


def runs(row: torch.Tensor) -> torch.Tensor:
    return torch.unique_consecutive(row, return_counts=True)[1]


def dense(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any) -> Any:
    """Attention by its definition, with the documents `[B, S]` that are in `dense.documents` by length."""
    ids, layer = dense.documents[query.size(2)], module.layer_idx
    key_ids = dense.documents[key.size(2)]
    q_pos, k_pos = (torch.arange(x.size(2)) for x in (query, key))
    distance = q_pos[:, None] - k_pos[None]
    allowed = (ids[:, :, None] == key_ids[:, None]) | (query.size(2) != key.size(2))
    allowed = allowed & (key_ids[:, None] >= 0)
    if module.is_causal:
        allowed = allowed & (distance >= 0)
    types = getattr(module.config, "layer_types", None)
    if types[layer] == "sliding_attention" if types else getattr(module.config, "sliding_window", None):
        allowed = allowed & (distance < WINDOW)
    groups = query.size(1) // key.size(1)
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if getattr(module.config, "attn_logit_softcapping", None) is not None:
        scores = (scores / module.config.attn_logit_softcapping).tanh() * module.config.attn_logit_softcapping
    scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    scores = torch.where(allowed.any(-1)[:, None, :, None], scores, 0.0)  # of padding; anything but NaN
    if hasattr(module, "sinks"):
        scores = torch.cat([scores, module.sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : key.size(2)]
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("dense", dense)  # with no mask function: no mask reaches it


@dataclass
class Found:
    """The logits of some tokens, `[B, L, V]`, and parameters' gradients: on a rank its share of them."""

    logits: torch.Tensor
    grads: dict[str, torch.Tensor]


def step(model: Any, inputs: dict[str, Any], weight: torch.Tensor, **options: Any) -> Found:
    """The gradient of a weighted sum of the logits."""
    logits = model(**inputs, **options).logits
    (logits * weight).sum().backward()
    return Found(logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def weight_of(case: Case) -> torch.Tensor:
    ids = case.documents()
    random = torch.randn(*ids.shape, VOCABULARY, generator=torch.Generator().manual_seed(2))
    return random * (ids >= 0)[..., None]  # what padding gives is nobody's affair


def on_one(case: Case, model: Any = None) -> Found:
    model = case.build() if model is None else model
    model.set_attn_implementation("dense")
    dense.documents = {case.tokens: case.documents()}
    inputs = {name: x for name, x in case.inputs().items() if name in ("input_ids", "position_ids")}
    return step(model, inputs, weight_of(case))


def part_of(case: Case, group: UlyssesGroup) -> dict[str, Any]:
    split = {
        name: x if name.startswith("cu_seq") else shard_sequence(x, group, lens=case.lens)
        for name, x in case.inputs().items()
    }
    lens = case.lens or shard_lens(case.tokens, group.size)
    return split | ({"ulysses_lens": lens} if len(set(lens)) > 1 else {})


def on_rank(case: Case, group: UlyssesGroup, model: Any, attention: str = "reference") -> Found:
    enable(model, group, attention=attention)
    return step(model, part_of(case, group), shard_sequence(weight_of(case), group, lens=case.lens))


def virtually(case: Case, ranks: int, run: Any = on_rank) -> list[Any]:
    models = [case.build() for _ in range(ranks)]  # not in threads: transformers builds under global switches
    return run_virtual(ranks, lambda group: run(case, group, models[group.rank]))


def on_process(ctx: Any, cases: list[Case]) -> list[Found]:
    with UlyssesGroup(ctx.group) as group:
        return [on_rank(case, group, case.build()) for case in cases]


def joined(found: list[Found]) -> Found:
    names = found[0].grads
    sums = {name: sum(part.grads[name] for part in found) for name in names}
    return Found(torch.cat([part.logits for part in found], dim=1), sums)


def check(case: Case, found: list[Found], expected: Found | None = None) -> None:
    compare(joined(found), expected or on_one(case), case.documents() >= 0)


def compare(whole: Found, expected: Found, real: Any = ..., of_model: bool = False) -> None:
    """Gradients relative to each one's largest element, or to the whole model's, where some may nearly cancel."""
    assert (whole.logits - expected.logits)[real].abs().max() < TOLERANCE
    assert whole.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        # A bias of all keys changes no softmax: its gradient is zero but for rounding, that of queries' is the measure.
        like = name.replace("key.bias", "query.bias").replace("k_proj.bias", "q_proj.bias")
        scale = max(g.abs().max() for g in (expected.grads.values() if of_model else [expected.grads[like]]))
        error = (whole.grads[name] - grad).abs().max() / scale
        assert scale > 0 and error < TOLERANCE, (name, error)


INPUTS = ["plain", "packed", "rows", "offsets", "left", "right", "both"]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("model", MODELS)
def test_model(model: str, kind: str, ranks: int) -> None:
    case = Case(model, kind)
    check(case, virtually(case, ranks))


@pytest.mark.parametrize("ranks", [4, 2])
def test_models_on_processes(pool: Any, ranks: int) -> None:
    cases = [Case(model, kind) for model in MODELS for kind in ("plain", "packed", "rows", "left", "right")]
    by_rank = pool.run(ranks, on_process, cases)
    for number, case in enumerate(cases):
        check(case, [found[number] for found in by_rank])


@dataclass(frozen=True)
class Translation:
    """An encoder-decoder with other heads in its encoder, and sequences of other lengths in each."""

    encoder: Case
    decoder: Case

    def build(self) -> Any:
        from transformers import BartConfig, BartForConditionalGeneration

        sizes = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
        layers = {"encoder_layers": 1, "decoder_layers": 2, "max_position_embeddings": 64}
        torch.manual_seed(0)
        return BartForConditionalGeneration(BartConfig(**sizes, **heads, **layers))

    def inputs(self) -> dict[str, torch.Tensor]:
        target = {f"decoder_{name}": x for name, x in self.decoder.inputs().items()}
        return self.encoder.inputs() | target

    def expected(self) -> Found:
        model = self.build()
        model.set_attn_implementation("dense")
        dense.documents = {case.tokens: case.documents() for case in (self.encoder, self.decoder)}
        inputs = {name: x for name, x in self.inputs().items() if name.endswith("input_ids")}
        return step(model, inputs, weight_of(self.decoder))

    def part(self, group: UlyssesGroup) -> dict[str, Any]:
        source, target = part_of(self.encoder, group), part_of(self.decoder, group)
        lens = {
            "ulysses_encoder_lens": source.pop("ulysses_lens", None),
            "ulysses_lens": target.pop("ulysses_lens", None),
        }
        return source | {f"decoder_{name}": x for name, x in target.items()} | lens

    def on_rank(self, group: UlyssesGroup, model: Any) -> Found:
        enable(model, group, attention="reference")
        return step(model, self.part(group), shard_sequence(weight_of(self.decoder), group, lens=self.decoder.lens))


TRANSLATIONS = [
    Translation(Case("", source, tokens=26, lens=lens[0]), Case("", target, lens=lens[1]))
    for source, target, lens in (
        ("plain", "plain", (None, None)),
        ("left", "plain", (None, (10, 20))),
        ("right", "both", (None, None)),
        ("both", "left", ((25, 1), None)),
    )
]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", TRANSLATIONS, ids=lambda case: f"{case.encoder.input}-{case.decoder.input}")
def test_encoder_decoder(case: Translation, ranks: int) -> None:
    if ranks != 2:
        case = Translation(replace(case.encoder, lens=None), replace(case.decoder, lens=None))
    models = [case.build() for _ in range(ranks)]
    found = run_virtual(ranks, lambda group: case.on_rank(group, models[group.rank]))
    check(case.decoder, found, case.expected())


def translated(ctx: Any, case: Translation) -> Found:
    with UlyssesGroup(ctx.group) as group:
        return case.on_rank(group, case.build())


def test_encoder_decoder_on_processes(pool: Any) -> None:
    case = TRANSLATIONS[2]
    check(case.decoder, pool.run(4, translated, case), case.expected())


def test_a_decoder_that_is_given_what_an_encoder_made() -> None:
    from transformers import BertLMHeadModel

    case, source = Case("bert", "left"), Case("", "right", tokens=20)
    states = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(4))

    def build() -> Any:
        torch.manual_seed(0)
        config = bert(is_decoder=True, add_cross_attention=True).config
        return BertLMHeadModel(config)

    def run(group: UlyssesGroup) -> Found:
        model = models[group.rank]
        enable(model, group, attention="reference")
        mask = shard_sequence(source.inputs()["attention_mask"], group)
        given = {"encoder_hidden_states": shard_sequence(states, group), "encoder_attention_mask": mask}
        return step(model, part_of(case, group) | given, shard_sequence(weight_of(case), group))

    one, models = build(), [build(), build()]
    one.set_attn_implementation("dense")
    dense.documents = {30: case.documents(), 20: source.documents()}
    inputs = {"input_ids": case.inputs()["input_ids"], "encoder_hidden_states": states}
    check(case, run_virtual(2, run), step(one, inputs, weight_of(case)))


@pytest.mark.parametrize("ranks", [2, 4])
def test_images(ranks: int) -> None:
    """16 patches and a class token, whole images in, whole output out; the gradient is the ranks' mean."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))

    def build() -> Any:
        torch.manual_seed(0)
        return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5))

    def run(group: UlyssesGroup) -> Found:
        model = models[group.rank]
        enable(model, group, attention="reference")
        return step(model, {"pixel_values": images}, weight / group.size)

    one, models = build(), [build() for _ in range(ranks)]
    one.set_attn_implementation("eager")  # which is right where nothing is masked
    expected, found = step(one, {"pixel_values": images}, weight), run_virtual(ranks, run)
    for part in found:
        assert (part.logits - expected.logits).abs().max() < TOLERANCE
    by_token = [replace(part, logits=part.logits[:, :0] if n else part.logits) for n, part in enumerate(found)]
    compare(joined(by_token), expected)


def test_attention_of_other_kinds() -> None:
    """The interpreted kernels, and aten's where it can; `reference` elsewhere here, as it is the fastest."""
    case = Case("mistral", "packed", batch=1)
    check(case, virtually(case, 2, lambda *given: on_rank(*given, attention="triton")))
    case = Case("llama", "plain")
    check(case, virtually(case, 2, lambda *given: on_rank(*given, attention="auto")))


@pytest.mark.parametrize("lens", [(1, 20, 9), (13, 16, 1)], ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_uneven_shards(kind: str, lens: tuple[int, ...]) -> None:
    case = Case("qwen3_window", kind, lens=lens)
    check(case, virtually(case, 3))


@st.composite
def drawn(draw: st.DrawFn, model: str) -> tuple[Case, int]:
    """Any documents and padding, in shards of any lengths."""
    tokens, ranks = draw(st.integers(8, 40)), draw(st.integers(2, 4))

    def cuts(first: int, parts: int) -> list[int]:
        inside = draw(st.lists(st.integers(first, tokens - 1), max_size=parts, unique=True))
        return [0, *sorted(inside), tokens]

    rows = []
    for _ in range(draw(st.integers(1, 2))):
        lengths = [b - a for a, b in itertools.pairwise(cuts(4, 5))]
        rows.append((lengths[0], *(n * draw(st.sampled_from([1, 1, -1])) for n in lengths[1:])))
    inside = draw(st.lists(st.integers(1, tokens - 1), min_size=ranks - 1, max_size=ranks - 1, unique=True))
    lens = tuple(b - a for a, b in itertools.pairwise([0, *sorted(inside), tokens]))
    return Case(model, "drawn", tokens=tokens, batch=len(rows), lens=lens, rows=tuple(rows)), ranks


@pytest.mark.parametrize("model", ["qwen3_window", "gpt_oss", "bert"])
def test_any_documents_in_any_shards(model: str) -> None:
    @given(drawn(model))
    def holds(given: tuple[Case, int]) -> None:
        case, ranks = given
        compare(joined(virtually(case, ranks)), on_one(case), case.documents() >= 0, of_model=True)

    holds()


def test_lengths_that_ranks_do_not_divide() -> None:
    case = Case("llama", "rows", tokens=31)
    check(case, virtually(case, 4))


@pytest.mark.parametrize("ranks", [3, 8])
def test_heads_that_ranks_do_not_divide(ranks: int) -> None:
    case = Case("mistral", "rows", tokens=32)
    check(case, virtually(case, ranks))


def test_one_rank_without_a_group() -> None:
    case = Case("mistral", "rows")
    model = case.build()
    enable(model, attention="reference")
    check(case, [step(model, case.inputs(), weight_of(case))])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_two_batches_in_flight(reentrant: bool) -> None:
    """A recomputed layer sees its own batch's documents, not those of the latest."""
    case, other = Case("mistral", "rows"), Case("mistral", "left")

    def run(case: Case, group: UlyssesGroup, model: Any) -> Found:
        enable(model, group, attention="reference")
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        first, second = (model(**part_of(c, group)).logits for c in (case, other))
        weights = (shard_sequence(weight_of(c), group) for c in (case, other))
        sum((logits * w).sum() for logits, w in zip((first, second), weights, strict=True)).backward()
        return Found(first.detach(), {name: p.grad for name, p in model.named_parameters()})

    one, two = on_one(case), on_one(other)
    both = Found(one.logits, {name: grad + two.grads[name] for name, grad in one.grads.items()})
    check(case, virtually(case, 2, run), both)


def test_evaluation_and_an_inner_model_alone() -> None:
    case = Case("qwen3", "packed")

    def run(case: Case, group: UlyssesGroup, model: Any) -> torch.Tensor:
        enable(model.model, group, attention="reference")
        with torch.no_grad():
            return model.eval()(**part_of(case, group)).logits

    found = torch.cat(virtually(case, 2, run), dim=1)
    assert (found - on_one(case).logits).abs().max() < TOLERANCE


def test_dropout_is_the_same_for_every_number_of_ranks() -> None:
    case = Case("llama", "packed")

    def run(case: Case, group: UlyssesGroup, model: Any) -> Found:
        torch.manual_seed(3)  # the draw is rank 0's
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        model.train()
        return on_rank(case, group, model)

    (one,) = virtually(case, 1, run)
    check(case, virtually(case, 1, run), one)
    assert (one.logits - on_one(case).logits).abs().max() > 0.01


def test_autocast() -> None:
    case = Case("qwen3", "packed")

    def run(case: Case, group: UlyssesGroup, model: Any) -> torch.Tensor:
        enable(model, group, attention="reference")
        with torch.autocast("cpu", torch.bfloat16):
            return model(**part_of(case, group)).logits

    found = torch.cat(virtually(case, 2, run), dim=1)
    error = (found - on_one(case).logits).abs().max() / on_one(case).logits.abs().max()
    assert 1e-4 < error < 3e-2


def test_disable_restores() -> None:
    case = Case("mistral", "plain")
    model = case.build()
    model.set_attn_implementation("sdpa")
    before = model(**case.inputs()).logits
    enable(model)
    enable(model)  # anew: nothing is doubled
    assert model.config._attn_implementation == "ulysses_triton"
    assert "generate" in model.__dict__
    disable(model)
    disable(model)
    assert "generate" not in model.__dict__
    assert model.config._attn_implementation == "sdpa" and not model.model._forward_pre_hooks
    assert torch.equal(model(**case.inputs()).logits, before)
    assert model.generate(**case.inputs(), max_new_tokens=2).shape == (2, 32)


def test_a_copy_of_an_enabled_model_is_enabled() -> None:
    case = Case("mistral", "packed")

    def run(case: Case, group: UlyssesGroup, model: Any) -> Found:
        enable(model, group, attention="reference")
        model = copy.deepcopy(model)
        return step(model, part_of(case, group), shard_sequence(weight_of(case), group))

    check(case, virtually(case, 2, run))


def test_labels_are_shifted_before_sharding() -> None:
    case = Case("llama", "plain")

    def run(case: Case, group: UlyssesGroup, model: Any) -> float:
        enable(model, group, attention="reference")
        inputs = part_of(case, group)
        shifted = torch.nn.functional.pad(case.inputs()["input_ids"], (0, 1), value=-100)[:, 1:]
        shifted = shard_sequence(shifted, group)
        return model(**inputs, labels=shifted, shift_labels=shifted, num_items_in_batch=58).loss.item()

    expected = case.build()(**case.inputs(), labels=case.inputs()["input_ids"]).loss.item()
    assert abs(sum(virtually(case, 2, run)) - expected) < TOLERANCE


def lora(model: Any) -> Any:
    import peft

    options = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]}
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def test_lora() -> None:
    """Enabled around PEFT's model; its parameters' gradients, and no others."""
    case = Case("mistral", "rows")

    def build() -> Any:
        model = case.build()
        torch.manual_seed(5)
        return lora(model)

    one, models = build(), [build(), build()]
    expected = on_one(case, one)
    assert len(expected.grads) == 8
    check(case, virtually(case, 2, lambda case, group, _: on_rank(case, group, models[group.rank])), expected)


def compiled_step(case: Case, group: UlyssesGroup, model: Any) -> Found:
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            model.zero_grad()
            found = step(model, part_of(case, group), shard_sequence(weight_of(case), group))
    return replace(found, grads={name.removeprefix("_orig_mod."): grad for name, grad in found.grads.items()})


def compiled(ctx: Any, cases: list[Case], checkpointing: bool) -> list[Found]:
    found = []
    with UlyssesGroup(ctx.group) as group:
        for case in cases:
            torch._dynamo.reset()
            model = case.build()
            if checkpointing:
                model.train()
                model.activation_checkpointing_enable({"use_reentrant": False})
            enable(model, group, attention="reference")
            found.append(compiled_step(case, group, torch.compile(model, fullgraph=True, backend="aot_eager")))
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_whole(pool: Any, checkpointing: bool) -> None:
    cases = [Case("mistral", kind) for kind in (("packed",) if checkpointing else ("packed", "left"))]
    by_rank = pool.run(2, compiled, cases, checkpointing)
    for number, case in enumerate(cases):
        check(case, [found[number] for found in by_rank])


def test_compiled_layer_by_layer() -> None:
    """Calls are counted where they happen, not where they are traced."""
    case = Case("mistral", "packed")
    model = case.build()
    enable(model, attention="reference")
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        found = step(model, case.inputs(), weight_of(case))
    check(case, [found])


def test_the_example_of_the_guide_runs() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    (source,) = re.findall(r"## Hugging Face.*?```python\n(.*?)```", text, re.DOTALL)
    case, expected = Case("llama", "plain"), Case("llama", "plain").build()
    names = {"model": case.build(), "group": None, "all_ranks": None, "torch": torch}
    exec(source, names | case.inputs())
    inputs = case.inputs()
    expected(**inputs, labels=inputs["input_ids"]).loss.backward()
    for mine, theirs in zip(names["model"].parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


# ---- what is refused


def refusal(kind: type[UlyssesError], change: Any, model: str = "llama", input: str = "plain") -> str:
    """The message of the error that both ranks raise where rank 1 gives the model other inputs."""
    case = Case(model, input)
    said = []

    def run(case: Case, group: UlyssesGroup, model: Any) -> None:
        enable(model, group)
        inputs = part_of(case, group)
        if group.rank == 1:
            change(inputs, model)
        with pytest.raises(kind) as caught:
            model(**inputs)
        said.append(str(caught.value))

    virtually(case, 2, run)
    assert len(said) == 2
    return min(said, key=len)


def test_wrong_inputs_raise_on_every_rank() -> None:
    whole = torch.ones(2, 1, 30, 30)
    cases = {
        "labels within this rank's part": lambda x, _: x.update(labels=x["input_ids"]),
        "with a cache": lambda x, _: x.update(use_cache=True),
        "attention_mask is [2, 1, 30, 30]": lambda x, _: x.update(attention_mask=whole),
        "attention_mask is [2, 30]": lambda x, _: x.update(attention_mask=whole[:, 0, 0]),
        "position_ids is [3, 2, 15]; expected": lambda x, _: x.update(
            position_ids=whole[:, 0, :3, :15].transpose(0, 1)
        ),
        "ulysses_lens = [14, 16] does not fit": lambda x, _: x.update(ulysses_lens=(14, 16)),
        "rank 1 has no tokens": lambda x, _: x.update({name: value[:, :0] for name, value in x.items()}),
        "attends with made_up": lambda x, _: x.update(made_up=3),
        "its attention is 'sdpa' now": lambda _, model: model.set_attn_implementation("sdpa"),
        "made no call": lambda _, model: setattr(model.config, "num_hidden_layers", 0),
    }
    for message, change in cases.items():
        assert message in refusal(UlyssesError, change)


def test_shards_that_differ_without_being_named_raise() -> None:
    def longer(inputs: dict[str, torch.Tensor], _: Any) -> None:
        inputs["input_ids"] = torch.ones(2, 16, dtype=torch.int64)

    assert "lens" in refusal(ShapeError, longer)


def test_positions_that_a_model_makes_in_a_way_of_its_own_are_asked_for() -> None:
    from transformers import RobertaConfig, RobertaForMaskedLM

    model = RobertaForMaskedLM(RobertaConfig(**Case("bert", "plain").build().config.to_dict()))
    enable(model)
    with pytest.raises(OptionError, match="RobertaModel makes positions in a way of its own"):
        model(torch.ones(1, 5, dtype=torch.int64))
    with pytest.raises(OptionError, match="RobertaModel makes positions in a way of its own"):
        model(torch.ones(1, 5, dtype=torch.int64), attention_mask=torch.ones(1, 5))
    model(torch.ones(1, 5, dtype=torch.int64), position_ids=torch.arange(2, 7)[None])


def test_a_decoder_needs_its_inputs_shifted() -> None:
    model = TRANSLATIONS[0].build()
    enable(model)
    with pytest.raises(OptionError, match="shift the whole sequence, shard that and pass decoder_input_ids"):
        model(input_ids=torch.ones(1, 5, dtype=torch.int64))
    target = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(OptionError, match="packing for a decoder"):
        model(target, decoder_input_ids=target, cu_seq_lens_q=torch.tensor([0, 2, 4]))
    with pytest.raises(OptionError, match="BartEncoder was given position_ids, which it does not take"):
        model(target, decoder_input_ids=target, position_ids=torch.arange(4)[None])


def test_offsets_and_a_mask_raise() -> None:
    def masked(inputs: dict[str, torch.Tensor], _: Any) -> None:
        inputs["attention_mask"] = torch.ones(1, 15)

    assert "both cu_seq_lens_q and attention_mask" in refusal(OptionError, masked, input="offsets")


def test_a_layer_alone_is_not_enabled() -> None:
    model = Case("llama", "plain").build()
    enable(model)
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 5, 32)
    with pytest.raises(GroupError, match="LlamaAttention was not told its group"):
        attention(x, position_embeddings=model.model.rotary_emb(x, torch.arange(5)[None]))


def test_masks_of_other_patterns_raise() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    model = Gemma3ForCausalLM(Gemma3TextConfig(**TINY, use_bidirectional_attention=True))
    with pytest.raises(OptionError, match="the model masks attention by or_masks"):
        enable(model)
        model(torch.ones(1, 5, dtype=torch.int64))


def unhandled() -> Iterator[Any]:
    import transformers as t

    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "num_experts": 2}
    linear["layer_types"] = ["linear_attention", "full_attention"]
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY}
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1}
    bert_sizes = {**small, "num_attention_heads": 2, "intermediate_size": 32}
    yield "layer 0 of", lambda: t.Qwen3NextForCausalLM(t.Qwen3NextConfig(**TINY | linear))
    bert_sizes = {**small, "num_attention_heads": 2, "intermediate_size": 32}
    yield "layer 0 of .* is 'linear_attention'", lambda: t.MambaForCausalLM(t.MambaConfig(**small))
    yield r"\(Rwkv\w+\)", lambda: t.RwkvForCausalLM(t.RwkvConfig(**small | {"num_hidden_layers": 2}))
    yield "'chunked_attention'", lambda: t.Llama4ForCausalLM(t.Llama4TextConfig(**TINY, num_local_experts=1))
    yield "BloomAttention", lambda: t.BloomForCausalLM(t.BloomConfig(**sizes | {"hidden_size": 32}))
    yield "flash attention", lambda: t.T5ForConditionalGeneration(t.T5Config(**small, d_model=32, d_kv=8, d_ff=32))
    yield r"bert.pooler \(BertPooler\)", lambda: t.BertForPreTraining(t.BertConfig(**bert_sizes))
    yield "has a head", lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**TINY))
    yield "no transformers model", lambda: torch.nn.Linear(2, 2)


@pytest.mark.parametrize("message, build", list(unhandled()))
def test_layers_that_are_not_handled_raise(message: str, build: Any) -> None:
    model = build()
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    with pytest.raises(OptionError, match=message):
        enable(model)
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) == before


def test_a_layer_of_another_kind_inside_a_model_raises() -> None:
    for layer in (torch.nn.Conv1d(32, 32, 3), torch.nn.MultiheadAttention(32, 4), torch.nn.GRU(32, 32)):
        model = Case("llama", "plain").build()
        model.model.layers[1].mlp.inner = layer
        with pytest.raises(OptionError, match=r"model.layers.1.mlp.inner \(\w+\) mixes tokens by other means"):
            enable(model)
