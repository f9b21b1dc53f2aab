"""The choice between builds of a tensor-core kernel: the first that gives correct results on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol, TypeVar

from marlin_cy.errors import BuildError
from marlin_cy.opencl.tiers.mma import local_limit

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend

__all__ = ["Build", "first_right"]


class Build(Protocol):
    """A kernel with its macros; its representation names all of them."""

    @property
    def local_bytes(self) -> int:
        """Local memory of a work-group."""
        ...


B = TypeVar("B", bound=Build)


def first_right(
    backend: OpenClBackend, builds: Iterable[B], what: str, check: Callable[[B], str | None], kind: object = ""
) -> B | None:
    """The first build that gives correct results on the backend's device.

    None if the backend's tier has no tensor cores, or no build is correct: then the portable kernel is used, with a
    warning.

    Parameters
    ----------
    backend : OpenClBackend
    builds : iterable of Build
        Best first.
    what : str
        The kernel, for the warning.
    check : callable
        ``check(build)`` runs a build; returns None or a description of the error.
    kind : object
        What the check depends on besides the build.
    """
    if backend.tier.name != "mma":
        return None
    device, verdicts = backend.runtime.capabilities, backend.runtime.verdicts
    for build in builds:
        if build.local_bytes > local_limit(device):
            continue
        if verdicts is None:
            return build
        try:
            reason = verdicts.reason_wrong(f"{what}: {build} {kind}", lambda build=build: check(build))  # type: ignore[misc]
        except BuildError as error:
            reason = f"its program does not compile: {error}"
        if reason is None:
            return build
        verdicts.warn(f"{device.name}, {what}: {build}", reason, stacklevel=5)
    return None
