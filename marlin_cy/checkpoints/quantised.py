"""Quantised weights in a quantiser's own format: found, checked, and packed for a backend on demand.

::

    Family ─ names ────┐
    Scheme ─ tensors ──┼─ where experts are (Separate, Fused or none), all checked when opening
    SafetensorsFolder ─┘            │
                     expert_stacks(layer): for each expert, in parallel: map → canonical → pack → give pages back
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from marlin_cy.checkpoints.safetensors import DTYPES
from marlin_cy.errors import CheckpointError, UnsupportedError

__all__ = ["ExpertPart", "QuantizedSource", "as_checkpoint_error"]


@dataclass(frozen=True)
class ExpertPart:
    """A linear layer of an expert, as it is stored.

    Attributes
    ----------
    module : str
        Its name; with an ``index``, that of all experts' tensors.
    k, n : int
        Input and output width of what is stored.
    index : int or None
        The expert's place on the first axis of the stored tensors, where one tensor holds all experts.
    """

    module: str
    k: int
    n: int
    index: int | None = None


class QuantizedSource:
    """The quantised linear layers of a checkpoint.

    Parameters
    ----------
    tensors : SafetensorsFolder
    scheme : Scheme
    family : Family
    spec : MoeSpec
    config_file : Path
        What the spec was read from, for messages.
    for_each : callable
        ``for_each(work, count, description)`` calls ``work(i)`` for each i, in parallel.
    """

    def __init__(self, tensors, scheme, family, spec, config_file, for_each):
        self._tensors, self._scheme, self._family, self._spec = tensors, scheme, family, spec
        self._config_file = config_file
        self._for_each = for_each
        self._kinds = {}
        self._names = {}  # of a layer's tensors but for its bias, by its module
        for name in tensors.names:
            module, _, part = name.rpartition(scheme.marker[0])
            if part != "bias":
                self._names.setdefault(module, []).append(name)

    # What there is -----------------------------------------------------------------------------

    @property
    def format(self):
        """The format's name."""
        return self._scheme.format

    @property
    def codes(self):
        """What a 4-bit code stands for."""
        return self._scheme.codes

    @property
    def linears(self):
        """Names of the quantised linear layers that are not routed experts."""
        marker = self._scheme.marker
        return [
            name.removesuffix(marker)
            for name in self._tensors.names
            if name.endswith(marker) and ".experts." not in name
        ]

    def has_linear(self, module):
        """Whether this linear layer is there, quantised."""
        return f"{module}{self._scheme.marker}" in self._tensors

    def holds_experts(self, block):
        """Whether a block's routed experts are quantised; every tensor of theirs has been checked then.

        Raises
        ------
        CheckpointError
            There are no experts under the family's names; tensors that contradict the configuration; some
            experts quantised and others not.
        """
        if block not in self._kinds:
            self._kinds[block] = self._find_experts(block)
        return self._kinds[block] != "dense"

    def _find_experts(self, block):
        """How a block's experts are stored: "fused" in one tensor each, "separate", or "dense" and not quantised."""
        family, marker = self._family, self._scheme.marker
        fused = f"{block}.experts.{family.gate_up}"
        if f"{fused}{marker}" in self._tensors:
            for part in self._fused_parts(block, 0):
                self._check_linear(part.module, part.k, part.n, self._spec.num_experts, self._config_file)
            return "fused"
        separate = f"{block}.experts.0.{family.gate}"
        dense = [name for name in (f"{separate}.weight", fused, f"{fused}.weight") if name in self._tensors]
        if not dense:
            # What is missing says which: an error names the first tensor that should be there.
            for expert in range(self._spec.num_experts):
                for part in self._separate_parts(block, expert):
                    self._check_linear(part.module, part.k, part.n, config_file=self._config_file)
            return "separate"
        quantised = [
            part.module
            for expert in range(self._spec.num_experts)
            for part in self._separate_parts(block, expert)
            if self.has_linear(part.module)
        ]
        if quantised:
            raise self._tensors.error(
                f"{quantised[0]}{marker}", f"quantised, but {dense[0]} is not: no known family mixes these"
            )
        return "dense"

    def _parts(self, block, expert):
        """The :class:`ExpertPart` of an expert: gate, up, down, or gate_up, down."""
        kind = self._kinds[block]
        return self._fused_parts(block, expert) if kind == "fused" else self._separate_parts(block, expert)

    def _separate_parts(self, block, expert):
        family, hidden, inter = self._family, self._spec.hidden_size, self._spec.intermediate_size
        return [
            ExpertPart(f"{block}.experts.{expert}.{family.gate}", hidden, inter),
            ExpertPart(f"{block}.experts.{expert}.{family.up}", hidden, inter),
            ExpertPart(f"{block}.experts.{expert}.{family.down}", inter, hidden),
        ]

    def _fused_parts(self, block, expert):
        family, hidden, inter = self._family, self._spec.hidden_size, self._spec.intermediate_size
        return [
            ExpertPart(f"{block}.experts.{family.gate_up}", hidden, 2 * inter, expert),
            ExpertPart(f"{block}.experts.{family.down}", inter, hidden, expert),
        ]

    def expert_group_sizes(self, block):
        """Rows of K that share a scale: ``(in gate and up, in down)``."""
        parts = self._parts(block, 0)
        return self._group_size(parts[0]), self._group_size(parts[-1])

    def expert_bytes(self, block):
        """Bytes that a block's quantised experts take in the files."""
        modules = self._expert_modules(block)
        return sum(self._tensors.info(name).nbytes for module in modules for name in self._names[module])

    def _expert_modules(self, block):
        """The modules that a block's quantised experts are stored as."""
        experts = {"dense": 0, "fused": 1, "separate": self._spec.num_experts}[self._kinds[block]]
        return [part.module for expert in range(experts) for part in self._parts(block, expert)]

    # Loading -----------------------------------------------------------------------------------

    def linear(self, module, backend):
        """A linear layer that is not a routed expert's, with its bias if it has one."""
        weight = self.weight(module)
        builder = new_builder(backend, 1, weight.n, weight, [weight.g_idx])
        builder.add(0, 0, weight)
        return backend.linear_of(builder.finish(), self.bias(module))

    def weight(self, module):
        """A linear layer in canonical form, checked; views of the files where the format allows."""
        k, n = self._linear_sizes(module)
        self._check_linear(module, k, n)
        part = ExpertPart(module, k, n)
        weight = self._canonical(part, self._g_idx(part))
        # A backend may keep it, and must not depend on the file.
        return weight if weight.g_idx is None else replace(weight, g_idx=weight.g_idx.copy())

    def bias(self, module):
        """A linear layer's bias, float32, or None."""
        name = f"{module}.bias"
        return self._tensors.tensor(name).astype(np.float32) if name in self._tensors else None

    def release(self, module, index=None):
        """Give back the memory that a linear layer's tensors (of one expert) were read into."""
        for name in self._names.get(module, ()):
            self._tensors.release(name, index)

    def quantized_tensors(self):
        """The names of the tensors that quantised layers are made of; of biases, those of routed experts."""
        experts = [module for block in self._kinds for module in self._expert_modules(block)]
        names = [name for module in [*self.linears, *experts] for name in self._names[module]]
        biases = [f"{module}{separator}bias" for module in experts for separator in "._"]
        return names + [name for name in biases if name in self._tensors]

    def expert_stacks(self, block, backend, description):
        """``(gate_up, down)`` of a block's routed experts.

        Raises
        ------
        CheckpointError
            Values that are wrong: scales that are not finite, a ``g_idx`` out of range.
        UnsupportedError
            gate and up of an expert order K differently (``desc_act``).
        """
        experts = range(self._spec.num_experts)
        parts = [self._parts(block, expert) for expert in experts]
        inner = [part[:-1] for part in parts]
        g_idx = [self._common_g_idx(modules) for modules in inner]
        g_idx_down = [self._g_idx(part[-1]) for part in parts]
        inter, hidden = self._spec.intermediate_size, self._spec.hidden_size
        gate_up = self._new_builder(backend, inner, 2 * inter, g_idx)
        down = self._new_builder(backend, [part[-1:] for part in parts], hidden, g_idx_down)

        def pack(expert):
            column = 0
            for part in inner[expert]:
                weight = self._canonical(part, g_idx[expert])
                for piece in self._gate_and_up(weight):
                    gate_up.add(expert, column, piece)
                    column += piece.n
                self._release(part)
            part = parts[expert][-1]
            down.add(expert, 0, self._canonical(part, g_idx_down[expert]))
            self._release(part)

        self._for_each(pack, len(parts), description)
        biases = self._expert_biases(inner, 2 * inter), self._expert_biases([part[-1:] for part in parts], hidden)
        return gate_up.finish(biases[0]), down.finish(biases[1])

    def _gate_and_up(self, weight):
        """The columns of a stored weight in the order of a stack: gate, then up."""
        if not (self._family.interleaved and weight.n == 2 * self._spec.intermediate_size):
            return [weight]
        return [
            replace(
                weight,
                words=weight.words[:, first::2],
                scale=weight.scale[:, first::2],
                zero=None if weight.zero is None else weight.zero[:, first::2],
            )
            for first in (0, 1)
        ]

    def _new_builder(self, backend, parts, n_per_expert, g_idx):
        """A builder for the experts whose parts these are."""
        first = parts[0][0]
        group_size, scale_dtype = self._group_size(first), self._scale_dtype(first)
        for part in (part for modules in parts for part in modules):
            if (self._group_size(part), self._scale_dtype(part)) != (group_size, scale_dtype):
                raise UnsupportedError(
                    f"{first.module} has groups of {group_size} with {scale_dtype} scales, {part.module} of "
                    f"{self._group_size(part)} with {self._scale_dtype(part)}; experts of a layer must be alike"
                )
        return backend.new_stack_builder(
            len(parts),
            first.k,
            n_per_expert,
            group_size=group_size,
            g_idx=None if all(entry is None for entry in g_idx) else g_idx,
            codes=self._scheme.codes,
            scale_dtype=scale_dtype,
        )

    def _canonical(self, part, g_idx):
        scheme = self._scheme.for_module(part.module)
        arrays = {
            suffix: self._array(part, suffix)
            for suffix in scheme.tensors(part.k, part.n)
            if f"{part.module}{suffix}" in self._tensors and suffix != scheme.order
        }
        # Dtypes and shapes were checked when opening, and g_idx before: what can still be wrong is a value.
        with self._blaming(f"{part.module}{scheme.scales}"):
            weight = scheme.to_canonical(arrays, part.k, part.n)
        return weight if g_idx is None else replace(weight, g_idx=g_idx)

    def _array(self, part, suffix):
        array = self._tensors.tensor(f"{part.module}{suffix}")
        return array if part.index is None else array[part.index]

    def _release(self, part):
        self.release(part.module, part.index)

    def _g_idx(self, part):
        """A linear layer's ``g_idx``, None where it has none or an ordinary one."""
        scheme = self._scheme.for_module(part.module)
        name = f"{part.module}{scheme.order}"
        if scheme.order is None or name not in self._tensors:
            return None
        with self._blaming(name):
            g_idx = scheme.g_idx(self._array(part, scheme.order), part.k, part.n)
        g_idx = None if g_idx is None else g_idx.copy()
        self._tensors.release(name)
        return g_idx

    def _common_g_idx(self, parts):
        """The ``g_idx`` that gate and up share."""
        first, *others = (self._g_idx(part) for part in parts)
        for part, other in zip(parts[1:], others, strict=True):
            if (first is None) != (other is None) or not np.array_equal(first, other):
                file = self._tensors.file_of(f"{part.module}{self._scheme.order}").path
                raise UnsupportedError(
                    f"{file}: {parts[0].module} and {part.module} order K differently (desc_act), so they cannot "
                    "share one stack; load each of them with linear()"
                )
        return first

    def _expert_biases(self, parts, n):
        """float32 ``[num_experts, n]``, gate before up, or None where experts have none, or only zeros."""
        if parts[0][0].index is not None:
            name = f"{parts[0][0].module}_bias"
            if name not in self._tensors:
                return None
            bias = self._tensors.tensor(name).astype(np.float32)
            if self._family.interleaved and n == 2 * self._spec.intermediate_size:
                bias = np.concatenate([bias[:, 0::2], bias[:, 1::2]], axis=1)
            return bias
        biases = [[self.bias(part.module) for part in modules] for modules in parts]
        # Older AutoGPTQ writes a bias of zeros for linear layers that have none.
        if not any(bias is not None and bias.any() for modules in biases for bias in modules):
            return None
        return np.stack(
            [
                np.concatenate(
                    [
                        np.zeros(part.n, np.float32) if bias is None else bias
                        for part, bias in zip(row, given, strict=True)
                    ]
                )
                for row, given in zip(parts, biases, strict=True)
            ]
        )

    # Checks ------------------------------------------------------------------------------------

    def _group_size(self, part):
        return self._scheme.for_module(part.module).checked_group_size(part.k, part.n)

    def _scale_dtype(self, part):
        scheme = self._scheme.for_module(part.module)
        return scheme.scale_dtype(DTYPES[self._tensors.info(f"{part.module}{scheme.scales}").dtype])

    def _linear_sizes(self, module):
        marker = f"{module}{self._scheme.marker}"
        shape = self._tensors.info(marker).shape
        with self._blaming(marker):
            return self._scheme.for_module(module).sizes(shape)

    def _check_linear(self, module, k, n, experts=None, config_file=None):
        """Check that a linear layer's tensors are there, with the dtypes and shapes of ``[k, n]``."""
        lead = () if experts is None else (experts,)
        scheme = self._scheme.for_module(module)
        marker = f"{module}{scheme.marker}"
        self._tensors.file_of(marker)
        # Experts' sizes come from the configuration, other layers' from their tensors.
        with self._blaming(marker) if config_file is None else as_checkpoint_error(config_file):
            scheme.checked_group_size(k, n)
            specs = scheme.tensors(k, n)
        for suffix, spec in specs.items():
            name = f"{module}{suffix}"
            if spec.required or name in self._tensors:
                self._tensors.check(name, (*lead, *spec.shape), spec.dtypes)
        for name in (f"{module}.bias", f"{module}_bias") if experts else (f"{module}.bias",):
            if name in self._tensors:
                self._tensors.check(name, (*lead, n))

    def _blaming(self, tensor):
        return as_checkpoint_error(self._tensors.file_of(tensor).path, tensor)


def new_builder(backend, num_experts, n_per_expert, weight, g_idx):
    """A builder for weights like this one."""
    return backend.new_stack_builder(
        num_experts,
        weight.k,
        n_per_expert,
        group_size=weight.group_size,
        g_idx=None if all(entry is None for entry in g_idx) else g_idx,
        codes=weight.codes,
        scale_dtype=weight.scale.dtype,
    )


@contextmanager
def as_checkpoint_error(file, tensor=None):
    """Turn a refused argument into a :class:`CheckpointError` about the file that it came from."""
    try:
        yield
    except CheckpointError:
        raise
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(str(error), file=file, tensor=tensor) from error
