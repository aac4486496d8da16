// Tiles of attention operands: copies of rows of heads into swizzled shared memory, and fragments of them for mma.sync.
#pragma once

#include "common.cuh"

constexpr int kAttentionThreads = 128;
constexpr int kAttentionWarps = kAttentionThreads / kWarp;
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// A value known to the compiler, to pass to a lambda.
template <bool kValue>
struct Constant {
    static constexpr bool value = kValue;
};

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// kBytes (8 or 16) to shared memory: the first `bytes` from global memory, the rest zeros.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, int bytes) {
    if constexpr (kBytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// A tile holds rows of kDim bf16 values as chunks of 8, chunk c of row r in place c ^ (r % 8), so that ldmatrix and the
// copies touch every bank once. Tiles are aligned to 1024 bytes. This is the byte of chunk c of row r.
template <int kDim>
__device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
    return 2 * kDim * row + 16 * (chunk ^ (row % 8));
}

// Starts the copy of kRows rows of head_dim values, `stride` apart; zeros past head_dim and from row `rows` on.
// kAligned: head_dim is a multiple of 8, so that every head starts at a multiple of 16 bytes.
template <int kRows, int kDim, bool kAligned>
__device__ __forceinline__ void load_tile(uint32_t tile, const bf16* head, int stride, int rows, int head_dim) {
    if (kAligned || (reinterpret_cast<uintptr_t>(head) % 16 == 0 && stride % 8 == 0)) {
        constexpr int kChunks = kDim / 8;
        constexpr int kStep = kAttentionThreads / kChunks;  // a multiple of 8: a thread's rows have the same swizzle
        const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
        const int bytes = kAligned ? (8 * chunk < head_dim ? 16 : 0) : max(0, min(16, 2 * head_dim - 16 * chunk));
        const bf16* source = head + static_cast<int64_t>(row) * stride + 8 * chunk;
        const uint32_t target = tile + tile_offset<kDim>(row, chunk);
#pragma unroll
        for (int r = 0; r < kRows; r += kStep)
            copy_async<16>(target + 2 * kDim * r, source + static_cast<int64_t>(r) * stride,
                           row + r < rows ? bytes : 0);
    } else {
        const int row = threadIdx.x / 16, quad = threadIdx.x % 16;
        const bf16* source = head + static_cast<int64_t>(row) * stride + 4 * quad;
        const uint32_t target = tile + tile_offset<kDim>(row, quad / 2) + quad % 2 * 8;
#pragma unroll
        for (int block = 0; block < kDim / 64; ++block) {
            const int bytes = 64 * block + 4 * quad < head_dim ? 8 : 0;
#pragma unroll
            for (int r = 0; r < kRows; r += kAttentionThreads / 16)
                copy_async<8>(target + 2 * kDim * r + 128 * block,
                              source + static_cast<int64_t>(r) * stride + 64 * block, row + r < rows ? bytes : 0);
        }
    }
}

// Where a lane points ldmatrix at 16 rows of a tile, relative to the first: for a operands (rows x values), and with
// .trans for b operands (values of 16 rows x 16 columns).
template <int kDim>
__device__ __forceinline__ uint32_t lane_offset_a() {
    const int lane = threadIdx.x % kWarp;
    return tile_offset<kDim>(lane % 16, lane / 16);
}

// The same for b operands whose 16 columns are rows of the tile.
template <int kDim>
__device__ __forceinline__ uint32_t lane_offset_b() {
    const int lane = threadIdx.x % kWarp;
    return tile_offset<kDim>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

// The address of 16 rows from `row` on and 16 values from 16 * step on, for a lane's offset from the above. `row` is a
// multiple of 8, so the step only flips chunk bits.
template <int kDim>
__device__ __forceinline__ uint32_t fragment_address(uint32_t tile, uint32_t lane_offset, int row, int step) {
    return tile + 2 * kDim * row + (lane_offset ^ (32 * step));
}

// A warp's kTiles x 16 rows from `row` on of a tile, as a operands.
template <int kDim, int kDepth, int kTiles>
__device__ __forceinline__ void load_rows(uint32_t tile, int row, uint32_t (&out)[kTiles][kDepth / 16][4]) {
    const uint32_t lane_offset = lane_offset_a<kDim>();
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int step = 0; step < kDepth / 16; ++step)
            load_matrix_x4(out[t][step], fragment_address<kDim>(tile, lane_offset, row + 16 * t, step));
}

// Two sums of 16 x 8, side by side, as the 16 x 16 a operand of the next product.
__device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack_bf16(left[0], left[1]);
    a[1] = pack_bf16(left[2], left[3]);
    a[2] = pack_bf16(right[0], right[1]);
    a[3] = pack_bf16(right[2], right[3]);
}

// sums (kTiles x 16 rows, kDepth) += a (kTiles x 16, 16) . the 16 rows from `row` on of a tile.
template <int kDim, int kDepth, int kTiles>
__device__ __forceinline__ void multiply_by_rows(float (&sums)[kTiles][kDepth / 8][4], const uint32_t (&a)[kTiles][4],
                                                 uint32_t tile, uint32_t lane_offset, int row) {
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
        uint32_t b[4];
        load_matrix_x4_transposed(b, fragment_address<kDim>(tile, lane_offset, row, step));
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            mma_bf16(sums[t][2 * step], a[t], b[0], b[1]);
            mma_bf16(sums[t][2 * step + 1], a[t], b[2], b[3]);
        }
    }
}

// Writes a warp's sums, times `scale`, as bf16 to rows `row`.. of a head; rows from `rows` on and columns from head_dim
// on are dropped.
template <int kDepth, int kTiles>
__device__ __forceinline__ void store_rows(bf16* head, int stride, const float (&sums)[kTiles][kDepth / 8][4],
                                           float scale, int row, int rows, int head_dim) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int r = row + 16 * t + 8 * half + lane / 4;
            if (r >= rows) continue;
            bf16* out = head + static_cast<int64_t>(r) * stride + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < kDepth / 8; ++n)
                if (8 * n + lane % 4 * 2 < head_dim)
                    *reinterpret_cast<uint32_t*>(out + 8 * n) =
                        pack_bf16(scale * sums[t][n][2 * half], scale * sums[t][n][2 * half + 1]);
        }
}
