"""What keeps the ranks of a group together.

Every call is agreed on before a byte moves (`agree`), a rank that cannot go on says so (`refuse`), and a peer that does
not come ends in an `ExchangeError` at the deadline (`step`).
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import errors, spec
from .errors import ExchangeError, GroupError, ShapeError, UlyssesError
from .exchange.base import Control, Exchange, Watched
from .exchange.pool import Pool

_RECORD = struct.Struct("<q?q8s")  # call number, refused, seed, hash of the signature
_TEXT_BYTES = 4096  # of a signature or a refusal, where ranks differ
_WORDS_SECONDS = 1.0  # how long a failing rank waits for its peers' last words


class AgreeingRanks:
    """The ranks of a group as one of them sees them. `check_all`: compare whole signatures, not hashes of them."""

    name: str  # of the group

    def __init__(self, control: Control, exchange: Exchange, pool: Pool, check_all: bool) -> None:
        self.control, self.exchange, self.pool = control, exchange, pool
        self.rank, self.size = control.rank, control.size
        self.counts: Counter[str] = Counter()  # "control" messages, and the "data" exchanges of each kind of step
        self.latest = 0, ""  # the latest call: its number, and what it is
        self._check_all = check_all
        self._calls = 0
        self._agreed: set[bytes] = set()  # calls that all ranks made, and that need not wait for it the next time
        self._later: tuple[str, Callable[[], list[bytes]]] | None = None  # a call whose comparison is still to come
        self._doing = "between calls"
        self._broken: str | None = None
        self._closed = False
        if isinstance(exchange, Watched):
            exchange.where = lambda: self._doing

    def check(self) -> None:
        """Raise if this group cannot be used any more, here or because a peer failed.

        ExchangeError, GroupError, or ShapeError where ranks compare their calls late and the last ones differ.
        """
        self._settle()
        self._require_usable()
        gone = sorted(self.control.gone())
        if gone or self.control.hear(0.0):
            raise self._fail(RuntimeError(f"ranks {gone} are gone" if gone else "a peer failed"))

    def agree(self, what: str, signature: str, seed: int | None = None, *, device: str | None = None) -> int:
        """Before a call moves anything: that every rank makes the same one. Returns rank 0's `seed`, 0 for None.

        Raises ShapeError on every rank when they differ, saying who differs in what; or, where a peer refused the call,
        that peer's error. `device`: that of the rows, where the exchange may let a call go ahead that all ranks made
        before: if it is not the same this time, the next call, `check` or `close` raises, and the group has ended.
        """
        self._settle()
        self._require_usable()
        self._calls += 1
        self.latest = self._calls, what
        self._doing = f"call {self._calls} ({what})"
        if self.size == 1:
            return seed or 0
        text = f"call={what}; {signature}"
        defers = seed is None and device is not None and self._defers(device)
        digest = _digest(text)
        if defers and digest in self._agreed:
            self._later = text, self._begin_gather(self._record(text))
            return 0
        seed = self._compare(text, seed or 0)
        if defers:
            self._agreed.add(digest)
        return seed

    def refuse(self, error: UlyssesError) -> None:
        """Take part in the agreement on a call that this rank cannot make, so that every rank raises."""
        if self.size == 1 or self._broken or self._closed:
            return
        self._settle()
        self._calls += 1
        self._doing = f"call {self._calls} (refused)"
        self._compare(f"{type(error).__name__}\n{error}", refused=error)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Around whatever waits for peers, so that what goes wrong there ends the group with an ExchangeError."""
        doing = self._doing
        self._doing = f"{doing}, {name}"
        try:
            yield
        except UlyssesError:
            raise
        except RuntimeError as error:
            raise self._fail(error) from error
        self._doing = doing

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call that was agreed on: when it fails on this rank alone, the peers can read why."""
        try:
            yield
        except BaseException as error:
            if self._broken is None:
                self._end(f"{self._doing} failed with {type(error).__name__}: {error}")
            raise
        self._doing = "between calls"

    def _compare(
        self,
        text: str,
        seed: int = 0,
        refused: UlyssesError | None = None,
        later: Callable[[], list[bytes]] | None = None,
    ) -> int:
        """Hold this call, `text`, against the others'; `later` is a gathering of the records that has begun."""
        with self.step("agreement"):
            texts: list[str] | None = None
            if later is not None:
                heads = later()
            elif self._check_all:
                blobs = self._begin_gather(self._record(text, seed, refused) + _padded(text))()
                heads, texts = [b[: _RECORD.size] for b in blobs], [_unpadded(b[_RECORD.size :]) for b in blobs]
            else:
                heads = self._begin_gather(self._record(text, seed, refused))()
            calls, refusals, seeds, hashes = zip(*map(_RECORD.unpack, heads), strict=True)
            if len(set(hashes)) == len(set(calls)) == 1 and not any(refusals):
                return int(seeds[0])
            if texts is None:
                texts = [_unpadded(blob) for blob in self._begin_gather(_padded(text))()]
        here = f"group {self.name!r}, {self._doing}, agreement"
        self._calls = max(calls)  # ranks that skipped a call are level again
        if self._agreed.intersection(hashes):  # of ranks that did not wait, and have begun to exchange
            self._end(f"{self._doing}: the ranks made different calls")
        self._doing = "between calls"
        if refused is not None:
            return seed
        if any(refusals):
            rank = refusals.index(True)
            name, _, message = texts[rank].partition("\n")
            raise getattr(errors, name, ShapeError)(f"{here}: rank {rank} refused this call: {message}")
        numbers = "" if len(set(calls)) == 1 else f"; their call numbers are {list(calls)}: did a rank skip a call?"
        raise ShapeError(f"{here}: the ranks make different calls: {spec.differences(texts)}{numbers}")

    def _record(self, text: str, seed: int = 0, refused: UlyssesError | None = None) -> bytes:
        return _RECORD.pack(self._calls, refused is not None, seed, _digest(text))

    def _begin_gather(self, payload: bytes) -> Callable[[], list[bytes]]:
        self.counts["control"] += 1
        return self.control.begin_gather(payload)

    def _defers(self, device: str) -> bool:
        """Whether a call on such a device that all ranks made before may go ahead before they have compared it."""
        return not self._check_all and isinstance(self.exchange, Watched) and self.exchange.defers(device)

    def _settle(self) -> None:
        """Compare the latest call, if that is still to be done."""
        if self._later is not None:
            (text, later), self._later = self._later, None
            doing, self._doing = self._doing, "call {} ({})".format(*self.latest)
            self._compare(text, later=later)
            self._doing = doing

    def _failure(self) -> str | None:
        """What the exchange found by itself."""
        return self.exchange.failure() if isinstance(self.exchange, Watched) else None

    def _require_usable(self) -> None:
        if self._closed:
            raise GroupError(f"group {self.name!r} is closed")
        if self._broken is not None:
            raise ExchangeError(f"group {self.name!r} cannot be used any more: {self._broken}; make a new one")
        failure = self._failure()
        if failure is not None:
            raise self._fail(RuntimeError(failure))

    def _end(self, why: str) -> None:
        """This group is of no use any more: tell the peers, and do not wait for them."""
        self._broken = why
        self._later = None
        self.pool.close()  # a late peer may still write to buffers in flight, so none is used again
        self.control.tell(why)
        if isinstance(self.exchange, Watched):
            self.exchange.abort(why)

    def _fail(self, error: RuntimeError) -> ExchangeError:
        """End the group: leave a last word, read the peers', and say who is where."""
        own = f"{self._doing}: {str(error).splitlines()[0]}"
        closed = self.control.closed()
        self._end(own)
        words = self.control.hear(_WORDS_SECONDS)
        words.pop(self.rank, None)
        silent = sorted(set(range(self.size)) - set(words) - closed - {self.rank})
        parts = [f"group {self.name!r}: rank {self.rank} in {own}"]
        parts += [f"rank {rank} in {word}" for rank, word in sorted(words.items())]
        parts += [f"rank {rank} has closed the group" for rank in sorted(closed - set(words))]
        if silent:
            parts.append(f"no word from ranks {silent}: died, stopped, or elsewhere")
        return ExchangeError("; ".join(parts))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _padded(text: str) -> bytes:
    return text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")


def _unpadded(blob: bytes) -> str:
    return blob.rstrip(b"\0").decode(errors="replace")
