"""The tables of kernels: complete, built once, and never changed.

Products read them without the GIL, while other threads make contexts.
"""

import contextlib
import ctypes
import re
import sys
import threading

import numpy as np
import pytest
from asserts import assert_same_bits
from conftest import ISAS
from kernel_libraries import (
    COMPILER,
    TESTS,
    build_library,
    context_with,
    emulated_amx_library,
    kernel_table,
)
from problems import activations, random_problem

from marlin_cy.cpu._dispatch import CONSTANTS, KernelTable

AVAILABLE = [name for name, isa in ISAS.items() if isa["available"]]
THREADS = 3
ROOT = TESTS.parent

# An ISA whose mc differs from its parent's. mc decides where split-K puts partial sums, so products would be wrong if a
# table held the parent's mc for a moment.
TALL = """
#include "isa.h"
const isa_descriptor isa_tall = {.name = "tall", .parent = &isa_PARENT, .kernels = {.mc = MAX_MC}};
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """An ISA ``tall``; and ``mine`` of the page on adding an ISA, if it can run here."""
    if COMPILER is None:
        pytest.skip("no C compiler")
    folder, parent = tmp_path_factory.mktemp("library"), "generic"
    sources = {"tall": TALL}
    if "avx2" in AVAILABLE:
        parent = "avx2"
        page = (ROOT / "docs" / "adding-an-isa.md").read_text()
        (sources["mine"],) = re.findall(r"```c\n(.*?)```", page, re.DOTALL)
    for name, source in sources.items():
        (folder / f"{name}.c").write_text(source.replace("PARENT", parent))
    return build_library(folder, *(folder / f"{name}.c" for name in sources))


@pytest.fixture(scope="module")
def tall(library):
    return lambda: kernel_table(library, "tall")


@pytest.fixture(scope="module")
def emulated_amx(tmp_path_factory):
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("the emulation needs Linux and a C compiler")
    if "avx512vnni" not in AVAILABLE:
        pytest.skip("AMX inherits kernels of AVX-512, which this machine lacks")
    library = emulated_amx_library(tmp_path_factory.mktemp("amx"))
    return lambda: kernel_table(library, "amx")


@pytest.fixture(params=[*AVAILABLE, "tall", "emulated_amx"])
def new_context(request, cpu_backend):
    """Makes contexts of an instruction set that runs here, or of a table that the tests compiled."""
    if request.param in AVAILABLE:
        return lambda num_threads: cpu_backend.new_context(isa=request.param, num_threads=num_threads)
    table = request.getfixturevalue(request.param)
    return lambda num_threads: context_with(cpu_backend, table(), num_threads=num_threads)


@contextlib.contextmanager
def repeated_beside(function):
    """Call a function again and again in another thread; yields the list of its calls."""
    calls, done, interval = [], threading.Event(), sys.getswitchinterval()

    def repeat():
        while not done.is_set():
            function()
            calls.append(None)

    thread = threading.Thread(target=repeat)
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        yield calls
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_products_beside_new_contexts(new_context, cpu_backend, rng):
    """K is split among the threads. Each product is compared with one that was computed alone."""
    k, m, repeats = 64 * CONSTANTS["CHUNK_K"], 2, 150
    stack = random_problem(rng, 1, k, 16, 128).stack(cpu_backend)
    x = activations(rng, m, k)
    ctx, out, wrong = new_context(THREADS), np.empty((m, 16), np.float32), 0
    stack.gemm_phase_batched(ctx, x, [(0, 0, 0, m)], out, k)
    expected = out.copy()
    with repeated_beside(lambda: new_context(1)) as calls:
        for _ in range(repeats):
            out.fill(12345)
            stack.gemm_phase_batched(ctx, x, [(0, 0, 0, m)], out, k)
            wrong += not np.array_equal(out.view(np.uint32), expected.view(np.uint32))
    assert wrong == 0, f"{wrong} of {repeats} products wrong, beside {len(calls)} new contexts"
    assert len(calls) > repeats / 10, "hardly any context was made meanwhile"


def test_nothing_writes_to_a_table(new_context, cpu_backend):
    """A pattern in its memory survives new contexts of every instruction set: no table is built a second time."""
    kernels = new_context(1).workspace.kernels
    content = bytes(kernels)
    pattern = b"\xa5" * len(content)
    ctypes.memmove(kernels.address, pattern, len(content))
    try:
        new_context(1)
        for isa in AVAILABLE:
            cpu_backend.new_context(isa=isa)
        assert bytes(kernels) == pattern
    finally:
        ctypes.memmove(kernels.address, content, len(content))


@pytest.mark.parametrize("isa", AVAILABLE)
def test_contexts_share_a_table(cpu_backend, isa):
    first, second = (cpu_backend.new_context(isa=isa).workspace.kernels for _ in range(2))
    assert first is second
    assert first.name == isa


def test_a_context_keeps_its_table(new_context, cpu_backend):
    ctx = new_context(1)
    kernels, address, content = ctx.workspace.kernels, ctx.workspace.kernels.address, bytes(ctx.workspace.kernels)
    for _ in range(3):
        for isa in AVAILABLE:
            cpu_backend.new_context(isa=isa)
    assert ctx.workspace.kernels is kernels
    assert (kernels.address, bytes(kernels)) == (address, content)


def test_every_table_is_complete(new_context):
    """Every function pointer is set; mr and mc are valid."""
    kernels = new_context(1).workspace.kernels
    pointer = np.dtype(np.uintp).itemsize
    words = np.frombuffer(bytes(kernels), np.uintp)
    gemms = CONSTANTS["CODES_COUNT"] * CONSTANTS["MAX_PLANES"]
    sizes = -(-3 * 4 // pointer)  # mr, mc and min_matrix_rows
    assert words[:gemms].all()
    assert words[gemms + sizes :].all()
    assert kernels.mc % kernels.mr == 0
    assert 0 < kernels.mr <= kernels.mc <= CONSTANTS["MAX_MC"]
    assert kernels.min_matrix_rows >= 0


def test_own_kernels_override_inherited_ones(tall, cpu_backend):
    table, parent = tall(), cpu_backend.new_context(isa="generic").workspace.kernels
    assert (table.name, table.mc) == ("tall", CONSTANTS["MAX_MC"])
    assert (table.mr, table.min_matrix_rows) == (parent.mr, parent.min_matrix_rows)
    assert parent.mc < table.mc


def test_a_table_is_not_made_from_nothing():
    with pytest.raises(TypeError, match="KernelTable: cannot be made directly"):
        KernelTable()


def test_the_example_of_the_page_on_adding_an_isa(library, cpu_backend, rng):
    """Its C file compiles as it stands, and its table computes."""
    if "avx2" not in AVAILABLE:
        pytest.skip("the example extends AVX2, which this machine lacks")
    stack, x = random_problem(rng, 1, 160, 24, 32).stack(cpu_backend), activations(rng, 5, 160)
    results = []
    for ctx in (
        cpu_backend.new_context(isa="generic", num_threads=1),
        context_with(cpu_backend, kernel_table(library, "mine"), num_threads=1),
    ):
        results.append(np.full((5, 24), 12345, np.float32))
        stack.gemm_phase_batched(ctx, x, [(0, 0, 0, 5)], results[-1], 160)
    assert ctx.isa == "mine"
    assert_same_bits(results[1], results[0])
