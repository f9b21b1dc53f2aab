"""Tensors of every format to canonical form: round trips of all values that a format can hold, and refusals."""

import dataclasses
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlin_cy.checkpoints.safetensors import DTYPES
from marlin_cy.errors import UnsupportedError
from marlin_cy.formats import awq, compressed_tensors, deepseek_fp4, gptq, marlin, mxfp4
from marlin_cy.formats.scheme import Scheme
from marlin_cy.stacks.builder import check_weight
from marlin_cy.weights.canonical import unpack_words

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Case:
    """A scheme and a function that makes its tensors: ``pack(q, scale, zero)`` returns them by suffix.

    ``zeros`` are the zero points that it can hold; ``n_unit`` divides N; ``dtypes`` are those of scales.
    """

    scheme: Scheme
    pack: callable
    zeros: range = range(16)
    n_unit: int = 8
    dtypes: tuple = (F16, BF16)


def pack_gptq(q, scale, zero, checkpoint_format="gptq"):
    qweight, _, qzeros = gptq.pack_gptq(q, scale, zero, checkpoint_format=checkpoint_format)
    return {".qweight": qweight, ".scales": scale, ".qzeros": qzeros}


def pack_gptq_v2(q, scale, zero):
    return pack_gptq(q, scale, zero, "gptq_v2")


def pack_awq(q, scale, zero):
    qweight, _, qzeros = awq.pack_awq(q, scale, zero)
    return {".qweight": qweight, ".scales": scale, ".qzeros": qzeros}


def pack_compressed(q, scale, zero):
    packed, scale, zero = compressed_tensors.pack_compressed(q, scale, None if (zero == 8).all() else zero)
    arrays = {".weight_packed": packed, ".weight_scale": scale, ".weight_shape": np.array(q.T.shape)}
    return arrays if zero is None else arrays | {".weight_zero_point": zero}


def pack_marlin(q, scale, _):
    return dict(zip((".B", ".s"), marlin.pack_marlin(q, scale), strict=True))


def pack_mxfp4(q, scale, _):
    return dict(zip(("_blocks", "_scales"), mxfp4.pack_mxfp4(q, exponents_of(scale)), strict=True))


def pack_compressed_mxfp4(q, scale, _):
    blocks, exponents = mxfp4.pack_mxfp4(q, exponents_of(scale))
    return {".weight_packed": blocks.reshape(len(blocks), -1), ".weight_scale": exponents}


def exponents_of(scale):
    return np.log2(scale.astype(np.float64)).astype(int) + 127


def pack_deepseek_fp4(q, scale, zero):
    blocks, scales = pack_mxfp4(q, scale, zero).values()
    return {".weight": blocks.reshape(q.shape[1], -1).view(np.int8), ".scale": scales}


SYMMETRIC = range(8, 9)
CASES = {
    "gptq": Case(gptq.GptqScheme(32), pack_gptq, range(1, 17)),
    "gptq-64": Case(gptq.GptqScheme(64), pack_gptq, range(1, 17)),
    "gptq-v2": Case(gptq.GptqScheme(-1, "gptq_v2"), pack_gptq_v2),
    "awq": Case(awq.AwqScheme(32), pack_awq),
    "awq-channel": Case(awq.AwqScheme(-1), pack_awq),
    "compressed": Case(compressed_tensors.CompressedTensorsScheme(32), pack_compressed, SYMMETRIC),
    "compressed-zeros": Case(compressed_tensors.CompressedTensorsScheme(64, symmetric=False), pack_compressed),
    "compressed-channel": Case(compressed_tensors.CompressedTensorsScheme(-1), pack_compressed, SYMMETRIC),
    "marlin": Case(marlin.MarlinScheme(128), pack_marlin, SYMMETRIC, 64, (F16,)),
    "marlin-channel": Case(marlin.MarlinScheme(-1), pack_marlin, SYMMETRIC, 64, (F16,)),
    "mxfp4": Case(mxfp4.Mxfp4Scheme(), pack_mxfp4, (), 8, (BF16,)),
    "deepseek-fp4": Case(deepseek_fp4.DeepSeekFp4Scheme(), pack_deepseek_fp4, (), 8, (BF16,)),
    "compressed-mxfp4": Case(compressed_tensors.CompressedMxfp4Scheme(), pack_compressed_mxfp4, (), 8, (BF16,)),
}
every_case = pytest.mark.parametrize("name", CASES)


def made(case, seed, k, n, dtype):
    """``(arrays, q, scale, zero)``: a random weight of every code, zero point and sign that the format can hold."""
    rng = np.random.default_rng(seed)
    group = k if case.scheme.group_size == -1 else case.scheme.group_size
    shape = (-(-k // group), n)
    q = rng.integers(0, 16, (k, n))
    if case.zeros:
        zero = rng.choice(np.array(case.zeros), shape)
        scale = rng.uniform(0.5, 2, shape) * rng.choice([1, 1, -1], shape) / 64
    else:
        zero = None
        scale = 2.0 ** rng.choice([-127, -126, -10, 0, 3, 127], shape)
    scale = scale.astype(dtype)
    return case.pack(q, scale, zero), q, scale, zero


def assert_means(weight, q, scale, zero, scheme):
    check_weight(weight)
    np.testing.assert_array_equal(unpack_words(weight.words), q)
    np.testing.assert_array_equal(weight.scale.view(np.uint16), scale.view(np.uint16))
    if zero is None:
        assert weight.zero is None
    else:
        np.testing.assert_array_equal(weight.zero, zero)
    assert weight.codes == scheme.codes
    assert weight.group_size == scheme.checked_group_size(*q.shape)
    assert weight.words.flags.c_contiguous
    assert weight.words.flags.aligned


@pytest.mark.sampled(7)
@every_case
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 10), n=st.integers(1, 9), which=st.integers(0, 1))
def test_round_trip(name, seed, k, n, which):
    case = CASES[name]
    k, n = 32 * k, case.n_unit * n
    arrays, q, scale, zero = made(case, seed, k, n, case.dtypes[which % len(case.dtypes)])
    scheme = case.scheme
    assert scheme.sizes(arrays[scheme.marker].shape) == (k, n)
    for suffix, spec in scheme.tensors(k, n).items():
        assert suffix in arrays or not spec.required
        if suffix in arrays:
            assert arrays[suffix].shape == spec.shape
            assert arrays[suffix].dtype in [DTYPES[dtype] for dtype in spec.dtypes]
    assert set(arrays) <= set(scheme.tensors(k, n))
    assert scheme.scale_dtype(arrays[scheme.scales].dtype) == scale.dtype
    assert scheme.for_module("any.module") == scheme
    assert_means(scheme.to_canonical(arrays, k, n), q, scale, zero, scheme)


def unaligned(array):
    return np.frombuffer(b"\0" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@every_case
@pytest.mark.parametrize("change", [np.asfortranarray, unaligned, read_only])
def test_other_arrays_of_the_same(name, change):
    case = CASES[name]
    arrays, q, scale, zero = made(case, 5, 256, 64, case.dtypes[0])
    arrays = {suffix: change(array) for suffix, array in arrays.items()}
    assert_means(case.scheme.to_canonical(arrays, 256, 64), q, scale, zero, case.scheme)


@every_case
def test_words_may_be_unsigned(name):
    case = CASES[name]
    arrays, q, scale, zero = made(case, 5, 256, 64, case.dtypes[0])
    arrays = {suffix: array.view(np.uint32) if array.dtype == np.int32 else array for suffix, array in arrays.items()}
    assert_means(case.scheme.to_canonical(arrays, 256, 64), q, scale, zero, case.scheme)


K, N = 256, 64


def named(suffix):
    return suffix.lstrip("._")


def refused(case, arrays, exception, message, k=K, n=N):
    with pytest.raises(exception, match=message):
        case.scheme.to_canonical(arrays, k, n, " of expert 3")


@every_case
def test_every_tensor_is_checked(name):
    """Each one's shape, dtype and byte order."""
    case = CASES[name]
    arrays, *_ = made(case, 1, K, N, case.dtypes[0])
    for suffix, array in arrays.items():
        tensor = f"^{named(suffix)} of expert 3: got"
        refused(case, arrays | {suffix: array[:-1]}, ValueError, rf"{tensor} shape \({len(array) - 1},.* expected")
        refused(case, arrays | {suffix: array[None]}, ValueError, rf"{tensor} shape \(1, .* expected")
        refused(case, arrays | {suffix: array.astype(np.float64)}, TypeError, f"{tensor} dtype float64, expected")
        refused(case, arrays | {suffix: [[1], [2, 3]]}, TypeError, f"{tensor} list")
        if array.dtype.itemsize > 1 and array.dtype != BF16:
            other = array.astype(array.dtype.newbyteorder())
            refused(case, arrays | {suffix: other}, TypeError, f"{tensor} big-endian dtype .*, expected native")


@every_case
def test_scales_have_to_be_finite(name):
    case = CASES[name]
    for dtype in case.dtypes:
        arrays, *_ = made(case, 1, K, N, dtype)
        suffix = case.scheme.scales
        for value in (np.nan, np.inf, -np.inf) if arrays[suffix].dtype != np.uint8 else (255,):
            wrong = arrays[suffix].copy()
            wrong[-1, -2 % wrong.shape[1]] = value
            where = rf"\[{wrong.shape[0] - 1}, {-2 % wrong.shape[1]}\]"
            refused(
                case, arrays | {suffix: wrong}, ValueError, f"^{named(suffix)} of expert 3: got {value}.* at {where}"
            )


@every_case
def test_sizes_are_checked(name):
    case = CASES[name]
    arrays, *_ = made(case, 1, K, N, case.dtypes[0])
    scheme = case.scheme
    for call in (scheme.tensors, scheme.checked_group_size, lambda k, n: scheme.to_canonical(arrays, k, n)):
        with pytest.raises(ValueError, match="k: got 72, expected a positive multiple of 32"):
            call(72, N)
        with pytest.raises(ValueError, match="n: got 12, expected a positive multiple of 8"):
            call(K, 12)
    for shape in ((), (8,), (8, 8, 8, 8), (2, 4, 15)):
        with pytest.raises(ValueError, match=r"^got shape \(.*expected (two|three) dimensions"):
            scheme.sizes(shape)


@pytest.mark.parametrize(
    "scheme", [gptq.GptqScheme(48), awq.AwqScheme(16), compressed_tensors.CompressedTensorsScheme(8)]
)
def test_group_sizes_without_kernels(scheme):
    with pytest.raises(UnsupportedError, match=f"group_size: got {scheme.group_size}, supported are 32, 64"):
        scheme.tensors(K, N)


def test_marlin_needs_whole_blocks():
    with pytest.raises(ValueError, match="n: got 72, expected a multiple of 64 in Marlin's layout"):
        marlin.MarlinScheme(128).tensors(K, 72)
    with pytest.raises(ValueError, match=r"got shape \(16, 127\), expected two dimensions, the last with two words"):
        marlin.MarlinScheme(128).sizes((16, 127))


@pytest.mark.parametrize("n", [64, 192])
@pytest.mark.parametrize("groups", [1, 2])
def test_marlin_scales_by_hand(n, groups):
    """Column 8*i + j of 64 is column i + 8*j; with one group, four pairs of columns 8 apart, of 32."""
    scale = np.arange(groups * n).reshape(groups, n).astype(np.float16)
    _, stored = marlin.pack_marlin(np.zeros((128 * groups, n), int), scale)
    first = [0, 8, 16, 24, 32, 40, 48, 56, 1] if groups == 2 else [0, 1, 8, 9, 16, 17, 24, 25, 2]
    assert stored[0, :9].tolist() == first
    assert stored[-1, n - 1] == scale[-1, n - 1]
    np.testing.assert_array_equal(
        marlin.unpack_marlin(*marlin.pack_marlin(np.zeros((128 * groups, n), int), scale))[1], scale
    )


def test_mxfp4_by_hand():
    """One block: the low nibble first, and a scale of 2**(e - 127)."""
    blocks, scales = np.zeros((8, 1, 16), np.uint8), np.full((8, 1), 127, np.uint8)
    blocks[2, 0, 1], scales[2, 0], scales[3, 0] = 0xE1, 128, 0
    weight = mxfp4.Mxfp4Scheme().to_canonical({"_blocks": blocks, "_scales": scales}, 32, 8)
    assert unpack_words(weight.words)[:5, 2].tolist() == [0, 0, 1, 14, 0]
    assert weight.scale[0, :4].astype(np.float64).tolist() == [1, 1, 2, 2.0**-127]


def test_awq_by_hand():
    """A word's nibbles, from the low end, are columns 0 2 4 6 1 3 5 7."""
    qweight = np.zeros((32, 1), np.uint32)
    qweight[3] = 0x76543210
    arrays = {".qweight": qweight, ".scales": np.ones((1, 8), F16), ".qzeros": np.array([[0xFEDCBA98]], np.uint32)}
    weight = awq.AwqScheme(32).to_canonical(arrays, 32, 8)
    assert unpack_words(weight.words)[3].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert weight.zero[0].tolist() == [8, 12, 9, 13, 10, 14, 11, 15]


class TestZeroPoints:
    """Zero points that contradict the config's word for them."""

    @pytest.mark.parametrize(
        ("name", "setting"), [("gptq", {"sym": True}), ("gptq-v2", {"sym": True}), ("awq", {"zero_point": False})]
    )
    def test_symmetric(self, name, setting):
        case = CASES[name]
        scheme = dataclasses.replace(case.scheme, **setting)
        arrays, q, scale, _ = made(dataclasses.replace(case, zeros=SYMMETRIC), 1, K, N, F16)
        assert_means(scheme.to_canonical(arrays, K, N), q, scale, np.full(scale.shape, 8), scheme)
        zero = np.full(scale.shape, 8)
        zero[-1, 5] = 9
        arrays = case.pack(q, scale, zero)
        with pytest.raises(ValueError, match=rf"^qzeros of expert 2: got zero point 9 at \[{len(zero) - 1}, 5\]"):
            scheme.to_canonical(arrays, K, N, " of expert 2")
        case.scheme.to_canonical(arrays, K, N)  # where the config does not say, the tensor decides

    def test_of_the_other_checkpoint_format(self):
        """The stored zero points of "gptq_v2", read as those of "gptq", are all 9."""
        arrays, *_ = made(dataclasses.replace(CASES["gptq-v2"], zeros=SYMMETRIC), 1, K, N, F16)
        with pytest.raises(ValueError, match="qzeros: got zero point 9 at .*sym: true"):
            gptq.GptqScheme(-1, "gptq", sym=True).to_canonical(arrays, K, N)


class TestOrders:
    """``g_idx`` of GPTQ and of compressed-tensors."""

    CASES = [
        (gptq.GptqScheme(32), "gptq", ".g_idx"),
        (compressed_tensors.CompressedTensorsScheme(32), "compressed", ".weight_g_idx"),
    ]

    @pytest.mark.parametrize(("scheme", "name", "suffix"), CASES)
    def test_means_the_group_of_each_row(self, scheme, name, suffix):
        arrays, *_ = made(CASES[name], 1, K, N, F16)
        ordinary = np.arange(K, dtype=np.int32) // 32
        shuffled = np.random.default_rng(0).permutation(ordinary)
        assert scheme.order == suffix
        for given_array, expected in ((ordinary, None), (shuffled, shuffled), (shuffled.view(np.uint32), shuffled)):
            for found in (
                scheme.g_idx(given_array, K, N),
                scheme.to_canonical(arrays | {suffix: given_array}, K, N).g_idx,
            ):
                np.testing.assert_array_equal(found, expected)
        assert scheme.to_canonical(arrays, K, N).g_idx is None

    @pytest.mark.parametrize(("scheme", "name", "suffix"), CASES)
    def test_refused(self, scheme, name, suffix):
        arrays, *_ = made(CASES[name], 1, K, N, F16)
        for wrong, exception, message in (
            (np.full(K, 8, np.int32), IndexError, "got 8 at row 0, expected 0 to 7"),
            (np.r_[np.zeros(K - 1), -1].astype(np.int32), IndexError, f"got -1 at row {K - 1}"),
            (np.zeros(K - 1, np.int32), ValueError, r"got shape \(255,\), expected int32 \(256,\)"),
            (np.zeros(K, np.int64), TypeError, "got dtype int64"),
        ):
            with pytest.raises(exception, match=f"^g_idx: {message}"):
                scheme.g_idx(wrong, K, N)
            with pytest.raises(exception, match=f"^g_idx of expert 3: {message}"):
                scheme.to_canonical(arrays | {suffix: wrong}, K, N, " of expert 3")

    @pytest.mark.parametrize(("scheme", "name", "suffix"), CASES)
    def test_contradictions(self, scheme, name, suffix):
        """A config that says whether rows are permuted, and a tensor that says otherwise."""
        flag = "desc_act" if name == "gptq" else "actorder"
        plain, ordered = (dataclasses.replace(scheme, **{flag: value}) for value in (False, True))
        ordinary = np.arange(K, dtype=np.int32) // 32
        shuffled, zeros = np.random.default_rng(0).permutation(ordinary), np.zeros(K, np.int32)
        # Zeros are an order that was never written.
        assert scheme.g_idx(zeros, K, N) is None
        assert plain.g_idx(zeros, K, N) is None
        assert plain.g_idx(ordinary, K, N) is None
        assert ordered.g_idx(ordinary, K, N) is None
        np.testing.assert_array_equal(ordered.g_idx(shuffled, K, N), shuffled)
        for told, array, message in (
            (plain, shuffled, "got group .* as the config says that rows are not permuted"),
            (ordered, zeros, "got 256 rows in group 0, expected 32"),
            (scheme, np.minimum(ordinary, 5), "got 96 rows in group 5, expected 32"),
        ):
            with pytest.raises(ValueError, match=f"^{suffix[1:]}: {message}"):
                told.g_idx(array, K, N)

    def test_required_where_the_checkpoint_says_so(self):
        assert gptq.GptqScheme(32, desc_act=True).tensors(K, N)[".g_idx"].required
        assert not gptq.GptqScheme(32).tensors(K, N)[".g_idx"].required
        ordered = compressed_tensors.CompressedTensorsScheme(32, actorder=True)
        assert ordered.tensors(K, N)[".weight_g_idx"].required

    def test_compressed_tensors_fills_it_with_minus_one_at_first(self):
        scheme = compressed_tensors.CompressedTensorsScheme(32, actorder=True)
        assert scheme.g_idx(np.full(K, -1, np.int32), K, N) is None


def test_weight_shape_has_to_agree():
    case = CASES["compressed"]
    arrays, q, scale, zero = made(case, 1, K, N, F16)
    refused(
        case, arrays | {".weight_shape": np.array([K, N])}, ValueError, r"^weight_shape of expert 3: got \[256, 64\]"
    )
    for shape in (np.array([N, K], np.int32), None):
        other = arrays | {".weight_shape": shape}
        if shape is None:
            del other[".weight_shape"]
        assert_means(case.scheme.to_canonical(other, K, N), q, scale, zero, case.scheme)


@pytest.mark.parametrize(
    ("pack", "q", "zero", "message"),
    [
        (awq.pack_awq, 16, 0, "q: got 16 to 16, awq holds 0 to 15"),
        (awq.pack_awq, 0, 16, "zero: got 16 to 16, awq holds 0 to 15"),
        (compressed_tensors.pack_compressed, -1, 0, "q: got -1 to -1, compressed-tensors holds 0 to 15"),
        (compressed_tensors.pack_compressed, 0, 16, "zero: got 16 to 16, compressed-tensors holds"),
        (lambda q, scale, zero: marlin.pack_marlin(q, scale), 16, 8, "q: got 16 to 16, marlin holds 0 to 15"),
        (lambda q, scale, zero: mxfp4.pack_mxfp4(q, zero), 16, 0, "q: got 16 to 16, mxfp4 holds 0 to 15"),
        (lambda q, scale, zero: mxfp4.pack_mxfp4(q, zero), 0, 255, "exponents: got 255 to 255, mxfp4 holds 0 to 254"),
    ],
)
def test_packers_refuse_what_a_format_cannot_hold(pack, q, zero, message):
    with pytest.raises(ValueError, match=message):
        pack(np.full((32, 64), q), np.ones((1, 64)), np.full((1, 64), zero))
