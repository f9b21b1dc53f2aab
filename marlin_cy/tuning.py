"""The interface between ``marlin-cy tune`` and the tuner of a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

__all__ = ["Choice", "Shape", "Tuner", "TuningResult"]


@dataclass(frozen=True)
class Shape:
    """A stack of random weights to measure on.

    Attributes
    ----------
    k, n, experts, group_size : int
    top_k : int
        Experts of a token.
    gathered : bool
        The input has a row for each (token, expert) pair, as in a layer's second product.
    symmetric : bool
        All zero points are 8. Also set for codes and records without zero points.
    codes : str
        Name of the code type.
    scales : str
        Name of the scale record.
    """

    k: int
    n: int
    experts: int
    group_size: int
    top_k: int = 8
    gathered: bool = False
    symmetric: bool = True
    codes: str = "uint4"
    scales: str = "float16"


class Choice(NamedTuple):
    """One of the kernels, or of the settings of a kernel, that a tuner compares.

    Attributes
    ----------
    document : dict
        For ``--json``.
    words : str
        For the table.
    """

    document: dict[str, Any]
    words: str


class TuningResult(NamedTuple):
    """The result for one shape and one number of tokens.

    Attributes
    ----------
    shape : Shape
    tokens : int
    rows : int
        Rows of each expert.
    default_seconds, best_seconds : float
    best : Choice
    is_default : bool
        Whether ``best`` is the backend's own choice.
    tried : int
        Number of choices that were compared with the default.
    refused : list of (Choice, str)
        Choices that fail or compute wrong results, with the reason.
    """

    shape: Shape
    tokens: int
    rows: int
    default_seconds: float
    best_seconds: float
    best: Choice
    is_default: bool
    tried: int
    refused: Sequence[tuple[Choice, str]]


class Tuner(Protocol):
    """Measures and stores the fastest choice for a product on the device of one backend.

    Attributes
    ----------
    place : mapping of str to str
        What the results depend on besides the shape, such as the device and its driver. For ``--json`` and, in this
        order, for the heading of the table.
    file : str
        Where the results are stored.
    """

    @property
    def place(self) -> Mapping[str, str]:
        """See above."""

    @property
    def file(self) -> str:
        """See above."""

    def tune(
        self, shape: Shape, tokens: Sequence[int], progress: Callable[[int, int, str], None]
    ) -> Sequence[TuningResult]:
        """Measure, and store the results. Backends that are made afterwards use them.

        Parameters
        ----------
        shape : Shape
        tokens : sequence of int
        progress : callable
            Called as ``progress(done, total, description)``.

        Raises
        ------
        ValueError, TypeError
            The backend cannot load weights of this shape.
        MarlinError
            The results cannot be stored, or no choice computes right results.
        """
