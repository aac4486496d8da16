// Forward product of a BitLinear on Hopper: x (M, K) int8, w (N, K) ternary int8, residual and y (M, N) bf16;
// y = [residual +] float(x . w^T) * b(n) * x_scale(m), the integer sum exact, b(n) one of three weight scales.

#include <type_traits>

#include "gemm_hopper.cuh"

namespace {

constexpr int kTileM = 128;    // rows of x of a block's tile
constexpr int kTileK = 128;    // bytes of a row in one step over K: a swizzled row of shared memory
constexpr int kConsumers = 2;  // warpgroups that multiply, beside one that loads
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kGroupRows = 2048;  // rows of x that stay in L2 while the tiles of all columns pass
constexpr int kChunk = 64;        // columns that a warp brings through shared memory at a time
constexpr int kChunkBytes = 16 * kChunk * 2;

// Blocks of a cluster take tiles above one another, with the same rows of w, and each loads its share of these for all.
// kPingPong: the consumers take whole tiles in turns, so that one multiplies while the other stores;
// otherwise each takes half the rows of every tile.
template <int kTileN_, bool kPingPong_, int kCluster_>
struct Config {
    static constexpr int kTileN = kTileN_, kCluster = kCluster_;
    static constexpr bool kPingPong = kPingPong_;
    static constexpr int kXBytes = kTileM * kTileK;
    static constexpr int kStageBytes = kXBytes + kTileN * kTileK;
    static constexpr int kStages = (227 * 1024 - 128 - 8 * kChunkBytes) / kStageBytes;
    static constexpr int kConsumerRegisters = kPingPong && kTileN > 128 ? 240 : 232;
    static constexpr int kLoaderRegisters = 3 * 168 - 2 * kConsumerRegisters;
    static constexpr int kBlocksM = kPingPong ? 2 : 1;  // of 64 rows, per consumer
    static constexpr int kChunks = kTileN / kChunk;
    static constexpr int kAhead = kPingPong ? 1 : kChunks;  // chunks of the residual in registers
};

struct Tile {
    int m, n;
};

// The order of tiles: down the rows of a group, then over the columns, then the next group.
template <class C>
__device__ __forceinline__ Tile tile_at(int index, int M, int N, int rank) {
    constexpr int kRows = C::kCluster * kTileM, kGroup = kGroupRows / kRows;
    const int rows = (M + kRows - 1) / kRows, columns = (N + C::kTileN - 1) / C::kTileN;
    const int group = index / (kGroup * columns), rest = index - group * kGroup * columns;
    const int height = min(kGroup, rows - group * kGroup);
    return {(group * kGroup + rest % height) * kRows + rank * kTileM, rest / height * C::kTileN};
}

__device__ __forceinline__ void store_shared(uint32_t shared, const uint4& v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ uint4 load_global(const bf16* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_global(bf16* p, const uint4& v) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// Hides how an address comes about from the compiler, which would otherwise hold every address of a tile in registers.
__device__ __forceinline__ void hide(uint32_t& shared) { asm volatile("" : "+r"(shared)); }

template <class T>
__device__ __forceinline__ void advance(T*& p, int step) {
    p += step;
    asm volatile("" : "+l"(p));
}

// A warp has done with a stage: tells the block, or all blocks of the cluster, since each loads for the others.
template <class C>
__device__ __forceinline__ void release(uint64_t* empty, int lane) {
    if constexpr (C::kCluster > 1) {
        if (lane < C::kCluster) barrier_arrive_in(empty, lane);
    } else {
        if (lane == 0) barrier_arrive(empty);
    }
}

template <class C>
__device__ __forceinline__ void bit_linear(const CUtensorMap* x, const CUtensorMap* w, const float* x_scale,
                                           const float* w_scale, const bf16* residual, bf16* y, int M, int N, int K,
                                           int end0, int end1) {
    extern __shared__ __align__(1024) uint8_t dynamic_shared[];
    uint8_t* const stages = dynamic_shared;  // on a kilobyte, after which swizzling repeats
    uint8_t* const staging = stages + C::kStages * C::kStageBytes;
    uint64_t* const full = reinterpret_cast<uint64_t*>(staging + 4 * kConsumers * kChunkBytes);
    uint64_t* const empty = full + C::kStages;

    const int rank = C::kCluster > 1 ? static_cast<int>(cluster_rank()) : 0;
    if (threadIdx.x == 0) {
        constexpr int kReaders = (C::kPingPong ? 1 : kConsumers) * 4 * C::kCluster;
        for (int i = 0; i < C::kStages; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], kReaders);
        barrier_init_fence();
        prefetch_tensor_map(x);
        prefetch_tensor_map(w);
    }
    if constexpr (C::kCluster > 1)
        cluster_sync();
    else
        __syncthreads();

    constexpr int kRows = C::kCluster * kTileM;
    const int tiles = (M + kRows - 1) / kRows * ((N + C::kTileN - 1) / C::kTileN);
    const int first = blockIdx.x / C::kCluster, step = gridDim.x / C::kCluster;
    const int k_steps = (K + kTileK - 1) / kTileK;

    if (threadIdx.x < kWarpgroup) {  // the loading warpgroup, of which one thread works
        fewer_registers<C::kLoaderRegisters>();
        if (threadIdx.x == 0) {
            int stage = 0;
            uint32_t phase = 0;
            for (int index = first; index < tiles; index += step) {
                const Tile tile = tile_at<C>(index, M, N, rank);
                for (int k = 0; k < k_steps; ++k) {
                    uint8_t* const x_tile = stages + stage * C::kStageBytes;
                    uint8_t* const w_tile = x_tile + C::kXBytes;
                    barrier_wait(&empty[stage], phase ^ 1);
                    barrier_expect(&full[stage], C::kStageBytes);
                    copy_box_2d(x_tile, x, &full[stage], k * kTileK, tile.m);
                    if constexpr (C::kCluster > 1) {
                        constexpr int kShare = C::kTileN / C::kCluster;
                        copy_box_2d_multicast(w_tile + rank * kShare * kTileK, w, &full[stage], k * kTileK,
                                              tile.n + rank * kShare, (1 << C::kCluster) - 1);
                    } else {
                        copy_box_2d(w_tile, w, &full[stage], k * kTileK, tile.n);
                    }
                    if (++stage == C::kStages) stage = 0, phase ^= 1;
                }
            }
        }
    } else {
        more_registers<C::kConsumerRegisters>();
        const int consumer = threadIdx.x / kWarpgroup - 1, lane = threadIdx.x % kWarp;
        const int warp = threadIdx.x % kWarpgroup / kWarp;
        const float b0 = w_scale[0], b1 = end0 < N ? w_scale[1] : b0, b2 = end1 < N ? w_scale[2] : b1;
        const uint32_t first_x = descriptor_low(shared_address(stages) + (C::kPingPong ? 0 : consumer * 64 * kTileK));
        // A chunk (16, 64) lies swizzled in shared memory: written as fragments of 8 x 8, read as rows of 128 bytes.
        const uint32_t chunk_at = shared_address(staging) + (4 * consumer + warp) * kChunkBytes;
        uint32_t fragment_at = chunk_at + lane % 16 * 128 + ((lane / 16) ^ (lane % 8)) * 16;
        const int row_in_chunk = lane / 8, column = lane % 8 * 8;
        uint32_t row_at = chunk_at + row_in_chunk * 128 + ((lane % 8) ^ row_in_chunk) * 16;

        // The consumers multiply in turns: a phase of `full` must not end twice unseen by the one that waits for it.
        if (C::kPingPong && consumer == 1) barrier_pass(1, kConsumers * kWarpgroup);
        int turn = 0;
        for (int index = first; index < tiles; index += step, ++turn) {
            if (C::kPingPong && turn % 2 != consumer) continue;
            const uint32_t position = static_cast<uint32_t>(turn) * k_steps;
            int stage = position % C::kStages;
            uint32_t phase = position / C::kStages & 1;
            const Tile tile = tile_at<C>(index, M, N, rank);
            const int first_m = tile.m + (C::kPingPong ? 0 : 64 * consumer) + 16 * warp;

            float scale[C::kBlocksM][2];
#pragma unroll
            for (int i = 0; i < C::kBlocksM; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int m = first_m + 64 * i + 8 * half + lane / 4;
                    scale[i][half] = m < M ? x_scale[m] : 0.f;
                }

            const int64_t corner = static_cast<int64_t>(first_m + row_in_chunk) * N + tile.n + column;
            const int rows_left = M - first_m - row_in_chunk, columns_left = N - tile.n - column;
            // Where the next row of the residual is read and the next one of y is written, chunk after chunk.
            const bf16* from = residual + corner;
            bf16* to = y + corner;
            const auto step_of = [&](int chunk, int i) {
                return i < 3 ? 4 * N : chunk % C::kBlocksM < C::kBlocksM - 1 ? 52 * N : (52 - 64 * C::kBlocksM) * N;
            };
            const auto inside = [&](int chunk, int i) {
                return chunk % C::kBlocksM * 64 + 4 * i < rows_left && chunk / C::kBlocksM * kChunk < columns_left;
            };
            uint4 ahead[C::kAhead][4];
            const auto load_residual = [&](int chunk) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (inside(chunk, i))
                        ahead[chunk % C::kAhead][i] = load_global(from + chunk / C::kBlocksM * kChunk);
                    advance(from, step_of(chunk, i));
                }
            };
            const auto load_first = [&] {
                if (residual)
#pragma unroll
                    for (int chunk = 0; chunk < C::kAhead; ++chunk) load_residual(chunk);
            };
            if (!C::kPingPong) load_first();

            if constexpr (C::kPingPong) barrier_sync(1 + consumer, kConsumers * kWarpgroup);
            int sums[C::kBlocksM][C::kTileN / 2];
            int last = 0;
#pragma unroll 1
            for (int k = 0; k < k_steps; ++k) {
                const uint32_t a = first_x + stage * (C::kStageBytes / 16);
                const uint32_t b = a + (C::kXBytes - (C::kPingPong ? 0 : consumer * 64 * kTileK)) / 16;
                barrier_wait(&full[stage], phase);
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < kTileK / 32; ++i)
#pragma unroll
                    for (int block = 0; block < C::kBlocksM; ++block)
                        multiply_int8(sums[block], descriptor(a + 512 * block + 2 * i), descriptor(b + 2 * i),
                                      i == 0 ? k : 1);
                wgmma_commit();
                wgmma_wait<1>();
                if (k > 0) release<C>(&empty[last], lane);
                last = stage;
                if (++stage == C::kStages) stage = 0, phase ^= 1;
            }
            if constexpr (C::kPingPong) barrier_pass(2 - consumer, kConsumers * kWarpgroup);
            wgmma_wait<0>();
            release<C>(&empty[last], lane);
            if (C::kPingPong) load_first();

            const auto store_tile = [&](auto with_residual) {
                constexpr bool kResidual = decltype(with_residual)::value;
#pragma unroll
                for (int chunk = 0; chunk < C::kBlocksM * C::kChunks; ++chunk) {
                    const int block = chunk % C::kBlocksM, first_column = chunk / C::kBlocksM * kChunk;
                    hide(fragment_at), hide(row_at);
                    if constexpr (kResidual) {
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            store_shared((row_at ^ i % 2 * 64) + 512 * i, ahead[chunk % C::kAhead][i]);
                        if (chunk + C::kAhead < C::kBlocksM * C::kChunks) load_residual(chunk + C::kAhead);
                        __syncwarp();
                    }
#pragma unroll
                    for (int j = 0; j < kChunk / 8; j += 2) {  // 16 columns: two fragments wide, two high
                        const int n = tile.n + first_column + 8 * j;
                        const float b = n < end0 ? b0 : n < end1 ? b1 : b2;
                        uint32_t old[4], packed[4];
                        if constexpr (kResidual) load_matrix_x4(old, fragment_at ^ j * 16);
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const int* const sum = &sums[block][first_column / 2 + 4 * j + 2 * i];
                            const float s = scale[block][i % 2];
                            float low = __fmul_rn(__fmul_rn(static_cast<float>(sum[0]), b), s);
                            float high = __fmul_rn(__fmul_rn(static_cast<float>(sum[1]), b), s);
                            if constexpr (kResidual) {
                                low = __fadd_rn(__uint_as_float(old[i] << 16), low);
                                high = __fadd_rn(__uint_as_float(old[i] & 0xffff0000u), high);
                            }
                            packed[i] = pack_bf16(low, high);
                        }
                        store_matrix_x4(fragment_at ^ j * 16, packed[0], packed[1], packed[2], packed[3]);
                    }
                    __syncwarp();
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const uint4 v = load_shared((row_at ^ i % 2 * 64) + 512 * i);
                        if (inside(chunk, i)) store_global(to + first_column, v);
                        advance(to, step_of(chunk, i));
                    }
                    __syncwarp();
                }
            };
            if (residual)
                store_tile(std::true_type());
            else
                store_tile(std::false_type());
        }
    }
    if constexpr (C::kCluster > 1) cluster_sync();  // no block ends while another still arrives at its barriers
}

}  // namespace

// Both kernels: clusters of 2 blocks; grid: a multiple of 2, at most the multiprocessors; 384 threads; 227 KB of
// dynamic shared memory. Boxes are 128 bytes wide, swizzled by 128 bytes: of x 128 rows, of w as said below.
// y and residual 16-byte aligned; end0 and end1 multiples of 16; w_scale[1] and w_scale[2] are read only where end0 < N
// and end1 < N.

// Tiles of 128 x 256, of which each consumer takes half; boxes of w: 128 rows.
extern "C" __global__ void __launch_bounds__(kThreads, 1) __cluster_dims__(2, 1, 1)
bit_linear_hopper(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w, const float* x_scale,
                  const float* w_scale, const bf16* residual, bf16* y, int M, int N, int K, int end0, int end1) {
    bit_linear<Config<256, false, 2>>(&x, &w, x_scale, w_scale, residual, y, M, N, K, end0, end1);
}

// Tiles of 128 x 192, taken in turns: faster at K near 2048 without a residual; boxes of w: 96 rows.
extern "C" __global__ void __launch_bounds__(kThreads, 1) __cluster_dims__(2, 1, 1)
bit_linear_hopper_192(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w,
                      const float* x_scale, const float* w_scale, const bf16* residual, bf16* y, int M, int N, int K,
                      int end0, int end1) {
    bit_linear<Config<192, true, 2>>(&x, &w, x_scale, w_scale, residual, y, M, N, K, end0, end1);
}
