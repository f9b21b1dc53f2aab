"""The error and the speed of one MoE layer."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from marlin_cy.commands.activations import LayerActivations
    from marlin_cy.interface import Backend, Buffer, Context
    from marlin_cy.moe.layer import MoeLayer

__all__ = ["ERROR_BOUND", "LayerMeasurement", "LayerResult", "common_figures", "repeated"]

ERROR_BOUND = 2e-2
"""The largest relative error (Frobenius) of a layer on a backend that does not set one.

It is derived for bfloat16, the least precise dtype of activations: its unit roundoff is 2**-9, and five roundings
affect an output: hidden states, gate_up's result, the activation, down's result, the output.
"""

# Unless --repeat says otherwise, passes are timed until both are reached. On a machine that runs other programs too,
# the median over a few milliseconds may show only their effect.
LEAST_SECONDS = 0.2
LEAST_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """The result of running one layer, on any backend.

    Attributes
    ----------
    layer, num_experts, hidden_size, intermediate_size, top_k, tokens : int
    experts_hit : int
        Experts that at least one token was routed to.
    finite : bool
        Whether the whole output is finite.
    relative_error : float or None
        Frobenius norm of the difference from the recorded output, divided by the norm of the recorded output;
        None if no output was recorded or the output is not finite.
    repeats : int
        Number of timed passes.
    seconds : float
        The median time of a pass, as the caller sees it.
    weight_bytes : int
        Packed bytes of the experts that were hit.
    weight_bytes_per_second : float
    """

    layer: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    tokens: int
    experts_hit: int
    finite: bool
    relative_error: float | None
    repeats: int
    seconds: float
    weight_bytes: int
    weight_bytes_per_second: float

    def failure(self, bound: float) -> str | None:
        """A sentence that describes an error in the result, or None."""
        if not self.finite:
            return f"layer {self.layer}: the output has NaN or infinity"
        if self.relative_error is not None and self.relative_error > bound:
            return f"layer {self.layer}: relative error {self.relative_error:.2g}, expected at most {bound:g}"
        return None


class LayerMeasurement:
    """How ``marlin-cy run`` measures layers: by the time until the output is on the host.

    A backend that measures its own times or bandwidths returns a subclass from
    :meth:`~marlin_cy.Backend.layer_measurement`.

    Parameters
    ----------
    backend : Backend
    context : Context
        Of the backend; all passes use it.

    Attributes
    ----------
    columns : tuple of str
        Headings of the table's columns for :meth:`cells`; one that begins with ``>`` is aligned to the right.
    """

    columns: tuple[str, ...] = (">time\nms", ">weights\nGB/s")

    def __init__(self, backend: Backend, context: Context) -> None:
        self.backend, self.context = backend, context

    def prepare(self) -> None:
        """Measure the reference for the results, such as a bandwidth. Called once, before any layer."""

    def measure(self, index: int, layer: MoeLayer, fed: LayerActivations, repeats: int | None) -> LayerResult:
        """Run a layer: once for its output, then several times for its speed.

        Parameters
        ----------
        index : int
            The layer's number in the model.
        layer : MoeLayer
        fed : LayerActivations
        repeats : int or None
            Number of timed passes; None for as many as take 0.2 seconds, but at least 5.
        """
        backend, context = self.backend, self.context
        hidden, logits = backend.from_host(fed.hidden_states), backend.from_host(fed.router_logits)
        buffer = layer(context, hidden, logits)
        out = np.array(backend.to_host(buffer))
        times = repeated(lambda: self.timed_pass(layer, hidden, logits, buffer), repeats)
        topk_ids, _ = layer.route(context, logits)
        common = common_figures(index, layer, fed, out, backend.to_host(topk_ids))
        seconds = statistics.median(times)
        rate = common["weight_bytes"] / seconds
        return self.result(common | {"repeats": len(times), "seconds": seconds, "weight_bytes_per_second": rate})

    def timed_pass(self, layer: MoeLayer, hidden_states: Buffer, router_logits: Buffer, out: Buffer) -> float:
        """Run the layer once; returns its seconds."""
        start = time.perf_counter()
        layer(self.context, hidden_states, router_logits, out=out)
        self.backend.to_host(out)
        return time.perf_counter() - start

    def result(self, figures: dict[str, Any]) -> LayerResult:
        """The result of a layer; ``figures`` are the fields of :class:`LayerResult`."""
        return LayerResult(**figures)

    def error_bound(self, dtype: npt.DTypeLike) -> float:
        """The relative error that a layer may have with activations of this dtype."""
        return ERROR_BOUND

    def about(self) -> dict[str, Any]:
        """Keys that the backend adds to the object of ``--json``."""
        return {"device": self.description()}

    def description(self) -> str:
        """A short description of the device and the settings."""
        return self.backend.describe(self.context)

    def cells(self, result: LayerResult) -> tuple[str, ...]:
        """A result's cells for :attr:`columns`."""
        return f"{result.seconds * 1e3:.3f}", f"{result.weight_bytes_per_second / 1e9:#.3g}"

    def notes(self) -> list[str]:
        """Lines below the table."""
        return []


def repeated(one_pass: Callable[[], float], repeats: int | None) -> list[float]:
    """The seconds that each call of ``one_pass`` returns: ``repeats`` calls, or 0.2 seconds of them."""
    seconds: list[float] = []
    while len(seconds) < (repeats or LEAST_REPEATS) or (repeats is None and sum(seconds) < LEAST_SECONDS):
        seconds.append(one_pass())
    return seconds


def common_figures(
    index: int, layer: MoeLayer, fed: LayerActivations, out: npt.NDArray[Any], topk_ids: npt.NDArray[np.int32]
) -> dict[str, Any]:
    """The fields of a :class:`LayerResult` that do not depend on time.

    Parameters
    ----------
    index, layer, fed
        As in :meth:`LayerMeasurement.measure`.
    out, topk_ids : ndarray
        The layer's output, and the experts that its tokens were routed to.
    """
    finite = bool(np.isfinite(out.astype(np.float32)).all())
    hit = np.unique(topk_ids).size
    packed_bytes = layer.gate_up.metadata.packed_bytes + layer.down.metadata.packed_bytes
    return {
        "layer": index,
        "num_experts": layer.num_experts,
        "hidden_size": layer.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "top_k": layer.top_k,
        "tokens": len(fed.hidden_states),
        "experts_hit": hit,
        "finite": finite,
        "relative_error": _relative_error(out, fed.moe_output) if finite and fed.moe_output is not None else None,
        "weight_bytes": packed_bytes * hit // layer.num_experts,
    }


def _relative_error(out: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    expected = expected.astype(np.float64)
    # Where the expected output is zero, the error is the norm of the output.
    return float(np.linalg.norm(out - expected) / (np.linalg.norm(expected) or 1.0))
