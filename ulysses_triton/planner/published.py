"""Published runs, and runs of ours on CPU ranks, beside what is predicted for them.

Nothing here was tuned: no constant of the planner was calibrated on any of these cases. What a source leaves open is
taken as each group's note says, and where two readings are possible both are shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from .hardware import Cluster, cluster, with_attention
from .layer import attention
from .memory import CONTEXT, longest, memory
from .models import PRESETS, Model
from .setup import Setup
from .step import exposed, step


@dataclass(frozen=True)
class Case:
    """One number of a source, and ours for it."""

    group: str
    what: str
    unit: str
    published: float
    predict: Callable[[], float]

    @property
    def predicted(self) -> float:
        return self.predict()

    @property
    def error(self) -> float:
        """Of the published number: 0.1 if a tenth too much was predicted."""
        return self.predicted / self.published - 1


NOTES = {
    "DeepSpeed-Ulysses": """\
arXiv 2309.14509v2, tables 2 and 3: GPT-7B, dense attention, a global batch of 8, A100 of 40 GB. Its times and TFLOP/s
follow within 0.3% from Megatron's formula for 32 layers of 4096 channels and a vocabulary of 50 thousand: masked pairs
count and so does what checkpointing computes again; ours count the same. Not said, so taken: one sequence for each of 8
rows, nodes of 8 GPUs with 25 GB/s of network each, ZeRO-3, one chunk. Not said either is which kernel attended, and
whether it computed masked pairs: both are shown, at FlashAttention-2's rates.""",
    "ALST": """\
arXiv 2506.13996 and its recipe run-h100-sp8-llama-8b.yml: Llama-3.1-8B on H100, ZeRO-3, optimiser and checkpoints on
the host (1.9 TB), tiled MLP and loss, FlashAttention-2 (335 TFLOP/s forward for causal masks, 322 backward). That
kernel does not reach 590.6 TFLOP/s, so we take it that masked pairs were counted, and what checkpointing computes
again. What fits is a limit of our layer, with its buffers, against theirs; 1 and 32 GPUs are taken to train alike.""",
    "Accelerate SP=4": """\
huggingface.co/blog/ulysses-sp: Qwen3-4B on 4 H100, ZeRO-3, gradient checkpointing, no tiled loss, FlashAttention-2,
8 micro-batches a step. It says that the optimiser was on the host, but 76.4 GB on one GPU and 23.4 on four, both at 8K,
mean 14 bytes sharded for each parameter, so states on the GPU are shown, too. GB are taken as 1e9 bytes that PyTorch
allocated, without the allowance for CUDA and NCCL. 8K is 8,192 tokens. Its short steps take ten times what products,
bytes and Adam on the host do: what else the host did is not in our model.""",
    "CPU ranks": """\
This project's own traces on 2 cores. Layers: README's table, 8,192 tokens on 2 ranks, 8 heads of 64, fp32, forward and
backward, over shared memory. Training: `ulysses-triton train` at 8,192 bytes on 4 ranks, its last 25 steps, which went
at 5,950 to 6,400 tokens/s while nothing else ran. Rates are those of single kernels, measured on the same CPU.""",
}  # fmt: skip

_FA2 = {"a100": (190e12, 165e12), "h100": (335e12, 322e12)}  # FLOP/s forward and backward


def _a100(gpus: int) -> Cluster:
    return cluster("a100-40gb", gpus, between=25e9)


def _h100(gpus: int) -> Cluster:
    return with_attention(cluster("h100", gpus), *_FA2["h100"])


def _deepspeed(seq: int, gpus: int, skips: bool) -> float:
    setup = Setup(seq, gpus // 8, 8, skips_masked=skips, tiled_logits=False)
    return step(PRESETS["gpt-7b"], setup, _a100(gpus)).tflops(whole_mask=True, recomputed=True)


_ALST = Setup(3_700_000, 8, checkpoint="offload", offload_optimizer=True, tiled_mlp=True)


def _alst_tflops() -> float:
    return step(PRESETS["llama-3-8b"], _ALST, _h100(8)).tflops(whole_mask=True, recomputed=True)


def _alst_longest(gpus: int) -> float:
    nodes = replace(_h100(gpus), host_memory=1.9e12)
    return longest(PRESETS["llama-3-8b"], replace(_ALST, sequence_ranks=gpus), nodes) / 1e6


def _accelerate(seq: int, ranks: int, on_host: bool) -> Setup:
    return Setup(seq, ranks, batch=8, offload_optimizer=on_host, tiled_logits=False)


def _accelerate_memory(seq: int, ranks: int, on_host: bool) -> float:
    return (memory(PRESETS["qwen3-4b"], _accelerate(seq, ranks, on_host), _h100(ranks)).peak - CONTEXT) / 1e9


def _accelerate_tokens(seq: int) -> float:
    return step(PRESETS["qwen3-4b"], _accelerate(seq, 4, True), _h100(4)).tokens_per_second


_LAYER = Model("8 heads of 64", 1, 512, 8, 8, 64, 2048, 256)


def _cpu_layer(chunks: int) -> float:
    setup = Setup(8192, 2, chunks=chunks, exchange="symm", item=4)
    calls = [attention(_LAYER, setup, cluster("cpu", 2), False, backward) for backward in (False, True)]
    return 1e3 * sum(call.computing + exposed(call) for call in calls)


def _cpu_training() -> float:
    setup = Setup(8192, 4, exchange="symm", checkpoint="none", tiled_logits=False, item=4, grad=4)
    return step(PRESETS["ulysses-tiny"], setup, cluster("cpu", 4)).tokens_per_second


def cases() -> list[Case]:
    """All of them, group by group."""
    found = []
    tables = ((131072, 64, 165.5), (131072, 128, 157.4), (131072, 256, 136.1), (65536, 64, 161.4), (262144, 256, 147.4))
    for skips in (True, False):
        which = "masked pairs skipped" if skips else "masked pairs computed"
        for seq, gpus, tflops in tables:
            what = f"{seq} tokens, {gpus} A100, {which}"
            found.append(Case("DeepSpeed-Ulysses", what, "TFLOP/s", tflops, partial(_deepspeed, seq, gpus, skips)))
    found.append(Case("ALST", "3.7M tokens, 8 H100", "TFLOP/s", 590.6, _alst_tflops))
    for gpus, tokens in ((1, 0.5), (8, 3.7), (32, 15.0)):
        found.append(Case("ALST", f"longest sequence, {gpus} H100", "M tokens", tokens, partial(_alst_longest, gpus)))
    for on_host in (True, False):
        where = "optimiser on the host" if on_host else "optimiser on the GPUs"
        for k, ranks, gb in ((8, 4, 23.4), (32, 4, 35.0), (64, 4, 50.5), (96, 4, 66.0), (8, 1, 76.4)):
            what = f"{k}K tokens, {where}" + ", one GPU" * (ranks == 1)
            predict = partial(_accelerate_memory, k * 1024, ranks, on_host)
            found.append(Case("Accelerate SP=4", what, "GB", gb, predict))
    for k, speed in ((8, 2315), (32, 7872), (64, 13396)):
        found.append(Case("Accelerate SP=4", f"{k}K tokens", "tokens/s", speed, partial(_accelerate_tokens, k * 1024)))
    for chunks, ms in ((1, 1721.0), (2, 1697.0), (4, 1685.0)):
        found.append(Case("CPU ranks", f"a layer, chunks={chunks}, 2 ranks", "ms", ms, partial(_cpu_layer, chunks)))
    return [*found, Case("CPU ranks", "training step, 4 ranks", "tokens/s", 6100.0, _cpu_training)]


def table() -> str:
    """The page that `ulysses-triton plan --published` prints."""
    parts, group = ["Measured numbers beside predictions; no constant was calibrated on any of them."], ""
    for case in cases():
        if case.group != group:
            group = case.group
            parts += [
                "",
                f"{group}\n\n{NOTES[group]}",
                "",
                f"{'':48}{'':>10}{'measured':>11}{'predicted':>11}{'error':>8}",
            ]
        numbers = f"{case.unit:>10}{case.published:11,.1f}{case.predicted:11,.1f}{case.error:+8.0%}"
        parts.append(f"{case.what:48}{numbers}")
    return "\n".join(parts)
