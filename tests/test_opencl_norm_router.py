"""The launch that norms rows, computes the router's product, and chooses the experts, for few rows."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")

from test_opencl_checked_configurations import with_text  # noqa: E402

from marlin_cy.decoder.load import load_model  # noqa: E402
from marlin_cy.moe.align import moe_align_block_size  # noqa: E402
from marlin_cy.opencl.backend import OpenClBackend  # noqa: E402
from marlin_cy.opencl.checks import verdicts  # noqa: E402
from marlin_cy.opencl.checks.routing import topk_error  # noqa: E402
from marlin_cy.opencl.decoder.ffn import MoeFfn  # noqa: E402
from marlin_cy.opencl.decoder.norm_router import COUNTERS, MOST_FUSED_ROWS  # noqa: E402
from marlin_cy.opencl.tiers.configuration import PLANES  # noqa: E402

FOLDER = Path(str(files("marlin_cy") / "data" / "tiny-qwen3-moe-gptq-int4"))
LABEL = "norm_router, route, align"

pytestmark = pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")


def read(model, purpose, dtype, count):
    """The first elements of a buffer of the workspace."""
    host = np.empty(count, dtype)
    cl.enqueue_copy(model.context.queue, host, model._program._recorder._workspace[purpose])
    return host


def assert_choices(model, rows, most_rows):
    """The last layer's experts are those of its own logits, twice: a launch leaves its counters at 0."""
    program = model._program
    assert (LABEL in program.launches(rows)) == (rows <= most_rows)
    layers = [layer.ffn.plan for layer in program._layers if isinstance(layer.ffn, MoeFfn)]
    routing = layers[-1].routing
    pairs = rows * routing.top_k
    for seed in range(2):
        tokens = np.random.default_rng(seed).integers(1, model.vocab_size, rows)
        model.forward(tokens, sequence=model.new_sequence())
        logits = read(model, "decoder router logits", np.float32, (rows, routing.num_experts))
        ids = read(model, "topk_ids", np.int32, (rows, routing.top_k))
        assert topk_error(logits, routing, ids, read(model, "topk_weights", np.float32, ids.shape)) is None
        block_size = model.context.backend.tier.block_size(pairs / routing.num_experts)
        expected, experts, past = moe_align_block_size(ids, block_size, routing.num_experts)
        assert read(model, "num_tokens_past_padded", np.int32, 1) == past
        slots = read(model, "sorted_token_ids", np.int32, int(past[0]))
        np.testing.assert_array_equal(np.minimum(slots.view(np.uint32), pairs), expected[: len(slots)])
        blocks = len(slots) // block_size
        np.testing.assert_array_equal(read(model, "expert_ids", np.int32, blocks), experts[:blocks])
        if rows <= most_rows:
            assert not read(model, COUNTERS, np.uint32, MOST_FUSED_ROWS + 1).any()


@pytest.fixture
def new_backend(device_alone, tmp_path, monkeypatch):
    """A function that makes a backend without verdicts, as a new process would."""
    monkeypatch.setenv("MARLIN_CY_CACHE_DIR", str(tmp_path / "cache"))

    def make():
        monkeypatch.setattr(verdicts, "_memories", {})
        return OpenClBackend(context=device_alone.context, device=device_alone.device, tier=device_alone.tier.name)

    return make


@pytest.fixture(scope="module")
def models():
    return {}


@pytest.mark.parametrize("rows", [1, 3, MOST_FUSED_ROWS, MOST_FUSED_ROWS + 1])
def test_choices(device_alone, models, rows):
    if device_alone.runtime.capabilities.device_atomics is None:
        pytest.skip("the device has no atomics of device scope")
    if id(device_alone) not in models:
        models[id(device_alone)] = load_model(FOLDER, device_alone, context_length=64, cache_tokens=1024)
    model = models[id(device_alone)]
    backend = model.context.backend
    prepares = backend.tier.inputs(backend.runtime.capabilities).prepared_type == PLANES
    assert_choices(model, rows, 0 if prepares else MOST_FUSED_ROWS)


@pytest.mark.parametrize(
    ("text", "wrong", "reason"),
    [
        ("expert_ids[first + block] = (int)e;", "expert_ids[first + block] = (int)e + 1;", "expert_ids are wrong"),
        (
            "routes = arrive(arrived + row) ==",
            "routes = arrive(arrived + row) > 100 +",
            "expert ids are left unwritten",
        ),
        ("arrived[row] = 0;", "arrived[row] = 1;", "expert"),
        ("sums[item], norm_factor,", "sums[item], 1.01f * norm_factor,", "the logits are wrong"),
    ],
    ids=["pairs", "never last", "counter not reset", "logits"],
)
def test_a_wrong_launch_is_cut_up(new_backend, monkeypatch, text, wrong, reason):
    """Experts are chosen by a launch of its own; the error is found by the check, also that of a second launch."""
    backend = new_backend()
    if backend.runtime.capabilities.device_atomics is None:
        pytest.skip("the device has no atomics of device scope")
    with_text(monkeypatch, {text: wrong}, ["decoder_router"])
    model = load_model(FOLDER, backend, context_length=64, cache_tokens=256)
    with pytest.warns(RuntimeWarning, match=f"'norm_router, route, align' is not used: .*{reason}"):
        labels = model._program.launches(1)
    assert "norm_router" in labels and "route, align" in labels and LABEL not in labels


@pytest.mark.sampled(1)
@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "glm4_moe"])
def test_choices_of_families(tmp_path, device_alone, model_type):
    """Groups and a correction bias; a bias of the router; sigmoids."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")
    from language_models import write_model

    if device_alone.runtime.capabilities.device_atomics is None:
        pytest.skip("the device has no atomics of device scope")
    folder, _ = write_model(tmp_path, model_type)
    model = load_model(folder, device_alone, cache_dtype="float32", cache_tokens=512)
    fused = LABEL in model._program.launches(1)
    for rows in (1, 2):
        assert_choices(model, rows, MOST_FUSED_ROWS if fused else 0)
