"""The choice of the instruction set, and the messages about instruction sets that cannot run."""

import os
import subprocess
import sys

import pytest
from conftest import ISAS

from marlin_cy import cpu

VARIABLE = "MARLIN_CY_ISA"
MISSING = [name for name, isa in ISAS.items() if not isa["available"]]
REPORT = """
import numpy as np, marlin_cy
from marlin_cy import cpu
backend = marlin_cy.get_backend("cpu")
print(cpu.dispatch_report()["chosen"], cpu.dispatch_report()["reason"], backend.new_context().isa, sep="|")
"""
FAILURE = """
import marlin_cy
try:
    marlin_cy.get_backend("cpu").new_context()
except ValueError as error:
    print(error)
"""


def python(code, value):
    """The output of a new interpreter, with the variable set to ``value``."""
    environment = {**os.environ, VARIABLE: value}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ISAS)
def test_isa_is_tested_here(name):
    """That is: the tests that take the fixture ``isa`` run on it."""
    if not ISAS[name]["available"]:
        pytest.skip(f"{name}: {ISAS[name]['reason']}")


def test_generic_is_everywhere():
    assert next(iter(ISAS.values())) == {"name": "generic", "available": True, "reason": "portable C"}


def test_the_most_specific_is_chosen(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    report = cpu.dispatch_report()
    assert report["chosen"] == [name for name, isa in ISAS.items() if isa["available"]][-1]
    assert ISAS[report["chosen"]]["reason"] in report["reason"]


def test_the_variable_decides(isa):
    assert python(REPORT, isa) == f"{isa}|{VARIABLE} asks for it|{isa}"


def test_an_empty_variable_does_not():
    assert VARIABLE not in python(REPORT, "")


def test_a_context_decides_for_itself(cpu_backend, monkeypatch, isa):
    monkeypatch.setenv(VARIABLE, "generic")
    assert cpu_backend.new_context().isa == "generic"
    assert cpu_backend.new_context(isa=isa).isa == isa


def test_unknown_name_in_the_variable():
    expected = f"environment variable {VARIABLE}: isa: got 'mmx', expected one of {', '.join(ISAS)}"
    assert python(FAILURE, "mmx") == expected


@pytest.mark.skipif(not MISSING, reason="this machine runs every instruction set")
def test_a_name_that_cannot_run_here_in_the_variable():
    reason = ISAS[MISSING[0]]["reason"]
    expected = f"environment variable {VARIABLE}: isa: got {MISSING[0]!r}, which this machine cannot run: {reason}"
    assert python(FAILURE, MISSING[0]) == expected


@pytest.mark.skipif(not MISSING, reason="this machine runs every instruction set")
def test_a_context_of_what_cannot_run_here(cpu_backend):
    with pytest.raises(ValueError, match=f"isa: got '{MISSING[0]}', which this machine cannot run: "):
        cpu_backend.new_context(isa=MISSING[0])


@pytest.mark.parametrize(
    ("options", "exception", "message"),
    [
        ({"isa": "mmx"}, ValueError, "isa: got 'mmx', expected one of generic"),
        ({"isa": ""}, ValueError, "isa: got '', expected one of"),
        ({"isa": "generic\0"}, ValueError, r"isa: got 'generic\\x00', expected one of"),
        ({"isa": "\udcff"}, ValueError, "isa"),
        ({"isa": b"generic"}, TypeError, "isa: got bytes, expected str or None"),
        ({"num_threads": 0}, ValueError, "num_threads: got 0, expected 1 to 4096"),
        ({"num_threads": -1}, ValueError, "num_threads: got -1"),
        ({"num_threads": 2**70}, ValueError, "num_threads: got a number of 71 bits"),
        ({"num_threads": 1.0}, TypeError, "num_threads: got 1.0, expected an int"),
        ({"num_threads": "2"}, TypeError, "num_threads: got '2', expected an int"),
        ({"compute_dtype": "float32"}, ValueError, "compute_dtype: got 'float32', expected one of int16, int8"),
        ({"compute_dtype": None}, ValueError, "compute_dtype: got None"),
        ({"compute_dtype": ["int8"]}, ValueError, r"compute_dtype: got \['int8'\]"),
        ({"threads": 2}, TypeError, "threads"),
    ],
)
def test_options_refused(cpu_backend, options, exception, message):
    with pytest.raises(exception, match=message):
        cpu_backend.new_context(**options)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_threads_that_openmp_binds_do_not_hide_other_cpus():
    code = "from marlin_cy.cpu._workspace import available_cpus; print(available_cpus())"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"OMP_PROC_BIND": "true"}, capture_output=True, text=True
    )
    assert int(done.stdout) == len(os.sched_getaffinity(0)), done.stderr


def test_openmp_is_reported():
    report = cpu.openmp_report()
    assert report["enabled"] == (report["version"] != 0)
