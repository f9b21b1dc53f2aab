"""``import marlin_cy`` is quick and needs only declared dependencies."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

# None in sys.modules makes Python treat a module as not installed.
BLOCK = "import sys; sys.modules.update(torch=None, pyopencl=None)"


def python(code):
    """The output of a fresh interpreter that runs ``code``."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def imported():
    """The modules that ``import marlin_cy`` imports."""
    return python("import sys, marlin_cy; print(*sys.modules)").split()


@pytest.mark.parametrize(
    "module", ["torch", "pyopencl", "rich", "safetensors", "importlib.metadata", "marlin_cy.cpu", "marlin_cy.opencl"]
)
def test_import_leaves_alone(imported, module):
    assert "marlin_cy" in imported
    assert module not in imported


def test_works_without_torch_and_pyopencl():
    code = f"""{BLOCK}
import marlin_cy
from marlin_cy import cli
from marlin_cy.cpu.measure import _bandwidth
_bandwidth.read_bandwidth = lambda num_threads: 10e9
assert cli.main(["run", "--threads", "1", "--repeat", "1", "--json"]) == 0
assert marlin_cy.available_backends()["cpu"] is None
print(sys.modules["torch"], sys.modules["pyopencl"])
"""
    assert python(code).splitlines()[-1] == "None None"


def test_every_package_is_installed():
    root = Path(__file__).parents[1]
    folders = [file.parent for top in ("marlin_cy", "opencl") for file in (root / top).rglob("__init__.py")]
    names = {".".join(folder.relative_to(root).parts).removeprefix("marlin_cy.") for folder in folders} - {"marlin_cy"}
    declared = set(re.findall(r'"marlin_cy\.([\w.]+)",', (root / "setup.py").read_text(encoding="utf-8")))
    assert {name for name in names if not name.startswith("opencl.opencl")} == declared
