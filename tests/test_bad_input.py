"""Wrong arguments of every method that runs weights: the exception, its message, and no other effect.

The tables have a line for each mistake. Each line runs on the CPU and on each OpenCL device. After the exception the
input, the output and the memory around the output are unchanged, and the same context computes a right call
correctly. Failures of a device are in ``test_opencl_faults.py``, wrong arguments of loading in
``test_bad_input_loading.py``, those of layers in ``test_bad_input_layers.py``.
"""

import array

import ml_dtypes
import numpy as np
import pytest
from asserts import assert_same_bits
from calls import CALLS, EXTREMES, INT32, INT64, ROWS, Batched, E, K, N, every_call, only, table

import marlin_cy
from marlin_cy.errors import UnsupportedError

EXPECTED = "expected a (numpy.ndarray|pyopencl.array.Array)"
CALLERS_MISTAKES = (TypeError, ValueError, IndexError, UnsupportedError)


def unaligned(x):
    return np.frombuffer(bytearray(b"\0" + x.tobytes()), np.uint8)[1:].view(x.dtype).reshape(x.shape)


def read_only(x):
    x = x.view()
    x.flags.writeable = False
    return x


class Convertible:
    """An object that NumPy could convert to an array."""

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


@pytest.mark.sampled(24)
@pytest.mark.parametrize(("call", "name", "wrong", "exception", "message"), table(buffer_cases()), indirect=["call"])
def test_buffers(call, name, wrong, exception, message):
    # The message about a missing row may name the argument that counts the rows.
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
    """Adjacent arrays do not overlap."""
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
    """Dispatches with rows near the limits of int64, where sums must not wrap around."""
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
# Only on the host are the values of routing arrays checked.
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
        "out: got 6 rows, expected 7 as in hidden_states",
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
        "topk_ids: got 5 rows, expected 6 as in hidden_states",
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


@pytest.mark.sampled(1)
@only("batched")
def test_any_numbers_in_dispatches(call, rng):
    """Any numbers are either refused as a caller's mistake or valid."""
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


@pytest.mark.sampled(1)
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
