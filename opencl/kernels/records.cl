#include "codes.cl"

// Scale records: what a group of rows stores beside its codes. A program is built for one scale record.
//
// Build options, from the row in marlin_cy/weights/scale_records.py (marlin_cy/opencl/gemm/codes.py)
//   SCALE_BITS   16, 32: float scales; 8: integer sub-scales, and a float16 for every 256 rows (16)
//   MINIMA       1: a group has a minimum, too (0)
//   GROUP_16     1: groups of 16 rows; common.cl says how their rows lie (0)
//
// A weight is scale * (code - zero point) - minimum. All values of a record are of two columns, g and g + 8. Scales and
// minima are floats:
//
//   Record          of a group
//   BlockRecord     of 256 rows; an int that is not used unless SCALE_BITS is 8
//   Factors         float2: the scales; with MINIMA float4: the scales, then the minima
//   factors_of      the Factors of a Record and a BlockRecord
//
// PLAIN_SCALES: float16 scales without minima, which the packer has normalised (rescale of pack.cl).
// A file that includes this one may define RECORD_HALVES, which makes a float2 of two float16 in a uint.

#ifndef SCALE_BITS
#define SCALE_BITS 16
#endif
#ifndef MINIMA
#define MINIMA 0
#endif
#ifndef GROUP_16
#define GROUP_16 0
#endif
#ifndef RECORD_HALVES
#define RECORD_HALVES halves_to_float2
#endif
#define PLAIN_SCALES (SCALE_BITS == 16 && !MINIMA)
#define TWO_LEVELS (SCALE_BITS == 8)
#define PIECES (1 + GROUP_16) // groups in 32 rows, at most
#define BLOCK_SHIFT 8         // of the rows that share a BlockRecord

#if MINIMA
typedef float4 Factors;
#else
typedef float2 Factors;
#endif
#if !TWO_LEVELS
typedef int BlockRecord;
#elif MINIMA
typedef uint2 BlockRecord;
#else
typedef uint BlockRecord;
#endif

#if PLAIN_SCALES
#define RECORD_BYTES 4
typedef uint Record;
static inline Factors factors_of(Record record, BlockRecord block) { return RECORD_HALVES(record); }
#elif SCALE_BITS == 16
#define RECORD_BYTES 8
typedef uint2 Record;
static inline Factors factors_of(Record record, BlockRecord block)
{
    return (float4)(RECORD_HALVES(record.x), RECORD_HALVES(record.y));
}
#elif SCALE_BITS == 32 && MINIMA
#define RECORD_BYTES 16
typedef uint4 Record;
static inline Factors factors_of(Record record, BlockRecord block) { return as_float4(record); }
#elif SCALE_BITS == 32
#define RECORD_BYTES 8
typedef uint2 Record;
static inline Factors factors_of(Record record, BlockRecord block) { return as_float2(record); }
#elif MINIMA
#define RECORD_BYTES 4
typedef uint Record; // unsigned bytes: two sub-scales, two sub-minima
static inline Factors factors_of(Record record, BlockRecord block)
{
    const float4 of_group = convert_float4((uint4)(record, record >> 8, record >> 16, record >> 24) & 0xffu);
    return (float4)(RECORD_HALVES(block.x), RECORD_HALVES(block.y)) * of_group;
}
#else
#define RECORD_BYTES 2
typedef ushort Record; // signed bytes
static inline Factors factors_of(Record record, BlockRecord block)
{
    return RECORD_HALVES(block) * (float2)((char)(record & 0xff), (char)(record >> 8));
}
#endif

// Zero points of two columns: bytes, or ushorts with codes of 8 bits.
#if CODE_BITS == 8
typedef uint ZeroPair;
#define LOW_ZERO(zeros) ((zeros) & 0xffffu)
#define HIGH_ZERO(zeros) ((zeros) >> 16)
#else
typedef ushort ZeroPair;
#define LOW_ZERO(zeros) ((zeros) & 255u)
#define HIGH_ZERO(zeros) ((zeros) >> 8)
#endif

// Words of a lane: StepWords of four rows, HalfWords of 32 rows of K, that is of the lane's eight. BLOCK_QUADS: uint4 of
// a lane in a block.
#define BLOCK_QUADS (CODE_BITS / 4)
#if CODE_BITS == 8
typedef uint2 StepWords;
typedef uint4 HalfWords;
#define STEP_WORDS(words, step) ((step) ? (words).zw : (words).xy)
#else
typedef uint StepWords;
typedef uint2 HalfWords;
#define STEP_WORDS(words, step) ((step) ? (words).y : (words).x)
#endif

// The sections of an expert after its words.
#define WORDS_OF_EXPERT(strips, k_blocks) ((ulong)(strips) * (k_blocks) * (BLOCK_WORDS * BLOCK_QUADS))
#define UINTS_OF_RECORDS(strips, groups) ((ulong)(strips) * (groups) * (8 * RECORD_BYTES) / 4)

// BlockRecords of a column, in so many blocks of K.
static inline uint blocks_of_rows(uint k_blocks)
{
    return (k_blocks + (1 << BLOCK_SHIFT) / BLOCK_K - 1) / ((1 << BLOCK_SHIFT) / BLOCK_K);
}
