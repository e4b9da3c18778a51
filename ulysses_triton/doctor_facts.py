"""What `ulysses-triton doctor` finds on a machine, gathered once into plain values; `doctor_checks` judges them.

What cannot be found out is None or empty, or a field says in words why (`..._error`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import triton

from . import chunk_cache
from .errors import OutOfMemoryError
from .exchange.nccl_library import version
from .exchange.shared_pool import SharedPool
from .kernels import _cache, _config
from .kernels._config import INTERPRET
from .training.launch import cores_per_rank

PACKAGES = ("numpy", "filelock", "platformdirs", "transformers", "accelerate", "trl", "deepspeed")
_VARIABLES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_SYMM_MEM_", "CUDA_VISIBLE", "TRITON_INTERPRET", "ULYSSES_TRITON_")
_QUERY = ("uuid", "driver_version", "mig.mode.current", "ecc.mode.current", "ecc.errors.uncorrected.volatile.total")
_SMI_SECONDS = 20.0
_UNLIMITED = resource.RLIM_INFINITY


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use. What nvidia-smi says is in its words, empty where it says nothing."""

    name: str
    architecture: str  # "sm_90", "gfx942"
    memory: int  # bytes
    shared: int | None  # bytes of shared memory that a block of threads may have
    driver: str = ""
    mig: str = ""  # "Enabled", "Disabled"
    ecc: str = ""
    ecc_errors: str = ""  # uncorrected, since the last reset


@dataclass(frozen=True)
class Tuned:
    """A file of what `ulysses-triton tune` measured: how many entries are of the kernels of now, and how many not."""

    path: str
    current: int
    stale: int


@dataclass(frozen=True)
class Facts:
    """One rank's machine and packages. Memory in bytes; limits are None where there is none."""

    host: str
    rank: int
    local_rank: int
    local_ranks: int  # that torchrun started on this host
    system: str
    python: str
    cores: int
    memory: int
    free_memory: int
    shm: int | None  # free in /dev/shm
    shared_memory_error: str  # why this process cannot have memory that others map
    open_files: int | None
    locked_memory: int | None
    library: str
    sources: str  # a hash of this library's files
    torch: str
    cuda: str | None  # that torch is built for
    hip: str | None
    nccl: tuple[int, ...] | None  # torch's
    backends: tuple[str, ...]
    triton: str
    torchs_triton: str | None  # the version that torch's package asks for
    interpret: bool
    tables: tuple[str, ...]  # architectures that have a table of tiles
    tuned: tuple[Tuned, ...]  # for the GPUs here
    tiles: str  # a hash of the tiles in force; empty where kernels do not run
    packages: dict[str, str | None]  # by name, None for those that are not installed
    cupy_packages: tuple[str, ...]  # what is installed that brings cupy
    cupy: str | None
    cupy_error: str
    cupy_nccl: tuple[int, ...] | None
    driver_gpus: int  # GPUs that nvidia-smi knows, whether this process may use them or not
    gpus: tuple[Gpu, ...]
    no_access: tuple[tuple[int, int], ...]  # pairs of GPUs that cannot reach each other's memory
    links: dict[str, str]  # as nvidia-smi calls them: {"0-1": "NV18"}, by its own numbers
    interfaces: dict[str, int | None]  # of the network, that are up: Mb/s where the driver knows
    infiniband: tuple[str, ...]
    variables: dict[str, str]  # of the environment

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def of(content: dict[str, Any]) -> Facts:
        """From the values of its JSON, in which tuples are lists."""
        found: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in content.items()}
        found["gpus"] = tuple(Gpu(**gpu) for gpu in content["gpus"])
        found["tuned"] = tuple(Tuned(**file) for file in content["tuned"])
        found["no_access"] = tuple((a, b) for a, b in content["no_access"])
        return Facts(**found)


def gather() -> Facts:
    """The facts of this process."""
    memory = _memory()
    cupy, cupy_error, cupy_nccl = _cupy()
    gpus = _gpus(_smi_gpus())
    return Facts(
        host=platform.node(), rank=_number("RANK", 0), local_rank=_number("LOCAL_RANK", 0),
        local_ranks=_number("LOCAL_WORLD_SIZE", 1), system=platform.platform(), python=platform.python_version(),
        cores=cores_per_rank(1), memory=memory["MemTotal"], free_memory=memory["MemAvailable"],
        shm=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        shared_memory_error=_shared_memory_error(), open_files=_limit(resource.RLIMIT_NOFILE),
        locked_memory=_limit(resource.RLIMIT_MEMLOCK), library=_installed("ulysses-triton") or "a checkout",
        sources=_sources(), torch=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip,
        nccl=_torchs_nccl(), backends=_backends(), triton=triton.__version__, torchs_triton=_torchs_triton(),
        interpret=INTERPRET, tables=_tables(),
        tuned=_tuned({gpu.name for gpu in gpus}), tiles=_config.fingerprint("cuda") if gpus or INTERPRET else "",
        packages={name: _installed(name) for name in PACKAGES}, cupy_packages=_cupy_packages(),
        cupy=cupy, cupy_error=cupy_error, cupy_nccl=cupy_nccl, driver_gpus=_smi("-L").count("UUID: GPU-"), gpus=gpus,
        no_access=_no_access(len(gpus)), links=links(_smi("topo", "-m")), interfaces=_interfaces(),
        infiniband=tuple(_names("/sys/class/infiniband")), variables=_variables(),
    )  # fmt: skip


def _number(variable: str, otherwise: int) -> int:
    return int(os.environ.get(variable, otherwise))


def _limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == _UNLIMITED else soft


def _memory() -> dict[str, int]:
    """Bytes, by the names of /proc/meminfo; zeros where there is none."""
    found = {"MemTotal": 0, "MemAvailable": 0}
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0]) << 10
    return found


def _shared_memory_error() -> str:
    pool = SharedPool()
    try:
        pool.take((1,), torch.float32, torch.device("cpu"))
    except (OutOfMemoryError, AttributeError) as error:  # the latter where there is no memfd
        return str(error.__cause__ or error)
    finally:
        pool.close()
    return ""


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sources() -> str:
    root, whole = Path(__file__).parent, hashlib.sha256()
    for folder in (root, root / "kernels", root / "exchange"):
        for path in sorted(folder.glob("*.py")):
            whole.update(path.name.encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:12]


def _torchs_nccl() -> tuple[int, ...] | None:
    if torch.version.cuda is None or not dist.is_nccl_available():
        return None
    return tuple(torch.cuda.nccl.version()[:3])


def _backends() -> tuple[str, ...]:
    if not dist.is_available():
        return ()
    known = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    return tuple(name for name, is_there in known.items() if is_there)


def _torchs_triton() -> str | None:
    """What torch's own package pins: `triton==3.7.1; platform_system == "Linux"`."""
    asked = importlib.metadata.requires("torch") or []
    found = [match for text in asked if (match := re.match(r"triton\s*\(?==\s*([\d.]+)", text))]
    return found[0].group(1) if found else None


def _tables() -> tuple[str, ...]:
    stems = sorted(path.stem for path in _cache.SHIPPED.glob("*.json"))
    return tuple(stem for stem in stems if re.fullmatch(r"sm_\d+|gfx\w+", stem))


def _tuned(names: set[str]) -> tuple[Tuned, ...]:
    """The files that have entries for these GPUs."""
    found = []
    for name, folder in itertools.product(sorted(names), (_cache.SHIPPED, _cache.user_folder())):
        if folder is None:
            continue
        tiles = _cache.read(path := folder / f"{_cache.slug(name)}.json")
        hashes = {kernel: _cache.source(kernel)[0] for kernel in _cache.KERNELS}
        found.append((path, len(tiles), sum(e["source"] == hashes.get(key.kernel) for key, e in tiles.items())))
        chunks = chunk_cache.read(path := folder / chunk_cache.file_of(name))
        found.append((path, len(chunks), sum(e["source"] == chunk_cache.source() for e in chunks.values())))
    return tuple(Tuned(str(path), current, entries - current) for path, entries, current in found if entries)


def _cupy_packages() -> tuple[str, ...]:
    names = {str(found.metadata["Name"]).lower() for found in importlib.metadata.distributions()}
    return tuple(sorted(name for name in names if re.fullmatch(r"cupy(-cuda\w+|-rocm[\w-]+)?", name)))


def _cupy() -> tuple[str | None, str, tuple[int, ...] | None]:
    """Its version, why it cannot be imported, and its NCCL."""
    if not _cupy_packages():
        return None, "", None
    try:
        import cupy
        from cupy.cuda import nccl
    except Exception as error:  # of another CUDA it fails in many ways
        return None, f"{type(error).__name__}: {error}", None
    return cupy.__version__, "", version(nccl.get_version()) if nccl.available else None


def _smi(*arguments: str) -> str:
    """What nvidia-smi prints; nothing where there is none, or it fails."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _smi_gpus() -> dict[str, tuple[str, ...]]:
    """By the UUID: driver, MIG mode, ECC mode, errors."""
    lines = _smi(f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits").splitlines()
    rows = [tuple(value.strip() for value in line.split(",")) for line in lines]
    return {row[0].removeprefix("GPU-"): row[1:] for row in rows if len(row) == len(_QUERY)}


def _gpus(smi: dict[str, tuple[str, ...]]) -> tuple[Gpu, ...]:
    found = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(number)
        amd = about.gcnArchName.split(":")[0] if torch.version.hip else ""
        said = smi.get(str(getattr(about, "uuid", "")), ())
        shared = getattr(about, "shared_memory_per_block_optin", None)
        found.append(
            Gpu(about.name, amd or f"sm_{about.major}{about.minor}", about.total_memory, shared, *said),
        )
    return tuple(found)


def _no_access(count: int) -> tuple[tuple[int, int], ...]:
    pairs = [(a, b) for a in range(count) for b in range(count) if a < b]
    return tuple((a, b) for a, b in pairs if not torch.cuda.can_device_access_peer(a, b))


def links(topology: str) -> dict[str, str]:
    """The links between GPUs in what `nvidia-smi topo -m` prints: a table with a row and a column per GPU."""
    lines = [re.sub(r"\x1b\[\d*m", "", line).split() for line in topology.splitlines()]
    rows = {words[0]: words[1:] for words in lines if len(words) > 1 and re.fullmatch(r"GPU\d+", words[0])}
    columns = next((words for words in lines if words and words[0] == "GPU0"), [])
    gpus = [name for name in columns if re.fullmatch(r"GPU\d+", name)]
    return {
        f"{a.removeprefix('GPU')}-{b.removeprefix('GPU')}": rows[a][j]
        for i, a in enumerate(gpus)
        for j, b in enumerate(gpus)
        if i < j and a in rows and len(rows[a]) > j
    }


def _interfaces() -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for name in _names("/sys/class/net"):
        if _content(f"/sys/class/net/{name}/operstate") in ("up", "unknown"):
            speed = _content(f"/sys/class/net/{name}/speed")
            found[name] = int(speed) if speed.isdecimal() and int(speed) > 0 else None
    return found


def _names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir()) if Path(folder).is_dir() else []


def _content(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:  # a virtual interface has no speed
        return ""


def _variables() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}
