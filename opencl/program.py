"""From ``.cl`` files to built programs: compiled once, kept in memory, and as binaries on disk.

PyOpenCL has a cache of its own, which is left alone here: it does nothing on NVIDIA and PoCL, where it
trusts the driver's; a damaged entry or a folder that cannot be written raises KeyError (pyopencl/cache.py
reads a variable that is not set); and no entry has a checksum, while PoCL crashes on half a binary.
"""

import hashlib
import os
import re
import tempfile
import threading
import warnings
from importlib.resources import files
from pathlib import Path

import platformdirs
import pyopencl as cl

from marlin_cy import __version__
from marlin_cy.errors import BuildError
from marlin_cy.opencl.device import describe

__all__ = ["CACHE_VARIABLE", "ProgramCache", "cache_folder", "kernel_files", "source"]

CACHE_VARIABLE = "MARLIN_CY_CACHE_DIR"
KERNELS = files("marlin_cy.opencl") / "kernels"
COMMON = "common"
INCLUDE = re.compile(r'#include "(\w+)\.cl"\s*')
POCL = "Portable Computing Language"
# One build at a time in the process: each sets aside a warning, and the filters of warnings are the process's.
BUILDING = threading.Lock()


def kernel_files(folder=KERNELS):
    """The files with kernels, by name without ``.cl``; the others are parts of these."""
    return sorted(
        entry.name.removesuffix(".cl")
        for entry in folder.iterdir()
        if entry.name.endswith(".cl") and "__kernel" in entry.read_text(encoding="utf-8")
    )


def source(file, folder=KERNELS):
    """A program's source: ``common.cl``, then the file, with every line ``#include "NAME.cl"`` expanded.

    A file is included once, where it is first named. Compilers' messages keep the files' names and lines.

    Parameters
    ----------
    file : str
        The name without ``.cl``.
    folder : path-like, optional
        Where the files lie; the package's own when left out.

    Raises
    ------
    ValueError
        A file includes itself, directly or through others.
    """
    included = set()

    def expand(name, open_files):
        if name in open_files:
            raise ValueError(f"{' includes '.join(f'{each}.cl' for each in (*open_files, name))}: a cycle")
        if name in included:
            return
        included.add(name)
        yield f'#line 1 "{name}.cl"\n'
        text = (folder / f"{name}.cl").read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            if found := INCLUDE.fullmatch(line):
                yield from expand(found[1], (*open_files, name))
                yield f'#line {number + 1} "{name}.cl"\n'
            else:
                yield line
        yield "\n"

    return "".join((*expand(COMMON, ()), *expand(file, ())))


def cache_folder():
    """Where binaries are kept.

    Returns
    -------
    pathlib.Path or None
        ``opencl`` in the folder that ``MARLIN_CY_CACHE_DIR`` names, None if that is empty; else in
        ``marlin_cy`` in the user's cache folder (on Linux ``XDG_CACHE_HOME`` or ``~/.cache``).
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named is None:
        return platformdirs.user_cache_path("marlin_cy", appauthor=False) / "opencl"
    return Path(named).expanduser() / "opencl" if named else None


class ProgramCache:
    """The programs of one context on one of its devices. Threads may share it.

    Parameters
    ----------
    context : pyopencl.Context
    device : pyopencl.Device
        The one of the context's devices to build for.
    folder : path-like, optional
        Where the ``.cl`` files lie; the package's own when left out.
    keep_binaries : bool, optional
        Whether binaries are kept on disk, in :func:`cache_folder`. Unless given, they are where the driver
        has no better way of its own: PoCL keeps what it compiled, and would compile every kernel once more,
        for all sizes of work-groups, to give a binary away.

    Attributes
    ----------
    compiled, loaded : int
        How many programs were built from source, and how many from a binary on disk.
    """

    def __init__(self, context, device, *, folder=KERNELS, keep_binaries=None):
        if keep_binaries is None:
            keep_binaries = device.platform.name.strip() != POCL
        self.compiled = 0
        self.loaded = 0
        self._context = context
        self._device = device
        self._sources = folder
        self._binaries = cache_folder() if keep_binaries else None
        self._writable = self._binaries is not None
        self._programs = {}

    def kernel(self, file, name, macros=None, options=()):
        """A kernel of its own for each call, as kernels keep their arguments and no two threads may share one.

        Parameters
        ----------
        file : str
            The ``.cl`` file, without suffix.
        name : str
            The kernel in it.
        macros : dict of str to (int or str), optional
            What the program is compiled with: ``{"ROWS": 8}`` is ``-DROWS=8``.
        options : sequence of str, optional
            Other options of the compiler (``"-cl-std=CL3.0"``).

        Raises
        ------
        BuildError
            The program does not compile.
        pyopencl.LogicError
            It has no such kernel.
        """
        return cl.Kernel(self.program(file, macros, options), name)

    def program(self, file, macros=None, options=()):
        """The built ``pyopencl.Program``; parameters and errors as in :meth:`kernel`."""
        values = {name: int(value) if isinstance(value, bool) else value for name, value in (macros or {}).items()}
        options = (*(f"-D{name}={value}" for name, value in sorted(values.items())), *options)
        key = file, options
        # Looked up first without the lock, which another program's compilation may hold for seconds.
        program = self._programs.get(key)
        if program is None:
            with BUILDING:
                program = self._programs.get(key)
                if program is None:
                    program = self._programs[key] = self._built(file, options)
        return program

    def _built(self, file, options):
        text = source(file, self._sources)
        key = self._key(text, options)
        path = self._binaries / f"{file}-{hashlib.sha256(key).hexdigest()[:32]}.bin" if self._binaries else None
        program = self._from_binary(path, key, options)
        if program is not None:
            self.loaded += 1
            return program
        program = self._from_source(file, text, options)
        self.compiled += 1
        self._save(path, key, program)
        return program

    def _key(self, text, options):
        """All that a binary depends on."""
        device, platform = self._device, self._device.platform
        about = (device.vendor, device.name, device.version, device.driver_version, platform.name, platform.version)
        # PyOpenCL appends what this variable holds to the options of every build.
        return repr((__version__, about, options, os.environ.get("PYOPENCL_BUILD_OPTIONS"), text)).encode()

    def _from_source(self, file, text, options):
        try:
            # cache_dir=False: without PyOpenCL's cache.
            return self._build(cl.Program(self._context, text), options, cache_dir=False)
        except cl.Error as error:
            raise BuildError(f"{file}.cl", options, describe(self._device), _log(error)) from error

    def _from_binary(self, path, key, options):
        """None where there is no binary, where it is damaged, and where the driver does not take it."""
        binary = _read(path, key) if path else None
        if binary is None:
            return None
        try:
            return self._build(cl.Program(self._context, [self._device], [binary]), options)
        except cl.Error:
            return None

    def _build(self, program, options, **how):
        with warnings.catch_warnings():
            # Some compilers (Intel's) have something to say each time.
            warnings.filterwarnings("ignore", "Non-empty compiler output", cl.CompilerWarning)
            return program.build(list(options), devices=[self._device], **how)

    def _save(self, path, key, program):
        if not self._writable:
            return
        # Built for one device of the context's; what is listed for the others, if anything, is empty.
        binary = next(filter(None, program.get_info(cl.program_info.BINARIES)), None)
        if binary is None:  # the driver has none to give
            return
        try:
            _write(path, key, binary)
        except OSError as error:
            self._writable = False
            warnings.warn(
                f"compiled OpenCL programs are not kept, as {self._binaries} cannot be written ({error}); "
                f"set {CACHE_VARIABLE} to another folder, or to nothing to do without",
                RuntimeWarning,
                stacklevel=5,  # who called kernel()
            )


def _read(path, key):
    """The binary in a file; None where it was written under another key, or differs from what was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, binary = content[:32], content[32:]
    return binary if digest == _digest(key, binary) else None


def _write(path, key, binary):
    """A file that others see complete or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_digest(key, binary) + binary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _digest(key, binary):
    return hashlib.sha256(hashlib.sha256(key).digest() + binary).digest()


def _log(error):
    """What the compiler said, out of PyOpenCL's message, which may also name a copy of the source that it left."""
    log = str(error)
    saved = re.search(r"\n\(source saved as (.+)\)\s*$", log)
    if saved:
        Path(saved[1]).unlink(missing_ok=True)
        log = log[: saved.start()]
    log = re.sub(r"\n\(options: .*\)\s*$", "", log)
    return re.split(r"\nBuild on <.*>:\n", log, maxsplit=1)[-1].strip()
