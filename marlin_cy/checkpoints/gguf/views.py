"""What the stored tensors are in the family's model: names, and the order and form in which the family has them.

A :class:`View` is a tensor of the family's model. Most are stored tensors under another name. llama.cpp stores some in
another order of rows, cut into parts, or with a function applied; such views undo this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.families import Family
from marlin_cy.checkpoints.gguf.reader import Header, StoredTensor
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.json_fields import JsonObject

__all__ = ["Layer", "Target", "View", "less_one", "plain"]

Rows: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class View:
    """A tensor of the family's model.

    Attributes
    ----------
    name : str
    shape : tuple of int
    stored : tuple of StoredTensor
        What it is made of.
    rows : int64 ``[rows]`` or None
        The stored row of each row of a matrix, or the stored entry of each entry of a vector; None for all in order.
    columns : int64 ``[columns]`` or None
        The stored column of each column.
    convert : callable or None
        ``convert(*values)`` is the tensor, float32, from the float32 values of ``stored``, whose rows are in order
        already. None for the values themselves.
    """

    name: str
    shape: tuple[int, ...]
    stored: tuple[StoredTensor, ...]
    rows: Rows | None = None
    columns: Rows | None = None
    convert: Callable[..., Floats] | None = None


@dataclass(frozen=True, eq=False)
class Layer:
    """What a view's function knows.

    Attributes
    ----------
    header : Header
    config : dict
    family : Family
    number : int
    module : str
        The layer's name: ``"model.layers.0"``.
    tiled : bool
        Whether the value heads of linear attention are ordered by their place in a group of a key head first: files of
        Qwen3.5. Otherwise, value heads of a key head follow each other.
    """

    header: Header
    config: JsonObject
    family: Family
    number: int
    module: str
    tiled: bool

    def stored(self, name: str) -> StoredTensor | None:
        """Another tensor of the layer."""
        return self.header.tensors.get(f"blk.{self.number}.{name}")


Target: TypeAlias = "str | Callable[[Layer, StoredTensor, str], Iterable[View]]"
"""A module's name in a layer, or a function of a layer, a stored tensor and the end of its name, ``".weight"`` or
``".bias"``."""


def plain(name: str, tensor: StoredTensor) -> View:
    """A stored tensor as it is."""
    return View(name, tensor.shape, (tensor,))


def taken(name: str, tensor: StoredTensor, rows: Rows) -> View:
    """Some rows of a stored tensor."""
    return View(name, (len(rows), *tensor.shape[1:]), (tensor,), rows)


def check_shape(tensor: StoredTensor, *shape: int) -> None:
    """Refuse a tensor whose rows cannot be told apart."""
    if tensor.shape != shape:
        raise CheckpointError(
            f"got {tensor.shape}, expected {shape} by the metadata", file=tensor.file, tensor=tensor.name
        )


# ---------------------------------------------------------------------------------------------
# Attention


def fused_attention(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
    """Queries, keys and values in one tensor."""
    keys = layer.config["num_key_value_heads"] * layer.config["head_dim"]
    queries = tensor.shape[0] - 2 * keys
    if queries < 1:
        raise CheckpointError(
            f"got {tensor.shape[0]} rows, expected more than the {2 * keys} of keys and values",
            file=tensor.file,
            tensor=tensor.name,
        )
    begin = 0
    for name, count in zip("qkv", (queries, keys, keys), strict=True):
        yield taken(f"{layer.module}.self_attn.{name}_proj{end}", tensor, np.arange(begin, begin + count))
        begin += count


def pairs_apart(module: str, heads_key: str) -> Target:
    """A projection whose rotated pairs are neighbours in the file, and half a head apart in the family."""

    def views(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
        heads, size = layer.config[heads_key], tensor.shape[0]
        if size % (2 * heads):
            raise CheckpointError(
                f"got {size} rows, expected a multiple of two for each of {heads} heads",
                file=tensor.file,
                tensor=tensor.name,
            )
        rows = np.arange(size).reshape(heads, size // heads // 2, 2).swapaxes(1, 2).ravel()
        yield taken(f"{layer.module}.{module}{end}", tensor, rows)

    return views


def sinks(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
    """A logit of each head."""
    del end
    yield plain(f"{layer.module}.self_attn.sinks", tensor)


def key_value_up(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
    """``kv_b_proj`` of latent attention, from its keys' part, transposed, and its values' part."""
    values = layer.stored("attn_v_b.weight")
    if values is None:
        raise CheckpointError("missing", file=tensor.file, tensor=tensor.name.replace("attn_k_b", "attn_v_b"))
    config = layer.config
    heads, latent = config["num_attention_heads"], config["kv_lora_rank"]
    nope, width = config["qk_nope_head_dim"], config["v_head_dim"]
    check_shape(tensor, heads, latent, nope)
    check_shape(values, heads, width, latent)

    def joined(keys: Floats, others: Floats) -> Floats:
        both = np.concatenate([np.swapaxes(keys, 1, 2), others], axis=1)
        return both.reshape(-1, both.shape[-1])

    yield View(
        f"{layer.module}.self_attn.kv_b_proj{end}",
        (heads * (nope + width), latent),
        (tensor, values),
        convert=joined,
    )


def part_of_key_value_up(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
    """The values' part, which belongs to :func:`key_value_up`'s view."""
    if layer.stored("attn_k_b.weight") is None:
        raise CheckpointError("missing", file=tensor.file, tensor=tensor.name.replace("attn_v_b", "attn_k_b"))
    return ()


# ---------------------------------------------------------------------------------------------
# Mixture of experts


def shared_gate(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
    """The gate of a shared expert, which is stored as a vector or as one row."""
    size = layer.config["hidden_size"]
    if tensor.shape not in ((size,), (1, size)):
        check_shape(tensor, size)
    name = f"{layer.module}.{layer.family.block}.{layer.family.shared_gate}{end}"
    yield View(name, (1, size), (tensor,), convert=lambda values: values.reshape(1, -1))


def correction_bias(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
    """The bias that selects experts."""
    del end
    yield plain(f"{layer.module}.{layer.family.block}.{layer.family.router}.e_score_correction_bias", tensor)


# ---------------------------------------------------------------------------------------------
# Linear attention


def one_centred(module: str) -> Target:
    """A norm of a layer, as :func:`less_one`."""

    def views(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
        yield less_one(f"{layer.module}.{module}{end}", tensor)

    return views


def less_one(name: str, tensor: StoredTensor) -> View:
    """A norm that is stored as its factor, where the family stores the factor less 1."""
    return View(name, tensor.shape, (tensor,), convert=lambda values: values - np.float32(1))


def delta_qkv(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
    """Queries, keys and values of linear attention, or of attention."""
    if layer.config["layer_types"][layer.number] != "linear_attention":
        return fused_attention(layer, tensor, end)
    keys = _key_rows(layer)
    check_shape(tensor, keys + _value_rows(layer), tensor.shape[1])
    rows = np.concatenate([np.arange(keys), keys + value_order(layer, _value_dim(layer))])
    return [ordered(f"{layer.module}.linear_attn.in_proj_qkv{end}", tensor, rows)]


def delta_z(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
    """The gate of linear attention's output."""
    check_shape(tensor, _value_rows(layer), tensor.shape[1])
    yield ordered(f"{layer.module}.linear_attn.in_proj_z{end}", tensor, value_order(layer, _value_dim(layer)))


def delta_qkv_z(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
    """Queries, keys, values and gates in one tensor, by key heads: older files of Qwen3-Next."""
    key_heads, key = layer.config["linear_num_key_heads"], layer.config["linear_key_head_dim"]
    value = _value_rows(layer) // key_heads
    check_shape(tensor, _key_rows(layer) + 2 * _value_rows(layer), tensor.shape[1])
    rows = np.arange(tensor.shape[0]).reshape(key_heads, 2 * (key + value))
    q, k, v, z = np.split(rows, [key, 2 * key, 2 * key + value], axis=1)
    module = f"{layer.module}.linear_attn"
    yield taken(f"{module}.in_proj_qkv{end}", tensor, np.concatenate([q.ravel(), k.ravel(), v.ravel()]))
    yield taken(f"{module}.in_proj_z{end}", tensor, z.ravel())


def delta_b_a(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
    """``b`` and ``a`` in one tensor, by key heads."""
    key_heads, value_heads = layer.config["linear_num_key_heads"], layer.config["linear_num_value_heads"]
    check_shape(tensor, 2 * value_heads, tensor.shape[1])
    b, a = np.split(np.arange(2 * value_heads).reshape(key_heads, -1), 2, axis=1)
    yield taken(f"{layer.module}.linear_attn.in_proj_b{end}", tensor, b.ravel())
    yield taken(f"{layer.module}.linear_attn.in_proj_a{end}", tensor, a.ravel())


def delta_b(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
    """How much of a value each token writes."""
    yield _of_value_heads(layer, tensor, f"in_proj_b{end}")


def delta_a(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
    """How much each token forgets."""
    yield _of_value_heads(layer, tensor, f"in_proj_a{end}")


def delta_dt_bias(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
    """The bias of what each token forgets."""
    del end
    yield _of_value_heads(layer, tensor, "dt_bias")


def delta_a_log(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
    """``A_log``, which is stored as ``-exp(A_log)``."""
    del end

    def logarithm(values: Floats) -> Floats:
        if not (values < 0).all():
            raise CheckpointError(
                f"got {values.max()}, expected negative numbers", file=tensor.file, tensor=tensor.name
            )
        result: Floats = np.log(-values.astype(np.float64)).astype(np.float32)
        return result

    yield replace(_of_value_heads(layer, tensor, "A_log"), convert=logarithm)


def delta_conv(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
    """The weights of the convolution, which the family stores with an axis of one channel."""
    keys, width = _key_rows(layer), layer.config["linear_conv_kernel_dim"]
    check_shape(tensor, keys + _value_rows(layer), width)
    rows = np.concatenate([np.arange(keys), keys + value_order(layer, _value_dim(layer))])
    yield View(
        f"{layer.module}.linear_attn.conv1d{end}",
        (tensor.shape[0], 1, width),
        (tensor,),
        rows,
        convert=lambda values: values.reshape(-1, 1, width),
    )


def delta_out(layer: Layer, tensor: StoredTensor, end: str) -> Iterable[View]:
    """The output projection of linear attention, whose inputs are ordered as value heads."""
    check_shape(tensor, tensor.shape[0], _value_rows(layer))
    view = plain(f"{layer.module}.linear_attn.out_proj{end}", tensor)
    yield replace(view, columns=value_order(layer, _value_dim(layer))) if _is_reordered(layer) else view


def ordered(name: str, tensor: StoredTensor, rows: Rows) -> View:
    """All rows of a tensor in another order, or the tensor as it is."""
    same = np.array_equal(rows, np.arange(len(rows)))
    return plain(name, tensor) if same else taken(name, tensor, rows)


def value_order(layer: Layer, head_dim: int) -> Rows:
    """The stored place of each value of linear attention's value heads, ``head_dim`` values each."""
    places = np.arange(layer.config["linear_num_value_heads"] * head_dim)
    if not _is_reordered(layer):
        return places
    key_heads = layer.config["linear_num_key_heads"]
    return places.reshape(-1, key_heads, head_dim).swapaxes(0, 1).ravel()


def _is_reordered(layer: Layer) -> bool:
    key_heads, value_heads = layer.config["linear_num_key_heads"], layer.config["linear_num_value_heads"]
    if value_heads % key_heads:
        raise UnsupportedError(
            f"{layer.header.files[0]}: ssm.time_step_rank {value_heads}, expected a multiple of ssm.group_count, "
            f"{key_heads}"
        )
    return layer.tiled and bool(value_heads != key_heads)


def _of_value_heads(layer: Layer, tensor: StoredTensor, name: str) -> View:
    """A tensor with a row for each value head."""
    check_shape(tensor, layer.config["linear_num_value_heads"], *tensor.shape[1:])
    return ordered(f"{layer.module}.linear_attn.{name}", tensor, value_order(layer, 1))


def _value_dim(layer: Layer) -> int:
    dim: int = layer.config["linear_value_head_dim"]
    return dim


def _value_rows(layer: Layer) -> int:
    return _value_dim(layer) * int(layer.config["linear_num_value_heads"])


def _key_rows(layer: Layer) -> int:
    return 2 * int(layer.config["linear_num_key_heads"]) * int(layer.config["linear_key_head_dim"])
