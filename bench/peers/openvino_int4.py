"""OpenVINO's CPU plugin with compressed 4-bit weights.

A model holds the codes as a constant of type u4, followed by the operations that dequantise them (convert, subtract
zero points, multiply by scales, reshape) and the product. The plugin fuses this chain into the product, which then
reads 4-bit codes. If it does not fuse, the weights are expanded once and int4 is not measured: loading looks
at the executed graph and raises in this case. Source of the pattern: OpenVINO's documentation, "Weight Compression".

A layer's experts are written as every token through every expert, multiplied by a scattered ``[T, E]`` matrix of top-k
weights. The plugin turns this into products that run the selected experts only (``GatherMatmul``). Source of that
pattern: OpenVINO, ``convert_tiled_moe_block_to_gather_matmuls.cpp``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.peers.forms import (
    columns_of,
    require_matching,
    require_nibble_zeros,
    require_plain,
    require_routing,
    zeros_of,
)
from bench.peers.interface import Array, Experts, Peer, Projection
from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.canonical import CanonicalWeight, unpack_words

__all__ = ["OpenVinoBf16", "OpenVinoFloat32", "OpenVinoInt8"]

ACTIVATION_GROUP = 32  # values that share a scale; groups of weights must be a multiple of it


def pack_nibbles(codes: Array) -> npt.NDArray[np.uint8]:
    """uint8, two codes per byte in C order, the first in the low half. An odd number of codes is padded with 0."""
    codes = np.append(codes, np.uint8(0)) if codes.size % 2 else codes.reshape(-1)
    packed: npt.NDArray[np.uint8] = codes[0::2] | codes[1::2] << 4
    return packed


class OpenVino(Peer):
    """Base of the three precisions."""

    distribution = "openvino"
    most_weights = 8
    precision = "f32"
    activation_group = 0  # activations stay floats

    @functools.cached_property
    def core(self) -> Any:
        """The plugin's loader, made on first use."""
        import openvino

        return openvino.Core()

    def available(self) -> str | None:
        try:
            import openvino  # noqa: F401
        except ImportError as error:
            return f"openvino cannot be imported ({error}): pip install openvino"
        if "CPU" not in self.core.available_devices:
            return "openvino has no CPU plugin for this machine"
        return None

    def load(self, weight: CanonicalWeight) -> Projection:
        if self.activation_group and weight.group_size % self.activation_group:
            raise UnsupportedError(
                f"weight: got group_size {weight.group_size}, expected a multiple of {self.activation_group}"
            )
        model, held = _projection(weight)
        return _Projection(self._compile(model, "FullyConnected", 1), held, weight.k)

    def available_moe(self) -> str | None:
        return self.available()

    def load_moe(self, gate_up: Sequence[CanonicalWeight], down: Sequence[CanonicalWeight]) -> Experts:
        require_matching(gate_up, down)
        model, held = _experts(gate_up, down)
        return _Experts(self._compile(model, "GatherMatmul", 3), held, gate_up[0].k, len(gate_up))

    def _compile(self, model: Any, kind: str, products: int) -> Any:
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.num_threads,
            "INFERENCE_PRECISION_HINT": self.precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self.activation_group,
        }
        compiled = self.core.compile_model(model, "CPU", settings)
        _require_fused(compiled, kind, products)
        return compiled


class OpenVinoFloat32(OpenVino):
    """float32 activations; weights become float32 in registers."""

    name, accuracy = "openvino_f32", "float32"


class OpenVinoBf16(OpenVino):
    """bfloat16 activations."""

    name, accuracy, precision = "openvino_bf16", "bf16", "bf16"

    def available(self) -> str | None:
        missing = super().available()
        if missing is None and "BF16" not in self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            missing = "openvino has no bfloat16 arithmetic on this CPU"
        return missing


class OpenVinoInt8(OpenVino):
    """Activations quantised for each product: dynamic quantisation."""

    name, accuracy, activation_group = "openvino_int8", "int8", ACTIVATION_GROUP

    def available_moe(self) -> str | None:
        return self.available() or "openvino quantises no activations in its products by expert"

    def load_moe(self, gate_up: Sequence[CanonicalWeight], down: Sequence[CanonicalWeight]) -> Experts:
        raise UnsupportedError(self.available_moe())


class _Projection(Projection):
    def __init__(self, compiled: Any, held: list[Array], k: int) -> None:
        # The model's constants share the memory of the arrays in `held`.
        self._compiled, self._held, self._k = compiled, held, k

    def prepare(self, x: Array) -> Any:
        x = np.array(x, np.float32, order="C")
        if x.ndim != 2 or x.shape[1] != self._k:
            raise ValueError(f"x: got shape {x.shape}, expected [M, {self._k}]")
        return _request(self._compiled, x)

    def run(self, prepared: Any) -> Any:
        prepared.infer()
        return prepared

    def result(self, out: Any) -> Array:
        result: Array = out.get_output_tensor().data.copy()
        return result


class _Experts(Experts):
    def __init__(self, compiled: Any, held: list[Array], hidden: int, num_experts: int) -> None:
        self._compiled, self._held, self._hidden, self._num_experts = compiled, held, hidden, num_experts

    def prepare(self, x: Array, topk_ids: Array, topk_weights: Array) -> Any:
        x = np.array(x, np.float32, order="C")
        ids = np.array(topk_ids, np.int32, order="C")
        weights = np.array(topk_weights, np.float32, order="C")
        require_routing(x, ids, weights, self._hidden, self._num_experts)
        return _request(self._compiled, x, ids, weights)

    def run(self, prepared: Any) -> Any:
        prepared.infer()
        return prepared

    def result(self, out: Any) -> Array:
        result: Array = out.get_output_tensor().data.copy()
        return result


def _request(compiled: Any, *inputs: Array) -> Any:
    """A new inference request with these inputs, whose memory it shares."""
    import openvino

    request = compiled.create_infer_request()
    for i, array in enumerate(inputs):
        request.set_input_tensor(i, openvino.Tensor(array))
    return request


def _projection(weight: CanonicalWeight) -> tuple[Any, list[Array]]:
    """The model of one product, and the arrays that must live as long as it."""
    import openvino
    from openvino import opset13

    shape = [weight.n, weight.k // weight.group_size, weight.group_size]
    dense, held = _dense([weight], shape, [weight.n, weight.k])
    x = opset13.parameter([-1, weight.k], np.float32)
    return openvino.Model([opset13.matmul(x, dense, False, True)], [x], "projection"), held


def _experts(gate_up: Sequence[CanonicalWeight], down: Sequence[CanonicalWeight]) -> tuple[Any, list[Array]]:
    """The model of a layer's experts, and the arrays that must live as long as it.

    The plugin recognises the pattern only if gate and up are two products and Swish has one input. The opsets'
    function for Swish makes two inputs, so the node is created by name.
    """
    import openvino
    from openvino import opset13
    from openvino.utils.node_factory import NodeFactory

    num_experts, hidden, half = len(gate_up), gate_up[0].k, gate_up[0].n // 2
    held: list[Array] = []

    def product(x: Any, weights: Sequence[CanonicalWeight]) -> Any:
        n, k, group_size = weights[0].n, weights[0].k, weights[0].group_size
        dense, arrays = _dense(weights, [num_experts, n, k // group_size, group_size], [num_experts, n, k])
        held.extend(arrays)
        return opset13.matmul(x, dense, False, True)

    x = opset13.parameter([-1, hidden], np.float32)
    ids = opset13.parameter([-1, -1], np.int32)
    weights = opset13.parameter([-1, -1], np.float32)
    rows = opset13.reshape(x, np.array([-1, hidden]), special_zero=False)
    tiled = opset13.tile(rows, np.array([num_experts, 1]))
    tiled = opset13.reshape(tiled, np.array([num_experts, -1, hidden]), special_zero=False)
    gate = product(tiled, [columns_of(weight, slice(half)) for weight in gate_up])
    up = product(tiled, [columns_of(weight, slice(half, None)) for weight in gate_up])
    silu = NodeFactory("opset4").create("Swish", [gate.output(0)], {})
    outputs = product(opset13.multiply(silu, up), down)
    outputs = opset13.reshape(outputs, np.array([num_experts, -1, 1, hidden]), special_zero=False)

    tokens = opset13.gather(opset13.shape_of(ids, "i64"), np.array([0]), np.array(0))
    experts = opset13.constant(np.array([num_experts]))
    nothing = opset13.broadcast(opset13.constant(np.zeros(1, np.float32)), opset13.concat([tokens, experts], 0))
    shares = opset13.scatter_elements_update(nothing, ids, weights, opset13.constant(np.array([1])))
    shares = opset13.transpose(shares, np.array([1, 0]))
    last = opset13.constant(np.array([-1]))
    shares = opset13.reshape(shares, opset13.concat([experts, tokens, last], 0), special_zero=True)
    shares = opset13.unsqueeze(shares, np.array([-1]))

    total = opset13.reduce_sum(opset13.multiply(outputs, shares), np.array([0]), False)
    total = opset13.reshape(total, opset13.shape_of(x, "i64"), special_zero=False)
    return openvino.Model([total], [x, ids, weights], "experts"), held


def _dense(weights: Sequence[CanonicalWeight], grouped: list[int], shape: list[int]) -> tuple[Any, list[Array]]:
    """The chain that dequantises codes of shape ``grouped`` to float32 ``shape``, and the arrays that it shares.

    Raises
    ------
    UnsupportedError
        The chain cannot represent a weight.
    """
    import openvino
    from openvino import opset13

    for weight in weights:
        require_plain(weight)
        require_nibble_zeros(weight)
    held: list[Array] = []

    def nibbles(codes: Array, shape: list[int]) -> Any:
        packed = pack_nibbles(codes)
        held.append(packed)
        constant = openvino.op.Constant(openvino.Tensor(packed, openvino.Shape(shape), openvino.Type.u4))
        return opset13.convert(constant, np.float32)

    per_group = [*grouped[:-1], 1]
    codes = nibbles(np.stack([unpack_words(weight.words).T for weight in weights]), grouped)
    zero = nibbles(np.stack([zeros_of(weight).T for weight in weights]), per_group)
    scale = np.stack([weight.scale.T.astype(np.float32) for weight in weights]).reshape(per_group)
    weighted = opset13.multiply(opset13.subtract(codes, zero), opset13.constant(scale))
    return opset13.reshape(weighted, np.array(shape), special_zero=False), held


def _require_fused(compiled: Any, kind: str, products: int) -> None:
    """Raise UnsupportedError unless the graph has ``products`` products of a kind, each of which reads 4-bit codes."""
    nodes = compiled.get_runtime_model().get_ordered_ops()
    found = [node for node in nodes if node.get_rt_info()["layerType"].value == kind]
    types = [node.input(1).get_element_type().get_type_name() for node in found]
    if types != products * ["u4"]:
        raise UnsupportedError(f"openvino expands weights: got {kind} of {types}, expected {products} of 'u4'")
