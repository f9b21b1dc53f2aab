"""Steps by phases of families with shared experts and dense layers, against recorded launches."""

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
def test_logits(tmp_path, device_alone, rng, monkeypatch, model_type, changes):
    """A shared expert with and without a gate, wider than the routed ones; dense layers first, and later."""
    model, new_steps = new_model(tmp_path, device_alone, model_type, **changes)
    program, lengths = model._program, (1, 20, 3)
    monkeypatch.setattr("marlin_cy.opencl.decoder.program.PHASED_ERROR", 0.1)
    sequences = [model.new_sequence() for _ in lengths]
    for sequence, length in zip(sequences, lengths, strict=True):
        model.forward(rng.integers(0, VOCABULARY, length), sequence=sequence)
    for rows in (1, 3):
        tokens = rng.integers(0, VOCABULARY, rows)
        pairs = [(model.fork(sequence), [token]) for sequence, token in zip(sequences[:rows], tokens, strict=True)]
        again = [(model.fork(sequence), [token]) for sequence, token in zip(sequences[:rows], tokens, strict=True)]
        program._phased = None
        expected = np.array(model.forward_batch(pairs))
        program._phased = steps = new_steps()
        assert steps._macros["SHARED"]
        found = np.array(model.forward_batch(again))
        assert program._phased is steps
        assert 0 < relative_error(found, expected) < BOUND


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("qwen2_moe", {"kept": ["shared_expert."], **HEADS}, "a layer of its feed-forward is not quantised"),
        ("glm4_moe", {"kept": ["self_attn.k"], **HEADS}, "a layer of its attention is not quantised"),
    ],
    ids=str,
)
def test_what_is_not_supported(tmp_path, device_alone, model_type, changes, reason):
    _, new_steps = new_model(tmp_path, device_alone, model_type, **changes)
    with pytest.raises(NotPhased, match=reason):
        new_steps()
