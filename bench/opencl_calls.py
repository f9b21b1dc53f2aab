"""What is timed on an OpenCL device: products with random routing and whole layers, over random weights."""

import time
from typing import NamedTuple

import numpy as np
import pyopencl as cl

from bench.shapes import DISTINCT_WEIGHTS
from marlin_cy import MoeLayer, get_backend
from marlin_cy.moe.align import moe_align_block_size
from marlin_cy.opencl import tiers
from marlin_cy.opencl.timing import times_of
from marlin_cy.weights.int4 import Int4Weight

__all__ = [
    "DAM_BYTES",
    "ROUTED_EXPERTS",
    "Dam",
    "GemmCase",
    "LayerCase",
    "Shape",
    "Weights",
    "by_label",
    "open_tiers",
    "profiled",
    "random_ids",
    "warm_up",
]

ROUTED_EXPERTS = 8  # of each token
POISON = np.uint16(0x7E5A)  # a NaN of float16 that no kernel makes
WARM_SECONDS = 0.03
DAM_BYTES, LEAST_DAM_BYTES = 256 << 20, 16 << 20


class Shape(NamedTuple):
    """A product: ``experts`` of ``[k, n]``; with ``gathered`` the input has a row for each pair of token and expert."""

    k: int
    n: int
    experts: int
    gathered: bool = False
    group_size: int = 128

    def __str__(self):
        return f"{self.k}, {self.n}, {self.experts}{' (pre-gathered)' if self.gathered else ''}"


def open_tiers(names, device=None):
    """Backends by tier, on one context, so that they share weights.

    Parameters
    ----------
    names : sequence of str
        ``"best"`` is the tier that the device is given when none is asked for.
    device : str, optional
        As ``MARLIN_CY_OPENCL_DEVICE``.

    Returns
    -------
    dict of str to OpenClBackend
        By the tier's own name, in the order asked for; those that the device cannot run are left out
        as long as one remains.
    """
    first = get_backend("opencl", device=device)
    backends = {}
    reasons = dict(tiers.explain(first.runtime.capabilities))
    for name in names:
        tier = first.tier.name if name == "best" else tiers.tier_named(name).name
        if reasons[tier] is None and tier not in backends:
            backends[tier] = get_backend("opencl", device=first.device, context=first.context, tier=tier)
    if not backends:
        raise ValueError(f"--tiers: {', '.join(f'{name} needs {reasons[name]}' for name in names)}")
    return backends


class Weights:
    """A stack of symmetric experts in device memory, made of a few random weights in turn.

    Attributes
    ----------
    shape : Shape
    stack : OpenClMarlinExpertStack
    """

    def __init__(self, backend, shape, seed=0):
        rng = np.random.default_rng(seed)
        self.shape = shape
        groups = (-(-shape.k // shape.group_size), shape.n)
        self._weights = [
            Int4Weight(
                words=rng.integers(0, 1 << 32, (shape.k // 8, shape.n), dtype=np.uint32),
                scale=rng.uniform(0.005, 0.015, groups).astype(np.float16),
                zero=np.full(groups, 8, np.uint8),
                group_size=shape.group_size,
            )
            for _ in range(min(DISTINCT_WEIGHTS, shape.experts))
        ]
        self._dense = {}
        builder = backend.new_stack_builder(shape.experts, shape.k, shape.n, group_size=shape.group_size)
        for expert in range(shape.experts):
            builder.add(expert, 0, self._weights[expert % len(self._weights)])
        self.stack = builder.finish()

    @property
    def expert_bytes(self):
        """Packed bytes of an expert."""
        return self.stack.metadata.packed_bytes // self.shape.experts

    def dense(self, expert):
        """float64 ``[k, n]``."""
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

    def release(self):
        """Give the device's memory back."""
        self.stack.store.release()


def random_ids(rng, tokens, experts, top_k=ROUTED_EXPERTS):
    """int32 ``[tokens, top_k]``: experts of each token, drawn alike."""
    drawn = rng.random((tokens, experts), np.float32)
    return np.argpartition(drawn, top_k - 1, axis=1)[:, :top_k].astype(np.int32)


class Dam:
    """Copies on the device that keep a queue busy while calls are enqueued behind them.

    Without it the time of a call with several short kernels is the host's, as long as that is slower.
    """

    def __init__(self, ctx, nbytes):
        self._ctx = ctx
        nbytes = max(LEAST_DAM_BYTES, nbytes)
        self._buffers = [cl.Buffer(ctx.cl_context, cl.mem_flags.READ_WRITE, nbytes) for _ in range(2)]
        self._copy().wait()
        self._seconds = times_of([("", self._copy_finished())]).kernels

    def _copy(self):
        target, source = self._buffers
        return cl.enqueue_copy(self._ctx.queue, target, source, byte_count=source.size)

    def _copy_finished(self):
        event = self._copy()
        event.wait()
        return event

    def hold(self, seconds):
        """Enqueue copies that take so long."""
        for _ in range(int(seconds / self._seconds) + 1):
            self._copy()

    def release(self):
        """Give the device's memory back."""
        for buffer in self._buffers:
            buffer.release()


def profiled(ctx, calls, dam=None):
    """The events of each call, all enqueued one after the other.

    Parameters
    ----------
    ctx : OpenClContext
    calls : list of callable
    dam : Dam, optional
        Have all of them enqueued before the first begins.

    Returns
    -------
    list of list of (str, pyopencl.Event)
    """
    if dam is not None:
        begin = time.perf_counter()
        for call in calls:
            call()
        seconds = time.perf_counter() - begin
        ctx.finish()
        dam.hold(2 * seconds)
    collected = []
    for call in calls:
        with ctx.profile() as events:
            call()
        collected.append(events)
    ctx.finish()
    return collected


def warm_up(ctx, calls):
    """Run the calls until kernels are built and clocks are up; returns the seconds of the first's kernels."""
    calls[0]()
    (events,) = profiled(ctx, calls[:1])
    seconds = times_of(events).kernels
    spent = seconds
    while spent < WARM_SECONDS:
        begin = time.perf_counter()
        for call in calls:
            call()
        ctx.finish()
        spent += time.perf_counter() - begin
    return seconds


def by_label(calls_events):
    """Median seconds a call of each kind of command, in order: ``{label: seconds}``."""
    totals = {}
    for number, events in enumerate(calls_events):
        for label, event in events:
            totals.setdefault(label, [0.0] * len(calls_events))[number] += times_of([(label, event)]).kernels
    return {label: float(np.median(seconds)) for label, seconds in totals.items()}


class GemmCase:
    """``gemm_phase_vllm`` on one stack with one number of tokens, over several random routings.

    Parameters
    ----------
    weights : Weights
    ctx : OpenClContext
    inputs : pyopencl.array.Array
        float16 ``[rows, k]``, as many rows as the case needs or more.
    all_ids : list of int32 ``[tokens, top_k]``
        The routings; a launch each.
    block_size : int, optional
        The tier's own choice unless given.
    """

    def __init__(self, weights, ctx, inputs, all_ids, block_size=None):
        backend, shape = ctx.backend, weights.shape
        self.weights, self.ctx, self.inputs, self.all_ids = weights, ctx, inputs, all_ids
        tokens, top_k = all_ids[0].shape
        self.pairs = tokens * top_k
        self.top_k = 1 if shape.gathered else top_k
        self.block_size = block_size or backend.tier.block_size(self.pairs / shape.experts)
        self._routing = []
        for ids in all_ids:
            sorted_ids, experts, past = moe_align_block_size(ids, self.block_size, shape.experts)
            # As vLLM cuts these arrays: no more blocks than pairs.
            cut = sorted_ids[: self.pairs * self.block_size], experts[: self.pairs], past
            self._routing.append([backend.from_host(array) for array in cut])
        self.out = backend.empty((self.pairs, shape.n), np.float16)
        self.calls = [lambda routing=routing: self._call(routing) for routing in self._routing]

    @property
    def experts_hit(self):
        """Experts that a launch uses, on average."""
        return float(np.mean([len(np.unique(ids)) for ids in self.all_ids]))

    def _call(self, routing):
        self.weights.stack.gemm_phase_vllm(
            self.ctx, self.inputs, *routing, self.out, self.pairs // self.top_k, self.block_size, self.top_k
        )

    def launch_times(self, budget_seconds, least=5, dam=None):
        """:class:`Times` of launches after a warm-up; fewer, but ``least``, where all take longer than the budget."""
        seconds = warm_up(self.ctx, self.calls)
        count = max(least, min(len(self.calls), int(budget_seconds / max(seconds, 1e-9))))
        return [times_of(events) for events in profiled(self.ctx, self.calls[:count], dam)]

    def error(self, x, rng, rows=3):
        """Relative error (Frobenius) of sampled rows of one launch against float64; infinite if rows were not written.

        Parameters
        ----------
        x : float16 ``[rows, k]``
            What is in ``inputs``.
        """
        number = int(rng.integers(len(self.calls)))
        cl.enqueue_fill(self.ctx.queue, self.out.base_data, POISON.tobytes(), self.out.nbytes)
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
    """A whole layer, routing included, over several random router logits."""

    def __init__(self, gate_up, down, ctx, tokens, launches, rng, top_k=ROUTED_EXPERTS):
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
        self.calls = [lambda each=each: layer(ctx, x, each, out=out) for each in map(backend.from_host, logits)]

    def events(self, dam=None):
        """The events of each call, after a warm-up."""
        warm_up(self.ctx, self.calls)
        return profiled(self.ctx, self.calls, dam)
