// What a MoE layer does between its two products: act(gate) * up.
//
// Names, formulas and sources are in marlin_cy/moe/layer.py. Two are computed in another form: 1 + erf(x) is erfc(-x),
// and (1 + tanh(x)) / 2 is 1 / (1 + exp(-2 * x)), so that nothing cancels where a gate is negative.
//
// Build options
//   ACTIVATION   0: none; 1: silu; 2: gelu; 3: gelu_tanh; 4: swigluoai (0)

#ifndef ACTIVATION
#define ACTIVATION 0
#endif

#if ACTIVATION == 1
#define ACTIVATED(type) gate / (1 + exp(-gate)) * up
#elif ACTIVATION == 2
#define ACTIVATED(type) 0.5f * gate * erfc(-M_SQRT1_2_F * gate) * up
#elif ACTIVATION == 3 // 2 * sqrt(2 / pi), and 0.044715 times that
#define ACTIVATED(type) gate / (1 + exp(gate * (-1.5957691f - 0.07135482f * gate * gate))) * up
#elif ACTIVATION == 4 // comparisons, by which a NaN stays what it is
#define AT_MOST(x, limit, type) ((x) > (limit) ? (type)(limit) : (x))
#define AT_LEAST(x, limit, type) ((x) < (limit) ? (type)(limit) : (x))
#define ACTIVATED(type)                                                                              \
    (gate = AT_MOST(gate, 7.0f, type), up = AT_LEAST(AT_MOST(up, 7.0f, type), -7.0f, type),          \
     gate / (1 + exp(-1.702f * gate)) * (up + 1))
#endif

#if ACTIVATION
static inline float activated(float gate, float up) { return ACTIVATED(float); }
static inline float8 activated8(float8 gate, float8 up) { return ACTIVATED(float8); }
#endif
