"""Why the decoder would refuse a checkpoint, by its configuration and the headers of its files: no weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.checkpoint import Checkpoint
from marlin_cy.checkpoints.moe_block import check_sizes
from marlin_cy.decoder.build import PlanBuilder, read_config
from marlin_cy.decoder.config import LatentAttentionConfig
from marlin_cy.decoder.loading import Loader
from marlin_cy.decoder.plan import DenseLinear, Projection
from marlin_cy.distributed.shard import Columns
from marlin_cy.errors import CheckpointError
from marlin_cy.moe.layer import MoeLayer

__all__ = ["check_decoder"]


def check_decoder(checkpoint: Checkpoint) -> None:
    """Refuse what :func:`~marlin_cy.decoder.build.build_plan` would refuse, but for the values of weights.

    Raises
    ------
    CheckpointError, UnsupportedError
        As ``build_plan``.
    """
    config = read_config(checkpoint)
    for problem in checkpoint.problems(layers=True):
        raise problem
    PlanChecker(checkpoint, config, 1, HeaderLoader(checkpoint)).build()


class HeaderLoader(Loader):
    """A loader that checks matrices by the headers of the files. Those that it returns have no values."""

    def _floats(self, tensor: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        if not self.checkpoint.scaled.has_weight(tensor):
            return super()._floats(tensor, shape)
        self.checkpoint.check_tensor(tensor, shape)
        self.checkpoint.scaled.check(tensor)
        self._use(tensor)
        return np.broadcast_to(np.float32(0), shape)

    def projection(self, module: str, k: int, n: int, bias: bool = False, columns: Columns | None = None) -> Projection:
        return self.dense(module, k, n, bias, columns)

    def unpacked(self, module: str, k: int, n: int, bias: bool = False) -> npt.NDArray[np.float32]:
        self._bias(module, n, bias)
        if self.is_quantised(module):
            self._used.add(module)
            check_sizes(module, self.checkpoint.linear_sizes(module), (k, n), self.checkpoint.path)
        else:
            self.matrix(f"{module}.weight", n, k)
        return np.broadcast_to(np.float32(0), (n, k))

    def reordered(
        self, module: str, k: int, n: int, parts: Sequence[Columns], kept: Sequence[Columns | None]
    ) -> list[Projection]:
        self.unpacked(module, k, n)
        columns = (part if own is None else own for part, own in zip(parts, kept, strict=True))
        return [DenseLinear(np.broadcast_to(np.float32(0), (len(own), k))) for own in columns]


class PlanChecker(PlanBuilder):
    """Goes through a plan without its weights."""

    def _own_head(self, name: str, embedding: npt.NDArray[Any]) -> bool:
        return self._loader.has(f"{name}.weight")

    def _up_projections(self, module: str, config: LatentAttentionConfig) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        per_head = config.nope_dim + config.v_head_dim
        nothing = self._loader.unpacked(module, config.latent_dim, config.num_heads * per_head)
        return nothing, nothing

    def _experts(self, layer: int, shared_expert: bool) -> MoeLayer:
        """No layer. Its tensors were checked; the biases are compared with what the model has."""
        checkpoint = self._checkpoint
        experts = f"{checkpoint.moe_block(layer)}.experts"
        biases = [
            name
            for name in checkpoint.tensor_names
            if name.startswith(f"{experts}.") and name.endswith("bias") and not name.endswith("correction_bias")
        ]
        expected = self._config.architecture.expert_bias
        if expected and not biases:
            raise CheckpointError(f"{experts}: the biases are missing", file=checkpoint.path)
        if not expected and any(checkpoint.tensor(name).any() for name in biases):
            raise CheckpointError(f"{experts}: the model has no biases", file=checkpoint.path)
        return cast(MoeLayer, None)  # a plan only holds it
