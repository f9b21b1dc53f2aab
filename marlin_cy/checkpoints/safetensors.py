"""Memory-mapped safetensors files: views without copies, and pages that can be released.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes. The ``safetensors``
library checks the header (offsets, sizes, the file's length). The views are made here, because the library's reader
copies each tensor and cannot release pages. Source: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.json_fields import StrPath, check_fetched, read_json

__all__ = ["DTYPES", "FLOATS", "SafetensorsFile", "SafetensorsFolder", "TensorInfo"]

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
"""The NumPy dtype of each safetensors dtype that has one. F8_E8M0 numbers are read as their exponents."""

FLOATS = ("F32", "F16", "BF16")
"""The dtypes of weights that are not quantised."""

NEIGHBOURHOOD = 2 * 1024 * 1024
"""Bytes on either side of a tensor that are released with it.

Reading a page maps its neighbours too: 64 KiB (Linux's fault_around_bytes), or a whole large folio of up to 2 MiB.
Measured on Linux 6.18 with tensors of 4 to 64 KB: after releasing 64 KiB on either side, a third of the file stayed
resident; after 2 MiB, nothing did, and loading took as long.
"""


BEGINNING = 64
"""Bytes that show what a file is, if it is not a safetensors file."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in the header.

    Attributes
    ----------
    dtype : str
        The safetensors name: ``"I32"``, ``"BF16"``.
    shape : tuple of int
    begin, end : int
        The range of its bytes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin


class SafetensorsFile:
    """One file, mapped read-only.

    Views may outlive the file object: the file is unmapped when the last view is gone. The file must not be
    truncated while it is mapped: the operating system terminates a process that reads mapped bytes beyond its end.

    Parameters
    ----------
    path : path-like

    Raises
    ------
    CheckpointError
        There is no such file, or it is not a valid safetensors file.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                check_fetched(file.read(BEGINNING), self.path)
            # Raises unless the tensors are adjacent and fill the file exactly.
            with safe_open(self.path, framework="np"):
                pass
            with open(self.path, "rb") as file:
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(str(error), file=path) from error
        self._tensors = self._parse_header(self._map)

    def _parse_header(self, mapped: mmap.mmap) -> dict[str, TensorInfo]:
        (length,) = struct.unpack_from("<Q", mapped)
        start, size = 8 + length, len(mapped)
        header = json.loads(mapped[8:start].decode())
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            tensors[name] = info = TensorInfo(entry["dtype"], tuple(entry["shape"]), begin, end)
            dtype = DTYPES.get(info.dtype)
            # The library and json resolve duplicate names differently, so the offsets are checked again here.
            count = math.prod(info.shape)
            if not start <= begin <= end <= size or (dtype and count * dtype.itemsize != info.nbytes):
                raise CheckpointError(
                    f"got bytes {begin} to {end} for {info.dtype} {info.shape} in a file of {size} bytes",
                    file=self.path,
                    tensor=name,
                )
        return tensors

    @property
    def names(self) -> list[str]:
        """The tensors' names, in the header's order."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """A tensor's entry in the header. Its bytes are not read.

        Raises
        ------
        CheckpointError
            The file has no such tensor.
        """
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError("missing", file=self.path, tensor=name) from None

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """A read-only view of a tensor; a copy if its bytes are not aligned to its dtype.

        Raises
        ------
        CheckpointError
            The file has no such tensor.
        UnsupportedError
            NumPy has no equivalent dtype.
        ValueError
            The file was closed.
        """
        info = self.info(name)
        if info.dtype not in DTYPES:
            raise UnsupportedError(f"{self.path}, tensor {name!r}: dtype {info.dtype} has no NumPy equivalent")
        if self._map is None:
            raise ValueError(f"{self.path} was closed")
        array: npt.NDArray[Any] = np.ndarray(info.shape, DTYPES[info.dtype], buffer=self._map, offset=info.begin)
        if sys.byteorder == "big":
            array = array.byteswap()
        elif not array.flags.aligned:
            array = array.copy()
        return array

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor of any dtype: a read-only uint8 view.

        Raises
        ------
        CheckpointError, ValueError
            As :meth:`tensor`.
        """
        info = self.info(name)
        if self._map is None:
            raise ValueError(f"{self.path} was closed")
        array: npt.NDArray[np.uint8] = np.ndarray((info.nbytes,), np.uint8, buffer=self._map, offset=info.begin)
        return array

    def release(self, name: str, index: int | None = None) -> None:
        """Let the operating system reclaim the memory into which a tensor's bytes were read.

        Neighbouring pages are released too. Views stay valid; using one reads the file again.

        Parameters
        ----------
        name : str
        index : int, optional
            Release only this entry of the tensor's first axis.
        """
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        info = self.info(name)
        first, last = info.begin, info.end
        if index is not None:
            step = info.nbytes // info.shape[0]
            first, last = info.begin + index * step, info.begin + (index + 1) * step
        begin = max(0, first - NEIGHBOURHOOD) // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(last + NEIGHBOURHOOD, len(self._map))
        self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def close(self) -> None:
        """Drop the map. Existing views stay valid and keep the file mapped."""
        self._map = None


class SafetensorsFolder:
    """The tensors of a model's folder: one ``*.safetensors``, or an index and its shards.

    ``model.safetensors`` has precedence over an index, and an index over any other single file.

    Parameters
    ----------
    folder : path-like

    Raises
    ------
    CheckpointError
        There are no such files, or several without an index; a file or the index is invalid; or the index names
        a shard or a tensor that does not exist.
    """

    def __init__(self, folder: StrPath) -> None:
        folder = Path(folder)
        single = folder / "model.safetensors"
        files = sorted(folder.glob("*.safetensors"))
        indices = sorted(folder.glob("*.safetensors.index.json"))
        if single in files:
            files, indices = [single], []
        if len(indices) == 1:
            self._file_of = _open_shards(indices[0])
            self._source = indices[0]
        elif len(files) == 1 and not indices:
            file = SafetensorsFile(files[0])
            self._file_of = dict.fromkeys(file.names, file)
            self._source = files[0]
        else:
            found = ", ".join(path.name for path in indices + files) or "none"
            raise CheckpointError(
                f"got {found}, expected model.safetensors, one *.safetensors.index.json, or one *.safetensors",
                file=folder,
            )

    @property
    def source(self) -> Path:
        """The file that lists all tensors: the index, or the single file."""
        return self._source

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def file_of(self, name: str) -> SafetensorsFile:
        """The file that holds a tensor; a :class:`~marlin_cy.errors.CheckpointError` if no file does."""
        try:
            return self._file_of[name]
        except KeyError:
            raise CheckpointError("missing", file=self._source, tensor=name) from None

    def info(self, name: str) -> TensorInfo:
        """As :meth:`SafetensorsFile.info`."""
        return self.file_of(name).info(name)

    def error(self, name: str, reason: str) -> CheckpointError:
        """An error about an existing tensor, which names the tensor's file."""
        return CheckpointError(reason, file=self.file_of(name).path, tensor=name)

    def check(self, name: str, shape: tuple[int, ...], dtypes: Sequence[str] | None = None) -> None:
        """Refuse a tensor that does not match a model's configuration.

        Parameters
        ----------
        name : str
        shape : tuple of int
        dtypes : sequence of str, optional
            The accepted dtypes, by safetensors' names; any if omitted.

        Raises
        ------
        CheckpointError
            The tensor is missing, or has another shape or dtype.
        """
        info = self.info(name)
        if info.shape != shape or (dtypes is not None and info.dtype not in dtypes):
            wanted = " or ".join(dtypes) if dtypes else info.dtype
            raise self.error(name, f"got {info.dtype} {info.shape}, expected {wanted} {shape} by the configuration")

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """As :meth:`SafetensorsFile.tensor`."""
        return self.file_of(name).tensor(name)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """As :meth:`SafetensorsFile.raw`."""
        return self.file_of(name).raw(name)

    def release(self, name: str, index: int | None = None) -> None:
        """As :meth:`SafetensorsFile.release`."""
        self.file_of(name).release(name, index)

    def close(self) -> None:
        """As :meth:`SafetensorsFile.close`, for every file."""
        for file in set(self._file_of.values()):
            file.close()


def _open_shards(index: Path) -> dict[str, SafetensorsFile]:
    """The :class:`SafetensorsFile` of each tensor that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError("weight_map: expected an object from tensor names to file names", file=index)
    shards: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if os.path.basename(shard) != shard or not os.path.isfile(path):
            raise CheckpointError(f"the index names shard {shard!r}, which is not in the folder", file=index)
        shards[shard] = SafetensorsFile(path)
    for name, shard in weight_map.items():
        shards[shard].info(name)
    return {name: shards[shard] for name, shard in weight_map.items()}
