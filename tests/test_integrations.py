"""The parts that need PyTorch and transformers, and the messages if these are missing."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from marlin_cy.integrations import __main__ as launcher
from marlin_cy.integrations import check_version

# None in sys.modules makes Python treat a module as not installed.
WITHOUT = "import sys; sys.modules.update({missing}=None)\n"


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not os.environ.get("CI"), reason="CI is not set: this machine need not have PyTorch")
def test_ci_has_pytorch_and_transformers():
    """Elsewhere the tests of whole models may be skipped, with a reason; not where the project's tests count."""
    assert find_spec("torch")
    assert find_spec("transformers")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("missing", ["torch", "transformers"])
@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["perplexity"]], ids=lambda words: words[0])
def test_command_says_what_to_install(missing, command):
    command = [*command, "--engine", "transformers"]
    done = python(WITHOUT.format(missing=missing) + f"from marlin_cy import cli; sys.exit(cli.main({command}))")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("marlin-cy: error: ")
    assert "pip install 'marlin-cy[transformers]'" in done.stderr
    assert missing in done.stderr
    assert "Traceback" not in done.stderr


# Without transformers, Python imports PyTorch first, which takes seconds.
@pytest.mark.parametrize("missing", ["torch", pytest.param("transformers", marks=pytest.mark.sweep)])
def test_import_says_what_to_install(missing):
    done = python(
        WITHOUT.format(missing=missing)
        + """
from marlin_cy.errors import BackendUnavailable
try:
    import marlin_cy.integrations.transformers
except BackendUnavailable as error:
    print(error)
"""
    )
    assert "pip install 'marlin-cy[transformers]'" in done.stdout, done.stderr


@pytest.mark.sweep
def test_an_old_transformers_will_not_do():
    pytest.importorskip("transformers", reason="transformers is not installed")
    done = python("import transformers; transformers.__version__ = '5.7.9'\nimport marlin_cy.integrations.transformers")
    assert "BackendUnavailable: PyTorch and transformers 5.8 or later are needed (this is transformers 5.7.9)" in (
        done.stderr
    )


def test_a_later_transformers_gives_a_warning():
    with pytest.warns(UserWarning, match=r"^transformers 6\.0\.dev0: marlin_cy is tested with 5\.8 to \d+\.\d+$"):
        check_version("6.0.dev0")
    for version in ("5.8.0", "5.24.1", "5.9rc1"):
        check_version(version)
    with pytest.raises(ImportError, match=r"this is transformers 5\.7\.9"):
        check_version("5.7.9")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Run a program of another package"),
        (["--help"], "Run a program of another package"),
        (["abacus"], "'abacus': no installed package has this command"),
    ],
)
def test_programs_that_do_not_run(arguments, words):
    with pytest.raises(SystemExit, match=words):
        launcher.main(arguments)


@pytest.mark.sweep
def test_a_program_runs_with_registered_methods():
    pytest.importorskip("transformers", reason="transformers is not installed")
    done = python(
        """
import sys
from importlib.metadata import EntryPoint
from marlin_cy.integrations import __main__ as launcher
launcher.entry_points = lambda **wanted: [EntryPoint("program", "platform:python_version", "console_scripts")]
assert launcher.main(["program", "--option"]).startswith("3.")
assert sys.argv == ["program", "--option"]
from transformers.quantizers import auto
print({auto.AUTO_QUANTIZER_MAPPING[name].__name__ for name in ("gptq", "awq", "mxfp4")})
"""
    )
    assert done.stdout.splitlines()[-1:] == ["{'MarlinCyQuantizer'}"], done.stderr


def test_other_commands_need_neither():
    done = python(
        "import sys; from marlin_cy import cli; from marlin_cy.cpu.measure import _bandwidth;"
        "_bandwidth.read_bandwidth = lambda num_threads: 10e9; cli.main(['doctor', '--json']);"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
