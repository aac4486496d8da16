// One AdamW step over all tensors: clipping, moments, f32 weights; zeroes the gradients.
//
//     g = gradient * factor;  m += (1 - beta1) (g - m);  v += (1 - beta2) (g^2 - v)
//     w -= lr (m correction1 / (sqrt(v correction2) + eps) + decay w)
//
// The update always uses m and v as computed in f32; how they are kept until the next step:
//   f32.
//   bf16, m to nearest, v stochastically: a step changes m by about a tenth, far above half a unit of bf16 (0.2 to
//     0.4%), but v by as little as 1 - beta2 = 0.1%, which rounding to nearest would drop.
//   8 bits, blocks of 256 elements with an f32 scale (the largest |m|, the largest v): small floats of 3 mantissa bits
//     over 16 octaves for |m| (linear about zero) and 32 for v, as the update divides m by sqrt(v), so that relative
//     errors count. v has no code for zero, so that no m meets a vanished v. Rounding is stochastic, which leaves the
//     means unbiased; to nearest, most changes would be dropped.
// The random bits are a hash of the step and the element: the same in every run.

#include "common.cuh"
#include "optimizer.cuh"

namespace {

constexpr int kAdamThreads = 128;
constexpr int kWarpElements = 256;      // that a warp handles at a time, 8 a lane; an 8-bit block
constexpr uint32_t kOne = 0x3f800000u;  // bits of 1.f
constexpr int kMantissa = 20;           // bits of an f32 mantissa below the 3 that 8-bit codes keep
constexpr float kMeanTop = 61432.f;     // 1 + it is just below the float of the largest code of 7 bits, 1.875 * 2^15
constexpr float kSquareTop = 4.026e9f;  // just below that of 8 bits, 1.875 * 2^31
constexpr float kTiny = 1e-28f;         // a largest m or v below it is zero

struct AdamWStep {
    float lr;
    float weight_decay;
    float correction1;  // 1 / (1 - beta1^t)
    float correction2;  // 1 / (1 - beta2^t)
    float factor;       // on every gradient, clipping included
    float beta1;
    float beta2;
    float eps;      // > 0
    uint32_t seed;  // of the rounding of bf16 and 8-bit moments: the step's number
};

// Where a lane's 8 elements are: 4 from `first` on, 4 from `first` + 128 on.
struct Lane {
    int64_t first;
    bool inside[2];
};

// Four elements as they lie in memory; zero bits are zero in every type.
template <typename T>
struct FourOf;
template <>
struct FourOf<float> {
    using Type = float4;
};
template <>
struct FourOf<bf16> {
    using Type = uint2;
};
template <>
struct FourOf<uint8_t> {
    using Type = uint32_t;
};
template <typename T>
using Four = typename FourOf<T>::Type;

__device__ __forceinline__ void unpack(const float4& four, float* x) {
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

__device__ __forceinline__ void unpack(const uint2& four, float* x) {
    x[0] = __uint_as_float(four.x << 16), x[1] = __uint_as_float(four.x & 0xffff0000u);
    x[2] = __uint_as_float(four.y << 16), x[3] = __uint_as_float(four.y & 0xffff0000u);
}

template <typename T>
__device__ __forceinline__ Four<T> pack(const float* x) {
    if constexpr (sizeof(T) == 4) return make_float4(x[0], x[1], x[2], x[3]);
    if constexpr (sizeof(T) == 2) return make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
}

// The pointers come from a table in memory: the compiler has to be told that they are global.
template <typename T>
__device__ __forceinline__ void load_kept(const T* p, const Lane& lane, Four<T> (&x)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        __builtin_assume(__isGlobal(p));
        x[half] = Four<T>();
        if (lane.inside[half]) x[half] = *reinterpret_cast<const Four<T>*>(p + lane.first + 128 * half);
    }
}

template <typename T>
__device__ __forceinline__ void store_kept(T* p, const Lane& lane, const Four<T> (&x)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        __builtin_assume(__isGlobal(p));
        if (lane.inside[half]) *reinterpret_cast<Four<T>*>(p + lane.first + 128 * half) = x[half];
    }
}

template <typename T>
__device__ __forceinline__ void store_kept(T* p, const Lane& lane, const float (&x)[8]) {
    const Four<T> packed[2] = {pack<T>(x), pack<T>(x + 4)};
    store_kept(p, lane, packed);
}

__device__ __forceinline__ uint32_t hash(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

__device__ __forceinline__ float sqrt_fast(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The codes of 8 bits number the floats of 3 mantissa bits from 1 on.
__device__ __forceinline__ float decode_byte(uint32_t word, int byte) {
    return __uint_as_float((__byte_perm(word, 0, 0x4440 + byte) << kMantissa) + kOne);
}

// The code of one of the two such floats about x >= 1, in the high byte; the chances are such that the mean is x. Takes
// one byte of random bits.
__device__ __forceinline__ uint32_t encode_byte(float x, uint32_t random, int byte) {
    const uint32_t uniform = (byte < 2 ? random << (12 - 8 * byte) : random >> (8 * byte - 12)) & 0xff000u;
    return (__float_as_uint(x) + uniform + (0x800u - kOne)) << (32 - 8 - kMantissa);
}

__device__ __forceinline__ uint32_t pack_high_bytes(const uint32_t (&x)[4]) {
    return __byte_perm(__byte_perm(x[0], x[1], 0x0073), __byte_perm(x[2], x[3], 0x0073), 0x5410);
}

// The moments of one tensor, kept in f32 or bf16.
template <typename T>
struct Moments {
    T *m, *v;

    // Of a lane, as they lie in memory.
    struct Kept {
        Four<T> m[2], v[2];
    };

    __device__ __forceinline__ explicit Moments(const OptimizerTensor& tensor)
        : m(static_cast<T*>(tensor.m)), v(static_cast<T*>(tensor.v)) {}

    __device__ __forceinline__ void load(const Lane& lane, Kept& kept) const {
        load_kept(m, lane, kept.m);
        load_kept(v, lane, kept.v);
    }

    static __device__ __forceinline__ void decode(const Kept& kept, float (&m_out)[8], float (&v_out)[8]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            unpack(kept.m[half], m_out + 4 * half);
            unpack(kept.v[half], v_out + 4 * half);
        }
    }

    // `random`: the lane may hash this number and the next 7.
    __device__ __forceinline__ void store(const Lane& lane, const float (&m_in)[8], float (&v_in)[8],
                                          uint32_t random) const {
        if constexpr (sizeof(T) == 2) {
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
                const uint32_t bits = hash(random + i);
                v_in[i] = round_up(v_in[i], bits >> 16);
                v_in[i + 1] = round_up(v_in[i + 1], bits & 0xffffu);
            }
        }
        store_kept(m, lane, m_in);
        store_kept(v, lane, v_in);
    }

    // x >= 0 to one of the two bf16 values about it.
    static __device__ __forceinline__ float round_up(float x, uint32_t random16) {
        const uint32_t bits = __float_as_uint(x);
        return __uint_as_float((bits < 0x7f7f0000u ? bits + random16 : bits) & 0xffff0000u);
    }
};

// The same in 8 bits: a sign and the code of 1 + |m| / scale * kMeanTop; the code of v / scale * kSquareTop.
template <>
struct Moments<uint8_t> {
    uint8_t *m, *v;
    float *m_scale, *v_scale;

    struct Kept {
        uint32_t m[2], v[2];
        float m_scale, v_scale;
    };

    __device__ __forceinline__ explicit Moments(const OptimizerTensor& tensor)
        : m(static_cast<uint8_t*>(tensor.m)),
          v(static_cast<uint8_t*>(tensor.v)),
          m_scale(tensor.m_scale),
          v_scale(tensor.v_scale) {}

    __device__ __forceinline__ void load(const Lane& lane, Kept& kept) const {
        load_kept(m, lane, kept.m);
        load_kept(v, lane, kept.v);
        kept.m_scale = lane.inside[0] ? m_scale[lane.first / kWarpElements] : 0.f;
        kept.v_scale = lane.inside[0] ? v_scale[lane.first / kWarpElements] : 0.f;
    }

    static __device__ __forceinline__ void decode(const Kept& kept, float (&m_out)[8], float (&v_out)[8]) {
        const float m_unit = kept.m_scale * (1.f / kMeanTop), v_unit = kept.v_scale * (1.f / kSquareTop);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t word = kept.m[i / 4];
            const float size = decode_byte(word & 0x7f7f7f7fu, i % 4) * m_unit - m_unit;
            m_out[i] = copysignf(size, __uint_as_float(word << (24 - 8 * (i % 4))));
            v_out[i] = decode_byte(kept.v[i / 4], i % 4) * v_unit;
        }
    }

    __device__ __forceinline__ void store(const Lane& lane, const float (&m_in)[8], const float (&v_in)[8],
                                          uint32_t random) const {
        float m_largest = 0.f, v_largest = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            m_largest = fmaxf(m_largest, fabsf(m_in[i]));
            v_largest = fmaxf(v_largest, v_in[i]);
        }
        m_largest = warp_max(m_largest), v_largest = warp_max(v_largest);
        if (threadIdx.x % kWarp == 0) {
            m_scale[lane.first / kWarpElements] = m_largest;
            v_scale[lane.first / kWarpElements] = v_largest;
        }
        const float m_factor = m_largest < kTiny ? 0.f : __fdividef(kMeanTop, m_largest);
        const float v_factor = v_largest < kTiny ? 0.f : __fdividef(kSquareTop, v_largest);
        uint32_t m_words[2], v_words[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t m_random = hash(random + 2 * half), v_random = hash(random + 2 * half + 1);
            uint32_t m_codes[4], v_codes[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float x = m_in[4 * half + i];
                m_codes[i] = encode_byte(1.f + fabsf(x) * m_factor, m_random, i) | (__float_as_uint(x) & 0x80000000u);
                v_codes[i] = encode_byte(fmaxf(v_in[4 * half + i] * v_factor, 1.f), v_random, i);
            }
            m_words[half] = pack_high_bytes(m_codes);
            v_words[half] = pack_high_bytes(v_codes);
        }
        store_kept(m, lane, m_words);
        store_kept(v, lane, v_words);
    }
};

template <typename Gradient, typename State>
__device__ __forceinline__ void adamw(const OptimizerTensor* tensors, const uint32_t* tensor_of_block, int first_block,
                                      const AdamWStep& step) {
    constexpr int kStride = kAdamThreads / kWarp * kWarpElements;
    const uint32_t block = first_block + blockIdx.x;
    const OptimizerTensor tensor = tensors[tensor_of_block[block]];
    const int64_t start = static_cast<int64_t>(block - tensor.first_block) * kOptimizerBlock;
    const int64_t left = tensor.count - start;
    const int count = static_cast<int>(left < kOptimizerBlock ? left : kOptimizerBlock);
    const int warp_offset = threadIdx.x / kWarp * kWarpElements, lane_offset = threadIdx.x % kWarp * 4;
    const auto lane_at = [=](int i) {
        i += lane_offset;
        return Lane{start + i, {i < count, i + 128 < count}};
    };
    Gradient* gradient = static_cast<Gradient*>(tensor.gradient);
    const bool zero = !(tensor.flags & kKeepGradient);
    const Four<Gradient> zeros[2] = {};
    const float decay = tensor.flags & kDecay ? step.weight_decay : 0.f;
    const uint32_t random = hash(step.seed) + block * kOptimizerBlock + 2 * lane_offset;
    const Moments<State> moments(tensor);
    Four<Gradient> next_g[2];
    Four<float> next_w[2];
    typename Moments<State>::Kept next_kept;
    const auto load_next = [&](int i) {
        const Lane lane = lane_at(i);
        load_kept(gradient, lane, next_g);
        load_kept(tensor.weights, lane, next_w);
        moments.load(lane, next_kept);
    };

    load_next(warp_offset);
#pragma unroll 1
    for (int i = warp_offset; i < count; i += kStride) {
        float w[8], g[8], m[8], v[8];
        unpack(next_g[0], g), unpack(next_g[1], g + 4);
        unpack(next_w[0], w), unpack(next_w[1], w + 4);
        moments.decode(next_kept, m, v);
        load_next(i + kStride);  // before the stores, so that the loads are always under way
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            g[j] *= step.factor;
            m[j] += (1.f - step.beta1) * (g[j] - m[j]);
            v[j] += (1.f - step.beta2) * (g[j] * g[j] - v[j]);
            const float update = __fdividef(m[j] * step.correction1, sqrt_fast(v[j] * step.correction2) + step.eps);
            w[j] -= step.lr * (update + decay * w[j]);
        }
        const Lane lane = lane_at(i);
        if (zero) store_kept(gradient, lane, zeros);
        store_kept(tensor.weights, lane, w);
        moments.store(lane, m, v, random + i);
    }
}

}  // namespace

// Names: adamw_{gradient}_{state}. tensors: the table; tensor_of_block (all blocks,): index in it. Block b of the grid
// does block first_block + b, so that tensors of one gradient type, placed together in the table, can have a launch of
// their own. Grid: number of blocks to do. Block: 128.
extern "C" __global__ void __launch_bounds__(kAdamThreads)
adamw_f32_f32(const OptimizerTensor* __restrict__ tensors, const uint32_t* __restrict__ tensor_of_block, int first_block,
              const __grid_constant__ AdamWStep step) {
    adamw<float, float>(tensors, tensor_of_block, first_block, step);
}

extern "C" __global__ void __launch_bounds__(kAdamThreads)
adamw_f32_bf16(const OptimizerTensor* __restrict__ tensors, const uint32_t* __restrict__ tensor_of_block, int first_block,
               const __grid_constant__ AdamWStep step) {
    adamw<float, bf16>(tensors, tensor_of_block, first_block, step);
}

extern "C" __global__ void __launch_bounds__(kAdamThreads)
adamw_f32_8bit(const OptimizerTensor* __restrict__ tensors, const uint32_t* __restrict__ tensor_of_block, int first_block,
               const __grid_constant__ AdamWStep step) {
    adamw<float, uint8_t>(tensors, tensor_of_block, first_block, step);
}

extern "C" __global__ void __launch_bounds__(kAdamThreads)
adamw_bf16_f32(const OptimizerTensor* __restrict__ tensors, const uint32_t* __restrict__ tensor_of_block, int first_block,
               const __grid_constant__ AdamWStep step) {
    adamw<bf16, float>(tensors, tensor_of_block, first_block, step);
}

extern "C" __global__ void __launch_bounds__(kAdamThreads)
adamw_bf16_bf16(const OptimizerTensor* __restrict__ tensors, const uint32_t* __restrict__ tensor_of_block, int first_block,
                const __grid_constant__ AdamWStep step) {
    adamw<bf16, bf16>(tensors, tensor_of_block, first_block, step);
}

extern "C" __global__ void __launch_bounds__(kAdamThreads)
adamw_bf16_8bit(const OptimizerTensor* __restrict__ tensors, const uint32_t* __restrict__ tensor_of_block, int first_block,
                const __grid_constant__ AdamWStep step) {
    adamw<bf16, uint8_t>(tensors, tensor_of_block, first_block, step);
}
