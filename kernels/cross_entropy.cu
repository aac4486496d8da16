// Cross-entropy of bf16 logits (rows, stride) over the first `vocab` columns, its gradient in their place, its sum.

#include "common.cuh"

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kBatch = 8;  // vectors of 8 logits that a thread loads at a time; its first batch stays in registers
constexpr float kLowest = -3.38953139e38f;  // lowest finite bf16: what stands in a masked column
constexpr uint32_t kLowestPair = 0xff7fff7fu;

using Batch = uint4[kBatch];

__device__ __forceinline__ __nv_bfloat162 as_pair(uint32_t word) { return *reinterpret_cast<__nv_bfloat162*>(&word); }

__device__ __forceinline__ void unpack(const uint4& v, float (&x)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        x[2 * j] = __uint_as_float(words[j] << 16);
        x[2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
    }
}

__device__ __forceinline__ uint32_t mask_pair(uint32_t pair, int valid) {
    if (valid <= 0) return kLowestPair;
    return valid == 1 ? (pair & 0xffffu) | (kLowestPair & 0xffff0000u) : pair;
}

__device__ __forceinline__ float exponential(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
    return y;
}

// Vectors first, first + blockDim.x, ... of a row of `vectors`; columns from `vocab` on become the lowest finite value.
__device__ __forceinline__ void load_batch(const bf16* row, int first, int vectors, int vocab, Batch& batch) {
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
        const int i = first + k * static_cast<int>(blockDim.x);
        if (i < vectors) batch[k] = *reinterpret_cast<const uint4*>(row + 8 * i);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
        const int valid = vocab - 8 * (first + k * static_cast<int>(blockDim.x));
        if (valid >= 8) continue;
        batch[k] = make_uint4(mask_pair(batch[k].x, valid), mask_pair(batch[k].y, valid - 2),
                              mask_pair(batch[k].z, valid - 4), mask_pair(batch[k].w, valid - 6));
    }
}

// What a thread knows of the logits it has seen: their extremes, and the sum of exp(logit - high).
struct Running {
    float high = kLowest, sum = 0.f;
    __nv_bfloat162 low = __floats2bfloat162_rn(0.f, 0.f);

    __device__ __forceinline__ void add(const Batch& batch) {
        __nv_bfloat162 top = as_pair(kLowestPair);
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            const __nv_bfloat162 x = as_pair(batch[k].x), y = as_pair(batch[k].y);
            const __nv_bfloat162 z = as_pair(batch[k].z), w = as_pair(batch[k].w);
            top = __hmax2(top, __hmax2(__hmax2(x, y), __hmax2(z, w)));
            low = __hmin2(low, __hmin2(__hmin2(x, y), __hmin2(z, w)));
        }
        const float2 tops = __bfloat1622float2(top);
        const float new_high = fmaxf(high, fmaxf(tops.x, tops.y));
        sum *= exponential(high - new_high);
        high = new_high;
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            float x[8];
            unpack(batch[k], x);
#pragma unroll
            for (int j = 0; j < 8; ++j) x[j] = exponential(x[j] - high);
            sum += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
        }
    }

    // Over the block, the same bits in every thread. NaN and +inf have reached the sum by themselves, -inf has not.
    __device__ __forceinline__ void combine(float2* scratch) {
        const float2 lows = __bfloat1622float2(low);
        if (fminf(lows.x, lows.y) == -INFINITY) sum = NAN;
        combine_warp();
        __syncwarp();
        if (blockDim.x == kWarp) return;
        const int lane = threadIdx.x % kWarp;
        if (lane == 0) scratch[threadIdx.x / kWarp] = make_float2(high, sum);
        __syncthreads();
        const float2 part = lane < blockDim.x / kWarp ? scratch[lane] : make_float2(kLowest, 0.f);
        high = part.x, sum = part.y;
        combine_warp();
    }

    __device__ __forceinline__ void combine_warp() {
        const float warp_high = warp_max(high);
        sum = warp_sum(sum * exponential(high - warp_high));
        high = warp_high;
    }
};

// kStream: the stores should not displace logits from L2.
template <bool kStream>
__device__ __forceinline__ void store_gradients(bf16* row, int first, int vectors, const Batch& batch, float high,
                                                float factor) {
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
        const int i = first + k * static_cast<int>(blockDim.x);
        if (i >= vectors) break;
        float x[8];
        unpack(batch[k], x);
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = exponential(x[j] - high) * factor;
        const uint4 packed = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                                        pack_bf16(x[6], x[7]));
        uint4* out = reinterpret_cast<uint4*>(row + 8 * i);
        if constexpr (kStream)
            __stcs(out, packed);
        else
            *out = packed;
    }
}

template <bool kBackward>
__device__ __forceinline__ void cross_entropy_row(bf16* row, uint32_t label, float* loss, int vocab, int stride,
                                                  float scale) {
    __shared__ float2 scratch[kWarp];
    const int vectors = stride / 8, held = kBatch * static_cast<int>(blockDim.x), thread = threadIdx.x;
    const float label_logit = __bfloat162float(row[label]);

    Batch batch;
    Running running;
#pragma unroll 1
    for (int first = held + thread; first < vectors; first += held) {
        load_batch(row, first, vectors, vocab, batch);
        running.add(batch);
    }
    load_batch(row, thread, vectors, vocab, batch);
    running.add(batch);
    running.combine(scratch);
    if (thread == 0) *loss = logf(running.sum) - (label_logit - running.high);
    if constexpr (!kBackward) return;

    const float factor = scale / running.sum;
    if (vectors > held)
        store_gradients<true>(row, thread, vectors, batch, running.high, factor);
    else
        store_gradients<false>(row, thread, vectors, batch, running.high, factor);
#pragma unroll 1
    for (int first = held + thread; first < vectors; first += held) {  // from L2, mostly
        load_batch(row, first, vectors, vocab, batch);
        store_gradients<true>(row, first, vectors, batch, running.high, factor);
    }
    // The thread that stored the label's column stores it again.
    if (thread == static_cast<int>(label / 8 % blockDim.x))
        row[label] = __float2bfloat16_rn(exponential(label_logit - running.high) * factor - scale);
}

}  // namespace

// losses[r] = logsumexp(row r) - row r[label]; NaN if a logit is not finite. The logits become
// (softmax - onehot(label)) * scale, the columns from vocab to stride 0. stride is a multiple of 8, logits are 16-byte
// aligned. Grid: rows. Block: any multiple of 32 up to 1024; the best is ceil(stride / 64) rounded up to a multiple of
// 32, but 512 for strides of 32769 to 65536 and 1024 above.
extern "C" __global__ void __launch_bounds__(kMaxThreads)
cross_entropy_backward(bf16* logits, const uint32_t* __restrict__ labels, float* __restrict__ losses, int rows,
                       int vocab, int stride, float scale) {
    const int64_t r = blockIdx.x;
    if (r < rows) cross_entropy_row<true>(logits + r * stride, labels[r], losses + r, vocab, stride, scale);
}

// The losses only. Grid and block as above.
extern "C" __global__ void __launch_bounds__(kMaxThreads)
cross_entropy(const bf16* logits, const uint32_t* __restrict__ labels, float* __restrict__ losses, int rows, int vocab,
              int stride) {
    const int64_t r = blockIdx.x;
    if (r < rows)
        cross_entropy_row<false>(const_cast<bf16*>(logits) + r * stride, labels[r], losses + r, vocab, stride, 0.f);
}

// total[0] += scale * (sum of losses (rows,)), in a fixed order; losses 16-byte aligned. Grid: 1. Block: 1024.
extern "C" __global__ void __launch_bounds__(kMaxThreads)
sum_losses(const float* __restrict__ losses, double* total, int rows, double scale) {
    __shared__ double sums[kMaxThreads];
    double sum = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < rows / 4; i += kMaxThreads) {
        const float4 four = reinterpret_cast<const float4*>(losses)[i];
        sum += (four.x + four.y) + (four.z + four.w);
    }
    if (threadIdx.x < rows % 4) sum += losses[rows / 4 * 4 + threadIdx.x];
    sums[threadIdx.x] = sum;
    for (int half = kMaxThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *total += scale * sums[0];
}
