"""The tables over real shapes on OpenCL: as many rows of each expert of a call, and whole layers; times by events."""

import statistics
from dataclasses import dataclass

import numpy as np

from bench.opencl_calls import DAM_BYTES, Dam, LayerCase, Shape, Weights, profiled, warm_up
from bench.shapes import packed_bytes_estimate
from bench.timing import spread
from marlin_cy.commands.output import table
from marlin_cy.opencl.timing import copy_bandwidth, times_of

__all__ = ["Settings", "run_sweep"]

SECONDS_A_CASE = 1.0  # of launches: slower ones are repeated less often
MEMORY_SHARE = 0.5  # of the device, for weights unless told otherwise


@dataclass(frozen=True)
class Settings:
    """What to measure, and how often.

    Attributes
    ----------
    backends : dict of str to OpenClBackend
        By tier, the best first.
    models : tuple of ModelShape
    rows, tokens : tuple of int
    memory_bytes : int or None
        For weights; half of the device's when None.
    repeats : int
        Launches of a case.
    quick : bool
    """

    backends: dict
    models: tuple
    rows: tuple
    tokens: tuple
    memory_bytes: int | None
    repeats: int
    quick: bool


def run_sweep(settings, screen):
    """Measure every case, print each model's tables as they are ready; returns what goes into the JSON object."""
    backend = next(iter(settings.backends.values()))
    contexts = [each.new_context(profiling=True) for each in settings.backends.values()]
    bandwidth = copy_bandwidth(contexts[0], (16 if settings.quick else 1024) << 20)
    limit = settings.memory_bytes or int(MEMORY_SHARE * backend.runtime.capabilities.global_memory)
    results = []
    for model in settings.models:
        stacks = _build(backend, model, limit)
        experts = stacks["gate_up"].shape.experts
        screen.print(f"\n[bold]{model.name}[/bold]: {experts} experts, {model.hidden} -> {model.intermediate}")
        for projection, weights in stacks.items():
            rows = [
                _gemm(weights, ctx, model, projection, count, settings, bandwidth)
                for count in settings.rows
                for ctx in contexts
            ]
            screen.print(f"\n{projection} {weights.shape.k} -> {weights.shape.n}, {model.top_k} experts a call")
            screen.print(_table(rows))
            results += rows
        rows = [_layer(stacks, ctx, model, count, settings, bandwidth) for count in settings.tokens for ctx in contexts]
        screen.print(f"\nwhole layer, top {model.top_k}")
        screen.print(_table(rows))
        results += rows
        for weights in stacks.values():
            weights.release()
    return {"copy_bytes_per_second": bandwidth, "results": results}


def _build(backend, model, limit):
    """The stacks of a model, with as many experts as the memory allows: ``{projection: Weights}``."""
    shapes = {name: Shape(k, n, 1, group_size=model.group_size) for name, (k, n) in model.projections.items()}
    expert_bytes = sum(packed_bytes_estimate(shape.k, shape.n) for shape in shapes.values())
    experts = min(model.num_experts, limit // expert_bytes)
    if experts < model.top_k:
        raise ValueError(
            f"--memory: {limit / 1e9:.3g} GB hold {experts} experts of {model.name}, of which {model.top_k} are "
            f"needed: expected at least {model.top_k * expert_bytes / 1e9:.3g} GB"
        )
    return {name: Weights(backend, shape._replace(experts=experts)) for name, shape in shapes.items()}


def _gemm(weights, ctx, model, projection, count, settings, bandwidth):
    """A row of a table: ``count`` rows through each of ``top_k`` experts, other experts in each call."""
    shape, per_call = weights.shape, model.top_k
    backend = ctx.backend
    rng = np.random.default_rng(0)
    total = per_call * count
    x = backend.from_host(rng.standard_normal((total, shape.k), np.float32).astype(np.float16))
    out = backend.empty((total, shape.n), np.float16)
    begins = np.arange(per_call) * count

    def call(turn):
        experts = (turn * per_call + np.arange(per_call)) % shape.experts
        dispatches = np.stack([experts, begins, begins, np.full(per_call, count)], axis=1)
        weights.stack.gemm_phase_batched(ctx, x, dispatches, out, shape.k)

    calls = [lambda turn=turn: call(turn) for turn in range(settings.repeats)]
    calls = calls[: _affordable(warm_up(ctx, calls), len(calls))]
    # A list of rows goes to the device before each product, which is no part of the kernels' time.
    collected = [[one for one in events if not one[0].startswith("upload")] for events in profiled(ctx, calls)]
    case = {
        "kind": "gemm",
        "model": model.name,
        "projection": projection,
        "k": shape.k,
        "n": shape.n,
        "num_experts": shape.experts,
        "experts_per_call": per_call,
        "rows": count,
    }
    seconds = [times_of(events).kernels for events in collected]
    return _row(case, ctx, seconds, per_call * weights.expert_bytes, 2 * total * shape.k * shape.n, bandwidth)


def _layer(stacks, ctx, model, tokens, settings, bandwidth):
    """A row of a table: a whole layer."""
    case = LayerCase(
        stacks["gate_up"], stacks["down"], ctx, tokens, settings.repeats, np.random.default_rng(0), model.top_k
    )
    case.calls = case.calls[: _affordable(warm_up(ctx, case.calls[:1]), len(case.calls))]
    dam = Dam(ctx, 0 if settings.quick else DAM_BYTES)
    seconds = [times_of(events).span for events in case.events(dam)]
    dam.release()
    expert_bytes = sum(weights.expert_bytes for weights in stacks.values())
    per_row = sum(k * n for k, n in model.projections.values())
    about = {
        "kind": "layer",
        "model": model.name,
        "hidden": model.hidden,
        "intermediate": model.intermediate,
        "num_experts": case.layer.num_experts,
        "top_k": model.top_k,
        "rows": tokens,
        "experts_hit": case.experts_hit,
    }
    flop = 2 * tokens * model.top_k * per_row
    return _row(about, ctx, seconds, case.experts_hit * expert_bytes, flop, bandwidth)


def _affordable(seconds, most):
    """How many launches of so many seconds, of ``most``, the time allows."""
    return max(3, min(most, int(SECONDS_A_CASE / max(seconds, 1e-9))))


def _row(case, ctx, seconds, bytes_read, flop, bandwidth):
    median = statistics.median(seconds)
    return case | {
        "tier": ctx.backend.tier.name,
        "us": spread(np.multiply(seconds, 1e6))._asdict(),
        "gbps": bytes_read / median / 1e9,
        "gflops": flop / median / 1e9,
        "copy_gbps": bandwidth / 1e9,
        "copy_share": bytes_read / median / bandwidth,
    }


def _table(rows):
    result = table(
        ">tokens" if rows[0]["kind"] == "layer" else ">rows an\nexpert",
        "tier",
        ">µs",
        ">p10–p90\nµs",
        ">weights\nGB/s",
        ">GFLOP/s",
        ">share of\ncopy GB/s",
    )
    for row in rows:
        us = row["us"]
        result.add_row(
            str(row["rows"]),
            row["tier"],
            f"{us['median']:.1f}",
            f"{us['p10']:.1f}–{us['p90']:.1f}",
            f"{row['gbps']:.4g}",
            f"{row['gflops']:.4g}",
            f"{row['copy_share']:.2f}",
        )
    return result
