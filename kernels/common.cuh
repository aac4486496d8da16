// What several kernels share: bf16 in vectors, reductions in a fixed order, asynchronous copies, tensor-core products.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

using bf16 = __nv_bfloat16;

constexpr int kWarp = 32;

// Eight bf16 values in one 16-byte access.
struct alignas(16) Bf16x8 {
    __nv_bfloat162 pair[4];
};

__device__ __forceinline__ Bf16x8 load8(const bf16* p) { return *reinterpret_cast<const Bf16x8*>(p); }

__device__ __forceinline__ void store8(bf16* p, const Bf16x8& v) { *reinterpret_cast<Bf16x8*>(p) = v; }

__device__ __forceinline__ void unpack8(const Bf16x8& v, float (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t pair = reinterpret_cast<const uint32_t&>(v.pair[i]);
        out[2 * i] = __uint_as_float(pair << 16), out[2 * i + 1] = __uint_as_float(pair & 0xffff0000u);
    }
}

__device__ __forceinline__ Bf16x8 pack8(const float (&in)[8]) {
    Bf16x8 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.pair[i] = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
    return v;
}

// Two floats as a pair of bf16 in one register, `low` in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// Sums and maxima over the lanes, the same bits in every lane and every run.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lane = kWarp / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

// Over a block of kThreads threads (a multiple of 32); `scratch` holds 32 floats and may be used again at once.
template <int kThreads>
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if constexpr (kThreads == kWarp) return x;
    __syncthreads();
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kThreads / kWarp; ++i) sum += scratch[i];
    return sum;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes that nothing writes meanwhile and that are used once.
__device__ __forceinline__ uint4 load_streamed(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

// 16 bytes from global to shared memory; zeros when not `valid` (the source is then not read).
__device__ __forceinline__ void copy_async16(uint32_t shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of the groups committed last are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared));
}

__device__ __forceinline__ uint4 load_shared(uint32_t shared) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(shared)
                 : "memory");
    return v;
}

__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared));
}

// Register j of lane i of each four lanes to register i of lane j.
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4]) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = threadIdx.x & bit;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32_t &low = v[bit == 1 ? 2 * i : i], &high = v[bit == 1 ? 2 * i + 1 : i + 2];
            const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? low : high, bit);
            if (upper) low = received;
            else high = received;
        }
    }
}

// A launch with programmatic serialization starts while earlier kernels still run: until these have ended ...
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ... and from when on later kernels may start in that manner.
__device__ __forceinline__ void let_later_kernels_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// d += a . b: a (16, 16) by rows, b (16, 8) by columns.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a . b in int32: a (16, 32) by rows, b (32, 8) by columns, both int8.
__device__ __forceinline__ void mma_int8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a . b in int32, modulo 2^32: a (16, 32) uint8 by rows, b (32, 8) int8 by columns.
__device__ __forceinline__ void mma_uint8_int8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
