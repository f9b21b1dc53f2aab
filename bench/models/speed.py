"""Speed of packing while loading, and of whole models in transformers."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common.timing import ratios

__all__ = ["Steps", "fastest_experts", "packing_speed", "speed"]

EXPERTS = ("eager", "batched_mm", "grouped_mm")  # implementations of experts in transformers that run on a CPU
CONTEXT = 64  # tokens in the cache while decoding
DECODED = 16  # tokens of a decoding round


def packing_speed(folder: Path, rounds: int) -> list[float]:
    """Bytes of qweight per second while a layer's experts are loaded from files in the system's page cache."""
    from marlin_cy import open_checkpoint

    rates = []
    with open_checkpoint(folder) as checkpoint:
        names = [name for name in checkpoint.tensor_names if ".layers.0.mlp.experts." in name and "qweight" in name]
        nbytes = sum(checkpoint.tensor_info(name).nbytes for name in names)
        for _ in range(rounds):
            begin = time.perf_counter()
            layer = checkpoint.moe_layer(0)
            rates.append(nbytes / (time.perf_counter() - begin))
            del layer
    return rates


def speed(folder: Path, layers: int, prefill: int, rounds: int) -> dict[str, Any]:
    """The time of transformers with bfloat16 weights over its time with this library's weights.

    The bfloat16 model uses whichever experts implementation is fastest in each phase.

    Returns
    -------
    dict
        ``decode`` and ``prefill`` (median ratios), ``decode_us`` and ``prefill_us`` (µs per layer of both sides, and
        the implementation).
    """
    import torch

    from marlin_cy.integrations.dequantized import dequantized_model
    from marlin_cy.integrations.transformers import load

    dense = dequantized_model(folder, torch.bfloat16)
    prompt = torch.randint(2, 1000, (1, prefill), generator=torch.Generator().manual_seed(0))
    steps = {"ours": Steps(load(folder), prompt), "bfloat16": Steps(dense, prompt)}
    fastest = {
        phase: fastest_experts(dense, getattr(steps["bfloat16"], phase), phase) for phase in ("prefill", "decode")
    }
    figures: dict[str, Any] = {}
    for phase in ("decode", "prefill"):
        dense.set_experts_implementation(fastest[phase])
        seconds: dict[str, list[float]] = {side: [] for side in steps}
        for round_number in range(rounds + 1):
            for side in sorted(steps, reverse=round_number % 2 == 1):
                seconds[side].append(getattr(steps[side], phase)())
        counted = {side: times[1:] for side, times in seconds.items()}  # the first round warms up
        figures[phase] = ratios(counted["bfloat16"], counted["ours"]).median
        figures[f"{phase}_us"] = {
            f"{side}_us_a_layer": round(statistics.median(times) / layers * 1e6) for side, times in counted.items()
        } | {"bfloat16_experts": fastest[phase]}
    return figures


def fastest_experts(model: Any, run: Callable[[], float], phase: str) -> str:
    """The implementation of experts that makes ``run`` of a model of transformers fastest.

    Parameters
    ----------
    model : a model of transformers
        Its implementation is left at any of them.
    run : callable
        Runs the model; returns seconds.
    phase : str
        What ``run`` is, for messages.
    """
    seconds: dict[str, float] = {}
    for name in EXPERTS:
        model.set_experts_implementation(name)
        try:
            run()
            seconds[name] = min(run() for _ in range(2))
        except RuntimeError as error:  # batched_mm copies the experts of each token: 26 GB for 512 tokens
            print(f"{name} cannot do the {phase}: {str(error).splitlines()[0][-90:]}", file=sys.stderr)
    return min(seconds, key=lambda name: seconds[name])


class Steps:
    """Seconds of the phases of a model.

    Parameters
    ----------
    model : a model of transformers
    prompt : torch.Tensor
        Token ids, int64 ``[1, T]``.
    """

    def __init__(self, model: Any, prompt: Any) -> None:
        import torch

        self._torch, self._model, self._prompt = torch, model, prompt

    def prefill(self) -> float:
        """Seconds of the whole prompt."""
        with self._torch.no_grad():
            begin = time.perf_counter()
            self._model(self._prompt, use_cache=True)
            return time.perf_counter() - begin

    def decode(self, tokens: int = DECODED) -> float:
        """Seconds of one token after a context of 64: the median of some."""
        with self._torch.no_grad():
            cache = self._model(self._prompt[:, :CONTEXT], use_cache=True).past_key_values
            seconds = []
            for token in range(tokens):
                begin = time.perf_counter()
                self._model(self._prompt[:, token : token + 1], past_key_values=cache, use_cache=True)
                seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)
