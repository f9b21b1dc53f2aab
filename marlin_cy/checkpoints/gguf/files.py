"""Paths that mean a GGUF model: a file, a part of a model that was split, or a folder that holds nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from marlin_cy.errors import CheckpointError

__all__ = ["find_gguf", "model_files"]

SUFFIX = ".gguf"
SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
PROJECTOR = "mmproj"
"""The beginning of the names of files that hold an image encoder for the model beside them."""

MAGIC = b"GGUF"


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path means; None if the path means something else, such as a folder of safetensors.

    Raises
    ------
    CheckpointError
        A folder has several GGUF models, or one beside safetensors.
    """
    if not path.is_dir():
        return path if path.suffix.lower() == SUFFIX or _begins_with_magic(path) else None
    found = [file for file in sorted(path.glob(f"*{SUFFIX}")) if not file.name.lower().startswith(PROJECTOR)]
    if not found:
        return None
    others = sorted(path.glob("*.safetensors"))
    if others:
        raise CheckpointError(
            f"got {others[0].name} and {found[0].name}, expected one format; move the one away, or open the GGUF file "
            "by its own path",
            file=path,
        )
    models = list(dict.fromkeys(model_files(file)[0] for file in found))
    if len(models) > 1:
        raise CheckpointError(
            f"got {len(models)} GGUF models: {', '.join(model.name for model in models)}; open one by its own path",
            file=path,
        )
    return found[0]


def model_files(path: Path) -> tuple[Path, ...]:
    """All files of the model that a file belongs to, in order.

    Raises
    ------
    CheckpointError
        The numbers in the file's name are invalid.
    """
    match = SPLIT.fullmatch(path.name)
    if match is None:
        return (path,)
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count:
        raise CheckpointError(f"got part {number} of {count}, expected part 1 to {count}", file=path)
    return tuple(path.with_name(f"{match['stem']}-{part:05}-of-{count:05}{SUFFIX}") for part in range(1, count + 1))


def _begins_with_magic(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False
