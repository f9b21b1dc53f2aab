"""Process groups of PyTorch that are a single process: one thread serves them all.

vLLM makes about 15 process groups, most of them or all with one process. Gloo starts a thread for each group, which
wakes up 100 times a second to look for messages, even if the group has nobody to talk to. Where the model has few
CPUs, these 1500 interruptions a second hold up threads that others wait for.
"""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any

from torch.distributed import distributed_c10d

__all__ = ["share_threads"]


def share_threads() -> None:
    """Let groups of one process, made from now on, share one device of Gloo, and so its thread."""
    group = getattr(distributed_c10d, "ProcessGroupGloo", None)
    if group is None or not hasattr(group, "_Options") or hasattr(group.__init__, "__wrapped__"):
        return
    make = group.__init__

    @functools.cache
    def device() -> Any:
        return group.create_default_device()

    @functools.wraps(make)
    def make_sharing(self: Any, store: Any, rank: int, size: int, timeout: Any = None, **options: Any) -> None:
        if size > 1 or not isinstance(timeout, timedelta) or options:
            given = {} if timeout is None else {"timeout": timeout}
            make(self, store, rank, size, **given, **options)
            return
        chosen = group._Options()
        chosen._devices, chosen._timeout = [device()], timeout
        make(self, store, rank, size, chosen)

    group.__init__ = make_sharing
