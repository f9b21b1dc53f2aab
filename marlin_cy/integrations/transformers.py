"""Whole models in transformers (5.8 or later), whose quantised layers run packed.

::

    config.json ── the architecture's class, on the meta device
                                    │  experts give up their weights, quantised nn.Linear become MarlinLinear
    tensors that are not quantised ─┤  transformers' own loader: its renames, ties, buffers, checks
    quantised ones, by Checkpoint ──┘  packed, one layer after the other

Where a checkpoint's names differ from the model's, transformers' table of conversions says how.
"""

import re
import warnings
from contextlib import contextmanager

from marlin_cy.checkpoints.checkpoint import open_checkpoint
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.integrations import needs_extra
from marlin_cy.integrations.modules import Contexts, MarlinLinear, as_tensor, packed_experts, packed_linear

with needs_extra():
    import torch
    import transformers
    from torch import nn
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    # Before, it refused implementations of experts that are not its own.
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 8):
        raise ImportError(f"this is transformers {transformers.__version__}")

__all__ = ["load", "weight_bytes"]

NAME = "marlin_cy"
"""Of the experts implementation and the quantisation method, in transformers' registries."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(path, backend="cpu", *, dtype=None, progress=None, **context_options):
    """A checkpoint folder as a transformers model for inference.

    Nothing quantised is ever expanded. Experts and quantised linear layers are packed; all other weights are
    views of the mapped files, unless their dtype has to change.

    Parameters
    ----------
    path : path-like
        As for :func:`marlin_cy.open_checkpoint`.
    backend : str or Backend
        Where the packed layers run. The rest of the model runs in PyTorch on the CPU.
    dtype : torch.dtype or str, optional
        Of the weights that are not quantised, and of the activations: float32, float16 or bfloat16. The one that
        most of those weights have in the files unless given.
    progress : callable, optional
        Called as ``progress(done, total, description)`` while layers are packed; ``done`` may be a fraction.
    **context_options
        Of the backend's ``new_context``: ``num_threads`` and ``compute_dtype`` on the CPU.

    Returns
    -------
    transformers.PreTrainedModel
        Of the config's class for causal language models, in evaluation mode, with the folder's generation
        config. Any number of threads may call it at once: each gets a context of its own. Copies share the
        packed weights. It cannot be saved, pickled or trained. Weights that are views of the files are
        read-only: to write to one in place ends the process.

    Raises
    ------
    CheckpointError
        As :func:`marlin_cy.open_checkpoint`; tensors that the model lacks, has too many of, or of other shapes.
    UnsupportedError
        A model that transformers does not know, or whose experts cannot be replaced.
    TypeError, ValueError
        A ``backend``, ``dtype`` or context option that is none.
    """
    report = _Progress(progress)
    with open_checkpoint(path, backend, progress=report) as checkpoint:
        contexts = Contexts(checkpoint.backend, context_options)
        tensors, modules = dense_tensors(checkpoint), _Modules(checkpoint)
        model = load_dense(
            checkpoint,
            tensors,
            as_dtype(dtype, tensors),
            experts_implementation=NAME,
            quantization_config=_QuantizationConfig(modules.replace),
        )
        modules.check_shapes(model)
        modules.fill(contexts, report)
    # What stands there was for transformers' loader alone.
    model.config.quantization_config = checkpoint.config.get("quantization_config")
    return model


def weight_bytes(model):
    """``(packed, dense)``: bytes of a model's packed weights, and of its other ones, shared ones counted once."""
    packed = 0
    for module in model.modules():
        held = getattr(module, "packed", None)
        if held is not None:
            layers = [held.layer] if isinstance(module, MarlinLinear) else [held.layer.gate_up, held.layer.down]
            packed += sum(layer.metadata.packed_bytes for layer in layers)
    storages = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in model.parameters()}
    return packed, sum(storages.values())


# ---------------------------------------------------------------------------------------------
# The parts that are transformers' own


def read_config(path):
    """The folder's config as transformers reads it, without its quantisation."""
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of many kinds: whatever it is, it is about the file
        raise CheckpointError(f"transformers {transformers.__version__}: {error}", file=path / "config.json") from error
    # transformers would look for its own way to load it.
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
    return config


def model_class_of(config):
    """``(class, config)``: the class for causal language models, and the part of the config that it takes."""
    try:
        model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise UnsupportedError(
            f"model_type {config.model_type!r}: transformers {transformers.__version__} has no causal language model"
        ) from None
    # A model of text and images: its text config.
    if model_class.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()
    return model_class, config


def model_on_meta(checkpoint):
    """A checkpoint's model without memory for its weights."""
    model_class, config = model_class_of(read_config(checkpoint.path))
    with torch.device("meta"):
        return model_class(config)


def load_dense(checkpoint, tensors, dtype, **options):
    """A model by a checkpoint's config, with tensors by their names there, as transformers loads them.

    Parameters
    ----------
    checkpoint : Checkpoint
        For its configs alone.
    tensors : dict of str to torch.Tensor
    dtype : torch.dtype
    **options
        Of transformers' ``from_pretrained``.

    Raises
    ------
    CheckpointError
        Tensors that are missing, unexpected or of another shape.
    UnsupportedError
        A model that transformers does not know.
    """
    path = checkpoint.path
    model_class, config = model_class_of(read_config(path))
    with _quiet():
        model, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            local_files_only=True,
            **options,
        )
        if (path / "generation_config.json").exists():
            try:
                model.generation_config = transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
            except (OSError, ValueError, TypeError) as error:
                raise CheckpointError(str(error), file=path / "generation_config.json") from error
    _refuse(path, sorted(found["missing_keys"]), "missing")
    _refuse(path, sorted(found["unexpected_keys"]), f"{model_class.__name__} has no such weight")
    for name, got, expected in sorted(found["mismatched_keys"]):
        raise CheckpointError(f"got shape {tuple(got)}, expected {tuple(expected)}", file=path, tensor=name)
    for name, reason in sorted(found.get("conversion_errors", {}).items()):
        raise CheckpointError(reason.strip().splitlines()[-1], file=path, tensor=name)
    model.name_or_path = str(path)
    return model.requires_grad_(False).eval()


def dense_tensors(checkpoint):
    """The tensors of a checkpoint that belong to no quantised layer, as tensors over the mapped files."""
    quantised = {*checkpoint.quantized_tensors, *(f"{name}.bias" for name in checkpoint.linears)}
    with warnings.catch_warnings():
        # Of memory that must not be written to: load() tells.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return {name: _mapped(checkpoint, name) for name in checkpoint.tensor_names if name not in quantised}


def _mapped(checkpoint, name):
    array = checkpoint.tensor(name)
    try:
        return as_tensor(array)
    except TypeError as error:
        raise UnsupportedError(f"{checkpoint.path}, tensor {name!r}: dtype {array.dtype}: {error}") from error


def as_dtype(dtype, tensors):
    """The ``torch.dtype`` that a caller asked for, or that most bytes of the tensors have."""
    if dtype is None:
        counts = dict.fromkeys(DTYPES.values(), 0)
        for tensor in tensors.values():
            if tensor.dtype in counts:
                counts[tensor.dtype] += tensor.nbytes
        return max(counts, key=counts.get)
    known = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(known, torch.dtype) and not isinstance(dtype, str):
        raise TypeError(f"dtype: got {type(dtype).__name__}, expected a torch.dtype or its name")
    if known not in DTYPES.values():
        raise ValueError(f"dtype: got {dtype}, expected one of {', '.join(DTYPES)}")
    return known


def _refuse(path, names, reason):
    if names:
        others = f" (and {len(names) - 1} more: {', '.join(names[1:4])}{', …' * (len(names) > 4)})"
        raise CheckpointError(reason + others * (len(names) > 1), file=path, tensor=names[0])


@contextmanager
def _quiet():
    """transformers' report and progress bar say what is said here by exceptions, and by ``progress``."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    if bars:
        log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


# ---------------------------------------------------------------------------------------------
# The modules that are replaced


def experts_modules(model, checkpoint):
    """``{layer: path}`` of the modules that hold a model's routed experts, where a checkpoint has them quantised.

    Raises
    ------
    CheckpointError
        The model has experts in other layers than the checkpoint.
    """
    found = {}
    for path, module in model.named_modules():
        # What transformers' decorator of experts leaves on them.
        if hasattr(module, "is_transposed") and hasattr(module, "has_bias"):
            found[int(re.search(r"(?:^|\.)layers\.(\d+)\.", path)[1])] = path
    layers = sorted(checkpoint.moe_layers + checkpoint.dense_moe_layers)
    if sorted(found) != layers:
        raise CheckpointError(
            f"got experts in layers {layers}, but transformers' {type(model).__name__} has them in {sorted(found)}",
            file=checkpoint.path,
        )
    return {layer: found[layer] for layer in checkpoint.moe_layers}


def linear_modules(model, names):
    """``{name: path}`` of the modules that a checkpoint's linear layers are in a model.

    Those that transformers ignores (of layers that predict several tokens) are left out.

    Raises
    ------
    CheckpointError
        The model has no such linear layer.
    UnsupportedError
        transformers makes one weight of several such.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    state, modules = model.state_dict(), dict(model.named_modules())
    found = {}
    for name in names:
        weight, converter = rename_source_key(f"{name}.weight", renamings, converters, model.base_model_prefix, state)
        if converter is not None:
            raise UnsupportedError(f"{name}: transformers' {type(model).__name__} makes one weight of it and others")
        path = weight.removesuffix(".weight")
        if type(modules.get(path)) is nn.Linear:
            found[name] = path
        elif not any(re.search(pattern, weight) for pattern in ignored):
            raise CheckpointError(f"{name}: transformers' {type(model).__name__} has no such linear layer")
    return found


class _Modules:
    """The modules of a model that run packed, by what they are called in the checkpoint.

    Attributes
    ----------
    linears : dict of str to MarlinLinear
    experts : dict of int to torch.nn.Module
        By layer. They keep their class, whose calls transformers passes on to :func:`_experts_forward`.
    """

    def __init__(self, checkpoint):
        self._checkpoint = checkpoint
        self.linears, self.experts, self._shapes = {}, {}, {}

    def replace(self, model):
        """Take the weights out of a model on the meta device, before transformers asks for them."""
        for name, path in linear_modules(model, self._checkpoint.linears).items():
            parent, _, attribute = path.rpartition(".")
            parent = model.get_submodule(parent)
            linear = getattr(parent, attribute)
            self._check_bias(name, linear)
            self.linears[name] = MarlinLinear(linear.in_features, linear.out_features)
            setattr(parent, attribute, self.linears[name])
        for layer, path in experts_modules(model, self._checkpoint).items():
            module = model.get_submodule(path)
            if not getattr(module, "has_gate", True) or getattr(module, "has_post_expert_norm", False):
                raise UnsupportedError(f"{path}: experts without a gate, or with a norm, are not supported")
            for name, _ in list(module.named_parameters(recurse=False)):
                delattr(module, name)
            module._is_hf_initialized = True  # there is nothing left to initialise
            self.experts[layer] = module
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def check_shapes(self, model):
        """Refuse weights of other shapes than the model's, which older transformers with a quantiser do not."""
        for name, tensor in model.state_dict().items():
            if tensor.shape != self._shapes[name]:
                raise self._error(name, f"got shape {tuple(tensor.shape)}, expected {tuple(self._shapes[name])}")

    def fill(self, contexts, report):
        """Pack the layers."""
        report.parts = len(self.linears) + len(self.experts)
        for name, module in self.linears.items():
            linear = self._checkpoint.linear(name)
            got, expected = (linear.in_features, linear.out_features), (module.in_features, module.out_features)
            if got != expected:
                raise self._error(name, f"got {got[0]} to {got[1]} features, expected {expected[0]} to {expected[1]}")
            module.packed = packed_linear(linear, contexts)
            report.finish(name)
        for layer, module in self.experts.items():
            module.packed = packed_experts(self._checkpoint.moe_layer(layer, shared_expert=False), contexts)
            report.finish(f"layer {layer}")

    def _check_bias(self, name, module):
        """Refuse a bias that one has and the other has not; but AutoGPTQ writes zeros for layers without."""
        bias = f"{name}.bias"
        has_bias = bias in self._checkpoint.tensor_names
        if module.bias is not None and not has_bias:
            raise self._error(bias, "missing")
        if module.bias is None and has_bias and self._checkpoint.tensor(bias).any():
            raise self._error(bias, "the model's layer has no bias")

    def _error(self, tensor, reason):
        return CheckpointError(reason, file=self._checkpoint.path, tensor=tensor)


class _Progress:
    """Counts layers, and within one its experts, for which :func:`~marlin_cy.open_checkpoint` calls it.

    Attributes
    ----------
    parts : int
        How many layers there are.
    """

    def __init__(self, progress):
        if progress is not None and not callable(progress):
            raise TypeError(f"progress: got {type(progress).__name__}, expected a callable or None")
        self._progress, self.parts, self._finished = progress, 1, 0

    def __call__(self, done, total, description):
        if self._progress is not None and done < total:
            self._progress(self._finished + done / total, self.parts, description)

    def finish(self, description):
        """A layer is done."""
        self._finished += 1
        if self._progress is not None:
            self._progress(self._finished, self.parts, description)


# ---------------------------------------------------------------------------------------------
# What transformers calls


def _experts_forward(module, hidden_states, topk_ids, topk_weights):
    packed = getattr(module, "packed", None)
    if packed is None:  # experts that are not quantised: the class's own forward, which transformers has wrapped
        return type(module).forward.__wrapped__(module, hidden_states, topk_ids, topk_weights)
    return packed(hidden_states, topk_ids, topk_weights)


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_forward)


@register_quantization_config(NAME)
class _QuantizationConfig(QuantizationConfigMixin):
    """How transformers' loader is told to let a function at the model before it loads weights."""

    def __init__(self, replace):
        self.quant_method, self.replace = NAME, replace

    def __deepcopy__(self, memo):
        return self

    def to_dict(self):
        return {"quant_method": self.quant_method}


@register_quantizer(NAME)
class _Quantizer(HfQuantizer):
    """Replaces modules, and says of the model what it cannot do."""

    def _process_model_before_weight_loading(self, model, **kwargs):
        self.quantization_config.replace(model)
        self.quantization_config.replace = None  # and what it holds

    def is_serializable(self, *args, **kwargs):
        return False

    @property
    def is_trainable(self):
        return False
