"""``python -m bench decoder``: whole models by this library's decoder, by llama.cpp, and by transformers.

All models have Qwen3-30B-A3B's layer shapes and random weights. The sides of a case take turns, each in a process of
its own. Each claim about the decoder's speed is printed with its bar.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.common.machine import available_memory
from bench.common.options import (
    COMPUTE_DTYPES,
    add_cpus,
    add_quick,
    names,
    positive,
    restrict_cpus,
    set_defaults,
    values,
)
from bench.models.claims import run_claims
from bench.models.synthetic import QWEN3_30B_A3B, TINY, num_weights, write_qwen3_moe

if TYPE_CHECKING:
    from bench.models.decoder_cases import Measurement, Settings
    from bench.models.llama import LlamaBatchedBench, LlamaBench

__all__ = ["PARTS", "add_options", "run"]

SCHEMA_VERSION = 1
PARTS = ("decode", "prefill", "sequences", "head", "built-in", "start", "memory")
DEFAULTS: Mapping[str, Any] = {
    "layers": 8,
    "rounds": 5,
    "tokens": 64,
    "depths": (0, 4096),
    "prompts": (512, 4096),
    "sequences": (4, 16),
    "head": (151936, 2048),
    "pause_ms": 200.0,
}
QUICK: Mapping[str, Any] = {
    "layers": 2,
    "rounds": 1,
    "tokens": 2,
    "depths": (0, 20),
    "prompts": (24,),
    "sequences": (2,),
    "head": (1024, 128),
    "pause_ms": 1.0,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""

    def option(name: str, kind: Any, metavar: str, words: str) -> None:
        default = DEFAULTS[name.replace("-", "_")]
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else f"{default:g}"
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=f"{words} (default: {shown})")

    parser.add_argument("--only", type=names(PARTS), default=PARTS, metavar="A,B", help=f"default: {','.join(PARTS)}")
    parser.add_argument("--llama-bench", type=Path, metavar="PATH", help="llama.cpp's program of this name")
    parser.add_argument("--llama-batched-bench", type=Path, metavar="PATH", help="llama.cpp's program of this name")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="model of llama.cpp, see `python -m bench gguf`")
    parser.add_argument(
        "--folder",
        type=Path,
        help="a checkpoint of that shape, written if it does not exist (default: temporary), or the file of --gguf",
    )
    option("layers", positive, "N", "layers of a checkpoint that is written, 0.34 GB each")
    parser.add_argument("--compute-dtypes", type=names(COMPUTE_DTYPES), default=COMPUTE_DTYPES, metavar="A,B")
    option("tokens", positive, "N", "tokens that a run decodes")
    option("depths", values(depth), "A,B", "tokens in the cache when decoding begins")
    option("prompts", values(positive), "A,B", "tokens of a prompt")
    option("sequences", values(positive), "A,B", "sequences that are decoded together")
    option("rounds", positive, "N", "rounds that count")
    option("pause-ms", float, "MS", "sleep before a run")
    parser.add_argument("--no-torch", action="store_true", help="do not measure transformers")
    add_cpus(parser)
    parser.add_argument("--output", "--json", type=Path, metavar="FILE", help="default: a new file in bench/results/")
    add_quick(parser)


def depth(text: str) -> int:
    """A number of tokens in the cache."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 0")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and save; returns the exit code."""
    for name in ("llama_bench", "llama_batched_bench"):
        if getattr(arguments, name) and not arguments.gguf:
            raise ValueError(f"--{name.replace('_', '-')}: needs --gguf, a model for llama.cpp; python -m bench gguf")
    set_defaults(arguments, DEFAULTS, QUICK)
    restrict_cpus(arguments)
    # These load OpenMP runtimes, which must see the CPUs that were chosen.
    from bench.report.decoder_bars import judge
    from bench.report.decoder_tables import print_decoder

    timing = {name: getattr(arguments, name) for name in ("rounds", "tokens", "pause_ms", "quick")}
    return run_claims("decoder", SCHEMA_VERSION, arguments, timing, partial(measure, arguments), judge, print_decoder)


def measure(arguments: argparse.Namespace, temporary: Path, threads: int) -> dict[str, Any]:
    """The measured part of the document."""
    from bench.models.decoder_cases import Measurement, Settings, pack, start_ours
    from marlin_cy.checkpoints.gguf.documents import read_document

    folder = (arguments.folder or temporary / "model").resolve()
    if not read_document(folder, "config.json"):
        context = max(4096, *(one + arguments.tokens for one in arguments.depths), *arguments.prompts)
        sizes = TINY if arguments.quick else QWEN3_30B_A3B
        write_qwen3_moe(folder, arguments.layers, sizes, max_position_embeddings=context)
    config = read_document(folder, "config.json")
    settings = Settings(
        folder=folder,
        num_weights=num_weights(config),
        threads=threads,
        pause_seconds=arguments.pause_ms * 1e-3,
        **{name: getattr(arguments, name) for name in ("compute_dtypes", "rounds", "tokens", "depths", "prompts")},
        **{name: getattr(arguments, name) for name in ("sequences", "head", "quick")},
    )
    llama, batched, missing = _llama(arguments, threads)
    ours = start_ours()
    measurement = Measurement(settings, ours, None, llama, batched, missing)
    try:
        _measure_models(measurement, settings, arguments)
        if "head" in arguments.only:
            measurement.head(_isas())
        if "built-in" in arguments.only:
            measurement.built_in()
    finally:
        ours.close()
    if {"start", "memory"} & set(arguments.only):
        packed = temporary / "packed"
        pack(folder, packed)
        if "start" in arguments.only:
            measurement.start(packed, config["vocab_size"])
        if "memory" in arguments.only:
            measurement.memory(packed)
    return {
        "model": {"layers": config["num_hidden_layers"], **{name: config[name] for name in QWEN3_30B_A3B}},
        "sides": {
            "marlin_cy": ours.described["version"],
            "llama.cpp": llama.described.get("version") if llama else None,
            "transformers": measurement.transformers.described["version"] if measurement.transformers else None,
        },
        "cases": measurement.cases,
        "figures": measurement.figures,
    }


def _measure_models(measurement: Measurement, settings: Settings, arguments: argparse.Namespace) -> None:
    """Runs of whole models, if some are asked for."""
    from bench.models.decoder_cases import start_transformers

    parts = [part for part in ("decode", "prefill", "sequences") if part in arguments.only]
    if not parts:
        return
    measurement.load()
    needed = 2 * settings.num_weights
    if arguments.no_torch:
        measurement.missing["transformers"] = "left out"
    elif needed > available_memory():
        measurement.missing["transformers"] = f"its weights need {needed / 1e9:.1f} GB, which are not free"
    else:
        try:
            measurement.transformers = start_transformers(settings.folder, settings.threads)
        except ValueError as error:
            measurement.missing["transformers"] = str(error)
    try:
        for part in parts:
            getattr(measurement, part)()
    finally:
        if measurement.transformers is not None:
            measurement.transformers.close()


def _llama(
    arguments: argparse.Namespace, threads: int
) -> tuple[LlamaBench | None, LlamaBatchedBench | None, dict[str, str]]:
    """llama.cpp's programs, and the reason for each that is missing."""
    from bench.models.llama import LlamaBatchedBench, LlamaBench

    missing: dict[str, str] = {}
    llama = batched = None
    if arguments.llama_bench:
        llama = LlamaBench(arguments.llama_bench, arguments.gguf, threads)
    else:
        missing["llama"] = "no --llama-bench"
    if arguments.llama_batched_bench:
        batched = LlamaBatchedBench(arguments.llama_batched_bench, arguments.gguf, threads)
    else:
        missing["batched"] = "no --llama-batched-bench"
    return llama, batched, missing


def _isas() -> dict[str, str | None]:
    """By ISA: the reason for its absence here, or None."""
    from marlin_cy.cpu import dispatch_report

    return {isa["name"]: None if isa["available"] else isa["reason"] for isa in dispatch_report()["isas"]}
