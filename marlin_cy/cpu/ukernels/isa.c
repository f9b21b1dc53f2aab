/* Install the generic kernels, then override them by what the CPU and the operating system allow. */
#include "isa.h"

#include <string.h>

#ifdef MARLIN_CY_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Register state that the operating system saves on a context switch (XCR0). Without it a CPU's
 * instructions fault or, worse, lose their registers. */
enum { XCR0_YMM = 0x6, XCR0_ZMM = 0xe6, XCR0_TILES = 0x60000 };

static uint32_t read_xcr0(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

/* Linux saves tiles only for a process that has asked for it, which holds for its threads and children. Asking again
 * changes nothing. */
static int ask_for_tiles(void)
{
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

typedef struct {
    int avx2, avxvnni, avx512vnni, amx, ymm, zmm, tiles;
} features;

static features detect(void)
{
    features found = {0};
    uint32_t a, b, c, d, c1, d7;
    if (!__get_cpuid(1, &a, &b, &c1, &d))
        return found;
    const int osxsave = c1 >> 27 & 1;
    const uint32_t xcr0 = osxsave ? read_xcr0() : 0;
    found.ymm = (xcr0 & XCR0_YMM) == XCR0_YMM;
    found.zmm = (xcr0 & XCR0_ZMM) == XCR0_ZMM;
    found.tiles = found.zmm && (xcr0 & XCR0_TILES) == XCR0_TILES;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d7))
        return found;
    const uint32_t subleaves = a;
    const int fma = c1 >> 12 & 1, f16c = c1 >> 29 & 1;
    found.avx2 = (b >> 5 & 1) && fma && f16c;
    const int avx512 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1); /* F, DQ, BW, VL */
    found.avx512vnni = found.avx2 && avx512 && (c >> 11 & 1);
    found.amx = found.avx512vnni && (d7 >> 24 & 1) && (d7 >> 25 & 1); /* TILE, INT8 */
    if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d))
        found.avxvnni = found.avx2 && (a >> 4 & 1);
    return found;
}
#endif

static const char *why(int cpu, int os, const char *has, const char *lacks)
{
    if (!cpu)
        return lacks;
    return os ? has : "the CPU has it, but the operating system does not save its registers";
}

int isa_list(isa_info *info)
{
    int count = 0;
    info[count++] = (isa_info){"generic", 1, "portable C"};
#ifdef MARLIN_CY_X86
    const features found = detect();
    info[count++] = (isa_info){"avx2", found.avx2 && found.ymm,
                               why(found.avx2, found.ymm, "AVX2, FMA and F16C", "the CPU lacks AVX2, FMA or F16C")};
#ifdef MARLIN_CY_AVXVNNI
    info[count++] = (isa_info){"avxvnni", found.avxvnni && found.ymm,
                               why(found.avxvnni, found.ymm, "AVX2 and AVX-VNNI", "the CPU lacks AVX-VNNI")};
#else
    info[count++] = (isa_info){"avxvnni", 0, "built by a compiler that does not know AVX-VNNI"};
#endif
    info[count++] = (isa_info){"avx512vnni", found.avx512vnni && found.zmm,
                               why(found.avx512vnni, found.zmm, "AVX-512 F, DQ, BW, VL and VNNI",
                                   "the CPU lacks AVX-512 F, DQ, BW, VL or VNNI")};
#ifdef MARLIN_CY_AMX
    const int permitted = found.amx && found.tiles && ask_for_tiles();
    info[count++] = (isa_info){"amx", permitted,
                               found.amx && found.tiles && !permitted
                                   ? "the CPU has it, but the operating system does not permit its use"
                                   : why(found.amx, found.tiles, "AMX TILE and INT8, beside AVX-512 with VNNI",
                                         "the CPU lacks AMX TILE or INT8")};
#else
    info[count++] = (isa_info){"amx", 0, "built by a compiler that does not know AMX"};
#endif
#endif
    return count;
}

/* The kernels of each ISA of isa_list, and the ISA whose entries it inherits where it has none. */
static const struct {
    const ukernel_table *kernels;
    int parent;
} lineage[] = {
    {&ukernels_generic, -1},
#ifdef MARLIN_CY_X86
    {&ukernels_avx2, 0},
#ifdef MARLIN_CY_AVXVNNI
    {&ukernels_avxvnni, 1},
#else
    {NULL, 1},
#endif
    {&ukernels_avx512vnni, 1},
#ifdef MARLIN_CY_AMX
    {&ukernels_amx, 3},
#else
    {NULL, 3},
#endif
#endif
};

static void install(ukernel_table *table, int isa)
{
    if (lineage[isa].parent >= 0)
        install(table, lineage[isa].parent);
    const ukernel_table *by = lineage[isa].kernels;
#define OVERRIDE(entry)      \
    if (by->entry)           \
        table->entry = by->entry
    OVERRIDE(name);
    for (int codes = 0; codes < CODES_COUNT; codes++)
        for (int planes = 1; planes <= 2; planes++)
            OVERRIDE(gemm[codes][planes - 1]);
    OVERRIDE(mr);
    OVERRIDE(mc);
    OVERRIDE(min_matrix_rows);
    OVERRIDE(quantize_row);
    OVERRIDE(widen);
    OVERRIDE(narrow);
    OVERRIDE(store_rows);
    OVERRIDE(glu_epilogue);
    OVERRIDE(axpy);
    OVERRIDE(softmax);
    OVERRIDE(sigmoid);
#undef OVERRIDE
}

const ukernel_table *isa_table(const char *name)
{
    static ukernel_table tables[ISA_MAX];
    isa_info info[ISA_MAX];
    const int count = isa_list(info);
    for (int isa = 0; isa < count; isa++)
        if (strcmp(info[isa].name, name) == 0) {
            if (!info[isa].available)
                return NULL;
            install(&tables[isa], isa);
            return &tables[isa];
        }
    return NULL;
}
