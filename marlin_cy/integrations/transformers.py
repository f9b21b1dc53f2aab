"""Whole models in transformers (5.8 or later) whose quantised layers run packed.

::

    config.json ── the architecture's class, on the meta device
                              │  experts lose their weights, quantised nn.Linear modules become MarlinLinear
    unquantised tensors ──────┤  transformers' own loader: renames, tied weights, buffers, checks
    quantised tensors ────────┘  Checkpoint packs them, layer by layer

Transformers' conversion table maps the names in a checkpoint to the names in the model where the two differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_cy.checkpoints.checkpoint import open_checkpoint
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.integrations import check_version, compiled, needs_extra
from marlin_cy.integrations.configs import describe_of, model_class_of, read_config, read_generation_config
from marlin_cy.integrations.modules import MarlinLinear, tensor_over
from marlin_cy.integrations.packed_modules import Progress
from marlin_cy.integrations.packing import NAME, Packing, quantised_names
from marlin_cy.integrations.quantizer import MarlinCyConfig, register

with needs_extra():
    import torch
    import transformers
    from torch import nn
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    check_version(transformers.__version__)

if TYPE_CHECKING:
    import numpy.typing as npt

    from marlin_cy.checkpoints.checkpoint import Checkpoint
    from marlin_cy.interface import Backend

__all__ = ["MarlinCyConfig", "load", "register", "weight_bytes"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    path: str | PathLike[str],
    backend: str | Backend = "cpu",
    *,
    dtype: torch.dtype | str | None = None,
    progress: Callable[[float, int, str], None] | None = None,
    **context_options: Any,
) -> transformers.PreTrainedModel:
    """Load a checkpoint folder as a transformers model for inference.

    No quantised weight is ever expanded. Experts and quantised linear layers are packed. All other weights are
    views of the mapped files, unless their dtype must change.

    Parameters
    ----------
    path : path-like
        As for :func:`marlin_cy.open_checkpoint`.
    backend : str or Backend
        Runs the packed layers. The rest of the model runs in PyTorch on the CPU.
    dtype : torch.dtype or str, optional
        Dtype of the unquantised weights and of the activations: float32, float16 or bfloat16. By default the
        dtype that most bytes of these weights have in the files.
    progress : callable, optional
        Called as ``progress(done, total, description)`` while layers are packed; ``done`` may be a fraction.
    **context_options
        Options of the backend's ``new_context``: ``num_threads`` and ``compute_dtype`` on the CPU.

    Returns
    -------
    transformers.PreTrainedModel
        The class for causal language models that belongs to the config, in evaluation mode, with the folder's
        generation config. Any number of threads may call the model at once; each gets a context of its own. Copies
        share the packed weights. The model cannot be saved, pickled or trained. Weights that are views of the
        files are read-only; writing to one in place ends the process.

    Raises
    ------
    CheckpointError
        As :func:`marlin_cy.open_checkpoint`; or tensors that are missing, unknown to the model, or of another shape.
    UnsupportedError
        A model that transformers does not know, or whose experts cannot be replaced.
    TypeError, ValueError
        An invalid ``backend``, ``dtype`` or context option.
    """
    report = Progress(progress)
    with open_checkpoint(path, backend, progress=report, describe=describe_of(path)) as checkpoint:
        for problem in checkpoint.problems():
            raise problem
        tensors = dense_tensors(checkpoint)
        torch_dtype = as_dtype(dtype, tensors)
        packing = Packing(checkpoint, tensors, torch_dtype, context_options, report)
        model = load_dense(checkpoint, tensors, torch_dtype, quantization_config=MarlinCyConfig(packing=packing))
        packing.fill(model)
    # Replace the entry that was meant for transformers' loader only.
    model.config.quantization_config = checkpoint.config.get("quantization_config")
    return model


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """``(packed, dense)``: bytes of the packed weights and of all other weights. Shared weights count once."""
    packed = 0
    for module in model.modules():
        held = getattr(module, "packed", None)
        if held is not None:
            layers = [held.layer] if isinstance(module, MarlinLinear) else [held.layer.gate_up, held.layer.down]
            packed += sum(layer.metadata.packed_bytes for layer in layers)
    storages = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in model.parameters()}
    return packed, sum(storages.values())


# ---------------------------------------------------------------------------------------------
# The loader of transformers


def load_dense(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, **options: Any) -> Any:
    """Load a model with transformers' loader from a checkpoint's config and from tensors.

    Parameters
    ----------
    checkpoint : Checkpoint
        Only its configs are used.
    tensors : dict of str to torch.Tensor
        By their names in the checkpoint.
    dtype : torch.dtype
    **options
        Options of transformers' ``from_pretrained``.

    Raises
    ------
    CheckpointError
        Tensors that are missing, unexpected or of another shape.
    UnsupportedError
        A model that transformers does not know.
    """
    path = checkpoint.path
    model_class, config = model_class_of(read_config(path))
    if checkpoint.has_own_head:
        config.tie_word_embeddings = False
    with _quiet():
        model, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            local_files_only=True,
            **options,
        )
        if (generation := read_generation_config(path)) is not None:
            model.generation_config = generation
    _refuse(path, sorted(found["missing_keys"]), "missing")
    _refuse(path, sorted(found["unexpected_keys"]), f"{model_class.__name__} has no such weight")
    for name, got, expected in sorted(found["mismatched_keys"]):
        raise CheckpointError(f"got shape {tuple(got)}, expected {tuple(expected)}", file=path, tensor=name)
    for name, reason in sorted(found.get("conversion_errors", {}).items()):
        raise CheckpointError(reason.strip().splitlines()[-1], file=path, tensor=name)
    model.name_or_path = str(path)
    return model.requires_grad_(False).eval()


def dense_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that belong to no layer of 4 or 8 bits, as views of the mapped files."""
    quantised = quantised_names(checkpoint)
    with warnings.catch_warnings():
        # PyTorch warns about read-only memory, which the docstring of load() mentions.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return {
            name: _mapped(checkpoint, name)
            for name in checkpoint.tensor_names
            if name not in quantised and not checkpoint.is_passed_over(name)
        }


def _mapped(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    array: npt.NDArray[Any] = checkpoint.tensor(name)
    try:
        return tensor_over(array)
    except TypeError as error:
        raise UnsupportedError(f"{checkpoint.path}, tensor {name!r}: dtype {array.dtype}: {error}") from error


def as_dtype(dtype: torch.dtype | str | None, tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """``dtype`` as a ``torch.dtype``; for None, the dtype that most bytes of the tensors have."""
    if dtype is None:
        counts = dict.fromkeys(DTYPES.values(), 0)
        for tensor in tensors.values():
            if tensor.dtype in counts:
                counts[tensor.dtype] += tensor.nbytes
        return max(counts, key=lambda known: counts[known])
    known = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(known, torch.dtype) and not isinstance(dtype, str):
        raise TypeError(f"dtype: got {type(dtype).__name__}, expected a torch.dtype or its name")
    if known not in DTYPES.values():
        raise ValueError(f"dtype: got {dtype}, expected one of {', '.join(DTYPES)}")
    return known


def _refuse(path: Path, names: list[str], reason: str) -> None:
    """Raise CheckpointError with the first names, if there are any."""
    if names:
        others = f" (and {len(names) - 1} more: {', '.join(names[1:4])}{', …' * (len(names) > 4)})"
        raise CheckpointError(reason + others * (len(names) > 1), file=path, tensor=names[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off transformers' loading report and progress bar, which exceptions and ``progress`` replace here."""
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
# Entry points that transformers calls


def _experts_forward(
    module: Any, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    packed = getattr(module, "packed", None)
    output: torch.Tensor
    if packed is None:  # unquantised experts: the forward of their class, which transformers has wrapped
        output = type(module).forward.__wrapped__(module, hidden_states, topk_ids, topk_weights)
    elif torch.compiler.is_compiling():
        output = compiled.experts(hidden_states, topk_ids, topk_weights, packed.number)
    else:
        output = packed(hidden_states, topk_ids, topk_weights)
    return output


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_forward)
