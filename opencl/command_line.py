"""The OpenCL backend's part of the command line. It does not need PyOpenCL."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from marlin_cy import opencl
from marlin_cy.command_line import ArgumentGroup, CommandLine, DoctorReport, Precision

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.tuning import Tuner

__all__ = ["OpenClCommandLine"]


class OpenClCommandLine(CommandLine):
    """The options ``--device`` and ``--tier``, the precision of ``--compare``, the tuner, and the doctor's report."""

    @classmethod
    def availability(cls) -> str | None:
        return opencl.availability()

    @classmethod
    def add_arguments(cls, group: ArgumentGroup) -> None:
        from marlin_cy.opencl.tiers import TIERS

        group.add_argument("--device", metavar="DEVICE", help="an index, or a part of the device's name")
        group.add_argument(
            "--tier", choices=[tier.name for tier in TIERS], help="the kernels to use; default: the best that work"
        )

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> dict[str, Any]:
        return {"device": arguments.device, "tier": arguments.tier}

    @classmethod
    def precisions(cls) -> Sequence[Precision]:
        return [Precision("float16", "float16")]

    @classmethod
    def tuner(cls) -> Callable[[OpenClBackend], Tuner]:
        def make(backend: OpenClBackend) -> Tuner:
            from marlin_cy.opencl.tuner import OpenClTuner

            return OpenClTuner(backend)

        return make

    @classmethod
    def doctor(cls) -> DoctorReport:
        from marlin_cy.opencl.doctor import report

        return report()
