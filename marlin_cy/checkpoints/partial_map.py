"""Maps of some parts of a file, at their distances in the file.

The address space of the whole range is reserved, and the wanted pages are mapped into it::

    file       | expert 0: a b c d | expert 1: a b c d | ...
    memory     |           . b . . |           . b . . |           . = reserved: no memory, no access

If a whole file is mapped and a part of it is read, the system also maps pages around the part, if it has them
in its cache. With one map for each part, it does not.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["map_parts"]

MAP_FIXED = 0x10  # Linux and macOS; Python's module does not have it
RESERVED = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0) | getattr(mmap, "MAP_NORESERVE", 0)


def map_parts(path: Path, begin: int, nbytes: int, parts: Iterable[tuple[int, int]]) -> npt.NDArray[np.uint8] | None:
    """``nbytes`` of a file from ``begin`` on, of which only some parts may be read.

    Parameters
    ----------
    path : Path
    begin, nbytes : int
    parts : pairs of int
        ``(first, end)``, relative to ``begin``, ascending.

    Returns
    -------
    uint8 ``[nbytes]``, read-only
        A read outside of the parts ends the process. None on a system without such maps.

    Raises
    ------
    MemoryError
        The system allows no more maps.
    """
    if sys.platform not in ("linux", "darwin"):
        return None
    return np.asarray(_Map(path, begin, nbytes, parts))


class _Map:
    """The owner of the reserved addresses, which NumPy keeps as an array's base."""

    def __init__(self, path: Path, begin: int, nbytes: int, parts: Iterable[tuple[int, int]]) -> None:
        self._library = ctypes.CDLL(None, use_errno=True)
        self._library.mmap.restype = ctypes.c_void_p
        self._library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        first_page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._size = pages_up(begin + nbytes) - first_page
        self._base = 0
        self._base = self._mapped(0, self._size, 0, RESERVED, -1, 0)
        file = os.open(path, os.O_RDONLY)
        try:
            for first, end in pages_of(parts, begin):
                address = self._base + first - first_page
                self._mapped(address, end - first, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, file, first)
        finally:
            os.close(file)
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (self._base + begin - first_page, True),
        }

    def _mapped(self, address: int, size: int, access: int, flags: int, file: int, offset: int) -> int:
        found: int | None = self._library.mmap(address, size, access, flags, file, offset)
        if found in (None, ctypes.c_void_p(-1).value):
            reason = os.strerror(ctypes.get_errno())
            raise MemoryError(
                f"packed weights: could not map {size} bytes ({reason}); Linux allows vm.max_map_count maps, and each "
                "expert takes three"
            )
        assert found is not None
        return found

    def __del__(self) -> None:
        if getattr(self, "_base", 0):
            self._library.munmap(self._base, self._size)


def pages_of(parts: Iterable[tuple[int, int]], begin: int) -> Iterator[tuple[int, int]]:
    """The whole pages of a file that hold the parts, ``(first, end)``; parts that share a page are joined."""
    current: tuple[int, int] | None = None
    for first, end in parts:
        page, last = (begin + first) // mmap.PAGESIZE * mmap.PAGESIZE, pages_up(begin + end)
        if current is not None and page <= current[1]:
            current = current[0], max(last, current[1])
            continue
        if current is not None:
            yield current
        current = page, last
    if current is not None:
        yield current


def pages_up(nbytes: int) -> int:
    """``nbytes``, rounded up to whole pages."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
