"""A thread that ends an exchange which does not get on: for carriers that nobody on the host waits for.

Hops complete in the order of their numbers. The clock runs from the latest sign of life: a hop that started when none
was under way, or one that completed. The thread sleeps while there are none, and never calls CUDA.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

_LOOKS = 20  # in a deadline, at least
_SECONDS = 0.1  # between two looks, at most
_SOON = 0.002  # where somebody waits
_NEWS_SECONDS = 1.0


class Watchdog:
    """Looks after numbered hops.

    Args:
        timeout: seconds without any progress until the watchdog gives up.
        reached: the number of the latest hop that completed.
        trouble: what is wrong with the carrier itself, or None; asked at every look.
        news: what peers left as their last words, or None; asked once a second, as it may take a while.
        give_up: called once, in the watchdog's thread, with the reason; it ends what is under way.
    """

    def __init__(
        self,
        timeout: float,
        *,
        reached: Callable[[], int],
        trouble: Callable[[], str | None],
        news: Callable[[], str | None],
        give_up: Callable[[str], None],
    ) -> None:
        self._timeout = timeout
        self._reached, self._trouble, self._news, self._give_up = reached, trouble, news, give_up
        self._hops: deque[tuple[int, str]] = deque()
        self._alive = 0.0  # when there was a sign of life
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self.reason: str | None = None  # why it gave up

    def watch(self, number: int, what: str) -> None:
        """From now on wait for hop `number`; `what` says what it is."""
        with self._changed:
            if not self._hops:
                self._alive = time.monotonic()
            self._hops.append((number, what))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="ulysses-triton watchdog", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until no hop is under way: all completed, or the watchdog gave up and ends what is."""
        with self._changed:
            while self._hops and self.reason is None:
                self._progress()
                self._changed.wait(_SOON)

    def close(self) -> None:
        """Stop watching. Idempotent."""
        with self._changed:
            self._closed = True
            self._hops.clear()
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self._timeout)  # it may be in an abort that does not come back

    def _work(self) -> None:
        asked = time.monotonic()
        while True:
            news = None
            if time.monotonic() - asked > _NEWS_SECONDS:
                news, asked = self._news(), time.monotonic()
            with self._changed:
                self._changed.wait_for(lambda: self._hops or self._closed)
                self._progress()
                if self._closed:
                    return
                if self._hops:
                    self.reason = self._trouble_now(news)
                    if self.reason is not None:
                        self._changed.notify_all()
                    else:
                        self._changed.wait(min(_SECONDS, self._timeout / _LOOKS))
            if self.reason is not None:
                self._give_up(self.reason)
                return self.close()

    def _progress(self) -> None:
        reached = self._reached()
        while self._hops and self._hops[0][0] <= reached:
            self._hops.popleft()
            self._alive = time.monotonic()
        if not self._hops:
            self._changed.notify_all()

    def _trouble_now(self, news: str | None) -> str | None:
        what = self._hops[0][1]
        trouble = news or self._trouble()
        if trouble is not None:
            return f"{what}: {trouble}"
        if time.monotonic() - self._alive > self._timeout:
            return f"{what}: not complete after {self._timeout:g} s"
        return None
