// f = act(gate) * up, int8 codes of its RMSNorm, and backward: gate_up (rows, 2 * features) bf16, gate first.
// With r = 1 / sqrt(mean(f^2) + eps) and n = f * r * weight: scale = max(absmax(n), 1e-5) / 127, code = round(n /
// scale).
//
// A block takes a row at a time and walks over the rows: any grid is right. As many blocks a multiprocessor are best as
// have 48 KB of dynamic shared memory in all (backward 96, in 8 bits 64), rounded up, if so many fit: fewer leave too
// few loads under way, more disturb each other in device memory.

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

template <class Act, int kVectors>
__device__ __forceinline__ void forward_rows(const bf16* __restrict__ gate_up, const float* __restrict__ weight,
                                             int8_t* __restrict__ codes, float* __restrict__ scale,
                                             float* __restrict__ rstd, int rows, int features, float eps) {
    Rows<kVectors, true, 2> part(features);
    const int step = part.step();
    const float per_feature = 1.f / features;
    const auto fetch = [&](int row) {
        if (row < rows) {
            const bf16* gate = gate_up + static_cast<int64_t>(row) * 2 * features;
            part.fetch(0, gate);
            part.fetch(1, gate + features);
        }
        copy_async_commit();
    };
    fetch(part.first());

    for (int row = part.first(); row < rows; row += step) {
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
        const float r = rsqrtf(squares * per_feature + eps);
        const float s = code_scale(absmax * r);
        const float factor = code_factor(r, s);
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

// With g = dn * weight: df = r * g - f * r^3 * (g . f) / features;  dgate = df * up * act'(gate), dup = df *
// act(gate); dweight = sum over rows of dn * f * r. With bf16 inputs = code * scale, dgate_up = [dgate, dup]; with
// int8 ones, their codes, `gradient` of [dgate, dup], which share a dscale.
template <class Act, int kVectors, class Input>
__device__ __forceinline__ void backward_rows(const bf16* dn, const bf16* gate_up, const float* weight,
                                              const float* rstd, const float* scale, bf16* dgate_up, Gradient gradient,
                                              Input* inputs, float* dscale, const float* w_scale,
                                              float* dweight_partials, int rows, int features) {
    constexpr bool kQuantize = sizeof(Input) == 1;
    Rows<kVectors, true, 3> part(features);
    const int step = part.step();
    const float per_feature = __fdividef(1.f, features);
    const float b_gate = kQuantize ? w_scale[0] : 0.f, b_up = kQuantize ? w_scale[1] : 0.f;
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
    fetch(part.first());

    float sums[kVectors][8] = {};
    for (int row = part.first(); row < rows; row += step) {
        const int64_t at = static_cast<int64_t>(row) * features;
        const float r = r_next, s = s_next;
        copy_async_wait<0>();

        const float factor = code_factor(r, s);
        float dot = 0.f;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            if (!part.inside(i)) continue;  // a branch, lest the compiler interleave vectors, and spill
            float dn_value[8], gate[8], up[8], w[8], rounded[8];
            unpack8(*part.staged(0, i), dn_value);
            unpack8(*part.staged(1, i), gate);
            unpack8(*part.staged(2, i), up);
            part.load_weight(weight, i, w);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float f = __fmul_rn(Act::value(gate[j]), up[j]);
                const float product = __fmul_rn(f, w[j]);
                dot = fmaf(dn_value[j], product, dot);
                sums[i][j] = fmaf(dn_value[j], f * r, sums[i][j]);
                rounded[j] = rounded_code(product, factor);
            }
            store_inputs(inputs + at + 8 * part.vector(i), rounded, s);
        }
        float shrink = part.reduce_sum(dot) * per_feature * r * r;
        if (!kQuantize) shrink *= r;  // else df is df / r: r comes with the factor of the codes

        Bf16x8 dgate[kVectors], dup[kVectors];
        float gate_max = 0.f, up_max = 0.f;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            if (!part.inside(i)) continue;
            float dn_value[8], gate[8], up[8], w[8];
            unpack8(*part.staged(0, i), dn_value);
            unpack8(*part.staged(1, i), gate);
            unpack8(*part.staged(2, i), up);
            part.load_weight(weight, i, w);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float slope;
                const float value = Act::value(gate[j], slope);
                const float g = dn_value[j] * w[j], f = value * up[j];
                const float df = kQuantize ? fmaf(-f, shrink, g) : fmaf(g, r, -f * shrink);
                gate[j] = df * up[j] * slope;
                up[j] = df * value;
                if (kQuantize) gate_max = max_abs(gate_max, gate[j]), up_max = max_abs(up_max, up[j]);
            }
            dgate[i] = pack8(gate), dup[i] = pack8(up);
            if constexpr (!kQuantize) {
                bf16* out = dgate_up + 2 * at + 8 * part.vector(i);
                store8(out, dgate[i]);
                store8(out + features, dup[i]);
            }
        }
        fetch(row + step);

        if constexpr (kQuantize) {
            const float absmax = part.reduce_max(max_abs(gate_max * b_gate, up_max * b_up)) * r;
            const float ds = code_scale(absmax, kGradientFloor);
            const float df_factor = code_factor(r, ds);
            const float gate_factor = b_gate * df_factor, up_factor = b_up * df_factor;
            const float fp8_factor = kFp8PerCode * smaller(gate_factor, up_factor);
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                if (!part.inside(i)) continue;
                float gate[8], up[8];
                unpack8(dgate[i], gate);
                unpack8(dup[i], up);
                const int64_t to = 2 * at + 8 * part.vector(i);
                store_gradient(gradient, to, gate, gate_factor, fp8_factor);
                store_gradient(gradient, to + features, up, up_factor, fp8_factor);
            }
            if (part.thread() == 0) dscale[row] = ds;
        }
    }
    part.store_sums(sums, dweight_partials + static_cast<int64_t>(blockIdx.x) * features);
}

}  // namespace

// codes (rows, features) int8, scale and rstd (rows,). Blocks of round32(ceil(features / 16)) threads, 64 bytes of
// dynamic shared memory a thread. 56 registers let two blocks of 8640 features run on a multiprocessor.
extern "C" __global__ void __maxnreg__(56)
swiglu_quantize(const bf16* gate_up, const float* weight, int8_t* codes, float* scale, float* rstd, int rows,
                int features, float eps) {
    forward_rows<Silu, 2>(gate_up, weight, codes, scale, rstd, rows, features, eps);
}

extern "C" __global__ void __maxnreg__(56)
relu2_quantize(const bf16* gate_up, const float* weight, int8_t* codes, float* scale, float* rstd, int rows,
               int features, float eps) {
    forward_rows<Relu2, 2>(gate_up, weight, codes, scale, rstd, rows, features, eps);
}

// From dn (rows, features): dgate_up (rows, 2 * features), which may lie on gate_up; inputs = code * scale;
// dweight_partials (grid, features), the column sums of each block's rows. Blocks of round32(ceil(features / 32))
// threads, at most 512; 192 bytes of dynamic shared memory a thread. The bound of 768 holds it to 80 registers.
extern "C" __global__ void __launch_bounds__(768, 1)
swiglu_backward(const bf16* dn, const bf16* gate_up, const float* weight, const float* rstd, const float* scale,
                bf16* dgate_up, bf16* inputs, float* dweight_partials, int rows, int features) {
    backward_rows<Silu, 4>(dn, gate_up, weight, rstd, scale, dgate_up, {}, inputs, nullptr, nullptr,
                           dweight_partials, rows, features);
}

extern "C" __global__ void __launch_bounds__(768, 1)
relu2_backward(const bf16* dn, const bf16* gate_up, const float* weight, const float* rstd, const float* scale,
               bf16* dgate_up, bf16* inputs, float* dweight_partials, int rows, int features) {
    backward_rows<Relu2, 4>(dn, gate_up, weight, rstd, scale, dgate_up, {}, inputs, nullptr, nullptr,
                            dweight_partials, rows, features);
}

// The same, for an 8-bit backward pass: codes (rows, features), those of swiglu_quantize, and dcodes (rows, 2 *
// features), those of g = [dgate * w_scale[0], dup * w_scale[1]], rounded to bf16 on the way: dscale (rows,) =
// max(absmax(g), 1e-30) / 127, dcode = round(g / dscale); dfp8 = e4m3(3.5 * [dgate, dup] * min(w_scale) / dscale).
// Blocks of round32(ceil(features / 16)) threads; 96 bytes of dynamic shared memory a thread.
extern "C" __global__ void __launch_bounds__(1024, 1)
swiglu_backward_quantize(const bf16* dn, const bf16* gate_up, const float* weight, const float* rstd,
                         const float* scale, int8_t* codes, int8_t* dcodes, uint8_t* dfp8, float* dscale,
                         const float* w_scale, float* dweight_partials, int rows, int features) {
    backward_rows<Silu, 2>(dn, gate_up, weight, rstd, scale, nullptr, {dcodes, dfp8}, codes, dscale, w_scale,
                           dweight_partials, rows, features);
}

extern "C" __global__ void __launch_bounds__(1024, 1)
relu2_backward_quantize(const bf16* dn, const bf16* gate_up, const float* weight, const float* rstd, const float* scale,
                        int8_t* codes, int8_t* dcodes, uint8_t* dfp8, float* dscale, const float* w_scale,
                        float* dweight_partials, int rows, int features) {
    backward_rows<Relu2, 2>(dn, gate_up, weight, rstd, scale, nullptr, {dcodes, dfp8}, codes, dscale, w_scale,
                            dweight_partials, rows, features);
}

// The same for features <= 9216, faster above 8192, where registers leave room for two of these blocks on a
// multiprocessor, but one of those. Blocks of round32(ceil(features / 24)) threads; 144 bytes of dynamic shared memory
// a thread.
extern "C" __global__ void __launch_bounds__(384, 2)
swiglu_backward_quantize_wide(const bf16* dn, const bf16* gate_up, const float* weight, const float* rstd,
                              const float* scale, int8_t* codes, int8_t* dcodes, uint8_t* dfp8, float* dscale,
                              const float* w_scale, float* dweight_partials, int rows, int features) {
    backward_rows<Silu, 3>(dn, gate_up, weight, rstd, scale, nullptr, {dcodes, dfp8}, codes, dscale, w_scale,
                           dweight_partials, rows, features);
}

extern "C" __global__ void __launch_bounds__(384, 2)
relu2_backward_quantize_wide(const bf16* dn, const bf16* gate_up, const float* weight, const float* rstd,
                             const float* scale, int8_t* codes, int8_t* dcodes, uint8_t* dfp8, float* dscale,
                             const float* w_scale, float* dweight_partials, int rows, int features) {
    backward_rows<Relu2, 3>(dn, gate_up, weight, rstd, scale, nullptr, {dcodes, dfp8}, codes, dscale, w_scale,
                            dweight_partials, rows, features);
}
