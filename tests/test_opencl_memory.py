"""Device memory of a whole model: all buffers together, against its weights and its cache."""

import gc
import sys
import weakref
from pathlib import Path

import pytest

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")
sys.path.append(str(Path(__file__).parents[1]))  # bench is not installed

from bench.models.synthetic import QWEN3_30B_A3B, write_qwen3_moe  # noqa: E402
from marlin_cy.decoder.load import load_model  # noqa: E402
from marlin_cy.decoder.model import MAX_ROWS  # noqa: E402
from marlin_cy.opencl.decoder.program import HEAD_ROWS  # noqa: E402
from marlin_cy.opencl.memory import live_stores  # noqa: E402

LAYERS, EXPERTS = 8, 128
"""Of the model whose memory is worked out. The model of the test has one layer and few experts of the same sizes."""
FEW_EXPERTS = 8
VOCABULARY = 151_936
DEPTH = 4096
MOST = 1.05

pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")]


@pytest.fixture
def live(monkeypatch):
    """A function that gives the bytes of all buffers that were made since and still exist."""
    made = []

    class Buffer(cl.Buffer):
        def __init__(self, context, flags, size=0, hostbuf=None):
            super().__init__(context, flags, size, hostbuf)
            made.append((weakref.ref(self), int(self.size)))

    monkeypatch.setattr(cl, "Buffer", Buffer)

    def nbytes():
        gc.collect()
        return sum(size for buffer, size in made if buffer() is not None)

    return nbytes


def test_memory_of_a_large_model(device_alone, tmp_path, live):
    """Eight layers of Qwen3-30B-A3B's sizes, with a cache of 4096 tokens.

    What a layer and an expert take is measured on one layer with few experts, and multiplied. Layers share the
    work-space, and that of the largest steps is recorded. Nothing is run, so a device of any speed will do.
    """
    sizes = {**QWEN3_30B_A3B, "num_experts": FEW_EXPERTS}
    write_qwen3_moe(tmp_path, 1, sizes)
    before = live_stores.nbytes(device_alone.device)
    model = load_model(tmp_path, device_alone, context_length=DEPTH, cache_tokens=DEPTH)
    program, layer = model._program, model.plan.layers[0]
    loaded, packed = live(), live_stores.nbytes(device_alone.device) - before
    for rows in (1, MAX_ROWS):
        program._recorded("layers", rows, program._record_layers)
    workspace = live() - loaded
    moe = layer.ffn.layer.plan
    of_experts = sum(stack.store.nbytes for stack in (moe.gate_up, moe.down))
    dense = {"embedding": model.plan.embedding.nbytes, "router": layer.ffn.router.weight.nbytes}
    head = 0 if model.plan.head.weight is model.plan.embedding else model.plan.head.weight.nbytes
    # Of the model in question: what its weights and its cache take, and everything that comes on top.
    weights = LAYERS * (packed - of_experts + of_experts * EXPERTS // FEW_EXPERTS)
    weights += LAYERS * dense["router"] * EXPERTS // FEW_EXPERTS
    weights += (dense["embedding"] + head) * VOCABULARY // model.vocab_size
    cache = LAYERS * model.cache_bytes
    needed = packed + sum(dense.values()) + head + model.cache_bytes
    shared = program._recorder._workspace["gate_up"].size  # the logits take the memory of these rows
    logits = max(0, HEAD_ROWS * 4 * VOCABULARY - shared)
    more = LAYERS * (loaded - needed) + workspace + logits
    kinds = {
        "weights": weights,
        "cache": cache,
        "copies and tables": LAYERS * (loaded - needed),
        f"work-space of steps of {MAX_ROWS} tokens": workspace,
        "logits beyond it": logits,
    }
    listed = ", ".join(f"{name} {nbytes >> 20} MiB" for name, nbytes in kinds.items())
    print(f"{device_alone!r}: {listed}: {1 + more / (weights + cache):.3f} of weights and cache")
    assert packed <= loaded
    assert 1 + more / (weights + cache) <= MOST
