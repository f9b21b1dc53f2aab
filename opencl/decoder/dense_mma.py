"""Dense products of many rows by tensor cores, in tier "mma": builds of ``decoder_dense_mma.cl``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from marlin_cy.opencl.arguments import arguments_of
from marlin_cy.opencl.checks.builds import first_right
from marlin_cy.opencl.tiers.configuration import FLOAT16, FLOAT32

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.recording import RecordingContext

__all__ = ["DenseKernel", "dense_kernel"]

LANES, STRIP, WAVE_COLUMNS, WAVE_K = 32, 16, 32, 64  # of decoder_dense_mma.cl
FLOAT8, INT8 = 3, 4  # WEIGHT_TYPE of weights that are multiplied as float16
SIZES = ((4, 8, 1), (2, 4, 2), (1, 1, 8))
"""ROW_STRIPS, COLUMN_WAVES and K_WAVES, the largest tile first. A router has few columns: there waves share K."""
FILLED = 0.75
"""A tile is taken if there are at least as many of them for each compute unit; the smallest in any case."""


@dataclass(frozen=True)
class DenseKernel:
    """A build of ``dense_tiles``; the kernel's file explains the numbers.

    Attributes
    ----------
    input_type, weight_type : int
    row_strips, column_waves, k_waves : int
    scale_k : int
        Of weights of 8 bits: values of K of a scale; 0 for all of K.
    """

    input_type: int
    weight_type: int
    row_strips: int
    column_waves: int
    k_waves: int
    scale_k: int = 0

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return STRIP * self.row_strips

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return WAVE_COLUMNS * self.column_waves

    @property
    def local_bytes(self) -> int:
        """Two stages of rows as one or two parts, or the sums of all waves but the first along K."""
        operand_type = FLOAT16 if self.weight_type in (FLOAT8, INT8) else self.weight_type
        stages = 2 * (1 + (self.input_type != operand_type)) * self.rows * self.k_waves * 2 * WAVE_K
        return max(stages, 4 * (self.k_waves - 1) * self.rows * self.columns)

    def groups(self, rows: int, n: int, batch: int) -> tuple[int, int, int]:
        """Work-groups of a product."""
        return -(-n // self.columns), -(-rows // self.rows), batch

    def record(self, ctx: RecordingContext, batch: int, label: str, values: Mapping[str, Any]) -> None:
        """Record a launch; ``values``: the arguments."""
        macros = {
            "INPUT_TYPE": self.input_type,
            "WEIGHT_TYPE": self.weight_type,
            "ROW_STRIPS": self.row_strips,
            "COLUMN_WAVES": self.column_waves,
            "K_WAVES": self.k_waves,
            "ALIGNED": 1,
        }
        if self.scale_k:
            macros["SCALE_K"] = self.scale_k
        items = LANES * self.column_waves * self.k_waves
        columns, tiles, _ = self.groups(values["rows"], values["n"], batch)
        table = arguments_of("dense_tiles", macros)
        options = ctx.backend.tier.options(ctx.backend.runtime.capabilities)
        size = columns * items, tiles, batch
        ctx.record("decoder_dense_mma", "dense_tiles", macros, size, (items, 1, 1), table, values, label, options)


def dense_kernel(
    backend: OpenClBackend, input_type: int, weight_type: int, rows: int, n: int, batch: int, scale_k: int = 0
) -> DenseKernel | None:
    """The build for a product on the backend's device; None where the portable kernels are used."""
    from marlin_cy.opencl.checks.dense import reason_wrong  # it imports modules of the decoder

    if backend.tier.name != "mma" or weight_type == FLOAT32 or scale_k % WAVE_K:
        return None
    wanted = FILLED * backend.runtime.capabilities.compute_units
    builds = [DenseKernel(input_type, weight_type, *sizes, scale_k) for sizes in SIZES]
    filling = [build for build in builds[:-1] if product(build.groups(rows, n, batch)) >= wanted]
    return first_right(
        backend, [*filling, builds[-1]], "dense products by tensor cores", partial(reason_wrong, backend)
    )


def product(groups: tuple[int, int, int]) -> int:
    """The number of work-groups."""
    return groups[0] * groups[1] * groups[2]
