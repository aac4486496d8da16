// out = in with every head on 16 bytes, as the Hopper attention copies them: in (tokens, heads, head_dim) bf16, head_dim
// 4 more than a multiple of 8; out (tokens, heads, head_dim + 4), the last four features of a head zero.

#include "common.cuh"

// Grid: tokens. Block: 256.
extern "C" __global__ void __launch_bounds__(256)
align_heads(const bf16* __restrict__ in, bf16* __restrict__ out, int heads, int head_dim) {
    const int quads = head_dim / 4;
    const int64_t head = static_cast<int64_t>(blockIdx.x) * heads;
    const uint2* from = reinterpret_cast<const uint2*>(in) + head * quads;
    uint2* to = reinterpret_cast<uint2*>(out) + head * (quads + 1);
#pragma unroll 4
    for (int i = threadIdx.x; i < heads * (quads + 1); i += blockDim.x) {
        const int of_head = i / (quads + 1), quad = i % (quads + 1);
        to[i] = quad < quads ? from[i - of_head] : make_uint2(0, 0);
    }
}
