"""ggml: its products and its products by expert (``mul_mat_id``) on Q4_0 and Q4_K weights, called through ctypes.

Q4_0 is groups of 32 rows of K with a float16 scale and no zero point, ``w = d * (q - 8)``. A symmetric
weight (every zero point 8) whose group is a multiple of 32 and whose scales are float16 is therefore the
same weight in Q4_0, its scales repeated: nothing is requantised. Activations become Q8_0, int8 with a
float16 scale every 32 values.

Q4_K is groups of 32 with a scale and an offset, ``w = d * s * q - dmin * m``, of which ``s`` and ``m`` have
6 bits, and ``d`` and ``dmin`` are float16 every 256. It cannot hold other scales and zero points as they are:
ggml's own quantiser makes it from the weights that they stand for, and what it makes is less accurate. Activations
become Q8_K, int8 with a float32 scale every 256 values.

A block of Q4_0, 18 bytes, is ``d`` and then 16 bytes, of which byte j has ``q[j]`` in its low half and
``q[j + 16]`` in its high half. Source: ggml, ``ggml-common.h`` (``block_q4_0``).
"""

import ctypes
import functools
import importlib.util
import os
import sys
import weakref
from pathlib import Path

import numpy as np

from marlin_cy import reference
from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.int4 import unpack_words

from .interface import Experts, Peer, Projection, RoutedProduct, require_plain

__all__ = ["GgmlMoe", "GgmlQ4K", "pack_q4_0"]

LIBRARY_VARIABLE = "GGML_LIBRARY_DIR"
BLOCK = 32
BLOCK_DTYPE = np.dtype([("d", np.float16), ("qs", np.uint8, BLOCK // 2)])
SUPER_BLOCK = 256
SUPER_BLOCK_DTYPE = np.dtype([("d", np.float16, 2), ("scales", np.uint8, 12), ("qs", np.uint8, SUPER_BLOCK // 2)])
TYPE_F32, TYPE_Q4_0, TYPE_Q4_K, TYPE_I32 = 0, 2, 12, 26  # enum ggml_type
SPARE_BYTES = 4096  # of a context, for the alignment of its objects

POINTER, INT, INT64, SIZE, BOOL = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_bool

LOG_CALLBACK = ctypes.CFUNCTYPE(None, INT, ctypes.c_char_p, POINTER)
LEVEL_WARN, LEVEL_ERROR = 3, 4  # enum ggml_log_level


@LOG_CALLBACK
def log_problems(level, text, _):
    """Without this, ggml writes a line for each weight that it rearranges."""
    if level in (LEVEL_WARN, LEVEL_ERROR):
        print(text.decode(errors="replace"), end="", file=sys.stderr)


class InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = [("mem_size", SIZE), ("mem_buffer", POINTER), ("no_alloc", BOOL)]


TO_FLOAT = ctypes.CFUNCTYPE(None, POINTER, POINTER, INT64)


class TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits``, as far as what makes floats of a type's blocks."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", INT64),
        ("blck_size_interleave", INT64),
        ("type_size", SIZE),
        ("is_quantized", BOOL),
        ("to_float", TO_FLOAT),
    ]


# Name: result, arguments. Source: ggml's headers, version 0.25.
BASE_FUNCTIONS = {
    "ggml_version": (ctypes.c_char_p, []),
    "ggml_log_set": (None, [LOG_CALLBACK, POINTER]),
    "ggml_get_type_traits": (ctypes.POINTER(TypeTraits), [INT]),
    "ggml_quantize_chunk": (SIZE, [INT, POINTER, POINTER, INT64, INT64, INT64, POINTER]),
    "ggml_init": (POINTER, [InitParams]),
    "ggml_free": (None, [POINTER]),
    "ggml_tensor_overhead": (SIZE, []),
    "ggml_graph_overhead": (SIZE, []),
    "ggml_new_tensor_2d": (POINTER, [POINTER, INT, INT64, INT64]),
    "ggml_new_tensor_3d": (POINTER, [POINTER, INT, INT64, INT64, INT64]),
    "ggml_view_2d": (POINTER, [POINTER, POINTER, INT64, INT64, SIZE, SIZE]),
    "ggml_mul_mat": (POINTER, [POINTER, POINTER, POINTER]),
    "ggml_mul_mat_id": (POINTER, [POINTER, POINTER, POINTER, POINTER]),
    "ggml_swiglu": (POINTER, [POINTER, POINTER]),
    "ggml_mul": (POINTER, [POINTER, POINTER, POINTER]),
    "ggml_add": (POINTER, [POINTER, POINTER, POINTER]),
    "ggml_cont": (POINTER, [POINTER, POINTER]),
    "ggml_new_graph": (POINTER, [POINTER]),
    "ggml_build_forward_expand": (None, [POINTER, POINTER]),
    "ggml_backend_alloc_ctx_tensors": (POINTER, [POINTER, POINTER]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (POINTER, [POINTER, POINTER]),
    "ggml_backend_buffer_free": (None, [POINTER]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [POINTER]),
    "ggml_backend_tensor_set": (None, [POINTER, POINTER, SIZE, SIZE]),
    "ggml_backend_tensor_get": (None, [POINTER, POINTER, SIZE, SIZE]),
    "ggml_backend_graph_compute": (INT, [POINTER, POINTER]),
    "ggml_backend_supports_op": (BOOL, [POINTER, POINTER]),
    "ggml_backend_free": (None, [POINTER]),
    "ggml_backend_get_device": (POINTER, [POINTER]),
    "ggml_backend_get_default_buffer_type": (POINTER, [POINTER]),
    "ggml_backend_dev_backend_reg": (POINTER, [POINTER]),
    "ggml_backend_reg_get_proc_address": (POINTER, [POINTER, ctypes.c_char_p]),
}
CPU_FUNCTIONS = {
    "ggml_backend_cpu_init": (POINTER, []),
    "ggml_backend_cpu_set_n_threads": (None, [POINTER, INT]),
}


def library_folder():
    """Where ggml's shared libraries are: what the environment says, else the package llama_cpp's; None without."""
    if os.environ.get(LIBRARY_VARIABLE):
        return Path(os.environ[LIBRARY_VARIABLE])
    package = importlib.util.find_spec("llama_cpp")  # found and not imported: importing it needs libllama
    return None if package is None else Path(package.origin).parent / "lib"


class Functions:
    """ggml's functions, by name, as attributes."""

    def __init__(self, folder):
        for library, functions in (("libggml-base.so", BASE_FUNCTIONS), ("libggml-cpu.so", CPU_FUNCTIONS)):
            loaded = ctypes.CDLL(str(folder / library))
            for name, (result, arguments) in functions.items():
                function = getattr(loaded, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)


def pack_q4_0(weight):
    """A weight as Q4_0, :data:`BLOCK_DTYPE` ``[N, K / 32]``.

    Raises
    ------
    UnsupportedError
        For a weight that Q4_0 cannot hold exactly.
    """
    require_plain(weight)
    if weight.group_size % BLOCK:
        raise UnsupportedError(f"weight: got group_size {weight.group_size}, expected a multiple of {BLOCK}")
    if (weight.zero != 8).any():
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


def pack_q4_k(ggml, weight):
    """What ggml's quantiser makes of a weight, :data:`SUPER_BLOCK_DTYPE` ``[N, K / 256]``.

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


class Context:
    """A ggml context: the descriptions of some tensors, and the buffer that holds their data once allocated."""

    def __init__(self, ggml, tensors):
        self.ggml = ggml
        size = tensors * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead() + SPARE_BYTES
        self.pointer = ggml.ggml_init(InitParams(size, None, True))
        self._owned = weakref.finalize(self, ggml.ggml_free, self.pointer)
        self._buffer = None

    def allocate(self, buffer):
        """Take ``buffer``, which was made for this context's tensors."""
        if not buffer:
            raise MemoryError("ggml cannot allocate a buffer")
        self._buffer = weakref.finalize(self, self.ggml.ggml_backend_buffer_free, buffer)

    def set(self, tensor, values):
        """Copy an array, contiguous, into a tensor."""
        self.ggml.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)


class Weights:
    """Weights in the buffer type that ggml's CPU backend has its fastest kernels for.

    Parameters
    ----------
    backend : Backend
    quantized : int
        The ``enum ggml_type`` of the blocks.
    packed : ndarray
        Blocks, ``[N, K / block]``, or ``[E, N, K / block]`` for experts.
    k : int

    Attributes
    ----------
    tensor : int
        2-D for one weight, 3-D for experts.
    buffer_type : str
        ggml's name of it, "CPU_REPACK" or "AMX" for one that rearranges weights, "CPU" for blocks as they are.
    """

    def __init__(self, backend, quantized, packed, k):
        ggml = backend.ggml
        self.k, self.n = k, packed.shape[-2]
        for buffer_type in backend.buffer_types:
            self.context = Context(ggml, 1)
            new = ggml.ggml_new_tensor_2d if packed.ndim == 2 else ggml.ggml_new_tensor_3d
            self.tensor = new(self.context.pointer, quantized, k, *packed.shape[-2::-1])
            self.context.allocate(ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.context.pointer, buffer_type))
            if self._has_kernels(backend, packed.ndim):
                break
        else:
            raise RuntimeError(f"ggml's CPU backend takes type {quantized} in none of its buffer types")
        self.buffer_type = ggml.ggml_backend_buft_name(buffer_type).decode()
        self.context.set(self.tensor, packed)

    def _has_kernels(self, backend, ndim):
        """Whether the backend multiplies by these weights where they lie; the product is described, not computed."""
        ggml, trial = backend.ggml, Context(backend.ggml, 3)
        if ndim == 2:
            x = ggml.ggml_new_tensor_2d(trial.pointer, TYPE_F32, self.k, 1)
            product = ggml.ggml_mul_mat(trial.pointer, self.tensor, x)
        else:
            x = ggml.ggml_new_tensor_3d(trial.pointer, TYPE_F32, self.k, 1, 1)
            ids = ggml.ggml_new_tensor_2d(trial.pointer, TYPE_I32, 1, 1)
            product = ggml.ggml_mul_mat_id(trial.pointer, self.tensor, x, ids)
        return ggml.ggml_backend_supports_op(backend.pointer, product)


class Graph:
    """A graph with its inputs set and its output allocated.

    Parameters
    ----------
    backend : Backend
    weights : list of Weights
        Kept as long as the graph.
    build : callable
        ``build(context)`` gives the output tensor and a list of ``(input tensor, values)``.
    tensors : int
        At least as many as ``build`` makes.
    shape : tuple
        The output's, in NumPy's order.
    """

    def __init__(self, backend, weights, build, tensors, shape):
        self.backend, self.weights, self.shape = backend, weights, shape
        ggml = backend.ggml
        self.context = Context(ggml, tensors)
        self.output, inputs = build(self.context.pointer)
        self.graph = ggml.ggml_new_graph(self.context.pointer)
        ggml.ggml_build_forward_expand(self.graph, self.output)
        self.context.allocate(ggml.ggml_backend_alloc_ctx_tensors(self.context.pointer, backend.pointer))
        for tensor, values in inputs:
            self.context.set(tensor, values)

    def compute(self):
        """The same graph, its output computed."""
        status = self.backend.ggml.ggml_backend_graph_compute(self.backend.pointer, self.graph)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute: got status {status}, expected 0")
        return self

    def read(self):
        """The output, float32."""
        values = np.empty(self.shape, np.float32)
        self.backend.ggml.ggml_backend_tensor_get(self.output, values.ctypes.data, 0, values.nbytes)
        return values


class GgmlLinear(Projection):
    """One weight; a prepared input is a :class:`Graph`, and so is its output, until it runs again."""

    def __init__(self, backend, weights):
        self.backend, self.weights = backend, weights

    def prepare(self, x):
        ggml, weights = self.backend.ggml, self.weights
        x = np.ascontiguousarray(x, np.float32)
        if x.ndim != 2 or x.shape[1] != weights.k:
            raise ValueError(f"x: got shape {x.shape}, expected [M, {weights.k}]")

        def build(context):
            rows = ggml.ggml_new_tensor_2d(context, TYPE_F32, weights.k, len(x))
            return ggml.ggml_mul_mat(context, weights.tensor, rows), [(rows, x)]

        return Graph(self.backend, [weights], build, 2, (len(x), weights.n))

    def run(self, prepared):
        return prepared.compute()

    def result(self, out):
        return out.read()


class GgmlRouted(RoutedProduct):
    """One product by expert; inputs are as :class:`GgmlLinear`'s."""

    def __init__(self, backend, weights, num_experts):
        self.backend, self.weights, self.num_experts = backend, weights, num_experts

    def prepare(self, x, topk_ids):
        ggml, weights = self.backend.ggml, self.weights
        x = np.ascontiguousarray(x, np.float32)
        ids = np.ascontiguousarray(topk_ids, np.int32)
        require_routing(x, ids, weights.k, self.num_experts)
        tokens, top_k = ids.shape

        def build(context):
            rows = ggml.ggml_new_tensor_3d(context, TYPE_F32, weights.k, 1, tokens)
            chosen = ggml.ggml_new_tensor_2d(context, TYPE_I32, top_k, tokens)
            return ggml.ggml_mul_mat_id(context, weights.tensor, rows, chosen), [(rows, x), (chosen, ids)]

        return Graph(self.backend, [weights], build, 3, (tokens, top_k, weights.n))

    def run(self, prepared):
        return prepared.compute()

    def result(self, out):
        return out.read()


def require_routing(x, ids, k, num_experts):
    """Raise ValueError or IndexError unless rows and their experts fit each other and the weights."""
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x: got shape {x.shape}, expected [T, {k}]")
    if ids.ndim != 2 or len(ids) != len(x):
        raise ValueError(f"topk_ids: got shape {ids.shape}, expected [{len(x)}, top_k]")
    if ids.size and not 0 <= ids.min() <= ids.max() < num_experts:
        raise IndexError(f"topk_ids: got {ids.min()} to {ids.max()}, expected 0 to {num_experts - 1}")


class GgmlExperts(Experts):
    """Two products by expert with SwiGLU between them, then the weighted sum; inputs are as :class:`GgmlLinear`'s."""

    def __init__(self, backend, gate_up, down, num_experts):
        self.backend, self.gate_up, self.down, self.num_experts = backend, gate_up, down, num_experts
        if self.gate_up.n != 2 * self.down.k or self.gate_up.k != self.down.n:
            raise ValueError(
                f"down: got K {self.down.k}, N {self.down.n}, expected {self.gate_up.n // 2}, {self.gate_up.k}"
            )

    def prepare(self, x, topk_ids, topk_weights):
        ggml, hidden = self.backend.ggml, self.gate_up.k
        x = np.ascontiguousarray(x, np.float32)
        ids = np.ascontiguousarray(topk_ids, np.int32)
        weights = np.ascontiguousarray(topk_weights, np.float32)
        require_routing(x, ids, hidden, self.num_experts)
        if ids.shape != weights.shape:
            raise ValueError(f"topk_weights: got shape {weights.shape}, expected {ids.shape}, as topk_ids has")
        tokens, top_k = ids.shape

        def build(context):
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

    def run(self, prepared):
        return prepared.compute()

    def result(self, out):
        return out.read()


class Backend:
    """ggml's CPU backend with a number of threads.

    Attributes
    ----------
    ggml : Functions
    pointer : int
    buffer_types : list of int
        Those that rearrange weights, in ggml's own order of preference, then the plain one.
    """

    def __init__(self, folder, num_threads):
        self.ggml = ggml = Functions(folder)
        ggml.ggml_log_set(log_problems, None)
        self.pointer = ggml.ggml_backend_cpu_init()
        self._owned = weakref.finalize(self, ggml.ggml_backend_free, self.pointer)
        ggml.ggml_backend_cpu_set_n_threads(self.pointer, num_threads)
        self.buffer_types = [*self._extra_buffer_types(), ggml.ggml_backend_get_default_buffer_type(self.pointer)]

    def _extra_buffer_types(self):
        device = self.ggml.ggml_backend_get_device(self.pointer)
        registry = self.ggml.ggml_backend_dev_backend_reg(device)
        address = self.ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return
        ends_with_null = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(address)(device)
        for buffer_type in ends_with_null:
            if buffer_type is None:
                return
            yield buffer_type


class GgmlMoe(Peer):
    """ggml's CPU backend on Q4_0 weights, int8 activations."""

    name, accuracy, distribution = "ggml_q4_0", "int8", "llama_cpp_python"
    quantized = TYPE_Q4_0

    @functools.cached_property
    def backend(self):
        """The :class:`Backend`, made when first asked for."""
        return Backend(library_folder(), self.num_threads)

    @property
    def version(self):
        """ggml's own, as llama_cpp_python need not be installed; None without ggml."""
        return None if self.available() else Functions(library_folder()).ggml_version().decode()

    def available(self):
        folder = library_folder()
        if folder is None:
            return f"no ggml: pip install llama-cpp-python, or set {LIBRARY_VARIABLE} to a folder with libggml-base.so"
        try:
            Functions(folder)
        except (OSError, AttributeError) as error:
            return f"no usable ggml in {folder}: {error}"
        return None

    def pack(self, weight):
        """A weight's blocks, ``[N, K / block]``."""
        return pack_q4_0(weight)

    def load(self, weight):
        return GgmlLinear(self.backend, Weights(self.backend, self.quantized, self.pack(weight), weight.k))

    def available_routed(self):
        return self.available()

    def load_routed(self, weights):
        return GgmlRouted(self.backend, self._experts(weights), len(weights))

    def available_moe(self):
        return self.available()

    def load_moe(self, gate_up, down):
        if len(gate_up) != len(down):
            raise ValueError(f"down: got {len(down)} experts, expected {len(gate_up)}, as gate_up has")
        return GgmlExperts(self.backend, self._experts(gate_up), self._experts(down), len(gate_up))

    def _experts(self, weights):
        """One tensor of all; a weight that several experts share is packed once."""
        packed = {}
        for weight in weights:
            if id(weight) not in packed:
                packed[id(weight)] = self.pack(weight)
        blocks = np.stack([packed[id(weight)] for weight in weights])
        return Weights(self.backend, self.quantized, blocks, weights[0].k)


class GgmlQ4K(GgmlMoe):
    """ggml's CPU backend on Q4_K weights of its own rounding, int8 activations."""

    name, quantized = "ggml_q4_k", TYPE_Q4_K

    def pack(self, weight):
        return pack_q4_k(self.backend.ggml, weight)

    def kept(self, weight):
        packed = self.pack(weight)
        values = np.empty((weight.n, weight.k), np.float32)
        to_float = self.backend.ggml.ggml_get_type_traits(TYPE_Q4_K).contents.to_float
        to_float(packed.ctypes.data, values.ctypes.data, values.size)
        return values.T.astype(np.float64)

    def rounding(self, weight):
        """A group has 16 equal steps from 0 or its least value to 0 or its greatest, and a weight is half one off.

        With 6 bits, a scale is off by 1/126 of the greatest of 256 values at most, which the 15th step has 15
        times, and an offset by 1/126 of the greatest offset.
        """
        groups = reference.dequantize_weight(weight).T.reshape(weight.n, -1, SUPER_BLOCK // BLOCK, BLOCK)
        offset = -np.minimum(groups.min(axis=3), 0)
        step = (np.maximum(groups.max(axis=3), 0) + offset) / 15
        of_six_bits = (15 * step.max(axis=2) + offset.max(axis=2)) / 126
        off = step / 2 + of_six_bits[..., None]
        return float(np.linalg.norm(off) * BLOCK**0.5 / np.linalg.norm(groups))
