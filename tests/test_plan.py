"""`ulysses-triton plan`: formulas by hand and against `cost`, what holds for all setups, measured cases."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ulysses_triton import cli, cost
from ulysses_triton.errors import OptionError
from ulysses_triton.placement import place
from ulysses_triton.planner import models, published
from ulysses_triton.planner.hardware import HOST_ADAM, Cluster, Gpu, cluster
from ulysses_triton.planner.layer import attention
from ulysses_triton.planner.memory import CONTEXT, LOGIT_TILE, longest, memory, saved_by_attention
from ulysses_triton.planner.models import PRESETS, Model, from_config
from ulysses_triton.planner.network import FatTree, Routes, Stragglers, simulate
from ulysses_triton.planner.plan import ALIKE, bottleneck_bandwidth, bottleneck_ranks, longest_sequence, plan
from ulysses_triton.planner.rows import Rows, kv_copies
from ulysses_triton.planner.setup import CHECKPOINTS, EXCHANGES, Setup
from ulysses_triton.planner.step import exposed, flops, step
from ulysses_triton.planner.walk import walk
from ulysses_triton.spec import Problem

LLAMA = PRESETS["llama-3-8b"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}
# One of everything a second and no latency; the names of its numbers are those of their units.
UNIT = Cluster(Gpu("unit", 1.0, 1.0, 1e30, 1.0, 1.0, 1.0, 1.0), 4, 4, 1.0, 1.0, 0.0, 0.0, 0.0)


# -- models


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # those that the models' own pages and checkpoints state
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3-405b", 405_853_388_800),
        ("qwen3-4b", 4_022_468_096),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-32b", 32_762_123_264),
        ("mistral-7b", 7_248_023_552),
    ],
)
def test_parameters(name, parameters):
    assert PRESETS[name].parameters == parameters


def test_the_presets_training_model_is_the_training_commands():
    from ulysses_triton import UlyssesGroup
    from ulysses_triton.training.config import TrainConfig
    from ulysses_triton.training.model import LanguageModel

    with UlyssesGroup() as group:
        model = LanguageModel(TrainConfig("", 1), group)
    assert PRESETS["ulysses-tiny"].parameters == sum(p.numel() for p in model.parameters())


def test_a_configuration_gives_the_preset(tmp_path):
    assert from_config(CONFIG, "llama-3-8b") == LLAMA
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert (
        models.find(str(tmp_path)) == models.find(str(tmp_path / "config.json")) == replace(LLAMA, name=tmp_path.name)
    )
    with_images = {"architectures": ["XForConditionalGeneration"], "text_config": CONFIG | {"architectures": None}}
    assert from_config(with_images, "llama-3-8b") == LLAMA


def test_windows_of_a_configuration():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    mixed = from_config(CONFIG | {"num_hidden_layers": 6, "sliding_window": 1024, "layer_types": kinds}, "x")
    assert (mixed.window, mixed.windowed) == (1024, 5)
    every = from_config(CONFIG | {"sliding_window": 4096}, "x")
    assert (every.window, every.windowed) == (4096, 32)
    off = from_config(CONFIG | {"sliding_window": 4096, "use_sliding_window": False}, "x")
    assert (off.window, off.windowed) == (None, 0)
    assert flops(mixed, 8192) < flops(replace(mixed, window=None, windowed=0), 8192)


@pytest.mark.parametrize("kind", ["MixtralConfig", "Qwen3MoeConfig", "Qwen2MoeConfig"])
def test_experts_of_a_configuration_have_the_weights_of_transformers(kind):
    """Whole, and those of a token: the experts that it goes to, which is all if there are as many as it is sent to."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 16, "intermediate_size": 32, "vocab_size": 100}  # fmt: skip
    sizes |= {"intermediate_size": 96, "moe_intermediate_size": 32} if kind != "MixtralConfig" else {}
    sizes |= {"shared_expert_intermediate_size": 48} if kind == "Qwen2MoeConfig" else {}

    def both(experts: int, chosen: int) -> tuple[Model, int]:
        counts = {"num_local_experts": experts, "num_experts": experts, "num_experts_per_tok": chosen}
        config = getattr(transformers, kind)(**sizes, **counts)
        with torch.device("meta"):
            theirs = transformers.AutoModelForCausalLM.from_config(config)
        gates = sum(p.numel() for name, p in theirs.named_parameters() if "shared_expert_gate" in name)
        return from_config(config.to_dict(), "x"), sum(p.numel() for p in theirs.parameters()) - gates

    model, whole = both(8, 2)
    assert model.parameters == whole
    of_a_token = both(2, 2)[1] + 3 * 64 * 6  # and the router's weights of the six others
    assert whole - 3 * 3 * model.hidden * model.idle == of_a_token
    few = replace(model, idle=0)
    assert few.parameters == of_a_token and few.layer_products == model.layer_products
    assert flops(few, 4096) == flops(model, 4096)


def test_sizes_of_presets_with_experts():
    """As their makers say: 46.7 and 12.9 billion; 30.5 and 3.3."""
    for name, whole, active in (("mixtral-8x7b", 46.7e9, 12.9e9), ("qwen3-30b-a3b", 30.5e9, 3.3e9)):
        assert PRESETS[name].parameters == pytest.approx(whole, rel=2e-3)
        assert replace(PRESETS[name], idle=0).parameters == pytest.approx(active, rel=2e-2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM, no decoder-only"),
        ({"is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]}, "no decoder-only"),
        ({"num_local_experts": 8}, "has experts"),
        ({"num_experts": 16, "num_experts_per_tok": 2, "model_type": "jamba"}, "num_experts = 16.*those of mixtral"),
        (EXPERTS | {"num_experts_per_tok": None}, "lacks num_experts_per_tok"),
        (EXPERTS | {"num_experts_per_tok": 9}, "to 9 of 8 experts; num_experts_per_tok is at most num_experts"),
        (EXPERTS | {"mlp_only_layers": [0]}, r"not in others \(mlp_only_layers = \[0\]"),
        (EXPERTS | {"decoder_sparse_step": 2}, r"decoder_sparse_step = 2"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"num_attention_heads": 30}, "30 query heads cannot share 8"),
        ({"layer_types": ["linear_attention"] * 32}, "linear_attention"),
        ({"num_attention_heads": 0}, "has 0 for num_attention_heads"),
        ({"hidden_size": "4096"}, "has '4096' for hidden_size"),
        ({"intermediate_size": -1}, "intermediate is -1"),
    ],
)
def test_configurations_of_what_has_no_plan(change, says):
    with pytest.raises(OptionError, match=says):
        from_config(CONFIG | change, "x")


def test_flops_by_hand():
    model = Model("x", layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, intermediate=16, vocabulary=10)
    weights = 8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 16  # q, k, v; output; gate, up, down
    assert model.layer_products == weights and model.layer_parameters == weights + 16
    forward = 2 * 2 * 5 * weights + 2 * 4 * (5 * 6 / 2) * 8  # 5 tokens; 15 pairs, products with k and v, 8 channels
    assert flops(model, 5) == 3 * forward + 6 * 5 * 80
    assert flops(model, 5, whole_mask=True) - flops(model, 5) == 3 * 2 * 4 * 10 * 8
    assert flops(model, 5, recomputed=True) == 4 * forward + 6 * 5 * 80


# -- memory


def test_memory_of_zero_3_by_hand():
    setup = Setup(131072, 8, checkpoint="full", tiled_logits=False)
    terms = memory(LLAMA, setup, cluster("h100", 8))
    n, tokens = LLAMA.parameters, 131072 // 8
    assert terms.backward["weights"] == terms.backward["gradients"] == n * 2 / 8
    assert terms.backward["optimiser"] == n * 12 / 8
    assert terms.backward["checkpoints: inputs of the layers"] == 32 * tokens * 4096 * 2
    saved = 4 * tokens * 4096 * 2 + tokens * (32 + 16) * 128 * 2 + tokens * 4096 * 2 + 4 * tokens * 32
    assert terms.backward["activations of one layer"] == saved + 4 * tokens * 14336 * 2
    assert terms.backward["exchange buffers"] == tokens * (4096 + 32 * 2) * 2 + 2 * tokens * 48 * 128 * 2
    assert terms.loss["logits"] == tokens * 128256 * 10
    assert terms.loss["the head, gathered, and its gradient"] == 128256 * 4096 * 4
    assert terms.backward["allowance: CUDA and NCCL"] == CONTEXT
    assert terms.peak == max(sum(terms.loss.values()), sum(terms.backward.values()))


def test_what_attention_saves_is_what_a_run_of_it_saved():
    """`saved_bytes` of a record in bench/results: 2,048 tokens on 4 ranks, 8 query and 8 kv heads of 64, fp32."""
    model = Model("x", 1, 512, 8, 8, 64, 2048, 256)
    assert saved_by_attention(model, Setup(2048, 4, item=4)) == 4_210_688


@pytest.mark.parametrize(("zero", "bytes_each"), [(0, 16), (1, 4 + 12 / 8), (2, 2 + 14 / 8), (3, 16 / 8)])
def test_states_by_stage(zero, bytes_each):
    terms = memory(LLAMA, Setup(8192, 4, 2, zero=zero), cluster("h100", 8)).backward
    assert sum(terms[name] for name in ("weights", "gradients", "optimiser")) == LLAMA.parameters * bytes_each


def test_what_options_take_away():
    base, gpus = Setup(1 << 20, 8, tiled_logits=False), cluster("h100", 8)
    terms = memory(LLAMA, base, gpus)

    def of(**changes: object):
        return memory(LLAMA, replace(base, **changes), gpus)

    assert of(tiled_logits=True).loss["logits"] == LOGIT_TILE * 128256 * 10
    tiled = of(tiled_mlp=True)
    assert tiled.backward["gradients in the MLP"] == 3 * 4096 * 14336 * 2
    offload = of(checkpoint="offload")
    assert offload.host["checkpoints"] == 8 * terms.backward["checkpoints: inputs of the layers"]
    assert offload.backward["checkpoints on their way"] == terms.backward["checkpoints: inputs of the layers"] / 16
    assert of(offload_optimizer=True).host["optimiser and gradients"] == LLAMA.parameters * 14
    every = of(checkpoint="none").backward["activations of all layers"]
    assert every == 32 * terms.backward["activations of one layer"]
    assert of(chunks=4).backward["exchange buffers"] < terms.backward["exchange buffers"]
    one_sided = of(exchange="symm").backward["exchange buffers"]
    assert one_sided < terms.backward["exchange buffers"]
    shared = replace(base, sequence_ranks=16)  # each kv head on two ranks: received rows are wider than those sent
    kept = [
        memory(LLAMA, replace(shared, recompute_exchange=x), gpus).backward["activations of one layer"] for x in (0, 1)
    ]
    assert kept[0] - kept[1] == shared.tokens * 2 * 8 * 128 * 2


setups = st.builds(
    Setup, st.integers(10_000, 10_000_000), st.integers(1, 64), st.integers(1, 64), chunks=st.sampled_from([1, 2, 4]),
    exchange=st.sampled_from(EXCHANGES), zero=st.integers(0, 3), checkpoint=st.sampled_from(CHECKPOINTS),
    offload_optimizer=st.booleans(), tiled_logits=st.booleans(), tiled_mlp=st.booleans(),
    recompute_exchange=st.booleans(), skips_masked=st.booleans(),
).filter(lambda setup: not setup.one_sided or setup.sequence_ranks <= 8)  # fmt: skip
presets = st.sampled_from(sorted(PRESETS)).map(PRESETS.__getitem__)


@given(presets, setups, st.integers(1, 1_000_000))
def test_more_tokens_take_more_of_everything(model, setup, more):
    gpus, longer = cluster("h100", setup.gpus), replace(setup, seq=setup.seq + more)
    assert memory(model, setup, gpus).peak <= memory(model, longer, gpus).peak
    assert step(model, setup, gpus).seconds <= step(model, longer, gpus).seconds


@given(presets, setups)
def test_more_rows_shard_more_and_keep_less(model, setup):
    gpus, wider = cluster("h100", setup.gpus), replace(setup, rows=2 * setup.rows)
    assert memory(model, wider, gpus).peak <= memory(model, setup, gpus).peak


@given(presets, setups, st.floats(1.1, 100))
def test_faster_links_and_gpus_never_take_longer(model, setup, faster):
    gpus = cluster("h100", setup.gpus)
    now = step(model, setup, gpus)
    links = replace(gpus, inside=gpus.inside * faster, between=gpus.between * faster)
    assert step(model, setup, links).seconds <= now.seconds * (1 + 1e-12)
    stronger = replace(gpus, gpu=replace(gpus.gpu, matmul=gpus.gpu.matmul * faster))
    assert step(model, setup, stronger).seconds <= now.seconds * (1 + 1e-12)
    assert all(value >= 0 for value in now.phases.values()) and 0 < now.mfu < 1
    assert now.exposed <= now.exchange * (1 + 1e-9)


@given(presets, setups)
def test_the_longest_sequence_fits_and_one_more_token_a_rank_does_not(model, setup):
    gpus = cluster("h200", setup.gpus)
    limit = longest(model, setup, gpus)
    longer = replace(setup, seq=limit + setup.sequence_ranks)
    assert not memory(model, longer, gpus).fits(gpus)
    if limit:
        assert memory(model, replace(setup, seq=limit), gpus).fits(gpus)


# -- time


def problem(model: Model, setup: Setup) -> Problem:
    lens = (setup.tokens,) * setup.sequence_ranks
    return Problem(
        1, lens, lens, model.heads, model.kv_heads, model.head_dim, model.head_dim, "bfloat16", "cuda", True, 0.1,
        attention="triton", grad=True, chunks=setup.chunks, recompute=setup.recompute_exchange,
    )  # fmt: skip


@pytest.mark.parametrize("kv_heads", [1, 4, 64])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_layer_is_that_of_the_cost_model(ranks, one_sided, kv_heads, again):
    """Its timeline, on ranks of one node. Left out: chunks that share a kv head send it with the first of them, and
    rows with deltas are padded to 16 elements."""
    model = Model("x", 1, 8192, 64, kv_heads, 128, 8192, 1000)
    gpus = cluster("h100", ranks)
    for chunks in (1, 2):
        setup = Setup(
            4096 * ranks, ranks, chunks=chunks, exchange="symm" if one_sided else "nccl", recompute_exchange=again
        )
        events = cost.timeline(problem(model, setup), cost.MACHINES["h100"], one_sided=one_sided)
        calls = [attention(model, setup, gpus, False, back) for back in (False, True)]
        exact = (chunks == 1 or kv_heads % (chunks * ranks) == 0) and 2 * 64 % (16 * chunks * ranks) == 0
        assert sum(call.computing for call in calls) == pytest.approx(events.busy(), rel=1e-9 if exact else 0.02)
        assert sum(map(exposed, calls)) == pytest.approx(events.exposed(), rel=1e-9 if exact else 0.4)
        if not one_sided:
            sent = sum(call.sent[s.name] for call in calls for s in call.steps if s.stream == "exchange")
            assert sent * ranks == pytest.approx(events.sent(), rel=1e-9 if exact else 0.05)


@pytest.mark.parametrize("heads", [(12, 4), (6, 6), (28, 4), (8, 1), (3, 3)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_kv_heads_travel_as_the_placement_says(heads, ranks):
    model = Model("x", 1, 64, *heads, 16, 64, 64)
    setup = Setup(256 * 24 * ranks, ranks)
    shares = place(replace(problem(model, setup), causal=False)).shares
    held = sum(share.kv_heads for share in shares)
    tiles = 24 * ranks * heads[0]  # queries are cut at tiles, so not always where heads are
    assert kv_copies(model, ranks) == held or (tiles % ranks and abs(kv_copies(model, ranks) - held) <= 1)


def test_exchanges_by_hand():
    gpus = replace(cluster("h100", 16), inside=100.0, between=10.0, inside_latency=1.0, between_latency=2.0)
    assert gpus.exchange(15.0, 1) == 0
    assert gpus.exchange(7.0, 8) == 7 / 100 + 7  # inside a node
    assert gpus.exchange(15.0, 16) == 8 / 10 + 7 + 16  # 7 blocks inside meanwhile, 8 over the network
    assert gpus.exchange(15.0, 16, two_hop=True) == pytest.approx(7 * 2 / 100 + 7 + 8 / 10 + 2)
    assert gpus.gather(80.0, 16) == 80 * 7 / 8 / 100 + 7 + 2  # 40 / 80 over 8 rails is less
    rows = Rows.of(Model("x", 1, 64, 4, 2, 16, 64, 64), Setup(40, 4))
    assert (rows.qkv, rows.out) == (10 * 2 * (64 + 2 * 4 * 16), 10 * 2 * 64)  # 4 ranks: each kv head on two


def test_a_step_by_hand():
    """One of everything a second: products and bytes are seconds."""
    model = Model("x", layers=3, hidden=8, heads=4, kv_heads=4, head_dim=2, intermediate=16, vocabulary=10)
    setup = Setup(4, 4, checkpoint="none", zero=0, rows=1)
    found = step(model, setup, UNIT)
    weights = 4 * 64 + 3 * 8 * 16
    assert found.phases["matrix products"] == 3 * 3 * 2 * weights  # one token; forward, and twice as much backward
    assert found.phases["attention"] == 3 * (2 + 5) * 2 * (4 * 5 / 2) * 8 / 4
    assert found.phases["elementwise"] == 3 * 3 * 2 * (10 * 8 + 5 * 16)
    assert found.phases["computed again"] == 0
    sent = (8 + 16) * 2, 8 * 2, (8 + 8) * 2, (8 + 16) * 2  # bytes of a token: q k v; o; dO and delta; dq dk dv
    assert found.exchange == found.exposed == 3 * sum(sent) * 3 / 4
    assert found.phases["head and loss"] == max(6 * 80 + 10 * 30, 2 * 80 * 2 * 3 / 4)
    assert found.phases["optimiser"] == model.parameters * (2 + 24 + 2)
    again = step(model, replace(setup, checkpoint="full"), UNIT)
    assert again.phases["computed again"] == pytest.approx(
        3 * (2 * weights + 2 * 2 * 10 * 8 / 4 + 2 * 160 + 2 * (sent[0] + sent[1]))
    )
    assert step(model, replace(setup, skips_masked=False), UNIT).phases["attention"] == 3 * 7 * 2 * 16 * 8 / 4
    host = step(model, replace(setup, offload_optimizer=True), UNIT).phases["optimiser"]
    assert host == model.parameters * 4 + model.parameters * 4 / HOST_ADAM


def test_setups_that_do_not_fit_their_cluster():
    with pytest.raises(OptionError, match="8 x 2 ranks are 16 GPUs, and the cluster has 8"):
        step(LLAMA, Setup(4096, 8, 2), cluster("h100", 8))
    with pytest.raises(OptionError, match="'symm' is for ranks of one node, and 16 share"):
        step(LLAMA, Setup(4096, 16, exchange="symm"), cluster("h100", 16))


def test_a_walk_by_hand():
    from ulysses_triton import schedule

    steps = schedule.forward(False, 1)
    seconds = {"pack": 1.0, "exchange_in": 2.0, "attend": 3.0, "exchange_out": 2.0, "unpack": 1.0}
    end, busy = walk(steps, seconds, np.array([0.0, 1.0, 0.0, 0.0]), np.array([1.0, 1.0, 1.0, 2.0]), 2)
    assert end.tolist() == [10, 10, 13, 14] and busy.tolist() == [5, 5, 5, 10]


# -- thousands of GPUs


@pytest.mark.parametrize(
    "changes",
    [{}, {"chunks": 2}, {"checkpoint": "offload"}, {"checkpoint": "none", "zero": 1, "batch": 64},
     {"exchange": "two_hop"}, {"zero": 0, "chunks": 4}, {"sequence_ranks": 8, "exchange": "symm", "rows": 64}],
)  # fmt: skip
@pytest.mark.parametrize("model", [LLAMA, replace(LLAMA, window=4096, windowed=24)])
def test_without_stragglers_the_simulation_is_the_closed_form(changes, model):
    setup = replace(Setup(1 << 17, 16, 32), **changes)
    gpus = cluster("h100", 512)
    found, closed = simulate(model, setup, gpus), step(model, setup, gpus)
    assert found.seconds == pytest.approx(closed.seconds, rel=1e-12)
    assert found.waiting <= closed.seconds


def test_links_that_ranks_share():
    """The example of the file's beginning."""
    gpus = replace(cluster("h100", 64), inside=1e6, between=50.0, inside_latency=0.0, between_latency=0.0)
    setup = Setup(1 << 20, 64)
    free = Routes(setup, gpus, FatTree(leaf=4)).exchange(63.0)
    assert free == pytest.approx(np.full(64, 56 / 50))  # 8 ranks are in the node
    assert Routes(setup, gpus, FatTree(leaf=4, oversubscription=2)).exchange(63.0) == pytest.approx(
        np.full(64, 64 / 50)
    )
    assert Routes(setup, gpus, FatTree(leaf=8, oversubscription=9)).exchange(63.0) == pytest.approx(free)  # one leaf
    pods = FatTree(leaf=2, pod=2, oversubscription=1, core_oversubscription=4)
    assert Routes(setup, gpus, pods).exchange(63.0) == pytest.approx(np.full(64, 4 * 32 / 50))


def test_thousands_of_gpus_with_stragglers():
    gpus, setup = cluster("h100", 4096), Setup(1 << 20, 64, 64, exchange="nccl", chunks=2)
    alike = simulate(LLAMA, setup, gpus)
    slower = simulate(LLAMA, setup, gpus, stragglers=Stragglers(share=1 / 4096, slow=1.5, seed=3))
    assert 1.3 * alike.seconds < slower.seconds < 1.5 * alike.seconds  # FSDP makes all wait for the slowest
    assert slower.computing == pytest.approx(alike.computing, rel=1e-3)
    jitter = [simulate(LLAMA, setup, gpus, stragglers=Stragglers(jitter=0.05, seed=n)) for n in (1, 1, 2)]
    assert jitter[0] == jitter[1] != jitter[2]
    assert all(alike.seconds < one.seconds < 1.5 * alike.seconds for one in jitter)
    narrow = simulate(LLAMA, setup, gpus, FatTree(leaf=4, pod=4, oversubscription=4, core_oversubscription=2))
    assert narrow.seconds > alike.seconds
    walked = (
        len(attention(LLAMA, setup, gpus, False, False).steps),
        len(attention(LLAMA, setup, gpus, False, True).steps),
    )
    assert alike.steps == 32 * (2 * walked[0] + walked[1])  # forward, again, and backward


# -- questions


def test_the_bottleneck_bandwidth_is_where_exchanges_take_as_long_as_attention():
    for ranks in (8, 32):
        gpus, setup = cluster("h100", ranks), Setup(1 << 17, ranks)
        speed = bottleneck_bandwidth(LLAMA, gpus, setup)
        link = "between" if ranks > 8 else "inside"
        calls = [attention(LLAMA, setup, replace(gpus, **{link: speed}), False, back) for back in (False, True)]
        attending = calls[0].seconds["attend"] + calls[1].seconds["attend_backward"]
        assert sum(call.exchanging for call in calls) == pytest.approx(attending, rel=1e-3)
        assert speed < getattr(gpus, link)
    assert bottleneck_bandwidth(LLAMA, cluster("h100", 1), Setup(4096, 1)) == 0
    slow = replace(cluster("h100", 8), inside_latency=1.0)
    assert bottleneck_bandwidth(LLAMA, slow, Setup(4096, 8)) == float("inf")


def test_the_bottleneck_ranks():
    gpus, setup = cluster("h100", 8), Setup(1 << 15, 8)
    ranks = bottleneck_ranks(LLAMA, gpus, setup)
    assert ranks is not None and 8 < ranks <= 4096
    longer = bottleneck_ranks(LLAMA, gpus, replace(setup, seq=1 << 20))
    assert longer is None or longer > ranks  # attention grows with the square
    assert bottleneck_ranks(LLAMA, replace(gpus, between=1e6, inside=1e6), setup) == 2
    # with as many tokens on each rank attention grows with the ranks and bytes do not
    assert bottleneck_ranks(LLAMA, gpus, setup, 131072) is None


def test_a_plan_fits_and_nothing_that_fits_is_faster():
    gpus, given = cluster("h100", 16), Setup(1 << 18, 1, 16)
    found = plan(LLAMA, gpus, given)
    assert all(s.memory.fits(gpus) for s in (found.best, *found.others))
    assert all(s.tokens_per_second * ALIKE <= found.best.tokens_per_second for s in found.others)
    limit, where = found.longest_of_all
    assert limit == longest_sequence(LLAMA, gpus, given)[0] >= found.longest >= found.best.setup.seq
    assert memory(LLAMA, where, gpus).fits(gpus) and where.seq == limit
    assert found.best.setup.gpus == 16
    odd = plan(PRESETS["qwen2.5-7b"], cluster("h100", 24), Setup(1 << 18, 1, 24))  # 28 heads on 24 GPUs
    assert 24 % odd.best.setup.sequence_ranks == 0
    fixed = plan(LLAMA, gpus, replace(given, rows=1, batch=4))
    assert fixed.best.setup.sequences == 4 and fixed.best.setup.rows in (1, 2, 4)


# -- published

ERRORS = {  # percent of the measured number: what they are, not what they should be
    "DeepSpeed-Ulysses: 131072 tokens, 64 A100, masked pairs skipped, TFLOP/s": 77,
    "DeepSpeed-Ulysses: 131072 tokens, 128 A100, masked pairs skipped, TFLOP/s": 77,
    "DeepSpeed-Ulysses: 131072 tokens, 256 A100, masked pairs skipped, TFLOP/s": 97,
    "DeepSpeed-Ulysses: 65536 tokens, 64 A100, masked pairs skipped, TFLOP/s": 74,
    "DeepSpeed-Ulysses: 262144 tokens, 256 A100, masked pairs skipped, TFLOP/s": 95,
    "DeepSpeed-Ulysses: 131072 tokens, 64 A100, masked pairs computed, TFLOP/s": -1,
    "DeepSpeed-Ulysses: 131072 tokens, 128 A100, masked pairs computed, TFLOP/s": 1,
    "DeepSpeed-Ulysses: 131072 tokens, 256 A100, masked pairs computed, TFLOP/s": 14,
    "DeepSpeed-Ulysses: 65536 tokens, 64 A100, masked pairs computed, TFLOP/s": 5,
    "DeepSpeed-Ulysses: 262144 tokens, 256 A100, masked pairs computed, TFLOP/s": 6,
    "ALST: 3.7M tokens, 8 H100, TFLOP/s": -1,
    "ALST: longest sequence, 1 H100, M tokens": -10,
    "ALST: longest sequence, 8 H100, M tokens": 18,
    "ALST: longest sequence, 32 H100, M tokens": -21,
    "Accelerate SP=4: 8K tokens, optimiser on the host, GB": -69,
    "Accelerate SP=4: 32K tokens, optimiser on the host, GB": -48,
    "Accelerate SP=4: 64K tokens, optimiser on the host, GB": -35,
    "Accelerate SP=4: 96K tokens, optimiser on the host, GB": -28,
    "Accelerate SP=4: 8K tokens, optimiser on the host, one GPU, GB": -68,
    "Accelerate SP=4: 8K tokens, optimiser on the GPUs, GB": -9,
    "Accelerate SP=4: 32K tokens, optimiser on the GPUs, GB": -7,
    "Accelerate SP=4: 64K tokens, optimiser on the GPUs, GB": -7,
    "Accelerate SP=4: 96K tokens, optimiser on the GPUs, GB": -6,
    "Accelerate SP=4: 8K tokens, optimiser on the GPUs, one GPU, GB": 6,
    "Accelerate SP=4: 8K tokens, tokens/s": 1009,
    "Accelerate SP=4: 32K tokens, tokens/s": 150,
    "Accelerate SP=4: 64K tokens, tokens/s": -9,
    "CPU ranks: a layer, chunks=1, 2 ranks, ms": -12,
    "CPU ranks: a layer, chunks=2, 2 ranks, ms": -11,
    "CPU ranks: a layer, chunks=4, 2 ranks, ms": -10,
    "CPU ranks: training step, 4 ranks, tokens/s": 48,
}


def test_published_cases_have_the_errors_that_the_table_states():
    found = {f"{case.group}: {case.what}, {case.unit}": round(100 * case.error) for case in published.cases()}
    assert found == ERRORS
    assert set(published.NOTES) == {case.group for case in published.cases()}


@pytest.mark.parametrize(
    ("seq", "gpus", "ms", "tflops"),
    [
        (131072, 64, 32432.13, 165.53),
        (131072, 128, 17052.51, 157.41),
        (131072, 256, 9886.7, 136.09),
        (65536, 64, 9676.76, 161.36),
        (262144, 256, 33486.5, 147.4),
    ],
)
def test_the_papers_own_flops(seq, gpus, ms, tflops):
    """DeepSpeed-Ulysses' times and TFLOP/s are of one formula, which is ours with masked pairs and recomputation."""
    counted = 8 * flops(PRESETS["gpt-7b"], seq, whole_mask=True, recomputed=True) / gpus / (ms / 1e3) / 1e12
    assert counted == pytest.approx(tflops, rel=0.003)


# -- the command


def test_the_page(capsys):
    assert cli.main(["plan", "--gpus", "16", "--simulate", "--jitter", "0.02", "--oversubscription", "2"]) == 0
    said = capsys.readouterr().out
    for word in ("a prediction", "recommended", "MFU", "simulated", "bottleneck", "optimiser", "allowance", "longest"):
        assert word in said
    assert cli.main(["plan", "--published"]) == 0
    said = capsys.readouterr().out
    assert all(group in said for group in published.NOTES) and "590.6" in said


def test_json_holds_what_the_prediction_is_made_of(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    options = ["--model", str(tmp_path), "--seq", "262144", "--gpu", "h200", "--tiled-mlp", "--simulate", "--json"]
    assert cli.main(["plan", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    model = Model(**{name: value for name, value in found["model"].items() if name != "parameters"})
    gpus = Cluster(**(found["cluster"] | {"gpu": Gpu(**found["cluster"]["gpu"])}))
    again = step(model, Setup(**found["setup"]), gpus)
    assert again.seconds == found["seconds"] and again.phases == found["phases"]
    assert again.memory.terms == found["memory"]["terms"] and asdict(model)["layers"] == 32
    assert found["simulation"]["seconds"] == pytest.approx(found["seconds"], rel=1e-12)
    assert "prediction" in found["note"] and found["bottleneck"]["bandwidth"] > 0


def test_pictures(capsys, tmp_path):
    assert cli.main(["plan", "--plots", str(tmp_path / "new"), "--jitter", "0.05"]) == 0
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["longest-by-gpus.svg", "step-by-ranks.svg", "thousands-of-gpus.svg", "waiting-by-link.svg"]
    for path in (tmp_path / "new").iterdir():
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--model nothing", "there is no model 'nothing'"),
        ("--seq 0", "seq = 0"),
        ("--gpus 0", "gpus = 0"),
        ("--seq 99999999 --gpus 1", "does not fit on 1 h100"),
        ("--zero 4", "zero = 4"),
        ("--batch 3 --gpus 8 --seq 1", "no number of data-parallel rows divides both"),
        ("--bytes 2,2", "not 3 numbers"),
        ("--stragglers 2,1", "share"),
        ("--oversubscription 0.5", "oversubscription"),
        ("--between 0", "link between"),
        ("--bytes 2,2,-1", "states = -1"),
        ("--jitter nan", "jitter nan"),
        ("--seed -1", "seed -1"),
    ],
)
def test_wrong_use(capsys, options, says):
    assert cli.main(["plan", *options.split()]) == 2
    assert says in capsys.readouterr().err


def test_pictures_without_matplotlib(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["plan", "--plots", str(tmp_path)]) == 2
    assert "ulysses-triton[plot]" in capsys.readouterr().err
