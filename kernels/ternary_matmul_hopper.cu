// y = x . w^T on Hopper: x (M, K) int8, w (N, K) ternary in packed tiles; y (M, N) the exact int32 sums, or these as
// float(sum) * w_scale[n] * x_scale[m] in bf16 or f32. For many rows of x.

#include <type_traits>

#include "gemm_hopper.cuh"
#include "ternary_wgmma.cuh"

namespace {

constexpr int kConsumers = 2;  // warpgroups that multiply, beside one that loads
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kGroupTokens = 2048;  // tokens that stay in L2 while the tiles of all rows of w pass
constexpr int kColumns = 64;        // columns of y that a warpgroup brings through shared memory at a time
constexpr int kSharedBytes = 227 * 1024;
constexpr int kConsumerRegisters = 232, kLoaderRegisters = 3 * 168 - 2 * kConsumerRegisters;
constexpr int kMaxFastK = 32767;  // |sum| < 2^22 up to here

// As store_matrix_x4, each matrix transposed.
__device__ __forceinline__ void store_matrix_x4_transposed(uint32_t shared, uint32_t r0, uint32_t r1, uint32_t r2,
                                                           uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(r0),
                 "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
}

// An arrival of this thread at `barrier` as soon as its asynchronous copies so far are there.
__device__ __forceinline__ void arrive_after_copies(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// A warpgroup multiplies `steps` stages, every kStride-th of the ring from `stage`: sums[i] (64, tokens) of blocks of
// 64 rows of w, whose words lie at `words` in stage 0, by the tokens at `x` (a descriptor) in stage 0. Two sets of
// fragments take turns: one is unpacked while the other is multiplied. release(stage) says that this warpgroup has done
// with a stage, issued() that it has issued its last product.
template <int kStages, int kStageBytes, int kStride, int kBlocks, int kSums, class Release, class Issued>
__device__ __forceinline__ void multiply(int (&sums)[kBlocks][kSums], uint32_t x, uint32_t words, uint64_t* full,
                                         int stage, uint32_t phase, int steps, Release release, Issued issued) {
    uint4 packed[kBlocks];
    uint32_t even[kBlocks][2][4], odd[kBlocks][2][4];  // of the first 64 columns of a stage, of the last 64
    const auto load = [&] {
        barrier_wait(&full[stage], phase);
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) packed[i] = load_shared(words + stage * kStageBytes + i * 4 * kTileBytes);
    };
    const auto unpack_even = [&] {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) unpack(even[i][0], packed[i].x), unpack(even[i][1], packed[i].y);
    };
    load();
    unpack_even();
#pragma unroll 1
    for (int k = 0; k < steps; ++k) {
        const uint32_t b = x + stage * (kStageBytes / 16);
        const int done = stage - kStride;
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int block = 0; block < kBlocks; ++block)
                multiply_codes(sums[block], even[block][i], descriptor(b + 2 * i), i == 0 ? k : 1);
        wgmma_commit();
        wgmma_wait<1>();
        if (k > 0) release(done < 0 ? done + kStages : done);
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) unpack(odd[i][0], packed[i].z), unpack(odd[i][1], packed[i].w);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int block = 0; block < kBlocks; ++block)
                multiply_codes(sums[block], odd[block][i], descriptor(b + 4 + 2 * i), 1);
        wgmma_commit();
        if (k + 1 == steps) break;
        stage += kStride;
        if (stage >= kStages) stage -= kStages, phase ^= 1;
        load();
        wgmma_wait<1>();
        unpack_even();
    }
    issued();
    wgmma_wait<0>();
    release(stage);
}

// The exact sum of the codes as a float. kFast: |sum| < 2^22, where adding to a float's mantissa beats conversion.
template <bool kFast>
__device__ __forceinline__ float to_float(int sum) {
    if constexpr (kFast)
        return __fsub_rn(__int_as_float((sum >> kSumShift) + 0x4b400000), 12582912.f);
    else
        return static_cast<float>(sum >> kSumShift);
}

template <class Out, bool kFast>
__device__ __forceinline__ Out scaled(int sum, float w_scale, float x_scale) {
    if constexpr (std::is_same_v<Out, int>)
        return sum >> kSumShift;
    else
        return static_cast<Out>(__fmul_rn(__fmul_rn(to_float<kFast>(sum), w_scale), x_scale));
}

// A tile of y: kRows rows of w by kTokens_ tokens. The consumers take tiles in turns: one multiplies while the other
// stores. Blocks of a cluster take the same tokens at a time, and each loads its share of them for all.
template <int kBlocks_, int kTokens_, int kCluster_>
struct Config {
    static constexpr int kBlocks = kBlocks_;  // of 64 rows of w
    static constexpr int kTokens = kTokens_, kCluster = kCluster_;
    static constexpr int kRows = 64 * kBlocks;
    static constexpr int kUnits = kRows / kTileRows;
    static constexpr int kXBytes = kTokens * kTileColumns;
    static constexpr int kStageBytes = kXBytes + kUnits * kTileBytes;
};

// A chunk of y on its way through shared memory: some tokens of a tile by kColumns columns, rows padded by 16 bytes.
template <class C, class Out>
struct Chunk {
    static constexpr int kTokens = C::kTokens < 128 / sizeof(Out) ? C::kTokens : 128 / sizeof(Out);
    static constexpr int kPitch = kColumns * sizeof(Out) + 16;
    static constexpr int kBytes = kTokens * kPitch;
    static constexpr int kPieces = kColumns * sizeof(Out) / 16;  // of a row
    static constexpr int kPieceColumns = 16 / sizeof(Out);
};

template <class C, class Out>
struct Shared {
    static constexpr int kStagingBytes = kConsumers * (2 * Chunk<C, Out>::kBytes + C::kTokens * 4);
    static constexpr int kMostStages = (kSharedBytes - kStagingBytes - 512) / C::kStageBytes;
    static constexpr int kStages = kMostStages < 24 ? kMostStages : 24;
};

struct Tile {
    int m, n;
};

// The order of tiles: along the tokens of a group, then over the rows of w, then the next group. The last tile of
// tokens is moved back to end with the last token, since boxes that reach beyond x arrive slowly: two blocks then write
// the same values to some places.
template <class C>
__device__ __forceinline__ Tile tile_at(int index, int M, int N, int rank) {
    constexpr int kRows = C::kCluster * C::kRows, kGroup = kGroupTokens / C::kTokens;
    const int wide = (M + C::kTokens - 1) / C::kTokens, high = (N + kRows - 1) / kRows;
    const int group = index / (kGroup * high), rest = index - group * kGroup * high;
    const int width = min(kGroup, wide - group * kGroup);
    const int m = min((group * kGroup + rest % width) * C::kTokens, max(M - C::kTokens, 0));
    return {m, rest / width * kRows + rank * C::kRows};
}

// A warp has done with a stage: tells the block, or all blocks of the cluster, since each loads for the others.
template <class C>
__device__ __forceinline__ void release_stage(uint64_t* empty, int lane) {
    if constexpr (C::kCluster > 1) {
        if (lane < C::kCluster) barrier_arrive_in(empty, lane);
    } else {
        if (lane == 0) barrier_arrive(empty);
    }
}

// A warpgroup writes a tile of y from token m and column n on, by way of `staging`, which holds two chunks.
template <class C, class Out, bool kFast>
__device__ __forceinline__ void store_tile(const int (&sums)[C::kBlocks][C::kTokens / 2],
                                           const float (&w_scale)[C::kBlocks][2], const float* x_scale,
                                           uint8_t* staging, Out* y, int M, int N, int m, int n, int barrier) {
    using Chunk = Chunk<C, Out>;
    constexpr int kTokensAtOnce = kWarpgroup / Chunk::kPieces;
    const int thread = threadIdx.x % kWarpgroup, lane = thread % kWarp, warp = thread / kWarp;
    const int piece = thread % Chunk::kPieces, first_token = thread / Chunk::kPieces;
    const bool whole = N % Chunk::kPieceColumns == 0;  // every piece of a row is aligned, and inside or outside
    const int m_left = M - m - first_token;
    Out* const to = y + static_cast<int64_t>(m + first_token) * N + n + piece * Chunk::kPieceColumns;
#pragma unroll
    for (int chunk = 0; chunk < C::kTokens / Chunk::kTokens; ++chunk) {
#pragma unroll
        for (int block = 0; block < C::kBlocks; ++block) {
            uint8_t* const buffer = staging + (chunk * C::kBlocks + block) % 2 * Chunk::kBytes;
#pragma unroll
            for (int j = 0; j < Chunk::kTokens; j += 16) {
                const int first = chunk * Chunk::kTokens + j;
                const int* const sum = &sums[block][first / 2];
                Out v[2][2][2];  // of eight tokens, of eight columns, of a pair of tokens
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float2 s = *reinterpret_cast<const float2*>(x_scale + first + 8 * i + 2 * (lane % 4));
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        v[i][half][0] = scaled<Out, kFast>(sum[4 * i + 2 * half], w_scale[block][half], s.x);
                        v[i][half][1] = scaled<Out, kFast>(sum[4 * i + 2 * half + 1], w_scale[block][half], s.y);
                    }
                }
                if constexpr (sizeof(Out) == 2) {
                    const auto pair = [&](int i, int half) {
                        return *reinterpret_cast<const uint32_t*>(&v[i][half][0]);
                    };
                    uint8_t* const row = buffer + (j + lane / 16 * 8 + lane % 8) * Chunk::kPitch;
                    store_matrix_x4_transposed(shared_address(row) + (16 * warp + lane / 8 % 2 * 8) * 2, pair(0, 0),
                                               pair(0, 1), pair(1, 0), pair(1, 1));
                } else {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const int token = j + i / 4 * 8 + 2 * (lane % 4) + i % 2;
                        const int column = 16 * warp + i / 2 % 2 * 8 + lane / 4;
                        *reinterpret_cast<Out*>(buffer + token * Chunk::kPitch + column * sizeof(Out)) =
                            v[i / 4][i / 2 % 2][i % 2];
                    }
                }
            }
            barrier_sync(barrier, kWarpgroup);  // also: all have read the chunk before, whose place comes next
            const int left = N - n - 64 * block - piece * Chunk::kPieceColumns;
#pragma unroll
            for (int i = 0; i < Chunk::kTokens / kTokensAtOnce; ++i) {
                const int token = i * kTokensAtOnce;
                if (chunk * Chunk::kTokens + token >= m_left || left <= 0) continue;
                const uint8_t* const from = buffer + (first_token + token) * Chunk::kPitch + piece * 16;
                Out* const out = to + static_cast<int64_t>(chunk * Chunk::kTokens + token) * N + 64 * block;
                if (whole) {
                    *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(from);
                } else {
#pragma unroll 1
                    for (int c = 0; c < min(left, Chunk::kPieceColumns); ++c)
                        out[c] = reinterpret_cast<const Out*>(from)[c];
                }
            }
        }
    }
}

template <class C, class Out>
__device__ __forceinline__ void ternary_matmul(const CUtensorMap* x, const uint8_t* w, const float* x_scale,
                                               const float* w_scale, Out* y, int M, int N, int K) {
    using S = Shared<C, Out>;
    extern __shared__ __align__(1024) uint8_t dynamic_shared[];
    uint8_t* const stages = dynamic_shared;  // on a kilobyte, after which swizzling repeats
    uint8_t* const staging = stages + S::kStages * C::kStageBytes;
    float* const x_scales = reinterpret_cast<float*>(staging + kConsumers * 2 * Chunk<C, Out>::kBytes);
    uint64_t* const full = reinterpret_cast<uint64_t*>(x_scales + kConsumers * C::kTokens);
    uint64_t* const empty = full + S::kStages;

    const int rank = C::kCluster > 1 ? static_cast<int>(cluster_rank()) : 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::kStages; ++i)
            barrier_init(&full[i], 1 + kWarpgroup), barrier_init(&empty[i], 4 * C::kCluster);
        barrier_init_fence();
        prefetch_tensor_map(x);
    }
    if constexpr (C::kCluster > 1)
        cluster_sync();
    else
        __syncthreads();

    constexpr int kRows = C::kCluster * C::kRows;
    const int tiles = (M + C::kTokens - 1) / C::kTokens * ((N + kRows - 1) / kRows);
    const int first = blockIdx.x / C::kCluster, step = gridDim.x / C::kCluster;
    const int k_steps = (K + kTileColumns - 1) / kTileColumns;

    if (threadIdx.x < kWarpgroup) {  // the loading warpgroup: each warp a quarter of the words, one thread the tokens
        fewer_registers<kLoaderRegisters>();
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        const int last_unit = (N + kTileRows - 1) / kTileRows - 1;
        constexpr int kOwn = C::kUnits / 4;  // units of a warp
        const uint32_t own = C::kXBytes + warp * kOwn * kTileBytes + lane * 16;
        if (threadIdx.x == 0) wait_for_earlier_kernels();  // the others bring weights ahead
        int stage = 0;
        uint32_t phase = 0;
        for (int index = first; index < tiles; index += step) {
            const Tile tile = tile_at<C>(index, M, N, rank);
            const int first_unit = tile.n / kTileRows + warp * kOwn;
            const uint8_t* from[kOwn];
#pragma unroll
            for (int i = 0; i < kOwn; ++i)  // beyond N: anything, not stored
                from[i] = w + static_cast<int64_t>(min(first_unit + i, last_unit)) * k_steps * kTileBytes + lane * 16;
#pragma unroll 1
            for (int k = 0; k < k_steps; ++k) {
                uint8_t* const x_tile = stages + stage * C::kStageBytes;
                barrier_wait(&empty[stage], phase ^ 1);
                if (threadIdx.x == 0) {
                    barrier_expect(&full[stage], C::kXBytes);
                    if constexpr (C::kCluster > 1) {
                        constexpr int kShare = C::kTokens / C::kCluster;
                        copy_box_2d_multicast(x_tile + rank * kShare * kTileColumns, x, &full[stage], k * kTileColumns,
                                              tile.m + rank * kShare, (1 << C::kCluster) - 1);
                    } else {
                        copy_box_2d(x_tile, x, &full[stage], k * kTileColumns, tile.m);
                    }
                }
#pragma unroll
                for (int i = 0; i < kOwn; ++i)
                    copy_async16(shared_address(x_tile) + own + i * kTileBytes, from[i] + k * kTileBytes);
                arrive_after_copies(&full[stage]);
                if (++stage == S::kStages) stage = 0, phase ^= 1;
            }
        }
    } else {
        more_registers<kConsumerRegisters>();
        const int consumer = threadIdx.x / kWarpgroup - 1, thread = threadIdx.x % kWarpgroup;
        const int lane = thread % kWarp, warp = thread / kWarp;
        const uint32_t first_x = descriptor_low(shared_address(stages));
        const uint32_t words = shared_address(stages) + C::kXBytes + warp * kTileBytes + lane * 16;
        float* const scales = x_scales + consumer * C::kTokens;
        uint8_t* const chunks = staging + consumer * 2 * Chunk<C, Out>::kBytes;
        wait_for_earlier_kernels();

        // The consumers multiply in turns: a phase of `full` must not end twice unseen by the one that waits for it.
        if (consumer == 1) barrier_pass(1, kConsumers * kWarpgroup);
        int turn = 0;
        for (int index = first; index < tiles; index += step, ++turn) {
            if (turn % 2 != consumer) continue;
            const uint32_t position = static_cast<uint32_t>(turn) * k_steps;
            const Tile tile = tile_at<C>(index, M, N, rank);

            float scale[C::kBlocks][2];
            if constexpr (!std::is_same_v<Out, int>) {
#pragma unroll
                for (int i = 0; i < C::kBlocks; ++i)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int n = tile.n + 64 * i + 16 * warp + 8 * half + lane / 4;
                        scale[i][half] = n < N ? w_scale[n] : 0.f;
                    }
#pragma unroll
                for (int i = thread; i < C::kTokens; i += kWarpgroup)
                    scales[i] = tile.m + i < M ? x_scale[tile.m + i] : 0.f;
            }

            barrier_sync(1 + consumer, kConsumers * kWarpgroup);
            int sums[C::kBlocks][C::kTokens / 2];
            multiply<S::kStages, C::kStageBytes, 1>(
                sums, first_x, words, full, position % S::kStages, position / S::kStages & 1, k_steps,
                [&](int stage) { release_stage<C>(&empty[stage], lane); },
                [&] { barrier_pass(2 - consumer, kConsumers * kWarpgroup); });
            barrier_sync(3 + consumer, kWarpgroup);  // the scales are there, and the last chunk has been read
            if (!std::is_same_v<Out, int> && K > kMaxFastK)
                store_tile<C, Out, false>(sums, scale, scales, chunks, y, M, N, tile.m, tile.n, 3 + consumer);
            else
                store_tile<C, Out, true>(sums, scale, scales, chunks, y, M, N, tile.m, tile.n, 3 + consumer);
        }
    }
    if constexpr (C::kCluster > 1) cluster_sync();  // no block ends while another still arrives at its barriers
}

}  // namespace

// All kernels: 384 threads; 227 KB of dynamic shared memory; boxes of x 128 bytes wide by 128 tokens, swizzled by 128
// bytes; w and y 16-byte aligned; x_scale and w_scale are not read by _i32. Launches may use programmatic serialization.

#define TERNARY_MATMUL(name, Tile, type)                                                                            \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) __cluster_dims__(Tile::kCluster, 1, 1)                \
    name(const __grid_constant__ CUtensorMap x, const uint8_t* w, const float* x_scale, const float* w_scale,       \
         type* y, int M, int N, int K) {                                                                            \
        ternary_matmul<Tile>(&x, w, x_scale, w_scale, y, M, N, K);                                                  \
    }
#define TERNARY_MATMULS(name, Tile)               \
    TERNARY_MATMUL(name##_i32, Tile, int)         \
    TERNARY_MATMUL(name##_bf16, Tile, bf16)       \
    TERNARY_MATMUL(name##_f32, Tile, float)

// Clusters of 2 blocks, which take 64 rows of w by 256 tokens each; grid: a multiple of 2, at most the multiprocessors.
using Wide = Config<1, 256, 2>;
TERNARY_MATMULS(ternary_matmul_hopper_256, Wide)

// 64 rows of w by 128 tokens; grid: at most the multiprocessors.
using Narrow = Config<1, 128, 1>;
TERNARY_MATMULS(ternary_matmul_hopper_128, Narrow)
