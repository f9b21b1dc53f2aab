"""Marlin's tensors, as IST-DASLab's Marlin, AutoGPTQ and AutoAWQ store them, to canonical form and back.

==================  =======  ===============  ======================================
B (AWQ: qweight)    int32    ``[K/16, 2*N]``  codes in the order of tensor core fragments
s (AWQ: scales)     float16  ``[G, N]``       columns permuted to match
==================  =======  ===============  ======================================

Weights are symmetric (zero points are 8), in groups of 128 rows or in one group. Row ``t`` of B holds rows
``16*t .. 16*t+15`` of K. 128 consecutive words hold 64 columns of these rows, as four tiles of 16 by 16. Word
``4*lane + tile`` holds the codes that one of 32 GPU lanes needs from a tile, with ``column = lane // 4`` and
``row = 2 * (lane % 4)``::

    bits      0    4    8    12   16   20   24   28
    row      r  , r+8, r  , r+8, r+1, r+9, r+1, r+9
    column   c  , c  , c+8, c+8, c  , c  , c+8, c+8      of columns 16*tile .. 16*tile+15

A mask of every fourth nibble thus extracts two consecutive rows of a column at once. The columns of s are permuted so
that a lane's scales are adjacent: within runs of 64, or of 32 if there is one group. See :func:`scale_columns`.

Source: IST-DASLab/marlin, ``marlin/__init__.py``; AutoGPTQ, ``auto_gptq/nn_modules/qlinear/qlinear_marlin.py``;
AutoAWQ, ``awq/modules/linear/marlin.py``. GPTQModel and vLLM use this layout in memory only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.arrays import check_finite, symmetric_zeros
from marlin_cy.formats.fields import check_bits
from marlin_cy.formats.json_fields import JsonObject, StrPath, optional, required
from marlin_cy.formats.scheme import Scheme, TensorSpec
from marlin_cy.weights._nibbles import words_of_marlin
from marlin_cy.weights.arrays import WORDS, checked_array
from marlin_cy.weights.canonical import NIBBLE_SHIFTS, CanonicalWeight, unpack_words
from marlin_cy.weights.sizes import checked_group_size

__all__ = ["MarlinScheme", "pack_marlin", "parse", "scale_columns", "unpack_marlin"]

TILE = 16
BLOCK_N = 64
BLOCK_WORDS = TILE * BLOCK_N // 8
GROUP_SIZE = 128
HALVES = (np.dtype(np.float16),)

ROW_OF_NIBBLE = (0, 8, 0, 8, 1, 9, 1, 9)
COLUMN_OF_NIBBLE = (0, 0, 8, 8, 0, 0, 8, 8)

NAMES = {"gptq": (".B", ".s"), "marlin": (".B", ".s"), "awq": (".qweight", ".scales")}
"""The suffixes of the two tensors, by ``quant_method``."""


@dataclass(frozen=True)
class MarlinScheme(Scheme):
    """Marlin's tensors: see :mod:`marlin_cy.formats.marlin`.

    Attributes
    ----------
    marker, scales : str
        ``".B"`` and ``".s"``; in AutoAWQ's files, ``".qweight"`` and ``".scales"``.
    """

    group_size: int
    marker: str = ".B"
    scales: str = ".s"

    format = "marlin"

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def act_order(self) -> bool:
        return False

    def sizes(self, marker_shape: tuple[int, ...]) -> tuple[int, int]:
        if len(marker_shape) != 2 or marker_shape[1] % 2:
            raise ValueError(f"got shape {marker_shape}, expected two dimensions, the last with two words per column")
        return TILE * marker_shape[0], marker_shape[1] // 2

    def checked_group_size(self, k: int, n: int) -> int:
        group_size = checked_group_size(group_size=self.group_size, k=k, n=n)
        if n % BLOCK_N:
            raise ValueError(f"n: got {n}, expected a multiple of {BLOCK_N} in Marlin's layout")
        return group_size

    def tensors(self, k: int, n: int) -> dict[str, TensorSpec]:
        groups = -(-k // self.checked_group_size(k, n))
        return {
            self.marker: TensorSpec((k // TILE, 2 * n), ("I32",)),
            self.scales: TensorSpec((groups, n), ("F16",)),
        }

    def to_canonical(self, arrays: Mapping[str, npt.NDArray[Any]], k: int, n: int, label: str = "") -> CanonicalWeight:
        specs = self.tensors(k, n)
        packed, scales = self.marker.lstrip("."), self.scales.lstrip(".")
        words = checked_array(f"{packed}{label}", arrays[self.marker], WORDS, specs[self.marker].shape)
        scale = checked_array(f"{scales}{label}", arrays[self.scales], HALVES, specs[self.scales].shape)
        check_finite(f"{scales}{label}", scale)
        return CanonicalWeight(
            words=words_of_marlin(words.view(np.uint32)),
            scale=_permuted(scale, np.argsort(scale_columns(len(scale)))),
            zero=symmetric_zeros(scale.shape),
            group_size=self.checked_group_size(k, n),
        )


def parse(config: JsonObject, file: StrPath) -> MarlinScheme:
    """The scheme of a checkpoint whose ``checkpoint_format`` (AWQ: ``version``) is "marlin".

    Parameters
    ----------
    config : dict
    file : path-like
        For messages.

    Raises
    ------
    CheckpointError, UnsupportedError
        Also settings that the layout cannot represent: zero points, ``desc_act``, other group sizes.
    """
    check_bits(required(config, ("bits", "w_bit"), int, file), file, (4,))
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


def scale_columns(groups: int) -> npt.NDArray[Any]:
    """The permutation of the columns of ``s``, within each run of ``len(result)`` columns.

    Stored column ``i`` of a run is column ``result[i]`` of the run.

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


def pack_marlin(q: npt.ArrayLike, scale: npt.ArrayLike) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]:
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
        The format cannot hold a code.
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


def unpack_marlin(
    packed: npt.NDArray[np.int32], scale: npt.NDArray[np.float16]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
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


def _permuted(scale: npt.NDArray[np.float16], columns: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """``scale`` with the columns of each run permuted."""
    return scale.reshape(len(scale), -1, len(columns))[:, :, columns].reshape(scale.shape)
