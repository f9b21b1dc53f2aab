"""The options that commands on OpenCL have in common: which device, which kernels."""

from marlin_cy import get_backend
from marlin_cy.errors import MarlinError
from marlin_cy.opencl.tiers import TIERS

__all__ = ["add_opencl_options", "open_opencl"]


def add_opencl_options(parser):
    """Declare ``--device`` and ``--tier``."""
    parser.add_argument("--device", metavar="DEVICE", help="of OpenCL: an index, or a part of its name")
    parser.add_argument(
        "--tier", choices=[tier.name for tier in TIERS], help="of OpenCL's kernels; default: the best that works"
    )


def open_opencl(arguments):
    """The backend that the options ask for.

    Raises
    ------
    BackendUnavailable
        It cannot run here, or not with this tier.
    MarlinError
        ``--device``, or the variable in its place, names no device.
    """
    try:
        return get_backend("opencl", device=arguments.device, tier=arguments.tier)
    except (ValueError, IndexError) as error:
        raise MarlinError(str(error)) from error
