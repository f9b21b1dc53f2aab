"""The claims about speed and accuracy on the CPU, each measured and compared with its bar.

A claim is a numbered line of a table. Its ratio is taken within each round of alternating sides, and its figure is the
median over rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

import numpy as np
from rich.console import Console

from bench.common.shapes import (
    MODELS,
    TINY,
    build_stack,
    gptq_bytes,
    packed_bytes_estimate,
    quantised_normal_weight,
    routings,
)
from bench.common.timing import Call, CallTimer, Spread, alternate, exact, pause_check, ratios, spread
from bench.cpu.calls import experts_beyond_cache, gemm_call, gemm_flop, layer_call, layer_flop, read_side
from bench.peers.torch_calls import TorchPeers
from bench.report.show_lines import measured_line, show_table, skipped_line
from marlin_cy import CheckpointError, MoeLayer, UnsupportedError, open_checkpoint
from marlin_cy.commands.activations import RecordedActivations
from marlin_cy.commands.run import ACTIVATIONS_FILE, BUILT_IN
from marlin_cy.cpu import CpuBackend, CpuContext, dispatch_report

__all__ = ["Settings", "run_show"]

EXPERTS_PER_CALL = 8
DENSE_COPIES_BYTES = 2 << 30
FORCED, BASELINE = "avx2", "avx512vnni"


@dataclass(frozen=True)
class Settings:
    """How carefully to measure."""

    isa: str
    threads: int
    repeats: int
    min_seconds: float
    pause_seconds: float
    quick: bool


def run_show(backend: CpuBackend, torch_peers: TorchPeers, settings: Settings, screen: Console) -> dict[str, Any]:
    """Measure and print all lines.

    Returns
    -------
    dict
        Parts of the JSON document: ``show``, ``pause_check``, ``medians`` and ``seconds``.
    """
    show = _Show(backend, torch_peers, settings)
    for measure in (
        show.few_rows,
        show.many_rows,
        show.call_overhead,
        show.rounding_errors,
        show.packed_bytes,
        show.recorded_activations,
        show.eight_bits,
    ):
        start = time.perf_counter()
        measure()
        show.seconds[measure.__name__] = time.perf_counter() - start
    screen.print(show_table(show.lines))
    check = show.pause_check
    if check:
        screen.print(
            f"\nA call takes {check['right_after']:.2f} times as long right after a call of torch, and "
            f"{check['after_pause']:.2f} times as long after the pause between sides."
        )
    return {"show": show.lines, "pause_check": check, "medians": show.medians, "seconds": show.seconds}


class _Show:
    """The lines so far, and the weights and contexts that several of them use."""

    def __init__(self, backend: CpuBackend, torch_peers: TorchPeers, settings: Settings) -> None:
        self.backend, self.peers, self.settings = backend, torch_peers, settings
        self.lines: list[dict[str, Any]] = []
        self.medians: dict[str, dict[str, float]] = {}
        self.seconds: dict[str, float] = {}
        self.pause_check: dict[str, float] | None = None
        self.model = TINY if settings.quick else MODELS["qwen3"]
        self.rows = 16 if settings.quick else 256
        isas = dispatch_report()["isas"]
        self.available = [isa["name"] for isa in isas if isa["available"]]
        self.why_not = {isa["name"]: isa["reason"] for isa in isas}
        self.k, self.n = self.model.projections["gate_up"]
        estimate = packed_bytes_estimate(self.k, self.n)
        experts = self.model.num_experts
        if not settings.quick:
            experts = experts_beyond_cache(estimate, experts)
        experts += -experts % EXPERTS_PER_CALL
        self.stack = build_stack(backend, experts, self.k, self.n, self.model.group_size)

    def few_rows(self) -> None:
        """Lines 1, 2, 7a: how much of the memory bandwidth a memory-bound product uses."""
        own, forced = self._context(), FORCED in self.available
        calls = {
            "1 row": gemm_call(self.stack, own, 1, EXPERTS_PER_CALL),
            "4 rows": gemm_call(self.stack, own, 4, EXPERTS_PER_CALL),
        }
        if forced:
            calls[f"1 row {FORCED}"] = gemm_call(self.stack, self._context(isa=FORCED), 1, EXPERTS_PER_CALL)
        read = read_side(self.settings.threads, self.settings.quick)
        figures = self._alternate(calls, read=read)
        bytes_read = self.stack.metadata.packed_bytes / self.stack.num_experts * EXPERTS_PER_CALL
        self.medians["read, GB/s"] = spread(np.divide(figures["read"], 1e9))._asdict()
        for name in calls:
            self.medians[f"{name}, GB/s"] = spread(np.divide(bytes_read / 1e9, figures[name]))._asdict()
        what = f"{EXPERTS_PER_CALL} experts × 1 row, {self.k}→{self.n}, int16"
        share = ratios(np.divide(bytes_read, figures["1 row"]), figures["read"])
        self._line("1", f"{what}: packed bytes/s ÷ read bandwidth", ">=", 0.85, share)
        self._line(
            "2", "the same, 4 rows each: time ÷ time with 1 row", "<=", 1.15, self._ratio(figures, "4 rows", "1 row")
        )
        what = f"ISA {FORCED}, 1 row: packed bytes/s ÷ read bandwidth"
        if forced:
            share = ratios(np.divide(bytes_read, figures[f"1 row {FORCED}"]), figures["read"])
            self._line("7a", what, ">=", 0.7, share)
        else:
            self._skip("7a", what, ">=", 0.7, self.why_not.get(FORCED, "not an ISA of this architecture"))

    def many_rows(self) -> None:
        """Lines 3 to 6, 7b: the arithmetic speed of compute-bound products and of a layer."""
        rows, model = self.rows, self.model
        own = self._context()
        calls = {"int16": gemm_call(self.stack, own, rows, 1)}
        calls["int8"] = gemm_call(self.stack, self._context("int8"), rows, 1)
        for name in self.peers.names:
            copies = min(self.stack.num_experts, DENSE_COPIES_BYTES // self.peers.weight_bytes(name, self.k, self.n))
            linears = self.peers.linears(name, copies, self.k, self.n, model.group_size)
            calls[name] = self.peers.gemm_call(linears, 1, rows, self.k)
        gate_up, down = (
            build_stack(self.backend, model.num_experts, k, n, model.group_size) for k, n in model.projections.values()
        )
        layer = MoeLayer(gate_up, down, top_k=model.top_k)
        calls["layer"] = layer_call(layer, own, routings(model.num_experts, model.top_k, rows))
        compared = [name for name in (FORCED, BASELINE) if name in self.available]
        if len(compared) == 2:
            calls |= {isa: gemm_call(self.stack, self._context(isa=isa), rows, 1) for isa in compared}
        if self.peers.names:
            # The peer's threads spin after a call; the timed call needs all CPUs at once.
            timer = CallTimer(gemm_call(self.stack, own, 1, EXPERTS_PER_CALL), self.settings.min_seconds)
            other = CallTimer(calls[self.peers.names[0]], self.settings.min_seconds)
            self.pause_check = pause_check(timer, other, self.settings.pause_seconds)

        figures = self._alternate(calls)
        gflop = gemm_flop(self.stack, rows, 1) / 1e9
        layer_gflop = layer_flop(layer, rows) / 1e9
        for name in calls:
            work = layer_gflop if name == "layer" else gflop
            self.medians[f"{name}, {rows} rows, GFLOP/s"] = spread(np.divide(work, figures[name]))._asdict()
        one = f"1 expert × {rows} rows, {self.k}→{self.n}"
        for number, name, bar, words in (
            ("3", "torch_bf16", 1.0, "dense bf16 linear"),
            ("4", "torch_int4", 2.5, "_weight_int4pack_mm_for_cpu, bf16"),
        ):
            what = f"{one}, int16: speed ÷ torch {words}"
            if name in calls:
                self._line(number, what, ">=", bar, self._ratio(figures, name, "int16"))
            else:
                self._skip(number, what, ">=", bar, self.peers.missing[name])
        self._line("5", "the same, int8: speed ÷ int16", ">=", 1.7, self._ratio(figures, "int16", "int8"))
        self._line(
            "6",
            f"MoE layer, {rows} tokens, top {model.top_k} of {model.num_experts}, {model.hidden}/{model.intermediate}: "
            f"GFLOP/s ÷ {one}",
            ">=",
            0.75,
            ratios(figures["int16"], figures["layer"], layer_gflop / gflop),
        )
        what = f"{one}, int16: ISA {FORCED} speed ÷ {BASELINE}"
        if len(compared) == 2:
            self._line("7b", what, ">=", 0.3, self._ratio(figures, BASELINE, FORCED))
        else:
            absent = next(isa for isa in (BASELINE, FORCED) if isa not in compared)
            self._skip("7b", what, ">=", 0.3, f"no {absent} here: {self.why_not.get(absent, 'another architecture')}")

    def call_overhead(self) -> None:
        """Lines 8, 8b: the cost of a call without its kernel, from a call that has almost nothing to compute."""
        tiny = build_stack(self.backend, EXPERTS_PER_CALL, 32, 8, 32)
        calls = {1: gemm_call(tiny, self._context(threads=1), 1, EXPERTS_PER_CALL)}
        threads = self.settings.threads
        calls[threads] = gemm_call(tiny, self._context(), 1, EXPERTS_PER_CALL)
        figures = self._alternate(calls)
        what = f"gemm_phase_batched, {EXPERTS_PER_CALL} dispatches × 1 row, 32→8: µs per call"
        self._line("8", f"{what}, 1 thread", "<=", 15.0, spread(np.multiply(figures[1], 1e6)))
        if threads > 1:
            self._line("8b", f"{what}, {threads} threads", None, None, spread(np.multiply(figures[threads], 1e6)))

    def rounding_errors(self) -> None:
        """Lines 9a, 9b: relative errors (Frobenius) on normal data, against float64 on the same quantised weights."""
        rng = np.random.default_rng(0)
        weight, dense = quantised_normal_weight(rng, self.k, self.n, self.model.group_size)
        builder = self.backend.new_stack_builder(1, self.k, self.n, group_size=self.model.group_size)
        builder.add(0, 0, weight)
        stack = builder.finish()
        x = rng.standard_normal((64, self.k), dtype=np.float32)
        expected = x.astype(np.float64) @ dense
        out = np.empty((64, self.n), np.float32)
        for number, dtype, bar in (("9a", "int16", 1e-4), ("9b", "int8", 2e-2)):
            stack.gemm_phase_batched(self._context(dtype), x, [(0, 0, 0, 64)], out, self.k)
            error = float(np.linalg.norm(out - expected) / np.linalg.norm(expected))
            self._line(number, f"relative error, normal data, K={self.k}, {dtype}", "<=", bar, exact(error))

    def packed_bytes(self) -> None:
        """Line 10: bytes in memory over bytes in the checkpoint."""
        model, packed, stored = self.model, 0, 0
        for name, (k, n) in model.projections.items():
            stack = build_stack(self.backend, 1, k, n, model.group_size)
            packed += stack.metadata.packed_bytes
            # A checkpoint stores gate and up as two weights.
            parts = 2 if name == "gate_up" else 1
            stored += parts * gptq_bytes(k, n // parts, model.group_size)
        sizes = f"{model.hidden}/{model.intermediate}, group {model.group_size}"
        what = f"packed bytes ÷ bytes in the checkpoint, expert of {sizes}"
        self._line("10", what, "<=", 1.05, exact(packed / stored))

    def recorded_activations(self) -> None:
        """Line 11: every layer's output on the built-in checkpoint, against the recorded output."""
        what = "recorded activations of the built-in checkpoint, worst layer, int16: relative error"
        context = self._context()
        try:
            with as_file(files("marlin_cy") / BUILT_IN) as folder, open_checkpoint(folder, self.backend) as checkpoint:
                recorded = RecordedActivations(folder / ACTIVATIONS_FILE)
                errors = {index: _layer_error(checkpoint, index, recorded, context) for index in checkpoint.moe_layers}
        except (CheckpointError, UnsupportedError) as error:
            self._skip("11", what, "<=", 2e-4, str(error))
            return
        worst = max(errors, key=lambda index: errors[index])
        self._line("11", f"{what} (layer {worst} of {len(errors)})", "<=", 2e-4, exact(errors[worst]))

    def eight_bits(self) -> None:
        """Lines 12, 13: weights with codes of 8 bits."""
        size, experts = self.model.group_size, max(EXPERTS_PER_CALL, self.stack.num_experts // 2)
        wide = build_stack(self.backend, experts, self.k, self.n, size, bits=8)
        calls = {"1 row": gemm_call(wide, self._context(), 1, EXPERTS_PER_CALL)}
        for dtype in ("int16", "int8"):
            for bits, stack in ((4, self.stack), (8, wide)):
                calls[f"{dtype}, {bits} bits"] = gemm_call(stack, self._context(dtype), self.rows, 1)
        figures = self._alternate(calls, read=read_side(self.settings.threads, self.settings.quick))
        bytes_read = wide.metadata.packed_bytes / wide.num_experts * EXPERTS_PER_CALL
        share = ratios(np.divide(bytes_read, figures["1 row"]), figures["read"])
        what = f"8-bit codes, {EXPERTS_PER_CALL} experts × 1 row, int16: packed bytes/s ÷ read bandwidth"
        self._line("12", what, ">=", 0.85, share)
        for number, dtype in (("13a", "int16"), ("13b", "int8")):
            ratio = self._ratio(figures, f"{dtype}, 8 bits", f"{dtype}, 4 bits")
            self._line(
                number, f"8-bit codes, 1 expert × {self.rows} rows, {dtype}: time ÷ 4-bit time", "<=", 2.1, ratio
            )

    def _context(self, compute_dtype: str = "int16", isa: str | None = None, threads: int | None = None) -> CpuContext:
        """A context with the settings' ISA and threads unless others are given."""
        return self.backend.new_context(
            num_threads=threads or self.settings.threads, compute_dtype=compute_dtype, isa=isa or self.settings.isa
        )

    def _alternate(self, calls: dict[Any, Call], **more: Callable[[], float]) -> dict[Any, list[float]]:
        settings = self.settings
        sides: dict[Any, Callable[[], float]] = dict(more)
        sides |= {name: CallTimer(call, settings.min_seconds) for name, call in calls.items()}
        return alternate(sides, settings.repeats, settings.pause_seconds)

    @staticmethod
    def _ratio(figures: dict[Any, list[float]], numerator: str, denominator: str) -> Spread:
        return ratios(figures[numerator], figures[denominator])

    def _line(self, number: str, what: str, comparison: str | None, bar: float | None, measured: Spread) -> None:
        self.lines.append(measured_line(number, what, comparison, bar, measured))

    def _skip(self, number: str, what: str, comparison: str, bar: float, reason: str) -> None:
        self.lines.append(skipped_line(number, what, comparison, bar, reason))


def _layer_error(checkpoint: Any, index: int, recorded: RecordedActivations, context: CpuContext) -> float:
    layer = checkpoint.moe_layer(index)
    fed = recorded.layer(index, layer.hidden_size, layer.num_experts)
    assert fed.moe_output is not None
    out = np.empty(fed.moe_output.shape, np.float32)
    layer(context, fed.hidden_states, fed.router_logits, out=out)
    expected = fed.moe_output.astype(np.float64)
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))
