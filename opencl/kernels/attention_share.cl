// BASE_EXP is the exponential that weights of attention are made by: exp or native_exp2.

// The factor of a query's sums, which divides them by the sum of the weights.
static inline float share_of(float high, float total, float sink)
{
    float factor = 1;
    if (sink > high) {
        factor = BASE_EXP(high - sink);
        total = fma(total, factor, 1.0f);
    } else if (sink > -INFINITY) {
        total += BASE_EXP(sink - high);
    }
    return total == 0 ? 0 : factor / total;
}
