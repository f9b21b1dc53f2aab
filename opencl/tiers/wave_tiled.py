"""The tiers for devices of any vendor: "portable" and "subgroup", whose kernels are cut up alike.

The heads of ``wave_tiled.cl``, ``gemm_portable.cl`` and ``gemm_subgroup.cl`` say what their macros are.
"""

from dataclasses import replace
from typing import NamedTuple

from marlin_cy.opencl.tiers.configuration import (
    ALL_TYPES,
    FLOAT32_ROWS,
    PLANES,
    Configuration,
    Inputs,
    Tier,
    by_rows,
    fitting,
    with_splits,
)

__all__ = ["PORTABLE", "SUBGROUP", "staged", "wave_tiled"]

RESIDENT_WAVES = 64  # of 32 work-items: what a compute unit of a GPU can have under way


def wave_tiled(rows, *, k_waves=1, column_waves=1, row_waves=1, wave_strips=1, staged=0, row_step=1, macros=()):
    """A configuration of either."""
    waves = k_waves * column_waves * row_waves
    reduce_rows = max(1, min(rows // row_waves, 64 // (waves * wave_strips)))
    return Configuration(
        rows=rows,
        columns=16 * wave_strips * column_waves,
        local_size=32 * waves,
        local_bytes=max(staged * 256 * rows * k_waves, 16 * waves * (16 * wave_strips * reduce_rows + 8)) + 8 * rows,
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


def staged(rows, **sizes):
    """A configuration of gemm_portable.cl whose activations go through local memory."""
    return wave_tiled(rows, staged=1, macros=(("STAGED", 1),), **sizes)


class WaveTiledTable(NamedTuple):
    """Configurations by what limits them.

    Attributes
    ----------
    cpu
        A core runs a work-group on its own, so more than one wave has no loads to hide. More rows would reuse
        weights more often, but PoCL compiles 8 rows for three seconds and 32 for ten, and a CPU has a backend
        of its own.
    few, few_short
        A GPU with few rows waits for weights: waves along K, so that many loads are in flight. ``few_short`` is
        for less than 1024 rows of K.
    many
        With many rows it waits for activations: waves share them, and a work-item holds up to 64 sums.
    small
        For devices with small work-groups, whatever the rows.
    """

    cpu: tuple
    few: tuple
    few_short: tuple
    many: tuple
    small: tuple

    def __call__(self, problem):
        """As ``Tier.configurations``."""
        device = problem.device
        if device.is_cpu:
            return [with_splits(problem, candidate, device.compute_units) for candidate in self.cpu]
        few = self.few if problem.k >= 1024 else self.few_short
        table = few if problem.rows <= max(candidate.rows for candidate in few) else self.many
        candidates = fitting([*by_rows(table, problem.rows), *self.small], device)
        return [with_splits(problem, candidate, device.compute_units) for candidate in candidates]

    def missing(self, device):
        """What a device lacks for the smallest of them."""
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
        staged(32, column_waves=4, row_waves=2, wave_strips=2),
        staged(64, column_waves=2, row_waves=4, wave_strips=2),
    ),
    small=SMALL,
)
SUBGROUP_TABLE = PORTABLE_TABLE._replace(
    many=(
        wave_tiled(16, k_waves=2, wave_strips=2, row_step=2),
        wave_tiled(32, column_waves=4, row_waves=2, wave_strips=2),
        wave_tiled(64, column_waves=2, row_waves=4, wave_strips=2),
    ),
)


def wave_tiled_block_size(average_rows):
    """So that most blocks have few rows to spare: work-items multiply those that lie between others."""
    return next((size for limit, size in ((0.5, 1), (1.25, 2), (2, 4), (24, 8)) if average_rows <= limit), 32)


def portable_inputs(device):
    return Inputs(ALL_TYPES, FLOAT32_ROWS)


def subgroup_missing(device):
    wanted = {"cl_khr_fp16": device.fp16, "sub-groups": device.sub_groups}
    lacking = ", ".join(name for name, present in wanted.items() if not present)
    return lacking or SUBGROUP_TABLE.missing(device)


def subgroup_inputs(device):
    if device.integer_dot_product:
        return Inputs(frozenset(), PLANES)
    return Inputs(ALL_TYPES, FLOAT32_ROWS)


def subgroup_configurations(problem):
    device = problem.device
    macros = ("DOT", int(device.integer_dot_product)), ("SHUFFLE", int("cl_khr_subgroup_shuffle" in device.extensions))
    return [replace(candidate, macros=(*candidate.macros, *macros)) for candidate in SUBGROUP_TABLE(problem)]


def subgroup_options(device):
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
