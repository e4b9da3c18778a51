"""The arguments of the ops as one value, and the problem that they state.

All ops take the same arguments in the same order; their schemas are made from `Call`. The raw projection output is
passed as `q` with `k` and `v` None, and so is the input x where the layer projects it with `weight`; `heads` and
`kv_heads` then say how to split it. Documents come as the tables that
the kernels take (`packed`), a mask as the name of its predicate, the tensors it captured and the status of its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from . import masks, projection
from .errors import DeviceError, DtypeError, OptionError, ShapeError
from .executor import Inputs
from .group import UlyssesGroup, by_name, told_to_peers
from .kernels._blocks import BLOCK
from .kernels._config import fingerprint
from .kernels._views import Documents, Dropout, Predicate, Transform
from .local import choose
from .placement import chunk_count
from .projection import Projection, split_qkv
from .spec import Problem


class Call(NamedTuple):
    """The arguments of an op, in order. In a backward op q is None where the raw inputs are not needed."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    sinks: Tensor | None
    slopes: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    out_weight: Tensor | None
    out_bias: Tensor | None
    q_documents: Tensor | None
    k_documents: Tensor | None
    blocks: Tensor | None
    seed: Tensor | None
    captured: list[Tensor]
    group: str
    heads: int
    kv_heads: int
    lens: list[int]
    kv_lens: list[int]
    causal: bool
    scale: float
    window: list[int]
    softcap: float | None
    dropout_p: float
    dropout_seed: int | None
    predicate: str
    rope_interleaved: bool
    rope_dim: int
    norm_eps: float
    attention: str
    chunks: int
    cuts: list[int]
    recompute: bool
    return_lse: bool
    grad: bool
    abi: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them in one row, as autograd saves them."""
        first: tuple[Any, ...] = self[:TENSORS]
        return (*first, *self.captured)

    @property
    def numbers(self) -> tuple[Any, ...]:
        return self[TENSORS + 1 :]

    @staticmethod
    def of(tensors: Sequence[Tensor | None], numbers: Sequence[Any]) -> Call:
        """The call with these `tensors` and `numbers`."""
        return Call._make((*tensors[:TENSORS], list(tensors[TENSORS:]), *numbers))

    @property
    def projection(self) -> Projection:
        x = None if self.weight is None else self.q
        return Projection(x, self.weight, self.bias, self.out_weight, self.out_bias)

    @property
    def fused(self) -> bool:
        return self.k is None


TENSORS = list(Call._fields).index("captured")  # that come ahead of the captured ones
_TYPES = {
    Tensor | None: "Tensor?", list[Tensor]: "Tensor[]", str: "str", int: "SymInt", int | None: "SymInt?",
    list[int]: "SymInt[]", bool: "bool", float: "float", float | None: "float?",
}  # fmt: skip
SCHEMA = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(Call).items())


def describe(group: UlyssesGroup, call: Call) -> tuple[Problem, Inputs]:
    """The problem that the arguments of a call state, and its tensors as the executor takes them.

    Raises the `UlyssesError` that names the argument that is wrong.
    """
    q, k, v = call.q, call.k, call.v
    assert q is not None
    if k is None or v is None:
        name, last = ("qkv", "(heads + 2 kv_heads) D") if call.weight is None else ("x", "E")
        if q.dim() != 3:
            raise ShapeError(f"{name} has shape {list(q.shape)}; expected [B, L, {last}]")
        projection.check(call.projection, q)
        if call.weight is not None:
            name = "the projected x"
            q = q.new_empty(1).expand(*q.shape[:2], call.weight.size(0))  # for its shape
        if call.heads < 1 or call.kv_heads < 1 or q.size(-1) % (call.heads + 2 * call.kv_heads):
            raise ShapeError(
                f"{name} has {q.size(-1)} channels, which {call.heads} query heads and 2 x {call.kv_heads} kv heads "
                "do not divide: check heads= and kv_heads="
            )
        q, k, v = split_qkv(q, call.heads, call.kv_heads)
        projection.check_output(call.projection, call.heads, v.size(3))
    _check_shapes(q, k, v)
    _check_alike(call, {"q": q, "k": k, "v": v})
    transform = _transform(call, q)
    kv_lens = call.kv_lens or (call.lens if k.size(1) == q.size(1) else [])
    if call.lens and not kv_lens and group.size > 1:
        raise ShapeError(f"q has {q.size(1)} tokens here and k has {k.size(1)}: pass kv_lens= beside lens=")
    problem = Problem(
        batch=q.size(0),
        lens=_all_lens("lens", "q", call.lens, q.size(1), group),
        kv_lens=_all_lens("kv_lens", "k", kv_lens, k.size(1), group),
        heads=q.size(2),
        kv_heads=k.size(2),
        head_dim=q.size(3),
        value_dim=v.size(3),
        dtype=str(q.dtype).removeprefix("torch."),
        device=q.device.type,
        causal=call.causal,
        scale=call.scale,
        window=(call.window[0], call.window[1]) if call.window else None,
        softcap=call.softcap,
        documents=call.q_documents is not None,
        sinks=call.sinks is not None,
        slopes=call.slopes is not None,
        dropout_p=call.dropout_p,
        predicate=call.predicate,
        captured=tuple(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in call.captured),
        blocks=() if call.blocks is None else tuple(call.blocks.shape),
        rope_dim=0 if transform is None else transform.rope_dim,
        rope_interleaved=call.rope_interleaved,
        q_norm=call.q_norm is not None,
        k_norm=call.k_norm is not None,
        norm_eps=call.norm_eps,
        attention=call.attention,
        recompute=call.recompute,
        return_lse=call.return_lse,
        grad=call.grad,
        features=None if call.weight is None else call.weight.size(1),
        bias=call.bias is not None,
        out_features=None if call.out_weight is None else call.out_weight.size(0),
        out_bias=call.out_bias is not None,
    )
    problem.check()
    _check_masks(call, problem)
    chosen = choose(problem).name
    if call.attention == "callable":
        chosen = "callable"
    problem = replace(problem, attention=chosen, tuning=fingerprint(problem.device) if chosen == "triton" else "")
    problem = replace(problem, chunks=chunk_count(problem, call.chunks), cuts=tuple(call.cuts))
    tables = call.q_documents, call.k_documents
    return problem, Inputs(
        q,
        k,
        v,
        transform,
        sinks=call.sinks,
        slopes=call.slopes,
        documents=None if tables[0] is None or tables[1] is None else Documents(tables[0], tables[1]),
        predicate=Predicate(masks.by_name(call.predicate), tuple(call.captured)) if call.predicate else None,
        blocks=call.blocks,
        projection=call.projection,
    )


def agreed(what: str, call: Call) -> tuple[UlyssesGroup, Problem, Inputs]:
    """The problem of a call that every rank of the group makes; raises on every rank when one cannot, or differs.

    A seed for dropout that was drawn, not given, is rank 0's.
    """
    group = by_name(call.group)
    with told_to_peers(group):
        problem, inputs = describe(group, call)
        if problem.attention == "reference" and inputs.predicate is not None and problem.seq and problem.kv_seq:
            masks.ask(inputs.predicate)
    given = "" if call.dropout_seed is None else f"; dropout_seed={call.dropout_seed}"
    drawn = call.dropout_seed if call.seed is None else int(call.seed)
    seed = group.agree(what, problem.signature + given, drawn if problem.dropout_p else None, device=problem.device)
    if problem.dropout_p:
        inputs = inputs._replace(dropout=Dropout(problem.dropout_p, seed))
    return group, problem, inputs


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor, letters in (("q", q, "[B, L, Hq, D]"), ("k", k, "[B, Lk, Hkv, D]"), ("v", v, "[B, Lk, Hkv, Dv]")):
        if tensor.dim() != 4:
            raise ShapeError(f"{name} has shape {list(tensor.shape)}; expected {letters}")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.size(0) == k.size(0) == v.size(0):
        raise ShapeError(f"q, k and v differ in batch size: {shapes}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ShapeError(f"k and v differ in tokens or heads: {shapes}; both are [B, Lk, Hkv, ...]")
    if q.size(3) != k.size(3):
        raise ShapeError(f"q and k differ in head dim: {shapes}")


def _check_alike(call: Call, qkv: dict[str, Tensor]) -> None:
    q = qkv["q"]
    floats = {"rope cos": call.cos, "rope sin": call.sin, "q_norm": call.q_norm, "k_norm": call.k_norm}
    floats |= {"sinks": call.sinks, "alibi_slopes": call.slopes}
    others = {f"tensor {i} captured by the mask": tensor for i, tensor in enumerate(call.captured)}
    given: dict[str, Tensor | None] = {**qkv, **floats, **others, "the block mask": call.blocks}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if name in qkv and tensor.dtype != q.dtype:
            raise DtypeError(f"q has dtype {q.dtype} and {name} has {tensor.dtype}; q, k and v must have one dtype")
        if (name in qkv or name in floats) and not tensor.dtype.is_floating_point:
            raise DtypeError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")
        if tensor.device != q.device:
            raise DeviceError(f"q is on {q.device} and {name} on {tensor.device}; all must be on one device")


def _check_masks(call: Call, problem: Problem) -> None:
    for name, tensor in (("sinks", call.sinks), ("alibi_slopes", call.slopes)):
        if tensor is not None and tensor.shape != (problem.heads,):
            raise ShapeError(
                f"{name} has shape {list(tensor.shape)}; expected one number for each query head of the model, "
                f"[{problem.heads}], on every rank"
            )
    if call.q_documents is not None and call.k_documents is not None:
        found = call.q_documents.shape, call.k_documents.shape
        expected = (5, problem.batch, problem.seq), (5, problem.batch, problem.kv_seq)
        if found != expected:
            raise ShapeError(f"the documents are those of {list(found[0][1:])} tokens, q has {list(expected[0][1:])}")
    if call.dropout_seed is not None and not 0 <= call.dropout_seed < 2**63:
        raise OptionError(f"dropout_seed = {call.dropout_seed}; it must be at least 0 and below 2^63")
    if call.blocks is not None:
        batch, heads, *tiles = call.blocks.shape
        counts = [-(-n // BLOCK) for n in (problem.seq, problem.kv_seq)]
        if batch not in (1, problem.batch) or heads not in (1, problem.heads) or tiles != counts:
            raise ShapeError(
                f"the block mask is for a batch of {batch}, {heads} heads and {tiles} blocks of {BLOCK} tokens; this "
                f"call has a batch of {problem.batch}, {problem.heads} heads, {problem.seq} queries and "
                f"{problem.kv_seq} keys: {counts} blocks"
            )


def _transform(call: Call, q: Tensor) -> Transform | None:
    batch, tokens, _, dim = q.shape
    for name, weight in (("q_norm", call.q_norm), ("k_norm", call.k_norm)):
        if weight is not None and weight.shape != (dim,):
            raise ShapeError(f"{name} has shape {list(weight.shape)}; expected [D] = [{dim}]")
    cos, sin = call.cos, call.sin
    norms = Transform(q_norm=call.q_norm, k_norm=call.k_norm, eps=call.norm_eps)
    if cos is None or sin is None:
        return None if call.q_norm is None and call.k_norm is None else norms
    if cos.shape != sin.shape or cos.dim() not in (2, 3) or cos.size(-2) != tokens:
        raise ShapeError(
            f"rope cos {list(cos.shape)} and sin {list(sin.shape)} must have one shape, [L, R/2] or [L, R] with or "
            f"without a leading B, for this rank's own L = {tokens} tokens"
        )
    if cos.dim() == 3 and cos.size(0) not in (1, batch):
        raise ShapeError(f"rope cos {list(cos.shape)} has a leading {cos.size(0)}; the batch size is {batch}")
    width = cos.size(-1)
    # Without rope_dim the whole head rotates when the width is D or D/2; a smaller width is one column per channel.
    rotated = call.rope_dim or (dim if 2 * width == dim else width)
    if rotated > dim or width not in (rotated, rotated // 2) or rotated % 2:
        raise ShapeError(
            f"rope cos has {width} columns, which fits neither R nor R/2 for R = {rotated} rotated channels of a head "
            f"dim of {dim}: pass rope_dim="
        )
    cos, sin = (cos, sin) if cos.dim() == 3 else (cos.unsqueeze(0), sin.unsqueeze(0))
    return norms._replace(cos=cos, sin=sin, rope_dim=rotated, interleaved=call.rope_interleaved)


def _all_lens(name: str, tensor: str, lens: Sequence[int], own: int, group: UlyssesGroup) -> tuple[int, ...]:
    if not lens:
        return (own,) * group.size
    if len(lens) != group.size:
        raise ShapeError(f"{name} = {list(lens)} has {len(lens)} entries; the group has {group.size} ranks")
    if lens[group.rank] != own:
        raise ShapeError(f"{name}[{group.rank}] is {lens[group.rank]}, but {tensor} has {own} tokens on this rank")
    return tuple(lens)
