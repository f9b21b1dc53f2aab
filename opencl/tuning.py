"""Which configuration of a tier is fastest for a product on this very device: measured once, and kept.

``marlin-cy tune`` measures; :class:`Tuned` is what a backend asks when it plans a product. Results lie in
``tuning.json`` in the folder of compiled programs (:func:`~marlin_cy.opencl.program.cache_folder`)::

    {"schema": 1,
     "places": {"DEVICE | DRIVER | LIBRARY VERSION | TIER":
                {"k=2048 n=1536 group=128 codes=uint4 symmetric=1 rows=8 runs=256":
                 {"rows": 8, "columns": 64, ..., "macros": {"WAVES": 4, ...}}}}}

``k`` is the packed K, ``group`` the rows of a packed group; ``rows`` (of an expert that come together) and
``runs`` (how many experts' rows are likely to come) are rounded up to powers of two: what was measured for
one number serves its neighbours. A place or product that is not listed gets the tier's first configuration.
"""

import json
import os
import statistics
import tempfile
import warnings
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import pyopencl as cl

from marlin_cy import __version__
from marlin_cy.errors import BuildError, MarlinError
from marlin_cy.moe.align import moe_align_block_size
from marlin_cy.opencl.buffers import Vector
from marlin_cy.opencl.gemm.multiply import problem_of
from marlin_cy.opencl.gemm.work import RoutedBlocks
from marlin_cy.opencl.program import CACHE_VARIABLE, cache_folder
from marlin_cy.opencl.tiers.configuration import Configuration
from marlin_cy.opencl.timing import times_of
from marlin_cy.weights.int4 import Int4Weight

__all__ = ["Shape", "Tuned", "Tuning", "candidates", "tune", "tuning_file"]

SCHEMA_VERSION = 1
SPLITS = (1, 2, 4, 8)
LEAST_SPLIT_ROWS = 128  # of K
PARTIAL_BYTES = 64 << 20  # of sums that wait for each other
TOLERANCE = 2e-3  # of the norm, to the default configuration's result
LAUNCHES, LEAST_LAUNCHES = 15, 5
SECONDS_A_CANDIDATE = 0.1  # of launches: slow ones are launched less often, but so often
WARM_SECONDS = 0.02
DISTINCT_WEIGHTS = 4
UNWRITTEN = np.uint16(0x7E5A)  # a NaN of float16 that no kernel makes
COMPARED_ROWS = 512
GAIN = 0.98  # what a candidate's time must be of the default's at most, to be more than chance


def tuning_file():
    """Where results are kept: a path, or None where nothing is to be kept."""
    folder = cache_folder()
    return None if folder is None else folder / "tuning.json"


# What a backend asks ----------------------------------------------------------------------------


class Tuned:
    """The results for one device, read when first asked for.

    A file that is damaged, and entries that are not those of a configuration that the device could run,
    are left out with a warning; nothing in the file makes a product fail.

    Parameters
    ----------
    device : Capabilities
    """

    def __init__(self, device):
        self._device = device
        self._places = None
        self._forced = None

    def configuration(self, tier, problem, symmetric, codes):
        """The :class:`Configuration` to use.

        Parameters
        ----------
        tier : Tier
        problem : Problem
        symmetric : bool
        codes : str
            Of the weights.
        """
        if self._forced is not None:
            return self._forced
        offered = tier.configurations(problem)
        if self._places is None:
            self._places = read_places(tuning_file())
        key = product_key(problem, symmetric, codes)
        entries = self._places.get(place_key(self._device, tier))
        entry = entries.get(key) if isinstance(entries, dict) else None
        if entry is None:
            return offered[0]
        try:
            return parsed(entry, problem, offered)
        except ValueError as error:
            warnings.warn(
                f"{tuning_file()}: {key}: {error}; the tier's own choice is used. 'marlin-cy tune' measures again",
                RuntimeWarning,
                stacklevel=5,  # who called the product
            )
            return offered[0]

    def forced(self, configuration):
        """From here on, the answer for every product; None ends it. For the tuner, on a backend of its own."""
        self._forced = configuration


def place_key(device, tier):
    """What results depend on beside the product."""
    return " | ".join((device.name, device.driver_version, __version__, tier.name))


def product_key(problem, symmetric, codes):
    """The product, as far as results are told apart."""
    rows, runs = (1 << (number - 1).bit_length() for number in (problem.rows, problem.runs))
    weights = f"k={problem.k} n={problem.n} group={problem.group_rows} codes={codes} symmetric={int(symmetric)}"
    return f"{weights} rows={rows} runs={runs}"


def as_entry(configuration):
    """A configuration, of JSON's own types."""
    return asdict(configuration) | {"macros": dict(configuration.macros)}


def parsed(entry, problem, offered):
    """The configuration of an entry; a :class:`ValueError` says why it is none that can run.

    Parameters
    ----------
    entry : object
        From JSON.
    problem : Problem
    offered : list of Configuration
        The tier's own for the problem. These name the kernels there are, and what each takes.
    """
    names = {field.name for field in fields(Configuration)}
    if not isinstance(entry, dict) or entry.keys() != names or not isinstance(entry["macros"], dict):
        raise ValueError("no configuration")
    numbers = [entry[name] for name in names - {"macros", "file"}] + list(entry["macros"].values())
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("numbers that are none")
    found = Configuration(**entry | {"macros": tuple(entry["macros"].items())})
    if min(found.rows, found.columns, found.local_size, found.groups_per_unit) < 1 or found.splits not in SPLITS:
        raise ValueError("sizes that no kernel has")
    alike = [one for one in offered if one.file == found.file and dict(one.macros).keys() == dict(found.macros).keys()]
    if not alike:
        raise ValueError("kernels that the tier does not use here")
    largest_local = max(problem.device.local_memory, *(one.local_bytes for one in offered))
    if found.local_size > problem.device.max_work_group_size or found.local_bytes > largest_local:
        raise ValueError("work-groups that are too large for the device")
    # A kernel that knows no splits, or a neighbour of what was measured that has too many sums for them.
    if found.splits > 1 and (all(one.splits == 1 for one in alike) or partial_bytes(problem, found) > PARTIAL_BYTES):
        return replace(found, splits=1)
    return found


def partial_bytes(problem, configuration):
    """Bytes of the sums of runs of K."""
    rows = problem.most_runs * -(-problem.rows // configuration.rows) * configuration.rows
    return 4 * configuration.splits * rows * problem.n


def read_places(path):
    """The ``places`` of a file: empty where there is none, and, with a warning, where it is damaged."""
    if path is None:
        return {}
    try:
        document = json.loads(path.read_bytes())
        if document["schema"] != SCHEMA_VERSION or not isinstance(document["places"], dict):
            raise ValueError("another schema")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        warnings.warn(
            f"{path} is left out, as it is damaged ({type(error).__name__}: {error}); 'marlin-cy tune' writes another",
            RuntimeWarning,
            stacklevel=6,
        )
        return {}
    return document["places"]


def keep(device, tier, results):
    """Add results to the file, in place of those for the same products; others see it complete, or as it was.

    Where the tier's own choice is the best nothing is kept: for a neighbour it may choose otherwise.

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
        It cannot be written; the message says what to do.
    """
    path = tuning_file()
    if path is None:
        raise MarlinError(
            f"results cannot be kept: {CACHE_VARIABLE} is empty; set it to a folder, or unset it for the user's own"
        )
    places = read_places(path)
    place = places.setdefault(place_key(device, tier), {})
    if not isinstance(place, dict):
        place = places[place_key(device, tier)] = {}
    for result in results:
        if result.best == result.default:
            place.pop(result.key, None)
        else:
            place[result.key] = as_entry(result.best)
    text = json.dumps({"schema": SCHEMA_VERSION, "places": places}, indent=1) + "\n"
    temporary = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            os.unlink(temporary)
        raise MarlinError(
            f"results cannot be kept: {path} cannot be written ({error}); set {CACHE_VARIABLE} to a folder that can"
        ) from error
    return path


# What measures ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A stack of random weights to measure on.

    Attributes
    ----------
    k, n, experts, group_size : int
    top_k : int
        Experts of a token.
    gathered : bool
        The input has a row for each pair of token and expert, as a layer's second product has.
    symmetric : bool
        All zero points are 8. Those of 4-bit floats always are: there are none.
    codes : {"uint4", "e2m1"}
    """

    k: int
    n: int
    experts: int
    group_size: int
    top_k: int = 8
    gathered: bool = False
    symmetric: bool = True
    codes: str = "uint4"


class Tuning(NamedTuple):
    """The result for one number of tokens.

    Attributes
    ----------
    shape : Shape
    tokens : int
    rows : int
        Of an expert that come together.
    key : str
        :func:`product_key`'s.
    default_seconds, best_seconds : float
        Median of the launches' event times.
    default, best : Configuration
        The same where nothing is faster by more than chance.
    tried : int
        Candidates beside the default.
    refused : list of (Configuration, str)
        Those that fail or are wrong, and why.
    """

    shape: Shape
    tokens: int
    rows: int
    key: str
    default_seconds: float
    best_seconds: float
    default: Configuration
    best: Configuration
    tried: int
    refused: list


def candidates(tier, problem):
    """The tier's configurations for a problem, best first, and their like with more or fewer splits of K."""
    offered = tier.configurations(problem)
    found = list(offered)
    for configuration in offered:
        # Those with one run of K may be of a kernel that knows no other.
        if configuration.splits > 1:
            most = problem.k // LEAST_SPLIT_ROWS
            found += [replace(configuration, splits=splits) for splits in SPLITS if splits <= most]
    return [one for one in dict.fromkeys(found) if one is offered[0] or partial_bytes(problem, one) <= PARTIAL_BYTES]


def tune(backend, shape, all_tokens, progress=None):
    """Time a tier's candidates on random weights and float16 rows with random routing.

    Parameters
    ----------
    backend : OpenClBackend
        Nobody else may use it meanwhile.
    shape : Shape
    all_tokens : sequence of int
    progress : callable, optional
        Called as ``progress(done, total, description)``.

    Returns
    -------
    list of Tuning
        One for each number of tokens; numbers that come to the same product are measured once.
    """
    rng = np.random.default_rng(0)
    stack = random_stack(backend, shape, rng)
    results = {}
    for number, tokens in enumerate(all_tokens):
        case = Case(backend, stack, shape, tokens, rng)
        if case.key in results:
            continue
        results[case.key] = tune_case(case)
        if progress is not None:
            progress(number + 1, len(all_tokens), f"{shape.k}, {shape.n}, {tokens} tokens")
    stack.store.release()
    return list(results.values())


def random_stack(backend, shape, rng):
    """A stack of a few random weights in turn."""
    groups = (-(-shape.k // shape.group_size), shape.n)
    weights = [
        Int4Weight(
            words=rng.integers(0, 1 << 32, (shape.k // 8, shape.n), dtype=np.uint32),
            scale=rng.uniform(0.005, 0.015, groups).astype(np.float16),
            zero=random_zeros(rng, shape, groups),
            group_size=shape.group_size,
            codes=shape.codes,
        )
        for _ in range(min(DISTINCT_WEIGHTS, shape.experts))
    ]
    builder = backend.new_stack_builder(shape.experts, shape.k, shape.n, group_size=shape.group_size, codes=shape.codes)
    for expert in range(shape.experts):
        builder.add(expert, 0, weights[expert % len(weights)])
    return builder.finish()


def random_zeros(rng, shape, groups):
    """Zero points of a shape's weights, or None."""
    if shape.codes != "uint4":
        return None
    return np.full(groups, 8, np.uint8) if shape.symmetric else rng.integers(1, 17, groups, dtype=np.uint8)


class Case:
    """Products of one stack with so many tokens.

    Attributes
    ----------
    key : str
    problem : Problem
    """

    def __init__(self, backend, stack, shape, tokens, rng):
        self.backend, self.shape, self.tokens = backend, shape, tokens
        pairs = tokens * shape.top_k
        reads = 1 if shape.gathered else shape.top_k
        block_size = backend.tier.block_size(pairs / shape.experts)
        x = backend.from_host(rng.standard_normal((pairs // reads, shape.k), np.float32).astype(np.float16))
        self._out = backend.empty((pairs, shape.n), np.float16)
        self._calls = []
        for _ in range(LAUNCHES):
            drawn = rng.random((tokens, shape.experts), np.float32)
            ids = np.argpartition(drawn, shape.top_k - 1, axis=1)[:, : shape.top_k]
            sorted_ids, expert_ids, past = moe_align_block_size(ids, block_size, shape.experts)
            sorted_ids, expert_ids = sorted_ids[: pairs * block_size], expert_ids[:pairs]
            routing = [backend.from_host(array) for array in (sorted_ids, expert_ids, past)]

            def call(ctx, routing=routing):
                stack.gemm_phase_vllm(ctx, x, *routing, self._out, pairs // reads, block_size, reads)

            self._calls.append(call)
        none = Vector(None, 0, 0)
        limit = min(len(sorted_ids) // block_size, len(expert_ids)) * block_size
        work = RoutedBlocks(none, none, None, limit, pairs, block_size, reads)
        self.problem = problem_of(stack.store, work, backend.runtime.capabilities)
        self.key = product_key(self.problem, stack.store.symmetric, stack.store.codes)

    def run(self, configuration):
        """Median seconds of the launches, and float32 rows of the first routing, NaN if any row was not written."""
        tuned = self.backend.runtime.tuned
        tuned.forced(configuration)
        try:
            # Plans are a context's own.
            ctx = self.backend.new_context(profiling=True)
            cl.enqueue_fill(ctx.queue, self._out.base_data, UNWRITTEN.tobytes(), self._out.nbytes)
            self._calls[0](ctx)
            output = self.backend.to_host(self._out)
            missing = (output.view(np.uint16) == UNWRITTEN).any()
            step = max(1, len(output) // COMPARED_ROWS)
            output = output[::step].astype(np.float32) + (np.nan if missing else 0)
            seconds = spent = statistics.median(self._seconds(ctx, self._calls[:1]))
            while spent < WARM_SECONDS:
                spent += sum(self._seconds(ctx, self._calls)) + 1e-6
            count = max(LEAST_LAUNCHES, min(LAUNCHES, int(SECONDS_A_CANDIDATE / max(seconds, 1e-9))))
            return statistics.median(self._seconds(ctx, self._calls[:count])), output
        finally:
            tuned.forced(None)

    @staticmethod
    def _seconds(ctx, calls):
        collected = []
        for call in calls:
            with ctx.profile() as events:
                call(ctx)
            collected.append(events)
        ctx.finish()
        return [times_of(events).kernels for events in collected]


def tune_case(case):
    """The :class:`Tuning` of a :class:`Case`."""
    default, *others = candidates(case.backend.tier, case.problem)
    default_seconds, expected = case.run(default)
    norm = np.linalg.norm(expected)
    best, best_seconds, refused = default, default_seconds, []
    for configuration in others:
        try:
            seconds, actual = case.run(configuration)
        except (BuildError, cl.Error, MarlinError) as error:
            refused.append((configuration, f"does not run: {error}"))
            continue
        error = np.linalg.norm(actual - expected) / norm
        if not error <= TOLERANCE:  # a NaN is wrong, too
            refused.append((configuration, f"its result is wrong: relative difference {error:.2g}"))
        elif seconds < min(best_seconds, GAIN * default_seconds):
            best, best_seconds = configuration, seconds
    return Tuning(
        shape=case.shape,
        tokens=case.tokens,
        rows=case.problem.rows,
        key=case.key,
        default_seconds=default_seconds,
        best_seconds=best_seconds,
        default=default,
        best=best,
        tried=len(others),
        refused=refused,
    )
