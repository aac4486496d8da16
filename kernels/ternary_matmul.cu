// y = x . w^T, exact, scaled or not: int8 x (M, K), ternary w (N, K) in packed tiles, y (M, N); mma.sync, sm_80 and up.

#include <type_traits>

#include "ternary_tiles.cuh"

namespace {

constexpr int kStepColumns = 32;
constexpr int kSteps = kTileColumns / kStepColumns;
constexpr int kGroupRows = 1024;  // rows of x walked together, so that the blocks at work share x and w in L2

// A block multiplies kTileM rows of x by kTileN rows of w. Its warps share all rows of x; kWarpsN of them divide the
// rows of w, and kWarpsK the chunks of K. Tall parts of a warp are best: what is unpacked serves kFragsM fragments.
template <int kFragsM_, int kFragsN_, int kWarpsN_, int kWarpsK_, int kStages_, int kBlocks_>
struct Shape {
    static constexpr int kFragsM = kFragsM_, kFragsN = kFragsN_;  // of 16 rows each, of a warp
    static constexpr int kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
    static constexpr int kStages = kStages_;
    static constexpr int kBlocks = kBlocks_;  // that share a multiprocessor
    static constexpr int kWarps = kWarpsN * kWarpsK;
    static constexpr int kThreads = kWarps * kWarp;
    static constexpr int kTileM = 16 * kFragsM;
    static constexpr int kTileN = kTileRows * kFragsN * kWarpsN;
    static constexpr int kWTiles = kFragsN * kWarpsN;
    static constexpr int kXBytes = kTileM * kTileColumns;  // of one chunk
    static constexpr int kStageBytes = kWarpsK * (kXBytes + kWTiles * kTileBytes);  // x of all chunks, then w of all
    static constexpr int kSharedBytes = kStages * kStageBytes;
    static constexpr int kXPass = kThreads / 8;      // rows of x that the block copies with 16 bytes a thread
    static constexpr int kWPass = kWarps / kWarpsK;  // tiles of w of each chunk that it copies so
    static_assert(kTileM % kXPass == 0 && kWTiles % kWPass == 0 && kFragsN % 2 == 0);
    static_assert(kWarpsK == 1 || kWarps * kFragsM * kFragsN * 1024 <= kSharedBytes);
};

// The first row and column of a block's tile: down a group of tiles of M, then on to the next tile of N.
template <class S>
__device__ __forceinline__ int2 tile_origin(int tile, int tiles_m, int tiles_n) {
    constexpr int kGroup = kGroupRows / S::kTileM;
    const int group = tile / (kGroup * tiles_n), inside = tile % (kGroup * tiles_n);
    const int height = min(kGroup, tiles_m - group * kGroup);
    return {(group * kGroup + inside % height) * S::kTileM, inside / height * S::kTileN};
}

__device__ __forceinline__ void load_words(uint32_t (&v)[4], uint32_t shared) {
    const uint4 words = load_shared(shared);
    v[0] = words.x, v[1] = words.y, v[2] = words.z, v[3] = words.w;
}

__device__ __forceinline__ void unpack(uint32_t (&v)[4], uint32_t word) {
#pragma unroll
    for (int r = 0; r < 4; ++r) v[r] = unpack_codes(word, r);
}

// Scales of consecutive rows or columns, a lane each: read when a tile begins, handed around when it is stored.
template <int kCount>
struct Scales {
    float held[(kCount + kWarp - 1) / kWarp];

    __device__ __forceinline__ void load(const float* from, int first, int end) {
#pragma unroll
        for (int i = 0; i < (kCount + kWarp - 1) / kWarp; ++i)
            held[i] = from[min(first + i * kWarp + static_cast<int>(threadIdx.x) % kWarp, end - 1)];
    }

    // Of `at` + offset; the offset is below 8 and may differ by lane, `at` is a constant, and a multiple of 8.
    __device__ __forceinline__ float get(int at, int offset) const {
        return __shfl_sync(0xffffffffu, held[at / kWarp], at % kWarp + offset);
    }
};

template <class T>
struct Output {
    const float* x_scale;
    const float* w_scale;
    T* y;
    int M, N;

    // From a sum that is 64 times the product, b the scale of w through 64.
    __device__ __forceinline__ static T value(int sum, float b, float s) {
        if constexpr (std::is_same_v<T, int>) return sum >> kSumShift;
        else return static_cast<T>(__fmul_rn(__fmul_rn(static_cast<float>(sum), b), s));
    }

    // 8 rows of a warp's sums, those in registers 2 half and 2 half + 1; s is the row's scale. A lane holds pairs of
    // columns: 2 (lane % 4) on of each eight.
    template <int kFragsN>
    __device__ __forceinline__ void store(const int (&sums)[2 * kFragsN][4], const float (&b)[2 * kFragsN][2], float s,
                                          int half, int m, int first_n) const {
        const int lane = threadIdx.x % kWarp;
        T* row = y + static_cast<int64_t>(m) * N;
        T pair[2 * kFragsN][2];
#pragma unroll
        for (int j = 0; j < 2 * kFragsN; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) pair[j][i] = value(sums[j][2 * half + i], b[j][i], s);

        if (sizeof(T) == 2 && N % 8 == 0) {
            // Four lanes exchange four such pairs each, so that a lane writes 8 consecutive columns.
#pragma unroll
            for (int part = 0; part < kFragsN / 2; ++part) {
                uint32_t out[4];
#pragma unroll
                for (int q = 0; q < 4; ++q) out[q] = reinterpret_cast<const uint32_t&>(pair[4 * part + q]);
                transpose_quad(out);
                const int n = first_n + 32 * part + lane % 4 * 8;
                if (m < M && n < N) *reinterpret_cast<uint4*>(row + n) = make_uint4(out[0], out[1], out[2], out[3]);
            }
        } else {
#pragma unroll
            for (int j = 0; j < 2 * kFragsN; ++j) {
                const int n = first_n + 8 * j + lane % 4 * 2;
                if (m >= M || n >= N) continue;
                if (sizeof(T) == 4 && N % 2 == 0) {
                    *reinterpret_cast<uint2*>(row + n) = reinterpret_cast<const uint2&>(pair[j]);
                } else {
                    row[n] = pair[j][0];
                    if (n + 1 < N) row[n + 1] = pair[j][1];
                }
            }
        }
    }
};

template <class S, class T>
__device__ __forceinline__ void multiply_tiles(const int8_t* x, const uint8_t* w, const Output<T>& output, int K) {
    constexpr bool kScaled = !std::is_same_v<T, int>;
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t stages = shared_address(shared);
    const int M = output.M, N = output.N;
    const int tiles_m = (M + S::kTileM - 1) / S::kTileM, tiles_n = (N + S::kTileN - 1) / S::kTileN;
    const int tiles = tiles_m * tiles_n;
    const int chunks = (K + kTileColumns - 1) / kTileColumns, w_tiles = (N + kTileRows - 1) / kTileRows;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int warp_k = warp % S::kWarpsK, warp_n = warp / S::kWarpsK;

    // Copies run ahead of the products, across tiles: the next tile's first stages arrive while this one is stored.
    // A row of x has 8 parts of 16 bytes in a chunk; part c of row r lies at place c ^ r % 8, so that a part of any 8
    // consecutive rows touches all 32 banks once. Tiles of w stay as they are.
    const int x_row = threadIdx.x / 8, x_column = threadIdx.x % 8 * 16;
    const int w_tile = warp / S::kWarpsK;
    const uint32_t x_to = stages + x_row * kTileColumns + (x_column ^ x_row % 8 * 16);
    const uint32_t w_to = stages + S::kWarpsK * S::kXBytes + (warp_k * S::kWTiles + w_tile) * kTileBytes + lane * 16;
    constexpr int kXPasses = S::kTileM / S::kXPass, kWPasses = S::kWTiles / S::kWPass;
    int copy_tile = blockIdx.x, copy_chunk = 0, rows_m = 0, tiles_w = 0;
    const int8_t* x_from = nullptr;
    const uint8_t* w_from = nullptr;
    const auto copy_stage = [&](int stage, bool of_x, bool of_w) {
        if (copy_tile >= tiles) return;
        if (copy_chunk == 0) {
            const int2 origin = tile_origin<S>(copy_tile, tiles_m, tiles_n);
            rows_m = M - origin.x - x_row, tiles_w = w_tiles - origin.y / kTileRows - w_tile;
            x_from = x + static_cast<int64_t>(origin.x + x_row) * K + x_column;
            w_from =
                w + (static_cast<int64_t>(origin.y / kTileRows + w_tile) * chunks + warp_k) * kTileBytes + lane * 16;
        }
        if (of_x)
#pragma unroll
            for (int g = 0; g < S::kWarpsK; ++g) {
                const bool in_k = (copy_chunk + g) * kTileColumns + x_column < K;
#pragma unroll
                for (int i = 0; i < kXPasses; ++i)
                    copy_async16(x_to + stage * S::kStageBytes + g * S::kXBytes + i * S::kXPass * kTileColumns,
                                 x_from + g * kTileColumns + static_cast<int64_t>(i * S::kXPass) * K,
                                 in_k && i * S::kXPass < rows_m);
            }
        if (of_w)
#pragma unroll
            for (int i = 0; i < kWPasses; ++i)
                copy_async16(w_to + stage * S::kStageBytes + i * S::kWPass * kTileBytes,
                             w_from + static_cast<int64_t>(i * S::kWPass) * chunks * kTileBytes,
                             copy_chunk + warp_k < chunks && i * S::kWPass < tiles_w);
        x_from += S::kWarpsK * kTileColumns, w_from += S::kWarpsK * kTileBytes, copy_chunk += S::kWarpsK;
        if (copy_chunk >= chunks) copy_chunk = 0, copy_tile += gridDim.x;
    };

    // Where the lane's row of ldmatrix starts in stage 0, for step 0; step s differs by s in bits 5 and 6.
    const uint32_t x_at = stages + warp_k * S::kXBytes + lane % 16 * kTileColumns + (lane / 16 ^ lane % 8) * 16;
    const uint32_t w_at = stages + S::kWarpsK * S::kXBytes +
                          (warp_k * S::kWTiles + warp_n * S::kFragsN) * kTileBytes + lane * 16;

    // The first stages: w at once, x when the kernel before this one is done. Groups are committed also when empty:
    // their number tells which stage has arrived.
    for (int stage = 0; stage < S::kStages - 1; ++stage) copy_stage(stage, false, true);
    wait_for_earlier_kernels();
    copy_tile = blockIdx.x, copy_chunk = 0;
    for (int stage = 0; stage < S::kStages - 1; ++stage) {
        copy_stage(stage, true, false);
        copy_async_commit();
    }
    int read_stage = 0, write_stage = S::kStages - 1;
    copy_async_wait<S::kStages - 2>();
    __syncthreads();

    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        if (tile + static_cast<int>(gridDim.x) >= tiles) let_later_kernels_start();
        const int2 origin = tile_origin<S>(tile, tiles_m, tiles_n);
        const int first_n = origin.y + warp_n * kTileRows * S::kFragsN;
        Scales<16 * S::kFragsM> x_scales;
        Scales<16 * S::kFragsN> w_scales;
        if constexpr (kScaled) x_scales.load(output.x_scale, origin.x, M), w_scales.load(output.w_scale, first_n, N);

        int sums[S::kFragsM][2 * S::kFragsN][4] = {};
        uint32_t x_now[S::kFragsM][4];
        uint32_t w_now[2][S::kFragsN][4];     // of this step and of the next
        uint32_t packed[S::kFragsN][kSteps];  // of a chunk
#pragma unroll
        for (int i = 0; i < S::kFragsM; ++i)
            load_matrix_x4(x_now[i], x_at + read_stage * S::kStageBytes + i * 16 * kTileColumns);
#pragma unroll
        for (int j = 0; j < S::kFragsN; ++j) {
            load_words(packed[j], w_at + read_stage * S::kStageBytes + j * kTileBytes);
            unpack(w_now[0][j], packed[j][0]);
        }

        for (int chunk = 0; chunk < chunks; chunk += S::kWarpsK) {
            copy_stage(write_stage, true, true);  // over the stage before this one, which every warp has left
            copy_async_commit();
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                if (step == kSteps - 1) {
                    write_stage = read_stage;
                    read_stage = read_stage + 1 == S::kStages ? 0 : read_stage + 1;
                    copy_async_wait<S::kStages - 2>();
                    __syncthreads();
                }
                // Products of this step, among them what the next one needs.
                const uint32_t x_next = (x_at + read_stage * S::kStageBytes) ^ ((step + 1) % kSteps * kStepColumns);
#pragma unroll
                for (int i = 0; i < S::kFragsM; ++i) {
                    if (step == kSteps - 1)
#pragma unroll
                        for (int j = i; j < S::kFragsN; j += S::kFragsM)
                            load_words(packed[j], w_at + read_stage * S::kStageBytes + j * kTileBytes);
#pragma unroll
                    for (int j = 0; j < S::kFragsN; ++j) {
                        const uint32_t (&w_frag)[4] = w_now[step % 2][j];
                        mma_int8(sums[i][2 * j], x_now[i], w_frag[0], w_frag[2]);
                        mma_int8(sums[i][2 * j + 1], x_now[i], w_frag[1], w_frag[3]);
                    }
                    load_matrix_x4(x_now[i], x_next + i * 16 * kTileColumns);
                    if (step < kSteps - 1)
#pragma unroll
                        for (int j = i; j < S::kFragsN; j += S::kFragsM)
                            unpack(w_now[(step + 1) % 2][j], packed[j][step + 1]);
                }
                if (step == kSteps - 1)
#pragma unroll
                    for (int j = 0; j < S::kFragsN; ++j) unpack(w_now[0][j], packed[j][0]);
            }
        }

        // Warps that share rows and columns leave each other the sums that they don't store.
        constexpr int kKept = (S::kFragsM + S::kWarpsK - 1) / S::kWarpsK;
        if constexpr (S::kWarpsK > 1) {
            copy_async_wait<0>();
            __syncthreads();
            int4* exchange = reinterpret_cast<int4*>(shared) +
                             (warp - warp_k) * S::kFragsM * 2 * S::kFragsN * kWarp + lane;  // of warp_k 0
            const auto place = [&](int k, int i, int j) {
                return exchange + ((k * S::kFragsM + i) * 2 * S::kFragsN + j) * kWarp;
            };
#pragma unroll
            for (int i = 0; i < S::kFragsM; ++i)
                if (i / kKept != warp_k)
#pragma unroll
                    for (int j = 0; j < 2 * S::kFragsN; ++j)
                        *place(warp_k, i, j) = make_int4(sums[i][j][0], sums[i][j][1], sums[i][j][2], sums[i][j][3]);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < S::kFragsM; ++i)
                if (i / kKept == warp_k)
#pragma unroll
                    for (int k = 1; k < S::kWarpsK; ++k)
#pragma unroll
                        for (int j = 0; j < 2 * S::kFragsN; ++j) {
                            const int4 part = *place((warp_k + k) % S::kWarpsK, i, j);
                            sums[i][j][0] += part.x, sums[i][j][1] += part.y;
                            sums[i][j][2] += part.z, sums[i][j][3] += part.w;
                        }
        }

        float b[2 * S::kFragsN][2];
        if constexpr (kScaled)
#pragma unroll
            for (int j = 0; j < 2 * S::kFragsN; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i) b[j][i] = w_scales.get(8 * j, lane % 4 * 2 + i) * 0.015625f;  // exact
#pragma unroll
        for (int i = 0; i < S::kFragsM; ++i)
            if (i / kKept == warp_k)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int at = 16 * i + 8 * half;
                    const float s = kScaled ? x_scales.get(at, lane / 4) : 1.f;
                    output.template store<S::kFragsN>(sums[i], b, s, half, origin.x + at + lane / 4, first_n);
                }
    }
    copy_async_wait<0>();
}

}  // namespace

// For all: w in tiles; x_scale (M) and w_scale (N) are not read by _i32, and may be null there. x, w and y lie on 16
// bytes; K is a multiple of 32 and at most 262143. M, N >= 1. Launches may use programmatic serialization (sm_90).
// Scales are not restrict: x_scale must not be read before the kernel that writes it is done.

#define TERNARY_MATMUL(name, Tile, type)                                                                          \
    extern "C" __global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)                                   \
    name(const int8_t* x, const uint8_t* w, const float* x_scale, const float* w_scale, type* y, int M, int N,    \
         int K) {                                                                                                 \
        multiply_tiles<Tile, type>(x, w, {x_scale, w_scale, y, M, N}, K);                                         \
    }
#define TERNARY_MATMULS(tile, Tile)                              \
    TERNARY_MATMUL(ternary_matmul_##tile##_i32, Tile, int)       \
    TERNARY_MATMUL(ternary_matmul_##tile##_bf16, Tile, bf16)     \
    TERNARY_MATMUL(ternary_matmul_##tile##_f32, Tile, float)

// Grid: min(ceil(M / 128) * ceil(N / 256), multiprocessors) blocks of 256 threads. Dynamic shared memory: 98304 bytes.
using Tile128x256 = Shape<8, 2, 8, 1, 4, 1>;
TERNARY_MATMULS(128x256, Tile128x256)

// Grid: min(ceil(M / 128) * ceil(N / 128), resident blocks: 2 a multiprocessor, 1 where it has 100 KB) of 128 threads.
// Dynamic shared memory: 61440 bytes.
using Tile128x128 = Shape<8, 2, 4, 1, 3, 2>;
TERNARY_MATMULS(128x128, Tile128x128)

// Grid: ceil(M / 32) * ceil(N / 64) blocks, exactly, of 128 threads. Dynamic shared memory: 49152 bytes.
using Tile32x64 = Shape<2, 2, 2, 2, 4, 3>;
TERNARY_MATMULS(32x64, Tile32x64)

// Grid: ceil(M / 32) * ceil(N / 32) blocks, exactly, of 128 threads. Dynamic shared memory: 61440 bytes.
using Tile32x32 = Shape<2, 2, 1, 4, 3, 3>;
TERNARY_MATMULS(32x32, Tile32x32)
