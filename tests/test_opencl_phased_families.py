"""Steps by phases of families with shared experts, dense layers, sinks, gates, and attention that is not quantised."""

import numpy as np
import pytest

pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from asserts import relative_error  # noqa: E402
from language_models import VOCABULARY, write_model  # noqa: E402

from marlin_cy.decoder.load import load_model  # noqa: E402
from marlin_cy.opencl.decoder.phased_shape import NotPhased  # noqa: E402
from marlin_cy.opencl.decoder.phased_step import PhasedStep  # noqa: E402

BOUND = 2e-3  # as in test_opencl_phased_step.py
HEADS = {"head_dim": 32}
ALL_FULL = {"layer_types": ["full_attention", "full_attention"]}

pytestmark = pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")
torch.set_num_threads(1)


def new_model(tmp_path, backend, model_type, **changes):
    """A tiny model, and its steps by phases."""
    folder, _ = write_model(tmp_path, model_type, **changes)
    model = load_model(folder, backend, cache_tokens=512)
    program = model._program
    return model, lambda: PhasedStep(program._ctx, program._plan, program._layers, program._ends(), False)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("glm4_moe", {"num_hidden_layers": 3, **HEADS}),
        ("qwen2_moe", HEADS),
        ("qwen2_moe", {"mlp_only_layers": [], "shared_expert_intermediate_size": 96, **HEADS}),
        ("qwen3_moe", {"mlp_only_layers": [1], **HEADS}),
    ],
    ids=str,
)
def test_shared_experts(tmp_path, device_alone, rng, monkeypatch, model_type, changes):
    """With and without a gate, wider than the routed ones; dense layers first, and later."""
    model, new_steps = new_model(tmp_path, device_alone, model_type, **changes)
    assert new_steps()._macros["SHARED"]
    assert_same_logits(model, new_steps, rng, monkeypatch, (1, 20, 3))


@pytest.mark.sweep
@pytest.mark.parametrize("groups", [2, 24], ids=["one run", "several runs"])
@pytest.mark.parametrize(
    ("model_type", "changes", "macro"),
    [
        ("gpt_oss", {"head_dim": 64}, "SINKS"),
        ("gpt_oss", {"attention_bias": False, "dtype": torch.bfloat16, **HEADS}, "EXPERT_BIASES"),
        ("qwen3_next", {**ALL_FULL, "head_dim": 64}, "GATED"),
        ("qwen3_next", {**ALL_FULL, "head_dim": 64, "kept": ["self_attn"]}, "DENSE"),
        ("qwen3_moe", {"attention_bias": True, "kept": ["self_attn"], **HEADS}, "DENSE"),
    ],
    ids=str,
)
def test_attention(tmp_path, device_alone, rng, monkeypatch, model_type, changes, macro, groups):
    """Sinks with windows and biases, gates, and weights that are not quantised; positions in one run and in several."""
    model, new_steps = new_model(tmp_path, device_alone, model_type, **changes)
    monkeypatch.setattr("marlin_cy.opencl.decoder.phased_step.SPLIT_PAGES", 1)

    def steps_of_groups():
        steps = new_steps()
        assert steps._macros[macro] == 1
        steps._groups = groups
        return steps

    assert_same_logits(model, steps_of_groups, rng, monkeypatch, (70, 20, 3))


def assert_same_logits(model, new_steps, rng, monkeypatch, lengths):
    """Of steps of one row, and of as many as there are lengths.

    The median of three steps counts: where two experts' router logits are nearly equal, the ways may choose different
    experts.
    """
    program, steps = model._program, new_steps()
    monkeypatch.setattr("marlin_cy.opencl.decoder.program.PHASED_ERROR", 0.1)
    sequences = [model.new_sequence() for _ in lengths]
    for sequence, length in zip(sequences, lengths, strict=True):
        model.forward(rng.integers(0, VOCABULARY, length), sequence=sequence)
    for rows in (1, 3):
        errors = []
        for _ in range(3):
            tokens = rng.integers(0, VOCABULARY, rows)
            forks = [
                [(model.fork(s), [token]) for s, token in zip(sequences[:rows], tokens, strict=True)] for _ in "ab"
            ]
            program._phased = None
            expected = np.array(model.forward_batch(forks[0]))
            program._phased = steps
            errors.append(relative_error(np.array(model.forward_batch(forks[1])), expected))
            assert program._phased is steps
            for sequence, _token in [*forks[0], *forks[1]]:
                model.free(sequence)
        assert 0 < np.median(errors) < BOUND


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("qwen2_moe", {"kept": ["shared_expert."], **HEADS}, "a layer of its feed-forward is not quantised"),
        ("glm4_moe", {"kept": ["self_attn.k"], **HEADS}, "a layer of its attention is not quantised"),
        ("qwen3_moe", {"kept": ["self_attn.o"], **HEADS}, "a layer of its attention is not quantised"),
        ("qwen3_moe", {"kept": ["layers.0.self_attn"], **HEADS}, "its layers differ in DENSE"),
        ("qwen3_next", {}, "it has layers of DeltaNet"),
    ],
    ids=str,
)
def test_what_is_not_supported(tmp_path, device_alone, model_type, changes, reason):
    _, new_steps = new_model(tmp_path, device_alone, model_type, **changes)
    with pytest.raises(NotPhased, match=reason):
        new_steps()
