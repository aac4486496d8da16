// BitLinear of one token with the norm before it: x (K,) f32, norm (K,) f32, ternary tiles w (N, K), w_scale (N,) -> y
// f32 = w . codes of rms_norm(x), scaled; written, added to y (the residual), or gated. K % 4 == 0, K <= 16384.

#include "normed_row.cuh"
#include "ternary_tiles.cuh"

// A block multiplies kTiles row tiles and all of K. It normalises and quantises the token for itself: that takes less
// time than one more kernel. Before it waits for the token it has weights under way: each lane 16 bytes of kDepth
// chunks a tile. The codes lie in shared memory as the tensor cores take them.
namespace {

constexpr int kTileLoads = kTileBytes / 16;      // one a lane
constexpr int kDepth = 2;                        // chunks that a warp has under way
constexpr int kChunkCodes = 2 * kTileColumns;    // of a chunk: 16 codes, 16 zeros, and so on

// Where a warp's weights come from: chunks warp, warp + warps, ... of the block's tiles.
template <int kTiles>
struct Weights {
    const uint4* source[kTiles];
    uint4 words[kDepth][kTiles];
    int chunks;

    __device__ __forceinline__ void load(int depth, int chunk) {
#pragma unroll
        for (int r = 0; r < kTiles; ++r)
            if (chunk < chunks) words[depth][r] = load_streamed(source[r] + chunk * kTileLoads);
    }
};

// Codes of the token, and their sum, to shared memory; the scale.
__device__ __forceinline__ float quantize(const float* x, const float4 (&weight)[kQuads], unsigned char* codes,
                                          int* code_sum, int K, float eps) {
    float4 row[kQuads];
    load_row(row, K, [&](int quad) { return __ldcg(reinterpret_cast<const float4*>(x) + quad); });
    const Normed normed = norm_row(row, weight, K, eps);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
        const int k = 4 * quad_of_thread(i);
        if (k >= K) continue;
        const uint32_t word = quad_codes(row[i], normed.per_code);
        *reinterpret_cast<uint32_t*>(codes + k / 16 * 32 + k % 16) = word;
        sum = __dp4a(static_cast<int>(word), 0x01010101, sum);
    }
    sum = __reduce_add_sync(0xffffffffu, sum);
    if (threadIdx.x % kWarp == 0) atomicAdd(code_sum, sum);
    return normed.scale;
}

// Row tiles tile[0] .. of w times the token: the product of row thread % 16 of tile thread / 16, for the first 16
// kTiles threads; with what `addend` (N,) has there, unless it is null. For the arithmetic see `multiply_token` in
// ternary_matmul_small.cu.
template <int kTiles>
__device__ __forceinline__ float multiply(const float* x, const float* norm, const uint4* w, const float* w_scale,
                                          const float* addend, const int (&tile)[kTiles], int N, int K, float eps) {
    constexpr int kChains = kTiles == 1 ? 2 : 1;
    __shared__ uint32_t sums[kTileRows * kTiles];
    __shared__ int code_sum;
    extern __shared__ __align__(128) unsigned char codes[];  // [chunks][kChunkCodes]

    const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp, warps = blockDim.x / kWarp;
    Weights<kTiles> weights;
    weights.chunks = (K + kTileColumns - 1) / kTileColumns;
#pragma unroll
    for (int r = 0; r < kTiles; ++r)
        weights.source[r] = w + static_cast<int64_t>(tile[r]) * weights.chunks * kTileLoads + lane;
#pragma unroll
    for (int d = 0; d < kDepth; ++d) weights.load(d, warp + d * warps);

    float4 norm_weight[kQuads];
    load_norm(norm_weight, norm, K);
    const int my_tile = kTiles == 1 || thread < kTileRows ? tile[0] : tile[kTiles - 1];
    const int n = my_tile * kTileRows + thread % kTileRows;
    const bool has_output = thread < kTileRows * kTiles && n < N;
    const float row_scale = has_output ? __ldg(w_scale + n) : 0.f;
    if (thread < kTileRows * kTiles) sums[thread] = 0;
    if (thread == 0) code_sum = 0;
    for (int i = thread; i < weights.chunks * kChunkCodes / 16; i += blockDim.x)
        reinterpret_cast<uint4*>(codes)[i] = make_uint4(0, 0, 0, 0);
    wait_for_earlier_kernels();
    let_later_kernels_start();  // not earlier: blocks that only wait take registers from others

    const float before = addend != nullptr && has_output ? __ldcg(addend + n) : 0.f;
    const float scale = quantize(x, norm_weight, codes, &code_sum, K, eps);
    __syncthreads();

    // ldmatrix: lane i gives row i % 8 (a column of the product) of the 16 codes i / 8, or the zeros behind them.
    const uint32_t row = shared_address(codes) + lane / 8 * 32 + ((lane ^ lane / 8) & 1) * 16;
    int acc[kChains][kTiles][4] = {};
    for (int first = warp; first < weights.chunks; first += kDepth * warps) {
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
            const int chunk = first + d * warps;
            if (chunk >= weights.chunks) break;
            uint32_t b[2][4];
            load_matrix_x4(b[0], row + chunk * kChunkCodes);
            load_matrix_x4(b[1], row + chunk * kChunkCodes + kChunkCodes / 2);
#pragma unroll
            for (int r = 0; r < kTiles; ++r) {
                const uint4& v = weights.words[d][r];
                const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t word = words[i] ^ 0xaaaaaaaau;
                    const uint32_t a[4] = {word & 0x03030303u, word & 0x0c0c0c0cu, word & 0x30303030u,
                                           word & 0xc0c0c0c0u};
                    mma_uint8_int8(acc[i % kChains][r], a, b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
                }
            }
            weights.load(d, chunk + kDepth * warps);
        }
    }
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
        uint32_t d[4] = {};
#pragma unroll
        for (int i = 0; i < 4 * kChains; ++i) d[i % 4] += static_cast<uint32_t>(acc[i / 4][r][i % 4]);
        const uint32_t value = lane % 2 == 0 ? 64 * d[0] + 4 * d[1] : 16 * d[2] + d[3];
        if (lane / 2 % 2 == r % 2) atomicAdd(&sums[kTileRows * r + lane / 4 + lane % 2 * 8], value);
    }
    __syncthreads();
    if (thread >= kTileRows * kTiles) return 0.f;
    const uint32_t sum = sums[thread] - 128 * static_cast<uint32_t>(code_sum);
    return before + __fmul_rn(__fmul_rn(static_cast<float>(static_cast<int>(sum) >> kSumShift), row_scale), scale);
}

__device__ __forceinline__ void multiply_and_store(const float* x, const float* norm, const uint4* w,
                                                   const float* w_scale, const float* addend, float* y, int N, int K,
                                                   float eps) {
    const float value = multiply<1>(x, norm, w, w_scale, addend, {static_cast<int>(blockIdx.x)}, N, K, eps);
    const int n = blockIdx.x * kTileRows + threadIdx.x;
    if (threadIdx.x < kTileRows && n < N) y[n] = value;
}

// y (N / 2,) = act(gate) * up, of which gate is the first half of the product and up the second.
template <bool kRelu2>
__device__ __forceinline__ void multiply_gated(const float* x, const float* norm, const uint4* w, const float* w_scale,
                                               float* y, int N, int K, float eps) {
    __shared__ float up[kTileRows];
    const int gate_tile = blockIdx.x, up_tile = gate_tile + N / (2 * kTileRows), thread = threadIdx.x;
    const float value = multiply<2>(x, norm, w, w_scale, nullptr, {gate_tile, up_tile}, N, K, eps);
    if (thread >= kWarp) return;
    if (thread >= kTileRows) up[thread - kTileRows] = value;
    __syncwarp();
    if (thread < kTileRows) y[gate_tile * kTileRows + thread] = gated(value, up[thread], kRelu2);
}

}  // namespace

// Grid: a block of W warps for each row tile of y, round32(ceil(K / 16)) <= 32 W <= 1024. Dynamic shared memory:
// ceil(K / 128) * 256 bytes. Launches may use programmatic serialization (sm_90).

// y = product.
extern "C" __global__ void __launch_bounds__(1024)
token_linear(const float* x, const float* norm, const uint4* w, const float* w_scale, float* y, int N, int K,
             float eps) {
    multiply_and_store(x, norm, w, w_scale, nullptr, y, N, K, eps);
}

// y += product.
extern "C" __global__ void __launch_bounds__(1024)
token_linear_add(const float* x, const float* norm, const uint4* w, const float* w_scale, float* y, int N, int K,
                 float eps) {
    multiply_and_store(x, norm, w, w_scale, y, y, N, K, eps);
}

// y (N / 2,) = act(gate) * up, of which gate is the first half of the product and up the second; N % 32 == 0. Grid:
// blocks for N / 2 rows.
extern "C" __global__ void __launch_bounds__(1024)
token_linear_silu(const float* x, const float* norm, const uint4* w, const float* w_scale, float* y, int N, int K,
                  float eps) {
    multiply_gated<false>(x, norm, w, w_scale, y, N, K, eps);
}

extern "C" __global__ void __launch_bounds__(1024)
token_linear_relu2(const float* x, const float* norm, const uint4* w, const float* w_scale, float* y, int N, int K,
                   float eps) {
    multiply_gated<true>(x, norm, w, w_scale, y, N, K, eps);
}
