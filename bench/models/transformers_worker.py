"""A model of transformers with bfloat16 weights, in a process of its own, for ``python -m bench decoder``.

The requests are those of ``decoder_worker.py``. The model has the checkpoint's weights, dequantised, and the
implementation of experts that is fastest in each phase.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench.common.processes import serve
from bench.models.speed import fastest_experts

__all__ = ["TransformersWorker"]


class TransformersWorker:
    """Answers the requests."""

    def __init__(self) -> None:
        self._model: Any = None
        self._fastest: dict[tuple[str, int], str] = {}
        self._filled: tuple[tuple[int, int], Any] | None = None

    def describe(self) -> dict[str, Any]:
        """The libraries' versions."""
        import torch
        import transformers

        self._torch = torch
        self._generator = torch.Generator().manual_seed(0)
        return {"version": f"{transformers.__version__}, torch {torch.__version__}"}

    def load(self, folder: str, threads: int | None) -> dict[str, Any]:
        """Load a folder."""
        from marlin_cy.integrations.dequantized import dequantized_model

        if threads is not None:
            self._torch.set_num_threads(threads)
        self._model = dequantized_model(Path(folder), self._torch.bfloat16)
        return {"layers": self._model.config.num_hidden_layers}

    def decode(self, depth: int, sequences: int, tokens: int) -> dict[str, Any]:
        """Seconds in which ``tokens`` tokens are appended to each sequence, one at a time."""
        return self._run("decode", depth, sequences, tokens, 1)

    def prefill(self, depth: int, sequences: int, tokens: int) -> dict[str, Any]:
        """Seconds in which ``tokens`` tokens are appended to each sequence at once."""
        return self._run("prefill", depth, sequences, 1, tokens)

    def _run(self, phase: str, depth: int, sequences: int, steps: int, tokens: int) -> dict[str, Any]:
        key = phase, sequences * tokens
        if key not in self._fastest:
            run = lambda: self._seconds(depth, sequences, 1, tokens)  # noqa: E731
            self._fastest[key] = fastest_experts(self._model, run, phase)
        self._model.set_experts_implementation(self._fastest[key])
        return {"seconds": self._seconds(depth, sequences, steps, tokens), "experts": self._fastest[key]}

    def _seconds(self, depth: int, sequences: int, steps: int, tokens: int) -> float:
        cache = self._cache(depth, sequences)
        vocab = self._model.config.vocab_size
        rows = self._torch.randint(0, vocab, (steps, sequences, tokens), generator=self._generator)
        try:
            with self._torch.no_grad():
                start = time.perf_counter()
                for row in rows:
                    # Only the last token's logits are wanted, as in this library's run.
                    cache = self._model(row, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
                return time.perf_counter() - start
        except RuntimeError:  # some layers' caches may be longer than others'
            self._filled = None
            raise
        finally:
            if depth and self._filled is not None:
                cache.crop(-steps * tokens)

    def _cache(self, depth: int, sequences: int) -> Any:
        """A cache that holds ``depth`` tokens of each sequence; None for none. Runs crop it to this length."""
        if depth == 0:
            return None
        key = depth, sequences
        if self._filled is None or self._filled[0] != key:
            vocab = self._model.config.vocab_size
            tokens = self._torch.randint(0, vocab, (sequences, depth), generator=self._generator)
            with self._torch.no_grad():
                cache = self._model(tokens, use_cache=True, logits_to_keep=1).past_key_values
            self._filled = key, cache
        return self._filled[1]


if __name__ == "__main__":
    worker = TransformersWorker()
    serve(worker.describe, {name: getattr(worker, name) for name in ("load", "decode", "prefill")})
