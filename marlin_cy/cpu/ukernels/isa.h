/* Which micro-kernels this machine can run, and which of them is in use. */
#ifndef MARLIN_CY_ISA_H
#define MARLIN_CY_ISA_H

#include "ukernel.h"

enum { ISA_MAX = 8 };

typedef struct {
    const char *name;
    int available;
    const char *reason; /* what was found, or what is missing */
} isa_info;

/* All ISAs of this architecture, from the most general to the most specific; returns how many. */
int isa_list(isa_info *info);

/* The complete table of an ISA (entries that it lacks inherited from a more general one), or NULL
 * when the name is unknown or this machine cannot run it. */
const ukernel_table *isa_table(const char *name);

#endif
