"""``marlin-cy generate``: its text, its figures, its refusals."""

import json
import re
import subprocess
import sys
from importlib.resources import files

import pytest

from marlin_cy import available_backends, cli
from marlin_cy.commands import generate
from marlin_cy.commands.run import BUILT_IN

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from language_models import write_model  # noqa: E402

from marlin_cy.integrations.dequantized import dequantized_model  # noqa: E402

FOLDER = files("marlin_cy") / BUILT_IN
PROMPT = "    def __init__(self, name):\n        self."
KEYS = {
    *("version", "checkpoint", "backend", "device", "dtype", "load_seconds", "prompt", "text", "tokens", "stopped"),
    *("prompt_tokens", "prompt_tokens_per_second", "generated_tokens", "generated_tokens_per_second"),
    *("packed_bytes", "other_weight_bytes", "resident_bytes"),
}


@pytest.fixture
def run(capsys):
    """Runs the command in this process, on one thread; returns its exit code, stdout and stderr."""

    def command(*arguments, threads=("--threads", "1")):
        code = cli.main(["generate", *map(str, arguments), *threads])
        return code, *capsys.readouterr()

    return command


def report_of(done):
    code, out, err = done
    assert (code, err) == (0, "")
    return json.loads(out)


def assert_refused(done, *words):
    """Exit code 1, a message with these words, and nothing on stdout."""
    code, out, err = done
    assert (code, out) == (1, "")
    assert err.startswith("marlin-cy: error: ")
    for word in words:
        assert word in err


def test_text_is_that_of_the_dense_model(run):
    report = report_of(run("--prompt", PROMPT, "--max-new-tokens", 40, "--dtype", "float32", "--json"))
    prompt = torch.tensor([list(PROMPT.encode())])
    expected = dequantized_model(FOLDER).generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
    assert report["tokens"] == expected.tolist()
    assert report["text"] == bytes(expected.tolist()).decode()
    assert report["text"].startswith("_")


def test_json(run):
    report = report_of(run("--prompt", PROMPT, "--max-new-tokens", 12, "--json"))
    assert report.keys() == KEYS
    assert (report["backend"], report["dtype"], report["prompt"]) == ("cpu", "bfloat16", PROMPT)
    assert report["device"].endswith("1 threads, int16")
    assert (report["prompt_tokens"], report["generated_tokens"], report["stopped"]) == (len(PROMPT), 12, "length")
    assert 1 < report["prompt_tokens_per_second"] < 1e6
    assert 1 < report["generated_tokens_per_second"] < 1e5
    assert 3.7e6 < report["packed_bytes"] < 4e6
    assert 2e5 < report["other_weight_bytes"] < 4e5
    assert report["resident_bytes"] is None or report["resident_bytes"] > report["packed_bytes"]


def test_text_comes_as_it_is_produced():
    """The first words are there long before the last ones."""
    command = [sys.executable, "-u", "-m", "marlin_cy", "generate", "--prompt", PROMPT, "--threads", "1"]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "900"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline().startswith("_")
        assert child.poll() is None
        child.kill()


def test_text_and_figures(run):
    code, out, err = run("--prompt", PROMPT, "--max-new-tokens", 30)
    assert code == 0
    text = report_of(run("--prompt", PROMPT, "--max-new-tokens", 30, "--json"))["text"]
    assert out == f"{text}\n"
    assert "tiny-qwen3-moe-gptq-int4 on cpu (" in err
    assert re.search(rf"^prompt +{len(PROMPT)} +[\d.]+", err, re.MULTILINE)
    assert re.search(r"^generated +30 +[\d.]+ +stopped: --max-new-tokens", err, re.MULTILINE)
    assert re.search(r"Weights: 3\.\d MB packed, 0\.\d MB others", err)


def test_prompt_from_a_file(run, tmp_path):
    (tmp_path / "prompt").write_bytes(PROMPT.encode())
    options = ("--max-new-tokens", 8, "--json")
    from_file = report_of(run("--prompt-file", tmp_path / "prompt", *options))
    assert from_file["tokens"] == report_of(run("--prompt", PROMPT, *options))["tokens"]


def test_one_token_has_no_rate(run):
    report = report_of(run("--prompt", PROMPT, "--max-new-tokens", 1, "--json"))
    assert report["generated_tokens"] == 1
    assert report["generated_tokens_per_second"] is None
    assert run("--prompt", PROMPT, "--max-new-tokens", 1)[0] == 0


def test_sampling(run):
    options = ("--prompt", PROMPT, "--max-new-tokens", 40, "--json", "--temperature", 1.5)
    first, again, other = (report_of(run(*options, "--seed", seed))["tokens"] for seed in (1, 1, 2))
    assert first == again != other
    greedy = report_of(run("--prompt", PROMPT, "--max-new-tokens", 40, "--json"))["tokens"]
    assert first != greedy
    # So little of the probability that it is the most likely token alone.
    assert report_of(run(*options, "--top-p", 1e-6))["tokens"] == greedy
    assert report_of(run(*options[:-1], 1e-4))["tokens"] == greedy


def test_it_stops_where_the_context_is_full(run, tmp_path):
    (tmp_path / "prompt").write_text("x = 1\n" * 170)  # 1020 tokens of 1024
    report = report_of(run("--prompt-file", tmp_path / "prompt", "--json"))
    assert (report["generated_tokens"], report["stopped"]) == (4, "context")


def test_it_stops_where_the_model_ends_the_text(run, monkeypatch):
    from marlin_cy.commands import language_model

    def ended(self, folder, dtype, load=language_model.PackedPlace.load):
        model = load(self, folder, dtype)
        model.generation_config.eos_token_id = ord(" ")
        return model

    monkeypatch.setattr(language_model.PackedPlace, "load", ended)
    report = report_of(run("--prompt", PROMPT, "--json"))
    assert report["stopped"] == "end"
    assert report["tokens"].index(ord(" ")) == report["generated_tokens"] - 1


@pytest.mark.skipif(available_backends()["opencl"] is not None, reason=str(available_backends()["opencl"]))
def test_on_opencl(run):
    options = ("--prompt", PROMPT, "--max-new-tokens", 4, "--dtype", "float32", "--json")
    report = report_of(run(*options, "--backend", "opencl", "--tier", "portable", threads=()))
    assert report["backend"] == "opencl"
    assert report["device"].endswith("tier portable")
    assert report["tokens"] == report_of(run(*options))["tokens"]


@pytest.mark.parametrize(
    ("text", "words"),
    [(b"", ["empty"]), (b"ab\xff", ["not UTF-8", "byte 2"]), (b"a" * 1024, ["1024 tokens", "a context of 1024"])],
)
def test_refuses_prompt_files(run, tmp_path, text, words):
    (tmp_path / "prompt").write_bytes(text)
    assert_refused(run("--prompt-file", tmp_path / "prompt"), *words)


def test_refuses_prompts(run, tmp_path):
    assert_refused(run("--prompt", ""), "--prompt: empty")
    assert_refused(run("--prompt", "\udcff"), "--prompt: not UTF-8")
    assert_refused(run("--prompt-file", tmp_path / "none"), str(tmp_path / "none"))


def test_refuses_folders(run, tmp_path):
    assert_refused(run(tmp_path / "none", "--prompt", "a"), str(tmp_path / "none"))
    quantised, _ = write_model(tmp_path, "qwen3_moe")
    assert_refused(run(quantised, "--prompt", "a"), str(quantised), "tokenizer")


def test_refuses_an_unknown_isa(run, monkeypatch):
    monkeypatch.setenv("MARLIN_CY_ISA", "z80")
    assert_refused(run("--prompt", "a"), "MARLIN_CY_ISA", "'z80'")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--prompt", "a", "--prompt-file", "b"],
        ["--prompt", "a", "--max-new-tokens", "0"],
        ["--prompt", "a", "--temperature", "0"],
        ["--prompt", "a", "--temperature", "inf"],
        ["--prompt", "a", "--temperature", "warm"],
        ["--prompt", "a", "--temperature", "1", "--top-p", "1.5"],
        ["--prompt", "a", "--top-p", "0.5"],
        ["--prompt", "a", "--seed", "1"],
        ["--prompt", "a", "--dtype", "float64"],
        ["--prompt", "a", "--backend", "opencl", "--threads", "1"],
        ["--prompt", "a", "--device", "0"],
    ],
    ids=" ".join,
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", *arguments])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "usage: marlin-cy generate" in err


def test_resident_memory_where_the_system_does_not_say(monkeypatch):
    def none(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(generate.Path, "read_text", none)
    assert generate.resident_bytes() is None
