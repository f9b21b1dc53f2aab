"""``marlin-cy chat``: answers, history, commands, interruptions, refusals."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from importlib.resources import files

import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from fake_model import FakeModel, install, write_tokenizer  # noqa: E402
from slow_text import slow_command  # noqa: E402

from marlin_cy import cli  # noqa: E402
from marlin_cy.commands.run import BUILT_IN  # noqa: E402

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
EOS = 256


class Terminal(io.StringIO):
    """An input whose lines may be exceptions."""

    def __init__(self, lines, terminal):
        super().__init__()
        self._lines, self._terminal = iter(lines), terminal

    def readline(self):
        line = next(self._lines, "")
        if isinstance(line, BaseException):
            raise line
        return line

    def isatty(self):
        return self._terminal


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 300}')
    return write_tokenizer(tmp_path, chat_template=TEMPLATE)


@pytest.fixture
def model(folder, monkeypatch):
    """It answers each message with "Yes.", and notes the prompts."""
    model = FakeModel(folder, context_length=300)
    model.prompts = []

    def logits(tokens):
        text = bytes(token % 256 for token in tokens).decode(errors="replace")
        prompt, _, answer = text.rpartition("a:")
        if not answer:
            model.prompts.append(prompt)
        found = FakeModel.logits(model, tokens)
        found[[*b"Yes.", EOS][min(len(answer.encode()), 4)]] = 10
        return found

    model.logits = logits
    model.loads = install(monkeypatch, model)
    return model


@pytest.fixture
def talk(folder, monkeypatch, capsys):
    """Runs the command with these lines as its input; gives its exit code, stdout and stderr."""

    def command(lines, *options, terminal=False):
        monkeypatch.setattr(sys, "stdin", Terminal(lines, terminal))
        code = cli.main(["chat", str(folder), *options, "--threads", "1"])
        return code, *capsys.readouterr()

    return command


def test_a_conversation(model, talk):
    code, out, err = talk(["Hello\n", "\n", "And now?"], "--system", "Be brief.")
    assert (code, out) == (0, "Yes.\nYes.\n")
    start = "s:Be brief.\nu:Hello\n"
    assert model.prompts == [start, f"{start}a:Yes.\nu:And now?\n"]
    assert len(model.calls[0]) == 1
    assert max(length for call in model.calls[1:] for length in call) < len(model.prompts[1])
    assert re.search(r"on cpu \(.*1 threads, int16\), loaded in \d", err)
    assert len(re.findall(r"5 tokens, [\d.,]+ tokens/s, the first after", err)) == 2
    assert re.search(r"tokens/s\. Memory: [\d,.]+ MB resident", err)
    assert "> " not in err
    assert model.loads[0]["context_length"] == 300


def test_commands(model, talk):
    code, out, err = talk(["One\n", "/reset\n", "Two\n", "/help me\n", " /exit \n", "Three\n"], "--system", "S")
    assert (code, out) == (0, "Yes.\nYes.\n")
    assert model.prompts == ["s:S\nu:One\n", "s:S\nu:Two\n"]
    assert "got /help, expected /reset, /exit or a message" in err


def test_ctrl_c_stops_the_answer(model, talk):
    """What was answered stays in the history, and the next message is answered."""
    pick_batch = model.pick_batch

    def interrupted(pairs, samplers):
        if len(model.prompts) == 1 and list(pairs[0][1]) == [ord("e")]:
            raise KeyboardInterrupt
        return pick_batch(pairs, samplers)

    model.pick_batch = interrupted
    code, out, err = talk(["One\n", "Two\n"])
    assert (code, out) == (0, "Ye\nYes.\n")
    assert "2 tokens" in err
    assert "; stopped" in err
    assert model.prompts == ["u:One\n", "u:One\na:Ye\nu:Two\n"]


def test_ctrl_c_before_the_first_token(model, talk):
    pick_batch = model.pick_batch

    def interrupted(pairs, samplers):
        if not model.prompts:
            model.prompts.append(None)
            raise KeyboardInterrupt
        return pick_batch(pairs, samplers)

    model.pick_batch = interrupted
    code, out, _ = talk(["One\n", "Two\n"])
    assert (code, out) == (0, "Yes.\n")
    assert model.prompts == [None, "u:Two\n"]  # a message without an answer is forgotten


def test_ctrl_c_at_the_prompt(model, talk):
    code, out, err = talk([KeyboardInterrupt(), "One\n", KeyboardInterrupt(), "/exit\n"], terminal=True)
    assert (code, out) == (0, "Yes.\n")
    assert err.count("> ") == 4


def test_errors_do_not_end_a_conversation(model, talk):
    lines = ["One\n", "x" * 400 + "\n", "Two\n"]
    for terminal, expected in ((True, 0), (False, 1)):
        model.prompts.clear()
        code, out, err = talk(lines, terminal=terminal)
        assert (code, out) == (expected, "Yes.\nYes.\n")
        assert "marlin-cy: error: messages: got" in err
        assert "a context of 300" in err
        assert model.prompts[1] == "u:One\na:Yes.\nu:Two\n"


def test_options(model, talk):
    code, out, err = talk(["One\n"], "--max-new-tokens", "2")
    assert (code, out) == (0, "Ye\n")
    assert "; the answer has --max-new-tokens" in err
    options = ["--context-length", "12", "--cache-dtype", "float32", "--stop", "s", "--compute-dtype", "int8"]
    code, out, err = talk(["One\n"], *options)
    assert (code, out) == (0, "Ye\n")
    loaded = model.loads[-1]
    assert (loaded["context_length"], loaded["cache_dtype"], loaded["compute_dtype"]) == (12, "float32", "int8")


def test_the_context_is_full(model, talk):
    model.context_length = len("u:One\na:") + 2
    code, out, err = talk(["One\n"])
    assert (code, out) == (0, "Ye\n")
    assert "; the context is full: /reset begins anew" in err


def test_the_default_context_has_a_limit(model, folder, talk):
    (folder / "config.json").write_text('{"text_config": {"max_position_embeddings": 1000000}}')
    talk([])
    (folder / "config.json").write_text("{}")
    talk([])
    assert [load["context_length"] for load in model.loads] == [16384, 16384]


def test_sampling_is_that_of_the_folder(model, folder, talk):
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 50.0}))
    assert talk(["One\n"], "--max-new-tokens", "5")[1] != "Yes.\n"
    assert talk(["One\n"], "--max-new-tokens", "5", "--temperature", "0")[1] == "Yes.\n"
    assert talk(["One\n"], "--max-new-tokens", "5", "--top-k", "1")[1] == "Yes.\n"


def test_refuses_folders(model, folder, talk):
    """Before the model is loaded."""
    for name, content, words in (
        ("generation_config.json", '{"top_p": 3}', "generation_config.json: top_p: got 3"),
        ("tokenizer_config.json", "{}", "tokenizer_config.json: no chat template"),
        ("tokenizer.json", "{", "tokenizer.json: "),
    ):
        (folder / name).write_text(content)
        code, out, err = talk(["One\n"])
        assert (code, out) == (1, "")
        assert words in err
        assert err.startswith("marlin-cy: error: ")
    assert model.loads == []


def test_refuses_input_that_is_not_utf_8(model, talk):
    code, _, err = talk([UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")])
    assert code == 1
    assert "the input: not UTF-8 (invalid start byte at byte 0)" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-new-tokens", "0"],
        ["--context-length", "x"],
        ["--temperature", "-1"],
        ["--dtype", "float32"],
        ["--json"],
        ["--backend", "opencl", "--threads", "1"],
    ],
    ids=" ".join,
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["chat", *arguments])
    assert stop.value.code == 2
    assert "usage: marlin-cy chat" in capsys.readouterr().err


@pytest.fixture
def chatting(tmp_path):
    """The built-in model with a chat template, in a process of its own."""
    folder = shutil.copytree(files("marlin_cy") / BUILT_IN, tmp_path / "checkpoint")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    command = slow_command("chat", folder, "--threads", "1", "--temperature", "0")
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([*command, "--max-new-tokens", "700"], text=True, bufsize=1, **pipes) as child:
        yield child
        child.kill()


def test_in_a_process(chatting):
    """Ctrl-C stops the first answer, and the second one is whole."""
    chatting.stdin.write("def f(\n")
    assert chatting.stdout.read(1)
    chatting.send_signal(signal.SIGINT)
    chatting.stdin.write("/reset\ndef f(\n")
    out, err = chatting.communicate(timeout=120)
    assert chatting.returncode == 0, err
    assert re.search(r"^marlin-cy: \d+ tokens.*; stopped$", err, re.MULTILINE)
    assert re.search(r"^marlin-cy: 700 tokens.*; the answer has --max-new-tokens$", err, re.MULTILINE)
    assert len(out) > 700
