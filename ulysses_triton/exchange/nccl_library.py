"""Whether cupy's NCCL can be used here: it is optional, and must be the same NCCL as PyTorch's, on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import GroupError
from .base import Control

_FINDING_BYTES = 512


def library() -> Any:
    """`cupy.cuda.nccl`, if it can carry PyTorch's CUDA tensors here. Raises GroupError, saying what to install."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise GroupError(
            'exchange="nccl" needs NVIDIA GPUs and a PyTorch for CUDA; '
            f'this is torch {torch.__version__} with {torch.cuda.device_count()} CUDA devices: use exchange="torch"'
        )
    cuda = torch.version.cuda
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise GroupError(f'exchange="nccl" needs cupy, which cannot be imported ({error}): {install(cuda)}') from error
    if not nccl.available:
        raise GroupError(f"cupy finds no NCCL: the package {package(cuda)} is missing; {install(cuda)}")
    ours, torchs = version(nccl.get_version()), tuple(torch.cuda.nccl.version()[:3])
    if not same(ours, torchs):
        raise GroupError(
            f"cupy found NCCL {dotted(ours)}, PyTorch has NCCL {dotted(torchs)}; their minor versions must be equal: "
            f"{install(cuda, torchs)}"
        )
    return nccl


def same(ours: Sequence[int], torchs: Sequence[int]) -> bool:
    """Whether cupy's NCCL can be used beside PyTorch's; versions are (major, minor, patch)."""
    return ours[:2] == torchs[:2]


def install(cuda: str, nccl: Sequence[int] | None = None) -> str:
    """The command that installs what this exchange needs beside a PyTorch for a CUDA ("13.0"), of this NCCL."""
    pinned = "" if nccl is None else f' "{package(cuda)}=={dotted(nccl)}"'
    return f'pip install "ulysses-triton[cuda{cuda.split(".")[0]}]"{pinned}'


def package(cuda: str) -> str:
    """The package of NCCL for a CUDA."""
    return f"nvidia-nccl-cu{cuda.split('.')[0]}"


def version(code: int) -> tuple[int, int, int]:
    """NCCL's version number as (major, minor, patch): 22907 is 2.29.7."""
    return code // 10000, code // 100 % 100, code % 100


def usable(control: Control) -> tuple[Any, str]:
    """`cupy.cuda.nccl` if every rank can use the same NCCL, else None; and why not. All ranks find the same."""
    nccl, mine = None, ""
    try:
        nccl = library()
        mine = f"={dotted(version(nccl.get_version()))}"
    except GroupError as error:
        mine = str(error)
    padded = mine.encode()[:_FINDING_BYTES].ljust(_FINDING_BYTES, b"\0")
    found = [blob.rstrip(b"\0").decode(errors="replace") for blob in control.gather(padded)]
    without = [rank for rank, finding in enumerate(found) if not finding.startswith("=")]
    if without:
        return None, f"ranks {without}: {found[without[0]]}"
    if len(set(found)) > 1:
        return None, f"ranks have different NCCL: {', '.join(finding[1:] for finding in found)}"
    return nccl, ""


def dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))
