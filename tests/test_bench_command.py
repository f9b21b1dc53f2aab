"""``marlin-cy bench``: what it runs, its figures, its refusals."""

import json
import re
import shutil
from importlib.resources import files

import numpy as np
import pytest
from fake_model import FakeModel, install

from marlin_cy import cli
from marlin_cy.commands.run import BUILT_IN

FOLDER = files("marlin_cy") / BUILT_IN
KEYS = {
    *("version", "checkpoint", "backend", "device", "cache_dtype"),
    *("prompt_tokens", "new_tokens", "depth", "sequences", "repeat", "load_seconds"),
    *("prefill_tokens_per_second", "decode_tokens_per_second", "prefill_seconds", "decode_seconds"),
    *("packed_bytes", "other_weight_bytes", "cache_bytes", "resident_bytes"),
}


@pytest.fixture
def run(capsys):
    """Runs the command in this process, on one thread; gives its exit code, stdout and stderr."""

    def command(*arguments):
        code = cli.main(["bench", *map(str, arguments), "--threads", "1"])
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def model(monkeypatch):
    model = FakeModel(FOLDER, context_length=1000, cache_tokens=10**6)
    model.logits = lambda tokens: np.zeros(model.vocab_size, np.float32)
    model.loads = install(monkeypatch, model)
    return model


def report_of(done):
    code, out, err = done
    assert (code, err) == (0, "")
    return json.loads(out)


def test_it_runs_what_it_says(model, run):
    options = ("--prompt-tokens", 30, "--new-tokens", 4, "--depth", 50, "--sequences", 3, "--repeat", 2)
    report = report_of(run(*options, "--json"))
    fill, prefill, decode = [[50] * 3], [[30] * 3], [[1] * 3] * 4
    assert model.calls == fill + prefill * 3 + decode * 3  # the first run of each is not counted
    lengths = sorted(sequence.length for sequence in model.sequences)
    assert lengths == [50] * 3 + [54] * 9 + [80] * 9
    assert model.loads[0]["cache_tokens"] >= 3 * 80
    assert (len(report["prefill_seconds"]), len(report["decode_seconds"])) == (2, 2)
    for name, tokens in (("prefill", 3 * 30), ("decode", 3 * 4)):
        median = sum(report[f"{name}_seconds"]) / 2
        assert report[f"{name}_tokens_per_second"] == pytest.approx(tokens / median)


def test_no_depth(model, run):
    report_of(run("--prompt-tokens", 7, "--new-tokens", 2, "--repeat", 1, "--json"))
    assert model.calls == [[7], [7], [1], [1], [1], [1]]
    assert len(model.open) == 0


def test_parts_that_are_left_out(model, run):
    report = report_of(run("--prompt-tokens", 0, "--new-tokens", 2, "--repeat", 1, "--json"))
    assert (report["prefill_tokens_per_second"], report["prefill_seconds"]) == (None, [])
    assert model.calls == [[1]] * 4
    model.calls.clear()
    report = report_of(run("--prompt-tokens", 5, "--new-tokens", 0, "--repeat", 1, "--json"))
    assert (report["decode_tokens_per_second"], report["decode_seconds"]) == (None, [])
    assert model.calls == [[5]] * 2
    assert "decode" not in run("--prompt-tokens", 5, "--new-tokens", 0)[1]


def test_built_in_model(run):
    report = report_of(run("--prompt-tokens", 64, "--new-tokens", 8, "--repeat", 2, "--json"))
    assert report.keys() == KEYS
    assert (report["prompt_tokens"], report["new_tokens"], report["depth"], report["sequences"]) == (64, 8, 0, 1)
    assert (report["backend"], report["cache_dtype"]) == ("cpu", "float16")
    assert report["device"].endswith("1 threads, int16")
    assert report["prefill_tokens_per_second"] > report["decode_tokens_per_second"] > 1
    assert 3.7e6 < report["packed_bytes"] < 4e6
    assert 2e5 < report["other_weight_bytes"] < 4e5
    assert report["cache_bytes"] > 0


def test_depth_of_the_built_in_model(run):
    options = ("--depth", 100, "--sequences", 2, "--new-tokens", 4, "--prompt-tokens", 20, "--repeat", 1)
    report = report_of(run(*options, "--cache-dtype", "float32", "--compute-dtype", "int8", "--json"))
    assert report["cache_dtype"] == "float32"
    assert report["device"].endswith("1 threads, int8")


def test_table(run):
    code, out, err = run("--prompt-tokens", 16, "--new-tokens", 4, "--repeat", 1)
    assert (code, err) == (0, "")
    assert re.search(r"tiny-qwen3-moe-gptq-int4 on cpu \(.*\), cache in float16, 1 sequences, depth 0", out)
    assert re.search(r"^prefill +16 +[\d.,]+", out, re.MULTILINE)
    assert re.search(r"^decode +4 +[\d.,]+", out, re.MULTILINE)
    assert re.search(r"Weights: 3\.\d MB packed, 0\.\d MB others\. Cache: ", out)


def test_it_needs_no_tokenizer(run, tmp_path):
    ignored = shutil.ignore_patterns("tokenizer*", "generation_config.json")
    folder = shutil.copytree(FOLDER, tmp_path / "checkpoint", ignore=ignored)
    report_of(run(folder, "--prompt-tokens", 4, "--new-tokens", 1, "--repeat", 1, "--json"))


def test_refuses(run, tmp_path):
    for arguments, words in (
        ((tmp_path / "none",), str(tmp_path / "none")),
        (("--depth", 1000, "--prompt-tokens", 25), "--depth 1000: 1064 tokens with those of a run"),
        (("--prompt-tokens", 1025), "a context of 1024"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "")
        assert err.startswith("marlin-cy: error: ")
        assert words in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt-tokens", "0", "--new-tokens", "0"],
        ["--prompt-tokens", "-1"],
        ["--new-tokens", "x"],
        ["--depth", "-1"],
        ["--sequences", "0"],
        ["--repeat", "0"],
        ["--cache-dtype", "int4"],
        ["--prompt", "a"],
    ],
    ids=" ".join,
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    assert stop.value.code == 2
    assert "usage: marlin-cy bench" in capsys.readouterr().err
