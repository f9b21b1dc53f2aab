"""A backend that records the weights that a checkpoint loads, and the shipped checkpoint."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from marlin_cy import reference
from marlin_cy.checkpoints.checkpoint import open_checkpoint
from marlin_cy.interface import Backend, StackBuilder
from marlin_cy.weights.scale_records import scale_record

SHIPPED = Path(__file__).parents[1] / "marlin_cy" / "data" / "tiny-qwen3-moe-gptq-int4"
GATE = "model.layers.1.mlp.experts.2.gate_proj"
UP = "model.layers.1.mlp.experts.2.up_proj"
DOWN = "model.layers.0.mlp.experts.1.down_proj"
Q_PROJ = "model.layers.0.self_attn.q_proj"


class RecordingBuilder(StackBuilder):
    """Dequantises each weight that is added, and records where."""

    def __init__(self, num_experts, k, n_per_expert, *, group_size, g_idx=None, codes="uint4", scales="float16"):
        self.num_experts, self.k, self.n_per_expert = num_experts, k, n_per_expert
        self.codes, self.scales = codes, scale_record(scales).name
        self.weights = np.full((num_experts, k, n_per_expert), np.nan)
        self.group_size = group_size
        self.g_idx = g_idx
        self.adds = []

    def add(self, expert, column_offset, weight):
        expected = self.g_idx[expert] if isinstance(self.g_idx, list) else self.g_idx
        np.testing.assert_array_equal(weight.g_idx, expected)
        assert (weight.group_size, weight.codes, weight.scales) == (self.group_size, self.codes, self.scales)
        self.weights[expert, :, column_offset : column_offset + weight.n] = reference.dequantize_weight(weight)
        self.adds.append((expert, column_offset, weight.n))

    def finish(self, bias=None):
        assert not np.isnan(self.weights).any()
        self.bias = bias
        return self


class RecordingBackend(Backend):
    """A backend whose stacks record the weights that a checkpoint adds. It computes nothing."""

    name = "recording"

    def new_stack_builder(self, *args, **kwargs):
        return RecordingBuilder(*args, **kwargs)

    def linear_of(self, stack, bias):
        return SimpleNamespace(weight=stack.weights[0], bias=bias)

    def new_context(self, **options):
        raise NotImplementedError

    from_host = to_host = empty = route = moe_forward = new_context


def open_recording(folder, **options):
    return open_checkpoint(folder, RecordingBackend(), **options)
