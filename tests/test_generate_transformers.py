"""``marlin-cy generate`` with transformers: its text, its figures, its refusals."""

import json
import re
from importlib.resources import files

import pytest

from marlin_cy import available_backends, cli
from marlin_cy.commands.run import BUILT_IN

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from language_models import write_model  # noqa: E402
from test_generate import KEYS, PROMPT, assert_refused, report_of  # noqa: E402

from marlin_cy.commands import language_model  # noqa: E402
from marlin_cy.errors import UnsupportedError  # noqa: E402
from marlin_cy.integrations.dequantized import dequantized_model  # noqa: E402

FOLDER = files("marlin_cy") / BUILT_IN


@pytest.fixture
def run(capsys):
    """Runs the command in this process, on one thread; gives its exit code, stdout and stderr."""

    def command(*arguments, engine=("--engine", "transformers"), threads=("--threads", "1")):
        code = cli.main(["generate", *map(str, arguments), *engine, *threads])
        return code, *capsys.readouterr()

    return command


def test_text_is_that_of_the_dense_model(run):
    options = ("--prompt", PROMPT, "--max-new-tokens", 40, "--dtype", "float32", "--json")
    report = report_of(run(*options))
    prompt = torch.tensor([list(PROMPT.encode())])
    expected = dequantized_model(FOLDER).generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
    assert report["tokens"] == expected.tolist()
    assert report["text"] == bytes(expected.tolist()).decode()
    assert report["text"].startswith("_")
    assert report_of(run(*options, engine=()))["engine"] == "transformers"  # --dtype is an option of transformers


def test_json(run):
    report = report_of(run("--prompt", PROMPT, "--max-new-tokens", 12, "--json"))
    assert report.keys() == KEYS
    assert (report["engine"], report["backend"], report["dtype"]) == ("transformers", "cpu", "bfloat16")
    assert (report["prompt"], report["cache_dtype"]) == (PROMPT, None)
    assert report["device"].endswith("1 threads, int16")
    assert (report["prompt_tokens"], report["generated_tokens"], report["stopped"]) == (len(PROMPT), 12, "length")
    assert 1 < report["prompt_tokens_per_second"] < 1e6
    assert 1 < report["generated_tokens_per_second"] < 1e5
    assert 3.7e6 < report["packed_bytes"] < 4e6
    assert 2e5 < report["other_weight_bytes"] < 4e5
    assert report["resident_bytes"] is None or report["resident_bytes"] > report["packed_bytes"]


def test_text_and_figures(run):
    code, out, err = run("--prompt", PROMPT, "--max-new-tokens", 30)
    assert code == 0
    text = report_of(run("--prompt", PROMPT, "--max-new-tokens", 30, "--json"))["text"]
    assert out == f"{text}\n"
    assert re.search(r"tiny-qwen3-moe-gptq-int4 on cpu \(.*\), transformers, activations in bfloat16", err)
    assert re.search(rf"^prompt +{len(PROMPT)} +[\d.,]+", err, re.MULTILINE)
    assert re.search(r"^generated +30 +[\d.,]+ +stopped: --max-new-tokens", err, re.MULTILINE)
    assert re.search(r"Weights: 3\.\d MB packed, 0\.\d MB others", err)


@pytest.mark.sweep
def test_sampling(run):
    options = ("--prompt", PROMPT, "--max-new-tokens", 16, "--json", "--temperature", 1.5)
    first, again, other = (report_of(run(*options, "--seed", seed))["tokens"] for seed in (1, 1, 2))
    assert first == again != other
    greedy = report_of(run("--prompt", PROMPT, "--max-new-tokens", 16, "--json"))["tokens"]
    assert first != greedy
    # So little of the probability that it is the most likely token alone.
    for alone in (("--top-p", 1e-6), ("--top-k", 1), ("--min-p", 1.0)):
        assert report_of(run(*options, *alone))["tokens"] == greedy
    for temperature in (1e-4, 0):
        assert report_of(run(*options[:-1], temperature))["tokens"] == greedy
    assert report_of(run(*options[:-2], "--repetition-penalty", 5.0))["tokens"] != greedy


def test_options_of_the_decoder(run):
    for option in (("--stop", "x"), ("--presence-penalty", "1")):
        assert_refused(run("--prompt", "a", *option), f"{option[0]}: only with the decoder")


def test_it_stops_where_the_context_is_full(run, tmp_path):
    (tmp_path / "prompt").write_text("x = 1\n" * 170)  # 1020 tokens of 1024
    report = report_of(run("--prompt-file", tmp_path / "prompt", "--json"))
    assert (report["generated_tokens"], report["stopped"]) == (4, "context")


def test_it_stops_where_the_model_ends_the_text(run, monkeypatch):
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


def test_a_model_that_the_decoder_does_not_have(run, monkeypatch):
    def refuse(*arguments, **options):
        raise UnsupportedError("model_type 'abacus'")

    monkeypatch.setattr("marlin_cy.decoder.load.load_model", refuse)
    options = ("--prompt", PROMPT, "--max-new-tokens", 4, "--json")
    code, out, err = run(*options, engine=())
    assert code == 0
    assert json.loads(out)["engine"] == "transformers"
    expected = "the decoder does not run this model (model_type 'abacus'); transformers runs it"
    assert err == f"marlin-cy: {expected}\n"
    assert_refused(run(*options, engine=("--engine", "decoder")), "model_type 'abacus'")
    code, out, err = run(*options, "--stop", "x", engine=())
    assert (code, out) == (1, "")
    assert "--stop: only with the decoder, but transformers runs this model" in err


def test_refuses_prompts(run, tmp_path):
    (tmp_path / "prompt").write_bytes(b"a" * 1024)
    assert_refused(run("--prompt-file", tmp_path / "prompt"), "1024 tokens", "a context of 1024")


def test_refuses_folders(run, tmp_path):
    assert_refused(run(tmp_path / "none", "--prompt", "a"), str(tmp_path / "none"))
    quantised, _ = write_model(tmp_path, "qwen3_moe")
    assert_refused(run(quantised, "--prompt", "a"), str(quantised), "tokenizer")
