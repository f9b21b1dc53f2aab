"""OpenVINO's CPU plugin on compressed 4-bit weights.

A model holds the codes as a constant of type u4, then what makes weights of them: convert, subtract zero
points, multiply by scales, reshape, and the product. The plugin takes that chain into the product, which
then reads the 4-bit codes; where it does not, the weights would be expanded once and their speed would say
nothing of int4, so loading looks at the executed graph and fails. Source of the pattern: OpenVINO's
documentation, "Weight Compression".
"""

import functools

import numpy as np

from marlin_cy.errors import UnsupportedError
from marlin_cy.formats.canonical import unpack_words

from .interface import Peer, Projection, require_plain

__all__ = ["OpenVinoBf16", "OpenVinoFloat32", "OpenVinoInt8"]

ACTIVATION_GROUP = 32  # values that share a scale; groups of weights must be a multiple of it


def pack_nibbles(codes):
    """uint8, two codes a byte, the first in the low half, from codes in C order; an odd one has 0 beside it."""
    codes = np.append(codes, np.uint8(0)) if codes.size % 2 else codes.reshape(-1)
    return codes[0::2] | codes[1::2] << 4


class OpenVino(Peer):
    """What the three precisions share."""

    distribution = "openvino"
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
        require_plain(weight)
        if self.activation_group and weight.group_size % self.activation_group:
            raise UnsupportedError(
                f"weight: got group_size {weight.group_size}, expected a multiple of {self.activation_group}"
            )
        if (weight.zero > 15).any():
            raise UnsupportedError("weight: got a zero point of 16, expected at most 15, as they become 4-bit codes")
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.num_threads,
            "INFERENCE_PRECISION_HINT": self.precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self.activation_group,
        }
        return _Compiled(self.core, weight, settings)


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


class _Compiled(Projection):
    def __init__(self, core, weight, settings):
        self._k = weight.k
        model, held = _model(weight)
        self._compiled = core.compile_model(model, "CPU", settings)
        self._held = held  # constants share the memory of these arrays
        _require_fused(self._compiled)

    def prepare(self, x):
        import openvino

        x = np.ascontiguousarray(x, np.float32)
        if x.ndim != 2 or x.shape[1] != self._k:
            raise ValueError(f"x: got shape {x.shape}, expected [M, {self._k}]")
        request = self._compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(x.copy()))
        return request

    def run(self, prepared):
        prepared.infer()
        return prepared

    def result(self, out):
        return out.get_output_tensor().data.copy()


def _model(weight):
    """The model, and the arrays that it needs as long as it lives."""
    import openvino
    from openvino import opset13

    groups = weight.k // weight.group_size
    held = []

    def nibbles(codes, shape):
        packed = pack_nibbles(np.ascontiguousarray(codes.T))
        held.append(packed)
        constant = openvino.op.Constant(openvino.Tensor(packed, openvino.Shape(shape), openvino.Type.u4))
        return opset13.convert(constant, np.float32)

    codes = nibbles(unpack_words(weight.words), [weight.n, groups, weight.group_size])
    zero = nibbles(weight.zero, [weight.n, groups, 1])
    scale = opset13.constant(np.ascontiguousarray(weight.scale.T, np.float32)[:, :, None])
    grouped = opset13.multiply(opset13.subtract(codes, zero), scale)
    dense = opset13.reshape(grouped, np.array([weight.n, weight.k]), special_zero=False)
    x = opset13.parameter([-1, weight.k], np.float32)
    return openvino.Model([opset13.matmul(x, dense, False, True)], [x], "projection"), held


def _require_fused(compiled):
    """Raise UnsupportedError unless the product itself reads 4-bit codes."""
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    kinds = [(str(node["layerType"].value), str(node["runtimePrecision"].value)) for node in nodes]
    if ("FullyConnected", "u4") not in kinds:
        raise UnsupportedError(f"openvino expands the weight before the product: its graph is {kinds}")
