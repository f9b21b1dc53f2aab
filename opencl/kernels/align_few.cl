// Groups few (token, choice) pairs by expert, in blocks, in one work-group: as `align` in align.cl does.

// The experts of four pairs that are `step` apart; ~0 beyond `pairs`. Four loads are in flight at a time.
static inline void load_experts(uint experts[4], __global const int *ids, uint pair, uint pairs, uint step)
{
    for (uint i = 0; i < 4; i++)
        experts[i] = pair + i * step < pairs ? (uint)ids[pair + i * step] : ~0u;
}

// Aligns few pairs: one work-group does it for all experts.
//   counts   local uint4 [num_experts / 4, rounded up]
//   marks    local uint [num_experts][ceil(pairs / 32) | 1]: one bit for each pair. The odd number of words spreads the
//            experts over the banks of local memory
__attribute__((always_inline)) static inline void align_few(__global const int *ids, uint pairs, uint num_experts,
                                                            uint block_size, __global int *sorted_ids,
                                                            __global int *expert_ids, __global int *past,
                                                            __local uint4 *counts, __local uint *marks)
{
    __local uint *blocks_of = (__local uint *)counts;
    const uint me = get_local_id(0), items = get_local_size(0), words = (pairs + 31) / 32, stride = words | 1;
    for (uint i = me; i < num_experts * stride; i += items)
        marks[i] = 0;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint pair = me; pair < pairs; pair += 4 * items) {
        uint e[4];
        load_experts(e, ids, pair, pairs, items);
        for (uint i = 0; i < 4; i++)
            if (e[i] < num_experts)
                atomic_or(&marks[e[i] * stride + (pair + i * items) / 32], 1u << (pair + i * items) % 32);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint e = me; e < num_experts; e += items) {
        uint count = 0;
        for (uint i = 0; i < words; i++)
            count += popcount(marks[e * stride + i]);
        blocks_of[e] = (count + block_size - 1) / block_size;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint e = me; e < num_experts; e += items) {
        uint4 before = 0;
        for (uint i = 0; i < e / 4; i++)
            before += counts[i];
        uint first = before.x + before.y + before.z + before.w;
        for (uint other = e / 4 * 4; other < e; other++)
            first += blocks_of[other];
        const uint blocks = blocks_of[e];
        __global int *slots = sorted_ids + (ulong)first * block_size;
        uint slot = 0;
        for (uint i = 0; i < words; i++)
            for (uint left = marks[e * stride + i]; left != 0; left &= left - 1)
                slots[slot++] = (int)(32 * i + 31 - clz(left & -left));
        for (; slot < blocks * block_size; slot++)
            slots[slot] = (int)pairs;
        for (uint block = 0; block < blocks; block++)
            expert_ids[first + block] = (int)e;
        if (e == num_experts - 1)
            *past = (int)((first + blocks) * block_size);
    }
}
