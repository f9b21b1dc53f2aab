"""``marlin-cy perplexity``: packed layers predict a text as well as the same weights dense."""

import json
import math
import re
from importlib.resources import files

import numpy as np
import pytest

from marlin_cy import cli
from marlin_cy.commands.run import BUILT_IN
from marlin_cy.decoder.model import load_model
from marlin_cy.decoder.perplexity import perplexity

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from marlin_cy.commands import language_model  # noqa: E402
from marlin_cy.integrations.dequantized import dequantized_model  # noqa: E402
from marlin_cy.integrations.transformers import load  # noqa: E402

FOLDER = files("marlin_cy") / BUILT_IN
KEYS = {"version", "checkpoint", "text", "tokens", "window", "windows", "scored_tokens", "skipped", "results"}
# Of dequantised float64, on all of the held-out text; recorded when the checkpoint was made.
RECORDED = 2.6256
FEW_WINDOWS = 2  # for OpenCL on CPUs, which is slow

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

    def command(*arguments, threads=("--threads", "1")):
        code = cli.main(["perplexity", *map(str, arguments), *threads])
        return code, *capsys.readouterr()

    return command


def score(model, tokens, windows=32, window=512):
    return language_model.perplexity(model, tokens, window, windows, lambda *progress: None)


@pytest.fixture(scope="module")
def reference(dense, tokens):
    """Of dequantised float32, on all of the held-out text."""
    return score(dense, tokens)


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
    assert score(packed, tokens, FEW_WINDOWS) == pytest.approx(score(dense, tokens, FEW_WINDOWS), rel=1e-3)


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


def report_of(done):
    code, out, err = done
    assert (code, err) == (0, "")
    return json.loads(out)


def test_json(run):
    report = report_of(run("--json"))
    assert report.keys() == KEYS
    assert (report["tokens"], report["window"], report["windows"]) == (16384, 512, 32)
    assert (report["scored_tokens"], report["skipped"]) == (32 * 511, {})
    (result,) = report["results"]
    assert (result["name"], result["dtype"], result["relative_difference"]) == ("cpu, int16", "bfloat16", 0.0)
    assert result["perplexity"] == pytest.approx(RECORDED, rel=1e-3)
    assert result["seconds"] > 0


@pytest.mark.sweep
def test_compare(run, monkeypatch):
    """All in one run; without OpenCL it says so."""

    monkeypatch.setattr("marlin_cy.opencl.availability", lambda: "no abacus")
    code, out, err = run("--compare", "--window", 16)
    assert (code, err) == (0, "")
    assert "32 windows of 16 tokens of validation.txt (16384 tokens), 480 scored" in out
    rows = re.findall(r"^(\S.*?) {2,}(float32|bfloat16) +(\d+\.\d{5}) +(—|[-+]\S+%) +\d", out, re.MULTILINE)
    assert [row[:2] for row in rows] == [
        ("dequantised, float32", "float32"),
        ("dequantised, bfloat16", "bfloat16"),
        ("cpu, int16", "float32"),
        ("cpu, int8", "float32"),
    ]
    assert [row[3] for row in rows][0] == "—"
    assert "Skipped: opencl, float16 (backend 'opencl': no abacus)" in out
    report = report_of(run("--compare", "--window", 128, "--json"))
    assert report["skipped"] == {"opencl, float16": "backend 'opencl': no abacus"}
    bounds = {"dequantised, bfloat16": 5e-3, "cpu, int16": 2e-4, "cpu, int8": 5e-3}
    first, *others = report["results"]
    assert [result["name"] for result in others] == list(bounds)
    for result in others:
        expected = result["perplexity"] / first["perplexity"] - 1
        assert result["relative_difference"] == pytest.approx(expected)
        assert 0 < abs(expected) < bounds[result["name"]]


@pytest.mark.parametrize(
    ("options", "windows", "window"),
    [((), 32, 512), (("--all",), 35, 512), (("--all", "--window", 1024), 17, 1024), (("--window", 100), 32, 100)],
)
def test_windows(run, tmp_path, monkeypatch, options, windows, window):
    asked = []
    monkeypatch.setattr(language_model, "perplexity", lambda model, tokens, *sizes: asked.append(sizes[:2]) or 2.5)
    text = (FOLDER / "validation.txt").read_text()
    (tmp_path / "text").write_text((text + text)[: 35 * 512 + 7])
    report = report_of(run("--text", tmp_path / "text", "--json", *options))
    assert (report["windows"], report["window"], report["tokens"]) == (windows, window, 35 * 512 + 7)
    assert report["scored_tokens"] == windows * (window - 1)
    assert asked == [(window, windows)]


def test_text_that_is_shorter_than_a_window(run, tmp_path):
    (tmp_path / "text").write_text("import os\n")
    report = report_of(run("--text", tmp_path / "text", "--json"))
    assert (report["windows"], report["window"], report["scored_tokens"]) == (1, 10, 9)


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (b"", (), ["empty"]),
        (b"a", (), ["1 tokens, expected at least 2"]),
        (b"abc\xff", (), ["not UTF-8", "byte 3"]),
        (b"abc", ("--window", "2048"), ["--window: got 2048", "context of 1024 tokens"]),
    ],
)
def test_refuses(run, tmp_path, text, options, words):
    (tmp_path / "text").write_bytes(text)
    code, out, err = run("--text", tmp_path / "text", *options)
    assert (code, out) == (1, "")
    assert err.startswith("marlin-cy: error: ")
    for word in words:
        assert word in err


def test_refuses_an_output_that_is_not_finite(run, monkeypatch):
    monkeypatch.setattr(language_model, "perplexity", lambda *arguments: math.inf)
    code, out, err = run()
    assert (code, out) == (1, "")
    assert "cpu, int16: the model's output has NaN or infinity" in err


def test_refuses_folders_and_files_that_are_not_there(run, tmp_path):
    for arguments in ([tmp_path / "none"], ["--text", tmp_path / "none"]):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "")
        assert str(tmp_path / "none") in err


def test_refuses_a_backend_that_is_missing(run, monkeypatch):
    monkeypatch.setattr("marlin_cy.opencl.availability", lambda: "no abacus")
    code, out, err = run("--backend", "opencl", threads=())
    assert (code, out, err) == (1, "", "marlin-cy: error: backend 'opencl': no abacus\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--window", "1"],
        ["--window", "many"],
        ["--compare", "--compute-dtype", "int8"],
        ["--compare", "--dtype", "float32"],
        ["--backend", "opencl", "--threads", "1"],
        ["--tier", "portable"],
    ],
    ids=" ".join,
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["perplexity", *arguments])
    assert stop.value.code == 2
    assert "usage: marlin-cy perplexity" in capsys.readouterr().err
