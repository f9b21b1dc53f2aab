/* The AMX intrinsics that amx.c uses, in plain C, for machines without AMX: compile amx.c with `-include` this file.
 *
 * Register for register and fault for fault: what the CPU would answer with an exception aborts.
 */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    int configured;
    int rows[8], row_bytes[8];
    uint8_t data[8][16][64];
} amx_registers;

static _Thread_local amx_registers amx;

#define AMX_REQUIRE(condition)                              \
    do                                                      \
        if (!(condition)) {                                 \
            fprintf(stderr, "AMX fault: %s\n", #condition); \
            abort();                                        \
        }                                                   \
    while (0)

static inline void amx_loadconfig(const void *from)
{
    const uint8_t *config = from;
    AMX_REQUIRE(config[0] == 1);
    for (int i = 1; i < 16; i++)
        AMX_REQUIRE(config[i] == 0);
    memset(&amx, 0, sizeof amx);
    for (int i = 0; i < 8; i++) {
        uint16_t row_bytes;
        memcpy(&row_bytes, config + 16 + 2 * i, sizeof row_bytes);
        AMX_REQUIRE(row_bytes <= 64 && config[48 + i] <= 16 && (row_bytes == 0) == (config[48 + i] == 0));
        amx.row_bytes[i] = row_bytes, amx.rows[i] = config[48 + i];
    }
    for (int i = 32; i < 64; i++)
        AMX_REQUIRE((i >= 48 && i < 56) || config[i] == 0);
    amx.configured = 1;
}

static inline void amx_release(void) { memset(&amx, 0, sizeof amx); }

int amx_is_configured(void) { return amx.configured; }

static inline void amx_require(int tile) { AMX_REQUIRE(amx.configured && amx.rows[tile]); }

static inline void amx_zero(int tile)
{
    amx_require(tile);
    memset(amx.data[tile], 0, sizeof amx.data[tile]);
}

static inline void amx_loadd(int tile, const void *base, ptrdiff_t stride)
{
    amx_zero(tile);
    for (int r = 0; r < amx.rows[tile]; r++)
        memcpy(amx.data[tile][r], (const char *)base + r * stride, (size_t)amx.row_bytes[tile]);
}

static inline void amx_stored(int tile, void *base, ptrdiff_t stride)
{
    amx_require(tile);
    for (int r = 0; r < amx.rows[tile]; r++)
        memcpy((char *)base + r * stride, amx.data[tile][r], (size_t)amx.row_bytes[tile]);
}

static inline void amx_dpbssd(int c, int a, int b)
{
    amx_require(a), amx_require(b), amx_require(c);
    AMX_REQUIRE(c != a && c != b && a != b);
    AMX_REQUIRE(amx.rows[c] == amx.rows[a] && amx.row_bytes[c] == amx.row_bytes[b]);
    AMX_REQUIRE(amx.row_bytes[a] == 4 * amx.rows[b] && amx.row_bytes[b] % 4 == 0);
    for (int m = 0; m < amx.rows[a]; m++)
        for (int n = 0; n < amx.row_bytes[b] / 4; n++) {
            uint32_t sum;
            memcpy(&sum, amx.data[c][m] + 4 * n, sizeof sum);
            for (int k = 0; k < amx.row_bytes[a]; k++)
                sum += (uint32_t)((int8_t)amx.data[a][m][k] * (int8_t)amx.data[b][k / 4][4 * n + k % 4]);
            memcpy(amx.data[c][m] + 4 * n, &sum, sizeof sum);
        }
}

/* The operating system permits the use of AMX. */
#define syscall(...) 0

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#define _tile_loadconfig amx_loadconfig
#define _tile_release amx_release
#define _tile_zero amx_zero
#define _tile_loadd amx_loadd
#define _tile_stored amx_stored
#define _tile_dpbssd amx_dpbssd
