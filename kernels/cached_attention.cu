// Causal grouped-query attention over a cache of keys and values, for inference: qkv (tokens, heads + 2 kv_heads, D)
// f32 of the tokens from *position on; keys, values (kv_heads, capacity, D) f32, keys rotated; cos, sin (positions,
// D / 2) -> out (tokens, heads, D) = softmax(q . K^T / sqrt(D)) . V. D: a multiple of 4, at most 128.

#include <cfloat>

#include "token_heads.cuh"

namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kBatch = 2;  // keys that a group of lanes has under way
constexpr int kMerge = 8;  // partial results that are merged at a time

__device__ __forceinline__ float dot(const float4& a, const float4& b) {
    return (a.x * b.x + a.y * b.y) + (a.z * b.z + a.w * b.w);
}

__device__ __forceinline__ void add_scaled(float4& sum, float factor, const float4& v) {
    sum.x += factor * v.x, sum.y += factor * v.y, sum.z += factor * v.z, sum.w += factor * v.w;
}

// 2^x, to 2 ulp; 0 for x below -126.
__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Softmax so far: sum = sum of 2^(score - most), out = the same with values.
struct Partial {
    float most = -FLT_MAX, sum = 0.f;
    float4 out = {0.f, 0.f, 0.f, 0.f};

    // What there is, in terms of a larger maximum.
    __device__ __forceinline__ void raise(float larger) {
        const float factor = power_of_2(most - larger);
        most = larger, sum *= factor;
        out.x *= factor, out.y *= factor, out.z *= factor, out.w *= factor;
    }

    // Adds kCount others, whose maxima and sums are given in pairs.
    template <int kCount>
    __device__ __forceinline__ void merge(const float2 (&states)[kCount], const float4 (&outs)[kCount]) {
        float larger = most;
#pragma unroll
        for (int i = 0; i < kCount; ++i) larger = fmaxf(larger, states[i].x);
        raise(larger);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float factor = power_of_2(states[i].x - larger);
            sum += factor * states[i].y;
            add_scaled(out, factor, outs[i]);
        }
    }
};

// A block takes a part of the keys, blockIdx.x of gridDim.x, for kHeads query heads that share them, of token
// blockIdx.z. A key is read by kLanes lanes, four features each. The block that is done last merges the parts of all.
// Where the cache takes in the token, the keys before it come while earlier kernels still run.
template <int kLanes, int kHeads>
__device__ __forceinline__ void attend(const float* qkv, const float* cos, const float* sin, float* keys, float* values,
                                       float* out, float* parts, int* done, const int* position, const Shape& shape,
                                       int min_keys, bool appends) {
    constexpr int kGroups = kWarp / kLanes;  // of lanes, in a warp
    constexpr int kStep = kGroups * kWarps;  // keys that the block takes at a time
    constexpr int kWidth = 4 * kLanes;       // features, with those beyond D
    constexpr int kTurns = (kHeads * kWidth + kThreads - 1) / kThreads;
    __shared__ float4 queries[kHeads][kLanes];
    __shared__ float4 outs[kWarps][kHeads][kLanes];
    __shared__ float2 states[kWarps][kHeads];
    __shared__ bool is_last;

    const int D = shape.head_dim, group = shape.heads / shape.kv_heads, shares = (group + kHeads - 1) / kHeads;
    const int kv_head = blockIdx.y / shares, first = blockIdx.y % shares * kHeads;  // of the group
    const int heads = min(kHeads, group - first), token = blockIdx.z;
    const int at = *position + token, len = at + 1;
    const int span = max(min_keys, (len + gridDim.x - 1) / gridDim.x), used = (len + span - 1) / span;
    const int begin = blockIdx.x * span, end = min(len, begin + span);
    let_later_kernels_start();
    if (begin >= len) return;

    const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp, part = lane % kLanes;
    const int64_t cached = static_cast<int64_t>(kv_head) * shape.capacity * D;
    int key = begin + warp * kGroups + lane / kLanes;
    float4 k[kBatch], v[kBatch];
    const auto load = [&](int i) {
        const int64_t from = cached + static_cast<int64_t>(key + i * kStep) * D + 4 * part;
        k[i] = *reinterpret_cast<const float4*>(keys + from);
        v[i] = *reinterpret_cast<const float4*>(values + from);
    };
    const auto load_before = [&](int limit) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            k[i] = v[i] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (key + i * kStep < limit && 4 * part < D) load(i);
        }
    };
    load_before(appends ? min(end, at) : end);
    const float* const cos_row = cos + at * (D / 2);
    const float* const sin_row = sin + at * (D / 2);
    Turn turns[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; ++i) turns[i] = Turn(cos_row, sin_row, min((thread + i * kThreads) % kWidth, D - 1), D);
    const bool takes_in = appends && end == len;
    const Turn key_turn(cos_row, sin_row, min(thread, D - 1), D);
    wait_for_earlier_kernels();

    const float* const row = qkv + static_cast<int64_t>(token) * shape.features();
    const float* const q = row + (kv_head * group + first) * D;
    const float scale = 1.44269504f * rsqrtf(static_cast<float>(D));  // to base 2
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
        const int place = thread + i * kThreads, head = place / kWidth, d = place % kWidth;
        if (head < kHeads)
            reinterpret_cast<float*>(queries)[place] = head < heads && d < D ? scale * turns[i](q + head * D, d) : 0.f;
    }
    if (takes_in) {
        const float* const new_key = row + (shape.heads + kv_head) * D;
        const int64_t to = cached + static_cast<int64_t>(at) * D;
        if (thread < D) keys[to + thread] = key_turn(new_key, thread);
        const int d = thread - kThreads / 2;
        if (d >= 0 && d < D) values[to + d] = __ldcg(new_key + shape.kv_heads * D + d);
    }
    __syncthreads();
    if (takes_in && 4 * part < D) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (key + i * kStep == at) load(i);
    }

    Partial partial[kHeads];
    while (true) {
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
            const float4 query = queries[h][part];
            float score[kBatch], most = partial[h].most;
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                score[i] = dot(query, k[i]);
#pragma unroll
                for (int by = kLanes / 2; by > 0; by /= 2) score[i] += __shfl_xor_sync(0xffffffffu, score[i], by);
                if (key + i * kStep >= end) score[i] = -FLT_MAX;
                most = fmaxf(most, score[i]);
            }
            partial[h].raise(most);
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const float weight = key + i * kStep < end ? power_of_2(score[i] - most) : 0.f;
                partial[h].sum += weight;
                add_scaled(partial[h].out, weight, v[i]);
            }
        }
        key += kBatch * kStep;
        if (key - lane / kLanes >= end) break;
        load_before(end);
    }

    // The groups of lanes of a warp, then its warps.
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        Partial& p = partial[h];
#pragma unroll
        for (int by = kLanes; by < kWarp; by *= 2) {
            const float2 state = make_float2(__shfl_xor_sync(0xffffffffu, p.most, by),
                                             __shfl_xor_sync(0xffffffffu, p.sum, by));
            const float4 o = make_float4(__shfl_xor_sync(0xffffffffu, p.out.x, by),
                                         __shfl_xor_sync(0xffffffffu, p.out.y, by),
                                         __shfl_xor_sync(0xffffffffu, p.out.z, by),
                                         __shfl_xor_sync(0xffffffffu, p.out.w, by));
            p.merge<1>({state}, {o});
        }
        if (lane < kLanes) outs[warp][h][lane] = p.out;
        if (lane == 0) states[warp][h] = make_float2(p.most, p.sum);
    }
    __syncthreads();
    const int head = thread / kLanes, mine = thread % kLanes;
    const bool has_part = head < heads && 4 * mine < D;
    Partial whole;
    for (int i = 0; has_part && i < kWarps; i += kMerge) {
        float2 state[kMerge];
        float4 from[kMerge];
#pragma unroll
        for (int j = 0; j < kMerge; ++j) state[j] = states[i + j][head], from[j] = outs[i + j][head][mine];
        whole.merge(state, from);
    }

    if (used > 1) {
        // Parts (tokens, shares of heads, parts, kHeads, kWidth + 4): the values, then the maximum and the sum.
        const int64_t place = static_cast<int64_t>(token) * gridDim.y + blockIdx.y;
        float* const first_part = parts + place * gridDim.x * kHeads * (kWidth + 4);
        const auto part_of = [&](int i) { return first_part + (i * kHeads + head) * (kWidth + 4); };
        if (has_part) {
            float* const to = part_of(blockIdx.x);
            __stcg(reinterpret_cast<float4*>(to) + mine, whole.out);
            if (mine == 0) __stcg(reinterpret_cast<float2*>(to + kWidth), make_float2(whole.most, whole.sum));
        }
        __syncthreads();
        if (thread == 0) {
            __threadfence();
            is_last = atomicAdd(done + place, 1) == used - 1;
            __threadfence();
        }
        __syncthreads();
        if (!is_last) return;
        if (thread == 0) done[place] = 0;
        whole = Partial();
        for (int i = 0; has_part && i < used; i += kMerge) {
            float2 state[kMerge];
            float4 from[kMerge];
#pragma unroll
            for (int j = 0; j < kMerge; ++j) {
                const float* const p = part_of(min(i + j, used - 1));
                state[j] = __ldcg(reinterpret_cast<const float2*>(p + kWidth));
                from[j] = __ldcg(reinterpret_cast<const float4*>(p) + mine);
                if (i + j >= used) state[j] = make_float2(-FLT_MAX, 0.f), from[j] = make_float4(0.f, 0.f, 0.f, 0.f);
            }
            whole.merge(state, from);
        }
    }
    if (!has_part) return;
    const float inverse = __fdiv_rn(1.f, whole.sum);
    float* const to = out + (static_cast<int64_t>(token) * shape.heads + kv_head * group + first + head) * D + 4 * mine;
    *reinterpret_cast<float4*>(to) =
        make_float4(whole.out.x * inverse, whole.out.y * inverse, whole.out.z * inverse, whole.out.w * inverse);
}

}  // namespace

// The keys and values of tokens to the cache. Grid: (tokens) blocks of any size.
extern "C" __global__ void append_to_cache(const float* qkv, const float* cos, const float* sin, float* keys,
                                           float* values, const int* position, int heads, int kv_heads, int head_dim,
                                           int capacity) {
    const Shape shape = {heads, kv_heads, head_dim, capacity};
    const int D = head_dim, at = *position + blockIdx.x, angle = at * (D / 2);
    const float* const k = qkv + static_cast<int64_t>(blockIdx.x) * shape.features() + heads * D;
    for (int i = threadIdx.x; i < kv_heads * D; i += blockDim.x) {
        const int head = i / D, d = i % D;
        const int64_t to = (static_cast<int64_t>(head) * capacity + at) * D + d;
        keys[to] = Turn(cos + angle, sin + angle, d, D)(k + head * D, d);
        values[to] = k[kv_heads * D + i];
    }
}

// Names: cached_attention_LANES_HEADS, 4 LANES >= D. Grid: (parts, kv_heads * ceil(heads / kv_heads / HEADS), tokens)
// blocks of 512 threads; any number of parts is right, each has at least min_keys keys. parts: (tokens, grid y, grid x,
// HEADS, 4 LANES + 4) of scratch; done: (tokens, grid y) zeros, which it leaves. With `appends` the cache takes in the
// token, of which there is one; otherwise it has taken in all of them. Launches of one token may use programmatic
// serialization (sm_90).
#define CACHED_ATTENTION(lanes, query_heads)                                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) cached_attention_##lanes##_##query_heads(              \
        const float* qkv, const float* cos, const float* sin, float* keys, float* values, float* out, float* parts,  \
        int* done, const int* position, int heads, int kv_heads, int head_dim, int capacity, int min_keys,           \
        int appends) {                                                                                               \
        attend<lanes, query_heads>(qkv, cos, sin, keys, values, out, parts, done, position,                          \
                                   {heads, kv_heads, head_dim, capacity}, min_keys, appends);                        \
    }
CACHED_ATTENTION(8, 1)
CACHED_ATTENTION(8, 2)
CACHED_ATTENTION(8, 4)
CACHED_ATTENTION(16, 1)
CACHED_ATTENTION(16, 2)
CACHED_ATTENTION(16, 4)
CACHED_ATTENTION(32, 1)
CACHED_ATTENTION(32, 2)
CACHED_ATTENTION(32, 4)
