// Causal grouped-query attention of many tokens over a cache of keys and values, for inference, on tensor cores: f32
// values as pairs of bf16 values.

#include "attention_tiles.cuh"
#include "bf16_pairs.cuh"
#include "token_heads.cuh"

namespace {

// Scratch: queries (2, tokens, heads, width), keys and values (2, kv_heads, capacity, width) each, the first half high
// and the second low; width is head_dim rounded up to whole chunks of tiles.
struct Pairs {
    int width;
    int64_t query_plane, key_plane;
    bf16 *queries, *keys, *values;

    __device__ __forceinline__ Pairs(bf16* scratch, int tokens, const Shape& shape)
        : width((shape.head_dim + 7) / 8 * 8),
          query_plane(static_cast<int64_t>(tokens) * shape.heads * width),
          key_plane(static_cast<int64_t>(shape.kv_heads) * shape.capacity * width),
          queries(scratch),
          keys(queries + 2 * query_plane),
          values(keys + 2 * key_plane) {}

    static __device__ __forceinline__ void store(bf16* at, int64_t plane, float x) {
        split(x, at[0], at[plane]);
    }
};

// sums (16 rows, 16 columns from the one of step `at`) += a . b, all of them pairs.
template <int kColumns>
__device__ __forceinline__ void multiply_pairs(float (&sums)[kColumns][4], int at, const uint32_t (&high)[4],
                                               const uint32_t (&low)[4], const uint32_t (&b_high)[4],
                                               const uint32_t (&b_low)[4]) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        float(&sum)[4] = sums[2 * at + side];
        mma_bf16(sum, high, b_high[2 * side], b_high[2 * side + 1]);
        mma_bf16(sum, high, b_low[2 * side], b_low[2 * side + 1]);
        mma_bf16(sum, low, b_high[2 * side], b_high[2 * side + 1]);
    }
}

constexpr int kRows = 16 * kAttentionWarps;  // queries of a block, 16 for each warp
constexpr int kKeys = 32;                    // keys of a step

// kDim is the width of tiles, kDepth that of products. A stage has four tiles: high and low of keys, then of values. The
// queries stay in registers and come by way of the second stage.
template <int kDim, int kDepth>
__device__ __forceinline__ void attend(const bf16* scratch, float* out, int before, int tokens, const Shape& shape) {
    constexpr int kTileBytes = 2 * kKeys * kDim, kStageBytes = 4 * kTileBytes, kQueryBytes = 2 * kRows * kDim;
    static_assert(2 * kQueryBytes <= kStageBytes, "the queries must fit into a stage");
    extern __shared__ __align__(1024) uint8_t shared[];
    const int lane = threadIdx.x % kWarp, head = blockIdx.x, D = shape.head_dim;
    const int first_query = (gridDim.y - 1 - blockIdx.y) * kRows;  // the longest blocks first
    const int warp_row = threadIdx.x / kWarp * 16, warp_query = first_query + warp_row;
    const int warp_position = before + warp_query, len = before + tokens;
    const int key_end = min(before + first_query + kRows, len);
    const Pairs pairs(const_cast<bf16*>(scratch), tokens, shape);
    const bf16* const queries = pairs.queries + (static_cast<int64_t>(first_query) * shape.heads + head) * pairs.width;
    const int64_t kv_head = head / (shape.heads / shape.kv_heads), kv_offset = kv_head * shape.capacity * pairs.width;

    const uint32_t stages = shared_address(shared), query_tile = stages + kStageBytes;
    const auto load_keys = [&](int first_key, uint32_t tile) {
        const int64_t from = kv_offset + static_cast<int64_t>(first_key) * pairs.width;
        const bf16* const sources[2] = {pairs.keys + from, pairs.values + from};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            load_tile<kKeys, kDim, true>(tile + i * kTileBytes, sources[i / 2] + i % 2 * pairs.key_plane, pairs.width,
                                         len - first_key, pairs.width);
        copy_async_commit();
    };
#pragma unroll
    for (int i = 0; i < 2; ++i)
        load_tile<kRows, kDim, true>(query_tile + i * kQueryBytes, queries + i * pairs.query_plane,
                                     shape.heads * pairs.width, tokens - first_query, pairs.width);
    copy_async_commit();
    load_keys(0, stages);

    const uint32_t offset_a = lane_offset_a<kDim>(), offset_b = lane_offset_b<kDim>();
    uint32_t query_high[1][kDepth / 16][4], query_low[1][kDepth / 16][4];
    copy_async_wait<1>();
    __syncthreads();
    load_rows<kDim, kDepth>(query_tile, warp_row, query_high);
    load_rows<kDim, kDepth>(query_tile + kQueryBytes, warp_row, query_low);

    float sums[kDepth / 8][4] = {};
    float weight[2] = {};  // of the columns that this lane sees
    float maximum[2] = {-INFINITY, -INFINITY};  // of scores, in powers of two
    for (int first_key = 0, stage = 0; first_key < key_end; first_key += kKeys, stage ^= 1) {
        copy_async_wait<0>();
        __syncthreads();
        const uint32_t key_tile = stages + stage * kStageBytes, value_tile = key_tile + 2 * kTileBytes;
        if (first_key + kKeys < key_end) load_keys(first_key + kKeys, stages + (stage ^ 1) * kStageBytes);
        if (first_key >= warp_position + 16) continue;  // nothing that this warp may see

        float s[kKeys / 8][4] = {};
#pragma unroll
        for (int step = 0; step < kDepth / 16; ++step)
#pragma unroll
            for (int n = 0; n < kKeys / 16; ++n) {
                uint32_t b_high[4], b_low[4];
                const uint32_t from = fragment_address<kDim>(key_tile, offset_b, 16 * n, step);
                load_matrix_x4(b_high, from);
                load_matrix_x4(b_low, from + kTileBytes);
                multiply_pairs(s, n, query_high[0][step], query_low[0][step], b_high, b_low);
            }

        if (first_key + kKeys > warp_position + 1) {
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int key = first_key + 8 * n + lane % 4 * 2 + i % 2;
                    if (key > warp_position + i / 2 * 8 + lane / 4) s[n][i] = -INFINITY;
                }
        }

        // fmaxf drops NaN, but exp2 then makes the weights of the row NaN.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float raised = maximum[half];
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n) raised = fmaxf(raised, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            raised = fmaxf(raised, __shfl_xor_sync(0xffffffffu, raised, 1));
            raised = fmaxf(raised, __shfl_xor_sync(0xffffffffu, raised, 2));
            const float factor = exp2_fast(maximum[half] - raised);
            maximum[half] = raised, weight[half] *= factor;
#pragma unroll
            for (int n = 0; n < kDepth / 8; ++n) sums[n][2 * half] *= factor, sums[n][2 * half + 1] *= factor;
        }

#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
            uint32_t high[4], low[4];  // rows, then rows + 8, of 8 columns and the next
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int half = i % 2;
                float *const p = s[2 * n + i / 2] + 2 * half;
#pragma unroll
                for (int j = 0; j < 2; ++j) p[j] = exp2_fast(p[j] - maximum[half]), weight[half] += p[j];
                split(p[0], p[1], high[i], low[i]);
            }
#pragma unroll
            for (int step = 0; step < kDepth / 16; ++step) {
                uint32_t b_high[4], b_low[4];
                const uint32_t from = fragment_address<kDim>(value_tile, offset_a, 16 * n, step);
                load_matrix_x4_transposed(b_high, from);
                load_matrix_x4_transposed(b_low, from + kTileBytes);
                multiply_pairs(sums, step, high, low, b_high, b_low);
            }
        }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float total = weight[half];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        const float inverse = __fdiv_rn(1.f, total);
        const int query = warp_query + 8 * half + lane / 4;
        if (query >= tokens) continue;
        float* const to = out + (static_cast<int64_t>(query) * shape.heads + head) * D;
#pragma unroll
        for (int n = 0; n < kDepth / 8; ++n) {
            const int d = 8 * n + lane % 4 * 2;
            if (d < D)
                *reinterpret_cast<float2*>(to + d) =
                    make_float2(sums[n][2 * half] * inverse, sums[n][2 * half + 1] * inverse);
        }
    }
}

}  // namespace

// qkv (tokens, (heads + 2 kv_heads) D) f32 of the tokens after the `before` first -> their keys, rotated, and values in
// the cache (kv_heads, capacity, D) f32, and the pairs of queries, of keys and of values, of these and of all before;
// cos, sin (positions, D / 2). Queries are scaled to base 2. Grid: (before + tokens) blocks of any size.
extern "C" __global__ void prompt_pairs(const float* qkv, const float* cos, const float* sin, float* keys,
                                        float* values, bf16* scratch, int before, int tokens, int heads, int kv_heads,
                                        int head_dim, int capacity) {
    const Shape shape = {heads, kv_heads, head_dim, capacity};
    const Pairs pairs(scratch, tokens, shape);
    const int D = head_dim, width = pairs.width, at = blockIdx.x, token = at - before;
    const float *const cos_row = cos + at * (D / 2), *const sin_row = sin + at * (D / 2);
    const float* const row = qkv + static_cast<int64_t>(max(token, 0)) * shape.features();
    if (token >= 0) {
        const float scale = kLog2E * rsqrtf(static_cast<float>(D));
        bf16* const to = pairs.queries + static_cast<int64_t>(token) * heads * width;
        for (int i = threadIdx.x; i < heads * width; i += blockDim.x) {
            const int head = i / width, d = i % width;
            const float x = d < D ? scale * Turn(cos_row, sin_row, d, D)(row + head * D, d) : 0.f;
            Pairs::store(to + i, pairs.query_plane, x);
        }
    }
    for (int i = threadIdx.x; i < kv_heads * width; i += blockDim.x) {
        const int head = i / width, d = i % width;
        const int64_t place = static_cast<int64_t>(head) * capacity + at;
        float k = 0.f, v = 0.f;
        if (d < D) {
            float &cached_key = keys[place * D + d], &cached_value = values[place * D + d];
            if (token >= 0) {
                const float* const key = row + (heads + head) * D;
                cached_key = Turn(cos_row, sin_row, d, D)(key, d);
                cached_value = key[kv_heads * D + d];
            }
            k = cached_key, v = cached_value;
        }
        Pairs::store(pairs.keys + place * width + d, pairs.key_plane, k);
        Pairs::store(pairs.values + place * width + d, pairs.key_plane, v);
    }
}

// Pairs -> out (tokens, heads, D) f32 = softmax(q . K^T / sqrt(D)) . V. D: a multiple of 4, at most the number in the
// name. Grid: (heads, ceil(tokens / 64)) blocks of 128 threads; 32768 bytes of dynamic shared memory for D up to 64,
// 65536 above.
#define PROMPT_ATTENTION(depth, dim, blocks)                                                                       \
    extern "C" __global__ void __launch_bounds__(kAttentionThreads, blocks)                                        \
        prompt_attention_##depth(const bf16* scratch, float* out, int before, int tokens, int heads, int kv_heads, \
                                 int head_dim, int capacity) {                                                     \
        attend<dim, depth>(scratch, out, before, tokens, {heads, kv_heads, head_dim, capacity});                   \
    }
PROMPT_ATTENTION(64, 64, 3)
PROMPT_ATTENTION(112, 128, 2)
PROMPT_ATTENTION(128, 128, 2)
