"""The names in a checkpoint's files: the prefix of layers, the set of names of the family, layers beyond the last."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING

from marlin_cy.checkpoints.families import Family, block_prefix
from marlin_cy.formats.json_fields import JsonObject, StrPath, optional

if TYPE_CHECKING:
    from marlin_cy.checkpoints.contents import Tensors

__all__ = ["Naming"]

LAYER_PREFIXES = (
    "model.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "backbone.layers",
    "layers",
)
"""The prefixes of layers' names: of language models, of models with other inputs too, of Nemotron-H, of DeepSeek-V4."""

PREDICTION_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "num_mtp_modules")
"""The keys for the number of layers that predict further tokens. Such layers follow the model's own."""

PREDICTION_PARTS = frozenset({"eh_proj", "enorm", "hnorm", "shared_head", "embed_tokens", "mtp_block"})
"""Names of modules that only such layers have."""


PREDICTION_PREFIXES = ("mtp.", "model.mtp.")
"""The beginnings of names of such layers that are numbered by themselves, as in DeepSeek-V4 and Qwen3-Next."""


class Naming:
    """The names of a checkpoint's tensors.

    Parameters
    ----------
    tensors : SafetensorsFolder or GgufTensors
    config : dict
        The configuration of the language model.
    family : Family
    num_layers : int
    config_file : path-like
        For messages.

    Attributes
    ----------
    prefix : str
        The part of a tensor's name before the layer's number: ``"model.layers"``.
    family : Family
        The family, under the names that the tensors have.
    is_corrected : bool
        Whether routers have a bias that selects experts.

    Raises
    ------
    CheckpointError
        There are layers beyond the last that do not predict further tokens.
    """

    def __init__(
        self, tensors: Tensors, config: JsonObject, family: Family, num_layers: int, config_file: StrPath
    ) -> None:
        self._tensors, self._num_layers, self._config_file = tensors, num_layers, config_file
        self.prefix = self._find_prefix()
        # The rest of each tensor's name after the layer's number.
        self._layers: dict[int, list[str]] = {}
        pattern = re.compile(rf"{re.escape(self.prefix)}\.(\d+)\.(.*)")
        for name in tensors.names:
            if match := pattern.fullmatch(name):
                self._layers.setdefault(int(match[1]), []).append(match[2])
        self.family = self._find_spelling(family)
        key = family.correction_key
        self.is_corrected = family.correction is not None and (
            key is None or optional(config, (key,), bool, config_file, default=True)
        )
        self._check_layers_beyond(config)

    def check_moe_layers(self, layers: list[int]) -> None:
        """Refuse experts in layers that have none by the configuration."""
        expert = self._expert_pattern(self.family)
        for layer, names in self._layers.items():
            if layer < self._num_layers and layer not in layers:
                found = next((name for name in names if expert.match(name)), None)
                if found is not None:
                    name = f"{self.prefix}.{layer}.{found}"
                    raise self._tensors.error(name, f"layer {layer} has no experts by the configuration")

    def block_tensors(self, block: str) -> list[str]:
        """The names of a MoE block's tensors. Without a block, those of its experts and its router."""
        layer = int(re.match(rf"{re.escape(self.prefix)}\.(\d+)", block)[1])  # type: ignore[index]
        inside = block_prefix(self.family)
        starts = (inside,) if inside else ("experts.", f"{self.family.router.split('.')[0]}.")
        return [f"{self.prefix}.{layer}.{name}" for name in self._layers.get(layer, ()) if name.startswith(starts)]

    @cached_property
    def beyond(self) -> list[int]:
        """The numbers of the layers beyond the last one, which predict further tokens."""
        return sorted(layer for layer in self._layers if layer >= self._num_layers)

    def is_beyond(self, name: str) -> bool:
        """Whether a tensor or a module belongs to such a layer, or to others that predict further tokens."""
        if name.startswith(PREDICTION_PREFIXES):
            return True
        number = name.removeprefix(f"{self.prefix}.").split(".")[0]
        return name.startswith(f"{self.prefix}.") and number.isdecimal() and int(number) >= self._num_layers

    def _find_prefix(self) -> str:
        names = self._tensors.names
        for prefix in LAYER_PREFIXES:
            if any(name.startswith(f"{prefix}.") for name in names):
                return prefix
        return LAYER_PREFIXES[0]

    def _find_spelling(self, family: Family) -> Family:
        """The family under the first set of names that the experts have; as it is if they have none."""
        for spelling in family.spellings:
            expert = self._expert_pattern(spelling)
            found = next((names for names in self._layers.values() if any(map(expert.match, names))), None)
            if found is not None:
                return self._with_details(spelling, family, found)
        return family

    @staticmethod
    def _with_details(spelling: Family, family: Family, names: list[str]) -> Family:
        """Of the sets of names with the same names of experts, the one with most of its other names in a layer."""

        def explained(candidate: Family) -> int:
            inside = block_prefix(candidate)
            starts = [f"{inside}{candidate.router}.", f"{inside}{candidate.shared_expert}."]
            found = [any(name.startswith(start) for name in names) for start in starts]
            return sum(found) + (f"{inside}{candidate.correction}" in names)

        same = [
            candidate
            for candidate in family.spellings
            if (candidate.block, candidate.expert_names) == (spelling.block, spelling.expert_names)
        ]
        return max(same, key=explained)

    @staticmethod
    def _expert_pattern(family: Family) -> re.Pattern[str]:
        """Matches the rest of an expert's tensor's name."""
        first, fused = re.escape(family.expert_names[0]), re.escape(family.gate_up)
        return re.compile(rf"{re.escape(block_prefix(family))}experts\.(?:\d+\.{first}\.|{fused}(?:[._]|$))")

    def _check_layers_beyond(self, config: JsonObject) -> None:
        stated = max(
            (optional(config, (key,), int, self._config_file, default=0) for key in PREDICTION_KEYS), default=0
        )
        for layer in self.beyond:
            parts = {part for name in self._layers[layer] for part in name.split(".")}
            if layer >= self._num_layers + stated and not parts & PREDICTION_PARTS:
                raise self._tensors.error(
                    f"{self.prefix}.{layer}.{self._layers[layer][0]}",
                    f"num_hidden_layers is {self._num_layers}, and the layer does not predict further tokens",
                )
