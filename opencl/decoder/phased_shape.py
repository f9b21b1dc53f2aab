"""What ``kernels/decoder_step.cl`` must know of a model: its macros, and the table of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from marlin_cy.activations import ACTIVATIONS
from marlin_cy.decoder.plan import AttentionPlan, DecoderPlan, LayerPlan, MoeFfnPlan
from marlin_cy.opencl.arguments import arguments_of
from marlin_cy.opencl.decoder.attention import GroupedAttention
from marlin_cy.opencl.decoder.cache import SEGMENTS
from marlin_cy.opencl.decoder.ffn import Mlp, MoeFfn
from marlin_cy.opencl.decoder.phased_stores import NotPhased, check_store, covering, packed_parts
from marlin_cy.opencl.gemm.codes import code_macros
from marlin_cy.opencl.launch import Launch
from marlin_cy.opencl.layer.routing import normalises, routing_macros
from marlin_cy.opencl.layout import STRIP_N
from marlin_cy.opencl.memory import zeroed_buffers
from marlin_cy.opencl.stack import OpenClMarlinExpertStack

if TYPE_CHECKING:
    from marlin_cy.opencl.decoder.cache import KvPool
    from marlin_cy.opencl.decoder.layer import Layer
    from marlin_cy.opencl.stack import Runtime
    from marlin_cy.opencl.store import OpenClGptqStore

__all__ = ["LAYER", "SHARED_LAYER", "ModelShape", "NotPhased", "addresses", "shape_of"]

MOST_HEADS = 8
"""Heads that a work-group attends with, at most."""

BLOCK_OF_ROWS = 32
"""Values of a row that the lanes of a wave read together."""

# Layer of decoder_step.cl.
LAYER = np.dtype(
    [
        ("qkv", "u8", 3),
        ("o", "u8"),
        ("gate_up", "u8", 8),
        ("down", "u8", 8),
        *((name, "u8") for name in ("mixer_norm", "ffn_norm", "q_norm", "k_norm", "qkv_bias", "o_bias", "sinks")),
        *((name, "u8") for name in ("gate_up_bias", "down_bias")),
        ("cosine", "u8"),
        ("sine", "u8"),
        ("keys", "u8", SEGMENTS),
        ("values", "u8", SEGMENTS),
        *((name, "u8") for name in ("router", "router_bias", "correction")),
        ("qkv_strips", "u4", 3),
        ("pad", "u4"),
        ("qkv_first", "u4", 3),
        ("pad2", "u4"),
        ("qkv_factor", "f4", 3),
        ("o_factor", "f4"),
        ("gate_up_factor", "f4"),
        ("down_factor", "f4"),
        ("scale", "f4"),
        ("norm_eps", "f4"),
        ("routing_factor", "f4"),
        ("window", "u4"),
        ("soft_cap", "f4"),
        ("pad5", "u4"),
    ]
)

# The layer with SHARED, for models with shared experts or dense layers.
SHARED_LAYER = np.dtype(
    [
        *LAYER.descr,
        ("shared", "u8", 3),
        ("shared_gate", "u8"),
        ("shared_strips", "u4", 2),
        ("shared_first", "u4", 2),
        ("shared_shift", "u4", 3),
        ("shared_inner", "u4"),
        ("is_dense", "u4"),
        ("pad3", "u4"),
        ("shared_factor", "f4", 3),
        ("pad4", "u4"),
    ]
)


@dataclass
class Entry:
    """A layer's row of the table.

    Attributes
    ----------
    places : dict
        By field and index: a buffer, and a number of bytes from its beginning.
    numbers : dict
        By field and index.
    pool : KvPool
        The layer's part of the cache. It grows.
    """

    places: dict[tuple[str, int], tuple[cl.Buffer, int]] = field(default_factory=dict)
    numbers: dict[tuple[str, int], float] = field(default_factory=dict)
    pool: KvPool | None = None

    def put(self, name: str, buffer: cl.Buffer | None, offset: int = 0, index: int = 0) -> None:
        """Set an address; None stays NULL."""
        if buffer is not None:
            self.places[name, index] = buffer, offset

    def put_store(self, name: str, store: OpenClGptqStore, expert: int, index: int = 0) -> None:
        """Set the address of an expert."""
        part, number = divmod(expert, store.experts_per_part)
        self.put(name, store.parts[part], 4 * store.expert_words * number, index)


@dataclass(frozen=True)
class ModelShape:
    """
    Attributes
    ----------
    macros : dict of str to int
        Of the kernel.
    entries : list of Entry
    layer_type : numpy.dtype
        LAYER or SHARED_LAYER.
    shared_inner : int
        The largest inner width of a shared expert or a dense layer; 0 without any.
    """

    macros: dict[str, int]
    entries: list[Entry]
    layer_type: np.dtype[Any]
    shared_inner: int

    def table(self, runtime: Runtime) -> npt.NDArray[Any]:
        """The table, an array of ``layer_type``, with the segments that the cache has."""
        table = np.zeros(len(self.entries), self.layer_type)
        for entry in self.entries:
            assert entry.pool is not None
            for name, index, buffer in entry.pool.all_segments():
                entry.put(name, buffer, index=index)
        # Layers share tables of RoPE, and stacks repeat their last part.
        buffers = {id(buffer): buffer for entry in self.entries for buffer, _ in entry.places.values()}
        found = dict(zip(buffers, addresses(runtime, list(buffers.values())), strict=True))
        for row, entry in zip(table, self.entries, strict=True):
            for (name, index), (buffer, offset) in entry.places.items():
                set_field(row, name, index, found[id(buffer)] + offset)
            for (name, index), number in entry.numbers.items():
                set_field(row, name, index, number)
        return table


def set_field(row: Any, name: str, index: int, value: float) -> None:
    """Set a field, or an element of one."""
    if row.dtype[name].shape:
        row[name][index] = value
    else:
        row[name] = value


def addresses(runtime: Runtime, buffers: Sequence[cl.Buffer]) -> list[int]:
    """The addresses that kernels see."""
    table = arguments_of("address_of", {})
    launch = Launch(runtime.programs.kernel("address", "address_of", {}), table)
    (out,) = zeroed_buffers(runtime, [8 * max(1, len(buffers))], "addresses")
    found = np.empty(len(buffers), np.uint64)
    with runtime.loading_lock:
        queue = runtime.loading_queue
        for place, buffer in enumerate(buffers):
            launch(queue, (1,), (1,), (buffer, out, place))
        if buffers:
            cl.enqueue_copy(queue, found, out)
    return [int(address) for address in found]


# The shape of a model -----------------------------------------------------------------------------


def shape_of(plan: DecoderPlan, layers: Sequence[Layer]) -> ModelShape:
    """The shape of a model.

    Raises
    ------
    NotPhased
        The kernel does not support it.
    """
    found = [LayerShape(its, layer) for its, layer in zip(plan.layers, layers, strict=True)]
    macros = dict[str, int]()
    for layer in found:
        for name, value in layer.macros.items():
            if macros.setdefault(name, value) != value:
                raise NotPhased(f"its layers differ in {name}")
    if "EXPERTS" not in macros:
        raise NotPhased("it has no experts")
    activations = {layer.shared_activation for layer in found if layer.shared_inner}
    if activations - {macros["ACTIVATION"]}:
        raise NotPhased("its shared experts or dense layers have an activation of their own")
    stores = [store for layer in found for store in layer.stores]
    if len({store.codes for store in stores}) > 1:
        raise NotPhased("its weights have several code types")
    if plan.hidden_size % STRIP_N:
        raise NotPhased(f"its hidden size is {plan.hidden_size}, no multiple of {STRIP_N}")
    for layer in found:
        layer.entry.numbers["norm_eps", 0] = plan.norm_eps
    attentions = [its.mixer for its in plan.layers if isinstance(its.mixer, AttentionPlan)]
    shared_inner = max(layer.shared_inner for layer in found)
    layer_type = SHARED_LAYER if shared_inner else LAYER
    if shared_inner:
        macros["SHARED"] = 1
    macros = {
        **macros,
        **code_macros(stores[0].codes, all(store.symmetric for store in stores)),
        "GROUP_32": int(any(store.layout.group_shift == 5 for store in stores)),
        "SINKS": int(any(attention.sinks is not None for attention in attentions)),
        "CAPPED": int(any(attention.soft_cap for attention in attentions)),
        "LAYERS": len(layers),
        "HIDDEN": plan.hidden_size,
        "LAYER_BYTES": layer_type.itemsize,
    }
    return ModelShape(macros, [layer.entry for layer in found], layer_type, shared_inner)


class LayerShape:
    """The shape of a layer.

    Attributes
    ----------
    macros : dict of str to int
    entry : Entry
    stores : list of OpenClGptqStore
    shared_inner : int
        The inner width of a shared expert or of a dense network; 0 if there is neither.
    shared_activation : int
        The macro ACTIVATION that it needs.
    """

    def __init__(self, plan: LayerPlan, layer: Layer) -> None:
        attention, ffn = plan.mixer, plan.ffn
        if not isinstance(attention, AttentionPlan) or not isinstance(layer.mixer, GroupedAttention):
            raise NotPhased(f"it has layers of {type(attention).__name__.removesuffix('Plan')}")
        self.macros: dict[str, int] = {}
        self.shared_inner = self.shared_activation = 0
        self.entry = Entry()
        self.stores: list[OpenClGptqStore] = []
        self.entry.put("mixer_norm", layer.mixer_norm)
        self.entry.put("ffn_norm", layer.ffn_norm)
        self._attention(attention, layer.mixer)
        if isinstance(ffn, MoeFfnPlan) and isinstance(layer.ffn, MoeFfn):
            self._experts(ffn, layer.ffn)
        elif isinstance(layer.ffn, Mlp):
            self.entry.numbers["is_dense", 0] = 1
            self._network(layer.ffn)
        for store in self.stores:
            check_store(store)

    def _attention(self, plan: AttentionPlan, layer: GroupedAttention) -> None:
        heads, kv_heads, width = plan.num_heads, plan.num_kv_heads, plan.head_dim
        if width % 32:
            raise NotPhased(f"its head size is {width}, no multiple of 32")
        entry = self.entry
        if layer.inputs.quantised or layer.output.quantised:
            queries = heads * width * (2 if plan.gated else 1)
            self._packed_projections(layer, (queries, kv_heads * width, kv_heads * width))
        else:
            self._dense_projections(layer)
        entry.put("q_norm", layer.q_norm)
        entry.put("k_norm", layer.k_norm)
        entry.put("cosine", layer.rotation.cosine)
        entry.put("sine", layer.rotation.sine)
        entry.put("sinks", layer.attend.sinks)
        entry.pool = layer.attend.pool
        entry.numbers["scale", 0] = plan.scale
        entry.numbers["window", 0] = plan.window or 0
        entry.numbers["soft_cap", 0] = plan.soft_cap or 0
        per_kv = heads // kv_heads
        self.macros |= {
            "NUM_HEADS": heads,
            "NUM_KV_HEADS": kv_heads,
            "HEAD_DIM": width,
            "HEADS": max(number for number in range(1, MOST_HEADS + 1) if per_kv % number == 0),
            "PAIRS_ROTATED": layer.rotation.pairs,
            "INTERLEAVED": int(layer.rotation.interleaved),
            "GATED": int(plan.gated),
            **layer.attend.pool.table_macros,
        }

    def _packed_projections(self, layer: GroupedAttention, widths: Sequence[int]) -> None:
        """Quantised projections; ``widths``: of queries with their gates, of keys, and of values."""
        parts, outputs = packed_parts(layer.inputs), packed_parts(layer.output)
        entry, begin, shifts = self.entry, 0, set()
        for index, columns in enumerate(widths):
            store, expert, column = covering(parts, begin, columns)
            entry.put_store("qkv", store, expert, index)
            entry.numbers["qkv_strips", index] = store.layout.strips
            entry.numbers["qkv_first", index] = column // STRIP_N
            entry.numbers["qkv_factor", index] = store.weight_factor
            shifts.add(store.layout.group_shift)
            self.stores.append(store)
            begin += columns
        if len(shifts) > 1:
            raise NotPhased("its projections have several group sizes")
        output, expert, column = covering(outputs, 0, layer.output.width)
        if column or output.n != layer.output.width:
            raise NotPhased("its output projection is a part of a stack")
        entry.put_store("o", output, expert)
        entry.numbers["o_factor", 0] = output.weight_factor
        self.stores.append(output)
        entry.put("qkv_bias", parts[0].bias_buffer)
        entry.put("o_bias", outputs[0].bias_buffer)
        self.macros |= {"DENSE": 0, "QKV_SHIFT": shifts.pop(), "O_SHIFT": output.layout.group_shift}

    def _dense_projections(self, layer: GroupedAttention) -> None:
        """Projections that are not quantised."""
        inputs, output = layer.inputs.whole_dense, layer.output.whole_dense
        if inputs is None or output is None or inputs.type_code != output.type_code:
            raise NotPhased("its projections have several element types")
        if inputs.scales is not None:
            raise NotPhased("its projections have 8 bits")
        self.entry.put("qkv", inputs.buffer)
        self.entry.put("qkv_bias", inputs.bias)
        self.entry.put("o", output.buffer)
        self.entry.put("o_bias", output.bias)
        self.macros |= {"DENSE": 1, "PROJECTION_TYPE": inputs.type_code}

    def _experts(self, plan: MoeFfnPlan, layer: MoeFfn) -> None:
        moe = layer.plan
        gate_up, down = layer.stacks
        for what, found in (
            ("weights on the experts' input", moe.apply_router_weight_on_input),
            ("a routing by sparsemixer", moe.routing.scoring == "sparsemixer"),
            ("a scale for each expert", moe.routing.expert_scale is not None),
        ):
            if found:
                raise NotPhased(f"it has {what}")
        inner = down.k
        if inner % STRIP_N:
            raise NotPhased(f"its intermediate size is {inner}, no multiple of {STRIP_N}")
        if gate_up.store.experts_per_part != down.store.experts_per_part:
            raise NotPhased("its experts lie in buffers of different sizes")
        if layer.shared is not None:
            self._network(layer.shared)
            self.entry.put("shared_gate", layer.shared_gate)
        elif moe.shared_expert is not None:
            shared_gate_up, shared_down = moe.shared_expert.gate_up, moe.shared_expert.down
            assert isinstance(shared_gate_up, OpenClMarlinExpertStack)
            assert isinstance(shared_down, OpenClMarlinExpertStack)
            if shared_gate_up.bias_buffer is not None or shared_down.bias_buffer is not None:
                raise NotPhased("it has biases of experts")
            width = shared_down.k
            parts = [(shared_gate_up.store, 0, column) for column in (0, width)]
            self._shared([*parts, (shared_down.store, 0, 0)], width, moe.activation)
            self.entry.put("shared_gate", layer.shared_gate)
        if (gate_up.bias_buffer is None) != (down.bias_buffer is None):
            raise NotPhased("only one projection of its experts has biases")
        entry, routing = self.entry, moe.routing
        for name, stack in (("gate_up", gate_up), ("down", down)):
            store = stack.store
            for index, part in enumerate(store.parts):
                entry.put(name, part, 0, index)
            entry.put(f"{name}_bias", stack.bias_buffer)
            entry.numbers[f"{name}_factor", 0] = store.weight_factor
            self.stores.append(store)
        entry.put("router", layer.router.buffer)
        entry.put("router_bias", layer.router.bias)
        entry.put("correction", layer.correction)
        entry.numbers["routing_factor", 0] = routing.routed_scaling_factor
        self.macros |= {
            "INNER": inner,
            "EXPERTS": moe.num_experts,
            "EXPERT_BIASES": int(gate_up.bias_buffer is not None),
            "TOP_K": moe.top_k,
            "GATE_SHIFT": gate_up.store.layout.group_shift,
            "DOWN_SHIFT": down.store.layout.group_shift,
            "GATE_WORDS": gate_up.store.expert_words,
            "DOWN_WORDS": down.store.expert_words,
            "EXPERTS_PER_PART": gate_up.store.experts_per_part,
            "ROUTER_TYPE": layer.router.type_code,
            "ACTIVATION": ACTIVATIONS[moe.activation].number + 1,
            "NORMALISE": normalises(routing),
            "NUM_GROUPS": routing.num_groups,
            "TOPK_GROUPS": routing.topk_groups,
            **routing_macros(routing),
        }

    def _network(self, layer: Mlp) -> None:
        """A network of its own: a dense layer's, or a shared expert whose projections are layers of the plan."""
        gate_up, down = packed_parts(layer.gate_up, "feed-forward"), packed_parts(layer.down, "feed-forward")
        if any(part.bias_buffer is not None for part in (*gate_up, *down)):
            raise NotPhased("its feed-forward layers have biases")
        width, hidden = layer.inner, layer.down.width
        parts = [covering(gate_up, 0, width), covering(gate_up, width, width), covering(down, 0, hidden)]
        if parts[2][2] or parts[2][0].n != hidden:
            raise NotPhased("a down projection is a part of a stack")
        self._shared(parts, width, layer.activation)

    def _shared(self, parts: Sequence[tuple[OpenClGptqStore, int, int]], width: int, activation: str) -> None:
        """Enter gate, up and down, each as :func:`covering` gives it."""
        if width % BLOCK_OF_ROWS:
            raise NotPhased(f"it has a feed-forward layer of width {width}, no multiple of {BLOCK_OF_ROWS}")
        entry = self.entry
        for index, (store, expert, column) in enumerate(parts):
            entry.put_store("shared", store, expert, index)
            entry.numbers["shared_factor", index] = store.weight_factor
            entry.numbers["shared_shift", index] = store.layout.group_shift
            if index < 2:
                entry.numbers["shared_strips", index] = store.layout.strips
                entry.numbers["shared_first", index] = column // STRIP_N
            self.stores.append(store)
        entry.numbers["shared_inner", 0] = self.shared_inner = width
        self.shared_activation = ACTIVATIONS[activation].number + 1
