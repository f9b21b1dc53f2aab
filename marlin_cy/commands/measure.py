"""One MoE layer run over activations: is it right, and how fast is it?"""

import dataclasses
import statistics
import time

import numpy as np

__all__ = ["ERROR_BOUNDS", "LayerResult", "measure_layer"]

# Unless told otherwise, a layer is timed for so long, and so often: on a machine that others use too,
# a median over a few milliseconds may see nothing but the others.
LEAST_SECONDS = 0.2
LEAST_REPEATS = 5

# Relative error (Frobenius) of a layer's output, by compute dtype: two products and an activation,
# each at the error of its dtype on normal data, with room for activations that are less kind.
ERROR_BOUNDS = {"int16": 2e-4, "int8": 3e-2}


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """What one layer showed.

    Attributes
    ----------
    layer, num_experts, hidden_size, intermediate_size, top_k, tokens : int
    experts_hit : int
        Experts that at least one token was routed to.
    finite : bool
        Whether all of the output is.
    relative_error : float or None
        Frobenius norm of the difference to the recorded output, over that of the recorded output;
        None where nothing was recorded or the output is not finite.
    repeats : int
        How many forward passes were timed.
    seconds : float
        Their median time.
    weight_bytes : int
        Packed bytes of the experts that were hit.
    weight_bytes_per_second : float
    read_share : float
        ``weight_bytes_per_second`` over the machine's read bandwidth with the same threads.
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
    read_share: float

    def failure(self, bound):
        """A sentence on what is wrong with it, or None."""
        if not self.finite:
            return f"layer {self.layer}: the output has NaN or infinity"
        if self.relative_error is not None and self.relative_error > bound:
            return f"layer {self.layer}: relative error {self.relative_error:.2g}, expected at most {bound:g}"
        return None


def measure_layer(context, index, layer, fed, *, repeats, read_bandwidth):
    """Run a layer once for its output, then several times for its speed.

    Parameters
    ----------
    context : Context
    index : int
        The layer's number in the model.
    layer : MoeLayer
    fed : LayerActivations
    repeats : int or None
        Timed passes; None for as many as take 0.2 seconds, but at least 5.
    read_bandwidth : float
        Bytes per second at which the machine reads memory with the context's threads.

    Returns
    -------
    LayerResult
    """
    out = layer(context, fed.hidden_states, fed.router_logits)
    pass_seconds = _time_passes(context, layer, fed, repeats)
    seconds = statistics.median(pass_seconds)
    finite = bool(np.isfinite(out.astype(np.float32)).all())
    topk_ids, _ = layer.route(context, fed.router_logits)
    experts_hit = np.unique(topk_ids).size
    packed_bytes = layer.gate_up.metadata.packed_bytes + layer.down.metadata.packed_bytes
    weight_bytes = packed_bytes * experts_hit // layer.num_experts
    return LayerResult(
        layer=index,
        num_experts=layer.num_experts,
        hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size,
        top_k=layer.top_k,
        tokens=len(fed.hidden_states),
        experts_hit=experts_hit,
        finite=finite,
        relative_error=_relative_error(out, fed.moe_output) if finite and fed.moe_output is not None else None,
        repeats=len(pass_seconds),
        seconds=seconds,
        weight_bytes=weight_bytes,
        weight_bytes_per_second=weight_bytes / seconds,
        read_share=weight_bytes / seconds / read_bandwidth,
    )


def _time_passes(context, layer, fed, repeats):
    """The seconds that each pass took."""
    seconds = []
    while len(seconds) < (repeats or LEAST_REPEATS) or (repeats is None and sum(seconds) < LEAST_SECONDS):
        start = time.perf_counter()
        layer(context, fed.hidden_states, fed.router_logits)
        seconds.append(time.perf_counter() - start)
    return seconds


def _relative_error(out, expected):
    expected = expected.astype(np.float64)
    # An expected output of zeros leaves the norm of what came out.
    return float(np.linalg.norm(out - expected) / (np.linalg.norm(expected) or 1.0))
