"""From ``.cl`` files to built programs: compiled once, kept in memory, and as binaries on disk.

PyOpenCL's own cache is not used, for three reasons. It is disabled on NVIDIA and PoCL, where it relies on the driver's
cache. A damaged entry or a folder that cannot be written raises a KeyError, because pyopencl/cache.py reads a variable
that is not set. Its entries have no checksum, and PoCL crashes on a truncated binary.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyopencl as cl

from marlin_cy import __version__
from marlin_cy.errors import BuildError
from marlin_cy.opencl.cache import cache_folder, mark_used, trim, warn_unwritable, write_atomically
from marlin_cy.opencl.device import describe

if TYPE_CHECKING:
    from importlib.abc import Traversable

__all__ = ["ProgramCache", "cache_folder", "device_identity", "kernel_files", "source", "sources_digest"]

KERNELS = files("marlin_cy.opencl") / "kernels"
BINARY = ".bin"
COMMON = "common"
INCLUDE = re.compile(r'#include "(\w+)\.cl"\s*')
POCL = "Portable Computing Language"
# One build at a time in the process: a build suppresses a warning, and warning filters are global to the process.
BUILDING = threading.Lock()


def kernel_files(folder: Traversable = KERNELS) -> list[str]:
    """The files with kernels, by name without ``.cl``; all other files are included by these."""
    return sorted(
        entry.name.removesuffix(".cl")
        for entry in folder.iterdir()
        if entry.name.endswith(".cl") and "__kernel" in entry.read_text(encoding="utf-8")
    )


def source(file: str, folder: Traversable = KERNELS) -> str:
    """A program's source: ``common.cl``, then the file, with every line ``#include "NAME.cl"`` expanded.

    A file is included once, where it is first named. Compilers' messages keep the files' names and lines.

    Parameters
    ----------
    file : str
        The name without ``.cl``.
    folder : path-like, optional
        The folder of the files; by default the package's own.

    Raises
    ------
    ValueError
        A file includes itself, directly or through others.
    """
    included: set[str] = set()

    def expand(name: str, open_files: tuple[str, ...]) -> Iterator[str]:
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


@cache
def sources_digest() -> str:
    """A digest of all ``.cl`` files of the package. It changes when kernels are edited and the version is not."""
    digest = hashlib.sha256()
    for name in kernel_files():
        digest.update(source(name).encode())
    return digest.hexdigest()


def device_identity(device: cl.Device) -> tuple[str, ...]:
    """The device, its driver and its platform, on which compiled programs depend."""
    platform = device.platform
    return device.vendor, device.name, device.version, device.driver_version, platform.name, platform.version


class ProgramCache:
    """The programs of one context on one of its devices. Threads may share it.

    Parameters
    ----------
    context : pyopencl.Context
    device : pyopencl.Device
        The one of the context's devices to build for.
    folder : path-like, optional
        The folder of the ``.cl`` files; by default the package's own.
    keep_binaries : bool, optional
        Whether binaries are kept on disk, in :func:`cache_folder`. Unless given, they are kept except with PoCL.
        PoCL has a cache of its own, and returns a binary only after it has compiled every kernel once more, for
        all sizes of work-groups.

    Attributes
    ----------
    compiled, loaded : int
        How many programs were built from source, and how many from a binary on disk.
    """

    def __init__(
        self,
        context: cl.Context,
        device: cl.Device,
        *,
        folder: Traversable = KERNELS,
        keep_binaries: bool | None = None,
    ) -> None:
        if keep_binaries is None:
            keep_binaries = device.platform.name.strip() != POCL
        self.compiled = 0
        self.loaded = 0
        self._context = context
        self._device = device
        self._sources = folder
        self._binaries = cache_folder() if keep_binaries else None
        self._writable = self._binaries is not None
        self._programs: dict[tuple[str, tuple[str, ...]], cl.Program] = {}

    def kernel(
        self, file: str, name: str, macros: Mapping[str, int | str] | None = None, options: Sequence[str] = ()
    ) -> cl.Kernel:
        """A new kernel object in each call. A kernel object stores its arguments, so threads must not share it.

        Parameters
        ----------
        file : str
            The ``.cl`` file, without suffix.
        name : str
            The kernel in it.
        macros : dict of str to (int or str), optional
            Macros of the program: ``{"ROWS": 8}`` is ``-DROWS=8``.
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

    def program(
        self, file: str, macros: Mapping[str, int | str] | None = None, options: Sequence[str] = ()
    ) -> cl.Program:
        """The built ``pyopencl.Program``; parameters and errors as in :meth:`kernel`."""
        values = {name: int(value) if isinstance(value, bool) else value for name, value in (macros or {}).items()}
        options = (*(f"-D{name}={value}" for name, value in sorted(values.items())), *options)
        key = file, options
        # The first lookup is without the lock, which the compilation of another program may hold for seconds.
        program = self._programs.get(key)
        if program is None:
            with BUILDING:
                program = self._programs.get(key)
                if program is None:
                    program = self._programs[key] = self._built(file, options)
        return program

    def _built(self, file: str, options: tuple[str, ...]) -> cl.Program:
        text = source(file, self._sources)
        key = self._key(text, options)
        path = self._binaries / f"{file}-{hashlib.sha256(key).hexdigest()[:32]}{BINARY}" if self._binaries else None
        program = self._from_binary(path, key, options)
        if path is not None and program is not None:
            self.loaded += 1
            mark_used(path)
            return program
        program = self._from_source(file, text, options)
        self.compiled += 1
        self._save(path, key, program)
        return program

    def _key(self, text: str, options: Sequence[str]) -> bytes:
        """Everything that a binary depends on."""
        about = device_identity(self._device)
        # PyOpenCL appends the value of this variable to the options of every build.
        return repr((__version__, about, options, os.environ.get("PYOPENCL_BUILD_OPTIONS"), text)).encode()

    def _from_source(self, file: str, text: str, options: Sequence[str]) -> cl.Program:
        try:
            # cache_dir=False: without PyOpenCL's cache.
            return self._build(cl.Program(self._context, text), options, cache_dir=False)
        except cl.Error as error:
            raise BuildError(f"{file}.cl", options, describe(self._device), _log(error)) from error

    def _from_binary(self, path: Path | None, key: bytes, options: Sequence[str]) -> cl.Program | None:
        """The program built from its binary; None if there is no binary, or it is damaged, or the driver rejects it."""
        binary = _read(path, key) if path else None
        if binary is None:
            return None
        try:
            return self._build(cl.Program(self._context, [self._device], [binary]), options)
        except cl.Error:
            return None

    def _build(self, program: cl.Program, options: Sequence[str], **how: Any) -> cl.Program:
        with warnings.catch_warnings():
            # Some compilers (Intel's) print a log even when nothing is wrong.
            warnings.filterwarnings("ignore", "Non-empty compiler output", cl.CompilerWarning)
            built: cl.Program = program.build(list(options), devices=[self._device], **how)
            return built

    def _save(self, path: Path | None, key: bytes, program: cl.Program) -> None:
        if path is None or not self._writable:
            return
        # The program is built for one device of the context; the entries of the other devices, if any, are empty.
        binaries: Any = program.get_info(cl.program_info.BINARIES)  # typed `object`
        binary = next(filter(None, binaries), None)
        if binary is None:  # the driver does not return binaries
            return
        try:
            _write(path, key, binary)
        except OSError as error:
            self._writable = False
            warn_unwritable(path.parent, error, stacklevel=5)  # the caller of kernel()
            return
        trim(path.parent, (BINARY,))


def _read(path: Path, key: bytes) -> bytes | None:
    """The binary in a file; None if it was written under another key, or its checksum differs."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, binary = content[:32], content[32:]
    return binary if digest == _digest(key, binary) else None


def _write(path: Path, key: bytes, binary: bytes) -> None:
    write_atomically(path, _digest(key, binary) + binary)


def _digest(key: bytes, binary: bytes) -> bytes:
    return hashlib.sha256(hashlib.sha256(key).digest() + binary).digest()


def _log(error: cl.Error) -> str:
    """The compiler's log, taken from PyOpenCL's message; a copy of the source that PyOpenCL saved is removed."""
    log = str(error)
    saved = re.search(r"\n\(source saved as (.+)\)\s*$", log)
    if saved:
        Path(saved[1]).unlink(missing_ok=True)
        log = log[: saved.start()]
    log = re.sub(r"\n\(options: .*\)\s*$", "", log)
    return re.split(r"\nBuild on <.*>:\n", log, maxsplit=1)[-1].strip()
