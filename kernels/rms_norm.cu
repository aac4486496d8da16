// RMSNorm by rows, with int8 codes of its result, and backward: x (rows, features) bf16, weight (features,) f32.
// With r = 1 / sqrt(mean(x^2) + eps) and n = x * r * weight: scale = max(absmax(n), 1e-5) / 127, code = round(n /
// scale).
//
// A block (_warp: a warp) takes a row at a time and walks over the rows: any grid is right. As many blocks a
// multiprocessor are best as have 48 KB of dynamic shared memory in all (rms_norm 24, backward 64, in 8 bits 96),
// rounded up, if so many fit: fewer leave too few loads under way, more disturb each other in device memory.

#include "row.cuh"

namespace {

template <int kVectors, bool kBlock, bool kQuantize>
__device__ __forceinline__ void forward_rows(const bf16* __restrict__ x, const float* __restrict__ weight,
                                             int8_t* __restrict__ codes, float* __restrict__ scale,
                                             bf16* __restrict__ y, float* __restrict__ rstd, int rows, int features,
                                             float eps) {
    Rows<kVectors, kBlock, 1> part(features);
    const int step = part.step();
    const float per_feature = 1.f / features;
    const auto fetch = [&](int row) {
        if (row < rows) part.fetch(0, x + static_cast<int64_t>(row) * features);
        copy_async_commit();
    };
    fetch(part.first());

    for (int row = part.first(); row < rows; row += step) {
        copy_async_wait<0>();
        float products[kVectors][8];
        float squares = 0.f, absmax = 0.f;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            float v[8], w[8];
            unpack8(*part.staged(0, i), v);
            part.load_weight(weight, i, w);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                squares = fmaf(v[j], v[j], squares);
                products[i][j] = __fmul_rn(v[j], w[j]);
                if (kQuantize) absmax = max_abs(absmax, products[i][j]);
            }
        }
        fetch(row + step);

        if (kQuantize)
            part.reduce(squares, absmax);
        else
            squares = part.reduce_sum(squares);
        const float r = rsqrtf(squares * per_feature + eps);
        const float s = code_scale(absmax * r);  // r > 0: absmax(product * r) is absmax(product) * r, to the bit
        const float factor = code_factor(r, s);
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            if (!part.inside(i)) continue;
            const int64_t at = static_cast<int64_t>(row) * features + 8 * part.vector(i);
            float out[8];
#pragma unroll
            for (int j = 0; j < 8; ++j)
                out[j] = kQuantize ? rounded_code(products[i][j], factor) : products[i][j] * r;
            if (kQuantize)
                *reinterpret_cast<uint2*>(codes + at) = pack_codes(out);
            else
                store8(y + at, pack8(out));
        }
        if (part.thread() == 0) {
            rstd[row] = r;
            if (kQuantize) scale[row] = s;
        }
    }
}

// With g = dn * weight: dx = r * g - x * r^3 * (g . x) / features (+ dresidual); dweight = sum over rows of dn * x * r.
// And the row's inputs, code * scale in bf16 or int8 codes; in the latter case also dx as an output gradient.
template <int kVectors, class Input>
__device__ __forceinline__ void backward_rows(const bf16* dn, const bf16* x, const float* weight, const float* rstd,
                                              const float* scale, const bf16* dresidual, bf16* dx, Input* inputs,
                                              float* dweight_partials, Gradient gradient, float* dscale,
                                              const float* w_scale, int rows, int features) {
    constexpr bool kQuantize = sizeof(Input) == 1;
    Rows<kVectors, true, 3> part(features);
    const int step = part.step();
    const float b = kQuantize && gradient.codes ? *w_scale : 0.f;
    float r_next = 0.f, s_next = 0.f;
    const auto fetch = [&](int row) {
        if (row < rows) {
            const int64_t at = static_cast<int64_t>(row) * features;
            part.fetch(0, dn + at);
            part.fetch(1, x + at);
            if (dresidual) part.fetch(2, dresidual + at);
            r_next = rstd[row];
            if (inputs) s_next = scale[row];
        }
        copy_async_commit();
    };
    fetch(part.first());

    float sums[kVectors][8] = {};
    for (int row = part.first(); row < rows; row += step) {
        const int64_t at = static_cast<int64_t>(row) * features;
        const float r = r_next, s = s_next;
        const float factor = code_factor(r, s);
        float dot = 0.f;
        copy_async_wait<0>();
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            float dn_value[8], x_value[8], w[8], rounded[8];
            unpack8(*part.staged(0, i), dn_value);
            unpack8(*part.staged(1, i), x_value);
            part.load_weight(weight, i, w);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float product = __fmul_rn(x_value[j], w[j]);
                dot = fmaf(dn_value[j], product, dot);
                sums[i][j] = fmaf(dn_value[j], x_value[j] * r, sums[i][j]);
                rounded[j] = rounded_code(product, factor);
            }
            if (inputs && part.inside(i)) store_inputs(inputs + at + 8 * part.vector(i), rounded, s);
        }
        const float shrink = part.reduce_sum(dot) / features * r * r * r;

        float out[kVectors][8] = {};
        float absmax = 0.f;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            float dn_value[8], x_value[8], w[8];
            unpack8(*part.staged(0, i), dn_value);
            unpack8(*part.staged(1, i), x_value);
            if (dresidual) unpack8(*part.staged(2, i), out[i]);
            part.load_weight(weight, i, w);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                out[i][j] = fmaf(dn_value[j] * w[j], r, fmaf(-x_value[j], shrink, out[i][j]));
                if (kQuantize) absmax = max_abs(absmax, out[i][j]);
            }
            const Bf16x8 packed = pack8(out[i]);
            if (part.inside(i)) store8(dx + at + 8 * part.vector(i), packed);
        }
        fetch(row + step);

        if (kQuantize && gradient.codes) {
            const float ds = code_scale(part.reduce_max(absmax) * b, kGradientFloor);
            const float dfactor = code_factor(b, ds);
#pragma unroll
            for (int i = 0; i < kVectors; ++i)
                if (part.inside(i))
                    store_gradient(gradient, at + 8 * part.vector(i), out[i], dfactor, kFp8PerCode * dfactor);
            if (part.thread() == 0) dscale[row] = ds;
        }
    }
    part.store_sums(sums, dweight_partials + static_cast<int64_t>(blockIdx.x) * features);
}

}  // namespace

// codes (rows, features) int8, scale and rstd (rows,). Blocks of round32(ceil(features / 16)) threads, 32 bytes of
// dynamic shared memory a thread.
extern "C" __global__ void __launch_bounds__(1024, 1)
rms_norm_quantize(const bf16* x, const float* weight, int8_t* codes, float* scale, float* rstd, int rows, int features,
                  float eps) {
    forward_rows<2, true, true>(x, weight, codes, scale, nullptr, rstd, rows, features, eps);
}

// The same for features <= 768, faster there. Blocks of 256 threads, 8 rows each at a time; 12288 bytes of dynamic
// shared memory.
extern "C" __global__ void __launch_bounds__(256, 1)
rms_norm_quantize_warp(const bf16* x, const float* weight, int8_t* codes, float* scale, float* rstd, int rows,
                       int features, float eps) {
    forward_rows<3, false, true>(x, weight, codes, scale, nullptr, rstd, rows, features, eps);
}

// y (rows, features) = n, rstd (rows,). Blocks as of rms_norm_quantize.
extern "C" __global__ void __launch_bounds__(1024, 1)
rms_norm(const bf16* x, const float* weight, bf16* y, float* rstd, int rows, int features, float eps) {
    forward_rows<2, true, false>(x, weight, nullptr, nullptr, y, rstd, rows, features, eps);
}

// From dn (rows, features): dx, to which dresidual is added if not null, and which may lie on either; inputs = code *
// scale if not null (else scale is not read); dweight_partials (grid, features), the column sums of each block's rows.
// Blocks of round32(ceil(features / 16)) threads; dynamic shared memory 96 bytes a thread, 64 if dresidual is null.
extern "C" __global__ void __launch_bounds__(1024, 1)
rms_norm_backward(const bf16* dn, const bf16* x, const float* weight, const float* rstd, const float* scale,
                  const bf16* dresidual, bf16* dx, bf16* inputs, float* dweight_partials, int rows, int features) {
    backward_rows<2>(dn, x, weight, rstd, scale, dresidual, dx, inputs, dweight_partials, {}, nullptr, nullptr, rows,
                     features);
}

// The same, for an 8-bit backward pass: instead of inputs the codes of rms_norm_quantize, if not null (else scale is
// not read), and if dcodes (rows, features) is not null, those of g = dx * w_scale[0], of dx in f32: dscale (rows,)
// = max(absmax(g), 1e-30) / 127, dcode = round(g / dscale), dfp8 = e4m3(3.5 * g / dscale). Launched as
// rms_norm_backward.
extern "C" __global__ void __launch_bounds__(1024, 1)
rms_norm_backward_quantize(const bf16* dn, const bf16* x, const float* weight, const float* rstd, const float* scale,
                           const bf16* dresidual, bf16* dx, int8_t* codes, float* dweight_partials, int8_t* dcodes,
                           uint8_t* dfp8, float* dscale, const float* w_scale, int rows, int features) {
    backward_rows<2>(dn, x, weight, rstd, scale, dresidual, dx, codes, dweight_partials, {dcodes, dfp8}, dscale,
                     w_scale, rows, features);
}

// sums (features,) += the sum of partials (parts, features): 32 runs of parts, each in order, then the runs in order.
// Grid: ceil(features / 32) blocks of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024)
add_column_sums(const float* __restrict__ partials, float* sums, int parts, int features) {
    __shared__ float runs[32][kWarp];
    const int run = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int column = blockIdx.x * kWarp + lane;
    const int length = (parts + 31) / 32;
    const int end = min(parts, (run + 1) * length);
    float sum = 0.f;
    if (column < features) {
#pragma unroll 8
        for (int part = run * length; part < end; ++part)
            sum += partials[static_cast<int64_t>(part) * features + column];
    }
    runs[run][lane] = sum;
    __syncthreads();
    if (run > 0 || column >= features) return;
    for (int i = 1; i < 32; ++i) sum += runs[i][lane];
    sums[column] += sum;
}
