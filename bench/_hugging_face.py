"""One rank of `bench.hugging_face`: tiny transformers models, and what they give over shards by each contestant."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_triton import UlyssesGroup, shard_lens, shard_sequence
from ulysses_triton.integrations.transformers import enable

from ._contestants import contestants
from ._limits import NEVER
from ._peers import variables

WINDOW = 6
VOCABULARY = 50
KINDS = {  # by model: the name in transformers, the head, and options
    "Llama": ("Llama", "ForCausalLM", {}),
    "Mistral, window": ("Mistral", "ForCausalLM", {"sliding_window": WINDOW}),
    "Gemma 2": (
        "Gemma2", "ForCausalLM",
        {"sliding_window": WINDOW, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 4},
    ),
    "gpt-oss": ("GptOss", "ForCausalLM", {"sliding_window": WINDOW, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "BERT": ("Bert", "ForMaskedLM", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
}  # fmt: skip
MODULES = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "gemma2", "gpt_oss", "bert")]
DOCUMENTS = {  # by input and row: the tokens of documents one after the other, negative ones of padding; 0 for the rest
    "plain": [[0]],
    "packed": [[7, 1, 12, 0]],
    "2 packed rows": [[8, 8, 0], [3, 0]],
    "padded right": [[0, -17], [0]],
    "padded left": [[-9, 0], [0]],
}


@dataclass(frozen=True)
class Case:
    """A model, the batch that it is given, and on how many ranks."""

    model: str
    input: str = "plain"
    heads: int = 4
    kv_heads: int = 2
    tokens: int = 48
    ranks: int = 4

    def build(self) -> Any:
        """The model, with the same weights in every process; transformers chooses how it attends."""
        transformers = import_module("transformers")
        name, head, options = KINDS[self.model]
        sizes = {
            "vocab_size": VOCABULARY, "hidden_size": 8 * self.heads, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": self.heads, "max_position_embeddings": 64, "pad_token_id": 0,
            "use_cache": False,  # as for training; with a cache transformers does not see that input is packed
        }  # fmt: skip
        if self.model != "BERT":
            sizes |= {"num_key_value_heads": self.kv_heads, "head_dim": 8}
        torch.manual_seed(0)
        model = getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**sizes, **options))
        for parameter, p in model.named_parameters():
            if "norm" in parameter or "bias" in parameter or "sinks" in parameter:  # which begin as ones and zeros
                p.data += 0.1 * torch.randn_like(p)
        return model.train()

    def documents(self) -> Tensor:
        """int64 `[B, S]`, -1 for padding."""
        rows = []
        for lengths in DOCUMENTS[self.input]:
            rest = self.tokens - sum(map(abs, lengths))
            ids = [torch.full((abs(n) or rest,), -1 if n < 0 else i) for i, n in enumerate(lengths)]
            rows.append(torch.cat(ids))
        return torch.stack(rows)

    def batch(self) -> dict[str, Tensor]:
        """What the model is given of the whole sequence, as collators make it: each `[B, S]`."""
        ids = self.documents()
        random = torch.Generator().manual_seed(1)
        batch = {"input_ids": torch.randint(3, VOCABULARY, ids.shape, generator=random)}
        positions = torch.arange(self.tokens).expand(ids.shape).clone()
        if "packed" in self.input:
            for row, of_row in zip(positions, ids, strict=True):
                row -= torch.searchsorted(of_row, of_row)  # where its document begins
        if "padded" in self.input:
            batch["attention_mask"] = (ids >= 0).long()
        return batch | {"position_ids": positions}

    def weight(self) -> Tensor:
        """`[B, S, V]`: the loss is the sum of the logits times these; what padding gives is nobody's affair."""
        ids = self.documents()
        random = torch.randn(*ids.shape, VOCABULARY, generator=torch.Generator().manual_seed(2))
        return random * (ids >= 0)[..., None]


def step(model: Any, part: dict[str, Any], weight: Tensor) -> dict[str, Tensor]:
    """The logits of some tokens, and these tokens' share of the parameters' gradients by name."""
    logits = model(**part).logits
    (logits * weight).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, softcap: Any, sinks: Any) -> Tensor:
    """Attention by its definition: q `[B, S, Hq, D]`, k and v `[B, S, Hkv, D]`, pairs `[B, S, S]` -> like q."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    scores = torch.where(allowed.any(-1)[:, None, :, None], scores, 0.0)  # of padding; anything but NaN
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., : k.size(2)] @ v).transpose(1, 2)


def exact(case: Case) -> dict[str, Tensor]:
    """What `step` must give in all, of one process and in fp64, with the mask of pairs that the case says."""
    from transformers import AttentionInterface

    documents = case.documents()
    distance = torch.arange(case.tokens)[:, None] - torch.arange(case.tokens)

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: object, scaling: float, **kwargs: Any) -> Any:
        config, number = module.config, module.layer_idx
        allowed = (documents[:, :, None] == documents[:, None]) & (documents[:, None] >= 0)
        if case.model != "BERT":
            allowed = allowed & (distance >= 0)
        types = getattr(config, "layer_types", None)
        if types[number] == "sliding_attention" if types else getattr(config, "sliding_window", None):
            allowed = allowed & (distance < WINDOW)
        softcap, sinks = getattr(config, "attn_logit_softcapping", None), getattr(module, "sinks", None)
        return dense(*(x.transpose(1, 2) for x in (q, k, v)), allowed, scaling, softcap, sinks), None

    AttentionInterface.register("bench_dense", attend)  # with no mask function: transformers builds no mask
    model = case.build().double()
    model.set_attn_implementation("bench_dense")
    model.config._experts_implementation = "eager"  # the only one for fp64
    batch = case.batch()
    return step(model, {name: batch[name] for name in ("input_ids", "position_ids")}, case.weight().double())


# ---- contestants

Run = Callable[[Case], dict[str, Tensor]]  # a rank's `step`


def _ours(case: Case) -> dict[str, Tensor]:
    model = case.build()
    with UlyssesGroup() as group:
        enable(model, group)
        part: dict[str, Any] = {name: shard_sequence(x, group) for name, x in case.batch().items()}
        if case.tokens % case.ranks:
            part["ulysses_lens"] = shard_lens(case.tokens, case.ranks)
        return step(model, part, shard_sequence(case.weight(), group))


def _alst(core: str) -> Run:
    """DeepSpeed's UlyssesSPAttentionHF around an attention of transformers, and its UlyssesSPDataLoaderAdapter."""

    def run(case: Case) -> dict[str, Tensor]:
        contestants("attention", {}, ["deepspeed"])  # DeepSpeed's own process group
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter

        model = _attending(case.build(), core)
        batch = case.batch()
        rows = len(batch["input_ids"])
        parallel = UlyssesSPAttentionHF.register_with_transformers(model, core, case.ranks, micro_batch_size=rows)
        rank = parallel.get_sequence_parallel_rank()
        group = parallel.get_sequence_parallel_group()
        loader = [batch | {"labels": batch["input_ids"]}]
        part = next(UlyssesSPDataLoaderAdapter(loader, rank, group, case.ranks, "cpu"))
        del part["shift_labels"]  # for a loss that the script computes
        return step(model, part, case.weight().chunk(case.ranks, 1)[rank])

    return run


def _alone(core: str) -> Run:
    """transformers on one process: what a mistake of its own would be."""
    return lambda case: step(_attending(case.build(), core), case.batch(), case.weight())


def _attending(model: Any, core: str) -> Any:
    if core == "sdpa":
        model.set_attn_implementation(core)
        return model
    # What transformers does where the kernels of flash attention are installed, with functions of PyTorch in their
    # place: it is what calls them, and how, that is looked at here.
    from transformers import modeling_flash_attention_utils as used

    used._loaded_implementation = core
    used._flash_fn, used._flash_varlen_fn = flash_attn_func, flash_attn_varlen_func
    used._pad_fn, used._unpad_fn = used._pad_input, used._unpad_input
    used._process_flash_kwargs_fn = used._lazy_define_process_function(flash_attn_varlen_func)
    model.config._attn_implementation = core
    return model


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float | None = None, s_aux: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Stands for flash attention's function: q, k, v `[B, S, H, D]` -> `[B, S, Hq, D]`."""
    distance = torch.arange(q.size(1))[:, None] - torch.arange(k.size(1))
    left, right = (q.size(1) if n < 0 else n for n in window_size)
    allowed = (distance <= left) & (distance >= (0 if causal else -right))
    if s_aux is not None and len(s_aux) != q.size(2):  # as the kernels check it
        raise RuntimeError(f"s_aux must have shape ({q.size(2)})")
    return dense(q, k, v, allowed[None], softmax_scale or q.size(-1) ** -0.5, softcap, s_aux)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: object,
    max_seqlen_k: object, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float | None = None, s_aux: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Stands for flash attention's function of sequences one after the other: `[T, H, D]`."""
    lengths = cu_seqlens_q.diff().tolist()
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    options = (softmax_scale, causal, window_size, softcap, s_aux)
    return torch.cat([flash_attn_func(*(x[None] for x in part), *options)[0] for part in parts])


FLASH = "flash_attention_3"  # the one whose kernels know sinks
CONTESTANTS: dict[str, Run] = {
    "ours": _ours,
    "DeepSpeed ALST, sdpa": _alst("sdpa"),
    "DeepSpeed ALST, flash": _alst(FLASH),
    "one process, sdpa": _alone("sdpa"),
    "one process, flash": _alone(FLASH),
}


def tell(rank: int, port: int, name: str, case: Case, pipe: Connection, stderr: Path) -> None:
    """What a rank's process does: send None when it begins, then its arrays by name, or the error."""
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)  # where C++ says why it ends a process
    os.environ.update(variables(rank, case.ranks, port))
    torch.set_num_threads(1)
    import_module("transformers")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=case.ranks, timeout=NEVER)
    pipe.send(None)
    said: str | dict[str, Any]
    try:
        said = {name: x.contiguous().numpy() for name, x in CONTESTANTS[name](case).items()}
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    pipe.send(said)
    pipe.poll(None)  # not the end of this process is what the other ranks see
