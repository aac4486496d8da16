// RMSNorm of a row of f32 features by a block, and its int8 codes, as the CPU's passes compute them.
#pragma once

#include "row.cuh"

namespace {

constexpr int kQuads = 4;  // vectors of four features that a thread has, at most

// The factors of a normalised row: with p = x * weight, n = p * rstd, code = round(p * per_code), n ~ code * scale.
struct Normed {
    float rstd, per_code, scale;
};

__device__ __forceinline__ int quad_of_thread(int i) { return threadIdx.x + i * blockDim.x; }

// Vectors past the end are zeros. `load_quad` gives vector `quad`.
template <class LoadQuad>
__device__ __forceinline__ void load_row(float4 (&row)[kQuads], int features, LoadQuad load_quad) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
        const int quad = quad_of_thread(i);
        row[i] = quad < features / 4 ? load_quad(quad) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
}

// Norm weights: nothing writes them while a model runs.
__device__ __forceinline__ void load_norm(float4 (&weight)[kQuads], const float* norm, int features) {
    load_row(weight, features, [&](int quad) { return __ldg(reinterpret_cast<const float4*>(norm) + quad); });
}

// x becomes x * weight. A barrier is passed.
__device__ __forceinline__ Normed norm_row(float4 (&x)[kQuads], const float4 (&weight)[kQuads], int features,
                                           float eps) {
    float squares = 0.f, most = 0.f;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
        float4& v = x[i];
        const float4& w = weight[i];
        squares += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
        v.x *= w.x, v.y *= w.y, v.z *= w.z, v.w *= w.w;
        most = max_abs(max_abs(max_abs(max_abs(most, v.x), v.y), v.z), v.w);
    }
    Rows<1, true, 1>(0).reduce(squares, most);
    Normed normed;
    normed.rstd = __fdiv_rn(1.f, __fsqrt_rn(squares / features + eps));
    const float absmax = most * normed.rstd;
    normed.per_code = __fdiv_rn(127.f, absmax < kAbsmaxFloor ? kAbsmaxFloor : absmax) * normed.rstd;
    normed.scale = code_scale(absmax);
    return normed;
}

// Four codes in a word.
__device__ __forceinline__ uint32_t quad_codes(const float4& product, float per_code) {
    const float low[2] = {rounded_code(product.x, per_code), rounded_code(product.y, per_code)};
    const float high[2] = {rounded_code(product.z, per_code), rounded_code(product.w, per_code)};
    return __byte_perm(__byte_perm(__float_as_uint(low[0]), __float_as_uint(low[1]), 0x0040),
                       __byte_perm(__float_as_uint(high[0]), __float_as_uint(high[1]), 0x0040), 0x5410);
}

// act(gate) * up, with act silu or, for `relu2`, max(x, 0)^2.
__device__ __forceinline__ float gated(float gate, float up, bool relu2) {
    const float positive = gate < 0.f ? 0.f : gate;  // NaN stays
    return (relu2 ? positive * positive : __fdiv_rn(gate, 1.f + expf(-gate))) * up;
}

}  // namespace
