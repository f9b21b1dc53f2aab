"""The documentation agrees with the code: links, files, commands, options and environment variables exist."""

import re
import shlex
from pathlib import Path

import pytest
from test_readme import commands_of, parse, run_block

from marlin_cy import cli

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md"), ROOT / "opencl" / "README.md"]
}
COMMAND_LINE = PAGES["docs/command-line.md"]
# A fence that says "run" marks a block that is complete; other blocks are excerpts.
RUNNABLE = {
    f"{page}:{index}": code
    for page, text in PAGES.items()
    for index, code in enumerate(re.findall(r"^```python run\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
}
# The pages on adding something name backends that are not installed.
COMMANDS = sorted(
    {
        command
        for page, text in PAGES.items()
        if page != "README.md" and "/adding-" not in page
        for command in commands_of(text)
    }
)
VARIABLE = re.compile(r"\bMARLIN_CY_[A-Z][A-Z_]*\b")


def without_code(text):
    """A page without its code blocks and inline code, which may hold brackets."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text):
    """The anchors of a page's headings, as renderers of Markdown make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def source_of(*folders, suffixes=(".py", ".pyx")):
    """The text of all source files in folders of the repository."""
    return "\n".join(
        path.read_text(encoding="utf-8")
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in suffixes
    )


def test_there_is_something_to_test():
    assert len(PAGES) > 10
    assert RUNNABLE
    assert COMMANDS


@pytest.mark.parametrize("name", RUNNABLE)
def test_runnable_block_runs(name, tmp_path):
    run_block(RUNNABLE[name], tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    parse(shlex.split(command)[1:])


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    folder = (ROOT / page).parent
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(PAGES[page])):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (folder / path).resolve() if path else ROOT / page
        if not linked.exists() or (anchor and anchor not in anchors(linked.read_text(encoding="utf-8"))):
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    named = re.findall(r"`((?:marlin_cy|opencl|tests|tools|bench|docs)/[\w/.\-]+\.\w+)`", PAGES[page])
    # A how-to page tells the reader to create files: "Create `...`".
    created = re.findall(r"[Cc]reate `([\w/.\-]+)`", PAGES[page])
    assert [name for name in named if name not in created and not (ROOT / name).exists()] == []


def test_every_page_is_in_the_index():
    index = PAGES["docs/README.md"]
    pages = [path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md"]
    assert [name for name in pages if f"]({name})" not in index] == []


def test_commands_are_those_of_the_parser():
    documented = re.findall(r"^\| `([a-z]+)` \|", COMMAND_LINE, re.MULTILINE)
    assert documented == list(cli.COMMANDS)
    assert {command.split()[1] for command in commands_of(COMMAND_LINE)} == set(cli.COMMANDS)


def test_options_exist(capsys):
    """Every option that the page names is in the help of a command, for one of the backends."""
    helps = ""
    for command in cli.COMMANDS:
        for backend in ([], ["--backend", "opencl"]):
            with pytest.raises(SystemExit):
                parse([command, *backend, "--help"])
            helps += capsys.readouterr().out
    existing = set(re.findall(r"--[a-z][a-z\-]*", helps))
    assert set(re.findall(r"--[a-z][a-z\-]*", COMMAND_LINE)) - existing == set()


def test_environment_variables_are_those_of_the_code():
    documented = re.findall(r"^\| `([A-Z_]+)` \|", COMMAND_LINE, re.MULTILINE)
    source = source_of("marlin_cy", "opencl")
    foreign = {"NO_COLOR"}  # rich reads it
    assert [name for name in documented if name not in foreign and f'"{name}"' not in source] == []
    in_code = {name for name in VARIABLE.findall(source) if f'"{name}"' in source}
    assert in_code == {name for name in documented if VARIABLE.fullmatch(name)}


def test_variables_of_other_pages_exist():
    source = source_of("marlin_cy", "opencl", "tests", "bench", "tools") + (ROOT / "setup.py").read_text(
        encoding="utf-8"
    )
    named = {name for page in PAGES.values() for name in VARIABLE.findall(page)}
    assert {name for name in named if name not in source} == set()
