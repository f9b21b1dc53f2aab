/* An instruction set is one C file that ends in one `isa_descriptor`, and one row of isa_list.h. */
#ifndef MARLIN_CY_ISA_H
#define MARLIN_CY_ISA_H

#include "isa_list.h"
#include "ukernel.h"

typedef struct {
    int available;
    const char *reason; /* what was found, or what is missing */
} isa_support;

/* Whether this CPU has the instructions, and whether the operating system saves the registers that they use. */
typedef isa_support isa_probe_fn(void);

/* Do `steps` rounds of the multiply-adds that the ISA's gemm consists of, on registers only; return the number of
 * operations. A multiplication and an addition are two operations. The rounds need more accumulators than an
 * instruction's latency times its throughput, which is 10 on the cores that were measured. */
typedef int64_t peak_fn(int64_t steps);

typedef struct isa_descriptor isa_descriptor;
struct isa_descriptor {
    const char *name;
    const isa_descriptor *parent; /* the ISA whose kernels are inherited; it must be available too; NULL: no parent */
    isa_probe_fn *probe;
    peak_fn *peak; /* NULL if the ISA has no such loop; not inherited */
    ukernel_table kernels; /* own kernels; entries that are NULL or 0 are the parent's */
};

#define DECLARE_ISA(name) extern const isa_descriptor isa_##name;
ISA_LIST(DECLARE_ISA)
#undef DECLARE_ISA

/* Row `index` of isa_list.h; NULL past the last. */
const isa_descriptor *isa_at(int index);

/* Whether an ISA and all of its ancestors are available. */
isa_support isa_probe(const isa_descriptor *isa);

/* Fill a table with the kernels of the oldest ancestor, then with those of each descendant, down to the ISA itself. */
void isa_merge(ukernel_table *table, const isa_descriptor *isa);

#endif
