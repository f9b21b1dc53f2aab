"""ONNX Runtime's operators on 4-bit weights, ``MatMulNBits`` and ``QMoE``, each in a model of one node.

Source of the formats: the operators' own documentation, ``docs/ContribOperators.md`` of onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bench.peers.forms import pack_rows, require_nibble_zeros, require_plain, zeros_of
from bench.peers.interface import Array, Experts, Peer, Projection
from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.canonical import CanonicalWeight, unpack_words

__all__ = ["OnnxRuntimeFloat32", "OnnxRuntimeInt8"]

BLOCK_SIZES = (16, 32, 64, 128, 256)
DOMAIN = "com.microsoft"
MODEL_BYTES = 2**31 - 2**20  # limit of a serialised model, less room for everything but weights


class _OnnxRuntime(Peer):
    """Base of both accuracies. Threads belong to the session and do not spin between calls."""

    distribution = "onnxruntime"
    accuracy_level: int

    def available(self) -> str | None:
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
        except ImportError as error:
            return f"{error.name} cannot be imported ({error}): pip install onnxruntime onnx"
        return None

    def load(self, weight: CanonicalWeight) -> Projection:
        parts: dict[str, Any] = {name: None if array is None else array[0] for name, array in _packed([weight]).items()}
        codes = parts["codes"].reshape(weight.n, -1, weight.group_size // 2)
        weights = {"B": codes, "scales": parts["scales"], "zero_points": parts["zero_points"]}
        attributes = {"K": weight.k, "N": weight.n, "bits": 4, "block_size": weight.group_size}
        return _Projection(self._session("MatMulNBits", {"A": weight.k}, weights, weight.n, attributes))

    def available_moe(self) -> str | None:
        if (missing := self.available()) is not None:
            return missing
        from onnxruntime.capi import onnxruntime_pybind11_state as states

        scale, zero = np.ones((1, 32), np.float16), np.full((1, 32), 8, np.uint8)
        gate_up = CanonicalWeight(np.zeros((2, 32), np.uint32), scale, zero, 16)
        down = CanonicalWeight(gate_up.words[:, :16], scale[:, :16], zero[:, :16], 16)
        try:
            self._moe_session(*_moe_parts([gate_up], [down]), top_k=1)
        except (states.Fail, states.InvalidGraph, states.NotImplemented) as error:
            return f"onnxruntime {self.version} cannot run QMoE ({error}): pip install -U onnxruntime"
        return None

    def load_moe(self, gate_up: Sequence[CanonicalWeight], down: Sequence[CanonicalWeight]) -> Experts:
        weights, attributes = _moe_parts(gate_up, down)
        return _Experts(lambda top_k: self._moe_session(weights, attributes, top_k), len(gate_up))

    def _moe_session(self, weights: Mapping[str, Any], attributes: Mapping[str, Any], top_k: int) -> Any:
        num_experts, width = weights["fc2_experts_weights"].shape[:2]
        inputs = {"input": width, "router_probs": num_experts}
        return self._session(
            "QMoE", inputs, weights, width, {**attributes, "k": top_k}, {"router_weights": num_experts}
        )

    def _session(
        self,
        operator: str,
        first_inputs: dict[str, int],
        weights: Mapping[str, Array | None],
        width: int,
        attributes: Mapping[str, Any],
        last_inputs: dict[str, int] | None = None,
    ) -> Any:
        """A session of one node.

        Parameters
        ----------
        operator : str
        first_inputs, last_inputs : dict of str to int
            Widths of the inputs before and after the weights, in order.
        weights : dict of str to array or None
            In order; None for an optional input that is not given.
        width : int
            Width of the output.
        attributes : dict
        """
        import onnx
        import onnxruntime

        if sum(array.nbytes for array in weights.values() if array is not None) > MODEL_BYTES:
            raise UnsupportedError(f"weights: got more bytes than a model may have, expected at most {MODEL_BYTES}")
        last_inputs = last_inputs or {}
        names = [*first_inputs, *("" if array is None else name for name, array in weights.items()), *last_inputs]
        node = onnx.helper.make_node(
            operator, names, ["Y"], domain=DOMAIN, accuracy_level=self.accuracy_level, **attributes
        )
        graph = onnx.helper.make_graph(
            [node],
            operator,
            [_rows_of(onnx, *name_and_width) for name_and_width in (first_inputs | last_inputs).items()],
            [_rows_of(onnx, "Y", width)],
            [onnx.numpy_helper.from_array(array, name) for name, array in weights.items() if array is not None],
        )
        opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(DOMAIN, 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.num_threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # a rejected model raises an error that says the same
        return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


class OnnxRuntimeFloat32(_OnnxRuntime):
    """Accuracy level 0: activations as they are."""

    name, accuracy, accuracy_level = "onnxruntime_float32", "float32", 0


class OnnxRuntimeInt8(_OnnxRuntime):
    """Accuracy level 4: activations rounded to 8 bits, by blocks as long as the weight's."""

    name, accuracy, accuracy_level = "onnxruntime_int8", "int8", 4


class _Projection(Projection):
    def __init__(self, session: Any) -> None:
        self._session = session

    def prepare(self, x: Array) -> Any:
        return _values(A=x)

    def run(self, prepared: Any) -> Any:
        return self._session.run_with_ort_values(["Y"], prepared)[0]

    def result(self, out: Any) -> Array:
        result: Array = out.numpy()
        return result


class _Experts(Experts):
    """Has one session per top-k, which is an attribute of the node."""

    def __init__(self, make_session: Callable[[int], Any], num_experts: int) -> None:
        self._make_session, self._num_experts = make_session, num_experts
        self._sessions: dict[int, Any] = {}

    def prepare(self, x: Array, topk_ids: Array, topk_weights: Array) -> Any:
        tokens, top_k = topk_ids.shape
        if top_k not in self._sessions:
            self._sessions[top_k] = self._make_session(top_k)
        chosen, weights = np.zeros((2, tokens, self._num_experts), np.float32)
        np.put_along_axis(chosen, topk_ids, 1, axis=1)
        np.put_along_axis(weights, topk_ids, topk_weights, axis=1)
        return self._sessions[top_k], _values(input=x, router_probs=chosen, router_weights=weights)

    def run(self, prepared: Any) -> Any:
        session, values = prepared
        return session.run_with_ort_values(["Y"], values)[0]

    def result(self, out: Any) -> Array:
        result: Array = out.numpy()
        return result


def _moe_parts(
    gate_up: Sequence[CanonicalWeight], down: Sequence[CanonicalWeight]
) -> tuple[dict[str, Array | None], dict[str, Any]]:
    """QMoE's inputs that are weights, in order, with None for those not given; and its attributes."""
    sizes = {weight.group_size for weight in (*gate_up, *down)}
    if len(sizes) != 1:
        raise UnsupportedError(f"weight: got group sizes {sorted(sizes)}, expected the same for all")
    # Gate and up rows alternate: the only order that the CPU operator supports.
    interleaved = np.arange(gate_up[0].n).reshape(2, -1).T.reshape(-1)
    first, second = _packed(gate_up, interleaved), _packed(down)
    weights = {
        "fc1_experts_weights": first["codes"],
        "fc1_scales": first["scales"],
        "fc1_experts_bias": None,
        "fc2_experts_weights": second["codes"],
        "fc2_scales": second["scales"],
        "fc2_experts_bias": None,
        "fc3_experts_weights": None,
        "fc3_scales": None,
        "fc3_experts_bias": None,
        "fc1_zero_points": first["zero_points"],
        "fc2_zero_points": second["zero_points"],
        "fc3_zero_points": None,
    }
    attributes = {
        "activation_type": "swiglu",  # with this alpha and beta: silu(gate) * up
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "swiglu_fusion": 1,
        "normalize_routing_weights": 0,
        "expert_weight_bits": 4,
        "block_size": sizes.pop(),
        "weights_prepacked": 0,
    }
    return weights, attributes


def _packed(weights: Sequence[CanonicalWeight], columns: Any = slice(None)) -> dict[str, Array | None]:
    """The arrays of both operators for several weights, N before K.

    ``codes`` is uint8 ``[E, N, K/2]`` and ``zero_points`` uint8 ``[E, N, ceil(K/g/2)]``, low nibble first.
    ``zero_points`` is None if all of them are 8, the operators' default. ``scales`` is float32 ``[E, N, K/g]``.
    """
    for weight in weights:
        require_plain(weight, BLOCK_SIZES)
        require_nibble_zeros(weight)
    symmetric = all((zeros_of(weight) == 8).all() for weight in weights)
    return {
        "codes": np.stack([pack_rows(unpack_words(weight.words).T[columns]) for weight in weights]),
        "scales": np.stack([weight.scale.T[columns].astype(np.float32) for weight in weights]),
        "zero_points": None if symmetric else np.stack([pack_rows(zeros_of(weight).T[columns]) for weight in weights]),
    }


def _rows_of(onnx: Any, name: str, width: int) -> Any:
    """The description of a float32 input or output ``[rows, width]``."""
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", width])


def _values(**arrays: Array) -> dict[str, Any]:
    """float32 arrays as ONNX Runtime's own values."""
    from onnxruntime import OrtValue

    return {name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x, np.float32)) for name, x in arrays.items()}
