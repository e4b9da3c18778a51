"""`generate` over ranks against one process, with transformers' own attention and cache: tokens and logits."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import test_transformers as models  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from pool import Exit  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from transformers import (  # noqa: E402
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer  # noqa: E402

from ulysses_triton import ExchangeError, OptionError, UlyssesError, UlyssesGroup, run_virtual, shard_lens  # noqa: E402
from ulysses_triton.integrations.transformers import disable, enable  # noqa: E402

TOLERANCE = 1e-5  # of logits
LIKELY = 1e-4  # the least distance of the two largest logits: no rounding decides on a token
MORE = {"max_position_embeddings": 256, "initializer_range": 0.2, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Call:
    """A model, a prompt and the arguments of generate."""

    model: str = "llama"
    tokens: int = 37
    padding: tuple[int, ...] = (0,)  # of each row, on the left
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def build(self) -> Any:
        torch.manual_seed(self.seed)
        model = models.MODELS[self.model](**MORE | self.config)
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name or "sinks" in name:  # which begin as ones and zeros
                p.data += 0.3 * torch.randn_like(p)
        model.generation_config.eos_token_id = None  # but where a test sets it
        return model.eval()

    def inputs(self) -> dict[str, Any]:
        shape = (len(self.padding), self.tokens)
        ids = torch.randint(3, models.VOCABULARY, shape, generator=torch.Generator().manual_seed(1))
        real = torch.arange(self.tokens) >= torch.tensor(self.padding)[:, None]
        return {"input_ids": ids * real} | ({"attention_mask": real.long()} if any(self.padding) else {})

    def arguments(self) -> dict[str, Any]:
        fixed = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 8}
        return self.inputs() | fixed | self.options

    def on_one(self) -> Any:
        model = self.build()
        model.set_attn_implementation("eager")
        torch.manual_seed(7)
        return model.generate(**self.arguments())

    def on_rank(self, group: UlyssesGroup) -> Any:
        model = self.build()
        enable(model, group, attention="reference")
        torch.manual_seed(7 + group.rank)
        return model.generate(**self.arguments())


def on_ranks(ctx: Any, calls: list[Call]) -> list[dict[str, Any]]:
    with UlyssesGroup(ctx.group) as group:
        found = [call.on_rank(group) for call in calls]
        return [{name: x for name, x in one.items() if name != "past_key_values"} for one in found]


def check(pool: Any, ranks: int, calls: list[Call]) -> None:
    by_rank = pool.run(ranks, on_ranks, calls)
    for number, call in enumerate(calls):
        expected = call.on_one()
        logits = torch.stack(expected.logits)
        if not call.options.get("do_sample"):
            first, second = logits.topk(2).values.unbind(-1)
            assert (first - second).min() > LIKELY, f"seed {call.seed} of {call.model} is none to test with"
        for found in by_rank:
            assert torch.equal(found[number]["sequences"], expected.sequences), call
            assert (torch.stack(found[number]["logits"]) - logits).abs().max() < TOLERANCE, call
            if "sequences_scores" in expected:
                torch.testing.assert_close(found[number]["sequences_scores"], expected.sequences_scores)


LEFT = (0, 9)
MODELS = ("llama", "mistral", "gemma2", "gpt_oss", "qwen3")
LONG = [Call(model, options={"max_new_tokens": 64}) for model in MODELS]


@pytest.mark.parametrize("ranks", [4, 2])
def test_greedy(pool: Any, ranks: int) -> None:
    check(pool, ranks, LONG)


def test_padding_on_the_left(pool: Any) -> None:
    """Also a prompt of which one rank gets nothing but padding, and rows that end at different tokens."""
    calls = [Call(model, padding=LEFT) for model in (*MODELS, "qwen3_window", "gemma3")]
    expected = Call(padding=(0, 19, 12)).on_one().sequences[:, 37:]
    ends = [int(row[n]) for row, n in zip(expected, (1, 4, 2), strict=True)]
    check(pool, 4, [*calls, Call(padding=(0, 19, 12), options={"eos_token_id": ends, "pad_token_id": 0})])


HEADS = [(6, 6), (6, 3), (6, 1), (4, 1), (3, 3), (2, 2)]


@pytest.mark.parametrize("ranks", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_heads_that_ranks_do_not_divide(pool: Any, ranks: int) -> None:
    sizes = [{"num_attention_heads": q, "num_key_value_heads": kv, "hidden_size": 8 * q} for q, kv in HEADS]
    check(pool, ranks, [Call(config=size, padding=LEFT) for size in sizes])


def test_prompts_of_any_length(pool: Any) -> None:
    check(pool, 3, [Call("mistral", tokens=n, options={"max_new_tokens": 4}) for n in (1, 2, 11, 12, 13, 50)])


def test_beams(pool: Any) -> None:
    beams = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 16, "output_scores": True}
    ends = {"eos_token_id": [5, 7, 11, 13], "pad_token_id": 0}
    drawn = {"do_sample": True}
    calls = [Call(model, padding=LEFT, options=beams) for model in ("llama", "mistral")]
    check(pool, 2, [*calls, Call(padding=LEFT, options=beams | ends), Call(options=beams | drawn)])


def test_what_else_generate_takes(pool: Any) -> None:
    embeds = Call().build().get_input_embeddings()(Call().inputs()["input_ids"]).detach()
    check(
        pool,
        2,
        [
            Call(options={"prefill_chunk_size": 10}, padding=LEFT),
            Call(options={"inputs_embeds": embeds}),
            Call(options={"inputs_embeds": embeds, "input_ids": None}),
            Call(options={"position_ids": torch.arange(5, 42)[None]}),
            Call(options={"cache_implementation": "dynamic"}),
            Call(options={"repetition_penalty": 1.5, "min_new_tokens": 3, "no_repeat_ngram_size": 2}),
            Call(options={"generation_config": GenerationConfig(max_new_tokens=5), "max_new_tokens": None}),
        ],
    )


# ---- random numbers


def drawing(ctx: Any, calls: list[Call]) -> list[tuple[Tensor, float]]:
    found = []
    with UlyssesGroup(ctx.group) as group:
        for call in calls:
            sequences = call.on_rank(group).sequences
            found.append((sequences, torch.rand(()).item()))
    return found


def test_sampling_draws_what_rank_0_would_alone(pool: Any) -> None:
    """And leaves rank 0's random numbers as one process would, and other ranks' as they were."""
    options = {"do_sample": True, "max_new_tokens": 24, "temperature": 1.3, "top_p": 0.9}
    calls = [Call(options=options), Call(padding=LEFT, options=options | {"num_return_sequences": 3})]
    by_rank = pool.run(4, drawing, calls)
    for number, call in enumerate(calls):
        expected = call.on_one().sequences
        assert len(set(expected[0, 37:].tolist())) > 10
        after = [torch.rand(()).item()] + [float(torch.manual_seed(7 + rank) and torch.rand(())) for rank in (1, 2, 3)]
        for rank, found in enumerate(by_rank):
            assert torch.equal(found[number][0], expected) and found[number][1] == after[rank]


# ---- going on


def two_turns(call: Call, generate: Callable[..., Any], whole: bool) -> Any:
    """Another question after the answer, with what both have in common, or with the new tokens alone."""
    first = generate(**call.arguments())
    ids, mask = first.sequences, call.inputs().get("attention_mask", torch.ones(1, call.tokens, dtype=torch.int64))
    question = torch.randint(3, models.VOCABULARY, (len(ids), 13), generator=torch.Generator().manual_seed(2))
    mask = torch.nn.functional.pad(mask, (0, ids.size(1) + 13 - mask.size(1)), value=1)
    past = first.past_key_values.get_seq_length()
    ids = torch.cat([ids if whole else ids[:, past:], question], 1)
    again = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
    return generate(**call.arguments() | again)


CHATS = [(Call(model, padding=LEFT), whole) for model in ("llama", "gemma2") for whole in (True, False)]
CHATS.append((Call(tokens=20), True))


def chatting(ctx: Any) -> list[dict[str, Any]]:
    found = []
    with UlyssesGroup(ctx.group) as group:
        for call, whole in CHATS:
            model = call.build()
            enable(model, group, attention="reference")
            answer = two_turns(call, model.generate, whole)
            cache = answer.past_key_values
            held = cache.get_seq_length()
            cache.crop(-5)
            found.append({"sequences": answer.sequences, "logits": answer.logits})
            found[-1] |= {"held": held, "cropped": cache.get_seq_length()}
    return found


def test_an_earlier_cache_is_continued(pool: Any) -> None:
    by_rank = pool.run(3, chatting)
    for number, (call, whole) in enumerate(CHATS):
        model = call.build()
        model.set_attn_implementation("eager")
        expected = two_turns(call, model.generate, whole)
        for found in by_rank:
            assert torch.equal(found[number]["sequences"], expected.sequences)
            logits, wanted = torch.stack(found[number]["logits"]), torch.stack(expected.logits)
            assert (logits - wanted).abs().max() < TOLERANCE
            assert found[number]["held"] == expected.past_key_values.get_seq_length() == found[number]["cropped"] + 5


# ---- how it runs


class Lines(BaseStreamer):
    def __init__(self) -> None:
        self.said: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.said.append(value.reshape(-1))

    def end(self) -> None:
        self.ended = True


def watched(group: UlyssesGroup, call: Call) -> tuple[list[int], int, list[int]]:
    """How many tokens a rank's embedding saw at a time, the bytes it keeps, and the messages and hops of each step."""
    model, seen, messages = call.build(), [], []
    enable(model, group, attention="reference")

    def note(_: Any, args: Any) -> None:
        seen.append(args[0].size(1))
        messages.append(group.counts.total())

    model.get_input_embeddings().register_forward_pre_hook(note)
    streamer = Lines()
    given = call.arguments() | ({"streamer": streamer} if group.rank == 0 else {})
    found = model.generate(**given)
    if group.rank == 0:
        assert torch.equal(torch.cat(streamer.said), found.sequences[0]) and streamer.ended
    steps = [b - a for a, b in zip(messages[1:], messages[2:], strict=False)]
    return seen, found.past_key_values.kept.bytes, steps


def test_a_rank_sees_its_part_of_the_prompt_and_keeps_its_heads() -> None:
    """A step takes a message and a hop for each of 2 layers and for the logits, and a message that compares tokens."""
    call = Call(config={"num_key_value_heads": 4})
    found = run_virtual(4, lambda group: watched(group, call))
    assert [seen for seen, _, _ in found] == [[n] + [1] * 7 for n in shard_lens(37, 4)]
    row = 8 * 4 * 2 * 2  # of a head: 8 numbers of 4 bytes, k and v, 2 layers
    assert all(size == (37 + 8 - 1) * row for _, size, _ in found)
    assert all(set(steps) == {2 * 3 + 1} for _, _, steps in found)


def sharded(ctx: Any, calls: list[Call]) -> Tensor:
    """As many rows of ranks as there are calls, each with a prompt of its own; parameters are sharded over all."""
    size = ctx.size // len(calls)
    rows = [list(range(row * size, (row + 1) * size)) for row in range(len(calls))]
    own = ctx.group if len(calls) == 1 else [dist.new_group(row) for row in rows][ctx.rank // size]
    with UlyssesGroup(own) as group:
        call = calls[ctx.rank // size]
        model = call.build()
        enable(model, group, attention="reference")
        mesh = DeviceMesh.from_group(ctx.group, "cpu")
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model.generate(**call.arguments()).sequences


def test_fully_sharded_parameters(pool: Any) -> None:
    call = Call(padding=LEFT, options={"synced_gpus": False})
    assert all(torch.equal(found, call.on_one().sequences) for found in pool.run(2, sharded, [call]))


@pytest.mark.slow
def test_fully_sharded_parameters_and_rows_of_ranks_that_end_at_different_tokens(pool: Any) -> None:
    """transformers lets the row that is done take the steps of the other, as its parameters are needed there."""
    calls = [Call(padding=LEFT), Call(tokens=20, options={"max_new_tokens": 13})]
    expected = [call.on_one().sequences for call in calls for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(pool.fresh(4, sharded, calls), expected, strict=True))


def test_lora_a_copy_and_disable() -> None:
    call = Call(padding=LEFT)

    def build() -> Any:
        model = call.build()
        torch.manual_seed(5)
        return models.lora(model).eval()

    one, ranks = build(), [build(), build()]
    one.base_model.model.set_attn_implementation("eager")
    expected = one.generate(**call.arguments()).sequences

    def run(group: UlyssesGroup) -> Tensor:
        enable(ranks[group.rank], group, attention="reference")
        return copy.deepcopy(ranks[group.rank]).generate(**call.arguments()).sequences

    assert all(torch.equal(found, expected) for found in run_virtual(2, run))
    disable(ranks[1])
    assert isinstance(ranks[1].generate(**call.arguments()).past_key_values, DynamicCache)


@pytest.mark.slow
def test_compiled_layers() -> None:
    """Attention over a cache is a break in their graphs."""
    call = Call(padding=LEFT)
    model = call.build()
    enable(model, attention="reference")
    for layer in model.model.layers:
        layer.compile(backend="eager")
    assert torch.equal(model.generate(**call.arguments()).sequences, call.on_one().sequences)


def test_a_model_that_leaves_positions_and_logits_to_keep_to_others() -> None:
    """All logits of the last rank's part come back then."""
    call = Call("mistral", padding=LEFT)

    class Brief(transformers.MistralForCausalLM):
        def forward(
            self, input_ids: Any = None, attention_mask: Any = None, past_key_values: Any = None, **k: Any
        ) -> Any:
            seen.append("position_ids" in k)
            return super().forward(input_ids, attention_mask, past_key_values=past_key_values, **k)

    def build() -> Any:
        model = call.build()
        model.__class__ = Brief
        return model

    seen: list[bool] = []
    one, ranks = build(), [build(), build()]
    one.set_attn_implementation("eager")
    expected = one.generate(**call.arguments()).sequences

    def run(group: UlyssesGroup) -> Tensor:
        enable(ranks[group.rank], group, attention="reference")
        return ranks[group.rank].generate(**call.arguments()).sequences

    assert all(torch.equal(found, expected) for found in run_virtual(2, run)) and not any(seen)


def test_one_rank_without_a_group() -> None:
    call = Call("mistral", padding=LEFT)
    model = call.build()
    enable(model, attention="reference")
    assert torch.equal(model.generate(**call.arguments()).sequences, call.on_one().sequences)


# ---- what is refused


def refusals(change: Callable[[dict[str, Any], Any, int], None], call: Call = Call()) -> list[str]:
    """The messages of the errors that two ranks raise where `change` changes what they are given."""
    built = [call.build(), call.build()]
    said = []

    def run(group: UlyssesGroup) -> None:
        model, given = built[group.rank], call.arguments()
        enable(model, group, attention="reference")
        change(given, model, group.rank)
        with pytest.raises(UlyssesError) as caught:
            model.generate(**given)
        said.append(f"{caught.type.__name__}: {caught.value}")

    run_virtual(2, run)
    assert len(said) == 2
    return said


REFUSED: dict[str, dict[str, Any]] = {
    "does not take assisted generation": {"prompt_lookup_num_tokens": 3},
    "does not take assistant_model": {"assistant_model": "none"},
    "cache_implementation='static'": {"cache_implementation": "static"},
    "cache_implementation='paged'": {"cache_implementation": "paged"},
    "cache_implementation='quantized'": {"generation_config": GenerationConfig(cache_implementation="quantized")},
    "use_cache=False": {"use_cache": False},
    "max_time": {"max_time": 1.0},
    "guidance_scale": {"guidance_scale": 1.5},
    "output_attentions": {"output_attentions": True},
    "output_hidden_states": {"output_hidden_states": True},
    "does not take pixel_values": {"pixel_values": torch.ones(1)},
    "does not take custom_generate": {"custom_generate": "someone/something"},
    "past_key_values is a DynamicCache": {"past_key_values": DynamicCache()},
    "position_ids is [3, 1, 37]": {"position_ids": torch.arange(37).expand(3, 1, 37)},
    "attention_mask is [1, 30]; expected that of all tokens, [1, 37]": {
        "attention_mask": torch.arange(30)[None] * 2 + 1
    },
    "attention_mask ends with padding": {"attention_mask": (torch.arange(37) < 30).long()[None]},
}


@pytest.mark.parametrize("everywhere", [True, False])
def test_arguments_that_are_refused(everywhere: bool) -> None:
    """By name and on all ranks before the model runs, also where only one rank gives them."""
    for message, options in REFUSED.items():

        def change(given: dict[str, Any], model: Any, rank: int) -> None:
            model.get_input_embeddings().register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
            if everywhere or rank == 1:
                given |= options  # noqa: B023

        said = refusals(change)
        if everywhere:
            assert all(message in text for text in said), said
        else:
            assert all(message in text or f"{next(iter(options))}: rank" in text for text in said), said


def test_ranks_that_differ_raise() -> None:
    class Biased(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores[:, 3] += 100.0 * (input_ids.size(1) == 40)
            return scores

    class Ending(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.size(1) == 41 and here[id(self)])

    class Neutral(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores

    def prompt(given: dict[str, Any], model: Any, rank: int) -> None:
        given["input_ids"][0, 3] += rank

    def option(given: dict[str, Any], model: Any, rank: int) -> None:
        given["max_new_tokens"] = 8 + rank

    def default(given: dict[str, Any], model: Any, rank: int) -> None:
        model.generation_config.repetition_penalty = 1.0 + rank

    def tokens(given: dict[str, Any], model: Any, rank: int) -> None:
        Biased.__name__ = "Neutral"
        given["logits_processor"] = LogitsProcessorList([Biased() if rank else Neutral()])

    here: dict[int, bool] = {}

    def stop(given: dict[str, Any], model: Any, rank: int) -> None:
        ending = Ending()
        here[id(ending)] = rank == 1
        given["stopping_criteria"] = StoppingCriteriaList([ending])

    assert all("inputs: " in text or "input_ids: " in text for text in refusals(prompt))
    assert all("max_new_tokens: rank 0 has 8, rank 1 has 9" in text for text in refusals(option))
    assert all("defaults: rank" in text for text in refusals(default))
    assert all("step of generate" in text and "tokens: " in text for text in refusals(tokens))
    assert all("end of generate" in text for text in refusals(stop))


def test_an_error_of_one_rank_is_every_ranks() -> None:
    class Failing(BaseStreamer):
        def put(self, value: Tensor) -> None:
            pass

        def end(self) -> None:
            raise ZeroDivisionError("the last line")

    call = Call()
    built = [call.build(), call.build()]

    def run(group: UlyssesGroup) -> str:
        enable(built[group.rank], group, attention="reference")
        given = call.arguments() | ({"streamer": Failing()} if group.rank else {})
        with pytest.raises((ZeroDivisionError, ExchangeError)) as caught:
            built[group.rank].generate(**given)
        return str(caught.value)

    said = run_virtual(2, run)
    assert "rank 1 refused this call: generate failed with ZeroDivisionError: the last line" in said[0]
    assert said[1] == "the last line"


def dying(ctx: Any, call: Call) -> str:
    class Last(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.size(1) == 40 and ctx.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return scores

    with UlyssesGroup(ctx.group, timeout=timedelta(seconds=20)) as group:
        model = call.build()
        enable(model, group, attention="reference")
        with pytest.raises(ExchangeError) as caught:
            model.generate(**call.arguments(), logits_processor=LogitsProcessorList([Last()]))
        return str(caught.value)


@pytest.mark.slow
def test_a_rank_that_dies_ends_generation_on_all(pool: Any) -> None:
    first, second = pool.fresh(2, dying, Call())
    assert isinstance(first, str) and isinstance(second, Exit)


def test_a_cache_of_a_generate_that_failed_is_refused() -> None:
    call = Call()
    model = call.build()
    enable(model, attention="reference")
    cache = model.generate(**call.arguments()).past_key_values
    given = {"input_ids": torch.ones(1, 60, dtype=torch.int64), "past_key_values": cache, "max_new_tokens": 2}
    norm = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(**given)
    norm.remove()
    with pytest.raises(OptionError, match="failed half-way"):
        model.generate(**given)


def test_masks_that_do_not_fit_a_cache() -> None:
    for padding, changed in ((LEFT, "all"), (LEFT, "some"), ((0, 0), "some")):
        call = Call(padding=padding)
        model = call.build()
        enable(model, attention="reference")
        first = model.generate(**call.arguments())
        mask = torch.ones_like(first.sequences)
        if changed == "some":
            mask[1, 3] = 0
        with pytest.raises(OptionError, match="attention_mask does not fit the tokens in past_key_values"):
            model.generate(first.sequences, attention_mask=mask, past_key_values=first.past_key_values)


def test_other_models_and_modes() -> None:
    model = models.TRANSLATIONS[0].build()
    enable(model, attention="reference")
    with pytest.raises(OptionError, match="it has an encoder and a decoder"):
        model.generate(torch.ones(1, 5, dtype=torch.int64))
    call = Call()
    model = call.build()
    enable(model, attention="reference")
    kept = model.generate(**call.arguments()).past_key_values
    with pytest.raises(OptionError, match="only generate of an enabled model has one"):
        model(call.inputs()["input_ids"], past_key_values=kept)
    model.train()
    model.activation_checkpointing_enable()
    assert torch.equal(model.generate(**call.arguments()).sequences, call.on_one().sequences)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(OptionError, match=r"call model.eval\(\)"):
        model.generate(**call.arguments())
    model.eval()
    enable(model, attention=lambda *args, **kwargs: args[0])
    with pytest.raises(OptionError, match="without a callable"):
        model.generate(**call.arguments())
