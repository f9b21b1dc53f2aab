"""The cost of a product depends on the number of named rows, not on their indices; rows are quantised once."""

import mmap
import tracemalloc

import numpy as np
import pytest
from asserts import assert_same_bits
from problems import activations, random_problem

import marlin_cy

FAR = 2_000_000
K, N = 32, 8
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def batched(rows):
    """Multiply single rows, in one call of ``gemm_phase_batched``."""

    def call(stack, ctx, x, out):
        dispatches = [(0, row, place, 1) for place, row in enumerate(rows)]
        stack.gemm_phase_batched(ctx, x, dispatches, out, K)
        return out[: len(rows)]

    return call


def vllm(rows):
    """Multiply single rows, in one call of ``gemm_phase_vllm``."""
    ids = np.array(rows, np.int32)
    experts = np.zeros(len(ids), np.int32)

    def call(stack, ctx, x, out):
        stack.gemm_phase_vllm(ctx, x, ids, experts, len(ids), out, max(rows) + 1, 1, 1)
        return out[ids]

    return call


@pytest.mark.parametrize("form", [batched, vllm])
class TestFarRows:
    @pytest.fixture
    def far(self, cpu_backend, rng):
        """A stack, and an input whose row ``FAR`` equals row 0. Pages in between are never touched."""
        stack = random_problem(rng, 2, K, N, 32).stack(cpu_backend)
        x = np.zeros((FAR + 1, K), np.float16)
        x[0] = x[FAR] = activations(rng, 1, K, np.float16)
        return stack, x, np.zeros((FAR + 1, N), np.float32)

    @pytest.mark.parametrize("rows", [[FAR], [0, FAR]], ids=["far", "near and far"])
    def test_memory(self, cpu_backend, far, form, rows):
        """The workspace and the peak of all allocations equal the ones for rows 0 and 1, within 10 %."""
        stack, x, out = far
        held, peaks = [], []
        for named in (list(range(len(rows))), rows):
            ctx, call = cpu_backend.new_context(num_threads=1), form(named)
            tracemalloc.start()
            call(stack, ctx, x, out)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            held.append(ctx.workspace.nbytes)
        assert held[0] == held[1] > 0
        assert peaks[1] <= 1.1 * peaks[0]

    @pytest.mark.parametrize("rows", [[FAR], [0, FAR], [FAR - 1, FAR]], ids=str)
    def test_work(self, cpu_backend, far, form, rows):
        """Exactly as many rows are quantised, in exactly as many bytes, as for the first rows.

        Callgrind counts 40,494 instructions for a batched call with row 0, and 40,484 with row 2,000,000; 34,206 and
        34,256 in vLLM's form (AVX2, one thread). Times are not compared, as they depend on the machine's load.
        """
        stack, x, out = far
        near = list(range(len(rows)))
        work = []
        for named in (near, rows):
            ctx = cpu_backend.new_context(num_threads=1)
            form(named)(stack, ctx, x, out)
            work.append((ctx.workspace.quantized_rows, ctx.workspace.nbytes))
        assert work[1] == work[0]
        assert work[0][0] == len(rows)

    def test_result(self, cpu_backend, far, form):
        stack, x, out = far
        ctx = cpu_backend.new_context(num_threads=1)
        near, distant = form([0, FAR])(stack, ctx, x, out)
        assert np.any(near)
        assert_same_bits(near, distant)


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="no anonymous maps on this system")
@pytest.mark.parametrize("count", [2, 600])
@pytest.mark.parametrize("first", [0, FAR])
def test_repeated_ids(cpu_backend, rng, count, first):
    """A repeated id is found among few ids and among many, whatever their values. Skipped blocks may repeat ids."""
    stack, ctx = random_problem(rng, 2, K, N, 32).stack(cpu_backend), cpu_backend.new_context(num_threads=1)
    rows = first + count
    x, out = untouched(rows, K), untouched(rows, N)
    ids = (first + rng.permutation(count)).astype(np.int32)
    ids[-1] = ids[0]
    experts = np.zeros(count, np.int32)
    with pytest.raises(ValueError, match=rf"sorted_token_ids\[{count - 1}\]: got {ids[0]} a second time"):
        stack.gemm_phase_vllm(ctx, x, ids, experts, count, out, rows, 1, 1)
    experts[-1] = -1
    stack.gemm_phase_vllm(ctx, x, ids, experts, count, out, rows, 1, 1)
    assert ctx.workspace.quantized_rows == count - 1


def untouched(rows, columns):
    """Zeros, float16. Only pages that are written take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        pages = mmap.mmap(-1, rows * columns * 2, flags=flags)
    except (OSError, OverflowError) as error:
        pytest.skip(f"no address space for {rows * columns * 2} bytes: {error}")
    return np.frombuffer(pages, np.float16).reshape(rows, columns)


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="no anonymous maps on this system")
class TestRowsBeyondInt32:
    def test_input_row(self, cpu_backend, rng):
        row = 2**31 + 3
        stack, ctx = random_problem(rng, 2, K, N, 32).stack(cpu_backend), cpu_backend.new_context(num_threads=1)
        x, out = untouched(row + 1, K), np.zeros((2, N), np.float32)
        x[row] = activations(rng, 1, K, np.float16)
        stack.gemm_phase_batched(ctx, x, [(1, row, 0, 1)], out, K)
        stack.gemm_phase_batched(ctx, x[row:], [(1, 0, 1, 1)], out, K)
        assert np.any(out)
        assert_same_bits(out[0], out[1])

    def test_too_many_rows(self, cpu_backend, rng):
        rows = 2**31
        stack, ctx = random_problem(rng, 1, K, N, 32).stack(cpu_backend), cpu_backend.new_context(num_threads=1)
        x, out = untouched(rows, K), untouched(rows, N)
        with pytest.raises(
            ValueError, match=r"dispatches: got 2147483648 rows to compute, expected fewer than 2\*\*31"
        ):
            stack.gemm_phase_batched(ctx, x, [(0, 0, 0, rows - 5), (0, 3, rows - 5, 5)], out, K)
        with pytest.raises(ValueError, match=r"m: got 2147483648 rows to compute, expected fewer than 2\*\*31"):
            stack.make_expert_linear(0, N).forward(ctx, x, out, rows)
        assert ctx.workspace.nbytes == 0


class TestRowsQuantisedOnce:
    """``Workspace.quantized_rows`` counts the rows that products have quantised."""

    @pytest.mark.parametrize("g_idx", ["none", "common"])
    @pytest.mark.parametrize("m", [1, 7, 300])
    @pytest.mark.parametrize(("begin", "end"), [(0, 5 * 40), (8, 5 * 40), (16, 4 * 40 + 8), (40, 80), (72, 88)])
    def test_view(self, cpu_backend, rng, g_idx, m, begin, end):
        """A view over several experts quantises each input row once, and gives the columns of each expert."""
        n = 40
        problem = random_problem(rng, 5, 1056, n, 32, g_idx=g_idx)
        stack, x = problem.stack(cpu_backend), activations(rng, m, 1056)
        ctx = cpu_backend.new_context(num_threads=3)
        bias = rng.standard_normal(end - begin).astype(np.float32)
        out = np.empty((m, end - begin), np.float32)
        stack.make_expert_linear(begin, end - begin, bias).forward(ctx, x, out, m)
        assert ctx.workspace.quantized_rows == m
        whole = np.empty((m, 5 * n), np.float32)
        for expert in range(5):
            part = np.empty((m, n), np.float32)
            stack.gemm_phase_batched(ctx, x, [(expert, 0, 0, m)], part, 1056)
            whole[:, expert * n : (expert + 1) * n] = part
        assert_same_bits(out, whole[:, begin:end] + bias)

    def test_rows_of_several_experts(self, cpu_backend, rng):
        """Rows that dispatches share are quantised once."""
        stack = random_problem(rng, 3, 64, 16, 32).stack(cpu_backend)
        ctx = cpu_backend.new_context(num_threads=2, isa="generic")
        out = np.empty((12, 16), np.float32)
        stack.gemm_phase_batched(ctx, activations(rng, 9, 64), [(0, 1, 0, 4), (1, 3, 4, 4), (2, 1, 8, 4)], out, 64)
        assert ctx.workspace.quantized_rows == 6

    def test_rows_of_several_choices(self, cpu_backend, rng):
        stack = random_problem(rng, 4, 64, 16, 32).stack(cpu_backend)
        ctx = cpu_backend.new_context(num_threads=2, isa="generic")
        ids = np.array([rng.permutation(4)[:3] for _ in range(10)])
        out = np.empty((30, 16), np.float32)
        routing = marlin_cy.moe_align_block_size(ids, 4, 4)
        stack.gemm_phase_vllm(ctx, activations(rng, 10, 64), *routing, out, 10, 4, 3)
        assert ctx.workspace.quantized_rows == 10
