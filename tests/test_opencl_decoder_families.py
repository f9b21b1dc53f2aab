"""Tiny models of every family by OpenCL launches: their logits against the CPU's decoder, and sequences with state."""

import numpy as np
import pytest

pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

import language_models  # noqa: E402
from asserts import relative_error  # noqa: E402
from language_models import write_model  # noqa: E402

from marlin_cy.decoder.load import load_model  # noqa: E402

TOKENS = np.random.default_rng(1).integers(1, language_models.VOCABULARY, 40).astype(np.int32)
BOUND = 2e-3
"""Relative, Frobenius. Tokens whose experts differ by their routers' rounding are left out: at most one in fifty."""

pytestmark = pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")
torch.set_num_threads(1)


def models(tmp_path, backend, model_type, **changes):
    """The CPU's model and the device's, with float32 caches."""
    folder, _ = write_model(tmp_path, model_type, **changes)
    options = {"cache_dtype": "float32", "cache_tokens": 512}
    return load_model(folder, num_threads=1, **options), load_model(folder, backend, **options)


def assert_same_logits(reference, model):
    """A prompt in one piece, and in several."""
    expected = reference.forward(TOKENS, all_logits=True)
    whole = model.forward(TOKENS, sequence=model.new_sequence(), all_logits=True)
    sequence = model.new_sequence()
    parts = [
        model.forward(TOKENS[begin:end], sequence=sequence, all_logits=True)
        for begin, end in ((0, 7), (7, 8), (8, 10), (10, 40))
    ]
    for logits in (whole, np.concatenate(parts)):
        errors = np.linalg.norm(logits - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert np.isfinite(errors).all()
        kept = errors <= np.sort(errors)[-1 - len(errors) // 50]
        assert relative_error(logits[kept], expected[kept]) < BOUND


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model_type", language_models.CONFIGS)
def test_every_family(tmp_path, device_alone, model_type):
    assert_same_logits(*models(tmp_path, device_alone, model_type))


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2_moe", {"kept": ["shared_expert."]}),
        ("deepseek_v2", {"kept": ["self_attn"]}),
        ("deepseek_v3", {"q_lora_rank": None, "kept": ["shared_experts"]}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8, "attention_bias": True}),
        ("qwen3_moe", {"kept": ["self_attn.k", "layers.0.mlp"], "mlp_only_layers": [0]}),
        ("qwen3_next", {"linear_num_value_heads": 8, "linear_conv_kernel_dim": 3, "mlp_only_layers": [1]}),
        ("qwen3_moe", {"tie_word_embeddings": True, "dtype": torch.bfloat16, "hidden_act": "gelu_pytorch_tanh"}),
        ("gpt_oss", {"attention_bias": False, "layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_settings(tmp_path, device_alone, model_type, changes):
    assert_same_logits(*models(tmp_path, device_alone, model_type, **changes))


def test_recurrent_state(tmp_path, device_alone, monkeypatch):
    """Sequences with state are forked, emptied, run together, and restored after an interrupted prompt."""
    reference, model = models(tmp_path, device_alone, "qwen3_next")
    expected = reference.forward(TOKENS, all_logits=True)

    def near(logits, place):
        return relative_error(logits, expected[place]) < 2 * BOUND

    first = model.new_sequence()
    model.forward(TOKENS[:10], sequence=first)
    fork = model.fork(first)
    model.forward([5, 6, 7], sequence=first)
    assert near(model.forward(TOKENS[10:20], sequence=fork), 19)
    model.truncate(first, 0)
    results = model.forward_batch([(first, TOKENS[:12]), (fork, TOKENS[20:21])])
    assert near(results[0], 11)
    assert near(results[1], 20)
    monkeypatch.setattr("marlin_cy.decoder.model.MAX_ROWS", 4)
    steps, step = [], model._program.step

    def interrupted(batch):
        steps.append(batch)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(batch)

    monkeypatch.setattr(model._program, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.forward(TOKENS[21:40], sequence=fork)
    monkeypatch.undo()
    assert fork.length == 21
    assert near(model.forward(TOKENS[21:24], sequence=fork), 23)
