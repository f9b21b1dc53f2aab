"""Checkpoint folders: the loaded weights, the order of loading, and the memory that it takes."""

import mmap
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import edit_json, edit_tensor, write_checkpoint
from recording import GATE, Q_PROJ, SHIPPED, RecordingBackend, open_recording
from safetensors.numpy import load_file, save_file

from marlin_cy.backends import get_backend
from marlin_cy.checkpoints.checkpoint import open_checkpoint
from marlin_cy.checkpoints.families import FAMILIES, MoeSpec
from marlin_cy.errors import CheckpointError


def test_a_stack_names_the_expert_that_is_wrong():
    qweight, scales, qzeros = np.zeros((4, 8), np.int32), np.ones((1, 8), np.float16), np.zeros((1, 1), np.int32)
    stacked = {"scales": [scales, scales], "qzeros": [qzeros, qzeros], "bits": 4, "group_size": 32, "k": 32}
    load = RecordingBackend().load_gptq_stacked
    assert load([qweight, qweight], n_per_expert=8, **stacked).weights.shape == (2, 32, 8)
    with pytest.raises(TypeError, match="qweight of expert 1: got dtype int64"):
        load([qweight, qweight.astype(np.int64)], n_per_expert=8, **stacked)
    with pytest.raises(IndexError, match="g_idx of expert 1: got 1 at row 0, expected 0 to 0"):
        load([qweight, qweight], g_idx=[None, np.ones(32, np.int32)], n_per_expert=8, **stacked)


VARIANTS = [
    {},
    {"model_type": "mixtral"},
    {"model_type": "qwen2_moe", "sym": True},
    {"checkpoint_format": "gptq_v2"},
    {"shards": 3},
    {"desc_act": True, "group_size": 32, "inter": 128},
    {"desc_act": True, "model_type": "mixtral", "checkpoint_format": "gptq_v2", "shards": 2, "sym": True},
    {"group_size": -1},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_loads_what_was_written(tmp_path, variant):
    weights = write_checkpoint(tmp_path, seed=7, **variant)
    family = FAMILIES[variant.get("model_type", "qwen3_moe")]
    with open_recording(tmp_path) as checkpoint:
        assert checkpoint.family is family
        assert checkpoint.moe_layers == [0, 1]
        assert checkpoint.moe_spec == MoeSpec(3, 2, 64, variant.get("inter", 96))
        layer = checkpoint.moe_layer(1)
        for expert in range(3):
            gate, up, down = (
                weights[f"{checkpoint.moe_block(1)}.experts.{expert}.{projection}"]
                for projection in (family.gate, family.up, family.down)
            )
            np.testing.assert_array_equal(layer.gate_up.weights[expert], np.concatenate([gate, up], axis=1))
            np.testing.assert_array_equal(layer.down.weights[expert], down)
        assert (layer.top_k, layer.activation, layer.norm_topk_prob) == (2, "silu", True)
        assert checkpoint.linears == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
        linear = checkpoint.linear(Q_PROJ)
        np.testing.assert_array_equal(linear.weight, weights[Q_PROJ])
        np.testing.assert_array_equal(linear.bias, checkpoint.tensor(f"{Q_PROJ}.bias").astype(np.float32))
        assert checkpoint.router_weight(0).shape == (3, 64)


def test_every_column_is_added_once_and_progress_is_reported(tmp_path):
    write_checkpoint(tmp_path, num_experts=5)
    calls, threads = [], set()

    def progress(*call):
        calls.append(call)
        threads.add(threading.get_ident())

    layer = open_recording(tmp_path, progress=progress, num_threads=3).moe_layer(0)
    assert sorted(layer.gate_up.adds) == [(expert, offset, 96) for expert in range(5) for offset in (0, 96)]
    assert sorted(layer.down.adds) == [(expert, 0, 64) for expert in range(5)]
    assert calls == [(done, 5, "layer 0") for done in range(1, 6)]
    assert threads == {threading.get_ident()}


def test_an_exception_in_progress_ends_the_load(tmp_path):
    write_checkpoint(tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    checkpoint = open_recording(tmp_path, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.moe_layer(0)


def test_the_shipped_checkpoint():
    with open_recording(SHIPPED) as checkpoint:
        assert (checkpoint.format, checkpoint.scheme.group_size, checkpoint.scheme.sym) == ("gptq", 128, True)
        assert checkpoint.moe_spec == MoeSpec(8, 2, 256, 256)
        assert checkpoint.moe_layers == [0, 1, 2, 3]
        assert len(checkpoint.linears) == 16
        # Codes, scales, zero points and g_idx of 24 matrices of 256 by 256, group 128.
        assert checkpoint.expert_bytes(0) == 24 * (256 * 256 // 2 + 2 * 256 * 2 + 2 * 256 // 2 + 256 * 4)
        layer = checkpoint.moe_layer(3)
        assert layer.gate_up.weights.shape == (8, 256, 512)
        assert checkpoint.router_weight(0).dtype == ml_dtypes.bfloat16


def test_the_shipped_weights_mean_what_was_recorded():
    """The MoE block in float64 on the weights as read gives the recorded outputs, which are float32."""
    recorded = load_file(SHIPPED / "recorded" / "activations.safetensors")
    with open_recording(SHIPPED) as checkpoint:
        for index in checkpoint.moe_layers:
            hidden, logits, expected = (
                recorded[f"layers.{index}.{name}"].astype(np.float64)
                for name in ("hidden_states", "router_logits", "moe_output")
            )
            router = checkpoint.router_weight(index).astype(np.float64)
            np.testing.assert_allclose(hidden @ router.T, logits, atol=1e-4)
            layer = checkpoint.moe_layer(index)
            output = np.zeros_like(expected)
            chosen = np.argsort(-logits, axis=1, kind="stable")[:, :2]
            share = np.exp(np.take_along_axis(logits, chosen, axis=1))
            share /= share.sum(axis=1, keepdims=True)
            for token, rank in np.ndindex(chosen.shape):
                expert = chosen[token, rank]
                gate, up = np.split(hidden[token] @ layer.gate_up.weights[expert], 2)
                inner = gate / (1 + np.exp(-gate)) * up
                output[token] += share[token, rank] * (inner @ layer.down.weights[expert])
            assert np.linalg.norm(output - expected) <= 1e-6 * np.linalg.norm(expected), f"layer {index}"


@pytest.mark.parametrize(
    ("keys", "layer"),
    [({"decoder_sparse_step": 2}, 0), ({"mlp_only_layers": [3]}, 3), ({"first_k_dense_replace": 1}, 0)],
)
def test_experts_in_layers_that_have_none_by_the_config(tmp_path, keys, layer):
    write_checkpoint(tmp_path, layers=4)
    edit_json(tmp_path, "config.json", **keys)
    name = rf"model\.layers\.{layer}\.mlp\.experts\.0\.gate_proj\.\w+"
    with pytest.raises(CheckpointError, match=rf"{name}': layer {layer} has no experts by the configuration"):
        open_recording(tmp_path)


def test_layer_that_is_none(tmp_path):
    write_checkpoint(tmp_path, layers=4)
    checkpoint = open_recording(tmp_path)
    assert checkpoint.moe_layers == [0, 1, 2, 3]
    for call in (checkpoint.moe_layer, checkpoint.experts, checkpoint.router_weight, checkpoint.expert_bytes):
        with pytest.raises(IndexError, match=r"layer: got 4, expected one of the MoE layers: \[0, 1, 2, 3\]"):
            call(4)


def quantize_config_only(folder):
    edit_json(folder, "config.json", quantization_config=None)


def quantization_config_only(folder):
    (folder / "quantize_config.json").unlink()


def autogptq_keys(folder):
    quantize_config_only(folder)
    edit_json(folder, "quantize_config.json", quant_method=None, checkpoint_format=None, sym=None)


def gptqmodel_keys(folder):
    edit_json(folder, "quantize_config.json", method="gptq", format="gptq", checkpoint_format=None)


def expert_count_under_both_names(folder):
    edit_json(folder, "config.json", num_experts=3)


def another_file_name(folder):
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-64g.safetensors")


def zero_biases(folder):
    edit_tensor(folder, f"{GATE}.bias", lambda _: np.zeros(96, np.float16))


def no_g_idx(folder):
    edit_tensor(folder, f"{GATE}.g_idx", lambda _: None)


def bystanders(folder):
    save_file({"x": np.zeros(3)}, folder / "activations.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        quantize_config_only,
        quantization_config_only,
        autogptq_keys,
        gptqmodel_keys,
        expert_count_under_both_names,
        another_file_name,
        zero_biases,
        no_g_idx,
        bystanders,
    ],
)
def test_other_ways_to_say_the_same(tmp_path, change):
    weights = write_checkpoint(tmp_path)
    change(tmp_path)
    checkpoint = open_recording(tmp_path)
    np.testing.assert_array_equal(checkpoint.moe_layer(1).gate_up.weights[2, :, :96], weights[GATE])


def test_norm_topk_prob(tmp_path):
    """Qwen's config says, and false is transformers' default; Mixtral's has no such key."""
    write_checkpoint(tmp_path)
    edit_json(tmp_path, "config.json", norm_topk_prob=None)
    assert open_recording(tmp_path).moe_spec.norm_topk_prob is False
    write_checkpoint(tmp_path / "mixtral", model_type="mixtral")
    assert open_recording(tmp_path / "mixtral").moe_spec.norm_topk_prob is True


@pytest.mark.parametrize(
    ("options", "exception", "message"),
    [
        ({"backend": 3}, TypeError, "backend: got int, expected a name or a Backend"),
        ({"backend": "abacus"}, ValueError, "'abacus'"),
        ({"progress": 3}, TypeError, "progress: got int, expected a callable or None"),
        ({"num_threads": 0}, ValueError, "num_threads: got 0, expected 1 to 4096"),
        ({"num_threads": 1.5}, TypeError, "num_threads: got 1.5, expected an int"),
        ({"num_threads": True}, TypeError, "num_threads: got True, expected an int"),
    ],
)
def test_options_refused(options, exception, message):
    with pytest.raises(exception, match=message):
        open_checkpoint(SHIPPED, **({"backend": RecordingBackend()} | options))


PEAK_PROGRAM = """
import sys
from pathlib import Path
from marlin_cy.checkpoints.checkpoint import open_checkpoint

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

warm = open_checkpoint(sys.argv[1], "cpu", num_threads=2).moe_layer(0)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
layer = open_checkpoint(sys.argv[2], "cpu", num_threads=2).moe_layer(0)
packed = layer.gate_up.metadata.packed_bytes + layer.down.metadata.packed_bytes
print((status("VmHWM") - before) / packed)
"""


class TestOnTheCpu:
    """With a real backend."""

    @pytest.mark.parametrize("variant", VARIANTS, ids=str)
    def test_experts_compute_what_was_written(self, tmp_path, variant):
        weights = write_checkpoint(tmp_path, seed=11, **variant)
        backend = get_backend("cpu")
        context = backend.new_context()
        checkpoint = open_checkpoint(tmp_path, backend)
        family, layer = checkpoint.family, checkpoint.moe_layer(1)
        for expert in range(3):
            gate, up, down = (
                weights[f"{checkpoint.moe_block(1)}.experts.{expert}.{projection}"]
                for projection in (family.gate, family.up, family.down)
            )
            for stack, weight in ((layer.gate_up, np.concatenate([gate, up], axis=1)), (layer.down, down)):
                rows = np.random.default_rng(expert).standard_normal((3, stack.k)).astype(np.float32)
                output = np.zeros((3, stack.n_per_expert), np.float32)
                stack.gemm_phase_batched(context, rows, [(expert, 0, 0, 3)], output, stack.k)
                expected = rows.astype(np.float64) @ weight
                assert np.linalg.norm(output - expected) <= 1e-4 * np.linalg.norm(expected)

    def test_recorded_activations(self):
        """Each layer of the shipped checkpoint gives the outputs that were recorded when it was made."""
        backend = get_backend("cpu")
        recorded = load_file(SHIPPED / "recorded" / "activations.safetensors")
        context = backend.new_context()
        with open_checkpoint(SHIPPED, backend) as checkpoint:
            for index in checkpoint.moe_layers:
                layer = checkpoint.moe_layer(index)
                of_layer = {name: recorded[f"layers.{index}.{name}"] for name in ("hidden_states", "router_logits")}
                output = layer(context, **of_layer)
                expected = recorded[f"layers.{index}.moe_output"].astype(np.float64)
                error = np.linalg.norm(output - expected) / np.linalg.norm(expected)
                assert error <= 2e-4, f"layer {index}"

    @pytest.mark.skipif(
        not hasattr(mmap, "MADV_DONTNEED") or sys.platform != "linux", reason="Linux's /proc and madvise"
    )
    def test_peak_memory(self, tmp_path):
        """Loading 100 MB takes less than 1.25 times the packed size."""
        write_checkpoint(
            tmp_path, layers=1, num_experts=32, hidden=2048, inter=1024, group_size=128, with_weights=False
        )
        command = [sys.executable, "-c", PEAK_PROGRAM, SHIPPED, tmp_path]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert float(result.stdout) < 1.25
