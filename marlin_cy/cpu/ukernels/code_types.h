/* The code types on the CPU: one row each. The Python side of a row is in marlin_cy/weights/code_types.py, which has
 * the formulas; tests/test_constants.py compares the two. The numbers are defined here only: Python code finds a number
 * by the row's name.
 *
 * Kernels multiply activations by unsigned integers w(q), the multiplicands, never by the value of a code:
 *
 *   weight = scale / units_per_one * (w(q) - zero)
 *
 * Codes of 8 bits are their own multiplicands. To add a 4-bit code type, add its number and its row here, and two instances of `gemm` (one for each number of
 * planes) to the table of each ISA.
 */
#ifndef MARLIN_CY_CODE_TYPES_H
#define MARLIN_CY_CODE_TYPES_H

#include <stdint.h>

enum { CODES_UINT4 = 0, CODES_E2M1 = 1, CODES_IQ4_NL = 2, CODES_UINT8 = 3, CODES_COUNT = 4 };

enum { TILE_N = 16 }; /* columns of a packed tile */

/* The zero point that `act_meta.symmetric_sum` is made for: the one that symmetric quantisers store. */
enum { SYMMETRIC_ZERO = 8 };

typedef struct {
    const char *name;          /* of the row in Python */
    int bits;                  /* of a code: 4 or 8 */
    uint8_t multiplicands[16]; /* w(q) of each code of 4 bits */
    int is_identity;           /* w(q) = q, so that kernels need not look it up; true of every type of 8 bits */
    int max_multiplicand;
    int has_zero_points; /* whether each group may store a zero point; otherwise all zero points are symmetric_zero */
    int zero_bytes;      /* of a stored zero point */
    int symmetric_zero;  /* the zero point for which kernels have a cheaper form */
    int units_per_one;   /* a power of two, so that dividing a float32 scale by it is exact */
    int min_group;       /* the smallest group, in rows of K; it divides every group */
} code_type;

/* Kernels index this table with constants only, so compilers fold every member into the code. */
static const code_type code_types[CODES_COUNT] =
    {
        [CODES_UINT4] =
            {
                .name = "uint4",
                .bits = 4,
                .multiplicands = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                .is_identity = 1,
                .max_multiplicand = 15,
                .has_zero_points = 1,
                .zero_bytes = 1,
                .symmetric_zero = SYMMETRIC_ZERO,
                .units_per_one = 1,
                .min_group = 32,
            },
        /* 4-bit floats: twice the value, plus 12, so that no multiplicand is negative. */
        [CODES_E2M1] =
            {
                .name = "e2m1",
                .bits = 4,
                .multiplicands = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0},
                .is_identity = 0,
                .max_multiplicand = 24,
                .has_zero_points = 0,
                .zero_bytes = 1,
                .symmetric_zero = 12,
                .units_per_one = 2,
                .min_group = 32,
            },
        /* A table of integers from -127 to 113, plus 127. */
        [CODES_IQ4_NL] =
            {
                .name = "iq4_nl",
                .bits = 4,
                .multiplicands = {0, 23, 44, 62, 78, 92, 105, 117, 128, 140, 152, 165, 180, 196, 216, 240},
                .is_identity = 0,
                .max_multiplicand = 240,
                .has_zero_points = 0,
                .zero_bytes = 1,
                .symmetric_zero = 127,
                .units_per_one = 1,
                .min_group = 32,
            },
        [CODES_UINT8] =
            {
                .name = "uint8",
                .bits = 8,
                .is_identity = 1,
                .max_multiplicand = 255,
                .has_zero_points = 1,
                .zero_bytes = 2, /* 0 to 256 */
                .symmetric_zero = 128,
                .units_per_one = 1,
                .min_group = 16,
            },
};

/* Bytes of eight values of K of a tile. */
static inline int block_bytes(int codes) { return TILE_N * code_types[codes].bits; }

/* The factor of a float32 scale; a compile-time constant if `codes` is a constant. */
static inline float unit_scale(int codes) { return 1.0f / (float)code_types[codes].units_per_one; }

#endif
