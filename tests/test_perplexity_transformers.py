"""``marlin-cy perplexity`` with transformers: packed layers predict a text as well as the same weights dense."""

import json
import math
import re
from importlib.resources import files

import numpy as np
import pytest

from marlin_cy import cli
from marlin_cy.commands.run import BUILT_IN

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from test_perplexity import KEYS, RECORDED, report_of  # noqa: E402

from marlin_cy.commands import language_model  # noqa: E402
from marlin_cy.decoder.load import load_model  # noqa: E402
from marlin_cy.decoder.perplexity import perplexity  # noqa: E402
from marlin_cy.errors import UnsupportedError  # noqa: E402
from marlin_cy.integrations.dequantized import dequantized_model  # noqa: E402
from marlin_cy.integrations.transformers import load  # noqa: E402

FOLDER = files("marlin_cy") / BUILT_IN
FEW_WINDOWS, SHORT_WINDOW = 2, 128  # for OpenCL on CPUs, which is slow

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokens():
    text = np.frombuffer((FOLDER / "validation.txt").read_bytes(), np.uint8)
    return torch.from_numpy(text.astype(np.int64))[None]


@pytest.fixture(scope="module")
def dense():
    return dequantized_model(FOLDER)


@pytest.fixture
def run(capsys):
    """Runs the command in this process, on one thread; returns its exit code, stdout and stderr."""

    def command(*arguments, engine=("--engine", "transformers")):
        code = cli.main(["perplexity", *map(str, arguments), *engine, "--threads", "1"])
        return code, *capsys.readouterr()

    return command


def score(model, tokens, windows=32, window=512):
    return language_model.perplexity(model, tokens, window, windows, lambda *progress: None)


@pytest.fixture(scope="module")
def reference(dense, tokens):
    """Of dequantised float32, on all of the held-out text."""
    return score(dense, tokens)


@pytest.mark.sweep
def test_dense_is_as_recorded(reference):
    assert reference == pytest.approx(RECORDED, abs=5e-5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("compute_dtype", "bound"), [("int16", 2e-4), ("int8", 5e-3)])
def test_on_the_cpu(reference, tokens, compute_dtype, bound):
    packed = load(FOLDER, dtype="float32", num_threads=1, compute_dtype=compute_dtype)
    assert score(packed, tokens) == pytest.approx(reference, rel=bound)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("compute_dtype", "bound"), [("int16", 2e-4), ("int8", 5e-3)])
def test_by_the_decoder(reference, tokens, compute_dtype, bound):
    """With the defaults: a cache of float16."""
    model = load_model(FOLDER, num_threads=1, compute_dtype=compute_dtype)
    actual = perplexity(model, tokens[0].tolist(), 512, 32)
    print(f"{compute_dtype}: {actual:.5f}, {100 * (actual / reference - 1):+.4f}%")
    assert actual == pytest.approx(reference, rel=bound)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_on_opencl(dense, tokens, device_alone, dtype):
    packed = load(FOLDER, device_alone, dtype=dtype)
    expected = score(dense, tokens, FEW_WINDOWS, SHORT_WINDOW)
    assert score(packed, tokens, FEW_WINDOWS, SHORT_WINDOW) == pytest.approx(expected, rel=1e-3)


def test_it_is_what_its_definition_says(dense, tokens):
    """``exp(-mean(log p(token | earlier tokens of its window)))``, in float64."""
    window, windows, total = 96, 3, 0.0
    for begin in range(0, window * windows, window):
        seen = tokens[:, begin : begin + window]
        with torch.no_grad():
            logits = dense(seen).logits[0].double().numpy()
        for position in range(1, window):
            row = logits[position - 1]
            total -= row[seen[0, position]] - np.log(np.exp(row - row.max()).sum()) - row.max()
    expected = math.exp(total / (windows * (window - 1)))
    assert score(dense, tokens, windows, window) == pytest.approx(expected, rel=1e-6)


def test_not_a_number_is_no_perplexity(dense, tokens):
    class Broken:
        def __call__(self, seen, **options):
            output = dense(seen, **options)
            output.logits[0, 3] = math.nan
            return output

    assert score(Broken(), tokens, 1) == math.inf


@pytest.mark.sweep
def test_compare(run, monkeypatch):
    """All in one run; without OpenCL it says so."""

    monkeypatch.setattr("marlin_cy.opencl.availability", lambda: "no abacus")
    monkeypatch.setattr("marlin_cy.commands.perplexity.WINDOWS", 8)
    code, out, err = run("--compare", "--window", 16)
    assert (code, err) == (0, "")
    assert "8 windows of 16 tokens of validation.txt (16384 tokens), 120 scored" in out
    rows = re.findall(r"^(\S.*?) {2,}(float32|bfloat16) +(\d+\.\d{5}) +(—|[-+]\S+%) +\d", out, re.MULTILINE)
    assert [row[:2] for row in rows] == [
        ("dequantised, float32", "float32"),
        ("dequantised, bfloat16", "bfloat16"),
        ("cpu, int16", "float32"),
        ("cpu, int8", "float32"),
    ]
    assert [row[3] for row in rows][0] == "—"
    assert "Skipped: opencl, float16 (backend 'opencl': no abacus)" in out
    report = report_of(run("--compare", "--window", 64, "--json"))
    assert report["skipped"] == {"opencl, float16": "backend 'opencl': no abacus"}
    bounds = {"dequantised, bfloat16": 5e-3, "cpu, int16": 2e-4, "cpu, int8": 5e-3}
    first, *others = report["results"]
    assert [result["name"] for result in others] == list(bounds)
    for result in others:
        expected = result["perplexity"] / first["perplexity"] - 1
        assert result["relative_difference"] == pytest.approx(expected)
        assert 0 < abs(expected) < bounds[result["name"]]


def test_json(run):
    report = report_of(run("--json", "--window", 64))
    assert report.keys() == KEYS
    (result,) = report["results"]
    assert (result["name"], result["engine"], result["dtype"]) == ("cpu, int16", "transformers", "bfloat16")
    decoded = report_of(run("--json", "--window", 64, engine=()))["results"][0]
    assert decoded["engine"] == "decoder"
    assert result["perplexity"] == pytest.approx(decoded["perplexity"], rel=5e-3)
    float32 = report_of(run("--json", "--window", 64, "--dtype", "float32", engine=()))["results"][0]
    assert float32["engine"] == "transformers"
    assert float32["perplexity"] == pytest.approx(decoded["perplexity"], rel=2e-4)


def test_a_model_that_the_decoder_does_not_have(run, monkeypatch):
    def refuse(*arguments, **options):
        raise UnsupportedError("model_type 'abacus'")

    monkeypatch.setattr("marlin_cy.decoder.load.load_model", refuse)
    code, out, err = run("--json", "--window", 16, engine=())
    assert code == 0
    assert json.loads(out)["results"][0]["engine"] == "transformers"
    assert err == "marlin-cy: the decoder does not run this model (model_type 'abacus'); transformers runs it\n"
    code, out, err = run("--window", 16, engine=("--engine", "decoder"))
    assert (code, out, err) == (1, "", "marlin-cy: error: model_type 'abacus'\n")


def test_a_tokenizer_that_the_decoder_does_not_read(run, monkeypatch):
    def refuse(folder):
        raise UnsupportedError("tokenizer.model")

    monkeypatch.setattr("marlin_cy.decoder.text.Tokenizer", refuse)
    code, out, err = run("--json", "--window", 16, engine=())
    assert code == 0
    assert json.loads(out)["results"][0]["engine"] == "transformers"
    assert err == (
        "marlin-cy: the decoder does not read this tokenizer (tokenizer.model); transformers runs the model\n"
    )


def test_refuses_an_output_that_is_not_finite(run, monkeypatch):
    monkeypatch.setattr(language_model, "perplexity", lambda *arguments: math.inf)
    code, out, err = run()
    assert (code, out) == (1, "")
    assert "cpu, int16: the model's output has NaN or infinity" in err
