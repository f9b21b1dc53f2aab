"""A checkpoint folder: what it says of itself, and its weights packed on demand.

::

    config.json ─────────────┬─ Family, MoeSpec (families.py)
    the quantiser's JSON ────┴─ Scheme (formats/) ────────────┐
    *.safetensors (+ index) ─── SafetensorsFolder ────────────┴─ QuantizedSource, or PackedSource for a
                                                                 folder that `marlin-cy pack` wrote
             moe_layer(i), linear(name): stacks and layers on a backend
"""

from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from marlin_cy.backends import get_backend
from marlin_cy.checkpoints.families import find_family, find_moe_layers, read_moe_spec, text_config
from marlin_cy.checkpoints.packed import PackedSource, is_packed
from marlin_cy.checkpoints.quantised import QuantizedSource, as_checkpoint_error, new_builder
from marlin_cy.checkpoints.safetensors import SafetensorsFolder, TensorInfo, read_json
from marlin_cy.cpu.threads import checked_num_threads
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.registry import read_scheme
from marlin_cy.interface import Backend, Linear
from marlin_cy.moe.layer import MoeLayer, SharedExpert
from marlin_cy.moe.routing import Routing

__all__ = ["Checkpoint", "open_checkpoint"]

LAYER_PREFIXES = ("model.layers", "model.language_model.layers", "language_model.model.layers")
"""Where layers are: of language models, and of models that see as well."""


def open_checkpoint(path, backend="cpu", *, progress=None, num_threads=None, verify=False) -> "Checkpoint":
    """Open a checkpoint folder. Everything but the weights' values is checked; none is loaded.

    Parameters
    ----------
    path : path-like
        The folder: ``config.json``, the quantisation config there (``quantization_config``) or in the
        quantiser's own file (``quantize_config.json``, ...), and ``*.safetensors`` with or without an index.
        Or a folder that ``marlin-cy pack`` wrote.
    backend : str or Backend
        Where weights are loaded to.
    progress : callable, optional
        Called as ``progress(done, total, description)`` after each expert, from the thread that loads.
    num_threads : int, optional
        Threads that pack, 1 to 4096; by default as for a CPU context.
    verify : bool
        Read all of a packed folder's tensors and compare their checksums. Other folders have none.

    Raises
    ------
    CheckpointError
        A damaged or contradictory checkpoint, with file, tensor and reason.
    UnsupportedError
        A model family, activation, quantisation method, width of codes or group size that is not supported.
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

    Nothing is cached: each call that returns a layer packs it again (of a packed folder, maps it). Layers
    loaded from a quantiser's folder do not depend on its files and outlive :meth:`close`; so do those of a
    packed folder on the CPU, which keep its files mapped. Arrays from :meth:`tensor` and
    :meth:`router_weight` are views of the files and must be copied to be kept once those change.

    Attributes
    ----------
    path : Path
    backend : Backend
    config : dict
        ``config.json``.
    format : str
        What the weights are stored in: ``"gptq"``, ``"awq"``, ``"packed"``, ...
    codes : str
        What a 4-bit code stands for: ``"uint4"`` or ``"e2m1"``.
    scheme : Scheme or None
        The format's settings; None for a packed folder.
    family : Family
    moe_spec : MoeSpec
    moe_layers : list of int
        The layers whose routed experts are quantised.
    dense_moe_layers : list of int
        MoE layers whose experts are not.
    num_layers : int
    layer_prefix : str
        What names of a layer's tensors begin with, before its number: ``"model.layers"``.
    """

    def __init__(self, path, backend, progress, num_threads, verify=False):
        self.path = path
        self.backend = backend
        self._progress = progress
        self._num_threads = num_threads
        self._config_file = path / "config.json"
        self.config = read_json(self._config_file)
        packed = is_packed(self.config)
        self.scheme = None if packed else read_scheme(path, self.config)
        self.family = find_family(self.config, self._config_file)
        text = text_config(self.config, self._config_file)
        self.moe_spec = read_moe_spec(text, self.family, self._config_file)
        with as_checkpoint_error(self._config_file):
            Routing(self.moe_spec.num_experts, self.moe_spec.top_k, **self.moe_spec.routing())
        self._tensors = SafetensorsFolder(path)
        layers = find_moe_layers(text, len(self._tensors.names), self._config_file)
        self.num_layers = text["num_hidden_layers"]
        self.layer_prefix = self._find_prefix()
        if packed:
            self._source = PackedSource(path, self.config, self._tensors, self.family, self.moe_spec, verify)
        else:
            self._source = QuantizedSource(
                self._tensors, self.scheme, self.family, self.moe_spec, self._config_file, self._for_each
            )
        self.format, self.codes = self._source.format, self._source.codes
        quantised = [self._source.holds_experts(self.moe_block(layer)) for layer in layers]
        self.moe_layers = [layer for layer, held in zip(layers, quantised, strict=True) if held]
        self.dense_moe_layers = [layer for layer, held in zip(layers, quantised, strict=True) if not held]

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self):
        """Close the files. Layers that were loaded stay; so do arrays that were handed out."""
        self._tensors.close()

    # Tensors -----------------------------------------------------------------------------------

    @property
    def tensor_names(self) -> list:
        """The names of all tensors in the files."""
        return self._tensors.names

    def tensor(self, name) -> np.ndarray:
        """A tensor as it is stored: a read-only view of the file.

        Raises
        ------
        CheckpointError
            There is none of that name.
        """
        return self._tensors.tensor(name)

    def raw_tensor(self, name) -> np.ndarray:
        """A tensor's bytes: a read-only uint8 view of the file. Raises as :meth:`tensor`."""
        return self._tensors.raw(name)

    def tensor_info(self, name) -> TensorInfo:
        """A tensor's dtype (safetensors' name), shape and place. Raises as :meth:`tensor`."""
        return self._tensors.info(name)

    def release(self, name):
        """Let the operating system take back the memory that a tensor was read into. Views stay valid."""
        self._tensors.release(name)

    @property
    def quantized_tensors(self) -> list:
        """The names of the tensors that quantised weights are made of, biases but for routed experts' not among them.

        All other tensors are the model's own.
        """
        return self._source.quantized_tensors()

    # Linear layers -----------------------------------------------------------------------------

    @property
    def linears(self) -> list:
        """The names of the quantised linear layers that are not routed experts.

        Attention's projections, say, and the shared expert of Qwen2-MoE.
        """
        return self._source.linears

    def linear(self, name) -> Linear:
        """One quantised linear layer (an expert's as well), with its bias if it has one.

        Parameters
        ----------
        name : str
            Without the tensor's part: ``"model.layers.0.self_attn.q_proj"``.

        Raises
        ------
        CheckpointError, UnsupportedError
            As :func:`open_checkpoint`, and for scales or a ``g_idx`` that are wrong.
        """
        linear = self._source.linear(name, self.backend)
        self._source.release(name)
        return linear

    # MoE layers --------------------------------------------------------------------------------

    def moe_block(self, layer) -> str:
        """The name of a layer's MoE block: ``"model.layers.0.mlp"``."""
        return f"{self.layer_prefix}.{layer}.{self.family.block}"

    def router_weight(self, layer) -> np.ndarray:
        """The router of a MoE layer, ``[num_experts, hidden_size]``: a read-only view in the file's dtype.

        Raises
        ------
        IndexError
            ``layer`` is not a MoE layer.
        CheckpointError
            It is missing, or its shape contradicts ``config.json``.
        """
        self._check_layer(layer)
        self._check_router(layer)
        return self._tensors.tensor(self._router(layer, "weight"))

    def router_bias(self, layer) -> np.ndarray | None:
        """What is added to a router's logits, ``[num_experts]``, or None. gpt-oss has it.

        Raises
        ------
        IndexError, CheckpointError
            As :meth:`router_weight`.
        """
        return self._router_vector(layer, "bias")

    def correction_bias(self, layer) -> np.ndarray | None:
        """What is added to a router's scores to choose experts, ``[num_experts]``, or None. DeepSeek-V3 has it.

        Raises
        ------
        IndexError, CheckpointError
            As :meth:`router_weight`.
        """
        return self._router_vector(layer, "e_score_correction_bias")

    def expert_bytes(self, layer) -> int:
        """Bytes that the routed experts of a MoE layer take in the files.

        Raises
        ------
        IndexError
            ``layer`` is not a MoE layer.
        """
        self._check_layer(layer)
        return self._source.expert_bytes(self.moe_block(layer))

    def expert_group_sizes(self, layer) -> tuple:
        """Rows of K that share a scale in a MoE layer's experts: ``(in gate and up, in down)``.

        Raises
        ------
        IndexError
            ``layer`` is not a MoE layer.
        """
        self._check_layer(layer)
        return self._source.expert_group_sizes(self.moe_block(layer))

    def moe_layer(self, layer, *, shared_expert=True) -> MoeLayer:
        """Load the experts of a MoE layer.

        gate and up share one stack, gate's columns first. Experts are packed in parallel, and the
        memory that a tensor was read into is given back as soon as it is packed, so that the file
        and the packed stack are never both resident.

        Parameters
        ----------
        layer : int
            One of :attr:`moe_layers`.
        shared_expert : bool
            Load the family's shared expert, too, where it has one. False for a caller who computes it.

        Returns
        -------
        MoeLayer

        Raises
        ------
        IndexError
            ``layer`` is not a MoE layer.
        CheckpointError
            Scales that are not finite, or a ``g_idx`` out of range.
        UnsupportedError
            An expert's gate and up order K differently (``desc_act``), or the shared expert is not quantised.
        """
        self._check_layer(layer)
        spec, block = self.moe_spec, self.moe_block(layer)
        routing = {"top_k": spec.top_k, "correction_bias": self.correction_bias(layer), **spec.routing()}
        with self._blaming_correction_bias(layer):
            Routing(spec.num_experts, **routing)
        shared = self._shared_expert(block) if shared_expert and spec.shared_intermediate_size else None
        gate_up, down = self._source.expert_stacks(block, self.backend, f"layer {layer}")
        return MoeLayer(gate_up, down, activation=spec.activation, shared_expert=shared, **routing)

    def _shared_expert(self, block):
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
        hidden, inter = spec.hidden_size, spec.shared_intermediate_size
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
        return SharedExpert(builder.finish(), below.finish(), gate_weight)

    def _for_each(self, work, total, description):
        """Call ``work(i)`` for every i, in parallel; the first exception ends it."""
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

    def _find_prefix(self):
        names = self._tensors.names
        for prefix in LAYER_PREFIXES:
            if any(name.startswith(f"{prefix}.") for name in names):
                return prefix
        return LAYER_PREFIXES[0]

    def _router(self, layer, part):
        return f"{self.moe_block(layer)}.{self.family.router}.{part}"

    def _router_vector(self, layer, part):
        self._check_layer(layer)
        name = self._router(layer, part)
        if name not in self._tensors:
            return None
        self._tensors.check(name, (self.moe_spec.num_experts,))
        return self._tensors.tensor(name)

    def _blaming_correction_bias(self, layer):
        name = self._router(layer, "e_score_correction_bias")
        return as_checkpoint_error(
            self._tensors.file_of(name).path if name in self._tensors else self._config_file, name
        )

    def _check_router(self, layer):
        self._tensors.check(self._router(layer, "weight"), (self.moe_spec.num_experts, self.moe_spec.hidden_size))

    def _check_layer(self, layer):
        if layer not in self.moe_layers:
            raise IndexError(f"layer: got {layer!r}, expected one of the MoE layers: {self.moe_layers}")
