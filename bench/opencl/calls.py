"""Calls that are timed on an OpenCL device: products with random routing, and whole layers, with random weights."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from bench.common.shapes import DISTINCT_WEIGHTS, in_turn, random_weight
from marlin_cy import MoeLayer, get_backend
from marlin_cy.moe.align import moe_align_block_size
from marlin_cy.opencl import tiers
from marlin_cy.opencl.buffers import memory_of
from marlin_cy.opencl.timing import Times, times_of

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.context import OpenClContext
    from marlin_cy.opencl.stack import OpenClMarlinExpertStack

__all__ = [
    "PLUG_BYTES",
    "ROUTED_EXPERTS",
    "GemmCase",
    "LayerCase",
    "QueuePlug",
    "Shape",
    "Weights",
    "by_label",
    "open_backend",
    "open_tiers",
    "profiled",
    "warm_up",
]

ROUTED_EXPERTS = 8  # per token
POISON = np.uint16(0x7E5A)  # a NaN of float16 that no kernel produces
WARM_SECONDS = 0.03
PLUG_BYTES, LEAST_PLUG_BYTES = 256 << 20, 16 << 20

Events = list[tuple[str, Any]]
"""Labels and events of the commands of a call."""


class Shape(NamedTuple):
    """A product: ``experts`` weights ``[k, n]``. ``gathered``: the input has one row per (token, expert) pair."""

    k: int
    n: int
    experts: int
    gathered: bool = False
    group_size: int = 128

    def __str__(self) -> str:
        return f"{self.k}, {self.n}, {self.experts}{' (pre-gathered)' if self.gathered else ''}"


def open_backend(**options: Any) -> OpenClBackend:
    """The OpenCL backend with the options of that class."""
    return cast("OpenClBackend", get_backend("opencl", **options))


def open_tiers(names: Sequence[str], device: str | None = None) -> dict[str, OpenClBackend]:
    """Backends by tier, in one OpenCL context, so that they share weights.

    Parameters
    ----------
    names : sequence of str
        ``"best"`` is the tier that the device gets by default.
    device : str, optional
        As ``MARLIN_CY_OPENCL_DEVICE``.

    Returns
    -------
    dict of str to OpenClBackend
        By the tier's own name, in the requested order. Tiers that the device cannot run are left out.

    Raises
    ------
    ValueError
        The device can run none of the tiers.
    """
    first = open_backend(device=device)
    backends: dict[str, OpenClBackend] = {}
    reasons = dict(tiers.explain(first.runtime.capabilities))
    for name in names:
        tier = first.tier.name if name == "best" else tiers.tier_named(name).name
        if reasons[tier] is None and tier not in backends:
            backends[tier] = open_backend(device=first.device, context=first.context, tier=tier)
    if not backends:
        raise ValueError(f"--tiers: {', '.join(f'{name} needs {reasons[name]}' for name in names)}")
    return backends


class Weights:
    """A stack of symmetric experts with random weights, in device memory.

    Attributes
    ----------
    shape : Shape
    stack : OpenClMarlinExpertStack
    """

    def __init__(self, backend: OpenClBackend, shape: Shape, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.shape = shape
        self._weights = [
            random_weight(rng, shape.k, shape.n, shape.group_size, symmetric=True)
            for _ in range(min(DISTINCT_WEIGHTS, shape.experts))
        ]
        self._dense: dict[int, npt.NDArray[np.float64]] = {}
        builder = backend.new_stack_builder(shape.experts, shape.k, shape.n, group_size=shape.group_size)
        for expert, weight in enumerate(in_turn(self._weights, shape.experts)):
            builder.add(expert, 0, weight)
        self.stack = cast("OpenClMarlinExpertStack", builder.finish())

    @property
    def expert_bytes(self) -> int:
        """Packed bytes of an expert."""
        return self.stack.metadata.packed_bytes // self.shape.experts

    def dense(self, expert: int) -> npt.NDArray[np.float64]:
        """An expert's weight, float64 ``[k, n]``."""
        index = expert % len(self._weights)
        if index not in self._dense:
            weight = self._weights[index]
            dense = np.empty((weight.k, weight.n))
            for row in range(8):
                dense[row::8] = (weight.words >> np.uint32(4 * row)) & np.uint32(15)
            dense -= 8
            for group, scale in enumerate(weight.scale.astype(np.float64)):
                dense[group * weight.group_size : (group + 1) * weight.group_size] *= scale
            self._dense[index] = dense
        return self._dense[index]

    def release(self) -> None:
        """Free the device memory."""
        self.stack.store.release()


class QueuePlug:
    """Copies on the device that keep its queue busy while the host enqueues calls behind them.

    Otherwise the host, where it is slower than the device, sets the time of a call with several short kernels.
    """

    def __init__(self, ctx: OpenClContext, nbytes: int) -> None:
        self._ctx = ctx
        nbytes = max(LEAST_PLUG_BYTES, nbytes)
        self._buffers = [cl.Buffer(ctx.cl_context, cl.mem_flags.READ_WRITE, nbytes) for _ in range(2)]
        self._copy().wait()
        self._seconds = times_of([("", self._copy_finished())]).kernels

    def _copy(self) -> cl.Event:
        target, source = self._buffers
        return cl.enqueue_copy(self._ctx.queue, target, source, byte_count=source.size)

    def _copy_finished(self) -> cl.Event:
        event = self._copy()
        event.wait()
        return event

    def hold(self, seconds: float) -> None:
        """Enqueue copies that take at least this long."""
        for _ in range(int(seconds / self._seconds) + 1):
            self._copy()

    def release(self) -> None:
        """Free the device memory."""
        for buffer in self._buffers:
            buffer.release()


def profiled(ctx: OpenClContext, calls: Sequence[Callable[[], object]], plug: QueuePlug | None = None) -> list[Events]:
    """Enqueue all calls, one after the other, and return the events of each.

    Parameters
    ----------
    ctx : OpenClContext
    calls : sequence of callable
    plug : QueuePlug, optional
        Keeps the queue busy until all calls are enqueued.

    Returns
    -------
    list of list of (str, pyopencl.Event)
    """
    if plug is not None:
        begin = time.perf_counter()
        for call in calls:
            call()
        seconds = time.perf_counter() - begin
        ctx.finish()
        plug.hold(2 * seconds)
    collected = []
    for call in calls:
        with ctx.profile() as events:
            call()
        collected.append(events)
    ctx.finish()
    return collected


def warm_up(ctx: OpenClContext, calls: Sequence[Callable[[], object]]) -> float:
    """Run the calls until kernels are built and clocks are high; returns the seconds of the first call's kernels."""
    calls[0]()
    (events,) = profiled(ctx, calls[:1])
    seconds = float(times_of(events).kernels)
    spent = seconds
    while spent < WARM_SECONDS:
        begin = time.perf_counter()
        for call in calls:
            call()
        ctx.finish()
        spent += time.perf_counter() - begin
    return seconds


def by_label(calls_events: Sequence[Events]) -> dict[str, float]:
    """Median seconds per call of each kind of command, in order: ``{label: seconds}``."""
    totals: dict[str, list[float]] = {}
    for number, events in enumerate(calls_events):
        for label, event in events:
            totals.setdefault(label, [0.0] * len(calls_events))[number] += times_of([(label, event)]).kernels
    return {label: float(np.median(seconds)) for label, seconds in totals.items()}


class GemmCase:
    """``gemm_phase_vllm`` on one stack, with one number of tokens and several random routings.

    Parameters
    ----------
    weights : Weights
    ctx : OpenClContext
    inputs : pyopencl.array.Array
        float16 ``[rows, k]``, with at least the rows that the case needs.
    all_ids : list of int32 ``[tokens, top_k]``
        The routings, one per launch.
    block_size : int, optional
        Default: the tier's choice.
    """

    def __init__(
        self,
        weights: Weights,
        ctx: OpenClContext,
        inputs: Any,
        all_ids: Sequence[npt.NDArray[np.int32]],
        block_size: int | None = None,
    ) -> None:
        backend, shape = ctx.backend, weights.shape
        self.weights, self.ctx, self.inputs, self.all_ids = weights, ctx, inputs, all_ids
        tokens, top_k = all_ids[0].shape
        self.pairs = tokens * top_k
        self.top_k = 1 if shape.gathered else top_k
        self.block_size = block_size or backend.tier.block_size(self.pairs / shape.experts)
        self._routing = []
        for ids in all_ids:
            sorted_ids, experts, past = moe_align_block_size(ids, self.block_size, shape.experts)
            # vLLM cuts these arrays to at most one block per pair.
            cut = sorted_ids[: self.pairs * self.block_size], experts[: self.pairs], past
            self._routing.append([backend.from_host(array) for array in cut])
        self.out = backend.empty((self.pairs, shape.n), np.float16)
        self.calls = [functools.partial(self._call, routing) for routing in self._routing]

    @property
    def experts_hit(self) -> float:
        """The mean number of experts that a launch uses."""
        return float(np.mean([len(np.unique(ids)) for ids in self.all_ids]))

    def _call(self, routing: Sequence[Any]) -> None:
        ids, experts, past = routing
        rows = self.pairs // self.top_k
        self.weights.stack.gemm_phase_vllm(
            self.ctx, self.inputs, ids, experts, past, self.out, rows, self.block_size, self.top_k
        )

    def launch_times(self, budget_seconds: float, least: int = 5, plug: QueuePlug | None = None) -> list[Times]:
        """:class:`Times` of launches after a warm-up; at least ``least`` launches, all if the budget allows."""
        seconds = warm_up(self.ctx, self.calls)
        count = max(least, min(len(self.calls), int(budget_seconds / max(seconds, 1e-9))))
        return [times_of(events) for events in profiled(self.ctx, self.calls[:count], plug)]

    def error(self, x: npt.NDArray[np.float16], rng: np.random.Generator, rows: int = 3) -> float:
        """Relative error (Frobenius) of sampled rows of one launch against float64; infinite if rows were not written.

        Parameters
        ----------
        x : float16 ``[rows, k]``
            The content of ``inputs``.
        rng : numpy.random.Generator
        rows : int
            How many rows are compared.
        """
        number = int(rng.integers(len(self.calls)))
        data = memory_of(self.out)
        assert data is not None  # the case has rows
        cl.enqueue_fill(self.ctx.queue, data, POISON.tobytes(), self.out.nbytes)
        self.calls[number]()
        actual = self.ctx.backend.to_host(self.out)
        if (actual.view(np.uint16) == POISON).any():
            return float("inf")
        experts = self.all_ids[number].reshape(-1)
        difference = norm = 0.0
        for pair in (0, *rng.integers(0, self.pairs, rows - 2), self.pairs - 1):
            expected = x[pair // self.top_k].astype(np.float64) @ self.weights.dense(experts[pair])
            difference += np.sum((actual[pair].astype(np.float64) - expected) ** 2)
            norm += np.sum(expected**2)
        error = float(np.sqrt(difference / norm))
        return error if np.isfinite(error) else float("inf")


class LayerCase:
    """A whole layer, routing included, with several random router logits."""

    def __init__(
        self,
        gate_up: Weights,
        down: Weights,
        ctx: OpenClContext,
        tokens: int,
        launches: int,
        rng: np.random.Generator,
        top_k: int = ROUTED_EXPERTS,
    ) -> None:
        backend = ctx.backend
        layer = MoeLayer(gate_up.stack, down.stack, top_k=top_k)
        x = backend.from_host((0.1 * rng.standard_normal((tokens, layer.hidden_size), np.float32)).astype(np.float16))
        out = backend.empty(x.shape, np.float16)
        logits = [
            rng.standard_normal((tokens, layer.num_experts), np.float32).astype(np.float16) for _ in range(launches)
        ]
        chosen = [np.argpartition(-each, top_k - 1, axis=1)[:, :top_k] for each in logits]
        self.experts_hit = float(np.mean([len(np.unique(ids)) for ids in chosen]))
        self.ctx, self.layer, self.out = ctx, layer, out
        self.calls = [functools.partial(layer, ctx, x, backend.from_host(each), out=out) for each in logits]

    def events(self, plug: QueuePlug | None = None) -> list[Events]:
        """The events of each call, after a warm-up."""
        warm_up(self.ctx, self.calls)
        return profiled(self.ctx, self.calls, plug)
