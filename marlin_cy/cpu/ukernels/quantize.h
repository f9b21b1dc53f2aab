/* The steps of quantize_row that every ISA does once per group. */
#ifndef MARLIN_CY_QUANTIZE_H
#define MARLIN_CY_QUANTIZE_H

#include <math.h>
#include <string.h>

#include "ukernel.h"

/* The largest magnitude that a value is quantised to. */
static inline float qmax_of(int planes) { return planes == 2 ? (float)QMAX_INT16 : (float)QMAX_INT8; }

/* The largest magnitude of a group, from its bits. The result is 0 if all values are tiny, or if one value is a NaN or
 * an infinity. Then the group is finished: its `bytes` bytes are set to 0, and the scale in its meta to 0 or NaN. */
static inline float group_amax(uint32_t amax_bits, int8_t *a, int bytes, act_meta *meta)
{
    const int finite = amax_bits < 0x7f800000;
    float amax;
    memcpy(&amax, &amax_bits, sizeof amax);
    if (finite && amax >= QUANTIZE_MIN_AMAX)
        return amax;
    memset(a, 0, (size_t)bytes);
    *meta = (act_meta){.scale = finite ? 0.0f : NAN};
    return 0.0f;
}

static inline act_meta group_meta(float scale, int32_t sum)
{
    return (act_meta){
        .scale = scale,
        .sum_split = (int32_t)((uint32_t)(sum & 255) | (uint32_t)(sum >> 8) << 16),
        .symmetric_sum = -SYMMETRIC_ZERO * sum,
    };
}

#endif
