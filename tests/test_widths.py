"""Codes of 8 bits and float32 scales in checkpoints: by every route, with widths that differ by stack.

The shipped model is stored again with the same codes and zero points in 8 bits, or the same scales in float32. These
are the same numbers, so every result has the same bits.
"""

import json
import re
import shutil

import numpy as np
import pytest
from asserts import assert_same_bits
from problems import activations
from recording import SHIPPED
from safetensors.numpy import load_file, save_file

import marlin_cy
from marlin_cy import open_checkpoint
from marlin_cy.checkpoints.packed_writer import write_packed
from marlin_cy.commands.inspect import width_words, widths
from marlin_cy.decoder.load import load_model
from marlin_cy.errors import UnsupportedError
from marlin_cy.formats import gptq
from marlin_cy.stacks.builder import refuse_unsupported
from marlin_cy.weights.canonical import pack_words, unpack_words
from marlin_cy.weights.sizes import checked_stack_sizes

TEXT = [5, 17, 99, 200, 3, 42]
MIXES = {
    "attention": r"self_attn",
    "down": r"mlp\.experts\.\d+\.down_proj",
    "gate and up, of two layers": r"layers\.[12]\.mlp\.experts\.\d+\.(gate|up)_proj",
    "everything": r".*",
}


def stored_again(folder, wide, scale_dtype=np.float16):
    """The shipped model, with 8 bits for the modules that an expression finds, and with scales of a dtype."""
    shutil.copytree(SHIPPED, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        tensors[f"{module}.scales"] = tensors[f"{module}.scales"].astype(scale_dtype)
        if not re.search(wide, module):
            continue
        tensors[name] = pack_words(unpack_words(tensors[name]), 8).view(np.int32)
        zeros = unpack_words(np.ascontiguousarray(tensors[f"{module}.qzeros"].T))  # minus one, as in the new file
        tensors[f"{module}.qzeros"] = np.ascontiguousarray(pack_words(zeros, 8).T).view(np.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {rf".*{wide}": {"bits": 8}}
    # The codes lie around 8, so the 8-bit layers are not symmetric.
    config["quantization_config"]["sym"] = False
    (folder / "config.json").write_text(json.dumps(config))
    settings = folder / "quantize_config.json"
    if settings.exists():
        settings.unlink()
    return folder


@pytest.fixture(scope="module")
def logits():
    return load_model(SHIPPED, context_length=64).forward(TEXT, all_logits=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mix", MIXES)
def test_mixed_widths_in_the_decoder(tmp_path, logits, mix):
    folder = stored_again(tmp_path / "mixed", MIXES[mix])
    assert_same_bits(load_model(folder, context_length=64).forward(TEXT, all_logits=True), logits)
    with open_checkpoint(folder) as checkpoint:
        write_packed(checkpoint, tmp_path / "packed")
    assert_same_bits(load_model(tmp_path / "packed", context_length=64).forward(TEXT, all_logits=True), logits)


def test_float32_scales_in_the_decoder(tmp_path, logits):
    folder = stored_again(tmp_path / "wide", r"down_proj", np.float32)
    assert_same_bits(load_model(folder, context_length=64).forward(TEXT, all_logits=True), logits)


def test_widths_of_stacks(tmp_path):
    folder = stored_again(tmp_path / "mixed", MIXES["down"])
    with open_checkpoint(folder) as checkpoint, open_checkpoint(SHIPPED) as shipped:
        layer, other = checkpoint.moe_layer(0), shipped.moe_layer(0)
        assert (layer.gate_up.metadata.bits, layer.down.metadata.bits) == (4, 8)
        assert layer.down.metadata.packed_bytes > 1.9 * other.down.metadata.packed_bytes
        ctx, x = marlin_cy.get_backend("cpu").new_context(), np.ones((3, 256), np.float32)
        logits = np.arange(24, dtype=np.float32).reshape(3, 8)
        assert_same_bits(layer(ctx, x, logits), other(ctx, x, logits))


def test_inspect_shows_widths(tmp_path):
    folder = stored_again(tmp_path / "mixed", MIXES["gate and up, of two layers"])
    with open_checkpoint(folder) as checkpoint:
        found = widths(checkpoint)
    assert found == {"gate and up": {4: 32, 8: 32}, "down": {4: 32}, "other linears": {4: 16}}
    assert width_words("gate and up", found["gate and up"]) == "gate and up 4 (32 layers), 8 (32 layers)"
    assert width_words("down", found["down"]) == "down 4"


def test_widths_within_a_stack(tmp_path, logits):
    """The widest holds all: the same numbers."""
    folder = stored_again(tmp_path / "mixed", r"layers\.1\.mlp\.experts\.3\.down_proj")
    with open_checkpoint(folder) as checkpoint:
        assert [checkpoint.moe_layer(layer).down.metadata.bits for layer in (0, 1)] == [4, 8]
        form = "uint8 in groups of 128 with float16 scales"
        [note] = checkpoint.expert_notes(1)
        assert note == f"down: experts differ in their settings, and keep their values as {form}"
        assert checkpoint.expert_notes(0) == []
    assert_same_bits(load_model(folder, context_length=64).forward(TEXT, all_logits=True), logits)


def test_a_backend_refuses_by_name():
    sizes = checked_stack_sizes(1, 256, 16, 32, None, "uint8", "two_level_min")
    for codes, scales, message in (
        (("uint4", "e2m1"), ("two_level_min",), "codes: got 'uint8', the XPU backend supports 'uint4', 'e2m1'"),
        (("uint8",), ("float16",), "scales: got 'two_level_min', the XPU backend supports 'float16'"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            refuse_unsupported("XPU", sizes, codes, scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale_dtype", [np.float16, np.float32])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_load_gptq(cpu_backend, rng, bits, scale_dtype, checkpoint_format):
    """Random zero points in groups of 32, by each entry of the interface: equal bits, and near the dense product."""
    experts, k, n = 3, 256, 64
    low = gptq.ZERO_OFFSETS[checkpoint_format]
    q = rng.integers(0, 2**bits, (experts, k, n)).astype(np.uint8)
    zero = rng.integers(low, low + 2**bits, (experts, k // 32, n))
    scale = rng.uniform(0.005, 0.02, zero.shape).astype(scale_dtype)
    packed = [
        gptq.pack_gptq(*parts, checkpoint_format=checkpoint_format, bits=bits, scale_dtype=scale_dtype)
        for parts in zip(q, scale, zero, strict=True)
    ]
    sizes = {"bits": bits, "group_size": 32, "k": k, "checkpoint_format": checkpoint_format}
    stack = cpu_backend.load_gptq_stacked(*map(list, zip(*packed, strict=True)), n_per_expert=n, **sizes)
    assert stack.metadata.bits == bits
    ctx = cpu_backend.new_context()
    x = activations(rng, 20, k)
    batched = np.empty((experts * 20, n), np.float32)
    stack.gemm_phase_batched(ctx, x, [(e, 0, 20 * e, 20) for e in range(experts)], batched, k)
    ids = np.repeat(np.arange(experts, dtype=np.int32)[None], 20, axis=0)
    routed = np.empty((20 * experts, n), np.float32)
    stack.gemm_phase_vllm(ctx, x, *marlin_cy.moe_align_block_size(ids, 8, experts), routed, 20, 8, experts)
    for expert in range(experts):
        linear = cpu_backend.load_gptq(*packed[expert], n=n, **sizes)
        out, of_view = np.empty((20, n), np.float32), np.empty((20, n), np.float32)
        linear.forward(ctx, x, out, 20)
        stack.make_expert_linear(expert * n, n).forward(ctx, x, of_view, 20)
        w = scale[expert].astype(np.float64).repeat(32, 0) * (q[expert] - zero[expert].astype(np.float64).repeat(32, 0))
        expected = x.astype(np.float64) @ w
        assert np.linalg.norm(out - expected) <= 1e-4 * np.linalg.norm(expected)
        for other in (of_view, batched[20 * expert : 20 * expert + 20], routed[expert::experts]):
            assert_same_bits(other, out)
