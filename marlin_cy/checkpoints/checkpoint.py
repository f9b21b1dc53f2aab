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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.backends import get_backend
from marlin_cy.checkpoints.calls import Describe, Progress, call_in_parallel
from marlin_cy.checkpoints.contents import new_source, open_contents
from marlin_cy.checkpoints.families import (
    count_layers,
    find_family,
    find_moe_layers,
    has_row,
    read_moe_spec,
    text_config,
)
from marlin_cy.checkpoints.ignored import is_ignored
from marlin_cy.checkpoints.moe_block import MoeBlock, dequantized
from marlin_cy.checkpoints.naming import Naming
from marlin_cy.checkpoints.problems import problems_of
from marlin_cy.checkpoints.safetensors import SafetensorsFolder, TensorInfo
from marlin_cy.checkpoints.scaled import find_scaled
from marlin_cy.distributed.agreement import open_share
from marlin_cy.distributed.shard import Shard
from marlin_cy.errors import MarlinError
from marlin_cy.formats.json_fields import StrPath, finite
from marlin_cy.interface import Backend, Linear
from marlin_cy.moe.layer import MoeLayer
from marlin_cy.threads import checked_num_threads
from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.widening import StackKind

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(
    path: StrPath,
    backend: str | Backend = "cpu",
    *,
    progress: Progress | None = None,
    num_threads: int | None = None,
    verify: bool = False,
    describe: Describe | None = None,
    shard: Shard | None = None,
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
    describe : callable, optional
        Describes a model whose family has no row: ``describe(tensor_names)`` returns the :class:`Family`, the
        :class:`MoeSpec` and the numbers of the MoE layers. By default, such a model is refused.
    shard : Shard, optional
        From :meth:`marlin_cy.distributed.Group.shard`: MoE layers have only this host's columns.

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
    GroupError
        With ``shard``: another host has other files, or cannot open its own.
    """
    if isinstance(backend, str):
        backend = get_backend(backend)
    if not isinstance(backend, Backend):
        raise TypeError(f"backend: got {type(backend).__name__}, expected a name or a Backend")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: got {type(progress).__name__}, expected a callable or None")
    options = Path(path), backend, progress, checked_num_threads(num_threads), bool(verify), describe
    return Checkpoint(*options) if shard is None else open_share(shard, lambda: Checkpoint(*options, shard))


class Checkpoint:
    """An open checkpoint, made by :func:`open_checkpoint`; a context manager that closes its files.

    Nothing is cached: each call packs its layer again, or maps it again if the folder is packed. Layers are valid after
    :meth:`close`; arrays from :meth:`tensor` and :meth:`router_weight` are views of the files.

    Attributes
    ----------
    path : Path
        The folder, or the GGUF file.
    backend : Backend
    shard : Shard or None
        This host's share of the layers.
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
    scaled : ScaledLayers
        The linear layers in FP8 and int8.
    num_layers : int
    layer_prefix : str
        The part of a tensor's name before the layer's number: ``"model.layers"``.
    """

    def __init__(
        self,
        path: Path,
        backend: Backend,
        progress: Progress | None,
        num_threads: int,
        verify: bool = False,
        describe: Describe | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.backend, self.shard = backend, shard
        self._progress = progress
        self._num_threads = num_threads
        contents = open_contents(path)
        self.path, self._config_file, self.config = contents.path, contents.config_file, contents.config
        self.scheme = contents.scheme
        text = text_config(self.config, self._config_file)
        if describe is not None and not has_row(self.config, self._config_file):
            self._tensors = contents.open_tensors()
            self.family, self.moe_spec, layers = describe(self._tensors.names)
        else:
            self.family = find_family(self.config, self._config_file)
            self.moe_spec = read_moe_spec(text, self.family, self._config_file)
            self._tensors = contents.open_tensors()
            layers = find_moe_layers(text, len(self._tensors.names), self._config_file)
        self.num_layers = count_layers(text, self._config_file)
        self._naming = Naming(self._tensors, text, self.family, self.num_layers, self._config_file)
        self.family, self.layer_prefix = self._naming.family, self._naming.prefix
        self._naming.check_moe_layers(layers)
        self.scaled = find_scaled(self._tensors, self.config)
        self._source = new_source(
            contents, self._tensors, self.family, self.moe_spec, self._for_each, verify, self.scaled
        )
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

    def linear(self, name: str, backend: Backend | None = None) -> Linear:
        """One quantised linear layer, which may be an expert's, with its bias if it has one.

        Parameters
        ----------
        name : str
            The module's name, without a tensor's suffix: ``"model.layers.0.self_attn.q_proj"``.
        backend : Backend, optional
            By default :attr:`backend`.

        Raises
        ------
        CheckpointError, UnsupportedError
            As :func:`open_checkpoint`; also if scales or ``g_idx`` are invalid.
        """
        linear = self._source.linear(name, backend or self.backend)
        self._source.release(name)
        return linear

    def weight(self, name: str) -> CanonicalWeight:
        """One quantised linear layer in canonical form, without its bias.

        Its arrays may be views of the files. Parameters and exceptions are those of :meth:`linear`.
        """
        return self._source.weight(name)

    def linear_sizes(self, name: str) -> tuple[int, int]:
        """Input and output width of a quantised linear layer."""
        return self._source.linear_sizes(name)

    @property
    def prediction_layers(self) -> list[int]:
        """The numbers of layers beyond the last one. They predict further tokens, and are not loaded."""
        return self._naming.beyond

    def problems(self, *, layers: bool = False) -> list[MarlinError]:
        """Why loading the whole model would fail, as far as that shows without reading weights.

        :func:`open_checkpoint` itself refuses what concerns the routed experts' tensors. With ``layers``, what
        :meth:`moe_layer` refuses is included, though transformers may run the model.
        """
        blocks = map(self._block, self.moe_layers)
        return problems_of(self._tensors, self._source, self.scheme, self.scaled, blocks, layers, self.is_passed_over)

    @property
    def has_own_head(self) -> bool:
        """Whether the files have a quantised output layer. It is used, whatever ``tie_word_embeddings`` says."""
        return any(name.split(".")[-1] == "lm_head" for name in self.linears)

    def is_passed_over(self, name: str) -> bool:
        """Whether a tensor or a linear layer is not needed: its name says so, or its layer predicts further tokens."""
        return is_ignored(name) or self._naming.is_beyond(name)

    def dequantized(self, name: str, n: int | None = None, k: int | None = None) -> npt.NDArray[np.float32]:
        """The weight of a quantised linear layer, float32 ``[n, k]``: exact, as 16-bit scales times small integers.

        Raises
        ------
        CheckpointError, UnsupportedError
            As :meth:`linear`; also if the layer has another size than ``n`` and ``k``, where they are given.
        """
        return dequantized(self._source, name, n, k)

    # MoE layers: methods that take a layer raise an IndexError if it is not a MoE layer ---------

    @property
    def act_order(self) -> bool:
        """Whether rows of K are permuted (``desc_act``). Activations are then gathered in that order."""
        return self._source.act_order

    def moe_block(self, layer: int) -> str:
        """The name of a layer's MoE block: ``"model.layers.0.mlp"``; the layer's if the family has no blocks."""
        return f"{self.layer_prefix}.{layer}.{self.family.block}".removesuffix(".")

    def router_weight(self, layer: int) -> npt.NDArray[Any]:
        """The router of a MoE layer, ``[num_experts, hidden_size]``.

        A read-only view in the file's dtype; float32 if the router is quantised or has 8 bits.

        Raises
        ------
        IndexError
            ``layer`` is not a MoE layer.
        CheckpointError
            The tensor is missing, or its shape contradicts ``config.json``.
        """
        return self._block(layer).router_weight()

    def router_bias(self, layer: int) -> npt.NDArray[Any] | None:
        """The bias that is added to a router's logits, ``[num_experts]``; gpt-oss has one. As :meth:`router_weight`."""
        return self._block(layer).router_bias()

    def correction_bias(self, layer: int) -> npt.NDArray[Any] | None:
        """The bias that is added to a router's scores to select experts, ``[num_experts]``; DeepSeek-V3 has one.

        Raises
        ------
        IndexError, CheckpointError
            As :meth:`router_weight`; also if the family has such a bias, and the layer does not.
        """
        return self._block(layer).correction_bias()

    def expert_scale(self, layer: int) -> npt.NDArray[Any] | None:
        """The factor of each expert's weight, ``[num_experts]``; Gemma-4 has one. As :meth:`correction_bias`."""
        return self._block(layer).expert_scale()

    def router_logits(self, layer: int, hidden_states: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """The logits that a MoE layer routes by, float32 ``[tokens, num_experts]``.

        Parameters
        ----------
        layer : int
        hidden_states : float ``[tokens, hidden_size]``
            What the model's router gets.

        Raises
        ------
        IndexError, CheckpointError
            As :meth:`router_weight`.
        ValueError
            ``hidden_states`` has another shape.
        """
        eps = finite(text_config(self.config, self._config_file), "rms_norm_eps", self._config_file, 1e-6)
        return self._block(layer).router_logits(hidden_states, eps)

    def expert_bytes(self, layer: int) -> int:
        """Bytes of a MoE layer's routed experts in the files."""
        self._check_layer(layer)
        return self._source.expert_bytes(self.moe_block(layer))

    def expert_kinds(self, layer: int) -> tuple[StackKind, StackKind]:
        """Group size, codes and scale record of a MoE layer's stacks: ``(gate and up, down)``."""
        return self._source.expert_kinds(self._block(layer).name)

    def expert_symmetry(self, layer: int) -> tuple[bool, bool]:
        """Whether all zero points of a MoE layer's experts are the symmetric one: ``(in gate and up, in down)``.

        For a quantiser's folder, the configuration decides. For a packed folder, the zero points are read.
        """
        self._check_layer(layer)
        return self._source.expert_symmetry(self.moe_block(layer))

    def expert_notes(self, layer: int) -> list[str]:
        """Sentences about the experts of a MoE layer that are held in another form than the files have."""
        return self._source.expert_notes(self._block(layer).name)

    def moe_layer(self, layer: int, *, shared_expert: bool = True) -> MoeLayer:
        """Load the experts of a MoE layer.

        The gate and up layers share one stack, gate's columns first. Experts are packed in parallel. A tensor's memory
        is released as soon as it is packed, so that the file and the packed stack are never both resident.

        Parameters
        ----------
        layer : int
            One of :attr:`moe_layers`.
        shared_expert : bool
            Also load the shared expert, if the model has one. Pass False if the caller computes it.

        Raises
        ------
        IndexError
            ``layer`` is not a MoE layer.
        CheckpointError
            A scale is not finite, an entry of ``g_idx`` is out of range, or the block has a tensor that the layer
            would not use.
        UnsupportedError
            The gate and up layers of an expert order K differently (``desc_act``), or the shared expert is not
            quantised.
        """
        return self._block(layer).layer(self.backend, f"layer {layer}", shared_expert)

    def has_packed_shared_expert(self, layer: int) -> bool:
        """Whether :meth:`moe_layer` can load all of a layer: its shared expert is quantised, or there is none."""
        return not self.moe_spec.shared_intermediate_size or self._block(layer).has_packed_shared_expert()

    def experts(self, layer: int) -> MoeLayer:
        """The routed experts of a MoE layer alone, for a caller that routes: use ``forward_routed``.

        The parameter and the exceptions are those of :meth:`moe_layer`. Tensors that only routing needs are not read.
        """
        return self._block(layer).experts(self.backend, f"layer {layer}")

    def _block(self, layer: int) -> MoeBlock:
        self._check_layer(layer)
        files = self._tensors, self._source, self._naming
        return MoeBlock(self.moe_block(layer), *files, self.moe_spec, self._config_file, self.scaled, self.shard)

    def _for_each(self, work: Callable[[int], None], total: int, description: str | None) -> None:
        """As :func:`~marlin_cy.checkpoints.calls.call_in_parallel`, with the checkpoint's threads and progress."""
        progress, name = self._progress if description else None, description or ""
        call_in_parallel(work, total, self._num_threads, lambda done: progress and progress(done, total, name))

    # Checks ------------------------------------------------------------------------------------

    def _check_layer(self, layer: int) -> None:
        if layer not in self.moe_layers:
            raise IndexError(f"layer: got {layer!r}, expected one of the MoE layers: {self.moe_layers}")
