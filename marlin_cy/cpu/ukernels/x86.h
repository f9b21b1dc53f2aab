/* Queries of the CPU and the operating system, for the probes of x86-64 ISAs. */
#ifndef MARLIN_CY_X86_H
#define MARLIN_CY_X86_H

#include <cpuid.h>

#include "isa.h"

/* The first compiler versions that support AVX-VNNI and AMX. */
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define COMPILER_HAS_AVXVNNI 1
#define COMPILER_HAS_AMX 1
#endif

enum cpuid_register { CPUID_EAX, CPUID_EBX, CPUID_ECX, CPUID_EDX };

/* Whether all `bits` of a register are set in a leaf of CPUID; 0 if the CPU does not have the leaf or its subleaf.
 * Subleaves other than 0 are for leaf 7, whose EAX gives the last one. */
static inline int cpuid_has(uint32_t leaf, uint32_t subleaf, enum cpuid_register which, uint32_t bits)
{
    uint32_t registers[4];
#define READ(subleaf) __get_cpuid_count(leaf, subleaf, &registers[0], &registers[1], &registers[2], &registers[3])
    if (subleaf > 0 && (!READ(0) || registers[CPUID_EAX] < subleaf))
        return 0;
    return READ(subleaf) && (registers[which] & bits) == bits;
#undef READ
}

/* Register state that the operating system saves on a context switch, as bits of XCR0. Without it, instructions fault,
 * or the contents of their registers are lost. */
enum { XCR0_YMM = 0x6, XCR0_ZMM = 0xe6, XCR0_TILES = 0x60000 };

static inline int os_saves(uint32_t state)
{
    uint32_t low, high;
    if (!cpuid_has(1, 0, CPUID_ECX, 1u << 27)) /* OSXSAVE: xgetbv may be executed */
        return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & state) == state;
}

/* The result of a probe: `has` and `lacks` are the reasons. */
static inline isa_support x86_support(int cpu, int os, const char *has, const char *lacks)
{
    if (!cpu)
        return (isa_support){0, lacks};
    if (!os)
        return (isa_support){0, "the CPU has it, but the operating system does not save its registers"};
    return (isa_support){1, has};
}

#endif
