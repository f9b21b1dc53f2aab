// The activation between a MoE layer's two products: act(gate) * up.
//
// Names and definitions are in marlin_cy/activations.py. Two are written in another form here, without cancellation for
// negative gates: erfc(-x) for 1 + erf(x), and 1 / (1 + exp(-2 * x)) for (1 + tanh(x)) / 2.
//
// Build options
//   ACTIVATION   one of ACTIVATION_*: one more than the number in marlin_cy/activations.py (ACTIVATION_NONE)
//
// To add an activation, add its number and a branch that defines ACTIVATED(type): the result for float or float8 `gate`
// and `up`.

#define ACTIVATION_NONE 0
#define ACTIVATION_SILU 1
#define ACTIVATION_GELU 2
#define ACTIVATION_GELU_TANH 3
#define ACTIVATION_SWIGLUOAI 4
#define ACTIVATION_SILU_CLAMP10 5
#define ACTIVATION_RELU2 6

#ifndef ACTIVATION
#define ACTIVATION ACTIVATION_NONE
#endif

// Comparisons keep a NaN.
#define AT_MOST(x, limit, type) ((x) > (limit) ? (type)(limit) : (x))
#define AT_LEAST(x, limit, type) ((x) < (limit) ? (type)(limit) : (x))

// The numbers of a row for each value: gate and up, or up alone.
#if ACTIVATION == ACTIVATION_NONE || ACTIVATION == ACTIVATION_RELU2
#define ROW_PARTS 1
#else
#define ROW_PARTS 2
#endif

#if ACTIVATION == ACTIVATION_SILU
#define ACTIVATED(type) gate / (1 + exp(-gate)) * up
#elif ACTIVATION == ACTIVATION_GELU
#define ACTIVATED(type) 0.5f * gate *erfc(-M_SQRT1_2_F *gate) * up
#elif ACTIVATION == ACTIVATION_GELU_TANH // 2 * sqrt(2 / pi), and 0.044715 times as much
#define ACTIVATED(type) gate / (1 + exp(gate * (-1.5957691f - 0.07135482f * gate * gate))) * up
#elif ACTIVATION == ACTIVATION_SWIGLUOAI
#define ACTIVATED(type)                                                                     \
    (gate = AT_MOST(gate, 7.0f, type), up = AT_LEAST(AT_MOST(up, 7.0f, type), -7.0f, type), \
     gate / (1 + exp(-1.702f * gate)) * (up + 1))
#elif ACTIVATION == ACTIVATION_SILU_CLAMP10
#define ACTIVATED(type)                                                                        \
    (gate = AT_MOST(gate, 10.0f, type), up = AT_LEAST(AT_MOST(up, 10.0f, type), -10.0f, type), \
     gate / (1 + exp(-gate)) * up)
#elif ACTIVATION == ACTIVATION_RELU2
#define ACTIVATED(type) (up = AT_LEAST(up, 0.0f, type), up * up)
#elif ACTIVATION != ACTIVATION_NONE
#error "activation.cl has no branch for this ACTIVATION"
#endif

#if ACTIVATION
static inline float activated(float gate, float up) { return ACTIVATED(float); }
static inline float8 activated8(float8 gate, float8 up) { return ACTIVATED(float8); }
#endif
