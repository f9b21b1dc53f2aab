"""Calls after ``fork``.

GNU's OpenMP keeps a team of threads for each thread that has started one. A child of ``fork`` inherits the record of
its parent's team but not the team's threads, so a call in the child would wait for ever. A thread that is started in
the child has no such record. Therefore:

- calls in a child run on one thread that is started for this purpose, one call after another, no matter which threads
  make the calls. Each call still uses as many OpenMP threads as its context says. A KeyboardInterrupt is raised after
  the call has ended, as in the parent;
- a context that is in use at the fork, by a call of another thread of the parent, stays in use in the child for ever:
  the call that would release it does not exist there. Calls with this context raise ``ContextInUse``; make a new
  context in the child.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

__all__ = ["run"]

Result = TypeVar("Result")

_executor: ThreadPoolExecutor | None = None


def run(function: Callable[..., Result], *args: object) -> Result:
    """``function(*args)``, on a thread that may start an OpenMP team."""
    if _executor is None:
        return function(*args)
    future = _executor.submit(function, *args)
    try:
        return future.result()
    finally:
        # After a KeyboardInterrupt, the call may still write to memory that its caller takes back.
        while not future.done():
            with suppress(KeyboardInterrupt):
                wait([future])


def _in_child() -> None:
    global _executor
    _executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="marlin_cy")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
