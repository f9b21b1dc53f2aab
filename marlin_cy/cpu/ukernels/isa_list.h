/* The instruction sets, one row each, the most general first: a parent stands above its children. The last one that is
 * available is the default. ROW(name) stands for the descriptor isa_<name> of the file <name>.c. */
#ifndef MARLIN_CY_ISA_LIST_H
#define MARLIN_CY_ISA_LIST_H

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define MARLIN_CY_X86 1
#define ISA_LIST(ROW) \
    ROW(generic)      \
    ROW(avx2)         \
    ROW(avxvnni)      \
    ROW(avx512vnni)   \
    ROW(amx)
#else
#define ISA_LIST(ROW) ROW(generic)
#endif

#endif
