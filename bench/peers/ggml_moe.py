"""ggml: its products and its products by expert (``mul_mat_id``) with Q4_0 and Q4_K weights.

Q4_0 has groups of 32 rows of K with a float16 scale and no zero point, ``w = d * (q - 8)``. A symmetric weight (all
zero points 8) whose group size is a multiple of 32 and whose scales are float16 has exactly the same values in Q4_0,
with its scales repeated: nothing is quantised again. Activations become Q8_0: int8 with a float16 scale per 32 values.

Q4_K has groups of 32 with a scale and an offset, ``w = d * s * q - dmin * m``, where ``s`` and ``m`` have 6 bits and
``d`` and ``dmin`` are float16, one per 256 values. It cannot hold arbitrary scales and zero points: ggml's own
quantiser makes it from the dequantised weights, and the result is less accurate. Activations become Q8_K: int8 with a
float32 scale per 256 values.

A block of Q4_0 has 18 bytes: ``d``, then 16 bytes. The low half of byte j is ``q[j]``, the high half is ``q[j + 16]``.
Source: ggml, ``ggml-common.h`` (``block_q4_0``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.peers.forms import require_matching, require_plain, require_routing, zeros_of
from bench.peers.ggml_library import (
    LIBRARY_VARIABLE,
    TYPE_F32,
    TYPE_I32,
    TYPE_Q4_0,
    TYPE_Q4_K,
    Backend,
    Functions,
    Graph,
    Weights,
    library_folder,
)
from bench.peers.interface import Array, Experts, Peer, Projection, RoutedProduct
from marlin_cy import reference
from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.canonical import CanonicalWeight, unpack_words

__all__ = ["GgmlMoe", "GgmlQ4K", "pack_q4_0"]

BLOCK = 32
BLOCK_DTYPE = np.dtype([("d", np.float16), ("qs", np.uint8, BLOCK // 2)])
SUPER_BLOCK = 256
SUPER_BLOCK_DTYPE = np.dtype([("d", np.float16, 2), ("scales", np.uint8, 12), ("qs", np.uint8, SUPER_BLOCK // 2)])


class GgmlMoe(Peer):
    """ggml's CPU backend on Q4_0 weights, int8 activations."""

    name, accuracy, distribution = "ggml_q4_0", "int8", "llama_cpp_python"
    quantized = TYPE_Q4_0

    @functools.cached_property
    def backend(self) -> Backend:
        """The :class:`Backend`, made on first use."""
        folder = library_folder()
        assert folder is not None, "available() is checked before"
        return Backend(folder, self.num_threads)

    @property
    def version(self) -> str | None:
        """ggml's own version, as llama_cpp_python need not be installed; None without ggml."""
        folder = library_folder()
        if folder is None or self.available() is not None:
            return None
        functions: Any = Functions(folder)
        return str(functions.ggml_version().decode())

    def available(self) -> str | None:
        folder = library_folder()
        if folder is None:
            return f"no ggml: pip install llama-cpp-python, or set {LIBRARY_VARIABLE} to a folder with libggml-base.so"
        try:
            Functions(folder)
        except (OSError, AttributeError) as error:
            return f"no usable ggml in {folder}: {error}"
        return None

    def pack(self, weight: CanonicalWeight) -> Array:
        """A weight's blocks, ``[N, K / block]``."""
        return pack_q4_0(weight)

    def load(self, weight: CanonicalWeight) -> GgmlLinear:
        return GgmlLinear(self.backend, Weights(self.backend, self.quantized, self.pack(weight), weight.k))

    def available_routed(self) -> str | None:
        return self.available()

    def load_routed(self, weights: Sequence[CanonicalWeight]) -> GgmlRouted:
        return GgmlRouted(self.backend, self._experts(weights), len(weights))

    def available_moe(self) -> str | None:
        return self.available()

    def load_moe(self, gate_up: Sequence[CanonicalWeight], down: Sequence[CanonicalWeight]) -> GgmlExperts:
        require_matching(gate_up, down)
        return GgmlExperts(self.backend, self._experts(gate_up), self._experts(down), len(gate_up))

    def _experts(self, weights: Sequence[CanonicalWeight]) -> Weights:
        """One tensor with all experts. A weight that several experts share is packed once."""
        packed: dict[int, Array] = {}
        for weight in weights:
            if id(weight) not in packed:
                packed[id(weight)] = self.pack(weight)
        blocks = np.stack([packed[id(weight)] for weight in weights])
        return Weights(self.backend, self.quantized, blocks, weights[0].k)


class GgmlQ4K(GgmlMoe):
    """ggml's CPU backend on Q4_K weights, which ggml's quantiser makes from the dequantised ones; int8 activations."""

    name, quantized = "ggml_q4_k", TYPE_Q4_K

    def pack(self, weight: CanonicalWeight) -> Array:
        return pack_q4_k(self.backend.ggml, weight)

    def kept(self, weight: CanonicalWeight) -> npt.NDArray[np.float64]:
        packed = self.pack(weight)
        values = np.empty((weight.n, weight.k), np.float32)
        to_float: Any = self.backend.ggml.ggml_get_type_traits(TYPE_Q4_K).contents.to_float
        to_float(packed.ctypes.data, values.ctypes.data, values.size)
        return values.T.astype(np.float64)

    def rounding(self, weight: CanonicalWeight) -> float:
        """Half a step of a group, and the error that 6 bits of scale and offset cause.

        A group's 16 values are equally spaced between min(0, its least value) and max(0, its greatest value). A 6-bit
        scale is wrong by at most 1/126 of the largest scale of 256 values, which the 15th step multiplies by 15; a
        6-bit offset is wrong by at most 1/126 of the largest offset.
        """
        groups = reference.dequantize_weight(weight).T.reshape(weight.n, -1, SUPER_BLOCK // BLOCK, BLOCK)
        offset = -np.minimum(groups.min(axis=3), 0)
        step = (np.maximum(groups.max(axis=3), 0) + offset) / 15
        of_six_bits = (15 * step.max(axis=2) + offset.max(axis=2)) / 126
        off = step / 2 + of_six_bits[..., None]
        return float(np.linalg.norm(off) * BLOCK**0.5 / np.linalg.norm(groups))


class GgmlLinear(Projection):
    """One weight. The prepared input is a :class:`Graph`, which also holds the output until it runs again."""

    def __init__(self, backend: Backend, weights: Weights) -> None:
        self.backend, self.weights = backend, weights

    def prepare(self, x: Array) -> Graph:
        ggml, weights = self.backend.ggml, self.weights
        x = np.ascontiguousarray(x, np.float32)
        if x.ndim != 2 or x.shape[1] != weights.k:
            raise ValueError(f"x: got shape {x.shape}, expected [M, {weights.k}]")

        def build(context: int) -> tuple[int, list[tuple[int, Array]]]:
            rows = ggml.ggml_new_tensor_2d(context, TYPE_F32, weights.k, len(x))
            return ggml.ggml_mul_mat(context, weights.tensor, rows), [(rows, x)]

        return Graph(self.backend, [weights], build, 2, (len(x), weights.n))

    def run(self, prepared: Graph) -> Graph:
        return prepared.compute()

    def result(self, out: Graph) -> Array:
        return out.read()


class GgmlRouted(RoutedProduct):
    """One product by expert, with inputs as for :class:`GgmlLinear`."""

    def __init__(self, backend: Backend, weights: Weights, num_experts: int) -> None:
        self.backend, self.weights, self.num_experts = backend, weights, num_experts

    def prepare(self, x: Array, topk_ids: Array) -> Graph:
        ggml, weights = self.backend.ggml, self.weights
        x = np.ascontiguousarray(x, np.float32)
        ids = np.ascontiguousarray(topk_ids, np.int32)
        require_routing(x, ids, None, weights.k, self.num_experts)
        tokens, top_k = ids.shape

        def build(context: int) -> tuple[int, list[tuple[int, Array]]]:
            rows = ggml.ggml_new_tensor_3d(context, TYPE_F32, weights.k, 1, tokens)
            chosen = ggml.ggml_new_tensor_2d(context, TYPE_I32, top_k, tokens)
            return ggml.ggml_mul_mat_id(context, weights.tensor, rows, chosen), [(rows, x), (chosen, ids)]

        return Graph(self.backend, [weights], build, 3, (tokens, top_k, weights.n))

    def run(self, prepared: Graph) -> Graph:
        return prepared.compute()

    def result(self, out: Graph) -> Array:
        return out.read()


class GgmlExperts(Experts):
    """Two products by expert with SwiGLU between them, then the weighted sum; inputs as for :class:`GgmlLinear`."""

    def __init__(self, backend: Backend, gate_up: Weights, down: Weights, num_experts: int) -> None:
        self.backend, self.gate_up, self.down, self.num_experts = backend, gate_up, down, num_experts

    def prepare(self, x: Array, topk_ids: Array, topk_weights: Array) -> Graph:
        ggml, hidden = self.backend.ggml, self.gate_up.k
        x = np.ascontiguousarray(x, np.float32)
        ids = np.ascontiguousarray(topk_ids, np.int32)
        weights = np.ascontiguousarray(topk_weights, np.float32)
        require_routing(x, ids, weights, hidden, self.num_experts)
        tokens, top_k = ids.shape

        def build(context: int) -> tuple[int, list[tuple[int, Array]]]:
            rows = ggml.ggml_new_tensor_3d(context, TYPE_F32, hidden, 1, tokens)
            chosen = ggml.ggml_new_tensor_2d(context, TYPE_I32, top_k, tokens)
            shares = ggml.ggml_new_tensor_3d(context, TYPE_F32, 1, top_k, tokens)
            both = ggml.ggml_mul_mat_id(context, self.gate_up.tensor, rows, chosen)
            between = ggml.ggml_swiglu(context, both)
            outputs = ggml.ggml_mul_mat_id(context, self.down.tensor, between, chosen)
            outputs = ggml.ggml_mul(context, outputs, shares)
            row = 4 * hidden
            parts = [ggml.ggml_view_2d(context, outputs, hidden, tokens, top_k * row, i * row) for i in range(top_k)]
            total = parts[0] if top_k > 1 else ggml.ggml_cont(context, parts[0])
            for part in parts[1:]:
                total = ggml.ggml_add(context, total, part)
            return total, [(rows, x), (chosen, ids), (shares, weights)]

        return Graph(self.backend, [self.gate_up, self.down], build, 7 + 2 * top_k, (tokens, hidden))

    def run(self, prepared: Graph) -> Graph:
        return prepared.compute()

    def result(self, out: Graph) -> Array:
        return out.read()


def pack_q4_0(weight: CanonicalWeight) -> Array:
    """A weight as Q4_0, :data:`BLOCK_DTYPE` ``[N, K / 32]``.

    Raises
    ------
    UnsupportedError
        For a weight that Q4_0 cannot hold exactly.
    """
    require_plain(weight)
    if weight.group_size % BLOCK:
        raise UnsupportedError(f"weight: got group_size {weight.group_size}, expected a multiple of {BLOCK}")
    if (zeros_of(weight) != 8).any():
        raise UnsupportedError("weight: got zero points other than 8, expected a symmetric weight, as Q4_0 has none")
    with np.errstate(over="ignore"):
        scale = weight.scale.astype(np.float16)
    if (scale.astype(np.float32) != weight.scale.astype(np.float32)).any():
        raise UnsupportedError(f"weight: got {weight.scale.dtype} scales, expected values that float16 has")
    blocks = weight.k // BLOCK
    q = unpack_words(weight.words).T.reshape(weight.n, blocks, 2, BLOCK // 2)
    packed = np.empty((weight.n, blocks), BLOCK_DTYPE)
    packed["d"] = np.repeat(scale, weight.group_size // BLOCK, axis=0).T
    packed["qs"] = q[:, :, 0] | q[:, :, 1] << 4
    return packed


def pack_q4_k(ggml: Any, weight: CanonicalWeight) -> Array:
    """A weight as ggml's quantiser rounds it, :data:`SUPER_BLOCK_DTYPE` ``[N, K / 256]``.

    Raises
    ------
    UnsupportedError
        For a weight that cannot be cut into blocks of 256.
    """
    require_plain(weight)
    if weight.k % SUPER_BLOCK:
        raise UnsupportedError(f"weight: got K {weight.k}, expected a multiple of {SUPER_BLOCK}")
    rows_of_n = np.ascontiguousarray(reference.dequantize_weight(weight).T, np.float32)
    packed = np.empty((weight.n, weight.k // SUPER_BLOCK), SUPER_BLOCK_DTYPE)
    size = ggml.ggml_quantize_chunk(TYPE_Q4_K, rows_of_n.ctypes.data, packed.ctypes.data, 0, *rows_of_n.shape, None)
    if size != packed.nbytes:
        raise RuntimeError(f"ggml_quantize_chunk: got {size} bytes, expected {packed.nbytes}")
    return packed
