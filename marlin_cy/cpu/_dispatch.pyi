from collections.abc import Mapping
from typing import Final, TypedDict, final

import numpy as np
import numpy.typing as npt

ENVIRONMENT_VARIABLE: Final = "MARLIN_CY_ISA"
ACTIVATIONS: Final[Mapping[str, int]]
CONSTANTS: Final[Mapping[str, int | float]]

class _KernelCodeType(TypedDict):
    number: int
    bits: int
    multiplicands: list[int]
    is_identity: bool
    max_multiplicand: int
    has_zero_points: bool
    zero_bytes: int
    symmetric_zero: int
    units_per_one: int
    min_group: int

KERNEL_CODE_TYPES: Final[Mapping[str, _KernelCodeType]]

class _KernelScaleRecord(TypedDict):
    number: int
    scale_bytes: int
    has_minimum: bool
    has_blocks: bool

KERNEL_SCALE_RECORDS: Final[Mapping[str, _KernelScaleRecord]]

class _Isa(TypedDict):
    name: str
    available: bool
    reason: str

class _OpenMp(TypedDict):
    enabled: bool
    version: int

@final
class KernelTable:
    @property
    def name(self) -> str: ...
    @property
    def mr(self) -> int: ...
    @property
    def mc(self) -> int: ...
    @property
    def min_matrix_rows(self) -> int: ...
    @property
    def address(self) -> int: ...
    @staticmethod
    def from_descriptor(address: int, owner: object) -> KernelTable: ...
    def __bytes__(self) -> bytes: ...

def isas() -> list[_Isa]: ...
def choose_isa() -> tuple[str, str]: ...
def activate(
    isa: str, activation: str, sums: npt.NDArray[np.float32], bias: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]: ...
def openmp_report() -> _OpenMp: ...
