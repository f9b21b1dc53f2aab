"""Fixtures that the tests share: printed seeds, and the backends, instruction sets and precisions to run on."""

import ctypes
import functools
import gc
import os
import re
import sys
import zlib
from typing import NamedTuple

# Processes of pytest-xdist share the cores: a thread that waits must not spin. OpenMP reads this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Tests start more than a hundred Python processes. Without bytecode, each would compile the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Instruction sets that this machine emulates, a library that emulated.sh compiles. It is loaded before the package, so
# that the package takes these kernels instead of its own of the same names.
EMULATED_PATH = os.environ.get("MARLIN_CY_TEST_EMULATED")
EMULATED = ctypes.CDLL(EMULATED_PATH, ctypes.RTLD_GLOBAL) if EMULATED_PATH else None

import numpy as np  # noqa: E402
import pytest  # noqa: E402

import marlin_cy  # noqa: E402
from marlin_cy import cpu  # noqa: E402

SEED_VARIABLE = "MARLIN_CY_TEST_SEED"
# How many times the cases of each test marked `sampled` a run takes: for runs that the sweep does not complete.
SAMPLES_VARIABLE = "MARLIN_CY_TEST_SAMPLES"
# The name of the only backend to test, such as a backend of another package.
BACKEND_VARIABLE = "MARLIN_CY_TEST_BACKEND"
ISAS = {isa["name"]: isa for isa in cpu.dispatch_report()["isas"]}
assert EMULATED is None or ISAS["amx"]["reason"] == "emulated by the tests", "the package has not taken the emulation"


@pytest.fixture
def rng(request):
    """A test's own generator."""
    return generator(request.node.nodeid)


def generator(name):
    """A generator whose seed is printed, so that a failure shows it; the environment can set another."""
    seed = int(os.environ.get(SEED_VARIABLE) or zlib.crc32(name.encode()))
    print(f"{SEED_VARIABLE}={seed}")
    return np.random.default_rng(seed)


# Compiled programs are not left in the user's cache.
os.environ.setdefault("MARLIN_CY_CACHE_DIR", "")
# PoCL, an OpenCL driver for CPUs, compiles without its optimiser, which would take three quarters of the time of the
# OpenCL tests. A variable that is set is kept: with `POCL_EXTRA_BUILD_FLAGS= pytest`, PoCL compiles as for users.
os.environ.setdefault("POCL_EXTRA_BUILD_FLAGS", "-cl-opt-disable")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Keep the garbage collector from the million objects of modules and items, which live as long as the run."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    """Put most cases of a test that is marked ``sampled(n)`` into the sweep.

    The default run takes ``n`` cases of each such test, evenly spread over its parameters; the environment may multiply
    ``n``. The other cases get the marker ``sweep``. A case that is marked ``sweep`` in its own right does not count.
    """
    times = int(os.environ.get(SAMPLES_VARIABLE) or 1)
    cases = {}
    for item in items:
        if (sampled := item.get_closest_marker("sampled")) and not item.get_closest_marker("sweep"):
            cases.setdefault((item.parent.nodeid, item.originalname), (sampled.args[0] * times, []))[1].append(item)
    for kept, of_one_test in cases.values():
        chosen = {round(i * (len(of_one_test) - 1) / max(kept - 1, 1)) for i in range(kept)}
        for position, item in enumerate(of_one_test):
            if position not in chosen:
                item.add_marker("sweep")


class OpenClPlace(NamedTuple):
    """A tier on a device; ``missing`` is the reason why it cannot run there, or None."""

    device: int
    tier: str
    missing: str | None
    label: str


def opencl_places():
    """Every tier on every OpenCL device found; none where the backend does not work."""
    if marlin_cy.available_backends()["opencl"] is not None:
        return []
    from marlin_cy.opencl import device, tiers

    return [
        OpenClPlace(number, tier, missing, re.sub(r"[^\w:]+", "-", f"opencl:{device.describe(found)}:{tier}"))
        for number, found in enumerate(device.list_devices())
        if device.reason_unusable(found) is None
        for tier, missing in tiers.explain(device.capabilities(found))
    ]


OPENCL_PLACES = opencl_places()
USABLE_PLACES = {place.label: place for place in OPENCL_PLACES if place.missing is None}
# Every device once, with its most general tier.
DEVICE_LABELS = ["cpu", *{place.device: place.label for place in USABLE_PLACES.values()}.values()]


@functools.cache
def backend_called(name):
    """A backend by its label; one for all tests, so that they share compiled programs."""
    if name not in USABLE_PLACES:
        return marlin_cy.get_backend(name)
    place = USABLE_PLACES[name]
    return marlin_cy.get_backend("opencl", device=place.device, tier=place.tier)


ONLY_BACKEND = os.environ.get(BACKEND_VARIABLE)


@pytest.fixture(params=[ONLY_BACKEND] if ONLY_BACKEND else ["cpu", *USABLE_PLACES])
def backend(request):
    """Every backend that works here, OpenCL once for each device and tier; or the one that the environment names.

    ``test_contract.py`` skips, with the reason, for each that does not.
    """
    return backend_called(request.param)


@pytest.fixture(params=USABLE_PLACES)
def opencl_backend(request):
    return backend_called(request.param)


@pytest.fixture(scope="session")
def built_programs():
    """Programs of :func:`shared_programs`, by context, device, source and options."""
    return {}


@pytest.fixture
def shared_programs(built_programs, monkeypatch):
    """Backends of one context do not compile a program again that another of them has compiled from the same source.

    For tests that make a backend as a new process would: what it remembers is new, what the compiler gives is not.
    """
    from marlin_cy.opencl.program import ProgramCache

    compile_source = ProgramCache._from_source

    def from_source(programs, file, text, options):
        key = programs._context, programs._device, text, tuple(options)
        if key not in built_programs:
            built_programs[key] = compile_source(programs, file, text, options)
        return built_programs[key]

    monkeypatch.setattr(ProgramCache, "_from_source", from_source)


@pytest.fixture(params=DEVICE_LABELS)
def device_backend(request):
    """Every backend, OpenCL once for each device: for tests that do not depend on the tier."""
    return backend_called(request.param)


@pytest.fixture(params=DEVICE_LABELS[1:])
def device_alone(request):
    """OpenCL alone, once for each device."""
    return backend_called(request.param)


@pytest.fixture(scope="session")
def made_calls():
    """What the calls of :func:`call` are made of, by parameter: packed once for all tests."""
    return {}


@pytest.fixture
def call(request, made_calls):
    """A right call of one method; the parameter is ``(label of a backend, name in calls.CALLS)``."""
    from calls import CALLS

    label, name = request.param
    call = CALLS[name](backend_called(label), generator(name), made_calls.get(request.param))
    made_calls.setdefault(request.param, call.made)
    return call


@pytest.fixture
def cpu_backend():
    return backend_called("cpu")


@pytest.fixture
def quick_bandwidth(monkeypatch):
    """A bandwidth that costs nothing to measure: 10 GB/s. For a process of its own, there is ``quick_command.py``."""
    monkeypatch.setattr("marlin_cy.cpu.measure._bandwidth.read_bandwidth", lambda num_threads: 10e9)


AVAILABLE_ISAS = [name for name, isa in ISAS.items() if isa["available"]]


@pytest.fixture(params=AVAILABLE_ISAS)
def isa(request):
    """Every instruction set that this machine runs; ``test_dispatch.py`` skips, with the reason, for each other."""
    return request.param


@pytest.fixture
def on_every_isa(cpu_backend):
    """``on_every_isa(**options)``: a context on each instruction set, for tests whose reference takes the most time."""

    def contexts(**options):
        for name in AVAILABLE_ISAS:
            print(f"isa {name}")
            yield cpu_backend.new_context(isa=name, **options)

    return contexts


@pytest.fixture(params=["int16", "int8"])
def compute_dtype(request):
    return request.param
