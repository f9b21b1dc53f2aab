"""The commands, and transformers, with the path of a GGUF file."""

import io
import json
from importlib.resources import files

import numpy as np
import pytest
from asserts import relative_error

pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from gguf_files import ARCHITECTURES, Entry, tokenizer_fields, write_gguf_model  # noqa: E402
from language_models import logits_in_float64  # noqa: E402

from marlin_cy import cli  # noqa: E402
from marlin_cy.commands.run import BUILT_IN  # noqa: E402
from marlin_cy.decoder.text import Tokenizer  # noqa: E402
from marlin_cy.integrations.transformers import load  # noqa: E402

SOURCE = files("marlin_cy") / BUILT_IN
PROMPT = "def f(x):"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ONE_THREAD = ("--threads", "1")

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """``(path, dense folder)``: a model with the built-in tokenizer, not to be changed."""
    document, config = (json.loads((SOURCE / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))

    def edit(fields, tensors):
        fields |= tokenizer_fields(document, {**config, "chat_template": TEMPLATE})
        fields |= {"qwen3moe.nextn_predict_layers": 1, "qwen3moe.block_count": 3}
        tensors["blk.2.nextn.enorm.weight"] = Entry(np.ones(64))

    return write_gguf_model(tmp_path_factory.mktemp("model"), "qwen3_moe", edit=edit, vocab_size=257)


@pytest.fixture
def report(capsys):
    """Runs a command in this process with ``--json``; returns the object that it prints."""

    def command(*arguments):
        code = cli.main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return command


def test_inspect(model, report, capsys):
    found = report("inspect", model[0])
    assert (found["format"], found["family"], found["layers"]) == ("gguf", "Qwen3-MoE", 2)
    assert found["settings"] == {"Q4_0": 14, "F32": 13}
    assert found["quantized_linears"] == 8
    assert found["bytes"]["total"] == sum(found["bytes"][name] for name in ("experts", "linears", "others"))
    assert found["unusual"] == ["tensors of layers that predict several tokens, not loaded: 1"]
    assert cli.main(["inspect", str(model[0].parent)]) == 0
    assert "gguf: Q4_0 14, F32 13" in capsys.readouterr().out


def test_generate(model, report, tmp_path):
    """By the decoder, by transformers and from the packed folder: the text that the dense model would write."""
    tokens = Tokenizer(model[0]).encode(PROMPT)
    dense = transformers.AutoModelForCausalLM.from_pretrained(model[1]).eval()
    with torch.no_grad():
        expected = dense.generate(
            torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)), do_sample=False, max_new_tokens=12
        )[0, len(tokens) :].tolist()
    report("pack", model[0], tmp_path / "packed")
    options = "--prompt", PROMPT, "--max-new-tokens", "12", *ONE_THREAD
    for path, engine in ((model[0], "decoder"), (model[0], "transformers"), (tmp_path / "packed", "decoder")):
        found = report("generate", path, *options, "--engine", engine)
        assert (found["engine"], found["tokens"]) == (engine, expected)
        assert found["text"] == Tokenizer(SOURCE).decode(expected)


def test_perplexity(model, report, tmp_path):
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 3)  # no router is close to a tie
    options = "--text", text, "--window", "32", *ONE_THREAD
    found = {
        engine: report("perplexity", model[0], *options, "--engine", engine) for engine in ("decoder", "transformers")
    }
    values = [each["results"][0]["perplexity"] for each in found.values()]
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_bench_and_run(model, report, quick_bandwidth):
    found = report("bench", model[0], "--prompt-tokens", "8", "--new-tokens", "2", "--repeat", "1", *ONE_THREAD)
    assert found["decode_tokens_per_second"] > 0
    found = report("run", model[0], "--tokens", "1", "--repeat", "1", *ONE_THREAD)
    assert (found["ok"], len(found["layers"])) == (True, 2)


def test_chat(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert cli.main(["chat", str(model[0]), "--max-new-tokens", "4", *ONE_THREAD]) == 0
    out, err = capsys.readouterr()
    assert out
    assert "4 tokens" in err


def test_errors(model, tmp_path, capsys):
    path = tmp_path / "model.gguf"
    path.write_bytes(model[0].read_bytes()[:5000])
    for command in (["inspect"], ["generate", "--prompt", "x"], ["bench"], ["run"], ["chat"]):
        assert cli.main([command[0], str(path), *command[1:]]) == 1
        assert "truncated, or damaged" in capsys.readouterr().err


@pytest.mark.sampled(4)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_in_transformers(tmp_path, model_type):
    changes = {"linear_value_head_dim": 32} if model_type == "qwen3_5_moe_text" else {}
    kind = "MXFP4" if model_type == "gpt_oss" else "Q5_1"
    path, dense = write_gguf_model(tmp_path, model_type, kind, **changes)
    loaded, tokens = load(path, dtype=torch.float32, num_threads=1), np.arange(1, 41)
    with torch.no_grad():
        logits = loaded(torch.from_numpy(tokens)[None]).logits[0].numpy()
    assert relative_error(logits, logits_in_float64(dense, tokens)) < 5e-4
