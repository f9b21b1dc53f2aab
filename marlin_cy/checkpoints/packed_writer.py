"""Writing packed folders; :mod:`marlin_cy.checkpoints.packed` describes their contents and reads them.

The folder is filled in place, whether it existed or not. Only the files ``packed.json`` and ``config.json`` identify a
packed folder. They are written last, so an interrupted write does not leave a folder that looks complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.checkpoint import Checkpoint
from marlin_cy.checkpoints.gguf.documents import gguf_documents
from marlin_cy.checkpoints.gguf.files import model_files
from marlin_cy.checkpoints.gguf.source import GgufSource
from marlin_cy.checkpoints.packed import (
    BIAS,
    DESCRIPTION,
    FORMAT_VERSION,
    G_IDX,
    METHOD,
    PACKED,
    PackedSource,
    sha256_of,
)
from marlin_cy.checkpoints.safetensors import DTYPES, SafetensorsFile
from marlin_cy.errors import CheckpointError
from marlin_cy.formats.json_fields import StrPath
from marlin_cy.formats.registry import FILES as QUANTISER_FILES

__all__ = ["write_packed"]

ALIGNMENT = 64
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
"""Ends of the names of files that hold weights, which are not copied."""

Tensors: TypeAlias = "dict[str, tuple[str, tuple[int, ...], npt.NDArray[np.uint8]]]"
"""``(safetensors dtype, shape, bytes)`` of each tensor, by name."""

Part: TypeAlias = "tuple[int | None, list[str], list[str]]"
"""The contents of a file: ``(MoE layer or None, linear layers, other tensors)``."""


def write_packed(
    checkpoint: Checkpoint, out: StrPath, progress: Callable[[int, int, str], object] | None = None
) -> dict[str, int]:
    """Write an open checkpoint as a packed folder.

    Parameters
    ----------
    checkpoint : Checkpoint
        On the CPU backend, and not packed itself.
    out : path-like
        A folder that does not exist, or is empty. An existing folder is filled in place.
    progress : callable, optional
        Called as ``progress(done, total, description)`` after each file of tensors.

    Returns
    -------
    dict
        ``bytes`` written, ``source_bytes``, ``stacks``, ``files``.

    Raises
    ------
    FileExistsError
        ``out`` is a file, or a folder that is not empty.
    CheckpointError
        The source is packed already, or damaged.
    OSError
        The disk is full, or ``out`` is not writable.

    Notes
    -----
    If anything fails, all files that were written are removed, and so is ``out`` if it did not exist.
    """
    out = Path(out)
    if checkpoint.format == PackedSource.format:
        raise CheckpointError("this folder is packed already", file=checkpoint.path)
    existed = out.exists()
    if existed and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists already, and is not an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    writer = PackedFolderWriter(checkpoint, out, progress)
    try:
        return writer.write()
    except BaseException:
        writer.remove()
        if not existed:
            remove_if_empty(out)
        raise


class PackedFolderWriter:
    """Writes one folder: a file per layer, and one file of the tensors that belong to no layer."""

    def __init__(
        self, checkpoint: Checkpoint, folder: Path, progress: Callable[[int, int, str], object] | None
    ) -> None:
        self._checkpoint, self._folder, self._progress = checkpoint, folder, progress
        self._stacks: dict[str, dict[str, Any]] = {}
        self._sums: dict[str, str] = {}
        self._weight_map: dict[str, str] = {}
        self._bytes = 0
        self._written: list[Path] = []

    def write(self) -> dict[str, int]:
        """Write all files; returns what :func:`write_packed` returns."""
        parts = self._parts()
        for number, part in enumerate(parts, start=1):
            self._write_part(f"model-{number:05}-of-{len(parts):05}.safetensors", part)
            if self._progress is not None:
                self._progress(number, len(parts), "packing")
        self._write_json(INDEX, {"metadata": {"total_size": self._bytes}, "weight_map": self._weight_map})
        self._copy_other_files()
        digest = self._write_json(
            DESCRIPTION, {"format_version": FORMAT_VERSION, "stacks": self._stacks, "sha256": self._sums}
        )
        self._write_json(CONFIG, self._config(digest))
        source = sum(path.stat().st_size for path in self._weight_files())
        return {"bytes": self._bytes, "source_bytes": source, "stacks": len(self._stacks), "files": len(parts)}

    def remove(self) -> None:
        """Remove all files that were written, the description first."""
        for path in reversed(self._written):
            path.unlink(missing_ok=True)

    def _parts(self) -> list[Part]:
        """The contents of each file."""
        checkpoint = self._checkpoint
        owner = {f"{checkpoint.layer_prefix}.{layer}.": layer for layer in range(checkpoint.num_layers)}

        def layer_of(name: str) -> int | None:
            head = ".".join(name.split(".")[: checkpoint.layer_prefix.count(".") + 2]) + "."
            return owner.get(head)

        parts: dict[int | None, tuple[list[str], list[str]]] = {
            layer: ([], []) for layer in (None, *range(checkpoint.num_layers))
        }
        for name in checkpoint.linears:
            parts[layer_of(name)][0].append(name)
        quantized = set(checkpoint.quantized_tensors)
        for name in checkpoint.tensor_names:
            if name not in quantized:
                parts[layer_of(name)][1].append(name)
        return [
            (layer if layer in checkpoint.moe_layers else None, linears, others)
            for layer, (linears, others) in parts.items()
            if linears or others or layer in checkpoint.moe_layers
        ]

    def _write_part(self, name: str, part: Part) -> None:
        layer, linears, others = part
        checkpoint = self._checkpoint
        tensors: Tensors = {}
        if layer is not None:
            moe = checkpoint.experts(layer)
            for kind, stack in (("gate_up", moe.gate_up), ("down", moe.down)):
                self._add_stack(tensors, f"{checkpoint.moe_block(layer)}.experts.{kind}", stack)
        for module in linears:
            linear: Any = checkpoint.linear(module)
            self._add_stack(tensors, module, linear.stack)
        for other in others:
            info = checkpoint.tensor_info(other)
            tensors[other] = info.dtype, info.shape, checkpoint.raw_tensor(other)
        with self._create(name) as file:
            self._sums |= write_safetensors(file, tensors)
        SafetensorsFile(self._folder / name).close()  # the safetensors library checks the file
        self._weight_map |= dict.fromkeys(tensors, name)
        self._bytes += sum(len(data) for _, _, data in tensors.values())
        for other in others:
            checkpoint.release(other)

    def _add_stack(self, tensors: Tensors, name: str, stack: Any) -> None:
        """Add the tensors of a stack of the CPU backend."""
        store = stack.store
        experts = store.num_experts
        self._stacks[name] = {
            "num_experts": experts,
            "k": store.k,
            "n": store.n,
            "group_size": store.weight_group_size,
            "codes": store.codes,
            "scale_dtype": store.scales,
        }
        tensors[f"{name}{PACKED}"] = "U8", (experts, store.nbytes // experts), store.data
        if store.act_order:
            own = np.arange(store.k, dtype=np.int32) // store.weight_group_size
            orders = [order.g_idx(store.k, store.layout.group_size) for order in store.group_orders]
            g_idx = np.stack([own if orders[index] is None else orders[index] for index in store.order_of])
            tensors[f"{name}{G_IDX}"] = "I32", g_idx.shape, as_bytes(g_idx)
        if stack.bias is not None:
            tensors[f"{name}{BIAS}"] = "F32", stack.bias.shape, as_bytes(stack.bias)

    def _weight_files(self) -> Iterable[Path]:
        path = self._checkpoint.path
        return model_files(path) if self._checkpoint.format == GgufSource.format else path.glob("*.safetensors")

    def _copy_other_files(self) -> None:
        """Copy the tokenizer's files and the like; those that a GGUF file stands for are written."""
        if self._checkpoint.format == GgufSource.format:
            for name, document in gguf_documents(self._checkpoint.path).items():
                self._write_json(name, document)
            return
        written = (CONFIG, DESCRIPTION, *QUANTISER_FILES)
        for path in sorted(self._checkpoint.path.iterdir()):
            if path.is_file() and path.name not in written and not path.name.endswith(WEIGHT_FILES):
                with open(path, "rb") as source, self._create(path.name) as copy:
                    shutil.copyfileobj(source, copy)

    def _config(self, digest: str) -> dict[str, Any]:
        """``config.json`` of the packed folder; ``digest`` is of ``packed.json``."""
        config = dict(self._checkpoint.config)
        config["quantization_config"] = {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "packed_sha256": digest,
            "source": {**config.get("quantization_config", {}), "format": self._checkpoint.format},
        }
        return config

    def _write_json(self, name: str, value: Mapping[str, Any]) -> str:
        """Write a JSON file; returns its SHA-256."""
        data = (json.dumps(value, indent=2) + "\n").encode()
        with self._create(name) as file:
            file.write(data)
        return hashlib.sha256(data).hexdigest()

    def _create(self, name: str) -> IO[bytes]:
        """A new file of the folder, to write to. Only new files are removed if the write fails."""
        path = self._folder / name
        file = open(path, "xb")  # noqa: SIM115
        self._written.append(path)
        return file


def remove_if_empty(folder: Path) -> None:
    """Remove a folder if it is empty; it may hold files of another process."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def as_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The bytes of an array, uint8 ``[nbytes]``."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def write_safetensors(file: IO[bytes], tensors: Tensors) -> dict[str, str]:
    """Write tensors in safetensors format. Packed tensors come first, each at a multiple of 64 bytes.

    Returns the SHA-256 of each tensor's bytes. Source: the format's description in the safetensors library, whose
    own writer aligns to 8 bytes only.
    """

    def place(name: str) -> tuple[bool, int, str]:
        # The size of a packed tensor is a multiple of the alignment. After these, wider dtypes come first.
        dtype = DTYPES.get(tensors[name][0])
        return not name.endswith(PACKED), -(dtype.itemsize if dtype else 1), name

    ordered = sorted(tensors, key=place)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        dtype, shape, data = tensors[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    file.write(struct.pack("<Q", len(text)) + text)
    sums = {}
    for name in ordered:
        data = tensors[name][2]
        sums[name] = sha256_of(data)
        file.write(data.data)
    return sums
