"""What every process of the test suite sets up before it does anything: pytest's own, and the workers of `pool`.

Imported first of all, before torch and triton: Triton reads TRITON_INTERPRET when a kernel is decorated.
"""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # TRITON_INTERPRET=0 runs the kernels compiled, on a machine with a GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

torch.set_num_threads(1)  # some gradients differ between one thread and two

if importlib.util.find_spec("interpreter_shim") is not None:
    import interpreter_shim

    interpreter_shim.install()


def poison_memory() -> None:
    """Let `torch.empty` and its kin, `resize_` and inductor's buffers come filled with NaN (integers: their maximum).

    An element that nobody wrote then shows in the result. This is what PyTorch does in deterministic mode; it holds
    for allocations inside ops and compiled code too, which a patch of `torch.empty` would not reach.
    """
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)


poison_memory()
