// Causal grouped-query attention: qkv (batch, seq, (heads + 2 kv_heads) * head_dim) bf16 -> out (batch, seq,
// heads * head_dim) bf16 and log_sum_exp (batch, heads, seq) f32; head_dim a multiple of 8, or of 4 up to 112.

#include "attention_tiles.cuh"

namespace {

// A row's maximum is raised, and its sums rescaled, only when scores exceed it by more than this power of two.
constexpr float kSlack = 8.f;

// Per block kTiles x 64 queries of a head, a quarter for each warp, against steps of kKeys keys. kDim is the width of
// tiles, kDepth that of products. kHold: the queries stay in registers, their tile makes room for keys and values.
template <int kDim, int kDepth, bool kAligned, int kTiles, int kKeys, bool kHold>
struct AttentionForward {
    static constexpr int kRows = 16 * kTiles * kAttentionWarps;
    static constexpr int kTileBytes = 2 * kKeys * kDim;
    static constexpr int kStageBytes = 2 * kTileBytes;
    static_assert(!kHold || kRows <= 2 * kKeys, "the queries must fit where the second stage of keys and values is");

    static __device__ __forceinline__ void run(const bf16* __restrict__ qkv, bf16* __restrict__ out,
                                               float* __restrict__ log_sum_exp, int seq, int heads, int kv_heads,
                                               int head_dim) {
        extern __shared__ __align__(1024) uint8_t shared[];
        const int lane = threadIdx.x % kWarp;
        const int head = blockIdx.x, batch = blockIdx.y;
        const int first_query = (gridDim.z - 1 - blockIdx.z) * kRows;  // the longest blocks first
        const int warp_row = threadIdx.x / kWarp * 16 * kTiles, warp_query = first_query + warp_row;
        const int stride = (heads + 2 * kv_heads) * head_dim, out_stride = heads * head_dim;
        const int64_t token = static_cast<int64_t>(batch) * seq;
        const bf16* queries = qkv + (token + first_query) * stride + head * head_dim;
        const bf16* keys = qkv + token * stride + (heads + head / (heads / kv_heads)) * head_dim;
        const int value_offset = kv_heads * head_dim;
        const int key_end = min(first_query + kRows, seq);

        const uint32_t stages = shared_address(shared);
        const uint32_t query_tile = stages + (kHold ? 1 : 2) * kStageBytes;
        const auto load_keys = [&](int first_key, uint32_t tile) {
            const bf16* source = keys + static_cast<int64_t>(first_key) * stride;
            load_tile<kKeys, kDim, kAligned>(tile, source, stride, seq - first_key, head_dim);
            load_tile<kKeys, kDim, kAligned>(tile + kTileBytes, source + value_offset, stride, seq - first_key,
                                             head_dim);
            copy_async_commit();
        };
        load_tile<kRows, kDim, kAligned>(query_tile, queries, stride, seq - first_query, head_dim);
        copy_async_commit();
        load_keys(0, stages);

        const uint32_t offset_a = lane_offset_a<kDim>(), offset_b = lane_offset_b<kDim>();
        uint32_t held[kTiles][kDepth / 16][4];
        if constexpr (kHold) {
            copy_async_wait<1>();
            __syncthreads();
            load_rows<kDim, kDepth, kTiles>(query_tile, warp_row, held);
        }

        const float scale = kLog2E * rsqrtf(static_cast<float>(head_dim));
        float sums[kTiles][kDepth / 8][4] = {};
        float weight[kTiles][2] = {};  // of the columns that this lane sees
        float maximum[kTiles][2];      // of scaled scores, in powers of two
#pragma unroll
        for (int t = 0; t < kTiles; ++t) maximum[t][0] = maximum[t][1] = -INFINITY;

        for (int first_key = 0, stage = 0; first_key < key_end; first_key += kKeys, stage ^= 1) {
            copy_async_wait<0>();
            __syncthreads();
            const uint32_t key_tile = stages + stage * kStageBytes, value_tile = key_tile + kTileBytes;
            if (first_key + kKeys < key_end) load_keys(first_key + kKeys, stages + (stage ^ 1) * kStageBytes);
            if (first_key >= warp_query + 16 * kTiles) continue;  // nothing that this warp may see

            float s[kTiles][kKeys / 8][4] = {};
#pragma unroll
            for (int step = 0; step < kDepth / 16; ++step) {
                uint32_t a[kTiles][4];
                if constexpr (!kHold) {
#pragma unroll
                    for (int t = 0; t < kTiles; ++t)
                        load_matrix_x4(a[t], fragment_address<kDim>(query_tile, offset_a, warp_row + 16 * t, step));
                }
#pragma unroll
                for (int n = 0; n < kKeys / 16; ++n) {
                    uint32_t b[4];
                    load_matrix_x4(b, fragment_address<kDim>(key_tile, offset_b, 16 * n, step));
#pragma unroll
                    for (int t = 0; t < kTiles; ++t) {
                        mma_bf16(s[t][2 * n], kHold ? held[t][step] : a[t], b[0], b[1]);
                        mma_bf16(s[t][2 * n + 1], kHold ? held[t][step] : a[t], b[2], b[3]);
                    }
                }
            }

            if (first_key + kKeys > warp_query + 1) {
#pragma unroll
                for (int t = 0; t < kTiles; ++t)
#pragma unroll
                    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const int key = first_key + 8 * n + lane % 4 * 2 + i % 2;
                            if (key > warp_query + 16 * t + i / 2 * 8 + lane / 4) s[t][n][i] = -INFINITY;
                        }
            }

            // fmaxf drops NaN, but exp2 then makes the weights of the row NaN.
            float fresh[kTiles][2];
            bool grown = false;
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float best = -INFINITY;
#pragma unroll
                    for (int n = 0; n < kKeys / 8; ++n)
                        best = fmaxf(best, fmaxf(s[t][n][2 * half], s[t][n][2 * half + 1]));
                    best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
                    best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
                    fresh[t][half] = best * scale;
                    grown |= fresh[t][half] > maximum[t][half] + kSlack;
                }
            if (__any_sync(0xffffffffu, grown)) {
#pragma unroll
                for (int t = 0; t < kTiles; ++t)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float raised = fmaxf(maximum[t][half], fresh[t][half]);
                        const float factor = exp2_fast(maximum[t][half] - raised);
                        maximum[t][half] = raised;
                        weight[t][half] *= factor;
#pragma unroll
                        for (int n = 0; n < kDepth / 8; ++n)
                            sums[t][n][2 * half] *= factor, sums[t][n][2 * half + 1] *= factor;
                    }
            }
#pragma unroll
            for (int n = 0; n < kKeys / 16; ++n) {
                uint32_t p[kTiles][4];
#pragma unroll
                for (int t = 0; t < kTiles; ++t) {
#pragma unroll
                    for (int j = 2 * n; j < 2 * n + 2; ++j)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            s[t][j][i] = exp2_fast(s[t][j][i] * scale - maximum[t][i / 2]);
                            weight[t][i / 2] += s[t][j][i];
                        }
                    pack_operand(p[t], s[t][2 * n], s[t][2 * n + 1]);
                }
                multiply_by_rows<kDim, kDepth, kTiles>(sums, p, value_tile, offset_a, 16 * n);
            }
        }

        float* lse = log_sum_exp + (token * heads + static_cast<int64_t>(head) * seq);
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float total = weight[t][half];
                total += __shfl_xor_sync(0xffffffffu, total, 1);
                total += __shfl_xor_sync(0xffffffffu, total, 2);
                const int query = warp_query + 16 * t + 8 * half + lane / 4;
                if (lane % 4 == 0 && query < seq) lse[query] = kLn2 * (maximum[t][half] + log2f(total));
                const float inverse = 1.f / total;
#pragma unroll
                for (int n = 0; n < kDepth / 8; ++n)
                    sums[t][n][2 * half] *= inverse, sums[t][n][2 * half + 1] *= inverse;
            }
        store_rows<kDepth, kTiles>(out + token * out_stride + head * head_dim, out_stride, sums, 1.f, warp_query, seq,
                                   head_dim);
    }
};

}  // namespace

// head_dim <= 64, a multiple of 8. Grid: (heads, batch, ceil(seq / 128)) blocks of 128 threads; 32768 bytes of dynamic
// shared memory.
extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_forward_64(const bf16* __restrict__ qkv, bf16* __restrict__ out, float* __restrict__ log_sum_exp,
                         int batch, int seq, int heads, int kv_heads, int head_dim) {
    AttentionForward<64, 64, true, 2, 64, true>::run(qkv, out, log_sum_exp, seq, heads, kv_heads, head_dim);
}

// head_dim <= 112. Grid: (heads, batch, ceil(seq / 128)) blocks of 128 threads; 65536 bytes of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_forward_112(const bf16* __restrict__ qkv, bf16* __restrict__ out, float* __restrict__ log_sum_exp,
                          int batch, int seq, int heads, int kv_heads, int head_dim) {
    AttentionForward<128, 112, false, 2, 32, false>::run(qkv, out, log_sum_exp, seq, heads, kv_heads, head_dim);
}

// head_dim <= 128, a multiple of 8. Grid: (heads, batch, ceil(seq / 64)) blocks of 128 threads; 32768 bytes of dynamic
// shared memory.
extern "C" __global__ void __launch_bounds__(kAttentionThreads, 3)
    attention_forward_128(const bf16* __restrict__ qkv, bf16* __restrict__ out, float* __restrict__ log_sum_exp,
                          int batch, int seq, int heads, int kv_heads, int head_dim) {
    AttentionForward<128, 128, true, 1, 32, true>::run(qkv, out, log_sum_exp, seq, heads, kv_heads, head_dim);
}
