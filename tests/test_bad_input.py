"""Every mistake a caller can make: what is raised, what it says, and that nothing else has happened.

The tables below have a line for each, for the CPU and for each OpenCL device. After every one of them the output
and what surrounds it are as they were, the input too, and the same context gives the right result for a right
call. What only a device can get wrong is in ``test_opencl_faults.py``.
"""

import array
import itertools

import ml_dtypes
import numpy as np
import pytest
from asserts import GuardedArray, assert_same_bits
from conftest import DEVICE_LABELS, backend_called
from problems import activations, random_problem

import marlin_cy
from marlin_cy.errors import UnsupportedError

K, N, E, ROWS = 64, 16, 3, 6
INT32, INT64 = np.iinfo(np.int32), np.iinfo(np.int64)
EXTREMES = [0, 1, 2, ROWS, ROWS + 1, -1, INT32.max, INT32.max + 1, INT32.min, INT64.max, INT64.min, 2**64, -(2**70)]
EXPECTED = "expected a (numpy.ndarray|pyopencl.array.Array)"
CALLERS_MISTAKES = (TypeError, ValueError, IndexError, UnsupportedError)


class Memory:
    """Arrays where a backend has them: on a device, copied as they lie, with what surrounds them.

    Arrays that share memory on the host share it there, too.
    """

    def __init__(self, backend):
        self._backend, self._copies = backend, {}

    def buffer(self, array):
        """The array itself, or a device array of the same shape, strides and place in its memory."""
        if self._backend.name == "cpu":
            return array
        from pyopencl.array import Array

        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        if id(root) not in self._copies:
            self._copies[id(root)] = root, self._backend.from_host(raw_bytes(root))
        copy = self._copies[id(root)][1]
        offset = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
        return Array(copy.queue, array.shape, array.dtype, data=copy.base_data, offset=offset, strides=array.strides)

    def fetch(self, ctx):
        """Let the arrays on the host hold what those on the device hold."""
        if self._copies:
            ctx.finish()
        for root, copy in self._copies.values():
            raw_bytes(root)[:] = self._backend.to_host(copy)


def raw_bytes(array):
    """The bytes of an array that lies in one piece, whatever the order of its axes."""
    return array.ravel(order="K").view(np.uint8)


def new_context(backend):
    """A context, on the CPU of one thread."""
    return backend.new_context(num_threads=1) if backend.name == "cpu" else backend.new_context()


class Call:
    """A right call of one method, as keyword arguments that a test may change, and its guarded output.

    Arguments are NumPy arrays; those of ``buffers`` (``inputs``, ``output``, ``others``) are given to the
    backend where it wants them, but for objects of a subclass of ``ndarray``.
    """

    others = ()

    def __init__(self, backend, rng):
        self.backend, self.ctx = backend, new_context(backend)
        self.buffers = {*self.inputs, self.output, *self.others}
        self.args = self.make(backend, rng)
        self.args["ctx"] = self.ctx
        self.expected = self.right().copy()
        self.args[self.output] = self.guarded()

    def guarded(self):
        self.guard = GuardedArray((ROWS, self.width), np.float32)
        return self.guard.array

    def right(self):
        out = GuardedArray((ROWS, self.width), np.float32)
        self.make_call({**self.args, self.output: out.array})
        out.assert_guards()
        return out.array

    def make_call(self, args):
        """Call, with arrays placed where the backend wants them, and what it left there brought back."""
        memory = Memory(self.backend)
        try:
            self.call(
                **{
                    name: memory.buffer(value) if name in self.buffers and type(value) is np.ndarray else value
                    for name, value in args.items()
                }
            )
        finally:
            memory.fetch(self.ctx)

    def refused(self, changes, exception, message):
        """Make the call with some arguments changed, and check all that is promised."""
        right = dict(self.args)
        copies = {name: value.copy() for name, value in right.items() if isinstance(value, np.ndarray)}
        wrong = changes(right) if callable(changes) else changes
        with pytest.raises(exception, match=message):
            self.make_call({**right, **wrong})
        self.guard.assert_untouched()
        for name, copy in copies.items():
            assert_same_bits(right[name], copy)
        assert_same_bits(self.right(), self.expected)


class Batched(Call):
    inputs, output, width = ["input"], "output", N

    def make(self, backend, rng):
        self.call = random_problem(rng, E, K, N, 32).stack(backend).gemm_phase_batched
        dispatches = [(2, 0, 3, 3), (0, 3, 0, 3)]
        return {"input": activations(rng, ROWS, K), "dispatches": dispatches, "output": self.guarded(), "k": K}


class Vllm(Call):
    inputs, output, width = ["input"], "output", N
    others = "sorted_token_ids", "expert_ids"

    def make(self, backend, rng):
        self.call = random_problem(rng, E, K, N, 32).stack(backend).gemm_phase_vllm
        ids = np.array([[0, 1], [2, 0], [2, 1]])
        sorted_ids, expert_ids, past = marlin_cy.moe_align_block_size(ids, 4, E)
        return {
            "input": activations(rng, ROWS, K),
            "sorted_token_ids": sorted_ids,
            "expert_ids": expert_ids,
            "num_tokens_past_padded": past,
            "output": self.guarded(),
            "prob_m": 3,
            "moe_block_size": 4,
            "top_k": 2,
        }


class View(Call):
    inputs, output, width = ["input"], "out", N

    def make(self, backend, rng):
        self.call = random_problem(rng, E, K, N, 32).stack(backend).make_expert_linear(N, N).forward
        return {"input": activations(rng, ROWS, K), "out": self.guarded(), "m": ROWS}


class Layer(Call):
    inputs, output, width = ["hidden_states", "router_logits"], "out", K

    def make(self, backend, rng):
        gate_up, down = random_problem(rng, E, K, 64, 32), random_problem(rng, E, 32, K, 32)
        self.call = marlin_cy.MoeLayer(gate_up.stack(backend), down.stack(backend), top_k=2)
        logits = rng.standard_normal((ROWS, E)).astype(np.float32)
        return {"hidden_states": activations(rng, ROWS, K), "router_logits": logits, "out": self.guarded()}


class RoutedBlocks(Layer):
    inputs = ["hidden_states"]

    def make(self, backend, rng):
        args = super().make(backend, rng)
        self.call = self.call.forward_routed
        del args["router_logits"]
        ids, weights = rng.integers(-1, E, (ROWS, 2)).astype(np.int32), np.ones((ROWS, 2), np.float32)
        return {**args, "topk_ids": ids, "topk_weights": weights}


class Weighed(RoutedBlocks):
    """With the router's weights on the input, a bias everywhere and a shared expert."""

    def make(self, backend, rng):
        def pair(experts, inner):
            gate_up = random_problem(rng, experts, K, 2 * inner, 32, bias=True).stack(backend)
            return gate_up, random_problem(rng, experts, inner, K, 32, bias=True).stack(backend)

        args = super().make(backend, rng)
        shared = marlin_cy.SharedExpert(*pair(1, 64), rng.standard_normal(K))
        self.call = marlin_cy.MoeLayer(
            *pair(E, 32), top_k=1, shared_expert=shared, apply_router_weight_on_input=True
        ).forward_routed
        return {**args, "topk_ids": args["topk_ids"][:, :1].copy(), "topk_weights": np.ones((ROWS, 1), np.float32)}


CALLS = {"batched": Batched, "vllm": Vllm, "view": View, "layer": Layer, "routed": RoutedBlocks, "weighed": Weighed}


def table(lines):
    """Parameters of a test of ``(call, id, *values)``: each line on each backend, or where the id says so.

    Parameters
    ----------
    lines : iterable of (str, str, tuple)
        A name in CALLS, an id, and what else the test takes. An id that begins with "host" is of what
        only an array on the host can be.
    """
    return [
        pytest.param((label, call), *values, id=f"{label}-{call}-{name}")
        for call, name, values in lines
        for label in DEVICE_LABELS
        if label == "cpu" or not name.startswith("host")
    ]


every_call = pytest.mark.parametrize("call", table((call, "call", ()) for call in CALLS), indirect=True)


def only(*names):
    """One of some calls, on each backend."""
    return pytest.mark.parametrize("call", table((call, "call", ()) for call in names), indirect=True)


@pytest.fixture
def call(request, rng):
    label, name = request.param
    return CALLS[name](backend_called(label), rng)


def unaligned(x):
    return np.frombuffer(bytearray(b"\0" + x.tobytes()), np.uint8)[1:].view(x.dtype).reshape(x.shape)


def read_only(x):
    x = x.view()
    x.flags.writeable = False
    return x


class Convertible:
    """Something that NumPy could make an array of."""

    def __array__(self, dtype=None, copy=None):
        return np.zeros((ROWS, K), np.float32)


BUFFERS = [
    (lambda x: x.astype(np.float64), TypeError, "got dtype float64, expected float32, float16 or bfloat16"),
    (lambda x: x.astype(np.int32), TypeError, "got dtype int32"),
    (lambda x: x.astype(np.uint16), TypeError, "got dtype uint16"),
    (lambda x: x.astype(bool), TypeError, "got dtype bool"),
    (lambda x: x.astype(np.complex64), TypeError, "got dtype complex64"),
    (lambda x: x.astype(np.longdouble), TypeError, "got dtype"),
    (lambda x: x.astype(ml_dtypes.float8_e4m3fn), TypeError, "got dtype float8_e4m3fn"),
    (lambda x: x.view([("f", np.float32)]), TypeError, r"got dtype \[\('f', '<f4'\)\]"),
    (lambda x: np.zeros(x.shape, "U4"), TypeError, "got dtype <U4"),
    (lambda x: np.zeros(x.shape, "M8[s]"), TypeError, "got dtype datetime64"),
    (lambda x: x.astype(">f4"), TypeError, "got dtype '>f4', which is not in this machine's byte order"),
    (lambda x: x.astype(">f2"), TypeError, "got dtype '>f2', which is not in this machine's byte order"),
    (lambda x: np.asfortranarray(x), ValueError, "got strides .*, expected C-contiguous rows"),
    (lambda x: x.repeat(2, axis=1)[:, ::2], ValueError, "got strides .*, expected C-contiguous"),
    (lambda x: x.repeat(2, axis=0)[::2], ValueError, "got strides .*, expected C-contiguous"),
    (lambda x: x[::-1], ValueError, "got strides .*, expected C-contiguous"),
    (lambda x: x[:, ::-1], ValueError, "got strides .*, expected C-contiguous"),
    (lambda x: np.broadcast_to(x[0], x.shape), ValueError, r"got strides \(0, 4\)"),
    (lambda x: np.broadcast_to(np.float32(0), x.shape), ValueError, r"got strides \(0, 0\)"),
    (lambda x: np.broadcast_to(np.float32(0), (1 << 40) * x.shape[1]), ValueError, r"got strides \(0,\)"),
    (unaligned, ValueError, "got data that is not aligned to its dtype float32"),
    (lambda x: x[None], ValueError, r"got shape \(1, 6, \d+\), expected \[rows, \d+\]"),
    (lambda x: x[0, 0], TypeError, "got float32, " + EXPECTED),
    (lambda x: np.array(1, np.float32), ValueError, r"got shape \(\), expected \[rows, \d+\]"),
    (lambda x: x.reshape(-1)[:-1].copy(), ValueError, r"got \d+ elements, expected a multiple of \d+, the row length"),
    (lambda x: np.zeros((ROWS, x.shape[1] + 1), x.dtype), ValueError, r"got shape \(6, \d+\), expected \[rows, \d+\]"),
    (lambda x: np.zeros((ROWS, 0), x.dtype), ValueError, r"got shape \(6, 0\)"),
    (lambda x: np.zeros((0, 0), x.dtype), ValueError, r"got shape \(0, 0\)"),
    (lambda x: np.zeros((0, x.shape[1]), x.dtype), (ValueError, IndexError), "rows"),
    (lambda x: np.zeros(0, x.dtype), (ValueError, IndexError), "rows"),
    (lambda x: x[:1].copy(), (ValueError, IndexError), "rows"),
    (lambda x: x.tolist(), TypeError, "got list, " + EXPECTED),
    (lambda x: x.tobytes(), TypeError, "got bytes"),
    (lambda x: memoryview(x), TypeError, "got memoryview"),
    (lambda x: array.array("f", x.reshape(-1).tolist()), TypeError, "got array"),
    (lambda x: Convertible(), TypeError, "got Convertible"),
    (lambda x: np.ndarray, TypeError, "got type"),
]
ON_HOST = [(lambda x: x.astype(object), TypeError, "got dtype object")]
OUTPUTS_ON_HOST = [(read_only, ValueError, "got a read-only array, expected a writeable one")]


def buffer_cases():
    for call, kind in CALLS.items():
        for name in [*kind.inputs, kind.output]:
            for number, case in enumerate(BUFFERS):
                yield call, f"{name}-{number}", (name, *case)
            for number, case in enumerate(ON_HOST + OUTPUTS_ON_HOST * (name == kind.output)):
                yield call, f"host-{name}-{number}", (name, *case)


@pytest.mark.sampled(44)
@pytest.mark.parametrize(("call", "name", "wrong", "exception", "message"), table(buffer_cases()), indirect=["call"])
def test_buffers(call, name, wrong, exception, message):
    # A missing row may be missed by the argument that counts them.
    prefix = "" if message == "rows" else f"^{name}: "
    call.refused(lambda args: {name: wrong(args[name])}, exception, prefix + message)


@only("batched", "vllm", "view")
@pytest.mark.parametrize("name", ["input", "output"])
def test_no_buffer(call, name):
    name = call.output if name == "output" else name
    call.refused({name: None}, TypeError, f"^{name}: got NoneType, " + EXPECTED)


def overlapping(rows, shared):
    """An input and an output that share ``shared`` elements, the output behind or before."""
    memory = np.arange(4 * ROWS * K, dtype=np.float32)
    inp = memory[ROWS * K : 2 * ROWS * K].reshape(ROWS, K)
    return lambda width: (
        (inp, memory[2 * ROWS * K - shared :][: rows * width].reshape(rows, width)),
        (inp, memory[ROWS * K + shared - rows * width : ROWS * K + shared].reshape(rows, width)),
    )


@every_call
@pytest.mark.parametrize("shared", [1, 5, ROWS * N])
def test_output_overlapping_input(call, shared):
    for inp, out in overlapping(ROWS, shared)(call.width):
        before = out.copy(), inp.copy()
        changes = {call.inputs[0]: inp, call.output: out}
        call.refused(changes, ValueError, f"^{call.output}: shares memory with the input, expected separate arrays")
        assert_same_bits(out, before[0])
        assert_same_bits(inp, before[1])


@every_call
def test_output_beside_input(call):
    """The last element of one next to the first of the other is no overlap."""
    for inp, out in overlapping(ROWS, 0)(call.width):
        inp[:] = call.args[call.inputs[0]]
        call.make_call({**call.args, call.inputs[0]: inp, call.output: out})
        assert_same_bits(out[:1], call.expected[:1])


@only("layer")
def test_output_overlapping_logits(call):
    memory = np.zeros(ROWS * K, np.float32)
    logits, out = memory[: ROWS * E].reshape(ROWS, E), memory.reshape(ROWS, K)
    call.refused({"router_logits": logits, "out": out}, ValueError, "^out: shares memory with the")


@every_call
@pytest.mark.parametrize("ctx", [None, 1, "ctx", object(), marlin_cy.get_backend("cpu"), Batched])
def test_no_context(call, ctx):
    call.refused({"ctx": ctx}, TypeError, r"^ctx: got \w+, expected an? (Cpu|OpenCl)?Context")


def in_column_order(dispatches):
    return np.asfortranarray(np.array(dispatches, np.int64))


def far(rows):
    """Of rows from there on: whatever is added must not wrap around."""
    return [(0, 0, 0, 1), rows]


OF_BATCHED = [
    ({"k": K - 32}, ValueError, f"k: got 32, expected {K}, the stack's"),
    ({"k": 2**70}, ValueError, "k: got a number of 71 bits"),
    ({"k": float(K)}, TypeError, "k: got 64.0, expected an int"),
    ({"k": None}, TypeError, "k: got None, expected an int"),
    ({"k": True}, TypeError, "k: got True, expected an int"),
    ({"k": np.array([K, K])}, TypeError, r"k: got array\(\[64, 64\]\), expected an int"),
    ({"dispatches": None}, TypeError, "dispatches: got NoneType, expected a sequence of 4-tuples"),
    ({"dispatches": 7}, TypeError, "dispatches: got int"),
    ({"dispatches": "abcd"}, TypeError, r"dispatches\[0\]: got 'a', expected an int"),
    ({"dispatches": [3]}, TypeError, r"dispatches\[0\]: got 3, expected \(expert_idx"),
    ({"dispatches": [None]}, TypeError, r"dispatches\[0\]: got None"),
    ({"dispatches": [(0, 0, 0)]}, ValueError, r"dispatches\[0\]: got 3 numbers, expected \(expert_idx"),
    ({"dispatches": [(0, 0, 0, 1), (0, 0, 0, 1, 1)]}, ValueError, r"dispatches\[1\]: got 5 numbers"),
    ({"dispatches": [()]}, ValueError, r"dispatches\[0\]: got 0 numbers"),
    ({"dispatches": [(0, 0, 0, 1.0)]}, TypeError, r"dispatches\[0\]: got 1.0, expected an int"),
    ({"dispatches": [(0, 0, 0, np.float32(1))]}, TypeError, r"dispatches\[0\]: got .*1.0.*, expected an int"),
    ({"dispatches": [(0, 0, 0, "1")]}, TypeError, r"dispatches\[0\]: got '1', expected an int"),
    ({"dispatches": [(0, 0, 0, None)]}, TypeError, r"dispatches\[0\]: got None, expected an int"),
    ({"dispatches": [(0, 0, 0, True)]}, TypeError, r"dispatches\[0\]: got True, expected an int"),
    ({"dispatches": [(2**70, 0, 0, 1)]}, ValueError, r"dispatches\[0\]: got a number of 71 bits"),
    ({"dispatches": [(0, 0, 0, -(2**64))]}, ValueError, r"dispatches\[0\]: got a number of 65 bits"),
    ({"dispatches": np.zeros((1, 4))}, TypeError, "dispatches: got dtype float64, expected int64"),
    ({"dispatches": np.zeros((1, 4), np.uint64)}, TypeError, "dispatches: got dtype uint64, expected int64"),
    ({"dispatches": np.zeros((1, 4), bool)}, TypeError, "dispatches: got dtype bool"),
    ({"dispatches": np.zeros((1, 4), object)}, TypeError, "dispatches: got dtype object"),
    ({"dispatches": np.zeros(4, np.int64)}, ValueError, r"dispatches: got shape \(4,\), expected \[D, 4\]"),
    ({"dispatches": np.zeros((1, 3), np.int64)}, ValueError, r"dispatches: got shape \(1, 3\)"),
    ({"dispatches": np.zeros((0, 0), np.int64)}, ValueError, r"dispatches: got shape \(0, 0\)"),
    ({"dispatches": np.zeros((1, 1, 4), np.int64)}, ValueError, r"dispatches: got shape \(1, 1, 4\)"),
    ({"dispatches": np.array(0)}, ValueError, r"dispatches: got shape \(\)"),
    ({"dispatches": [(E, 0, 0, 1)]}, IndexError, r"dispatches\[0\]: got expert_idx 3, expected 0 to 2"),
    ({"dispatches": [(-1, 0, 0, 1)]}, IndexError, r"dispatches\[0\]: got expert_idx -1, expected 0 to 2"),
    ({"dispatches": [(0, 0, 0, 1), (INT64.max, 0, 1, 1)]}, IndexError, r"dispatches\[1\]: got expert_idx 9223372036"),
    ({"dispatches": [(E, 0, 0, 0)]}, IndexError, "got expert_idx 3"),  # even where there is nothing to do
    ({"dispatches": [(0, 0, 0, -1)]}, ValueError, r"dispatches\[0\]: got m -1, expected 0 or more"),
    ({"dispatches": [(0, 0, 0, INT64.min)]}, ValueError, "got m -9223372036854775808"),
    ({"dispatches": [(0, 0, 0, ROWS + 1)]}, IndexError, "got 7 input rows from 0 on, expected .* input's 6"),
    ({"dispatches": [(0, 1, 0, ROWS)]}, IndexError, "got 6 input rows from 1 on"),
    ({"dispatches": [(0, -1, 0, 1)]}, IndexError, "got 1 input rows from -1 on"),
    ({"dispatches": [(0, ROWS + 1, 0, 0)]}, IndexError, "got 0 input rows from 7 on"),
    ({"dispatches": [(0, 0, 1, ROWS)]}, IndexError, "got 6 output rows from 1 on, expected .* output's 6"),
    ({"dispatches": [(0, 0, -1, 1)]}, IndexError, "got 1 output rows from -1 on"),
    (
        {"dispatches": far((0, INT64.max, 1, 1))},
        IndexError,
        r"dispatches\[1\]: got 1 input rows from 92233720368547758",
    ),
    (
        {"dispatches": far((0, 1, INT64.max, 1))},
        IndexError,
        r"dispatches\[1\]: got 1 output rows from 92233720368547758",
    ),
    ({"dispatches": far((0, 1, 1, INT64.max))}, IndexError, r"dispatches\[1\]: got 9223372036854775807 input rows"),
    (
        {"dispatches": far((0, INT64.min, 1, 1))},
        IndexError,
        r"dispatches\[1\]: got 1 input rows from -92233720368547758",
    ),
    ({"dispatches": far((0, 2**62, 1, 2**62))}, IndexError, r"dispatches\[1\]: got 4611686018427387904 input rows"),
    (
        {"dispatches": far((0, INT64.max, INT64.max, INT64.max))},
        IndexError,
        r"dispatches\[1\]: got 9223372036854775807",
    ),
    ({"dispatches": [(0, 0, 0, 2), (1, 0, 1, 2)]}, ValueError, "overlapping output rows 0 to 2 and 1 to 3"),
    ({"dispatches": [(1, 0, 3, 1), (0, 0, 0, 6)]}, ValueError, "overlapping output rows 0 to 6 and 3 to 4"),
    ({"dispatches": in_column_order([(0, 0, 0, 1), (0, 1, 0, 1)])}, ValueError, "overlapping output rows 0 to 1 and 0"),
    ({"dispatches": [(0, 0, 0, 1)] * 1000}, ValueError, "overlapping output rows"),
]

TOO_LONG = "num_tokens_past_padded: got .*, expected a multiple of moe_block_size .*, within the"
OF_VLLM = [
    ({"num_tokens_past_padded": np.array([3], np.int32)}, ValueError, TOO_LONG),  # not a multiple of 4
    ({"num_tokens_past_padded": np.array([-4], np.int32)}, ValueError, TOO_LONG),
    ({"num_tokens_past_padded": np.array([400], np.int32)}, ValueError, TOO_LONG),
    ({"num_tokens_past_padded": 400}, ValueError, TOO_LONG + " 15 sorted_token_ids and the 4 blocks of expert_ids"),
    ({"num_tokens_past_padded": 16}, ValueError, TOO_LONG),
    ({"num_tokens_past_padded": INT64.min}, ValueError, TOO_LONG),
    ({"num_tokens_past_padded": 2**70}, ValueError, "num_tokens_past_padded: got a number of 71 bits"),
    (
        {"num_tokens_past_padded": np.array([2**64 - 4], np.uint64)},
        ValueError,
        "num_tokens_past_padded: got a number of",
    ),
    ({"num_tokens_past_padded": 4.0}, TypeError, "num_tokens_past_padded: got 4.0, expected an int"),
    ({"num_tokens_past_padded": np.array([4.0])}, TypeError, "num_tokens_past_padded: got 4.0, expected an int"),
    ({"num_tokens_past_padded": np.array([True])}, TypeError, "num_tokens_past_padded: got True, expected an int"),
    ({"num_tokens_past_padded": np.array([None])}, TypeError, "num_tokens_past_padded: got None, expected an int"),
    ({"num_tokens_past_padded": [4]}, TypeError, r"num_tokens_past_padded: got \[4\], expected an int"),
    ({"num_tokens_past_padded": None}, TypeError, "num_tokens_past_padded: got None"),
    ({"num_tokens_past_padded": np.zeros(0, np.int32)}, ValueError, r"num_tokens_past_padded: got shape \(0,\)"),
    ({"num_tokens_past_padded": np.zeros(2, np.int32)}, ValueError, r"num_tokens_past_padded: got shape \(2,\)"),
    ({"expert_ids": np.zeros(2, np.int32)}, ValueError, TOO_LONG),
    ({"expert_ids": np.zeros(0, np.int32)}, ValueError, TOO_LONG),
    ({"sorted_token_ids": np.zeros(11, np.int32)}, ValueError, TOO_LONG),
    ({"sorted_token_ids": np.zeros(0, np.int32)}, ValueError, TOO_LONG),
    ({"expert_ids": np.full(3, INT32.min)}, TypeError, "expert_ids: got dtype int64, expected int32"),
    ({"expert_ids": np.zeros(3)}, TypeError, "expert_ids: got dtype float64, expected int32"),
    ({"expert_ids": np.zeros(3, np.uint32)}, TypeError, "expert_ids: got dtype uint32, expected int32"),
    ({"expert_ids": np.zeros(3, ">i4")}, TypeError, "expert_ids: got dtype '>i4', which is not in this machine's"),
    ({"expert_ids": np.zeros((3, 1), np.int32)}, ValueError, r"expert_ids: got shape \(3, 1\)"),
    ({"expert_ids": np.zeros(6, np.int32)[::2]}, ValueError, r"expert_ids: got shape \(3,\) with strides \(8,\)"),
    ({"expert_ids": unaligned(np.zeros(3, np.int32))}, ValueError, "expert_ids: got (shape|data that is not aligned)"),
    ({"expert_ids": [0, 1, 2]}, TypeError, "expert_ids: got list, " + EXPECTED),
    ({"expert_ids": None}, TypeError, "expert_ids: got NoneType"),
    ({"sorted_token_ids": np.full(12, INT32.min)}, TypeError, "sorted_token_ids: got dtype int64, expected int32"),
    ({"sorted_token_ids": np.zeros(12, np.float32)}, TypeError, "sorted_token_ids: got dtype float32"),
    ({"sorted_token_ids": np.zeros(12, ">i4")}, TypeError, "sorted_token_ids: got dtype '>i4'"),
    ({"sorted_token_ids": np.zeros((3, 4), np.int32)}, ValueError, r"sorted_token_ids: got shape \(3, 4\)"),
    ({"sorted_token_ids": np.zeros(24, np.int32)[::-2]}, ValueError, "sorted_token_ids: got shape"),
    ({"sorted_token_ids": list(range(12))}, TypeError, "sorted_token_ids: got list"),
    ({"moe_block_size": 0}, ValueError, "moe_block_size: got 0, expected at least 1"),
    ({"moe_block_size": -4}, ValueError, "moe_block_size: got -4"),
    ({"moe_block_size": 5}, ValueError, TOO_LONG),
    ({"moe_block_size": 2}, ValueError, TOO_LONG),  # too few expert_ids for so many blocks
    ({"moe_block_size": INT64.max}, ValueError, TOO_LONG),
    ({"moe_block_size": 2**70}, ValueError, "moe_block_size: got a number of 71 bits"),
    ({"moe_block_size": 4.0}, TypeError, "moe_block_size: got 4.0, expected an int"),
    ({"moe_block_size": None}, TypeError, "moe_block_size: got None"),
    ({"top_k": 0}, ValueError, "top_k: got 0, expected at least 1"),
    ({"top_k": -2}, ValueError, "top_k: got -2"),
    ({"top_k": 3}, ValueError, r"prob_m \* top_k: got 3 \* 3, expected at most 6, the rows of output"),
    ({"top_k": INT64.max}, ValueError, r"prob_m \* top_k: got 3 \* 9223372036854775807"),
    ({"top_k": 2**70}, ValueError, "top_k: got a number of 71 bits"),
    ({"top_k": 2.0}, TypeError, "top_k: got 2.0, expected an int"),
    ({"prob_m": -1}, ValueError, "prob_m: got -1, expected 0 to 6, the rows of input"),
    ({"prob_m": ROWS + 1}, ValueError, "prob_m: got 7, expected 0 to 6"),
    ({"prob_m": 4}, ValueError, r"prob_m \* top_k: got 4 \* 2, expected at most 6"),
    ({"prob_m": INT64.max}, ValueError, "prob_m: got 9223372036854775807"),
    ({"prob_m": 2**70}, ValueError, "prob_m: got a number of 71 bits"),
    ({"prob_m": 3.0}, TypeError, "prob_m: got 3.0, expected an int"),
    ({"prob_m": None}, TypeError, "prob_m: got None"),
]
# What routing arrays hold is looked at on the host alone.
OF_VLLM_ON_HOST = [
    ({"expert_ids": np.array([0, E, 0], np.int32)}, IndexError, r"expert_ids\[1\]: got 3, expected -1 to 2"),
    ({"expert_ids": np.array([0, 0, -2], np.int32)}, IndexError, r"expert_ids\[2\]: got -2, expected -1 to 2"),
    ({"expert_ids": np.full(3, INT32.max, np.int32)}, IndexError, r"expert_ids\[0\]: got 2147483647"),
    ({"sorted_token_ids": np.full(12, -1, np.int32)}, IndexError, r"sorted_token_ids\[0\]: got -1, expected 0 or more"),
    ({"sorted_token_ids": np.full(12, INT32.min, np.int32)}, IndexError, r"sorted_token_ids\[0\]: got -2147483648"),
    ({"sorted_token_ids": np.zeros(12, np.int32)}, ValueError, r"sorted_token_ids\[1\]: got 0 a second time"),
    ({"sorted_token_ids": np.array([*range(6), 5] + [9] * 5, np.int32)}, ValueError, r"\[6\]: got 5 a second time"),
]

OF_VIEW = [
    ({"m": -1}, ValueError, "m: got -1, expected 0 to 6, the rows of input and out"),
    ({"m": ROWS + 1}, ValueError, "m: got 7, expected 0 to 6"),
    ({"m": INT64.max}, ValueError, "m: got 9223372036854775807"),
    ({"m": INT64.min}, ValueError, "m: got -9223372036854775808"),
    ({"m": 2**70}, ValueError, "m: got a number of 71 bits"),
    ({"m": 6.0}, TypeError, "m: got 6.0, expected an int"),
    ({"m": None}, TypeError, "m: got None"),
    ({"m": [6]}, TypeError, r"m: got \[6\]"),
    ({"m": np.array([6, 6])}, TypeError, r"m: got array\(\[6, 6\]\)"),
]

OF_LAYER = [
    ({"router_logits": None}, TypeError, "router_logits: got None"),
    ({"router_logits": np.zeros((ROWS - 1, E), np.float32)}, ValueError, "router_logits: got 5 rows, expected 6"),
    (
        {"hidden_states": np.zeros((ROWS + 1, K), np.float32)},
        ValueError,
        "out: got 6 rows, expected 7, those of hidden",
    ),
    ({"out": np.zeros((ROWS + 1, K), np.float32)}, ValueError, "out: got 7 rows, expected 6"),
    ({"hidden_states": np.zeros((ROWS, K), np.int8), "out": None}, TypeError, "got dtype int8"),
    ({"hidden_states": np.zeros(ROWS * K, np.float32), "out": None}, ValueError, r"hidden_states: got shape \(384,\)"),
    ({"hidden_states": None, "out": None}, TypeError, "hidden_states: got NoneType"),
    ({"hidden_states": [[0.0] * K], "out": None}, TypeError, "hidden_states: got list"),
]

OF_ROUTED = [
    ({"topk_ids": np.full((ROWS, 2), E)}, IndexError, r"topk_ids\[0, 0\]: got 3, expected -1 to 2"),
    ({"topk_ids": np.full((ROWS, 2), -2)}, IndexError, r"topk_ids\[0, 0\]: got -2, expected -1 to 2"),
    ({"topk_ids": np.full((ROWS, 2), 2**32)}, IndexError, r"topk_ids\[0, 0\]: got 4294967296"),
    ({"topk_ids": np.full((ROWS, 2), 2**64 - 1, np.uint64)}, IndexError, r"topk_ids\[0, 0\]: got 18446744073709551615"),
    ({"topk_ids": np.zeros((ROWS, 2))}, TypeError, "topk_ids: got dtype float64, expected int32 or int64"),
    ({"topk_ids": np.zeros((ROWS, 2), bool)}, TypeError, "topk_ids: got dtype bool"),
    ({"topk_ids": np.zeros((ROWS, 2), object)}, TypeError, "topk_ids: got dtype object"),
    ({"topk_ids": np.zeros(ROWS, np.int32)}, ValueError, r"topk_ids: got shape \(6,\), expected \[tokens, top_k\]"),
    ({"topk_ids": np.zeros((ROWS, 3), np.int32)}, ValueError, r"topk_weights: got shape \(6, 2\), expected \(6, 3\)"),
    ({"topk_ids": [[0, 1], [0]]}, ValueError, r"topk_ids: got list .*expected \[tokens, top_k\]"),
    ({"topk_ids": None}, TypeError, "topk_ids: got dtype object"),
    ({"topk_weights": np.zeros((ROWS, 2), np.int32)}, TypeError, "topk_weights: got dtype int32, expected float32"),
    ({"topk_weights": np.zeros((ROWS, 2), complex)}, TypeError, "topk_weights: got dtype complex128"),
    ({"topk_weights": np.zeros((ROWS, 1), np.float32)}, ValueError, r"topk_weights: got shape \(6, 1\)"),
    ({"topk_weights": [[0.0, 1.0], [0.0]]}, ValueError, "topk_weights: got list"),
    ({"topk_weights": None}, TypeError, "topk_weights: got dtype object"),
    (
        {"topk_ids": np.zeros((ROWS, 0), np.int32), "topk_weights": np.zeros((ROWS, 0), np.float32)},
        ValueError,
        r"topk_ids: got shape \(6, 0\), expected at least one expert for each token",
    ),
    (
        {"topk_ids": np.zeros((ROWS - 1, 2), np.int32), "topk_weights": np.zeros((ROWS - 1, 2), np.float32)},
        ValueError,
        "topk_ids: got 5 rows, expected 6, those of hidden_states",
    ),
]

OF_WEIGHED = [
    (
        {"topk_ids": np.zeros((ROWS, 2), np.int32), "topk_weights": np.zeros((ROWS, 2), np.float32)},
        ValueError,
        r"topk_ids: got shape \(6, 2\), expected \[tokens, 1\], as apply_router_weight_on_input is set",
    ),
    ({"topk_weights": np.zeros((ROWS, 2), np.float32)}, ValueError, r"topk_weights: got shape \(6, 2\)"),
    ({"topk_ids": np.full((ROWS, 1), E)}, IndexError, r"topk_ids\[0, 0\]: got 3, expected -1 to 2"),
]

TABLES = {
    "batched": OF_BATCHED,
    "vllm": OF_VLLM,
    "view": OF_VIEW,
    "layer": OF_LAYER,
    "routed": OF_ROUTED,
    "weighed": OF_WEIGHED,
}
LINES = [
    *((call, str(number), line) for call, lines in TABLES.items() for number, line in enumerate(lines)),
    *(("vllm", f"host-{number}", line) for number, line in enumerate(OF_VLLM_ON_HOST)),
]


@pytest.mark.parametrize(("call", "changes", "exception", "message"), table(LINES), indirect=["call"])
def test_arguments(call, changes, exception, message):
    call.refused(changes, exception, message)


@pytest.mark.parametrize("name", CALLS)
def test_subclasses_are_arrays(cpu_backend, rng, name):
    call = CALLS[name](cpu_backend, rng)

    class Named(np.ndarray):
        pass

    for name in (*call.inputs, call.output):
        call.args[name] = call.args[name].view(Named)
    assert_same_bits(np.asarray(call.right()), np.asarray(call.expected))


@only("batched")
def test_any_numbers_in_dispatches(call, rng):
    """Whatever they are, they are refused as a caller's mistake, or right."""
    for _ in range(2000):
        dispatches = [
            tuple(
                int(rng.choice(EXTREMES[: rng.integers(2, 14)])) if rng.random() < 0.5 else int(rng.integers(4))
                for _ in range(4)
            )
            for _ in range(rng.integers(1, 4))
        ]
        try:
            call.make_call({**call.args, "dispatches": dispatches})
        except CALLERS_MISTAKES:
            call.guard.assert_untouched()
        else:
            assert all(0 <= number <= ROWS for dispatch in dispatches for number in dispatch)
            call.guard.assert_guards()
            call.args["output"] = call.guarded()
    assert_same_bits(call.right(), call.expected)


@only("vllm")
def test_any_numbers_in_routing(call, rng):
    names = ("num_tokens_past_padded", "prob_m", "moe_block_size", "top_k")
    small = [number for number in EXTREMES if INT32.min <= number <= INT32.max]
    done = 0
    for _ in range(2000):
        changes = {
            name: int(rng.choice(small if rng.random() < 0.7 else EXTREMES[:11]))
            for name in names
            if rng.random() < 0.4
        }
        for name in ("sorted_token_ids", "expert_ids"):
            if rng.random() < 0.3:
                changes[name] = rng.choice([*small, 3, 4, 5], int(rng.integers(0, 16))).astype(np.int32)
        try:
            call.make_call({**call.args, **changes})
        except CALLERS_MISTAKES:
            call.guard.assert_untouched()
        else:
            done += 1
            call.guard.assert_guards()
            call.args["output"] = call.guarded()
    assert done
    assert_same_bits(call.right(), call.expected)


class TestViews:
    @pytest.mark.parametrize(
        ("changes", "exception", "message"),
        [
            ({"expert_offset": 4}, ValueError, "expert_offset: got 4, expected a multiple of n_tile, 8"),
            ({"expert_n": 12}, ValueError, "expert_n: got 12, expected a multiple of n_tile, 8"),
            ({"expert_offset": -8}, IndexError, "got columns -8 to 8, expected a part of 0 to 48"),
            ({"expert_offset": 40}, IndexError, "got columns 40 to 56, expected a part of 0 to 48"),
            ({"expert_n": 0}, IndexError, "got columns 0 to 0"),
            ({"expert_n": -8}, IndexError, "got columns 0 to -8"),
            ({"expert_n": 56}, IndexError, "got columns 0 to 56"),
            ({"expert_offset": 2**63 - 8}, IndexError, "got columns 9223372036854775800 to"),
            ({"expert_n": 2**63 - 8}, IndexError, "got columns 0 to 9223372036854775800"),
            ({"expert_offset": 2**70}, ValueError, "expert_offset: got a number of 71 bits"),
            ({"expert_n": 2**70}, ValueError, "expert_n: got a number of 71 bits"),
            ({"expert_offset": 8.0}, TypeError, "expert_offset: got 8.0, expected an int"),
            ({"expert_n": "8"}, TypeError, "expert_n: got '8', expected an int"),
            ({"expert_n": None}, TypeError, "expert_n: got None, expected an int"),
            ({"bias_host": np.zeros(15, np.float32)}, ValueError, r"bias: got shape \(15,\), expected \(16,\)"),
            ({"bias_host": np.zeros((1, 16), np.float32)}, ValueError, r"bias: got shape \(1, 16\)"),
            ({"bias_host": np.zeros(0, np.float32)}, ValueError, r"bias: got shape \(0,\)"),
            ({"bias_host": 0.0}, ValueError, r"bias: got shape \(\)"),
            ({"bias_host": np.zeros(16, np.int32)}, TypeError, "bias: got dtype int32, expected float32, float16 or"),
            ({"bias_host": np.zeros(16, ">f4")}, TypeError, "bias: got dtype >f4"),
            ({"bias_host": np.zeros(16, object)}, TypeError, "bias: got dtype object"),
            ({"bias_host": "bias"}, TypeError, "bias: got dtype <U4"),
            ({"bias_host": [[0.0], [0.0, 1.0]]}, ValueError, "bias: got list"),
        ],
    )
    def test_refused(self, backend, rng, changes, exception, message):
        stack = random_problem(rng, E, K, N, 32).stack(backend)
        with pytest.raises(exception, match=message):
            stack.make_expert_linear(**{"expert_offset": 0, "expert_n": N, **changes})

    def test_every_place(self, backend, rng):
        """Refused, or a view."""
        stack = random_problem(rng, E, K, N, 32).stack(backend)
        for offset, width in itertools.product([*range(-9, 60), *EXTREMES], repeat=2):
            right = offset % 8 == width % 8 == 0 and 0 <= offset < offset + width <= E * N
            if right:
                assert stack.make_expert_linear(offset, width).out_features == width
            else:
                with pytest.raises((ValueError, IndexError), match="expert_"):
                    stack.make_expert_linear(offset, width)


def with_value(values, index, value):
    values = values.copy()
    values[index] = value
    return values


class TestLoading:
    """One line for each argument of ``load_gptq_stacked``; ``test_gptq_format.py`` has the rest."""

    @pytest.mark.parametrize(
        ("changes", "exception", "message"),
        [
            ({"bits": 3}, UnsupportedError, "bits: got 3, only 4"),
            ({"bits": 8}, UnsupportedError, "bits: got 8"),
            ({"bits": 4.0}, TypeError, "bits: got 4.0, expected an int"),
            ({"bits": True}, TypeError, "bits: got True, expected an int"),
            ({"bits": None}, TypeError, "bits: got None"),
            ({"group_size": 16}, UnsupportedError, "group_size: got 16, supported are 32, 64"),
            ({"group_size": 96}, UnsupportedError, "group_size: got 96"),
            ({"group_size": 0}, ValueError, "group_size: got 0"),
            ({"group_size": -128}, ValueError, "group_size: got -128"),
            ({"group_size": 2**70}, ValueError, "group_size: got a number of 71 bits"),
            ({"k": 48}, ValueError, "k: got 48, expected a positive multiple of 32"),
            ({"k": 96}, ValueError, r"qweight of expert 0: got shape \(8, 16\), expected int32 \(12, 16\)"),
            ({"k": 0}, ValueError, "k: got 0"),
            ({"k": 2**62}, ValueError, "qweight of expert 0: got shape"),
            ({"k": "64"}, TypeError, "k: got '64', expected an int"),
            ({"n_per_expert": 4}, ValueError, "n_per_expert: got 4, expected a positive multiple of 8"),
            ({"n_per_expert": 24}, ValueError, r"qweight of expert 0: got shape \(8, 16\), expected int32 \(8, 24\)"),
            ({"n_per_expert": None}, TypeError, "n_per_expert: got None, expected an int"),
            ({"checkpoint_format": "awq"}, ValueError, "checkpoint_format: got 'awq', expected one of gptq, gptq_v2"),
            ({"checkpoint_format": None}, ValueError, "checkpoint_format: got None"),
            ({"qweights": []}, ValueError, "qweights: got no experts|scales: got 3 entries"),
            ({"qweights": None}, TypeError, "qweights: got NoneType, expected a sequence"),
            ({"qweights": 5}, TypeError, "qweights: got int, expected a sequence"),
            ({"qweights": [None] * E}, TypeError, "qweight of expert 0: got dtype object"),
            ({"scales": None}, TypeError, "scales: got NoneType, expected a sequence"),
            ({"qzeros": iter([])}, TypeError, "qzeros: got list_iterator, expected a sequence"),
            ({"g_idx": 3}, TypeError, "g_idx: got int, expected a sequence"),
            ({"g_idx": []}, ValueError, "g_idx: got 0 entries, expected one an expert: 3"),
            ({"g_idx": [None, None]}, ValueError, "g_idx: got 2 entries"),
            ({"g_idx": np.zeros(K - 1, np.int32)}, ValueError, r"g_idx: got shape \(63,\)"),
            ({"g_idx": np.zeros((E, K - 1), np.int32)}, ValueError, r"g_idx of expert 0: got shape \(63,\)"),
            ({"g_idx": np.zeros((E, K, 1), np.int32)}, ValueError, "g_idx: got 3 dimensions"),
            ({"g_idx": np.full(K, 2, np.int32)}, IndexError, "g_idx of expert 0: got 2 at row 0, expected 0 to 1"),
            ({"g_idx": [None, None, np.full(K, -1, np.int32)]}, IndexError, "g_idx of expert 2: got -1 at row 0"),
            ({"g_idx": np.zeros(K)}, TypeError, "g_idx of expert 0: got dtype float64, expected int32"),
            ({"g_idx": np.zeros(K, np.int64)}, TypeError, "g_idx of expert 0: got dtype int64, expected int32"),
        ],
    )
    def test_refused(self, backend, rng, changes, exception, message):
        problem = random_problem(rng, E, K, N, 32)
        tensors = dict(zip(("qweights", "scales", "qzeros"), problem.tensors(), strict=True))
        with pytest.raises(exception, match=message):
            backend.load_gptq_stacked(**{**tensors, **problem.sizes(), **changes})

    @pytest.mark.parametrize("name", ["qweights", "scales", "qzeros"])
    def test_lengths_that_disagree(self, backend, rng, name):
        problem = random_problem(rng, E, K, N, 32)
        tensors = dict(zip(("qweights", "scales", "qzeros"), problem.tensors(), strict=True))
        tensors[name] = tensors[name][:-1]
        with pytest.raises(ValueError, match="entries, expected one an expert: [23], as in qweights"):
            backend.load_gptq_stacked(**tensors, **problem.sizes())

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_scales_that_are_not_finite(self, backend, rng, value):
        problem = random_problem(rng, E, K, N, 32)
        qweights, scales, qzeros = problem.tensors()
        scales[2] = with_value(scales[2], (1, 7), value)
        with pytest.raises(ValueError, match=r"scales of expert 2: got -?(nan|inf) at \[1, 7\], expected finite"):
            backend.load_gptq_stacked(qweights, scales, qzeros, **problem.sizes())

    @pytest.mark.parametrize(
        ("changes", "exception", "message"),
        [
            ({"bits": 2}, UnsupportedError, "bits: got 2"),
            ({"n": 12}, ValueError, "n: got 12"),
            ({"n": 2**70}, ValueError, "n: got a number of 71 bits"),
            ({"k": None}, TypeError, "k: got None, expected an int"),
            ({"bias": np.zeros(N - 1, np.float32)}, ValueError, r"bias: got shape \(15,\), expected \(16,\)"),
            ({"bias": np.zeros(N, np.int64)}, TypeError, "bias: got dtype int64"),
            ({"g_idx": np.full(K, 9, np.int32)}, IndexError, "g_idx: got 9 at row 0"),
        ],
    )
    def test_linear_refused(self, backend, rng, changes, exception, message):
        qweights, scales, qzeros = random_problem(rng, 1, K, N, 32).tensors()
        right = {"qweight": qweights[0], "scales": scales[0], "qzeros": qzeros[0]}
        with pytest.raises(exception, match=message):
            backend.load_gptq(**{**right, "bits": 4, "group_size": 32, "k": K, "n": N, **changes})


class TestMoe:
    @pytest.mark.parametrize(
        ("changes", "exception", "message"),
        [
            ({"top_k": 0}, ValueError, "top_k: got 0, expected 1 to 3, the number of experts"),
            ({"top_k": E + 1}, ValueError, "top_k: got 4, expected 1 to 3"),
            ({"top_k": 2**70}, ValueError, "top_k: got a number of 71 bits"),
            ({"top_k": 1.0}, TypeError, "top_k: got 1.0, expected an int"),
            (
                {"activation": "relu"},
                UnsupportedError,
                "activation: got 'relu', expected one of silu, gelu, gelu_tanh,",
            ),
            ({"activation": None}, UnsupportedError, "activation: got None"),
            ({"activation": ["silu"]}, UnsupportedError, r"activation: got \['silu'\]"),
            ({"activation": np.array("silu")}, UnsupportedError, "activation: got array"),
            (
                {"apply_router_weight_on_input": True},
                ValueError,
                "apply_router_weight_on_input: got top_k 2, expected 1",
            ),
            ({"apply_router_weight_on_input": 1}, TypeError, "apply_router_weight_on_input: got 1, expected a bool"),
            (
                {"apply_router_weight_on_input": None},
                TypeError,
                "apply_router_weight_on_input: got None, expected a bool",
            ),
            ({"shared_expert": 3}, TypeError, "shared_expert: got int, expected a SharedExpert"),
            ({"num_groups": 2}, ValueError, "num_groups: got 2, expected a divisor of 3 experts"),
            ({"scoring": "tanh"}, ValueError, "scoring: got 'tanh', expected one of softmax"),
            ({"correction_bias": np.zeros(2)}, ValueError, r"correction_bias: got shape \(2,\), expected \(3,\)"),
            ({"gate_up": None}, TypeError, "gate_up: got NoneType, expected a MarlinExpertStack"),
            ({"down": 3}, TypeError, "down: got int, expected a MarlinExpertStack"),
        ],
    )
    def test_layer_refused(self, backend, rng, changes, exception, message):
        gate_up, down = random_problem(rng, E, K, 64, 32), random_problem(rng, E, 32, K, 32)
        right = {"gate_up": gate_up.stack(backend), "down": down.stack(backend), "top_k": 2}
        with pytest.raises(exception, match=message):
            marlin_cy.MoeLayer(**{**right, **changes})

    @pytest.mark.parametrize(
        ("changes", "exception", "message"),
        [
            ({"gate_up": None}, TypeError, "gate_up: got NoneType, expected a MarlinExpertStack"),
            ({"down": "down"}, TypeError, "down: got str, expected a MarlinExpertStack"),
            ({"gate_weight": np.zeros(K - 1)}, ValueError, r"gate_weight: got shape \(63,\), expected \(64,\)"),
            ({"gate_weight": np.zeros((1, K))}, ValueError, r"gate_weight: got shape \(1, 64\)"),
            ({"gate_weight": 0.0}, ValueError, r"gate_weight: got shape \(\)"),
            ({"gate_weight": [[0.0], [0.0, 1.0]]}, ValueError, "gate_weight: got list"),
            ({"gate_weight": np.zeros(K, np.int32)}, TypeError, "gate_weight: got dtype int32, expected float32"),
            ({"gate_weight": np.zeros(K, ">f4")}, TypeError, "gate_weight: got dtype >f4"),
            ({"gate_weight": np.zeros(K, object)}, TypeError, "gate_weight: got dtype object"),
            ({"gate_weight": "gate"}, TypeError, "gate_weight: got dtype <U4"),
            (
                {"gate_weight": with_value(np.zeros(K), 5, np.nan)},
                ValueError,
                r"gate_weight: got nan at \[5\], expected",
            ),
            (
                {"gate_weight": with_value(np.zeros(K), 9, 1e39)},
                ValueError,
                r"gate_weight: got 1e\+39 at \[9\], expected",
            ),
        ],
    )
    def test_shared_expert_refused(self, backend, rng, changes, exception, message):
        gate_up, down = random_problem(rng, 1, K, 64, 32), random_problem(rng, 1, 32, K, 32)
        right = {"gate_up": gate_up.stack(backend), "down": down.stack(backend), "gate_weight": np.zeros(K)}
        with pytest.raises(exception, match=f"^{message}"):
            marlin_cy.SharedExpert(**{**right, **changes})

    def test_shared_expert_that_does_not_fit(self, backend, rng):
        def stack(*sizes):
            return random_problem(rng, *sizes, 32).stack(backend)

        gate_up, down = stack(E, K, 64), stack(E, 32, K)
        with pytest.raises(ValueError, match="^gate_up: got 3 experts, expected 1"):
            marlin_cy.SharedExpert(gate_up, down)
        with pytest.raises(ValueError, match="^down: got 3 experts, expected 1, as in gate_up"):
            marlin_cy.SharedExpert(stack(1, K, 64), down)
        with pytest.raises(ValueError, match="^gate_up: got n_per_expert 64, expected 192, twice the k of down"):
            marlin_cy.SharedExpert(stack(1, K, 64), stack(1, 96, K))
        for k, width in ((K, 32), (32, K)):
            shared = marlin_cy.SharedExpert(stack(1, k, 64), stack(1, 32, width))
            with pytest.raises(ValueError, match=f"^shared_expert: got {k} -> {width}, expected 64 -> 64"):
                marlin_cy.MoeLayer(gate_up, down, top_k=1, shared_expert=shared)

    @only("layer", "routed")
    def test_stacks_of_another_backend(self, call, rng):
        """A shared expert's, too; a stack that is none of the backend's stands for it."""
        layer = call.call.__self__ if hasattr(call.call, "__self__") else call.call

        class Elsewhere:
            num_experts, k, n_per_expert = 1, K, 64

        class Down(Elsewhere):
            k, n_per_expert = 32, K

        shared = marlin_cy.SharedExpert(Elsewhere(), Down())
        other = marlin_cy.MoeLayer(layer.gate_up, layer.down, top_k=2, shared_expert=shared)
        right = call.call
        call.call = other if right is layer else other.forward_routed
        with pytest.raises(
            TypeError, match="^ctx: got an? .* context, but the layer's shared_expert.gate_up is a Elsew"
        ):
            call.make_call(call.args)
        call.guard.assert_untouched()
        call.call = right
        assert_same_bits(call.right(), call.expected)

    def test_stacks_that_do_not_fit(self, backend, rng):
        gate_up = random_problem(rng, E, K, 64, 32).stack(backend)
        with pytest.raises(ValueError, match="down: got 2 experts, expected 3, as in gate_up"):
            marlin_cy.MoeLayer(gate_up, random_problem(rng, 2, 32, K, 32).stack(backend), top_k=1)
        with pytest.raises(ValueError, match="gate_up: got n_per_expert 64, expected 128, twice the k of down"):
            marlin_cy.MoeLayer(gate_up, random_problem(rng, E, 64, K, 32).stack(backend), top_k=1)

    @pytest.mark.parametrize(
        ("changes", "exception", "message"),
        [
            ({"block_size": 0}, ValueError, "block_size: got 0, expected at least 1"),
            ({"block_size": -1}, ValueError, "block_size: got -1"),
            ({"block_size": 2.0}, TypeError, "block_size: got 2.0, expected an int"),
            ({"block_size": 2**70}, ValueError, "block_size: got a number of 71 bits"),
            ({"block_size": 2**31}, ValueError, r"topk_ids: got 8 slots, expected fewer than 2\*\*31"),
            ({"block_size": INT64.max}, ValueError, "topk_ids: got 8 slots, expected fewer"),
            ({"num_experts": 0}, ValueError, "num_experts: got 0, expected at least 1"),
            ({"num_experts": None}, TypeError, "num_experts: got None"),
            ({"num_experts": 2**31}, ValueError, "topk_ids: got 8 slots, expected fewer"),
            ({"topk_ids": np.full((4, 2), 3)}, IndexError, r"topk_ids\[0, 0\]: got 3, expected -1 to 2"),
            ({"topk_ids": np.full((4, 2), -2)}, IndexError, r"topk_ids\[0, 0\]: got -2"),
            ({"topk_ids": np.full((4, 2), 2**32)}, IndexError, r"topk_ids\[0, 0\]: got 4294967296"),
            ({"topk_ids": np.zeros(8, np.int32)}, ValueError, r"topk_ids: got shape \(8,\)"),
            ({"topk_ids": np.zeros((4, 2))}, TypeError, "topk_ids: got dtype float64"),
            ({"topk_ids": None}, TypeError, "topk_ids: got dtype object"),
            ({"topk_ids": [[0], [1, 2]]}, ValueError, "topk_ids: got list"),
            ({"expert_map": np.zeros(2, np.int32)}, ValueError, r"expert_map: got shape \(2,\), expected \(3,\)"),
            ({"expert_map": np.zeros(3)}, TypeError, "expert_map: got dtype float64, expected int32"),
            ({"expert_map": np.full(3, -2)}, IndexError, "expert_map: got -2 to -2, expected -1 or a local index"),
            ({"expert_map": np.full(3, 2**32)}, IndexError, "expert_map: got 4294967296"),
            ({"expert_map": 5}, ValueError, r"expert_map: got shape \(\)"),
        ],
    )
    def test_align_refused(self, changes, exception, message):
        right = {"topk_ids": np.zeros((4, 2), np.int32), "block_size": 4, "num_experts": 3}
        with pytest.raises(exception, match=message):
            marlin_cy.moe_align_block_size(**{**right, **changes})

    @pytest.mark.parametrize(
        ("logits", "exception", "message"),
        [
            (None, TypeError, "router_logits: got NoneType"),
            (np.zeros((2, E + 1), np.float32), ValueError, r"router_logits: got shape \(2, 4\), expected \[rows, 3\]"),
            (np.zeros((2, E)), TypeError, "router_logits: got dtype float64"),
        ],
    )
    @only("layer")
    def test_route_refused(self, call, logits, exception, message):
        if logits is not None:
            logits = call.backend.from_host(logits)
        with pytest.raises(exception, match=message):
            call.call.route(call.ctx, logits)
        with pytest.raises(TypeError, match="ctx: got NoneType, expected a Context"):
            call.call.route(None, call.backend.from_host(np.zeros((2, E), np.float32)))


def test_store_of_another_size(device_backend, rng):
    stack = random_problem(rng, E, K, N, 32).stack(device_backend)
    with pytest.raises(ValueError, match=r"store: holds 3 experts of \[64, 16\], expected 4 of \[64, 16\]"):
        type(stack)(stack.store, 4, N, K)
    with pytest.raises(TypeError, match=r"store: got NoneType, expected \w+GptqStore"):
        type(stack)(None, 4, N, K)


def test_contexts_and_stores_cannot_be_pickled(device_backend, rng):
    """They hold addresses: a copy would point into memory that is not its own."""
    import copy
    import pickle

    stack = random_problem(rng, E, K, N, 32).stack(device_backend)
    for unique in (device_backend.new_context(), stack.store):
        for attempt in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match="pickl|__reduce__"):
                attempt(unique)
