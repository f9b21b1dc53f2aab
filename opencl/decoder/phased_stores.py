"""Which stores of packed weights ``kernels/decoder_step.cl`` reads, and where a projection is in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from marlin_cy.opencl.decoder.projections import PackedColumns, ProjectionGroup
from marlin_cy.opencl.layout import STRIP_N

if TYPE_CHECKING:
    from marlin_cy.opencl.store import OpenClGptqStore

__all__ = ["NotPhased", "check_store", "covering", "packed_parts"]


class NotPhased(Exception):
    """A model that the kernel does not support."""


def packed_parts(group: ProjectionGroup, what: str = "attention") -> list[PackedColumns]:
    """The parts of projections that are all quantised."""
    found = [part for part in group.parts if isinstance(part, PackedColumns)]
    if len(found) < len(group.parts):
        raise NotPhased(f"a layer of its {what} is not quantised")
    return found


def covering(parts: Sequence[PackedColumns], begin: int, columns: int) -> tuple[OpenClGptqStore, int, int]:
    """The store, the expert and its first column that give output columns ``begin`` to ``begin + columns - 1``."""
    for part in parts:
        for expert, first, count, out in part.columns.tolist():
            column = first + begin - out
            if out <= begin and begin + columns <= out + count and column % STRIP_N == columns % STRIP_N == 0:
                return part.store, expert, column
    raise NotPhased("the columns of its projections are not whole strips of one stack")


def check_store(store: OpenClGptqStore) -> None:
    """Refuse codes and scale records that the kernel does not read, another order of K, and scales out of range."""
    if store.layout.code_type.bits != 4:
        raise NotPhased("its weights have codes of 8 bits")
    if store.scales != "float16":
        raise NotPhased(f"its weights have {store.scales} scales")
    if store.order is not None or store.packed_k != store.k:
        raise NotPhased("its weights have an order of K (act-order)")
    if not 2.0**-100 < store.weight_factor < 2.0**100:
        raise NotPhased(f"its scales have a factor of {store.weight_factor}")
