"""``marlin-cy generate`` on the decoder: its text, its figures, its refusals."""

import json
import re
import shutil
import signal
import subprocess
import sys
from importlib.resources import files

import pytest
from slow_text import slow_command

from marlin_cy import cli
from marlin_cy.commands import decoder_model
from marlin_cy.commands.run import BUILT_IN

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

FOLDER = files("marlin_cy") / BUILT_IN
PROMPT = "    def __init__(self, name):\n        self."
KEYS = {
    *("version", "checkpoint", "engine", "backend", "device", "dtype", "cache_dtype", "load_seconds"),
    *("prompt", "text", "tokens", "stopped"),
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
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")
    from marlin_cy.integrations.dequantized import dequantized_model

    prompt = torch.tensor([list(PROMPT.encode())])
    expected = dequantized_model(FOLDER).generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
    for cache in ("float16", "float32"):
        report = report_of(run("--prompt", PROMPT, "--max-new-tokens", 40, "--cache-dtype", cache, "--json"))
        assert report["tokens"] == expected.tolist()
        assert report["text"] == bytes(expected.tolist()).decode()


def test_json(run):
    report = report_of(run("--prompt", PROMPT, "--max-new-tokens", 12, "--json"))
    assert report.keys() == KEYS
    assert (report["engine"], report["backend"], report["dtype"]) == ("decoder", "cpu", "float32")
    assert (report["prompt"], report["cache_dtype"]) == (PROMPT, "float16")
    assert report["device"].endswith("1 threads, int16")
    assert (report["prompt_tokens"], report["generated_tokens"], report["stopped"]) == (len(PROMPT), 12, "length")
    assert 1 < report["prompt_tokens_per_second"] < 1e6
    assert 1 < report["generated_tokens_per_second"] < 1e5
    assert 3.7e6 < report["packed_bytes"] < 4e6
    assert 2e5 < report["other_weight_bytes"] < 4e5
    assert report["resident_bytes"] is None or report["resident_bytes"] > report["packed_bytes"]


def test_text_comes_as_it_is_produced():
    """The first words are there before the last ones."""
    command = slow_command("generate", "--prompt", PROMPT, "--threads", "1")
    with subprocess.Popen(
        [*command, "--max-new-tokens", "900"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline().startswith("_")
        assert child.poll() is None
        child.kill()


def test_ctrl_c():
    """The text so far stays, and the exit code is that of an interrupted program."""
    command = slow_command("generate", "--prompt", PROMPT, "--threads", "1")
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([*command, "--max-new-tokens", "900"], text=True, **pipes) as child:
        assert child.stdout.read(1) == "_"
        child.send_signal(signal.SIGINT)
        text, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (130, "marlin-cy: interrupted\n")
    assert len(text) < 900


def test_text_and_figures(run):
    code, out, err = run("--prompt", PROMPT, "--max-new-tokens", 30)
    assert code == 0
    text = report_of(run("--prompt", PROMPT, "--max-new-tokens", 30, "--json"))["text"]
    assert out == f"{text}\n"
    assert re.search(r"tiny-qwen3-moe-gptq-int4 on cpu \(.*\), decoder, activations in float32", err)
    assert re.search(rf"^prompt +{len(PROMPT)} +[\d.,]+", err, re.MULTILINE)
    assert re.search(r"^generated +30 +[\d.,]+ +stopped: --max-new-tokens", err, re.MULTILINE)
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
    for alone in (("--top-p", 1e-6), ("--top-k", 1), ("--min-p", 1.0)):
        assert report_of(run(*options, *alone))["tokens"] == greedy
    for temperature in (1e-4, 0):
        assert report_of(run(*options[:-1], temperature))["tokens"] == greedy
    for penalty in ("--repetition-penalty", "--presence-penalty"):
        assert report_of(run(*options[:-2], penalty, 5.0))["tokens"] != greedy


def test_stop_strings(run):
    text = report_of(run("--prompt", PROMPT, "--max-new-tokens", 40, "--json"))["text"]
    report = report_of(
        run("--prompt", PROMPT, "--max-new-tokens", 40, "--stop", "nowhere", "--stop", text[9:12], "--json")
    )
    assert report["text"] == text[: text.index(text[9:12])]
    assert report["stopped"] == "stop"


def test_it_stops_where_the_context_is_full(run, tmp_path):
    (tmp_path / "prompt").write_text("x = 1\n" * 170)  # 1020 tokens of 1024
    report = report_of(run("--prompt-file", tmp_path / "prompt", "--json"))
    assert (report["generated_tokens"], report["stopped"]) == (4, "context")


def test_it_stops_where_the_model_ends_the_text(run, tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "checkpoint")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ord(" ")}))
    report = report_of(run(folder, "--prompt", PROMPT, "--json"))
    assert report["stopped"] == "end"
    assert report["tokens"].index(ord(" ")) == report["generated_tokens"] - 1
    assert " " not in report["text"]


def test_it_needs_neither_pytorch_nor_transformers():
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None)\n"
        "from marlin_cy import cli\n"
        f"assert cli.main(['generate', '--prompt', {PROMPT!r}, '--max-new-tokens', '3', '--threads', '1']) == 0"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.sampled(2)
@pytest.mark.parametrize("module", ["torch", "transformers", "rich", "jinja2", "marlin_cy.opencl"])
def test_the_first_token_does_not_wait_for(module):
    code = (
        "import sys\n"
        "from marlin_cy import cli\n"
        "assert cli.main(['generate', '--prompt', 'a', '--max-new-tokens', '1', '--threads', '1', '--json']) == 0\n"
        f"print({module!r} in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


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
    folder = shutil.copytree(FOLDER, tmp_path / "checkpoint")
    (folder / "tokenizer_config.json").write_text("{")
    assert_refused(run(folder, "--prompt", "a"), "tokenizer_config.json", "not JSON")
    (folder / "tokenizer.json").write_text("{")
    assert_refused(run(folder, "--prompt", "a"), "tokenizer.json")
    (folder / "tokenizer.json").unlink()
    assert_refused(run(folder, "--prompt", "a"), "tokenizer.json: no such file")


def test_refuses_an_unknown_isa(run, monkeypatch):
    monkeypatch.setenv("MARLIN_CY_ISA", "z80")
    assert_refused(run("--prompt", "a"), "MARLIN_CY_ISA", "'z80'")


def test_refuses_a_cache_that_does_not_fit(run, monkeypatch):
    def refuse(*arguments, **options):
        raise MemoryError("cache: 9 GB, 1 GB would fit")

    monkeypatch.setattr("marlin_cy.decoder.load.load_model", refuse)
    assert_refused(run("--prompt", "a"), "cache: 9 GB, 1 GB would fit")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--prompt", "a", "--prompt-file", "b"],
        ["--prompt", "a", "--max-new-tokens", "0"],
        ["--prompt", "a", "--temperature", "-1"],
        ["--prompt", "a", "--temperature", "inf"],
        ["--prompt", "a", "--temperature", "warm"],
        ["--prompt", "a", "--temperature", "1", "--top-p", "1.5"],
        ["--prompt", "a", "--temperature", "1", "--top-p", "0"],
        ["--prompt", "a", "--temperature", "1", "--min-p", "-0.5"],
        ["--prompt", "a", "--temperature", "1", "--top-k", "-1"],
        ["--prompt", "a", "--temperature", "1", "--top-k", "1.5"],
        ["--prompt", "a", "--repetition-penalty", "0"],
        ["--prompt", "a", "--presence-penalty", "nan"],
        ["--prompt", "a", "--stop", ""],
        ["--prompt", "a", "--top-p", "0.5"],
        ["--prompt", "a", "--seed", "1"],
        ["--prompt", "a", "--temperature", "0", "--seed", "1"],
        ["--prompt", "a", "--dtype", "float64"],
        ["--prompt", "a", "--engine", "abacus"],
        ["--prompt", "a", "--engine", "decoder", "--dtype", "float32"],
        ["--prompt", "a", "--engine", "transformers", "--cache-dtype", "float32"],
        ["--prompt", "a", "--dtype", "float32", "--cache-dtype", "float32"],
        ["--prompt", "a", "--cache-dtype", "int8"],
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

    monkeypatch.setattr(decoder_model.Path, "read_text", none)
    assert decoder_model.resident_bytes() is None
