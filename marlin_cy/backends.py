"""The backends by name: the built-in backends and the backends that installed packages declare.

A package declares a backend as an entry point in the group ``marlin_cy.backends``::

    [project.entry-points."marlin_cy.backends"]
    abacus = "marlin_abacus:AbacusBackend"

The entry point names a callable ``(**options) -> Backend``, such as a subclass of :class:`~marlin_cy.Backend`. The
callable may have the attributes ``availability``, ``add_arguments``, ``from_arguments``, ``precisions``, ``tuner`` and
``doctor``, which are documented in :class:`~marlin_cy.command_line.CommandLine`. A subclass of ``Backend`` has all of
them. The table :data:`BUILT_IN` declares the built-in backends in the same form, without package metadata.

A package is imported only when its own backend is requested or checked.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from marlin_cy.errors import BackendUnavailable

if TYPE_CHECKING:
    from marlin_cy.interface import Backend

__all__ = ["BUILT_IN", "DEFAULT", "GROUP", "available_backends", "backend_factory", "backend_names", "get_backend"]

GROUP = "marlin_cy.backends"
"""The group of entry points that declare backends."""

BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "cpu": "marlin_cy.cpu:CpuBackend",
        "opencl": "marlin_cy.opencl.factory:make_backend",
    }
)
"""The backends of this package: name and ``module:attribute``."""

DEFAULT = "cpu"
"""The backend that commands use unless another one is named."""


class Declaration(NamedTuple):
    """A package's declaration of a backend: ``value`` is ``module:attribute``, ``package`` its name and version."""

    value: str
    package: str


def get_backend(name: str, **options: Any) -> Backend:
    """The backend called ``name``.

    Parameters
    ----------
    name : str
        ``"cpu"``, ``"opencl"``, or the name of an installed package's backend.
    **options
        Documented by the backend.

    Raises
    ------
    TypeError
        ``name`` is not a string.
    ValueError
        No backend has that name.
    BackendUnavailable
        The backend cannot run on this machine. The message says why.
    """
    from marlin_cy.interface import Backend

    factory = backend_factory(name)
    if reason := _reason_unavailable(factory):
        raise BackendUnavailable(f"backend {name!r}: {reason}")
    backend = factory(**options)
    if not isinstance(backend, Backend):
        raise BackendUnavailable(f"backend {name!r}: got a {type(backend).__name__}, expected a marlin_cy.Backend")
    return backend


def available_backends() -> dict[str, str | None]:
    """Which backends work on this machine.

    Returns
    -------
    dict of str to (str or None)
        For each name None if the backend works, else the reason why not. A package that cannot be imported, or
        whose backend is incomplete, is a reason too.
    """
    return {name: _reason_missing(name) for name in backend_names()}


def backend_names() -> list[str]:
    """The names of all backends, whether they work or not: the built-in ones first. Imports no backend."""
    return [*BUILT_IN, *sorted(_declared())]


def backend_factory(name: str) -> Any:
    """The callable ``(**options) -> Backend`` that is registered as ``name``, imported.

    Raises
    ------
    TypeError
        ``name`` is not a string.
    ValueError
        No backend has that name.
    BackendUnavailable
        The callable cannot be imported, is declared twice, or lacks methods of the interface.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, expected str")
    if name in BUILT_IN:
        return _built_in(name)
    declarations = _declared()
    if name not in declarations:
        known = ", ".join(map(repr, [*BUILT_IN, *sorted(declarations)]))
        raise ValueError(f"name: got {name!r}, expected one of {known}")
    return _third_party(name, declarations[name])


def _built_in(name: str) -> Any:
    value = BUILT_IN[name]
    try:
        return _load(name, value)
    except ImportError as error:
        raise BackendUnavailable(
            f"backend {name!r}: {value.partition(':')[0]} cannot be imported ({error}); "
            "reinstall marlin-cy, which compiles it (in its source folder: pip install .)"
        ) from error


def _third_party(name: str, declarations: list[Declaration]) -> Any:
    from marlin_cy.interface import Backend

    if len(declarations) > 1:
        packages = " and ".join(f"{package} ({value})" for value, package in declarations)
        raise BackendUnavailable(f"backend {name!r}: declared by {packages}; uninstall all but one")
    ((value, package),) = declarations
    prefix = f"backend {name!r}: {value} of package {package}"
    try:
        factory = _load(name, value)
    except Exception as error:  # any exception of the package is the reason
        raise BackendUnavailable(f"{prefix} cannot be imported ({type(error).__name__}: {error})") from error
    if isinstance(factory, type):
        if not issubclass(factory, Backend):
            raise BackendUnavailable(f"{prefix} is a class that is not a subclass of marlin_cy.Backend")
        if missing := sorted(factory.__abstractmethods__):
            raise BackendUnavailable(f"{prefix} lacks the methods {', '.join(missing)} of marlin_cy.Backend")
    elif not callable(factory):
        raise BackendUnavailable(f"{prefix} is a {type(factory).__name__}, expected a callable that makes a Backend")
    return factory


def _load(name: str, value: str) -> Any:
    from importlib.metadata import EntryPoint  # imported here because its import is slow

    return EntryPoint(name, value, GROUP).load()


def _reason_missing(name: str) -> str | None:
    try:
        factory = backend_factory(name)
    except BackendUnavailable as error:
        return str(error).removeprefix(f"backend {name!r}: ")
    return _reason_unavailable(factory)


def _reason_unavailable(factory: Any) -> str | None:
    """The result of a factory's ``availability()``. If the call fails or returns another type, the reason says so."""
    availability = getattr(factory, "availability", None)
    if availability is None:
        return None
    try:
        reason = availability()
    except Exception as error:  # the package's own, of any type
        return f"availability() fails ({type(error).__name__}: {error})"
    if reason is not None and not isinstance(reason, str):
        return f"availability() gives a {type(reason).__name__}, expected None or a str"
    return reason


def _declared() -> dict[str, list[Declaration]]:
    """The backends of installed packages. Two declarations of one name are an error in the packages."""
    found: dict[str, list[Declaration]] = {}
    for name, declaration in _declarations():
        if name in BUILT_IN:
            if declaration.value != BUILT_IN[name]:
                warnings.warn(
                    f"package {declaration.package} declares a backend {name!r}, which is built in: its own is ignored",
                    RuntimeWarning,
                    stacklevel=2,
                )
        elif declaration not in found.setdefault(name, []):
            found[name].append(declaration)
    return found


def _declarations() -> Iterator[tuple[str, Declaration]]:
    """Each declaration once. Of a package that is found in several folders, Python imports the first."""
    from importlib.metadata import distributions

    seen = set()
    for distribution in distributions():
        try:
            entries = distribution.entry_points.select(group=GROUP)
            if not entries:
                continue
            package, version = distribution.metadata["Name"], distribution.metadata["Version"]
        except Exception as error:  # damaged metadata of a package, which need not have a backend
            warnings.warn(
                f"the entry points of an installed package cannot be read ({type(error).__name__}: {error}): "
                "a backend of it is not found",
                RuntimeWarning,
                stacklevel=2,
            )
            continue
        if package not in seen:
            seen.add(package)
            for entry in entries:
                yield entry.name, Declaration(entry.value, f"{package} {version}")
