"""What loading refuses, ``marlin-cy inspect`` says from the headers of the files: no value of a weight is read.

Each case changes a checkpoint so that its headers or its config show a fault.
"""

import json
import re
import shutil

import numpy as np
import pytest
from checkpoint_files import edit_json, edit_tensor

from marlin_cy import open_checkpoint
from marlin_cy.checkpoints.packed_writer import write_packed
from marlin_cy.cli import main
from marlin_cy.decoder.build import build_plan
from marlin_cy.errors import MarlinError

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

import family_models  # noqa: E402
from family_models import write_family  # noqa: E402
from language_models import save_tensors, write_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from marlin_cy.integrations.problems import transformers_problems  # noqa: E402
from marlin_cy.integrations.transformers import load  # noqa: E402

LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """``source(model_type)``: the folder of a checkpoint that is as it should be."""
    made = {}

    def source(model_type):
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            write = write_family if model_type == "dots1" else write_model
            with torch.no_grad():
                made[model_type], _ = write(folder, model_type)
        return made[model_type]

    return source


@pytest.fixture
def copy_of(sources, tmp_path):
    return lambda model_type: shutil.copytree(sources(model_type), tmp_path / "copy")


def tensor(name, change):
    return lambda folder: edit_tensor(folder, name, change)


def config(**changes):
    return lambda folder: edit_json(folder, "config.json", **changes)


def without(_):
    return None


def wider(array):
    return np.concatenate([array, array])


def integers(array):
    return array.astype(np.int8)


CASES = {
    # (model, change, in "refused" too: by loading in transformers, and as single layers)
    "attention's weight that is missing": ("dots1", tensor(f"{LAYER}.self_attn.q_proj.qweight", without), False),
    "attention's scales that are missing": ("dots1", tensor(f"{LAYER}.self_attn.q_proj.scales", without), True),
    "attention that is wider": ("dots1", config(head_dim=32), False),
    "a router that is wider": ("dots1", tensor(f"{LAYER}.mlp.gate.weight", wider), True),
    "a router that is missing": ("dots1", tensor(f"{LAYER}.mlp.gate.weight", without), True),
    "a correction bias that is missing": (
        "dots1",
        tensor(f"{LAYER}.mlp.gate.e_score_correction_bias", without),
        True,
    ),
    "a shared expert that is wider": ("dots1", config(n_shared_experts=3), True),
    "an unknown tensor in a block": ("dots1", tensor(f"{LAYER}.mlp.gate.other", lambda _: np.ones(8, "f4")), True),
    "an unknown norm": ("dots1", tensor(f"{LAYER}.post_norm.weight", lambda _: np.ones(64, "f4")), False),
    "a norm that is missing": ("dots1", tensor(f"{LAYER}.input_layernorm.weight", without), False),
    "a norm that is wider": ("dots1", tensor(f"{LAYER}.input_layernorm.weight", wider), False),
    "an embedding that is missing": ("dots1", tensor("model.embed_tokens.weight", without), False),
    "a head that is missing": ("dots1", tensor("lm_head.weight", without), False),
    "an embedding of integers": ("dots1", tensor("model.embed_tokens.weight", integers), False),
    "a dense layer's network that is wider": ("dots1", config(intermediate_size=192), False),
    "int8 beside a scale": (
        "dots1",
        tensor(f"{LAYER}.self_attn.q_proj.weight_scale", lambda _: np.ones(64, "f4")),
        True,
    ),
    "settings that are not supported": ("dots1", config(mlp_bias=True), False),
    "a bias that is missing": ("gpt_oss", tensor(f"{LAYER}.self_attn.q_proj.bias", without), False),
    "experts' biases that are missing": (
        "gpt_oss",
        lambda folder: [
            edit_tensor(folder, f"{LAYER}.mlp.experts.{name}_proj_bias", without) for name in ("gate_up", "down")
        ],
        False,
    ),
    "sinks that are missing": ("gpt_oss", tensor(f"{LAYER}.self_attn.sinks", without), False),
    "latent attention that is wider": ("deepseek_v3", config(kv_lora_rank=64), False),
    "kv_b that is missing": ("deepseek_v3", tensor(f"{LAYER}.self_attn.kv_b_proj.qweight", without), False),
    "a convolution that is missing": ("qwen3_next", tensor("model.layers.0.linear_attn.conv1d.weight", without), False),
    "linear attention that is wider": ("qwen3_next", config(linear_num_value_heads=8), False),
}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", CASES)
def test_what_the_decoder_refuses(copy_of, capsys, name):
    model_type, change, is_problem = CASES[name]
    folder = copy_of(model_type)
    change(folder)
    with pytest.raises(MarlinError) as raised, open_checkpoint(folder, num_threads=1) as checkpoint:
        build_plan(checkpoint, context_length=4)
    assert main(["inspect", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert bool(report["refused"]) == is_problem
    found = {report["decoder"], *report["refused"]}
    # A fault may show in several ways. The tensor, the module or the key is the same.
    named = named_in(raised.value)
    assert str(raised.value) in found or any(named in str(reason) for reason in found), (raised.value, found)


def named_in(error):
    """The tensor or module, without ``.weight``, or the key of ``config.json`` that an error names."""
    found = re.search(r"tensor '([^']+)'|(model\.[\w.]+)|config\.json: (\w+)", str(error))
    return next(part for part in found.groups() if part).removesuffix(".weight")


@pytest.mark.parametrize("model_type", ["dots1", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_nothing_is_refused_without_a_fault(sources, tmp_path, capsys, model_type):
    """Also of packed folders."""
    with open_checkpoint(sources(model_type), num_threads=1) as checkpoint:
        write_packed(checkpoint, tmp_path / "packed")
    for folder in (sources(model_type), tmp_path / "packed"):
        assert main(["inspect", str(folder), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["decoder"], report["refused"]) == (None, [])


def test_a_dtype_that_no_model_has(copy_of, capsys):
    """Such as E5M2 without a scale, which would be loaded as it is."""
    folder = copy_of("dots1")
    tensors = load_file(folder / "model.safetensors")
    name = f"{LAYER}.input_layernorm.weight"
    save_tensors(folder, tensors | {name: tensors[name].to(torch.float8_e5m2)})
    message = rf"tensor '{name}': dtype F8_E5M2 is not supported outside of quantised layers"
    with open_checkpoint(folder) as checkpoint:
        assert [re.search(message, str(problem)) is not None for problem in checkpoint.problems()] == [True]


def test_layers_of_another_format_in_a_packed_folder(sources, tmp_path):
    with open_checkpoint(sources("dots1"), num_threads=1) as checkpoint:
        write_packed(checkpoint, tmp_path / "packed")
    file = max((tmp_path / "packed").glob("model-*.safetensors")).name
    edit_tensor(tmp_path / "packed", "lm_head.SCB", lambda _: np.ones(96, np.float32), file)
    index = "model.safetensors.index.json"
    stored = json.loads((tmp_path / "packed" / index).read_text())
    stored["weight_map"]["lm_head.SCB"] = file
    (tmp_path / "packed" / index).write_text(json.dumps(stored))
    with open_checkpoint(tmp_path / "packed") as checkpoint:
        [problem] = checkpoint.problems()
    assert re.search(r"lm_head: F32 weights with SCB, which is not a layer of format 'packed'", str(problem))


# ---------------------------------------------------------------------------------------------
# The model's class in transformers


@pytest.mark.sampled(3)
@pytest.mark.parametrize("model_type", family_models.CONFIGS)
def test_transformers_refuses_nothing_without_a_fault(tmp_path, model_type):
    with torch.no_grad():
        folder, _ = write_family(tmp_path, model_type)
    with open_checkpoint(folder) as checkpoint:
        assert transformers_problems(checkpoint) == []


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", [name for name, (model_type, _, _) in CASES.items() if model_type == "dots1"])
def test_what_transformers_refuses(copy_of, capsys, name):
    """By ``Checkpoint.problems``, or by the comparison with the class."""
    _, change, _ = CASES[name]
    folder = copy_of("dots1")
    change(folder)
    assert main(["inspect", str(folder), "--json", "--transformers"]) == 0
    refused = json.loads(capsys.readouterr().out)["refused"]
    try:
        load(folder, num_threads=1)
    except MarlinError as error:
        assert any(named_in(error) in reason for reason in refused), (error, refused)
    else:
        # What single layers refuse; transformers ignores a setting, or computes with a dtype that the decoder lacks.
        assert name in ("an unknown tensor in a block", "settings that are not supported", "an embedding of integers")
