"""Whole models with codes of 8 bits and other scale records on OpenCL, against the CPU's decoder."""

import numpy as np
import pytest
from asserts import relative_error
from test_widths import MIXES, stored_again

from marlin_cy import open_checkpoint
from marlin_cy.checkpoints.packed_writer import write_packed
from marlin_cy.decoder.load import load_model

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")

BOUND = 2e-3
TEXT = [5, 17, 80, 33, 3, 42]
pytestmark = pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")


def logits(path, backend, **options):
    """Of a prompt and of a token after it."""
    model = load_model(path, backend, cache_dtype="float32", context_length=64, **options)
    sequence = model.new_sequence()
    rows = model.forward(TEXT, sequence=sequence, all_logits=True)
    return np.concatenate([rows, model.forward(TEXT[:1], sequence=sequence)[None]])


def check(path, device):
    assert relative_error(logits(path, device), logits(path, "cpu", num_threads=1)) < BOUND


@pytest.mark.sweep
@pytest.mark.parametrize("mix", MIXES)
def test_mixed_widths(tmp_path, device_alone, mix):
    """GPTQ's `dynamic`."""
    check(stored_again(tmp_path / "mixed", MIXES[mix]), device_alone)


@pytest.mark.sweep
def test_float32_scales(tmp_path, device_alone):
    folder = stored_again(tmp_path / "wide", r"down_proj", np.float32)
    check(folder, device_alone)
    with open_checkpoint(folder) as checkpoint:
        write_packed(checkpoint, tmp_path / "packed")
    check(tmp_path / "packed", device_alone)


class TestGguf:
    @pytest.fixture
    def written(self, tmp_path):
        pytest.importorskip("gguf", reason="gguf is not installed")
        pytest.importorskip("torch", reason="PyTorch is not installed")
        pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")
        from gguf_files import write_gguf_model
        from test_gguf_models import WIDE

        return lambda kind, **options: write_gguf_model(tmp_path, "qwen3_moe", kind, **WIDE, **options)[0]

    def test_mixed_types(self, written, device_alone):
        """As llama.cpp's Q4_K_M: down, values, embedding and head are Q6_K."""
        from test_gguf_models import MIXES

        check(written("Q4_K", kinds=MIXES["Q4_K_M"]), device_alone)

    @pytest.mark.sweep
    @pytest.mark.parametrize("kind", ["Q4_1", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "IQ4_XS", "MXFP4"])
    def test_every_type(self, written, device_alone, kind):
        check(written(kind), device_alone)
