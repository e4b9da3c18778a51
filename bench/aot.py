"""Every kernel x configuration x target, compiled for GPUs that need not be present: a table of what came out.

`_config.capture` records exactly what a launcher would launch on an architecture; `compile_launch` specialises the
recorded arguments as Triton's JIT would (16-byte aligned pointers, integers by value unless `do_not_specialize`),
compiles them and reads the result. The columns:

    regs, spills     registers per thread; spill stores/loads in the program text, on AMD registers/loads
    shared, tmem     bytes of shared memory per block of those that a block may have; columns of tensor memory (sm_100)
    kind             matrix instructions; "+TMA" where rows are loaded by descriptors
    mma exp float int mem other
                     instructions of a warp per tile in the steady state, by class (`_machine_code`); "~" where the
                     kernel has no inner loop and a tile is all of it
    occ              warps that fit into an SM or CU at a time, of those it could hold (`_roofline`)
    roofline         share of the peak (or of the bandwidth, for kernels without matrix products) predicted from all of
                     that, between no overlap of pipes and perfect overlap; not measured
    waste            matrix operations beyond those asked for: heads padded to a power of two, tiles too small for the
                     warps, which then compute the same; only where instructions say their shape

The exit status is 1 if a kernel cannot be launched, does not use the matrix instructions of its architecture, accesses
rows element by element although their strides are aligned (`_accesses`), or spills more than `SPILLS` allows.

    python -m bench.aot [--targets sm_90,gfx942] [--cases bf16] [--kernels dkv] [--json FILE] [--processes 2]
    python -m bench.aot --record                # all of it, and a record of its sums in bench/results

must run with TRITON_INTERPRET unset, since Triton decides that when kernels are decorated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from ulysses_triton.kernels import _config
from ulysses_triton.kernels._config import Launch

from . import _machine_code, _record, _roofline
from ._accesses import accesses, is_narrow, is_scalar, scalar_rows
from ._aot_cases import attention_case, cases, movement_case  # noqa: F401 (of this module for its users)
from ._machine_code import Work
from ._roofline import GPU, GPUS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MMA = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}  # of 16-bit operands
PRODUCTS = {  # of a tile of scores with a matrix of D channels, and with one of Dv channels
    "attend_forward_kernel": (1, 1),
    "attend_dq_kernel": (2, 1),
    "attend_dkv_kernel": (2, 2),
}
PLAIN = "bf16 D=128 causal"  # the case, forward and backward, whose share of the roofline stands for a kernel
NAMES = {"attend_forward_kernel": "forward", "attend_dq_kernel": "dq", "attend_dkv_kernel": "dk, dv"}
SPILLS = {"attend_forward_kernel": 0, "attend_dq_kernel": 0, "attend_dkv_kernel": 8}


@dataclass(frozen=True)
class Report:
    """What one kernel compiled to."""

    kernel: str
    target: str
    wanted_mma: str | None  # kind of matrix instructions that it should use
    warps: int  # per block
    registers: int  # per thread
    spill_stores: int  # instructions in the program text; on AMD the number of spilled vector registers
    spill_loads: int
    shared: int  # bytes per block
    tensor_memory: int  # columns, sm_100 only
    mma: tuple[str, ...]  # kinds of matrix instructions
    tma: int | None  # loads by TMA in the program text; None where rows are read by pointers
    accesses: dict[str, int]  # global loads and stores by instruction and width, e.g. `ld.global.v4.b32`
    scalar_rows: dict[str, int]  # those that access rows element by element, with their lines
    instructions: dict[str, int]  # of a warp per tile, by class
    is_loop: bool  # those of the inner loop; else of all of the kernel
    blocks: int  # that fit into a processor
    share: tuple[float, float]  # of the roofline, predicted
    waste: float | None  # matrix operations done for each one asked for, less 1

    @property
    def scalar(self) -> dict[str, int]:
        """The accesses of at most 32 bits per thread."""
        return {name: n for name, n in self.accesses.items() if is_scalar(name)}

    @property
    def narrow(self) -> dict[str, int]:
        """The accesses of at most 16 bits per thread."""
        return {name: n for name, n in self.accesses.items() if is_narrow(name)}

    @property
    def occupancy(self) -> float:
        """Warps that fit into a processor at a time, of those it could hold."""
        return self.blocks * self.warps / GPUS[self.target].max_warps

    def problems(self) -> list[str]:
        """Why this kernel could not be launched. Triton does not reject a kernel over the budget of its GPU."""
        found, gpu = [], GPUS[self.target]
        if self.shared > gpu.shared_per_block:
            found.append(f"{self.shared} bytes of shared memory, {gpu.shared_per_block} are there")
        if self.tensor_memory > gpu.tensor_memory:
            found.append(f"{self.tensor_memory} columns of tensor memory, {gpu.tensor_memory} are there")
        if not self.blocks and not found:
            found.append(f"{self.warps} warps with {self.registers} registers per thread do not fit")
        return found

    def faults(self) -> list[str]:
        """What a shipped configuration may not do, for rows with aligned strides."""
        found = self.problems()
        if self.wanted_mma and self.wanted_mma not in self.mma:
            found.append(f"no {self.wanted_mma}")
        if self.tma == 0:
            found.append("no TMA for rows that descriptors describe")
        if self.spill_stores > SPILLS.get(self.kernel, self.spill_stores):
            found.append(f"{self.spill_stores} spills, {SPILLS[self.kernel]} allowed")
        return found + [f"scalar {name} x{n}" for name, n in self.scalar_rows.items()]


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
    amd, gpu, warps = target.startswith("gfx"), GPUS[target], compiled.metadata.num_warps
    text = compiled.asm["amdgcn" if amd else "ptx"]
    code, resources = (text, _amd_resources(text)) if amd else _nvidia_resources(compiled.asm["cubin"])
    shared, tensor_memory = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", 0)
    fit = {"registers": resources["registers"], "shared": shared, "tensor_memory": tensor_memory}
    work = _machine_code.work(code)
    share, waste = _predict(launch, gpu, work, warps)
    return Report(
        kernel=launch.kernel.__name__,
        target=target,
        wanted_mma=_wanted_mma(launch, target),
        warps=warps,
        **resources,
        shared=shared,
        tensor_memory=tensor_memory,
        mma=tuple(sorted(set(re.findall(r"mma\.sync|wgmma(?=\.mma_async)|tcgen05\.mma|v_mfma", text)))),
        tma=len(re.findall(r"\bUTMALDG\b", code)) if is_described(launch) else None,
        accesses=dict(sorted(Counter(name for name, _ in accesses(text)).items())),
        scalar_rows=dict(sorted(scalar_rows(text, compiled.asm["ttir"]).items())),
        instructions=work.classes,
        is_loop=work.is_loop,
        blocks=_roofline.blocks(gpu, warps=warps, **fit),
        share=share,
        waste=waste,
    )


def _wanted_mma(launch: Launch, target: str) -> str | None:
    attends = launch.kernel.__name__ in PRODUCTS
    return MMA[target] if attends and _element(launch) == 2 else None


def _predict(launch: Launch, gpu: GPU, work: Work, warps: int) -> tuple[tuple[float, float], float | None]:
    """Share of the roofline, and waste."""
    if launch.kernel.__name__ not in PRODUCTS:
        return _roofline.share_of_bandwidth(gpu, work, warps), None
    asked, element = _flops(launch, "D", "DV"), _element(launch)
    if work.matrix_flops is None:
        padded = _flops(launch, "BLOCK_D", "BLOCK_DV")
        return _roofline.share_of_peak(gpu, work, warps, asked, padded, element), None
    done = work.matrix_flops * warps
    return _roofline.share_of_peak(gpu, work, warps, asked, done, element), done / asked - 1


def is_described(launch: Launch) -> bool:
    """Whether rows are read by TMA descriptors."""
    return isinstance(launch.args.get("q_ptr"), TensorDescriptor)


def _element(launch: Launch) -> int:
    """Bytes of an element of q."""
    q = launch.args["q_ptr"]
    return (q.base if is_described(launch) else q).element_size()


def _flops(launch: Launch, dim: str, dim_v: str) -> int:
    """Operations of the matrix products of one tile, with heads as wide as the arguments of these names say."""
    with_d, with_dv = PRODUCTS[launch.kernel.__name__]
    args = launch.args
    return 2 * args["BLOCK_M"] * args["BLOCK_N"] * (with_d * args[dim] + with_dv * args[dim_v])


def _nvidia_resources(cubin: bytes) -> tuple[str, dict[str, int]]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
        code = subprocess.run([tools / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    (registers,) = set(re.findall(r"REG:(\d+)", usage.stdout + usage.stderr))
    return code, {
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


def _reports(job: tuple[str, str, str]) -> list[Report]:
    """What the launches of a case compile to for a target, for the kernels whose name contains something."""
    name, target, kernels = job
    launches = capture(target, dict(cases())[name])
    return [compile_launch(launch, target) for launch in launches if kernels in launch.kernel.__name__]


@contextmanager
def _mapping(processes: int) -> Iterator[Callable[..., Iterable[list[Report]]]]:
    """`map` over so many processes, or over none but this one."""
    if not processes:
        yield map
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield pool.map


HEADER = (
    f"{'case':33} {'kernel':14} {'target':6} {'regs':>4} {'spills':>6} {'shared':>13} {'tmem':>4} {'kind':15} "
    f"{'mma':>5}{'exp':>5}{'float':>6}{'int':>5}{'mem':>5}{'other':>6}   {'occ':>4} {'roofline':>9} {'waste':>5}"
)


def row(name: str, r: Report) -> str:
    """One line of the table, and one more for each fault."""
    counts = [f"{n:{width}}" for n, width in zip(r.instructions.values(), (5, 5, 6, 5, 5, 6), strict=True)]
    shared = f"{r.shared}/{GPUS[r.target].shared_per_block}"
    kind = (",".join(r.mma) or "-") + ("+TMA" if r.tma else "")
    share = f"{r.share[0]:.0%}-{r.share[1]:.0%}"
    waste = "" if r.waste is None else f"{r.waste:.0%}"
    line = (
        f"{name:33} {r.kernel.strip('_').removesuffix('_kernel'):14} {r.target:6} {r.registers:4} "
        f"{f'{r.spill_stores}/{r.spill_loads}':>6} {shared:>13} {r.tensor_memory or '':>4} {kind:15} "
        f"{''.join(counts)} {' ' if r.is_loop else '~'} {r.occupancy:4.0%} {share:>9} {waste:>5}"
    )
    return "\n".join([line.rstrip(), *(f"    FAULT: {fault}" for fault in r.faults())])


def summary(found: Sequence[tuple[str, Report]]) -> list[dict[str, Any]]:
    """For each target and kernel: how many were compiled, the worst of them, and the roofline's share in `PLAIN`."""
    groups: dict[tuple[str, str], list[tuple[str, Report]]] = {}
    for name, report in found:
        groups.setdefault((report.target, report.kernel), []).append((name, report))
    return [
        {
            "case": target,
            "kernel": kernel,
            "ok": not any(r.faults() for _, r in group),
            "compiled": len(group),
            "faults": sum(bool(r.faults()) for _, r in group),
            "registers": (min(r.registers for _, r in group), max(r.registers for _, r in group)),
            "spills": max(r.spill_stores for _, r in group),
            "share": next((r.share for name, r in group if name.rpartition(" ")[0] == PLAIN), None),
        }
        for (target, kernel), group in groups.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    assert not _config.INTERPRET, "unset TRITON_INTERPRET: interpreted kernels cannot be compiled"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--kernels", default="", help="only kernels whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers there")
    parser.add_argument("--record", action="store_true", help="also write a record, of all targets, cases and kernels")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile side by side; 0: this one")
    args = parser.parse_args(argv)
    targets = args.targets.split(",")
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"unknown targets {sorted(unknown)}: there are {list(TARGETS)}")
    if args.record and (args.cases or args.kernels or set(targets) != set(TARGETS)):
        parser.error("--record is of a whole run: leave out --targets, --cases and --kernels")
    jobs = [(name, target, args.kernels) for name, _ in cases() if args.cases in name for target in targets]
    found: list[tuple[str, Report]] = []
    print(HEADER)
    with _mapping(args.processes) as apply:
        for (name, *_), batch in zip(jobs, apply(_reports, jobs), strict=True):
            for report in batch:
                found.append((name, report))
                print(row(name, report), flush=True)
    where = len({report.target for _, report in found})
    faulty = sum(bool(report.faults()) for _, report in found)
    print(f"{len(found)} kernels compiled for {where} targets, {faulty} with faults")
    if args.json:
        records = [{"case": name} | asdict(r) | {"occupancy": r.occupancy, "faults": r.faults()} for name, r in found]
        args.json.write_text(json.dumps(records, indent=1) + "\n")
    if args.record:
        about = _record.environment(torch.device("cpu"), dry=False)
        about |= {
            "plain": PLAIN,
            "products": NAMES,
            "gpus": {name: f"{gpu.name} ({name})" for name, gpu in GPUS.items()},
        }
        print(f"record: {_record.write(_record.default_folder(), 'aot', about | {'cases': summary(found)})}")
    return int(faulty > 0 or not found)


if __name__ == "__main__":
    raise SystemExit(main())
