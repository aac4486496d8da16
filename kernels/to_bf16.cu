// out = bf16(in): count f32 values, a multiple of 8, both on 16 bytes.

#include "common.cuh"

// Grid: any. Block: 256.
extern "C" __global__ void __launch_bounds__(256)
to_bf16(const float* __restrict__ in, bf16* __restrict__ out, int64_t count) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count / 8; i += step) {
        const float4 low = reinterpret_cast<const float4*>(in)[2 * i], high = reinterpret_cast<const float4*>(in)[2 * i + 1];
        store8(out + 8 * i, pack8({low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}));
    }
}
