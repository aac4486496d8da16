// Gradient of causal grouped-query attention: qkv (batch, seq, (heads + 2 kv_heads) * head_dim), out and dout (batch,
// seq, heads * head_dim) bf16, log_sum_exp (batch, heads, seq) f32 -> delta (batch, heads, seq) f32, then dqkv like
// qkv, bf16; head_dim a multiple of 8, or of 4 up to 112.

#include "attention_tiles.cuh"

namespace {

// With s = q . k / sqrt(head_dim), p = exp(s - log_sum_exp) and dp = dout . v, the gradients are
//   dv = p^T . dout, ds = p * (dp - delta), dq = ds . k / sqrt(head_dim), dk = ds^T . q / sqrt(head_dim).
// One kernel holds a block of keys and values and goes over queries for dk and dv, another holds queries and their dout
// and goes over keys for dq. Both form s and dp with the held rows as rows, so that p and ds stay in registers.

// s, dp (kTiles x 16 held rows, 16 columns from `column` on): s += held_s . s_tile^T, dp += held_dp . dp_tile^T.
template <int kDim, int kDepth, int kTiles>
__device__ __forceinline__ void add_scores(float (&s)[kTiles][2][4], float (&dp)[kTiles][2][4],
                                           const uint32_t (&held_s)[kTiles][kDepth / 16][4],
                                           const uint32_t (&held_dp)[kTiles][kDepth / 16][4], uint32_t s_tile,
                                           uint32_t dp_tile, uint32_t lane_offset, int column) {
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
        uint32_t b[4], c[4];
        load_matrix_x4(b, fragment_address<kDim>(s_tile, lane_offset, column, step));
        load_matrix_x4(c, fragment_address<kDim>(dp_tile, lane_offset, column, step));
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                mma_bf16(s[t][n], held_s[t][step], b[2 * n], b[2 * n + 1]);
                mma_bf16(dp[t][n], held_dp[t][step], c[2 * n], c[2 * n + 1]);
            }
    }
}

// dk and dv of kTiles x 64 keys, a quarter for each warp, from steps of kQueries queries of each head of the group.
template <int kDim, int kDepth, bool kAligned, int kTiles, int kQueries>
struct AttentionBackwardKeys {
    static constexpr int kRows = 16 * kTiles * kAttentionWarps;
    static constexpr int kTileBytes = 2 * kQueries * kDim;
    static constexpr int kStageBytes = 2 * kTileBytes;
    static_assert(kRows <= 2 * kQueries, "keys and values must fit where the queries' stages are");

    static __device__ __forceinline__ void run(const bf16* __restrict__ qkv, const bf16* __restrict__ dout,
                                               const float* __restrict__ log_sum_exp, const float* __restrict__ delta,
                                               bf16* __restrict__ dqkv, int seq, int heads, int kv_heads,
                                               int head_dim) {
        extern __shared__ __align__(1024) uint8_t shared[];
        float (*statistics)[2][kQueries] = reinterpret_cast<float (*)[2][kQueries]>(shared + 2 * kStageBytes);
        const int lane = threadIdx.x % kWarp, batch = blockIdx.y;
        const int first_key = blockIdx.z * kRows;  // the longest blocks first
        const int warp_row = threadIdx.x / kWarp * 16 * kTiles, warp_key = first_key + warp_row;
        const int group = heads / kv_heads, first_head = blockIdx.x * group, end_head = first_head + group;
        const int stride = (heads + 2 * kv_heads) * head_dim, out_stride = heads * head_dim;
        const int key_column = (heads + blockIdx.x) * head_dim, value_column = key_column + kv_heads * head_dim;
        const int64_t token = static_cast<int64_t>(batch) * seq;
        const bf16* tokens = qkv + token * stride;
        const bf16* gradients = dout + token * out_stride;

        const uint32_t stages = shared_address(shared);
        uint32_t keys[kTiles][kDepth / 16][4], values[kTiles][kDepth / 16][4];
        {
            const uint32_t value_tile = stages + 2 * kRows * kDim;
            const bf16* rows = tokens + static_cast<int64_t>(first_key) * stride;
            load_tile<kRows, kDim, kAligned>(stages, rows + key_column, stride, seq - first_key, head_dim);
            load_tile<kRows, kDim, kAligned>(value_tile, rows + value_column, stride, seq - first_key, head_dim);
            copy_async_commit();
            copy_async_wait<0>();
            __syncthreads();
            load_rows<kDim, kDepth, kTiles>(stages, warp_row, keys);
            load_rows<kDim, kDepth, kTiles>(value_tile, warp_row, values);
            __syncthreads();
        }

        const auto load_queries = [&](int head, int query, uint32_t tile) {
            load_tile<kQueries, kDim, kAligned>(tile, tokens + static_cast<int64_t>(query) * stride + head * head_dim,
                                                stride, seq - query, head_dim);
            load_tile<kQueries, kDim, kAligned>(tile + kTileBytes,
                                                gradients + static_cast<int64_t>(query) * out_stride + head * head_dim,
                                                out_stride, seq - query, head_dim);
            copy_async_commit();
        };
        // A thread brings one number of a step: -log_sum_exp in powers of two, or -delta. Zeros, with the zeros of
        // queries past the end, add nothing to dk and dv.
        const int kind = threadIdx.x / kQueries, place = threadIdx.x % kQueries;
        const float* statistic_rows = (kind == 0 ? log_sum_exp : delta) + token * heads + place;
        const float statistic_scale = kind == 0 ? -kLog2E : -1.f;
        const auto load_statistic = [&](int head, int query) {
            const bool valid = kind <= 1 && query + place < seq;
            return valid ? statistic_scale * statistic_rows[static_cast<int64_t>(head) * seq + query] : 0.f;
        };
        load_queries(first_head, first_key, stages);
        if (kind <= 1) statistics[0][kind][place] = load_statistic(first_head, first_key);

        const uint32_t offset_a = lane_offset_a<kDim>(), offset_b = lane_offset_b<kDim>();
        const float root = rsqrtf(static_cast<float>(head_dim)), scale = kLog2E * root;
        float dk[kTiles][kDepth / 8][4] = {}, dv[kTiles][kDepth / 8][4] = {};

        for (int head = first_head, query = first_key, stage = 0; head < end_head; stage ^= 1) {
            int next_head = head, next_query = query + kQueries;
            if (next_query >= seq) next_query = first_key, ++next_head;
            copy_async_wait<0>();
            __syncthreads();
            const uint32_t query_tile = stages + stage * kStageBytes, gradient_tile = query_tile + kTileBytes;
            float statistic = 0.f;
            if (next_head < end_head) {
                load_queries(next_head, next_query, stages + (stage ^ 1) * kStageBytes);
                statistic = load_statistic(next_head, next_query);
            }

            const auto step = [&](int column, auto masked) {
                float s[kTiles][2][4] = {}, dp[kTiles][2][4];
                float2 shift[2];
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const int i = column + 8 * n + lane % 4 * 2;
                    shift[n] = *reinterpret_cast<const float2*>(&statistics[stage][0][i]);
                    const float2 start = *reinterpret_cast<const float2*>(&statistics[stage][1][i]);
#pragma unroll
                    for (int t = 0; t < kTiles; ++t) {
                        dp[t][n][0] = dp[t][n][2] = start.x;
                        dp[t][n][1] = dp[t][n][3] = start.y;
                    }
                }
                add_scores<kDim, kDepth, kTiles>(s, dp, keys, values, query_tile, gradient_tile, offset_b, column);
#pragma unroll
                for (int t = 0; t < kTiles; ++t)
#pragma unroll
                    for (int n = 0; n < 2; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            s[t][n][i] = exp2_fast(s[t][n][i] * scale + (i % 2 == 0 ? shift[n].x : shift[n].y));
                if (masked.value && query + column < warp_key + 16 * kTiles - 1) {
#pragma unroll
                    for (int t = 0; t < kTiles; ++t)
#pragma unroll
                        for (int n = 0; n < 2; ++n)
#pragma unroll
                            for (int i = 0; i < 4; ++i)
                                if (warp_key + 16 * t + i / 2 * 8 + lane / 4 >
                                    query + column + 8 * n + lane % 4 * 2 + i % 2)
                                    s[t][n][i] = 0.f;
                }
                uint32_t p[kTiles][4], ds[kTiles][4];
#pragma unroll
                for (int t = 0; t < kTiles; ++t) {
                    pack_operand(p[t], s[t][0], s[t][1]);
#pragma unroll
                    for (int n = 0; n < 2; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) dp[t][n][i] *= s[t][n][i];
                    pack_operand(ds[t], dp[t][0], dp[t][1]);
                }
                multiply_by_rows<kDim, kDepth, kTiles>(dv, p, gradient_tile, offset_a, column);
                multiply_by_rows<kDim, kDepth, kTiles>(dk, ds, query_tile, offset_a, column);
            };
            if (query >= first_key + kRows) {
#pragma unroll
                for (int column = 0; column < kQueries; column += 16) step(column, Constant<false>());
            } else {
#pragma unroll 1
                for (int column = max(0, warp_key - query); column < kQueries; column += 16)
                    step(column, Constant<true>());
            }

            if (kind <= 1) statistics[stage ^ 1][kind][place] = statistic;
            head = next_head, query = next_query;
        }

        bf16* rows = dqkv + token * stride;
        store_rows<kDepth, kTiles>(rows + key_column, stride, dk, root, warp_key, seq, head_dim);
        store_rows<kDepth, kTiles>(rows + value_column, stride, dv, 1.f, warp_key, seq, head_dim);
    }
};

// dq of kTiles x 64 queries of a head, a quarter for each warp, from steps of kKeys keys.
template <int kDim, int kDepth, bool kAligned, int kTiles, int kKeys>
struct AttentionBackwardQueries {
    static constexpr int kRows = 16 * kTiles * kAttentionWarps;
    static constexpr int kTileBytes = 2 * kKeys * kDim;
    static constexpr int kStageBytes = 2 * kTileBytes;
    static_assert(kRows <= 2 * kKeys, "queries and gradients must fit where the keys' stages are");

    static __device__ __forceinline__ void run(const bf16* __restrict__ qkv, const bf16* __restrict__ dout,
                                               const float* __restrict__ log_sum_exp, const float* __restrict__ delta,
                                               bf16* __restrict__ dqkv, int seq, int heads, int kv_heads,
                                               int head_dim) {
        extern __shared__ __align__(1024) uint8_t shared[];
        const int lane = threadIdx.x % kWarp, head = blockIdx.x, batch = blockIdx.y;
        const int first_query = (gridDim.z - 1 - blockIdx.z) * kRows;  // the longest blocks first
        const int warp_row = threadIdx.x / kWarp * 16 * kTiles, warp_query = first_query + warp_row;
        const int stride = (heads + 2 * kv_heads) * head_dim, out_stride = heads * head_dim;
        const int64_t token = static_cast<int64_t>(batch) * seq;
        const bf16* keys = qkv + token * stride + (heads + head / (heads / kv_heads)) * head_dim;
        const int value_offset = kv_heads * head_dim;
        const int key_end = min(first_query + kRows, seq);

        const uint32_t stages = shared_address(shared);
        uint32_t queries[kTiles][kDepth / 16][4], gradients[kTiles][kDepth / 16][4];
        {
            const uint32_t gradient_tile = stages + 2 * kRows * kDim;
            load_tile<kRows, kDim, kAligned>(stages, qkv + (token + first_query) * stride + head * head_dim, stride,
                                             seq - first_query, head_dim);
            load_tile<kRows, kDim, kAligned>(gradient_tile, dout + (token + first_query) * out_stride + head * head_dim,
                                             out_stride, seq - first_query, head_dim);
            copy_async_commit();
            copy_async_wait<0>();
            __syncthreads();
            load_rows<kDim, kDepth, kTiles>(stages, warp_row, queries);
            load_rows<kDim, kDepth, kTiles>(gradient_tile, warp_row, gradients);
            __syncthreads();
        }

        const auto load_keys = [&](int first_key, uint32_t tile) {
            const bf16* source = keys + static_cast<int64_t>(first_key) * stride;
            load_tile<kKeys, kDim, kAligned>(tile, source, stride, seq - first_key, head_dim);
            load_tile<kKeys, kDim, kAligned>(tile + kTileBytes, source + value_offset, stride, seq - first_key,
                                             head_dim);
            copy_async_commit();
        };
        load_keys(0, stages);

        const uint32_t offset_a = lane_offset_a<kDim>(), offset_b = lane_offset_b<kDim>();
        const float root = rsqrtf(static_cast<float>(head_dim)), scale = kLog2E * root;
        float shift[kTiles][2], start[kTiles][2];  // -log_sum_exp in powers of two, -delta
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int query = min(warp_query + 16 * t + 8 * half + lane / 4, seq - 1);
                const int64_t i = token * heads + static_cast<int64_t>(head) * seq + query;
                shift[t][half] = -kLog2E * log_sum_exp[i];
                start[t][half] = -delta[i];
            }
        float dq[kTiles][kDepth / 8][4] = {};

        for (int first_key = 0, stage = 0; first_key < key_end; first_key += kKeys, stage ^= 1) {
            copy_async_wait<0>();
            __syncthreads();
            const uint32_t key_tile = stages + stage * kStageBytes;
            if (first_key + kKeys < key_end) load_keys(first_key + kKeys, stages + (stage ^ 1) * kStageBytes);
            const auto step = [&](int column, auto masked) {
                float s[kTiles][2][4] = {}, dp[kTiles][2][4];
#pragma unroll
                for (int t = 0; t < kTiles; ++t)
#pragma unroll
                    for (int n = 0; n < 2; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) dp[t][n][i] = start[t][i / 2];
                add_scores<kDim, kDepth, kTiles>(s, dp, queries, gradients, key_tile, key_tile + kTileBytes, offset_b,
                                                 column);
#pragma unroll
                for (int t = 0; t < kTiles; ++t)
#pragma unroll
                    for (int n = 0; n < 2; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) s[t][n][i] = exp2_fast(s[t][n][i] * scale + shift[t][i / 2]);
                if (masked.value && first_key + column + 15 > warp_query) {
#pragma unroll
                    for (int t = 0; t < kTiles; ++t)
#pragma unroll
                        for (int n = 0; n < 2; ++n)
#pragma unroll
                            for (int i = 0; i < 4; ++i)
                                if (first_key + column + 8 * n + lane % 4 * 2 + i % 2 >
                                    warp_query + 16 * t + i / 2 * 8 + lane / 4)
                                    s[t][n][i] = 0.f;
                }
                uint32_t ds[kTiles][4];
#pragma unroll
                for (int t = 0; t < kTiles; ++t) {
#pragma unroll
                    for (int n = 0; n < 2; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) dp[t][n][i] *= s[t][n][i];
                    pack_operand(ds[t], dp[t][0], dp[t][1]);
                }
                multiply_by_rows<kDim, kDepth, kTiles>(dq, ds, key_tile, offset_a, column);
            };
            if (first_key + kKeys <= first_query) {
#pragma unroll
                for (int column = 0; column < kKeys; column += 16) step(column, Constant<false>());
            } else {
                const int columns = min(kKeys, warp_query + 16 * kTiles - first_key);
#pragma unroll 1
                for (int column = 0; column < columns; column += 16) step(column, Constant<true>());
            }
        }
        store_rows<kDepth, kTiles>(dqkv + token * stride + head * head_dim, stride, dq, root, warp_query, seq,
                                   head_dim);
    }
};

constexpr int kDeltaLanes = 8;    // that share a row
constexpr int kDeltaTokens = 32;  // of a block

// The lane's part of out . dout over a head.
__device__ __forceinline__ float partial_dot(const bf16* out, const bf16* dout, int head_dim, int lane) {
    float sum = 0.f;
    if (head_dim % 8 == 0) {
        for (int d = 8 * lane; d < head_dim; d += 8 * kDeltaLanes) {
            float a[8], b[8];
            unpack8(load8(out + d), a);
            unpack8(load8(dout + d), b);
#pragma unroll
            for (int i = 0; i < 8; ++i) sum += a[i] * b[i];
        }
    } else {
        for (int d = 4 * lane; d < head_dim; d += 4 * kDeltaLanes) {
            const uint2 a = *reinterpret_cast<const uint2*>(out + d), b = *reinterpret_cast<const uint2*>(dout + d);
            const float2 a0 = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(a.x));
            const float2 a1 = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(a.y));
            const float2 b0 = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(b.x));
            const float2 b1 = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(b.y));
            sum += a0.x * b0.x + a0.y * b0.y + a1.x * b1.x + a1.y * b1.y;
        }
    }
    return sum;
}

}  // namespace

// delta = sum over head_dim of out * dout. Grid: (ceil(seq / 32), batch) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(kDeltaLanes* kDeltaTokens)
    attention_delta(const bf16* __restrict__ out, const bf16* __restrict__ dout, float* __restrict__ delta, int seq,
                    int heads, int head_dim) {
    const int lane = threadIdx.x % kDeltaLanes;
    const int token = blockIdx.x * kDeltaTokens + threadIdx.x / kDeltaLanes;
    const int64_t row = static_cast<int64_t>(blockIdx.y) * seq + min(token, seq - 1);
#pragma unroll 4
    for (int head = 0; head < heads; ++head) {
        const int64_t start = (row * heads + head) * head_dim;
        float sum = partial_dot(out + start, dout + start, head_dim, lane);
#pragma unroll
        for (int step = kDeltaLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane == 0 && token < seq) delta[(static_cast<int64_t>(blockIdx.y) * heads + head) * seq + token] = sum;
    }
}

// head_dim <= 64, a multiple of 8. Grid: (kv_heads, batch, ceil(seq / 64)) blocks of 128 threads; 33792 bytes of
// dynamic shared memory.
extern "C" __global__ void __launch_bounds__(kAttentionThreads, 3)
    attention_backward_kv_64(const bf16* __restrict__ qkv, const bf16* __restrict__ dout,
                             const float* __restrict__ log_sum_exp, const float* __restrict__ delta,
                             bf16* __restrict__ dqkv, int batch, int seq, int heads, int kv_heads, int head_dim) {
    AttentionBackwardKeys<64, 64, true, 1, 64>::run(qkv, dout, log_sum_exp, delta, dqkv, seq, heads, kv_heads,
                                                    head_dim);
}

// head_dim <= 112. Grid: (kv_heads, batch, ceil(seq / 64)) blocks of 128 threads; 33280 bytes of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_backward_kv_112(const bf16* __restrict__ qkv, const bf16* __restrict__ dout,
                              const float* __restrict__ log_sum_exp, const float* __restrict__ delta,
                              bf16* __restrict__ dqkv, int batch, int seq, int heads, int kv_heads, int head_dim) {
    AttentionBackwardKeys<128, 112, false, 1, 32>::run(qkv, dout, log_sum_exp, delta, dqkv, seq, heads, kv_heads,
                                                       head_dim);
}

// head_dim <= 128, a multiple of 8. Grid: (kv_heads, batch, ceil(seq / 64)) blocks of 128 threads; 33280 bytes of
// dynamic shared memory.
extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_backward_kv_128(const bf16* __restrict__ qkv, const bf16* __restrict__ dout,
                              const float* __restrict__ log_sum_exp, const float* __restrict__ delta,
                              bf16* __restrict__ dqkv, int batch, int seq, int heads, int kv_heads, int head_dim) {
    AttentionBackwardKeys<128, 128, true, 1, 32>::run(qkv, dout, log_sum_exp, delta, dqkv, seq, heads, kv_heads,
                                                      head_dim);
}

// head_dim <= 64, a multiple of 8. Grid: (heads, batch, ceil(seq / 128)) blocks of 128 threads; 32768 bytes of dynamic
// shared memory.
extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_backward_q_64(const bf16* __restrict__ qkv, const bf16* __restrict__ dout,
                            const float* __restrict__ log_sum_exp, const float* __restrict__ delta,
                            bf16* __restrict__ dqkv, int batch, int seq, int heads, int kv_heads, int head_dim) {
    AttentionBackwardQueries<64, 64, true, 2, 64>::run(qkv, dout, log_sum_exp, delta, dqkv, seq, heads, kv_heads,
                                                       head_dim);
}

// head_dim <= 112. Grid: (heads, batch, ceil(seq / 64)) blocks of 128 threads; 32768 bytes of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_backward_q_112(const bf16* __restrict__ qkv, const bf16* __restrict__ dout,
                             const float* __restrict__ log_sum_exp, const float* __restrict__ delta,
                             bf16* __restrict__ dqkv, int batch, int seq, int heads, int kv_heads, int head_dim) {
    AttentionBackwardQueries<128, 112, false, 1, 32>::run(qkv, dout, log_sum_exp, delta, dqkv, seq, heads, kv_heads,
                                                          head_dim);
}

// head_dim <= 128, a multiple of 8. Grid: (heads, batch, ceil(seq / 64)) blocks of 128 threads; 32768 bytes of dynamic
// shared memory.
extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_backward_q_128(const bf16* __restrict__ qkv, const bf16* __restrict__ dout,
                             const float* __restrict__ log_sum_exp, const float* __restrict__ delta,
                             bf16* __restrict__ dqkv, int batch, int seq, int heads, int kv_heads, int head_dim) {
    AttentionBackwardQueries<128, 128, true, 1, 32>::run(qkv, dout, log_sum_exp, delta, dqkv, seq, heads, kv_heads,
                                                         head_dim);
}
