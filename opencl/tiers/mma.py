"""The tier "mma": NVIDIA's tensor cores.

``mma.cl`` and the heads of the two kernels' files explain the kernels and their macros. The choice of sizes was
measured on an H100; ``python -m bench opencl show`` repeats the measurement.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from marlin_cy.opencl.layout import expert_layout
from marlin_cy.opencl.tiers.configuration import (
    FLOAT16,
    FLOAT16_ROWS,
    Configuration,
    Inputs,
    Problem,
    Tier,
    with_splits,
)

if TYPE_CHECKING:
    from marlin_cy.opencl.capabilities import Capabilities

__all__ = ["MMA", "direct", "local_limit", "tiled"]

KIB = 1 << 10
MMA_LOCAL_BYTES = {(8, 0): 163 * KIB, (8, 7): 163 * KIB, (8, 6): 99 * KIB, (8, 9): 99 * KIB, (9, 0): 227 * KIB}
MMA_OTHER_LOCAL_BYTES = 99 * KIB  # local memory of a work-group; the driver reports 48 KiB but allows more
ALL_GROUPS = 1 << 31  # a work-group for each tile
LANE_BYTES = 32  # at most, with codes of 4 bits and float16 scales


def mma_macros(waves: int, strips: int, depth: int) -> tuple[tuple[str, int], ...]:
    """The macros of both kernels."""
    return ("WAVES", waves), ("STRIPS_PER_WAVE", strips), ("DEPTH", depth)


def direct(rows: int, strips: int, waves: int, depth: int) -> Configuration:
    """A configuration of ``gemm_mma_direct.cl``."""
    return Configuration(
        file="gemm_mma_direct",
        rows=rows,
        columns=16 * strips,
        local_size=32 * waves,
        local_bytes=4 * waves * rows * (16 * strips + 4),
        macros=mma_macros(waves, strips, depth),
        groups_per_unit=ALL_GROUPS,
    )


def tiled(rows: int, strips: int, waves: int, depth: int, lane_bytes: int = LANE_BYTES) -> Configuration:
    """A configuration of ``gemm_mma_tiled.cl``; a lane has ``lane_bytes`` of weights in a block of a strip."""
    stage = 128 * rows + waves * 32 * lane_bytes * strips
    return Configuration(
        file="gemm_mma_tiled",
        rows=rows,
        columns=16 * strips * waves,
        local_size=32 * waves,
        local_bytes=depth * stage,
        macros=mma_macros(waves, strips, depth),
        groups_per_unit=ALL_GROUPS,
    )


def mma_missing(device: Capabilities) -> str | None:
    if device.compute_capability is None:
        return "an NVIDIA GPU"
    if device.compute_capability < (8, 0):
        major, minor = device.compute_capability
        return f"compute capability 8.0 (it has {major}.{minor})"
    return None


def local_limit(device: Capabilities) -> int:
    """Bytes of local memory that a work-group may use."""
    return MMA_LOCAL_BYTES.get(device.compute_capability or (0, 0), MMA_OTHER_LOCAL_BYTES)


def mma_inputs(device: Capabilities) -> Inputs:
    return Inputs(frozenset((FLOAT16,)), FLOAT16_ROWS, aligned=True)


def mma_block_size(average_rows: float) -> int:
    """Blocks of 8 are best up to 10 rows per expert: weights that are read twice are in the cache the second time."""
    return 8 if average_rows <= 10 else 32 if average_rows <= 28 else 48 if average_rows <= 40 else 64


def mma_configurations(problem: Problem) -> list[Configuration]:
    device = problem.device
    limit = local_limit(device)
    group_32 = ("GROUP_32", int(problem.group_rows == 32))
    lane_bytes = bytes_of_lane(problem)
    return [
        with_splits(problem, candidate, device.compute_units // 2)
        if candidate.file == "gemm_mma_direct"  # gemm_mma_tiled has no SPLIT
        else candidate
        for candidate in (
            replace(in_stages(candidate, lane_bytes), macros=(*candidate.macros, group_32))
            for candidate in (mma_few(problem) if problem.rows <= 8 else mma_many(problem))
        )
        if candidate.local_bytes <= limit
    ]


def bytes_of_lane(problem: Problem) -> int:
    """Bytes of weights that a lane has in a block of a strip: ``LANE_UINTS`` of mma_stage.cl, and the words."""
    layout = expert_layout(problem.k, problem.n, problem.group_rows, problem.codes, problem.scales)
    if layout.code_type.bits == 4 and layout.scales == "float16":
        return LANE_BYTES
    groups = max(1, 64 // problem.group_rows)
    of_rows = (1 + layout.record.has_minimum) * layout.record.has_blocks
    uints = groups * (-(-layout.record_bytes // 4) + layout.has_zeros) + of_rows
    return 4 * layout.code_type.bits + 4 * uints


def in_stages(configuration: Configuration, lane_bytes: int) -> Configuration:
    """A configuration of :func:`tiled` for other weights; one of :func:`direct` as it is."""
    if configuration.file != "gemm_mma_tiled" or lane_bytes == LANE_BYTES:
        return configuration
    sizes = dict(configuration.macros)
    return tiled(configuration.rows, sizes["STRIPS_PER_WAVE"], sizes["WAVES"], sizes["DEPTH"], lane_bytes)


def mma_few(problem: Problem) -> list[Configuration]:
    """Configurations for at most 8 rows per expert."""
    strips = problem.runs * -(-problem.n // 16) / problem.device.compute_units  # per compute unit
    many_tiles = [direct(8, 3, 4, 1), direct(8, 2, 4, 2), direct(8, 3, 3, 1), direct(8, 2, 3, 1), direct(8, 4, 2, 1)]
    if problem.k <= 1024 and strips <= 64:
        many_tiles.insert(0, many_tiles.pop(2))
    if problem.k <= 4096:
        few_tiles = [direct(8, 2, 8, 1), direct(8, 1, 6, 2), direct(8, 1, 6, 1), direct(8, 3, 8, 1)]
        if tiles_of(few_tiles[0], problem) < problem.device.compute_units // 2:
            few_tiles.insert(0, direct(8, 1, 8, 2))  # twice the tiles take less time than a launch that adds up splits
        return [*few_tiles, *many_tiles] if strips <= 12 else many_tiles
    long_rows = [direct(8, 4, 4, 1), direct(8, 2, 8, 2), direct(8, 4, 4, 2), direct(8, 2, 4, 1)]
    if strips <= 20:
        return [*long_rows[::-1], *many_tiles]
    return [*many_tiles, *long_rows] if strips <= 300 else [*long_rows, *many_tiles]


def mma_many(problem: Problem) -> list[Configuration]:
    """Configurations for more than 8 rows per expert."""
    small = [tiled(16, 4, 4, 4), tiled(16, 2, 4, 6), direct(16, 3, 4, 1), direct(16, 2, 4, 1)]
    middle = [tiled(32, 2, 8, 4), tiled(32, 2, 4, 4), tiled(32, 4, 4, 4)]
    large = [tiled(64, 4, 4, 3), tiled(48, 4, 4, 4), tiled(96, 2, 8, 3)]
    if problem.k <= 1024:
        middle[:2] = middle[1::-1]
    if problem.rows <= 48:
        large[:2] = large[1::-1]
    if problem.rows <= 16:
        found, narrow = [*small, *middle], [direct(16, 1, 8, 2), direct(16, 2, 8, 1)]
    elif problem.rows <= 32:
        found, narrow = [*middle, *large], [direct(32, 1, 8, 1)]
    else:
        found, narrow = [*large, *middle], [tiled(64, 2, 4, 4), tiled(32, 2, 4, 4)]
    if tiles_of(found[0], problem) < problem.device.compute_units:
        found[:0] = narrow
    if problem.scales != "float16" or problem.group_rows < 32:
        more = [tiled(64, 2, 4, 4)] if problem.rows > 32 else []
        found = sorted([*more, *found], key=has_many_totals)
    return found


def has_many_totals(configuration: Configuration) -> bool:
    """Whether totals take more than 64 registers of a work-item.

    Weights whose scales are applied in float32 need registers for a group's sums, too. With 64 rows and 4 strips, ptxas
    spills 0.9 to 3.4 KiB; with 2 strips 0.2 to 0.3 KiB.
    """
    return configuration.rows * dict(configuration.macros)["STRIPS_PER_WAVE"] > 128


def tiles_of(configuration: Configuration, problem: Problem) -> int:
    """Work-groups of a product without splits."""
    return problem.runs * -(-problem.rows // configuration.rows) * -(-problem.n // configuration.columns)


MMA = Tier(
    "mma",
    "gemm_mma_direct",
    mma_inputs,
    mma_missing,
    mma_configurations,
    mma_block_size,
    checked=(direct(8, 2, 4, 2), tiled(32, 2, 4, 3)),
)
