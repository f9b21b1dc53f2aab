"""How a kernel may be built and launched, and what that is chosen for.

A *tier* is a family of kernels with the same signature. A *configuration* is what a program of it is built with and
launched with. Which configurations suit a product of given sizes is one function a tier,
``configurations(problem)``, best first.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

__all__ = [
    "ALL_TYPES",
    "BFLOAT16",
    "FLOAT16",
    "FLOAT16_ROWS",
    "FLOAT32",
    "FLOAT32_ROWS",
    "PLANES",
    "Configuration",
    "Inputs",
    "Problem",
    "Tier",
    "by_rows",
    "fitting",
    "with_splits",
]

FLOAT32, FLOAT16, BFLOAT16 = range(3)  # type codes of common.cl
ALL_TYPES = frozenset((FLOAT32, FLOAT16, BFLOAT16))
FLOAT32_ROWS, FLOAT16_ROWS, PLANES = range(3)  # PREPARED_TYPE of prepare.cl


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


def by_rows(table, rows):
    """A table's configurations, those first that hold ``rows`` rows with the least to spare, or the largest."""
    return sorted(table, key=lambda configuration: (configuration.rows < rows, abs(configuration.rows - rows)))


def with_splits(problem, configuration, tiles_wanted):
    """A configuration with as many runs of K as the problem needs."""
    splits = splits_for(problem, configuration, tiles_wanted)
    return configuration if splits == 1 else replace(configuration, splits=splits)
