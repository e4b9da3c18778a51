"""What a layer holds at once on one rank beyond its inputs and results: counted, tensor by tensor.

    with watch() as held:
        out = ulysses_attention(q, k, v, group)        # and its backward
    held[rank, "forward"].rows                         # bytes of the group's pool, at the worst moment

Of a forward, q, k, v, out and the LSE do not count, of a backward dout and the gradients; what forward keeps for
backward does, in both. What one PyTorch operation takes and gives back inside is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ulysses_triton import UlyssesGroup, executor


@dataclass
class Held:
    """The most bytes at once of one forward or backward."""

    rows: int = 0  # of the group's pool: what forward keeps, buffers of exchanges, sums of shared kv heads
    others: int = 0  # of all other tensors that were made inside


@dataclass
class _Ledger(TorchDispatchMode):
    """The storages that came to be inside, and when they came and went."""

    live: dict[StorageWeakRef, tuple[bool, int]] = field(default_factory=dict)
    events: list[tuple[StorageWeakRef, bool, int]] = field(default_factory=list)  # which, of the pool, bytes more

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {StorageWeakRef(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and StorageWeakRef(made.untyped_storage()) not in given:  # no view
                self.note(made, False)
        return result

    def note(self, tensor: Tensor, of_pool: bool) -> None:
        for which in [which for which in self.live if which.expired()]:
            self.events.append((which, self.live[which][0], -self.live.pop(which)[1]))
        which, size = StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()
        if which not in self.live:
            self.live[which] = of_pool, size
            self.events.append((which, of_pool, size))

    def most(self, but: list[Tensor]) -> Held:
        """Without the storages of some tensors."""
        found, now = Held(), Held()
        skipped = {StorageWeakRef(tensor.untyped_storage()) for tensor in but}
        for which, of_pool, size in self.events:
            name = "rows" if of_pool else "others"
            setattr(now, name, getattr(now, name) + size * (which not in skipped))
            setattr(found, name, max(getattr(found, name), getattr(now, name)))
        return found

    def __hash__(self) -> int:
        return id(self)


@contextmanager
def watch() -> Iterator[dict[tuple[int, str], Held]]:
    """Inside, all groups of this process are watched; gives every rank's latest "forward" and "backward"."""
    found: dict[tuple[int, str], Held] = {}

    def watched(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(problem: Any, group: UlyssesGroup, *arguments: Any) -> Any:
            ledger, take = _Ledger(), group.pool.take

            def taken(*size: Any, **options: Any) -> Tensor:
                tensor = take(*size, **options)
                ledger.note(tensor, True)
                return tensor

            with mock.patch.object(group.pool, "take", taken), ledger:
                result = run(problem, group, *arguments)
            held = ledger.most(list(result[:2]) if name == "forward" else [])
            if name == "backward":
                held.rows += arguments[2].nbytes  # what forward kept
            found[group.rank, name] = held
            return result

        return call

    with (
        mock.patch.object(executor, "forward", watched("forward", executor.forward)),
        mock.patch.object(executor, "backward", watched("backward", executor.backward)),
    ):
        yield found
