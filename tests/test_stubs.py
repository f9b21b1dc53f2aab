"""The stub of every compiled module matches the module."""

import subprocess
import sys
from pathlib import Path

import pytest

import marlin_cy

PACKAGE = Path(marlin_cy.__file__).parent
SOURCES = sorted({*PACKAGE.rglob("*.pyx"), *(PACKAGE / "opencl").glob("*.pyx")})  # in a clone, opencl is a link
ALLOWED = Path(__file__).with_name("stubtest_allowlist.txt")


def test_every_compiled_module_has_a_stub():
    assert SOURCES
    assert [source.name for source in SOURCES if not source.with_suffix(".pyi").exists()] == []


@pytest.mark.sweep
def test_stubs_match_the_modules():
    modules = [".".join(source.relative_to(PACKAGE.parent).with_suffix("").parts) for source in SOURCES]
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "--concise", f"--allowlist={ALLOWED}", *modules],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
