"""This host's part of a model: which heads and columns its weights have. All of them without a shard."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from marlin_cy.distributed.group import Group
from marlin_cy.distributed.shard import Columns, Cut, Shard

__all__ = ["Heads", "Share", "columns_of"]


@dataclass(frozen=True, eq=False)
class Heads:
    """Heads of attention, or of gated DeltaNet's values, and the key heads that they read.

    Attributes
    ----------
    queries, keys : slice
        The heads of this host.
    cut : Cut or None
        The query heads of each host; None if no other host has heads.
    """

    queries: slice
    keys: slice
    cut: Cut | None

    @property
    def num_queries(self) -> int:
        """Number of query heads of this host."""
        return int(self.queries.stop - self.queries.start)

    @property
    def num_keys(self) -> int:
        """Number of key heads of this host."""
        return int(self.keys.stop - self.keys.start)

    def query_columns(self, width: int) -> Columns | None:
        """The columns of this host's query heads, each of ``width`` columns; None for all columns."""
        return None if self.cut is None else columns_of(self.queries, width)

    def key_columns(self, width: int) -> Columns | None:
        """As :meth:`query_columns`, of key heads."""
        return None if self.cut is None else columns_of(self.keys, width)

    def values(self, width: int) -> Cut | None:
        """The cut of all query heads' values, ``width`` of each head."""
        return None if self.cut is None else self.cut * width


class Share:
    """Cuts of a model's columns and heads.

    Parameters
    ----------
    shard : Shard or None
    """

    def __init__(self, shard: Shard | None) -> None:
        self._shard = shard

    @property
    def group(self) -> Group | None:
        """The hosts of the model, if there are several."""
        return None if self._shard is None else self._shard.group

    def cut(self, name: str, n: int, *, whole_tiles: bool = False) -> Cut | None:
        """As :meth:`~marlin_cy.distributed.Shard.columns`; None without a shard."""
        return None if self._shard is None else self._shard.columns(name, n, whole_tiles=whole_tiles)

    def columns(self, cut: Cut | None) -> Columns | None:
        """The columns of this host; None for all columns."""
        return None if cut is None or self._shard is None else np.arange(*self._shard.local(cut))

    def heads(self, name: str, num_heads: int, num_kv_heads: int) -> Heads:
        """This host's heads."""
        if self._shard is None:
            return Heads(slice(0, num_heads), slice(0, num_kv_heads), None)
        cut, begin, end = self._shard.heads(name, num_heads, num_kv_heads)
        return Heads(slice(*self._shard.local(cut)), slice(begin, end), cut)


def columns_of(heads: slice, width: int, offset: int = 0) -> Columns:
    """The columns of some heads of ``width`` columns; head 0 begins at column ``offset``."""
    return np.arange(offset + heads.start * width, offset + heads.stop * width)
