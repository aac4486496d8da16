// Causal attention, softmax(q . k^T / sqrt(D)) . v, on Hopper: qkv (batch, seq, (heads + 2 kv_heads) * D) bf16, out
// (batch, seq, heads * D) bf16, log_sum_exp (batch, heads, seq) f32. Query head h reads kv head h / (heads / kv_heads).

#include "attention_hopper.cuh"

namespace {

constexpr int kKeys = 128;  // keys and values in one step

// A block is one warpgroup that only copies, and some that have 64 queries each.
template <int kHeadDim>
struct Shape {
    static constexpr int kWarpgroups = kHeadDim == 64 ? 3 : 2;
    static constexpr int kQueries = kWarpgroups * kChunk;
    static constexpr int kStages = kHeadDim == 64 ? 3 : 2;
    static constexpr int kThreads = (kWarpgroups + 1) * kWarpgroup;
    static constexpr int kCopyRegisters = kHeadDim == 64 ? 32 : 40;
    static constexpr int kRegisters = kHeadDim == 64 ? 160 : 232;
};

template <int kHeadDim>
struct Shared {
    static constexpr int kStages = Shape<kHeadDim>::kStages;
    bf16 query[Shape<kHeadDim>::kQueries * kHeadDim];
    bf16 scratch[Shape<kHeadDim>::kQueries * kPanel];
    bf16 key[kStages][kKeys * kHeadDim];
    bf16 value[kStages][kKeys * kHeadDim];
    uint64_t query_full, query_empty, key_full[kStages], key_empty[kStages], value_full[kStages], value_empty[kStages];
    Tile tile;  // of the queries
};

__device__ unsigned int tiles_taken;

// The last block of keys that a query at `row` may see; rows from seq on count as the last one.
__device__ __forceinline__ int last_key_block(int row, int seq) { return min(row, seq - 1) / kKeys; }

// The scores of a step become probabilities relative to the row's largest score so far; `shrink` is what earlier sums
// and outputs are to be multiplied by for that. `scale` counts in powers of two.
__device__ __forceinline__ void softmax_step(float (&s)[kKeys / 2], float (&row_max)[2], float (&row_sum)[2],
                                             float (&shrink)[2], float scale) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float max0 = fmaxf(row_max[row], s[2 * row]), max1 = s[2 * row + 1];
#pragma unroll
        for (int i = 4; i < kKeys / 2; i += 4) {
            max0 = fmaxf(max0, s[i + 2 * row]);
            max1 = fmaxf(max1, s[i + 2 * row + 1]);
        }
        float max = fmaxf(max0, max1);
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
        shrink[row] = exp2_approx((row_max[row] - max) * scale);
        row_max[row] = max;
        const float scaled_max = max * scale;
        float sum0 = 0.f, sum1 = 0.f;
#pragma unroll
        for (int i = 0; i < kKeys / 2; i += 4) {
            float& p0 = s[i + 2 * row];
            float& p1 = s[i + 2 * row + 1];
            p0 = exp2_approx(fmaf(p0, scale, -scaled_max));
            p1 = exp2_approx(fmaf(p1, scale, -scaled_max));
            sum0 += p0, sum1 += p1;
        }
        row_sum[row] = row_sum[row] * shrink[row] + (sum0 + sum1);
    }
}

static_assert(sizeof(Shared<64>) == 147584 && sizeof(Shared<128>) == 180320, "as the launch contract below says");

template <int kHeadDim>
__device__ __forceinline__ void attention_forward(const CUtensorMap* qkv, bf16* out, float* log_sum_exp, int batch,
                                                  int seq, int heads, int kv_heads, int head_dim) {
    using S = Shape<kHeadDim>;
    constexpr int kStages = S::kStages, kWarpgroups = S::kWarpgroups, kQueries = S::kQueries;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Shared<kHeadDim>& shared = *reinterpret_cast<Shared<kHeadDim>*>(shared_bytes);

    if (threadIdx.x == 0) {
        prefetch_tensor_map(qkv);
        barrier_init(&shared.query_full, 1);
        barrier_init(&shared.query_empty, kWarpgroups * 4);
        for (int i = 0; i < kStages; ++i) {
            barrier_init(&shared.key_full[i], 1);
            barrier_init(&shared.key_empty[i], kWarpgroups * 4);
            barrier_init(&shared.value_full[i], 1);
            barrier_init(&shared.value_empty[i], kWarpgroups * 4);
        }
        barrier_init_fence();
    }
    __syncthreads();

    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0) - 1;  // -1: the one that copies
    const int group = heads / kv_heads, row_tiles = (seq + kQueries - 1) / kQueries;

    if (warpgroup < 0) {
        fewer_registers<S::kCopyRegisters>();
        if (threadIdx.x > 0) return;
        const int64_t kv_bytes = static_cast<int64_t>(seq) * head_dim * 2 * sizeof(bf16);
        const TileOrder order(batch, heads, row_tiles, (kv_bytes + group - 1) / group);
        const int stride = head_stride(head_dim);
        Ring<kStages> ring;
        uint32_t tile_phase = 0;
        int index = blockIdx.x;
        while (index < order.tiles()) {
            const int next = next_tile(&tiles_taken, order.tiles());
            const Tile tile = order.tile(index);
            const int tile_row = (row_tiles - 1 - tile.rank) * kQueries;
            const int key_column = (heads + tile.head / group) * stride;
            barrier_wait(&shared.query_empty, tile_phase ^ 1);
            shared.tile = tile;
            barrier_expect(&shared.query_full, sizeof(shared.query));
            for (int i = 0; i < kWarpgroups; ++i)
                load_tile<kChunk, kHeadDim>(shared.query + i * kChunk * kHeadDim, qkv, &shared.query_full,
                                            tile.head * stride, tile_row + i * kChunk, tile.batch);
            tile_phase ^= 1;
            for (int key = last_key_block(tile_row + kQueries - 1, seq) * kKeys; key >= 0; key -= kKeys) {
                const int i = ring.stage;
                barrier_wait(&shared.key_empty[i], ring.phase ^ 1);
                barrier_expect(&shared.key_full[i], sizeof(shared.key[i]));
                load_tile<kKeys, kHeadDim>(shared.key[i], qkv, &shared.key_full[i], key_column, key, tile.batch);
                barrier_wait(&shared.value_empty[i], ring.phase ^ 1);
                barrier_expect(&shared.value_full[i], sizeof(shared.value[i]));
                load_tile<kKeys, kHeadDim>(shared.value[i], qkv, &shared.value_full[i],
                                           key_column + kv_heads * stride, key, tile.batch);
                ring.advance();
            }
            index = next;
        }
        barrier_wait(&shared.query_empty, tile_phase ^ 1);
        shared.tile.rank = -1;
        barrier_arrive(&shared.query_full);
    } else {
        more_registers<S::kRegisters>();
        const Turns<kWarpgroups> turns{warpgroup};
        turns.begin();
        const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
        const float scale = kLog2e / sqrtf(static_cast<float>(head_dim));
        bf16* query = shared.query + warpgroup * kChunk * kHeadDim;
        bf16* scratch = shared.scratch + (warpgroup * kChunk + warp * 16) * kPanel;

        Ring<kStages> keys, values;
        uint32_t tile_phase = 0;
        while (true) {
            barrier_wait(&shared.query_full, tile_phase);
            tile_phase ^= 1;
            const Tile tile = shared.tile;
            if (tile.rank < 0) break;
            const int tile_row = (row_tiles - 1 - tile.rank) * kQueries;
            const int first_row = tile_row + warpgroup * kChunk;
            const int last_block = last_key_block(first_row + kChunk - 1, seq);

            float result[kHeadDim / 2] = {};
            float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.f, 0.f}, shrink[2];
            float s[kKeys / 2];
            uint32_t p[kKeys / 16][4];

            zero_columns<kChunk, kHeadDim>(query, head_dim, turns.own_barrier());

            // A last block of keys that only the warpgroups after this one see.
            if (last_block < last_key_block(tile_row + kQueries - 1, seq)) {
                barrier_wait(&shared.key_full[keys.stage], keys.phase);
                warp_arrive(&shared.key_empty[keys.stage]);
                barrier_wait(&shared.value_full[values.stage], values.phase);
                warp_arrive(&shared.value_empty[values.stage]);
                keys.advance(), values.advance();
                turns.take();
                turns.pass();
            }

            // The block on the diagonal.
            barrier_wait(&shared.key_full[keys.stage], keys.phase);
            wgmma_fence();
            multiply_transposed<kHeadDim, kChunk, kKeys>(s, query, shared.key[keys.stage]);
            wgmma_commit();
            wgmma_wait<0>();
            warp_arrive(&shared.key_empty[keys.stage]);
            keys.advance();
            const int diagonal = first_row - last_block * kKeys + warp * 16 + lane / 4;
#pragma unroll
            for (int i = 0; i < kKeys / 2; ++i)
                if (8 * (i / 4) + 2 * (lane % 4) + i % 2 > diagonal + 8 * (i % 4 / 2)) s[i] = -INFINITY;
            softmax_step(s, row_max, row_sum, shrink, scale);
            to_left_factor<kKeys>(p, s);

            // The blocks before it: the scores of a block are multiplied while the one before it meets its values.
            for (int block = last_block; block > 0; --block) {
                barrier_wait(&shared.key_full[keys.stage], keys.phase);
                turns.take();
                wgmma_fence();
                multiply_transposed<kHeadDim, kChunk, kKeys>(s, query, shared.key[keys.stage]);
                wgmma_commit();
                barrier_wait(&shared.value_full[values.stage], values.phase);
                wgmma_fence();
                multiply_add<kHeadDim, kKeys>(result, p, shared.value[values.stage]);
                wgmma_commit();
                turns.pass();
                wgmma_wait<1>();
                warp_arrive(&shared.key_empty[keys.stage]);
                keys.advance();
                softmax_step(s, row_max, row_sum, shrink, scale);
                wgmma_wait<0>();
                warp_arrive(&shared.value_empty[values.stage]);
                values.advance();
#pragma unroll
                for (int i = 0; i < kHeadDim / 2; ++i) result[i] *= shrink[i % 4 / 2];
                to_left_factor<kKeys>(p, s);
            }
            warp_arrive(&shared.query_empty);
            barrier_wait(&shared.value_full[values.stage], values.phase);
            wgmma_fence();
            multiply_add<kHeadDim, kKeys>(result, p, shared.value[values.stage]);
            wgmma_commit();
            wgmma_wait<0>();
            warp_arrive(&shared.value_empty[values.stage]);
            values.advance();

            const int row = first_row + warp * 16;
            const int64_t head = static_cast<int64_t>(tile.batch) * heads + tile.head;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                row_sum[i] += __shfl_xor_sync(0xffffffffu, row_sum[i], 1);
                row_sum[i] += __shfl_xor_sync(0xffffffffu, row_sum[i], 2);
                const int own_row = row + lane / 4 + 8 * i;
                if (lane % 4 == 0 && own_row < seq)
                    log_sum_exp[head * seq + own_row] = row_max[i] * scale / kLog2e + logf(row_sum[i]);
            }
            store_rows<kHeadDim>(result, 1.f / row_sum[0], 1.f / row_sum[1], scratch,
                                 out + ((static_cast<int64_t>(tile.batch) * seq + row) * heads + tile.head) * head_dim,
                                 static_cast<int64_t>(heads) * head_dim, seq - row, head_dim);
        }
    }
}

}  // namespace

// head_dim <= 64, a multiple of 4. qkv: a map for load_tile.
// Grid: any number of blocks, best one a multiprocessor, of 512 threads with 147584 bytes of dynamic shared memory.
// Launches must not overlap.
extern "C" __global__ void __launch_bounds__(Shape<64>::kThreads, 1)
attention_forward_hopper_64(const __grid_constant__ CUtensorMap qkv, bf16* __restrict__ out,
                            float* __restrict__ log_sum_exp, int batch, int seq, int heads, int kv_heads,
                            int head_dim) {
    attention_forward<64>(&qkv, out, log_sum_exp, batch, seq, heads, kv_heads, head_dim);
}

// The same for 64 < head_dim <= 128 with 384 threads and 180320 bytes.
extern "C" __global__ void __launch_bounds__(Shape<128>::kThreads, 1)
attention_forward_hopper_128(const __grid_constant__ CUtensorMap qkv, bf16* __restrict__ out,
                             float* __restrict__ log_sum_exp, int batch, int seq, int heads, int kv_heads,
                             int head_dim) {
    attention_forward<128>(&qkv, out, log_sum_exp, batch, seq, heads, kv_heads, head_dim);
}
