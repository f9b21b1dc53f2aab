"""The tiers for devices of any vendor: "portable" and "subgroup", whose kernels divide a tile in the same way.

The heads of ``wave_tiled.cl`` and of the files that include it explain their macros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from marlin_cy.opencl.tiers.configuration import (
    ALL_TYPES,
    FLOAT32_ROWS,
    PLANES,
    Configuration,
    Inputs,
    Problem,
    Tier,
    by_rows,
    fitting,
    with_splits,
)

if TYPE_CHECKING:
    from marlin_cy.opencl.capabilities import Capabilities

__all__ = ["PORTABLE", "SUBGROUP", "tiled", "wave_tiled"]

RESIDENT_WAVES = 64  # waves of 32 work-items that a compute unit of a GPU can hold


def wave_tiled(
    rows: int,
    *,
    k_waves: int = 1,
    column_waves: int = 1,
    row_waves: int = 1,
    wave_strips: int = 1,
    row_step: int = 1,
    macros: tuple[tuple[str, int], ...] = (),
) -> Configuration:
    """A configuration of either kernel."""
    waves = k_waves * column_waves * row_waves
    reduce_rows = max(1, min(rows // row_waves, 64 // (waves * wave_strips)))
    return Configuration(
        rows=rows,
        columns=16 * wave_strips * column_waves,
        local_size=32 * waves,
        local_bytes=16 * waves * (16 * wave_strips * reduce_rows + 8) + 8 * rows,
        groups_per_unit=RESIDENT_WAVES // waves,
        macros=(
            ("K_WAVES", k_waves),
            ("COLUMN_WAVES", column_waves),
            ("ROW_WAVES", row_waves),
            ("WAVE_STRIPS", wave_strips),
            ("ROW_STEP", row_step),
            *macros,
        ),
    )


def tiled(rows: int, *, column_waves: int = 1, row_waves: int = 1, wave_strips: int = 1) -> Configuration:
    """A configuration of gemm_portable_tiled.cl, which copies activations and weights to local memory."""
    configuration = wave_tiled(rows, column_waves=column_waves, row_waves=row_waves, wave_strips=wave_strips)
    return replace(
        configuration,
        file="gemm_portable_tiled",
        local_bytes=144 * (rows + configuration.columns) + 8 * rows,
        groups_per_unit=RESIDENT_WAVES // 2 // (column_waves * row_waves),
    )


@dataclass(frozen=True)
class WaveTiledTable:
    """Configurations, grouped by what limits the speed.

    Attributes
    ----------
    cpu : tuple of Configuration
        For CPUs. A core runs one work-group at a time, so that several waves would hide no loads. More rows would
        reuse weights more often, but PoCL compiles 8 rows in three seconds and 32 rows in ten, and CPUs have a backend
        of their own.
    few, few_short : tuple of Configuration
        For GPUs with few rows, where loads of weights limit the speed: waves split K, so that many loads are in
        flight. ``few_short`` is for less than 1024 rows of K.
    many : tuple of Configuration
        For GPUs with many rows, where arithmetic limits the speed: waves share activations, and a work-item holds up
        to 64 sums.
    small : tuple of Configuration
        For devices with small work-groups, and any number of rows.
    """

    cpu: tuple[Configuration, ...]
    few: tuple[Configuration, ...]
    few_short: tuple[Configuration, ...]
    many: tuple[Configuration, ...]
    small: tuple[Configuration, ...]

    def __call__(self, problem: Problem) -> list[Configuration]:
        """``Tier.configurations``."""
        device = problem.device
        if device.is_cpu:
            return [with_splits(problem, candidate, device.compute_units) for candidate in self.cpu]
        few = self.few if problem.k >= 1024 else self.few_short
        table = few if problem.rows <= max(candidate.rows for candidate in few) else self.many
        candidates = fitting([*by_rows(table, problem.rows), *self.small], device)
        return [with_splits(problem, candidate, device.compute_units) for candidate in candidates]

    def missing(self, device: Capabilities) -> str | None:
        """The capability that a device lacks for the smallest configuration, or None."""
        smallest = self.small[-1]
        if device.max_work_group_size < smallest.local_size:
            return f"work-groups of {smallest.local_size} work-items (it has {device.max_work_group_size})"
        if device.local_memory < smallest.local_bytes:
            return f"{smallest.local_bytes} bytes of local memory (it has {device.local_memory})"
        return None


FEW_ROWS = (
    wave_tiled(1, k_waves=8, wave_strips=2),
    wave_tiled(2, k_waves=4, wave_strips=2),
    wave_tiled(4, k_waves=2, wave_strips=2),
    wave_tiled(8, k_waves=2, wave_strips=2, row_step=2),
)
FEW_SHORT_ROWS = (
    wave_tiled(1, k_waves=4, wave_strips=2),
    wave_tiled(2, k_waves=4, wave_strips=2),
    wave_tiled(4, k_waves=2, wave_strips=2),
    wave_tiled(8, k_waves=2, wave_strips=2, row_step=2),
)
SMALL = (wave_tiled(8, k_waves=2), wave_tiled(8))
PORTABLE_TABLE = WaveTiledTable(
    cpu=(wave_tiled(8, macros=(("UNROLL", 0),)),),
    few=FEW_ROWS,
    few_short=FEW_SHORT_ROWS,
    many=(
        wave_tiled(16, k_waves=2, wave_strips=2, row_step=2),
        tiled(32, column_waves=4, wave_strips=4),
        tiled(32, column_waves=2, wave_strips=4),  # for devices with 32 KiB of local memory
        tiled(64, column_waves=2, row_waves=2, wave_strips=4),
    ),
    small=SMALL,
)
SUBGROUP_TABLE = replace(
    PORTABLE_TABLE,
    many=(
        wave_tiled(16, k_waves=2, wave_strips=2, row_step=2),
        wave_tiled(32, column_waves=4, row_waves=2, wave_strips=2),
        wave_tiled(64, column_waves=2, row_waves=4, wave_strips=2),
    ),
)


def wave_tiled_block_size(average_rows: float) -> int:
    """Small enough that most blocks have little padding, which work-items multiply if it lies between rows."""
    return next(
        (size for limit, size in ((0.5, 1), (1.25, 2), (2, 4), (12, 8), (128, 32)) if average_rows <= limit), 64
    )


def portable_inputs(device: Capabilities) -> Inputs:
    return Inputs(ALL_TYPES, FLOAT32_ROWS)


def subgroup_missing(device: Capabilities) -> str | None:
    wanted = {"cl_khr_fp16": device.fp16, "sub-groups": device.sub_groups}
    lacking = ", ".join(name for name, present in wanted.items() if not present)
    return lacking or SUBGROUP_TABLE.missing(device)


def subgroup_inputs(device: Capabilities) -> Inputs:
    if device.integer_dot_product:
        return Inputs(frozenset(), PLANES)
    return Inputs(ALL_TYPES, FLOAT32_ROWS)


def subgroup_configurations(problem: Problem) -> list[Configuration]:
    device = problem.device
    macros = ("DOT", int(device.integer_dot_product)), ("SHUFFLE", int("cl_khr_subgroup_shuffle" in device.extensions))
    return [replace(candidate, macros=(*candidate.macros, *macros)) for candidate in SUBGROUP_TABLE(problem)]


def subgroup_options(device: Capabilities) -> tuple[str, ...]:
    return ("-cl-std=CL3.0",) if device.c_version >= (3, 0) else ()


SUBGROUP = Tier(
    "subgroup",
    "gemm_subgroup",
    subgroup_inputs,
    subgroup_missing,
    subgroup_configurations,
    wave_tiled_block_size,
    subgroup_options,
)
PORTABLE = Tier(
    "portable", "gemm_portable", portable_inputs, PORTABLE_TABLE.missing, PORTABLE_TABLE, wave_tiled_block_size
)
