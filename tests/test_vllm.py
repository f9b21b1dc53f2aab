"""Models in vLLM whose layers run packed by the plugin: ``tests/vllm.sh`` runs this."""

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from marlin_cy import cli, load_model
from marlin_cy.commands.run import BUILT_IN

pytestmark = pytest.mark.vllm

pytest.importorskip("vllm", reason="vLLM is not installed")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")

# The engine runs in this process, and leaves the threads where they are.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

from vllm_models import engine, said_by_load, said_by_vllm, write_format  # noqa: E402

FOLDER = files("marlin_cy") / BUILT_IN
ROOT = Path(__file__).parents[1]
TEXT = "def __init__(self, name):"
NEW_TOKENS = 31
"""After :data:`TEXT`. Their two largest logits are 0.14 apart at least. Those of the next token are 0.001 apart, which
bfloat16 cannot tell."""

NEW_TOKENS_TOGETHER = 6
TOLERANCE = 2e-3
"""Of log-probabilities in float32: both sides multiply with 16-bit activations, whose relative error is 2.5e-5."""


def check(folder, **options):
    """The same tokens and log-probabilities as by ``load``."""
    with engine(folder, **options) as llm:
        tokens, logprobs = said_by_vllm(llm)
    expected_tokens, expected = said_by_load(folder)
    assert tokens == expected_tokens
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_built_in_model(dtype):
    """The same greedy text as by the library's decoder."""
    from vllm import SamplingParams

    with engine(FOLDER, dtype=dtype, skip_tokenizer_init=False) as llm:
        (found,) = llm.generate([TEXT], SamplingParams(temperature=0, max_tokens=NEW_TOKENS), use_tqdm=False)
    model = load_model(FOLDER, context_length=64)
    assert found.outputs[0].text == "".join(piece.text for piece in model.generate(TEXT, max_new_tokens=NEW_TOKENS))


FORMS = ["gptq", "gptq, desc_act", "awq", "compressed-tensors", "auto-round"]


@pytest.mark.parametrize("form", FORMS)
def test_formats(tmp_path, form):
    check(write_format(tmp_path, form))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral"])
def test_families(tmp_path, model_type):
    """A shared expert and biases of attention; experts with other names."""
    check(write_format(tmp_path, "gptq", model_type))


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0}
YARN |= {"original_max_position_embeddings": 64, "truncate": False}


def test_gpt_oss(tmp_path):
    """MXFP4 experts in tensors of all experts, with biases."""
    check(write_format(tmp_path, "mxfp4", "gpt_oss", rope_parameters=YARN))


def test_packed_folder(tmp_path):
    """Layers are mapped in place."""
    assert cli.main(["pack", str(FOLDER), str(tmp_path / "packed")]) == 0
    check(tmp_path / "packed")


def test_compiled():
    """``torch.compile`` passes over packed layers."""
    check(FOLDER, enforce_eager=False, compilation_config={"backend": "eager"})


def attention_of(model):
    """The class of the attention of each layer."""
    return {type(layer.impl).__name__ for layer in model.modules() if hasattr(layer, "kv_cache")}


def test_attention(tmp_path):
    """Prompts of a part of a block and of several blocks: the same tokens together and alone. Together, one is read in
    two steps."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=NEW_TOKENS_TOGETHER, ignore_eos=True)
    prompts = [{"prompt_token_ids": [3 + (7 * i + i // 5) % 90 for i in range(length)]} for length in (5, 300, 130)]
    sizes = {"max_model_len": 320, "max_num_seqs": 3, "max_num_batched_tokens": 320}
    with engine(write_format(tmp_path, "gptq", max_position_embeddings=512), **sizes) as llm:
        classes = llm.apply_model(attention_of)
        together = llm.generate(prompts, wanted, use_tqdm=False)
        alone = [llm.generate([prompt], wanted, use_tqdm=False)[0] for prompt in prompts]
    assert classes == [{"CPUAttentionBackendImpl" if torch.cpu._is_avx512_supported() else "BlockAttention"}]
    assert [found.outputs[0].token_ids for found in together] == [found.outputs[0].token_ids for found in alone]


@pytest.mark.parametrize("options", [{}, {"enable_expert_parallel": True}], ids=["columns", "experts"])
def test_two_processes(tmp_path, options):
    """Tensor and expert parallelism: each process packs its share."""
    check(write_format(tmp_path, "gptq"), tensor_parallel_size=2, **options)


def test_benchmark(tmp_path):
    """``python -m bench vllm`` measures the plugin beside both others."""
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "bench", "vllm", "--quick", "--eager", "--threads", "1", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text())["figures"]
    assert all(found["ratios"].keys() == {"load", "bfloat16"} for found in figures.values())
