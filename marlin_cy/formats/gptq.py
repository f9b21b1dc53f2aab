"""GPTQ tensors, as AutoGPTQ and GPTQModel store them, to canonical form and back.

==========  =======  ============  ======================================================
qweight     int32    ``[K/8, N]``  ``q[8*b + i, n]`` is bits ``4*i .. 4*i+3`` of word ``[b, n]``
scales      float16  ``[G, N]``
qzeros      int32    ``[G, N/8]``  the code of ``[g, 8*c + j]`` is bits ``4*j .. 4*j+3`` of word ``[g, c]``
g_idx       int32    ``[K]``       the group of each row of K
==========  =======  ============  ======================================================

with ``G = ceil(K / group_size)``. The two checkpoint formats differ in what a code of ``qzeros``
means: ``"gptq"`` stores the zero point minus one, so it is 1 to 16 and is never wrapped to four
bits; ``"gptq_v2"`` stores the zero point, 0 to 15.
"""

import numpy as np

from marlin_cy.arguments import integer, sequence
from marlin_cy.errors import UnsupportedError
from marlin_cy.formats.canonical import Int4Weight, pack_words

__all__ = [
    "ZERO_OFFSETS",
    "checked_group_size",
    "g_idx_per_expert",
    "normalised_g_idx",
    "pack_gptq",
    "tensor_shapes",
    "to_canonical",
]

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""What each checkpoint format adds to a code of ``qzeros`` to get the zero point."""

WORDS = (np.dtype(np.int32), np.dtype(np.uint32))
HALVES = (np.dtype(np.float16),)
HALF_EXPONENT = np.uint16(0x7C00)


def to_canonical(
    qweight, scales, qzeros, g_idx=None, *, bits, group_size, k, n, checkpoint_format="gptq", label=""
) -> Int4Weight:
    """One weight in canonical form; only its zero points are unpacked, the rest is not copied.

    Parameters
    ----------
    qweight : int32 or uint32 ``[k/8, n]``
    scales : float16 ``[G, n]``
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
    qweight = _array(f"qweight{label}", qweight, WORDS, shapes["qweight"])
    scales = _array(f"scales{label}", scales, HALVES, shapes["scales"])
    qzeros = _array(f"qzeros{label}", qzeros, WORDS, shapes["qzeros"])
    _check_finite(f"scales{label}", scales)
    return Int4Weight(
        words=qweight.view(np.uint32),
        scale=scales,
        zero=_unpack_zeros(qzeros, ZERO_OFFSETS[checkpoint_format]),
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
    g_idx = _array(f"g_idx{label}", g_idx, WORDS, (k,))
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


def _unpack_zeros(qzeros, offset):
    """Zero points, uint8 ``[G, N]``, from contiguous ``qzeros``."""
    pairs = qzeros.astype("<u4", copy=False).view(np.uint8)
    zero = np.empty((pairs.shape[0], 2 * pairs.shape[1]), np.uint8)
    np.bitwise_and(pairs, 15, out=zero[:, 0::2])
    np.right_shift(pairs, 4, out=zero[:, 1::2])
    zero += np.uint8(offset)
    return zero


def _check_finite(name, scales):
    # Halves are finite unless their exponent is all ones. np.isfinite takes four times as long.
    if (scales.view(np.uint16) & HALF_EXPONENT).max() == HALF_EXPONENT:
        g, n = np.argwhere(~np.isfinite(scales))[0]
        raise ValueError(f"{name}: got {scales[g, n]} at [{g}, {n}], expected finite values")


def _array(name, value, dtypes, shape):
    """``value`` as an aligned, contiguous ndarray, copied only where it is not one already."""
    expected = f"{dtypes[0].name} {shape}"
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: got {type(value).__name__} ({error}), expected an array, {expected}") from error
    if not array.dtype.isnative:
        order = {"<": "little", ">": "big"}[array.dtype.byteorder]
        raise TypeError(f"{name}: got {order}-endian dtype {array.dtype.str}, expected native byte order, {expected}")
    if array.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {array.dtype.name}, expected {expected}")
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected {expected}")
    return np.require(array, requirements=("C_CONTIGUOUS", "ALIGNED"))
