"""compressed-tensors' 4-bit tensors, as llm-compressor writes them, to canonical form and back.

``format`` "pack-quantized", integers:

==================  ====================  ============  ============================================================
weight_packed       int32                 ``[N, K/8]``  bits ``4*i .. 4*i+3`` of word ``[n, b]``: ``q[8*b + i, n]``
weight_scale        float16 or bfloat16   ``[N, G]``
weight_zero_point   int32                 ``[N/8, G]``  bits ``4*j .. 4*j+3`` of word ``[c, g]``: ``zero[g, 8*c + j]``
weight_g_idx        int32                 ``[K]``       the group of each row of K; newer releases do not write it
weight_shape        int64 or int32        ``[2]``       N and K
==================  ====================  ============  ============================================================

with ``G = K / group_size``. Codes and zero points are integers from -8 to 7, stored with 8 added. A symmetric weight
stores no zero points; all of them are 8. :mod:`marlin_cy.formats.mxfp4` describes ``format`` "mxfp4-pack-quantized".
Each expert's layers are stored separately, even if the model's class in transformers fuses all experts.

``input_activations`` is ignored: activations are not quantised. Source: compressed-tensors,
``compressors/pack_quantized`` and ``quantization``; llm-compressor, ``modeling/moe``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.arrays import (
    SAFETENSORS_SCALES,
    SCALES,
    check_finite,
    checked_order,
    symmetric_zeros,
    unpack_zeros,
)
from marlin_cy.formats.fields import compiled, refuse_rotation
from marlin_cy.formats.json_fields import JsonObject, StrPath, optional, required
from marlin_cy.formats.mxfp4 import GROUP_SIZE as MXFP4_GROUP_SIZE
from marlin_cy.formats.mxfp4 import Mxfp4Scheme
from marlin_cy.formats.scheme import Scheme, TensorSpec
from marlin_cy.weights._nibbles import transpose
from marlin_cy.weights.arrays import WORDS, checked_array
from marlin_cy.weights.canonical import CanonicalWeight, contiguous_transpose, pack_words
from marlin_cy.weights.sizes import BITS, checked_group_size

__all__ = ["CompressedMxfp4Scheme", "CompressedTensorsScheme", "Targets", "pack_compressed", "parse"]

FORMAT = "compressed-tensors"
SUPPORTED_FORMATS = ("pack-quantized", "mxfp4-pack-quantized")
SUPPORTED_STRATEGIES = ("group", "channel")
ORDERED = ("group", "dynamic", True)
"""The values of ``actorder`` with which ``weight_g_idx`` is stored."""

REGEX = "re:"
LINEAR = "Linear"
SHAPES = (np.dtype(np.int64), np.dtype(np.int32))


@dataclass(frozen=True)
class Targets:
    """The assignment of modules to groups of settings, by name.

    A target is a module's name, or ``re:`` and a regular expression that matches the beginning of a name, or "Linear"
    for all linear layers. A name has precedence over an expression, and an expression over "Linear". Of several
    matching expressions, the one that sorts first is used. Targets in ``ignore`` are not quantised. Source:
    compressed-tensors, ``utils/match.py``, ``match_targets``.

    Attributes
    ----------
    groups : dict
        From target to :class:`Scheme`, or to a str that says why the target is not supported.
    ignore : tuple of str
    """

    groups: dict[str, Scheme | str] = field(hash=False)
    ignore: tuple[str, ...]

    def scheme(self, module: str) -> Scheme:
        """The scheme of a module.

        Raises
        ------
        UnsupportedError
            The module is not quantised, or no kernel supports its settings.
        """
        for target in self.ignore:
            if _names(target, module):
                raise UnsupportedError(f"{module}: not quantised, by {target!r} of ignore")
        for target in sorted(self.groups, key=lambda target: (target == LINEAR, target.startswith(REGEX), target)):
            if _names(target, module):
                found = self.groups[target]
                if isinstance(found, str):
                    raise UnsupportedError(f"{module}: {found}")
                return found
        raise UnsupportedError(f"{module}: not quantised, no target of config_groups names it")


def _names(target: str, module: str) -> bool:
    if target.startswith(REGEX):
        return re.match(target[len(REGEX) :], module) is not None
    return target in (module, LINEAR)


@dataclass(frozen=True)
class CompressedTensorsScheme(Scheme):
    """Packed integers: see :mod:`marlin_cy.formats.compressed_tensors`.

    Attributes
    ----------
    symmetric : bool
        No zero points are stored; all are 8.
    actorder : bool or None
        Rows of K were quantised in another order, and ``weight_g_idx`` is required. None if the config does not say:
        then ``weight_g_idx`` decides.
    targets : Targets or None
    """

    group_size: int
    symmetric: bool = True
    actorder: bool | None = None
    targets: Targets | None = None
    bits: int = 4

    widths = BITS
    format = FORMAT
    marker = ".weight_packed"
    scales = ".weight_scale"
    order = ".weight_g_idx"

    @property
    def act_order(self) -> bool:
        return bool(self.actorder)

    def for_module(self, module: str) -> Scheme:
        return self if self.targets is None else self.targets.scheme(module)

    def sizes(self, marker_shape: tuple[int, ...]) -> tuple[int, int]:
        if len(marker_shape) != 2:
            raise ValueError(f"got shape {marker_shape}, expected two dimensions")
        return 32 // self.bits * marker_shape[1], marker_shape[0]

    def checked_group_size(self, k: int, n: int) -> int:
        return checked_group_size(group_size=self.group_size, k=k, n=n, bits=self.bits)

    def tensors(self, k: int, n: int) -> dict[str, TensorSpec]:
        groups, codes = -(-k // self.checked_group_size(k, n)), 32 // self.bits
        specs = {
            ".weight_packed": TensorSpec((n, k // codes), ("I32",)),
            ".weight_scale": TensorSpec((n, groups), SAFETENSORS_SCALES),
            ".weight_g_idx": TensorSpec((k,), ("I32",), required=self.act_order),
            ".weight_shape": TensorSpec((2,), ("I64", "I32"), required=False),
        }
        if not self.symmetric:
            specs[".weight_zero_point"] = TensorSpec((n // codes, groups), ("I32",))
        return specs

    def g_idx(self, array: npt.ArrayLike, k: int, n: int, label: str = "") -> npt.NDArray[np.int32] | None:
        # A layer that was not calibrated has the tensor's initial value, -1 for every row.
        if np.ndim(array) == 1 and np.size(array) and np.all(np.equal(array, -1)):
            return None
        return checked_order("weight_g_idx", array, k, self.checked_group_size(k, n), self.actorder, label)

    def to_canonical(self, arrays: Mapping[str, npt.NDArray[Any]], k: int, n: int, label: str = "") -> CanonicalWeight:
        specs, group_size = self.tensors(k, n), self.checked_group_size(k, n)

        def array(suffix: str, dtypes: tuple[np.dtype[Any], ...]) -> npt.NDArray[Any]:
            return checked_array(f"{suffix[1:]}{label}", arrays[suffix], dtypes, specs[suffix].shape)

        packed, scales = array(".weight_packed", WORDS), array(".weight_scale", SCALES)
        check_finite(f"weight_scale{label}", scales)
        if ".weight_shape" in arrays:
            shape = array(".weight_shape", SHAPES).tolist()
            if shape != [n, k]:
                raise ValueError(f"weight_shape{label}: got {shape}, expected {[n, k]}")
        if self.symmetric:
            zero = symmetric_zeros(scales.shape[::-1], self.bits)
        else:
            zero = unpack_zeros(transpose(array(".weight_zero_point", WORDS).view(np.uint32)), self.bits)
        return CanonicalWeight(
            words=transpose(packed.view(np.uint32)),
            scale=contiguous_transpose(scales),
            zero=zero,
            group_size=group_size,
            g_idx=self.g_idx(arrays[".weight_g_idx"], k, n, label) if ".weight_g_idx" in arrays else None,
            codes=self.codes,
        )


@dataclass(frozen=True)
class CompressedMxfp4Scheme(Mxfp4Scheme):
    """Packed 4-bit floats: see :mod:`marlin_cy.formats.mxfp4`.

    Attributes
    ----------
    targets : Targets or None
    """

    targets: Targets | None = None

    format = FORMAT
    marker = ".weight_packed"
    scales = ".weight_scale"

    def for_module(self, module: str) -> Scheme:
        return self if self.targets is None else self.targets.scheme(module)

    def sizes(self, marker_shape: tuple[int, ...]) -> tuple[int, int]:
        if len(marker_shape) != 2:
            raise ValueError(f"got shape {marker_shape}, expected two dimensions")
        return 2 * marker_shape[1], marker_shape[0]

    def tensors(self, k: int, n: int) -> dict[str, TensorSpec]:
        self.checked_group_size(k, n)
        return {
            ".weight_packed": TensorSpec((n, k // 2), ("U8",)),
            ".weight_scale": TensorSpec((n, k // MXFP4_GROUP_SIZE), ("U8",)),
        }


def parse(config: JsonObject, file: StrPath) -> Scheme:
    """The scheme of the first supported group in a quantisation config of compressed-tensors.

    Parameters
    ----------
    config : dict
    file : path-like
        For messages.

    Raises
    ------
    CheckpointError
    UnsupportedError
        No group is supported, or the model is rotated or sparse.
    """
    refuse_rotation(config, "transform_config", file)
    sparsity = optional(config, ("sparsity_config",), dict, file, default={}).get("format")
    if sparsity not in (None, "dense"):
        raise UnsupportedError(f"{file}: sparsity_config: format {sparsity!r}, sparse weights are not supported")
    layout = optional(config, ("format",), str, file)
    groups: dict[str, Scheme | str] = {}
    for name, group in required(config, ("config_groups",), dict, file).items():
        if not isinstance(group, dict):
            raise CheckpointError(f"config_groups: got {group!r} for {name!r}, expected an object", file=file)
        found = _read_group(group, layout, file)
        groups |= dict.fromkeys(_checked_targets(group, "targets", file), found)
    schemes: list[Any] = [found for found in groups.values() if isinstance(found, Scheme)]
    if not schemes:
        said = next(iter(groups.values()), "config_groups: has no targets")
        raise UnsupportedError(f"{file}: {said}")
    scheme: Scheme = replace(schemes[0], targets=Targets(groups, tuple(_checked_targets(config, "ignore", file))))
    return scheme


def _checked_targets(config: JsonObject, name: str, file: StrPath) -> list[str]:
    targets: list[Any] = optional(config, (name,), list, file, default=[])
    for target in targets:
        if not isinstance(target, str):
            raise CheckpointError(f"{name}: got {target!r}, expected strings", file=file)
        if target.startswith(REGEX):
            compiled(target[len(REGEX) :], name, file)
    return targets


def _read_group(group: JsonObject, layout: str | None, file: StrPath) -> Scheme | str:
    """The scheme of a group's layers, or a str that says why the group is not supported."""
    layout = optional(group, ("format",), str, file) or layout
    weights = optional(group, ("weights",), dict, file)
    if weights is None:
        return "not quantised, its group has no weights"
    if layout is None:
        raise CheckpointError("format: missing", file=file)
    if layout not in SUPPORTED_FORMATS:
        return f"format {layout!r}, supported: {', '.join(SUPPORTED_FORMATS)}"
    bits = required(weights, ("num_bits",), int, file)
    widths = BITS if layout == "pack-quantized" else (4,)
    if bits not in widths:
        return f"num_bits: got {bits}, supported: {', '.join(map(str, widths))}"
    kind = optional(weights, ("type",), str, file, default="int")
    expected = "int" if layout == "pack-quantized" else "float"
    if kind != expected:
        raise CheckpointError(f"type: got {kind!r}, expected {expected!r} in format {layout!r}", file=file)
    group_size = optional(weights, ("group_size",), int, file)
    symmetric = optional(weights, ("symmetric",), bool, file, default=True)
    if layout == "mxfp4-pack-quantized":
        if group_size != MXFP4_GROUP_SIZE or not symmetric:
            raise CheckpointError(
                f"got group_size {group_size} and symmetric {symmetric}, expected {MXFP4_GROUP_SIZE} and True of MXFP4",
                file=file,
            )
        return CompressedMxfp4Scheme()
    strategy = optional(weights, ("strategy",), str, file, default=_usual_strategy(group_size))
    if strategy not in SUPPORTED_STRATEGIES:
        return f"strategy {strategy!r}, supported: {', '.join(SUPPORTED_STRATEGIES)}"
    if (strategy == "group") != (group_size is not None and group_size > 0):
        raise CheckpointError(f"got strategy {strategy!r} and group_size {group_size}, which contradict", file=file)
    return CompressedTensorsScheme(
        group_size=-1 if strategy == "channel" or group_size is None else group_size,
        bits=bits,
        symmetric=symmetric,
        actorder=None if weights.get("actorder") is None else weights["actorder"] in ORDERED,
    )


def _usual_strategy(group_size: int | None) -> str:
    """The strategy if the config does not name one."""
    if group_size is None:
        return "tensor"
    return "channel" if group_size == -1 else "group"


def pack_compressed(
    q: npt.ArrayLike, scale: npt.ArrayLike, zero: npt.ArrayLike | None = None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any], npt.NDArray[np.int32] | None]:
    """Packed integers from plain codes: the inverse of :meth:`CompressedTensorsScheme.to_canonical`.

    Parameters
    ----------
    q : integers ``[K, N]``
        0 to 15; K and N multiples of 8.
    scale : float16 or bfloat16 ``[G, N]``
    zero : integers ``[G, N]``, optional
        0 to 15; omitted if all are 8.

    Returns
    -------
    weight_packed, weight_scale, weight_zero_point : int32 ``[N, K/8]``, as ``scale`` ``[N, G]``, int32 ``[N/8, G]``
        The last one is None if ``zero`` is None.

    Raises
    ------
    ValueError
        The format cannot hold a code or a zero point.
    """
    for name, codes in (("q", q), ("zero", 8 if zero is None else zero)):
        if np.min(codes) < 0 or np.max(codes) > 15:
            raise ValueError(f"{name}: got {np.min(codes)} to {np.max(codes)}, compressed-tensors holds 0 to 15")
    packed = np.ascontiguousarray(pack_words(q).T).view(np.int32)
    zero = None if zero is None else np.ascontiguousarray(pack_words(np.asarray(zero).T)).view(np.int32)
    return packed, np.ascontiguousarray(np.asarray(scale).T), zero
