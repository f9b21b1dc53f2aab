"""marlin_cy inside other libraries: ``transformers.py`` loads whole models, ``vllm/`` is a plugin of vLLM.

``python -m marlin_cy.integrations PROGRAM`` runs a program that loads models by transformers: ``__main__.py``.
"""

from __future__ import annotations

import re
import warnings
from contextlib import AbstractContextManager

from marlin_cy.extras import needs

__all__ = ["check_version", "needs_extra"]

OLDEST = (5, 8)
NEWEST = (5, 24)
"""The versions of transformers that are tested. Earlier ones refuse experts implementations of other packages."""


def needs_extra() -> AbstractContextManager[None]:
    """Context for imports of PyTorch and transformers: :func:`marlin_cy.extras.needs`."""
    return needs(f"PyTorch and transformers {_text(OLDEST)} or later", "transformers")


def check_version(version: str) -> None:
    """Refuse versions of transformers before the tested ones, and warn about later ones.

    Raises
    ------
    ImportError
    """
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST:
        raise ImportError(f"this is transformers {version}")
    if found > NEWEST:
        warnings.warn(
            f"transformers {version}: marlin_cy is tested with {_text(OLDEST)} to {_text(NEWEST)}", stacklevel=3
        )


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
