"""A limit in time for calls that know none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def within(seconds: float, function: Callable[[], Any], failure: str) -> Any:
    """The result of `function`, which may never return: then it is left behind in its thread, and `failure` is raised.

    Raises RuntimeError.
    """
    result: list[Any] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            result.append(function())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name=f"ulysses-triton: {failure}?", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # Python 3.12 starts no threads at exit
        return function()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not result:
        raise RuntimeError(f"{failure} within {seconds:g} s")
    return result[0]
