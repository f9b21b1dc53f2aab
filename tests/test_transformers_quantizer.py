"""``from_pretrained`` of transformers on folders whose layers run packed: ``marlin_cy.integrations.quantizer``."""

import re
from importlib.resources import files

import pytest

from marlin_cy import cli
from marlin_cy.commands.run import BUILT_IN
from marlin_cy.errors import CheckpointError, UnsupportedError

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from checkpoint_files import edit_json, edit_tensor  # noqa: E402
from family_models import WITHOUT_A_ROW, write_family  # noqa: E402
from language_models import WITH_QUANTISED_HEAD, write_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig  # noqa: E402
from transformers.quantizers import auto  # noqa: E402

from marlin_cy.integrations.modules import MarlinLinear  # noqa: E402
from marlin_cy.integrations.packing import name_pattern  # noqa: E402
from marlin_cy.integrations.transformers import MarlinCyConfig, load, register  # noqa: E402

FOLDER = str(files("marlin_cy") / BUILT_IN)
IDS = torch.tensor([list(b"def quicksort(values):")])
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_next")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def registries():
    """The registries of transformers, which are as before after the test."""
    found = [auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING]
    before = [dict(registry) for registry in found]
    yield
    for registry, entries in zip(found, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture(scope="module")
def expected():
    """Logits by ``load``, in the dtype of the folder's config."""
    with torch.no_grad():
        return load(FOLDER, num_threads=1, dtype="bfloat16")(IDS).logits


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, config=MarlinCyConfig.for_folder(FOLDER, num_threads=1))


# ---------------------------------------------------------------------------------------------
# Ways to load


def test_with_a_config(model, expected):
    assert torch.equal(model(IDS).logits, expected)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert sum(isinstance(module, MarlinLinear) for module in model.modules()) == 16
    assert model.config.quantization_config.to_dict() == {"quant_method": "marlin_cy"}
    assert "marlin_cy" in repr(model.config)


def test_a_packed_folder(tmp_path, expected):
    assert cli.main(["pack", FOLDER, str(tmp_path / "packed")]) == 0
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(packed(IDS).logits, expected)


def test_a_registered_method(registries, expected):
    register("gptq", "awq")
    registered = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert torch.equal(registered(IDS).logits, expected)
    wide = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")
    assert torch.equal(wide(IDS).logits, load(FOLDER, dtype="float32", num_threads=1)(IDS).logits)


def test_pipelines(registries, model):
    register("gptq")
    pipeline = transformers.pipeline("text-generation", model=FOLDER)
    (answer,) = pipeline("def f(", max_new_tokens=8, do_sample=False)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = model.generate(**tokenizer("def f(", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert answer["generated_text"] == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_assisted_generation(model, expected):
    """The model assists itself."""
    plain = model.generate(IDS, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=12, do_sample=False, assistant_model=model), plain)


@pytest.mark.sweep  # its threads wait for each other
def test_continuous_batching():
    """Transformers' own, with its paged attention: each prompt has the tokens that it has alone."""
    options = {"config": MarlinCyConfig.for_folder(FOLDER, num_threads=1), "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(FOLDER, **options)
    ends = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 256, "pad_token_id": 256}
    alone = transformers.GenerationConfig(**ends)
    blocks = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)  # by default all of the memory
    prompts = [list(b"def f("), list(b"import numpy as")]
    batch = model.generate_batch(
        inputs=prompts, generation_config=alone, continuous_batching_config=blocks, progress_bar=False
    )
    written = [list(one.generated_tokens) for one in batch.values()]
    expected = [model.generate(torch.tensor([one]), generation_config=alone)[0, len(one) :].tolist() for one in prompts]
    assert written == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family):
    folder = write_model(tmp_path / family, family)[0]
    ids = torch.arange(1, 12)[None]
    loaded = load(folder, num_threads=1)
    config = MarlinCyConfig.for_folder(folder, num_threads=1)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=loaded.dtype)
    assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_a_family_without_a_row(tmp_path):
    folder = write_family(tmp_path, next(iter(WITHOUT_A_ROW)))[0]
    loaded = load(folder, num_threads=1)
    config = MarlinCyConfig.for_folder(folder, num_threads=1)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=loaded.dtype)
    assert torch.equal(model(IDS[:, :9] % 80).logits, loaded(IDS[:, :9] % 80).logits)


def test_a_head_of_its_own(tmp_path):
    """The files have a quantised head, whatever ``tie_word_embeddings`` says; it stays when weights are tied again."""
    folder = write_model(tmp_path, "qwen3_moe", not_quantised=WITH_QUANTISED_HEAD)[0]
    edit_json(folder, "config.json", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder, config=MarlinCyConfig.for_folder(folder, num_threads=1))
    model.tie_weights()
    assert isinstance(model.lm_head, MarlinLinear)
    ids = torch.arange(1, 12)[None]
    assert torch.equal(model(ids).logits, load(folder, dtype=model.dtype, num_threads=1)(ids).logits)


def test_options_reach_the_backend(tmp_path):
    told = []
    config = MarlinCyConfig.for_folder(
        FOLDER, num_threads=3, compute_dtype="int8", progress=lambda *state: told.append(state)
    )
    model = AutoModelForCausalLM.from_pretrained(FOLDER, config=config)
    linear = next(module for module in model.modules() if isinstance(module, MarlinLinear))
    assert linear.packed.contexts.ctx.num_threads == 3
    coarse = load(FOLDER, dtype="bfloat16", num_threads=1, compute_dtype="int8")
    assert torch.equal(model(IDS).logits, coarse(IDS).logits)
    assert told[-1][:2] == (20, 20)


# ---------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("compiler", ["eager", pytest.param("aot_eager", marks=pytest.mark.sweep)])
def test_compile_passes_over_packed_layers(model, expected, compiler):
    """The whole model is one graph, and its logits have the same bits."""
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend=compiler, fullgraph=True)
    assert torch.equal(compiled(IDS, use_cache=False).logits, expected)


def test_operators_say_what_they_give(model):
    """PyTorch's own checks of an operator: its schema, its shapes and its use in graphs."""
    linear = next(module for module in model.modules() if isinstance(module, MarlinLinear))
    experts = model.model.layers[0].mlp.experts
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(3, 256, dtype=dtype)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            torch.ops.marlin_cy.linear, (hidden, linear.packed.number, linear.out_features), test_utils=tests
        )
        chosen, weights = torch.tensor([[0, 1], [2, 3], [7, 0]]), torch.rand(3, 2, dtype=dtype)
        torch.library.opcheck(
            torch.ops.marlin_cy.experts, (hidden, chosen, weights, experts.packed.number), test_utils=tests
        )


# ---------------------------------------------------------------------------------------------
# What is refused


def test_unknown_methods(registries):
    with pytest.raises(ValueError, match="methods: got 'bitnet', expected some of gptq, awq"):
        register("gptq", "bitnet")
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"].__name__ == "GptqHfQuantizer"


def test_other_devices():
    config = MarlinCyConfig.for_folder(FOLDER)
    quantizer = auto.AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    for device_map in ("cuda", {"": "cuda:0"}, {"model": "cpu", "lm_head": "cuda"}):
        with pytest.raises(UnsupportedError, match="device_map: got 'cuda.*, expected 'cpu'"):
            quantizer.validate_environment(device_map=device_map)
    for device_map in (None, "cpu", {"": "cpu"}, "auto"):
        quantizer.validate_environment(device_map=device_map)
    assert quantizer.update_device_map("auto") == {"": "cpu"}


def test_damaged_checkpoints(tmp_path):
    folder = write_model(tmp_path / "model", "qwen3_moe", dtype=torch.bfloat16)[0]
    config = MarlinCyConfig.for_folder(folder)
    edit_json(folder, "config.json", quantization_config__bits=5)
    with pytest.raises((CheckpointError, UnsupportedError), match="bits"):
        AutoModelForCausalLM.from_pretrained(folder, config=config)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=re.escape(str(folder / "config.json"))):
        MarlinCyConfig.for_folder(folder)


def test_problems_are_reported_before_layers_are_packed(tmp_path):
    """As by ``load``, with the same words."""
    folder = write_model(tmp_path, "qwen3_moe")[0]
    edit_tensor(folder, "model.layers.1.self_attn.q_proj.scales", lambda array: array[:1])
    told = []
    config = MarlinCyConfig.for_folder(folder, progress=lambda *state: told.append(state))
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.scales") as refused:
        AutoModelForCausalLM.from_pretrained(folder, config=config)
    with pytest.raises(CheckpointError) as by_load:
        load(folder, progress=lambda *state: told.append(state))
    assert str(refused.value) == str(by_load.value)
    assert not told


def test_what_cannot_be_saved_or_trained(model, tmp_path):
    assert not model.hf_quantizer.is_serializable()
    assert not model.hf_quantizer.is_trainable
    with pytest.raises(Exception, match="not serializable|cannot be saved|marlin_cy"):
        model.save_pretrained(tmp_path / "saved")


def test_patterns_of_names():
    (pattern,) = {
        name_pattern(f"layers.{layer}.experts.{expert}.w.qweight") for layer in range(9) for expert in range(9)
    }
    assert re.search(pattern, "model.layers.10.experts.127.w.qweight")
    assert not re.search(pattern, "model.layers.10.experts.127.w.qweight.other")
    assert not re.search(pattern, "model.otherlayers.1.experts.1.w.qweight")
