// Instructions of NVIDIA GPUs for which OpenCL C has no functions, as inline PTX.
//
// Pairs of float16 are 32-bit registers, because NVIDIA's driver has no cl_khr_fp16. A wave is 32 work-items.
//
// With -DEMULATE_PTX the functions are OpenCL C with sub-groups of 32, so that the kernels can be tested without such a
// GPU, on Intel's CPU runtime. With -DNO_PTX the functions are empty, so that other compilers can check the kernels.

static inline float2 bfloat2_to_float2(uint pair) { return as_float2((uint2)(pair << 16, pair & 0xffff0000u)); }

#ifdef EMULATE_PTX

#pragma OPENCL EXTENSION cl_khr_subgroup_shuffle : enable
#pragma OPENCL EXTENSION cl_khr_subgroup_ballot : enable
#define WAVE_OF_32 __attribute__((intel_reqd_sub_group_size(32)))
#define UNROLLED _Pragma("unroll 1") // compiles in a tenth of the time

static inline float2 half2_to_float2(uint pair)
{
    const ushort bits[2] = {(ushort)pair, (ushort)(pair >> 16)};
    return vload_half2(0, (const __private half *)bits);
}

static inline uint float2_to_half2(float2 pair)
{
    ushort bits[2];
    vstore_half2_rte(pair, 0, (__private half *)bits);
    return bits[0] | (uint)bits[1] << 16;
}

static inline uint half2_sub(uint a, uint b) { return float2_to_half2(half2_to_float2(a) - half2_to_float2(b)); }
static inline uint half2_mul(uint a, uint b) { return float2_to_half2(half2_to_float2(a) * half2_to_float2(b)); }
static inline uint half2_fma(uint a, uint b, uint c)
{
    return float2_to_half2(fma(half2_to_float2(a), half2_to_float2(b), half2_to_float2(c)));
}

static inline uint float2_to_bfloat2(float2 pair)
{
    return float_to_bfloat16(pair.x) | (uint)float_to_bfloat16(pair.y) << 16;
}

// Lanes 4g to 4g + 3 hold rows g (x, z) and g + 8 (y, w) of a; lanes 4c to 4c + 3 hold column c of b.
#define DEFINE_MMA(name, to_float2)                                                                                  \
    __attribute__((noinline)) static float4 name(uint4 a, uint b0, uint b1, float4 c)                                \
    {                                                                                                                \
        const uint lane = get_sub_group_local_id(), g = lane / 4, t = lane % 4;                                      \
        _Pragma("unroll 1") for (uint i = 0; i < 4; i++)                                                             \
        {                                                                                                            \
            const float2 x = to_float2(sub_group_shuffle(a.x, 4 * g + i));                                           \
            const float2 y = to_float2(sub_group_shuffle(a.y, 4 * g + i));                                           \
            const float2 z = to_float2(sub_group_shuffle(a.z, 4 * g + i));                                           \
            const float2 w = to_float2(sub_group_shuffle(a.w, 4 * g + i));                                           \
            const float2 even0 = to_float2(sub_group_shuffle(b0, 8 * t + i));                                        \
            const float2 even1 = to_float2(sub_group_shuffle(b1, 8 * t + i));                                        \
            const float2 odd0 = to_float2(sub_group_shuffle(b0, 8 * t + 4 + i));                                     \
            const float2 odd1 = to_float2(sub_group_shuffle(b1, 8 * t + 4 + i));                                     \
            c += (float4)(dot(x, even0) + dot(z, even1), dot(x, odd0) + dot(z, odd1), dot(y, even0) + dot(w, even1), \
                          dot(y, odd0) + dot(w, odd1));                                                              \
        }                                                                                                            \
        return c;                                                                                                    \
    }
DEFINE_MMA(mma, half2_to_float2)
DEFINE_MMA(mma_bfloat16, bfloat2_to_float2)

static inline float exchange(float value, uint lane_mask) { return sub_group_shuffle_xor(value, lane_mask); }
static inline float from_lane(float value, uint lane) { return sub_group_shuffle(value, lane); }
static inline uint ballot(bool condition) { return sub_group_ballot(condition).x; }
static inline uint4 load_once(__global const uint4 *p) { return *p; }
static inline uint4 load_early(__global const uint4 *p) { return *p; }
static inline uint2 load_early_pair(__global const uint2 *p) { return *p; }
static inline uint load_early_word(__global const uint *p) { return *p; }
static inline void issue_loads(void) {}
static inline void prefetch_line(__global const void *p) {}

static inline uint arrive(__global uint *arrived)
{
    return atomic_fetch_add_explicit((volatile __global atomic_uint *)arrived, 1u, memory_order_acq_rel,
                                     memory_scope_device);
}

typedef size_t LocalAddress;
static inline LocalAddress local_address(__local const void *p) { return (size_t)p; }
static inline void copy_async(LocalAddress to, __global const void *from)
{
    *(__local uint4 *)to = *(__global const uint4 *)from;
}
static inline void copy_async4(LocalAddress to, __global const void *from)
{
    *(__local uint *)to = *(__global const uint *)from;
}
static inline void copy_async_if(LocalAddress to, __global const void *from, bool inside)
{
    *(__local uint4 *)to = inside ? *(__global const uint4 *)from : (uint4)(0);
}
static inline void commit_copies(void) {}
#define AWAIT_COPIES(left)

static inline uint column_pair(LocalAddress even, LocalAddress odd, uint column)
{
    return ((__local const ushort *)even)[column] | (uint)((__local const ushort *)odd)[column] << 16;
}
static inline uint4 load_transposed(LocalAddress row)
{
    const uint lane = get_sub_group_local_id(), g = lane / 4, first = 2 * (lane % 4);
    return (uint4)(column_pair(sub_group_shuffle(row, first), sub_group_shuffle(row, first + 1), g),
                   column_pair(sub_group_shuffle(row, 8 + first), sub_group_shuffle(row, 9 + first), g),
                   column_pair(sub_group_shuffle(row, 16 + first), sub_group_shuffle(row, 17 + first), g),
                   column_pair(sub_group_shuffle(row, 24 + first), sub_group_shuffle(row, 25 + first), g));
}

#else

#ifdef NO_PTX
#define ASM(...)
#define ORDERED_ASM(...)
#else
// clang-format off: it would split the strings and operands of inline assembly
#define ASM asm
#define ORDERED_ASM asm volatile
#endif
#define WAVE_OF_32
#define UNROLLED _Pragma("unroll")

static inline uint half2_sub(uint a, uint b)
{
    uint d = 0;
    ASM("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

static inline uint half2_mul(uint a, uint b)
{
    uint d = 0;
    ASM("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

static inline uint half2_fma(uint a, uint b, uint c)
{
    uint d = 0;
    ASM("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

static inline float2 half2_to_float2(uint pair)
{
    float low = 0, high = 0;
    ASM("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high) : "r"(pair));
    return (float2)(low, high);
}

static inline uint float2_to_half2(float2 pair)
{
    uint d = 0;
    ASM("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(pair.y), "f"(pair.x));
    return d;
}

static inline uint float2_to_bfloat2(float2 pair)
{
    uint d = 0;
    ASM("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(pair.y), "f"(pair.x));
    return d;
}

// A lane's sums: columns g and g + 8 (a's rows) of tokens 2t and 2t + 1 (b's columns), as x, y and z, w.
static inline float4 mma(uint4 a, uint b0, uint b1, float4 c)
{
    float d0 = 0, d1 = 0, d2 = 0, d3 = 0;
    ASM("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(c.x), "f"(c.y), "f"(c.z), "f"(c.w));
    return (float4)(d0, d1, d2, d3);
}

static inline float4 mma_bfloat16(uint4 a, uint b0, uint b1, float4 c)
{
    float d0 = 0, d1 = 0, d2 = 0, d3 = 0;
    ASM("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(c.x), "f"(c.y), "f"(c.z), "f"(c.w));
    return (float4)(d0, d1, d2, d3);
}

// The value of the lane whose number differs by the bits of lane_mask, and that of a lane.
static inline float exchange(float value, uint lane_mask)
{
    float other = 0;
    ORDERED_ASM("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(other) : "f"(value), "r"(lane_mask));
    return other;
}
static inline float from_lane(float value, uint lane)
{
    float other = 0;
    ORDERED_ASM("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(other) : "f"(value), "r"(lane));
    return other;
}

static inline uint ballot(bool condition)
{
    uint mask = 0;
    ORDERED_ASM("{ .reg .pred p; setp.ne.u32 p, %1, 0; vote.sync.ballot.b32 %0, p, 0xffffffff; }"
                 : "=r"(mask) : "r"((uint)condition));
    return mask;
}

// Loads that stay before issue_loads(), so that all of them are in flight before the first result is used. The
// assembler would move ordinary loads down to their uses, one after the other. load_once does not fill the first-level
// cache.
static inline uint4 load_once(__global const uint4 *p)
{
    uint x = 0, y = 0, z = 0, w = 0;
    ORDERED_ASM("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                : "=r"(x), "=r"(y), "=r"(z), "=r"(w) : "l"(p) : "memory");
    return (uint4)(x, y, z, w);
}
static inline uint4 load_early(__global const uint4 *p)
{
    uint x = 0, y = 0, z = 0, w = 0;
    ORDERED_ASM("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x), "=r"(y), "=r"(z), "=r"(w) : "l"(p) : "memory");
    return (uint4)(x, y, z, w);
}
static inline uint2 load_early_pair(__global const uint2 *p)
{
    uint x = 0, y = 0;
    ORDERED_ASM("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(x), "=r"(y) : "l"(p) : "memory");
    return (uint2)(x, y);
}
static inline uint load_early_word(__global const uint *p)
{
    uint v = 0;
    ORDERED_ASM("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
static inline void issue_loads(void) { ORDERED_ASM("bar.warp.sync 0xffffffff;" : : : "memory"); }
// Brings a line of 128 bytes to the second-level cache.
static inline void prefetch_line(__global const void *p) { ORDERED_ASM("prefetch.global.L2 [%0];" : : "l"(p)); }

// Between work-groups of a launch, all of which are resident. After a work-item has read a count, it can read what the
// work-groups that were counted had written, and so can its work-group after a barrier.
static inline void add_release(__global uint *count)
{
    ORDERED_ASM("red.release.gpu.global.add.u32 [%0], 1;" : : "l"(count) : "memory");
}
static inline uint load_acquire(__global const uint *count)
{
    uint v = 0;
    ORDERED_ASM("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(count) : "memory");
    return v;
}

// Adds 1 to the count of work-groups, and returns the previous count. After the call, this work-item can read all writes
// of the work-groups that were counted before.
static inline uint arrive(__global uint *arrived)
{
    uint before = 0;
    ORDERED_ASM("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
    return before;
}

// Copies of 16 or 4 bytes to local memory that bypass registers. The copies between two commits are a group.
// AWAIT_COPIES waits until at most `left` groups of the work-item are in flight.
typedef uint LocalAddress;
static inline LocalAddress local_address(__local const void *p) { return (uint)(size_t)p; }
static inline void copy_async(LocalAddress to, __global const void *from)
{
    ORDERED_ASM("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to), "l"(from) : "memory");
}
static inline void copy_async4(LocalAddress to, __global const void *from)
{
    ORDERED_ASM("cp.async.ca.shared.global [%0], [%1], 4;" : : "r"(to), "l"(from) : "memory");
}
// 16 bytes, or zeros and no access to `from`.
static inline void copy_async_if(LocalAddress to, __global const void *from, bool inside)
{
    ORDERED_ASM("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                : : "r"(to), "l"(from), "r"(inside ? 16u : 0u) : "memory");
}
static inline void commit_copies(void) { ORDERED_ASM("cp.async.commit_group;" : : : "memory"); }
#define AWAIT_COPIES(left) ORDERED_ASM("cp.async.wait_group %0;" : : "n"(left) : "memory")

// Four matrices of eight rows of eight 16-bit values, transposed. Lane 8m + i gives the address of row i of matrix m; a
// lane gets rows 2t and 2t + 1 of column g of each matrix: registers of mma's second operand.
static inline uint4 load_transposed(LocalAddress row)
{
    uint x = 0, y = 0, z = 0, w = 0;
    ORDERED_ASM("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                : "=r"(x), "=r"(y), "=r"(z), "=r"(w) : "r"(row) : "memory");
    return (uint4)(x, y, z, w);
}

// clang-format on
#endif
