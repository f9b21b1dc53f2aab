"""This library's decoder as a model of transformers: ``generate`` and pipelines run on it.

::

    generate() ── forward(input_ids, attention_mask, cache) ── DecoderCache ── Model.forward_batch
    (transformers chooses tokens)                              (rows to sequences)
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.decoder.load import load_model
from marlin_cy.errors import UnsupportedError
from marlin_cy.integrations import needs_extra
from marlin_cy.integrations.configs import check_device_map, read_config, read_generation_config
from marlin_cy.integrations.decoder_cache import DecoderCache, Mask, SharedDecoder

with needs_extra():
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = ["DecoderForCausalLM", "DecoderModelConfig", "decoder_config"]

FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""What programs read of a model's config."""

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name of caches in this version of transformers."""

WITHOUT_MEANING = frozenset(
    ("_from_auto", "_from_pipeline", "adapter_kwargs", "cache_dir", "code_revision", "force_download")
    + ("local_files_only", "low_cpu_mem_usage", "proxies", "revision", "subfolder", "token", "tqdm_class")
    + ("trust_remote_code", "use_safetensors")
)
"""Options of ``from_pretrained`` that do not matter for a folder."""


class DecoderModelConfig(PreTrainedConfig):
    """The config of a model that the decoder runs. Its ``quantization_config`` has the options of ``load_model``."""

    model_type = "marlin_cy_decoder"


def decoder_config(folder: str | PathLike[str], options: Any) -> DecoderModelConfig:
    """The config of a folder's model in the decoder.

    Parameters
    ----------
    folder : path-like
    options : MarlinCyConfig

    Raises
    ------
    CheckpointError
        transformers cannot read the folder's config.
    """
    text = read_config(Path(folder)).get_text_config()
    fields = {name: getattr(text, name) for name in FIELDS if hasattr(text, name)}
    config = DecoderModelConfig(**fields, architectures=[DecoderForCausalLM.__name__])
    config.quantization_config = options
    return config


class DecoderForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose forward is the decoder.

    Logits are those of :meth:`marlin_cy.decoder.model.Model.forward_batch`. The model has no parameters of PyTorch.
    Threads take turns.

    Attributes
    ----------
    decoder : SharedDecoder
    """

    config_class = DecoderModelConfig
    main_input_name = "input_ids"

    def __init__(self, config: DecoderModelConfig, decoder: SharedDecoder) -> None:
        super().__init__(config)
        self.decoder = decoder
        self._is_stateful = decoder.recurrent
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        config: DecoderModelConfig,
        dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        **options: Any,
    ) -> DecoderForCausalLM:
        """Load a folder. ``AutoModelForCausalLM.from_pretrained`` calls this for a :class:`DecoderModelConfig`.

        Raises
        ------
        CheckpointError, UnsupportedError, TypeError, ValueError, MemoryError
            As :func:`~marlin_cy.load_model`; also for options that the decoder does not have.
        """
        check_device_map(device_map)
        for name, value in (("dtype", dtype), ("torch_dtype", torch_dtype)):
            if value not in (None, "auto", "float32", torch.float32):
                raise UnsupportedError(f"{name}: got {value}, expected 'auto': the decoder computes in float32")
        if attn_implementation is not None:
            raise UnsupportedError(f"attn_implementation: got {attn_implementation!r}; the decoder has its own")
        if unknown := sorted(options.keys() - WITHOUT_MEANING):
            raise TypeError(f"{unknown[0]}: the decoder has no such option; those of load_model go to MarlinCyConfig")
        folder, given = Path(pretrained_model_name_or_path), config.quantization_config
        model = load_model(folder, given.backend, progress=given.progress, **given.context_options)
        config.max_position_embeddings = model.context_length
        config.name_or_path = str(folder)
        loaded = cls(config, SharedDecoder(model))
        if (generation := read_generation_config(folder)) is not None:
            loaded.generation_config = generation
        loaded.eval()
        return loaded

    @property
    def device(self) -> torch.device:
        """Where tokens and logits are."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits."""
        return torch.float32

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: DecoderCache | None = None,
        past_key_values: DecoderCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Append tokens to a cache.

        Parameters
        ----------
        input_ids : int64 ``[rows, columns]``
        attention_mask : ``[rows, columns]``, optional
            0 where a row is padded, on its left or right. With a cache, it begins with the columns of the cache.
        position_ids : optional
            Checked: tokens have consecutive positions, and padding has none.
        cache, past_key_values : DecoderCache, optional
            The same under two names. Without a cache, a new one is made if ``use_cache`` is not False.
        logits_to_keep : int or tensor
            The last columns whose logits are wanted, or a tensor of columns. 0: all.

        Returns
        -------
        CausalLMOutputWithPast
            float32 logits; zeros where a row is padded.

        Raises
        ------
        UnsupportedError
            ``labels``, ``inputs_embeds``, attention or hidden states are asked for; a mask with gaps or of four
            dimensions; other positions; a cache of another kind or of another model.
        ValueError, IndexError, CacheFull
            As :meth:`~marlin_cy.decoder.model.Model.forward_batch`.
        """
        if refused := sorted(name for name, value in others.items() if value is not None and value is not False):
            raise UnsupportedError(f"{refused[0]}: the decoder does not support it")
        if input_ids is None or input_ids.ndim != 2 or not input_ids.numel():
            raise ValueError("input_ids: expected token ids, [rows, columns]")
        used = self._checked_cache(past_key_values if cache is None else cache)
        tokens = input_ids.numpy()
        before = used.mask if used.batch_size else np.zeros((len(tokens), 0), bool)
        mask = _checked_mask(attention_mask, before, tokens.shape)
        _check_positions(position_ids, before, mask)
        last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1 and bool(mask[:, -1].all())
        rows = [row[kept] for row, kept in zip(tokens, mask, strict=True)]
        logits = _padded(
            used.append(rows, mask, all_logits=not last_only), mask, last_only, self.decoder.model.vocab_size
        )
        if not last_only:
            logits = logits[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        kept_cache = used if cache is not None or past_key_values is not None or use_cache is not False else None
        output = CausalLMOutputWithPast(logits=logits, **{CACHE: kept_cache})
        return output.to_tuple() if return_dict is False else output

    def _checked_cache(self, cache: Any) -> DecoderCache:
        if cache is None:
            return DecoderCache(self.decoder)
        if not isinstance(cache, DecoderCache) or cache.decoder is not self.decoder:
            raise UnsupportedError(
                f"{CACHE}: got a {type(cache).__name__}, expected a DecoderCache of this model, which it makes itself"
            )
        return cache

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give ``generate`` a cache, unless the caller has one or wants none."""
        # "dynamic_full" is what earlier versions ask of an assistant: a cache from which tokens can be taken back.
        if generation_config.cache_implementation not in (None, "dynamic", "dynamic_full"):
            raise UnsupportedError(
                f"cache_implementation: got {generation_config.cache_implementation!r}; the decoder has its own cache"
            )
        if model_kwargs.get(CACHE) is not None:
            self._checked_cache(model_kwargs[CACHE])._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = DecoderCache(self.decoder)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse transformers' continuous batching, which runs transformers' attention.

        Raises
        ------
        UnsupportedError
        """
        raise UnsupportedError(
            "continuous batching: the decoder does not run transformers' attention; `marlin-cy serve` and "
            "marlin_cy.load_model(...).generate_batch batch continuously"
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to save.

        Raises
        ------
        UnsupportedError
        """
        raise UnsupportedError(
            "save_pretrained: packed weights cannot be saved; `marlin-cy pack` writes a packed folder"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError("a model of the decoder cannot be copied or pickled: load the folder again instead")


def _checked_mask(given: torch.Tensor | None, before: Mask, shape: tuple[int, ...]) -> Mask:
    """Which of the next columns are tokens, ``[rows, columns]``."""
    rows, columns = shape
    if len(before) != rows:
        raise ValueError(f"input_ids: got {rows} rows, expected {len(before)} as in the cache")
    expected = (rows, before.shape[1] + columns)
    if given is None:
        mask = np.concatenate([before, np.ones(shape, bool)], axis=1)
    elif given.ndim != 2 or tuple(given.shape) != expected:
        raise UnsupportedError(f"attention_mask: got shape {tuple(given.shape)}, expected {expected}")
    else:
        mask = given.numpy() != 0
    if (mask[:, : before.shape[1]] != before).any():
        raise UnsupportedError("attention_mask: differs from the mask of the tokens that are in the cache")
    begins = mask[:, 1:] & ~mask[:, :-1]
    gaps = mask[:, :1].sum(axis=1) + begins.sum(axis=1) > 1
    if gaps.any():
        raise UnsupportedError(
            f"attention_mask: row {gaps.argmax()} has zeros between ones, expected padding at an end"
        )
    return mask[:, before.shape[1] :]


def _check_positions(given: torch.Tensor | None, before: Mask, mask: Mask) -> None:
    if given is None:
        return
    expected = before.sum(axis=1, keepdims=True) + mask.cumsum(axis=1) - 1
    try:
        positions = np.broadcast_to(given.numpy(), expected.shape)
    except ValueError:
        raise ValueError(f"position_ids: got shape {tuple(given.shape)}, expected {expected.shape}") from None
    if (positions != expected)[mask].any():
        raise UnsupportedError(
            "position_ids: expected those that follow from attention_mask: each token's is one more than the last's"
        )


def _padded(logits: list[npt.NDArray[np.float32] | None], mask: Mask, last_only: bool, vocab_size: int) -> torch.Tensor:
    """Logits ``[rows, columns, vocab]``, or ``[rows, 1, vocab]`` of the last column."""
    if last_only:
        return torch.from_numpy(np.stack([row for row in logits if row is not None])[:, None])
    if mask.all():
        return torch.from_numpy(np.stack([row for row in logits if row is not None]))
    padded = np.zeros((*mask.shape, vocab_size), np.float32)
    for place, kept, row in zip(padded, mask, logits, strict=True):
        if row is not None:
            place[kept] = row
    return torch.from_numpy(padded)


AutoConfig.register(DecoderModelConfig.model_type, DecoderModelConfig)
AutoModelForCausalLM.register(DecoderModelConfig, DecoderForCausalLM)
