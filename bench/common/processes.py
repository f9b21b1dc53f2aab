"""Modules of this package, or of marlin_cy, in processes of their own: run once, or asked again and again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Child", "module_command", "module_environment", "run_module", "serve"]

ROOT = Path(__file__).resolve().parents[2]


def module_command(module: str, *arguments: str | Path) -> list[str]:
    """The command line of ``python -m module arguments``."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def module_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child that imports what this process can import; ``more`` is added."""
    path = os.pathsep.join([*map(os.path.abspath, sys.path), str(ROOT)])
    return {**os.environ, **(more or {}), "PYTHONPATH": path}


def run_module(
    module: str,
    *arguments: str | Path,
    folder: str | Path,
    environment: Mapping[str, str] | None = None,
    input: str = "",
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module arguments``, with its output captured.

    Parameters
    ----------
    module : str
    arguments : str or Path
    folder : path
        The child's current folder. It comes first on the child's module search path, so it must not hold packages.
        After it come the folders of this process's path and the repository.
    environment : mapping, optional
        Variables that are added to those of this process.
    input : str
        The child's stdin.
    timeout : float, optional
        Seconds.

    Raises
    ------
    subprocess.TimeoutExpired
    """
    return subprocess.run(
        module_command(module, *arguments),
        cwd=folder,
        env=module_environment(environment),
        input=input,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


class Child:
    """A process that stays alive, and answers each line of JSON on its stdin by a line of JSON on its stdout.

    Parameters
    ----------
    name : str
        For messages.
    command : sequence of str
    environment : mapping, optional
        By default that of this process.

    Attributes
    ----------
    described : dict
        The first line, which the process writes without a request.

    Raises
    ------
    ValueError
        The process does not start.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._name = name
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        except OSError as error:
            raise ValueError(f"{name}: got {command[0]!r}: {error.strerror}") from error
        try:
            self.described = self._reply()
        except ValueError:
            self.close()
            raise

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a request.

        Raises
        ------
        ValueError
            The request failed, or the process ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise ValueError(f"{self._name}: its process ended") from error
        return self._reply()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"{self._name}: its process ended without a reply")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ValueError(f"{self._name}: {reply['error']}")
        return reply


def serve(describe: Callable[[], dict[str, Any]], requests: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """The other end of a :class:`Child`: answer requests until stdin ends.

    A request ``{"do": name, ...}`` is answered by ``requests[name](...)``; one that raises by ``{"error": message}``.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints to stdout must not mix with replies
    reply = _answer(describe, {})
    print(json.dumps(reply), file=replies, flush=True)
    if "error" in reply:
        return
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_answer(requests[request.pop("do")], request)), file=replies, flush=True)


def _answer(function: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return function(**arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
