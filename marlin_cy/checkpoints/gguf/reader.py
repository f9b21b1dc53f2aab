"""The header of GGUF files: metadata, and the place of each tensor. Everything is checked before it is used.

A file, little-endian::

    "GGUF" | version u32 | tensors u64 | fields u64 | fields | tensors' entries | padding | tensors' bytes

    field    key | type u32 | value                  an array's value: type u32 | length u64 | values
    entry    name | dimensions u32 | sizes u64, the innermost first | type u32 | offset u64
    string   length u64 | UTF-8

The package ``gguf`` knows the types of tensors. Its own reader makes several arrays for each string of the vocabulary,
which takes seconds, and it trusts counts and lengths, so headers are read here. Source: ggml, ``docs/gguf.md``.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from marlin_cy.checkpoints.gguf.files import model_files
from marlin_cy.checkpoints.gguf.package import tensor_type
from marlin_cy.errors import CheckpointError, UnsupportedError

__all__ = ["Header", "StoredTensor", "read_header"]

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
LFS = b"version https://git-lfs"
"""The first bytes of a Git LFS pointer."""

NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""The dtype of each type of a field that is a number."""

BOOL, STRING, ARRAY = 7, 8, 9
"""The types of fields that are truth values, strings and arrays."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's entry.

    Attributes
    ----------
    name : str
    type : str
        The name of its ggml type: ``"Q4_0"``, ``"F32"``.
    shape : tuple of int
        The innermost size last, as in NumPy.
    file : Path
    begin, end : int
        The range of its bytes in the file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """What a model's files say about themselves.

    Attributes
    ----------
    files : tuple of Path
        One file, or all parts of a model that was split.
    fields : mapping
        The metadata of the first file: int, float, bool, str, list of str, or a NumPy array of numbers.
    tensors : mapping
        The :class:`StoredTensor` of each name, in all files.
    """

    files: tuple[Path, ...]
    fields: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def read_header(path: Path) -> Header:
    """The header of the model that a GGUF file is, or is a part of. No tensor is read.

    Raises
    ------
    CheckpointError
        A file is missing, damaged or contradicts another one.
    UnsupportedError
        Another version, another order of bytes, or a type of tensors that is not known.
    BackendUnavailable
        The package ``gguf`` is not installed.
    """
    files = model_files(path)
    stats: list[tuple[int, int]] = []
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            part = f" (part {len(stats) + 1} of {len(files)})" if len(files) > 1 else ""
            raise CheckpointError(f"{error.strerror or error}{part}", file=file) from error
        stats.append((stat.st_size, stat.st_mtime_ns))
    return _read_all(files, tuple(stats))


@lru_cache(maxsize=2)
def _read_all(files: tuple[Path, ...], stats: tuple[tuple[int, int], ...]) -> Header:
    """The header; kept, as commands read it several times. ``stats``, sizes and times, tell when a file changes."""
    del stats
    parts = [_read_file(file) for file in files]
    fields = parts[0][0]
    tensors: dict[str, StoredTensor] = {}
    for number, (file, (own, found)) in enumerate(zip(files, parts, strict=True)):
        _check_split(own, number, len(files), file)
        for tensor in found:
            if tensor.name in tensors:
                raise CheckpointError("there are two of this name", file=file, tensor=tensor.name)
            tensors[tensor.name] = tensor
    expected = fields.get("split.tensors.count")
    if expected is not None and expected != len(tensors):
        raise CheckpointError(
            f"split.tensors.count: got {expected}, but there are {len(tensors)} tensors", file=files[0]
        )
    return Header(files, fields, tensors)


def _check_split(fields: Mapping[str, Any], number: int, count: int, file: Path) -> None:
    said = fields.get("split.no", number), fields.get("split.count", count)
    if said[1] in (0, 1):  # a file that was merged
        said = number, 1
    if said != (number, count):
        raise CheckpointError(
            f"split.no, split.count: got {said[0]} and {said[1]}, expected {number} and {count} by the file's name",
            file=file,
        )


def _read_file(path: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise CheckpointError(f"cannot be read: {error}", file=path) from error
    return _Reader(mapped, path).read()


class _Reader:
    """Reads the header of one file from its beginning."""

    def __init__(self, mapped: mmap.mmap, path: Path) -> None:
        self._data, self._size, self._path = memoryview(mapped), len(mapped), path
        self._at = 0

    def read(self) -> tuple[dict[str, Any], list[StoredTensor]]:
        """``(fields, tensors)``."""
        self._check_magic()
        num_tensors, num_fields = self._count("tensors", 24), self._count("fields", 13)
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._string("a key")
            if key in fields:
                raise self._error(f"{key}: there are two fields of this name")
            fields[key] = self._value(key)
        alignment = fields.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"general.alignment: got {alignment!r}, expected a power of two")
        entries = [self._entry() for _ in range(num_tensors)]
        start = -(-self._at // alignment) * alignment
        tensors = [self._placed(*entry, start, alignment) for entry in entries]
        self._check_places(tensors)
        return fields, tensors

    def _check_magic(self) -> None:
        if self._size < 24:
            raise self._error(f"got {self._size} bytes, expected a GGUF file")
        magic = bytes(self._data[:4])
        if bytes(self._data[: len(LFS)]) == LFS:
            raise self._error("this is a Git LFS pointer, not the file itself; git lfs pull fetches the file")
        if magic != b"GGUF":
            raise self._error(f"got {magic!r} at the beginning, expected b'GGUF'")
        version = int.from_bytes(self._data[4:8], "little")
        if version & 0xFFFF == 0:
            raise UnsupportedError(f"{self._path}: a big-endian GGUF file, only little-endian files are supported")
        if version not in VERSIONS:
            raise UnsupportedError(f"{self._path}: version {version} of GGUF, supported: 2 and 3")
        self._at = 8

    # Values ------------------------------------------------------------------------------------

    def _take(self, nbytes: int, what: str) -> int:
        """The place of the next bytes."""
        place = self._at
        if nbytes > self._size - place:
            raise self._error(
                f"truncated, or damaged: {what} has {nbytes} bytes at {place}, but the file ends at {self._size}"
            )
        self._at += nbytes
        return place

    def _number(self, form: str, size: int, what: str) -> int:
        (value,) = struct.unpack_from(form, self._data, self._take(size, what))
        return int(value)

    def _count(self, what: str, least: int) -> int:
        """A number of things, each of which takes at least ``least`` bytes."""
        count = self._number("<Q", 8, f"the number of {what}")
        if count > (self._size - self._at) // least:
            raise self._error(
                f"truncated, or damaged: got {count} {what}, but the file ends after {self._size - self._at} more bytes"
            )
        return count

    def _string(self, what: str) -> str:
        length = self._number("<Q", 8, f"the length of {what}")
        place = self._take(length, what)
        try:
            return str(self._data[place : place + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"{what}: not UTF-8 ({error.reason} at byte {place + error.start})") from None

    def _value(self, key: str) -> Any:
        kind = self._number("<I", 4, key)
        if kind == STRING:
            return self._string(key)
        if kind in NUMBERS:
            return self._numbers(kind, 1, key)[0].item()
        if kind != ARRAY:
            raise self._error(f"{key}: got type {kind} of a field, expected 0 to 12")
        kind = self._number("<I", 4, key)
        if kind == STRING:
            return self._strings(key)
        if kind not in NUMBERS:
            raise self._error(f"{key}: got an array of type {kind}, expected one of numbers or strings")
        return self._numbers(kind, self._count(f"values of {key}", 1), key)

    def _numbers(self, kind: int, count: int, key: str) -> Any:
        dtype = np.dtype(NUMBERS[kind])
        place = self._take(count * dtype.itemsize, key)
        values = np.frombuffer(self._data, np.uint8, count * dtype.itemsize, place).copy()
        return values.view(dtype) if kind != BOOL else values != 0

    def _strings(self, key: str) -> list[str]:
        """An array of strings: as :meth:`_string`, for hundreds of thousands."""
        count = self._count(f"values of {key}", 8)
        data, at, size, length_of = self._data, self._at, self._size, struct.Struct("<Q").unpack_from
        values = []
        for _ in range(count):
            if at + 8 > size or (end := at + 8 + length_of(data, at)[0]) > size:
                raise self._error(f"truncated, or damaged: {key} goes beyond the end of the file")
            values.append(data[at + 8 : end])
            at = end
        self._at = at
        try:
            return [str(value, "utf-8") for value in values]
        except UnicodeDecodeError as error:
            raise self._error(f"{key}: not UTF-8 ({error.reason})") from None

    # Tensors -----------------------------------------------------------------------------------

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """``(name, shape, type, offset)``."""
        name = self._string("a tensor's name")
        dimensions = self._number("<I", 4, name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._error(f"got {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}", name)
        sizes = [self._number("<Q", 8, name) for _ in range(dimensions)]
        if 0 in sizes or math.prod(sizes) >= 1 << 62:
            raise self._error(f"got sizes {sizes}, expected positive ones of less than 2**62 values", name)
        return name, tuple(reversed(sizes)), self._number("<I", 4, name), self._number("<Q", 8, name)

    def _placed(
        self, name: str, shape: tuple[int, ...], number: int, offset: int, start: int, alignment: int
    ) -> StoredTensor:
        found = tensor_type(number)
        if found is None:
            raise UnsupportedError(f"{self._path}, tensor {name!r}: type {number} is not known")
        type_name, block, block_bytes = found
        if shape[-1] % block:
            raise self._error(f"got rows of {shape[-1]} values, expected a multiple of {block} for {type_name}", name)
        nbytes = math.prod(shape) // block * block_bytes
        if offset % alignment:
            raise self._error(f"got offset {offset}, expected a multiple of general.alignment, {alignment}", name)
        begin = start + offset
        if begin + nbytes > self._size:
            raise self._error(
                f"truncated, or damaged: {nbytes} bytes at {begin}, but the file ends at {self._size}", name
            )
        return StoredTensor(name, type_name, shape, self._path, begin, begin + nbytes)

    def _check_places(self, tensors: list[StoredTensor]) -> None:
        ordered = sorted(tensors, key=lambda tensor: tensor.begin)
        for before, after in zip(ordered, ordered[1:], strict=False):
            if after.begin < before.end:
                raise self._error(f"begins at {after.begin}, inside of {before.name!r}", after.name)

    def _error(self, reason: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(reason, file=self._path, tensor=tensor)
