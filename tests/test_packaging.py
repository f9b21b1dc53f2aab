"""The sdist and the wheel hold all that they need: the wheel that pip builds from the sdist runs in an empty venv."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import marlin_cy

ROOT = Path(__file__).parent.parent
# Files that a clone does not have. An egg-info left by an earlier build would hide files missing from MANIFEST.in.
NOT_IN_A_CLONE = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", ".hypothesis", "results"
)

pytestmark = pytest.mark.sweep


def succeed(*command, **options):
    """Run a command that must succeed; its output."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    """``{"sdist": path, "wheel": path}``; the wheel is what ``pip install`` builds from the sdist.

    Compiling takes a minute, so the processes of one run share the files: the first process builds, the others wait.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # the folder of the run; each process has a folder in it
    dist = shared / "dist"
    with open(shared / "dist.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not dist.exists():
            build(tmp_path_factory.mktemp("packaging")).rename(dist)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def build(folder):
    """Build both from a copy of the sources; the folder that holds them.

    The wheel is compiled with -O0, in less time: these tests ask what is in it, and whether it runs. The build uses the
    packages of this environment. That pip finds those that pyproject.toml names, each installation shows.
    """
    shutil.copytree(ROOT, folder / "source", ignore=NOT_IN_A_CLONE)
    sdists = ["--sdist", "--no-isolation", "--outdir", folder / "dist"]
    succeed(sys.executable, "-m", "build", *sdists, folder / "source")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    wheels = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist"]
    quick = {"CC": str(compiler_with(folder / "cc", "-O0"))} if os.name == "posix" else {}
    succeed(sys.executable, "-m", "pip", "wheel", *wheels, sdist, env=os.environ | quick)
    return folder / "dist"


def compiler_with(path, flags):
    """A program that compiles as Python's own compiler does, with more flags at the end, where they win."""
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC")
    path.write_text(f'#!/bin/sh\nexec {compiler} "$@" {flags}\n')
    path.chmod(0o755)
    return path


def test_kernels_are_in_both(distributions):
    kernels = {path.name for path in (ROOT / "opencl" / "kernels").glob("*.cl")}
    assert "common.cl" in kernels
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        packed = [Path(name) for name in wheel.namelist()]
    assert {path.name for path in packed if path.parent == Path("marlin_cy/opencl/kernels")} == kernels
    with tarfile.open(distributions["sdist"]) as sdist:
        packed = [Path(name) for name in sdist.getnames()]
    assert {path.name for path in packed if path.match("*/opencl/kernels/*.cl")} == kernels


def test_the_chat_page_is_in_both(distributions):
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        assert "marlin_cy/serve/page.html" in wheel.namelist()
    with tarfile.open(distributions["sdist"]) as sdist:
        assert any(name.endswith("/marlin_cy/serve/page.html") for name in sdist.getnames())


def test_version_is_that_of_the_package(distributions):
    assert distributions["wheel"].name.startswith(f"marlin_cy-{marlin_cy.__version__}-")
    assert distributions["sdist"].name == f"marlin_cy-{marlin_cy.__version__}.tar.gz"


def test_sdist_has_the_opencl_package_once(distributions):
    """The link marlin_cy/opencl is not followed: a copy behind it would win over changes in opencl/."""
    with tarfile.open(distributions["sdist"]) as sdist:
        assert [name for name in sdist.getnames() if name.endswith("marlin_cy/opencl/__init__.py")] == []


def test_stubs_are_in_both(distributions):
    """Type checkers read the .pyi files of compiled modules."""
    stubs = {str(path.relative_to(ROOT)) for path in (ROOT / "marlin_cy").rglob("*.pyi")}
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        assert stubs <= set(wheel.namelist())
    with tarfile.open(distributions["sdist"]) as sdist:
        assert stubs <= {name.partition("/")[2] for name in sdist.getnames()}


def test_editable_install_needs_no_import_hook(tmp_path):
    """Its .pth names the folder, so that type checkers and editors find marlin_cy and marlin_cy.opencl."""
    shutil.copytree(ROOT, tmp_path / "source", ignore=NOT_IN_A_CLONE, symlinks=True)
    setup = tmp_path / "source" / "setup.py"
    text, compiled = setup.read_text(), "ext_modules=cythonize("
    assert compiled in text
    setup.write_text(text.replace(compiled, "ext_modules=(lambda *args, **options: [])("))  # nothing is compiled
    code = "import setuptools.build_meta as backend; print(backend.build_editable('dist'))"
    (tmp_path / "source" / "dist").mkdir()
    name = succeed(sys.executable, "-c", code, cwd=tmp_path / "source").splitlines()[-1]
    with zipfile.ZipFile(tmp_path / "source" / "dist" / name) as wheel:
        (pth,) = (entry for entry in wheel.namelist() if entry.endswith(".pth"))
        assert Path(wheel.read(pth).decode().strip()) == tmp_path / "source"
    assert (tmp_path / "source" / "marlin_cy" / "opencl" / "__init__.py").exists()


def build_extension(folder, **sources):
    """Compile C files, given by name, into one extension ``pair`` by the project's own command ``build_ext``."""
    text, compiled = (ROOT / "setup.py").read_text(), "ext_modules=cythonize("
    assert compiled in text
    extension = f'Extension("pair", {[f"{name}.c" for name in sources]})'
    (folder / "setup.py").write_text(text.replace(compiled, f"ext_modules=(lambda *args, **options: [{extension}])("))
    for name, source in sources.items():
        (folder / f"{name}.c").write_text(source)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "built"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


MODULE = """
#include <Python.h>
long two(void);
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "pair"};
PyMODINIT_FUNC PyInit_pair(void)
{
    PyObject *made = PyModule_Create(&module);
    PyModule_AddIntConstant(made, "two", two());
    return made;
}
"""


def test_files_that_are_compiled_side_by_side_are_linked(tmp_path):
    done = build_extension(tmp_path, module=MODULE, other="long two(void) { return 2; }\n")
    assert done.returncode == 0, done.stderr
    assert succeed(sys.executable, "-c", "import pair; print(pair.two)", cwd=tmp_path / "built").strip() == "2"


@pytest.mark.parametrize("broken", ["first", "last"])
def test_an_error_in_any_file_is_shown_and_fails_the_build(tmp_path, broken):
    sources = {"first": "long two(void) { return 2; }\n", "middle": MODULE, "last": "long three(void) { return 3; }\n"}
    sources[broken] = "#error this file is broken\n"
    done = build_extension(tmp_path, **sources)
    assert done.returncode != 0
    assert f"{broken}.c:1" in done.stderr and "this file is broken" in done.stderr
    assert not list(tmp_path.glob("built/**/*.so"))


def test_install_and_run_elsewhere(distributions, tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=os.name == "posix")
    binaries = environment / ("Scripts" if os.name == "nt" else "bin")
    succeed(sys.executable, "-m", "pip", "--python", binaries / "python", "install", distributions["wheel"])

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    report = json.loads(succeed(binaries / "marlin-cy", "run", "--json", cwd=elsewhere))
    assert report["ok"] is True
    assert len(report["layers"]) == 4
    assert Path(report["checkpoint"]).is_relative_to(environment.resolve())
    found = json.loads(succeed(binaries / "python", "-m", "marlin_cy", "doctor", "--json", cwd=elsewhere))
    assert found["backends"]["cpu"] is None
    assert "pip install 'marlin-cy[opencl]'" in found["backends"]["opencl"]
    find = "import marlin_cy.opencl; print(marlin_cy.opencl.__path__[0])"
    installed = Path(succeed(binaries / "python", "-c", find, cwd=elsewhere).strip())
    assert installed.is_relative_to(environment.resolve())
    assert (installed / "kernels" / "common.cl").read_text() == (ROOT / "opencl/kernels/common.cl").read_text()
