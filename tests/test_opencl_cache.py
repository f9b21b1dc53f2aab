"""The cache folder: its size, leftovers of killed processes, sharing, damage, folders that cannot be written."""

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")

from marlin_cy.opencl import cache, program  # noqa: E402
from marlin_cy.opencl import device as devices  # noqa: E402

HOUR = 3600
TESTS = Path(__file__).parent


def file(folder, name, size, age):
    """A file of a size that was used ``age`` seconds ago."""
    path = folder / name
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - age,) * 2)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_least_recently_used_files_go_first(tmp_path):
    for age in range(1, 6):
        file(tmp_path, f"{age}.bin", 100, age * HOUR)
    cache.trim(tmp_path, (".bin",), 300)
    assert names(tmp_path) == ["1.bin", "2.bin", "3.bin"]
    cache.mark_used(tmp_path / "3.bin")
    cache.trim(tmp_path, (".bin",), 200)
    assert names(tmp_path) == ["1.bin", "3.bin"]


def test_files_within_the_bound_stay(tmp_path):
    for age in range(1, 4):
        file(tmp_path, f"{age}.bin", 100, 1000 * HOUR * age)
    cache.trim(tmp_path, (".bin",), 300)
    assert len(names(tmp_path)) == 3


def test_other_files_are_left_alone(tmp_path):
    file(tmp_path, "tuning-1.json", 1000, 1000 * HOUR)
    file(tmp_path, "old.bin", 10, HOUR)
    cache.trim(tmp_path, (".bin",), 5)
    assert names(tmp_path) == ["tuning-1.json"]


def test_temporary_files_of_killed_processes_go(tmp_path):
    file(tmp_path, "moe-abc123.tmp", 100, 2 * HOUR)
    file(tmp_path, "moe-def456.tmp", 100, 1)  # being written
    cache.trim(tmp_path, (".bin",))
    assert names(tmp_path) == ["moe-def456.tmp"]


def test_no_folder(tmp_path):
    cache.trim(tmp_path / "none", (".bin",))


def test_a_file_that_another_process_removes(tmp_path, monkeypatch):
    """Between listing it and removing it."""
    for age in range(1, 4):
        file(tmp_path, f"{age}.bin", 100, age * HOUR)
    unlink = os.unlink

    def unlink_twice(path):
        unlink(path)
        unlink(path)

    monkeypatch.setattr(os, "unlink", unlink_twice)
    cache.trim(tmp_path, (".bin",), 100)
    assert names(tmp_path) == ["1.bin"]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def replace(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        cache.write_atomically(tmp_path / "a.bin", b"content")
    assert names(tmp_path) == []


def test_one_warning_for_a_folder(tmp_path):
    error = OSError(30, "Read-only file system")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            cache.warn_unwritable(tmp_path, error, stacklevel=1)
    assert len(said) == 1
    assert "Read-only file system" in str(said[0].message)
    assert "MARLIN_CY_CACHE_DIR" in str(said[0].message)


class TestPrograms:
    """The use of the cache folder by :class:`ProgramCache`."""

    SOURCE = "__kernel void write(__global int *out)\n{\n    out[0] = VALUE;\n}\n"

    @pytest.fixture(params=devices.list_devices()[:1], ids=devices.describe)
    def programs(self, request, tmp_path, monkeypatch):
        """A function that makes a cache, as a new process would."""
        monkeypatch.setenv("MARLIN_CY_CACHE_DIR", str(tmp_path / "cache"))
        sources = tmp_path / "kernels"
        sources.mkdir()
        (sources / "common.cl").write_text("")
        (sources / "write.cl").write_text(self.SOURCE)
        context = cl.Context([request.param])
        return lambda: program.ProgramCache(context, request.param, folder=sources, keep_binaries=True)

    @pytest.mark.sweep
    def test_the_folder_stays_below_the_bound(self, programs, tmp_path, monkeypatch):
        folder = tmp_path / "cache" / "opencl"
        programs().kernel("write", "write", {"VALUE": 0})
        (first,) = folder.iterdir()
        size = first.stat().st_size
        monkeypatch.setattr(cache, "MAX_BYTES", 3 * size + size // 2)
        os.utime(first, (time.time() - HOUR,) * 2)
        for value in range(1, 6):
            programs().kernel("write", "write", {"VALUE": value})
            assert len(names(folder)) <= 3
        assert not first.exists()

    def test_a_loaded_program_counts_as_used(self, programs, tmp_path, monkeypatch):
        folder = tmp_path / "cache" / "opencl"
        programs().kernel("write", "write", {"VALUE": 1})
        (first,) = folder.iterdir()
        programs().kernel("write", "write", {"VALUE": 2})
        (second,) = set(folder.iterdir()) - {first}
        os.utime(first, (time.time() - 2 * HOUR,) * 2)
        os.utime(second, (time.time() - HOUR,) * 2)
        programs().kernel("write", "write", {"VALUE": 1})
        size = first.stat().st_size
        monkeypatch.setattr(cache, "MAX_BYTES", 2 * size + size // 2)
        programs().kernel("write", "write", {"VALUE": 3})
        assert first.exists()
        assert not second.exists()

    def test_leftovers_go_when_a_program_is_kept(self, programs, tmp_path):
        folder = tmp_path / "cache" / "opencl"
        folder.mkdir(parents=True)
        file(folder, "gemm-of-a-killed-process.tmp", 100, 2 * HOUR)
        programs().kernel("write", "write", {"VALUE": 1})
        assert [path.suffix for path in folder.iterdir()] == [".bin"]


SCRIPT = """
import numpy as np
from marlin_cy import get_backend
from marlin_cy.opencl import program
from problems import random_problem
program.POCL = "none"  # so that binaries are kept with PoCL, too
backend = get_backend("opencl")
stack = random_problem(np.random.default_rng(0), 1, 64, 32, 32).stack(backend)
x, out = (backend.from_host(np.ones((3, width), np.float32)) for width in (64, 32))
stack.gemm_phase_batched(backend.new_context(), x, [(0, 0, 0, 3)], out, 64)
print(backend.runtime.programs.compiled, out.get().tobytes().hex())
"""


@pytest.mark.sweep
def test_two_processes_and_a_damaged_folder(tmp_path):
    """Two processes fill one cold cache at once. Then its files are damaged, each in another way."""
    folders = {"MARLIN_CY_CACHE_DIR": str(tmp_path / "ours"), "POCL_CACHE_DIR": str(tmp_path / "pocl")}
    environment = {**os.environ, **folders, "POCL_EXTRA_BUILD_FLAGS": "-cl-opt-disable"}

    def started():
        command = [sys.executable, "-W", "error::RuntimeWarning", "-c", SCRIPT]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=TESTS)

    def result(process):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        compiled, product = output.split()
        return int(compiled), product

    (_, first), (_, second) = [result(process) for process in [started(), started()]]
    assert first == second
    kept = sorted((tmp_path / "ours" / "opencl").iterdir())
    assert {file.suffix for file in kept} == {".bin", ".checked"}
    assert len(kept) >= 3
    assert result(started()) == (0, first)
    for number, file in enumerate(kept):
        content = file.read_bytes()
        file.write_bytes([b"", content[: len(content) // 2], os.urandom(len(content))][number % 3])
    compiled, product = result(started())
    assert compiled == sum(file.suffix == ".bin" for file in kept)
    assert product == first
