from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.order import GroupOrder
from marlin_cy.weights.sizes import StackSizes
from marlin_cy.weights.stored import StoredWeight
from marlin_cy.weights.tile_layout import TileLayout

def allocate_pages(nbytes: int) -> npt.NDArray[np.uint8]: ...

class TilePlace(NamedTuple):
    nbytes: int
    expert_stride: int
    begin: int
    run_tiles: int
    skip: int

def place_of(sizes: StackSizes, columns: Sequence[tuple[int, int]]) -> TilePlace: ...
def checked_data(data: npt.NDArray[np.uint8], nbytes: int) -> npt.NDArray[np.uint8]: ...

@final
class CpuGptqStore:
    @property
    def num_experts(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def weight_group_size(self) -> int: ...
    @property
    def codes(self) -> str: ...
    @property
    def scales(self) -> str: ...
    @property
    def layout(self) -> TileLayout: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def data(self) -> npt.NDArray[np.uint8]: ...
    @property
    def orders(self) -> npt.NDArray[np.int32] | None: ...
    @property
    def order_of(self) -> npt.NDArray[np.int32]: ...
    @property
    def group_orders(self) -> list[GroupOrder]: ...
    @property
    def act_order(self) -> bool: ...
    def __init__(
        self, sizes: StackSizes, data: npt.NDArray[np.uint8] | None = None, place: TilePlace | None = None
    ) -> None: ...
    @staticmethod
    def from_packed(
        num_experts: int,
        k: int,
        n: int,
        group_size: int,
        g_idx: Sequence[npt.NDArray[np.int32] | None] | None,
        codes: str,
        scales: str | npt.DTypeLike,
        data: npt.NDArray[np.uint8],
        columns: Sequence[tuple[int, int]] | None = None,
    ) -> CpuGptqStore: ...
    def pack(self, expert: int, column_offset: int, weight: CanonicalWeight) -> None: ...
    def pack_stored(self, expert: int, column_offset: int, weight: StoredWeight) -> None: ...
