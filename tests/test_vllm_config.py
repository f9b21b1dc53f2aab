"""What the plugin of vLLM decides about layers, with a stand-in for vLLM: which run packed, and which are refused."""

import functools
import types

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

import fake_vllm  # noqa: E402
import torch  # noqa: E402
from asserts import relative_error  # noqa: E402
from checkpoint_files import awq_parts, dequantised, gptq_parts, random_weight  # noqa: E402

from marlin_cy.activations import ACTIVATIONS  # noqa: E402
from marlin_cy.errors import UnsupportedError  # noqa: E402
from marlin_cy.weights.code_types import CODE_TYPES  # noqa: E402

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
ATTENTION, EXPERTS = "model.layers.0.self_attn", "model.layers.0.mlp.experts"


@pytest.fixture
def config(monkeypatch):
    return fake_vllm.install(monkeypatch)


def new_config(config, dtypes, quantization=GPTQ):
    found = config.VllmConfig.from_config(quantization)
    found.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    found.see_tensors(dtypes)
    return found


def gptq_dtypes(*modules):
    return {f"{module}.{part}": dtype for module in modules for part, dtype in (("qweight", "I32"), ("scales", "F16"))}


@pytest.mark.parametrize(
    ("quantization", "user", "expected"),
    [
        (GPTQ, None, "marlin_cy"),
        (GPTQ, "marlin_cy", "marlin_cy"),
        (GPTQ, "gptq", None),
        (GPTQ | {"bits": 3}, None, None),
        ({"quant_method": "fp8"}, None, None),
        ({"quant_method": "mxfp4"}, None, "marlin_cy"),
        ({"quant_method": "gpt_oss_mxfp4"}, None, "marlin_cy"),
        ({"quant_method": "marlin_cy"}, None, "marlin_cy"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, None, "marlin_cy"),
        ({"quant_method": "awq", "bits": "four", "group_size": 128}, None, None),
    ],
)
def test_which_checkpoints(config, quantization, user, expected):
    assert config.VllmConfig.override_quantization_method(quantization, user) == expected


def test_which_layers(config):
    found = new_config(config, gptq_dtypes(*(f"{ATTENTION}.{part}_proj" for part in "qkv"), f"{EXPERTS}.0.up_proj"))
    linear, experts = fake_vllm.LinearBase(), fake_vllm.RoutedExperts(moe_config=None, ckpt_down_proj_name="down_proj")
    assert type(found.get_quant_method(linear, f"{ATTENTION}.qkv_proj")).__name__ == "PackedLinearMethod"
    assert type(found.get_quant_method(linear, f"{ATTENTION}.o_proj")).__name__ == "DenseLinearMethod"
    assert type(found.get_quant_method(experts, "model.layers.1.mlp.experts")) is fake_vllm.UnquantizedFusedMoEMethod
    assert found.get_quant_method(fake_vllm.VocabParallelEmbedding(), "model.embed_tokens") is None
    assert type(found.get_quant_method(fake_vllm.ParallelLMHead(), "lm_head")).__name__ == "DenseHeadMethod"


def test_unquantised_layers_that_vllm_multiplies_itself(monkeypatch):
    """They are left to vLLM."""
    found = new_config(fake_vllm.install(monkeypatch, has_own_kernels=True), gptq_dtypes(f"{EXPERTS}.0.up_proj"))
    method = found.get_quant_method(fake_vllm.LinearBase(), f"{ATTENTION}.o_proj")
    assert type(method) is fake_vllm.UnquantizedLinearMethod
    assert found.get_quant_method(fake_vllm.ParallelLMHead(), "lm_head") is None


def test_refusals_name_the_layer_and_the_reason(config):
    linear = fake_vllm.LinearBase()
    some = new_config(config, gptq_dtypes(f"{ATTENTION}.q_proj"))
    with pytest.raises(UnsupportedError, match=rf"{ATTENTION}.k_proj: not quantised, but vLLM runs it as one layer"):
        some.get_quant_method(linear, f"{ATTENTION}.qkv_proj")
    eight = new_config(config, gptq_dtypes("a.o_proj") | {"b.o_proj.weight": "F8_E4M3"})
    with pytest.raises(UnsupportedError, match=r"b.o_proj: F8_E4M3 weights, not of format 'gptq'"):
        eight.get_quant_method(linear, "b.o_proj")
    two = GPTQ | {"dynamic": {r".*\.b$": {"bits": 2}, r".*\.c$": {"bits": 8}}}
    mixed = new_config(config, gptq_dtypes("m.b", "m.c", f"{EXPERTS}.0.up.c", f"{EXPERTS}.1.up_proj"), two)
    with pytest.raises(UnsupportedError, match=r"^m\.b: .*bits"):
        mixed.get_quant_method(linear, "m.b")
    experts = fake_vllm.RoutedExperts(moe_config=None, ckpt_down_proj_name="down_proj")
    with pytest.raises(UnsupportedError, match=rf"{EXPERTS}: got 2 different formats, expected one for all experts"):
        mixed.get_quant_method(experts, EXPERTS)
    embedding = new_config(config, gptq_dtypes("model.embed_tokens"))
    with pytest.raises(UnsupportedError, match=r"model.embed_tokens: quantised embeddings"):
        embedding.get_quant_method(fake_vllm.VocabParallelEmbedding(), "model.embed_tokens")


def test_no_safetensors(config):
    with pytest.raises(UnsupportedError, match=r"some/model: got no \*\.safetensors"):
        config.VllmConfig.from_config(GPTQ).maybe_update_config("some/model")


def test_options(monkeypatch):
    given = {"marlin_cy": {"compute_dtype": "int8", "num_threads": 1}}
    config = fake_vllm.install(monkeypatch, additional_config=given)
    assert config.options() == given["marlin_cy"]
    context = config.contexts(**config.options()).ctx
    assert (context.compute_dtype, context.num_threads) == ("int8", 1)
    config = fake_vllm.install(monkeypatch, additional_config={"marlin_cy": {"threads": 1}})
    with pytest.raises(ValueError, match="got 'threads', expected some of compute_dtype, num_threads, isa"):
        config.options()


# ---------------------------------------------------------------------------------------------
# A linear layer through the loader's calls


def load(method, layer, parts, shard=None):
    """What vLLM's loader does with a layer of the checkpoint."""
    for name, array in parts.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, torch.from_numpy(np.ascontiguousarray(array)), *([shard] if shard else []))


def new_linear(config, k, widths, rank=0, ranks=1, sizes=None, quantization=GPTQ, part="gptq"):
    names = [f"p{number}" for number in range(len(widths))]
    found = new_config(config, gptq_dtypes(*names), quantization)
    found.packed_modules_mapping = {"all": names}
    layer = fake_vllm.LinearBase(tp_rank=rank, tp_size=ranks, output_sizes=sizes or widths)
    method = found.get_quant_method(layer, "all" if len(widths) > 1 else "p0")
    method.create_weights(layer, k, widths, k if sizes is None else 2 * k, sum(widths), torch.float32)
    return method, layer


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_parts_side_by_side(config, rng, form):
    """Three layers of the checkpoint, of which the second is in another order of K."""
    make = {"gptq": gptq_parts, "awq": awq_parts}[form]
    quantization = GPTQ | ({"desc_act": True} if form == "gptq" else {"quant_method": "awq"})
    method, layer = new_linear(config, 64, [32, 16, 16], quantization=quantization)
    x, expected = torch.from_numpy(rng.standard_normal((3, 64)).astype(np.float32)), []
    for number, width in enumerate(method._widths):
        g_idx = np.arange(64, dtype=np.int32) // 32
        g_idx = rng.permutation(g_idx) if form == "gptq" and number == 1 else g_idx
        q, scale, zero = random_weight(rng, 64, width, 32, checkpoint_format="gptq")
        zero = np.minimum(zero, 15)
        load(method, layer, make(q, scale, zero, g_idx, "gptq"), shard=("q", "k", "v")[number])
        expected.append(x.double() @ torch.from_numpy(dequantised(q, scale, zero, g_idx)))
    method.process_weights_after_loading(layer)
    assert not list(layer.parameters())
    assert len(method._linears) == (3 if form == "gptq" else 1)
    expected = torch.cat(expected, dim=1)
    assert (method.apply(layer, x).double() - expected).norm() <= 1e-4 * expected.norm()
    compiled = torch.compile(lambda x: method.apply(layer, x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), method.apply(layer, x), rtol=0, atol=0)
    ones = torch.ones(64)
    assert (method.apply(layer, x, ones).double() - expected - 1).norm() <= 1e-4 * expected.norm()


def test_missing_and_invalid_tensors(config, rng):
    method, layer = new_linear(config, 64, [16])
    with pytest.raises(UnsupportedError, match=r"^p0: got the parts \[\], expected 1 parts"):
        method.process_weights_after_loading(layer)
    q, scale, zero = random_weight(rng, 64, 16, 32)
    parts = gptq_parts(q, scale, zero, np.arange(64, dtype=np.int32) // 32, "gptq")
    method, layer = new_linear(config, 64, [16])
    load(method, layer, {name: array for name, array in parts.items() if name != "scales"})
    with pytest.raises(UnsupportedError, match=r"^p0: got no tensor 'scales' of format 'gptq'"):
        method.process_weights_after_loading(layer)
    method, layer = new_linear(config, 64, [16])
    load(method, layer, parts | {"scales": np.full_like(parts["scales"], np.nan)})
    with pytest.raises(UnsupportedError, match=r"^p0: scales: .*finite"):
        method.process_weights_after_loading(layer)
    with pytest.raises(UnsupportedError, match=r"^p0: k: got 40, expected a positive multiple of 32"):
        new_linear(config, 40, [16])


def test_activations(config):
    from marlin_cy.integrations.vllm.experts import activation_of

    layer = types.SimpleNamespace(activation=types.SimpleNamespace(value="silu"), swiglu_limit=10.0)
    assert activation_of(layer, "experts") == "silu_clamp10"
    layer.swiglu_limit = 8.0
    with pytest.raises(UnsupportedError, match=r"experts: activation 'silu' with limit, alpha and beta \(8.0, None"):
        activation_of(layer, "experts")


# ---------------------------------------------------------------------------------------------
# Routed experts through the loader's calls

EXPERT_SIZES = {"num_experts": 3, "hidden": 64, "inter": 128}
IDS, WEIGHTS = [[0, 2], [1, 0], [2, 1]], [[0.75, 0.25], [0.5, 0.5], [1.0, 0.125]]


def new_experts(config, quantization, dtypes, rank=0, ranks=1, local=None):
    """A method for this process's share, and its layer; ``local`` is the expert map of expert parallelism."""
    found = new_config(config, dtypes, quantization)
    routing = types.SimpleNamespace(name="RenormalizeNaive")
    moe = types.SimpleNamespace(tp_rank=rank, tp_size=ranks, routing_method=routing, is_lora_enabled=False)
    value = "swigluoai" if quantization["quant_method"] == "mxfp4" else "silu"
    layer = fake_vllm.RoutedExperts(
        moe_config=moe,
        ckpt_down_proj_name="down_proj",
        activation=types.SimpleNamespace(value=value),
        top_k=2,
        apply_router_weight_on_input=False,
        renormalize=True,
        use_grouped_topk=False,
        custom_routing_function=None,
        expert_map=None if local is None else torch.tensor(local),
    )
    method = found.get_quant_method(layer, EXPERTS)
    held = EXPERT_SIZES["num_experts"] if local is None else max(local) + 1
    inter = EXPERT_SIZES["inter"] // ranks
    method.create_weights(layer, held, EXPERT_SIZES["hidden"], inter, torch.float32)
    return method, layer


def output(method, layer, x):
    method.process_weights_after_loading(layer)
    assert not list(layer.parameters())
    return method.apply(layer, x, torch.tensor(WEIGHTS), torch.tensor(IDS), None, None).double().numpy()


def expected_output(x, weights, activate):
    """float64; ``weights`` has each expert's ``(gate, up, down)``, each a matrix and a bias."""
    found = np.zeros((3, EXPERT_SIZES["hidden"]))
    for token, (ids, routing) in enumerate(zip(IDS, WEIGHTS, strict=True)):
        for expert, factor in zip(ids, routing, strict=True):
            gate, up, down = weights[expert]
            row = x[token].double().numpy()
            found[token] += factor * (activate(row @ gate[0] + gate[1], row @ up[0] + up[1]) @ down[0] + down[1])
    return found


def random_experts(rng, desc_act=False):
    """``(weights, quantization, tensors)``: as for :func:`expected_output`, and GPTQ's configuration and tensors."""
    hidden, inter = EXPERT_SIZES["hidden"], EXPERT_SIZES["inter"]
    group_size = 64 if desc_act else 32  # halves of groups in another order are groups of half the size
    weights, tensors = [], []
    for expert in range(EXPERT_SIZES["num_experts"]):
        orders = {k: np.arange(k, dtype=np.int32) // group_size for k in (hidden, inter)}
        if desc_act:
            orders = {k: rng.permutation(order) for k, order in orders.items()}
        weights.append([])
        for shard, k, n in (("w1", hidden, inter), ("w3", hidden, inter), ("w2", inter, hidden)):
            q, scale, zero = random_weight(rng, k, n, group_size)
            bias = rng.standard_normal(n).astype(np.float16)
            weights[-1].append((dequantised(q, scale, zero, orders[k]), bias.astype(float)))
            parts = gptq_parts(q, scale, zero, orders[k], "gptq") | {"bias": bias}
            tensors += [(expert, shard, name, array) for name, array in parts.items()]
    return weights, GPTQ | {"desc_act": desc_act, "group_size": group_size}, tensors


def load_experts(layer, tensors):
    for expert, shard, name, array in tensors:
        parameter = getattr(layer, f"{'w2' if shard == 'w2' else 'w13'}_{name}")
        loaded = torch.from_numpy(np.ascontiguousarray(array))
        assert parameter.weight_loader(
            param=parameter, loaded_weight=loaded, shard_id=shard, expert_id=expert, return_success=True
        )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("desc_act", [False, True])
def test_experts_and_their_shares(config, rng, ranks, desc_act):
    """The sum of all processes' outputs, with biases, and with rows of K in other orders."""
    weights, quantization, tensors = random_experts(rng, desc_act)
    x = torch.from_numpy(rng.standard_normal((3, EXPERT_SIZES["hidden"])).astype(np.float32))
    found = 0.0
    for rank in range(ranks):
        method, layer = new_experts(config, quantization, gptq_dtypes(f"{EXPERTS}.0.up_proj", DOWN), rank, ranks)
        load_experts(layer, tensors)
        found += output(method, layer, x)
    expected = expected_output(x, weights, ACTIVATIONS["silu"].reference)
    assert relative_error(found, expected) <= 2e-4


DOWN = f"{EXPERTS}.0.down_proj"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalised", [True, False])
def test_experts_route(config, rng, normalised, dtype):
    """Where vLLM would route by a plain softmax, the logits give the output that vLLM's experts and weights give."""
    _, quantization, tensors = random_experts(rng)
    method, layer = new_experts(config, quantization, gptq_dtypes(f"{EXPERTS}.0.up_proj", DOWN))
    layer.renormalize = normalised
    load_experts(layer, tensors)
    assert not method.is_monolithic
    method.process_weights_after_loading(layer)
    assert method.is_monolithic
    x = torch.from_numpy(rng.standard_normal((5, EXPERT_SIZES["hidden"])).astype(np.float32)).to(dtype)
    logits = torch.from_numpy(rng.permuted(np.tile([-1.5, 0.25, 1.0], (5, 1)), axis=1).astype(np.float32)).to(dtype)
    weights, ids = torch.topk(logits.double().softmax(dim=-1), 2)
    if normalised:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    found = method.apply_monolithic(layer, x, logits)
    assert found.dtype is dtype
    expected = method.apply(layer, x, weights.float(), ids, None, None)
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-6 * float(expected.abs().max()))
    run = functools.partial(method.apply_monolithic, layer)
    assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(x, logits), found)


def other_routing(layer):
    layer.moe_config.routing_method.name = "DeepSeekV3"


ROUTED_BY_VLLM = {
    "sigmoid": other_routing,
    "custom": lambda layer: setattr(layer, "custom_routing_function", len),
    "groups": lambda layer: setattr(layer, "use_grouped_topk", True),
    "some experts": lambda layer: setattr(layer, "expert_map", torch.tensor([0, -1, 1])),
    "lora": lambda layer: setattr(layer.moe_config, "is_lora_enabled", True),
}


@pytest.mark.parametrize("change", ROUTED_BY_VLLM.values(), ids=ROUTED_BY_VLLM)
def test_routing_that_is_left_to_vllm(config, change):
    from marlin_cy.integrations.vllm.experts import is_plain_softmax

    _, layer = new_experts(config, GPTQ, gptq_dtypes(f"{EXPERTS}.0.up_proj", DOWN))
    assert is_plain_softmax(layer)
    change(layer)
    assert not is_plain_softmax(layer)


def test_experts_of_gpt_oss(config, rng):
    """Tensors of all experts, with alternating gate and up columns and biases, as vLLM's loader reshapes them."""
    experts, hidden, inter = EXPERT_SIZES.values()
    # The names of the files, as vLLM's mapper for them changes them.
    names = {f"{EXPERTS}.{part}_blocks": "U8" for part in ("w13_weight", "w2_weight")}
    method, layer = new_experts(config, {"quant_method": "mxfp4"}, names)
    dense = {}
    for product, k, n in (("w13", hidden, 2 * inter), ("w2", inter, hidden)):
        codes, exponents = rng.integers(0, 16, (experts, n, k)), rng.integers(117, 125, (experts, n, k // 32))
        bias = rng.standard_normal((experts, n)).astype(np.float32)
        packed = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
        parts = {"weight": packed, "weight_scale": exponents.astype(np.uint8), "bias": bias}
        for name, array in parts.items():
            parameter = getattr(layer, f"{product}_{name}")
            parameter.weight_loader(parameter, torch.from_numpy(array), weight_name=name, shard_id=None, expert_id=None)
        scales = np.repeat(2.0 ** (exponents - 127.0), 32, axis=2)
        dense[product] = (CODE_TYPES["e2m1"].decode_table[codes] * scales).transpose(0, 2, 1), bias.astype(float)
    first, down = dense["w13"], dense["w2"]
    weights = [
        [
            *((first[0][expert][:, half::2], first[1][expert][half::2]) for half in (0, 1)),
            (down[0][expert], down[1][expert]),
        ]
        for expert in range(experts)
    ]
    x = torch.from_numpy(rng.standard_normal((3, hidden)).astype(np.float32))
    expected = expected_output(x, weights, ACTIVATIONS["swigluoai"].reference)
    assert relative_error(output(method, layer, x), expected) <= 2e-4
