"""A config and tensors that contradict each other: right numbers or a refusal, never wrong numbers.

Each case changes one field of a config, or one tensor's values or shape, in a way that its other parts contradict. The
property is the same for all: either the change is refused by name, or outputs stay those of the checkpoint before the
change. A change that no other part contradicts is another model, and is not here.
"""

import json

import numpy as np
import pytest
from asserts import relative_error
from checkpoint_files import edit_json, edit_tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marlin_cy import open_checkpoint
from marlin_cy.errors import MarlinError
from marlin_cy.formats import awq, gptq
from marlin_cy.formats.compressed_tensors import CompressedTensorsScheme, pack_compressed

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from family_models import write_family  # noqa: E402

from marlin_cy.decoder.build import build_plan  # noqa: E402
from marlin_cy.decoder.reference import reference_logits  # noqa: E402
from marlin_cy.integrations.transformers import load  # noqa: E402

TOKENS = np.random.default_rng(1).integers(1, 80, 10)
EXPERT = "model.layers.1.mlp.experts.1.up_proj"

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def logits_of(folder):
    """``{way: logits or the refusal}``."""
    found = {}

    def by_transformers():
        return load(folder, num_threads=1)(torch.from_numpy(TOKENS)[None]).logits[0].double().numpy()

    def by_the_decoder():
        with open_checkpoint(folder, num_threads=1) as checkpoint:
            return reference_logits(build_plan(checkpoint), TOKENS)

    for way in (by_transformers, by_the_decoder):
        try:
            found[way.__name__] = way()
        except MarlinError as error:
            found[way.__name__] = error
    return found


def assert_right_or_refused(before, after, refused=None):
    """``refused``: None if either will do."""
    for way, logits in after.items():
        if isinstance(logits, MarlinError):
            assert refused is not False, f"{way}: {logits}"
            assert len(str(logits)) > 20
        else:
            assert not refused, way
            assert relative_error(logits, before[way]) < 5e-4, way


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """``source(model_type, method)``: ``(folder, logits)`` of a checkpoint that is as it should be."""
    made = {}

    def source(model_type="dots1", method="gptq"):
        if (model_type, method) not in made:
            with torch.no_grad():
                folder, _ = write_family(tmp_path_factory.mktemp(f"{model_type}-{method}"), model_type, method=method)
                made[model_type, method] = folder, logits_of(folder)
        return made[model_type, method]

    return source


@pytest.fixture
def copy_of(sources, tmp_path):
    """``copy_of(model_type, method)``: a copy to be changed, and the logits before."""

    def copy(*args, **kwargs):
        folder, logits = sources(*args, **kwargs)
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path, logits

    return copy


def pairs(fields):
    return [(key, value) for key, values in fields.items() for value in values]


FIELDS = {
    # Of models: sizes, which tensors show.
    "hidden_size": [32, 128, 63],
    "moe_intermediate_size": [16, 64],
    "intermediate_size": [48, 192],
    "n_routed_experts": [4, 7, 16],
    "n_shared_experts": [0, 1, 3],
    "first_k_dense_replace": [0, 2],
    "num_hidden_layers": [1, 3],
    "num_attention_heads": [2, 8],
    "num_key_value_heads": [1, 4],
    "head_dim": [8, 32],
    "vocab_size": [48, 192],
    "attention_bias": [True],
    # Of quantisation.
    "quantization_config__bits": [2, 3, 8],
    "quantization_config__group_size": [16, 64, 128, -1],
    "quantization_config__desc_act": [True],
    "quantization_config__sym": [True],
    "quantization_config__quant_method": ["awq", "auto-round", "compressed-tensors", "mxfp4"],
}


@pytest.mark.sampled(12)
@pytest.mark.parametrize(("key", "value"), pairs(FIELDS))
def test_a_field_that_tensors_contradict(copy_of, key, value):
    folder, before = copy_of()
    edit_json(folder, "config.json", **{key: value})
    assert_right_or_refused(before, logits_of(folder))


COMPRESSED_FIELDS = {
    "num_bits": [2, 8],
    "type": ["float"],
    "strategy": ["channel", "tensor", "block"],
    "group_size": [16, 64, 128, None],
    "symmetric": [True],
    "actorder": ["group", "weight"],
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("key", "value"), pairs(COMPRESSED_FIELDS))
def test_a_field_of_compressed_tensors(copy_of, key, value):
    folder, before = copy_of(method="compressed-tensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    assert_right_or_refused(before, logits_of(folder), refused=value != "weight")


CHANGES = {
    "g_idx of zeros": (f"{EXPERT}.g_idx", np.zeros_like, False),
    "g_idx in another order": (f"{EXPERT}.g_idx", lambda g: g[::-1].copy(), None),
    "g_idx that is missing": (f"{EXPERT}.g_idx", lambda _: None, False),
    "a scale more": (f"{EXPERT}.scales", lambda s: np.concatenate([s, s[:1]]), True),
    "a zero point less": (f"{EXPERT}.qzeros", lambda z: z[1:], True),
    "half the columns": (f"{EXPERT}.qweight", lambda q: q[:, ::2].copy(), True),
    "codes of 8 bits": (f"{EXPERT}.qweight", lambda q: np.concatenate([q, q]), True),
    "a dense weight too": (f"{EXPERT}.weight", lambda _: np.ones((32, 64), np.float32), True),
    "a bias": (f"{EXPERT}.bias", lambda _: np.ones(32, np.float16), True),
    "a bias of zeros": (f"{EXPERT}.bias", lambda _: np.zeros(32, np.float16), False),
    "another expert": ("model.layers.1.mlp.experts.8.up_proj.scales", lambda _: np.ones((2, 32), np.float16), True),
    "experts in a dense layer": (
        "model.layers.0.mlp.experts.0.gate_proj.scales",
        lambda _: np.ones(3, np.float16),
        True,
    ),
    "a second correction": ("model.layers.1.mlp.e_score_correction_bias", lambda _: np.ones(8, np.float32), True),
    "no correction": ("model.layers.1.mlp.gate.e_score_correction_bias", lambda _: None, True),
    "a router that is wider": ("model.layers.1.mlp.gate.weight", lambda w: np.concatenate([w, w]), True),
    "a norm of heads that is wider": ("model.layers.1.self_attn.q_norm.weight", lambda w: np.tile(w, 4), True),
    "a scale of attention's 8 bits": (
        "model.layers.1.self_attn.q_proj.weight_scale",
        lambda _: np.ones(64, "f4"),
        True,
    ),
    "another norm": ("model.layers.1.pre_feedforward_layernorm.weight", lambda _: np.ones(64, np.float32), True),
    "a layer more": ("model.layers.2.input_layernorm.weight", lambda _: np.ones(64, np.float32), True),
    "a scale of a cache": ("model.layers.1.self_attn.k_scale", lambda _: np.ones(1, np.float32), False),
}


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", CHANGES)
def test_a_tensor_that_the_config_contradicts(copy_of, name):
    tensor, change, refused = CHANGES[name]
    folder, before = copy_of()
    if name == "g_idx in another order":
        edit_json(folder, "config.json", quantization_config__desc_act=False)
        refused = True
    edit_tensor(folder, tensor, change)
    assert_right_or_refused(before, logits_of(folder), refused)


# ---------------------------------------------------------------------------------------------
# One layer of each format, with random settings

K, N = 128, 16
SETTINGS = {
    "gptq": {"sym": [None, True, False], "desc_act": [None, True, False], "checkpoint_format": ["gptq", "gptq_v2"]},
    "awq": {"zero_point": [None, True, False]},
    "compressed-tensors": {"symmetric": [True, False], "actorder": [None, True, False]},
}
SCHEMES = {"gptq": gptq.GptqScheme, "awq": awq.AwqScheme, "compressed-tensors": CompressedTensorsScheme}


def choices(options):
    return st.fixed_dictionaries({key: st.sampled_from(values) for key, values in options.items()})


@st.composite
def layers(draw):
    """``(format, group sizes of tensors and config, settings of both, symmetric, permuted)``."""
    name = draw(st.sampled_from(sorted(SETTINGS)))
    sizes = st.sampled_from([32, 64, 128, -1])
    return name, draw(sizes), draw(sizes), draw(choices(SETTINGS[name])), *(draw(st.booleans()) for _ in range(2))


@given(layers(), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_one_layer(layer, seed):
    """Tensors of some settings, read by a scheme of others: the weight itself, or an error that names a tensor."""
    name, stored_size, told_size, options, symmetric, permuted = layer
    rng = np.random.default_rng(seed)
    size = K if stored_size == -1 else stored_size
    q, scale = rng.integers(0, 16, (K, N)), rng.uniform(0.5, 2, (K // size, N)).astype(np.float16)
    zero = np.full(scale.shape, 8) if symmetric else rng.integers(1, 16, scale.shape)
    g_idx = np.arange(K, dtype=np.int32) // size
    g_idx = rng.permutation(g_idx) if permuted and name != "awq" else g_idx
    expected = (q - zero[g_idx]) * scale.astype(np.float64)[g_idx]
    if name == "gptq":
        # A file of one checkpoint format under the name of the other cannot be told, unless it is symmetric.
        stored = "gptq" if symmetric and options["sym"] else options["checkpoint_format"]
        tensors = gptq.pack_gptq(q, scale, zero, checkpoint_format=stored)
        parts = dict(zip(("qweight", "scales", "qzeros"), tensors, strict=True))
        parts["g_idx"] = g_idx
    elif name == "awq":
        parts = dict(zip(("qweight", "scales", "qzeros"), awq.pack_awq(q, scale, zero), strict=True))
    else:
        packed, scales, zeros = pack_compressed(q, scale, None if symmetric else zero)
        parts = {"weight_packed": packed, "weight_scale": scales}
        parts |= {} if zeros is None else {"weight_zero_point": zeros}
        parts |= {"weight_g_idx": g_idx} if permuted else {}
    arrays = {f".{suffix}": array for suffix, array in parts.items()}
    scheme = SCHEMES[name](told_size, **options)
    try:
        specs = scheme.tensors(K, N)
        # As QuantizedSource checks them when a folder is opened.
        for suffix, spec in specs.items():
            assert not spec.required or suffix in arrays, f"{suffix} is missing"
        assert not set(arrays) - set(specs), "a tensor that the format does not have"
        order = scheme.g_idx(arrays[scheme.order], K, N) if scheme.order in arrays else None
        weight = scheme.to_canonical({key: array for key, array in arrays.items() if key != scheme.order}, K, N)
    except (ValueError, IndexError, TypeError, KeyError, AssertionError, MarlinError) as error:
        assert str(error)
        return
    rows = np.arange(K) // weight.group_size if order is None else order
    codes = (weight.words[np.arange(K) // 8] >> (4 * (np.arange(K) % 8))[:, None].astype(np.uint32)) & 15
    found = (codes.astype(int) - weight.zero[rows].astype(int)) * weight.scale.astype(np.float64)[rows]
    np.testing.assert_array_equal(found, expected)
