/* Probing instruction sets, and merging their tables. Nothing here has state. */
#include "isa.h"

const isa_descriptor *isa_at(int index)
{
#define ADDRESS(name) &isa_##name,
    static const isa_descriptor *const rows[] = {ISA_LIST(ADDRESS)};
#undef ADDRESS
    return index < (int)(sizeof rows / sizeof *rows) ? rows[index] : NULL;
}

isa_support isa_probe(const isa_descriptor *isa)
{
    const isa_support own = isa->probe();
    if (!own.available || !isa->parent)
        return own;
    const isa_support inherited = isa_probe(isa->parent);
    return inherited.available ? own : inherited;
}

void isa_merge(ukernel_table *table, const isa_descriptor *isa)
{
    const ukernel_table *own = &isa->kernels;
    if (isa->parent)
        isa_merge(table, isa->parent);
    else
        *table = *own;
#define OVERRIDE(entry) \
    if (own->entry)     \
    table->entry = own->entry
    for (int codes = 0; codes < CODES_COUNT; codes++)
        for (int planes = 1; planes <= MAX_PLANES; planes++)
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
    OVERRIDE(rms_norm);
    OVERRIDE(gated_rms_norm);
    OVERRIDE(l2_normalize);
    OVERRIDE(add);
    OVERRIDE(rope);
    OVERRIDE(sigmoid_gate);
    OVERRIDE(glu_rows);
    OVERRIDE(dense);
    OVERRIDE(attention);
    OVERRIDE(attention_merge);
    OVERRIDE(attention_finish);
    OVERRIDE(store_keys);
    OVERRIDE(short_conv);
    OVERRIDE(delta_gates);
    OVERRIDE(delta_rule);
#undef OVERRIDE
}
