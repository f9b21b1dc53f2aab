"""The OpenCL backend's program for a whole model: launches that are recorded once for a number of rows.

A step is one write to the device, the recorded launches, and one read, of the logits that are wanted. The residual
stream ``x`` is float32. What a mixer or a feed-forward network gives is added to it by the norm that follows, which
also adds up the rows of a token's experts::

    embed_rows ── x
    for each layer:    norm_rows ── mixer         x += what the last network gave
                       norm_rows ── network       x += what the mixer gave
    norm_rows of the rows that are wanted ── head
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from marlin_cy.decoder.plan import DecoderPlan, DenseLinear
from marlin_cy.decoder.program import Batch, DecoderProgram
from marlin_cy.errors import BuildError
from marlin_cy.interface import Context
from marlin_cy.opencl.buffers import TYPE_CODES
from marlin_cy.opencl.decoder.cache import KvPool, StatePool, check_memory, new_pools, provide_pages
from marlin_cy.opencl.decoder.delta import DeltaNet
from marlin_cy.opencl.decoder.ffn import MoeFfn
from marlin_cy.opencl.decoder.layer import Layer
from marlin_cy.opencl.decoder.maker import Maker, Residual, row_type
from marlin_cy.opencl.decoder.merged import Merger
from marlin_cy.opencl.decoder.phased_step import Ends, PhasedStep, new_phased_step
from marlin_cy.opencl.decoder.projections import ProjectionGroup, Uploads
from marlin_cy.opencl.decoder.step import Known, StepLayout, describe_step, rows_recorded
from marlin_cy.opencl.memory import zeroed_buffers
from marlin_cy.opencl.recording import Recording, RecordingContext
from marlin_cy.opencl.stack import opencl_context
from marlin_cy.opencl.tiers.configuration import FLOAT32

__all__ = ["OpenClDecoder"]

MAX_RECORDINGS = 24
"""Recordings that are kept. Each has a kernel object for every launch."""
HEAD_ROWS = 64
"""Rows whose logits are computed at once: 64 rows of 150,000 take 39 MB."""
LEAST_STEP_INTS = 1 << 16
SPLIT_TOKENS = 128
"""The fewest positions of a split: a work-group goes through as many at a time."""

PHASED_ERROR = 5e-3
"""Relative error of logits by phases, at most: both ways round rows to float16, in other places."""

INCOMPLETE = -1
"""The length of a slot of recurrent state whose change was interrupted."""


class OpenClDecoder(DecoderProgram):
    """A plan on an OpenCL device. The parameters are those of ``Backend.new_decoder``."""

    def __init__(self, ctx: Context, plan: DecoderPlan, num_pages: int, num_states: int, cache_dtype: str) -> None:
        self._ctx = opencl_context(ctx)
        backend = self._ctx.backend
        runtime = backend.runtime
        self._recorder = recorder = RecordingContext(backend, self._ctx.queue)
        mixers = [layer.mixer for layer in plan.layers]
        check_memory(runtime, mixers, num_pages, num_states, cache_dtype, dense_bytes(plan))
        self._uploads = uploads = Uploads(runtime)
        self._pools = new_pools(runtime, mixers, num_pages, num_states, cache_dtype)
        merger = Merger(runtime)
        self._layers = [
            Layer(recorder, uploads, merger, layer, pool, plan.norm_eps)
            for layer, pool in zip(plan.layers, self._pools, strict=True)
        ]
        self._plan, self._row_type = plan, row_type(recorder)
        self._embedding = uploads(plan.embedding, "embedding")
        self._embedding_type = TYPE_CODES[plan.embedding.dtype]
        self._final_norm = uploads(plan.final_norm, "norm")
        self._head = ProjectionGroup(uploads, [plan.head])
        device = runtime.capabilities
        self._attentions = [
            (layer.attention.attend, layer.attention.kernels(backend, self._row_type))
            for layer in self._layers
            if layer.attention is not None
        ]
        self.most_splits = max((attend.most_splits(device, found) for attend, found in self._attentions), default=1)
        self.split_tokens = SPLIT_TOKENS
        (self._step,) = zeroed_buffers(runtime, [4 * LEAST_STEP_INTS], "description of a step")
        self._upload: cl.Event | None = None
        self._state_lengths = np.zeros(num_states, np.int64)
        self._recordings: OrderedDict[tuple[str, int], Recorded] = OrderedDict()
        self._phased = new_phased_step(self._ctx, plan, self._layers, self._ends(), True)
        self._phased_checked: set[tuple[bool, int]] = set()

    def step(self, batch: Batch) -> npt.NDArray[np.float32]:
        return self._run(batch, "head", (self._plan.vocab_size,), np.float32)

    def greedy_step(self, batch: Batch) -> npt.NDArray[np.int32]:
        """As :meth:`step`, but returns the first token of the largest logit of each wanted row, int32 ``[wanted]``.

        The logits stay on the device.
        """
        return self._run(batch, "greedy", (), np.int32)

    def provide_pages(self, num_pages: int) -> int:
        pools = [pool for pool in self._pools if isinstance(pool, KvPool)]
        with self._ctx as ctx:
            if provide_pages(pools, num_pages):
                # Recordings have the segments as arguments. Earlier steps may still be in the queue.
                ctx.queue.finish()
                self._recordings.clear()
                if self._phased is not None:
                    self._phased.cache_grown()
        return min((pool.provided_pages for pool in pools), default=num_pages)

    def copy_page(self, source: int, target: int) -> None:
        with self._ctx as ctx:
            for pool in self._pools:
                if isinstance(pool, KvPool):
                    pool.copy_page(ctx.queue, source, target)

    def state_length(self, slot: int) -> int:
        return int(self._state_lengths[slot])

    def clear_state(self, slot: int) -> None:
        with self._ctx as ctx:
            self._state_lengths[slot] = INCOMPLETE
            for pool in self._states():
                pool.clear(ctx.queue, slot)
            self._state_lengths[slot] = 0

    def copy_state(self, source: int, target: int) -> None:
        with self._ctx as ctx:
            self._state_lengths[target] = INCOMPLETE
            for pool in self._states():
                pool.copy(ctx.queue, source, target)
            self._state_lengths[target] = self._state_lengths[source]

    def save_state(self, slot: int) -> Any:
        with self._ctx as ctx:
            return self.state_length(slot), [pool.save(ctx.queue, slot) for pool in self._states()]

    def restore_state(self, slot: int, saved: Any) -> None:
        length, states = saved
        with self._ctx as ctx:
            self._state_lengths[slot] = INCOMPLETE
            for pool, values in zip(self._states(), states, strict=True):
                pool.restore(ctx.queue, slot, values)
            self._state_lengths[slot] = length

    @property
    def cache_bytes(self) -> int:
        return sum(pool.nbytes for pool in self._pools)

    def launches(self, rows: int) -> list[str]:
        """The launches of a step of ``rows`` rows, by name, without the head. For tests and measurements."""
        return list(self._recorded("layers", rows_recorded(rows), self._record_layers).recording.labels)

    def _tile_rows(self, rows: int) -> int:
        """Rows of a tile of attention, at most, of a step of ``rows`` rows."""
        device = self._ctx.backend.runtime.capabilities
        return min((attend.tile_rows(device, found, rows) for attend, found in self._attentions), default=1)

    def _states(self) -> list[StatePool]:
        return [pool for pool in self._pools if isinstance(pool, StatePool)]

    # A step ------------------------------------------------------------------------------------

    def _run(self, batch: Batch, head: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Run a step, and read what the head gives for each wanted row: ``shape`` of ``dtype``."""
        with self._ctx:
            while (steps := self._phased_for(batch)) is not None:
                results = self._run_phased(steps, batch, head, shape, dtype)
                if not steps.gave_up():
                    return results
                self._leave(steps, "a work-group waited in vain for the others; are several models on the device?")
            return self._run_launches(batch, head, shape, dtype)

    def _run_phased(
        self, steps: PhasedStep, batch: Batch, head: str, shape: tuple[int, ...], dtype: npt.DTypeLike
    ) -> npt.NDArray[Any]:
        """As ``_run``, by phases. The caller asks whether a work-group gave up."""
        greedy = head == "greedy"
        x = steps.enqueue(batch, greedy)
        rows, wanted = len(batch.tokens), batch.wanted
        if steps.has_head:
            results = steps.tokens(rows) if greedy else steps.logits(rows)
            return results if len(wanted) == rows else results[wanted]
        layout = StepLayout(rows_recorded(rows))
        self._write(wanted, layout.picked)
        results = np.empty((len(wanted), *shape), dtype)
        self._run_head(f"{head} {rows} by phases", layout, wanted, Residual(x), greedy, results)
        steps.read_state()
        return results

    def _run_launches(self, batch: Batch, head: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """As ``_run``, by launches."""
        layout = StepLayout(rows_recorded(len(batch.tokens)))
        step, known = describe_step(batch, layout, self._tile_rows(layout.rows), self.most_splits, self.split_tokens)
        self._reserve_step(len(step))
        layers = self._recorded("layers", layout.rows, self._record_layers)
        slots, lengths = batch.segments[:, 3], batch.segments[:, 1] + batch.segments[:, 2]
        recurrent = len(self._state_lengths) > 0
        if recurrent:
            self._state_lengths[slots] = INCOMPLETE
        self._write(step, 0)
        self._enqueue(layers, known)
        if recurrent:
            self._state_lengths[slots] = lengths
        wanted = batch.wanted
        results = np.empty((len(wanted), *shape), dtype)
        for begin in range(0, len(wanted), HEAD_ROWS):
            rows = wanted[begin : begin + HEAD_ROWS]
            if begin:  # the step has the first ones
                self._write(rows, layout.picked)
            part = results[begin : begin + len(rows)]
            self._run_head(f"{head} {layout.rows}", layout, rows, layers.result, head == "greedy", part)
        return results

    def _run_head(
        self,
        way: str,
        layout: StepLayout,
        rows: npt.NDArray[np.int32],
        residual: Residual,
        greedy: bool,
        results: npt.NDArray[Any],
    ) -> None:
        """Run the head for rows that the step names as picked, and read its results."""
        found = self._recorded(
            way,
            rows_recorded(len(rows)),
            lambda maker: self._record_head(replace(maker, layout=layout), residual, greedy),
        )
        self._enqueue(found, None)
        cl.enqueue_copy(self._ctx.queue, results, found.result)

    def _write(self, ints: npt.NDArray[np.int32], place: int) -> None:
        """Enqueue a write to the step's description; ``ints`` is not changed afterwards."""
        # Dropping the event of a write waits for it: so it is kept until the next one.
        self._upload = cl.enqueue_copy(self._ctx.queue, self._step, ints, dst_offset=4 * place, is_blocking=False)

    def _enqueue(self, recorded: Recorded, known: Known | None) -> None:
        for label, event in recorded.recording.enqueue(self._ctx.queue, known):
            self._ctx.log(label, event)

    def _reserve_step(self, ints: int) -> None:
        """Make room for a step's description. All recordings refer to the buffer, so it grows by doubling."""
        if 4 * ints > self._step.size:
            self._ctx.queue.finish()
            self._recordings.clear()
            (self._step,) = zeroed_buffers(
                self._ctx.backend.runtime, [4 << (ints - 1).bit_length()], "description of a step"
            )

    # Steps by phases ---------------------------------------------------------------------------

    def _ends(self) -> Ends:
        """What lies before and after the layers."""
        return Ends(
            self._embedding, self._embedding_type, self._final_norm, self._head.whole_dense, self._plan.vocab_size
        )

    def _phased_for(self, batch: Batch) -> PhasedStep | None:
        """The way by phases, if it is for this batch and gives correct results on this device."""
        while self._phased is not None and self._phased.takes(batch):
            steps = self._phased
            key = steps.resident, steps.capacity(len(batch.tokens))
            if key in self._phased_checked:
                return steps
            wrong = self._phased_reason_wrong(steps, batch)
            if wrong is None:
                self._phased_checked.add(key)
                return steps
            self._leave(steps, wrong)
        return None

    def _phased_reason_wrong(self, steps: PhasedStep, batch: Batch) -> str | None:
        """None if logits by phases are those by recorded launches, else what is wrong; remembered for the device."""
        verdicts, kind = self._ctx.backend.runtime.verdicts, steps.kind(len(batch.tokens))
        if verdicts is None:
            return None
        if verdicts.knows(kind):
            return verdicts.reason_wrong(kind, lambda: None)
        # Launches may be checked themselves when they run first, and checks are not nested.
        expected = self._run_launches(batch, "head", (self._plan.vocab_size,), np.float32)
        return verdicts.reason_wrong(kind, lambda: self._phased_error(steps, batch, expected))

    def _phased_error(self, steps: PhasedStep, batch: Batch, expected: npt.NDArray[np.float32]) -> str | None:
        """What is wrong with the logits by phases; None if they are ``expected`` up to rounding."""
        try:
            found = self._run_phased(steps, batch, "head", (self._plan.vocab_size,), np.float32)
        except (cl.Error, BuildError) as error:
            return f"the kernel does not run: {error}"
        if steps.gave_up():
            return "a work-group waited in vain for the others"
        finite = np.isfinite(expected)
        if not np.array_equal(np.isfinite(found), finite):
            return "its logits are not finite"
        relative = np.linalg.norm((found - expected)[finite]) / max(float(np.linalg.norm(expected[finite])), 1e-30)
        return None if relative <= PHASED_ERROR else f"the relative error of its logits is {relative:.1e}"

    def _leave(self, steps: PhasedStep, reason: str) -> None:
        """Use the next way from now on: after one launch a launch for each phase, then recorded launches."""
        self._phased = None
        if steps.resident:
            self._phased = new_phased_step(self._ctx, self._plan, self._layers, self._ends(), False)
        verdicts = self._ctx.backend.runtime.verdicts
        if verdicts is not None:
            name = "a step in one launch" if steps.resident else "a step by phases"
            verdicts.warn(f"the decoder's kernel for {name}", reason, stacklevel=5)

    # Recordings --------------------------------------------------------------------------------

    def _recorded(self, kind: str, rows: int, record: Callable[[Maker], Any]) -> Recorded:
        """The launches of a kind for a number of rows; ``record`` records them, and returns their result."""
        key = kind, rows
        found = self._recordings.get(key)
        if found is not None:
            self._recordings.move_to_end(key)
            return found
        recorder = self._recorder
        while True:
            recorder.begin()
            result = record(Maker(recorder, self._step, StepLayout(rows), rows))
            if not recorder.grown:
                break
            # Older recordings refer to buffers that have been replaced, and so may the beginning of this one.
            self._ctx.queue.finish()
            self._recordings.clear()
        while len(self._recordings) >= MAX_RECORDINGS:
            self._ctx.queue.finish()
            self._recordings.popitem(last=False)
        self._recordings[key] = Recorded(recorder.recording, result)
        return self._recordings[key]

    def _record_layers(self, maker: Maker) -> Residual:
        """Record the embedding and all layers."""
        plan = self._plan
        hidden, eps = plan.hidden_size, plan.norm_eps
        residual, added = Residual(maker.room("x", hidden)), maker.room("added", hidden)
        normed = maker.room("normed", hidden, self._row_type)
        tile_rows = self._tile_rows(maker.rows)
        maker.record(
            "decoder_rows",
            "embed_rows",
            {"INPUT_TYPE": self._embedding_type, "ROW_ITEMS": maker.items},
            (maker.rows * maker.items,),
            (maker.items,),
            "embed_rows",
            batch=maker.step,
            table=self._embedding,
            x=residual.x.data,
            width=hidden,
        )
        for layer in self._layers:
            residual.norm(maker, layer.mixer_norm, eps, normed)
            if isinstance(layer.mixer, DeltaNet):
                layer.mixer.record(maker, normed, added, self._row_type)
            else:
                layer.mixer.record(maker, normed, added, self._row_type, tile_rows, self.most_splits)
            residual.pending = added
            if isinstance(layer.ffn, MoeFfn):
                residual.pending = layer.ffn.record(maker, residual, layer.ffn_norm, eps, normed)
            else:
                residual.norm(maker, layer.ffn_norm, eps, normed)
                layer.ffn.record(maker, normed, added)
                residual.pending = added
        return residual

    def _record_head(self, maker: Maker, residual: Residual, greedy: bool) -> cl.Buffer:
        """Record the final norm of the wanted rows, and the head."""
        plan = self._plan
        type_code = self._row_type if self._head.quantised else FLOAT32
        normed = maker.room("normed", plan.hidden_size, type_code)
        replace(residual).norm(maker, self._final_norm, plan.norm_eps, normed, picked=maker.layout.picked)
        logits = maker.room("logits", plan.vocab_size)
        self._head.record(maker, normed, logits, "head")
        assert logits.data is not None
        if not greedy:
            return logits.data
        tokens = maker.ctx.reserve("decoder tokens", 4 * maker.rows)
        maker.record(
            "decoder_rows",
            "argmax_rows",
            {"ROW_ITEMS": maker.items},
            (maker.rows * maker.items,),
            (maker.items,),
            "argmax_rows",
            logits=logits.data,
            tokens=tokens,
            width=plan.vocab_size,
        )
        return tokens


class Recorded(NamedTuple):
    """A recording, and what it leaves behind: the residual stream, or the buffer to read."""

    recording: Recording
    result: Any


def dense_bytes(plan: DecoderPlan) -> int:
    """Bytes of the embedding, and of a head that is not quantised and not the embedding itself.

    Other weights that are not quantised are small beside these.
    """
    nbytes = plan.embedding.nbytes
    if isinstance(plan.head, DenseLinear) and plan.head.weight is not plan.embedding:
        nbytes += plan.head.weight.nbytes
    return nbytes
