// Shared by the decoder's kernels: the buffer in which the host describes a step, and pages of the cache.
//
// Kernels call the buffer `batch`, as `step` is a function of OpenCL C. R is the number of rows that the launches were made
// for. The host may have fewer rows, and then repeats the last one with a segment of -1. The buffer in ints:
//
//   0                         splits of the positions of tiles of one row
//   1                         splits of the positions of tiles of several rows
//   16              [R][4]    of each row: token, position, first int of its page table, segment
//   tiles           [R][4]    of each tile of attention: first row, rows, 0, 0. There are two such lists
//   segments        [R][4]    of each segment: first row, rows, slot of recurrent state, 0
//   picked          [R]       rows whose logits are wanted
//   tables                    the page tables of the segments
//
// A page of one head, for keys and for values alike. Positions are neighbours, so that a row of work-items that has a
// position each reads whole lines, and so does a row of work-items that has eight values each:
//
//   [width / 8][16 positions][8]        value c of position p is at (c / 8 * 16 + p % 16) * 8 + c % 8
//
//              position  0        1              15
//   values  0 ..  7      01234567 01234567 ...   01234567
//   values  8 .. 15      01234567 01234567 ...   01234567
//
// A layer's cache is one segment or eight: buffers of keys and of values, as OpenCL cannot make a buffer larger. Page p is
// page p % 2^segment_shift of segment p >> segment_shift. Segments that were not needed so far are NULL.
//
// CACHE_ARGS(type)           declares a kernel's arguments
// KEYS_OF(p), VALUES_OF(p)   the segment of page p
// IN_SEGMENT(p)              the page's number there
// Pages                      the pages of keys, or of values, for a function
// KEYS_FROM(i), VALUES_FROM(i)   these, from element i of each page on
// PAGE_AT(pages, p, size)    the pointer to page p; a page has `size` elements
//
// With SEGMENT_SHIFT the segments are not arguments: their addresses are in a table (decoder_step_shape.cl).
//
// Build options
//   CACHE_TYPE   element type of the cache, as INPUT_TYPE of common.cl
//   SEGMENTS     1 or 8
//   SEGMENT_SHIFT

#ifndef CACHE_TYPE
#define CACHE_TYPE 0
#endif
#define CACHE JOIN(TYPE_, CACHE_TYPE)
#define load8_cache JOIN(load8_, CACHE_TYPE)
#define store_cache JOIN(store_, CACHE_TYPE)

#ifndef SEGMENTS
#define SEGMENTS 1
#endif
#if SEGMENTS == 1
#define CACHE_ARGS(type) __global type *restrict keys, __global type *restrict values
#define KEYS_OF(page) keys
#define VALUES_OF(page) values
#define IN_SEGMENT(page) (page)
typedef __global const CACHE *Pages;
#define KEYS_FROM(place) (keys + (place))
#define VALUES_FROM(place) (values + (place))
#define PAGE_AT(pages, page, size) ((pages) + (page) * (size))
#elif defined(SEGMENT_SHIFT)
#define IN_SEGMENT(page) ((uint)(page) & ((1u << SEGMENT_SHIFT) - 1))
typedef struct {
    __constant ulong *segments;
    ulong place;
} Pages;
#define PAGE_AT(pages, page, size)                                                                                \
    ((__global const CACHE *)(pages).segments[(uint)(page) >> SEGMENT_SHIFT] + IN_SEGMENT(page) * (ulong)(size) + \
     (pages).place)
#else
#define CACHE_ARGS(type)                                                                                   \
    const uint segment_shift, __global type *restrict keys, __global type *restrict keys1,                 \
        __global type *restrict keys2, __global type *restrict keys3, __global type *restrict keys4,       \
        __global type *restrict keys5, __global type *restrict keys6, __global type *restrict keys7,       \
        __global type *restrict values, __global type *restrict values1, __global type *restrict values2,  \
        __global type *restrict values3, __global type *restrict values4, __global type *restrict values5, \
        __global type *restrict values6, __global type *restrict values7
#define CHOOSE(parts, i)                                                                    \
    ((i) < 4 ? ((i) < 2 ? ((i) == 0 ? parts : parts##1) : ((i) == 2 ? parts##2 : parts##3)) \
             : ((i) < 6 ? ((i) == 4 ? parts##4 : parts##5) : ((i) == 6 ? parts##6 : parts##7)))
#define KEYS_OF(page) CHOOSE(keys, (uint)(page) >> segment_shift)
#define VALUES_OF(page) CHOOSE(values, (uint)(page) >> segment_shift)
#define IN_SEGMENT(page) ((uint)(page) & ((1u << segment_shift) - 1))
typedef struct {
    __global const CACHE *segment, *segment1, *segment2, *segment3, *segment4, *segment5, *segment6, *segment7;
    ulong place;
    uint segment_shift;
} Pages;
#define PAGES_FROM(parts, place) \
    ((Pages){parts, parts##1, parts##2, parts##3, parts##4, parts##5, parts##6, parts##7, place, segment_shift})
#define KEYS_FROM(place) PAGES_FROM(keys, place)
#define VALUES_FROM(place) PAGES_FROM(values, place)
#define PAGE_AT(pages, page, size) page_at(pages, page, size)
static inline __global const CACHE *page_at(Pages pages, uint page, ulong size)
{
    const uint segment_shift = pages.segment_shift;
    return CHOOSE(pages.segment, page >> segment_shift) + IN_SEGMENT(page) * size + pages.place;
}
#endif

#define PAGE_TOKENS 16
#define CHUNK 8 // values of a position that lie together
#define CHUNK_STRIDE (PAGE_TOKENS * CHUNK)

#define STEP_SPLITS 0
#define STEP_TILE_SPLITS 1
#define STEP_ROWS 16
#define STEP_ROW(batch, row) vload4(row, (batch) + STEP_ROWS)

// Adds `value` over the work-items of a group whose size is a power of two. `sums` holds that many floats. It is always
// inlined for PoCL: see align.cl.
__attribute__((always_inline)) static inline float group_sum(float value, __local float *sums)
{
    const uint item = get_local_id(0);
    barrier(CLK_LOCAL_MEM_FENCE);
    sums[item] = value;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint half_size = get_local_size(0) / 2; half_size > 0; half_size /= 2) {
        if (item < half_size)
            sums[item] += sums[item + half_size];
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    return sums[0];
}
