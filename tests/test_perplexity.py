"""``marlin-cy perplexity`` on the decoder: the number, its windows, its refusals."""

import json
import math
from importlib.resources import files

import numpy as np
import pytest
from fake_model import FakeModel

from marlin_cy import cli
from marlin_cy.commands.run import BUILT_IN
from marlin_cy.decoder import perplexity as scoring

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

FOLDER = files("marlin_cy") / BUILT_IN
KEYS = {"version", "checkpoint", "text", "tokens", "window", "windows", "scored_tokens", "skipped", "results"}
# Of dequantised float64, on all of the held-out text; recorded when the checkpoint was made, to 5 digits.
RECORDED = 2.6256


@pytest.fixture
def run(capsys):
    """Runs the command in this process, on one thread; returns its exit code, stdout and stderr."""

    def command(*arguments, threads=("--threads", "1")):
        code = cli.main(["perplexity", *map(str, arguments), *threads])
        return code, *capsys.readouterr()

    return command


def report_of(done):
    code, out, err = done
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.mark.parametrize("logits_at_once", [264, 5000, 1 << 24])
def test_it_is_what_its_definition_says(monkeypatch, logits_at_once):
    """``exp(-mean(log p(token | those before it in its window)))``, in float64, whatever runs in a call."""
    monkeypatch.setattr(scoring, "LOGITS", logits_at_once)
    model, window, windows, total = FakeModel(FOLDER), 24, 3, 0.0
    tokens = np.random.default_rng(0).integers(0, 264, 80).tolist()
    for begin in range(0, window * windows, window):
        for position in range(begin + 1, begin + window):
            row = model.logits(tokens[begin:position]).astype(np.float64)
            total -= row[tokens[position]] - np.log(np.exp(row).sum())
    expected = math.exp(total / (windows * (window - 1)))
    told = []
    value = scoring.perplexity(model, tokens, window, windows, lambda *state: told.append(state))
    assert value == pytest.approx(expected, rel=1e-6)
    assert told == [(1, 3, "window 1"), (2, 3, "window 2"), (3, 3, "window 3")]
    assert model.open == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_a_number_is_no_perplexity(value):
    model = FakeModel(FOLDER)
    model.logits = lambda tokens: np.full(264, value if len(tokens) == 3 else 0, np.float32)
    assert scoring.perplexity(model, list(range(20)), 10, 2) == math.inf


def test_int8(run):
    (result,) = report_of(run("--compute-dtype", "int8", "--json"))["results"]
    assert result["name"] == "cpu, int8"
    assert result["perplexity"] == pytest.approx(RECORDED, rel=5e-3)


def test_cache_dtypes(run):
    found = [report_of(run("--window", 64, "--cache-dtype", name, "--json")) for name in ("float32", "float16")]
    first, second = (report["results"][0]["perplexity"] for report in found)
    assert 0 < abs(first / second - 1) < 2**-11  # half a unit in the last place of float16


@pytest.mark.sweep
def test_json(run):
    report = report_of(run("--json"))
    assert report.keys() == KEYS
    assert (report["tokens"], report["window"], report["windows"]) == (16384, 512, 32)
    assert (report["scored_tokens"], report["skipped"]) == (32 * 511, {})
    (result,) = report["results"]
    assert (result["name"], result["engine"], result["dtype"]) == ("cpu, int16", "decoder", "float32")
    assert result["relative_difference"] == 0.0
    assert result["perplexity"] == pytest.approx(RECORDED, rel=2e-4 + 2e-5)
    assert result["device"].endswith("1 threads, int16")
    assert result["seconds"] > 0


@pytest.mark.parametrize(
    ("options", "windows", "window"),
    [((), 32, 512), (("--all",), 35, 512), (("--all", "--window", 1024), 17, 1024), (("--window", 100), 32, 100)],
)
def test_windows(run, tmp_path, monkeypatch, options, windows, window):
    asked = []
    score = "marlin_cy.decoder.perplexity.perplexity"
    monkeypatch.setattr(score, lambda model, tokens, *sizes: asked.append(sizes[:2]) or 2.5)
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
    monkeypatch.setattr("marlin_cy.decoder.perplexity.perplexity", lambda *arguments: math.inf)
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
        ["--engine", "decoder", "--dtype", "float32"],
        ["--engine", "transformers", "--cache-dtype", "float32"],
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
