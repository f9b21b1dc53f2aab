"""Packed folders: a model whose 4-bit weights are stored as the CPU's tiles, ready to be mapped.

::

    config.json      as the source had it, but for quantization_config,
                     {"quant_method", "format_version": 1, "packed_sha256": of packed.json, "source": its own}
    packed.json      {"format_version": 1,
                      "stacks": {name: {"num_experts", "k", "n", "group_size", "codes", "scale_dtype"}},
                      "sha256": {tensor: of its bytes}}
    *.safetensors    <name>.packed  U8 [num_experts, bytes of an expert]   tiles as drawn in cpu/ukernels/ukernel.h
                     <name>.g_idx   I32 [num_experts, k]                   where rows of K are not in their own order
                     <name>.bias    F32 [num_experts, n]                   of routed experts
                     and every other tensor of the source, as it was
    all else         tokenizer, generation_config.json, ...: copied

A stack's name is ``<block>.experts.gate_up``, ``<block>.experts.down``, or a linear layer's own. Packed tensors
begin at multiples of 64 bytes of their file, as kernels want them. The tiles are the same for every instruction
set. Opening checks all but the tensors' bytes: reading these is left to ``verify``, or to their use.
"""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np

from marlin_cy.checkpoints.json_fields import optional, positive
from marlin_cy.checkpoints.safetensors import DTYPES, SafetensorsFile, read_json
from marlin_cy.cpu import CpuBackend, CpuGptqStore, CpuMarlinExpertStack
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.weights.int4 import CODES, SCALE_DTYPES

__all__ = ["FORMAT_VERSION", "METHOD", "PackedSource", "is_packed", "write_packed"]

METHOD = "marlin_cy"
FORMAT_VERSION = 1
DESCRIPTION = "packed.json"
ALIGNMENT = 64
PACKED, G_IDX, BIAS = ".packed", ".g_idx", ".bias"
READ_BYTES = 16 << 20  # hashed at a time
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
QUANTISER_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")


def is_packed(config):
    """Whether a folder with this ``config.json`` is a packed one."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


# Reading ------------------------------------------------------------------------------------------


class PackedSource:
    """The quantised linear layers of a packed folder: what
    :class:`~marlin_cy.checkpoints.quantised.QuantizedSource` is for a quantiser's folder.

    Parameters
    ----------
    path : Path
    config : dict
        ``config.json``.
    tensors : SafetensorsFolder
    family : Family
    spec : MoeSpec
    verify : bool
        Compare every tensor's checksum.

    Raises
    ------
    CheckpointError
        A newer version, a checksum that is not the file's, a description that contradicts the tensors.
    """

    format = "packed"

    def __init__(self, path, config, tensors, family, spec, verify):
        self._tensors, self._spec = tensors, spec
        self._file = path / DESCRIPTION
        config_file = path / "config.json"
        quantization = config["quantization_config"]
        check_version(quantization, config_file)
        self.source_quantization = optional(quantization, ("source",), dict, config_file, default={})
        expected = optional(quantization, ("packed_sha256",), str, config_file)
        description = read_json(self._file)
        found = hashlib.sha256(self._file.read_bytes()).hexdigest()
        if found != expected:
            raise CheckpointError(f"got SHA-256 {found}, expected {expected} by config.json", file=self._file)
        check_version(description, self._file)
        self._stacks = optional(description, ("stacks",), dict, self._file, default={})
        self._sums = optional(description, ("sha256",), dict, self._file, default={})
        for name, stack in self._stacks.items():
            self._check_stack(name, stack)
        missing = sorted(set(self._sums) - set(tensors.names))
        if missing:
            raise CheckpointError("missing", file=tensors.source, tensor=missing[0])
        if verify:
            self._verify()

    def _check_stack(self, name, stack):
        if not isinstance(stack, dict):
            raise CheckpointError(f"{name}: got {stack!r}, expected an object", file=self._file)
        for key in ("num_experts", "k", "n", "group_size"):
            positive(stack, (key,), self._file)
        for key, known in (("codes", CODES), ("scale_dtype", [dtype.name for dtype in SCALE_DTYPES])):
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
    def _is_experts(name):
        return name.endswith((".experts.gate_up", ".experts.down"))

    def _verify(self):
        for name in self._tensors.names:
            if name not in self._sums:
                raise self._tensors.error(name, f"has no checksum in {DESCRIPTION}")
            found = sha256_of(self._tensors.raw(name))
            if found != self._sums[name]:
                raise self._tensors.error(
                    name, f"got SHA-256 {found}, expected {self._sums[name]}: the file was damaged"
                )
            self._tensors.release(name)

    @property
    def codes(self):
        """As QuantizedSource's."""
        return next((stack["codes"] for stack in self._stacks.values()), CODES[0])

    @property
    def linears(self):
        """As QuantizedSource's."""
        return [name for name in self._stacks if not self._is_experts(name)]

    def has_linear(self, module):
        """As QuantizedSource's."""
        return module in self._stacks

    def quantized_tensors(self):
        """As QuantizedSource's; biases of routed experts are among them."""
        names = [f"{name}{suffix}" for name in self._stacks for suffix in (PACKED, G_IDX)]
        names += [f"{name}{BIAS}" for name in self._stacks if self._is_experts(name)]
        return [name for name in names if name in self._tensors]

    def holds_experts(self, block):
        """As QuantizedSource's."""
        names = [f"{block}.experts.gate_up", f"{block}.experts.down"]
        if not any(name in self._stacks for name in names):
            return False
        spec = self._spec
        sizes = (spec.hidden_size, 2 * spec.intermediate_size), (spec.intermediate_size, spec.hidden_size)
        for name, (k, n) in zip(names, sizes, strict=True):
            if name not in self._stacks:
                raise CheckpointError(f"{name}: missing", file=self._file)
            stack = self._stacks[name]
            got, expected = (stack["num_experts"], stack["k"], stack["n"]), (spec.num_experts, k, n)
            if got != expected:
                raise CheckpointError(f"{name}: got experts, k, n {got}, config.json says {expected}", file=self._file)
        return True

    def expert_group_sizes(self, block):
        """As QuantizedSource's."""
        return tuple(self._stacks[f"{block}.experts.{part}"]["group_size"] for part in ("gate_up", "down"))

    def expert_bytes(self, block):
        """As QuantizedSource's."""
        return sum(
            self._tensors.info(f"{block}.experts.{part}{suffix}").nbytes
            for part in ("gate_up", "down")
            for suffix in (PACKED, G_IDX, BIAS)
            if f"{block}.experts.{part}{suffix}" in self._tensors
        )

    def expert_stacks(self, block, backend, description):
        """As QuantizedSource's; on the CPU, stacks over the mapped files."""
        del description
        return tuple(self._stack(f"{block}.experts.{part}", backend, True) for part in ("gate_up", "down"))

    def linear(self, module, backend):
        """As QuantizedSource's."""
        stack = self._stack(module, backend, False)
        if f"{module}{BIAS}" in self._tensors:
            self._tensors.check(f"{module}{BIAS}", (stack.n_per_expert,))
        return backend.linear_of(stack, self.bias(module))

    def weight(self, module):
        """As QuantizedSource's."""
        store = self._store(module)
        return store.canonical(0, 0, store.n)

    def bias(self, module):
        """As QuantizedSource's."""
        name = f"{module}{BIAS}"
        return self._tensors.tensor(name).astype(np.float32) if name in self._tensors else None

    def release(self, module, index=None):
        """Nothing: what is mapped is what is used."""

    def _stack(self, name, backend, with_bias):
        store = self._store(name)
        bias = self.bias(name) if with_bias else None
        if isinstance(backend, CpuBackend):
            return CpuMarlinExpertStack(store, store.num_experts, store.n, store.k, bias)
        stack = self._stacks[name]
        builder = backend.new_stack_builder(
            store.num_experts,
            store.k,
            store.n,
            group_size=stack["group_size"],
            g_idx=self._g_idx(name),
            codes=stack["codes"],
            scale_dtype=scale_dtype_of(stack),
        )
        for expert in range(store.num_experts):
            builder.add(expert, 0, store.canonical(expert, 0, store.n))
            self._tensors.release(f"{name}{PACKED}", expert)
        return builder.finish(bias)

    def _store(self, name):
        if name not in self._stacks:
            raise CheckpointError("missing", file=self._file, tensor=name)
        stack, packed = self._stacks[name], f"{name}{PACKED}"
        g_idx = self._g_idx(name)
        try:
            return CpuGptqStore.from_packed(
                stack["num_experts"],
                stack["k"],
                stack["n"],
                stack["group_size"],
                [None] * stack["num_experts"] if g_idx is None else list(g_idx),
                stack["codes"],
                scale_dtype_of(stack),
                self._tensors.raw(packed),
            )
        except (TypeError, ValueError, IndexError, UnsupportedError) as error:
            raise self._tensors.error(packed, str(error)) from error

    def _g_idx(self, name):
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


def check_version(config, file):
    """Refuse what a later version of this library wrote."""
    version = positive(config, ("format_version",), file)
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"format_version: got {version}, this version of marlin_cy reads up to {FORMAT_VERSION}: upgrade it, "
            "or pack the source again",
            file=file,
        )


def scale_dtype_of(stack):
    return next(dtype for dtype in SCALE_DTYPES if dtype.name == stack["scale_dtype"])


def sha256_of(data):
    """Hexadecimal SHA-256 of a uint8 array, read in pieces."""
    digest = hashlib.sha256()
    for begin in range(0, len(data), READ_BYTES):
        digest.update(data[begin : begin + READ_BYTES])
    return digest.hexdigest()


# Writing ------------------------------------------------------------------------------------------


def write_packed(checkpoint, out, progress=None):
    """Write an open checkpoint as a packed folder.

    Parameters
    ----------
    checkpoint : Checkpoint
        On the CPU backend, and not packed itself.
    out : path-like
        A folder that does not exist, or is empty. It appears when all is written.
    progress : callable, optional
        ``progress(done, total, description)`` after each file.

    Returns
    -------
    dict
        ``bytes`` written, ``source_bytes``, ``stacks``, ``files``.

    Raises
    ------
    FileExistsError
        ``out`` is a file, or holds something.
    CheckpointError
        The source is packed already, or damaged.
    OSError
        The disk is full, or not writable. What was written is removed.
    """
    out = Path(out)
    if checkpoint.format == PackedSource.format:
        raise CheckpointError("this folder is packed already", file=checkpoint.path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists already, and is not an empty folder")
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        written = Writer(checkpoint, partial, progress).write()
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return written


class Writer:
    """Writes one folder: a file a layer, and one of all that belongs to none."""

    def __init__(self, checkpoint, folder, progress):
        self._checkpoint, self._folder, self._progress = checkpoint, folder, progress
        self._stacks, self._sums, self._weight_map, self._bytes = {}, {}, {}, 0

    def write(self):
        parts = self._parts()
        for number, part in enumerate(parts, start=1):
            self._write_part(f"model-{number:05}-of-{len(parts):05}.safetensors", part)
            if self._progress is not None:
                self._progress(number, len(parts), "packing")
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._weight_map}
        self._write_json("model.safetensors.index.json", index)
        digest = self._write_json(
            DESCRIPTION, {"format_version": FORMAT_VERSION, "stacks": self._stacks, "sha256": self._sums}
        )
        config = dict(self._checkpoint.config)
        config["quantization_config"] = {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "packed_sha256": digest,
            "source": {**config.get("quantization_config", {}), "format": self._checkpoint.format},
        }
        self._write_json("config.json", config)
        for path in sorted(self._checkpoint.path.iterdir()):
            written = path.name in ("config.json", DESCRIPTION, *QUANTISER_FILES)
            if path.is_file() and not written and not path.name.endswith(WEIGHT_FILES):
                shutil.copyfile(path, self._folder / path.name)
        source = sum(path.stat().st_size for path in self._checkpoint.path.glob("*.safetensors"))
        return {"bytes": self._bytes, "source_bytes": source, "stacks": len(self._stacks), "files": len(parts)}

    def _parts(self):
        """For each file: ``(MoE layer or None, linears, other tensors)``."""
        checkpoint = self._checkpoint
        owner = {f"{checkpoint.layer_prefix}.{layer}.": layer for layer in range(checkpoint.num_layers)}

        def layer_of(name):
            head = ".".join(name.split(".")[: checkpoint.layer_prefix.count(".") + 2]) + "."
            return owner.get(head)

        parts = {layer: ([], []) for layer in (None, *range(checkpoint.num_layers))}
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

    def _write_part(self, file, part):
        layer, linears, others = part
        checkpoint, tensors = self._checkpoint, {}
        if layer is not None:
            moe = checkpoint.moe_layer(layer, shared_expert=False)
            for name, stack in (("gate_up", moe.gate_up), ("down", moe.down)):
                self._add_stack(tensors, f"{checkpoint.moe_block(layer)}.experts.{name}", stack)
        for name in linears:
            self._add_stack(tensors, name, checkpoint.linear(name).stack)
        for name in others:
            info = checkpoint.tensor_info(name)
            tensors[name] = info.dtype, info.shape, checkpoint.raw_tensor(name)
        self._sums |= write_safetensors(self._folder / file, tensors)
        self._weight_map |= dict.fromkeys(tensors, file)
        self._bytes += sum(len(data) for _, _, data in tensors.values())
        for name in others:
            checkpoint.release(name)

    def _add_stack(self, tensors, name, stack):
        store = stack.store
        experts = store.num_experts
        self._stacks[name] = {
            "num_experts": experts,
            "k": store.k,
            "n": store.n,
            "group_size": store.weight_group_size,
            "codes": store.codes,
            "scale_dtype": store.scale_dtype.name,
        }
        tensors[f"{name}{PACKED}"] = "U8", (experts, store.nbytes // experts), store.data
        if store.act_order:
            own = np.arange(store.k, dtype=np.int32) // store.weight_group_size
            orders = [order.g_idx(store.k, store.layout.group_size) for order in store.group_orders]
            g_idx = np.stack([own if orders[index] is None else orders[index] for index in store.order_of])
            tensors[f"{name}{G_IDX}"] = "I32", g_idx.shape, as_bytes(g_idx)
        if stack.bias is not None:
            tensors[f"{name}{BIAS}"] = "F32", stack.bias.shape, as_bytes(stack.bias)

    def _write_json(self, name, value):
        """Write a JSON file; returns its SHA-256."""
        data = (json.dumps(value, indent=2) + "\n").encode()
        (self._folder / name).write_bytes(data)
        return hashlib.sha256(data).hexdigest()


def as_bytes(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def write_safetensors(path, tensors):
    """Write ``{name: (dtype, shape, uint8 bytes)}``; packed tensors first, each at a multiple of 64 bytes.

    Returns the SHA-256 of each tensor's bytes. Source: the format's description in the safetensors library,
    whose own writer aligns to 8 bytes only.
    """

    def place(name):
        # Sizes of packed tensors are multiples of the alignment; behind them the widest dtypes come first.
        dtype = DTYPES.get(tensors[name][0])
        return not name.endswith(PACKED), -(dtype.itemsize if dtype else 1), name

    ordered = sorted(tensors, key=place)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in ordered:
        dtype, shape, data = tensors[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    sums = {}
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in ordered:
            data = tensors[name][2]
            sums[name] = sha256_of(data)
            file.write(data)
    SafetensorsFile(path).close()  # the library's own check of what was written
    return sums
