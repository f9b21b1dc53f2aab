"""Backends by name."""

import subprocess
import sys

import pytest

import marlin_cy
from marlin_cy import backends
from marlin_cy.errors import BackendUnavailable


def test_cpu():
    assert marlin_cy.get_backend("cpu").name == "cpu"


def test_opencl_says_why_it_is_unavailable_and_what_to_do():
    with pytest.raises(BackendUnavailable, match=r"'opencl'.*no OpenCL kernels.*use backend 'cpu'"):
        marlin_cy.get_backend("opencl")


@pytest.mark.parametrize("installed", [True, False])
def test_opencl_says_whether_pyopencl_is_there(monkeypatch, installed):
    from marlin_cy import opencl

    monkeypatch.setattr(opencl, "find_spec", lambda name: object() if installed else None)
    assert f"PyOpenCL is {'' if installed else 'not '}installed" in opencl.availability()


def test_available_backends():
    reasons = marlin_cy.available_backends()
    assert reasons.keys() == {"cpu", "opencl"}
    assert reasons["cpu"] is None
    assert isinstance(reasons["opencl"], str)


def test_a_backend_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "abacus", backends.BACKENDS["cpu"]._replace(module="marlin_cy.abacus"))
    assert "marlin_cy.abacus" in marlin_cy.available_backends()["abacus"]
    with pytest.raises(BackendUnavailable, match=r"'abacus'.*marlin_cy\.abacus.*pip install"):
        marlin_cy.get_backend("abacus")


def test_unknown_name():
    with pytest.raises(ValueError, match=r"name: got 'cuda', expected one of 'cpu', 'opencl'"):
        marlin_cy.get_backend("cuda")


@pytest.mark.parametrize("name", [None, 1, b"cpu", ["cpu"]])
def test_name_of_another_type(name):
    with pytest.raises(TypeError, match=r"name: got .*, expected str"):
        marlin_cy.get_backend(name)


def test_asking_what_is_available_does_not_import_pyopencl():
    code = "import sys, marlin_cy; marlin_cy.available_backends(); print('pyopencl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
