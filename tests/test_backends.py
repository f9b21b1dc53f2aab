"""Backends by name."""

import os
import re

import pytest

import marlin_cy
from marlin_cy import backends
from marlin_cy.errors import BackendUnavailable


def test_cpu():
    assert marlin_cy.get_backend("cpu").name == "cpu"


def test_opencl():
    """Its ways not to be available are in ``test_opencl_device.py``."""
    reason = marlin_cy.available_backends()["opencl"]
    if reason:
        with pytest.raises(BackendUnavailable, match=re.escape(f"backend 'opencl': {reason}")):
            marlin_cy.get_backend("opencl")
    else:
        assert marlin_cy.get_backend("opencl").name == "opencl"


@pytest.mark.skipif(not os.environ.get("CI"), reason="CI is not set: this machine need not have OpenCL")
def test_ci_has_opencl():
    """Elsewhere the OpenCL tests may be skipped, with a reason; not where the project's tests count."""
    assert marlin_cy.available_backends()["opencl"] is None


def test_opencl_refuses_an_unknown_option(monkeypatch):
    monkeypatch.setattr("marlin_cy.opencl.availability", lambda: None)
    pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")
    with pytest.raises(TypeError, match="abacus"):
        marlin_cy.get_backend("opencl", abacus=True)


def test_available_backends():
    reasons = marlin_cy.available_backends()
    assert reasons.keys() == {"cpu", "opencl"}
    assert reasons["cpu"] is None


def test_a_built_in_backend_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(backends, "BUILT_IN", {"abacus": "marlin_cy.abacus:Abacus"})
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
