// Rows of features, each walked by a block or by one warp of it: staged loads, sums and maxima, int8 codes.
#pragma once

#include <cuda_fp8.h>

#include "common.cuh"

namespace {

constexpr float kAbsmaxFloor = 1e-5f;
constexpr float kGradientFloor = 1e-30f;
constexpr float kFp8PerCode = 3.5f;     // 127 * 3.5 = 444.5 is below 448, the largest e4m3
constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: |v| < 2^22 added to it is rounded half to even, into the low bits

// The part of a row that a thread works on: vectors (eight features) thread, thread + threads, ..., kVectors at most.
// Vectors past the end of the row are read as zeros and not written. A row belongs to a block (kBlock), or to one warp.
// A row of kInputs arrays comes through dynamic shared memory, kInputs * kVectors * 16 bytes a thread. What a thread
// copies is read by that thread alone, so that its own wait suffices, and once it is in registers the copy of the next
// row may start.
template <int kVectors, bool kBlock, int kInputs>
struct Rows {
    int vectors;     // of a row
    int parity = 0;  // the reduction scratch in use

    __device__ explicit Rows(int features) : vectors(features / 8) {}

    __device__ static int thread() { return kBlock ? threadIdx.x : threadIdx.x % kWarp; }
    __device__ static int threads() { return kBlock ? blockDim.x : kWarp; }
    __device__ static int rows_per_block() { return kBlock ? 1 : blockDim.x / kWarp; }
    __device__ static int first() { return blockIdx.x * rows_per_block() + (kBlock ? 0 : threadIdx.x / kWarp); }
    __device__ static int step() { return gridDim.x * rows_per_block(); }

    __device__ int vector(int i) const { return thread() + i * threads(); }
    __device__ bool inside(int i) const { return vector(i) < vectors; }

    __device__ static Bf16x8* staged(int input, int i) {
        extern __shared__ __align__(16) unsigned char shared[];
        const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;  // together: constant offsets
        return reinterpret_cast<Bf16x8*>(shared) + ((warp * kInputs + input) * kVectors + i) * kWarp + lane;
    }

    // Starts the copy of a row of array `input`.
    __device__ void fetch(int input, const bf16* row) const {
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
            copy_async16(shared_address(staged(input, i)), row + 8 * vector(i), inside(i));
    }

    // Eight f32 values, by the L1 cache; volatile, so that they are not kept in registers over the loop.
    __device__ void load_weight(const float* weight, int i, float (&w)[8]) const {
        const float* p = weight + 8 * min(vector(i), vectors - 1);
        asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(w[0]), "=f"(w[1]), "=f"(w[2]), "=f"(w[3])
                     : "l"(p));
        asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(w[4]), "=f"(w[5]), "=f"(w[6]), "=f"(w[7])
                     : "l"(p + 4));
    }

    // Sum and maximum over the row, in a fixed order. `max` is >= 0 or NaN, which as bits is the largest of all. The
    // two scratches take turns, so that one barrier suffices.
    __device__ void reduce(float& sum, float& max) {
        uint32_t bits = __reduce_max_sync(0xffffffffu, __float_as_uint(max));
        sum = warp_sum(sum);
        if constexpr (kBlock) {
            __shared__ float sums[2][kWarp];
            __shared__ uint32_t maxima[2][kWarp];
            const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
            if (lane == 0) sums[parity][warp] = sum, maxima[parity][warp] = bits;
            __syncthreads();
            const bool used = lane < blockDim.x / kWarp;
            bits = __reduce_max_sync(0xffffffffu, used ? maxima[parity][lane] : 0u);
            sum = warp_sum(used ? sums[parity][lane] : 0.f);
            parity ^= 1;
        }
        max = __uint_as_float(bits);
    }

    __device__ float reduce_sum(float sum) {
        sum = warp_sum(sum);
        if constexpr (kBlock) {
            __shared__ float sums[2][kWarp];
            const int lane = threadIdx.x % kWarp;
            if (lane == 0) sums[parity][threadIdx.x / kWarp] = sum;
            __syncthreads();
            sum = warp_sum(lane < blockDim.x / kWarp ? sums[parity][lane] : 0.f);
            parity ^= 1;
        }
        return sum;
    }

    // The same for a maximum alone, >= 0 or NaN.
    __device__ float reduce_max(float max) {
        uint32_t bits = __reduce_max_sync(0xffffffffu, __float_as_uint(max));
        if constexpr (kBlock) {
            __shared__ uint32_t maxima[2][kWarp];
            const int lane = threadIdx.x % kWarp;
            if (lane == 0) maxima[parity][threadIdx.x / kWarp] = bits;
            __syncthreads();
            bits = __reduce_max_sync(0xffffffffu, lane < blockDim.x / kWarp ? maxima[parity][lane] : 0u);
            parity ^= 1;
        }
        return __uint_as_float(bits);
    }

    // Column sums of a block to `out` (features,).
    __device__ void store_sums(const float (&sums)[kVectors][8], float* out) const {
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
            if (inside(i)) {
                float4* p = reinterpret_cast<float4*>(out + 8 * vector(i));
                p[0] = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
                p[1] = make_float4(sums[i][4], sums[i][5], sums[i][6], sums[i][7]);
            }
    }
};

// The larger of `max` and |x|, NaN if either is (fmaxf would drop it).
__device__ __forceinline__ float max_abs(float max, float x) {
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(max) : "f"(max), "f"(fabsf(x)));
    return max;
}

// Dequantisation factor of a row: max(absmax, floor) / 127, NaN if absmax is.
__device__ __forceinline__ float code_scale(float absmax, float floor = kAbsmaxFloor) {
    return (absmax < floor ? floor : absmax) * (1.f / 127.f);
}

// With n = product * multiplier (rstd, or a gradient's weight scale): n / scale = product * factor.
__device__ __forceinline__ float code_factor(float multiplier, float scale) { return __fdividef(multiplier, scale); }

// kRounder + the code of n: the low byte of its bits is the int8 code. |n / scale| < 127.5: there is nothing to clamp.
__device__ __forceinline__ float rounded_code(float product, float factor) {
    return __fmaf_rn(product, factor, kRounder);
}

// The low bytes of eight words.
__device__ __forceinline__ uint2 pack_codes(const float (&rounded)[8]) {
    uint32_t pair[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        pair[i] = __byte_perm(__float_as_uint(rounded[2 * i]), __float_as_uint(rounded[2 * i + 1]), 0x0040);
    return make_uint2(__byte_perm(pair[0], pair[1], 0x5410), __byte_perm(pair[2], pair[3], 0x5410));
}

// NaN if either is.
__device__ __forceinline__ float smaller(float a, float b) {
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
}

// Two values in e4m3; a NaN stays.
__device__ __forceinline__ uint32_t pack_fp8(float low, float high) {
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

// An output gradient, (rows, features): int8 codes for the input gradient, and e4m3 for the weight gradient, where
// small features beside large ones count.
struct Gradient {
    int8_t* codes;
    uint8_t* fp8;
};

// Eight values from `at` on.
__device__ __forceinline__ void store_gradient(const Gradient& to, int64_t at, const float (&product)[8], float factor,
                                               float fp8_factor) {
    float rounded[8];
    uint32_t pair[4];
#pragma unroll
    for (int j = 0; j < 8; ++j) rounded[j] = rounded_code(product[j], factor);
#pragma unroll
    for (int j = 0; j < 4; ++j) pair[j] = pack_fp8(product[2 * j] * fp8_factor, product[2 * j + 1] * fp8_factor);
    *reinterpret_cast<uint2*>(to.codes + at) = pack_codes(rounded);
    *reinterpret_cast<uint2*>(to.fp8 + at) = make_uint2(pair[0] | pair[1] << 16, pair[2] | pair[3] << 16);
}

// Eight inputs of the projection behind a norm, from their rounded codes: the codes themselves, or code * scale.
__device__ __forceinline__ void store_inputs(int8_t* inputs, const float (&rounded)[8], float) {
    *reinterpret_cast<uint2*>(inputs) = pack_codes(rounded);
}

__device__ __forceinline__ void store_inputs(bf16* inputs, const float (&rounded)[8], float scale) {
    float value[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) value[j] = (rounded[j] - kRounder) * scale;
    store8(inputs, pack8(value));
}

}  // namespace
