// What a MoE layer does between its two products: act(gate) * up.
//
// Names, formulas and sources are in marlin_cy/moe/layer.py. Two are computed in another form: 1 + erf(x) is erfc(-x),
// and (1 + tanh(x)) / 2 is 1 / (1 + exp(-2 * x)), so that nothing cancels where a gate is negative.
//
// Build options
//   ACTIVATION   0: none; 1: silu; 2: gelu; 3: gelu_tanh; 4: swigluoai (0)

#define ACTIVATION_NONE 0
#define ACTIVATION_SILU 1
#define ACTIVATION_GELU 2
#define ACTIVATION_GELU_TANH 3
#define ACTIVATION_SWIGLUOAI 4

#ifndef ACTIVATION
#define ACTIVATION ACTIVATION_NONE
#endif

#if ACTIVATION == ACTIVATION_SILU
#define ACTIVATED(type) gate / (1 + exp(-gate)) * up
#elif ACTIVATION == ACTIVATION_GELU
#define ACTIVATED(type) 0.5f * gate * erfc(-M_SQRT1_2_F * gate) * up
#elif ACTIVATION == ACTIVATION_GELU_TANH // 2 * sqrt(2 / pi), and 0.044715 times that
#define ACTIVATED(type) gate / (1 + exp(gate * (-1.5957691f - 0.07135482f * gate * gate))) * up
#elif ACTIVATION == ACTIVATION_SWIGLUOAI // comparisons, by which a NaN stays what it is
#define AT_MOST(x, limit, type) ((x) > (limit) ? (type)(limit) : (x))
#define AT_LEAST(x, limit, type) ((x) < (limit) ? (type)(limit) : (x))
#define ACTIVATED(type)                                                                              \
    (gate = AT_MOST(gate, 7.0f, type), up = AT_LEAST(AT_MOST(up, 7.0f, type), -7.0f, type),          \
     gate / (1 + exp(-1.702f * gate)) * (up + 1))
#elif ACTIVATION != ACTIVATION_NONE
#error "activation.cl has no branch for this ACTIVATION"
#endif

#if ACTIVATION
static inline float activated(float gate, float up) { return ACTIVATED(float); }
static inline float8 activated8(float8 gate, float8 up) { return ACTIVATED(float8); }
#endif
