// The address of a buffer, for kernels that get many buffers by a table.
__kernel void address_of(__global const uchar *buffer, __global ulong *addresses, const uint place)
{
    addresses[place] = (ulong)buffer;
}
