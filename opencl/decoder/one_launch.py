"""A step of few tokens through all layers in one launch: ``kernels/decoder_step.cl``.

The kernel's work-groups wait for each other, so all of them must be resident. That is known on NVIDIA GPUs, in the tier
"mma". Elsewhere the same phases can run as a launch each, which tests do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyopencl as cl

from marlin_cy.decoder.plan import DecoderPlan
from marlin_cy.opencl.arguments import arguments_of
from marlin_cy.opencl.buffers import Rows
from marlin_cy.opencl.decoder.one_launch_shape import LAYER, NotOneLaunch, addresses, shape_of
from marlin_cy.opencl.launch import bound_kernel
from marlin_cy.opencl.memory import uploaded, zeroed_buffers
from marlin_cy.opencl.tiers.configuration import FLOAT32

if TYPE_CHECKING:
    from marlin_cy.decoder.program import Batch
    from marlin_cy.opencl.context import OpenClContext
    from marlin_cy.opencl.decoder.program import Layer

__all__ = ["MOST_TOKENS", "OneLaunch", "new_one_launch", "reason_not"]

MOST_TOKENS = 8
CAPACITIES = (1, 2, 4, 8)
WAVES, CPU_WAVES = 16, 4
QKV_TEAM, GATE_TEAM = 4, 4
WAVE = 32
SPLIT_TOKENS = 128
"""The fewest positions of a run."""
PHASES = 7
JOINS = 2  # the phase that is left out if there is one run
PATIENCE = 1 << 21
"""Loads of the counter, of about a microsecond each, until a work-group gives up."""


def new_one_launch(
    ctx: OpenClContext, plan: DecoderPlan, layers: Sequence[Layer], embedding: cl.Buffer, embedding_type: int
) -> OneLaunch | None:
    """The one-launch way of a model; None where steps are not taken in one launch."""
    if ctx.backend.tier.name != "mma":
        return None
    try:
        return OneLaunch(ctx, plan, layers, embedding, embedding_type, True)
    except NotOneLaunch:
        return None


def reason_not(plan: DecoderPlan, layers: Sequence[Layer]) -> str | None:
    """Why a model's steps cannot be one launch; None if they can."""
    try:
        shape_of(plan, layers)
    except NotOneLaunch as reason:
        return str(reason)
    return None


class OneLaunch:
    """Steps of up to MOST_TOKENS rows.

    Parameters
    ----------
    ctx : OpenClContext
    plan : DecoderPlan
    layers : sequence of Layer
    embedding : pyopencl.Buffer
    embedding_type : int
    resident : bool
        Whether a step is one launch; else each phase is.

    Raises
    ------
    NotOneLaunch
        See :func:`reason_not`.
    """

    def __init__(
        self,
        ctx: OpenClContext,
        plan: DecoderPlan,
        layers: Sequence[Layer],
        embedding: cl.Buffer,
        embedding_type: int,
        resident: bool,
    ) -> None:
        self._ctx, self._resident = ctx, resident
        runtime = ctx.backend.runtime
        device = runtime.capabilities
        shape = shape_of(plan, layers)
        waves = CPU_WAVES if device.is_cpu else WAVES
        self._macros = shape.macros | {
            "MMA": int(ctx.backend.tier.name == "mma"),
            "RESIDENT": int(resident),
            "STEP_WAVES": waves,
            "QKV_TEAM": QKV_TEAM,
            "GATE_TEAM": GATE_TEAM,
            "EMBEDDING_TYPE": embedding_type,
            "LAYER_BYTES": LAYER.itemsize,
        }
        self._local = WAVE * waves
        self.groups = device.compute_units
        (self._embedding,) = addresses(runtime, [embedding])
        self._layers = uploaded(runtime, shape.table(runtime).view(np.uint8), "table of layers")
        (self._state,) = zeroed_buffers(runtime, [8], "counter of work-groups")
        self._target = 0
        self._seen = np.zeros(2, np.uint32)
        self._reading: cl.Event | None = None
        self._kernels: dict[int, Kernel] = {}

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
        return f"decoder_step {sorted(self._macros.items())} TOKENS {self.capacity(rows)} groups {self.groups}"

    def prepared(self, step: cl.Buffer, rows: int) -> Kernel:
        """The kernel for a step of ``rows`` rows, whose description is in a buffer."""
        tokens = self.capacity(rows)
        found = self._kernels.get(tokens)
        if found is None or found.step is not step:
            found = self._kernels[tokens] = self._bound(step, tokens)
        return found

    def enqueue(self, step: cl.Buffer, rows: int, longest: int) -> Rows:
        """Enqueue a step. Returns the residual stream.

        Parameters
        ----------
        step : pyopencl.Buffer
            As of :func:`~marlin_cy.opencl.decoder.step.describe_step`, for ``rows`` rows.
        rows : int
        longest : int
            Positions that the row which sees most of them sees.
        """
        kernel = self.prepared(step, rows)
        macros = self._macros
        blocks = macros["HEADS"] // macros["HEADS_TOGETHER"]
        splits = max(1, min(self.groups // (rows * blocks), longest // SPLIT_TOKENS))
        size, local = (self.groups * self._local,), (self._local,)
        queue, last = self._ctx.queue, macros["LAYERS"] * PHASES
        kernel.set("rows", np.uint32(rows))
        kernel.set("splits", np.uint32(splits))
        if self._resident:
            kernel.set("target", np.uint32((self._target + self.groups) % 2**32))
            waits = macros["LAYERS"] * (PHASES - (splits == 1)) - 1
            self._target = (self._target + self.groups * waits) % 2**32
            self._ctx.log("decoder_step", cl.enqueue_nd_range_kernel(queue, kernel.kernel, size, local))
        else:
            for phase in range(last):
                if splits > 1 or phase % PHASES != JOINS:
                    kernel.set("first", np.uint32(phase))
                    kernel.set("last", np.uint32(phase + 1))
                    event = cl.enqueue_nd_range_kernel(queue, kernel.kernel, size, local)
                    self._ctx.log(f"decoder_step {phase % PHASES}", event)
        self._read_state()
        return Rows(kernel.x, 0, FLOAT32, rows, macros["HIDDEN"])

    @property
    def gave_up(self) -> bool:
        """Whether a work-group of the last step waited in vain. To be asked after a later read of the queue."""
        if not self._seen[1]:
            return False
        cl.enqueue_fill_buffer(self._ctx.queue, self._state, b"\0", 0, 8)
        self._target = self._seen[1] = 0
        return True

    def _read_state(self) -> None:
        """Enqueue a read of the counter."""
        if self._resident:
            self._reading = cl.enqueue_copy(self._ctx.queue, self._seen, self._state, is_blocking=False)

    def _bound(self, step: cl.Buffer, tokens: int) -> Kernel:
        """A kernel object with all arguments set that do not change."""
        ctx, macros = self._ctx, {**self._macros, "TOKENS": tokens}
        heads, width = macros["HEADS"], macros["HEAD_DIM"]
        pairs, attended = tokens * macros["TOP_K"], heads * width
        room = self.groups * macros["HEADS_TOGETHER"] + tokens * heads
        sizes = {
            "x": 4 * tokens * macros["HIDDEN"],
            "heads": 4 * tokens * (heads + 2 * macros["KV_HEADS"]) * width,
            "attended": 2 * tokens * attended,
            "partial": 4 * room * width,
            "stats": 8 * room,
            "logits": 4 * tokens * macros["EXPERTS"],
            "ids": 4 * pairs,
            "weights": 4 * pairs,
            "inner": 4 * pairs * macros["INNER"],
            "inner_most": 4 * pairs,
        }
        runtime = ctx.backend.runtime
        rooms = dict(zip(sizes, zeroed_buffers(runtime, list(sizes.values()), "rows of a step"), strict=True))
        options = ctx.backend.tier.options(runtime.capabilities)
        table = arguments_of("decoder_step", macros)
        kernel = cl.Kernel(runtime.programs.program("decoder_step", macros, options), "decoder_step")
        values: dict[str, Any] = {
            **rooms,
            "batch": step,
            "layers": self._layers,
            "embedding": self._embedding,
            "rows": tokens,
            "splits": 1,
            "first": 0,
            "last": macros["LAYERS"] * PHASES,
            "state": self._state,
            "target": 0,
            "patience": PATIENCE,
        }
        bound_kernel(kernel, table, values)
        return Kernel(kernel, list(table), step, rooms)


class Kernel:
    """A kernel object with its buffers.

    Attributes
    ----------
    kernel : pyopencl.Kernel
    step, x : pyopencl.Buffer
    """

    def __init__(self, kernel: cl.Kernel, names: list[str], step: cl.Buffer, rooms: dict[str, cl.Buffer]) -> None:
        self.kernel, self.step, self.x = kernel, step, rooms["x"]
        self._rooms = rooms
        self._places = {name: place for place, name in enumerate(names)}

    def set(self, name: str, value: Any) -> None:
        """Set an argument."""
        self.kernel.set_arg(self._places[name], value)
