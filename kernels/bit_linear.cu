// y = x . w^T * b * x_scale (+ residual): int8 x (M, K), ternary int8 w (N, K), bf16 y (M, N); mma.sync, sm_80 and up.

#include "common.cuh"

namespace {

// A block multiplies 128 rows of x by 128 rows of w, each of its warps 64 by 64. Two blocks share a multiprocessor, so
// that one multiplies while the other stores.
constexpr int kTileM = 128;
constexpr int kTileN = 128;
constexpr int kWarpTile = 64;
constexpr int kWarpsN = kTileN / kWarpTile;
constexpr int kThreads = kTileM / kWarpTile * kWarpsN * kWarp;
constexpr int kGroup = 16;  // tiles of M walked together, so that the blocks at work share x and w in L2

constexpr int kBlockK = 64;  // bytes of each row in a stage of the pipeline
constexpr int kStageBytes = (kTileM + kTileN) * kBlockK;
constexpr int kChunks = kBlockK / 16;
constexpr int kRowsPerPass = kThreads / kChunks;  // rows that the block copies with one chunk a thread

// Sums start at the bits of 1.5 * 2^23: as floats they then are 1.5 * 2^23 + sum, exactly, while |sum| < 2^22, and one
// subtraction replaces the slow conversion. |sum| <= 128 K.
constexpr int kBiasBits = 0x4b400000;
constexpr float kBias = 12582912.f;
constexpr int kBiasedK = (1 << 22) / 128;

// The first row and column of a tile: down kGroup tiles of M, then on to the next tile of N.
__device__ __forceinline__ int2 tile_origin(int tile, int tiles_m, int tiles_n) {
    const int group = tile / (kGroup * tiles_n), inside = tile % (kGroup * tiles_n);
    const int height = min(kGroup, tiles_m - group * kGroup);
    return {(group * kGroup + inside % height) * kTileM, inside / height * kTileN};
}

// Chunk c of row r lies at place c ^ (r / 2 % 4), so that a chunk of any 8 consecutive rows touches all 32 banks once.
__device__ __forceinline__ int chunk_offset(int row, int chunk) { return row * kBlockK + (chunk ^ (row / 2 % 4)) * 16; }

// A warp's operands for a step of 32 along K.
struct Fragments {
    uint32_t x[4][4];  // 16 rows each
    uint32_t w[4][4];  // 16 rows each: two operands of 8 columns

    __device__ __forceinline__ void load(int i, uint32_t x_shared, uint32_t w_shared) {
        load_matrix_x4(w[i], w_shared + i * 16 * kBlockK);
        load_matrix_x4(x[i], x_shared + i * 16 * kBlockK);
    }

    __device__ __forceinline__ void load(uint32_t x_shared, uint32_t w_shared) {
#pragma unroll
        for (int i = 0; i < 4; ++i) load(i, x_shared, w_shared);
    }

    // Products of these operands, among them the loads of the next.
    __device__ __forceinline__ void multiply(int (&sums)[4][8][4], Fragments& next, uint32_t x_shared,
                                             uint32_t w_shared) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            next.load(i, x_shared, w_shared);
#pragma unroll
            for (int j = 0; j < 8; ++j) mma_int8(sums[i][j], x[i], w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
        }
    }
};

struct Output {
    const float* x_scale;
    const float* w_scale;
    const bf16* residual;
    bf16* y;
    int M, N, end0, end1;

    // A warp's sums to y. Four lanes hold 8 consecutive columns of a row; they exchange four such parts, so that each
    // lane reads 16 bytes of the residual and writes 16 bytes of y.
    template <bool kAdd>
    __device__ __forceinline__ void store(const float (&sums)[4][8][4], int first_m, int first_n) const {
        const int lane = threadIdx.x % kWarp;
        first_m += lane / 4;
        const int lane_n = first_n + lane % 4 * 8;
        uint4 added[8];
        const auto load = [&](int i, int n) {
            const int m = first_m + 8 * i;
            added[i] = {};
            if (m < M && n < N) added[i] = *reinterpret_cast<const uint4*>(residual + static_cast<int64_t>(m) * N + n);
        };
        if constexpr (kAdd)
#pragma unroll
            for (int i = 0; i < 8; ++i) load(i, lane_n);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float b[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const int n = min(first_n + 32 * half + 8 * q, N - 1);
                b[q] = w_scale[n < end0 ? 0 : n < end1 ? 1 : 2];
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int m = first_m + 8 * i, n = lane_n + 32 * half;
                const float s = x_scale[min(m, M - 1)];
                uint32_t before[4], out[4];
                if constexpr (kAdd) {
                    before[0] = added[i].x, before[1] = added[i].y, before[2] = added[i].z, before[3] = added[i].w;
                    if (half == 0) load(i, lane_n + 32);
                    transpose_quad(before);
                }
#pragma unroll
                for (int q = 0; q < 4; ++q) {
                    const float* pair = &sums[i / 2][4 * half + q][i % 2 * 2];
                    if constexpr (kAdd) {
                        const float2 r = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(before[q]));
                        out[q] = pack_bf16(fmaf(pair[0] * b[q], s, r.x), fmaf(pair[1] * b[q], s, r.y));
                    } else {
                        out[q] = pack_bf16(pair[0] * b[q] * s, pair[1] * b[q] * s);
                    }
                }
                transpose_quad(out);
                if (m < M && n < N)
                    *reinterpret_cast<uint4*>(y + static_cast<int64_t>(m) * N + n) =
                        make_uint4(out[0], out[1], out[2], out[3]);
            }
        }
    }

    // Towards L2, the residual that the block will read when its products are done.
    __device__ __forceinline__ void prefetch_residual(int2 origin) const {
        constexpr int kSectors = kTileN / 16;  // of 32 bytes, in a row of the tile
#pragma unroll 1
        for (int i = 0; i < kTileM * kSectors / kThreads; ++i) {
            const int at = i * kThreads + threadIdx.x, m = origin.x + at / kSectors, n = origin.y + at % kSectors * 16;
            if (m < M && n < N)
                asm volatile("prefetch.global.L2 [%0];" ::"l"(residual + static_cast<int64_t>(m) * N + n));
        }
    }
};

template <int kStages>
__device__ __forceinline__ void multiply_tiles(const int8_t* x, const int8_t* w, const Output& output, int K) {
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t stages = shared_address(shared);
    const int M = output.M, N = output.N;
    const int tiles_m = (M + kTileM - 1) / kTileM, tiles_n = (N + kTileN - 1) / kTileN, tiles = tiles_m * tiles_n;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int warp_m = warp / kWarpsN * kWarpTile, warp_n = warp % kWarpsN * kWarpTile;

    // Copies run ahead of the products, across tiles: the next tile's first stages arrive while this one is stored.
    const int copy_row = threadIdx.x / kChunks, copy_chunk = threadIdx.x % kChunks;
    const uint32_t copy_to = stages + chunk_offset(copy_row, copy_chunk);
    int copy_tile = blockIdx.x, copy_k = 0, rows_m = 0, rows_n = 0;
    const int8_t *x_from = nullptr, *w_from = nullptr;
    const auto copy_stage = [&](int stage) {
        if (copy_tile < tiles) {
            if (copy_k == 0) {
                const int2 origin = tile_origin(copy_tile, tiles_m, tiles_n);
                rows_m = M - origin.x - copy_row, rows_n = N - origin.y - copy_row;
                x_from = x + static_cast<int64_t>(origin.x + copy_row) * K + copy_chunk * 16;
                w_from = w + static_cast<int64_t>(origin.y + copy_row) * K + copy_chunk * 16;
            }
            const bool in_k = copy_k + copy_chunk * 16 < K;
            const int64_t pass = static_cast<int64_t>(kRowsPerPass) * K;
            const uint32_t to = copy_to + stage * kStageBytes;
#pragma unroll
            for (int i = 0; i < kTileM / kRowsPerPass; ++i)
                copy_async16(to + i * kRowsPerPass * kBlockK, x_from + i * pass, in_k && i * kRowsPerPass < rows_m);
#pragma unroll
            for (int i = 0; i < kTileN / kRowsPerPass; ++i)
                copy_async16(to + (kTileM + i * kRowsPerPass) * kBlockK, w_from + i * pass,
                             in_k && i * kRowsPerPass < rows_n);
            x_from += kBlockK, w_from += kBlockK, copy_k += kBlockK;
            if (copy_k >= K) copy_k = 0, copy_tile += gridDim.x;
        }
        copy_async_commit();  // also when empty: the number of groups tells which stage has arrived
    };

    // Where the lane's row of ldmatrix starts in stage 0, for the first step of 32; the second differs in bit 5 alone.
    const uint32_t x_at = stages + chunk_offset(warp_m + lane % 16, lane / 16);
    const uint32_t w_at = stages + chunk_offset(kTileM + warp_n + lane / 16 * 8 + lane % 8, lane / 8 % 2);

    for (int stage = 0; stage < kStages - 1; ++stage) copy_stage(stage);
    int read_stage = 0, write_stage = kStages - 1;
    copy_async_wait<kStages - 2>();
    __syncthreads();

    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int2 origin = tile_origin(tile, tiles_m, tiles_n);
        if (output.residual != nullptr) output.prefetch_residual(origin);
        int sums[4][8][4];
#pragma unroll
        for (int i = 0; i < 128; ++i) sums[i / 32][i / 4 % 8][i % 4] = kBiasBits;

        Fragments even, odd;
        even.load(x_at + read_stage * kStageBytes, w_at + read_stage * kStageBytes);
        for (int k = 0; k < K; k += kBlockK) {
            copy_stage(write_stage);  // over the stage before this one, which every warp has left
            const uint32_t here = read_stage * kStageBytes;
            even.multiply(sums, odd, (x_at + here) ^ 32, (w_at + here) ^ 32);
            write_stage = read_stage;
            read_stage = read_stage + 1 == kStages ? 0 : read_stage + 1;
            copy_async_wait<kStages - 2>();
            __syncthreads();
            odd.multiply(sums, even, x_at + read_stage * kStageBytes, w_at + read_stage * kStageBytes);
        }

        float values[4][8][4];
        if (K < kBiasedK) {
#pragma unroll
            for (int i = 0; i < 128; ++i)
                values[i / 32][i / 4 % 8][i % 4] = __int_as_float(sums[i / 32][i / 4 % 8][i % 4]) - kBias;
        } else {
#pragma unroll
            for (int i = 0; i < 128; ++i)
                values[i / 32][i / 4 % 8][i % 4] = static_cast<float>(sums[i / 32][i / 4 % 8][i % 4] - kBiasBits);
        }
        if (output.residual == nullptr) output.store<false>(values, origin.x + warp_m, origin.y + warp_n);
        else output.store<true>(values, origin.x + warp_m, origin.y + warp_n);
    }
    copy_async_wait<0>();
}

}  // namespace

// b is w_scale[0] in columns n < end0, w_scale[1] in n < end1, else w_scale[2]; x_scale (M). residual may be null, and
// may be y. N, K, end0 and end1 are multiples of 16, pointers lie on 16 bytes.
// Grid: min(ceil(M / 128) * ceil(N / 128), 2 * multiprocessors) blocks of 128 threads. Dynamic shared memory: 65536.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
bit_linear(const int8_t* __restrict__ x, const int8_t* __restrict__ w, const float* __restrict__ x_scale,
           const float* __restrict__ w_scale, const bf16* residual, bf16* y, int M, int N, int K, int end0, int end1) {
    multiply_tiles<4>(x, w, {x_scale, w_scale, residual, y, M, N, end0, end1}, K);
}

// The same where a multiprocessor has 100 KB of shared memory (sm_86, sm_89). Dynamic shared memory: 49152 bytes.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
bit_linear_3_stages(const int8_t* __restrict__ x, const int8_t* __restrict__ w, const float* __restrict__ x_scale,
                    const float* __restrict__ w_scale, const bf16* residual, bf16* y, int M, int N, int K, int end0,
                    int end1) {
    multiply_tiles<3>(x, w, {x_scale, w_scale, residual, y, M, N, end0, end1}, K);
}
