"""Safetensors files by memory map: views without copying, and pages given back when done.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes. The
``safetensors`` library judges the header (offsets, sizes, the file's length); the views are made
here because its own reader copies each tensor and offers no way to give pages back.
Source: https://huggingface.co/docs/safetensors.
"""

import json
import math
import mmap
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from marlin_cy.errors import CheckpointError, UnsupportedError

__all__ = ["DTYPES", "SafetensorsFile", "SafetensorsFolder", "TensorInfo", "read_json"]

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
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
"""NumPy's dtype for each of the format's that has one."""

# Touching a page maps its neighbours as well: 64 KiB of them (Linux's fault_around_bytes), or all of
# a large folio, up to 2 MiB. Measured on Linux 6.18 with tensors of 4 to 64 KB: giving back only 64 KiB
# on either side left a third of the file resident, 2 MiB left nothing, and loading took as long.
NEIGHBOURHOOD = 2 * 1024 * 1024


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor.

    Attributes
    ----------
    dtype : str
        The format's own name: ``"I32"``, ``"BF16"``.
    shape : tuple of int
    begin, end : int
        Its bytes, counted from the start of the file.
    """

    dtype: str
    shape: tuple
    begin: int
    end: int

    @property
    def nbytes(self):
        return self.end - self.begin


class SafetensorsFile:
    """One file, mapped read-only.

    Views may outlive the file object: the map is undone when the last of them is gone. The file
    itself must not be shortened meanwhile; the operating system ends a process that touches mapped
    bytes which are no longer there.

    Parameters
    ----------
    path : path-like

    Raises
    ------
    CheckpointError
        No such file, not a file, or not a valid safetensors file.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            # Raises unless the tensors lie back to back and fill the file exactly.
            with safe_open(self.path, framework="np"):
                pass
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(str(error), file=path) from error
        self._tensors = self._parse_header()

    def _parse_header(self):
        (length,) = struct.unpack_from("<Q", self._map)
        start, size = 8 + length, len(self._map)
        header = json.loads(self._map[8:start].decode())
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            tensors[name] = info = TensorInfo(entry["dtype"], tuple(entry["shape"]), begin, end)
            dtype = DTYPES.get(info.dtype)
            # The library reads a header with duplicate names in its own way: trust no offset but by this.
            count = math.prod(info.shape)
            if not start <= begin <= end <= size or (dtype and count * dtype.itemsize != info.nbytes):
                raise CheckpointError(
                    f"got bytes {begin} to {end} for {info.dtype} {info.shape} in a file of {size} bytes",
                    file=self.path,
                    tensor=name,
                )
        return tensors

    @property
    def names(self):
        """The tensors' names, in the header's order."""
        return list(self._tensors)

    def info(self, name) -> TensorInfo:
        """What the header says of a tensor; its bytes are not touched.

        Raises
        ------
        CheckpointError
            The file has no such tensor.
        """
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError("missing", file=self.path, tensor=name) from None

    def tensor(self, name) -> np.ndarray:
        """A read-only view of a tensor; a copy where its bytes are not aligned to its dtype.

        Raises
        ------
        CheckpointError
            The file has no such tensor.
        UnsupportedError
            NumPy has no such dtype.
        ValueError
            The file was closed.
        """
        info = self.info(name)
        if info.dtype not in DTYPES:
            raise UnsupportedError(f"{self.path}, tensor {name!r}: dtype {info.dtype} has no NumPy equivalent")
        if self._map is None:
            raise ValueError(f"{self.path} was closed")
        array = np.ndarray(info.shape, DTYPES[info.dtype], buffer=self._map, offset=info.begin)
        if sys.byteorder == "big":
            return array.byteswap()
        return array if array.flags.aligned else array.copy()

    def raw(self, name) -> np.ndarray:
        """A tensor's bytes, a read-only uint8 view, whatever its dtype.

        Raises
        ------
        CheckpointError, ValueError
            As :meth:`tensor`.
        """
        info = self.info(name)
        if self._map is None:
            raise ValueError(f"{self.path} was closed")
        return np.ndarray((info.nbytes,), np.uint8, buffer=self._map, offset=info.begin)

    def release(self, name, index=None):
        """Let the operating system take back the memory that a tensor's bytes were read into.

        Neighbours that were read in with them go as well. Nothing is lost: views stay valid, and using
        one reads the file again.

        Parameters
        ----------
        name : str
        index : int, optional
            Only this entry of the tensor's first axis.
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

    def close(self):
        """Forget the map. Views that exist stay valid and keep it until they are gone."""
        self._map = None


class SafetensorsFolder:
    """The tensors of a model's folder: one ``*.safetensors``, or an index and its shards.

    ``model.safetensors`` comes first, then an index, then any single file.

    Parameters
    ----------
    folder : path-like

    Raises
    ------
    CheckpointError
        No such files, or several; a bad file or index; an index that names a shard or a tensor that
        is not there.
    """

    def __init__(self, folder):
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
    def source(self):
        """The file that says which tensors there are."""
        return self._source

    @property
    def names(self):
        """The names of all tensors."""
        return list(self._file_of)

    def __contains__(self, name):
        return name in self._file_of

    def file_of(self, name) -> SafetensorsFile:
        """The file that holds a tensor; :class:`~marlin_cy.errors.CheckpointError` when none does."""
        try:
            return self._file_of[name]
        except KeyError:
            raise CheckpointError("missing", file=self._source, tensor=name) from None

    def info(self, name) -> TensorInfo:
        """As :meth:`SafetensorsFile.info`."""
        return self.file_of(name).info(name)

    def error(self, name, reason) -> CheckpointError:
        """What is wrong with a tensor that there is, with its file."""
        return CheckpointError(reason, file=self.file_of(name).path, tensor=name)

    def check(self, name, shape, dtypes=None):
        """Refuse a tensor that is missing, or of another shape or dtype (any of safetensors' names) than a model's
        configuration says, with a :class:`~marlin_cy.errors.CheckpointError`."""
        info = self.info(name)
        if info.shape != shape or (dtypes is not None and info.dtype not in dtypes):
            wanted = " or ".join(dtypes) if dtypes else info.dtype
            raise self.error(name, f"got {info.dtype} {info.shape}, expected {wanted} {shape} by the configuration")

    def tensor(self, name) -> np.ndarray:
        """As :meth:`SafetensorsFile.tensor`."""
        return self.file_of(name).tensor(name)

    def raw(self, name) -> np.ndarray:
        """As :meth:`SafetensorsFile.raw`."""
        return self.file_of(name).raw(name)

    def release(self, name, index=None):
        """As :meth:`SafetensorsFile.release`."""
        self.file_of(name).release(name, index)

    def close(self):
        """As :meth:`SafetensorsFile.close`, for every file."""
        for file in set(self._file_of.values()):
            file.close()


def read_json(path) -> dict:
    """The object that a JSON file holds.

    Raises
    ------
    CheckpointError
        No such file, or it holds something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(error.strerror or str(error), file=path) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not JSON: {error}", file=path) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"got a JSON {type(value).__name__}, expected an object", file=path)
    return value


def _open_shards(index):
    """The :class:`SafetensorsFile` of each tensor that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError("weight_map: expected an object from tensor names to file names", file=index)
    shards = {}
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if os.path.basename(shard) != shard or not os.path.isfile(path):
            raise CheckpointError(f"the index names shard {shard!r}, which is not in the folder", file=index)
        shards[shard] = SafetensorsFile(path)
    for name, shard in weight_map.items():
        shards[shard].info(name)
    return {name: shards[shard] for name, shard in weight_map.items()}
