"""The command `ulysses-triton train`: its options, and what they ask for."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..errors import OptionError
from . import compare, hugging_face, launch, loop, report, run_directory, tokens
from .config import DEFAULT_STAGES, HuggingFaceConfig, ModelConfig, Stage, TrainConfig, from_json

CPU_RANKS = 4
STAGE_DEFAULTS = {"steps": 100, "length": 8192, "batch": 1}  # for a single stage, given by parts

_TRAIN_DESCRIPTION = """\
Train a small decoder-only byte-level language model (RMSNorm, RoPE, grouped-query attention, SwiGLU, QK-norm), or
with --model a causal model of transformers with random weights. Every sequence is sharded over ranks, and parameters,
gradients and optimizer state over all of them (FSDP2). Ranks are processes that this command starts (gloo on CPU, one
per GPU otherwise), or those of torchrun.

The default run takes a few minutes on 2 CPU cores. It ends with the loss on held-out windows of 8,192 bytes, beside
the text's bigram entropy: what a model reaches that knows of each byte only the one before. A model whose attention
works ends far below it; with --zero-attention the same run cannot.

--text names files and folders. Files that end in .jsonl, .json or .parquet are rows, whose text is in --column, and
all others are text. Without --tokenizer tokens are bytes: those of files one after another, those of a row with a zero
byte at its end. With it, files and rows are documents that end with its end-of-sequence token. The tokens are written
to the user's cache folder once and mapped from there.

A model of transformers (--model hf:...) is trained on the loss of its labels alone: what a mixture of experts adds to
balance its experts is left out. Its learning rate may have to be much lower than the default one.

The run directory receives config.json, metrics.csv (one line per step), checkpoints/, summary.json and loss.png.
A run that was killed goes on with --resume, on as many ranks as there are then. On several machines the run
directory must be on a file system that all of them share.
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    default, model = TrainConfig(out="", ranks=CPU_RANKS), ModelConfig()
    parser = commands.add_parser(
        "train",
        help="train a small language model over sharded sequences",
        description=_TRAIN_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_train)

    def option(name: str, help: str, default: object = None, **settings: object) -> None:
        """An option that stays None unless given: a resumed run has its own."""
        shown = help if default is None else f"{help} (default: {default})"
        parser.add_argument(name, help=shown, **settings)  # type: ignore[arg-type]

    option(
        "--text",
        "files and folders to train on (default: the Python standard library's source)",
        nargs="+",
        metavar="PATH",
    )
    option("--column", "of rows, the one that holds their text", default.column, metavar="NAME")
    option(
        "--tokenizer",
        "of transformers: a folder or a name on the Hugging Face hub (default: none, tokens are bytes)",
        metavar="NAME",
    )
    option(
        "--model",
        "a causal model of transformers: hf: and then a config.json, a folder with one, or a name on the Hugging Face "
        "hub, where only what is not on this machine is looked for (default: the built-in model)",
        metavar="hf:CONFIG",
    )
    option(
        "--set",
        "in that configuration, such as num_hidden_layers=2,hidden_size=128; may be given several times",
        action="append",
        metavar="NAME=VALUE[,...]",
    )
    option("--out", "run directory, new or empty (default: runs/<time>)", metavar="DIR")
    option("--resume", "go on with the run in this directory, from its newest complete checkpoint", metavar="DIR")
    option("--ranks", f"number of ranks (default: one per GPU; {CPU_RANKS} on CPU)", type=int, metavar="P")
    option(
        "--data-parallel",
        "share each batch between so many rows of P / N ranks; ranks of one row share each sequence",
        default.data_parallel,
        type=int,
        metavar="N",
    )
    option(
        "--device", "where ranks compute: GPUs if there are any, or as said", "auto", choices=("auto", "cpu", "cuda")
    )
    option("--threads", "CPU threads of each rank (default: cores / ranks)", type=int, metavar="N")
    option(
        "--stage",
        "so many updates on batches of so many sequences of so many tokens, over all ranks; may be given several times",
        " ".join(map(str, default.stages)),
        action="append",
        metavar="STEPSxLENGTHxBATCH",
    )
    one_stage = "of a single stage, in place of --stage"
    option("--steps", f"updates {one_stage}", STAGE_DEFAULTS["steps"], type=int, metavar="N")
    option("--sequence-length", f"tokens per sequence {one_stage}", STAGE_DEFAULTS["length"], type=int, metavar="S")
    option("--batch", f"sequences per update {one_stage}", STAGE_DEFAULTS["batch"], type=int, metavar="B")
    option(
        "--accumulate",
        "take each update's batch in so many micro-batches, to save memory; the result is the same",
        default.accumulate,
        type=int,
        metavar="N",
    )
    option("--lr", "peak learning rate of AdamW; it warms up, then falls along a cosine", default.lr, type=float)
    option("--seed", "of the initial weights and of the order of the text", default.seed, type=int)
    option(
        "--dtype", "what layers compute in; weights and optimizer stay fp32", default.dtype, choices=("fp32", "bf16")
    )
    option(
        "--checkpoint-activations",
        "keep only each block's input for backward and compute the rest again",
        action="store_const",
        const=True,
    )
    option(
        "--chunks",
        "exchange a rank's heads in so many parts, one under the attention of another",
        default.chunks,
        type=int,
        metavar="C",
    )
    option(
        "--recompute",
        "exchange: attention keeps only its inputs for backward and exchanges them again",
        choices=("exchange",),
    )
    option(
        "--tile",
        "compute MLPs and the loss for so many tokens of a rank at once, and again in backward (default: for all)",
        type=int,
        metavar="N",
    )
    option(
        "--offload",
        "checkpoint activations, in host memory from where they are fetched ahead in backward",
        action="store_const",
        const=True,
    )
    option(
        "--held-out",
        "windows of the text's end that the loss at the end is taken on; 0 for none",
        default.held_out,
        type=int,
        metavar="N",
    )
    option(
        "--checkpoint-every",
        "steps between checkpoints, the last step's apart; 0 for none",
        default.checkpoint_every,
        type=int,
        metavar="N",
    )
    option("--keep", "keep the newest N checkpoints", default.keep, type=int, metavar="N")
    built_in = "of the built-in model"
    option("--layers", f"transformer blocks {built_in}", model.layers, type=int, metavar="N")
    option("--width", f"channels of the residual stream {built_in}", model.width, type=int, metavar="N")
    option("--hidden", f"channels of SwiGLU {built_in} (default: 3 times its width)", type=int, metavar="N")
    option("--heads", f"query heads {built_in}", model.heads, type=int, metavar="N")
    option("--kv-heads", f"key/value heads {built_in}", model.kv_heads, type=int, metavar="N")
    option("--head-dim", f"channels of a head {built_in}", model.head_dim, type=int, metavar="N")
    option(
        "--window",
        f"tokens that each one attends to {built_in}, itself and those before it (default: all)",
        type=int,
        metavar="N",
    )
    option(
        "--zero-attention",
        f"ablation {built_in}: multiply attention's output by zero",
        action="store_const",
        const=True,
    )
    option(
        "--compare",
        "repeat the run on one rank with the same data, and plot both",
        action="store_true",
    )
    option("--debug", "print the traceback of an error", action="store_true")


def _train(arguments: argparse.Namespace) -> None:
    resumed = arguments.resume is not None
    config = _resumed_config(arguments) if resumed else _new_config(arguments)
    if launch.under_torchrun():
        if arguments.compare:
            raise OptionError(
                "--compare starts a rank of its own, which torchrun does not allow; run it without torchrun"
            )
        launch.run_as_torchrun_rank(loop.resume if resumed else loop.run, config)
        return
    _run(config, resumed=resumed)
    if arguments.compare:
        alone = compare.on_one_rank(config)
        print(f"{'':<16}-- the same on one rank", flush=True)
        _run(alone, resumed=Path(alone.out).exists())
        compare.summarise(config)


def _run(config: TrainConfig, *, resumed: bool) -> None:
    text, _ = loop.read(config)
    report.require_ready(config, text, resumed=resumed)
    launch.run_on_own_ranks(loop.resume if resumed else loop.run, config)


def _new_config(arguments: argparse.Namespace) -> TrainConfig:
    options = ["accumulate", "lr", "seed", "dtype", "checkpoint_activations", "checkpoint_every", "keep"]
    options += ["column", "tokenizer", "chunks", "recompute", "tile", "offload", "held_out"]
    return TrainConfig(
        out=run_directory.fresh_path() if arguments.out is None else arguments.out,
        text=tuple(arguments.text or ()),
        stages=_stages(arguments),
        model=_model(arguments),
        **_machine(arguments, launch.torchrun_ranks() if launch.under_torchrun() else None),
        **_given(arguments, *options, "data_parallel"),
    )


def _model(arguments: argparse.Namespace) -> ModelConfig | HuggingFaceConfig:
    sizes = ("layers", "width", "hidden", "heads", "kv_heads", "head_dim", "window", "zero_attention")
    given = _given(arguments, *sizes)
    if arguments.model is not None:
        if not arguments.model.startswith(hugging_face.PREFIX):
            raise OptionError(f"--model {arguments.model}: it begins with {hugging_face.PREFIX}, as in hf:config.json")
        if given:
            raise OptionError(f"{_flags(given)}: of the built-in model; with --model, use --set NAME=VALUE")
        return hugging_face.read_config(arguments.model.removeprefix(hugging_face.PREFIX), arguments.set or ())
    if arguments.set is not None:
        raise OptionError("--set changes the configuration that --model names; without it, use --layers, --width, ...")
    if arguments.width is not None:
        given.setdefault("hidden", 3 * arguments.width)
    if arguments.tokenizer is not None:
        given["vocabulary"] = tokens.Tokenizer(arguments.tokenizer).vocabulary
    return ModelConfig(**given)


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _stages(arguments: argparse.Namespace) -> tuple[Stage, ...]:
    single = {"steps": arguments.steps, "length": arguments.sequence_length, "batch": arguments.batch}
    given = {name: value for name, value in single.items() if value is not None}
    if arguments.stage is None:
        return (Stage(**(STAGE_DEFAULTS | given)),) if given else DEFAULT_STAGES
    if given:
        raise OptionError("--steps, --sequence-length and --batch describe a single stage; give them or --stage")
    return tuple(map(Stage.parse, arguments.stage))


def _resumed_config(arguments: argparse.Namespace) -> TrainConfig:
    """The options that the run was started with, on the ranks of now."""
    changeable = {"resume", "ranks", "data_parallel", "device", "threads", "keep", "compare", "debug", "command"}
    fixed = [name for name, value in vars(arguments).items() if name not in changeable and value is not None]
    if fixed:
        raise OptionError(
            f"{_flags(fixed)}: a resumed run keeps the options it was started with; leave them out with --resume"
        )
    before = from_json(run_directory.read_description(arguments.resume))
    ranks = launch.torchrun_ranks() if launch.under_torchrun() else before.ranks
    return dataclasses.replace(
        before, out=arguments.resume, **_machine(arguments, ranks), **_given(arguments, "data_parallel", "keep")
    )


def _machine(arguments: argparse.Namespace, ranks: int | None) -> dict[str, Any]:
    """Ranks, threads and device: as given, or as fits this machine. `ranks` where neither --ranks is given."""
    device = arguments.device or "auto"
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if device == "cuda" and not gpus:
        raise OptionError("--device cuda, but PyTorch finds no GPU here")
    ranks = arguments.ranks if arguments.ranks is not None else ranks if ranks is not None else gpus or CPU_RANKS
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) if launch.under_torchrun() else ranks
    if gpus and local_ranks > gpus:
        raise OptionError(
            f"{local_ranks} ranks need a GPU each and there are {gpus}; use --ranks {gpus} or --device cpu"
        )
    threads = arguments.threads
    return {
        "ranks": ranks,
        "threads": launch.cores_per_rank(max(1, local_ranks)) if threads is None else threads,
        "device": "cuda" if gpus else "cpu",
    }


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}
