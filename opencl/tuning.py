"""The search for the fastest configuration of a product on a device, which ``marlin-cy tune`` runs.

:mod:`~marlin_cy.opencl.tuned` stores the results and applies them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from marlin_cy.errors import BuildError, MarlinError
from marlin_cy.moe.align import moe_align_block_size
from marlin_cy.opencl.buffers import Vector, memory_of
from marlin_cy.opencl.checks.random_weights import random_weight
from marlin_cy.opencl.gemm.multiply import problem_of
from marlin_cy.opencl.gemm.work import RoutedBlocks
from marlin_cy.opencl.tiers.configuration import Configuration, Problem, Tier
from marlin_cy.opencl.timing import times_of
from marlin_cy.opencl.tuned import PARTIAL_BYTES, SPLITS, partial_bytes, product_key
from marlin_cy.tuning import Shape

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.context import OpenClContext
    from marlin_cy.opencl.stack import OpenClMarlinExpertStack

__all__ = ["Case", "Shape", "Tuning", "candidates", "tune"]

LEAST_SPLIT_ROWS = 128  # of K
TOLERANCE = 2e-3  # of the norm, to the default configuration's result
LAUNCHES, LEAST_LAUNCHES = 15, 5
SECONDS_A_CANDIDATE = 0.1  # of launches: slow ones are launched less often, but at least LEAST_LAUNCHES times
WARM_SECONDS = 0.02
DISTINCT_WEIGHTS = 4
SCALE = 0.01
UNWRITTEN = np.uint16(0x7E5A)  # a NaN of float16 that no kernel writes
COMPARED_ROWS = 512
GAIN = 0.98  # a candidate replaces the default if its time is below this part of the default's: less may be chance


class Tuning(NamedTuple):
    """The result for one number of tokens.

    Attributes
    ----------
    shape : Shape
    tokens : int
    rows : int
        Rows that share an expert.
    key : str
        That of :func:`~marlin_cy.opencl.tuned.product_key`.
    default_seconds, best_seconds : float
        Median of the launches' event times.
    default, best : Configuration
        The tier's first choice that passes its check, and the fastest one; the same unless another is clearly faster.
    tried : int
        Candidates besides the default.
    refused : list of (Configuration, str)
        Candidates that fail or compute wrong results, with the reason.
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
    refused: list[tuple[Configuration, str]]


def candidates(tier: Tier, problem: Problem) -> list[Configuration]:
    """The tier's configurations for a problem, best first, and variants of these with more or fewer splits of K."""
    offered = tier.configurations(problem)
    found = list(offered)
    for configuration in offered:
        # A kernel that the tier offers without splits may not support them.
        if configuration.splits > 1:
            most = problem.k // LEAST_SPLIT_ROWS
            found += [replace(configuration, splits=splits) for splits in SPLITS if splits <= most]
    return [one for one in dict.fromkeys(found) if one is offered[0] or partial_bytes(problem, one) <= PARTIAL_BYTES]


def tune(
    backend: OpenClBackend,
    shape: Shape,
    all_tokens: Sequence[int],
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Tuning]:
    """Time a tier's candidates on random weights and float16 rows with random routing.

    Parameters
    ----------
    backend : OpenClBackend
        Other threads must not use it during the search.
    shape : Shape
    all_tokens : sequence of int
    progress : callable, optional
        Called as ``progress(done, total, description)``.

    Returns
    -------
    list of Tuning
        One for each number of tokens; numbers with the same product key are measured once.
    """
    rng = np.random.default_rng(0)
    stack = random_stack(backend, shape, rng)
    results: dict[str, Tuning] = {}
    for number, tokens in enumerate(all_tokens):
        case = Case(backend, stack, shape, tokens, rng)
        if case.key in results:
            continue
        results[case.key] = tune_case(case)
        if progress is not None:
            progress(number + 1, len(all_tokens), f"{shape.k}, {shape.n}, {tokens} tokens")
    stack.store.release()
    return list(results.values())


def random_stack(backend: OpenClBackend, shape: Shape, rng: np.random.Generator) -> OpenClMarlinExpertStack:
    """A stack whose experts cycle through a few random weights."""
    weights = [
        random_weight(
            rng, shape.k, shape.n, shape.group_size, shape.codes, shape.scales, symmetric=shape.symmetric, scale=SCALE
        )
        for _ in range(min(DISTINCT_WEIGHTS, shape.experts))
    ]
    builder = backend.new_stack_builder(
        shape.experts, shape.k, shape.n, group_size=shape.group_size, codes=shape.codes, scales=shape.scales
    )
    for expert in range(shape.experts):
        builder.add(expert, 0, weights[expert % len(weights)])
    return cast("OpenClMarlinExpertStack", builder.finish())


class Case:
    """Products of one stack with a number of tokens.

    Attributes
    ----------
    key : str
    problem : Problem
    """

    def __init__(
        self,
        backend: OpenClBackend,
        stack: OpenClMarlinExpertStack,
        shape: Shape,
        tokens: int,
        rng: np.random.Generator,
    ) -> None:
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

            def call(ctx: OpenClContext, routing: list[Any] = routing) -> None:
                ids, experts, past = routing
                stack.gemm_phase_vllm(ctx, x, ids, experts, past, self._out, pairs // reads, block_size, reads)

            self._calls.append(call)
        none = Vector(None, 0, 0)
        limit = min(len(sorted_ids) // block_size, len(expert_ids)) * block_size
        work = RoutedBlocks(none, none, None, limit, pairs, block_size, reads)
        self.problem = problem_of(stack.store, work, backend.runtime.capabilities)
        self.key = product_key(self.problem, stack.store.symmetric, stack.store.codes)

    def run(self, configuration: Configuration) -> tuple[float, npt.NDArray[np.float32]]:
        """Median seconds of the launches, and float32 rows of the first routing, NaN if any output was not written."""
        tuned = self.backend.runtime.tuned
        tuned.forced(configuration)
        try:
            # A new context, as contexts keep plans.
            ctx, data = self.backend.new_context(profiling=True), memory_of(self._out)
            assert data is not None  # a product has rows
            cl.enqueue_fill(ctx.queue, data, UNWRITTEN.tobytes(), self._out.nbytes)
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
    def _seconds(ctx: OpenClContext, calls: Sequence[Callable[[OpenClContext], None]]) -> list[float]:
        collected = []
        for call in calls:
            with ctx.profile() as events:
                call(ctx)
            collected.append(events)
        ctx.finish()
        return [times_of(events).kernels for events in collected]


def tune_case(case: Case) -> Tuning:
    """The :class:`Tuning` of a :class:`Case`. Configurations that compute wrong results are left out.

    Raises
    ------
    MarlinError
        No configuration passes.
    """
    tried = candidates(case.backend.tier, case.problem)
    refused: list[tuple[Configuration, str]] = []
    default: Configuration | None = None
    for configuration in tried:
        try:
            # The first call of a configuration checks it, and raises DeviceError if its numbers are wrong.
            seconds, actual = case.run(configuration)
        except (BuildError, cl.Error, MarlinError) as error:
            refused.append((configuration, f"does not run: {error}"))
            continue
        if default is None:
            default, default_seconds, expected = configuration, seconds, actual
            best, best_seconds = configuration, seconds
            continue
        difference = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        if not difference <= TOLERANCE:  # a NaN is wrong, too
            refused.append((configuration, f"its result is wrong: relative difference {difference:.2g}"))
        elif seconds < min(best_seconds, GAIN * default_seconds):
            best, best_seconds = configuration, seconds
    if default is None:
        raise MarlinError(f"no configuration can be used: {'; '.join(reason for _, reason in refused)}")
    return Tuning(
        shape=case.shape,
        tokens=case.tokens,
        rows=case.problem.rows,
        key=case.key,
        default_seconds=default_seconds,
        best_seconds=best_seconds,
        default=default,
        best=best,
        tried=len(tried) - 1,
        refused=refused,
    )
