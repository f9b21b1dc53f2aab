"""Which kernels give correct results on a device: checked once, and remembered."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pyopencl as cl

from marlin_cy import __version__
from marlin_cy.opencl.cache import cache_folder, mark_used, trim, warn_unwritable
from marlin_cy.opencl.program import device_identity, sources_digest
from marlin_cy.opencl.tuned import Tuned

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.tiers.configuration import Configuration

__all__ = ["Verdicts", "confirmed", "unchecked_backend"]

SUFFIX = ".checked"
MAX_BYTES = 8 << 20  # of all devices' files; a line has some 500 bytes


class Verdicts:
    """The results of the checks on one device. Threads may share an object.

    In memory, all backends of a process share the verdicts on a device. On disk, there is a file for each device,
    driver, version of the library and set of kernels: its name is a digest of these. A line is a JSON object::

        {"kind": "KERNELS AND HOW THEY ARE LAUNCHED", "wrong": null or "WHAT IS WRONG"}

    Lines are only appended, each by one write, so processes may share a file; damaged lines are ignored.

    Parameters
    ----------
    device : pyopencl.Device
    """

    def __init__(self, device: cl.Device) -> None:
        built_by = os.environ.get("PYOPENCL_BUILD_OPTIONS")
        about = repr((__version__, device_identity(device), built_by, sources_digest()))
        self._name = hashlib.sha256(about.encode()).hexdigest()[:32] + SUFFIX
        with _memories_lock:
            self._memory = _memories.setdefault(self._name, Memory())

    def reason_wrong(self, kind: str, check: Callable[[], str | None]) -> str | None:
        """None if the kernels of a kind give correct results, else a description of the error.

        Parameters
        ----------
        kind : str
            The kernels, and everything that can make one use of them correct and another incorrect.
        check : callable
            Runs the kernels; returns None or a description of the error. Called as in :func:`confirmed` if there is no
            verdict. Its exceptions are passed on, and leave no verdict.
        """
        memory = self._memory
        try:
            return memory.verdicts[kind]
        except KeyError:
            pass
        with memory.lock:
            self._remember()
            if kind not in memory.verdicts:
                reason = confirmed(check)
                memory.verdicts[kind] = reason
                self._append(kind, reason)
            return memory.verdicts[kind]

    def knows(self, kind: str) -> bool:
        """Whether there is a verdict on a kind: for callers whose check is costly to prepare."""
        with self._memory.lock:
            self._remember()
            return kind in self._memory.verdicts

    def warn(self, name: str, reason: str, stacklevel: int) -> None:
        """Warn that kernels are not used; once in a process for each name."""
        with self._memory.lock:
            if name in self._memory.warned:
                return
            self._memory.warned.add(name)
        warnings.warn(f"{name} is not used: {reason}", RuntimeWarning, stacklevel=stacklevel + 1)

    def _remember(self) -> None:
        """Read the file, once. The caller holds the lock."""
        if not self._memory.read:
            self._memory.verdicts.update(self._read())
            self._memory.read = True

    def _path(self) -> Path | None:
        folder = cache_folder()
        return None if folder is None else folder / self._name

    def _read(self) -> dict[str, str | None]:
        path = self._path()
        try:
            lines = [] if path is None else path.read_bytes().splitlines()
        except OSError:
            return {}
        if path is not None:
            mark_used(path)
        found = {}
        for line in lines:
            try:
                entry = json.loads(line)
                kind, wrong = entry["kind"], entry["wrong"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            if isinstance(kind, str) and (wrong is None or isinstance(wrong, str)):
                found[kind] = wrong
        return found

    def _append(self, kind: str, reason: str | None) -> None:
        path = self._path()
        if path is None:
            return
        # A line break at both ends: half a line that a killed process left damages no other.
        line = f"\n{json.dumps({'kind': kind, 'wrong': reason})}\n".encode()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(handle, line)
            finally:
                os.close(handle)
        except OSError as error:
            warn_unwritable(path.parent, error, stacklevel=7)
            return
        trim(path.parent, (SUFFIX,), MAX_BYTES)


class Memory:
    """The verdicts of one file that this process knows."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.read = False
        self.verdicts: dict[str, str | None] = {}
        self.warned: set[str] = set()


_memories: dict[str, Memory] = {}
_memories_lock = threading.Lock()


def confirmed(check: Callable[[], str | None]) -> str | None:
    """None if a check passes, else a description of the error. An error counts if two of at most three runs find it.

    A fault that passes must not condemn a kernel: verdicts are kept.
    """
    if check() is None:
        return None
    second = check()
    return check() if second is None else second


def unchecked_backend(backend: OpenClBackend, configuration: Configuration | None = None) -> OpenClBackend:
    """A backend like another, with the same programs, whose kernels are used without a check.

    Parameters
    ----------
    backend : OpenClBackend
        Its tier has been chosen.
    configuration : Configuration, optional
        The one that all products use; the backend's own choices unless given.
    """
    other, tuned = copy.copy(backend), backend.runtime.tuned
    if configuration is not None:
        tuned = Tuned(backend.runtime.capabilities)
        tuned.forced(configuration)
    other.runtime = dataclasses.replace(backend.runtime, verdicts=None, tuned=tuned)
    return other
