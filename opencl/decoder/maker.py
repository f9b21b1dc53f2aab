"""What the parts of a decoder share while their launches are recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyopencl as cl

from marlin_cy.opencl.arguments import arguments_of
from marlin_cy.opencl.buffers import TYPES, Rows
from marlin_cy.opencl.decoder.step import StepLayout
from marlin_cy.opencl.tiers.configuration import FLOAT16, FLOAT32

if TYPE_CHECKING:
    from marlin_cy.opencl.layer.forward import Shared
    from marlin_cy.opencl.layer.routing import Chosen
    from marlin_cy.opencl.recording import GlobalSize, RecordingContext

__all__ = ["Combination", "Maker", "Residual", "row_type"]

ROW_ITEMS = 256
"""Work-items for a row. 2048 values are eight each."""
CPU_ROW_ITEMS = 16
ADDED_NONE, ADDED_ROWS, ADDED_EXPERTS = range(3)  # ADDED of decoder_rows.cl


def row_type(ctx: RecordingContext) -> int:
    """The element type of rows that a quantised product reads.

    float16 where the tier's products read it without a conversion and float32 not: a launch for the conversion costs
    more than the kernel. All other rows are float32: a row takes far less time than the weights it meets.
    """
    direct = ctx.backend.tier.inputs(ctx.backend.runtime.capabilities).direct_types
    return FLOAT16 if FLOAT16 in direct and FLOAT32 not in direct else FLOAT32


@dataclass(frozen=True)
class Maker:
    """Records the launches of a step with a number of rows.

    Attributes
    ----------
    ctx : RecordingContext
    step : pyopencl.Buffer
        The description of the step.
    layout : StepLayout
    rows : int
    """

    ctx: RecordingContext
    step: cl.Buffer
    layout: StepLayout
    rows: int

    @property
    def is_cpu(self) -> bool:
        """Whether the device is a CPU."""
        return self.ctx.backend.runtime.capabilities.is_cpu

    @property
    def items(self) -> int:
        """Work-items for a row; a CPU runs few, one after the other."""
        return CPU_ROW_ITEMS if self.is_cpu else ROW_ITEMS

    def room(self, purpose: str, width: int, type_code: int = FLOAT32, shares: str | None = None) -> Rows:
        """The workspace's rows for a purpose: one for each row of the step.

        ``shares``: the purpose of a product of the experts, ``"gate_up"`` or ``"down"``, whose rows nothing needs
        meanwhile. They are the largest of a step, so the memory is that of the product.
        """
        data = self.ctx.reserve(shares or f"decoder {purpose}", self.rows * width * TYPES[type_code].itemsize)
        return Rows(data, 0, type_code, self.rows, width)

    def record(
        self,
        file: str,
        name: str,
        macros: Mapping[str, int],
        global_size: GlobalSize,
        local_size: tuple[int, ...] | None,
        label: str | None = None,
        options: Sequence[str] = (),
        **values: Any,
    ) -> None:
        """Record a launch of a kernel, with its arguments by name. ``options``: of the compiler."""
        table = arguments_of(name, macros)
        self.ctx.record(file, name, macros, global_size, local_size, table, values, label, options)

    def norm(
        self,
        x: Rows,
        weight: cl.Buffer,
        eps: float,
        output: Rows,
        *,
        x_offset: int = 0,
        added: Rows | Combination | None = None,
        picked: int | None = None,
        arrived: cl.Buffer | None = None,
    ) -> None:
        """RMS norm of the first ``output.width`` values of rows, from ``x_offset`` on.

        ``added`` is added to ``x`` before. ``picked``: where the step has the rows to take.
        """
        items = self.items
        macros = {
            "ROW_ITEMS": items,
            "OUTPUT_TYPE": output.type_code,
            "ADDED": ADDED_NONE if added is None else ADDED_ROWS if isinstance(added, Rows) else ADDED_EXPERTS,
            "PICKED": int(picked is not None),
        }
        more: dict[str, Any] = {"added": added.data} if isinstance(added, Rows) else {"added": None}
        if isinstance(added, Combination):
            more = added.arguments()
        self.record(
            "decoder_rows",
            "norm_rows",
            macros,
            (output.rows * items,),
            (items,),
            "norm_rows",
            x=x.data,
            x_offset=x_offset,
            x_stride=x.width,
            weight=weight,
            output=output.data,
            eps=eps,
            width=output.width,
            picked=None if picked is None else self.step,
            picked_offset=picked or 0,
            arrived=arrived,
            **more,
        )


@dataclass(frozen=True)
class Combination:
    """The output of a Mixture-of-Experts block before its rows are added up: the norm that follows does that.

    Attributes
    ----------
    products : Rows
        float32, ``top_k`` rows of each token.
    chosen : Chosen
    num_experts : int
    weighted : bool
        Whether rows are multiplied by the tokens' weights.
    shared : Shared or None
    """

    products: Rows
    chosen: Chosen
    num_experts: int
    weighted: bool
    shared: Shared | None

    def arguments(self) -> dict[str, Any]:
        """The arguments of ``norm_rows``."""
        shared = self.shared
        return {
            "added": self.products.data,
            "ids": self.chosen.ids,
            "weights": self.chosen.weights if self.weighted else None,
            "num_experts": self.num_experts,
            "top_k": self.chosen.top_k,
            "shared": None if shared is None else shared.rows.data,
            "factors": None if shared is None else shared.factors,
        }


@dataclass
class Residual:
    """The residual stream while a step is recorded.

    Attributes
    ----------
    x : Rows
        float32.
    pending : Rows, Combination or None
        What the next norm adds to ``x`` first.
    """

    x: Rows
    pending: Rows | Combination | None = None

    def norm(
        self,
        maker: Maker,
        weight: cl.Buffer,
        eps: float,
        output: Rows,
        *,
        picked: int | None = None,
        arrived: cl.Buffer | None = None,
    ) -> None:
        """Add what is pending, and record the norm."""
        maker.norm(self.x, weight, eps, output, added=self.pending, picked=picked, arrived=arrived)
        self.pending = None
