"""From the start of ``marlin-cy generate`` to its first token, and the memory of ``marlin-cy bench``."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from bench.common.processes import module_command, module_environment, run_module

__all__ = ["first_token_seconds", "memory_share", "write_tokenizer"]

PROMPT = "def"


def first_token_seconds(folder: Path | None, threads: int) -> float:
    """Seconds from the start of the command to the first byte that it writes; None: the built-in model.

    Raises
    ------
    ValueError
        The command failed.
    """
    checkpoint = [] if folder is None else [folder.resolve()]
    options = ["--engine", "decoder", "--prompt", PROMPT, "--max-new-tokens", "1", "--threads", str(threads)]
    command = module_command("marlin_cy", "generate", *checkpoint, *options)
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        with subprocess.Popen(
            command, cwd=empty, env=module_environment(), stdout=subprocess.PIPE, stderr=errors
        ) as process:
            assert process.stdout is not None
            first = process.stdout.read(1)
            seconds = time.perf_counter() - start
            process.stdout.read()
        if process.returncode or not first:
            errors.seek(0)
            raise ValueError(f"marlin-cy generate: ended with {process.returncode}: {errors.read().strip()}")
    return seconds


def memory_share(folder: Path, threads: int, prompt_tokens: int) -> dict[str, Any]:
    """What ``marlin-cy bench`` takes with a full cache: ``resident_bytes``, and the bytes that it consists of.

    Returns
    -------
    dict
        ``share``: resident bytes over those of packed weights, other weights and cache; and these four figures.

    Raises
    ------
    ValueError
        The command failed.
    """
    options = ["--prompt-tokens", prompt_tokens, "--new-tokens", 0, "--repeat", 1, "--threads", threads, "--json"]
    with tempfile.TemporaryDirectory() as empty:
        done = run_module("marlin_cy", "bench", folder.resolve(), *map(str, options), folder=empty)
    if done.returncode:
        raise ValueError(f"marlin-cy bench: ended with {done.returncode}: {done.stderr.strip()}")
    report = json.loads(done.stdout)
    figures = {name: report[name] for name in ("resident_bytes", "packed_bytes", "other_weight_bytes", "cache_bytes")}
    needed = sum(nbytes for name, nbytes in figures.items() if name != "resident_bytes")
    return {"share": figures["resident_bytes"] / needed, **figures}


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write the built-in model's tokenizer for a larger vocabulary: each added token is a text like ``<300>``."""
    from marlin_cy.commands.run import BUILT_IN

    tokenizer = json.loads((files("marlin_cy") / BUILT_IN / "tokenizer.json").read_text("utf-8"))
    known = tokenizer["model"]["vocab"]
    known.update({f"<{token}>": token for token in range(len(known), vocab_size)})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
