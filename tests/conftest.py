"""What the tests share: printed seeds, and the backends, instruction sets and precisions to run on."""

import os
import zlib

import numpy as np
import pytest

import marlin_cy
from marlin_cy import cpu

SEED_VARIABLE = "MARLIN_CY_TEST_SEED"
ISAS = {isa["name"]: isa for isa in cpu.dispatch_report()["isas"]}


@pytest.fixture
def rng(request):
    """A generator whose seed is printed, so that a failure shows it; the environment can set another."""
    seed = int(os.environ.get(SEED_VARIABLE) or zlib.crc32(request.node.nodeid.encode()))
    print(f"{SEED_VARIABLE}={seed}")
    return np.random.default_rng(seed)


@pytest.fixture(params=[name for name, reason in marlin_cy.available_backends().items() if reason is None])
def backend(request):
    """Every backend that works here; ``test_contract.py`` skips, with the reason, for each that does not."""
    return marlin_cy.get_backend(request.param)


@pytest.fixture
def cpu_backend():
    return marlin_cy.get_backend("cpu")


@pytest.fixture(params=[name for name, isa in ISAS.items() if isa["available"]])
def isa(request):
    """Every instruction set that this machine runs; ``test_dispatch.py`` skips, with the reason, for each other."""
    return request.param


@pytest.fixture(params=["int16", "int8"])
def compute_dtype(request):
    return request.param
