"""The callable that makes the OpenCL backend. Its import and its command-line methods do not need PyOpenCL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from marlin_cy.opencl.command_line import OpenClCommandLine

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend

__all__ = ["make_backend"]


class OpenClFactory(OpenClCommandLine):
    """Makes an :class:`~marlin_cy.opencl.backend.OpenClBackend` from the options of that class."""

    def __call__(self, **options: Any) -> OpenClBackend:
        from marlin_cy.opencl.backend import OpenClBackend

        return OpenClBackend(**options)


make_backend = OpenClFactory()
