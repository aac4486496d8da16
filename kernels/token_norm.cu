// RMSNorm of f32 rows for inference: x (rows, features) -> int8 codes (rows, stride), zeros from `features` on, and
// scale (rows,), or normalised f32. With r = 1 / sqrt(mean(x^2) + eps) and n = x * r * weight: scale = max(absmax(n),
// 1e-5) / 127, code = round(n / scale).

#include "normed_row.cuh"

namespace {

__device__ __forceinline__ void store_codes(const float4 (&product)[kQuads], const Normed& normed, int8_t* codes,
                                            float* scale, int stride) {
    if (threadIdx.x == 0) scale[blockIdx.x] = normed.scale;
    uint32_t* out = reinterpret_cast<uint32_t*>(codes + static_cast<int64_t>(blockIdx.x) * stride);
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
        if (quad_of_thread(i) < stride / 4) out[quad_of_thread(i)] = quad_codes(product[i], normed.per_code);
}

// x += y, unless y is null; the sum.
__device__ __forceinline__ void load_sum(float4 (&row)[kQuads], float* x, const float* y, int features) {
    float4* to = reinterpret_cast<float4*>(x + static_cast<int64_t>(blockIdx.x) * features);
    const float4* more = reinterpret_cast<const float4*>(y + static_cast<int64_t>(blockIdx.x) * features);
    load_row(row, features, [&](int quad) {
        float4 v = to[quad];
        if (y != nullptr) {
            const float4 a = more[quad];
            v.x += a.x, v.y += a.y, v.z += a.z, v.w += a.w;
            to[quad] = v;
        }
        return v;
    });
}

}  // namespace

// Grid: (rows) blocks of round32(stride / 4) threads, at most 1024. features: a multiple of 4, at most 16384; stride: a
// multiple of 4. x += y comes before, unless y (rows, features) is null.
extern "C" __global__ void __launch_bounds__(1024)
add_norm_quantize(float* x, const float* y, const float* norm, int8_t* codes, float* scale, int features, int stride,
                  float eps) {
    float4 row[kQuads], weight[kQuads];
    load_norm(weight, norm, features);
    load_sum(row, x, y, features);
    const Normed normed = norm_row(row, weight, features, eps);
    store_codes(row, normed, codes, scale, stride);
}

extern "C" __global__ void __launch_bounds__(1024)
add_norm(float* x, const float* y, const float* norm, float* out, int features, float eps) {
    float4 row[kQuads], weight[kQuads];
    load_norm(weight, norm, features);
    wait_for_earlier_kernels();
    let_later_kernels_start();
    load_sum(row, x, y, features);
    const float r = norm_row(row, weight, features, eps).rstd;
    float4* to = reinterpret_cast<float4*>(out + static_cast<int64_t>(blockIdx.x) * features);
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
        if (quad_of_thread(i) < features / 4)
            to[quad_of_thread(i)] = make_float4(row[i].x * r, row[i].y * r, row[i].z * r, row[i].w * r);
}

// x = act(gate) * up of gate_up (rows, 2 features), gate first.
extern "C" __global__ void __launch_bounds__(1024)
gate_norm_quantize(const float* gate_up, const float* norm, int8_t* codes, float* scale, int features, int stride,
                   float eps, int relu2) {
    float4 row[kQuads], weight[kQuads];
    load_norm(weight, norm, features);
    const float4* gate = reinterpret_cast<const float4*>(gate_up + static_cast<int64_t>(blockIdx.x) * 2 * features);
    load_row(row, features, [&](int quad) {
        const float4 g = gate[quad], u = gate[features / 4 + quad];
        return make_float4(gated(g.x, u.x, relu2), gated(g.y, u.y, relu2), gated(g.z, u.z, relu2),
                           gated(g.w, u.w, relu2));
    });
    const Normed normed = norm_row(row, weight, features, eps);
    store_codes(row, normed, codes, scale, stride);
}
