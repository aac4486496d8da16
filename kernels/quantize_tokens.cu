// Int8 codes of activations: x (rows, K) f32 or bf16 -> codes (rows, stride) = round(x * 127 / max(absmax(x), 1e-5)),
// zeros from K on, and scale (rows,) = max(absmax(x), 1e-5) / 127.

#include "row.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kQuad = 4;  // codes that a thread stores together

template <class T>
__device__ __forceinline__ float value_at(const T* row, int k, int K) {
    return k < K ? static_cast<float>(row[k]) : 0.f;
}

template <class T>
__device__ __forceinline__ void quantize_row(const T* __restrict__ x, int8_t* __restrict__ codes,
                                             float* __restrict__ scale, int K, int stride) {
    const T* row = x + static_cast<int64_t>(blockIdx.x) * K;
    float absmax = 0.f;
    for (int k = threadIdx.x; k < K; k += kThreads) absmax = max_abs(absmax, static_cast<float>(row[k]));
    absmax = Rows<1, true, 1>(0).reduce_max(absmax);
    if (threadIdx.x == 0) scale[blockIdx.x] = code_scale(absmax);
    // Rounded as the CPU does it: the same codes, also near a tie.
    const float per_code = __fdiv_rn(127.f, absmax < kAbsmaxFloor ? kAbsmaxFloor : absmax);
    int* out = reinterpret_cast<int*>(codes + static_cast<int64_t>(blockIdx.x) * stride);
    for (int quad = threadIdx.x; quad < stride / kQuad; quad += kThreads) {
        uint32_t packed = 0;
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
            const float rounded = __fadd_rn(__fmul_rn(value_at(row, kQuad * quad + i, K), per_code), kRounder);
            packed |= (__float_as_uint(rounded) & 0xffu) << (8 * i);
        }
        out[quad] = static_cast<int>(packed);
    }
}

}  // namespace

// Grid: (rows) blocks of 256 threads. stride >= K, a multiple of 4; codes on 4 bytes.
extern "C" __global__ void __launch_bounds__(kThreads)
quantize_tokens_f32(const float* x, int8_t* codes, float* scale, int K, int stride) {
    quantize_row(x, codes, scale, K, stride);
}

extern "C" __global__ void __launch_bounds__(kThreads)
quantize_tokens_bf16(const bf16* x, int8_t* codes, float* scale, int K, int stride) {
    quantize_row(x, codes, scale, K, stride);
}
