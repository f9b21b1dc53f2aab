"""The methods of a backend that the command line calls before it makes the backend.

They give the availability, the options, the precisions and the diagnosis.

Every method has a default, so a backend that overrides no method still works with
``marlin-cy run --backend NAME``. Where a backend's entry point names a function, the methods may be attributes of that
function, see :mod:`marlin_cy.backends`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

    from marlin_cy.tuning import Tuner

__all__ = ["ArgumentGroup", "CommandLine", "DoctorReport", "Precision"]


class ArgumentGroup(Protocol):
    """The argument of :meth:`CommandLine.add_arguments`: a parser of argparse, or an argument group of a parser."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Declare an argument."""


class Precision(NamedTuple):
    """A precision in which ``marlin-cy perplexity --compare`` runs a model.

    Attributes
    ----------
    name : str
        A short name, which follows the backend's in the results.
    dtype : str
        Dtype of the model's activations: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    options : mapping
        Options of :meth:`~marlin_cy.Backend.new_context`. The command line's option for each has the same name.
    """

    name: str
    dtype: str
    options: Mapping[str, Any] = {}


@dataclass(frozen=True)
class DoctorReport:
    """A backend's part of ``marlin-cy doctor``.

    Attributes
    ----------
    document : dict
        For ``--json``, of types that JSON has. It is stored under the backend's name; the entries of the built-in
        backends' documents are stored at the top level.
    works : bool
        Whether the backend works with the settings in the environment variables.
    print_tables : callable
        Prints the report on a :class:`rich.console.Console`.
    """

    document: dict[str, Any]
    works: bool = True
    print_tables: Callable[[Console], None] = field(default=lambda screen: None)


class CommandLine:
    """The part of a :class:`~marlin_cy.Backend` that concerns the command line."""

    @classmethod
    def availability(cls) -> str | None:
        """None if the backend can run on this machine, else the reason why not, and what to install."""
        return None

    @classmethod
    def add_arguments(cls, group: ArgumentGroup) -> None:
        """Declare the command-line options of the backend and of its contexts.

        The default of every option is None, which means that the option was not given.
        """

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> dict[str, Any]:
        """The keyword arguments that the backend is made with, from the parsed command line."""
        return {}

    @classmethod
    def precisions(cls) -> Sequence[Precision]:
        """The precisions that ``marlin-cy perplexity --compare`` runs."""
        return (Precision("", "float32"),)

    @classmethod
    def tuner(cls) -> Callable[[Any], Tuner] | None:
        """The function that makes the :class:`~marlin_cy.tuning.Tuner` of a backend, for ``marlin-cy tune``.

        None if the backend has nothing to tune. The function takes the backend. It raises a
        :class:`~marlin_cy.errors.MarlinError` if results cannot be stored.
        """
        return None

    @classmethod
    def doctor(cls) -> DoctorReport | None:
        """The report of ``marlin-cy doctor`` on this machine's devices and drivers, or None.

        It is called even if :meth:`availability` returns a reason.
        """
        return None
