// f = act(gate) * up, its RMSNorm and int8 codes, and backward: gate_up (rows, 2 * features) bf16, gate first.
// With r = 1 / sqrt(mean(f^2) + eps) and n = f * r * weight: scale = max(absmax(n), 1e-5) / 127, code = round(n / scale).

#include "row.cuh"

namespace {

// Activations: value and derivative. The MUFU forms of 2^x and 1/x, accurate to 2 ulp, flush denormals to zero.
struct Silu {
    static __device__ __forceinline__ float sigmoid(float x) {
        constexpr float kLog2E = 1.4426950408889634f;
        float power, result;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(__fmul_rn(x, -kLog2E)));
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(__fadd_rn(1.f, power)));
        return result;
    }
    static __device__ __forceinline__ float value(float x) { return __fmul_rn(x, sigmoid(x)); }
    static __device__ __forceinline__ float value(float x, float& slope) {
        const float s = sigmoid(x), value = __fmul_rn(x, s);
        slope = fmaf(value, 1.f - s, s);
        return value;
    }
};

struct Relu2 {
    static __device__ __forceinline__ float positive(float x) { return x < 0.f ? 0.f : x; }  // fmaxf would drop NaN
    static __device__ __forceinline__ float value(float x) { return __fmul_rn(positive(x), positive(x)); }
    static __device__ __forceinline__ float value(float x, float& slope) {
        slope = 2.f * positive(x);
        return value(x);
    }
};

template <class Act, int kVectors, bool kBlock>
__device__ __forceinline__ void forward_rows(const bf16* __restrict__ gate_up, const float* __restrict__ weight,
                                             int8_t* __restrict__ codes, float* __restrict__ scale,
                                             float* __restrict__ rstd, int rows, int features, float eps) {
    Rows<kVectors, kBlock, 2> part(features);
    const int step = part.step();
    int row = part.first();
    const auto fetch = [&](int row) {
        if (row < rows) {
            const bf16* gate = gate_up + static_cast<int64_t>(row) * 2 * features;
            part.fetch(0, gate);
            part.fetch(1, gate + features);
        }
        copy_async_commit();
    };
    fetch(row);

    for (; row < rows; row += step) {
        copy_async_wait<0>();
        float products[kVectors][8];
        float squares = 0.f, absmax = 0.f;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            float gate[8], up[8], w[8];
            unpack8(*part.staged(0, i), gate);
            unpack8(*part.staged(1, i), up);
            part.load_weight(weight, i, w);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float f = __fmul_rn(Act::value(gate[j]), up[j]);
                squares = fmaf(f, f, squares);
                products[i][j] = __fmul_rn(f, w[j]);
                absmax = max_abs(absmax, products[i][j]);
            }
        }
        fetch(row + step);

        part.reduce(squares, absmax);
        const float r = rsqrtf(squares / features + eps);
        const float s = code_scale(absmax * r);
        const float factor = __fdiv_rn(r, s);
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            if (!part.inside(i)) continue;
            float rounded[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) rounded[j] = rounded_code(products[i][j], factor);
            *reinterpret_cast<uint2*>(codes + static_cast<int64_t>(row) * features + 8 * part.vector(i)) =
                pack_codes(rounded);
        }
        if (part.thread() == 0) scale[row] = s, rstd[row] = r;
    }
}

// With g = dn * weight: df = r * g - f * r^3 * (g . f) / features;  dgate = df * up * act'(gate), dup = df * act(gate);
// dweight = sum over rows of dn * f * r.
template <class Act, int kVectors, bool kBlock>
__device__ __forceinline__ void backward_rows(const bf16* dn, const bf16* gate_up, const float* weight,
                                              const float* rstd, const float* scale, bf16* dgate_up, bf16* inputs,
                                              float* dweight_partials, int rows, int features) {
    Rows<kVectors, kBlock, 3> part(features);
    const int step = part.step();
    int row = part.first();
    float r_next = 0.f, s_next = 0.f;
    const auto fetch = [&](int row) {
        if (row < rows) {
            const bf16* gate = gate_up + static_cast<int64_t>(row) * 2 * features;
            part.fetch(0, dn + static_cast<int64_t>(row) * features);
            part.fetch(1, gate);
            part.fetch(2, gate + features);
            r_next = rstd[row], s_next = scale[row];
        }
        copy_async_commit();
    };
    fetch(row);

    float sums[kVectors][8] = {};
    for (; row < rows; row += step) {
        const int64_t at = static_cast<int64_t>(row) * features;
        const float r = r_next, s = s_next;
        Bf16x8 dn_part[kVectors], gate_part[kVectors], up_part[kVectors];
        copy_async_wait<0>();
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            dn_part[i] = *part.staged(0, i);
            gate_part[i] = *part.staged(1, i);
            up_part[i] = *part.staged(2, i);
        }
        fetch(row + step);

        const float factor = __fdiv_rn(r, s);
        float dot = 0.f;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            float dn_value[8], gate[8], up[8], w[8], input[8];
            unpack8(dn_part[i], dn_value);
            unpack8(gate_part[i], gate);
            unpack8(up_part[i], up);
            part.load_weight(weight, i, w);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float f = __fmul_rn(Act::value(gate[j]), up[j]);
                const float product = __fmul_rn(f, w[j]);
                dot = fmaf(dn_value[j], product, dot);
                sums[i][j] = fmaf(dn_value[j], f * r, sums[i][j]);
                input[j] = (rounded_code(product, factor) - kRounder) * s;
            }
            if (part.inside(i)) store8(inputs + at + 8 * part.vector(i), pack8(input));
        }
        const float shrink = part.reduce_sum(dot) / features * r * r * r;

#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            float dn_value[8], gate[8], up[8], w[8];
            stay_packed(dn_part[i]), stay_packed(gate_part[i]), stay_packed(up_part[i]);
            unpack8(dn_part[i], dn_value);
            unpack8(gate_part[i], gate);
            unpack8(up_part[i], up);
            part.load_weight(weight, i, w);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float slope;
                const float value = Act::value(gate[j], slope);
                const float df = fmaf(dn_value[j] * w[j], r, -(value * up[j]) * shrink);
                gate[j] = df * up[j] * slope;
                up[j] = df * value;
            }
            if (part.inside(i)) {
                bf16* dgate = dgate_up + 2 * at + 8 * part.vector(i);
                store8(dgate, pack8(gate));
                store8(dgate + features, pack8(up));
            }
        }
    }
    part.store_sums(sums, dweight_partials + static_cast<int64_t>(blockIdx.x) * features);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
swiglu_quantize_warp(const bf16* gate_up, const float* weight, int8_t* codes, float* scale, float* rstd, int rows,
                     int features, float eps) {
    forward_rows<Silu, 4, false>(gate_up, weight, codes, scale, rstd, rows, features, eps);
}

extern "C" __global__ void __launch_bounds__(256)
swiglu_quantize_block(const bf16* gate_up, const float* weight, int8_t* codes, float* scale, float* rstd, int rows,
                      int features, float eps) {
    forward_rows<Silu, 2, true>(gate_up, weight, codes, scale, rstd, rows, features, eps);
}

extern "C" __global__ void __launch_bounds__(512)
swiglu_quantize_wide(const bf16* gate_up, const float* weight, int8_t* codes, float* scale, float* rstd, int rows,
                     int features, float eps) {
    forward_rows<Silu, 4, true>(gate_up, weight, codes, scale, rstd, rows, features, eps);
}

extern "C" __global__ void __launch_bounds__(256)
swiglu_backward_warp(const bf16* dn, const bf16* gate_up, const float* weight, const float* rstd,
                     const float* scale, bf16* dgate_up, bf16* inputs, float* dweight_partials, int rows,
                     int features) {
    backward_rows<Silu, 4, false>(dn, gate_up, weight, rstd, scale, dgate_up, inputs, dweight_partials,
                                  rows, features);
}

extern "C" __global__ void __launch_bounds__(256)
swiglu_backward_block(const bf16* dn, const bf16* gate_up, const float* weight, const float* rstd,
                      const float* scale, bf16* dgate_up, bf16* inputs, float* dweight_partials, int rows,
                      int features) {
    backward_rows<Silu, 2, true>(dn, gate_up, weight, rstd, scale, dgate_up, inputs, dweight_partials,
                                  rows, features);
}

extern "C" __global__ void __launch_bounds__(512)
swiglu_backward_wide(const bf16* dn, const bf16* gate_up, const float* weight, const float* rstd,
                     const float* scale, bf16* dgate_up, bf16* inputs, float* dweight_partials, int rows,
                     int features) {
    backward_rows<Silu, 4, true>(dn, gate_up, weight, rstd, scale, dgate_up, inputs, dweight_partials,
                                  rows, features);
}

extern "C" __global__ void __launch_bounds__(256)
relu2_quantize_warp(const bf16* gate_up, const float* weight, int8_t* codes, float* scale, float* rstd, int rows,
                    int features, float eps) {
    forward_rows<Relu2, 4, false>(gate_up, weight, codes, scale, rstd, rows, features, eps);
}

extern "C" __global__ void __launch_bounds__(256)
relu2_quantize_block(const bf16* gate_up, const float* weight, int8_t* codes, float* scale, float* rstd, int rows,
                     int features, float eps) {
    forward_rows<Relu2, 2, true>(gate_up, weight, codes, scale, rstd, rows, features, eps);
}

extern "C" __global__ void __launch_bounds__(512)
relu2_quantize_wide(const bf16* gate_up, const float* weight, int8_t* codes, float* scale, float* rstd, int rows,
                    int features, float eps) {
    forward_rows<Relu2, 4, true>(gate_up, weight, codes, scale, rstd, rows, features, eps);
}

extern "C" __global__ void __launch_bounds__(256)
relu2_backward_warp(const bf16* dn, const bf16* gate_up, const float* weight, const float* rstd,
                    const float* scale, bf16* dgate_up, bf16* inputs, float* dweight_partials, int rows,
                    int features) {
    backward_rows<Relu2, 4, false>(dn, gate_up, weight, rstd, scale, dgate_up, inputs, dweight_partials,
                                  rows, features);
}

extern "C" __global__ void __launch_bounds__(256)
relu2_backward_block(const bf16* dn, const bf16* gate_up, const float* weight, const float* rstd,
                     const float* scale, bf16* dgate_up, bf16* inputs, float* dweight_partials, int rows,
                     int features) {
    backward_rows<Relu2, 2, true>(dn, gate_up, weight, rstd, scale, dgate_up, inputs, dweight_partials,
                                  rows, features);
}

extern "C" __global__ void __launch_bounds__(512)
relu2_backward_wide(const bf16* dn, const bf16* gate_up, const float* weight, const float* rstd,
                    const float* scale, bf16* dgate_up, bf16* inputs, float* dweight_partials, int rows,
                    int features) {
    backward_rows<Relu2, 4, true>(dn, gate_up, weight, rstd, scale, dgate_up, inputs, dweight_partials,
                                  rows, features);
}
