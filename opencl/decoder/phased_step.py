"""A step of few tokens by the phases of ``kernels/decoder_step.cl``: all in one launch, or each in its own.

In one launch the work-groups wait for each other, so all of them must be resident. That is known of NVIDIA GPUs, in the
tier "mma". If they do not come all the same, each phase is a launch from then on. Both ways are one kernel.

A step that chooses tokens leaves the description of the step that follows on the device. While a text is decoded, that
step is enqueued before the tokens are read. So the device does not wait for the host::

    device   step 1 │ step 2    │ step 3    │ ...
    host            read 1, enqueue 3   read 2, enqueue 4
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from marlin_cy.decoder.plan import DecoderPlan
from marlin_cy.opencl.arguments import arguments_of
from marlin_cy.opencl.buffers import Rows
from marlin_cy.opencl.decoder.following import Following
from marlin_cy.opencl.decoder.phased_shape import NotPhased, addresses, shape_of
from marlin_cy.opencl.decoder.step import Description, Ints, describe_rows
from marlin_cy.opencl.launch import bound_kernel
from marlin_cy.opencl.memory import driver_errors, uploaded, zeroed_buffers
from marlin_cy.opencl.tiers.configuration import FLOAT32

if TYPE_CHECKING:
    from marlin_cy.decoder.program import Batch
    from marlin_cy.opencl.context import OpenClContext
    from marlin_cy.opencl.decoder.layer import Layer
    from marlin_cy.opencl.decoder.projections import DenseMatrix

__all__ = ["Ends", "PhasedStep", "new_phased_step"]

CAPACITIES = (1, 2, 4, 8)
MOST_TOKENS = CAPACITIES[-1]
WAVES, CPU_WAVES = 16, 4
QKV_TEAM, GATE_TEAM = 4, 4
WAVE = 32
SPLIT_PAGES = 16
"""The fewest pages of a run of positions: one for each wave."""
PHASES = 7
JOINS = 2  # the phase that is left out if there is one run
STATE_INTS = 2 + 2 * (2 * MOST_TOKENS + 1)
PATIENCE = 1 << 21
"""Loads of the counter, of about a microsecond each, until a work-group gives up."""
LEAST_STEP_INTS = 1 << 14


class Ends(NamedTuple):
    """What lies before and after a model's layers, on the device.

    Attributes
    ----------
    embedding, final_norm : pyopencl.Buffer
    embedding_type : int
    head : DenseMatrix or None
        None if the head is quantised. It is then no part of the launch, and neither is one of 8 bits.
    vocab_size : int
    """

    embedding: cl.Buffer
    embedding_type: int
    final_norm: cl.Buffer
    head: DenseMatrix | None
    vocab_size: int


def new_phased_step(
    ctx: OpenClContext, plan: DecoderPlan, layers: Sequence[Layer], ends: Ends, resident: bool
) -> PhasedStep | None:
    """Steps by phases; None if the device or the model is not for them."""
    if ctx.backend.tier.name != "mma":
        return None
    try:
        return PhasedStep(ctx, plan, layers, ends, resident)
    except NotPhased:
        return None


class Launched(NamedTuple):
    """A step in the queue: its number, and the event of its last launch."""

    number: int
    event: cl.Event


class PhasedStep:
    """Steps of up to MOST_TOKENS rows, each of another sequence.

    Parameters
    ----------
    ctx : OpenClContext
    plan : DecoderPlan
    layers : sequence of Layer
    ends : Ends
    resident : bool
        Whether a step is one launch; else each phase is.

    Attributes
    ----------
    resident : bool
    has_head : bool
        Whether a step gives logits and tokens; else it ends with the residual stream.

    Raises
    ------
    NotPhased
        The kernel does not support the model.
    """

    def __init__(
        self, ctx: OpenClContext, plan: DecoderPlan, layers: Sequence[Layer], ends: Ends, resident: bool
    ) -> None:
        self._ctx, self.resident, self._vocab_size = ctx, resident, ends.vocab_size
        self._context_length = plan.context_length
        runtime = ctx.backend.runtime
        device = runtime.capabilities
        shape = shape_of(plan, layers)
        waves = CPU_WAVES if device.is_cpu else WAVES
        head = ends.head
        if head is not None and (head.k % 8 or head.bias is not None or head.scales is not None):
            head = None
        self.has_head = head is not None
        self._macros = shape.macros | {
            "TENSOR": int(ctx.backend.tier.name == "mma"),
            "RESIDENT": int(resident),
            "WAVES": waves,
            "QKV_TEAM": QKV_TEAM,
            "GATE_TEAM": GATE_TEAM,
            "EMBEDDING_TYPE": ends.embedding_type,
            "HAS_HEAD": int(self.has_head),
            "HEAD_TYPE": 0 if head is None else head.type_code,
            "VOCABULARY": ends.vocab_size,
            "ALIGNED": 1,
        }
        self._local = WAVE * waves
        self._groups = device.compute_units
        self._ends = addresses(runtime, [ends.embedding, ends.final_norm, *([] if head is None else [head.buffer])])
        self._shape = shape
        self._layers = uploaded(runtime, shape.table(runtime).view(np.uint8), "table of layers")
        # The counter of work-groups, whether one gave up, and twice the tokens, their logits, and the step's number.
        (self._state,) = zeroed_buffers(runtime, [4 * STATE_INTS], "state of a step")
        self._step = Description(runtime, LEAST_STEP_INTS, "description of a step")
        self._target = 0
        self._seen = np.zeros(STATE_INTS, np.uint32)
        self._gave_up = False
        self._number = 0
        self._current: Launched | None = None
        self._ahead: Launched | None = None  # enqueued before the host has asked for it
        self._following: Following | None = None
        with driver_errors(runtime):
            self._reader = cl.CommandQueue(runtime.context, runtime.device)
        self._kernels: dict[int, Kernel] = {}
        self._rooms: dict[int, dict[str, cl.Buffer]] = {}

    def cache_grown(self) -> None:
        """Tell the kernel where new segments of the cache are. No step is in the queue."""
        cl.enqueue_copy(self._ctx.queue, self._layers, self._shape.table(self._ctx.backend.runtime).view(np.uint8))

    def takes(self, batch: Batch) -> bool:
        """Whether a batch is one row of each of a few sequences.

        A row cannot attend to a row of the same step: their work-groups do not wait for each other.
        """
        return len(batch.tokens) == len(batch.segments) <= MOST_TOKENS

    def capacity(self, rows: int) -> int:
        """Rows of the kernel that takes ``rows`` rows."""
        return next(number for number in CAPACITIES if number >= rows)

    def kind(self, rows: int) -> str:
        """Everything that decides whether the kernel gives correct results."""
        return f"decoder_step {sorted(self._macros.items())} TOKENS {self.capacity(rows)} groups {self._groups}"

    def enqueue(self, batch: Batch, greedy: bool) -> Rows:
        """Enqueue a step, unless it is in the queue already. Returns the residual stream.

        A greedy step whose tokens are those that the last step chose belongs to a text. The step that follows is then
        enqueued, too. If the caller asks for another step instead, its work was in vain: it has written keys and values
        at positions that no sequence has.

        Parameters
        ----------
        batch : Batch
            One that :meth:`takes` accepts.
        greedy : bool
            Whether tokens are chosen, too.
        """
        rows, greedy = len(batch.tokens), greedy and self.has_head
        following, ahead = self._following if greedy else None, self._ahead
        self._following = self._ahead = None
        continues = following is not None and following.is_step_of(batch)
        if following is None or not continues or not following.has_pages_of(batch):
            described = self._describe(batch)
            following, ahead = Following(batch.segments[:, 2].tolist(), described), None
        kernel = self._kernels.get(self.capacity(rows))
        if kernel is None:
            kernel = self._kernels[self.capacity(rows)] = self._bound(self.capacity(rows))
        self._current = self._launch(kernel, rows, following.num_pages, greedy) if ahead is None else ahead
        if greedy:
            self._following = following.next()
            if continues and self._following.can_be_computed(self._context_length):
                self._ahead = self._launch(kernel, rows, following.num_pages, greedy)
        return Rows(kernel.rooms["x"], 0, FLOAT32, rows, self._macros["HIDDEN"])

    def _describe(self, batch: Batch) -> Ints:
        """Write a step's description to the device. Returns its page tables, int32 ``[rows, pages]``."""
        step, pages = describe_rows(batch)
        if self._step.grow(len(step)):
            self._ctx.queue.finish()
            self._kernels.clear()
        self._step.write(self._ctx.queue, step)
        return step[len(step) - len(batch.tokens) * pages :].reshape(-1, pages)

    def _launch(self, kernel: Kernel, rows: int, pages: int, greedy: bool) -> Launched:
        """Enqueue the step that the device's description names."""
        macros, queue = self._macros, self._ctx.queue
        blocks = macros["NUM_HEADS"] // macros["HEADS"]
        splits = max(1, min(self._groups // (rows * blocks), pages // SPLIT_PAGES))
        last = macros["LAYERS"] * PHASES + self.has_head * (1 + greedy)
        self._number = (self._number + 1) % 2**32
        kernel.set(rows=rows, splits=splits)
        kernel.set_number(self._number)
        size, local = (self._groups * self._local,), (self._local,)
        if self.resident:
            kernel.set(last=last, target=(self._target + self._groups) % 2**32)
            waits = last - 1 - (macros["LAYERS"] if splits == 1 else 0)
            self._target = (self._target + self._groups * waits) % 2**32
            event = cl.enqueue_nd_range_kernel(queue, kernel.kernels[0], size, local)
            self._ctx.log("decoder_step", event)
        else:
            end = macros["LAYERS"] * PHASES
            for phase, found in enumerate(kernel.kernels[:last]):
                if splits > 1 or phase % PHASES != JOINS or phase >= end:
                    event = cl.enqueue_nd_range_kernel(queue, found, size, local)
                    self._ctx.log(f"decoder_step {PHASES + phase - end if phase >= end else phase % PHASES}", event)
        return Launched(self._number, event)

    def tokens(self, rows: int) -> npt.NDArray[np.int32]:
        """The tokens of the step that was enqueued last, and the bits of their logits, int32 ``[rows, 2]``.

        Waits for them. If all logits of a row are NaN, so is the logit.
        """
        current, following = self._current, self._following
        assert current is not None and following is not None
        if self._ahead is None:
            cl.enqueue_copy(self._ctx.queue, self._seen, self._state)
        else:  # by another queue: this one has the step that follows
            self._ctx.queue.flush()
            cl.enqueue_copy(self._reader, self._seen, self._state, wait_for=[current.event])
        size = 2 * self.capacity(rows) + 1
        begin = 2 + current.number % 2 * size
        found = self._seen[begin : begin + size]
        self._gave_up = int(found[-1]) != current.number
        tokens = found[: 2 * rows].view(np.int32).reshape(rows, 2).copy()
        following.tokens = tokens[:, 0].tolist()
        return tokens

    def vocabulary(self, rows: int) -> cl.Buffer:
        """The buffer of the logits of steps of ``rows`` rows."""
        return self._rooms_for(self.capacity(rows))["vocabulary"]

    def logits(self, rows: int) -> npt.NDArray[np.float32]:
        """The logits of the step that was enqueued last, float32 ``[rows, vocab_size]``. Waits for them."""
        found = np.empty((rows, self._vocab_size), np.float32)
        kernel = self._kernels[self.capacity(rows)]
        cl.enqueue_copy(self._ctx.queue, found, kernel.rooms["vocabulary"])
        self.read_state()
        return found

    def gave_up(self) -> bool:
        """Whether a work-group of the step that was read last waited in vain. Resets the counter if so."""
        if not self._gave_up:
            return False
        cl.enqueue_fill_buffer(self._ctx.queue, self._state, b"\0", 0, 8)
        self._target, self._gave_up = 0, False
        self._following = self._ahead = None
        return True

    def read_state(self) -> None:
        """Read whether a work-group of a step that chose no tokens gave up. Waits for the step."""
        cl.enqueue_copy(self._ctx.queue, self._seen, self._state)
        self._gave_up = bool(self._seen[1])

    def _rooms_for(self, tokens: int) -> dict[str, cl.Buffer]:
        """The buffers of steps of up to ``tokens`` rows. They stay the same: recordings of a head refer to them."""
        found = self._rooms.get(tokens)
        if found is not None:
            return found
        macros = self._macros
        heads, width = macros["NUM_HEADS"], macros["HEAD_DIM"]
        pairs, attended = tokens * macros["TOP_K"], heads * width
        queries = (1 + macros["GATED"]) * heads
        room = self._groups * macros["HEADS"] + tokens * heads
        sizes = {
            "x": 4 * tokens * macros["HIDDEN"],
            "heads": 4 * tokens * (queries + 2 * macros["NUM_KV_HEADS"]) * width,
            "attended": 2 * tokens * attended,
            "partial": 4 * room * width,
            "stats": 8 * room,
            "logits": 4 * tokens * macros["EXPERTS"],
            "ids": 4 * pairs,
            "weights": 4 * (pairs + tokens),
            "inner": 4 * (pairs * macros["INNER"] + tokens * self._shape.shared_inner),
            "inner_most": 4 * (pairs + tokens),
            "vocabulary": 4 * tokens * self._vocab_size,
            "best": 8 * tokens * self._groups,
        }
        buffers = zeroed_buffers(self._ctx.backend.runtime, list(sizes.values()), "rows of a step")
        self._rooms[tokens] = dict(zip(sizes, buffers, strict=True))
        return self._rooms[tokens]

    def _bound(self, tokens: int) -> Kernel:
        """A kernel object with all arguments set that do not change."""
        ctx, macros = self._ctx, {**self._macros, "TOKENS": tokens}
        runtime, rooms = ctx.backend.runtime, self._rooms_for(tokens)
        table = arguments_of("decoder_step", macros)
        options = ctx.backend.tier.options(runtime.capabilities)
        program = runtime.programs.program("decoder_step", macros, options)
        values: dict[str, Any] = {
            **rooms,
            "batch": self._step.buffer,
            "layers": self._layers,
            "embedding": self._ends[0],
            "final_norm": self._ends[1],
            "head": self._ends[2] if self.has_head else 0,
            "rows": tokens,
            "splits": 1,
            "state": self._state,
            "number": 0,
            "target": 0,
            "patience": PATIENCE,
        }
        last = macros["LAYERS"] * PHASES + 2 * self.has_head
        phases = [(0, last)] if self.resident else [(phase, phase + 1) for phase in range(last)]
        kernels = [
            bound_kernel(cl.Kernel(program, "decoder_step"), table, {**values, "first": begin, "last": end})
            for begin, end in phases
        ]
        return Kernel(kernels, list(table), rooms)


class Kernel:
    """The kernel objects of a step, with their buffers: one, or one for each phase.

    Attributes
    ----------
    kernels : list of pyopencl.Kernel
    rooms : dict of str to pyopencl.Buffer
    """

    def __init__(self, kernels: list[cl.Kernel], names: list[str], rooms: dict[str, cl.Buffer]) -> None:
        self.kernels, self.rooms = kernels, rooms
        self._places = {name: place for place, name in enumerate(names)}
        self._set: dict[str, int] = {}

    def set(self, **values: int) -> None:
        """Set arguments of type uint, where they have changed."""
        for name, value in values.items():
            if self._set.get(name) != value:
                for kernel in self.kernels:
                    kernel.set_arg(self._places[name], np.uint32(value))
                self._set[name] = value

    def set_number(self, number: int) -> None:
        """Set the number of the step, which the phase that chooses tokens writes."""
        self.kernels[-1].set_arg(self._places["number"], np.uint32(number))
