"""OpenCL where the user's cache folder cannot be written: tests that run the library in another process."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from marlin_cy.opencl.surroundings import is_writable, provide_folders

pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")

RUN = [sys.executable, "-m", "marlin_cy", "run", "--backend", "opencl", "--tokens", "2", "--repeat", "1"]


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """The variables of a process whose home is a file, so that root cannot write to it either."""
    (tmp_path / "home").write_text("")
    for name in ("XDG_CACHE_HOME", "POCL_CACHE_DIR", "PYOPENCL_NO_CACHE", "MARLIN_CY_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


@pytest.mark.sweep
def test_run_without_a_home(environment):
    done = subprocess.run(
        RUN, env=os.environ | {"MARLIN_CY_CACHE_DIR": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not list(environment.glob("marlin_cy-*")), "a folder was left behind"


def test_folder_of_the_user(environment):
    provide_folders()
    folder = environment / f"marlin_cy-{os.getuid()}"
    assert os.environ["POCL_CACHE_DIR"] == str(folder / "pocl")
    assert os.environ["PYOPENCL_NO_CACHE"] == "true"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_folder_that_others_may_write(environment):
    """Another user may have made it, to put programs there."""
    folder = environment / f"marlin_cy-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    provide_folders()
    used = Path(os.environ["POCL_CACHE_DIR"]).parent
    assert used != folder
    assert stat.S_IMODE(used.stat().st_mode) == 0o700


def test_named_folder(environment, monkeypatch):
    monkeypatch.setenv("MARLIN_CY_CACHE_DIR", str(environment / "ours"))
    provide_folders()
    assert os.environ["POCL_CACHE_DIR"] == str(environment / "ours" / "pocl")


def test_what_the_user_has_set_stays(environment, monkeypatch):
    monkeypatch.setenv("POCL_CACHE_DIR", "/somewhere")
    provide_folders()
    assert os.environ["POCL_CACHE_DIR"] == "/somewhere"
    monkeypatch.setenv("XDG_CACHE_HOME", str(environment / "cache"))
    monkeypatch.delenv("POCL_CACHE_DIR")
    monkeypatch.delenv("PYOPENCL_NO_CACHE")
    provide_folders()
    assert "POCL_CACHE_DIR" not in os.environ
    assert "PYOPENCL_NO_CACHE" not in os.environ


def test_is_writable(tmp_path):
    (tmp_path / "file").write_text("")
    assert is_writable(tmp_path / "a" / "b")
    assert not is_writable(tmp_path / "file")
    assert not is_writable(tmp_path / "file" / "b")
