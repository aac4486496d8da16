// Norm of all gradients together, f32 or bf16.

#include "common.cuh"
#include "optimizer.cuh"

namespace {

constexpr int kNormThreads = 256;
constexpr int kFinishThreads = 1024;

__device__ __forceinline__ float square_sum(const uint4& four, float) {
    const float4 x = *reinterpret_cast<const float4*>(&four);
    return (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w);
}

__device__ __forceinline__ float square_sum(const uint4& eight, bf16) {
    const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float low = __uint_as_float(words[j] << 16), high = __uint_as_float(words[j] & 0xffff0000u);
        sum += low * low + high * high;
    }
    return sum;
}

// Of the first `count` of 16384 values, a thread's share.
template <typename T>
__device__ __forceinline__ float thread_square_sum(const void* values, int count) {
    constexpr int kVector = 16 / sizeof(T), kBatch = 8;
    const uint4* vectors = static_cast<const uint4*>(values);
    float sum = 0.f;
#pragma unroll
    for (int first = 0; first < kOptimizerBlock / kVector; first += kBatch * kNormThreads) {
        uint4 batch[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            const int i = first + k * kNormThreads + threadIdx.x;
            batch[k] = i < count / kVector ? vectors[i] : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) sum += square_sum(batch[k], T());
    }
    return sum;
}

}  // namespace

// partials[block] = sum of squares of the block's gradients; infinite when a square overflows f32.
// tensor_of_block (blocks,): index in the table. Grid: blocks of all tensors. Block: 256.
extern "C" __global__ void __launch_bounds__(kNormThreads, 5)
grad_norm(const OptimizerTensor* __restrict__ tensors, const uint32_t* __restrict__ tensor_of_block,
          float* __restrict__ partials) {
    __shared__ float scratch[kWarp];
    const OptimizerTensor& tensor = tensors[tensor_of_block[blockIdx.x]];
    const int64_t start = static_cast<int64_t>(blockIdx.x - tensor.first_block) * kOptimizerBlock;
    const int64_t left = tensor.count - start;
    const int count = static_cast<int>(left < kOptimizerBlock ? left : kOptimizerBlock);
    const float sum = tensor.flags & kBf16Gradient
                          ? thread_square_sum<bf16>(static_cast<const bf16*>(tensor.gradient) + start, count)
                          : thread_square_sum<float>(static_cast<const float*>(tensor.gradient) + start, count);
    const float total = block_sum<kNormThreads>(sum, scratch);
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// norm[0] = sqrt(sum of the partials (blocks,)), which lie on 16 bytes. Grid: 1. Block: 1024.
extern "C" __global__ void __launch_bounds__(kFinishThreads)
grad_norm_finish(const float* __restrict__ partials, int blocks, double* norm) {
    __shared__ double sums[kFinishThreads];
    double sum = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < blocks / 4; i += kFinishThreads) {
        const float4 four = reinterpret_cast<const float4*>(partials)[i];
        sum += (four.x + four.y) + (four.z + four.w);
    }
    if (threadIdx.x < blocks % 4) sum += partials[blocks / 4 * 4 + threadIdx.x];
    sums[threadIdx.x] = sum;
    for (int half = kFinishThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) norm[0] = sqrt(sums[0]);
}
