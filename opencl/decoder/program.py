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
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from marlin_cy.decoder.plan import DecoderPlan
from marlin_cy.decoder.program import Batch, DecoderProgram
from marlin_cy.decoder.sampling import check_largest
from marlin_cy.errors import BuildError, MarlinError
from marlin_cy.interface import Context
from marlin_cy.opencl.buffers import TYPE_CODES
from marlin_cy.opencl.checks.sampling import is_choosing_correct
from marlin_cy.opencl.decoder.cache import KvPool, StatePool, check_memory, dense_bytes, new_pools, provide_pages
from marlin_cy.opencl.decoder.delta import DeltaNet
from marlin_cy.opencl.decoder.ffn import MoeFfn
from marlin_cy.opencl.decoder.layer import Layer
from marlin_cy.opencl.decoder.maker import Maker, Residual, row_type
from marlin_cy.opencl.decoder.merged import Merger
from marlin_cy.opencl.decoder.phased_step import Ends, PhasedStep, new_phased_step
from marlin_cy.opencl.decoder.projections import ProjectionGroup, Uploads
from marlin_cy.opencl.decoder.sample import TokenChooser, describe_choices, draws
from marlin_cy.opencl.decoder.step import Cuts, Description, Known, StepLayout, describe_step, rows_recorded
from marlin_cy.opencl.recording import Recording, RecordingContext
from marlin_cy.opencl.stack import opencl_context
from marlin_cy.opencl.tiers.configuration import FLOAT32

if TYPE_CHECKING:
    from marlin_cy.decoder.sampling import Sampler

__all__ = ["OpenClDecoder"]

Choosing: TypeAlias = "Sequence[tuple[Sampler, int] | None]"
"""What chooses the token of each wanted row, and the token's position; None: the first of the largest logit."""

MAX_RECORDINGS = 24
"""Recordings that are kept. Each has a kernel object for every launch."""
HEAD_ROWS = 64
"""Rows whose logits are computed at once: 64 rows of 150,000 take 39 MB."""
LEAST_STEP_INTS = 1 << 16
SPLIT_TOKENS, TILE_SPLIT_TOKENS = 128, 256
"""The fewest positions of a split of a row, and of a tile: a tile's sums are more to join."""

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
        self._tiles: dict[int, tuple[int, int]] = {}
        self.split_tokens, self.tile_split_tokens = SPLIT_TOKENS, TILE_SPLIT_TOKENS
        self._step = Description(runtime, LEAST_STEP_INTS, "description of a step")
        self._chooser = TokenChooser(runtime)
        self._state_lengths = np.zeros(num_states, np.int64)
        self._recordings: OrderedDict[tuple[str, int], Recorded] = OrderedDict()
        self._phased = new_phased_step(self._ctx, plan, self._layers, self._ends(), True)
        self._phased_checked: set[tuple[bool, int]] = set()

    def step(self, batch: Batch) -> npt.NDArray[np.float32]:
        return self._run(batch, None)

    def pick(self, batch: Batch, choices: Sequence[tuple[Sampler, int]]) -> list[int | MarlinError]:
        drawing = [choice if draws(choice[0]) else None for choice in choices]
        # A step by phases that draws no token does not use the kernel that this checks.
        checked = any(drawing) or self._phased is None
        if checked and not is_choosing_correct(self._ctx.backend, self._plan.vocab_size):
            return super().pick(batch, choices)
        results: list[int | MarlinError] = []
        found = self._run(batch, drawing)
        tokens, largest = found[:, 0].tolist(), found[:, 1].copy().view(np.float32).tolist()
        for (sampler, position), token, logit in zip(choices, tokens, largest, strict=True):
            try:
                check_largest(token, logit, position)
            except MarlinError as error:
                results.append(error)
                continue
            sampler.took(token)
            results.append(token)
        return results

    def greedy_step(self, batch: Batch) -> npt.NDArray[np.int32]:
        """The first token of the largest logit of each wanted row, int32 ``[wanted]``. For measurements."""
        return self._run(batch, [None] * len(batch.wanted))[:, 0]

    def provide_pages(self, num_pages: int) -> int:
        pools = [pool for pool in self._pools if isinstance(pool, KvPool)]
        with self._ctx:
            if provide_pages(pools, num_pages):
                self._forget_recordings()  # they have the segments as arguments
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

    def _cuts(self, rows: int) -> Cuts:
        """How attention of a step of ``rows`` rows is cut: by what suits every layer."""
        if rows not in self._tiles:
            device = self._ctx.backend.runtime.capabilities
            found = [
                (attend.tile_rows(device, kernels, rows), attend.most_tile_splits(device, kernels, rows))
                for attend, kernels in self._attentions
            ]
            tile_rows, splits = zip(*found, strict=True) if found else ((1,), (1,))
            self._tiles[rows] = min(tile_rows), min(splits)
        of_tiles, splits_of_tiles = self._tiles[rows]
        return Cuts(of_tiles, self.most_splits, splits_of_tiles)

    def _states(self) -> list[StatePool]:
        return [pool for pool in self._pools if isinstance(pool, StatePool)]

    # A step ------------------------------------------------------------------------------------

    def _run(self, batch: Batch, choices: Choosing | None) -> npt.NDArray[Any]:
        """Run a step, and read the logits of each wanted row, or its token and the largest logit by ``choices``."""
        with self._ctx:
            while (steps := self._phased_for(batch)) is not None:
                results = self._run_phased(steps, batch, choices)
                if not steps.gave_up():
                    return results
                self._leave(steps, "a work-group waited in vain for the others; are several models on the device?")
            return self._run_launches(batch, choices)

    def _run_phased(self, steps: PhasedStep, batch: Batch, choices: Choosing | None) -> npt.NDArray[Any]:
        """As ``_run``, by phases. The caller asks whether a work-group gave up."""
        rows, wanted = len(batch.tokens), batch.wanted
        greedy = choices is not None and not any(choices)
        x = steps.enqueue(batch, greedy)
        if steps.has_head and (greedy or choices is None):
            results = steps.tokens(rows) if greedy else steps.logits(rows)
            return results if len(wanted) == rows else results[wanted]
        results = self._new_results(len(wanted), choices)
        if choices is not None and steps.has_head:
            of_rows: list[tuple[Sampler, int] | None] = [None] * rows
            for row, choice in zip(wanted.tolist(), choices, strict=True):
                of_rows[row] = choice
            capacity, tokens = steps.capacity(rows), np.empty((rows, 2), np.int32)
            logits, vocabulary = steps.vocabulary(rows), self._plan.vocab_size
            known = self._write_choices(of_rows, capacity)
            found = self._recorded(
                f"tokens {capacity} by phases",
                capacity,
                lambda maker: self._chooser.record(maker, logits, vocabulary),
            )
            self._enqueue(found, known)
            cl.enqueue_copy(self._ctx.queue, tokens, found.result)
            results[:] = tokens[wanted]
        else:
            layout = StepLayout(rows_recorded(rows))
            self._step.write(self._ctx.queue, wanted, layout.picked)
            self._run_head(f"{rows} by phases", layout, wanted, Residual(x), choices, results)
        steps.read_state()
        return results

    def _run_launches(self, batch: Batch, choices: Choosing | None) -> npt.NDArray[Any]:
        """As ``_run``, by launches."""
        layout = StepLayout(rows_recorded(len(batch.tokens)))
        step, known = describe_step(batch, layout, self._cuts(layout.rows), self.split_tokens, self.tile_split_tokens)
        if self._step.grow(len(step)):
            self._forget_recordings()
        layers = self._recorded("layers", layout.rows, self._record_layers)
        recurrent = len(self._state_lengths) > 0
        if recurrent:
            self._state_lengths[batch.segments[:, 3]] = INCOMPLETE
        self._step.write(self._ctx.queue, step)
        self._enqueue(layers, known)
        if recurrent:
            self._state_lengths[batch.segments[:, 3]] = batch.segments[:, 1] + batch.segments[:, 2]
        wanted = batch.wanted
        results = self._new_results(len(wanted), choices)
        for begin in range(0, len(wanted), HEAD_ROWS):
            part = slice(begin, begin + HEAD_ROWS)
            if begin:  # the step has the first ones
                self._step.write(self._ctx.queue, wanted[part], layout.picked)
            of_part = None if choices is None else choices[part]
            self._run_head(f"{layout.rows}", layout, wanted[part], layers.result, of_part, results[part])
        return results

    def _new_results(self, rows: int, choices: Choosing | None) -> npt.NDArray[Any]:
        if choices is None:
            return np.empty((rows, self._plan.vocab_size), np.float32)
        return np.empty((rows, 2), np.int32)

    def _run_head(
        self,
        way: str,
        layout: StepLayout,
        rows: npt.NDArray[np.int32],
        residual: Residual,
        choices: Choosing | None,
        results: npt.NDArray[Any],
    ) -> None:
        """Run the head for rows that the step names as picked, and read its results."""
        count = rows_recorded(len(rows))
        known = None if choices is None else self._write_choices(choices, count)
        found = self._recorded(
            f"head {way}" if choices is None else f"tokens {way}",
            count,
            lambda maker: self._record_head(replace(maker, layout=layout), residual, choices is not None),
        )
        self._enqueue(found, known)
        cl.enqueue_copy(self._ctx.queue, results, found.result)

    def _write_choices(self, choices: Choosing, rows: int) -> int:
        """Write what chooses the tokens of ``rows`` rows. Returns what their launches depend on."""
        described = describe_choices(choices, rows)
        if self._chooser.reserve(len(described.ints)):
            self._forget_recordings()
        self._chooser.write(self._ctx.queue, described)
        return described.most_entries

    def _enqueue(self, recorded: Recorded, known: Known | int | None) -> None:
        recording, ctx = recorded.recording, self._ctx
        if not ctx.is_profiled:
            recording.enqueue(ctx.queue, known)
            return
        for label, event in recording.enqueue_with_events(ctx.queue, known):
            ctx.log(label, event)

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
        expected = self._run_launches(batch, None)
        return verdicts.reason_wrong(kind, lambda: self._phased_error(steps, batch, expected))

    def _phased_error(self, steps: PhasedStep, batch: Batch, expected: npt.NDArray[np.float32]) -> str | None:
        """What is wrong with the logits by phases; None if they are ``expected`` up to rounding."""
        try:
            found = self._run_phased(steps, batch, None)
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
        self._forget_recordings()  # those of a head refer to the buffers of the way that is left
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
            result = record(Maker(recorder, self._step.buffer, StepLayout(rows), rows))
            if not recorder.grown:
                break
            # Older recordings refer to buffers that have been replaced, and so may the beginning of this one.
            self._forget_recordings()
        while len(self._recordings) >= MAX_RECORDINGS:
            self._ctx.queue.finish()
            self._recordings.popitem(last=False)
        self._recordings[key] = Recorded(recorder.recording, result)
        return self._recordings[key]

    def _forget_recordings(self) -> None:
        """Make recordings anew, because they refer to a buffer that has been replaced. Steps may be in the queue."""
        self._ctx.queue.finish()
        self._recordings.clear()

    def _record_layers(self, maker: Maker) -> Residual:
        """Record the embedding and all layers."""
        plan = self._plan
        hidden, eps = plan.hidden_size, plan.norm_eps
        residual, added = Residual(maker.room("x", hidden)), maker.room("added", hidden)
        normed = maker.room("normed", hidden, self._row_type)
        cuts = self._cuts(maker.rows)
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
                layer.mixer.record(maker, normed, added, self._row_type, cuts)
            residual.pending = added
            if isinstance(layer.ffn, MoeFfn):
                residual.pending = layer.ffn.record(maker, residual, layer.ffn_norm, eps, normed)
            else:
                residual.norm(maker, layer.ffn_norm, eps, normed)
                layer.ffn.record(maker, normed, added)
                residual.pending = added
        return residual

    def _record_head(self, maker: Maker, residual: Residual, chooses: bool) -> cl.Buffer:
        """Record the final norm of the wanted rows, the head, and the choice of tokens if ``chooses``."""
        plan = self._plan
        type_code = self._row_type if self._head.quantised else FLOAT32
        normed = maker.room("normed", plan.hidden_size, type_code)
        replace(residual).norm(maker, self._final_norm, plan.norm_eps, normed, picked=maker.layout.picked)
        logits = maker.room("logits", plan.vocab_size, shares="gate_up")
        self._head.record(maker, normed, logits, "head")
        assert logits.data is not None
        return self._chooser.record(maker, logits.data, plan.vocab_size) if chooses else logits.data


class Recorded(NamedTuple):
    """A recording, and what it leaves behind: the residual stream, or the buffer to read."""

    recording: Recording
    result: Any
