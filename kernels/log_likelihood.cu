// The natural log of the probability that a softmax of f32 logits gives to a target.

#include <cfloat>

#include "common.cuh"

namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kBatch = 4;  // vectors of four logits that a thread loads at a time

// Of the logits seen so far: sum = sum of exp(logit - high). fmaxf drops NaN, but the sum does not.
struct Running {
    float high = -FLT_MAX, sum = 0.f;

    template <int kCount>
    __device__ __forceinline__ void add(const float (&x)[kCount]) {
        float raised = high;
#pragma unroll
        for (int i = 0; i < kCount; ++i) raised = fmaxf(raised, x[i]);
        sum *= __expf(high - raised), high = raised;
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum += __expf(x[i] - raised);
    }

    __device__ __forceinline__ void combine_warp() {
        const float raised = warp_max(high);
        sum = warp_sum(sum * __expf(high - raised)), high = raised;
    }
};

}  // namespace

// out[r] = row r[target] - logsumexp(row r), NaN if a logit is NaN or +inf; logits (rows, stride), of which `vocab`
// columns count, targets (rows,) below vocab. Grid: (rows) blocks of 512 threads.
extern "C" __global__ void __launch_bounds__(kThreads)
log_likelihoods(const float* logits, const uint32_t* targets, float* out, int vocab, int stride) {
    __shared__ float2 parts[kWarps];
    const float* const row = logits + static_cast<int64_t>(blockIdx.x) * stride;
    const int thread = threadIdx.x, lane = thread % kWarp;
    // Vectors from the first multiple of 16 bytes on, and what lies around them.
    const int lead = min(vocab, static_cast<int>(-(reinterpret_cast<uintptr_t>(row) / 4) % 4));
    const int vectors = (vocab - lead) / 4, around = vocab - 4 * vectors;
    const float4* const quads = reinterpret_cast<const float4*>(row + lead);
    Running running;
    for (int first = thread; first < vectors; first += kBatch * kThreads) {
        float x[4 * kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int at = first + i * kThreads;
            const float4 v = at < vectors ? quads[at] : make_float4(-FLT_MAX, -FLT_MAX, -FLT_MAX, -FLT_MAX);
            x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
        }
        running.add(x);
    }
    if (thread < around) running.add<1>({row[thread < lead ? thread : 4 * vectors + thread]});
    running.combine_warp();
    if (lane == 0) parts[thread / kWarp] = make_float2(running.high, running.sum);
    __syncthreads();
    if (thread >= kWarp) return;
    const float2 part = lane < kWarps ? parts[lane] : make_float2(-FLT_MAX, 0.f);
    running.high = part.x, running.sum = part.y;
    running.combine_warp();
    if (lane == 0) out[blockIdx.x] = (row[targets[blockIdx.x]] - running.high) - logf(running.sum);
}
