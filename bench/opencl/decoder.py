"""``python -m bench opencl decoder``: whole models by OpenCL launches, in µs a layer, with random weights.

A figure is the median time of a step, what the host does and the tokens read back included, divided by the number of
layers. Single tokens and several sequences are texts: each step has the tokens that the step before chose. Their
figure is the median of runs of 64 steps. The embedding and the head, of 1024 tokens, count as part of the layers.
Depths are not computed: a sequence of a depth has that many positions of zeros in the cache, which takes the same time.
With ``--profile`` the time of each kernel on the device follows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.common.options import add_output, add_quick, positive, values
from bench.common.results import save

if TYPE_CHECKING:
    from rich.console import Console

    from marlin_cy.decoder.model import Model
    from marlin_cy.decoder.program import Batch
    from marlin_cy.opencl.decoder.program import OpenClDecoder

__all__ = ["add_options", "run"]

CONTEXT = 40960
DEPTHS, PROMPTS, SEQUENCES = (0, 4096, 32768), (512, 4096), (4, 16, 32)
WARM_RUNS = 3
TEXT_STEPS, QUICK_TEXT_STEPS = 64, 4
"""Steps of a run of text."""
QUICK_SIZES = {
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--device", metavar="NAME", help="as MARLIN_CY_OPENCL_DEVICE")
    parser.add_argument("--tier", metavar="NAME", help="mma, subgroup or portable; default: the device's best one")
    parser.add_argument("--layers", type=positive, default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FOLDER", help="a model to measure instead of random weights"
    )
    parser.add_argument("--depths", type=values(int), default=DEPTHS, metavar="A,B", help="of single tokens")
    parser.add_argument("--prompts", type=values(positive), default=PROMPTS, metavar="A,B", help="tokens of prompts")
    parser.add_argument("--sequences", type=values(positive), default=SEQUENCES, metavar="A,B", help="at once")
    parser.add_argument(
        "--repeat", type=positive, default=24, metavar="N", help="runs of a case; texts, prompts: a sixth"
    )
    parser.add_argument("--profile", action="store_true", help="also print the time of each kernel")
    add_output(parser)
    add_quick(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and save; returns the exit code."""
    from bench.models.synthetic import QWEN3_30B_A3B, write_qwen3_moe
    from bench.opencl.machine import document_of
    from marlin_cy import get_backend
    from marlin_cy.commands.output import console
    from marlin_cy.decoder.load import load_model

    screen = console()
    options = {name: getattr(arguments, name) for name in ("device", "tier") if getattr(arguments, name) is not None}
    backend: Any = get_backend("opencl", **options)
    if arguments.quick:
        arguments.layers, arguments.repeat = 2, 6
        arguments.depths, arguments.prompts, arguments.sequences = (0, 64), (20,), (4,)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            checkpoint = Path(folder) / "model"
            write_qwen3_moe(checkpoint, arguments.layers, QUICK_SIZES if arguments.quick else QWEN3_30B_A3B)
        begin = time.perf_counter()
        context = 256 if arguments.quick else CONTEXT
        model = load_model(
            checkpoint, backend, context_length=context, cache_tokens=2 * context, profiling=arguments.profile
        )
        loaded = time.perf_counter() - begin
        bench = DecoderBench(model, arguments.repeat, QUICK_TEXT_STEPS if arguments.quick else TEXT_STEPS)
        document = document_of("opencl-decoder", {backend.tier.name: backend}, screen)
        document |= {"load_seconds": loaded, "layers": len(model.plan.layers), "cache_bytes": model.cache_bytes}
        document["launches"] = bench.launches()
        document["us_a_layer"] = bench.all_cases(arguments, screen)
        if arguments.profile:
            document["kernels_us_a_layer"] = bench.kernels(arguments, screen)
    print(f"\nSaved to {save(document, arguments.output)}")
    return 0


class DecoderBench:
    """Steps of a model.

    Parameters
    ----------
    model : Model
        On the OpenCL backend.
    repeat : int
        Runs of a case that count; of texts and long prompts, a sixth.
    text_steps : int
        Steps of a run of text.
    """

    def __init__(self, model: Model, repeat: int, text_steps: int) -> None:
        from marlin_cy.decoder.program import PAGE_TOKENS

        self._model, self._repeat, self._text_steps = model, repeat, text_steps
        self._program: OpenClDecoder = model._program  # type: ignore[assignment]
        self._layers = len(model.plan.layers)
        self._rng = np.random.default_rng(0)
        self._program.provide_pages(model.free_tokens // PAGE_TOKENS)  # steps here name pages themselves

    def launches(self) -> float:
        """Launches of a layer at one token, that which joins splits included."""
        return (len(self._program.launches(1)) - 1) / self._layers

    def all_cases(self, arguments: argparse.Namespace, screen: Console) -> dict[str, float]:
        """µs a layer of each case."""
        screen.print(f"{self.launches():.1f} launches a layer at one token; µs a layer:")
        found: dict[str, float] = {}
        for name, batches, steps, greedy in self._cases(arguments):
            found[name] = self._time(batches, steps, greedy)
            screen.print(f"  {name:30} {found[name]:10.1f}")
        return found

    def kernels(self, arguments: argparse.Namespace, screen: Console) -> dict[str, dict[str, float]]:
        """µs a layer of each kernel, by case. The context was made with profiling."""
        found: dict[str, dict[str, float]] = {}
        for name, batches, _, greedy in self._cases(arguments):
            self._run_all(batches, 1, greedy)
            with self._model.context.profile() as events:  # type: ignore[attr-defined]
                self._run_all(batches, 1, greedy)
            sums: dict[str, float] = defaultdict(float)
            for label, event in events:
                event.wait()
                sums[label] += (event.profile.end - event.profile.start) / 1e3 / self._layers
            found[name] = dict(sums)
            screen.print(f"{name}: {sum(sums.values()):.1f} µs a layer in kernels")
            for label, each in sorted(sums.items(), key=lambda item: -item[1]):
                screen.print(f"  {label:30} {each:10.1f}")
        return found

    def _cases(self, arguments: argparse.Namespace) -> Iterable[tuple[str, list[Batch], int, bool]]:
        """Of each case: its name, its batches, the steps of text after each, and whether the device chooses tokens."""
        for depth in arguments.depths:
            yield f"1 token, depth {depth}", [self._batch(1, 1, depth)], self._text_steps, True
        yield "1 token, logits read", [self._batch(1, 1, 0)], 1, False
        for count in arguments.sequences:
            yield f"{count} sequences", [self._batch(count, 1, 0)], self._text_steps, True
        for prompt in arguments.prompts:
            steps = [self._batch(1, min(1024, prompt - begin), begin) for begin in range(0, prompt, 1024)]
            yield f"prompt of {prompt}", steps, 1, True

    def _batch(self, sequences: int, tokens: int, depth: int) -> Batch:
        """A step of sequences that have ``depth`` positions each; only the last token's logits are wanted."""
        from marlin_cy.decoder.cache import pages_of
        from marlin_cy.decoder.program import Batch

        pages = pages_of(depth + tokens + self._text_steps)
        first = np.arange(sequences) * tokens
        segments = np.stack([first, np.full(sequences, tokens), np.full(sequences, depth), first * 0 - 1], axis=1)
        return Batch(
            self._rng.integers(0, self._model.vocab_size, sequences * tokens).astype(np.int32),
            segments.astype(np.int64),
            np.arange(sequences * pages, dtype=np.int32).reshape(sequences, pages),
            (first + tokens - 1).astype(np.int32),
        )

    def _time(self, batches: list[Batch], steps: int, greedy: bool) -> float:
        """The median µs a layer of a case; of a text, those of a step."""
        repeat = max(3, self._repeat // (6 if len(batches) > 1 or steps > 1 else 1))
        seconds = []
        for number in range(WARM_RUNS + repeat):
            begin = time.perf_counter()
            self._run_all(batches, steps, greedy)
            if number >= WARM_RUNS:
                seconds.append((time.perf_counter() - begin) / steps)
        return statistics.median(seconds) * 1e6 / self._layers

    def _run_all(self, batches: list[Batch], steps: int, greedy: bool) -> None:
        for batch in batches:
            self._run(batch, steps, greedy)

    def _run(self, batch: Batch, steps: int, greedy: bool) -> None:
        """Run a batch, and then the steps of the text that follows."""
        if not greedy:
            self._program.step(batch)
            return
        tokens = self._program.greedy_step(batch)
        segments = batch.segments.copy()
        for _ in range(steps - 1):
            segments[:, 2] += 1
            tokens = self._program.greedy_step(replace(batch, tokens=tokens, segments=segments))
