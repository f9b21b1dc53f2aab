"""Calls after ``fork``.

GNU's OpenMP keeps a team of threads for each thread that has started one. A child of ``fork``
inherits the record of its parent's team but not the threads, and would wait for them for ever. A
thread started in the child has no such record. So calls in a child run on one of these.
"""

import os
from concurrent.futures import ThreadPoolExecutor

__all__ = ["run"]

_executor = None


def _in_child():
    global _executor
    _executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="marlin_cy")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def run(function, *args):
    """``function(*args)``, on a thread that may start an OpenMP team."""
    if _executor is None:
        return function(*args)
    return _executor.submit(function, *args).result()
