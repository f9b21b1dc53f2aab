"""A model in a process of its own, served and alone, for ``python -m bench serve``.

Requests and replies are those of :func:`bench.common.processes.serve`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from bench.common.processes import serve

__all__ = ["ServeWorker"]


class ServeWorker:
    """Answers the requests. The model may be used alone while no client waits for an answer."""

    def __init__(self) -> None:
        self._model: Any = None
        self._service: Any = None

    def describe(self) -> dict[str, Any]:
        """The library's version."""
        import marlin_cy

        return {"version": marlin_cy.__version__}

    def load(
        self,
        folder: str | None,
        compute_dtype: str,
        threads: int,
        context_length: int,
        cache_tokens: int,
        max_sequences: int,
    ) -> dict[str, Any]:
        """Load a folder, or the built-in model if it is None, and serve it; the port."""
        from marlin_cy import load_model
        from marlin_cy.commands.options import BUILT_IN
        from marlin_cy.serve.server import Server, listen, open_socket
        from marlin_cy.serve.service import Service

        self._model = load_model(
            str(files("marlin_cy") / BUILT_IN) if folder is None else folder,
            context_length=context_length,
            cache_tokens=cache_tokens,
            num_threads=threads,
            compute_dtype=compute_dtype,
        )
        self._service = Service(self._model, "model", max_sequences=max_sequences, max_waiting=1024)
        bound = open_socket("127.0.0.1", 0)
        listen(bound)
        threading.Thread(target=Server(self._service).serve_on, args=(bound,), daemon=True).start()
        return {"port": bound.getsockname()[1]}

    def alone(self, prompts: Sequence[Sequence[int]], tokens: int, sequences: int) -> dict[str, Any]:
        """Seconds in which so many tokens follow each prompt, so many sequences at a time, by ``forward_batch``."""
        self._free_kept()
        model = self._model
        start = time.perf_counter()
        for begin in range(0, len(prompts), sequences):
            running = [model.new_sequence() for _ in prompts[begin : begin + sequences]]
            rows = model.forward_batch(list(zip(running, prompts[begin : begin + sequences], strict=True)))
            for _ in range(tokens - 1):
                steps = [(sequence, [int(row.argmax())]) for sequence, row in zip(running, rows, strict=True)]
                rows = model.forward_batch(steps)
            for sequence in running:
                model.free(sequence)
        return {"seconds": time.perf_counter() - start}

    def generate(self, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        """Seconds of ``generate``."""
        from marlin_cy.decoder.generate import new_writer, pieces_of, tokenizer_of
        from marlin_cy.decoder.sampling import SamplingParams

        self._free_kept()
        start = time.perf_counter()
        writer = new_writer(
            self._model, tokenizer_of(self._model), list(prompt), SamplingParams(), tokens, continues=True, stops=False
        )
        sequence = self._model.new_sequence()
        for _ in pieces_of(self._model, sequence, prompt, writer, None):
            pass
        self._model.free(sequence)
        return {"seconds": time.perf_counter() - start}

    def _free_kept(self) -> None:
        """Free the sequences that the server keeps. It is idle, so that its own thread does not run."""
        self._service.engine.scheduler.close()


if __name__ == "__main__":
    worker = ServeWorker()
    serve(worker.describe, {name: getattr(worker, name) for name in ("load", "alone", "generate")})
