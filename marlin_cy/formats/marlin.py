"""Marlin's tensors, as IST-DASLab's Marlin, AutoGPTQ and AutoAWQ store them, to canonical form and back.

==================  =======  ===============  ======================================
B (AWQ: qweight)    int32    ``[K/16, 2*N]``  codes in the order of tensor cores
s (AWQ: scales)     float16  ``[G, N]``       columns in that order
==================  =======  ===============  ======================================

Weights are symmetric (zero points are 8), in groups of 128 rows or in one group. Row ``t`` of B holds rows
``16*t .. 16*t+15`` of K; 128 words, one after another, are 64 columns of them. Word ``4*lane + tile`` is what one of
32 lanes needs of a tile of 16 rows by 16 columns, with ``column = lane // 4`` and ``row = 2 * (lane % 4)``::

    bits      0    4    8    12   16   20   24   28
    row      r  , r+8, r  , r+8, r+1, r+9, r+1, r+9
    column   c  , c  , c+8, c+8, c  , c  , c+8, c+8      of columns 16*tile .. 16*tile+15

so that a mask of every fourth nibble takes two consecutive rows of a column out at once. Columns of s, which are
stored in such an order that a lane's lie side by side, are permuted within 64, or within 32 if there is one group:
see :func:`scale_columns`.

Source: IST-DASLab/marlin, ``marlin/__init__.py``; AutoGPTQ, ``auto_gptq/nn_modules/qlinear/qlinear_marlin.py``;
AutoAWQ, ``awq/modules/linear/marlin.py``. GPTQModel and vLLM repack when loading, and write no such files.
"""

from dataclasses import dataclass

import numpy as np

from marlin_cy.checkpoints.json_fields import optional, required
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats import gptq
from marlin_cy.formats.arrays import WORDS, as_array, check_finite, symmetric_zeros
from marlin_cy.formats.fields import check_bits
from marlin_cy.formats.scheme import Scheme, TensorSpec
from marlin_cy.weights._nibbles import words_of_marlin
from marlin_cy.weights.int4 import NIBBLE_SHIFTS, Int4Weight, unpack_words

__all__ = ["MarlinScheme", "pack_marlin", "parse", "scale_columns", "unpack_marlin"]

TILE = 16
BLOCK_N = 64
BLOCK_WORDS = TILE * BLOCK_N // 8
GROUP_SIZE = 128
HALVES = (np.dtype(np.float16),)

ROW_OF_NIBBLE = (0, 8, 0, 8, 1, 9, 1, 9)
COLUMN_OF_NIBBLE = (0, 0, 8, 8, 0, 0, 8, 8)

NAMES = {"gptq": (".B", ".s"), "marlin": (".B", ".s"), "awq": (".qweight", ".scales")}
"""The suffixes of the two tensors, by what ``quant_method`` says."""


@dataclass(frozen=True)
class MarlinScheme(Scheme):
    """Marlin's tensors: see :mod:`marlin_cy.formats.marlin`.

    Attributes
    ----------
    marker, scales : str
        ``".B"`` and ``".s"``; AutoAWQ's names are ``".qweight"`` and ``".scales"``.
    """

    group_size: int
    marker: str = ".B"
    scales: str = ".s"

    format = "marlin"

    def sizes(self, marker_shape):
        if len(marker_shape) != 2 or marker_shape[1] % 2:
            raise ValueError(f"got shape {marker_shape}, expected two dimensions, the last of two for each column")
        return TILE * marker_shape[0], marker_shape[1] // 2

    def checked_group_size(self, k, n):
        group_size = gptq.checked_group_size(bits=4, group_size=self.group_size, k=k, n=n)
        if n % BLOCK_N:
            raise ValueError(f"n: got {n}, expected a multiple of {BLOCK_N} in Marlin's order")
        return group_size

    def tensors(self, k, n):
        groups = -(-k // self.checked_group_size(k, n))
        return {
            self.marker: TensorSpec((k // TILE, 2 * n), ("I32",)),
            self.scales: TensorSpec((groups, n), ("F16",)),
        }

    def to_canonical(self, arrays, k, n, label=""):
        specs = self.tensors(k, n)
        packed, scales = self.marker.lstrip("."), self.scales.lstrip(".")
        words = as_array(f"{packed}{label}", arrays[self.marker], WORDS, specs[self.marker].shape)
        scale = as_array(f"{scales}{label}", arrays[self.scales], HALVES, specs[self.scales].shape)
        check_finite(f"{scales}{label}", scale)
        return Int4Weight(
            words=words_of_marlin(words.view(np.uint32)),
            scale=_permuted(scale, np.argsort(scale_columns(len(scale)))),
            zero=symmetric_zeros(scale.shape),
            group_size=self.checked_group_size(k, n),
        )


def parse(config, file) -> MarlinScheme:
    """The scheme of a checkpoint whose ``checkpoint_format``, or whose ``version`` of AWQ, is "marlin".

    Parameters
    ----------
    config : dict
    file : path-like
        For messages.

    Raises
    ------
    CheckpointError, UnsupportedError
        Also for what cannot be: zero points, ``desc_act``, settings of single layers.
    """
    check_bits(required(config, ("bits", "w_bit"), int, file), file)
    group_size = required(config, ("group_size", "q_group_size"), int, file)
    if group_size not in (-1, GROUP_SIZE):
        raise UnsupportedError(f"{file}: group_size: got {group_size}, Marlin has {GROUP_SIZE} and -1 for one group")
    for name, expected in (("desc_act", False), ("sym", True), ("zero_point", False)):
        if optional(config, (name,), bool, file, default=expected) is not expected:
            raise CheckpointError(f"{name}: got {not expected}, which Marlin's layout cannot hold", file=file)
    method = optional(config, ("quant_method", "method"), str, file, default="gptq")
    if method not in NAMES:
        raise UnsupportedError(f"{file}: Marlin's layout of method {method!r}, supported: {', '.join(NAMES)}")
    return MarlinScheme(group_size, *NAMES[method])


def scale_columns(groups):
    """Where columns of ``s`` are from: column ``i`` of each run of ``len(result)`` is column ``result[i]`` of the run.

    Parameters
    ----------
    groups : int
        Rows of ``s``.

    Returns
    -------
    int ``[64]``, or ``[32]`` with one group
    """
    if groups > 1:
        return np.arange(64).reshape(8, 8).T.ravel()
    return (2 * np.arange(4)[:, None] + [0, 1, 8, 9, 16, 17, 24, 25]).ravel()


def pack_marlin(q, scale):
    """Marlin's tensors from plain codes, slow and obvious.

    Parameters
    ----------
    q : integers ``[K, N]``
        0 to 15; K a multiple of 16 and N of 64.
    scale : floats ``[G, N]``

    Returns
    -------
    B, s : int32 ``[K/16, 2*N]``, float16 ``[G, N]``

    Raises
    ------
    ValueError
        A code that the format cannot hold.
    """
    q, scale = np.asarray(q), np.asarray(scale, np.float16)
    if q.min() < 0 or q.max() > 15:
        raise ValueError(f"q: got {q.min()} to {q.max()}, marlin holds 0 to 15")
    k, n = q.shape
    lane, tile = np.divmod(np.arange(BLOCK_WORDS), 4)
    rows = 2 * (lane % 4)[:, None] + ROW_OF_NIBBLE
    columns = (16 * tile + lane // 4)[:, None] + COLUMN_OF_NIBBLE
    blocks = q.reshape(k // TILE, TILE, n // BLOCK_N, BLOCK_N).swapaxes(1, 2)
    codes = blocks[:, :, rows, columns].astype(np.uint32)
    words = np.bitwise_or.reduce(codes << NIBBLE_SHIFTS, axis=3)
    return words.reshape(k // TILE, 2 * n).view(np.int32), _permuted(scale, scale_columns(len(scale)))


def unpack_marlin(packed, scale):
    """Plain codes from Marlin's tensors: the inverse of :func:`pack_marlin`.

    Parameters
    ----------
    packed : int32 ``[K/16, 2*N]``
    scale : float16 ``[G, N]``

    Returns
    -------
    q, scale : uint8 ``[K, N]``, float16 ``[G, N]``
    """
    words = words_of_marlin(np.ascontiguousarray(packed).view(np.uint32))
    return unpack_words(words), _permuted(scale, np.argsort(scale_columns(len(scale))))


def _permuted(scale, columns):
    """``scale`` with each run of columns in the order given."""
    return scale.reshape(len(scale), -1, len(columns))[:, :, columns].reshape(scale.shape)
