"""Weights in a checkpoint's own form, which a backend may pack without the canonical form in between."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.tile_layout import TileLayout

__all__ = ["StoredWeight"]


class StoredWeight(ABC):
    """The weight of one expert, or of one linear layer, or some columns of it, whose rows of K are in K's own order.

    Attributes
    ----------
    k, n, group_size, codes, scales
        Those of the canonical form.
    """

    k: int
    n: int
    group_size: int
    codes: str
    scales: str

    @abstractmethod
    def canonical(self) -> CanonicalWeight:
        """The canonical form.

        The next call of any weight in the same thread may use its arrays again.

        Raises
        ------
        ValueError
            A scale or a minimum is not finite.
        """

    @abstractmethod
    def write_tiles(self, expert: npt.NDArray[np.uint8], column: int, layout: TileLayout) -> None:
        """Write the weight to columns ``[column, column + n)`` of a packed expert. Releases the GIL.

        Parameters
        ----------
        expert : uint8 ``[layout.expert_stride]``
        column : int
        layout : TileLayout
            Its rows, codes, scale record and group size are the weight's.

        Raises
        ------
        ValueError
            As :meth:`canonical`.
        """
