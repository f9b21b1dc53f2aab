"""Linear layers of vLLM over packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase

from marlin_cy.checkpoints.builders import new_builder
from marlin_cy.integrations.modules import Contexts
from marlin_cy.integrations.vllm import operators
from marlin_cy.integrations.vllm.shares import columns, share
from marlin_cy.integrations.vllm.tensors import LayerTensors, canonical, expected_dtypes, naming, refused
from marlin_cy.stacks.builder import same_groups

if TYPE_CHECKING:
    from marlin_cy.formats.scheme import Scheme
    from marlin_cy.interface import Linear
    from marlin_cy.weights.canonical import CanonicalWeight

__all__ = ["LinearMethod", "PackedLinearMethod"]

SHARD_NUMBERS = {"q": 0, "k": 1, "v": 2}


class LinearMethod(LinearMethodBase):
    """How vLLM runs one linear layer, after its packed layers were set.

    Parameters
    ----------
    name : str
        The layer's name in vLLM.
    contexts : Contexts
    """

    def __init__(self, name: str, contexts: Contexts) -> None:
        self._name, self._contexts = name, contexts
        self._linears: list[Linear] = []
        self._width = 0
        self._key = operators.known_as(name, self)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's output, eager or compiled."""
        if torch.compiler.is_compiling():
            output: torch.Tensor = operators.linear(x, bias, self._key, self._width)
            return output
        return self.compute(x, bias)

    def compute(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The outputs of the packed layers, side by side, plus ``bias``."""
        rows, linears = x.contiguous(), self._linears
        if len(linears) == 1:
            output = self._output(linears[0], rows, self._width)
        else:
            output = torch.cat([self._output(linear, rows, linear.out_features) for linear in linears], dim=-1)
        return output if bias is None else output.add_(bias)

    def _output(self, linear: Linear, x: torch.Tensor, width: int) -> torch.Tensor:
        out = x.new_empty((*x.shape[:-1], width))
        linear.forward(self._contexts.ctx, x, out, out.numel() // width)
        return out

    def _use(self, linears: list[Linear]) -> None:
        """Run these packed layers from now on."""
        self._linears = linears
        self._width = sum(linear.out_features for linear in linears)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """A quantised head is used, whatever ``tie_word_embeddings`` says."""
        return layer


class PackedLinearMethod(LinearMethod):
    """Packs a linear layer, which may be several layers of the checkpoint side by side.

    Parameters
    ----------
    name : str
        The layer's name in vLLM.
    schemes : sequence of Scheme
        Of each layer of the checkpoint that the layer consists of.
    dtypes : dict
        The dtype of the files by suffix.
    contexts : Contexts
    """

    def __init__(self, name: str, schemes: Sequence[Scheme], dtypes: dict[str, str], contexts: Contexts) -> None:
        super().__init__(name, contexts)
        self._schemes, self._dtypes = schemes, dtypes

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Called by vLLM when the layer is made: expect the checkpoint's tensors."""
        self._k, self._widths = input_size_per_partition, list(output_partition_sizes)
        self._tensors = LayerTensors(layer)
        with naming(self._name):
            found = expected_dtypes(self._schemes, input_size, output_size)
        for suffix, accepted in found.items():

            def load(parameter: Any, tensor: torch.Tensor, shard: Any = None, suffix: str = suffix) -> None:
                # vLLM passes the shard, or attaches it to the tensor.
                self._tensors.add(getattr(tensor, "shard_id", None) if shard is None else shard, suffix, tensor)

            self._tensors.expect(suffix.lstrip("._"), self._dtypes.get(suffix, accepted[0]), load)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Called by vLLM after the weights are loaded: pack this process's share of them."""
        pieces: dict[int, CanonicalWeight] = {}
        for part in self._tensors.parts:
            numbers = self._numbers(part)
            # One layer of the checkpoint may hold all partitions.
            scheme = self._schemes[numbers[0] if len(self._schemes) > 1 else 0]
            weight, _ = canonical(self._tensors.pop(part), scheme, self._name)
            with naming(self._name):
                pieces |= self._shares(layer, weight, numbers)
        if sorted(pieces) != list(range(len(self._widths))):
            raise refused(self._name, f"got the parts {sorted(pieces)}, expected {len(self._widths)} parts")
        with naming(self._name):
            runs = alike([pieces[number] for number in range(len(pieces))])
            self._use([packed(self._contexts, run) for run in runs])
        self._tensors.close()

    def _numbers(self, part: Any) -> list[int]:
        """The partitions of the layer that a part of the checkpoint holds, in its order."""
        if part is None:
            return list(range(len(self._widths)))
        if isinstance(part, tuple):
            return list(part)
        return [SHARD_NUMBERS.get(part, part)]

    def _shares(self, layer: Any, weight: CanonicalWeight, numbers: list[int]) -> dict[int, CanonicalWeight]:
        """This process's share of each partition in a weight that holds them side by side."""
        rank, ranks = layer.tp_rank, layer.tp_size
        widths = [self._widths[number] for number in numbers]
        totals = [weight.n] if len(numbers) == 1 else [layer.output_sizes[number] for number in numbers]
        if sum(totals) != weight.n:
            raise ValueError(f"got {weight.n} columns, expected {sum(totals)}")
        found, start = {}, 0
        for number, width, total in zip(numbers, widths, totals, strict=True):
            found[number] = share(columns(weight, start, total), self._k, width, rank, ranks)
            start += total
        return found


def alike(pieces: list[CanonicalWeight]) -> list[list[CanonicalWeight]]:
    """The pieces of a layer in runs that can be packed side by side, as one layer."""
    runs = [[pieces[0]]]
    for piece in pieces[1:]:
        last = runs[-1][-1]
        if kind(piece) == kind(last) and same_groups(piece.g_idx, last.g_idx):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def kind(weight: CanonicalWeight) -> tuple[int, str, str]:
    """What weights of a stack have in common."""
    return weight.group_size, weight.codes, weight.scales


def packed(contexts: Contexts, pieces: list[CanonicalWeight]) -> Any:
    """A linear layer of pieces side by side."""
    backend = contexts.backend
    builder = new_builder(backend, 1, sum(piece.n for piece in pieces), pieces[0], [pieces[0].g_idx])
    start = 0
    for piece in pieces:
        builder.add(0, start, piece)
        start += piece.n
    return backend.linear_of(builder.finish(), None)
