"""llama.cpp's own benchmarks as child processes, one run at a time."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["LlamaBatchedBench", "LlamaBench"]

TIMEOUT_SECONDS = 1800
CONTEXT_STEP = 256  # llama.cpp rounds a sequence's context up to a multiple of this


class LlamaBench:
    """``llama-bench``: one sequence.

    Parameters
    ----------
    program : Path
    model : Path
        A GGUF file.
    threads : int

    Attributes
    ----------
    described : dict
        ``version`` (the build), ``model_type`` and ``weights``, of the last run; empty before.
    """

    def __init__(self, program: Path, model: Path, threads: int) -> None:
        self._command = [str(program), "-m", str(model), "-t", str(threads), "-r", "1", "-o", "json"]
        self.described: dict[str, Any] = {}

    def seconds(self, phase: str, tokens: int, depth: int, flash_attention: bool) -> float:
        """Seconds of a run.

        Parameters
        ----------
        phase : {"prefill", "decode"}
        tokens : int
            Tokens of the prompt, or generated tokens.
        depth : int
            Tokens in the cache before.
        flash_attention : bool

        Raises
        ------
        ValueError
            The program failed.
        """
        counts = ["-p", str(tokens), "-n", "0"] if phase == "prefill" else ["-p", "0", "-n", str(tokens)]
        output = run_program([*self._command, *counts, "-d", str(depth), "-fa", str(int(flash_attention))])
        try:
            (result,) = json.loads(output)
            seconds = float(result["avg_ns"]) * 1e-9
            self.described = {
                "version": f"{result['build_commit']} ({result['build_number']})",
                "model_type": result["model_type"],
                "weights": result["model_n_params"],
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._command[0]}: unexpected output ({error!r}): {output[:200]}") from error
        return seconds


class LlamaBatchedBench:
    """``llama-batched-bench``: several sequences that are decoded together. Parameters as of :class:`LlamaBench`."""

    def __init__(self, program: Path, model: Path, threads: int) -> None:
        self._command = [str(program), "-m", str(model), "-t", str(threads), "--output-format", "jsonl"]

    def seconds(self, sequences: int, tokens: int, depth: int) -> float:
        """Seconds in which ``tokens`` tokens are generated in each sequence, after a prompt of ``depth`` tokens.

        Raises
        ------
        ValueError
            The program failed.
        """
        context = sequences * -(-(depth + tokens) // CONTEXT_STEP) * CONTEXT_STEP
        counts = ["-c", context, "-npp", depth, "-ntg", tokens, "-npl", sequences]
        output = run_program([*self._command, *map(str, counts)])
        lines = [line for line in output.splitlines() if line.startswith("{")]
        try:
            (line,) = lines
            return float(json.loads(line)["t_tg"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._command[0]}: unexpected output ({error!r}): {output[:200]}") from error


def run_program(command: Sequence[str]) -> str:
    """The stdout of a program.

    Raises
    ------
    ValueError
        The program does not start, fails, or does not end.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except OSError as error:
        raise ValueError(f"{command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{command[0]}: did not end within {TIMEOUT_SECONDS} seconds") from error
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-3:])
        raise ValueError(f"{command[0]}: ended with {done.returncode}: {last}")
    return done.stdout
