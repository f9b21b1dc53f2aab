"""``python -m bench models``: loading, opening a packed folder, memory, and speed in transformers.

A checkpoint with Qwen3-30B-A3B's layer shapes and random weights is written to a temporary folder (1 GB, and 2 GB for
the packed folder). Each claim about whole models is printed with its bar. Needs Linux and, for ``memory`` and
``speed``, ``pip install 'marlin_cy[transformers]'``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.common.machine import describe
from bench.common.options import names, positive
from bench.common.processes import run_module
from bench.models.synthetic import write_qwen3_moe

__all__ = ["PARTS", "add_options", "measure", "run"]

PARTS = ("pack", "open", "memory", "speed")
OPEN_ROUNDS = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--only", type=names(PARTS), default=PARTS, metavar="A,B", help=f"default: {','.join(PARTS)}")
    parser.add_argument(
        "--layers",
        type=positive,
        default=2,
        help="layers of the model whose speed and memory are measured (default: 2)",
    )
    parser.add_argument(
        "--packed-layers", type=positive, default=6, help="layers of the packed folder, 0.33 GB each (default: 6)"
    )
    parser.add_argument("--prefill", type=positive, default=512, metavar="TOKENS", help="default: 512")
    parser.add_argument("--rounds", type=positive, default=7, help="default: 7")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints (default: a temporary folder)")
    parser.add_argument("--output", "--json", type=Path, metavar="FILE", help="save the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and save; returns the exit code."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        lines = list(measure(Path(folder).resolve(), arguments))
    if arguments.output:
        from marlin_cy.cpu import CpuBackend

        machine = describe(CpuBackend().new_context(), None)
        arguments.output.write_text(json.dumps({"machine": machine, "show": lines}, indent=1) + "\n")
    return 0


def measure(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each claim, printed when it is known: ``{"what", "measured", "bar", "unit", "passed"}``."""
    from bench.models.speed import packing_speed, speed

    model = folder / "model"
    nbytes = write_qwen3_moe(model, arguments.layers)
    if "pack" in arguments.only:
        rates = packing_speed(model, arguments.rounds)
        yield _line(
            "packing while a GPTQ checkpoint is loaded, bytes of qweight",
            statistics.median(rates) / 1e9,
            1,
            "GB/s",
            True,
        )
    if "memory" in arguments.only:
        figures = _child("memory", model)
        for key, bar in (("resident", 1.15), ("peak", 1.3)):
            yield _line(f"{key} memory of the loaded model / checkpoint", figures[key] / nbytes, bar, "", False)
    if "speed" in arguments.only:
        figures = speed(model, arguments.layers, arguments.prefill, arguments.rounds)
        yield _line("decode, tokens/s of a layer / bfloat16", figures["decode"], 3, "x", True, **figures["decode_us"])
        name = f"prefill of {arguments.prefill} tokens / bfloat16"
        yield _line(name, figures["prefill"], 1, "x", True, **figures["prefill_us"])
    if "open" in arguments.only:
        yield from _open(folder, arguments.packed_layers)


def _open(folder: Path, layers: int) -> Iterator[dict[str, Any]]:
    """The claims about opening a packed folder, with its files in the system's page cache and without."""
    source, packed = folder / "source", folder / "packed"
    write_qwen3_moe(source, layers)
    _run("marlin_cy", "pack", source, packed, folder=folder)
    size = sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    for cold in (False, True):
        seconds = []
        for _ in range(OPEN_ROUNDS):
            if cold:
                _drop_from_cache(packed)
            seconds.append(_child("open", packed)["seconds"])
        state = "not in the page cache" if cold else "in the page cache"
        name = f"opening a packed folder of {size / 1e9:.1f} GB, {state}, to the first result"
        yield _line(name, statistics.median(seconds), 0.5, "s", False)


def _line(what: str, measured: float, bar: float, unit: str, at_least: bool, **more: Any) -> dict[str, Any]:
    """Print a claim and return its JSON object."""
    passed = measured >= bar if at_least else measured <= bar
    relation = ">=" if at_least else "<="
    print(f"{what}: {measured:.3g} {unit} (bar {relation} {bar:g}: {'met' if passed else 'MISSED'}) {more or ''}")
    sys.stdout.flush()
    return {"what": what, "measured": measured, "bar": bar, "unit": unit, "passed": passed, **more}


def _child(what: str, folder: Path) -> dict[str, Any]:
    """The figures of a measurement in a process of its own."""
    figures: dict[str, Any] = json.loads(_run("bench.models.child", what, folder, folder=folder))
    return figures


def _run(module: str, *arguments: str | Path, folder: Path) -> str:
    """The stdout of a module that runs in a process of its own."""
    done = run_module(module, *arguments, folder=folder)
    if done.returncode:
        raise ValueError(f"python -m {module} {arguments[0]}: ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def _drop_from_cache(folder: Path) -> None:
    """Take a folder's files out of the system's page cache."""
    os.sync()
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
