"""Folders for OpenCL where the user's cache folder cannot be written: containers, daemons, users without a home.

PoCL then reports no device, and PyOpenCL fails when it compiles the kernels of its arrays. Both read environment
variables when they are loaded, so these must be set before PyOpenCL is imported. Variables that the user has set are
left as they are.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from pathlib import Path

__all__ = ["provide_folders"]

POCL_VARIABLE = "POCL_CACHE_DIR"
NO_CACHE_VARIABLE = "PYOPENCL_NO_CACHE"
OUR_VARIABLE = "MARLIN_CY_CACHE_DIR"


def provide_folders() -> None:
    """Give PoCL a folder, and turn off PyOpenCL's cache, if the user's cache folder cannot be written.

    PoCL's folder is ``pocl`` in the folder that ``MARLIN_CY_CACHE_DIR`` names, or in a folder of the user in the
    system's temporary folder. It lasts as long as the process if ``MARLIN_CY_CACHE_DIR`` is empty: nothing is kept.
    """
    if os.name != "posix" or is_writable(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()):
        return
    os.environ.setdefault(NO_CACHE_VARIABLE, "true")
    if POCL_VARIABLE not in os.environ:
        os.environ[POCL_VARIABLE] = str(_pocl_folder())


def is_writable(folder: Path) -> bool:
    """Whether a folder can be written, or made."""
    for place in (folder, *folder.parents):
        if os.path.lexists(place):
            return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    return False


def _pocl_folder() -> Path:
    named = os.environ.get(OUR_VARIABLE)
    if named and is_writable(folder := Path(named).expanduser() / "pocl"):
        return folder
    own = Path(tempfile.gettempdir()) / f"marlin_cy-{os.getuid()}"
    if named != "" and _is_private(own):
        return own / "pocl"
    folder = Path(tempfile.mkdtemp(prefix="marlin_cy-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_private(folder: Path) -> bool:
    """Whether a folder belongs to this user alone; makes it if it does not exist."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700
