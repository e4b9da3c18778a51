"""One rank of `bench.limits`: each contestant as its users build it, and what it gives or says for given layers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_triton import UlyssesGroup
from ulysses_triton.case import Case, Inputs, Layer, draw

from ._contestants import contestants
from ._peers import variables

NAMES = ("out", "dq", "dk", "dv")
NEVER = timedelta(hours=1)  # the command's own deadline finds what hangs

Run = Callable[[Inputs], Sequence[Tensor]]  # the whole sequence's inputs to this rank's out, dq, dk, dv, [1, L, H, D]


def _ours(cases: Sequence[Case]) -> list[Run]:
    group = UlyssesGroup()

    def run(case: Case) -> Run:
        def results(inputs: Inputs) -> Sequence[Tensor]:
            found = Layer(case, inputs, group).results()
            return [found[name] for name in NAMES]

        return results

    return [run(case) for case in cases]


def _peer(name: str, *, mesh: bool = False) -> Callable[[Sequence[Case]], list[Run]]:
    """A layer that `bench.peers` measures, too; it is one for all cases, as head counts are not told to it."""

    def runs(cases: Sequence[Case]) -> list[Run]:
        (peer,) = contestants("attention", {}, [name])
        if mesh:  # as deepspeed.initialize(mesh_param=...) does: there DeepSpeed looks up which rank this is
            import deepspeed.comm
            from deepspeed.utils import groups

            names = ("data_parallel", "sequence_parallel")
            groups.mesh_device = deepspeed.comm.initialize_mesh_device((1, dist.get_world_size()), names)

        def run(case: Case) -> Run:
            def results(inputs: Inputs) -> Sequence[Tensor]:
                *leaves, dout = peer.given(_shards(case, inputs))
                found = peer.run([x.requires_grad_() for x in leaves], dout)
                return [x.transpose(0, 1) if peer.tokens_first else x for x in found]

            return results

        return [run(case) for case in cases]

    return runs


def _alst(cases: Sequence[Case]) -> list[Run]:
    """DeepSpeed's `UlyssesSPAttentionHF`, registered for a model of transformers and called as its attention does."""
    contestants("attention", {}, ["deepspeed"])  # DeepSpeed's own process group
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers import LlamaConfig
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaAttention

    def run(case: Case) -> Run:
        config = LlamaConfig(
            hidden_size=case.heads * case.head_dim, num_attention_heads=case.heads, head_dim=case.head_dim,
            num_key_value_heads=case.kv_heads, num_hidden_layers=1, attn_implementation="sdpa",
        )  # fmt: skip
        UlyssesSPAttentionHF.register_with_transformers(SimpleNamespace(config=config), "sdpa", case.ranks, case.batch)
        module = LlamaAttention(config, layer_idx=0)

        def results(inputs: Inputs) -> Sequence[Tensor]:
            *shards, dout = _shards(case, inputs)
            leaves = [x.contiguous().requires_grad_() for x in shards]
            mine = case.shard(dist.get_rank())
            out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
                module, *(x.transpose(1, 2) for x in leaves), None, dropout=0.0, scaling=case.scale,
                position_ids=torch.arange(mine.start, mine.stop)[None],
            )  # fmt: skip
            out = out.unflatten(-1, (case.heads, case.head_dim))
            return out, *torch.autograd.grad(out, leaves, dout)

        return results

    return [run(case) for case in cases]


BUILDERS: dict[str, Callable[[Sequence[Case]], list[Run]]] = {
    "ours": _ours,
    "deepspeed": _peer("deepspeed", mesh=True),
    "deepspeed, group only": _peer("deepspeed"),
    "deepspeed ALST": _alst,
    "yunchang": _peer("yunchang"),
}
MODULES: dict[str, tuple[str, ...]] = {  # what each imports: slow, so done before its time counts
    "ours": (),
    "deepspeed": ("deepspeed.sequence.layer",),
    "deepspeed, group only": ("deepspeed.sequence.layer",),
    "deepspeed ALST": ("deepspeed.runtime.sequence_parallel.ulysses_sp", "transformers.models.llama.modeling_llama"),
    "yunchang": ("yunchang.ulysses.attn_layer",),
}


def _shards(case: Case, inputs: Inputs) -> list[Tensor]:
    mine = case.shard(dist.get_rank())
    return [x[:, mine].clone() for x in (inputs.q, inputs.k, inputs.v, inputs.dout)]


def tell(rank: int, port: int, name: str, cases: Sequence[Case], pipe: Connection, stderr: Path) -> None:
    """What a rank's process does: send None when it begins, then every case's results as arrays, or the error."""
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)  # where C++ says why it ends a process
    ranks = cases[0].ranks
    os.environ.update(variables(rank, ranks, port))
    torch.set_num_threads(1)
    for module in MODULES[name]:
        import_module(module)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=NEVER)
    pipe.send(None)
    said: str | list[list[Any]]
    try:
        runs = BUILDERS[name](cases)  # all before the first runs: models that live in one process
        results = [run(draw(case, torch.device("cpu"))) for case, run in zip(cases, runs, strict=True)]
        said = [[x.detach().contiguous().numpy() for x in found] for found in results]
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    pipe.send(said)
    pipe.poll(None)  # not the end of this process is what the other ranks see
