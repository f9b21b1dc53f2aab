"""This library's decoder in a process of its own, for ``python -m bench decoder``.

Requests and replies are those of :func:`bench.common.processes.serve`.

A run begins with a cache that holds ``depth`` tokens of each sequence, and its seconds are those of the tokens after
them. Tokens are random.
"""

from __future__ import annotations

import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.common.processes import serve
from bench.cpu.calls import read_side
from bench.models.head import HeadStep
from marlin_cy.decoder.options import CACHE_DTYPE

if TYPE_CHECKING:
    from marlin_cy.decoder.cache import Sequence
    from marlin_cy.decoder.model import Model

__all__ = ["DecoderWorker"]


class DecoderWorker:
    """Answers the requests. A folder's weights are loaded once for all compute dtypes."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._filled: dict[str, tuple[tuple[int, int], list[Sequence]]] = {}
        self._heads: dict[str, HeadStep] = {}
        self._rng = np.random.default_rng(0)

    def describe(self) -> dict[str, Any]:
        """The library's version."""
        import marlin_cy

        return {"version": marlin_cy.__version__, "folder": str(Path(marlin_cy.__file__).parent)}

    def load(
        self, folder: str | None, compute_dtypes: list[str], threads: int | None, cache_tokens: int
    ) -> dict[str, Any]:
        """Load a folder in place of the last one; None: the built-in model."""
        from marlin_cy.commands.run import BUILT_IN

        self._models, self._filled = {}, {}
        if folder is not None:
            return self._load(Path(folder), compute_dtypes, threads, cache_tokens)
        with as_file(files("marlin_cy") / BUILT_IN) as built_in:
            return self._load(built_in, compute_dtypes, threads, cache_tokens)

    def _load(self, folder: Path, compute_dtypes: list[str], threads: int | None, cache_tokens: int) -> dict[str, Any]:
        from marlin_cy import get_backend, open_checkpoint
        from marlin_cy.decoder.build import build_plan, read_config
        from marlin_cy.decoder.model import Model

        backend = get_backend("cpu")
        checkpoint = open_checkpoint(folder, backend)
        config = read_config(checkpoint)
        plan = build_plan(checkpoint, config)
        for dtype in compute_dtypes:
            context = backend.new_context(num_threads=threads, compute_dtype=dtype)
            self._models[dtype] = Model(checkpoint, config, plan, context, cache_tokens, CACHE_DTYPE)
        return {"layers": len(plan.layers), "context_length": plan.context_length, "vocab_size": plan.vocab_size}

    def decode(self, compute_dtype: str, depth: int, sequences: int, tokens: int) -> dict[str, Any]:
        """Seconds in which ``tokens`` tokens are appended to each sequence, one at a time."""
        model = self._models[compute_dtype]
        steps = self._tokens(model, tokens, sequences)[:, :, None]
        running = self._sequences(compute_dtype, depth, sequences)
        start = time.perf_counter()
        for step in steps:
            model.forward_batch(list(zip(running, step, strict=True)))
        return self._end(model, running, time.perf_counter() - start)

    def prefill(self, compute_dtype: str, depth: int, sequences: int, tokens: int) -> dict[str, Any]:
        """Seconds in which ``tokens`` tokens are appended to each sequence at once."""
        model = self._models[compute_dtype]
        prompts = self._tokens(model, sequences, tokens)
        running = self._sequences(compute_dtype, depth, sequences)
        start = time.perf_counter()
        model.forward_batch(list(zip(running, prompts, strict=True)))
        return self._end(model, running, time.perf_counter() - start)

    def kernels(self, compute_dtype: str, tokens: int) -> dict[str, Any]:
        """Seconds of the products alone, for ``tokens`` tokens one at a time.

        Of each layer: the projections q, k, v and o, and the experts with their routing, called one after another.
        Routers, norms and attention are excluded.
        """
        from marlin_cy import Linear
        from marlin_cy.decoder.plan import AttentionPlan, MoeFfnPlan

        model = self._models[compute_dtype]
        calls = []
        for number, layer in enumerate(model.plan.layers):
            mixer, ffn = layer.mixer, layer.ffn
            if not isinstance(mixer, AttentionPlan) or not isinstance(ffn, MoeFfnPlan):
                raise ValueError(f"kernels: layer {number} has no grouped-query attention, or no experts")
            projections = []
            for linear in (mixer.q, mixer.k, mixer.v, mixer.o):
                if not isinstance(linear, Linear):
                    raise ValueError(f"kernels: layer {number} has a projection that is not quantised")
                projections.append((linear, self._row(linear.in_features), self._row(linear.out_features)))
            experts = ffn.layer
            logits = self._rng.standard_normal((tokens, 1, experts.num_experts), np.float32)
            calls.append((projections, experts, self._row(experts.hidden_size), logits, self._row(experts.hidden_size)))
        context = model.context
        start = time.perf_counter()
        for token in range(tokens):
            for projections, experts, x, logits, out in calls:
                for linear, row, result in projections:
                    linear.forward(context, row, result, 1)
                experts(context, x, logits[token], out=out)
        return {"seconds": time.perf_counter() - start}

    def read(self, threads: int, quick: bool) -> dict[str, Any]:
        """The machine's read bandwidth, in bytes per second."""
        return {"bytes_per_second": read_side(threads, quick)()}

    def head(
        self, file: str, vocab_size: int, hidden_size: int, threads: int | None, isa: str | None
    ) -> dict[str, Any]:
        """Seconds of the head for one row; ``file`` holds its weights in bfloat16. Loaded once for each ISA."""
        key = str(isa)
        if key not in self._heads:
            self._heads[key] = HeadStep(Path(file), vocab_size, hidden_size, threads, isa)
        return {"seconds": self._heads[key].seconds()}

    def _row(self, width: int) -> Any:
        return self._rng.standard_normal((1, width), np.float32)

    def _tokens(self, model: Model, rows: int, columns: int) -> Any:
        return self._rng.integers(0, model.vocab_size, (rows, columns))

    def _sequences(self, compute_dtype: str, depth: int, count: int) -> list[Sequence]:
        """Sequences of ``depth`` tokens. They are forks of sequences that are filled once and kept for the next run."""
        model = self._models[compute_dtype]
        key, filled = self._filled.get(compute_dtype, ((0, 0), []))
        if key != (depth, count):
            for sequence in filled:
                model.free(sequence)
            self._filled.pop(compute_dtype, None)
            filled = []
        if depth == 0:
            return [model.new_sequence() for _ in range(count)]
        if not filled:
            filled = [model.new_sequence() for _ in range(count)]
            model.forward_batch(list(zip(filled, self._tokens(model, count, depth), strict=True)))
            self._filled[compute_dtype] = (depth, count), filled
        return [model.fork(sequence) for sequence in filled]

    @staticmethod
    def _end(model: Model, sequences: list[Sequence], seconds: float) -> dict[str, Any]:
        for sequence in sequences:
            model.free(sequence)
        return {"seconds": seconds}


if __name__ == "__main__":
    worker = DecoderWorker()
    names = ("load", "decode", "prefill", "kernels", "read", "head")
    serve(worker.describe, {name: getattr(worker, name) for name in names})
