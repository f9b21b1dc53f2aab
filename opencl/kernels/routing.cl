#include "route_token.cl"

// route: chooses each token's experts, and their weights. A work-group for each token.
__attribute__((reqd_work_group_size(ROUTE_ITEMS, 1, 1))) __kernel void route(ROUTE_ARGS)
{
    __local uint2 pairs[ROUTE_ITEMS];
    route_token(get_group_id(0), ROUTE_NAMES, pairs);
}
