"""`ulysses-triton train --model hf:...`: what ranks and memory options must not change, and what is refused.

The reference is transformers' own model with its own attention, on one process and without FSDP.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.nn import functional
from training_command import TEXT, finish, losses, read_metrics, start

import ulysses_triton
from ulysses_triton import cli
from ulysses_triton.integrations import memory
from ulysses_triton.training import checkpoint, data, hugging_face, launch, loop, offload, run_directory, tiles
from ulysses_triton.training.config import HuggingFaceConfig, ModelConfig, Stage, TrainConfig, learning_rate

STEPS, LAYERS, LENGTH = 6, 2, 257  # 129 tokens on rank 0, 128 on rank 1
SMALL = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"model_type": "llama"},
    "gemma2": SMALL | {"model_type": "gemma2", "sliding_window": 96, "query_pre_attn_scalar": 16},
    "qwen3_moe": SMALL
    | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "dropping_gpt2": {
        "model_type": "gpt2", "vocab_size": 256, "n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 300,
        "bos_token_id": 0, "eos_token_id": 0,
    },
}  # fmt: skip
BASE = TrainConfig(
    out="",
    ranks=2,
    text=(TEXT,),
    stages=(Stage(STEPS, LENGTH, 2),),
    lr=3e-3,
    checkpoint_every=0,
    held_out=3,
    model=HuggingFaceConfig("a test", MODELS["llama"]),
)
MEMORY: dict[str, dict[str, Any]] = {
    "chunks": {"chunks": 2},
    "recompute": {"recompute": "exchange"},
    "checkpointed": {"checkpoint_activations": True},
    "tiled": {"tile": 100},
    "offloaded": {"offload": True},
    "all": {"chunks": 2, "recompute": "exchange", "tile": 100, "offload": True},
}
OWNERS = {module.__name__: module for module in (tiles, memory)}  # of what goes over tiles
EXACT = ["recompute", "checkpointed", "offloaded"]
BUILT_IN = ModelConfig(width=32, head_dim=16, hidden=96)


def runs() -> dict[str, TrainConfig]:
    found = {name: {"model": HuggingFaceConfig("a test", values)} for name, values in MODELS.items()}
    found["dropping_gpt2"]["checkpoint_every"] = STEPS // 2
    found |= MEMORY
    found |= {f"built_in_{name}": {"model": BUILT_IN, **options} for name, options in MEMORY.items()}
    found |= {"built_in": {"model": BUILT_IN}, "bf16": {"dtype": "bf16"}}
    found |= {"data_parallel": {"data_parallel": 2}, "accumulated": {"accumulate": 2}}
    return {name: dataclasses.replace(BASE, **options) for name, options in found.items()}


def train_all(config: TrainConfig) -> None:
    """Every run, one after another, under `config.out`, and what it did; a task for ranks.

    A run with dropout is made to go on from the middle of a copy of itself.
    """
    offload.HostOffload.__init__.__defaults__ = (0,)  # layers are small here
    for name, its in runs().items():
        folder = Path(config.out, name)
        did: Counter[str] = Counter()
        with pytest.MonkeyPatch.context() as patch, ulysses_triton.trace() as trace:
            for owner, function in ((offload._Copy, "__init__"), *((owner, "over_tiles") for owner in OWNERS.values())):
                patch.setattr(owner, function, counted(getattr(owner, function), did, owner.__name__))
            loop.run(dataclasses.replace(its, out=str(folder)))
        did.update(f"{event.what} {event.step}" for event in trace.events)
        if dist.get_rank() == 0:
            (folder / "did.json").write_text(json.dumps(did))
    again = Path(config.out, "again")
    if dist.get_rank() == 0:
        shutil.copytree(Path(config.out, "dropping_gpt2"), again)
        shutil.rmtree(again / checkpoint.FOLDER / f"step-{STEPS:06d}")
    dist.barrier()
    loop.resume(dataclasses.replace(runs()["dropping_gpt2"], out=str(again)))


def counted(function: Any, counts: Counter[str], name: str) -> Any:
    @functools.wraps(function)
    def count(*arguments: Any, **options: Any) -> Any:
        counts[name] += 1
        return function(*arguments, **options)

    return count


def did(folder: Path, name: str) -> Counter[str]:
    return Counter(json.loads((folder / name / "did.json").read_text()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # ranks inherit the environment
        patch.setenv("ULYSSES_TRITON_CACHE", str(folder / "cache"))
        launch.run_on_own_ranks(train_all, dataclasses.replace(BASE, out=str(folder)))
        yield folder


def reference_losses(config: TrainConfig) -> list[float]:
    """Of the same steps by transformers alone: its attention, PyTorch's optimizer, one process."""
    assert isinstance(config.model, HuggingFaceConfig)
    torch.manual_seed(config.seed)
    values = config.model.values
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**values), dtype=torch.float32, attn_implementation="eager"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=loop.BETAS)
    _, split = loop.read(config)
    windows = data.TrainingWindows(split.train, LENGTH, config.seed)
    found = []
    for step in range(1, STEPS + 1):
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        inputs, labels = data.inputs_and_labels(windows.batch(step - 1, 2))
        loss = functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), loop.MAX_GRADIENT_NORM)
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_losses_are_those_of_transformers_alone(trained: Path, name: str) -> None:
    expected = reference_losses(runs()[name])
    assert expected[-1] < expected[0] - 0.3
    assert losses(trained / name).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["data_parallel", "accumulated", *MEMORY])
def test_neither_grid_nor_memory_options_change_what_is_learnt(trained: Path, name: str) -> None:
    plain, other = losses(trained / "llama"), losses(trained / name)
    assert torch.equal(plain, other) if name in EXACT else (plain - other).abs().max() <= 1e-5
    held_out = [run_directory.read_summary(trained / run)["held_out_loss"] for run in ("llama", name)]
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-5)


@pytest.mark.parametrize("name", MEMORY)
def test_memory_options_do_not_change_what_the_built_in_model_learns(trained: Path, name: str) -> None:
    plain, other = losses(trained / "built_in"), losses(trained / f"built_in_{name}")
    assert torch.equal(plain, other) if name in EXACT else (plain - other).abs().max() <= 1e-5


def test_bf16_computes_in_bf16_and_learns_as_fp32_does(trained: Path) -> None:
    assert 0 < (losses(trained / "llama") - losses(trained / "bf16")).abs().max() < 2e-2


@pytest.mark.parametrize("prefix", ["", "built_in_"])
def test_memory_options_do_what_they_say(trained: Path, prefix: str) -> None:
    plain = did(trained, prefix.rstrip("_") or "llama")
    assert plain["_Copy"] == 0
    assert did(trained, f"{prefix}offloaded")["_Copy"] > 0
    over_tiles = {name: count for name, count in did(trained, f"{prefix}tiled").items() if name in OWNERS}
    assert len(over_tiles) == (1 if prefix else 2)  # `memory` has the loss of transformers' models
    assert sum(over_tiles.values()) >= STEPS * (LAYERS + 1)
    attends = "attention attend"
    assert did(trained, f"{prefix}chunks")[attends] == 2 * plain[attends] > 0
    assert did(trained, f"{prefix}recompute").total() > plain.total()


def test_a_run_goes_on_bit_for_bit_with_dropout_too(trained: Path) -> None:
    whole, again = trained / "dropping_gpt2", trained / "again"
    assert torch.equal(losses(whole), losses(again))
    summaries = [run_directory.read_summary(run) for run in (whole, again)]
    assert summaries[0]["held_out_loss"] == summaries[1]["held_out_loss"]
    assert json.loads((again / "config.json").read_text())["resumed"][0]["after_step"] == STEPS // 2


def test_the_command_trains_a_published_model_made_small(tmp_path: Path) -> None:
    """As a user runs it: overrides, JSONL, no held-out text."""
    model = {
        "model_type": "gemma2",
        "layer_types": ["sliding_attention", "full_attention"] * 13,
        "num_hidden_layers": 26,
    }
    (tmp_path / "config.json").write_text(json.dumps(model))
    rows = [json.dumps({"story": f"{number} and {number + 1} " * 9}) for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    small = {**SMALL, "num_hidden_layers": 1, "pad_token_id": "null", "bos_token_id": "null"}
    process = start(
        "--model", f"hf:{tmp_path}", "--set", ",".join(f"{name}={value}" for name, value in small.items()),
        "--text", tmp_path / "rows.jsonl", "--column", "story", "--ranks", 2, "--threads", 1,
        "--steps", 2, "--sequence-length", 64, "--held-out", 0, "--lr", "1e-3", "--out", tmp_path / "run", tiny=False,
    )  # fmt: skip
    status, out, err = finish(process, timeout=280)
    assert status == 0, err
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    assert described["model"]["values"]["layer_types"] == ["sliding_attention"]
    assert described["held_out"] == 0 and described["text_read"]["held_out_bytes"] == 0
    assert "held-out loss" not in out
    assert "peak memory     of each rank, resident: " in out
    assert len(read_metrics(tmp_path / "run")) == 2


# Mistakes


def written(folder: Path, **values: Any) -> str:
    (folder / "config.json").write_text(json.dumps(values))
    return f"hf:{folder / 'config.json'}"


@pytest.mark.parametrize(
    ("values", "options", "said"),
    [
        ({"model_type": "t5"}, (), "is a T5Config, of which there is no causal language model"),
        ({"model_type": "nonesuch"}, (), "is of model_type 'nonesuch', which this version of transformers does not"),
        ({"hidden_size": 32}, (), "names no model_type"),
        (MODELS["llama"], ("--set", "layers=3"), "--set layers: a LlamaConfig has no such value"),
        (MODELS["llama"], ("--set", "hidden_size"), "--set 'hidden_size' is not NAME=VALUE"),
        (MODELS["llama"], ("--set", "hidden_size=many"), "transformers cannot make a model of"),
        (MODELS["llama"], ("--layers", "3"), "--layers: of the built-in model; with --model, use --set"),
        (MODELS["llama"], ("--set", "vocab_size=255"), "the model knows 255 tokens and the text has up to 256 (bytes)"),
        (MODELS["qwen3_moe"], ("--set", "output_router_logits=true"), "--set output_router_logits=false"),
        ({**SMALL, "model_type": "bert"}, (), "sees the tokens that it should foretell"),
        (
            SMALL | {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
            (),
            "is 'linear_attention'; only full_attention and sliding_attention are handled",
        ),
    ],
    ids=[
        "encoder_decoder",
        "unknown",
        "no_type",
        "name",
        "text",
        "value",
        "size",
        "vocabulary",
        "experts",
        "bert",
        "linear",
    ],
)
def test_a_model_that_cannot_be_trained_is_one_line_before_any_rank_starts(
    values: dict[str, Any], options: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(launch, "run_on_own_ranks", None)
    monkeypatch.setenv("ULYSSES_TRITON_CACHE", str(tmp_path / "cache"))
    model = written(tmp_path, **values)
    arguments = ["train", "--device", "cpu", "--ranks", "2", "--text", TEXT, "--out", str(tmp_path / "run")]
    assert cli.main([*arguments, "--model", model, *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("ulysses-triton: error: ") == 1
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for model, said in (
        ("hf:no/such", "no/such is no file or folder that can be read, nor in Hugging Face's cache, nor on its hub"),
        (f"hf:{tmp_path}", f"there is no config.json in {tmp_path}"),
        ("llama", "--model llama: it begins with hf:"),
    ):
        assert cli.main(["train", "--device", "cpu", "--model", model, "--out", str(tmp_path / "run")]) == 2
        assert said in capsys.readouterr().err


def test_options_that_are_the_built_in_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--set", "hidden_size=3"]) == 2
    assert "--set changes the configuration that --model names" in capsys.readouterr().err


def test_values_on_the_command_line_may_hold_commas(tmp_path: Path) -> None:
    written(tmp_path, **MODELS["gemma2"])
    texts = [
        'num_hidden_layers=1,layer_types=["full_attention"]',
        'rope_parameters={"rope_theta": 5, "rope_type": "default"}',
    ]
    found = hugging_face.read_config(str(tmp_path), texts).values
    assert (found["num_hidden_layers"], found["layer_types"]) == (1, ["full_attention"])
    assert found["rope_parameters"] == {"rope_theta": 5, "rope_type": "default"}
    assert found["hidden_size"] == 32
