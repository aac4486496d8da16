// Rotary embedding in place: the first rotated_heads heads (queries and keys) of qkv (rows, row_features) bf16, rows =
// batch * seq; pairs (i, i + head_dim / 2) turn by the angle of position row % seq; cos, sin (>= seq, head_dim / 2).
// Backward also with int8 codes of the result.

#include "row.cuh"

namespace {

// head_dim 16, 32, 64, 128 or 256: a warp takes a row at a time. Each lane turns the same eight features of every head
// that it meets, and gets their partners from the lane that has them.
__device__ __forceinline__ void turn_by_shuffles(bf16* row, const float* __restrict__ cos,
                                                 const float* __restrict__ sin, int heads, int head_dim,
                                                 float direction) {
    constexpr int kBatch = 5;  // loads under way
    const int lane = threadIdx.x % kWarp;
    const int lanes_per_half = head_dim / 16, vectors = heads * head_dim / 8;
    const int angle = lane % lanes_per_half * 8;
    const float sign = lane % (2 * lanes_per_half) < lanes_per_half ? -direction : direction;
    float c[8], s[8];
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
        const float4 c4 = *reinterpret_cast<const float4*>(cos + angle + j);
        const float4 s4 = *reinterpret_cast<const float4*>(sin + angle + j);
        c[j] = c4.x, c[j + 1] = c4.y, c[j + 2] = c4.z, c[j + 3] = c4.w;
        s[j] = sign * s4.x, s[j + 1] = sign * s4.y, s[j + 2] = sign * s4.z, s[j + 3] = sign * s4.w;
    }
    for (int first = 0; first < vectors; first += kBatch * kWarp) {
        Bf16x8 own[kBatch] = {};
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int v = first + i * kWarp + lane;
            if (v < vectors) own[i] = load8(row + 8 * v);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int v = first + i * kWarp + lane;
            float x[8], partner[8];
            unpack8(own[i], x);
            uint4& words = reinterpret_cast<uint4&>(own[i]);
            words.x = __shfl_xor_sync(0xffffffffu, words.x, lanes_per_half);
            words.y = __shfl_xor_sync(0xffffffffu, words.y, lanes_per_half);
            words.z = __shfl_xor_sync(0xffffffffu, words.z, lanes_per_half);
            words.w = __shfl_xor_sync(0xffffffffu, words.w, lanes_per_half);
            unpack8(own[i], partner);
#pragma unroll
            for (int j = 0; j < 8; ++j) x[j] = x[j] * c[j] + partner[j] * s[j];
            if (v < vectors) store8(row + 8 * v, pack8(x));
        }
    }
}

// Any head_dim <= 512 that is a multiple of 4: a block takes a row at a time through shared memory, so that global
// accesses are whole vectors, the last of which may reach into the next head; a thread turns the same two pairs of
// several heads.
// Two buffers: the next row comes while this one is turned and stored.
__device__ __forceinline__ void turn_in_shared(bf16* qkv, bf16* buffers, const float* __restrict__ cos,
                                               const float* __restrict__ sin, int rows, int seq, int heads,
                                               int row_features, int head_dim, float direction) {
    const int vectors = (heads * head_dim + 7) / 8, half = head_dim / 2, groups = half / 2;
    const int group = threadIdx.x % groups, head_step = blockDim.x / groups;
    const int first_head = threadIdx.x / groups < head_step ? threadIdx.x / groups : heads;
    bf16* now = buffers;
    bf16* next = buffers + 8 * vectors;
    const auto fetch = [&](bf16* buffer, int row) {
        const bf16* p = qkv + static_cast<int64_t>(row) * row_features;
        if (row < rows)
            for (int v = threadIdx.x; v < vectors; v += blockDim.x)
                copy_async16(shared_address(buffer + 8 * v), p + 8 * v);
        copy_async_commit();
    };
    fetch(now, blockIdx.x);
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        const int angle = row % seq * half + 2 * group;
        const float2 c = *reinterpret_cast<const float2*>(cos + angle);
        const float2 s = *reinterpret_cast<const float2*>(sin + angle);
        copy_async_wait<0>();
        __syncthreads();
        fetch(next, row + gridDim.x);
#pragma unroll 4
        for (int head = first_head; head < heads; head += head_step) {
            auto* low = reinterpret_cast<__nv_bfloat162*>(now + head * head_dim + 2 * group);
            auto* high = low + half / 2;
            const float2 a = __bfloat1622float2(*low), b = __bfloat1622float2(*high);
            const float2 sine = make_float2(direction * s.x, direction * s.y);
            *low = __floats2bfloat162_rn(a.x * c.x - b.x * sine.x, a.y * c.y - b.y * sine.y);
            *high = __floats2bfloat162_rn(b.x * c.x + a.x * sine.x, b.y * c.y + a.y * sine.y);
        }
        __syncthreads();
        bf16* p = qkv + static_cast<int64_t>(row) * row_features;
        for (int v = threadIdx.x; v < vectors; v += blockDim.x) store8(p + 8 * v, load8(now + 8 * v));
        bf16* const turned = now;
        now = next, next = turned;
    }
}

// Of kPairs pairs: the features of either half, and their cosines or sines.
template <int kPairs>
struct alignas(2 * kPairs) Half {
    __nv_bfloat162 pair[kPairs / 2];
};
template <int kPairs>
struct alignas(kPairs < 4 ? 4 * kPairs : 16) Angles {
    float value[kPairs];
};

// Over the block, each of two values >= 0 or NaN, which as bits is the largest of all. The two scratches take turns, so
// that one barrier suffices.
__device__ __forceinline__ void block_max(float (&max)[2], int parity) {
    __shared__ uint32_t maxima[2][2][kWarp];
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t bits = __reduce_max_sync(0xffffffffu, __float_as_uint(max[i]));
        if (lane == 0) maxima[parity][i][threadIdx.x / kWarp] = bits;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i)
        max[i] = __uint_as_float(
            __reduce_max_sync(0xffffffffu, lane < blockDim.x / kWarp ? maxima[parity][i][lane] : 0u));
}

// A block takes a row at a time. A thread has the same kPairs pairs of 8 / kPairs heads, and while it turns and
// quantises those of a row, those of the next row come. kPairs 2: the codes go out through shared memory, as whole
// vectors.
template <int kPairs>
__device__ __forceinline__ void turn_back_and_quantize(const bf16* __restrict__ dqkv, const float* __restrict__ cos,
                                                       const float* __restrict__ sin, Gradient dqk, Gradient dv,
                                                       float* __restrict__ dqk_scale, float* __restrict__ dv_scale,
                                                       const float* __restrict__ w_scale, int rows, int seq,
                                                       int q_features, int kv_features, int head_dim) {
    extern __shared__ __align__(16) unsigned char shared[];
    constexpr int kHeads = 8 / kPairs;
    const int half = head_dim / 2, groups = half / kPairs, pairs = threadIdx.x % groups * kPairs;
    const int features = q_features + 2 * kv_features, turned = q_features + kv_features;
    const int step = blockDim.x / groups * head_dim;  // between heads of a thread
    const int head = threadIdx.x < blockDim.x / groups * groups ? threadIdx.x / groups * head_dim : features;
    const float qk_smaller = smaller(w_scale[0], w_scale[1]);
    float w[kHeads], fp8_per_code[kHeads];
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
        w[i] = w_scale[head + i * step < q_features ? 0 : head + i * step < turned ? 1 : 2];
        fp8_per_code[i] = head + i * step < turned ? kFp8PerCode * qk_smaller / w[i] : kFp8PerCode;
    }

    Half<kPairs> low[kHeads] = {}, high[kHeads] = {};
    Angles<kPairs> cosine, sine;
    const auto fetch = [&](int row) {
        if (row >= rows) return;
        const bf16* p = dqkv + static_cast<int64_t>(row) * features + head + pairs;
        const int angle = row % seq * half + pairs;
        cosine = *reinterpret_cast<const Angles<kPairs>*>(cos + angle);
        sine = *reinterpret_cast<const Angles<kPairs>*>(sin + angle);
#pragma unroll
        for (int i = 0; i < kHeads; ++i)
            if (head + i * step < features) {
                low[i] = *reinterpret_cast<const Half<kPairs>*>(p + i * step);
                high[i] = *reinterpret_cast<const Half<kPairs>*>(p + i * step + half);
            }
    };
    fetch(blockIdx.x);
    int parity = 0;
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        float g[kHeads][2][kPairs];
        float absmax[2] = {};
#pragma unroll
        for (int i = 0; i < kHeads; ++i) {
            const bool turn = head + i * step < turned;
            float most = 0.f;
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                const float a = __bfloat162float(j % 2 ? low[i].pair[j / 2].y : low[i].pair[j / 2].x);
                const float b = __bfloat162float(j % 2 ? high[i].pair[j / 2].y : high[i].pair[j / 2].x);
                const float c = turn ? cosine.value[j] : 1.f, s = turn ? sine.value[j] : 0.f;
                g[i][0][j] = (a * c + b * s) * w[i];
                g[i][1][j] = (b * c - a * s) * w[i];
                most = max_abs(max_abs(most, g[i][0][j]), g[i][1][j]);
            }
            absmax[0] = max_abs(absmax[0], turn ? most : 0.f);
            absmax[1] = max_abs(absmax[1], turn ? 0.f : most);
        }
        fetch(row + gridDim.x);

        block_max(absmax, parity);
        parity ^= 1;
        const float qk_scale = code_scale(absmax[0], kGradientFloor), v_scale = code_scale(absmax[1], kGradientFloor);
        // Where a feature goes, less its place in dqkv.
        const int64_t qk_at = static_cast<int64_t>(row) * turned;
        const int64_t v_at = static_cast<int64_t>(row) * kv_features - turned;
#pragma unroll
        for (int i = 0; i < 2 * kHeads; ++i) {
            if (head + i / 2 * step >= features) continue;
            const int feature = head + i / 2 * step + pairs + i % 2 * half;
            const bool turn = feature < turned;
            const float factor = code_factor(1.f, turn ? qk_scale : v_scale), fp8_factor = fp8_per_code[i / 2] * factor;
            const float(&value)[kPairs] = g[i / 2][i % 2];
            if constexpr (kPairs == 8) {
                store_gradient(turn ? dqk : dv, (turn ? qk_at : v_at) + feature, value, factor, fp8_factor);
            } else {
                const float rounded[2] = {rounded_code(value[0], factor), rounded_code(value[1], factor)};
                *reinterpret_cast<uint16_t*>(shared + feature) = static_cast<uint16_t>(
                    __byte_perm(__float_as_uint(rounded[0]), __float_as_uint(rounded[1]), 0x0040));
                *reinterpret_cast<uint16_t*>(shared + features + feature) =
                    static_cast<uint16_t>(pack_fp8(value[0] * fp8_factor, value[1] * fp8_factor));
            }
        }
        if (threadIdx.x == 0) dqk_scale[row] = qk_scale, dv_scale[row] = v_scale;
        if constexpr (kPairs < 8) {
            __syncthreads();
            for (int feature = 16 * threadIdx.x; feature < features; feature += 16 * blockDim.x) {
                const Gradient to = feature < turned ? dqk : dv;
                const int64_t at = (feature < turned ? qk_at : v_at) + feature;
                *reinterpret_cast<uint4*>(to.codes + at) = *reinterpret_cast<const uint4*>(shared + feature);
                *reinterpret_cast<uint4*>(to.fp8 + at) = *reinterpret_cast<const uint4*>(shared + features + feature);
            }
        }
    }
}

}  // namespace

// direction 1 forward, -1 backward. Any grid of blocks of 128 threads is right, best are four a multiprocessor. Dynamic
// shared memory: none if head_dim is a power of two from 16 to 256, else 32 * ceil(rotated_heads * head_dim / 8) bytes
// (and head_dim at most 512, row_features a multiple of 8).
extern "C" __global__ void __launch_bounds__(128)
rope(bf16* qkv, const float* cos, const float* sin, int rows, int seq, int rotated_heads, int row_features,
     int head_dim, float direction) {
    extern __shared__ __align__(16) unsigned char shared[];
    if (head_dim < 16 || head_dim > 256 || (head_dim & (head_dim - 1)) != 0) {
        turn_in_shared(qkv, reinterpret_cast<bf16*>(shared), cos, sin, rows, seq, rotated_heads, row_features, head_dim,
                       direction);
        return;
    }
    const int warps = blockDim.x / kWarp;
    for (int row = blockIdx.x * warps + threadIdx.x / kWarp; row < rows; row += gridDim.x * warps) {
        const int angles = row % seq * (head_dim / 2);
        turn_by_shuffles(qkv + static_cast<int64_t>(row) * row_features, cos + angles, sin + angles, rotated_heads,
                         head_dim, direction);
    }
}

// Int8 codes, their scales (rows,) and e4m3 values of dqkv (rows, features) bf16, features = q_features + 2 *
// kv_features: gradients by queries and keys are turned back, then those by q, k and v are multiplied by w_scale[0],
// [1] and [2] (g); scale = max(absmax(g), 1e-30) / 127, code = round(g / scale); and e4m3(3.5 * (g / b) * min(b) /
// scale). dqk (rows, q_features + kv_features) and dv (rows, kv_features) have scales of their own: the former is
// smaller by orders of magnitude while attention is still even. head_dim: a multiple of 4, q_features and
// kv_features: of 16. Any grid is right, best are as many blocks as fit, of round32(threads) <= 1024 threads:
// features / 16 and no dynamic shared memory if head_dim is a multiple of 16, else head_dim / 4 * ceil(heads / 4)
// and 2 * features bytes (heads: of q, k and v).
extern "C" __global__ void __launch_bounds__(1024)
rope_backward_quantize(const bf16* dqkv, const float* cos, const float* sin, int8_t* dqk, uint8_t* dqk_fp8,
                       float* dqk_scale, int8_t* dv, uint8_t* dv_fp8, float* dv_scale, const float* w_scale, int rows,
                       int seq, int q_features, int kv_features, int head_dim) {
    const Gradient qk = {dqk, dqk_fp8}, v = {dv, dv_fp8};
    if (head_dim % 16 == 0)
        turn_back_and_quantize<8>(dqkv, cos, sin, qk, v, dqk_scale, dv_scale, w_scale, rows, seq, q_features,
                                  kv_features, head_dim);
    else
        turn_back_and_quantize<2>(dqkv, cos, sin, qk, v, dqk_scale, dv_scale, w_scale, rows, seq, q_features,
                                  kv_features, head_dim);
}
