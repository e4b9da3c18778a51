"""Checkpoints of activations in host memory, with the next one on its way back while a layer is computed again.

    forward    layer 0 | layer 1 | layer 2          backward   layer 2      | layer 1      | layer 0
    to host      x0        x1        x2             to device  x2, x1 ahead | x0 ahead

A checkpoint is what `torch.utils.checkpoint` saves of a layer, its tensor arguments. On CUDA, copies run on a stream of
their own, from and to pinned memory, which PyTorch keeps for the next step. On a CPU the same code copies
into buffers of its own; there is nothing to gain from that but tests and measurements.

(PyTorch's `save_on_cpu`, which transformers and `offload_wrapper` use, copies on the stream that computes, and TRL's
activation offloading, which has a stream, needs an accelerator and takes all saved tensors of a step.)
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ..errors import OptionError, UlyssesError

IN_FLIGHT = 2  # tensors that are kept on the device behind the layer that works, so that it need not wait for copies


class HostOffload:
    """Takes the checkpoints of a model's layers to host memory. One serves all layers, and micro-batches in a row.

    Args:
        min_bytes: smaller tensors stay on the device. So do parameters, and tensors of other classes than Tensor.
    """

    def __init__(self, min_bytes: int = 1 << 16) -> None:
        if min_bytes < 0:
            raise OptionError(f"min_bytes = {min_bytes}; it must not be negative")
        self.min_bytes = min_bytes
        self._latest: weakref.ref[_Layer] | None = None
        self._copies: weakref.WeakSet[_Copy] = weakref.WeakSet()
        self._leaving: deque[_Copy] = deque()
        self._known: dict[StorageWeakRef, dict[tuple[Any, ...], weakref.ref[_Copy]]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __deepcopy__(self, memo: Any) -> HostOffload:
        return HostOffload(self.min_bytes)  # of a model that is copied

    @property
    def host_bytes(self) -> int:
        """Bytes that are in host buffers now."""
        return sum(copy.host.nbytes for copy in self._copies)

    def checkpoint(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """`torch.utils.checkpoint.checkpoint` with `use_reentrant=False`, whose saved arguments go to host memory."""
        if options.pop("use_reentrant", False):
            raise OptionError("checkpoints go to host memory without use_reentrant=True only")
        layer = _Layer()
        with saved_tensors_hooks(lambda x: self._pack(x, layer), self._unpack):
            return checkpoint(function, *args, use_reentrant=False, **options)

    def _pack(self, x: Tensor, layer: _Layer) -> Tensor | _Copy:
        if type(x) is not Tensor or x.layout is not torch.strided or x.nbytes < self.min_bytes:
            return x
        views = self._views_of(x)
        key = (x.shape, x.stride(), x.storage_offset(), x.dtype, x._version)
        known = views[key]() if key in views else None
        if known is not None:
            return known
        copy = _Copy(x, layer)
        with self._aside(x.device) as stream:
            copy.host.copy_(x, non_blocking=True)
            copy.left = stream.record_event() if stream else None
        views[key] = weakref.ref(copy)
        self._copies.add(copy)
        if not layer.saved:
            layer.before, self._latest = self._latest, weakref.ref(layer)
        layer.saved.append(weakref.ref(copy))
        self._leaving.append(copy)
        if len(self._leaving) > IN_FLIGHT:
            self._let_go(self._leaving.popleft())
        return copy

    def _unpack(self, packed: Tensor | _Copy) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        layer = packed.layer
        for copy in (packed, *layer.copies()):
            self._fetch(copy, again=copy is packed)
        before = layer.before and layer.before()
        for copy in before.copies() if before else ():
            self._fetch(copy)
        x = packed.x
        assert x is not None
        if packed in self._leaving:  # of a last layer: it never had to leave
            self._leaving.remove(packed)
            self._let_go(packed)
        elif packed.came:
            torch.cuda.current_stream(x.device).wait_event(packed.came)
        packed.x, packed.used = None, True
        return x

    def _fetch(self, copy: _Copy, again: bool = False) -> None:
        """Begin to copy to the device what is not there, and was not used yet."""
        if copy.x is not None or (copy.used and not again):
            return
        copy.x = torch.empty_like(copy.host, device=copy.device, pin_memory=False)
        with self._aside(copy.device) as stream:
            copy.x.copy_(copy.host, non_blocking=True)
            if stream:
                copy.came = stream.record_event()
                copy.x.record_stream(stream)  # a backward pass that fails may drop it at once

    def _let_go(self, copy: _Copy) -> None:
        """Drop the tensor on the device; what is computed next may overwrite it, after the copy."""
        assert copy.x is not None
        if copy.left:
            torch.cuda.current_stream(copy.device).wait_event(copy.left)
        if copy.x._version != copy.version:
            raise UlyssesError(
                f"a checkpoint {list(copy.x.shape)} was written to while it was copied to host memory; do not change a "
                "layer's input in place"
            )
        copy.x = None

    def _views_of(self, x: Tensor) -> dict[tuple[Any, ...], weakref.ref[_Copy]]:
        """Copies by the view of x's storage that they are of. An address means nothing once its storage is gone."""
        self._known = {ref: views for ref, views in self._known.items() if not ref.expired()}
        return self._known.setdefault(StorageWeakRef(x.untyped_storage()), {})

    @contextlib.contextmanager
    def _aside(self, device: torch.device) -> Iterator[torch.cuda.Stream | None]:
        """The stream of copies, behind all that was computed so far; None where there are no streams."""
        if device.type != "cuda":
            yield None
            return
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield stream


class _Layer:
    """What one call of `checkpoint` saved."""

    def __init__(self) -> None:
        self.before: weakref.ref[_Layer] | None = None
        self.saved: list[weakref.ref[_Copy]] = []

    def copies(self) -> Iterator[_Copy]:
        return (copy for ref in self.saved if (copy := ref()) is not None)


class _Copy:
    """A tensor in host memory, and on the device while it leaves and from when it is fetched until it is used."""

    def __init__(self, x: Tensor, layer: _Layer) -> None:
        self.x: Tensor | None = x.detach()
        self.version, self.device = x._version, x.device
        self.host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
        self.left: torch.cuda.Event | None = None
        self.came: torch.cuda.Event | None = None
        self.used = False
        self.layer = layer
