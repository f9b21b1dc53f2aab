"""``docs/adding-a-format.md`` and ``docs/adding-a-family.md``, followed literally on small checkpoints."""

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from asserts import relative_error
from checkpoint_files import CONFIGS, METHODS, write_checkpoint

from marlin_cy import open_checkpoint
from marlin_cy.checkpoints import families
from marlin_cy.decoder import architecture
from marlin_cy.decoder.config import read_decoder_config
from marlin_cy.formats import registry

DOCS = Path(__file__).parents[1] / "docs"


def code_blocks(page):
    """The Python blocks of a page, in order."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def named_paths(page):
    """The files of this repository that a page names, in full."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return sorted(set(re.findall(r"`?((?:marlin_cy|tests|docs)/[\w/]+\.(?:pyx|pyi|py|md))", text)))


@pytest.mark.parametrize("page", ["adding-a-format.md", "adding-a-family.md"])
def test_the_files_that_are_named_exist(page):
    paths = named_paths(page)
    assert len(paths) >= 5
    created = {"marlin_cy/formats/rowwise.py"}
    assert [path for path in paths if path not in created and not (DOCS.parent / path).exists()] == []


def test_a_new_format(tmp_path, cpu_backend, monkeypatch):
    module = types.ModuleType("marlin_cy.formats.rowwise")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source, row = code_blocks("adding-a-format.md")
    exec(compile(source, "rowwise.py", "exec"), module.__dict__)  # noqa: S102
    assert '"rowwise": rowwise.parse' in row
    monkeypatch.setattr(registry, "METHODS", {**registry.METHODS, "rowwise": module.parse})

    def parts(q, scale, zero, g_idx, checkpoint_format):
        assert (zero == 8).all()
        return {"codes": np.ascontiguousarray(q.T).astype(np.uint8), "scales": scale}

    monkeypatch.setitem(METHODS, "rowwise", (parts, lambda **_: {"quant_method": "rowwise", "bits": 4}))
    weights = write_checkpoint(tmp_path, method="rowwise", group_size=-1, sym=True)
    ctx, identity = cpu_backend.new_context(), np.eye(64, dtype=np.float32)
    with open_checkpoint(tmp_path, cpu_backend) as checkpoint:
        assert (checkpoint.format, checkpoint.expert_symmetry(0), checkpoint.act_order) == (
            "rowwise",
            (True, True),
            False,
        )
        out = np.zeros((64, 192), np.float32)
        checkpoint.moe_layer(1).gate_up.gemm_phase_batched(ctx, identity, [(2, 0, 0, 64)], out, 64)
    names = [f"model.layers.1.mlp.experts.2.{part}_proj" for part in ("gate", "up")]
    assert relative_error(out, np.concatenate([weights[name] for name in names], axis=1)) < 1e-4


def test_a_new_family(tmp_path, cpu_backend, monkeypatch):
    row, _ = code_blocks("adding-a-family.md")
    rows = {}
    exec(row.replace("    ...\n", ""), {"Family": families.Family}, rows)  # noqa: S102
    monkeypatch.setattr(families, "FAMILIES", {**families.FAMILIES, **rows["FAMILIES"]})
    monkeypatch.setitem(CONFIGS, "new_moe", {})
    monkeypatch.setitem(sys.modules["checkpoint_files"].FAMILIES, "new_moe", rows["FAMILIES"]["new_moe"])
    write_checkpoint(tmp_path, model_type="new_moe", shared=96)
    with open_checkpoint(tmp_path, cpu_backend) as checkpoint:
        assert checkpoint.family.name == "New-MoE"
        assert checkpoint.moe_spec == families.MoeSpec(3, 2, 64, 96, shared_intermediate_size=96)
        layer = checkpoint.moe_layer(0)
        hidden = np.ones((2, 64), np.float32)
        out = layer(cpu_backend.new_context(), hidden, np.ones((2, 3), np.float32))
    assert np.isfinite(out).all()


def test_a_new_architecture(monkeypatch):
    _, row = code_blocks("adding-a-family.md")
    rows = {}
    exec(row.replace("    ...\n", ""), {"Architecture": architecture.Architecture}, rows)  # noqa: S102
    monkeypatch.setattr(architecture, "ARCHITECTURES", {**architecture.ARCHITECTURES, **rows["ARCHITECTURES"]})
    config = {
        "model_type": "new_moe",
        "hidden_size": 64,
        "vocab_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "attention_bias": True,
    }
    read = read_decoder_config(config, "config.json")
    assert read.layer_types == ("sliding_attention", "full_attention", "sliding_attention")
    assert (read.norm_eps, read.attention.window) == (1e-5, 4096)
    assert (read.attention.bias, read.attention.output_bias, read.attention.head_norm) == (True, True, True)
