"""GPTQ tensors, as AutoGPTQ, GPTQModel and AutoRound store them, to canonical form and back.

==========  ====================  ============  ======================================================
qweight     int32                 ``[K/8, N]``  ``q[8*b + i, n]`` is bits ``4*i .. 4*i+3`` of word ``[b, n]``
scales      float16 or bfloat16   ``[G, N]``
qzeros      int32                 ``[G, N/8]``  the code of ``[g, 8*c + j]`` is bits ``4*j .. 4*j+3`` of word ``[g, c]``
g_idx       int32                 ``[K]``       the group of each row of K
==========  ====================  ============  ======================================================

with ``G = ceil(K / group_size)``. The two checkpoint formats differ in what a code of ``qzeros``
means: ``"gptq"`` stores the zero point minus one, so it is 1 to 16 and is never wrapped to four
bits; ``"gptq_v2"`` stores the zero point, 0 to 15.
"""

from dataclasses import dataclass

import numpy as np

from marlin_cy.arguments import integer, sequence
from marlin_cy.checkpoints.json_fields import optional, required
from marlin_cy.errors import UnsupportedError
from marlin_cy.formats.arrays import WORDS, as_array, check_finite, unpack_nibbles
from marlin_cy.formats.fields import check_bits, refuse_rotation
from marlin_cy.formats.overrides import Dynamic, overridden
from marlin_cy.formats.scheme import Scheme, TensorSpec
from marlin_cy.weights.int4 import SCALE_DTYPES, Int4Weight, pack_words

__all__ = [
    "ZERO_OFFSETS",
    "GptqScheme",
    "checked_group_size",
    "g_idx_per_expert",
    "normalised_g_idx",
    "pack_gptq",
    "parse",
    "read_settings",
    "tensor_shapes",
    "to_canonical",
]

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""What each checkpoint format adds to a code of ``qzeros`` to get the zero point."""

CHECKPOINT_FORMATS = {"gptq": "gptq", "gptq_v2": "gptq_v2", "gptq_p": "gptq_v2"}
"""What ``checkpoint_format`` may say, and which of the two it means. GPTQModel's "gptq_p" differs for other widths."""

SUPPORTED_FORMATS = (*CHECKPOINT_FORMATS, "marlin")
PACK_DTYPE = "int32"


@dataclass(frozen=True)
class GptqScheme(Scheme):
    """GPTQ tensors: see :mod:`marlin_cy.formats.gptq`.

    Attributes
    ----------
    checkpoint_format : str
        ``"gptq"`` or ``"gptq_v2"``.
    desc_act : bool
        Rows of K were quantised in another order; ``g_idx`` then has to be there.
    sym : bool
        All zero points are 8. Nothing depends on it: they are always read.
    overrides : tuple
        Of :mod:`marlin_cy.formats.overrides`.
    """

    group_size: int
    checkpoint_format: str = "gptq"
    desc_act: bool = False
    sym: bool = True
    overrides: tuple = ()

    format = "gptq"
    marker = ".qweight"
    scales = ".scales"
    order = ".g_idx"

    def for_module(self, module):
        return overridden(self, module)

    def sizes(self, marker_shape):
        if len(marker_shape) != 2:
            raise ValueError(f"got shape {marker_shape}, expected two dimensions")
        return 8 * marker_shape[0], marker_shape[1]

    def checked_group_size(self, k, n):
        return checked_group_size(
            bits=4, group_size=self.group_size, k=k, n=n, checkpoint_format=self.checkpoint_format
        )

    def tensors(self, k, n):
        shapes = tensor_shapes(k, n, self.checked_group_size(k, n))
        return {
            ".qweight": TensorSpec(shapes["qweight"], ("I32",)),
            ".scales": TensorSpec(shapes["scales"], ("F16", "BF16")),
            ".qzeros": TensorSpec(shapes["qzeros"], ("I32",)),
            # Without g_idx, rows are in groups one after another, which desc_act says they are not.
            ".g_idx": TensorSpec(shapes["g_idx"], ("I32",), required=self.desc_act),
        }

    def g_idx(self, array, k, n):
        return normalised_g_idx(array, k, self.checked_group_size(k, n))

    def to_canonical(self, arrays, k, n, label=""):
        return to_canonical(
            arrays[".qweight"],
            arrays[".scales"],
            arrays[".qzeros"],
            arrays.get(".g_idx"),
            bits=4,
            group_size=self.group_size,
            k=k,
            n=n,
            checkpoint_format=self.checkpoint_format,
            label=label,
        )


def parse(config, file) -> GptqScheme:
    """The scheme that AutoGPTQ's, GPTQModel's or transformers' quantisation config describes.

    Parameters
    ----------
    config : dict
    file : path-like
        For messages.

    Raises
    ------
    CheckpointError, UnsupportedError
    """
    checkpoint_format = optional(config, ("checkpoint_format", "format"), str, file, default="gptq")
    if checkpoint_format.lower() not in CHECKPOINT_FORMATS:
        raise UnsupportedError(
            f"{file}: checkpoint_format {checkpoint_format!r}, supported: {', '.join(SUPPORTED_FORMATS)}"
        )
    refuse_rotation(config, "rotation", file)
    check_bits(required(config, ("bits",), int, file), file)
    required(config, ("group_size",), int, file)
    dynamic = optional(config, ("dynamic",), dict, file)
    settings = read_settings(config, file)
    del settings["bits"]
    return GptqScheme(
        checkpoint_format=CHECKPOINT_FORMATS[checkpoint_format.lower()],
        overrides=(Dynamic.parse(dynamic, read_settings, file),) if dynamic else (),
        **settings,
    )


def read_settings(config, file):
    """Those settings of a layer that a JSON object has: a dict of ``bits``, ``group_size``, ``desc_act``, ``sym``."""
    kinds = {"bits": int, "group_size": int, "desc_act": bool, "sym": bool}
    settings = {name: optional(config, (name,), kind, file) for name, kind in kinds.items()}
    if optional(config, ("pack_dtype",), str, file, default=PACK_DTYPE) != PACK_DTYPE:
        raise UnsupportedError(f"{file}: pack_dtype: got {config['pack_dtype']!r}, only {PACK_DTYPE!r} is supported")
    return {name: value for name, value in settings.items() if value is not None}


def to_canonical(
    qweight, scales, qzeros, g_idx=None, *, bits, group_size, k, n, checkpoint_format="gptq", label=""
) -> Int4Weight:
    """One weight in canonical form; only its zero points are unpacked, the rest is not copied.

    Parameters
    ----------
    qweight : int32 or uint32 ``[k/8, n]``
    scales : float16 or bfloat16 ``[G, n]``
        Finite.
    qzeros : int32 or uint32 ``[G, n/8]``
    g_idx : int32 or uint32 ``[k]``, optional
        Each in ``0 .. G-1``, in any order.
    bits, group_size, k, n, checkpoint_format
        As in :func:`checked_group_size`.
    label : str
        Follows the argument's name in messages: ``" of expert 3"``.

    Raises
    ------
    TypeError
        A dtype that is not the above, or not in this machine's byte order.
    ValueError
        A shape or size that contradicts the others, an unknown ``checkpoint_format``, a scale that
        is not finite.
    IndexError
        A ``g_idx`` outside ``0 .. G-1``.
    UnsupportedError
        ``bits`` or a ``group_size`` that this library has no kernels for.
    """
    group_size = checked_group_size(
        bits=bits, group_size=group_size, k=k, n=n, checkpoint_format=checkpoint_format, label=label
    )
    shapes = tensor_shapes(k, n, group_size)
    qweight = as_array(f"qweight{label}", qweight, WORDS, shapes["qweight"])
    scales = as_array(f"scales{label}", scales, SCALE_DTYPES, shapes["scales"])
    qzeros = as_array(f"qzeros{label}", qzeros, WORDS, shapes["qzeros"])
    check_finite(f"scales{label}", scales)
    return Int4Weight(
        words=qweight.view(np.uint32),
        scale=scales,
        zero=unpack_nibbles(qzeros, ZERO_OFFSETS[checkpoint_format]),
        group_size=group_size,
        g_idx=normalised_g_idx(g_idx, k, group_size, label),
    )


def checked_group_size(*, bits, group_size, k, n, checkpoint_format="gptq", label="", n_name="n") -> int:
    """The rows of K that share a scale, after all sizes were checked; -1 becomes ``k``.

    Parameters
    ----------
    bits : int
        4.
    group_size : int
        32, 64, a multiple of 128, or one group of all of K: ``k`` or -1.
    k, n : int
        Multiples of 32 and of 8.
    checkpoint_format : {"gptq", "gptq_v2"}
    label : str
        As in :func:`to_canonical`.
    n_name : str
        What the caller calls ``n``, for messages.

    Raises
    ------
    TypeError, ValueError, UnsupportedError
        As :func:`to_canonical`.
    """
    bits = integer(f"bits{label}", bits)
    group_size = integer(f"group_size{label}", group_size)
    for name, size, unit in (("k", k, 32), (n_name, n, 8)):
        size = integer(f"{name}{label}", size)
        if size <= 0 or size % unit:
            raise ValueError(f"{name}{label}: got {size}, expected a positive multiple of {unit}")
    if not isinstance(checkpoint_format, str) or checkpoint_format not in ZERO_OFFSETS:
        raise ValueError(
            f"checkpoint_format{label}: got {checkpoint_format!r}, expected one of {', '.join(ZERO_OFFSETS)}"
        )
    if bits != 4:
        raise UnsupportedError(f"bits{label}: got {bits}, only 4 is supported")
    if group_size in (-1, k):
        return k
    if group_size <= 0:
        raise ValueError(f"group_size{label}: got {group_size}, expected a positive number, or -1 for one group")
    if group_size not in (32, 64) and group_size % 128:
        raise UnsupportedError(
            f"group_size{label}: got {group_size}, supported are 32, 64, multiples of 128, "
            f"and -1 or k ({k}) for one group"
        )
    return group_size


def tensor_shapes(k, n, group_size) -> dict:
    """The shape of each tensor of a ``[k, n]`` weight, by name; the sizes were checked, -1 resolved."""
    groups = -(-k // group_size)
    return {"qweight": (k // 8, n), "scales": (groups, n), "qzeros": (groups, n // 8), "g_idx": (k,)}


def normalised_g_idx(g_idx, k, group_size, label=""):
    """``g_idx`` as int32 ``[k]``, or None where it is None or says ``k // group_size`` anyway.

    Parameters
    ----------
    g_idx : int32 or uint32 ``[k]``, or None
    k, group_size : int
        Checked, -1 resolved.
    label : str
        As in :func:`to_canonical`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As :func:`to_canonical`.
    """
    if g_idx is None:
        return None
    g_idx = as_array(f"g_idx{label}", g_idx, WORDS, (k,))
    groups = -(-k // group_size)
    # As unsigned numbers, negative ones are too large as well.
    outside = g_idx.view(np.uint32) >= groups
    if outside.any():
        first = int(np.argmax(outside))
        raise IndexError(f"g_idx{label}: got {g_idx[first]} at row {first}, expected 0 to {groups - 1}")
    g_idx = g_idx.view(np.int32)
    return None if np.array_equal(g_idx, np.arange(k, dtype=np.int32) // group_size) else g_idx


def g_idx_per_expert(g_idx, num_experts, k) -> list:
    """One ``g_idx`` (or None) an expert.

    Parameters
    ----------
    g_idx : None, array ``[k]``, array ``[num_experts, k]``, or sequence of arrays ``[k]`` and Nones
        A single one is for all experts.
    num_experts, k : int

    Raises
    ------
    ValueError
        A shape or a length that is none of the above. Entries are checked by :func:`normalised_g_idx`.
    """
    if g_idx is None:
        return [None] * num_experts
    ndim = getattr(g_idx, "ndim", None)
    if ndim == 1:
        if len(g_idx) != k:
            raise ValueError(f"g_idx: got shape ({len(g_idx)},), expected ({k},) or one an expert")
        return [g_idx] * num_experts
    if ndim not in (None, 2):
        raise ValueError(f"g_idx: got {ndim} dimensions, expected ({k},) or ({num_experts}, {k})")
    entries = list(sequence("g_idx", g_idx))
    if len(entries) != num_experts:
        raise ValueError(f"g_idx: got {len(entries)} entries, expected one an expert: {num_experts}")
    return entries


def pack_gptq(q, scale, zero, *, checkpoint_format="gptq"):
    """GPTQ tensors from plain codes: the inverse of :func:`to_canonical`, slow and obvious.

    ``g_idx`` is not among them: a checkpoint stores it as it is.

    Parameters
    ----------
    q : integers ``[K, N]``
        0 to 15; K and N multiples of 8.
    scale : floats ``[G, N]``
    zero : integers ``[G, N]``
        1 to 16 for ``"gptq"``, 0 to 15 for ``"gptq_v2"``.
    checkpoint_format : {"gptq", "gptq_v2"}

    Returns
    -------
    qweight, scales, qzeros : int32 ``[K/8, N]``, float16 ``[G, N]``, int32 ``[G, N/8]``

    Raises
    ------
    ValueError
        A code or a zero point that the format cannot hold.
    """
    offset = ZERO_OFFSETS[checkpoint_format]
    q, zero = np.asarray(q), np.asarray(zero)
    for name, codes, low in (("q", q, 0), ("zero", zero, offset)):
        if codes.min() < low or codes.max() > low + 15:
            raise ValueError(
                f"{name}: got {codes.min()} to {codes.max()}, {checkpoint_format} holds {low} to {low + 15}"
            )
    # qzeros runs along N as qweight runs along K.
    qzeros = pack_words((zero.astype(np.int64) - offset).T).T
    return pack_words(q).view(np.int32), np.asarray(scale, np.float16), np.ascontiguousarray(qzeros).view(np.int32)
