"""The commands and code of the README work."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from marlin_cy import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands_of(page):
    """The lines of a page that begin with ``marlin-cy``, without their comments."""
    return re.findall(r"^(marlin-cy \S.*?)(?: +#.*)?$", page, re.MULTILINE)


def parse(words):
    """Parse a command line as ``marlin-cy`` does; SystemExit if it is wrong."""
    parser = cli._parser(words)
    return parser.parse_args(words)


def run_block(code, folder):
    """Run a Python block in a process of its own. It must print something, and nothing on stderr."""
    if "transformers" in code:
        pytest.importorskip("transformers", reason="transformers is not installed")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip()


COMMANDS = sorted(set(commands_of(README)))


def test_there_is_something_to_test():
    assert PYTHON_BLOCKS
    assert COMMANDS


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 180


@pytest.mark.parametrize("code", PYTHON_BLOCKS, ids=[f"block{i}" for i in range(len(PYTHON_BLOCKS))])
def test_python_block_runs(code, tmp_path):
    run_block(code, tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    parse(shlex.split(command)[1:])


def test_ci_begins_with_the_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    steps = [line for line in script.splitlines() if line.startswith(("python3 ", ".venv/"))]
    # CI adds the packages for formatting and for tests against transformers, and lets Python compile on import.
    command = " && ".join(steps[:3]).replace("--no-compile -e '.[dev,transformers]'", "-e '.[test]'")
    assert command in README
