"""What is to be said about the facts of a machine (`doctor_facts`).

A check that fails would make a call fail or be wrong; a warning makes it slower, or has not been tested.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .doctor_facts import Facts, Gpu
from .exchange.nccl_library import dotted, install, package, same

TOPICS = ("system", "packages", "GPUs", "links", "ranks", "choices", "self-test")
OK, WARNING, FAIL, SKIPPED = STATUSES = ("ok", "warning", "fail", "skipped")

PYTHON = (3, 11), (3, 13)  # the oldest and the newest that this library is tested with
TRITON = (3, 6), (3, 9)
TORCH = (2, 11)
CUPY = (14, 0)
TESTED = {  # integrations: the oldest version, and the one that the tests run with
    "transformers": ((5, 0), "5.23.0"),
    "accelerate": ((1, 0), "1.15.0"),
    "trl": ((1, 0), "1.16.0"),
    "deepspeed": ((0, 19), "0.19.8"),
}
NEEDED = ("numpy", "filelock", "platformdirs")
OLDEST_GPU = 80  # sm_80: the oldest that the kernels are compiled for
_GIB = 1 << 30
_LEAST_FILES = 1024
_SLOWER = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1"}


@dataclass(frozen=True)
class Check:
    """One line of the report. `ranks`: those it is about, none for all; `numbers`: what was measured, by name."""

    topic: str
    name: str
    status: str
    found: str
    remedy: str = ""
    ranks: tuple[int, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.topic in TOPICS and self.status in STATUSES, self
        assert self.remedy or self.status in (OK, SKIPPED), f"a problem without a remedy: {self}"


Found = Iterator[Check]


def machine(facts: Facts) -> list[Check]:
    """What one machine's facts say."""
    parts = (_system, _packages, _nccl, _integrations, _gpus, _links, _exchange, _tiles)
    return [check for part in parts for check in part(facts)]


def _numbers(version: str) -> tuple[int, int]:
    """(major, minor) of a version: (2, 13) of "2.13.0+cu130"."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB"


# -- system


def _system(facts: Facts) -> Found:
    def check(name: str, found: str, problem: str = "", remedy: str = "") -> Check:
        return Check("system", name, problem or OK, found, remedy if problem else "")

    fits = PYTHON[0] <= _numbers(facts.python) <= PYTHON[1]
    range_ = " to ".join(map(dotted, PYTHON))
    yield check("Python", facts.python, "" if fits else FAIL, f"use Python {range_}")
    linux = facts.system.startswith("Linux")
    yield check("system", facts.system, "" if linux else WARNING, "use Linux: nothing else is tested")
    memory = f"{facts.cores} cores; {_size(facts.memory)} of memory, {_size(facts.free_memory)} free"
    yield check("processor", memory)
    yield check(
        "shared memory", facts.shared_memory_error or "processes can have memory that others map",
        WARNING if facts.shared_memory_error else "",
        'raise the memory limit of this process or container: CPU ranks take exchange="torch" else, which is slower',
    )  # fmt: skip
    if facts.shm is not None and len(facts.gpus) > 1:
        small = facts.shm < _GIB
        yield check("/dev/shm", f"{_size(facts.shm)} free", WARNING if small else "",
                    "give the container more (docker run --shm-size=8g): NCCL keeps buffers there")  # fmt: skip
    few = facts.open_files is not None and facts.open_files < _LEAST_FILES
    found = "no limit" if facts.open_files is None else f"{facts.open_files} may be open"
    yield check("open files", found, WARNING if few else "", f"ulimit -n {16 * _LEAST_FILES}: sockets count as files")
    bound = facts.locked_memory is not None and bool(facts.infiniband)
    found = "no limit" if facts.locked_memory is None else f"{facts.locked_memory >> 10} KiB may be locked"
    found += "" if bound or facts.locked_memory is None else "; nothing here needs more"
    remedy = "ulimit -l unlimited (docker run --ulimit memlock=-1): NCCL over InfiniBand locks its buffers"
    yield check("locked memory", found, WARNING if bound else "", remedy)


# -- packages


def _packages(facts: Facts) -> Found:
    def check(name: str, found: str, problem: str = "", remedy: str = "") -> Check:
        return Check("packages", name, problem or OK, found, remedy if problem else "")

    yield check("ulysses-triton", f"{facts.library}, sources {facts.sources}")
    build = f"for CUDA {facts.cuda}" if facts.cuda else f"for ROCm {facts.hip}" if facts.hip else "for CPUs"
    old = _numbers(facts.torch) < TORCH
    remedy = f'pip install "torch>={dotted(TORCH)}"'
    yield check("torch", f"{facts.torch}, {build}", FAIL if old else "", remedy)
    if facts.driver_gpus and not (facts.cuda or facts.hip):
        found = f"a build for CPUs, on a machine with {facts.driver_gpus} NVIDIA GPUs"
        yield check("torch's build", found, WARNING, "install PyTorch for CUDA to use them")
    if "gloo" not in facts.backends:
        yield check("torch.distributed", "has no gloo", FAIL, "install a PyTorch with gloo: ranks agree over it")
    if facts.cuda and "nccl" not in facts.backends:
        remedy = "install a PyTorch with NCCL: process groups carry CUDA tensors by it"
        yield check("torch.distributed", "has no NCCL", FAIL, remedy)
    own, (oldest, newest) = _numbers(facts.triton), TRITON
    pinned = facts.torchs_triton
    asked = f"triton=={pinned}" if pinned else f"triton>={dotted(oldest)},<{newest[0]}.{newest[1] + 1}"
    found = f"{facts.triton}; tested are {dotted(oldest)} to {dotted(newest)}"
    status = FAIL if own < oldest else WARNING if own > newest else ""
    yield check("triton", found, status, f'pip install "{asked}"')
    if pinned and _numbers(pinned) != own:
        found = f"{facts.triton}, but this torch asks for {pinned}"
        yield check("torch's triton", found, WARNING, f'pip install "triton=={pinned}"')
    missing = [name for name in NEEDED if facts.packages[name] is None]
    found = ", ".join(f"{name} {facts.packages[name] or 'missing'}" for name in NEEDED)
    status = FAIL if "numpy" in missing else WARNING if missing else ""  # without the others only `tune` does not run
    yield check("numpy and others", found, status, f"pip install {' '.join(missing)}")


def _nccl(facts: Facts) -> Found:
    """cupy, its NCCL and torch's: what exchange="nccl" asks for."""

    def check(found: str, problem: str = "", remedy: str = "", name: str = "cupy") -> Check:
        return Check("packages", name, problem or OK, found, remedy if problem else "")

    if facts.cuda is None or not facts.gpus:
        has = facts.cupy or "not installed"
        yield Check("packages", "cupy", SKIPPED, f"{has}; only NVIDIA GPUs under a PyTorch for CUDA need it")
        return
    remedy, names = install(facts.cuda), ", ".join(facts.cupy_packages)
    if not facts.cupy_packages:
        yield check('not installed: exchange="auto" takes "torch"', WARNING, f"{remedy}, for exchanges that overlap")
        return
    major = facts.cuda.split(".")[0]
    others = [name for name in facts.cupy_packages if f"cuda{major}x" not in name and name != "cupy"]
    if others or len(facts.cupy_packages) > 1:
        found = f"{names} beside torch for CUDA {facts.cuda}"
        yield check(found, FAIL, f"pip uninstall -y {' '.join(facts.cupy_packages)} && {remedy}")
        return
    if facts.cupy is None:
        yield check(f"{names} cannot be imported: {facts.cupy_error}", FAIL, remedy)
        return
    remedy = f'pip install "{facts.cupy_packages[0]}>={CUPY[0]}"'
    yield check(f"{facts.cupy} ({names})", FAIL if _numbers(facts.cupy) < CUPY else "", remedy)
    if facts.cupy_nccl is None or facts.nccl is None:
        whose = "cupy" if facts.cupy_nccl is None else "torch"
        found = f"{whose} finds none: the package {package(facts.cuda)} is missing"
        yield check(found, FAIL, install(facts.cuda), "NCCL")
        return
    found = f"cupy found {dotted(facts.cupy_nccl)}, torch has {dotted(facts.nccl)}"
    fits = same(facts.cupy_nccl, facts.nccl)
    remedy = install(facts.cuda, facts.nccl)
    yield check(found if fits else f"{found}; their minor versions must be equal", "" if fits else FAIL, remedy, "NCCL")


def _integrations(facts: Facts) -> Found:
    for name, (oldest, tested) in TESTED.items():
        installed = facts.packages[name]
        if installed is None:
            yield Check("packages", name, SKIPPED, f"not installed (tested: {tested}); only its integration needs it")
            continue
        old = _numbers(installed) < oldest
        remedy = f'pip install "{name}>={dotted(oldest)}" to use it with this library' if old else ""
        yield Check("packages", name, WARNING if old else OK, f"{installed} (tested: {tested})", remedy)


# -- GPUs and links


def _gpus(facts: Facts) -> Found:
    hidden = facts.variables.get("CUDA_VISIBLE_DEVICES")
    if not facts.gpus:
        if facts.driver_gpus and facts.cuda and hidden not in ("", "-1"):
            found = f"nvidia-smi knows {facts.driver_gpus}, torch can use none"
            remedy = f"update the driver to one for CUDA {facts.cuda}, or install PyTorch for this driver's CUDA"
            yield Check("GPUs", "GPUs", FAIL, found, remedy)
        else:
            why = f" (CUDA_VISIBLE_DEVICES={hidden!r})" if facts.driver_gpus and hidden is not None else ""
            yield Check("GPUs", "GPUs", OK, f"none: CPU only{why}")
        return
    for number, gpu in enumerate(facts.gpus):
        yield from _gpu(f"GPU {number}", gpu)


def _gpu(name: str, gpu: Gpu) -> Found:
    about = [gpu.name, gpu.architecture, _size(gpu.memory)]
    about += [f"{gpu.shared >> 10} KiB of shared memory"] if gpu.shared else []
    about += [f"driver {gpu.driver}"] if gpu.driver else []
    about += [f"ECC {gpu.ecc.lower()}"] if gpu.ecc else []
    number = gpu.architecture.removeprefix("sm_")
    if number.isdecimal() and int(number) < OLDEST_GPU:
        remedy = f"use a GPU of sm_{OLDEST_GPU} (A100) or newer, or CPU ranks (CUDA_VISIBLE_DEVICES=)"
        yield Check("GPUs", name, FAIL, f"{', '.join(about)}: the kernels are not made for it", remedy)
    else:
        yield Check("GPUs", name, OK, ", ".join(about))
    if gpu.mig == "Enabled":
        found = "MIG is on: a part of a GPU has no NVLink to others"
        yield Check("GPUs", f"{name} MIG", WARNING, found, "use one rank, or have MIG switched off (nvidia-smi -mig 0)")
    if gpu.ecc_errors.isdecimal() and int(gpu.ecc_errors):
        remedy = "reset the GPU (nvidia-smi --gpu-reset) or have it replaced"
        yield Check("GPUs", f"{name} memory", FAIL, f"{gpu.ecc_errors} uncorrected ECC errors", remedy)


def _exchange(facts: Facts) -> Found:
    """What exchange="auto" takes, as far as one process can tell."""
    if facts.gpus:
        problems = [check.found for check in _nccl(facts) if check.status != OK]
        why = problems[0] if problems else "cupy's NCCL fits torch's"
        said = f"nccl ({why})" if facts.cuda and not problems else f"torch ({why})"
    elif facts.shared_memory_error:
        said = f"torch (no shared memory: {facts.shared_memory_error})"
    else:
        said = "shm for ranks on this host, torch for those of several"
    yield Check("choices", "exchange of ranks here", OK, said)


def _tiles(facts: Facts) -> Found:
    """Which tiles kernels are launched with."""
    if facts.interpret:
        found = "the table of Triton's interpreter (TRITON_INTERPRET=1)"
        remedy = "unset TRITON_INTERPRET: kernels run on the CPU with it, many times slower" if facts.gpus else ""
        yield Check("choices", "tiles", WARNING if facts.gpus else OK, found, remedy)
    elif not facts.gpus:
        yield Check("choices", "tiles", SKIPPED, "CPU only: the kernels run on GPUs, or in Triton's interpreter")
    for architecture in [] if facts.interpret else sorted({gpu.architecture for gpu in facts.gpus}):
        current = sum(file.current for file in facts.tuned)
        found = f"{architecture}: {current} tuned entries in force, else the table of "
        if architecture in facts.tables:
            yield Check("choices", "tiles", OK, f"{found}the architecture")
        else:
            remedy = "ulysses-triton tune, and see below whether the kernels run"
            yield Check("choices", "tiles", WARNING, f"{found}the nearest older architecture", remedy)
    for file in facts.tuned:
        found = f"{file.current} entries in force, {file.stale} of other kernels than those of now"
        remedy = f"ulysses-triton tune, or delete {file.path}" if file.stale else ""
        yield Check("choices", f"file {file.path}", WARNING if file.stale else OK, found, remedy)


def _links(facts: Facts) -> Found:
    if len(facts.gpus) > 1:
        kinds = Counter(facts.links.values())
        said = ", ".join(f"{kind} between {count} pairs" for kind, count in sorted(kinds.items()))
        yield Check("links", "GPU to GPU", OK, said or "nvidia-smi does not say what they are")
        if facts.no_access:
            pairs = ", ".join(f"{a} and {b}" for a, b in facts.no_access)
            found = f'GPUs {pairs} cannot reach each other\'s memory: exchange="symm" is not possible'
            remedy = "use GPUs with NVLink between them, or leave the exchange as it is"
            yield Check("links", "peer access", WARNING, found, remedy)
        else:
            yield Check("links", "peer access", OK, "every GPU can reach the memory of every other")
    speeds = [f"{name}{f' {speed / 1e3:g} Gb/s' if speed else ''}" for name, speed in facts.interfaces.items()]
    infiniband = f"; InfiniBand {', '.join(facts.infiniband)}" if facts.infiniband else ""
    yield Check("links", "network", OK, (", ".join(speeds) or "no interface is up") + infiniband)
    for name, value in facts.variables.items():
        yield _variable(facts, name, value)


def _variable(facts: Facts, name: str, value: str) -> Check:
    """One of the environment's variables that change what ranks do."""
    known = ", ".join(facts.interfaces) or "none"
    if name == "GLOO_SOCKET_IFNAME":
        missing = [part for part in value.split(",") if part not in facts.interfaces]
        if missing:
            remedy = f"unset it, or name one of {known}"
            return Check("links", name, FAIL, f"{value}: {', '.join(missing)} is not up here", remedy)
    if name == "NCCL_SOCKET_IFNAME" and facts.gpus and not _nccl_matches(value, list(facts.interfaces)):
        return Check("links", name, FAIL, f"{value}: fits no interface that is up", f"unset it, or name one of {known}")
    if _SLOWER.get(name) == value and facts.gpus:
        return Check("links", name, WARNING, f"{value}: NCCL goes a slower way", f"unset {name}, if nobody needs it")
    return Check("links", name, OK, value or "(empty)")


def _nccl_matches(value: str, interfaces: Sequence[str]) -> list[str]:
    """The interfaces that NCCL takes: those with one of the prefixes, after `=` of these names, after `^` not those."""
    without, exact = value.startswith("^"), value.lstrip("^").startswith("=")
    names = value.lstrip("^").lstrip("=").split(",")
    fits = [any(i == name if exact else i.startswith(name) for name in names) for i in interfaces]
    return [i for i, fit in zip(interfaces, fits, strict=True) if fit != without]
