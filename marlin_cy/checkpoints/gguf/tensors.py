"""The tensors of a GGUF model under the names of the family, read from the mapped files.

Weights of linear layers keep their ggml type. All other tensors are floats here: those that are stored in a quantised
type are dequantised when they are read.
"""

from __future__ import annotations

import math
import mmap
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.families import FAMILIES, Family
from marlin_cy.checkpoints.gguf.architectures import Architecture
from marlin_cy.checkpoints.gguf.blocks import BLOCK_TYPES
from marlin_cy.checkpoints.gguf.package import dequantised
from marlin_cy.checkpoints.gguf.reader import Header, StoredTensor
from marlin_cy.checkpoints.gguf.views import Layer, Target, View, less_one, plain
from marlin_cy.checkpoints.safetensors import DTYPES, NEIGHBOURHOOD, TensorInfo
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.json_fields import JsonObject
from marlin_cy.weights.sizes import K_STEP, N_TILE

__all__ = ["LAYERS", "GgufTensors", "Owner"]

LAYERS = "model.layers"
FINAL_NORM = "output_norm"
WHOLE_MODEL = {"token_embd": "model.embed_tokens", "output": "lm_head", FINAL_NORM: "model.norm"}
"""The modules that belong to no layer."""

FLOATS = ("F32", "F16", "BF16")
"""The ggml types that are not quantised, whose names are those of safetensors."""

LAYER_TENSOR = re.compile(r"blk\.(?P<number>\d{1,9})\.(?P<name>.+)")
TILED = ("qwen35moe",)
"""Architectures whose value heads are tiled: see :class:`~marlin_cy.checkpoints.gguf.views.Layer`."""


class Owner(NamedTuple):
    """Who holds a tensor, as messages name it: the file, by ``path``."""

    path: Path


class GgufTensors:
    """The tensors of one model. It has the methods of :class:`~marlin_cy.checkpoints.safetensors.SafetensorsFolder`.

    Parameters
    ----------
    header : Header
    architecture : Architecture
    config : dict

    Raises
    ------
    CheckpointError
        A tensor has another shape than the metadata say, or two tensors mean the same.
    UnsupportedError
        A tensor that the architecture does not have, or a linear layer in a type that is not supported.
    """

    def __init__(self, header: Header, architecture: Architecture, config: JsonObject) -> None:
        self._header = header
        self._family = FAMILIES[config["model_type"]]
        self._num_layers: int = config["num_hidden_layers"]
        self._maps: dict[Path, mmap.mmap] | None = {path: _mapped(path) for path in header.files}
        self._views: dict[str, View] = {}
        self.skipped: list[str] = []
        for tensor in header.tensors.values():
            for view in self._views_of(tensor, architecture, config):
                if view.name in self._views:
                    raise CheckpointError(
                        f"there is {self._views[view.name].stored[0].name!r} too, which means the same",
                        file=tensor.file,
                        tensor=tensor.name,
                    )
                self._views[view.name] = view
        self._infos = {name: self._info(view) for name, view in self._views.items()}

    def _views_of(self, tensor: StoredTensor, architecture: Architecture, config: JsonObject) -> Iterable[View]:
        module, dot, end = tensor.name.rpartition(".")
        if module in WHOLE_MODEL and end == "weight":
            of_whole = less_one if architecture.one_centred and module == FINAL_NORM else plain
            return [of_whole(f"{WHOLE_MODEL[module]}.{end}", tensor)]
        match = LAYER_TENSOR.fullmatch(tensor.name)
        if match is None:
            raise self._unknown(tensor)
        number = int(match["number"])
        if number >= self._num_layers:
            # Layers that predict several tokens.
            self.skipped.append(tensor.name)
            return []
        name = match["name"]
        target: Target | None = architecture.names.get(name)
        if target is None:
            name = name.removesuffix(f"{dot}{end}")
            target = architecture.names.get(name) if end in ("weight", "bias") else None
        if target is None:
            raise self._unknown(tensor)
        layer = self._layer(number, config)
        if isinstance(target, str):
            return [plain(f"{layer.module}.{_formatted(target, self._family)}.{end}", tensor)]
        return target(layer, tensor, f".{end}")

    def _layer(self, number: int, config: JsonObject) -> Layer:
        tiled = self._header.fields.get("general.architecture") in TILED
        return Layer(self._header, config, self._family, number, f"{LAYERS}.{number}", tiled)

    def _unknown(self, tensor: StoredTensor) -> UnsupportedError:
        architecture = self._header.fields.get("general.architecture")
        return UnsupportedError(f"{tensor.file}, tensor {tensor.name!r}: not known for architecture {architecture!r}")

    def _info(self, view: View) -> TensorInfo:
        stored = view.stored[0]
        if self._is_packed(view):
            rows = math.prod(view.shape[:-1])
            return TensorInfo(stored.type, view.shape, stored.begin, stored.begin + rows * _row_bytes(stored))
        dtype = stored.type if stored.type in FLOATS and view.convert is None else "F32"
        nbytes = math.prod(view.shape) * DTYPES[dtype].itemsize
        return TensorInfo(dtype, view.shape, stored.begin, stored.begin + nbytes)

    def _is_packed(self, view: View) -> bool:
        """Whether a tensor is the weight of a linear layer that keeps its quantised type."""
        stored = view.stored[0]
        if stored.type in FLOATS or view.convert is not None or len(view.shape) < 2 or self._is_dense(view.name):
            return False
        n, k = view.shape[-2:]
        if n % N_TILE or k % K_STEP:
            return False
        if stored.type not in BLOCK_TYPES:
            raise UnsupportedError(
                f"{stored.file}, tensor {stored.name!r}: type {stored.type}, supported for linear layers: "
                f"{', '.join((*BLOCK_TYPES, *FLOATS))}"
            )
        return True

    def _is_dense(self, name: str) -> bool:
        """Whether the decoder needs a tensor as floats: an embedding, a router."""
        return name == "model.embed_tokens.weight" or name.endswith(f".{self._family.router}.weight")

    # Contents ----------------------------------------------------------------------------------

    @property
    def source(self) -> Path:
        """The first file."""
        return self._header.files[0]

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._views)

    def __contains__(self, name: object) -> bool:
        return name in self._views

    def view(self, name: str) -> View:
        """What a tensor is made of; a :class:`~marlin_cy.errors.CheckpointError` if there is no such tensor."""
        try:
            return self._views[name]
        except KeyError:
            raise CheckpointError("missing", file=self.source, tensor=name) from None

    def file_of(self, name: str) -> Owner:
        """The file that holds a tensor."""
        return Owner(self.view(name).stored[0].file)

    def info(self, name: str) -> TensorInfo:
        """A tensor's type, shape and place. The type is a name of safetensors, or a quantised ggml type."""
        self.view(name)
        return self._infos[name]

    def error(self, name: str, reason: str) -> CheckpointError:
        """An error about a tensor, under the name that it has in the file."""
        stored = self.view(name).stored[0]
        return CheckpointError(reason, file=stored.file, tensor=stored.name)

    def check(self, name: str, shape: tuple[int, ...], dtypes: Sequence[str] | None = None) -> None:
        """As :meth:`~marlin_cy.checkpoints.safetensors.SafetensorsFolder.check`."""
        info = self.info(name)
        if info.shape != shape or (dtypes is not None and info.dtype not in dtypes):
            wanted = " or ".join(dtypes) if dtypes else info.dtype
            raise self.error(name, f"got {info.dtype} {info.shape}, expected {wanted} {shape} by the metadata")

    # Bytes -------------------------------------------------------------------------------------

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """A tensor's values: a view of the file where the file has them so, else a new array.

        Raises
        ------
        UnsupportedError
            The tensor is the weight of a quantised linear layer.
        """
        view, info = self.view(name), self.info(name)
        if info.dtype not in DTYPES:
            raise UnsupportedError(f"{self.source}, tensor {name!r}: {info.dtype} has no NumPy equivalent")
        if view.convert is None:
            return self._ordered(view, self._values(view.stored[0], DTYPES[info.dtype]))
        parts = [self._ordered(view, self._values(part, np.dtype(np.float32))) for part in view.stored]
        with np.errstate(all="ignore"):  # a damaged file has any bits
            return np.require(view.convert(*parts), np.float32, "C").reshape(view.shape)

    def blocks(self, name: str, expert: int | None = None) -> npt.NDArray[np.uint8]:
        """The blocks of a quantised linear layer, uint8 ``[n, bytes of a row]``: a view, or a copy in another order.

        Parameters
        ----------
        name : str
        expert : int, optional
            Of a tensor of all experts.
        """
        view = self.view(name)
        stored = view.stored[0]
        rows = self._raw(stored).reshape(*stored.shape[:-1], _row_bytes(stored))
        found: npt.NDArray[np.uint8] = rows if expert is None else rows[expert]
        return found if view.rows is None else found[view.rows]

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor as :meth:`tensor` gives it; of a quantised linear layer, its blocks."""
        values = self.tensor(name) if self.info(name).dtype in DTYPES else self.blocks(name)
        return np.ascontiguousarray(values).reshape(-1).view(np.uint8)

    def release(self, name: str, index: int | None = None) -> None:
        """Let the operating system reclaim the memory into which a tensor, or one expert of it, was read."""
        if self._maps is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        for stored in self.view(name).stored:
            first, last = stored.begin, stored.end
            if index is not None:
                step = stored.nbytes // stored.shape[0]
                first, last = stored.begin + index * step, stored.begin + (index + 1) * step
            mapped = self._map(stored.file)
            begin = max(0, first - NEIGHBOURHOOD) // mmap.PAGESIZE * mmap.PAGESIZE
            end = min(last + NEIGHBOURHOOD, len(mapped))
            mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def close(self) -> None:
        """Drop the maps. Existing views stay valid and keep the files mapped."""
        self._maps = None

    def _values(self, stored: StoredTensor, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """The values of a stored tensor, in its own order."""
        raw = self._raw(stored)
        if stored.type not in FLOATS:
            rows = raw.reshape(-1, _row_bytes(stored))
            kind = BLOCK_TYPES.get(stored.type)
            values = dequantised(rows, stored.type) if kind is None else kind.values(rows)
            return values.reshape(stored.shape)
        own = DTYPES[stored.type]
        if raw.ctypes.data % own.itemsize:
            raw = raw.copy()
        floats: npt.NDArray[Any] = raw.view(own).reshape(stored.shape)
        if sys.byteorder == "big":
            floats = floats.byteswap()
        return floats if own == dtype else floats.astype(dtype)

    @staticmethod
    def _ordered(view: View, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if view.rows is not None:
            values = values[view.rows]
        return values if view.columns is None else np.ascontiguousarray(values[..., view.columns])

    def _raw(self, stored: StoredTensor) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self._map(stored.file), np.uint8, stored.nbytes, stored.begin)

    def _map(self, path: Path) -> mmap.mmap:
        if self._maps is None:
            raise ValueError(f"{self.source} was closed")
        return self._maps[path]

    @cached_property
    def quantised_names(self) -> list[str]:
        """The names of the weights that keep a quantised type."""
        return [name for name, info in self._infos.items() if info.dtype not in DTYPES]


def _mapped(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", file=path) from error


def _formatted(target: str, family: Family) -> str:
    return target.format(**vars(family)) if "{" in target else target


def _row_bytes(stored: StoredTensor) -> int:
    return stored.nbytes // math.prod(stored.shape[:-1])
