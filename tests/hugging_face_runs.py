"""Training runs for `test_trainer`, on one process as Hugging Face does them, and on ranks that share sequences.

    python hugging_face_runs.py FOLDER [VARIANT ...]

runs these variants (all but those of DeepSpeed) and writes FOLDER/VARIANT.RANK.pt, what rank RANK saw. In a process of
its own, because accelerate keeps its state for a process, and because importing these libraries takes seconds: here all
ranks are forked after that.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import datasets
import tokenizers
import torch
import torch.distributed as dist
import transformers
import trl
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

import ulysses_triton
from ulysses_triton import count_tokens, token_mean
from ulysses_triton.integrations import trainer
from ulysses_triton.integrations.data import SequenceShards, sequence_group, share_batches
from ulysses_triton.integrations.transformers import enable

STEPS, FEW, ACCUMULATE, VOCABULARY, PAD = 20, 8, 2, 61, 0
IGNORED = -100
RANKS = 4


# ---- the model and its data


def model() -> transformers.LlamaForCausalLM:
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=PAD, bos_token_id=None, eos_token_id=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def samples(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Sequences that can be learnt, of different lengths, the first tokens of some without a label."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    found = []
    for _ in range(count):
        ids, step, prompt = [number(2, VOCABULARY)], number(1, 4), number(0, 12)
        ids += [2 + (ids[0] + step * i) % (VOCABULARY - 2) for i in range(number(6, 35))]
        found.append({"input_ids": ids, "labels": [IGNORED] * min(prompt, len(ids) - 2) + ids[prompt:]})
        found[-1]["labels"] = ([IGNORED] * prompt + ids[prompt:])[: len(ids)]
    return found


def padded(some: list[dict[str, list[int]]], side: str = "right") -> dict[str, torch.Tensor]:
    """A batch of sequences, and where it has tokens: [B, S]."""
    tokens = max(len(sample["input_ids"]) for sample in some)

    def row(values: list[int], fill: int) -> list[int]:
        filled = [fill] * (tokens - len(values))
        return values + filled if side == "right" else filled + values

    return {
        "input_ids": torch.tensor([row(sample["input_ids"], PAD) for sample in some]),
        "labels": torch.tensor([row(sample["labels"], IGNORED) for sample in some]),
        "attention_mask": torch.tensor([row([1] * len(sample["input_ids"]), 0) for sample in some]),
    }


def packed(some: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """All sequences as documents of one: [1, S]."""
    return {
        "input_ids": torch.tensor([sum((sample["input_ids"] for sample in some), [])]),
        "labels": torch.tensor([sum(([IGNORED, *sample["labels"][1:]] for sample in some), [])]),
        "position_ids": torch.cat([torch.arange(len(sample["input_ids"])) for sample in some])[None],
    }


# ---- what a run leaves behind


class Record(dict[str, Any]):
    """What a rank saw in one run; `watch` counts the calls of our op and looks at what is really sharded."""

    def watch(self, module: nn.Module) -> None:
        self["fsdp_modules"] = sum(isinstance(part, FSDPModule) for part in module.modules())
        self["dtensors"] = all(isinstance(parameter, DTensor) for parameter in module.parameters())
        meshes = {tuple(part.device_mesh.shape) for part in module.parameters() if isinstance(part, DTensor)}
        self["mesh"] = [size for mesh in meshes for size in mesh]

    def save(self, folder: Path, name: str) -> None:
        torch.save(dict(self), folder / f"{name}.{dist.get_rank() if dist.is_initialized() else 0}.pt")


class Calls:
    """Counts the calls of our op between two calls of `count`."""

    def __init__(self) -> None:
        self._trace = ulysses_triton.trace()
        self._trace.__enter__()

    def count(self) -> int:
        self._trace.__exit__(None, None, None)
        found = sum((event.what, event.step) == ("attention", "attend") for event in self._trace.events)
        self._trace.__enter__()
        return found

    def end(self) -> None:
        self._trace.__exit__(None, None, None)


# ---- the plain loop


def batches(rows: int, row: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """For every step its micro-batches, of one row: padded on the right, padded on the left, packed."""
    data = samples(STEPS * ACCUMULATE * 4, seed=1)
    for step in range(STEPS):
        micro = []
        for part in range(ACCUMULATE):
            first = (step * ACCUMULATE + part) * 4
            mine = data[first : first + 4][row * 4 // rows : (row + 1) * 4 // rows]
            make = (padded, functools.partial(padded, side="left"), packed)[(step + part) % 3]
            micro.append(make(mine))
        yield micro


def plain_loop(folder: Path, name: str, sequence_ranks: int | None) -> None:
    record, net = Record(), model()
    rows, row, shards = 1, 0, lambda batch: batch
    if sequence_ranks:
        group = sequence_group(sequence_ranks)
        rows, row = dist.get_world_size() // group.size, dist.get_rank() // group.size
        shards = SequenceShards(group)
        enable(net, group)
        for layer in net.model.layers:
            fully_shard(layer)
        fully_shard(net)
    record.watch(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses, lengths, counts, calls = [], [], [], Calls()
    record["calls"] = []
    for micro in batches(rows, row):
        micro = [dict(shards(batch)) for batch in micro]
        if not sequence_ranks:  # as Hugging Face shifts them
            micro = [
                batch | {"shift_labels": functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]}
                for batch in micro
            ]
        labels = [batch.pop("shift_labels") for batch in micro]
        total = sum(count_tokens(part) for part in labels)
        value = 0.0
        for batch, targets in zip(micro, labels, strict=True):
            batch.pop("labels")
            logits = net(**batch, use_cache=False).logits
            lengths.append(logits.size(1))
            loss_sum = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            count = int((targets != IGNORED).sum())
            counts.append(count)
            loss = token_mean(loss_sum, count, total_tokens=total)
            loss.backward()
            value += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value)
        record["calls"].append(calls.count())
    calls.end()
    record |= {"losses": losses, "lengths": lengths, "targets": counts}
    record.save(folder, name)


class Stream(IterableDataset[Any]):
    """Samples of which nobody knows how many there are."""

    def __init__(self, found: list[Any]) -> None:
        self._found = found

    def __iter__(self) -> Iterator[Any]:
        return iter(self._found)


def accelerate_loop(folder: Path, name: str, sequence_ranks: int | None, stream: bool = False) -> None:
    """The loop that README shows."""
    reading = accelerate.DataLoaderConfiguration(dispatch_batches=False if stream else None)
    accelerator, record, net = accelerate.Accelerator(cpu=True, dataloader_config=reading), Record(), model()
    rows = accelerator.num_processes // (sequence_ranks or 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    data = samples(STEPS * 4, seed=1)
    loader: Any = DataLoader(Stream(data) if stream else data, batch_size=4 // rows, collate_fn=padded)
    group = sequence_group(sequence_ranks or 1, accelerator.device.type)
    if sequence_ranks:
        enable(net, group)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    losses, calls = [], Calls()
    record["calls"] = []
    for batch in map(SequenceShards(group), share_batches(loader, group)):
        labels = batch.pop("shift_labels")
        batch.pop("labels")
        logits = net(**batch).logits
        loss_sum = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = token_mean(loss_sum, (labels != IGNORED).sum())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        record["calls"].append(calls.count())
    calls.end()
    record["losses"] = losses
    record.save(folder, name)


# ---- Hugging Face's Trainer, TRL's SFTTrainer


class FullySharded:
    """accelerate ignores FSDP on CPUs and says nothing; this switches it on as it is switched on for GPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = accelerate.utils.FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        self.accelerator.state.distributed_type = accelerate.DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = plugin
        self.is_fsdp_enabled = True


class Watching(transformers.TrainerCallback):
    """Notes what is sharded when training begins, and our op's calls in every step and in evaluations."""

    def __init__(self, record: Record) -> None:
        self._record = record
        record |= {"calls": [], "calls_in_evaluation": []}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._record.watch(kwargs["model"])
        self._calls = Calls()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._calls.count()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._record["calls"].append(self._calls.count())

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._record["calls_in_evaluation"].append(self._calls.count())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._calls.end()


def metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
    """How often the most probable token is the next one, and how many tokens were looked at."""
    guesses, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
    counted = labels != IGNORED
    return {"right": float((guesses == labels)[counted].mean()), "counted": float(counted.sum())}


def arguments(kind: type, folder: Path, batch: int, **options: Any) -> Any:
    return kind(
        output_dir=str(folder), per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch, gradient_accumulation_steps=ACCUMULATE, learning_rate=3e-3,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", logging_steps=1, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, seed=3, **{"use_cpu": True, "max_steps": STEPS} | options,
    )  # fmt: skip


def trainer_class(base: type, *, shards: bool, sharded: bool) -> type:
    bases = [trainer.SequenceParallelMixin] * shards + [FullySharded] * sharded + [base]
    return type("Trained", tuple(bases), {})


def hugging_face(
    folder: Path,
    name: str,
    *,
    sequence_ranks: int | None,
    sharded: bool = False,
    resume: str | None = None,
    short: int = 0,
    made_late: bool = False,
    saving: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    rows = dist.get_world_size() // sequence_ranks if sequence_ranks else 1
    steps = {"save_strategy": "steps", "save_steps": STEPS // 2, "eval_strategy": "steps", "eval_steps": STEPS // 2}
    args = arguments(transformers.TrainingArguments, folder / (resume or name), 4 // rows, **steps, **options)
    record = Record()
    made = trainer_class(transformers.Trainer, shards=bool(sequence_ranks), sharded=sharded)(
        None if made_late else model(), args, model_init=model if made_late else None, data_collator=padded,
        train_dataset=samples(STEPS * ACCUMULATE * 4 - short, seed=1), eval_dataset=samples(12 - short, seed=2),
        compute_metrics=metrics, callbacks=[Watching(record)],
        **({"sequence_ranks": sequence_ranks} if sequence_ranks else {}), **(saving or {}),
    )  # fmt: skip
    made.train(resume_from_checkpoint=str(folder / resume / f"checkpoint-{STEPS // 2}") if resume else None)
    keep(record, made).save(folder, name)


def zero(
    folder: Path,
    name: str,
    *,
    sequence_ranks: int,
    stage: int = 3,
    resume: str | None = None,
    saving: dict[str, Any] | None = None,
) -> None:
    """DeepSpeed's ZeRO under the Trainer, on CPUs."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles C++
    deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)
    # Arguments with `deepspeed=` would look for GPUs only; a state that is there already they take.
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.PartialState(backend="gloo")
    config = {
        "zero_optimization": {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
    }  # fmt: skip
    hugging_face(
        folder, name, sequence_ranks=sequence_ranks, resume=resume, deepspeed=config, use_cpu=False, saving=saving,
        accelerator_config={"use_configured_state": True},
    )  # fmt: skip


def keep(record: Record, made: Any) -> Record:
    """The losses of all steps and what evaluations found."""
    if made.is_deepspeed_enabled:
        parameters = list(made.model.parameters())
        record["zero_stage"] = made.deepspeed.zero_optimization_stage()
        if record["zero_stage"] == 3:
            record["whole"] = sum(parameter.ds_numel for parameter in parameters)
            record["local"] = sum(parameter.ds_tensor.numel() for parameter in parameters)
    history = made.state.log_history
    record["losses"] = [line["loss"] for line in history if "loss" in line]
    record["evaluations"] = [
        {key: value for key, value in line.items() if not key.endswith(("_second", "_runtime", "_time"))}
        for line in history if "eval_loss" in line
    ]  # fmt: skip
    measured = ("num_tokens", "mean_token_accuracy", "entropy")  # by TRL
    record["metrics"] = [{key: line[key] for key in measured if key in line} for line in history if "loss" in line]
    record["grad_norms"] = [float(line["grad_norm"]) for line in history if "grad_norm" in line]
    return record


def refusals(folder: Path, name: str) -> None:
    """What a Trainer says of what would make the loss another one."""
    mixed = trainer_class(transformers.Trainer, shards=True, sharded=False)
    record = Record()

    def refuse(what: str, net: nn.Module, *, sequence_ranks: int = 2, loss: Any = None, **options: Any) -> None:
        args = arguments(transformers.TrainingArguments, folder / name, 1, **options)
        try:
            mixed(net, args, compute_loss_func=loss, sequence_ranks=sequence_ranks)
        except ulysses_triton.OptionError as error:
            record[what] = str(error)

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    experts = transformers.MixtralConfig(
        **small, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, output_router_logits=True
    )
    refuse("smoothing", model(), label_smoothing_factor=0.1)
    refuse("loss", model(), loss=functional.cross_entropy)
    refuse("local", model(), average_tokens_across_devices=False)
    refuse("encoder", transformers.BertForMaskedLM(transformers.BertConfig(**small, num_attention_heads=2)))
    refuse("experts", transformers.MixtralForCausalLM(experts))
    refuse("ranks", model(), sequence_ranks=3)
    record.save(folder, name)


# What a packed data set looks like, TRL decides: documents that follow each other, or as many as fit best.
PACKING: dict[str, dict[str, Any]] = {
    "bfd": {"packing": True, "max_length": 64},
    "wrapped": {
        "packing": True,
        "packing_strategy": "wrapped",
        "max_length": 32,
        "gradient_checkpointing": False,
        "max_steps": FEW,
    },
    "padding_free": {"padding_free": True, "max_length": None, "gradient_checkpointing": False, "max_steps": FEW},
    "padded": {"max_length": 30, "gradient_checkpointing": False, "max_steps": FEW},
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<eos>": 1} | {f"w{number}": number for number in range(2, VOCABULARY)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def fine_tuning(
    folder: Path, name: str, *, sequence_ranks: int | None, packing: str, sharded: bool = False, **saving: Any
) -> None:
    rows = dist.get_world_size() // sequence_ranks if sequence_ranks else 1
    options = PACKING[packing]
    count = 160 if "packing" in options else 23  # which makes a short batch at the end of an epoch
    args = arguments(
        trl.SFTConfig, folder / name, 2 // rows, save_strategy="no", eval_strategy="steps",
        eval_steps=options.get("max_steps", STEPS) // 2,
        bf16=False, **options,
    )  # fmt: skip
    record = Record()
    data = [
        datasets.Dataset.from_list([{"input_ids": sample["input_ids"], "labels": sample["labels"]} for sample in some])
        for some in (samples(count, seed=1), samples(16 - count % 2, seed=2))
    ]
    made = trainer_class(trl.SFTTrainer, shards=bool(sequence_ranks), sharded=sharded)(
        model(), args, train_dataset=data[0], eval_dataset=data[1], processing_class=tokenizer(),
        callbacks=[Watching(record)], **({"sequence_ranks": sequence_ranks} if sequence_ranks else {}), **saving,
    )  # fmt: skip
    made.train()
    keep(record, made).save(folder, name)


SAVING = {"tile": 4, "offload": True}
VARIANTS: dict[str, tuple[int, Callable[..., None], dict[str, Any]]] = {
    "loop_1": (1, plain_loop, {"sequence_ranks": None}),
    "loop_4": (RANKS, plain_loop, {"sequence_ranks": 4}),
    "loop_2x2": (RANKS, plain_loop, {"sequence_ranks": 2}),
    "accelerate_1": (1, accelerate_loop, {"sequence_ranks": None}),
    "accelerate_2x2": (RANKS, accelerate_loop, {"sequence_ranks": 2}),
    "accelerate_stream_2x2": (RANKS, accelerate_loop, {"sequence_ranks": 2, "stream": True}),
    "trainer_1": (1, hugging_face, {"sequence_ranks": None}),
    "trainer_1_short": (1, hugging_face, {"sequence_ranks": None, "short": 3}),
    "trainer_4": (RANKS, hugging_face, {"sequence_ranks": 4, "short": 3}),
    "trainer_2x2": (RANKS, hugging_face, {"sequence_ranks": 2, "made_late": True}),
    "fsdp_4": (RANKS, hugging_face, {"sequence_ranks": 4, "sharded": True}),
    "fsdp_4_resumed": (RANKS, hugging_face, {"sequence_ranks": 4, "sharded": True, "resume": "fsdp_4"}),
    "fsdp_2x2": (RANKS, hugging_face, {"sequence_ranks": 2, "sharded": True}),
    "tiled_fsdp_2x2": (RANKS, hugging_face, {"sequence_ranks": 2, "sharded": True, "saving": SAVING}),
    "tiled_sft_4": (RANKS, fine_tuning, {"sequence_ranks": 4, "packing": "padded"} | SAVING),
    "refused": (RANKS, refusals, {}),
    **{f"sft_{kind}_1": (1, fine_tuning, {"sequence_ranks": None, "packing": kind}) for kind in PACKING},
    **{f"sft_{kind}_4": (RANKS, fine_tuning, {"sequence_ranks": 4, "packing": kind}) for kind in PACKING},
    "zero_4": (RANKS, zero, {"sequence_ranks": 4}),
    "zero_4_resumed": (RANKS, zero, {"sequence_ranks": 4, "resume": "zero_4"}),
    "zero_2x2": (RANKS, zero, {"sequence_ranks": 2}),
    "zero_tiled_4": (RANKS, zero, {"sequence_ranks": 4, "saving": SAVING}),
    "zero2_2x2": (RANKS, zero, {"sequence_ranks": 2, "stage": 2}),
    "sft_bfd_2x2": (RANKS, fine_tuning, {"sequence_ranks": 2, "packing": "bfd", "sharded": True}),
}


# ---- processes


def serve(folder: Path, names: list[str], rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)

    if world > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        dist.init_process_group("gloo")
    for name in names:
        _, run, options = VARIANTS[name]
        run(folder, name, **options)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes abort in an orderly end


def main(folder: Path, *names: str) -> None:
    names = names or tuple(name for name in VARIANTS if not name.startswith("zero"))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = []
    for world in (1, RANKS):
        mine = [name for name, (ranks, *_) in VARIANTS.items() if ranks == world and name in names]
        for rank in range(world if mine else 0):
            processes.append(context.Process(target=serve, args=(folder, mine, rank, world, port)))
            processes[-1].start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
