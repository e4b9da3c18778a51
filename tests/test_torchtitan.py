"""torchtitan's models over shards, against the same models on one process.

The fast tests use a stand-in: layers that call `inner_attention` as torchtitan's do, under the names of torchtitan's
classes. The slow ones use torchtitan itself where it is installed, with attention of its own masks on one process.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ulysses_triton import UlyssesGroup, shard_sequence
from ulysses_triton.errors import OptionError, UlyssesError
from ulysses_triton.integrations.torchtitan import STATE, UlyssesAttention, apply, undo

BATCH, TOKENS, HEADS, KV_HEADS, DIM, VOCABULARY = 2, 24, 4, 2, 8, 31
WINDOW = 5


# ---- the stand-in, in fp64


def titan(name: str) -> Callable[[type], type]:
    """Give a class the name of one of torchtitan's."""

    def rename(kind: type) -> type:
        kind.__module__, _, kind.__qualname__ = f"torchtitan.models.{name}".rpartition(".")
        return kind

    return rename


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention `[B, S, heads, D]` of the pairs that are `allowed` `[B, S, S]`, and the LSE `[B, S, heads]`."""
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.size(-1) ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), scores.logsumexp(-1).transpose(1, 2)


@titan("common.attention.FlexAttention")
class Flex(nn.Module):
    """Takes a dense mask in the place of a BlockMask."""

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Tensor,
        score_mod: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        out, lse = dense(q_BLNH, k_BLNH, v_BLNH, attention_masks, scale)
        return out if out_transform is None else out_transform(out, lse)


class Rope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(40).double(), 10.0 ** -torch.arange(DIM // 2).double())
        self.register_buffer("cache", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        turns = self.cache[None, : x.size(1)] if positions is None else self.cache[positions]
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns[:, :, None]).flatten(3)


@titan("common.attention.GQAttention")
class Grouped(nn.Module):
    def __init__(self, scaling: float | None) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, (HEADS + 2 * KV_HEADS) * DIM)
        self.wo = nn.Linear(HEADS * DIM, 16)
        self.rope, self.inner_attention, self.scaling = Rope(), Flex(), scaling

    def split(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (-1, DIM)).split((HEADS, KV_HEADS, KV_HEADS), 2)
        return self.rope(q, positions), self.rope(k, positions), v

    def forward(self, x: Tensor, attention_masks: Any, positions: Tensor | None = None) -> Tensor:
        out = self.inner_attention(
            *self.split(x, positions), attention_masks=attention_masks, scale=self.scaling, enable_gqa=True
        )
        return self.wo(out.contiguous().flatten(2))


@titan("gpt_oss.model.Attention")
class WithSinks(Grouped):
    def __init__(self, scaling: float | None) -> None:
        super().__init__(scaling)
        self.sinks = nn.Parameter(torch.linspace(-1, 1, HEADS))

    def forward(self, x: Tensor, attention_masks: Any, positions: Tensor | None = None) -> Tensor:
        out = self.inner_attention(
            *self.split(x, positions), attention_masks=attention_masks, scale=self.scaling, enable_gqa=True,
            out_transform=lambda out, lse: out * torch.sigmoid(lse - self.sinks).unsqueeze(-1),
        )  # fmt: skip
        return self.wo(out.contiguous().flatten(2))


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.norm = attention, nn.LayerNorm(16)

    def forward(self, x: Tensor, attention_masks: Any, positions: Tensor | None = None) -> Tensor:
        if isinstance(attention_masks, dict):
            raise AssertionError("the stand-in chooses no masks")
        return x + self.attention(self.norm(x), attention_masks, positions)


@titan("common.decoder.Decoder")
class Decoder(nn.Module):
    def __init__(self, attention: type, window: int | None) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleDict({str(i): Block(attention((None, 0.3)[i])) for i in range(2)})
        self.lm_head = nn.Linear(16, VOCABULARY)
        attentions = SimpleNamespace(attention=SimpleNamespace(sliding_window_size=window))
        self.config = SimpleNamespace(layers=[attentions] * 2)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, attention_masks: Any = None) -> Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = layer(h, attention_masks, positions)
        return self.lm_head(h)

    def get_attention_masks(self, positions: Tensor) -> Tensor:
        ids, at = (positions == 0).cumsum(1), torch.arange(positions.size(1))
        past = at[:, None] - at
        window = self.config.layers[0].attention.sliding_window_size or len(at)
        return (ids[:, :, None] == ids[:, None]) & (past >= 0) & (past < window)


# ---- the same on ranks


@dataclass(frozen=True)
class Case:
    attention: str
    positions: str | None
    window: int | None = None

    def model(self) -> Decoder:
        torch.manual_seed(7)
        kinds = {"grouped": Grouped, "sinks": WithSinks}
        return Decoder(kinds[self.attention], self.window).double()

    def batch(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(3)
        found = {"tokens": torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator)}
        rows = [[24], [24]] if self.positions == "whole" else [[7, 1, 16], [11, 13]]
        places = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
        if self.positions is not None:
            found["positions"] = places[1:] if self.positions == "shared" else places
        return found


CASES = [
    Case("grouped", None),
    Case("grouped", "whole"),
    Case("grouped", "packed"),
    Case("grouped", "shared", WINDOW),
    Case("sinks", "packed"),
    Case("sinks", "packed", WINDOW),
    Case("sinks", None, WINDOW),
]
Found = tuple[Tensor, dict[str, Tensor]]


def weight() -> Tensor:
    return torch.randn(BATCH, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(1)).double()


def step(model: nn.Module, batch: dict[str, Any], weight: Tensor) -> Found:
    """Logits, and the gradients of a weighted sum of them."""
    logits = model(**batch)
    (logits * weight).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def on_one(case: Case) -> Found:
    model, batch = case.model(), case.batch()
    places = batch.get("positions", torch.arange(TOKENS)[None])
    masks = model.get_attention_masks(places).expand(BATCH, -1, -1)
    return step(model, batch | {"attention_masks": masks}, weight())


def on_ranks(ctx: Any, cases: list[Case]) -> list[Found]:
    group, found = UlyssesGroup(ctx.group), []
    for case in cases:
        model = case.model()
        apply(model, group)
        assert model.get_attention_masks(torch.arange(TOKENS)[None]) is None
        parts = {name: shard_sequence(x, group) for name, x in case.batch().items()}
        found.append(step(model, parts, shard_sequence(weight(), group)))
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_stand_in_over_shards(pool: Any, ranks: int) -> None:
    found = pool.run(ranks, on_ranks, CASES)
    for number, case in enumerate(CASES):
        compare([its[number] for its in found], on_one(case), 1e-10)


def compare(parts: list[Found], expected: Found, bound: float) -> None:
    """Ranks' logits side by side and the sums of their gradients, relative to the largest value of each tensor."""
    logits, grads = expected
    assert apart(torch.cat([part for part, _ in parts], 1), logits) <= bound
    assert {name for _, its in parts for name in its} == set(grads)
    for name, grad in grads.items():
        assert apart(sum(its[name] for _, its in parts), grad) <= bound, name  # type: ignore[arg-type]


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# ---- one process


def test_undo_puts_back_what_was_there() -> None:
    case = Case("sinks", "packed")
    model = case.model()
    before = [layer.attention.inner_attention for layer in model.layers.values()]
    names = list(model.state_dict())
    apply(model)
    apply(model)  # once more is as once
    assert list(model.state_dict()) == names
    assert all(isinstance(layer.attention.inner_attention, UlyssesAttention) for layer in model.layers.values())
    undo(model)
    undo(model)
    assert [layer.attention.inner_attention for layer in model.layers.values()] == before
    assert STATE not in vars(model) and not model._forward_pre_hooks
    masks = model.get_attention_masks(case.batch()["positions"])
    compare([step(model, case.batch() | {"attention_masks": masks}, weight())], on_one(case), 0)


def test_checkpointed_blocks_keep_their_documents() -> None:
    """Two forward passes before their backward ones: what layers learn is among their arguments."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = CASES[2].model()
    model.layers = nn.ModuleDict({name: checkpoint_wrapper(block) for name, block in model.layers.items()})
    apply(model)
    batch = CASES[2].batch()
    logits = model(**batch)
    model(batch["tokens"])
    (logits * weight()).sum().backward()
    plain = {name.replace("._checkpoint_wrapped_module", ""): p.grad for name, p in model.named_parameters()}
    compare([(logits.detach(), plain)], on_one(CASES[2]), 1e-10)


def test_windows_of_varlen_attention() -> None:
    @titan("common.attention.VarlenAttention")
    class Varlen(Flex):
        window_size = (WINDOW - 1, 0)

    case = Case("sinks", "packed", WINDOW)
    model = case.model()
    model.config = None  # not read
    for layer in model.layers.values():
        layer.attention.inner_attention = Varlen()
    apply(model)
    compare([step(model, case.batch(), weight())], on_one(case), 1e-10)


@pytest.mark.parametrize("window_size", [(-1, -1), (3, -1), (3, 2)], ids=str)
def test_varlen_attention_that_is_not_causal(window_size: tuple[int, int]) -> None:
    @titan("common.attention.VarlenAttention")
    class Varlen(Flex):
        pass

    model = Case("grouped", None).model()
    layer = model.layers["0"].attention
    q, k, v = (torch.randn(1, TOKENS, heads, DIM, dtype=torch.float64) for heads in (HEADS, KV_HEADS, KV_HEADS))
    for block in model.layers.values():
        block.attention.inner_attention = Varlen()
        block.attention.inner_attention.window_size = window_size
    apply(model)
    left, right = (TOKENS if bound < 0 else bound for bound in window_size)
    past = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    expected, _ = dense(q, k, v, ((past <= left) & (-past <= right))[None], None)
    assert apart(layer.inner_attention(q, k, v), expected) <= 1e-10


# ---- what is refused


def test_other_models_are_refused_whole() -> None:
    """Also one whose last layer alone is of another kind: nothing is changed then."""

    class OtherForward(Decoder):
        def forward(self, *args: Any) -> Tensor:
            return super().forward(*args)

    with pytest.raises(OptionError, match="only that of torchtitan.models.common.decoder.Decoder"):
        apply(OtherForward(Grouped, None))
    model = CASES[0].model()
    model.layers["1"].attention.inner_attention = nn.Identity()
    with pytest.raises(OptionError, match="layer 1 .* attends by Grouped and Identity"):
        apply(model)
    assert isinstance(model.layers["0"].attention.inner_attention, Flex) and not model._forward_pre_hooks


def wrong_calls(ctx: Any) -> dict[str, str]:
    """The messages of wrong calls, each of them wrong on one rank at least."""
    group, said = UlyssesGroup(ctx.group), {}
    case, first = CASES[2], ctx.rank == 0
    model = case.model()
    apply(model, group)
    whole = case.batch()
    parts = {name: shard_sequence(x, group) for name, x in whole.items()}
    q, k, v = model.layers["0"].attention.split(model.tok_embeddings(parts["tokens"]), parts["positions"])
    inner = model.layers["0"].attention.inner_attention
    halves = whole["positions"].chunk(2 * ctx.size, 1)
    zigzag = torch.cat([halves[ctx.rank], halves[-1 - ctx.rank]], 1)
    long = torch.arange(41).expand(2, 41)

    def attempt(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except UlyssesError as error:
            said[name] = f"{type(error).__name__}: {error}"

    attempt("masks of the model", lambda: model(**parts, attention_masks=object() if first else None))
    attempt("masks of a layer", lambda: inner(q, k, v, attention_masks=object() if first else None))
    attempt("score_mod", lambda: inner(q, k, v, score_mod=abs if first else None))
    attempt(
        "positions of another shape", lambda: model(parts["tokens"], parts["positions"][:, : -1 if first else None])
    )
    attempt("no tensor", lambda: model(parts["tokens"], [0] if first else parts["positions"]))
    attempt("zigzag", lambda: model(parts["tokens"], zigzag))
    attempt("beyond the table", lambda: model(parts["tokens"], parts["positions"] + 40))
    attempt("counted beyond the table", lambda: model(long[:, : 41 // ctx.size + 1] % VOCABULARY))
    attempt("one without positions", lambda: model(parts["tokens"], None if first else parts["positions"]))
    mesh = DeviceMesh.from_group(ctx.group, "cpu")
    attempt("DTensors", lambda: inner(DTensor.from_local(q, mesh), k, v))
    attempt("uneven shards", lambda: model(parts["tokens"][:, : 5 if first else None]))
    return said


def test_wrong_calls_raise_on_every_rank(pool: Any) -> None:
    expected = {
        "masks of the model": "OptionError: .*documents are found from positions",
        "masks of a layer": "OptionError: .*is a object, which is not handled over shards",
        "score_mod": "OptionError: .*asked for score_mod",
        "positions of another shape": "ShapeError: .*expected those of this rank's own tokens",
        "no tensor": "ShapeError: .*positions is list",
        "zigzag": "ShapeError: .*context_parallel_load_balancer = None",
        "beyond the table": "ShapeError: .*rotary table of 40 positions",
        "counted beyond the table": "ShapeError: .*rotary table of 40 positions",
        "one without positions": "ShapeError",
        "DTensors": "OptionError: .*only plain tensors are handled",
        "uneven shards": "ShapeError",
    }
    for said in pool.run(2, wrong_calls):
        assert set(said) == set(expected)
        for name, pattern in expected.items():
            assert re.search(pattern, said[name], re.DOTALL), (name, said[name])


# ---- torchtitan itself

titan_itself = pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None or importlib.util.find_spec("spmd_types") is None,
    reason="needs torchtitan 0.3.0: pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 tyro docstring-parser "
    "typeguard shtab einops torchdata tensorboard torch_checkpointing",
)
SEQUENCE = 96  # tokens
DOCUMENTS = [[40, 56], [3, 50, 1, 42]]


def real_config(name: str) -> Any:
    """A debug model of torchtitan with fewer layers, whose rotary table is as long as the sequence."""
    if name == "llama3":
        from torchtitan.models.llama3 import llama3_configs

        config = llama3_configs["debugmodel"](attn_backend="flex")
    elif name == "qwen3":
        from torchtitan.models.qwen3 import qwen3_configs

        config = qwen3_configs["debugmodel"](attn_backend="flex")
    else:
        from torchtitan.models.gpt_oss import gptoss_configs

        config = gptoss_configs["debugmodel"](moe_comm_backend="standard", attn_backend="flex")
    config.layers = config.layers[:6] if name == "llama3" else config.layers[:2]
    for layer in config.layers:
        layer.attention.rope.max_seq_len = SEQUENCE
        if getattr(layer.attention, "sliding_window_size", None):
            layer.attention.sliding_window_size = 20
    return config


def real_model(config: Any) -> Any:
    torch.manual_seed(11)
    model = config.build()
    model.init_states(buffer_device=torch.device("cpu"))
    for block in model.layers.values():
        if hasattr(block, "moe"):  # whose experts have no fp32 on a CPU
            block.moe = nn.Linear(256, 256)
    return model


def real_batch(packed: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    rows = DOCUMENTS if packed else [[SEQUENCE]] * BATCH
    return {
        "tokens": torch.randint(2048, (BATCH, SEQUENCE), generator=generator),
        "positions": torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows]),
    }


def real_weight() -> Tensor:
    return torch.randn(BATCH, SEQUENCE, 2048, generator=torch.Generator().manual_seed(1))


class Masked(Flex):
    """In the place of FlexAttention, which has no gradients on a CPU: all pairs of its own block mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, attention_masks: Any, **options: Any) -> Tensor:
        from torch.nn.attention.flex_attention import create_mask

        batch, tokens = q.shape[:2]
        allowed = create_mask(attention_masks.mask_mod, batch, 1, tokens, tokens, device="cpu")[:, 0]
        return super().forward(q, k, v, attention_masks=allowed, **options)


def real_on_one(name: str, packed: bool) -> Found:
    model, batch = real_model(real_config(name)), real_batch(packed)
    batch["attention_masks"] = model.get_attention_masks(batch["positions"])
    with torch.no_grad():
        own = model(**batch)
    for layer in model.layers.values():
        layer.attention.inner_attention = Masked()
    found = step(model, batch, real_weight())
    assert apart(found[0], own) <= 1e-5  # torchtitan's FlexAttention finds the same
    return found


def real_on_ranks(ctx: Any, name: str, packed: bool) -> Found:
    group, model = UlyssesGroup(ctx.group), real_model(real_config(name))
    apply(model, group, attention="reference")
    parts = {key: shard_sequence(x, group) for key, x in real_batch(packed).items()}
    return step(model, parts, shard_sequence(real_weight(), group))


@titan_itself
@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["llama3", "qwen3", "gpt_oss"])
def test_models_of_torchtitan(pool: Any, name: str, packed: bool) -> None:
    expected = real_on_one(name, packed)
    for ranks in (2, 4):
        compare(pool.run(ranks, real_on_ranks, name, packed), expected, 1e-5)
