"""A checkpoint folder: its configuration, and its weights, packed on demand.

::

    config.json ─────────────┬─ Family, MoeSpec (families.py)
    the quantiser's JSON ────┴─ Scheme (formats/) ────────────┐
    *.safetensors (+ index) ─── SafetensorsFolder ────────────┴─ QuantizedSource, or PackedSource for a
                                                                 folder that `marlin-cy pack` wrote
             moe_layer(i), linear(name): stacks and layers on a backend

A GGUF model has the same parts: gguf/ reads the configuration and the tensors from its files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy.typing as npt

from marlin_cy.backends import get_backend
from marlin_cy.checkpoints.argument_errors import as_checkpoint_error
from marlin_cy.checkpoints.contents import new_source, open_contents
from marlin_cy.checkpoints.families import find_family, find_moe_layers, read_moe_spec, text_config
from marlin_cy.checkpoints.quantised import new_builder
from marlin_cy.checkpoints.safetensors import SafetensorsFolder, TensorInfo
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.json_fields import StrPath
from marlin_cy.interface import Backend, Linear
from marlin_cy.moe.layer import MoeLayer, SharedExpert
from marlin_cy.moe.routing import Routing
from marlin_cy.threads import checked_num_threads
from marlin_cy.weights.canonical import CanonicalWeight

__all__ = ["Checkpoint", "open_checkpoint"]

Progress = Callable[[int, int, str], object]
"""Called as ``progress(done, total, description)``."""

LAYER_PREFIXES = ("model.layers", "model.language_model.layers", "language_model.model.layers")
"""The prefixes of layers' names: of language models, and of vision-language models."""


def open_checkpoint(
    path: StrPath,
    backend: str | Backend = "cpu",
    *,
    progress: Progress | None = None,
    num_threads: int | None = None,
    verify: bool = False,
) -> Checkpoint:
    """Open a checkpoint folder. Everything except the weights' values is checked. No weight is loaded.

    Parameters
    ----------
    path : path-like
        The folder: ``config.json``, the quantisation config there (``quantization_config``) or in the
        quantiser's own file (``quantize_config.json``, ...), and ``*.safetensors`` with or without an index.
        Or a folder that ``marlin-cy pack`` wrote. Or a GGUF file, a part of one, or a folder with nothing else.
    backend : str or Backend
        The backend to which weights are loaded.
    progress : callable, optional
        Called as ``progress(done, total, description)`` after each expert, on the thread that loads the layer.
    num_threads : int, optional
        Threads that pack, 1 to 4096; by default as for a CPU context.
    verify : bool
        Read all tensors of a packed folder and compare their checksums. Other folders have no checksums.

    Raises
    ------
    CheckpointError
        The checkpoint is damaged or contradicts itself. The message has file, tensor and reason.
    UnsupportedError
        The model family, activation, quantisation method, width of codes or group size is not supported.
    BackendUnavailable
        A GGUF file, and the package ``gguf`` is not installed.
    TypeError, ValueError
        An invalid ``backend``, ``progress`` or ``num_threads``.
    """
    if isinstance(backend, str):
        backend = get_backend(backend)
    if not isinstance(backend, Backend):
        raise TypeError(f"backend: got {type(backend).__name__}, expected a name or a Backend")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: got {type(progress).__name__}, expected a callable or None")
    return Checkpoint(Path(path), backend, progress, checked_num_threads(num_threads), bool(verify))


class Checkpoint:
    """An open checkpoint, made by :func:`open_checkpoint`; a context manager that closes its files.

    Nothing is cached: each call that returns a layer packs it again, or maps it again if the folder is packed.
    Layers stay valid after :meth:`close`. A layer from a quantiser's folder does not depend on the files; a layer
    from a packed folder may keep them mapped. Arrays from :meth:`tensor` and :meth:`router_weight` are views of the
    files: copy them before the files change.

    Attributes
    ----------
    path : Path
        The folder, or the GGUF file.
    backend : Backend
    config : dict
        ``config.json``, or what a GGUF file says in its place.
    format : str
        The format of the weights: ``"gptq"``, ``"awq"``, ``"packed"``, ...
    codes : str
        The name of the code type, a key of :data:`~marlin_cy.weights.code_types.CODE_TYPES`.
    scheme : Scheme or None
        The format's settings; None for a packed folder, and for GGUF.
    family : Family
    moe_spec : MoeSpec
    moe_layers : list of int
        The MoE layers whose routed experts are quantised.
    dense_moe_layers : list of int
        The MoE layers whose routed experts are not quantised.
    num_layers : int
    layer_prefix : str
        The part of a tensor's name before the layer's number: ``"model.layers"``.
    """

    def __init__(
        self, path: Path, backend: Backend, progress: Progress | None, num_threads: int, verify: bool = False
    ) -> None:
        self.backend = backend
        self._progress = progress
        self._num_threads = num_threads
        contents = open_contents(path)
        self.path, self._config_file, self.config = contents.path, contents.config_file, contents.config
        self.scheme = contents.scheme
        self.family = find_family(self.config, self._config_file)
        text = text_config(self.config, self._config_file)
        self.moe_spec = read_moe_spec(text, self.family, self._config_file)
        with as_checkpoint_error(self._config_file):
            Routing(self.moe_spec.num_experts, self.moe_spec.top_k, **self.moe_spec.routing())
        self._tensors = contents.open_tensors()
        layers = find_moe_layers(text, len(self._tensors.names), self._config_file)
        self.num_layers: int = text["num_hidden_layers"]
        self.layer_prefix = self._find_prefix()
        self._source = new_source(contents, self._tensors, self.family, self.moe_spec, self._for_each, verify)
        self.format: str = self._source.format
        self.codes: str = self._source.codes
        quantised = [self._source.holds_experts(self.moe_block(layer)) for layer in layers]
        self.moe_layers = [layer for layer, held in zip(layers, quantised, strict=True) if held]
        self.dense_moe_layers = [layer for layer, held in zip(layers, quantised, strict=True) if not held]

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Layers that were loaded and arrays that were returned stay valid."""
        self._tensors.close()

    # Tensors -----------------------------------------------------------------------------------

    @property
    def tensor_names(self) -> list[str]:
        """The names of all tensors in the files."""
        return self._tensors.names

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """A tensor as it is stored: a read-only view of the file.

        Raises
        ------
        CheckpointError
            There is no tensor of this name.
        """
        return self._tensors.tensor(name)

    def raw_tensor(self, name: str) -> npt.NDArray[Any]:
        """A tensor's bytes: a read-only uint8 view of the file. Raises as :meth:`tensor`."""
        return self._tensors.raw(name)

    def tensor_info(self, name: str) -> TensorInfo:
        """A tensor's dtype (safetensors' name), shape and position in the file. Raises as :meth:`tensor`."""
        return self._tensors.info(name)

    def check_tensor(self, name: str, shape: tuple[int, ...], dtypes: Sequence[str] | None = None) -> None:
        """Refuse a tensor that is missing or has another shape or dtype (safetensors' names).

        Raises
        ------
        CheckpointError
            The message has file, tensor, and what was found and expected.
        """
        self._tensors.check(name, shape, dtypes)

    def release(self, name: str) -> None:
        """Let the operating system reclaim the memory into which a tensor was read. Views stay valid."""
        self._tensors.release(name)

    @property
    def quantized_tensors(self) -> list[str]:
        """The names of the quantised layers' tensors. Biases are included for routed experts only.

        All other tensors are not quantised.
        """
        return self._source.quantized_tensors()

    @property
    def skipped_tensors(self) -> list[str]:
        """Tensors in a GGUF file that are not loaded, under their own names: layers that predict several tokens."""
        return [] if isinstance(self._tensors, SafetensorsFolder) else list(self._tensors.skipped)

    # Linear layers -----------------------------------------------------------------------------

    @property
    def linears(self) -> list[str]:
        """The names of the quantised linear layers that are not routed experts.

        Examples are attention's projections and the shared expert of Qwen2-MoE.
        """
        return self._source.linears

    def linear(self, name: str) -> Linear:
        """One quantised linear layer, which may be an expert's, with its bias if it has one.

        Parameters
        ----------
        name : str
            The module's name, without a tensor's suffix: ``"model.layers.0.self_attn.q_proj"``.

        Raises
        ------
        CheckpointError, UnsupportedError
            As :func:`open_checkpoint`; also if scales or ``g_idx`` are invalid.
        """
        linear = self._source.linear(name, self.backend)
        self._source.release(name)
        return linear

    def weight(self, name: str) -> CanonicalWeight:
        """One quantised linear layer in canonical form, without its bias.

        Its arrays may be views of the files. Parameters and exceptions are those of :meth:`linear`.
        """
        return self._source.weight(name)

    # MoE layers --------------------------------------------------------------------------------

    @property
    def act_order(self) -> bool:
        """Whether rows of K are permuted (``desc_act``). Activations are then gathered in that order."""
        return self._source.act_order

    def moe_block(self, layer: int) -> str:
        """The name of a layer's MoE block: ``"model.layers.0.mlp"``."""
        return f"{self.layer_prefix}.{layer}.{self.family.block}"

    def router_weight(self, layer: int) -> npt.NDArray[Any]:
        """The router of a MoE layer, ``[num_experts, hidden_size]``: a read-only view in the file's dtype.

        Raises
        ------
        IndexError
            ``layer`` is not a MoE layer.
        CheckpointError
            The tensor is missing, or its shape contradicts ``config.json``.
        """
        self._check_layer(layer)
        self._check_router(layer)
        return self._tensors.tensor(self._router(layer, "weight"))

    def router_bias(self, layer: int) -> npt.NDArray[Any] | None:
        """The bias that is added to a router's logits, ``[num_experts]``, or None. gpt-oss has one.

        Raises
        ------
        IndexError, CheckpointError
            As :meth:`router_weight`.
        """
        return self._router_vector(layer, "bias")

    def correction_bias(self, layer: int) -> npt.NDArray[Any] | None:
        """The bias that is added to a router's scores to select experts, ``[num_experts]``, or None.

        DeepSeek-V3 has one.

        Raises
        ------
        IndexError, CheckpointError
            As :meth:`router_weight`.
        """
        return self._router_vector(layer, "e_score_correction_bias")

    def expert_bytes(self, layer: int) -> int:
        """Bytes of a MoE layer's routed experts in the files.

        Raises
        ------
        IndexError
            ``layer`` is not a MoE layer.
        """
        self._check_layer(layer)
        return self._source.expert_bytes(self.moe_block(layer))

    def expert_group_sizes(self, layer: int) -> tuple[int, int]:
        """Number of rows of K that share a scale in a MoE layer's experts: ``(in gate and up, in down)``.

        Raises
        ------
        IndexError
            ``layer`` is not a MoE layer.
        """
        self._check_layer(layer)
        return self._source.expert_group_sizes(self.moe_block(layer))

    def expert_symmetry(self, layer: int) -> tuple[bool, bool]:
        """Whether all zero points of a MoE layer's experts are the symmetric one: ``(in gate and up, in down)``.

        For a quantiser's folder, the configuration decides. For a packed folder, the zero points are read.

        Raises
        ------
        IndexError
            ``layer`` is not a MoE layer.
        """
        self._check_layer(layer)
        return self._source.expert_symmetry(self.moe_block(layer))

    def moe_layer(self, layer: int, *, shared_expert: bool = True) -> MoeLayer:
        """Load the experts of a MoE layer.

        The gate and up layers share one stack, gate's columns first. Experts are packed in parallel. The memory into
        which a tensor was read is released as soon as the tensor is packed, so that the file and the packed stack are
        never both resident.

        Parameters
        ----------
        layer : int
            One of :attr:`moe_layers`.
        shared_expert : bool
            Also load the shared expert, if the family has one. Pass False if the caller computes it.

        Returns
        -------
        MoeLayer

        Raises
        ------
        IndexError
            ``layer`` is not a MoE layer.
        CheckpointError
            A scale is not finite, or an entry of ``g_idx`` is out of range.
        UnsupportedError
            The gate and up layers of an expert order K differently (``desc_act``), or the shared expert is not
            quantised.
        """
        self._check_layer(layer)
        spec, block = self.moe_spec, self.moe_block(layer)
        routing: dict[str, Any] = {
            "top_k": spec.top_k,
            "correction_bias": self.correction_bias(layer),
            **spec.routing(),
        }
        with self._as_correction_bias_error(layer):
            Routing(spec.num_experts, **routing)
        shared = None
        if shared_expert and spec.shared_intermediate_size is not None:
            shared = self._shared_expert(block, spec.shared_intermediate_size)
        gate_up, down = self._source.expert_stacks(block, self.backend, f"layer {layer}")
        return MoeLayer(gate_up, down, activation=spec.activation, shared_expert=shared, **routing)

    def _shared_expert(self, block: str, inter: int) -> SharedExpert:
        """The shared expert of a block, of width ``inter``."""
        family, spec, source = self.family, self.moe_spec, self._source
        module = f"{block}.{family.shared_expert}"
        modules = [f"{module}.{name}" for name in (family.gate, family.up, family.down)]
        for name in modules:
            if not source.has_linear(name):
                raise UnsupportedError(
                    f"{self.path}: {name} is not quantised; load the layer with shared_expert=False, and add the "
                    "shared expert's output to the layer's"
                )
        gate, up, down = (source.weight(name) for name in modules)
        hidden = spec.hidden_size
        for name, weight, sizes in zip(
            modules, (gate, up, down), 2 * [(hidden, inter)] + [(inter, hidden)], strict=True
        ):
            if (weight.k, weight.n) != sizes:
                raise CheckpointError(
                    f"{name}: got [{weight.k}, {weight.n}], expected {list(sizes)} by the configuration", file=self.path
                )
        builder = new_builder(self.backend, 1, 2 * inter, gate, [gate.g_idx])
        builder.add(0, 0, gate)
        builder.add(0, inter, up)
        below = new_builder(self.backend, 1, hidden, down, [down.g_idx])
        below.add(0, 0, down)
        for name in modules:
            source.release(name)
        gate_weight = None
        if family.shared_gate is not None:
            name = f"{block}.{family.shared_gate}.weight"
            self._tensors.check(name, (1, hidden))
            gate_weight = self._tensors.tensor(name)[0]
        with as_checkpoint_error(self._tensors.source, name):
            return SharedExpert(builder.finish(), below.finish(), gate_weight)

    def _for_each(self, work: Callable[[int], None], total: int, description: str) -> None:
        """Call ``work(i)`` for each ``i`` below ``total``, in parallel. The first exception cancels the rest."""
        pool = ThreadPoolExecutor(self._num_threads)
        try:
            pending = [pool.submit(work, index) for index in range(total)]
            for done, future in enumerate(as_completed(pending), start=1):
                future.result()
                if self._progress is not None:
                    self._progress(done, total, description)
        finally:
            pool.shutdown(cancel_futures=True)

    # Checks ------------------------------------------------------------------------------------

    def _find_prefix(self) -> str:
        names = self._tensors.names
        for prefix in LAYER_PREFIXES:
            if any(name.startswith(f"{prefix}.") for name in names):
                return prefix
        return LAYER_PREFIXES[0]

    def _router(self, layer: int, part: str) -> str:
        return f"{self.moe_block(layer)}.{self.family.router}.{part}"

    def _router_vector(self, layer: int, part: str) -> npt.NDArray[Any] | None:
        self._check_layer(layer)
        name = self._router(layer, part)
        if name not in self._tensors:
            return None
        self._tensors.check(name, (self.moe_spec.num_experts,))
        return self._tensors.tensor(name)

    def _as_correction_bias_error(self, layer: int) -> AbstractContextManager[None]:
        name = self._router(layer, "e_score_correction_bias")
        return as_checkpoint_error(
            self._tensors.file_of(name).path if name in self._tensors else self._config_file, name
        )

    def _check_router(self, layer: int) -> None:
        self._tensors.check(self._router(layer, "weight"), (self.moe_spec.num_experts, self.moe_spec.hidden_size))

    def _check_layer(self, layer: int) -> None:
        if layer not in self.moe_layers:
            raise IndexError(f"layer: got {layer!r}, expected one of the MoE layers: {self.moe_layers}")
