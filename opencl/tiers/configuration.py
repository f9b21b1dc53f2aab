"""Tiers of kernels, their configurations, and the problems for which a configuration is chosen.

A *tier* is a family of kernels with the same signature. A *configuration* is a way to build and launch one of them.
Each tier has one function that lists the configurations for a product of given sizes, best first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from marlin_cy.opencl.capabilities import Capabilities


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

FLOAT32, FLOAT16, BFLOAT16 = range(3)  # INPUT_TYPE of common.cl
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
        Columns of a tile. A work-group computes one tile at a time.
    local_size : int
        Work-items of a work-group.
    local_bytes : int
        Local memory of a work-group.
    file : str or None
        The ``.cl`` file of its ``gemm``, without the suffix; None for the tier's file.
    macros : tuple of (str, int)
        The tier's own macros of the program.
    splits : int
        Number of runs into which K is cut. A separate work-group sums each run; the sums are added afterwards.
    groups_per_unit : int
        The largest number of work-groups in the grid, per compute unit. Each computes several tiles, one after the
        other.
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
    """The sizes of a product, and the device, for which a configuration is chosen.

    Attributes
    ----------
    rows : int
        Rows of one expert in a run: the rows of a block that may be in use, or of an average dispatch.
    runs, most_runs : int
        The likely and the largest number of runs.
    k, n : int
        Packed K, and columns of an expert (or of a view).
    group_rows : int
        Rows of K in a packed group.
    device : Capabilities
    codes, scales : str
        The names of the weights' code type, and of the scale record that is stored.
    """

    rows: int
    runs: int
    most_runs: int
    k: int
    n: int
    group_rows: int
    device: Capabilities
    codes: str = "uint4"
    scales: str = "float16"


class Inputs(NamedTuple):
    """The rows that a tier's ``gemm`` reads.

    Attributes
    ----------
    direct_types : frozenset of int
        Element types (INPUT_TYPE of common.cl) of rows that are read without preparation.
    prepared_type : int
        The type to which all other rows, and rows in another order of K, are converted: PREPARED_TYPE of prepare.cl.
    aligned : bool
        Rows that do not begin at a multiple of 8 elements must also be prepared.
    """

    direct_types: frozenset[int]
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
        ``inputs(device)``: the :class:`Inputs` of ``gemm`` on a device.
    missing : callable
        ``missing(device)``: the capability that the device lacks for the tier, or None.
    configurations : callable
        ``configurations(problem)``: configurations for a :class:`Problem`, best first.
    block_size : callable
        ``block_size(average_rows)``: slots in a block of the routing arrays, from the average rows of an expert.
    options : callable
        ``options(device)``: options of the compiler.
    checked : tuple of Configuration or None
        The configurations that the check at first use runs; None for the configuration that products of that size use.
    """

    name: str
    file: str
    inputs: Callable[[Capabilities], Inputs]
    missing: Callable[[Capabilities], str | None]
    configurations: Callable[[Problem], Sequence[Configuration]]
    block_size: Callable[[float], int]
    options: Callable[[Capabilities], tuple[str, ...]] = lambda device: ()
    checked: tuple[Configuration | None, ...] = (None,)


def with_splits(problem: Problem, configuration: Configuration, tiles_wanted: int) -> Configuration:
    """A configuration with as many runs of K as the problem needs for ``tiles_wanted`` tiles."""
    splits = splits_for(problem, configuration, tiles_wanted)
    return configuration if splits == 1 else replace(configuration, splits=splits)


def splits_for(problem: Problem, configuration: Configuration, tiles_wanted: int) -> int:
    """Runs into which K is cut if there are fewer than ``tiles_wanted`` tiles: 1, 2, 4 or 8.

    Each run has at least 256 rows of K. The stored sums stay below 64 MiB.
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


def fitting(candidates: Iterable[Configuration], device: Capabilities) -> list[Configuration]:
    """The configurations that fit the device's work-groups and local memory."""
    return [
        configuration
        for configuration in candidates
        if configuration.local_size <= device.max_work_group_size and configuration.local_bytes <= device.local_memory
    ]


def by_rows(table: Iterable[Configuration], rows: int) -> list[Configuration]:
    """A table's configurations: first those that hold ``rows`` rows, the smallest first; then the others, the largest
    first."""
    return sorted(table, key=lambda configuration: (configuration.rows < rows, abs(configuration.rows - rows)))
