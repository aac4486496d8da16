// y = x . w^T on Hopper where y has few tiles: x (M, K) int8, w (N, K) ternary in packed tiles; y (M, N) the exact
// int32 sums, or these as float(sum) * w_scale[n] * x_scale[m] in bf16 or f32. The blocks of a cluster share a tile of
// y and split K; each sends the others their parts of its sums through distributed shared memory.

#include <type_traits>

#include "gemm_hopper.cuh"
#include "ternary_wgmma.cuh"

namespace {

constexpr int kConsumers = 2;  // warpgroups that multiply, beside one warp that loads
constexpr int kWarps = 4 * kConsumers, kThreads = (kWarps + 1) * kWarp;
constexpr int kPartRows = 32, kPartTokens = 8;  // of a part of a tile: what a warp sums up and stores at a time
constexpr int kPartBytes = kPartRows * kPartTokens * 4;
constexpr int kMostBlocks = 8;  // of a cluster

// A tile of y: kTokens_ tokens by kRows_ rows of w. The consumers take 64 rows each or, where a tile has no more, the
// same rows and every other stage (kKSplit = 2).
template <int kTokens_, int kRows_>
struct Config {
    static constexpr int kTokens = kTokens_, kRows = kRows_;
    static constexpr int kRowGroups = kRows / 64, kKSplit = kConsumers / kRowGroups;
    static constexpr int kResident = kTokens < 128 ? 2 : 1;  // blocks on a multiprocessor, as registers allow
    static constexpr int kChunks = kTokens < 64 ? 2 : 1;     // of 128 columns in a stage
    static constexpr int kXBytes = kTokens * kTileColumns, kWBytes = kRows / kTileRows * kTileBytes;  // of a chunk
    static constexpr int kStageBytes = kChunks * (kXBytes + kWBytes);
    static constexpr int kParts = kRows / kPartRows * (kTokens / kPartTokens);
    static constexpr int kReceivedBytes = (kParts + kMostBlocks - 2) * kPartBytes;  // for any number of blocks
    static constexpr int kSmallBytes = 2048;                                        // barriers and scales
    static constexpr int kSharedBytes = (kResident == 1 ? 227 : 113) * 1024;
    // A multiple of kKSplit: a phase of `full` must not end twice unseen by the warpgroup that waits for it.
    static constexpr int kStages = (kSharedBytes - kSmallBytes - kReceivedBytes) / kStageBytes / kKSplit * kKSplit;
    static_assert(8 * (2 * kStages + 2) + 4 * (kTokens + kRows) <= kSmallBytes);
    static_assert(kKSplit == 1 || kRows * kTokens * 4 <= kStages * kStageBytes);
};

__device__ __forceinline__ uint32_t cluster_blocks() {
    uint32_t blocks;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return blocks;
}

__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// What block `rank` of the cluster has at the same place of its shared memory.
__device__ __forceinline__ uint32_t address_in(uint32_t shared, uint32_t rank) {
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
    return remote;
}

// Stores to a block of the cluster; its `barrier` counts the 16 bytes when they are there.
__device__ __forceinline__ void send(uint32_t address, const int (&v)[4], uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, const int (&v)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
}

// As barrier_wait, for what other blocks of the cluster did.
__device__ __forceinline__ void barrier_wait_cluster(uint64_t* barrier, uint32_t phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again%=:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again%=;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(phase)
        : "memory");
}

// An 8 x 8 matrix of 16-bit values, two of a row in a lane: transposed.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

template <class Out>
__device__ __forceinline__ Out scaled(int sum, float w_scale, float x_scale) {
    if constexpr (std::is_same_v<Out, int>)
        return sum >> kSumShift;
    else
        return static_cast<Out>(__fmul_rn(__fmul_rn(static_cast<float>(sum >> kSumShift), w_scale), x_scale));
}

// 8 tokens by 32 rows of w, as two wgmma of 16 rows each give them to the lanes of a warp: to y (8, 32) from token m
// and column n on.
template <class Out>
__device__ __forceinline__ void store_part(const int (&sums)[2][4], const float* x_scale, const float* w_scale, Out* y,
                                           int M, int N, int m, int n) {
    const int lane = threadIdx.x % kWarp, row = lane / 4, pair = lane % 4 * 2;
    Out v[4][2];  // rows 8 i + row, tokens pair + j
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            if constexpr (std::is_same_v<Out, int>)
                v[i][j] = scaled<Out>(sums[i / 2][i % 2 * 2 + j], 0.f, 0.f);
            else
                v[i][j] = scaled<Out>(sums[i / 2][i % 2 * 2 + j], w_scale[8 * i + row], x_scale[pair + j]);
        }
    if (sizeof(Out) == 2 && N % 8 == 0) {  // a lane: one token, eight rows
        uint32_t out[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = transposed(reinterpret_cast<const uint32_t&>(v[i]));
        transpose_quad(out);
        if (m + row < M && n + pair * 4 < N)
            *reinterpret_cast<uint4*>(y + static_cast<int64_t>(m + row) * N + n + pair * 4) =
                make_uint4(out[0], out[1], out[2], out[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j)
                if (m + pair + j < M && n + 8 * i + row < N)
                    y[static_cast<int64_t>(m + pair + j) * N + n + 8 * i + row] = v[i][j];
    }
}

template <class C, class Out>
__device__ __forceinline__ void multiply_tile(const CUtensorMap* x, const CUtensorMap* w, const float* x_scale,
                                              const float* w_scale, Out* y, int M, int N, int K) {
    constexpr bool kScaled = !std::is_same_v<Out, int>;
    extern __shared__ __align__(1024) uint8_t stages[];  // on a kilobyte, after which swizzling repeats
    uint8_t* const sums_received = stages + C::kStages * C::kStageBytes;
    uint64_t* const full = reinterpret_cast<uint64_t*>(sums_received + C::kReceivedBytes);
    uint64_t* const empty = full + C::kStages;
    uint64_t* const received = empty + C::kStages;  // the sums, and the scales
    float* const x_scales = reinterpret_cast<float*>(received + 2);
    float* const w_scales = x_scales + C::kTokens;
    const int blocks = cluster_blocks(), rank = cluster_rank();
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (threadIdx.x == 0) {
        for (int i = 0; i < C::kStages; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], 4 * C::kRowGroups);
        barrier_init(received, kConsumers * kWarpgroup + 1);
        barrier_init_fence();
    }
    __syncthreads();
    cluster_arrive();

    // The last tile of tokens is moved back to end with the last token, since boxes that reach beyond x arrive slowly:
    // two blocks then write the same values to some places.
    const int first_m = min(static_cast<int>(blockIdx.x) / blocks * C::kTokens, max(M - C::kTokens, 0));
    const int first_n = blockIdx.y * C::kRows;
    const int parts = min(C::kTokens, M - first_m + kPartTokens - 1) / kPartTokens * (C::kRows / kPartRows);
    const int all_steps = (K + C::kChunks * kTileColumns - 1) / (C::kChunks * kTileColumns);
    const int first_step = all_steps * rank / blocks, steps = all_steps * (rank + 1) / blocks - first_step;

    if (warp == kWarps) {  // the loading warp: weights and their scales before the kernel that writes x has ended
        const auto load_w = [&](int step, int stage) {
            copy_box_3d(stages + stage * C::kStageBytes + C::kChunks * C::kXBytes, w, &full[stage], 0,
                        (first_step + step) * C::kChunks * 4, first_n / kTileRows);
        };
        const auto load_x = [&](int step, int stage) {
            barrier_expect(&full[stage], C::kStageBytes);
#pragma unroll
            for (int i = 0; i < C::kChunks; ++i)
                copy_box_2d(stages + stage * C::kStageBytes + i * C::kXBytes, x, &full[stage],
                            ((first_step + step) * C::kChunks + i) * kTileColumns, first_m);
        };
        float w_held[C::kRows / kWarp], x_held[C::kTokens / kWarp];
        const int ahead = min(steps, C::kStages);
        if (lane == 0)
            for (int step = 0; step < ahead; ++step) load_w(step, step);
        if constexpr (kScaled)
#pragma unroll
            for (int i = 0; i < C::kRows / kWarp; ++i) w_held[i] = w_scale[min(first_n + i * kWarp + lane, N - 1)];
        wait_for_earlier_kernels();
        if (lane == 0)
            for (int step = 0; step < ahead; ++step) load_x(step, step);
        if constexpr (kScaled)
#pragma unroll
            for (int i = 0; i < C::kTokens / kWarp; ++i) x_held[i] = x_scale[min(first_m + i * kWarp + lane, M - 1)];
        if (lane == 0) {
            int stage = 0;
            uint32_t phase = 0;
            for (int step = ahead; step < steps; ++step) {
                barrier_wait(&empty[stage], phase);
                load_w(step, stage);
                load_x(step, stage);
                if (++stage == C::kStages) stage = 0, phase ^= 1;
            }
        }
        __syncwarp();
        let_later_kernels_start();
        if constexpr (kScaled) {
#pragma unroll
            for (int i = 0; i < C::kRows / kWarp; ++i) w_scales[i * kWarp + lane] = w_held[i];
#pragma unroll
            for (int i = 0; i < C::kTokens / kWarp; ++i) x_scales[i * kWarp + lane] = x_held[i];
        }
        __syncwarp();
        if (lane == 0) barrier_expect(received, (parts - rank + blocks - 1) / blocks * (blocks - 1) * kPartBytes);
        cluster_wait();
        return;
    }

    const int group = warp / 4, row_group = group % C::kRowGroups, k_part = group / C::kRowGroups;
    const uint32_t first_x = descriptor_low(shared_address(stages));
    const int tile = 4 * row_group + warp % 4;  // of 16 rows
    const uint32_t words = shared_address(stages) + C::kChunks * C::kXBytes + tile * C::kChunks * kTileBytes;
    const auto load_words = [&](int stage, int chunk) {
        const int line = lane / 8 + 4 * (tile * C::kChunks + chunk);  // of 128 bytes, swizzled
        return load_shared(words + stage * C::kStageBytes + chunk * kTileBytes + lane / 8 * 128 +
                           (lane ^ line) % 8 * 16);
    };
    int sums[C::kTokens / 2] = {};
    uint32_t even[2][4], odd[2][4];  // of the first 64 columns of a chunk, of the last 64: one is unpacked meanwhile
    int stage = k_part, before = 0;
    uint32_t phase = 0;
#pragma unroll 1
    for (int step = k_part; step < steps; step += C::kKSplit) {
        barrier_wait(&full[stage], phase);
#pragma unroll
        for (int i = 0; i < C::kChunks; ++i) {
            const uint4 packed = load_words(stage, i);
            const uint32_t b = first_x + (stage * C::kStageBytes + i * C::kXBytes) / 16;
            wgmma_wait<1>();
            unpack(even[0], packed.x), unpack(even[1], packed.y);
            wgmma_fence();
            multiply_codes(sums, even[0], descriptor(b), 1), multiply_codes(sums, even[1], descriptor(b + 2), 1);
            wgmma_commit();
            wgmma_wait<1>();
            if (i == 0 && step != k_part && lane == 0) barrier_arrive(&empty[before]);
            unpack(odd[0], packed.z), unpack(odd[1], packed.w);
            wgmma_fence();
            multiply_codes(sums, odd[0], descriptor(b + 4), 1), multiply_codes(sums, odd[1], descriptor(b + 6), 1);
            wgmma_commit();
        }
        before = stage, stage += C::kKSplit;
        if (stage >= C::kStages) stage -= C::kStages, phase ^= 1;
    }
    wgmma_wait<0>();

    // Consumers of the same rows share the tokens between them: each gives the other its sums of half of them.
    constexpr int kTokens = C::kTokens / C::kKSplit, kSums = kTokens / 2;
    if constexpr (C::kKSplit == 2) {
        int4* const exchange = reinterpret_cast<int4*>(stages);
        barrier_sync(1, kConsumers * kWarpgroup);  // no stage is read any more
#pragma unroll
        for (int j = 0; j < kSums; j += 4) {
            const int* const give = &sums[j];
            exchange[j / 4 * kConsumers * kWarpgroup + threadIdx.x] =
                make_int4(k_part ? give[0] : give[kSums], k_part ? give[1] : give[kSums + 1],
                          k_part ? give[2] : give[kSums + 2], k_part ? give[3] : give[kSums + 3]);
        }
        barrier_sync(1, kConsumers * kWarpgroup);
#pragma unroll
        for (int j = 0; j < kSums; j += 4) {
            const int4 got = exchange[j / 4 * kConsumers * kWarpgroup + (threadIdx.x ^ kWarpgroup)];
            int* const own = &sums[j];
            own[0] = (k_part ? own[kSums] : own[0]) + got.x, own[1] = (k_part ? own[kSums + 1] : own[1]) + got.y;
            own[2] = (k_part ? own[kSums + 2] : own[2]) + got.z, own[3] = (k_part ? own[kSums + 3] : own[3]) + got.w;
        }
    }

    // Part i of the tile is summed up by block i % blocks, to which all blocks send theirs.
    cluster_wait();
    {
        constexpr int kStep = C::kRows / kPartRows;  // parts of the same tokens
        const int first = k_part * (kTokens / kPartTokens) * kStep + row_group * 2 + warp % 4 / 2;
        int to = first % blocks, slot = first / blocks;
        const uint32_t place =
            shared_address(sums_received) + rank * kPartBytes + warp % 2 * (kPartBytes / 2) + lane * 16;
#pragma unroll
        for (int j = 0; j < kTokens / kPartTokens; ++j) {
            const int (&v)[4] = reinterpret_cast<const int (&)[4]>(sums[4 * j]);
            const uint32_t at = place + slot * blocks * kPartBytes;
            if (to == rank)
                store_shared(at, v);
            else if (first + j * kStep < parts)
                send(address_in(at, to), v, address_in(shared_address(received), to));
            to += kStep % blocks, slot += kStep / blocks;
            if (to >= blocks) to -= blocks, ++slot;
        }
    }
    barrier_arrive(received);
    barrier_wait_cluster(received, 0);
#pragma unroll 1
    for (int slot = warp; slot * blocks + rank < parts; slot += kWarps) {
        const int part = slot * blocks + rank;
        const uint32_t from = shared_address(sums_received) + slot * blocks * kPartBytes + lane * 16;
        int total[2][4] = {};
#pragma unroll 4
        for (int block = 0; block < blocks; ++block)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint4 v = load_shared(from + (2 * block + half) * (kPartBytes / 2));
                total[half][0] += v.x, total[half][1] += v.y, total[half][2] += v.z, total[half][3] += v.w;
            }
        const int row = part % (C::kRows / kPartRows) * kPartRows, token = part / (C::kRows / kPartRows) * kPartTokens;
        store_part(total, x_scales + token, w_scales + row, y, M, N, first_m + token, first_n + row);
    }
}

}  // namespace

// All kernels: grid: (S * ceil(M / tokens of a tile), ceil(N / rows of a tile)) in clusters of (S, 1, 1), S from 1 to 8
// set at the launch; 288 threads. x (M, K) in boxes of 128 bytes by the tokens of a tile; w as lines of 128 bytes, of
// which a tile of 16 x 128 has 4: (128, 4 * ceil(K / 128), ceil(N / 16)), innermost first, in boxes of (128, 4 * chunks
// of a stage, rows of a tile / 16); both swizzled by 128 bytes. y 16-byte aligned; x_scale and w_scale are not read by
// _i32. Launches may use programmatic serialization: w and w_scale are then read early.

#define TERNARY_MATMUL(name, Tile, type)                                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads, Tile::kResident)                                      \
    name(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w, const float* x_scale,     \
         const float* w_scale, type* y, int M, int N, int K) {                                                   \
        multiply_tile<Tile>(&x, &w, x_scale, w_scale, y, M, N, K);                                               \
    }
#define TERNARY_MATMULS(tile, Tile)                                      \
    TERNARY_MATMUL(ternary_matmul_split_##tile##_i32, Tile, int)   \
    TERNARY_MATMUL(ternary_matmul_split_##tile##_bf16, Tile, bf16) \
    TERNARY_MATMUL(ternary_matmul_split_##tile##_f32, Tile, float)

// Tiles of 32 tokens: 2 chunks in a stage. Dynamic shared memory: 113 KB.
using Tile32x64 = Config<32, 64>;
TERNARY_MATMULS(32x64, Tile32x64)
using Tile32x128 = Config<32, 128>;
TERNARY_MATMULS(32x128, Tile32x128)

// Tiles of 64 tokens: 1 chunk in a stage. Dynamic shared memory: 113 KB.
using Tile64x64 = Config<64, 64>;
TERNARY_MATMULS(64x64, Tile64x64)
using Tile64x128 = Config<64, 128>;
TERNARY_MATMULS(64x128, Tile64x128)

// Tiles of 128 tokens: 1 chunk in a stage. Dynamic shared memory: 227 KB.
using Tile128x128 = Config<128, 128>;
TERNARY_MATMULS(128x128, Tile128x128)
