// Gradients of causal attention on Hopper: from qkv (batch, seq, (heads + 2 kv_heads) * D), out and dout (batch, seq,
// heads * D) bf16 and log_sum_exp (batch, heads, seq) f32, dqkv in the shape of qkv. One kernel does the queries, one
// keys and values, and each forms the probabilities anew: 7 products in all, where one kernel could do with 5, but no
// sum leaves the registers before it is done, and all are taken in a fixed order.

#include "attention_hopper.cuh"

namespace {

// Statistics of a query: its log-sum-exp as a power of two, infinite from seq on so that probabilities are zero there,
// and delta = sum_d dout * out. They lie by head in blocks of 64 queries, 64 of the one and then 64 of the other.
constexpr int kStatistics = 2 * kChunk;
constexpr int kStatisticsRows = 128;  // queries of a block of threads that forms statistics

__host__ __device__ constexpr int statistics_blocks(int seq) {
    return (seq + kStatisticsRows - 1) / kStatisticsRows * (kStatisticsRows / kChunk);
}

// A block is one warpgroup that only copies, and some that form the gradients of 64 keys (or queries) each.
template <int kHeadDim>
struct KeyShape {
    static constexpr int kWarpgroups = 2;
    static constexpr int kKeys = kWarpgroups * kChunk;
    static constexpr int kQueries = 64;  // in one step
    static constexpr int kStages = kHeadDim == 64 ? 6 : 3;
    static constexpr bool kFactorsInRegisters = kHeadDim == 64;  // keys and values
    static constexpr int kThreads = (kWarpgroups + 1) * kWarpgroup;
    static constexpr int kCopyRegisters = 24;
    static constexpr int kRegisters = 240;
};

template <int kHeadDim>
struct QueryShape {
    static constexpr int kWarpgroups = kHeadDim == 64 ? 3 : 2;
    static constexpr int kQueries = kWarpgroups * kChunk;
    static constexpr int kKeys = 64;  // in one step
    static constexpr int kStages = kHeadDim == 64 ? 5 : 3;
    static constexpr int kThreads = (kWarpgroups + 1) * kWarpgroup;
    static constexpr int kCopyRegisters = kWarpgroups == 3 ? 32 : 40;
    static constexpr int kRegisters = kWarpgroups == 3 ? 160 : 232;
};

template <int kHeadDim>
struct KeyShared {
    static constexpr int kStages = KeyShape<kHeadDim>::kStages, kQueries = KeyShape<kHeadDim>::kQueries;
    bf16 key[KeyShape<kHeadDim>::kKeys * kHeadDim];
    bf16 value[KeyShape<kHeadDim>::kKeys * kHeadDim];
    bf16 query[kStages][kQueries * kHeadDim];
    bf16 dout[kStages][kQueries * kHeadDim];
    bf16 scratch[KeyShape<kHeadDim>::kKeys * kPanel];
    float statistics[kStages][2 * kQueries];
    uint64_t key_full, full[kStages], empty[kStages];
};

template <int kHeadDim>
struct QueryShared {
    static constexpr int kStages = QueryShape<kHeadDim>::kStages, kKeys = QueryShape<kHeadDim>::kKeys;
    bf16 query[QueryShape<kHeadDim>::kQueries * kHeadDim];
    bf16 dout[QueryShape<kHeadDim>::kQueries * kHeadDim];
    bf16 key[kStages][kKeys * kHeadDim];
    bf16 value[kStages][kKeys * kHeadDim];
    bf16 scratch[QueryShape<kHeadDim>::kQueries * kPanel];
    float statistics[QueryShape<kHeadDim>::kWarpgroups][kStatistics];
    uint64_t query_full, query_empty, full[kStages], empty[kStages];
    Tile tile;  // of the queries
};

static_assert(sizeof(KeyShared<64>) == 150632 && sizeof(KeyShared<128>) == 181816, "as the launch contract below says");
static_assert(sizeof(QueryShared<64>) == 157296 && sizeof(QueryShared<128>) == 181328);

// Transposed throughout: a warpgroup has 64 keys, and its products are (keys, queries).
template <int kHeadDim>
__device__ __forceinline__ void key_gradients(const CUtensorMap* qkv, const CUtensorMap* dout, const float* statistics,
                                              bf16* dqkv, int seq, int heads, int kv_heads, int head_dim) {
    using Shape = KeyShape<kHeadDim>;
    constexpr int kStages = Shape::kStages, kWarpgroups = Shape::kWarpgroups;
    constexpr int kKeys = Shape::kKeys, kQueries = Shape::kQueries;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    KeyShared<kHeadDim>& shared = *reinterpret_cast<KeyShared<kHeadDim>*>(shared_bytes);

    if (threadIdx.x == 0) {
        prefetch_tensor_map(qkv);
        prefetch_tensor_map(dout);
        barrier_init(&shared.key_full, 1);
        for (int i = 0; i < kStages; ++i) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.empty[i], kWarpgroups * 4);
        }
        barrier_init_fence();
    }
    __syncthreads();

    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0) - 1;  // -1: the one that copies
    const int group = heads / kv_heads;
    const int64_t query_bytes = static_cast<int64_t>(seq) * head_dim * group * 2 * sizeof(bf16);  // and dout
    const TileOrder order(gridDim.z, kv_heads, gridDim.x, query_bytes);
    const Tile tile = order.tile((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x);
    const int first_key = tile.rank * kKeys, kv_head = tile.head, batch = tile.batch;
    const int first_query = first_key / kQueries * kQueries;

    if (warpgroup < 0) {
        fewer_registers<Shape::kCopyRegisters>();
        if (threadIdx.x > 0) return;
        barrier_expect(&shared.key_full, sizeof(shared.key) + sizeof(shared.value));
        const int stride = head_stride(head_dim), key_column = (heads + kv_head) * stride;
        load_tile<kKeys, kHeadDim>(shared.key, qkv, &shared.key_full, key_column, first_key, batch);
        load_tile<kKeys, kHeadDim>(shared.value, qkv, &shared.key_full, key_column + kv_heads * stride, first_key,
                                   batch);
        Ring<kStages> ring;
        for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            const float* head_statistics =
                statistics + (static_cast<int64_t>(batch) * heads + head) * statistics_blocks(seq) * kStatistics;
            for (int query = first_query; query < seq; query += kQueries) {
                const int i = ring.stage;
                barrier_wait(&shared.empty[i], ring.phase ^ 1);
                barrier_expect(&shared.full[i],
                               sizeof(shared.query[i]) + sizeof(shared.dout[i]) + sizeof(shared.statistics[i]));
                load_tile<kQueries, kHeadDim>(shared.query[i], qkv, &shared.full[i], head * stride, query, batch);
                load_tile<kQueries, kHeadDim>(shared.dout[i], dout, &shared.full[i], head * stride, query, batch);
                load_bytes(shared.statistics[i], head_statistics + query / kChunk * kStatistics, &shared.full[i],
                           sizeof(shared.statistics[i]));
                ring.advance();
            }
        }
    } else {
        more_registers<Shape::kRegisters>();
        const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
        const float scale = 1.f / sqrtf(static_cast<float>(head_dim)), scale2 = scale * kLog2e;
        const int own_key = first_key + warpgroup * kChunk;  // the first one of the warpgroup
        const int own_query = own_key < seq ? own_key / kQueries * kQueries : first_query;  // and that sees it
        const int steps = (seq - own_query + kQueries - 1) / kQueries * group;
        bf16* key = shared.key + warpgroup * kBox;
        bf16* value = shared.value + warpgroup * kBox;

        float dk[kHeadDim / 2] = {}, dv[kHeadDim / 2] = {};
        float s[kQueries / 2], dp[kQueries / 2];
        uint32_t p_factor[kQueries / 16][4], ds_factor[kQueries / 16][4];

        const Turns<kWarpgroups> turns{warpgroup};
        barrier_wait(&shared.key_full, 0);
        zero_columns<kKeys, kHeadDim>(key, head_dim, turns.own_barrier());
        zero_columns<kKeys, kHeadDim>(value, head_dim, turns.own_barrier());
        uint32_t key_factor[kHeadDim / 16][4], value_factor[kHeadDim / 16][4];
        if constexpr (Shape::kFactorsInRegisters) {
            load_left_factor<kHeadDim, kKeys>(key_factor, key);
            load_left_factor<kHeadDim, kKeys>(value_factor, value);
        }
        const auto multiply_scores = [&](const bf16* queries) {
            if constexpr (Shape::kFactorsInRegisters) multiply_transposed<kHeadDim, kQueries>(s, key_factor, queries);
            else multiply_transposed<kHeadDim, kKeys, kQueries>(s, key, queries);
            wgmma_commit();
        };
        const auto multiply_dp = [&](const bf16* douts) {
            if constexpr (Shape::kFactorsInRegisters) multiply_transposed<kHeadDim, kQueries>(dp, value_factor, douts);
            else multiply_transposed<kHeadDim, kKeys, kQueries>(dp, value, douts);
            wgmma_commit();
        };

        // The scores of a step become probabilities, and those times dp - delta gradients of the scores.
        const auto to_probabilities = [&](int query, const float* step_statistics) {
            if (query < own_key + kChunk) {
                const int diagonal = own_key + warp * 16 + lane / 4 - query;
#pragma unroll
                for (int i = 0; i < kQueries / 2; ++i)
                    if (8 * (i / 4) + 2 * (lane % 4) + i % 2 < diagonal + 8 * (i % 4 / 2)) s[i] = -INFINITY;
            }
#pragma unroll
            for (int i = 0; i < kQueries / 2; i += 4) {
                const float2 log_sum = *reinterpret_cast<const float2*>(step_statistics + i / 32 * kStatistics +
                                                                        i % 32 * 2 + 2 * (lane % 4));
                s[i] = exp2_approx(fmaf(s[i], scale2, -log_sum.x));
                s[i + 1] = exp2_approx(fmaf(s[i + 1], scale2, -log_sum.y));
                s[i + 2] = exp2_approx(fmaf(s[i + 2], scale2, -log_sum.x));
                s[i + 3] = exp2_approx(fmaf(s[i + 3], scale2, -log_sum.y));
            }
        };
        const auto to_score_gradients = [&](const float* step_statistics) {
#pragma unroll
            for (int i = 0; i < kQueries / 2; i += 4) {
                const float2 delta = *reinterpret_cast<const float2*>(step_statistics + i / 32 * kStatistics + kChunk +
                                                                      i % 32 * 2 + 2 * (lane % 4));
                s[i] *= dp[i] - delta.x;
                s[i + 1] *= dp[i + 1] - delta.y;
                s[i + 2] *= dp[i + 2] - delta.x;
                s[i + 3] *= dp[i + 3] - delta.y;
            }
        };

        // The next step of the warpgroup; some of a head's first queries see only keys of the warpgroups before.
        Ring<kStages> ring;
        int query = first_query;
        const auto wait_for_step = [&] {
#pragma unroll 1
            for (; query < own_query; query += kQueries) {
                barrier_wait(&shared.full[ring.stage], ring.phase);
                warp_arrive(&shared.empty[ring.stage]);
                ring.advance();
                turns.take();
                turns.pass();
            }
            barrier_wait(&shared.full[ring.stage], ring.phase);
        };

        turns.begin();
        wait_for_step();
        int i = ring.stage;
        wgmma_fence();
        multiply_scores(shared.query[i]);
        multiply_dp(shared.dout[i]);
        wgmma_wait<1>();
        to_probabilities(query, shared.statistics[i]);
        to_left_factor<kQueries>(p_factor, s);
        wgmma_wait<0>();
        to_score_gradients(shared.statistics[i]);
        to_left_factor<kQueries>(ds_factor, s);

        // From here on the gradients of a step are added while the probabilities of the next one are formed.
        for (int step = 1; step < steps; ++step) {
            const int before = i;
            ring.advance();
            query += kQueries;
            if (query >= seq) query = first_query;
            wait_for_step();
            i = ring.stage;
            const auto add_gradients = [&] {
                multiply_add<kHeadDim, kQueries>(dk, ds_factor, shared.query[before]);
                multiply_add<kHeadDim, kQueries>(dv, p_factor, shared.dout[before]);
                wgmma_commit();
            };
            turns.take();
            wgmma_fence();
            if constexpr (kHeadDim == 64) {
                multiply_scores(shared.query[i]);
                multiply_dp(shared.dout[i]);
                add_gradients();
                turns.pass();
                wgmma_wait<2>();
            } else {  // dp only when the registers of the gradients' factors are free
                add_gradients();
                multiply_scores(shared.query[i]);
                wgmma_wait<0>();
                wgmma_fence();
                multiply_dp(shared.dout[i]);
                turns.pass();
            }
            to_probabilities(query, shared.statistics[i]);
            wgmma_wait<0>();
            warp_arrive(&shared.empty[before]);
            to_left_factor<kQueries>(p_factor, s);
            to_score_gradients(shared.statistics[i]);
            to_left_factor<kQueries>(ds_factor, s);
        }
        wgmma_fence();
        multiply_add<kHeadDim, kQueries>(dk, ds_factor, shared.query[i]);
        multiply_add<kHeadDim, kQueries>(dv, p_factor, shared.dout[i]);
        wgmma_commit();
        wgmma_wait<0>();

        const int row = first_key + warpgroup * kChunk + warp * 16;
        const int64_t width = static_cast<int64_t>(heads + 2 * kv_heads) * head_dim;
        const int key_column = (heads + kv_head) * head_dim, value_column = key_column + kv_heads * head_dim;
        bf16* to = dqkv + (static_cast<int64_t>(batch) * seq + row) * width;
        bf16* scratch = shared.scratch + (warpgroup * kChunk + warp * 16) * kPanel;
        store_rows<kHeadDim>(dk, scale, scale, scratch, to + key_column, width, seq - row, head_dim);
        store_rows<kHeadDim>(dv, 1.f, 1.f, scratch, to + value_column, width, seq - row, head_dim);
    }
}

__device__ unsigned int query_tiles_taken;

// A warpgroup has 64 queries, and its products are (queries, keys).
template <int kHeadDim>
__device__ __forceinline__ void query_gradients(const CUtensorMap* qkv, const CUtensorMap* dout,
                                                const float* statistics, bf16* dqkv, int batch, int seq, int heads,
                                                int kv_heads, int head_dim) {
    using Shape = QueryShape<kHeadDim>;
    constexpr int kStages = Shape::kStages, kWarpgroups = Shape::kWarpgroups;
    constexpr int kKeys = Shape::kKeys, kQueries = Shape::kQueries;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    QueryShared<kHeadDim>& shared = *reinterpret_cast<QueryShared<kHeadDim>*>(shared_bytes);

    if (threadIdx.x == 0) {
        prefetch_tensor_map(qkv);
        prefetch_tensor_map(dout);
        barrier_init(&shared.query_full, 1);
        barrier_init(&shared.query_empty, kWarpgroups * 4);
        for (int i = 0; i < kStages; ++i) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.empty[i], kWarpgroups * 4);
        }
        barrier_init_fence();
    }
    __syncthreads();

    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0) - 1;  // -1: the one that copies
    const int group = heads / kv_heads, row_tiles = (seq + kQueries - 1) / kQueries;
    const auto last_block = [&](int row) { return min(row, seq - 1) / kKeys * kKeys; };  // of keys that `row` sees

    if (warpgroup < 0) {
        fewer_registers<Shape::kCopyRegisters>();
        if (threadIdx.x > 0) return;
        const int64_t kv_bytes = static_cast<int64_t>(seq) * head_dim * 2 * sizeof(bf16);
        const TileOrder order(batch, heads, row_tiles, (kv_bytes + group - 1) / group);
        const int stride = head_stride(head_dim);
        Ring<kStages> ring;
        uint32_t tile_phase = 0;
        int index = blockIdx.x;
        while (index < order.tiles()) {
            const int next = next_tile(&query_tiles_taken, order.tiles());
            const Tile tile = order.tile(index);
            const int tile_row = (row_tiles - 1 - tile.rank) * kQueries;
            const int query_column = tile.head * stride, key_column = (heads + tile.head / group) * stride;
            const int value_column = key_column + kv_heads * stride;
            const int first_block = tile_row / kChunk, head_blocks = statistics_blocks(seq);
            const uint32_t statistics_bytes =
                min(kWarpgroups, head_blocks - first_block) * kStatistics * sizeof(float);
            const int64_t head = static_cast<int64_t>(tile.batch) * heads + tile.head;
            barrier_wait(&shared.query_empty, tile_phase ^ 1);
            shared.tile = tile;
            barrier_expect(&shared.query_full, sizeof(shared.query) + sizeof(shared.dout) + statistics_bytes);
            load_bytes(shared.statistics, statistics + (head * head_blocks + first_block) * kStatistics,
                       &shared.query_full, statistics_bytes);
            load_tile<kQueries, kHeadDim>(shared.query, qkv, &shared.query_full, query_column, tile_row, tile.batch);
            load_tile<kQueries, kHeadDim>(shared.dout, dout, &shared.query_full, query_column, tile_row, tile.batch);
            tile_phase ^= 1;
            for (int key = last_block(tile_row + kQueries - 1); key >= 0; key -= kKeys) {
                const int i = ring.stage;
                barrier_wait(&shared.empty[i], ring.phase ^ 1);
                barrier_expect(&shared.full[i], sizeof(shared.key[i]) + sizeof(shared.value[i]));
                load_tile<kKeys, kHeadDim>(shared.key[i], qkv, &shared.full[i], key_column, key, tile.batch);
                load_tile<kKeys, kHeadDim>(shared.value[i], qkv, &shared.full[i], value_column, key, tile.batch);
                ring.advance();
            }
            index = next;
        }
        barrier_wait(&shared.query_empty, tile_phase ^ 1);
        shared.tile.rank = -1;
        barrier_arrive(&shared.query_full);
    } else {
        more_registers<Shape::kRegisters>();
        const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
        const float scale = 1.f / sqrtf(static_cast<float>(head_dim)), scale2 = scale * kLog2e;
        bf16* query = shared.query + warpgroup * kBox;
        bf16* query_dout = shared.dout + warpgroup * kBox;
        bf16* scratch = shared.scratch + (warpgroup * kChunk + warp * 16) * kPanel;

        const Turns<kWarpgroups> turns{warpgroup};
        turns.begin();
        Ring<kStages> ring;
        uint32_t tile_phase = 0;
        while (true) {
            barrier_wait(&shared.query_full, tile_phase);
            tile_phase ^= 1;
            const Tile tile = shared.tile;
            if (tile.rank < 0) break;
            const int tile_row = (row_tiles - 1 - tile.rank) * kQueries;
            const int row = tile_row + warpgroup * kChunk + warp * 16;
            const float* own_statistics = shared.statistics[warpgroup] + warp * 16 + lane / 4;
            const float log_sum[2] = {own_statistics[0], own_statistics[8]};
            const float delta[2] = {own_statistics[kChunk], own_statistics[kChunk + 8]};

            float dq[kHeadDim / 2] = {};
            float s[kKeys / 2], dp[kKeys / 2];
            uint32_t ds_factor[kKeys / 16][4];

            zero_columns<kQueries, kHeadDim>(query, head_dim, turns.own_barrier());
            zero_columns<kQueries, kHeadDim>(query_dout, head_dim, turns.own_barrier());
            uint32_t query_factor[kHeadDim / 16][4];
            load_left_factor<kHeadDim, kQueries>(query_factor, query);

            const auto to_probabilities = [&](int block) {
                if (block + kKeys > tile_row + warpgroup * kChunk) {
                    const int diagonal = row + lane / 4 - block;
#pragma unroll
                    for (int i = 0; i < kKeys / 2; ++i)
                        if (8 * (i / 4) + 2 * (lane % 4) + i % 2 > diagonal + 8 * (i % 4 / 2)) s[i] = -INFINITY;
                }
#pragma unroll
                for (int i = 0; i < kKeys / 2; ++i) s[i] = exp2_approx(fmaf(s[i], scale2, -log_sum[i % 4 / 2]));
            };
            const auto to_score_gradients = [&] {
#pragma unroll
                for (int i = 0; i < kKeys / 2; ++i) s[i] *= dp[i] - delta[i % 4 / 2];
            };

            // Blocks of keys that only the warpgroups after this one see.
            int block = last_block(tile_row + kQueries - 1);
#pragma unroll 1
            for (; block > last_block(tile_row + (warpgroup + 1) * kChunk - 1); block -= kKeys) {
                barrier_wait(&shared.full[ring.stage], ring.phase);
                warp_arrive(&shared.empty[ring.stage]);
                ring.advance();
                turns.take();
                turns.pass();
            }

            int i = ring.stage;
            barrier_wait(&shared.full[i], ring.phase);
            wgmma_fence();
            multiply_transposed<kHeadDim, kKeys>(s, query_factor, shared.key[i]);
            wgmma_commit();
            multiply_transposed<kHeadDim, kQueries, kKeys>(dp, query_dout, shared.value[i]);
            wgmma_commit();
            wgmma_wait<1>();
            to_probabilities(block);
            wgmma_wait<0>();
            to_score_gradients();
            to_left_factor<kKeys>(ds_factor, s);

            // From here on the gradients of a block are added while the probabilities of the next one are formed.
            for (block -= kKeys; block >= 0; block -= kKeys) {
                const int before = i;
                ring.advance();
                i = ring.stage;
                barrier_wait(&shared.full[i], ring.phase);
                turns.take();
                wgmma_fence();
                multiply_transposed<kHeadDim, kKeys>(s, query_factor, shared.key[i]);
                wgmma_commit();
                multiply_add<kHeadDim, kKeys>(dq, ds_factor, shared.key[before]);
                wgmma_commit();
                multiply_transposed<kHeadDim, kQueries, kKeys>(dp, query_dout, shared.value[i]);
                wgmma_commit();
                turns.pass();
                wgmma_wait<2>();
                to_probabilities(block);
                wgmma_wait<0>();
                warp_arrive(&shared.empty[before]);
                to_score_gradients();
                to_left_factor<kKeys>(ds_factor, s);
            }
            warp_arrive(&shared.query_empty);
            wgmma_fence();
            multiply_add<kHeadDim, kKeys>(dq, ds_factor, shared.key[i]);
            wgmma_commit();
            wgmma_wait<0>();
            warp_arrive(&shared.empty[i]);
            ring.advance();

            const int64_t width = static_cast<int64_t>(heads + 2 * kv_heads) * head_dim;
            bf16* to = dqkv + (static_cast<int64_t>(tile.batch) * seq + row) * width + tile.head * head_dim;
            store_rows<kHeadDim>(dq, scale, scale, scratch, to, width, seq - row, head_dim);
        }
    }
}

}  // namespace

// Statistics of all queries: f32, batch * heads * ceil(seq / 128) * 256 of them, 16-byte aligned. head_dim <= 128, a
// multiple of 4. Grid: (ceil(seq / 128), heads, batch) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256)
attention_statistics_hopper(const bf16* __restrict__ out, const bf16* __restrict__ dout,
                            const float* __restrict__ log_sum_exp, float* __restrict__ statistics, int seq, int heads,
                            int head_dim) {
    constexpr int kLanes = 8;  // share a query, eight columns each at a time
    const int head = blockIdx.y, batch = blockIdx.z, lane = threadIdx.x % kLanes;
    const int64_t all_head = static_cast<int64_t>(batch) * heads + head;
    const int64_t first_block = all_head * statistics_blocks(seq) + blockIdx.x * (kStatisticsRows / kChunk);
    float* to = statistics + first_block * kStatistics;
#pragma unroll
    for (int i = threadIdx.x / kLanes; i < kStatisticsRows; i += 256 / kLanes) {
        const int row = blockIdx.x * kStatisticsRows + i;
        const int64_t at = ((static_cast<int64_t>(batch) * seq + row) * heads + head) * head_dim;
        float sum = 0.f;
#pragma unroll
        for (int column = 8 * lane; column < 128; column += 8 * kLanes) {
            if (row >= seq || column >= head_dim) continue;
            float x[8], y[8];
            unpack8(load_columns(out + at, column, head_dim), x);
            unpack8(load_columns(dout + at, column, head_dim), y);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += x[j] * y[j];
        }
#pragma unroll
        for (int other = kLanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
        if (lane == 0) {
            float* own = to + i / kChunk * kStatistics + i % kChunk;
            own[0] = row < seq ? log_sum_exp[all_head * seq + row] * kLog2e : INFINITY;
            own[kChunk] = sum;
        }
    }
}

// Columns of keys and values of dqkv. head_dim <= 64, a multiple of 4. qkv and dout: maps for load_tile.
// Grid: (ceil(seq / 128), kv_heads, batch) blocks of 384 threads with 150632 bytes of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(KeyShape<64>::kThreads, 1)
attention_key_gradients_hopper_64(const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap dout,
                                  const float* __restrict__ statistics, bf16* __restrict__ dqkv, int seq, int heads,
                                  int kv_heads, int head_dim) {
    key_gradients<64>(&qkv, &dout, statistics, dqkv, seq, heads, kv_heads, head_dim);
}

// The same for 64 < head_dim <= 128 with 181816 bytes.
extern "C" __global__ void __launch_bounds__(KeyShape<128>::kThreads, 1)
attention_key_gradients_hopper_128(const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap dout,
                                   const float* __restrict__ statistics, bf16* __restrict__ dqkv, int seq, int heads,
                                   int kv_heads, int head_dim) {
    key_gradients<128>(&qkv, &dout, statistics, dqkv, seq, heads, kv_heads, head_dim);
}

// Columns of queries of dqkv. head_dim <= 64, a multiple of 4. qkv and dout: maps for load_tile.
// Grid: any number of blocks, best one a multiprocessor, of 512 threads with 157296 bytes of dynamic shared memory.
// Launches must not overlap.
extern "C" __global__ void __launch_bounds__(QueryShape<64>::kThreads, 1)
attention_query_gradients_hopper_64(const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap dout,
                                    const float* __restrict__ statistics, bf16* __restrict__ dqkv, int batch, int seq,
                                    int heads, int kv_heads, int head_dim) {
    query_gradients<64>(&qkv, &dout, statistics, dqkv, batch, seq, heads, kv_heads, head_dim);
}

// The same for 64 < head_dim <= 128 with 384 threads and 181328 bytes.
extern "C" __global__ void __launch_bounds__(QueryShape<128>::kThreads, 1)
attention_query_gradients_hopper_128(const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap dout,
                                     const float* __restrict__ statistics, bf16* __restrict__ dqkv, int batch, int seq,
                                     int heads, int kv_heads, int head_dim) {
    query_gradients<128>(&qkv, &dout, statistics, dqkv, batch, seq, heads, kv_heads, head_dim);
}
