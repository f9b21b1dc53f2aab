"""``tools/compile_kernels.py`` compiles one variant of every ``.cl`` file for its targets, sm_90 excepted."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")

from marlin_cy.opencl.program import kernel_files  # noqa: E402

SCRIPT = Path(__file__).parents[1] / "tools" / "compile_kernels.py"


def loaded():
    spec = importlib.util.spec_from_file_location("compile_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = loaded()


def need(target):
    if reason := check.TARGETS[target].missing():
        pytest.skip(f"{target} needs {reason}")


# The default run takes the target that compiles fastest. What compiles for sm_80 does so for sm_90: NVIDIA's compilers
# take the instructions of older GPUs, and no kernel asks which of the two it is compiled for.
@pytest.mark.parametrize(
    "target", ["spir64", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("gfx90a", "gfx1100", "sm_80"))]
)
def test_compiles(target):
    need(target)
    problems = [
        f"{program}\n{problem}" for program in check.programs(target, quick=True) if (problem := program.problem())
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("target", ["gfx90a", "gfx1100", "spir64"])
def test_every_file_is_compiled(target):
    assert {program.file for program in check.programs(target)} == set(kernel_files())
    assert {program.file for program in check.programs(target, quick=True)} == set(kernel_files())


def test_the_table_names_files_that_exist():
    assert set(check.VARIANTS) <= set(kernel_files())


def test_a_file_that_does_not_compile(monkeypatch, capsys):
    need("gfx90a")
    monkeypatch.setattr(check, "source", lambda file: '#line 7 "a.cl"\n__kernel void a(void) { no_such_name(); }\n')
    assert check.main(["--target", "gfx90a", "--file", "pack"]) == 1
    said = capsys.readouterr().out
    assert "FAILED gfx90a pack" in said
    assert "a.cl:7" in said
    assert "no_such_name" in said


def test_commands_are_shown(capsys):
    need("gfx90a")
    assert check.main(["--target", "gfx90a", "--file", "mma", "--show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len([program for program in check.programs("gfx90a") if "mma" in program.file])
    assert all("-mcpu=gfx90a" in line and "-DNO_PTX=1" in line for line in lines)
