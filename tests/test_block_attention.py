"""Attention of a batch over a cache in blocks, against the decoder's attention of one sequence after another."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from marlin_cy import get_backend  # noqa: E402
from marlin_cy.cpu import _block_attention, _buffers  # noqa: E402
from marlin_cy.cpu.context import workspace_of  # noqa: E402
from marlin_cy.cpu.operations import CpuOperations  # noqa: E402
from marlin_cy.errors import UnsupportedError  # noqa: E402
from marlin_cy.integrations.modules import array_of  # noqa: E402

KV_BLOCK = 16
BLOCK, HEADS, KV_HEADS, HEAD_DIM, BLOCKS = 32, 6, 2, 48, 24
SCALE = HEAD_DIM**-0.5
STEPS = [
    ([5, 1, 33], [5, 1, 33]),  # rows of each sequence, and its positions with them
    ([1, 3, 1], [6, 4, 34]),
    ([1, 40, 0], [7, 44, 34]),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def tensors(monkeypatch):
    """As the plugin of vLLM sets it."""
    _buffers.accept_tensors(torch.Tensor, {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES})


def new_context(threads=1):
    return get_backend("cpu").new_context(num_threads=threads)


def batch_of(rows, lengths, table):
    starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
    return _block_attention.BlockBatch(starts, np.array(lengths, np.int32), table, BLOCK, KV_HEADS)


def one_by_one(ctx, q, k, v, pools, tables, rows, lengths, **options):
    """The same step by the decoder's operations."""
    operations, start = CpuOperations(), 0
    out = np.zeros(q.shape, np.float32)
    for count, length, pages in zip(rows, lengths, tables, strict=True):
        part = slice(start, start + count)
        if count:
            operations.append_to_cache(ctx, *pools, k[part], v[part], pages, length - count)
            operations.attention(ctx, q[part], *pools, pages, length - count, out[part], scale=SCALE, **options)
        start += count
    return out


def randoms(rng, *shape, dtype):
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype)


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"soft_cap": 5.0}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps(rng, dtype, threads, options):
    """Prompts, parts of prompts and single rows: the bits of the decoder's attention, rounded once."""
    ctx = new_context(threads)
    cache = torch.zeros(BLOCKS, KV_HEADS, BLOCK, 2 * HEAD_DIM, dtype=dtype)
    table = rng.permutation(BLOCKS).astype(np.int32).reshape(3, -1)
    pages = table[..., None] * (BLOCK // KV_BLOCK) + np.arange(BLOCK // KV_BLOCK, dtype=np.int32)
    count, numbers = BLOCKS * BLOCK // KV_BLOCK, array_of(torch.zeros(0, dtype=dtype)).dtype
    pools = (
        np.zeros((count, KV_HEADS, HEAD_DIM, KV_BLOCK), numbers),
        np.zeros((count, KV_HEADS, KV_BLOCK, HEAD_DIM), numbers),
    )
    sinks = randoms(rng, HEADS, dtype=torch.float32) if "sinks" in options else None
    known = options | ({"sinks": sinks.numpy()} if sinks is not None else {})
    for rows, lengths in STEPS:
        total = sum(rows)
        # Heads of a fused projection, whose rows lie apart, and more rows than the batch has.
        fused = randoms(rng, total + 2, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=dtype)
        q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        out = torch.zeros(total + 2, HEADS, HEAD_DIM, dtype=dtype)
        batch = batch_of(rows, lengths, table)
        window, soft_cap = options.get("window", 0), options.get("soft_cap", 0.0)
        batch.attend(workspace_of(ctx), q, k, v, cache, out, SCALE, window, sinks, soft_cap)
        wide = (np.ascontiguousarray(part[:total].float().numpy()) for part in (q, k, v))
        expected = one_by_one(ctx, *wide, pools, [row.reshape(-1) for row in pages], rows, lengths, **known)
        assert torch.equal(out[:total], torch.from_numpy(expected).to(dtype))
        assert not out[total:].any()


def test_other_blocks_are_left_alone(rng):
    """A step writes to the positions of its rows only."""
    cache = torch.full((BLOCKS, KV_HEADS, BLOCK, 2 * HEAD_DIM), 7.0)
    fused = randoms(rng, 3, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=torch.float32)
    q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    batch = batch_of([3], [3], np.array([[5]], np.int32))
    batch.attend(
        workspace_of(new_context()),
        q,
        k,
        v,
        cache,
        torch.zeros(q.shape),
        SCALE,
        0,
        None,
        0.0,
    )
    written = (cache != 7).flatten(2)
    assert written[5].sum(-1).tolist() == [3 * 2 * HEAD_DIM] * KV_HEADS
    assert written.sum() == written[5].sum()


def test_a_step_without_rows():
    table = np.zeros((0, 1), np.int32)
    nothing = torch.zeros(0, HEADS, HEAD_DIM)
    keys, cache = torch.zeros(0, KV_HEADS, HEAD_DIM), torch.zeros(1, KV_HEADS, BLOCK, 2 * HEAD_DIM)
    workspace = workspace_of(new_context())
    batch_of([], [], table).attend(workspace, nothing, keys, keys, cache, nothing, SCALE, 0, None, 0.0)


ONE = np.array([[0]], np.int32)
BAD_BATCHES = {
    "negative block": (IndexError, "block_table", ([0, 1], [1], -ONE - 1, BLOCK)),
    "too large a block": (IndexError, "block_table", ([0, 1], [1], ONE + (2**31 - 1), BLOCK)),
    "too few blocks": (ValueError, "block_table", ([0, 1], [BLOCK + 1], ONE, BLOCK)),
    "more rows than positions": (ValueError, "lengths", ([0, 2], [1], ONE, BLOCK)),
    "starts that descend": (ValueError, "lengths", ([0, -1], [1], ONE, BLOCK)),
    "another first start": (ValueError, "query_starts", ([1, 2], [1], ONE, BLOCK)),
    "too few starts": (ValueError, "query_starts", ([0], [1], ONE, BLOCK)),
    "no rows of the table": (ValueError, "query_starts", ([0, 1], [1], ONE[:0], BLOCK)),
    "blocks of parts of pages": (ValueError, "block_size", ([0, 1], [1], ONE, KV_BLOCK + 8)),
    "int64 lengths": (ValueError, "dtype", ([0, 1], np.array([1], np.int64), ONE, BLOCK)),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches(case):
    error, named, (starts, lengths, table, block) = BAD_BATCHES[case]
    lengths = np.array(lengths, getattr(lengths, "dtype", np.int32))
    with pytest.raises(error, match=named):
        _block_attention.BlockBatch(np.array(starts, np.int32), lengths, table, block, KV_HEADS)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


BAD_TENSORS = {
    "other heads": (ValueError, "q", {"q": zeros(1, HEADS - 1, HEAD_DIM)}),
    "too few rows": (ValueError, "out", {"out": zeros(0, HEADS, HEAD_DIM)}),
    "two dimensions": (ValueError, "k", {"k": zeros(1, KV_HEADS * HEAD_DIM)}),
    "heads that lie apart": (ValueError, "v", {"v": zeros(1, KV_HEADS, 2 * HEAD_DIM)[..., :HEAD_DIM]}),
    "float64": (TypeError, "k", {"k": zeros(1, KV_HEADS, HEAD_DIM, dtype=torch.float64)}),
    "a block that the cache lacks": (IndexError, "block_table", {"cache": zeros(0, KV_HEADS, BLOCK, 2 * HEAD_DIM)}),
    "a cache of other heads": (ValueError, "cache", {"cache": zeros(2, 1, BLOCK, 2 * HEAD_DIM)}),
    "a cache of other blocks": (ValueError, "cache", {"cache": zeros(2, KV_HEADS, 2 * BLOCK, 2 * HEAD_DIM)}),
    "a cache that lies apart": (
        ValueError,
        "cache",
        {"cache": zeros(2, KV_HEADS, BLOCK, 4 * HEAD_DIM)[..., : 2 * HEAD_DIM]},
    ),
    "bfloat16 sinks": (ValueError, "sinks", {"sinks": zeros(HEADS, dtype=torch.bfloat16)}),
    "other sinks": (ValueError, "sinks", {"sinks": zeros(HEADS + 1)}),
    "a gradient": (UnsupportedError, "q", {"q": zeros(1, HEADS, HEAD_DIM).requires_grad_()}),
    "heads of 20": (UnsupportedError, "q", {"q": zeros(1, HEADS, 20), "cache": zeros(2, KV_HEADS, BLOCK, 40)}),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(case):
    error, named, given = BAD_TENSORS[case]
    heads, keys = zeros(1, HEADS, HEAD_DIM), zeros(1, KV_HEADS, HEAD_DIM)
    cache = zeros(2, KV_HEADS, BLOCK, 2 * HEAD_DIM)
    tensors = {"q": heads, "k": keys, "v": keys, "cache": cache, "out": heads.clone(), "sinks": None} | given
    sinks = tensors.pop("sinks")
    batch = batch_of([1], [1], ONE)
    with pytest.raises(error, match=f"^{named}: "):
        batch.attend(workspace_of(new_context()), *tensors.values(), SCALE, 0, sinks, 0.0)


def test_query_heads_must_be_a_multiple():
    heads, keys = zeros(1, KV_HEADS + 1, HEAD_DIM), zeros(1, KV_HEADS, HEAD_DIM)
    cache = zeros(2, KV_HEADS, BLOCK, 2 * HEAD_DIM)
    with pytest.raises(ValueError, match="expected a multiple of 2"):
        batch_of([1], [1], ONE).attend(
            workspace_of(new_context()),
            heads,
            keys,
            keys,
            cache,
            heads.clone(),
            SCALE,
            0,
            None,
            0.0,
        )


SUPPORTED = [(128, 128), (48, 16)]
NOT_SUPPORTED = [(24, 128), (128, 24), (4096, 128), (0, 16), (128, 0)]


@pytest.mark.parametrize(("head_dim", "block_size"), SUPPORTED + NOT_SUPPORTED)
def test_what_is_supported(head_dim, block_size):
    assert _block_attention.are_supported(head_dim, block_size) is ((head_dim, block_size) in SUPPORTED)
