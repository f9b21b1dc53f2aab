// Counts the work-groups of a launch, so that the last one goes on with what all of them have written.
//
// Build options
//   PTX   1: for NVIDIA GPUs of compute capability 7.0 or later, whose OpenCL may lack atomics of device scope
//         0: OpenCL C 3.0 with __opencl_c_atomic_order_acq_rel and __opencl_c_atomic_scope_device

#ifndef PTX
#define PTX 0
#endif

// Adds 1 to the count of work-groups, and returns the previous count. After the call, this work-item can read all writes
// of the work-groups that were counted before.
static inline uint arrive(__global uint *arrived)
{
#if PTX
    uint before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
    return before;
#else
    return atomic_fetch_add_explicit((volatile __global atomic_uint *)arrived, 1u, memory_order_acq_rel,
                                     memory_scope_device);
#endif
}
