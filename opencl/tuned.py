"""The tuning results of a device: the configuration that was fastest for each product.

``marlin-cy tune`` measures (:mod:`~marlin_cy.opencl.tuning`) and keeps the results; :class:`Tuned` answers a backend
that plans a product. Results are in ``tuning-1.json`` in the cache folder
(:func:`~marlin_cy.opencl.cache.cache_folder`)::

    {"schema": 1,
     "places": {"DEVICE | DRIVER | LIBRARY VERSION | TIER":
                {"k=2048 n=1536 group=128 codes=uint4 symmetric=1 rows=8 runs=256":
                 {"rows": 8, "columns": 64, ..., "macros": {"WAVES": 4, ...}}}}}

The number in the file's name is the schema, so that versions of this library with different schemas do not read or
overwrite each other's results.

``k`` is the packed K, ``group`` the rows of a packed group. ``rows`` (rows that share an expert) and ``runs`` (the
expected number of experts with rows) are rounded up to powers of two: a result applies to neighbouring sizes too. For
a place or a product that is not listed, the tier's first configuration is used.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_cy import __version__
from marlin_cy.errors import MarlinError
from marlin_cy.opencl.cache import CACHE_VARIABLE, cache_folder, write_atomically
from marlin_cy.opencl.device import Capabilities
from marlin_cy.opencl.tiers.configuration import Configuration, Problem, Tier

if TYPE_CHECKING:
    from marlin_cy.opencl.tuning import Tuning

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["PARTIAL_BYTES", "SPLITS", "Tuned", "as_entry", "keep", "partial_bytes", "product_key", "tuning_file"]

SCHEMA_VERSION = 1
SPLITS = (1, 2, 4, 8)
PARTIAL_BYTES = 64 << 20  # the most bytes of partial sums


def tuning_file() -> Path | None:
    """The file of the results, or None where nothing is kept on disk."""
    folder = cache_folder()
    return None if folder is None else folder / f"tuning-{SCHEMA_VERSION}.json"


class Tuned:
    """The results for one device; the file is read at the first use.

    A damaged file is ignored with a warning, and so is an entry that is not a configuration that the device can run.
    Nothing in the file makes a product fail.

    Parameters
    ----------
    device : Capabilities
    """

    def __init__(self, device: Capabilities) -> None:
        self._device = device
        self._places: dict[str, Any] | None = None
        self._forced: Configuration | None = None

    def configurations(self, tier: Tier, problem: Problem, symmetric: bool, codes: str) -> list[Configuration]:
        """The configurations to use, best first: the result for the product, then the tier's own choices. The same
        configurations without splits of K follow, in case the device computes those incorrectly.

        Parameters
        ----------
        tier : Tier
        problem : Problem
        symmetric : bool
            Whether all zero points of the weights are 8, or there are none.
        codes : str
            Code type of the weights.
        """
        if self._forced is not None:
            return [self._forced]
        offered = tier.configurations(problem)
        if self._places is None:
            self._places = read_places(tuning_file())
        key = product_key(problem, symmetric, codes)
        entries = self._places.get(place_key(self._device, tier))
        entry = entries.get(key) if isinstance(entries, dict) else None
        if entry is None:
            return with_unsplit(offered)
        try:
            return with_unsplit([parsed(entry, problem, offered), *offered])
        except ValueError as error:
            warnings.warn(
                f"{tuning_file()}: {key}: {error}; the tier's own choice is used. 'marlin-cy tune' measures again",
                RuntimeWarning,
                stacklevel=5,  # the caller of the product
            )
            return with_unsplit(offered)

    def forced(self, configuration: Configuration | None) -> None:
        """Use one configuration for every product; None ends this. For the tuner's own backend."""
        self._forced = configuration


def with_unsplit(configurations: Sequence[Configuration]) -> list[Configuration]:
    """Configurations, followed by the same configurations without splits of K; duplicates are removed."""
    unsplit = [replace(one, splits=1) for one in configurations]
    return list(dict.fromkeys([*configurations, *unsplit]))


def place_key(device: Capabilities, tier: Tier) -> str:
    """The part of a result's key that does not depend on the product."""
    return " | ".join((device.name, device.driver_version, __version__, tier.name))


def product_key(problem: Problem, symmetric: bool, codes: str) -> str:
    """The key under which the result for a product is kept; products of similar sizes share a key."""
    rows, runs = (1 << (number - 1).bit_length() for number in (problem.rows, problem.runs))
    weights = f"k={problem.k} n={problem.n} group={problem.group_rows} codes={codes} symmetric={int(symmetric)}"
    if problem.scales != "float16":
        weights += f" scales={problem.scales}"
    return f"{weights} rows={rows} runs={runs}"


def as_entry(configuration: Configuration) -> dict[str, Any]:
    """A configuration in JSON types."""
    return asdict(configuration) | {"macros": dict(configuration.macros)}


def parsed(entry: Any, problem: Problem, offered: Sequence[Configuration]) -> Configuration:
    """The configuration of an entry; raises :class:`ValueError` with the reason if the device cannot run it.

    Parameters
    ----------
    entry : object
        From JSON.
    problem : Problem
    offered : list of Configuration
        The tier's own configurations for the problem, which determine the valid kernels and their macros.
    """
    names = {field.name for field in fields(Configuration)}
    if not isinstance(entry, dict) or entry.keys() != names or not isinstance(entry["macros"], dict):
        raise ValueError("not a configuration object")
    numbers = [entry[name] for name in names - {"macros", "file"}] + list(entry["macros"].values())
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("expected non-negative integers")
    found = Configuration(**entry | {"macros": tuple(entry["macros"].items())})
    if min(found.rows, found.columns, found.local_size, found.groups_per_unit) < 1 or found.splits not in SPLITS:
        raise ValueError("tile size not supported by any kernel")
    same_kernel = [
        one for one in offered if one.file == found.file and dict(one.macros).keys() == dict(found.macros).keys()
    ]
    if not same_kernel:
        raise ValueError("kernel not used by the tier for this product")
    largest_local = max(problem.device.local_memory, *(one.local_bytes for one in offered))
    if found.local_size > problem.device.max_work_group_size or found.local_bytes > largest_local:
        raise ValueError("work-groups too large for the device")
    # K is not split where the kernel may not support that, or where this product, larger than the measured one, would
    # have too many partial sums.
    if found.splits > 1 and (
        all(one.splits == 1 for one in same_kernel) or partial_bytes(problem, found) > PARTIAL_BYTES
    ):
        return replace(found, splits=1)
    return found


def partial_bytes(problem: Problem, configuration: Configuration) -> int:
    """Bytes of the partial sums of a product whose K is split."""
    rows = problem.most_runs * -(-problem.rows // configuration.rows) * configuration.rows
    return 4 * configuration.splits * rows * problem.n


def read_places(path: Path | None) -> dict[str, Any]:
    """The ``places`` of a file; empty if there is no file, and, with a warning, if the file is damaged."""
    if path is None:
        return {}
    try:
        document = json.loads(path.read_bytes())
        if document["schema"] != SCHEMA_VERSION or not isinstance(document["places"], dict):
            raise ValueError(f"expected schema {SCHEMA_VERSION}")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        warnings.warn(
            f"{path} is ignored, as it is damaged ({type(error).__name__}: {error}); 'marlin-cy tune' writes another",
            RuntimeWarning,
            stacklevel=6,
        )
        return {}
    places: dict[str, Any] = document["places"]
    return places


def keep(device: Capabilities, tier: Tier, results: Sequence[Tuning]) -> Path:
    """Add results to the file, in place of those for the same products.

    Other processes may do the same at the same time: the file is read and written under a lock (if the system has
    ``fcntl``), and readers always see a complete file. A product whose best configuration is the tier's first choice is
    not listed, because the tier may have another first choice for a neighbouring size.

    Parameters
    ----------
    device : Capabilities
    tier : Tier
    results : list of Tuning

    Returns
    -------
    Path

    Raises
    ------
    MarlinError
        The file cannot be written; the message says what to do.
    """
    path = tuning_file()
    if path is None:
        raise MarlinError(
            f"results cannot be kept: {CACHE_VARIABLE} is empty; set it to a folder, or unset it for the default folder"
        )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            places = read_places(path)
            place = places.setdefault(place_key(device, tier), {})
            if not isinstance(place, dict):
                place = places[place_key(device, tier)] = {}
            for result in results:
                if result.best == result.default:
                    place.pop(result.key, None)
                else:
                    place[result.key] = as_entry(result.best)
            document = {"schema": SCHEMA_VERSION, "places": places}
            write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
    except OSError as error:
        raise MarlinError(
            f"results cannot be kept: {path} cannot be written ({error}); set {CACHE_VARIABLE} to a writeable folder"
        ) from error
    return path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file against other processes and threads; does nothing where the system has no ``fcntl``.

    The file stays: if it were removed, one process could lock the removed file and another its successor.
    """
    if fcntl is None:
        yield
        return
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # closing the file releases the lock
        yield
