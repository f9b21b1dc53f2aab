"""The OpenCL backend's part of ``marlin-cy tune``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from marlin_cy.opencl import tuned, tuning
from marlin_cy.opencl.backend import OpenClBackend
from marlin_cy.opencl.tiers.configuration import Configuration
from marlin_cy.tuning import Choice, Shape, TuningResult

__all__ = ["OpenClTuner"]


class OpenClTuner:
    """A :class:`~marlin_cy.tuning.Tuner` of kernel configurations.

    Parameters
    ----------
    backend : OpenClBackend
        Other threads must not use it during the search.

    Raises
    ------
    MarlinError
        The results cannot be stored.
    """

    def __init__(self, backend: OpenClBackend) -> None:
        self._backend = backend
        self._device, self._tier = backend.runtime.capabilities, backend.tier
        # Before the measurements: fail early where the results cannot be stored.
        self._file = tuned.keep(self._device, self._tier, [])

    @property
    def place(self) -> Mapping[str, str]:
        return {"device": self._device.name, "driver": self._device.driver_version, "tier": self._tier.name}

    @property
    def file(self) -> str:
        return str(self._file)

    def tune(
        self, shape: Shape, tokens: Sequence[int], progress: Callable[[int, int, str], None]
    ) -> Sequence[TuningResult]:
        measured = tuning.tune(self._backend, shape, tokens, progress)
        tuned.keep(self._device, self._tier, measured)
        return [as_result(result) for result in measured]


def as_result(result: tuning.Tuning) -> TuningResult:
    return TuningResult(
        shape=result.shape,
        tokens=result.tokens,
        rows=result.rows,
        default_seconds=result.default_seconds,
        best_seconds=result.best_seconds,
        best=as_choice(result.best),
        is_default=result.best == result.default,
        tried=result.tried,
        refused=[(as_choice(configuration), reason) for configuration, reason in result.refused],
    )


def as_choice(configuration: Configuration) -> Choice:
    macros = " ".join(f"{name}={value}" for name, value in configuration.macros)
    kernel = f"{configuration.file}: " if configuration.file else ""
    words = f"{kernel}{configuration.rows} × {configuration.columns}, splits {configuration.splits}, {macros}"
    return Choice(tuned.as_entry(configuration), words)
