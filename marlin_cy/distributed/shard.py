"""Which columns and heads each host keeps.

A *cut* is an int64 array ``[hosts + 1]``: host ``h`` has the columns ``cut[h]`` to ``cut[h + 1] - 1``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.sizes import N_TILE
from marlin_cy.weights.tile_layout import TILE_N

if TYPE_CHECKING:
    from marlin_cy.distributed.group import Group

__all__ = ["Columns", "Cut", "LayerShard", "Shard"]

Cut: TypeAlias = npt.NDArray[np.int64]

Columns: TypeAlias = npt.NDArray[np.int64]
"""The numbers of some columns, ascending."""


@dataclass(frozen=True, eq=False)
class Shard:
    """One host's share of a model: the scheme "columns". Made by :meth:`marlin_cy.distributed.Group.shard`.

    Attributes
    ----------
    group : Group
        The hosts, which exchange what they have computed.
    """

    group: Group

    @property
    def rank(self) -> int:
        """This host's number."""
        return self.group.rank

    @property
    def size(self) -> int:
        """Number of hosts."""
        return self.group.size

    def columns(self, name: str, n: int, *, whole_tiles: bool = False) -> Cut:
        """A cut of ``n`` columns, as even as tiles allow.

        Parameters
        ----------
        name : str
            What has these columns, for messages.
        n : int
        whole_tiles : bool
            Every host begins at a tile of 16 columns. Otherwise, hosts begin at a multiple of 8 if there are too few
            tiles.

        Raises
        ------
        ValueError
            There are more hosts than tiles, or runs of 8 columns.
        """
        unit = TILE_N if whole_tiles or n >= TILE_N * self.size else N_TILE
        parts = -(-n // unit)
        if parts < self.size:
            raise ValueError(
                f"{name}: got {self.size} hosts, expected at most {parts}: {n} columns are shared out in runs of {unit}"
            )
        return np.minimum(evenly(parts, self.size) * unit, n)

    def heads(self, name: str, num_heads: int, num_kv_heads: int) -> tuple[Cut, int, int]:
        """``(cut, begin, end)``: a cut of query heads, and the key heads ``begin`` to ``end - 1`` of this host.

        Hosts share out the key heads, each with its query heads. If there are more hosts than key heads, several hosts
        have the same key head, and share out its query heads.

        Raises
        ------
        ValueError
            There are more hosts than query heads.
        """
        if num_heads < self.size:
            raise ValueError(f"{name}: got {self.size} hosts, expected at most {num_heads}, the number of heads")
        per_head = num_heads // num_kv_heads
        if self.size <= num_kv_heads:
            keys = evenly(num_kv_heads, self.size)
            return keys * per_head, int(keys[self.rank]), int(keys[self.rank + 1])
        key_of = np.arange(self.size) * num_kv_heads // self.size
        cut = np.zeros(self.size + 1, np.int64)
        for key in range(num_kv_heads):
            hosts = np.flatnonzero(key_of == key)
            cut[hosts + 1] = key * per_head + evenly(per_head, len(hosts))[1:]
        key = int(key_of[self.rank])
        return cut, key, key + 1

    def local(self, cut: Cut) -> tuple[int, int]:
        """``(begin, end)``: the columns of this host."""
        return int(cut[self.rank]), int(cut[self.rank + 1])


@dataclass(frozen=True, eq=False)
class LayerShard:
    """How a Mixture-of-Experts layer is shared out.

    Attributes
    ----------
    shard : Shard
    inner : Cut
        Of the intermediate values of each routed expert: the columns of gate, and of up.
    outputs : Cut
        Of the outputs: the columns of down.
    shared : Cut or None
        Of the intermediate values of the shared expert.
    """

    shard: Shard
    inner: Cut
    outputs: Cut
    shared: Cut | None = None

    def width(self, cut: Cut) -> int:
        """Number of columns of this host."""
        begin, end = self.shard.local(cut)
        return end - begin


def evenly(count: int, parts: int) -> npt.NDArray[np.int64]:
    """``count`` things in ``parts`` runs whose lengths differ by at most one: where each begins, and the end."""
    return np.arange(parts + 1, dtype=np.int64) * count // parts
