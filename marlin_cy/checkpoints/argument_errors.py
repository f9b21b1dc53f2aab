"""Errors about arguments, turned into errors about the checkpoint that the arguments come from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from marlin_cy.errors import CheckpointError
from marlin_cy.formats.json_fields import StrPath

__all__ = ["as_checkpoint_error"]


@contextmanager
def as_checkpoint_error(file: StrPath, tensor: str | None = None) -> Iterator[None]:
    """Turn an error about an argument into a :class:`CheckpointError` about the file that the argument is from."""
    try:
        yield
    except CheckpointError:
        raise
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(str(error), file=file, tensor=tensor) from error
