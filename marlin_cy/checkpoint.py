"""A GPTQ checkpoint folder: what it says of itself, and its weights packed on demand.

::

    config.json ─────────────┬─ family (a row of FAMILIES) ─ MoeSpec ──┐
    quantize_config.json ────┴─ QuantizationConfig ────────────────────┤ every expert's tensors are
    *.safetensors (+ index) ─── SafetensorsFolder ─ dtypes, shapes ────┘ checked when opening
                                      │
             moe_layer(i): for each expert, in parallel: map → canonical → pack → give pages back
"""

import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from marlin_cy.backends import get_backend
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats import gptq
from marlin_cy.interface import Backend, Linear
from marlin_cy.model_config import find_family, find_moe_layers, read_moe_spec, read_quantization
from marlin_cy.moe.layer import MoeLayer
from marlin_cy.safetensors_file import SafetensorsFolder, read_json

__all__ = ["Checkpoint", "open_checkpoint"]

TENSOR_DTYPES = {"qweight": "I32", "scales": "F16", "qzeros": "I32", "g_idx": "I32"}


def open_checkpoint(path, backend="cpu", *, progress=None, num_threads=None) -> "Checkpoint":
    """Open a checkpoint folder. Everything but the weights' values is checked; none is loaded.

    Parameters
    ----------
    path : path-like
        The folder: ``config.json``, the quantisation config there (``quantization_config``) or in
        ``quantize_config.json``, and ``*.safetensors`` with or without an index.
    backend : str or Backend
        Where weights are loaded to.
    progress : callable, optional
        Called as ``progress(done, total, description)`` after each expert, from the thread that loads.
    num_threads : int, optional
        Threads that pack; as many as the process may use.

    Raises
    ------
    CheckpointError
        A damaged or contradictory checkpoint, with file, tensor and reason.
    UnsupportedError
        A model family, activation, quantisation method, width of codes or group size that is not supported.
    TypeError, ValueError
        A ``backend``, ``progress`` or ``num_threads`` that is none.
    """
    if isinstance(backend, str):
        backend = get_backend(backend)
    if not isinstance(backend, Backend):
        raise TypeError(f"backend: got {type(backend).__name__}, expected a name or a Backend")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: got {type(progress).__name__}, expected a callable or None")
    if num_threads is None:
        num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not isinstance(num_threads, int) or num_threads < 1:
        raise ValueError(f"num_threads: got {num_threads!r}, expected a positive int")
    return Checkpoint(Path(path), backend, progress, num_threads)


class Checkpoint:
    """An open checkpoint, made by :func:`open_checkpoint`; a context manager that closes its files.

    Nothing is cached: each call that returns a layer packs it again. What was loaded does not depend
    on the files and outlives :meth:`close`; arrays from :meth:`tensor` and :meth:`router_weight` are
    views of the files and must be copied to be kept once those change.

    Attributes
    ----------
    path : Path
    backend : Backend
    config : dict
        ``config.json``.
    quantization : QuantizationConfig
    family : Family
    moe_spec : MoeSpec
    moe_layers : list of int
        The layers that are MoE layers.
    """

    def __init__(self, path, backend, progress, num_threads):
        self.path = path
        self.backend = backend
        self._progress = progress
        self._num_threads = num_threads
        self._config_file = path / "config.json"
        self.config = read_json(self._config_file)
        self.quantization = read_quantization(path, self.config)
        self.family = find_family(self.config, self._config_file)
        self.moe_spec = read_moe_spec(self.config, self.family, self._config_file)
        self._group_sizes = self._check_sizes()
        self._tensors = SafetensorsFolder(path)
        self.moe_layers = find_moe_layers(self.config, len(self._tensors.names), self._config_file)
        for layer in self.moe_layers:
            for module, k, n in self._projections(layer):
                self._check_linear(module, k, n)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self):
        """Close the files. Layers that were loaded stay; so do arrays that were handed out."""
        self._tensors.close()

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

    @property
    def linears(self) -> list:
        """The names of the quantised linear layers that are not routed experts.

        Attention's projections, say, and the shared expert of Qwen2-MoE.
        """
        suffix = ".qweight"
        return [
            name.removesuffix(suffix) for name in self.tensor_names if name.endswith(suffix) and ".experts." not in name
        ]

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
        shape = self._tensors.info(f"{name}.qweight").shape
        if len(shape) != 2:
            raise self._error(f"{name}.qweight", f"got shape {shape}, expected two dimensions")
        k, n = 8 * shape[0], shape[1]
        with self._blaming(f"{name}.qweight"):
            group_size = gptq.checked_group_size(k=k, n=n, **self._format())
        self._check_linear(name, k, n)
        g_idx = self._g_idx(name, k, group_size)
        bias = None
        if f"{name}.bias" in self._tensors:
            bias = self._tensors.tensor(f"{name}.bias").astype(np.float32)
        names = _weight_tensors(name)
        arrays = [self._tensors.tensor(tensor) for tensor in names]
        with self._blaming(f"{name}.scales"):
            linear = self.backend.load_gptq(*arrays, g_idx, bias, k=k, n=n, **self._format())
        self._release(names)
        return linear

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
        name = self.family.router.format(layer=layer)
        self._check_tensor(name, (self.moe_spec.num_experts, self.moe_spec.hidden_size))
        return self._tensors.tensor(name)

    def expert_bytes(self, layer) -> int:
        """Bytes that the routed experts of a MoE layer take in the files.

        Raises
        ------
        IndexError
            ``layer`` is not a MoE layer.
        """
        self._check_layer(layer)
        return sum(
            self._tensors.info(f"{module}.{tensor}").nbytes
            for module, _, _ in self._projections(layer)
            for tensor in TENSOR_DTYPES
            if f"{module}.{tensor}" in self._tensors
        )

    def moe_layer(self, layer) -> MoeLayer:
        """Load the routed experts of a MoE layer.

        gate and up share one stack, gate's columns first. Experts are packed in parallel, and the
        memory that a tensor was read into is given back as soon as it is packed, so that the file
        and the packed stack are never both resident. Shared experts are not part of it: when they
        are quantised they are among :attr:`linears`.

        Parameters
        ----------
        layer : int
            One of :attr:`moe_layers`.

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
            Experts with a bias, or whose gate and up order K differently (``desc_act``).
        """
        self._check_layer(layer)
        spec = self.moe_spec
        hidden, inter = spec.hidden_size, spec.intermediate_size
        modules = [self._expert(layer, expert) for expert in range(spec.num_experts)]
        for expert_modules in modules:
            self._refuse_biases(expert_modules)
        g_idx_in = [self._common_g_idx(gate, up) for gate, up, _ in modules]
        g_idx_down = [self._g_idx(down, inter, self._group_sizes[inter]) for _, _, down in modules]
        gate_up = self._new_builder(hidden, 2 * inter, g_idx_in)
        down = self._new_builder(inter, hidden, g_idx_down)

        def pack(expert):
            gate_name, up_name, down_name = modules[expert]
            self._pack(gate_up, expert, 0, gate_name, hidden, inter, g_idx_in[expert])
            self._pack(gate_up, expert, inter, up_name, hidden, inter, g_idx_in[expert])
            self._pack(down, expert, 0, down_name, inter, hidden, g_idx_down[expert])

        self._for_each_expert(pack, f"layer {layer}")
        return MoeLayer(
            gate_up.finish(),
            down.finish(),
            top_k=spec.top_k,
            activation=spec.activation,
            norm_topk_prob=spec.norm_topk_prob,
        )

    def _for_each_expert(self, work, description):
        """Call ``work(expert)`` for every expert, in parallel; the first exception ends it."""
        total = self.moe_spec.num_experts
        pool = ThreadPoolExecutor(self._num_threads)
        try:
            pending = [pool.submit(work, expert) for expert in range(total)]
            for done, future in enumerate(as_completed(pending), start=1):
                future.result()
                if self._progress is not None:
                    self._progress(done, total, description)
        finally:
            pool.shutdown(cancel_futures=True)

    def _pack(self, builder, expert, column_offset, module, k, n, g_idx):
        names = _weight_tensors(module)
        arrays = [self._tensors.tensor(name) for name in names]
        # Dtypes and shapes were checked when opening, and g_idx before: what can still be wrong is a scale.
        with self._blaming(f"{module}.scales"):
            weight = gptq.to_canonical(*arrays, g_idx, k=k, n=n, **self._format())
        builder.add(expert, column_offset, weight)
        self._release(names)

    def _new_builder(self, k, n_per_expert, g_idx):
        if all(entry is None for entry in g_idx):
            g_idx = None
        return self.backend.new_stack_builder(
            self.moe_spec.num_experts, k, n_per_expert, group_size=self._group_sizes[k], g_idx=g_idx
        )

    def _g_idx(self, module, k, group_size):
        """A linear layer's ``g_idx``, None where it has none or an ordinary one."""
        name = f"{module}.g_idx"
        if name not in self._tensors:
            return None
        with self._blaming(name):
            g_idx = gptq.normalised_g_idx(self._tensors.tensor(name), k, group_size)
        self._release([name])
        # A backend may keep it, and must not depend on the file.
        return None if g_idx is None else g_idx.copy()

    def _common_g_idx(self, gate, up):
        k = self.moe_spec.hidden_size
        of_gate, of_up = (self._g_idx(module, k, self._group_sizes[k]) for module in (gate, up))
        if (of_gate is None) != (of_up is None) or not np.array_equal(of_gate, of_up):
            raise UnsupportedError(
                f"{self._tensors.file_of(f'{up}.g_idx').path}: {gate} and {up} order K differently (desc_act), "
                "so they cannot share one stack; load each of them with linear()"
            )
        return of_gate

    def _refuse_biases(self, modules):
        # Older AutoGPTQ writes a bias of zeros for linear layers that have none.
        for name in (f"{module}.bias" for module in modules):
            if name in self._tensors and self._tensors.tensor(name).any():
                raise UnsupportedError(
                    f"{self._tensors.file_of(name).path}, tensor {name!r}: experts with a bias are not supported"
                )

    def _release(self, names):
        for name in names:
            self._tensors.release(name)

    def _expert(self, layer, expert):
        """The names of an expert's gate, up and down."""
        family = self.family
        return [
            family.expert.format(layer=layer, expert=expert, projection=projection)
            for projection in (family.gate, family.up, family.down)
        ]

    def _projections(self, layer):
        """``(name, k, n)`` of every linear layer of every expert."""
        hidden, inter = self.moe_spec.hidden_size, self.moe_spec.intermediate_size
        for expert in range(self.moe_spec.num_experts):
            gate, up, down = self._expert(layer, expert)
            yield gate, hidden, inter
            yield up, hidden, inter
            yield down, inter, hidden

    def _format(self):
        """What :func:`gptq.to_canonical` has to know of the quantisation."""
        quantization = self.quantization
        return {
            "bits": quantization.bits,
            "group_size": quantization.group_size,
            "checkpoint_format": quantization.checkpoint_format,
        }

    def _check_sizes(self):
        """The group size for each input width, -1 resolved, after the sizes were found to be supported."""
        hidden, inter = self.moe_spec.hidden_size, self.moe_spec.intermediate_size
        with _blaming(self._config_file):
            return {
                k: gptq.checked_group_size(k=k, n=n, **self._format()) for k, n in ((hidden, inter), (inter, hidden))
            }

    def _check_layer(self, layer):
        if layer not in self.moe_layers:
            raise IndexError(f"layer: got {layer!r}, expected one of the MoE layers: {self.moe_layers}")

    def _check_linear(self, module, k, n):
        """Check that a linear layer's tensors are there, with the dtypes and shapes of ``[k, n]``."""
        group_size = gptq.checked_group_size(k=k, n=n, **self._format())
        for tensor, shape in gptq.tensor_shapes(k, n, group_size).items():
            name = f"{module}.{tensor}"
            # Without g_idx, rows are in groups one after another, which desc_act says they are not.
            if tensor != "g_idx" or self.quantization.desc_act or name in self._tensors:
                self._check_tensor(name, shape, TENSOR_DTYPES[tensor])
        if f"{module}.bias" in self._tensors:
            self._check_tensor(f"{module}.bias", (n,))

    def _check_tensor(self, name, shape, dtype=None):
        info = self._tensors.info(name)
        if info.shape != shape or (dtype is not None and info.dtype != dtype):
            got, expected = f"{info.dtype} {info.shape}", f"{dtype or info.dtype} {shape}"
            raise self._error(name, f"got {got}, expected {expected} by the configuration")

    def _error(self, tensor, reason):
        return CheckpointError(reason, file=self._tensors.file_of(tensor).path, tensor=tensor)

    def _blaming(self, tensor):
        return _blaming(self._tensors.file_of(tensor).path, tensor)


@contextmanager
def _blaming(file, tensor=None):
    """Turn a refused argument into a :class:`CheckpointError` about the file that it came from."""
    try:
        yield
    except CheckpointError:
        raise
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(str(error), file=file, tensor=tensor) from error


def _weight_tensors(module):
    return [f"{module}.{tensor}" for tensor in ("qweight", "scales", "qzeros")]
