"""The kinds of kernels, from the most special to the most general, and how a product is cut up for each.

A *tier* is a family of kernels with one source file and the same signature. A *configuration* is what
a program of it is built with and launched with. Which configurations suit a product of given sizes is
one function a tier, ``configurations(problem)``, best first.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

__all__ = ["TIERS", "Configuration", "Problem", "Tier", "explain", "tier_named"]

FLOAT32, FLOAT16, BFLOAT16 = range(3)  # type codes of common.cl
ALL_TYPES = frozenset((FLOAT32, FLOAT16, BFLOAT16))
FLOAT32_ROWS, FLOAT16_ROWS, PLANES = range(3)  # PREPARED_TYPE of prepare.cl


SHARED_COUNTERS = 16384  # as in gemm_mma_streamed.cl; no more work-groups can share tiles


@dataclass(frozen=True)
class Configuration:
    """How a kernel is built and launched.

    Attributes
    ----------
    rows : int
        Rows of a tile (``ROWS``).
    columns : int
        Columns of a tile: what a work-group computes in one turn.
    local_size : int
        Work-items of a work-group.
    local_bytes : int
        Local memory of a work-group.
    file : str or None
        The ``.cl`` file of its ``gemm``, without the suffix, where it is not the tier's.
    quantum : int
        Rows of K that are the least a work-group takes of a tile, where work-groups share tiles; else 0.
    macros : tuple of (str, int)
        What else the program is built with: the tier's own.
    splits : int
        Runs that K is cut into, each summed by a work-group of its own and added up afterwards.
    groups_per_unit : int
        The most work-groups in the grid, per compute unit; each takes tiles in turn.
    """

    rows: int
    columns: int
    local_size: int
    local_bytes: int
    macros: tuple[tuple[str, int], ...]
    splits: int = 1
    groups_per_unit: int = 8
    file: str | None = None
    quantum: int = 0

    def shared_bytes(self, work_groups):
        """Device memory for sums of tiles that work-groups share: counters, and two tiles of each."""
        tile = -(-self.rows * self.columns // self.local_size) * self.local_size
        return 4 * (SHARED_COUNTERS + 2 * work_groups * tile)


class Problem(NamedTuple):
    """What a configuration is chosen for.

    Attributes
    ----------
    rows : int
        Rows of one expert that come together: those of a block that may be in use, or of an average dispatch.
    runs, most_runs : int
        How many such runs there are likely to be, and at most.
    k, n : int
        Packed K, and columns of an expert (or of a view).
    group_rows : int
        Rows of K in a packed group.
    device : Capabilities
    """

    rows: int
    runs: int
    most_runs: int
    k: int
    n: int
    group_rows: int
    device: object


class Inputs(NamedTuple):
    """What a tier's ``gemm`` reads.

    Attributes
    ----------
    direct_types : frozenset of int
        Element types (of common.cl) of rows that are read as they are.
    prepared_type : int
        What all other rows, and those in another order of K, are made first: ``PREPARED_TYPE`` of prepare.cl.
    aligned : bool
        Rows that do not begin at a multiple of 8 elements must be prepared, too.
    """

    direct_types: frozenset
    prepared_type: int
    aligned: bool = False


@dataclass(frozen=True)
class Tier:
    """A family of kernels.

    Attributes
    ----------
    name : str
    file : str
        The ``.cl`` file of its ``gemm``, without the suffix.
    inputs : callable
        :class:`Inputs`, from the device's capabilities.
    missing : callable
        What a device lacks for it, from the device's capabilities; None for nothing.
    configurations : callable
        Configurations for a :class:`Problem`, best first.
    block_size : callable
        Slots of a block of the routing arrays, from the average rows of an expert.
    options : callable
        The compiler's, a tuple of str, from the device's capabilities.
    checked : tuple of Configuration or None
        What the check at first use runs; None for what products of its size use.
    """

    name: str
    file: str
    inputs: Callable
    missing: Callable
    configurations: Callable
    block_size: Callable
    options: Callable = lambda device: ()
    checked: tuple = (None,)


def splits_for(problem, configuration, tiles_wanted):
    """Runs to cut K into where tiles are fewer than ``tiles_wanted``: 1, 2, 4 or 8.

    Each run has 256 rows of K at least. The sums that wait for each other stay below 64 MiB.
    """
    parts = -(-problem.rows // configuration.rows)
    column_tiles = -(-problem.n // configuration.columns)
    tiles, most_tiles = (runs * parts * column_tiles for runs in (problem.runs, problem.most_runs))
    splits = 1
    while (
        splits < 8
        and tiles * splits < tiles_wanted
        and problem.k >= 512 * splits
        and 8 * splits * most_tiles * configuration.rows * configuration.columns <= 64 << 20
    ):
        splits *= 2
    return splits


def fitting(candidates, device):
    """Those of some configurations that a device's work-groups are large enough for."""
    return [
        configuration
        for configuration in candidates
        if configuration.local_size <= device.max_work_group_size and configuration.local_bytes <= device.local_memory
    ]


# Portable and sub-groups ------------------------------------------------------------------------
#
# Both have the same work-groups; the heads of gemm_portable.cl and gemm_subgroup.cl say what the macros are.


def waved(rows, *, k_waves=1, column_waves=1, row_waves=1, wave_strips=1, staged=0, row_step=1, macros=()):
    """A configuration of either."""
    waves = k_waves * column_waves * row_waves
    reduce_rows = max(1, min(rows // row_waves, 64 // (waves * wave_strips)))
    return Configuration(
        rows=rows,
        columns=16 * wave_strips * column_waves,
        local_size=32 * waves,
        local_bytes=max(staged * 256 * rows * k_waves, 16 * waves * (16 * wave_strips * reduce_rows + 8)) + 8 * rows,
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
    return waved(rows, staged=1, macros=(("STAGED", 1),), **sizes)


class WavedTable(NamedTuple):
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
    waved(1, k_waves=8, wave_strips=2),
    waved(4, k_waves=4, wave_strips=2),
    waved(8, k_waves=2, wave_strips=2, row_step=2),
)
FEW_SHORT_ROWS = (
    waved(1, k_waves=4, wave_strips=2),
    waved(4, k_waves=2, wave_strips=2),
    waved(8, k_waves=2, wave_strips=2, row_step=2),
)
SMALL = (waved(8, k_waves=2), waved(8))
PORTABLE = WavedTable(
    cpu=(waved(8, macros=(("UNROLL", 0),)),),
    few=FEW_ROWS,
    few_short=FEW_SHORT_ROWS,
    many=(
        waved(16, k_waves=2, wave_strips=2, row_step=2),
        staged(32, column_waves=4, row_waves=2, wave_strips=2),
        staged(64, column_waves=2, row_waves=4, wave_strips=2),
    ),
    small=SMALL,
)
SUBGROUP = WavedTable(
    cpu=(waved(8, macros=(("UNROLL", 0),)),),
    few=FEW_ROWS,
    few_short=FEW_SHORT_ROWS,
    many=(
        waved(16, k_waves=2, wave_strips=2, row_step=2),
        waved(32, column_waves=4, row_waves=2, wave_strips=2),
        waved(64, column_waves=2, row_waves=4, wave_strips=2),
    ),
    small=SMALL,
)


def waved_block_size(average_rows):
    """So that most blocks have few rows to spare: work-items multiply those that lie between others."""
    return next((size for limit, size in ((0.5, 1), (2, 4), (24, 8)) if average_rows <= limit), 32)


def portable_inputs(device):
    return Inputs(ALL_TYPES, FLOAT32_ROWS)


def subgroup_missing(device):
    wanted = {"cl_khr_fp16": device.fp16, "sub-groups": device.sub_groups}
    lacking = ", ".join(name for name, present in wanted.items() if not present)
    return lacking or SUBGROUP.missing(device)


def subgroup_inputs(device):
    if device.integer_dot_product:
        return Inputs(frozenset(), PLANES)
    return Inputs(ALL_TYPES, FLOAT32_ROWS)


def subgroup_configurations(problem):
    dot = ("DOT", int(problem.device.integer_dot_product))
    return [replace(candidate, macros=(*candidate.macros, dot)) for candidate in SUBGROUP(problem)]


def subgroup_options(device):
    return ("-cl-std=CL3.0",) if device.c_version >= (3, 0) else ()


# NVIDIA tensor cores ----------------------------------------------------------------------------
#
# What the three kernels are for, and what their sizes mean, is said in mma.cl and their heads. Which sizes are
# used where was measured on an H200; bench/bench_gemm.py --backend opencl --show repeats it.

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
        return [all_at_once, direct(6, 8, 2), direct(4, 8, 2), direct(1, 8, 4), *streams]
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


def by_rows(table, rows):
    """A table's configurations, those first that hold ``rows`` rows with the least to spare, or the largest."""
    return sorted(table, key=lambda configuration: (configuration.rows < rows, abs(configuration.rows - rows)))


def with_splits(problem, configuration, tiles_wanted):
    """A configuration with as many runs of K as the problem needs."""
    splits = splits_for(problem, configuration, tiles_wanted)
    return configuration if splits == 1 else replace(configuration, splits=splits)


TIERS = (
    Tier(
        "mma",
        "gemm_mma_streamed",
        mma_inputs,
        mma_missing,
        mma_configurations,
        mma_block_size,
        checked=(direct(1, 4, 2), streamed(8, 2, 2, 2, 2), tiled(32, 2, 4, 3)),
    ),
    Tier(
        "subgroup",
        "gemm_subgroup",
        subgroup_inputs,
        subgroup_missing,
        subgroup_configurations,
        waved_block_size,
        subgroup_options,
    ),
    Tier("portable", "gemm_portable", portable_inputs, PORTABLE.missing, PORTABLE, waved_block_size),
)


def tier_named(name):
    """The tier called ``name``."""
    for tier in TIERS:
        if tier.name == name:
            return tier
    raise ValueError(f"tier: got {name!r}, expected one of {', '.join(tier.name for tier in TIERS)}")


def explain(capabilities):
    """Which tiers a device can run.

    Returns
    -------
    list of (str, str or None)
        Best first: the name of each tier, and None or what the device lacks for it.
    """
    return [(tier.name, tier.missing(capabilities)) for tier in TIERS]
