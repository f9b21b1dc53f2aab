// Sizes of a step in one launch, and the table of its layers.

#define WAVE 32
#ifndef ITEMS
#define ITEMS (WAVE * WAVES)
#endif
#define EACH(i, n) for (uint i = get_local_id(0); i < (n); i += ITEMS)
#ifndef GATED
#define GATED 0
#endif
#ifndef SINKS
#define SINKS 0
#endif
#ifndef CAPPED
#define CAPPED 0
#endif
#ifndef EXPERT_BIASES
#define EXPERT_BIASES 0
#endif
#ifndef DENSE
#define DENSE 0
#endif
#define HEAD_STRIDE ((1 + GATED) * HEAD_DIM) // a head's query, and its gate
#define QUERIES_WIDTH (NUM_HEADS * HEAD_STRIDE)
#define QKV (QUERIES_WIDTH + 2 * NUM_KV_HEADS * HEAD_DIM)
#define ATTENDED (NUM_HEADS * HEAD_DIM)
#define HIDDEN_BLOCKS ((HIDDEN + BLOCK_K - 1) / BLOCK_K)
#define ATTENDED_BLOCKS ((ATTENDED + BLOCK_K - 1) / BLOCK_K)
#define INNER_BLOCKS ((INNER + BLOCK_K - 1) / BLOCK_K)
#define GROUPS_OF(k, shift) (((k) + (1 << (shift)) - 1) >> (shift))
#define X_OCTETS (HIDDEN_BLOCKS * 8 + 4) // with 4 more, eight rows lie in different banks
#define FOURS ((HIDDEN / 4 + ITEMS - 1) / ITEMS) // of a row, of a work-item

#ifndef SHARED
#define SHARED 0
#endif

// A layer: addresses on the device.
typedef struct {
    ulong qkv[3], o, gate_up[8], down[8]; // experts in parts
    ulong mixer_norm, ffn_norm, q_norm, k_norm, qkv_bias, o_bias, sinks;
    ulong gate_up_bias, down_bias;        // of experts
    ulong cosine, sine, keys[8], values[8], router, router_bias, correction; // the cache in segments
    uint qkv_strips[3], pad;              // strips of the store that each projection is in
    uint qkv_first[3], pad2;              // its first strip there
    float qkv_factor[3], o_factor, gate_up_factor, down_factor;
    float scale, norm_eps, routing_factor;
    uint window;
    float soft_cap;                       // 0: none
    uint pad5;
#if SHARED                                // of a shared expert, or of a dense layer's network
    ulong shared[3], shared_gate;         // gate, up and down; the vector of a shared expert's gate, or NULL
    uint shared_strips[2], shared_first[2], shared_shift[3];
    uint shared_inner, is_dense, pad3;    // its inner width; 1: there are no other experts
    float shared_factor[3];
    uint pad4;
#endif
} Layer;
typedef char layer_has_the_size_that_the_host_expects[sizeof(Layer) == LAYER_BYTES ? 1 : -1];

// The cache of a layer.
//   LAYER_CACHE              declares what the others use, at the beginning of a function
//   SEGMENT(keys, page)      the segment of a page, or that of values
//   LAYER_PAGES(keys, i)     Pages of decoder.cl, from element i of each page on
#if SEGMENTS == 1
#define LAYER_CACHE \
    __global CACHE *keys = (__global CACHE *)layer->keys[0], *values = (__global CACHE *)layer->values[0];
#define SEGMENT(kind, page) kind
#define LAYER_PAGES(kind, place) ((__global const CACHE *)layer->kind[0] + (place))
#else
#define LAYER_CACHE
#define SEGMENT(kind, page) ((__global CACHE *)layer->kind[(uint)(page) >> SEGMENT_SHIFT])
#define LAYER_PAGES(kind, place) ((Pages){layer->kind, place})
#endif

#define load_embedding JOIN(load_, EMBEDDING_TYPE)
#define ROUTER JOIN(TYPE_, ROUTER_TYPE)
#define load_router JOIN(load_, ROUTER_TYPE)
