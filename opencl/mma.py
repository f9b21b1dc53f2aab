"""The tier "mma": NVIDIA's tensor cores.

What its three kernels are for, and what their sizes mean, is said in ``mma.cl`` and their heads. Which sizes are used
where was measured on an H200; ``bench/bench_gemm.py --backend opencl --show`` repeats it.
"""

from dataclasses import replace

from marlin_cy.opencl.configuration import FLOAT16, FLOAT16_ROWS, Configuration, Inputs, Tier, with_splits

__all__ = ["MMA", "direct", "streamed", "tiled"]

KIB = 1 << 10
MMA_LOCAL_BYTES = {(8, 0): 163 * KIB, (8, 7): 163 * KIB, (8, 6): 99 * KIB, (8, 9): 99 * KIB, (9, 0): 227 * KIB}
MMA_OTHER_LOCAL_BYTES = 99 * KIB  # of a work-group, by compute capability; the driver's own answer is 48 KiB
ALL_GROUPS = 1 << 16  # per compute unit: a work-group for each tile


def mma_macros(waves, strips, depth):
    return ("WAVES", waves), ("STRIPS_PER_WAVE", strips), ("DEPTH", depth)


def sums_bytes(rows, strips, waves):
    """Local memory for the sums of waves that split K."""
    return 4 * waves * rows * (16 * strips + 4)


def direct(strips, waves, depth):
    """A configuration of ``gemm_mma_direct.cl``."""
    return Configuration(
        file="gemm_mma_direct",
        rows=8,
        columns=16 * strips,
        local_size=32 * waves,
        local_bytes=sums_bytes(8, strips, waves),
        macros=mma_macros(waves, strips, depth),
        groups_per_unit=ALL_GROUPS,
    )


def streamed(rows, strips, waves, depth, groups_per_unit):
    """A configuration of ``gemm_mma_streamed.cl``."""
    stage = 32 * (16 * (strips + rows // 4) + 16 * strips)
    return Configuration(
        file="gemm_mma_streamed",
        rows=rows,
        columns=16 * strips,
        local_size=32 * waves,
        local_bytes=waves * depth * stage + sums_bytes(rows, strips, waves),
        macros=mma_macros(waves, strips, depth),
        groups_per_unit=groups_per_unit,
        quantum=64 * waves,
    )


def tiled(rows, strips, waves, depth):
    """A configuration of ``gemm_mma_tiled.cl``."""
    stage = 128 * rows + waves * 32 * 32 * strips
    return Configuration(
        file="gemm_mma_tiled",
        rows=rows,
        columns=16 * strips * waves,
        local_size=32 * waves,
        local_bytes=depth * stage,
        macros=mma_macros(waves, strips, depth),
        groups_per_unit=ALL_GROUPS,
    )


def mma_missing(device):
    if device.compute_capability is None:
        return "an NVIDIA GPU"
    if device.compute_capability < (8, 0):
        major, minor = device.compute_capability
        return f"compute capability 8.0 (it has {major}.{minor})"
    return None


def mma_inputs(device):
    return Inputs(frozenset((FLOAT16,)), FLOAT16_ROWS, aligned=True)


def mma_block_size(average_rows):
    """Up to 5 rows an expert are mostly 8 at most; tiles of 32 and 64 leave out what they don't need."""
    return 8 if average_rows <= 5 else 32 if average_rows <= 20 else 64


def mma_configurations(problem):
    device = problem.device
    limit = MMA_LOCAL_BYTES.get(device.compute_capability, MMA_OTHER_LOCAL_BYTES)
    group_32 = ("GROUP_32", int(problem.group_rows == 32))
    return [
        with_splits(problem, replace(candidate, macros=(*candidate.macros, group_32)), device.compute_units // 2)
        if candidate.file == "gemm_mma_direct"  # streamed shares tiles, tiled has many
        else replace(candidate, macros=(*candidate.macros, group_32))
        for candidate in (mma_few(problem) if problem.rows <= 8 else mma_many(problem))
        if candidate.local_bytes <= limit
    ]


def mma_few(problem):
    """For rows of which 8 or fewer share an expert: by how much there is to read."""
    blocks = -(-problem.k // 64)
    strips = problem.runs * -(-problem.n // 16) / problem.device.compute_units  # for each compute unit
    waves = 8 if blocks >= 16 else 6 if blocks > 8 else 4
    # Two work-groups for each compute unit: a launch of more takes longer to begin.
    all_at_once = direct(min(max(round(strips / 2), 1), 6), waves, 2)
    if blocks <= 16:  # 1024 rows of K
        by_size = (streamed(8, 4, 2, 2, 8), streamed(8, 8, 3, 2, 4), streamed(8, 4, 4, 2, 4), streamed(8, 4, 2, 3, 8))
        few_tiles = strips < 140
    else:
        by_size = (streamed(8, 8, 4, 2, 3), streamed(8, 8, 4, 3, 2), streamed(8, 4, 4, 3, 4), streamed(8, 4, 8, 3, 2))
        few_tiles = strips < 64 and blocks <= 64
    first, second, *others = by_size
    streams = [first, second, *others] if few_tiles else [second, first, *others]
    if strips <= 12:
        return [all_at_once, direct(3, 16, 2), direct(6, 8, 2), direct(8, 12, 1), direct(2, 8, 4), *streams]
    return [*streams, all_at_once]


def mma_many(problem):
    """For more rows an expert."""
    small = [tiled(16, 4, 4, 4), streamed(16, 4, 4, 2, 3), streamed(16, 4, 2, 3, 4)]
    middle = [tiled(32, 2, 8, 4), tiled(32, 2, 4, 4), tiled(32, 4, 4, 4)]
    large = [tiled(64, 4, 4, 3), tiled(48, 4, 4, 4), tiled(96, 2, 8, 3)]
    if problem.k <= 1024:
        middle[:2] = middle[1::-1]
    if problem.rows <= 16:
        return [*small, *middle]
    return [*middle, *large] if problem.rows <= 32 else [*large, *middle]


MMA = Tier(
    "mma",
    "gemm_mma_streamed",
    mma_inputs,
    mma_missing,
    mma_configurations,
    mma_block_size,
    checked=(direct(1, 4, 2), streamed(8, 2, 2, 2, 2), tiled(32, 2, 4, 3)),
)
