"""Compile launches ahead of time for GPUs that need not be present, and report what the compiler made of them.

`_config.capture` records exactly what a launcher would launch on an architecture; `compile_launch` specialises the
recorded arguments as Triton's JIT would (16-byte aligned pointers, integers by value unless `do_not_specialize`) and
reads registers, spills, shared memory, matrix instructions and the widths of global accesses from the result. Triton
does not reject a kernel over the budget of its GPU: `Report.problems` does.

    python -m bench.aot [--targets sm_90,gfx942] [--cases bf16]

must run with TRITON_INTERPRET unset, since Triton decides that when kernels are decorated.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from ulysses_triton.kernels import _config
from ulysses_triton.kernels._config import Launch
from ulysses_triton.kernels._views import HeadMap, Options, ORows, QKVRows, Span, Transform
from ulysses_triton.kernels.attend_backward import attend_backward
from ulysses_triton.kernels.attend_forward import attend_forward
from ulysses_triton.kernels.pack import pack, pack_grad
from ulysses_triton.kernels.unpack import unpack, unpack_grad

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes per block
TENSOR_MEMORY_COLUMNS = 512  # sm_100
MMA = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}  # of 16-bit operands

Case = tuple[str, Callable[[], None]]


@dataclass(frozen=True)
class Report:
    """What one kernel compiled to."""

    kernel: str
    target: str
    registers: int  # per thread
    spill_stores: int  # instructions in the program text; on AMD the number of spilled vector registers
    spill_loads: int
    shared: int  # bytes per block
    tensor_memory: int  # columns, sm_100 only
    mma: frozenset[str]  # kinds of matrix instructions
    accesses: dict[str, int]  # global loads and stores by instruction and width, e.g. `ld.global.v4.b32`

    @property
    def scalar(self) -> dict[str, int]:
        """The accesses of 16 or 32 bits per thread that are not vectors."""
        return {name: n for name, n in self.accesses.items() if _is_scalar(name)}

    @property
    def narrow(self) -> dict[str, int]:
        """The accesses of at most 16 bits per thread."""
        return {name: n for name, n in self.accesses.items() if _is_narrow(name)}

    def problems(self) -> list[str]:
        """Why this kernel could not be launched."""
        found = []
        if self.shared > SHARED_LIMIT[self.target]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMIT[self.target]} are there")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"{self.tensor_memory} columns of tensor memory, {TENSOR_MEMORY_COLUMNS} are there")
        return found


def capture(target: str, call: Callable[[], None]) -> list[Launch]:
    """The launches that `call` makes on `target`."""
    with _config.capture(target) as launches:
        call()
    return launches


def specialise(launch: Launch, target: str) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton's JIT would compile for the launch: two launches with equal results share one binary."""
    assert not _config.INTERPRET, "unset TRITON_INTERPRET: interpreted kernels cannot be compiled"
    backend = make_backend(TARGETS[target])
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**launch.args)
    packed = kernel._pack_args(backend, dict(launch.options), bound, specialization, None)
    options, signature, constexprs, attrs = packed
    return ASTSource(kernel, signature, constexprs, attrs), options.__dict__


def compile_launch(launch: Launch, target: str) -> Report:
    """Compile a recorded launch for one of `TARGETS`."""
    source, options = specialise(launch, target)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    text = compiled.asm["amdgcn" if target.startswith("gfx") else "ptx"]
    resources = _amd_resources(text) if target.startswith("gfx") else _nvidia_resources(compiled.asm["cubin"])
    return Report(
        kernel=launch.kernel.__name__,
        target=target,
        **resources,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        mma=frozenset(re.findall(r"mma\.sync|wgmma(?=\.mma_async)|tcgen05\.mma|v_mfma", text)),
        accesses=dict(sorted(Counter(_accesses(text)).items())),
    )


def _nvidia_resources(cubin: bytes) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
        code = subprocess.run([tools / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    (registers,) = set(re.findall(r"REG:(\d+)", usage.stdout + usage.stderr))
    return {
        "registers": int(registers),
        "spill_stores": len(re.findall(r"\bSTL\b", code)),
        "spill_loads": len(re.findall(r"\bLDL\b", code)),
    }


def _amd_resources(text: str) -> dict[str, int]:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    return {
        "registers": field("vgpr_count"),
        "spill_stores": field("vgpr_spill_count"),
        "spill_loads": len(re.findall(r"\bscratch_load", text)),
    }


def _accesses(text: str) -> Iterator[str]:
    """Every global load and store in PTX or amdgcn, named by instruction and width."""
    for name in re.findall(r"\b(?:ld|st)\.[\w.:]*global[\w.:]*", text):
        parts = [part for part in name.split(".") if re.fullmatch(r"ld|st|global|v[248]|[busf]\d+", part)]
        yield ".".join(parts)
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]*\s+\[[^]]*\],\s*\[[^]]*\],\s*(\w+)", text):
        yield f"cp.async.{int(size, 0)}"
    yield from re.findall(r"\b(?:global|buffer)_(?:load|store)_\w+", text)


def _is_scalar(name: str) -> bool:
    if name.startswith("cp.async."):
        return int(name.split(".")[-1]) <= 4
    if name.startswith(("ld", "st")):
        return ".v" not in name and int(re.findall(r"\d+$", name)[0]) <= 32
    return re.search(r"x[234]|_b(64|96|128)", name) is None


def _is_narrow(name: str) -> bool:
    if name.startswith(("ld", "st")):
        return ".v" not in name and int(re.findall(r"\d+$", name)[0]) <= 16
    return re.search(r"_(u|s)?(byte|short)|_(u|i|b)(8|16)|d16", name) is not None


def attention_case(
    dtype: torch.dtype = torch.bfloat16, *, D: int = 128, Dv: int | None = None, causal: bool = True, S: int = 512,
    hq: int = 4, hkv: int = 2, lse: bool = True, partial: bool = False, padding: int = 16,
    window: tuple[int, int] | None = None, softcap: float | None = None,
) -> tuple[Callable[[], None], Callable[[], None]]:  # fmt: skip
    """Forward and backward of one attention over packed rows, as callables; `partial` asks for dk and dv in fp32."""
    Dv = Dv or D
    options = Options(D**-0.5, causal, HeadMap(hq // hkv, 0), window, softcap)

    def packed(heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        each = (dim + 7) // 8 * 8  # as heads lie in the rows of a group
        rows = torch.empty(S, 1, heads * each + padding, dtype=dtype)
        return rows[..., : heads * each].unflatten(-1, (heads, each))[..., :dim]

    q, k, v, o = packed(hq, D, dtype), packed(hkv, D, dtype), packed(hkv, Dv, dtype), packed(hq, Dv, dtype)
    sum_dtype = torch.float32 if partial else dtype
    dk, dv = packed(hkv, D, sum_dtype), packed(hkv, Dv, sum_dtype)
    stat, delta = torch.empty(hq, 1, S), packed(hq, 1, torch.float32)[..., 0]

    def forward() -> None:
        attend_forward(q, k, v, [Span(0, (o, None))], stat if lse else None, options)

    def backward() -> None:
        attend_backward(q, k, v, o, stat, delta, [Span(0, (q,))], [Span(0, (dk, dv))], options)

    return forward, backward


def movement_case(
    dtype: torch.dtype = torch.bfloat16, *, D: int = 128, rope_dim: int = 0, interleaved: bool = False,
    wide: bool = False, norm: bool = False, partial: bool = True, L: int = 512,
) -> dict[str, Callable[[], None]]:  # fmt: skip
    """The four layout kernels: a fused projection's 8 query and 2 kv heads on 2 ranks; `partial`: fp32 dk and dv."""
    Hq, Hkv = 8, 2
    q, k, v = torch.empty(1, L, Hq + 2 * Hkv, D, dtype=dtype).split([Hq, Hkv, Hkv], 2)
    cos = torch.empty(1, L, rope_dim if wide else rope_dim // 2) if rope_dim else None
    weight = torch.empty(D, dtype=dtype) if norm else None
    transform = Transform(cos, cos, rope_dim, interleaved, weight, weight)
    o, lse = torch.empty(1, L, Hq, D, dtype=dtype), torch.empty(1, L, Hq)
    rows, gradients, o_rows = [], [], []
    for rank in range(2):
        r_q, r_k, r_v = torch.empty(L, 1, 6, D, dtype=dtype).split([4, 1, 1], 2)
        rows.append(QKVRows(r_q, r_k, r_v, 4 * rank, rank))
        sums = torch.empty(2, L, 1, Hkv, D, dtype=torch.float32 if partial else dtype)
        gradients.append(QKVRows(r_q, sums[0], sums[1], 4 * rank, 0))
        o_rows.append(ORows(torch.empty(L, 1, 4, D, dtype=dtype), torch.empty(L, 1, 4), 4 * rank))

    def unpack_gradients() -> None:
        unpack_grad(gradients, q, k, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), transform)

    return {
        "pack": lambda: pack(q, k, v, rows, transform),
        "unpack_grad": unpack_gradients,
        "pack_grad": lambda: pack_grad(o, o, lse, o_rows),
        "unpack": lambda: unpack(o_rows, o, lse),
    }


def cases() -> Iterator[Case]:
    """Every launch that the table shows."""
    for label, options in {
        "bf16 D=128 causal": {},
        "bf16 D=128 dense": {"causal": False},
        "bf16 D=128 window": {"window": (128, 0)},
        "bf16 D=128 causal softcap": {"softcap": 50.0},
        "bf16 D=128 window softcap": {"window": (128, 0), "softcap": 50.0},
        "bf16 D=64 causal": {"D": 64},
        "bf16 D=192/128 causal": {"D": 192, "Dv": 128},
        "bf16 D=256 causal": {"D": 256},
        "fp32 D=128 causal": {"dtype": torch.float32},
        "fp32 D=256 causal": {"dtype": torch.float32, "D": 256},
    }.items():
        forward, backward = attention_case(**options)
        yield f"{label} forward", forward
        yield f"{label} backward", backward
    for D in (64, 96, 128, 256):
        for kernel, call in movement_case(D=D).items():
            yield f"bf16 D={D} {kernel}", call
        for label, transform in {
            "half": {"rope_dim": D, "norm": True},
            "inter": {"rope_dim": D, "norm": True, "interleaved": True},
            "half part": {"rope_dim": D // 2, "wide": True},
            "inter part": {"rope_dim": D // 2, "wide": True, "interleaved": True},
        }.items():
            calls = movement_case(D=D, **transform)
            for kernel in ("pack", "unpack_grad"):
                yield f"bf16 D={D} {kernel} {label}", calls[kernel]


def main() -> None:
    assert not _config.INTERPRET, "unset TRITON_INTERPRET: interpreted kernels cannot be compiled"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    args = parser.parse_args()
    notes = "mma; scalar accesses; problems"
    print(f"{'case':32} {'kernel':24} {'target':8} {'regs':>4} {'spills':>9} {'shared':>7}  {notes}")
    for name, call in cases():
        if args.cases not in name:
            continue
        for target in args.targets.split(","):
            for launch in capture(target, call):
                r = compile_launch(launch, target)
                spills = f"{r.spill_stores}/{r.spill_loads}"
                scalar = ", ".join(f"{n} x{c}" for n, c in r.scalar.items()) or "-"
                notes = "; ".join([",".join(sorted(r.mma)) or "no mma", scalar, *r.problems()])
                numbers = f"{r.registers:4} {spills:>9} {r.shared:7}"
                print(f"{name:32} {r.kernel:24} {target:8} {numbers}  {notes}", flush=True)


if __name__ == "__main__":
    main()
