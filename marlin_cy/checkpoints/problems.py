"""Why loading a checkpoint would fail, as far as that shows without reading weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from marlin_cy.checkpoints.calls import errors_of
from marlin_cy.checkpoints.foreign import foreign_layers, unreadable_tensors
from marlin_cy.checkpoints.moe_block import MoeBlock
from marlin_cy.checkpoints.scaled import ScaledLayers
from marlin_cy.errors import MarlinError
from marlin_cy.formats.scheme import Scheme

if TYPE_CHECKING:
    from marlin_cy.checkpoints.contents import Source, Tensors

__all__ = ["problems_of"]


def problems_of(
    tensors: Tensors,
    source: Source,
    scheme: Scheme | None,
    scaled: ScaledLayers,
    blocks: Iterable[MoeBlock],
    routing: bool,
    is_passed_over: Callable[[str], bool],
) -> list[MarlinError]:
    """As :meth:`Checkpoint.problems`.

    Parameters
    ----------
    tensors, source, scheme, scaled
        Of the checkpoint.
    blocks : iterable of MoeBlock
        The blocks whose experts are quantised.
    routing : bool
        Include what a MoE layer refuses though a model may run.
    is_passed_over : callable
        Whether a tensor or a layer is not needed.
    """
    checks: list[Callable[[], None]] = [
        partial(source.check_linear, name) for name in source.linears if not is_passed_over(name)
    ]
    checks += [partial(scaled.check, name) for name in scaled.weights if not is_passed_over(name)]
    checks += [partial(block.check_all, routing) for block in blocks]
    known = {*source.quantized_tensors(), *scaled.weights, *scaled.scales.values()}
    return [
        *errors_of(checks),
        *foreign_layers(tensors, scheme, scaled, is_passed_over),
        *unreadable_tensors(tensors, known, is_passed_over),
    ]
