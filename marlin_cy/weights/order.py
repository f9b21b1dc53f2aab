"""The order in which rows of K are packed, so that a packed group's rows share one scale and zero point.

K is cut into groups of :func:`packed_group_size` rows. A weight group that is longer than that is
several packed groups with the same scale and zero point.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["GroupOrder", "distinct_orders", "group_order", "packed_group_size", "rows_of_orders"]

MAX_GROUP_K = 128
GROUP_K_STEP = 32


def packed_group_size(group_size):
    """Rows of K that are packed as one group: the weight's group, at most 128 of them."""
    return min(group_size, MAX_GROUP_K)


@dataclass(frozen=True)
class GroupOrder:
    """Where each packed row of K comes from.

    Attributes
    ----------
    rows : int32 ``[packed_k]`` or None
        Row of K at each packed position, -1 for padding (a weight of 0); None for K's own order.
    scale_rows : int32 ``[packed_groups]``
        Row of ``scale`` and ``zero`` that each packed group uses.
    packed_k : int
        Rows after packing: K, more when ``g_idx`` makes groups of unequal lengths.
    """

    rows: np.ndarray | None
    scale_rows: np.ndarray
    packed_k: int

    def g_idx(self, k, packed_group):
        """The group of each of K's ``k`` rows, int32 ``[k]``, None in K's own order; ``packed_group`` rows are packed
        as one group."""
        if self.rows is None:
            return None
        kept = np.flatnonzero(self.rows >= 0)
        g_idx = np.empty(k, np.int32)
        g_idx[self.rows[kept]] = self.scale_rows[kept // packed_group]
        return g_idx


def group_order(g_idx, k, group_size):
    """The order in which rows of K are packed, so that each group's rows lie together.

    Rows of one group keep their order. A group whose length is not a multiple of the packed group
    size is padded to one, except the last.
    """
    step = packed_group_size(group_size)
    if g_idx is None:
        scale_rows = np.arange(0, k, step) // group_size
        return GroupOrder(None, scale_rows.astype(np.int32), k)
    rows, scale_rows = [], []
    for group in np.unique(g_idx):
        members = np.flatnonzero(g_idx == group)
        pieces = -(-len(members) // step)
        rows.append(np.pad(members, (0, pieces * step - len(members)), constant_values=-1))
        scale_rows += [group] * pieces
    rows = np.concatenate(rows)
    last_row = int(np.flatnonzero(rows >= 0)[-1])
    packed_k = -(-(last_row + 1) // GROUP_K_STEP) * GROUP_K_STEP
    return GroupOrder(rows[:packed_k].astype(np.int32), np.array(scale_rows, np.int32), packed_k)


def distinct_orders(g_idx, k, group_size):
    """The orders of a stack's experts, each once.

    Parameters
    ----------
    g_idx : sequence of int32 ``[k]`` or None, one an expert
    k, group_size : int

    Returns
    -------
    orders : list of GroupOrder
    order_of : int32 ``[num_experts]``
        Which of them each expert uses.
    """
    distinct, order_of = {}, np.empty(len(g_idx), np.int32)
    for expert, groups in enumerate(g_idx):
        key = None if groups is None else groups.tobytes()
        if key not in distinct:
            distinct[key] = (len(distinct), group_order(groups, k, group_size))
        order_of[expert] = distinct[key][0]
    return [order for _, order in distinct.values()], order_of


def rows_of_orders(orders, k):
    """``rows`` of each order, int32 ``[len(orders), largest packed_k]``, ending in -1; None if all are K's own."""
    if all(order.rows is None for order in orders):
        return None
    rows = np.full((len(orders), max(order.packed_k for order in orders)), -1, np.int32)
    for index, order in enumerate(orders):
        rows[index, : order.packed_k] = np.arange(k) if order.rows is None else order.rows
    return rows
