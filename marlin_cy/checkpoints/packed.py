"""Reading packed folders: models whose 4-bit weights are stored as tiles, so that they can be mapped.

::

    config.json      as in the source, except for quantization_config:
                     {"quant_method", "format_version": 1, "packed_sha256": of packed.json, "source": the source's own}
    packed.json      {"format_version": 1,
                      "stacks": {name: {"num_experts", "k", "n", "group_size", "codes", "scale_dtype"}},
                      "sha256": {tensor: of its bytes}}
    *.safetensors    <name>.packed  U8 [num_experts, bytes of an expert]   tiles as drawn in weights/packed_tiles.py
                     <name>.g_idx   I32 [num_experts, k]                   if rows of K are not in their own order
                     <name>.bias    F32 [num_experts, n]                   of routed experts
                     and every other tensor of the source, unchanged
    other files      tokenizer, generation_config.json, ...: copied

A stack's name is ``<block>.experts.gate_up``, ``<block>.experts.down``, or the name of a linear layer. Packed tensors
begin at multiples of 64 bytes of their file, because kernels need this alignment. The tiles do not depend on the
instruction set. Opening a folder checks everything except the tensors' bytes; ``verify`` checks these too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.activations import ACTIVATIONS
from marlin_cy.checkpoints.families import MoeSpec
from marlin_cy.checkpoints.partial_map import map_parts
from marlin_cy.checkpoints.safetensors import SafetensorsFolder
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.json_fields import JsonObject, StrPath, optional, positive, read_json
from marlin_cy.interface import Backend, Linear, MarlinExpertStack
from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.code_types import CODE_TYPES
from marlin_cy.weights.packed_tiles import PackedTiles
from marlin_cy.weights.scale_records import SCALE_RECORDS
from marlin_cy.weights.widening import StackKind

__all__ = [
    "BIAS",
    "DESCRIPTION",
    "FORMAT_VERSION",
    "G_IDX",
    "METHOD",
    "PACKED",
    "PackedSource",
    "is_packed",
    "sha256_of",
]

METHOD = "marlin_cy"
FORMAT_VERSION = 1
DESCRIPTION = "packed.json"
PACKED, G_IDX, BIAS = ".packed", ".g_idx", ".bias"
EXPERT_PARTS = ("gate_up", "down")
READ_BYTES = 16 << 20
"""Bytes that are hashed at a time."""


def is_packed(config: JsonObject) -> bool:
    """Whether a folder with this ``config.json`` is a packed folder."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


class PackedSource:
    """The quantised linear layers of a packed folder.

    It has the methods of :class:`~marlin_cy.checkpoints.quantised.QuantizedSource`, which documents them.

    Parameters
    ----------
    path : Path
    config : dict
        ``config.json``.
    tensors : SafetensorsFolder
    spec : MoeSpec
    verify : bool
        Compare the checksum of every tensor.

    Raises
    ------
    CheckpointError
        The folder has a newer version, a checksum differs, or the description contradicts the tensors.
    """

    format = "packed"

    def __init__(
        self,
        path: Path,
        config: JsonObject,
        tensors: SafetensorsFolder,
        spec: MoeSpec,
        verify: bool,
    ) -> None:
        self._tensors, self._spec = tensors, spec
        self._file = path / DESCRIPTION
        config_file = path / "config.json"
        quantization = config["quantization_config"]
        check_version(quantization, config_file)
        expected = optional(quantization, ("packed_sha256",), str, config_file)
        description = read_json(self._file)
        found = hashlib.sha256(self._file.read_bytes()).hexdigest()
        if found != expected:
            raise CheckpointError(f"got SHA-256 {found}, expected {expected} by config.json", file=self._file)
        check_version(description, self._file)
        self._stacks: dict[str, Any] = optional(description, ("stacks",), dict, self._file, default={})
        self._sums: dict[str, Any] = optional(description, ("sha256",), dict, self._file, default={})
        for name, stack in self._stacks.items():
            self._check_stack(name, stack)
        missing = sorted(set(self._sums) - set(tensors.names))
        if missing:
            raise CheckpointError("missing", file=tensors.source, tensor=missing[0])
        if verify:
            self._verify()

    def _check_stack(self, name: str, stack: Any) -> None:
        if not isinstance(stack, dict):
            raise CheckpointError(f"{name}: got {stack!r}, expected an object", file=self._file)
        for key in ("num_experts", "k", "n", "group_size"):
            positive(stack, (key,), self._file)
        for key, known in (("codes", CODE_TYPES), ("scale_dtype", SCALE_RECORDS)):
            value = optional(stack, (key,), str, self._file)
            if value not in known:
                raise CheckpointError(
                    f"{name}: {key}: got {value!r}, expected one of {', '.join(known)}", file=self._file
                )
        experts, k, n = stack["num_experts"], stack["k"], stack["n"]
        info = self._tensors.info(f"{name}{PACKED}")
        if info.dtype != "U8" or len(info.shape) != 2 or info.shape[0] != experts:
            raise self._tensors.error(
                f"{name}{PACKED}", f"got {info.dtype} {info.shape}, expected U8 ({experts}, bytes)"
            )
        for suffix, dtype, shape in ((G_IDX, "I32", (experts, k)), (BIAS, None, (experts, n))):
            if f"{name}{suffix}" in self._tensors and (suffix == G_IDX or experts > 1 or self._is_experts(name)):
                info = self._tensors.info(f"{name}{suffix}")
                if info.shape != shape or (dtype is not None and info.dtype != dtype):
                    raise self._tensors.error(f"{name}{suffix}", f"got {info.dtype} {info.shape}, expected {shape}")

    @staticmethod
    def _is_experts(name: str) -> bool:
        return name.endswith(tuple(f".experts.{part}" for part in EXPERT_PARTS))

    def _verify(self) -> None:
        for name in self._tensors.names:
            if name not in self._sums:
                raise self._tensors.error(name, f"has no checksum in {DESCRIPTION}")
            found = sha256_of(self._tensors.raw(name))
            if found != self._sums[name]:
                raise self._tensors.error(
                    name, f"got SHA-256 {found}, expected {self._sums[name]}: the file was damaged"
                )
            self._tensors.release(name)

    # Contents ----------------------------------------------------------------------------------

    @property
    def codes(self) -> str:
        return next((stack["codes"] for stack in self._stacks.values()), next(iter(CODE_TYPES)))

    @property
    def act_order(self) -> bool:
        return any(f"{name}{G_IDX}" in self._tensors for name in self._stacks)

    @property
    def linears(self) -> list[str]:
        return [name for name in self._stacks if not self._is_experts(name)]

    def has_linear(self, module: str) -> bool:
        return module in self._stacks

    def quantized_tensors(self) -> list[str]:
        """As in the other source; the biases of routed experts are included."""
        names = [f"{name}{suffix}" for name in self._stacks for suffix in (PACKED, G_IDX)]
        names += [f"{name}{BIAS}" for name in self._stacks if self._is_experts(name)]
        return [name for name in names if name in self._tensors]

    def expert_tensors(self, block: str) -> list[str]:
        return [name for part in EXPERT_PARTS for name in self.linear_tensors(f"{block}.experts.{part}")]

    def linear_tensors(self, module: str) -> list[str]:
        names = [f"{module}{suffix}" for suffix in (PACKED, G_IDX, BIAS)]
        return [name for name in names if name in self._tensors]

    def linear_sizes(self, module: str) -> tuple[int, int]:
        if module not in self._stacks:
            raise CheckpointError("missing", file=self._file, tensor=module)
        return self._stacks[module]["k"], self._stacks[module]["n"]

    def check_linear(self, module: str) -> None:
        """Does nothing: opening the folder checks all stacks."""

    def check_stacks(self, block: str) -> None:
        """Does nothing: opening the folder checks all stacks."""

    def holds_experts(self, block: str) -> bool:
        names = [f"{block}.experts.{part}" for part in EXPERT_PARTS]
        if not any(name in self._stacks for name in names):
            return False
        spec = self._spec
        inner = spec.intermediate_size * (2 if ACTIVATIONS[spec.activation].gated else 1)
        sizes = (spec.hidden_size, inner), (spec.intermediate_size, spec.hidden_size)
        for name, (k, n) in zip(names, sizes, strict=True):
            if name not in self._stacks:
                raise CheckpointError(f"{name}: missing", file=self._file)
            stack = self._stacks[name]
            got, expected = (stack["num_experts"], stack["k"], stack["n"]), (spec.num_experts, k, n)
            if got != expected:
                raise CheckpointError(f"{name}: got experts, k, n {got}, config.json says {expected}", file=self._file)
        return True

    def expert_kinds(self, block: str) -> tuple[StackKind, StackKind]:
        tiles = (self._tiles(f"{block}.experts.{part}") for part in EXPERT_PARTS)
        gate_up, down = (StackKind(part.group_size, part.codes, part.scales) for part in tiles)
        return gate_up, down

    def expert_symmetry(self, block: str) -> tuple[bool, bool]:
        """As in the other source; reads the stored zero points."""
        gate_up, down = (self._tiles(f"{block}.experts.{part}").symmetric for part in EXPERT_PARTS)
        return gate_up, down

    def expert_notes(self, block: str) -> list[str]:
        """None: how experts are held was decided when the folder was written."""
        return []

    def expert_bytes(self, block: str) -> int:
        return sum(self._tensors.info(name).nbytes for name in self.expert_tensors(block))

    # Loading -----------------------------------------------------------------------------------

    def expert_stacks(
        self, block: str, backend: Backend, description: str
    ) -> tuple[MarlinExpertStack, MarlinExpertStack]:
        """As in the other source. A backend that uses the tile layout gets stacks over the mapped files."""
        del description
        names = [f"{block}.experts.{part}" for part in EXPERT_PARTS]
        gate_up, down = (self._stack(name, backend, self.bias(name)) for name in names)
        return gate_up, down

    def linear(self, module: str, backend: Backend) -> Linear:
        stack = self._stack(module, backend)
        if f"{module}{BIAS}" in self._tensors:
            self._tensors.check(f"{module}{BIAS}", (self._stacks[module]["n"],))
        return backend.linear_of(stack, self.bias(module))

    def weight(self, module: str) -> CanonicalWeight:
        return self._tiles(module).canonical(0)

    def bias(self, module: str) -> npt.NDArray[np.float32] | None:
        name = f"{module}{BIAS}"
        return self._tensors.tensor(name).astype(np.float32) if name in self._tensors else None

    def release(self, module: str, index: int | None = None) -> None:
        """Does nothing: stacks use the mapped memory itself."""

    def _stack(self, name: str, backend: Backend, bias: npt.NDArray[np.float32] | None = None) -> MarlinExpertStack:
        tiles = self._tiles(name, bias)
        with self._as_tensor_error(f"{name}{PACKED}"):
            stack = backend.stack_from_packed(tiles)
        if stack is not None:
            return stack
        builder = backend.new_stack_builder(
            tiles.num_experts,
            tiles.k,
            tiles.n,
            group_size=tiles.group_size,
            g_idx=None if all(groups is None for groups in tiles.g_idx) else tiles.g_idx,
            codes=tiles.codes,
            scales=tiles.scales,
        )
        for expert in range(tiles.num_experts):
            builder.add(expert, 0, tiles.canonical(expert))
            self._tensors.release(f"{name}{PACKED}", expert)
        return builder.finish(tiles.bias)

    def _tiles(self, name: str, bias: npt.NDArray[np.float32] | None = None) -> PackedTiles:
        """A stack's tiles, in the mapped file."""
        if name not in self._stacks:
            raise CheckpointError("missing", file=self._file, tensor=name)
        stack, packed = self._stacks[name], f"{name}{PACKED}"
        g_idx, info = self._g_idx(name), self._tensors.info(packed)
        with self._as_tensor_error(packed):
            return PackedTiles(
                data=self._tensors.raw(packed).reshape(stack["num_experts"], -1),
                num_experts=stack["num_experts"],
                k=stack["k"],
                n=stack["n"],
                group_size=stack["group_size"],
                g_idx=[None] * stack["num_experts"] if g_idx is None else list(g_idx),
                codes=stack["codes"],
                scales=stack["scale_dtype"],
                bias=bias,
                map_parts=partial(map_parts, self._tensors.file_of(packed).path, info.begin, info.nbytes),
            )

    def _g_idx(self, name: str) -> npt.NDArray[np.int32] | None:
        if f"{name}{G_IDX}" not in self._tensors:
            return None
        stack = self._stacks[name]
        g_idx = self._tensors.tensor(f"{name}{G_IDX}").copy()
        groups = -(-stack["k"] // stack["group_size"])
        if g_idx.min() < 0 or g_idx.max() >= groups:
            raise self._tensors.error(
                f"{name}{G_IDX}", f"got {g_idx.min()} to {g_idx.max()}, expected 0 to {groups - 1}"
            )
        return g_idx

    @contextmanager
    def _as_tensor_error(self, tensor: str) -> Iterator[None]:
        """Turn an error about packed tiles into a :class:`CheckpointError` about their tensor."""
        try:
            yield
        except (TypeError, ValueError, IndexError, UnsupportedError) as error:
            raise self._tensors.error(tensor, str(error)) from error


def check_version(config: JsonObject, file: StrPath) -> None:
    """Refuse a folder that a later version of this library wrote."""
    version = positive(config, ("format_version",), file)
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"format_version: got {version}, this version of marlin_cy reads up to {FORMAT_VERSION}: upgrade it, "
            "or pack the source again",
            file=file,
        )


def sha256_of(data: npt.NDArray[np.uint8]) -> str:
    """Hexadecimal SHA-256 of a uint8 array, read in pieces."""
    digest = hashlib.sha256()
    for begin in range(0, len(data), READ_BYTES):
        digest.update(data[begin : begin + READ_BYTES].data)
    return digest.hexdigest()
