"""The order in which rows of K are packed, so that the rows of a packed group share one scale and zero point.

K is cut into packed groups of :func:`packed_group_size` rows. A longer weight group becomes several packed groups with
the same scale and zero point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.sizes import K_STEP

__all__ = ["GroupOrder", "distinct_orders", "group_order", "packed_group_size", "rows_of_orders"]

MAX_GROUP_K = 128
"""The largest number of rows in a packed group."""


def packed_group_size(group_size: int) -> int:
    """Number of rows in a packed group: the weight's group size, at most 128."""
    return min(group_size, MAX_GROUP_K)


@dataclass(frozen=True)
class GroupOrder:
    """Which row of K each packed row holds.

    Attributes
    ----------
    rows : int32 ``[packed_k]`` or None
        The row of K in each packed row, -1 for padding (a weight of 0); None for K's own order.
    scale_rows : int32 ``[packed_groups]``
        The row of ``scale`` and ``zero`` that each packed group uses.
    packed_k : int
        Number of packed rows. More than K if ``g_idx`` makes groups of unequal lengths.
    """

    rows: npt.NDArray[np.int32] | None
    scale_rows: npt.NDArray[np.int32]
    packed_k: int

    def g_idx(self, k: int, packed_group: int) -> npt.NDArray[np.int32] | None:
        """The group of each of K's ``k`` rows, int32 ``[k]``; None for K's own order.

        Parameters
        ----------
        k : int
        packed_group : int
            Number of rows in a packed group.
        """
        if self.rows is None:
            return None
        kept = np.flatnonzero(self.rows >= 0)
        g_idx = np.empty(k, np.int32)
        g_idx[self.rows[kept]] = self.scale_rows[kept // packed_group]
        return g_idx


def distinct_orders(
    g_idx: Sequence[npt.NDArray[np.int32] | None], k: int, group_size: int
) -> tuple[list[GroupOrder], npt.NDArray[np.int32]]:
    """The orders of a stack's experts, each once.

    Parameters
    ----------
    g_idx : sequence of int32 ``[k]`` or None, one per expert
    k, group_size : int

    Returns
    -------
    orders : list of GroupOrder
    order_of : int32 ``[num_experts]``
        The index of each expert's order.
    """
    distinct: dict[bytes | None, tuple[int, GroupOrder]] = {}
    order_of = np.empty(len(g_idx), np.int32)
    for expert, groups in enumerate(g_idx):
        key = None if groups is None else groups.tobytes()
        if key not in distinct:
            distinct[key] = (len(distinct), group_order(groups, k, group_size))
        order_of[expert] = distinct[key][0]
    return [order for _, order in distinct.values()], order_of


def group_order(g_idx: npt.NDArray[np.int32] | None, k: int, group_size: int) -> GroupOrder:
    """The order of K in which the rows of each group are consecutive.

    Rows of one group keep their order. Each group but the last is padded to a multiple of the packed group size.
    """
    step = packed_group_size(group_size)
    if g_idx is None:
        scale_rows = np.arange(0, k, step) // group_size
        return GroupOrder(None, scale_rows.astype(np.int32), k)
    pieces_of_rows, rows_of_scale = [], []
    for group in np.unique(g_idx):
        members = np.flatnonzero(g_idx == group)
        pieces = -(-len(members) // step)
        pieces_of_rows.append(np.pad(members, (0, pieces * step - len(members)), constant_values=-1))
        rows_of_scale += [group] * pieces
    rows = np.concatenate(pieces_of_rows)
    last_row = int(np.flatnonzero(rows >= 0)[-1])
    packed_k = -(-(last_row + 1) // K_STEP) * K_STEP
    return GroupOrder(rows[:packed_k].astype(np.int32), np.array(rows_of_scale, np.int32), packed_k)


def rows_of_orders(orders: Sequence[GroupOrder], k: int) -> npt.NDArray[np.int32] | None:
    """The ``rows`` of each order, int32 ``[len(orders), largest packed_k]``, padded with -1.

    None if every order is K's own.
    """
    if all(order.rows is None for order in orders):
        return None
    rows = np.full((len(orders), max(order.packed_k for order in orders)), -1, np.int32)
    for index, order in enumerate(orders):
        rows[index, : order.packed_k] = np.arange(k) if order.rows is None else order.rows
    return rows
