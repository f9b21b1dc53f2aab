// Weights of 8 bits: WEIGHT_TYPE 3, E4M3 without infinities, and 4, int8. E4M3 is read as float16 times 2^-8: float16 has
// the same bits from bit 7 on, and 8 more in its exponent's bias.
//
// The matrix is element * scale. Scales are float [n][ceil(k / SCALE_K)], or [n] if SCALE_K is 0.

#ifndef SCALE_K
#define SCALE_K 0
#endif

// Two weights, in the low bits of x, as two float16.
static inline uint float8s_to_halves(uint x)
{
    const uint apart = (x & 0xffu) | (x & 0xff00u) << 8;
    return (apart & 0x00800080u) << 8 | (apart & 0x007f007fu) << 7;
}

static inline uint4 float8s_to_halves8(uint2 x)
{
    return (uint4)(float8s_to_halves(x.x), float8s_to_halves(x.x >> 16), float8s_to_halves(x.y),
                   float8s_to_halves(x.y >> 16));
}

#define HAS_SCALES (WEIGHT_TYPE >= 3)
#define TYPE_3 uchar
#define TYPE_4 char
#if ALIGNED
DEFINE_LOAD(3, halves_to_float2(float8s_to_halves(p[i])).x,
            halves_to_float8(float8s_to_halves8(*(__global const uint2 *)(p + i))))
DEFINE_LOAD(4, p[i], convert_float8(as_char8(*(__global const uint2 *)(p + i))))
#else
DEFINE_LOAD(3, halves_to_float2(float8s_to_halves(p[i])).x,
            halves_to_float8(float8s_to_halves8(as_uint2(vload8(0, p + i)))))
DEFINE_LOAD(4, p[i], convert_float8(vload8(0, p + i)))
#endif

// The factor of what the loads give, for k values of K.
static inline float scale_at(__global const float *scales, uint column, uint at, uint k)
{
    const float factor = WEIGHT_TYPE == 3 ? 256 : 1;
#if SCALE_K
    return factor * scales[column * (ulong)((k + SCALE_K - 1) / SCALE_K) + at / SCALE_K];
#else
    return factor * scales[column];
#endif
}
