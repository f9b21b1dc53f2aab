"""One MoE layer run over activations: is it right, and how fast is it?"""

import dataclasses
import statistics
import time

import numpy as np

__all__ = ["ERROR_BOUNDS", "CpuLayerResult", "LayerResult", "common_figures", "measure_layer", "repeated"]

# Unless told otherwise, a layer is timed for so long, and so often: on a machine that others use too,
# a median over a few milliseconds may see nothing but the others.
LEAST_SECONDS = 0.2
LEAST_REPEATS = 5

# Relative error (Frobenius) of a layer's output, by compute dtype: two products and an activation,
# each at the error of its dtype on normal data, with room for activations that are less kind.
ERROR_BOUNDS = {"int16": 2e-4, "int8": 3e-2}


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """What one layer showed, on any backend.

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
        Their median time, as the caller sees it.
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

    def failure(self, bound):
        """A sentence on what is wrong with it, or None."""
        if not self.finite:
            return f"layer {self.layer}: the output has NaN or infinity"
        if self.relative_error is not None and self.relative_error > bound:
            return f"layer {self.layer}: relative error {self.relative_error:.2g}, expected at most {bound:g}"
        return None


@dataclasses.dataclass(frozen=True)
class CpuLayerResult(LayerResult):
    """What one layer showed on the CPU.

    Attributes
    ----------
    read_share : float
        ``weight_bytes_per_second`` over the machine's read bandwidth with the same threads.
    """

    read_share: float


def measure_layer(context, index, layer, fed, *, repeats, read_bandwidth):
    """Run a layer on the CPU: once for its output, then several times for its speed.

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

    def one_pass():
        start = time.perf_counter()
        layer(context, fed.hidden_states, fed.router_logits)
        return time.perf_counter() - start

    pass_seconds = repeated(one_pass, repeats)
    seconds = statistics.median(pass_seconds)
    topk_ids, _ = layer.route(context, fed.router_logits)
    common = common_figures(index, layer, fed, out, topk_ids)
    return CpuLayerResult(
        **common,
        repeats=len(pass_seconds),
        seconds=seconds,
        weight_bytes_per_second=common["weight_bytes"] / seconds,
        read_share=common["weight_bytes"] / seconds / read_bandwidth,
    )


def repeated(one_pass, repeats):
    """What the calls of ``one_pass``, which returns its seconds, return: ``repeats`` calls, or 0.2 seconds of them."""
    seconds = []
    while len(seconds) < (repeats or LEAST_REPEATS) or (repeats is None and sum(seconds) < LEAST_SECONDS):
        seconds.append(one_pass())
    return seconds


def common_figures(index, layer, fed, out, topk_ids):
    """The fields of a :class:`LayerResult` that are no times.

    Parameters
    ----------
    index, layer, fed
        As in :func:`measure_layer`.
    out, topk_ids : ndarray
        The layer's output, and the experts that it took.
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


def _relative_error(out, expected):
    expected = expected.astype(np.float64)
    # An expected output of zeros leaves the norm of what came out.
    return float(np.linalg.norm(out - expected) / (np.linalg.norm(expected) or 1.0))
