"""The callable that makes the OpenCL backend. It is importable, and answers the command line, without PyOpenCL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from marlin_cy.opencl.command_line import OpenClCommandLine

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend

__all__ = ["make_backend"]


class OpenClFactory(OpenClCommandLine):
    """Called with the options of :class:`~marlin_cy.opencl.backend.OpenClBackend`, it makes one."""

    def __call__(self, **options: Any) -> OpenClBackend:
        from marlin_cy.opencl.backend import OpenClBackend

        return OpenClBackend(**options)


make_backend = OpenClFactory()
