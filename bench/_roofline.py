"""Occupancy, and the share of the roofline that a kernel could reach: predicted from its machine code, not measured.

For one tile, cycles of a processor (SM or CU) are counted per pipe: matrix instructions at their peak, special
functions (nearly all of them exponentials), and the issue of all instructions; AMD's vector unit does the latter two
one after the other. The roof is the cycles of the useful matrix products alone. If all pipes overlapped perfectly, the
longest would decide: `high = roof / longest`. If none did, their sum: `low = roof / sum`. Truth lies between, where
nothing else binds: waiting for memory, shared memory, barriers, the tail of the grid and the clock under load are left
out.

A kernel without matrix products moves rows: its roof is the bandwidth of the GPU's memory for the bytes that it
accesses, also where it reads a row twice and the second time from a cache.

Worked example: 128 x 128 scores with D = Dv = 128 in bf16 are 2 * 128 * 128 * 256 operations, 2048 cycles of an H100's
SM. 8 warps with 66 exponentials each take 8 * 66 * 32 / 16 = 1056, 551 instructions each 8 * 551 / 4 = 1102: from
2048 / (2048 + 1056 + 1102) = 49% to 100%.
"""

from __future__ import annotations

from dataclasses import dataclass

from ._machine_code import CLASSES, Work


@dataclass(frozen=True)
class GPU:
    """Facts of one GPU. Peaks are dense and at the boost clock; a processor is an SM or a CU, with four partitions."""

    name: str
    processors: int
    clock: float  # GHz
    flops: dict[int, int]  # per clock and processor, by bytes per element of the factors
    bandwidth: int  # GB/s
    warp: int  # threads
    pipes: dict[str, dict[str, float]]  # clocks of a processor that an instruction of a warp takes, by class
    registers: int  # per partition
    max_warps: int  # per processor
    max_blocks: int
    shared: int  # bytes per processor
    shared_reserved: int  # bytes per block that the driver takes
    tensor_memory: int = 0  # columns per processor

    @property
    def shared_per_block(self) -> int:
        """Bytes that one block may have."""
        return self.shared - self.shared_reserved

    @property
    def bytes_per_clock(self) -> float:
        """What memory gives to each processor."""
        return self.bandwidth / self.processors / self.clock


# Four schedulers issue one instruction per clock each; the special function units take 16 lanes per clock ("Arithmetic
# Instructions" in NVIDIA's CUDA C++ Programming Guide: exp2 has 16 results per clock and SM from 8.0 to 10.0).
_NVIDIA = {"exp": {"exp": 32 / 16}, "issue": dict.fromkeys(CLASSES, 1 / 4)}
# Four SIMDs of 16 lanes take 4 clocks for a wave of 64, and 4 times as long for special functions (quarter rate: LLVM's
# SISchedule.td, WriteTrans32). Scalar and memory instructions are issued beside them (AMD, "Pipeline descriptions").
_AMD = {"vector": {"float": 1.0, "integer": 1.0, "exp": 4.0}}

# Registers, warps, blocks and shared memory: "Technical Specifications per Compute Capability" in the CUDA C++
# Programming Guide; AMD: "Pipeline descriptions" of the ROCm Compute Profiler (512 registers a lane, 8 waves a SIMD).
GPUS = {
    "sm_80": GPU(
        name="A100 SXM 80 GB",  # NVIDIA A100 datasheet: 312 TFLOP/s = 108 * 1.41 GHz * 2048, fp32 19.5, 2039 GB/s
        processors=108, clock=1.41, flops={2: 2048, 4: 128}, bandwidth=2039,
        warp=32, pipes=_NVIDIA, registers=16384, max_warps=64, max_blocks=32, shared=164 << 10, shared_reserved=1 << 10,
    ),
    "sm_90": GPU(
        name="H100 SXM",  # NVIDIA H100 datasheet: 989.4 TFLOP/s = 132 * 1.83 GHz * 4096, 3350 GB/s; fp32 128 lanes
        processors=132, clock=1.83, flops={2: 4096, 4: 256}, bandwidth=3350,
        warp=32, pipes=_NVIDIA, registers=16384, max_warps=64, max_blocks=32, shared=228 << 10, shared_reserved=1 << 10,
    ),
    "sm_100": GPU(
        name="B200",  # NVIDIA DGX B200 datasheet: 2250 TFLOP/s, 8000 GB/s; 148 SMs of 8192 per clock (FlashAttention-4)
        processors=148, clock=1.85, flops={2: 8192, 4: 256}, bandwidth=8000,
        warp=32, pipes=_NVIDIA, registers=16384, max_warps=64, max_blocks=32, shared=228 << 10, shared_reserved=1 << 10,
        tensor_memory=512,  # PTX ISA, "Tensor Memory"
    ),
    "gfx942": GPU(
        name="MI300X",  # AMD MI300X datasheet: 1307.4 TFLOP/s = 304 * 2.1 GHz * 2048, fp32 matrix 163.4, 5300 GB/s
        processors=304, clock=2.1, flops={2: 2048, 4: 256}, bandwidth=5300,
        warp=64, pipes=_AMD, registers=32768, max_warps=32, max_blocks=16, shared=64 << 10, shared_reserved=0,
    ),
}  # fmt: skip


def blocks(gpu: GPU, *, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
    """How many blocks of `warps` warps fit into a processor; registers per thread, shared memory in bytes per block."""
    allocated = max(8, -(-registers // 8) * 8) * gpu.warp  # per warp; registers come by 8 per thread
    limits = [gpu.max_blocks, gpu.max_warps // warps, 4 * (gpu.registers // allocated) // warps]
    if used := -(-shared // 128) * 128 + gpu.shared_reserved:  # by 128 bytes
        limits.append(gpu.shared // used)
    if tensor_memory:
        limits.append(gpu.tensor_memory // tensor_memory)
    return min(limits)


def cycles(gpu: GPU, work: Work, warps: int) -> dict[str, float]:
    """Clocks of a processor that a tile keeps each pipe busy, but for matrix instructions."""
    classes = work.classes
    return {pipe: warps * sum(n * classes[kind] for kind, n in cost.items()) for pipe, cost in gpu.pipes.items()}


def share_of_peak(gpu: GPU, work: Work, warps: int, flops: int, done: int, element: int) -> tuple[float, float]:
    """(low, high) for a tile whose `flops` useful operations take `done`, with factors of `element` bytes."""
    pipes = {"mma": done / gpu.flops[element]} | cycles(gpu, work, warps)
    return _share(flops / gpu.flops[element], pipes)


def share_of_bandwidth(gpu: GPU, work: Work, warps: int) -> tuple[float, float]:
    """(low, high) for a tile that only moves rows."""
    roof = warps * gpu.warp * work.global_bytes / gpu.bytes_per_clock
    return _share(roof, {"memory": roof} | cycles(gpu, work, warps))


def _share(roof: float, pipes: dict[str, float]) -> tuple[float, float]:
    return roof / sum(pipes.values()), roof / max(pipes.values())
