// Weights of BitLinear: b = max(mean|W|, 1e-5), int8 codes clamp(round(W / b), -1, 1) of f32 tensors; bf16 codes * b.

#include "common.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kBlockWeights = 1 << 14;  // weights of one block
constexpr float kEpsilon = 1e-5f;

// A row of the table of tensors, 32 bytes. A launch over all tensors has ceil(count / kBlockWeights) blocks for each,
// in order.
struct Tensor {
    const float* weights;  // on 16 bytes
    int64_t count;         // a multiple of 16
    int64_t codes;         // where its codes start in the arena, a multiple of 16
    int64_t first_block;   // blocks of the tensors before it
};

// The last tensor that starts at or before this block.
__device__ __forceinline__ int find_tensor(const Tensor* table, int tensors) {
    int low = 0, high = tensors;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table[middle].first_block <= blockIdx.x) low = middle;
        else high = middle;
    }
    return low;
}

// Over the block in a fixed order, valid in thread 0.
__device__ __forceinline__ double block_sum(double x) {
    __shared__ double sums[kThreads / kWarp];
#pragma unroll
    for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
    __syncthreads();
    double sum = 0.;
#pragma unroll
    for (int i = 0; i < kThreads / kWarp; ++i) sum += sums[i];
    return sum;
}

// -1, 0 or 1 as clamp(round_half_even(w / b), -1, 1) in f32 gives it, without the division: the quotient rounds to more
// than 0.5 exactly when |w| > b / 2. A NaN gives 0, and b tells of it.
__device__ __forceinline__ int ternary(float w, float half) { return (w > half) - (w < -half); }

__device__ __forceinline__ int ternary_quad(const float4& w, float half) {
    return __byte_perm(__byte_perm(ternary(w.x, half), ternary(w.y, half), 0x0040),
                       __byte_perm(ternary(w.z, half), ternary(w.w, half), 0x0040), 0x5410);
}

}  // namespace

// Sums of |w| over kBlockWeights weights each. Grid: the blocks of all tensors, 256 threads; partials: a double each.
extern "C" __global__ void __launch_bounds__(kThreads)
absmean_partial(const void* table, int tensors, double* __restrict__ partials) {
    const Tensor tensor = static_cast<const Tensor*>(table)[find_tensor(static_cast<const Tensor*>(table), tensors)];
    const int64_t start = (blockIdx.x - tensor.first_block) * kBlockWeights;
    const float4* weights = reinterpret_cast<const float4*>(tensor.weights + start);
    const int quads = static_cast<int>(min(tensor.count - start, static_cast<int64_t>(kBlockWeights))) / 4;
    constexpr int kSteps = kBlockWeights / 4 / kThreads;
    float sums[2] = {};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        const int quad = i * kThreads + threadIdx.x;
        if (quad < quads) {
            const float4 w = __ldcs(weights + quad);
            sums[i % 2] += (fabsf(w.x) + fabsf(w.y)) + (fabsf(w.z) + fabsf(w.w));
        }
    }
    const double sum = block_sum(static_cast<double>(sums[0]) + sums[1]);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// scales[t] = b of tensor t. Grid: (tensors) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(kThreads)
absmean_scales(const void* table, const double* __restrict__ partials, float* __restrict__ scales) {
    const Tensor tensor = static_cast<const Tensor*>(table)[blockIdx.x];
    const int blocks = static_cast<int>((tensor.count + kBlockWeights - 1) / kBlockWeights);
    double sum = 0.;
    for (int i = threadIdx.x; i < blocks; i += kThreads) sum += partials[tensor.first_block + i];
    sum = block_sum(sum);
    const float mean = static_cast<float>(sum / static_cast<double>(tensor.count));
    if (threadIdx.x == 0) scales[blockIdx.x] = mean < kEpsilon ? kEpsilon : mean;  // a NaN stays
}

// Codes of all tensors into the arena. Grid: the blocks of all tensors, of 256 threads.
extern "C" __global__ void __launch_bounds__(kThreads)
ternary_codes(const void* table, int tensors, const float* __restrict__ scales, int8_t* __restrict__ arena) {
    const int index = find_tensor(static_cast<const Tensor*>(table), tensors);
    const Tensor tensor = static_cast<const Tensor*>(table)[index];
    const float half = scales[index] / 2;
    const int64_t start = (blockIdx.x - tensor.first_block) * kBlockWeights;
    const float4* weights = reinterpret_cast<const float4*>(tensor.weights + start);
    int4* codes = reinterpret_cast<int4*>(arena + tensor.codes + start);
    const int parts = static_cast<int>(min(tensor.count - start, static_cast<int64_t>(kBlockWeights))) / 16;
#pragma unroll 2
    for (int part = threadIdx.x; part < parts; part += kThreads) {
        float4 w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = __ldg(weights + 4 * part + i);
        codes[part] = make_int4(ternary_quad(w[0], half), ternary_quad(w[1], half), ternary_quad(w[2], half),
                                ternary_quad(w[3], half));
    }
}

// out (N, K) = bf16(codes (N, K) * b), b of a row n: w_scale[0] for n < end0, w_scale[1] for n < end1, else w_scale[2].
// Grid: ceil(N * K / 2048) blocks of 256 threads. N * K is a multiple of 8, pointers lie on 16 bytes.
extern "C" __global__ void __launch_bounds__(kThreads)
expand_codes(const int8_t* __restrict__ codes, const float* __restrict__ w_scale, bf16* __restrict__ out, int N, int K,
             int end0, int end1) {
    const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 8;
    if (at >= static_cast<int64_t>(N) * K) return;
    const float b = w_scale[at < static_cast<int64_t>(end0) * K ? 0 : at < static_cast<int64_t>(end1) * K ? 1 : 2];
    const uint2 read = *reinterpret_cast<const uint2*>(codes + at);
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
        values[i] = static_cast<float>(static_cast<int8_t>((i < 4 ? read.x : read.y) >> (i % 4 * 8))) * b;
    store8(out + at, pack8(values));
}
