"""What the README tells people to do works."""

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
COMMANDS = sorted(set(re.findall(r"^(marlin-cy \S.*?)(?: +#.*)?$", README, re.MULTILINE)))


def test_there_is_something_to_test():
    assert PYTHON_BLOCKS
    assert COMMANDS


@pytest.mark.parametrize("code", PYTHON_BLOCKS, ids=[f"block{i}" for i in range(len(PYTHON_BLOCKS))])
def test_python_block_runs(code, tmp_path):
    if "transformers" in code:
        pytest.importorskip("transformers", reason="transformers is not installed")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    cli._parser().parse_args(shlex.split(command)[1:])


def test_ci_runs_the_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    steps = [line for line in script.splitlines() if line.startswith(("python3 ", ".venv/"))]
    assert "'.[test,transformers]'" in README  # which is what CI has in place of '.[test]'
    assert " && ".join(steps).replace("'.[test,transformers]'", "'.[test]'") in README
