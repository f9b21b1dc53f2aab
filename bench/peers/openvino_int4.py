"""OpenVINO's CPU plugin on compressed 4-bit weights.

A model holds the codes as a constant of type u4, then what makes weights of them: convert, subtract zero
points, multiply by scales, reshape, and the product. The plugin takes that chain into the product, which
then reads the 4-bit codes; where it does not, the weights would be expanded once and their speed would say
nothing of int4, so loading looks at the executed graph and fails. Source of the pattern: OpenVINO's
documentation, "Weight Compression".

A layer's experts are written as every token through every expert, of which a scattered ``[T, E]`` of
top-k weights keeps some; the plugin makes of it products that run only the chosen experts
(``GatherMatmul``). Source of that pattern: OpenVINO, ``convert_tiled_moe_block_to_gather_matmuls.cpp``.
"""

import functools
from dataclasses import replace

import numpy as np

from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.int4 import unpack_words

from .interface import Experts, Peer, Projection, require_matching, require_plain, require_routing

__all__ = ["OpenVinoBf16", "OpenVinoFloat32", "OpenVinoInt8"]

ACTIVATION_GROUP = 32  # values that share a scale; groups of weights must be a multiple of it


def pack_nibbles(codes):
    """uint8, two codes a byte, the first in the low half, from codes in C order; an odd one has 0 beside it."""
    codes = np.append(codes, np.uint8(0)) if codes.size % 2 else codes.reshape(-1)
    return codes[0::2] | codes[1::2] << 4


class OpenVino(Peer):
    """What the three precisions share."""

    distribution = "openvino"
    most_weights = 8
    precision = "f32"
    activation_group = 0  # activations stay floats

    @functools.cached_property
    def core(self):
        """The plugin's loader, made when first asked for."""
        import openvino

        return openvino.Core()

    def available(self):
        try:
            import openvino  # noqa: F401
        except ImportError as error:
            return f"openvino cannot be imported ({error}): pip install openvino"
        if "CPU" not in self.core.available_devices:
            return "openvino has no CPU plugin for this machine"
        return None

    def load(self, weight):
        if self.activation_group and weight.group_size % self.activation_group:
            raise UnsupportedError(
                f"weight: got group_size {weight.group_size}, expected a multiple of {self.activation_group}"
            )
        model, held = _projection(weight)
        return _Projection(self._compile(model, "FullyConnected", 1), held, weight.k)

    def available_moe(self):
        return self.available()

    def load_moe(self, gate_up, down):
        require_matching(gate_up, down)
        model, held = _experts(gate_up, down)
        return _Experts(self._compile(model, "GatherMatmul", 3), held, gate_up[0].k, len(gate_up))

    def _compile(self, model, kind, products):
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

    def available(self):
        missing = super().available()
        if missing is None and "BF16" not in self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            missing = "openvino computes no bfloat16 on this CPU"
        return missing


class OpenVinoInt8(OpenVino):
    """Activations quantised at each product, which OpenVINO calls dynamic quantisation."""

    name, accuracy, activation_group = "openvino_int8", "int8", ACTIVATION_GROUP

    def available_moe(self):
        return self.available() or "openvino quantises no activations in its products by expert"

    def load_moe(self, gate_up, down):
        raise UnsupportedError(self.available_moe())


class _Projection(Projection):
    def __init__(self, compiled, held, k):
        self._compiled, self._held, self._k = compiled, held, k  # constants share the memory of the arrays held

    def prepare(self, x):
        x = np.array(x, np.float32, order="C")
        if x.ndim != 2 or x.shape[1] != self._k:
            raise ValueError(f"x: got shape {x.shape}, expected [M, {self._k}]")
        return _request(self._compiled, x)

    def run(self, prepared):
        prepared.infer()
        return prepared

    def result(self, out):
        return out.get_output_tensor().data.copy()


class _Experts(Experts):
    def __init__(self, compiled, held, hidden, num_experts):
        self._compiled, self._held, self._hidden, self._num_experts = compiled, held, hidden, num_experts

    def prepare(self, x, topk_ids, topk_weights):
        x = np.array(x, np.float32, order="C")
        ids = np.array(topk_ids, np.int32, order="C")
        weights = np.array(topk_weights, np.float32, order="C")
        require_routing(x, ids, weights, self._hidden, self._num_experts)
        return _request(self._compiled, x, ids, weights)

    def run(self, prepared):
        prepared.infer()
        return prepared

    def result(self, out):
        return out.get_output_tensor().data.copy()


def _request(compiled, *inputs):
    """A request of its own for these inputs, which it shares the memory of."""
    import openvino

    request = compiled.create_infer_request()
    for i, array in enumerate(inputs):
        request.set_input_tensor(i, openvino.Tensor(array))
    return request


def _projection(weight):
    """The model of one product, and the arrays that it needs as long as it lives."""
    import openvino
    from openvino import opset13

    shape = [weight.n, weight.k // weight.group_size, weight.group_size]
    dense, held = _dense([weight], shape, [weight.n, weight.k])
    x = opset13.parameter([-1, weight.k], np.float32)
    return openvino.Model([opset13.matmul(x, dense, False, True)], [x], "projection"), held


def _experts(gate_up, down):
    """The model of a layer's experts, and the arrays that it needs as long as it lives.

    The pass that finds the pattern wants gate and up as two products, and a Swish of one input, which the
    opsets' own function does not make.
    """
    import openvino
    from openvino import opset13
    from openvino.utils.node_factory import NodeFactory

    num_experts, hidden, half = len(gate_up), gate_up[0].k, gate_up[0].n // 2
    held = []

    def product(x, weights):
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
    gate = product(tiled, [_columns(weight, slice(half)) for weight in gate_up])
    up = product(tiled, [_columns(weight, slice(half, None)) for weight in gate_up])
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


def _columns(weight, columns):
    """Some of a weight's columns as a weight."""
    zero = weight.zero[:, columns]
    return replace(weight, words=weight.words[:, columns], scale=weight.scale[:, columns], zero=zero)


def _dense(weights, grouped, shape):
    """The chain that makes float32 ``shape`` of codes of shape ``grouped``, and the arrays that it shares.

    Raises
    ------
    UnsupportedError
        For a weight that the chain has no form for.
    """
    import openvino
    from openvino import opset13

    for weight in weights:
        require_plain(weight)
        if (weight.zero > 15).any():
            raise UnsupportedError("weight: got a zero point of 16, expected at most 15, as they become 4-bit codes")
    held = []

    def nibbles(codes, shape):
        packed = pack_nibbles(codes)
        held.append(packed)
        constant = openvino.op.Constant(openvino.Tensor(packed, openvino.Shape(shape), openvino.Type.u4))
        return opset13.convert(constant, np.float32)

    a_group = [*grouped[:-1], 1]
    codes = nibbles(np.stack([unpack_words(weight.words).T for weight in weights]), grouped)
    zero = nibbles(np.stack([weight.zero.T for weight in weights]), a_group)
    scale = np.stack([weight.scale.T.astype(np.float32) for weight in weights]).reshape(a_group)
    weighted = opset13.multiply(opset13.subtract(codes, zero), opset13.constant(scale))
    return opset13.reshape(weighted, np.array(shape), special_zero=False), held


def _require_fused(compiled, kind, products):
    """Raise UnsupportedError unless there are so many products of a kind, and each reads 4-bit codes itself."""
    nodes = compiled.get_runtime_model().get_ordered_ops()
    found = [node for node in nodes if node.get_rt_info()["layerType"].value == kind]
    types = [node.input(1).get_element_type().get_type_name() for node in found]
    if types != products * ["u4"]:
        raise UnsupportedError(f"openvino expands weights: got {kind} of {types}, expected {products} of 'u4'")
