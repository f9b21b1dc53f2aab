"""The cache folder: data that later processes reuse, and how its files are written.

Everything in it can be computed again. So a folder that cannot be written, or a full disk, only causes one warning.
The size of the folder is bounded: above the bound, the least recently used files are removed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
import warnings
from pathlib import Path

import platformdirs

__all__ = ["CACHE_VARIABLE", "cache_folder", "mark_used", "trim", "warn_unwritable", "write_atomically"]

CACHE_VARIABLE = "MARLIN_CY_CACHE_DIR"
# A program's binary has 20 to 300 KiB, and a model uses a few dozen: room for several models, drivers and versions.
MAX_BYTES = 256 << 20
TEMPORARY = ".tmp"
# A file is written within seconds. A temporary file of this age belongs to a process that was killed.
TEMPORARY_SECONDS = 3600

_warned: set[Path] = set()
_warned_lock = threading.Lock()


def cache_folder() -> Path | None:
    """The folder of compiled programs, of verdicts on kernels, and of tuning results.

    Returns
    -------
    pathlib.Path or None
        ``opencl`` in the folder that ``MARLIN_CY_CACHE_DIR`` names, None if that variable is empty; else in
        ``marlin_cy`` in the user's cache folder (on Linux ``XDG_CACHE_HOME`` or ``~/.cache``).
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named is None:
        default: Path = platformdirs.user_cache_path("marlin_cy", appauthor=False)
        return default / "opencl"
    return Path(named).expanduser() / "opencl" if named else None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that other processes see complete or not at all; makes the folder.

    Raises
    ------
    OSError
        The file cannot be written. Nothing is left behind.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def warn_unwritable(folder: Path, error: OSError, stacklevel: int) -> None:
    """Warn that a folder cannot be written, once per process and folder."""
    with _warned_lock:
        if folder in _warned:
            return
        _warned.add(folder)
    warnings.warn(
        f"compiled OpenCL programs and checks of kernels are not kept, as {folder} cannot be written ({error}); "
        f"set {CACHE_VARIABLE} to another folder, or to the empty string to keep nothing",
        RuntimeWarning,
        stacklevel=stacklevel + 1,
    )


def mark_used(path: Path) -> None:
    """Note that a file has just been used; :func:`trim` removes the least recently used files."""
    with contextlib.suppress(OSError):  # a read-only folder
        os.utime(path)


def trim(folder: Path, suffixes: tuple[str, ...], max_bytes: int | None = None) -> None:
    """Remove temporary files of killed processes, and the least recently used files above a bound on their size.

    Other processes may use the folder meanwhile. A file that one of them has open stays readable for it.

    Parameters
    ----------
    folder : Path
    suffixes : tuple of str
        Files with other suffixes are left alone.
    max_bytes : int, optional
        :data:`MAX_BYTES` unless given.
    """
    max_bytes = MAX_BYTES if max_bytes is None else max_bytes
    oldest_temporary = time.time() - TEMPORARY_SECONDS
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # another process has just removed it
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(TEMPORARY):
                    if status.st_mtime < oldest_temporary:
                        os.unlink(entry.path)
                elif entry.name.endswith(suffixes):
                    found.append((status.st_mtime, status.st_size, entry.path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= max_bytes:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
        total -= size
