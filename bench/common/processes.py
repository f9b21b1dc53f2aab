"""Running a module of this package, or of marlin_cy, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["run_module"]

ROOT = Path(__file__).resolve().parents[2]


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
    path = os.pathsep.join([*map(os.path.abspath, sys.path), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **(environment or {}), "PYTHONPATH": path},
        input=input,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
