// y = x . w^T for few tokens: int8 x (M, K), ternary tiles w (N, K), y (M, N) i32, bf16 or f32; K % 32 == 0, K < 2^18.

#include <type_traits>

#include "ternary_tiles.cuh"

// A block multiplies kTiles row tiles and all of K. Its warps take runs of kSteps chunks of K in turn; each lane loads
// its 16 bytes of a tile straight to registers, kSteps * kTiles of them before anything else, and the next one as soon
// as one is used. x goes through a warp's own part of shared memory: no warp waits for another until the sums meet.
namespace {

constexpr int kTileLoads = kTileBytes / 16;  // one a lane
constexpr int kSteps = 2;                    // chunks in a run
constexpr unsigned kManyBlocks = 256;        // from so many on later kernels are let start later; fitted to an H200

// 16 bytes that are used once; undefined when not `valid`.
__device__ __forceinline__ uint4 load_once(const uint4* p, bool valid) {
    uint4 v;
    asm volatile(
        "{\n"
        ".reg .pred valid;\n"
        "setp.ne.b32 valid, %5, 0;\n"
        "@valid ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p), "r"(static_cast<int>(valid)));
    return v;
}

__device__ __forceinline__ void store_shared(uint32_t shared, uint32_t value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t shared, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void add_shared(uint32_t shared, int value) {
    asm volatile("red.shared.add.s32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}

__device__ __forceinline__ void copy_async4(uint32_t shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}

// 16 bytes from global to shared memory; nothing when not `valid`.
__device__ __forceinline__ void copy_async16_if(uint32_t shared, const void* global, bool valid) {
    asm volatile(
        "{\n"
        ".reg .pred valid;\n"
        "setp.ne.b32 valid, %2, 0;\n"
        "@valid cp.async.cg.shared.global [%0], [%1], 16;\n"
        "}" ::"r"(shared), "l"(global), "r"(static_cast<int>(valid))
        : "memory");
}

template <typename Out>
__device__ __forceinline__ Out scaled(int sum, float w_scale, float x_scale) {
    if constexpr (std::is_same_v<Out, int>) {
        return sum;
    } else {
        const float value = __fmul_rn(__fmul_rn(static_cast<float>(sum), w_scale), x_scale);
        if constexpr (std::is_same_v<Out, float>) return value;
        else return __float2bfloat16_rn(value);
    }
}

// The weights of a warp: chunks `chunk` .. `chunk` + kSteps - 1 of the block's row tiles. Those past the end are
// undefined; x is zero there.
template <int kTiles, typename Index>
struct Weights {
    const uint4* source[kTiles];
    uint4 words[kSteps][kTiles];
    Index chunk, chunks;

    __device__ __forceinline__ Weights(const uint4* w, Index first_tile, Index tiles, Index chunks, Index lane,
                                       Index warp)
        : chunk(warp * kSteps), chunks(chunks) {
        source[0] = w + (static_cast<int64_t>(first_tile) * chunks + chunk) * kTileLoads + lane;
#pragma unroll
        for (Index r = 1; r < kTiles; ++r)  // tiles past the end repeat the last one
            source[r] = source[0] + min(r, tiles - 1 - first_tile) * chunks * kTileLoads;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) load(s);
    }

    __device__ __forceinline__ void load(int s) {
#pragma unroll
        for (int r = 0; r < kTiles; ++r) words[s][r] = load_once(source[r] + s * kTileLoads, chunk + s < chunks);
    }

    __device__ __forceinline__ void advance(Index by) {
        chunk += by;
#pragma unroll
        for (int r = 0; r < kTiles; ++r) source[r] += by * kTileLoads;
    }

    __device__ __forceinline__ uint32_t word(int s, int r, int i) const {
        const uint4& v = words[s][r];
        return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
    }
};

// One token. The eight columns of an mma would be the same, so even columns get the lower 16 of the 32 k and odd ones
// the upper 16, with zeros elsewhere: then each of the four fragment registers has its own sums, and the codes need no
// shifts. They are taken as code + 2 (1 to 3, times 1, 4, 16, 64); twice the sum of x is subtracted at the end. All
// modulo 2^32.
template <int kTiles, typename Out>
__device__ __forceinline__ void multiply_token(const int8_t* x, const uint4* w, const float* x_scale,
                                               const float* w_scale, Out* y, int N, int K) {
    constexpr int kRows = kTileRows * kTiles;
    constexpr int kStage = 2 * kTileColumns;  // of a chunk of x: 16 bytes, 16 zeros, and so on
    constexpr int kChains = kTiles == 1 ? 2 : 1;
    constexpr bool kScaled = !std::is_same_v<Out, int>;
    __shared__ uint32_t sums[kRows];
    extern __shared__ __align__(128) unsigned char stages[];  // [warps][kSteps][kStage]

    const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp, stride = blockDim.x / kWarp * kSteps;
    const int first_tile = blockIdx.y * kTiles, first_n = first_tile * kTileRows;
    const int tiles = (N + kTileRows - 1) / kTileRows, chunks = (K + kTileColumns - 1) / kTileColumns;
    Weights<kTiles, int> weights(w, first_tile, tiles, chunks, lane, warp);
    let_later_kernels_start();

    const bool has_output = thread < kRows && first_n + thread < N;
    float w_scale_value = 0.f, x_scale_value = 0.f;
    if constexpr (kScaled)
        if (has_output) w_scale_value = __ldg(w_scale + first_n + thread);
    if (thread < kRows) sums[thread] = 0;
    const uint32_t stage = shared_address(stages) + warp * (kSteps * kStage);
    const uint32_t x_to = stage + lane / 4 * 32 + lane % 4 * 4;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) store_shared(x_to + 16 + s * kStage, 0);
    __syncthreads();
    wait_for_earlier_kernels();

    const int64_t m = blockIdx.x;
    int column = weights.chunk * kTileColumns + lane * 4;
    const int8_t* x_source = x + m * K + column;
    uint32_t x_word[kSteps];
    auto load_x = [&](int s) {
        x_word[s] = column + s * kTileColumns < K ? *reinterpret_cast<const uint32_t*>(x_source + s * kTileColumns) : 0;
    };
#pragma unroll
    for (int s = 0; s < kSteps; ++s) load_x(s);
    if constexpr (kScaled) x_scale_value = x_scale[m];

    // ldmatrix: lane i gives row i % 8 (a column of the product) of the 16 bytes i / 8 of x, or the zeros behind them.
    const uint32_t x_row = stage + lane / 8 * 32 + ((lane ^ lane / 8) & 1) * 16;
    int acc[kChains][kTiles][4] = {}, x_sum = 0;
    while (true) {
        const bool more = weights.chunk + stride < chunks;
        weights.advance(stride), column += stride * kTileColumns, x_source += stride * kTileColumns;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            store_shared(x_to + s * kStage, x_word[s]);
            x_sum = __dp4a(static_cast<int>(x_word[s]), 0x01010101, x_sum);
            if (more) load_x(s);
        }
        __syncwarp();
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            uint32_t b[2][4];
            load_matrix_x4(b[0], x_row + s * kStage);
            load_matrix_x4(b[1], x_row + s * kStage + kStage / 2);
#pragma unroll
            for (int r = 0; r < kTiles; ++r)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t word = weights.word(s, r, i) ^ 0xaaaaaaaau;
                    const uint32_t a[4] = {word & 0x03030303u, word & 0x0c0c0c0cu, word & 0x30303030u,
                                           word & 0xc0c0c0c0u};
                    mma_uint8_int8(acc[i % kChains][r], a, b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
                }
            if (more) weights.load(s);
        }
        if (!more) break;
        __syncwarp();
    }

    // 64 times the sums of rows lane / 4 (scales 1 and 16) and lane / 4 + 8 (4 and 64), the same in four lanes.
    const uint32_t excess = __reduce_add_sync(0xffffffffu, static_cast<uint32_t>(x_sum)) * 128;
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
        uint32_t d[4] = {};
#pragma unroll
        for (int i = 0; i < 4 * kChains; ++i) d[i % 4] += static_cast<uint32_t>(acc[i / 4][r][i % 4]);
        const uint32_t value = lane % 2 == 0 ? 64 * d[0] + 4 * d[1] : 16 * d[2] + d[3];
        if (lane / 2 % 2 == r % 2) atomicAdd(&sums[kTileRows * r + lane / 4 + lane % 2 * 8], value - excess);
    }
    __syncthreads();
    if (has_output)
        y[m * N + first_n + thread] = scaled<Out>(static_cast<int>(sums[thread]) >> kSumShift, w_scale_value, x_scale_value);
}

// kTokens (8 or 16) tokens of x as the columns of the product, codes as bytes 64, 0, -64. The few loads and products of
// a warp are soon done: the instructions around them count, so indices are unsigned and copies predicated.
// kStored: the warps store their sums instead of adding them in shared memory, better for many blocks of few warps.
template <int kTokens, int kTiles, bool kStored, typename Out>
__device__ __forceinline__ void multiply_tokens(const int8_t* x, const uint4* w, const float* x_scale,
                                                const float* w_scale, Out* y, unsigned M, unsigned N, unsigned K) {
    constexpr unsigned kRows = kTileRows * kTiles;
    constexpr unsigned kPitch = kRows + 4;  // the lanes of a warp add to 32 different banks
    constexpr int kGroups = kTokens / 8;
    constexpr int kChains = kTokens == 16 && kTiles == 1 ? 2 : 1;
    constexpr unsigned kStage = kTokens * kTileColumns;
    constexpr int kFragments = kTiles * kGroups;
    constexpr unsigned kFragmentBytes = 16 * kWarp;
    static_assert(kFragments * kFragmentBytes <= kSteps * kStage);
    constexpr bool kScaled = !std::is_same_v<Out, int>;
    __shared__ __align__(16) int sums[kStored ? 4 : kTokens * kPitch];
    __shared__ float w_scales[kRows], x_scales[kTokens];
    extern __shared__ __align__(128) unsigned char stages[];  // [warps][kSteps][kTokens][kTileColumns], swizzled

    const unsigned thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
    const unsigned stride = blockDim.x / kWarp * kSteps;
    const unsigned first_tile = blockIdx.y * kTiles, first_n = first_tile * kTileRows;
    const unsigned tiles = (N + kTileRows - 1) / kTileRows, chunks = (K + kTileColumns - 1) / kTileColumns;
    Weights<kTiles, unsigned> weights(w, first_tile, tiles, chunks, lane, warp);

    if constexpr (kScaled)
        for (unsigned i = thread; i < kRows && first_n + i < N; i += blockDim.x)
            copy_async4(shared_address(w_scales + i), w_scale + first_n + i);
    if constexpr (!kStored) {
        for (unsigned i = thread; i < kTokens * kPitch / 4; i += blockDim.x)
            store_shared(shared_address(sums) + i * 16, make_uint4(0, 0, 0, 0));
        __syncthreads();
    }
    wait_for_earlier_kernels();
    const bool many_blocks = kStored || gridDim.y >= kManyBlocks;
    if (!many_blocks) let_later_kernels_start();  // not earlier: several kernels under way get in each other's way

    // Tokens past the end are not copied: their columns of the product are not stored. Nor are columns past K: weights
    // are 0 there.
    const unsigned first_token = blockIdx.x * kTokens, tokens = M - first_token;
    const uint32_t stage = shared_address(stages) + warp * (kSteps * kStage);
    const unsigned token = lane / 8, byte = lane % 8 * 16;  // a warp copies four tokens at a time
    const uint32_t x_to[2] = {stage + token * kTileColumns + (byte ^ token * 16),
                              stage + (token + 4) * kTileColumns + (byte ^ (token + 4) * 16)};
    unsigned column = weights.chunk * kTileColumns + byte;
    const int8_t* x_source[kTokens / 4];
#pragma unroll
    for (int t = 0; t < kTokens / 4; ++t)
        x_source[t] = x + (static_cast<uint64_t>(first_token + token + 4 * t) * K + column);
    auto load_x = [&](int s) {
        const bool valid = column + s * kTileColumns < K;
#pragma unroll
        for (int t = 0; t < kTokens / 4; ++t)
            copy_async16_if(x_to[t % 2] + t / 2 * (8 * kTileColumns) + s * kStage, x_source[t] + s * kTileColumns,
                            valid && token + 4 * t < tokens);
        copy_async_commit();
    };
    if constexpr (kScaled)
        if (thread < min(tokens, unsigned{kTokens}))
            copy_async4(shared_address(x_scales + thread), x_scale + first_token + thread);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) load_x(s);
    if (many_blocks) let_later_kernels_start();

    // ldmatrix: lane i gives row i % 8 (a token) of the 16 bytes i / 8.
    const uint32_t x_row = stage + lane % 8 * kTileColumns + (lane / 8 ^ lane % 8) * 16;
    int acc[kChains][kTiles][kGroups][4] = {};
    bool more = weights.chunk < chunks;
    while (more) {
        const unsigned left = chunks - weights.chunk;
        more = stride < left;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            copy_async_wait<kSteps - 1>();
            __syncwarp();
            if (s == 0 || s < left) {
                uint32_t b[kGroups][2][4];
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    load_matrix_x4(b[g][0], x_row + s * kStage + g * (8 * kTileColumns));
                    load_matrix_x4(b[g][1], (x_row ^ 64) + s * kStage + g * (8 * kTileColumns));
                }
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int r = 0; r < kTiles; ++r) {
                        const uint32_t word = weights.word(s, r, i);
                        const uint32_t a[4] = {unpack_codes(word, 0), unpack_codes(word, 1), unpack_codes(word, 2),
                                               unpack_codes(word, 3)};
#pragma unroll
                        for (int g = 0; g < kGroups; ++g)
                            mma_int8(acc[i % kChains][r][g], a, b[g][i / 2][i % 2 * 2], b[g][i / 2][i % 2 * 2 + 1]);
                    }
            }
            if (!more) {
                copy_async_commit();  // keeps the count of groups
                continue;
            }
            if (s == 0) {
                weights.advance(stride), column += stride * kTileColumns;
#pragma unroll
                for (int t = 0; t < kTokens / 4; ++t) x_source[t] += stride * kTileColumns;
            }
            weights.load(s);
            __syncwarp();
            load_x(s);
        }
    }

    if constexpr (kChains == 2)
#pragma unroll
        for (int g = 0; g < kGroups; ++g)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[0][0][g][i] += acc[1][0][g][i];
    const auto store = [&](unsigned t, unsigned row, int sum) {
        if (t < tokens && first_n + row < N)
            y[static_cast<uint64_t>(first_token + t) * N + (first_n + row)] =
                scaled<Out>(sum >> kSumShift, kScaled ? w_scales[row] : 0.f, kScaled ? x_scales[t] : 0.f);
    };
    if constexpr (kStored) {
        __syncwarp();
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
            const int(&v)[4] = acc[0][f / kGroups][f % kGroups];
            store_shared(stage + f * kFragmentBytes + lane * 16, make_uint4(v[0], v[1], v[2], v[3]));
        }
        copy_async_wait<0>();
        __syncthreads();
        const unsigned warps = blockDim.x / kWarp;
#pragma unroll 1
        for (unsigned f = warp; f < kFragments; f += warps) {
            const uint32_t from = shared_address(stages) + f * kFragmentBytes + lane * 16;
            int sum[4] = {};
#pragma unroll 4
            for (unsigned k = 0; k < warps; ++k) {
                const uint4 v = load_shared(from + k * (kSteps * kStage));
                sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
                store(f % kGroups * 8 + lane % 4 * 2 + i % 2, f / kGroups * kTileRows + lane / 4 + i / 2 * 8, sum[i]);
        }
    } else {
        const uint32_t to = shared_address(sums) + (lane % 4 * 2 * kPitch + lane / 4) * 4;
#pragma unroll
        for (int f = 0; f < kFragments; ++f)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                add_shared(to + ((f % kGroups * 8 + i % 2) * kPitch + f / kGroups * kTileRows + i / 2 * 8) * 4,
                           acc[0][f / kGroups][f % kGroups][i]);
        copy_async_wait<0>();
        __syncthreads();
#pragma unroll 1
        for (unsigned i = thread; i < min(tokens, unsigned{kTokens}) * kRows; i += blockDim.x)
            store(i / kRows, i % kRows, sums[i / kRows * kPitch + i % kRows]);
    }
}

}  // namespace

// Grid: (ceil(M / TOKENS), ceil(N / (16 TILES))) blocks of 32 W threads, 32 W <= launch bounds; one token:
// 16 TILES <= 32 W. Dynamic shared memory: W * 256 * max(2, TOKENS) bytes. Launches may use programmatic
// serialization (sm_90).

#define TERNARY_MATMUL(name, threads, type, product)                                                                 \
    extern "C" __global__ void __launch_bounds__(threads)                                                            \
    name(const int8_t* x, const uint4* w, const float* x_scale, const float* w_scale, type* y,                       \
         [[maybe_unused]] int M, int N, int K) {                                                                     \
        product;                                                                                                     \
    }
#define TERNARY_MATMULS(name, threads, product)         \
    TERNARY_MATMUL(name##_i32, threads, int, product)   \
    TERNARY_MATMUL(name##_bf16, threads, bf16, product) \
    TERNARY_MATMUL(name##_f32, threads, float, product)
#define ONE_TOKEN(tiles)                                        \
    TERNARY_MATMULS(ternary_matmul_small_1_##tiles, 1024,       \
                    multiply_token<tiles>(x, w, x_scale, w_scale, y, N, K))
#define FEW_TOKENS(name, tokens, tiles, stored, threads)  \
    TERNARY_MATMULS(ternary_matmul_small_##name, threads, \
                    (multiply_tokens<tokens, tiles, stored>(x, w, x_scale, w_scale, y, M, N, K)))

// Names: ternary_matmul_small_TOKENS_TILES_OUTPUT.
ONE_TOKEN(1)
ONE_TOKEN(2)
FEW_TOKENS(8_1, 8, 1, false, 1024)
FEW_TOKENS(8_2, 8, 2, false, 1024)
FEW_TOKENS(16_1, 16, 1, false, 768)
FEW_TOKENS(16_2, 16, 2, false, 640)
FEW_TOKENS(16_2_stored, 16, 2, true, 640)
FEW_TOKENS(16_4, 16, 4, false, 512)
