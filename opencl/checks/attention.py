"""The first use of a build of attention by tensor cores: checked on two sequences, with the very same program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from marlin_cy import reference as layer_reference
from marlin_cy.decoder import reference
from marlin_cy.decoder.program import PAGE_TOKENS, Batch
from marlin_cy.opencl.buffers import TYPES, as_bytes
from marlin_cy.opencl.checks.verdicts import unchecked_backend
from marlin_cy.opencl.decoder.attention_mma import Kernel, TilesKernel
from marlin_cy.opencl.decoder.step import FEW_ROWS, Cuts, StepLayout, describe_step
from marlin_cy.opencl.memory import uploaded, zeroed_buffers
from marlin_cy.opencl.recording import RecordingContext

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.stack import Runtime

__all__ = ["SETTINGS", "Setting", "reason_wrong", "results"]

KV_HEADS = 2
TOLERANCES = (2e-3, 2e-3, 1.5e-2)  # of the norm, by element type: rounding to it gives 3e-4, or 3e-3 for bfloat16
RUNS = 2  # counters of work-groups are as they were


class Setting(NamedTuple):
    """Arguments of attention; 0 and False leave a part out. ``splits`` are those of single rows and of split tiles."""

    window: int = 0
    soft_cap: float = 0.0
    sinks: bool = False
    gated: bool = False
    splits: int = 1


SETTINGS = Setting(), Setting(window=37, soft_cap=2.0, sinks=True, gated=True, splits=3)


def reason_wrong(backend: OpenClBackend, kernel: Kernel, output_type: int) -> str | None:
    """None if a build gives correct results, else a description of the error."""
    rng = np.random.default_rng(0)
    checked = unchecked_backend(backend)
    tolerance = max(TOLERANCES[kernel.cache_type], TOLERANCES[output_type])
    for setting in SETTINGS:
        actual, expected = results(checked, kernel, output_type, setting, rng)
        error = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
        if not error <= tolerance:  # a NaN is wrong, too
            return f"its results are wrong: relative error {error:.2g}, expected at most {tolerance:g}"
    return None


def results(
    backend: OpenClBackend, kernel: Kernel, output_type: int, setting: Setting, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Results of a kernel, and the expected results, for two sequences.

    Of tiles: a tile and a half of rows, and a few rows. Of single rows: three, and one that sees few positions.
    Positions that no row sees are NaN in the cache.
    """
    heads, dim, value_dim = KV_HEADS * kernel.heads, kernel.head_dim, kernel.value_dim
    if isinstance(kernel, TilesKernel):
        tile_rows = kernel.rows
        counts = np.array([tile_rows + tile_rows // 2 + FEW_ROWS, FEW_ROWS])
        positions = np.array([kernel.keys + 3, 2 * kernel.keys - 1])
    else:
        tile_rows, counts = 1, np.array([FEW_ROWS - 1, 1])
        positions = np.array([(kernel.waves + 1) * PAGE_TOKENS * setting.splits + 5, 9])
    lengths, cache_type = positions + counts, TYPES[kernel.cache_type]
    rows, most = int(counts.sum()), -(-int(lengths.max()) // PAGE_TOKENS)
    pages = rng.permutation(2 * most).astype(np.int32).reshape(2, most)
    first = np.cumsum(counts) - counts
    segments = np.stack([first, counts, positions, np.zeros_like(first)], axis=1).astype(np.int64)
    batch = Batch(np.zeros(rows, np.int32), segments, pages, np.zeros(0, np.int32))
    layout = StepLayout(rows)
    step, known = describe_step(batch, layout, Cuts(tile_rows, setting.splits * rows), 1)

    q = rng.standard_normal((rows, heads, dim + (value_dim if setting.gated else 0)), np.float32)
    keys, values = (rng.standard_normal((int(lengths.max()), 2, KV_HEADS, width)) for width in (dim, value_dim))
    keys, values = keys.astype(cache_type), values.astype(cache_type)
    sinks = rng.standard_normal(heads).astype(np.float32) if setting.sinks else None
    expected = np.zeros((rows, heads, value_dim))
    for number, (begin, count, position, _) in enumerate(segments):
        here, seen = slice(begin, begin + count), slice(0, position + count)
        expected[here] = reference.attention(
            q[here, :, :dim],
            keys[seen, number],
            values[seen, number],
            np.arange(position, position + count),
            scale=dim**-0.5,
            window=setting.window or None,
            sinks=sinks,
            soft_cap=setting.soft_cap or None,
        )
    if setting.gated:
        expected *= layer_reference.sigmoid(q[:, :, dim:].astype(np.float64))

    ctx = backend.new_context()
    recorder = RecordingContext(backend, ctx.queue)
    runtime = backend.runtime
    width = heads * value_dim
    (output,) = zeroed_buffers(runtime, [rows * width * TYPES[output_type].itemsize], "output of a check")
    arguments: dict[str, Any] = {
        "batch": uploaded(runtime, step, "step of a check"),
        "tiles": layout.many_tiles if isinstance(kernel, TilesKernel) else layout.few_tiles,
        "q": uploaded(runtime, q, "queries of a check"),
        "q_row_stride": heads * q.shape[2],
        "q_head_stride": q.shape[2],
        **cache_arguments(runtime, keys, values, pages, lengths, kernel.segments),
        "num_heads": heads,
        "num_kv_heads": KV_HEADS,
        "key_head": PAGE_TOKENS * dim,
        "value_head": PAGE_TOKENS * value_dim,
        "scale": dim**-0.5,
        "soft_cap": setting.soft_cap,
        "window": setting.window,
        "sinks": None if sinks is None else uploaded(runtime, sinks, "sinks of a check"),
        "gate_offset": dim if setting.gated else 0,
        "output": output,
    }
    groups = KV_HEADS, known.many_tiles, 1
    if not isinstance(kernel, TilesKernel):
        groups = KV_HEADS, known.few_tiles, known.splits
    elif kernel.split:
        groups = KV_HEADS, known.many_tiles, setting.splits
    if not isinstance(kernel, TilesKernel) or kernel.split:
        room = max(known.few_tiles, known.many_tiles * tile_rows) * groups[2]
        arguments |= {
            "partial": recorder.reserve("splits of a check", 4 * room * width),
            "stats": recorder.reserve("statistics of a check", 8 * room * heads),
            "arrived": recorder.reserve("counters of a check", 4 * rows * KV_HEADS),
        }
    kernel.record(recorder, output_type, lambda _: groups, arguments)
    for _ in range(RUNS):
        recorder.recording.enqueue(ctx.queue)
    actual = np.empty((rows, heads, value_dim), TYPES[output_type])
    cl.enqueue_copy(ctx.queue, as_bytes(actual), output)
    return actual.astype(np.float64), expected


def cache_arguments(
    runtime: Runtime,
    keys: npt.NDArray[Any],
    values: npt.NDArray[Any],
    pages: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int64],
    segments: int,
) -> dict[str, Any]:
    """CACHE_ARGS of ``kernels/decoder.cl``: the rows of keys and values in pages, all segments used."""
    found: dict[str, Any] = {}
    size = pages.size
    if segments > 1:
        shift = max(0, (-(-pages.size // segments) - 1).bit_length())
        size, found["segment_shift"] = 1 << shift, shift
    for name, rows in (("keys", keys), ("values", values)):
        all_pages = paged(rows, pages, lengths)
        for number in range(segments):
            part = all_pages[number * size : (number + 1) * size]
            buffer = uploaded(runtime, as_bytes(part), "cache of a check") if len(part) else None
            found[name + (str(number) if number else "")] = buffer
    return found


def paged(rows: npt.NDArray[Any], pages: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """``[positions, sequences, heads, width]`` as pages; ``kernels/decoder.cl`` draws one."""
    _, sequences, heads, width = rows.shape
    most = pages.shape[1]
    padded = np.full((most * PAGE_TOKENS, sequences, heads, width), np.nan, rows.dtype)
    for sequence, length in enumerate(lengths):
        padded[:length, sequence] = rows[:length, sequence]
    parts = padded.reshape(most, PAGE_TOKENS, sequences, heads, width // 8, 8).transpose(2, 0, 3, 4, 1, 5)
    found = np.empty((pages.size, *parts.shape[2:]), rows.dtype)
    found[pages] = parts
    return found
