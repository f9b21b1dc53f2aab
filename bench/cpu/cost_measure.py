"""Measures the cost model's parameters, and the layers that are predicted from them, in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from bench.common.shapes import ModelShape, build_stack, routings
from bench.common.timing import Call, CallTimer, alternate, spread
from bench.cpu.calls import gemm_call, read_side
from bench.cpu.cost_model import (
    MAX_OVERLAP,
    MC,
    MR,
    Machine,
    experts_hit,
    overlap_of,
    predict,
    rows_where_arithmetic_dominates,
)
from marlin_cy import MarlinExpertStack, MoeLayer
from marlin_cy.cpu import CpuBackend, CpuContext

__all__ = ["KERNEL_ROWS", "STREAM_ROWS", "CostMeasurement"]

AMX_MC, AMX_MR = 96, 16
KERNEL_ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 40, 48)
AMX_KERNEL_ROWS = (*KERNEL_ROWS, 64, 80, 96)
STREAM_ROWS = (1, 2, 4, 8, 16, 48)
KERNEL_K = 1024
KERNEL_COLUMNS = (256, 768)  # per thread: weights fit the second-level cache, and leave room for activations
PREPARE_ROWS = 768
QUICK_KERNEL = 1e-15  # with --quick a disturbed round is no error
QUARTILE = 25  # of the rounds: disturbances make a call longer, never shorter


class CostMeasurement:
    """Measures a model's layer for any number of threads and compute dtype.

    Parameters
    ----------
    backend : CpuBackend
    isa : str
    model : ModelShape
    tokens : sequence of int
    repeats : int
        Rounds.
    quick : bool
        Two short rounds.
    """

    def __init__(
        self, backend: CpuBackend, isa: str, model: ModelShape, tokens: Sequence[int], repeats: int, quick: bool
    ) -> None:
        self.backend, self.isa, self.model, self.tokens, self.quick = backend, isa, model, tokens, quick
        self.kernel_rows = AMX_KERNEL_ROWS if isa == "amx" else KERNEL_ROWS
        self.mc, self.mr = (AMX_MC, AMX_MR) if isa == "amx" else (MC, MR)
        self.repeats = 2 if quick else repeats
        self.min_seconds, self.pause_seconds = (1e-3, 0.0) if quick else (10e-3, 2e-3)
        self.layer = self._layer(model)
        stacks = {"gate_up": self.layer.gate_up, "down": self.layer.down}
        self.expert_bytes = {name: stack.metadata.packed_bytes / stack.num_experts for name, stack in stacks.items()}

    def measure(self, threads: int, dtype: str) -> dict[str, Any]:
        """An entry of ``runs``: parameters, and predicted and measured times by tokens."""
        context = self.backend.new_context(num_threads=threads, compute_dtype=dtype, isa=self.isa)
        # A layer whose products have almost nothing to read or compute: its time is the rest of a call.
        ends = ModelShape("ends", self.model.top_k, self.model.top_k, self.model.hidden, 32, 32)
        calls = self._calls(context, threads, ends)
        sides: dict[Any, Any] = {name: CallTimer(call, self.min_seconds) for name, call in calls.items()}
        figures = alternate(sides | {"read": read_side(threads, self.quick)}, self.repeats, self.pause_seconds)
        seconds = {name: float(np.percentile(figures[name], QUARTILE)) for name in calls}
        read = float(np.percentile(figures["read"], 100 - QUARTILE))
        machine = self._parameters(threads, dtype, read, seconds, ends)
        rows = [
            {
                "tokens": tokens,
                "experts_hit": experts_hit(self.model, tokens),
                "predicted": predict(machine, self.model, tokens, self.expert_bytes),
                "measured": seconds["layer", tokens],
                "spread": spread(figures["layer", tokens])._asdict(),
            }
            for tokens in self.tokens
        ]
        dominates = {
            name: rows_where_arithmetic_dominates(machine, k, n, self.expert_bytes[name])
            for name, (k, n) in self.model.projections.items()
        }
        return {"parameters": asdict(machine), "layers": rows, "arithmetic_from_rows": dominates}

    def _calls(self, context: CpuContext, threads: int, ends: ModelShape) -> dict[Any, Call]:
        """All calls that are timed, by name, or by name and rows or tokens."""
        narrow, wide = (self._stack(KERNEL_K, columns * threads) for columns in KERNEL_COLUMNS)
        thin = self._stack(self.model.hidden, 32 * threads)
        small = ModelShape("small", 1, 1, 32, 32, 32)
        calls: dict[Any, Call] = {
            "start": self._layer_call(self._layer(small), context, small, 1),
            "prepare": gemm_call(thin, context, PREPARE_ROWS, 1),
            "finish": self._layer_call(self._layer(ends), context, ends, max(self.tokens)),
        }
        for rows in self.kernel_rows:
            for name, stack in (("narrow", narrow), ("wide", wide)):
                calls[name, rows] = gemm_call(stack, context, rows, 1)
        for rows in STREAM_ROWS:
            calls["stream", rows] = gemm_call(self.layer.gate_up, context, rows, self.model.top_k)
        for tokens in self.tokens:
            calls["layer", tokens] = self._layer_call(self.layer, context, self.model, tokens)
        return calls

    def _parameters(
        self, threads: int, dtype: str, read: float, seconds: dict[Any, float], ends: ModelShape
    ) -> Machine:
        """The machine; each parameter is derived with the earlier ones."""
        machine = Machine(
            threads=threads,
            compute_dtype=dtype,
            read=read,
            start=seconds["start"],
            kernel=_kernel(seconds, threads, self.kernel_rows, least=QUICK_KERNEL if self.quick else 0.0),
            prepare=0.0,
            finish=0.0,
            overlap={1: MAX_OVERLAP},
            mc=self.mc,
            mr=self.mr,
        )
        arithmetic = self.model.hidden * 32 * threads * machine.expert(PREPARE_ROWS)
        left = seconds["prepare"] - machine.start - arithmetic
        machine = replace(machine, prepare=max(left, 0) / (PREPARE_ROWS * self.model.hidden))
        tokens = max(self.tokens)
        rest = predict(machine, ends, tokens, dict.fromkeys(self.expert_bytes, 0.0))["total"]
        machine = replace(machine, finish=max(seconds["finish"] - rest, 0) / (tokens * ends.top_k * ends.hidden))
        return replace(machine, overlap={rows: self._overlap(machine, rows, seconds) for rows in STREAM_ROWS})

    def _overlap(self, machine: Machine, rows: int, seconds: dict[Any, float]) -> float:
        """``Machine.overlap`` for a number of rows, from a product whose weights come from memory."""
        k, n = self.model.projections["gate_up"]
        one_expert = (seconds["stream", rows] - machine.start) / self.model.top_k - machine.prepare * rows * k
        return overlap_of(self.expert_bytes["gate_up"] / machine.read, k * n * machine.expert(rows), one_expert)

    def _stack(self, k: int, n: int, num_experts: int = 1, group_size: int | None = None) -> MarlinExpertStack:
        return build_stack(self.backend, num_experts, k, n, group_size or min(self.model.group_size, k))

    def _layer(self, model: ModelShape) -> MoeLayer:
        gate_up, down = (self._stack(k, n, model.num_experts, model.group_size) for k, n in model.projections.values())
        return MoeLayer(gate_up, down, top_k=model.top_k)

    @staticmethod
    def _layer_call(layer: MoeLayer, context: CpuContext, model: ModelShape, tokens: int) -> Call:
        """A call of a layer whose tokens are routed already; float32 in and out."""
        drawn = routings(model.num_experts, model.top_k, tokens)
        x = np.random.default_rng(0).standard_normal((tokens, model.hidden), np.float32)
        shares = np.full((tokens, model.top_k), 1 / model.top_k, np.float32)
        out = np.empty_like(x)
        return lambda i: layer.forward_routed(context, x, drawn[i % len(drawn)], shares, out=out)


def _kernel(seconds: dict[Any, float], threads: int, kernel_rows: Sequence[int], least: float) -> dict[int, float]:
    """``Machine.kernel``: the time of the columns that one product has more than another, at least ``least``.

    Raises
    ------
    ValueError
        The wider product took less time.
    """
    columns = threads * (KERNEL_COLUMNS[1] - KERNEL_COLUMNS[0])
    kernel = {
        rows: max(least, (seconds["wide", rows] - seconds["narrow", rows]) / (KERNEL_K * columns))
        for rows in kernel_rows
    }
    if min(kernel.values()) <= 0:
        raise ValueError("a product with more columns took less time: other processes use this machine")
    return kernel
