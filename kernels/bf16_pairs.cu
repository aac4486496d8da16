// x (count,) f16 or f32 -> high, low (count,) bf16. Grid and block: any.

#include "bf16_pairs.cuh"

#include <cuda_fp16.h>

namespace {

template <class T>
__device__ __forceinline__ void split_all(const T* x, bf16* high, bf16* low, int64_t count) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step)
        split(static_cast<float>(x[i]), high[i], low[i]);
}

}  // namespace

extern "C" __global__ void split_f16(const __half* x, bf16* high, bf16* low, int64_t count) {
    split_all(x, high, low, count);
}

extern "C" __global__ void split_f32(const float* x, bf16* high, bf16* low, int64_t count) {
    split_all(x, high, low, count);
}
