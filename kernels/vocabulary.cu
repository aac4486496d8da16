// The two ends of a model for inference: table (vocab, K) f16 or f32; embedding ids (tokens,) -> x (tokens, K) f32; LM
// head x (tokens, K) f32 -> logits (tokens, vocab) f32. K % 8 == 0.

#include <cuda_fp16.h>

#include "common.cuh"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRows = 4;     // of the table, a warp
constexpr int kVector = 8;   // values that a lane takes at a time
constexpr int kSlice = 4096; // values of all tokens that are in shared memory at a time

// Eight values of a table, on their way and as f32.
struct Half8 {
    uint4 words;

    __device__ __forceinline__ explicit Half8(const __half* p)
        : words(load_streamed(reinterpret_cast<const uint4*>(p))) {}

    __device__ __forceinline__ void unpack(float (&out)[kVector]) const {
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word[i]));
            out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
        }
    }
};

struct Float8 {
    uint4 low, high;

    __device__ __forceinline__ explicit Float8(const float* p)
        : low(load_streamed(reinterpret_cast<const uint4*>(p))),
          high(load_streamed(reinterpret_cast<const uint4*>(p) + 1)) {}

    __device__ __forceinline__ void unpack(float (&out)[kVector]) const {
        const uint32_t word[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = __uint_as_float(word[i]);
    }
};

// kTokens tokens of x from token blockIdx.y * kTokens on; a warp multiplies kRows rows of the table.
template <class Vector, int kTokens, class T>
__device__ __forceinline__ void multiply(const T* table, const float* x, float* logits, int tokens, int vocab, int K) {
    constexpr int kColumns = kSlice / kTokens;
    __shared__ __align__(16) float slice[kTokens][kColumns];
    const int lane = threadIdx.x % kWarp, first_row = (blockIdx.x * kWarps + threadIdx.x / kWarp) * kRows;
    const int first_token = blockIdx.y * kTokens;
    const T* row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) row[r] = table + static_cast<int64_t>(min(first_row + r, vocab - 1)) * K;
    wait_for_earlier_kernels();
    let_later_kernels_start();

    float acc[kRows][kTokens] = {};
    for (int start = 0; start < K; start += kColumns) {
        const int columns = min(kColumns, K - start);
        __syncthreads();
        for (int i = threadIdx.x; i < kTokens * (columns / 4); i += kThreads) {
            const int t = i / (columns / 4), quad = i % (columns / 4), token = min(first_token + t, tokens - 1);
            reinterpret_cast<float4*>(slice[t])[quad] =
                __ldcg(reinterpret_cast<const float4*>(x + static_cast<int64_t>(token) * K + start) + quad);
        }
        __syncthreads();
#pragma unroll(kTokens == 1 ? 2 : 1)
        for (int column = kVector * lane; column < columns; column += kVector * kWarp) {
            const Vector vectors[kRows] = {Vector(row[0] + start + column), Vector(row[1] + start + column),
                                           Vector(row[2] + start + column), Vector(row[3] + start + column)};
            float w[kRows][kVector];
#pragma unroll
            for (int r = 0; r < kRows; ++r) vectors[r].unpack(w[r]);
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                const float4 a = *reinterpret_cast<const float4*>(&slice[t][column]);
                const float4 b = *reinterpret_cast<const float4*>(&slice[t][column + 4]);
#pragma unroll
                for (int r = 0; r < kRows; ++r)
                    acc[r][t] += ((w[r][0] * a.x + w[r][1] * a.y) + (w[r][2] * a.z + w[r][3] * a.w)) +
                                 ((w[r][4] * b.x + w[r][5] * b.y) + (w[r][6] * b.z + w[r][7] * b.w));
            }
        }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            const float sum = warp_sum(acc[r][t]);
            if (lane == 0 && first_row + r < vocab && first_token + t < tokens)
                logits[static_cast<int64_t>(first_token + t) * vocab + first_row + r] = sum;
        }
}

}  // namespace

// Grid: (tokens) blocks of any size.
extern "C" __global__ void embed_f16(const uint32_t* ids, const __half* table, float* x, int K) {
    for (int k = threadIdx.x; k < K; k += blockDim.x)
        x[static_cast<int64_t>(blockIdx.x) * K + k] =
            __half2float(table[static_cast<int64_t>(ids[blockIdx.x]) * K + k]);
}

extern "C" __global__ void embed_f32(const uint32_t* ids, const float* table, float* x, int K) {
    for (int k = threadIdx.x; k < K; k += blockDim.x)
        x[static_cast<int64_t>(blockIdx.x) * K + k] = table[static_cast<int64_t>(ids[blockIdx.x]) * K + k];
}

// Names: lm_head_TYPE_TOKENS. Grid: (ceil(vocab / 32), ceil(tokens / TOKENS)) blocks of 256 threads. Launches may use
// programmatic serialization (sm_90).
#define LM_HEAD(type, T, Vector, count)                                                                     \
    extern "C" __global__ void __launch_bounds__(kThreads) lm_head_##type##_##count(                        \
        const T* table, const float* x, float* logits, int tokens, int vocab, int K) {                      \
        multiply<Vector, count>(table, x, logits, tokens, vocab, K);                                        \
    }
LM_HEAD(f16, __half, Half8, 1)
LM_HEAD(f16, __half, Half8, 8)
LM_HEAD(f32, float, Float8, 1)
LM_HEAD(f32, float, Float8, 8)
