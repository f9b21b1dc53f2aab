// The choice of a token from a row of logits, as marlin_cy/decoder/draw.py defines it: in integers, so that the host
// chooses the same token from equal logits. The host describes each row in `sampling`, an array of ints:
//
//   [rows][SAMPLING_INTS]   see the SAMPLING_* below; numbers of 64 bits are two ints, the lower one first
//   [entries][3]            tokens with penalties: the token, and what is subtracted, 64 bits
//
// Build options
//   SAMPLE_ITEMS    work-items of a row's work-group, a power of two of at least 16

#ifndef SAMPLE_ITEMS
#define SAMPLE_ITEMS 256
#endif

#define SAMPLING_INTS 24
#define SAMPLING_DRAWS 0 // 1: a token is drawn; 0: the first of the largest logit
#define SAMPLING_RATE 1  // mantissa and shift
#define SAMPLING_TOP_K 3
#define SAMPLING_LIMIT 4
#define SAMPLING_MIN_LIMIT 6
#define SAMPLING_SHARE 8
#define SAMPLING_RANDOM 10
#define SAMPLING_ENTRIES 12 // the first, and how many
#define SAMPLING_ABOVE 14   // mantissas and shifts
#define SAMPLING_BELOW 16

#define LARGEST_LOGIT 8192.0f
#define SCALE 16777216.0f // 2^24
#define LARGEST_SCORE (8192L << 24)
#define ID_BITS 24 // of a key: the distance, then the token
#define BIN_BITS 10
#define BINS (1 << BIN_BITS)
#define STRETCHES 32 // of bins, which are summed first
#define STRETCH (BINS / STRETCHES)
#define MOST_RUN 16

static inline ulong long_at(__global const int *ints) { return (uint)ints[0] | (ulong)(uint)ints[1] << 32; }

// A finite logit as an integer.
static inline long score_of(float logit)
{
    return convert_long_rte(clamp(logit, -LARGEST_LOGIT, LARGEST_LOGIT) * SCALE);
}

// Subtracts the penalties of a row's entries from its logits. Dimension 0: entries, as many as the longest list; 1: rows.
__kernel void penalise_rows(__global const int *restrict sampling, __global float *restrict logits, const uint width)
{
    __global const int *row = sampling + get_global_id(1) * SAMPLING_INTS;
    if (get_global_id(0) >= (uint)row[SAMPLING_ENTRIES + 1])
        return;
    __global const int *entry =
        sampling + get_global_size(1) * SAMPLING_INTS + 3 * ((ulong)row[SAMPLING_ENTRIES] + get_global_id(0));
    const ulong place = get_global_id(1) * (ulong)width + (uint)entry[0];
    const float logit = logits[place];
    if (!isfinite(logit))
        return;
    const long score = score_of(logit);
    __global const int *factor = row + (score > 0 ? SAMPLING_ABOVE : SAMPLING_BELOW);
    const long multiplied = score * factor[0] >> factor[1];
    const long less = clamp(multiplied, -LARGEST_SCORE, LARGEST_SCORE) - (long)long_at(entry + 1);
    logits[place] = convert_float_rte(less) * (1 / SCALE);
}

// What is found in bins of keys: how many keys, and the sum of their weights, [BINS] each.
typedef struct {
    __local uint *counts, *low, *high;
} Bins;

// The weight of a distance. tables: uint [3][256].
static inline ulong weight_of(ulong distance, uint rate, uint shift, __local const uint *tables)
{
    const ulong x = distance * rate >> shift;
    ulong weight = (ulong)tables[x >> 16 & 255] * tables[256 + (x >> 8 & 255)] >> 31;
    weight = weight * tables[512 + (x & 255)] >> 31;
    return weight << 9 >> min(x >> 24, 63ul);
}

// Adds to a sum of 64 bits in local memory: OpenCL C 1.2 has no such atomic operation.
static inline void add_weight(Bins bins, uint bin, ulong weight)
{
    const uint low = (uint)weight, before = atomic_add(bins.low + bin, low);
    atomic_add(bins.high + bin, (uint)(weight >> 32) + (before + low < before));
}
static inline ulong weight_in(Bins bins, uint bin) { return bins.low[bin] | (ulong)bins.high[bin] << 32; }

// A descent to one key, BIN_BITS of it at a time: the first key at which the count of keys, or the sum of weights, has
// reached `need`. Keys are distances and tokens (BY_COUNT, BY_WEIGHT), or tokens alone (BY_TOKEN), of those tokens whose
// keys of distance and token are below `end`. The result is the first key behind the one that was found, or `end`, if
// there are too few; BY_TOKEN: the token.
//   need     BY_COUNT. Otherwise this is `share`, in 2^-64, of the sum of all weights: BY_WEIGHT at least, BY_TOKEN more
#define BY_COUNT 0
#define BY_WEIGHT 1
#define BY_TOKEN 2
typedef struct {
    ulong before, found;
    uint bin;
} Step;

__attribute__((always_inline)) static inline ulong descend(const uint by, __global const float *logits, uint width,
                                                           long most, ulong end, ulong need, ulong share, uint rate,
                                                           uint shift, uint bits, __local const uint *tables, Bins bins,
                                                           __local ulong *stretches, __local Step *step)
{
    const uint item = get_local_id(0);
    ulong base = 0;
    bool first_pass = true;
    while (true) {
        const uint cut = bits > BIN_BITS ? bits - BIN_BITS : 0;
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint i = item; i < BINS; i += SAMPLE_ITEMS)
            bins.counts[i] = bins.low[i] = bins.high[i] = 0;
        barrier(CLK_LOCAL_MEM_FENCE);
        // A work-item has a run of tokens, whose weights are added first if they are in one bin.
        const uint run = by == BY_TOKEN ? min(1u << cut, (uint)MOST_RUN) : 1;
        const uint begin = by == BY_TOKEN ? (uint)base : 0;
        const uint stop = by == BY_TOKEN && !first_pass ? min((ulong)width, base + (1ul << bits)) : width;
        for (uint from = begin + item * run; from < stop; from += SAMPLE_ITEMS * run) {
            ulong weight = 0;
            for (uint token = from; token < min(from + run, stop); token++) {
                const ulong distance = (ulong)(most - score_of(logits[token]));
                const ulong key = distance << ID_BITS | token;
                if (key >= end)
                    continue;
                if (by == BY_TOKEN) {
                    weight += weight_of(distance, rate, shift, tables);
                } else if (key >= base && (first_pass || key - base < 1ul << bits)) {
                    const uint bin = (uint)((key - base) >> cut);
                    atomic_inc(bins.counts + bin);
                    if (by == BY_WEIGHT)
                        add_weight(bins, bin, weight_of(distance, rate, shift, tables));
                }
            }
            if (weight)
                add_weight(bins, (uint)((from - base) >> cut), weight);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint i = item; i < STRETCHES; i += SAMPLE_ITEMS) {
            ulong sum = 0;
            for (uint j = 0; j < STRETCH; j++)
                sum += by == BY_COUNT ? bins.counts[i * STRETCH + j] : weight_in(bins, i * STRETCH + j);
            stretches[i] = sum;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        if (item == 0) {
            ulong wanted = need, before = 0;
            if (first_pass && by != BY_COUNT) {
                ulong total = 0;
                for (uint i = 0; i < STRETCHES; i++)
                    total += stretches[i];
                wanted = mul_hi(total, share) + (by == BY_TOKEN || total * share != 0);
            }
            uint i = 0;
            while (i < STRETCHES && before + stretches[i] < wanted)
                before += stretches[i++];
            uint bin = i * STRETCH;
            ulong found = 0;
            for (; bin < BINS; bin++) {
                found = by == BY_COUNT ? bins.counts[bin] : weight_in(bins, bin);
                if (before + found >= wanted)
                    break;
                before += found;
            }
            step->bin = bin;
            step->before = wanted - before; // what is needed of the bin
            step->found = found;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        const uint bin = step->bin;
        need = step->before;
        if (bin == BINS)
            return end;
        base += (ulong)bin << cut;
        const bool whole = by != BY_TOKEN && (bins.counts[bin] == 1 || (by == BY_COUNT && step->found == need));
        if (cut == 0 || whole)
            return by == BY_TOKEN ? base : min(end, base + (1ul << cut));
        bits = cut;
        first_pass = false;
    }
}

static inline uint bits_of(ulong value) { return 64 - (uint)clz(value); }

// tokens[row] = the token, and the bits of the row's largest logit, a NaN first. A work-group for each row.
//   tables   uint [3][256]: TABLES of draw.py
__attribute__((reqd_work_group_size(SAMPLE_ITEMS, 1, 1))) __kernel void sample_rows(
    __global const int *restrict sampling, __global const float *restrict logits, const uint width,
    __global const uint *restrict tables, __global int2 *restrict tokens)
{
    __local uint own_tables[768], counts[BINS], low[BINS], high[BINS];
    __local ulong stretches[STRETCHES];
    __local Step step;
    __local float values[SAMPLE_ITEMS];
    __local uint places[SAMPLE_ITEMS];
    const uint item = get_local_id(0);
    __global const int *row = sampling + get_group_id(0) * SAMPLING_INTS;
    logits += get_group_id(0) * (ulong)width;

    for (uint i = item; i < 768; i += SAMPLE_ITEMS)
        own_tables[i] = tables[i];
    float best = -INFINITY;
    uint place = width;
    for (uint i = item; i < width; i += SAMPLE_ITEMS) {
        const float value = logits[i];
        if (place == width || value > best || (isnan(value) && !isnan(best))) {
            best = value;
            place = i;
        }
    }
    values[item] = best;
    places[item] = place;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint half_size = SAMPLE_ITEMS / 2; half_size > 0; half_size /= 2) {
        if (item < half_size) {
            const float mine = values[item], other = values[item + half_size];
            const uint here = places[item], there = places[item + half_size];
            const bool same = mine == other || (isnan(mine) && isnan(other));
            if (same ? there < here : other > mine || (isnan(other) && !isnan(mine))) {
                values[item] = other;
                places[item] = there;
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    best = values[0];
    place = places[0];
    if (row[SAMPLING_DRAWS] && isfinite(best)) {
        const long most = score_of(best);
        const uint rate = row[SAMPLING_RATE], shift = row[SAMPLING_RATE + 1], top_k = row[SAMPLING_TOP_K];
        const ulong limit = long_at(row + SAMPLING_LIMIT), min_limit = long_at(row + SAMPLING_MIN_LIMIT);
        const ulong share = long_at(row + SAMPLING_SHARE), random = long_at(row + SAMPLING_RANDOM);
        const Bins bins = {counts, low, high};
        ulong end = limit << ID_BITS;
        for (uint by = top_k ? BY_COUNT : BY_WEIGHT; by <= BY_TOKEN; by++) {
            if (by == BY_WEIGHT && !share)
                continue;
            if (by == BY_TOKEN)
                end = min(end, min_limit << ID_BITS);
            const ulong found = descend(by, logits, width, most, end, top_k, by == BY_TOKEN ? random : share, rate,
                                        shift, bits_of(by == BY_TOKEN ? width - 1 : (limit << ID_BITS) - 1), own_tables,
                                        bins, stretches, &step);
            if (by == BY_TOKEN)
                place = (uint)found;
            else
                end = found;
        }
    }
    if (item == 0)
        tokens[get_group_id(0)] = (int2)((int)place, as_int(best));
}
