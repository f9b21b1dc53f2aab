"""A plugin of vLLM: 4-bit experts and linear layers run packed where vLLM runs on CPUs.

::

    vLLM loads plugins ── register() ── config.py           the quantisation method "marlin_cy": which layers run packed
                                          ├── linear.py     linear layers
                                          ├── experts.py    routed experts; expert_weights.py packs them
                                          ├── dense.py      unquantised layers, on CPUs without AVX512
                                          └── attention.py  attention, on CPUs without AVX512
    tensors.py  what vLLM's loader hands over               shares.py  this process's part of a weight

vLLM calls :func:`register` in each of its processes, by the entry point ``vllm.general_plugins``.
"""

from __future__ import annotations

import re
import warnings

__all__ = ["TESTED", "register", "warn_if_untested"]

TESTED = ("0.32.0", "0.32")
"""The first version of vLLM that the plugin is tested with, and the last minor version."""


def register() -> None:
    """Register the quantisation method ``marlin_cy``, if vLLM runs on CPUs here. May be called any number of times.

    A checkpoint that the method can run gets it without a further option. ``quantization="gptq"``, or another name,
    selects vLLM's own method.

    Warns
    -----
    RuntimeWarning
        The version of vLLM is not in :data:`TESTED`, or lacks what the plugin needs. The plugin is then off.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import vllm

    warn_if_untested(vllm.__version__)
    try:
        import marlin_cy.integrations.vllm.config  # noqa: F401  registers itself
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"vLLM {vllm.__version__} has no place for the plugin of marlin_cy, which is off: {error}. The plugin is "
            f"tested with vLLM {TESTED[0]} to {TESTED[1]}.",
            RuntimeWarning,
            stacklevel=2,
        )


def warn_if_untested(version: str) -> None:
    """Warn if the plugin is not tested with this version of vLLM.

    Parameters
    ----------
    version : str
        ``vllm.__version__``, which may have a suffix: ``"0.32.1+cpu"``.
    """
    first, last = (_numbers(entry) for entry in TESTED)
    if not first <= _numbers(version) or _numbers(version)[: len(last)] > last:
        warnings.warn(
            f"the plugin of marlin_cy is tested with vLLM {TESTED[0]} to {TESTED[1]}, this is vLLM {version}",
            RuntimeWarning,
            stacklevel=3,
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: ``(0, 32, 1)`` of ``"0.32.1+cpu"``."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
