"""The decoder's OpenCL kernels against ``marlin_cy.decoder.reference``, at sizes that leave work-groups partly idle."""

import dataclasses
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")

from asserts import relative_error  # noqa: E402
from problems import random_problem  # noqa: E402

from marlin_cy.decoder import reference  # noqa: E402
from marlin_cy.decoder.plan import AttentionPlan, DeltaNetPlan, DenseLinear, RopeTable  # noqa: E402
from marlin_cy.decoder.program import PAGE_TOKENS, Batch  # noqa: E402
from marlin_cy.errors import UnsupportedError  # noqa: E402
from marlin_cy.formats import gptq  # noqa: E402
from marlin_cy.opencl.buffers import TYPE_CODES, Rows, as_bytes  # noqa: E402
from marlin_cy.opencl.decoder.attention import Attend, Shape  # noqa: E402
from marlin_cy.opencl.decoder.cache import KvPool, StatePool, check_widths  # noqa: E402
from marlin_cy.opencl.decoder.delta import DeltaNet  # noqa: E402
from marlin_cy.opencl.decoder.heads import Rotation, place_heads  # noqa: E402
from marlin_cy.opencl.decoder.maker import Maker  # noqa: E402
from marlin_cy.opencl.decoder.merged import Merger  # noqa: E402
from marlin_cy.opencl.decoder.projections import DenseMatrix, ProjectionGroup, Uploads  # noqa: E402
from marlin_cy.opencl.decoder.step import (  # noqa: E402
    Cuts,
    Known,
    StepLayout,
    describe_segments,
    describe_step,
    rows_recorded,
)
from marlin_cy.opencl.layout import unpack_expert  # noqa: E402
from marlin_cy.opencl.recording import RecordingContext  # noqa: E402

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Sums of up to some thousand terms in float32, and one rounding to the type of the result or the cache.
BOUNDS = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
GUARD = 7.0
NONE = np.zeros((0, 4), np.int64)

pytestmark = pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")


class Bench:
    """A device with a recording context: buffers from arrays, and the launches that a test records."""

    def __init__(self, backend):
        self.ctx = backend.new_context()
        self.queue = self.ctx.queue
        self.recorder = RecordingContext(backend, self.queue)
        self.uploads = Uploads(backend.runtime)

    def rows(self, array):
        """An ndarray ``[rows, width]`` as rows on the device."""
        array = np.ascontiguousarray(array)
        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
        data = cl.Buffer(self.ctx.cl_context, flags, hostbuf=as_bytes(array))
        return Rows(data, 0, TYPE_CODES[array.dtype], *array.shape)

    def empty(self, rows, width, dtype=np.float32):
        """Rows of a number that no kernel writes."""
        return self.rows(np.full((rows, width), GUARD, dtype))

    def maker(self, step, rows):
        self.recorder.begin()
        buffer = self.rows(np.asarray(step, np.int32).view(np.float32)[None]).data
        return Maker(self.recorder, buffer, StepLayout(rows), rows)

    def run(self, known=None):
        self.recorder.recording.enqueue(self.queue, known)
        self.queue.finish()

    def read(self, rows, dtype=np.float32):
        host = np.empty((rows.rows, rows.width), dtype)
        cl.enqueue_copy(self.queue, as_bytes(host), rows.data)
        return host


@pytest.fixture(scope="module")
def benches():
    return {}


@pytest.fixture
def bench(device_alone, benches):
    return benches.setdefault(id(device_alone), Bench(device_alone))


def batch_of(rng, sequences, wanted=()):
    """A batch of ``(position, rows)`` pairs, with pages in random order."""
    positions, counts = np.array(sequences).T
    most = -(-int((positions + counts).max()) // PAGE_TOKENS)
    pages = rng.permutation(most * len(counts)).astype(np.int32).reshape(len(counts), most)
    first = np.cumsum(counts) - counts
    segments = np.stack([first, counts, positions, np.arange(len(counts))[::-1]], axis=1).astype(np.int64)
    tokens = rng.integers(0, 50, counts.sum()).astype(np.int32)
    return Batch(tokens, segments, pages, np.array(wanted, np.int32))


# Rows -------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("width", "output"), [(32, "float32"), (1000, "float16"), (37, "bfloat16")])
@pytest.mark.parametrize("added", [False, True])
def test_norm(bench, rng, width, output, added):
    x, more = rng.standard_normal((2, 3, width), np.float32)
    weight = rng.standard_normal(width, np.float32)
    on_device, out = bench.rows(x), bench.empty(3, width, DTYPES[output])
    maker = bench.maker(np.zeros(80), 3)
    maker.norm(on_device, bench.uploads.new(weight, "w"), 1e-5, out, added=bench.rows(more) if added else None)
    bench.run()
    total = x + more if added else x
    np.testing.assert_array_equal(bench.read(on_device), total)
    expected = reference.rms_norm(total, weight, 1e-5)
    assert relative_error(bench.read(out, DTYPES[output]), expected) < BOUNDS[output]


def test_norm_of_picked_parts_of_rows(bench, rng):
    """As for the head, and for latent queries; and it resets the counter of the launch that routes."""
    x, weight = rng.standard_normal((5, 40), np.float32), rng.standard_normal(24, np.float32)
    step = np.zeros(200, np.int32)
    maker = bench.maker(step, 5)
    step[maker.layout.picked : maker.layout.picked + 2] = 4, 1
    maker = bench.maker(step, 5)
    out, counter = bench.empty(2, 24), bench.rows(np.ones((1, 1), np.float32))
    place, weights = maker.layout.picked, bench.uploads.new(weight, "w")
    maker.norm(bench.rows(x), weights, 1e-6, out, x_offset=16, picked=place, arrived=counter.data)
    bench.run()
    assert relative_error(bench.read(out), reference.rms_norm(x[[4, 1], 16:], weight, 1e-6)) < BOUNDS["float32"]
    assert not bench.read(counter).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(bench, rng, dtype):
    table = rng.standard_normal((50, 24), np.float32).astype(DTYPES[dtype])
    batch = batch_of(rng, [(0, 3)])
    layout = StepLayout(3)
    step, _ = describe_step(batch, layout, Cuts(4, 1), 128)
    maker, x = bench.maker(step, 3), bench.empty(3, 24)
    macros, table_rows = {"INPUT_TYPE": TYPE_CODES[table.dtype]}, bench.rows(table)
    maker.record(
        *("decoder_rows", "embed_rows", macros, (3 * 8,), (8,)),
        batch=maker.step,
        table=table_rows.data,
        x=x.data,
        width=24,
    )
    bench.run()
    np.testing.assert_array_equal(bench.read(x), table[batch.tokens].astype(np.float32))


@pytest.mark.parametrize("positions", [[0], [15, 300, 16], list(range(16))], ids=str)
def test_single_rows_are_described_as_others_are(rng, positions):
    """Also where not all logits are wanted, and page tables are longer than the sequences."""
    batch = batch_of(rng, [(position, 1) for position in positions], [0] if len(positions) < 4 else [1, 7])
    batch = dataclasses.replace(batch, pages=np.pad(batch.pages, ((0, 0), (0, 3))))
    arguments = batch, StepLayout(len(positions)), Cuts(4, 30, 5), 16
    step, known = describe_step(*arguments, 16)
    expected, others = describe_segments(*arguments, 16)
    assert known == others
    np.testing.assert_array_equal(step, expected)


# Dense products ---------------------------------------------------------------------------------


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("rows", "k", "n", "weight", "x"),
    [
        (1, 64, 33, "bfloat16", "float32"),
        (3, 37, 9, "float16", "float32"),
        (5, 2048, 16, "float32", "float16"),
        (17, 100, 70, "bfloat16", "float32"),
        (130, 33, 65, "float16", "float32"),
    ],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_dense(bench, rng, rows, k, n, weight, x, with_bias):
    matrix = rng.standard_normal((n, k), np.float32).astype(DTYPES[weight])
    inputs = rng.standard_normal((rows, k), np.float32).astype(DTYPES[x])
    bias = rng.standard_normal(n, np.float32) if with_bias else None
    maker, out = bench.maker(np.zeros(4), rows), bench.empty(rows, n + 5)
    DenseMatrix(bench.uploads, matrix, bias, of_plan=False).record(maker, bench.rows(inputs), out, out_offset=2)
    bench.run()
    found = bench.read(out)
    assert relative_error(found[:, 2 : n + 2], reference.dense(inputs, matrix, bias)) < BOUNDS["float32"]
    assert (found[:, :2] == GUARD).all()
    assert (found[:, n + 2 :] == GUARD).all()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("rows", "k", "sizes", "scale_k"),
    [(1, 64, (33,), 64), (3, 37, (9, 4), 37), (2, 272, (5,), 128), (130, 80, (40, 25), 32)],
)
@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, np.int8])
def test_dense_products_of_8_bits(bench, rng, rows, k, sizes, scale_k, dtype):
    """A scale for each output, and for each block of K; layers that are one product."""
    layers = [
        DenseLinear(
            (30 * rng.standard_normal((n, k))).astype(dtype),
            rng.standard_normal(n, np.float32),
            rng.uniform(0.5, 2, (n, -(-k // scale_k))).astype(np.float32),
            scale_k,
        )
        for n in sizes
    ]
    inputs = rng.standard_normal((rows, k), np.float32)
    group = ProjectionGroup(bench.uploads, layers)
    assert len(group.parts) == 1
    maker, out = bench.maker(np.zeros(4), rows), bench.empty(rows, group.width)
    group.record(maker, bench.rows(inputs), out, "test")
    bench.run()
    expected = np.concatenate([reference.projection(inputs, layer) for layer in layers], axis=1)
    assert relative_error(bench.read(out), expected) < BOUNDS["float32"]


@pytest.mark.parametrize("rows", [2, 19])
def test_dense_products_of_heads(bench, rng, rows):
    """As the up-projections of latent attention."""
    heads, n, k = 3, 10, 24
    matrices = rng.standard_normal((heads, n, k), np.float32).astype(np.float16)
    x = rng.standard_normal((rows, 7 + heads * 30), np.float32)
    maker, out = bench.maker(np.zeros(4), rows), bench.empty(rows, heads * 12)
    DenseMatrix(bench.uploads, matrices, of_plan=False).record(
        maker, bench.rows(x), out, x_offset=7, x_batch=30, out_batch=12
    )
    bench.run()
    found = bench.read(out).reshape(rows, heads, 12)
    inputs = x[:, 7:].reshape(rows, heads, 30)[:, :, :k].astype(np.float64)
    expected = np.einsum("rhk,hnk->rhn", inputs, matrices.astype(np.float64))
    assert relative_error(found[:, :, :n], expected) < BOUNDS["float32"]
    assert (found[:, :, n:] == GUARD).all()


# Heads and attention ----------------------------------------------------------------------------


def attention_plan(heads, kv_heads, dim, rng, **changes):
    """A plan without projections."""
    table = rng.standard_normal((2, 700, dim // 4)).astype(np.float32)
    norms = rng.standard_normal((2, dim), np.float32)
    plan = AttentionPlan(
        *[None] * 4, heads, kv_heads, dim, dim**-0.5, RopeTable(*table, bool(dim % 3)), norms[0], norms[1]
    )
    return dataclasses.replace(plan, **changes)


def run_attention(bench, rng, plan, sequences, dtype="float32", most_splits=1):
    """Append to a cache by `place_heads`, then attend, in two steps: the rows before each sequence's position, then the
    sequences' own. Returns the output of the second step, and the expected output.

    The cache is NaN wherever no position was written.
    """
    heads, kv_heads, dim = plan.num_heads, plan.num_kv_heads, plan.head_dim
    batch = batch_of(rng, sequences)
    count = len(batch.tokens)
    backend = bench.recorder.backend
    pool = KvPool(backend.runtime, plan, int(batch.pages.max()) + 1, dtype)
    for buffer in (pool.keys, pool.values):
        cl.enqueue_fill_buffer(bench.queue, buffer, b"\xff" * 4, 0, buffer.size)
    shape = Shape(heads, kv_heads, dim, dim)
    attend = Attend(
        shape,
        pool,
        plan.scale,
        plan.soft_cap or 0.0,
        plan.window or 0,
        bench.uploads.optional(plan.sinks, "sinks"),
        dim if plan.gated else 0,
    )
    q_stride = dim * (2 if plan.gated else 1)
    width = heads * q_stride + 2 * kv_heads * dim
    norms = [bench.uploads(norm, "norm") for norm in (plan.q_norm, plan.k_norm)]
    rotation = Rotation.of(bench.uploads, plan.rope)
    results, expected, keys_before = None, np.zeros((count, heads, dim)), {}
    for part in ("before", "now"):
        lengths = batch.segments[:, 2] if part == "before" else batch.segments[:, 1]
        starts = np.zeros_like(lengths) if part == "before" else batch.segments[:, 2]
        used = lengths > 0
        if not used.any():
            continue
        first = np.cumsum(lengths[used]) - lengths[used]
        segments = np.stack([first, lengths[used], starts[used], np.zeros_like(first)], axis=1)
        rows = rows_recorded(int(lengths.sum()))
        step_batch = Batch(np.zeros(int(lengths.sum()), np.int32), segments, batch.pages[used], NONE[:, 0])
        cuts = Cuts(shape.tile_rows(backend.runtime.capabilities), most_splits, most_splits)
        step, known = describe_step(step_batch, StepLayout(rows), cuts, 16, 16)
        values = rng.standard_normal((rows, width), np.float32)
        maker, projected = bench.maker(step, rows), bench.rows(values)
        place_heads(
            *(maker, pool, rotation, heads, kv_heads),
            q=projected,
            q_head_stride=q_stride,
            q_width=dim,
            q_norm=norms[0],
            kv=projected,
            k_offset=heads * q_stride,
            v_offset=heads * q_stride + kv_heads * dim,
            k_width=dim,
            v_width=dim,
            k_norm=norms[1],
            k_norm_values=dim,
            eps=1e-6,
        )
        out = bench.empty(rows, heads * dim)
        attend.record(maker, projected, q_stride, out, cuts)
        bench.run(known)
        q, k, v = np.split(values, [heads * q_stride, heads * q_stride + kv_heads * dim], axis=1)
        q = q.reshape(rows, heads, -1)
        k, v = (array.reshape(rows, kv_heads, dim) for array in (k, v))
        if part == "before":
            keys_before = {
                int(number): (k[begin : begin + length], v[begin : begin + length])
                for number, begin, length in zip(np.flatnonzero(used), first, lengths[used], strict=True)
            }
            continue
        results = bench.read(out)[:count].reshape(count, heads, dim)
        rounded = DTYPES[dtype]
        for number, (begin, length, position) in enumerate(segments[:, :3]):
            rows_here = slice(begin, begin + length)
            earlier = keys_before.get(number, (k[:0], v[:0]))
            positions = np.arange(position + length)
            all_k = reference.rms_norm(np.concatenate([earlier[0], k[rows_here]]), plan.k_norm, 1e-6)
            all_k = reference.rope(all_k, plan.rope, positions).astype(rounded)
            all_v = np.concatenate([earlier[1], v[rows_here]]).astype(rounded)
            queries = reference.rms_norm(q[rows_here, :, :dim], plan.q_norm, 1e-6)
            queries = reference.rope(queries, plan.rope, positions[position:])
            found = reference.attention(
                *(queries, all_k, all_v, positions[position:]),
                scale=plan.scale,
                window=plan.window,
                sinks=plan.sinks,
                soft_cap=plan.soft_cap,
            )
            expected[rows_here] = found * reference.sigmoid(q[rows_here, :, dim:]) if plan.gated else found
    return results, expected


MIXED = [(0, 1), (37, 2), (5, 9), (200, 1), (16, 21)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "changes", "dtype", "most_splits"),
    [
        (8, 1, 16, {}, "float32", 1),
        (6, 2, 24, {"window": 19}, "float32", 40),
        (7, 1, 32, {"soft_cap": 1.5, "sinks": "yes"}, "float16", 1),
        (4, 4, 40, {"gated": True}, "bfloat16", 40),
        (16, 1, 64, {"gated": True, "sinks": "yes", "window": 3}, "float32", 40),
        (2, 1, 128, {"rope": RopeTable(np.zeros((700, 0), np.float32), np.zeros((700, 0), np.float32))}, "float32", 9),
        (2, 1, 256, {}, "float16", 40),
    ],
)
def test_attention(bench, rng, heads, kv_heads, dim, changes, dtype, most_splits):
    plan = attention_plan(heads, kv_heads, dim, rng, **{k: v for k, v in changes.items() if k != "sinks"})
    if "sinks" in changes:
        plan = dataclasses.replace(plan, sinks=rng.standard_normal(heads).astype(np.float32))
    found, expected = run_attention(bench, rng, plan, MIXED, dtype, most_splits)
    # Rounded scores differ by up to the bound times their size, some units.
    assert relative_error(found, expected) < 4 * BOUNDS[dtype]


@pytest.mark.sweep
def test_a_tile_in_many_splits(bench, rng):
    """More splits than there are positions for; tiles that are not full; a window that leaves splits empty."""
    for changes in ({}, {"window": 300}):
        plan = attention_plan(8, 2, 32, rng, **changes)
        found, expected = run_attention(bench, rng, plan, [(650, 5), (3, 4)], most_splits=80)
        assert relative_error(found, expected) < 4 * BOUNDS["float32"]


def test_few_rows_in_many_splits(bench, rng):
    plan = attention_plan(4, 2, 16, rng)
    found, expected = run_attention(bench, rng, plan, [(650, 1), (3, 1)], most_splits=80)
    assert relative_error(found, expected) < 4 * BOUNDS["float32"]


# The description of a step ----------------------------------------------------------------------


def test_rows_recorded():
    """At least the rows, at most a quarter more, and few different numbers."""
    numbers = [rows_recorded(rows) for rows in range(1, 1025)]
    assert numbers[:16] == list(range(1, 17))
    assert all(rows <= number <= max(16, 1.25 * rows) for rows, number in enumerate(numbers, 1))
    assert {64, 512, 1024} <= set(numbers)
    assert len(set(numbers)) == 40


def test_step_repeats_its_last_row(rng):
    batch = batch_of(rng, [(3, 2), (0, 15)], wanted=[1, 16])
    layout = StepLayout(20)
    step, known = describe_step(batch, layout, Cuts(4, 30), 16)
    records = step[16 : 16 + 80].reshape(20, 4)
    np.testing.assert_array_equal(records[:17, 0], batch.tokens)
    np.testing.assert_array_equal(records[:17, 1], [3, 4, *range(15)])
    np.testing.assert_array_equal(records[17:, :3], np.tile(records[16, :3], (3, 1)))
    np.testing.assert_array_equal(records[:, 3], [0, 0] + [1] * 15 + [-1] * 3)
    tables = [step[record[2] : record[2] + 1] for record in records[:3]]
    np.testing.assert_array_equal(np.concatenate(tables), batch.pages[[0, 0, 1], 0])
    np.testing.assert_array_equal(step[layout.picked : layout.picked + 2], [1, 16])
    assert known == Known(few_tiles=2, many_tiles=5, splits=1, segments=2)
    tiles = step[layout.many_tiles : layout.many_tiles + 20].reshape(5, 4)[:, :2]
    np.testing.assert_array_equal(tiles, [[2, 4], [6, 4], [10, 4], [14, 4], [18, 2]])


# Gated DeltaNet ---------------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("key_heads", "value_heads", "key_dim", "value_dim", "taps"), [(2, 4, 16, 24, 4), (1, 1, 40, 48, 3)]
)
def test_delta_net(bench, rng, key_heads, value_heads, key_dim, value_dim, taps):
    """Two steps, of which the second goes on with the states of the first; the conv's state spans both."""
    hidden, channels, values = 24, 2 * key_heads * key_dim + value_heads * value_dim, value_heads * value_dim

    def dense(n, k=hidden):
        return DenseLinear(rng.standard_normal((n, k), np.float32) / np.float32(k**0.5))

    plan = DeltaNetPlan(
        *(dense(channels), dense(values), dense(value_heads), dense(value_heads), dense(hidden, values)),
        rng.standard_normal((channels, taps), np.float32),
        *rng.standard_normal((2, value_heads), np.float32),
        rng.standard_normal(value_dim, np.float32),
        *(key_heads, value_heads, key_dim, value_dim, taps, 1e-6),
    )
    pool = StatePool(bench.recorder.backend.runtime, plan, 3)
    net = DeltaNet(bench.uploads, Merger(bench.recorder.backend.runtime), plan, pool)
    inputs = {slot: rng.standard_normal((30, hidden), np.float32) for slot in (0, 2)}
    found = {0: [], 2: []}
    for counts in ([(0, 2), (2, 20)], [(0, 1), (2, 1)], [(2, 3), (0, 2)]):
        done = {slot: sum(map(len, found[slot])) for slot in found}
        segments, x, row = [], [], 0
        for slot, count in counts:
            segments.append((row, count, done[slot], slot))
            x.append(inputs[slot][done[slot] : done[slot] + count])
            row += count
        batch = Batch(np.zeros(row, np.int32), np.array(segments), np.zeros((2, 4), np.int32), NONE[:, 0])
        rows = rows_recorded(row)
        step, known = describe_step(batch, StepLayout(rows), Cuts(4, 1), 128)
        maker, out = bench.maker(step, rows), bench.empty(rows, hidden)
        net.record(maker, bench.rows(np.concatenate([*x, np.zeros((rows - row, hidden), np.float32)])), out, 0)
        bench.run(known)
        results = bench.read(out)
        for (slot, count), segment in zip(counts, segments, strict=True):
            found[slot].append(results[segment[0] : segment[0] + count])
    for slot, parts in found.items():
        result = np.concatenate(parts)
        expected = reference.delta_net(inputs[slot][: len(result)].astype(np.float64), plan)
        assert relative_error(result, expected) < 1e-5


def test_unknown_argument(bench):
    """Arguments by name: one too many or too few is named."""
    maker = bench.maker(np.zeros(4), 1)
    with pytest.raises(TypeError, match="arguments of embed_rows: got .* expected .*width"):
        maker.record("decoder_rows", "embed_rows", {}, (1,), (1,), batch=None, table=None, x=None)


def test_heads_of_other_widths():
    plan = attention_plan(2, 1, 16, np.random.default_rng(0))
    for width in (12, 648):
        with pytest.raises(UnsupportedError, match=f"head_dim {width}, the OpenCL backend supports multiples of 8"):
            check_widths(dataclasses.replace(plan, head_dim=width))


def test_tiles_fit_local_memory():
    """Of devices with as little as OpenCL promises, and of larger ones."""
    for local_memory in (32 << 10, 48 << 10, 64 << 10):
        device = SimpleNamespace(local_memory=local_memory)
        for shape in (Shape(32, 4, 128, 128), Shape(16, 2, 256, 256), Shape(128, 1, 576, 512), Shape(4, 4, 64, 64)):
            rows = shape.tile_rows(device)
            for number in (1, rows):
                macros = shape.macros(number)
                assert macros["QUERIES"] % macros["QUERY_SETS"] == 0
                assert shape.value_dim // 8 * macros["QUERY_SETS"] * macros["KEY_SETS"] <= macros["ATTEND_ITEMS"]
                assert shape.local_bytes(number) <= local_memory


# Merged layers ----------------------------------------------------------------------------------


def linear(backend, rng, k, n, factor=1.0, group=32):
    q = rng.integers(0, 16, (k, n)).astype(np.uint8)
    scale = (factor * rng.uniform(0.5, 1.5, (k // group, n))).astype(np.float16)
    zero = rng.integers(1, 17, scale.shape)
    return backend.load_gptq(*gptq.pack_gptq(q, scale, zero), bits=4, group_size=group, k=k, n=n)


@pytest.mark.parametrize("factors", [(1, 1, 1), (1, 16, 0.25)])
def test_merged_layers(device_alone, rng, factors):
    """The merged store holds what the layers' stores hold, with scales by one power of two."""
    layers = [linear(device_alone, rng, 96, n, factor) for n, factor in zip((48, 16, 32), factors, strict=True)]
    merger = Merger(device_alone.runtime)
    merged = merger(layers)
    assert merger.nbytes == merged.nbytes
    found = contents(device_alone, merged)
    expected = [contents(device_alone, layer.store) for layer in layers]
    for part, parts in zip(found, zip(*expected, strict=True), strict=True):
        np.testing.assert_array_equal(part, np.concatenate(parts, axis=1))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["uint8-two_level", "uint4-two_level_min", "uint8-float32"])
def test_merged_layers_of_other_kinds(device_alone, rng, kind):
    codes, scales = kind.split("-")
    layers = [random_problem(rng, 1, 256, n, 32, codes=codes, scales=scales).linear(device_alone) for n in (48, 16)]
    merged = Merger(device_alone.runtime)(layers)
    assert (merged.codes, merged.scales, merged.weight_factor) == (codes, scales, 1)
    expected = [contents(device_alone, layer.store) for layer in layers]
    for part, parts in zip(contents(device_alone, merged), zip(*expected, strict=True), strict=True):
        np.testing.assert_array_equal(part, np.concatenate(parts, axis=1))


def contents(backend, store):
    q, parts = unpack_expert(store.read(backend.runtime.loading_queue, 0), store.group_orders[0], store.layout, store.k)
    return [q, parts.pop("scale").astype(np.float64) * store.weight_factor, *parts.values()]


def test_layers_that_are_not_merged(device_alone, rng):
    """Other sizes of K or groups, scales too far apart, half a strip, one layer, or too many bytes."""
    merger = Merger(device_alone.runtime)
    layer = linear(device_alone, rng, 64, 32)
    others = [
        linear(device_alone, rng, 96, 32),
        linear(device_alone, rng, 64, 32, group=64),
        linear(device_alone, rng, 64, 32, factor=2.0**-10),
        linear(device_alone, rng, 64, 24),
    ]
    for layers in ([layer], *([layer, other] for other in others)):
        assert merger(layers) is None
    assert merger([layer, layer]) is not None
    merger._limit = merger.nbytes
    assert merger([layer, layer]) is None
