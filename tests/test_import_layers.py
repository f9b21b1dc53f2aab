"""Imports between packages go one way: weights < formats < checkpoints, and stacks use weights alone."""

import ast
from pathlib import Path

import pytest

import marlin_cy

ROOT = Path(marlin_cy.__file__).parent
FORBIDDEN = {
    "weights": ("formats", "checkpoints", "stacks", "interface", "moe", "cpu", "opencl"),
    "formats": ("checkpoints", "stacks", "interface", "moe", "cpu", "opencl"),
    "stacks": ("formats", "checkpoints", "moe", "cpu", "opencl"),
    "checkpoints": ("cpu", "opencl", "commands"),
}


def imports_of(source):
    """The modules that a module imports when it is imported itself, under ``TYPE_CHECKING`` not counted."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_package_imports_upward(package):
    files = sorted((ROOT / package).glob("*.py"))
    assert files
    above = {f"marlin_cy.{name}" for name in FORBIDDEN[package]}
    wrong = [
        f"{path.name}: {name}"
        for path in files
        for name in imports_of(path.read_text(encoding="utf-8"))
        if any(name == module or name.startswith(f"{module}.") for module in above)
    ]
    assert not wrong
