"""The search for the fastest configuration of a product on a device: what ``marlin-cy tune`` runs.

Where results are kept, and how a backend uses them, is in :mod:`~marlin_cy.opencl.tuned`.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyopencl as cl

from marlin_cy.errors import BuildError, MarlinError
from marlin_cy.moe.align import moe_align_block_size
from marlin_cy.opencl.buffers import Vector
from marlin_cy.opencl.gemm.multiply import problem_of
from marlin_cy.opencl.gemm.work import RoutedBlocks
from marlin_cy.opencl.tiers.configuration import Configuration
from marlin_cy.opencl.timing import times_of
from marlin_cy.opencl.tuned import PARTIAL_BYTES, SPLITS, partial_bytes, product_key
from marlin_cy.weights.int4 import Int4Weight

if TYPE_CHECKING:
    pass

__all__ = ["Case", "Shape", "Tuning", "candidates", "tune"]

LEAST_SPLIT_ROWS = 128  # of K
TOLERANCE = 2e-3  # of the norm, to the default configuration's result
LAUNCHES, LEAST_LAUNCHES = 15, 5
SECONDS_A_CANDIDATE = 0.1  # of launches: slow ones are launched less often, but at least LEAST_LAUNCHES times
WARM_SECONDS = 0.02
DISTINCT_WEIGHTS = 4
UNWRITTEN = np.uint16(0x7E5A)  # a NaN of float16 that no kernel writes
COMPARED_ROWS = 512
GAIN = 0.98  # a candidate replaces the default if its time is below this part of the default's: less may be chance


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
