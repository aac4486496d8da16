// RMSNorm by rows, with int8 codes of its result, and backward: x (rows, features) bf16, weight (features,) f32.
// With r = 1 / sqrt(mean(x^2) + eps) and n = x * r * weight: scale = max(absmax(n), 1e-5) / 127, code = round(n / scale).
//
// Every kernel comes in instances that differ in how a row is spread:
//   _warp   features <= 1024    256 threads, a warp a row
//   _block  features <= 4096    ceil(features / 16) threads rounded up to a multiple of 32, a block a row
//   _wide   features <= 16384   ceil(features / 32) threads rounded up to a multiple of 32, a block a row
// Blocks walk over the rows: any grid does, as many blocks as the device holds at a time are best.

#include "row.cuh"

namespace {

template <int kVectors, bool kBlock, bool kQuantize>
__device__ __forceinline__ void forward_rows(const bf16* __restrict__ x, const float* __restrict__ weight,
                                             int8_t* __restrict__ codes, float* __restrict__ scale,
                                             bf16* __restrict__ y, float* __restrict__ rstd, int rows, int features,
                                             float eps) {
    Rows<kVectors, kBlock, 1> part(features);
    const int step = part.step();
    int row = part.first();
    const auto fetch = [&](int row) {
        if (row < rows) part.fetch(0, x + static_cast<int64_t>(row) * features);
        copy_async_commit();
    };
    fetch(row);

    for (; row < rows; row += step) {
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
        const float r = rsqrtf(squares / features + eps);
        const float s = code_scale(absmax * r);  // r > 0: absmax(product * r) is absmax(product) * r, to the bit
        const float factor = __fdiv_rn(r, s);
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

// With g = dn * weight: dx = r * g - x * r^3 * (g . x) / features (+ dresidual);  dweight = sum over rows of dn * x * r.
template <int kVectors, bool kBlock>
__device__ __forceinline__ void backward_rows(const bf16* dn, const bf16* x, const float* weight, const float* rstd,
                                              const float* scale, const bf16* dresidual, bf16* dx, bf16* inputs,
                                              float* dweight_partials, int rows, int features) {
    Rows<kVectors, kBlock, 3> part(features);
    const int step = part.step();
    int row = part.first();
    float r_next = 0.f, s_next = 0.f;
    const auto fetch = [&](int row) {
        if (row < rows) {
            const int64_t at = static_cast<int64_t>(row) * features;
            part.fetch(0, dn + at);
            part.fetch(1, x + at);
            r_next = rstd[row];
            if (inputs) s_next = scale[row];
        }
        copy_async_commit();
    };
    const auto fetch_residual = [&](int row) {  // on its own: it stays in shared memory until the row is written
        if (row < rows && dresidual) part.fetch(2, dresidual + static_cast<int64_t>(row) * features);
        copy_async_commit();
    };
    fetch(row);
    fetch_residual(row);

    float sums[kVectors][8] = {};
    for (; row < rows; row += step) {
        const int64_t at = static_cast<int64_t>(row) * features;
        const float r = r_next, s = s_next;
        Bf16x8 dn_part[kVectors], x_part[kVectors];
        copy_async_wait<1>();
#pragma unroll
        for (int i = 0; i < kVectors; ++i) dn_part[i] = *part.staged(0, i), x_part[i] = *part.staged(1, i);
        fetch(row + step);

        const float factor = __fdiv_rn(r, s);
        float dot = 0.f;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            float dn_value[8], x_value[8], w[8], input[8];
            unpack8(dn_part[i], dn_value);
            unpack8(x_part[i], x_value);
            part.load_weight(weight, i, w);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float product = __fmul_rn(x_value[j], w[j]);
                dot = fmaf(dn_value[j], product, dot);
                sums[i][j] = fmaf(dn_value[j], x_value[j] * r, sums[i][j]);
                input[j] = (rounded_code(product, factor) - kRounder) * s;
            }
            if (inputs && part.inside(i)) store8(inputs + at + 8 * part.vector(i), pack8(input));
        }
        const float shrink = part.reduce_sum(dot) / features * r * r * r;

        copy_async_wait<1>();
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            float dn_value[8], x_value[8], w[8], out[8] = {};
            stay_packed(dn_part[i]), stay_packed(x_part[i]);
            unpack8(dn_part[i], dn_value);
            unpack8(x_part[i], x_value);
            if (dresidual) unpack8(*part.staged(2, i), out);
            part.load_weight(weight, i, w);
#pragma unroll
            for (int j = 0; j < 8; ++j)
                out[j] = fmaf(dn_value[j] * w[j], r, fmaf(-x_value[j], shrink, out[j]));
            const Bf16x8 packed = pack8(out);
            if (part.inside(i)) store8(dx + at + 8 * part.vector(i), packed);
        }
        fetch_residual(row + step);
    }
    part.store_sums(sums, dweight_partials + static_cast<int64_t>(blockIdx.x) * features);
}

}  // namespace

// codes (rows, features) int8, scale and rstd (rows,). Dynamic shared memory, bytes a thread: 64 (_warp, _wide), 32 (_block).
extern "C" __global__ void __launch_bounds__(256)
rms_norm_quantize_warp(const bf16* x, const float* weight, int8_t* codes, float* scale, float* rstd, int rows,
                       int features, float eps) {
    forward_rows<4, false, true>(x, weight, codes, scale, nullptr, rstd, rows, features, eps);
}

extern "C" __global__ void __launch_bounds__(256)
rms_norm_quantize_block(const bf16* x, const float* weight, int8_t* codes, float* scale, float* rstd, int rows,
                        int features, float eps) {
    forward_rows<2, true, true>(x, weight, codes, scale, nullptr, rstd, rows, features, eps);
}

extern "C" __global__ void __launch_bounds__(512)
rms_norm_quantize_wide(const bf16* x, const float* weight, int8_t* codes, float* scale, float* rstd, int rows,
                       int features, float eps) {
    forward_rows<4, true, true>(x, weight, codes, scale, nullptr, rstd, rows, features, eps);
}

// y (rows, features) = n, rstd (rows,). Dynamic shared memory as above.
extern "C" __global__ void __launch_bounds__(256)
rms_norm_warp(const bf16* x, const float* weight, bf16* y, float* rstd, int rows, int features, float eps) {
    forward_rows<4, false, false>(x, weight, nullptr, nullptr, y, rstd, rows, features, eps);
}

extern "C" __global__ void __launch_bounds__(256)
rms_norm_block(const bf16* x, const float* weight, bf16* y, float* rstd, int rows, int features, float eps) {
    forward_rows<2, true, false>(x, weight, nullptr, nullptr, y, rstd, rows, features, eps);
}

extern "C" __global__ void __launch_bounds__(512)
rms_norm_wide(const bf16* x, const float* weight, bf16* y, float* rstd, int rows, int features, float eps) {
    forward_rows<4, true, false>(x, weight, nullptr, nullptr, y, rstd, rows, features, eps);
}

// dx (rows, features), dweight_partials (gridDim.x, features); dresidual and inputs may be null. dx may be dresidual or dn.
// Dynamic shared memory, bytes a thread: 192 (_warp, _wide), 96 (_block).
extern "C" __global__ void __launch_bounds__(256, 2)
rms_norm_backward_warp(const bf16* dn, const bf16* x, const float* weight, const float* rstd, const float* scale,
                       const bf16* dresidual, bf16* dx, bf16* inputs, float* dweight_partials, int rows, int features) {
    backward_rows<4, false>(dn, x, weight, rstd, scale, dresidual, dx, inputs, dweight_partials, rows, features);
}

extern "C" __global__ void __launch_bounds__(256, 3)
rms_norm_backward_block(const bf16* dn, const bf16* x, const float* weight, const float* rstd, const float* scale,
                        const bf16* dresidual, bf16* dx, bf16* inputs, float* dweight_partials, int rows,
                        int features) {
    backward_rows<2, true>(dn, x, weight, rstd, scale, dresidual, dx, inputs, dweight_partials, rows, features);
}

extern "C" __global__ void __launch_bounds__(512)
rms_norm_backward_wide(const bf16* dn, const bf16* x, const float* weight, const float* rstd, const float* scale,
                       const bf16* dresidual, bf16* dx, bf16* inputs, float* dweight_partials, int rows, int features) {
    backward_rows<4, true>(dn, x, weight, rstd, scale, dresidual, dx, inputs, dweight_partials, rows, features);
}

// sums (features,) += the sum of partials (parts, features): 32 runs of parts, each in order, then the runs in order.
// Grid: ceil(features / 32) blocks of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024)
add_column_sums(const float* partials, float* sums, int parts, int features) {
    __shared__ float runs[32][kWarp];
    const int run = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int column = blockIdx.x * kWarp + lane;
    const int length = (parts + 31) / 32;
    const int end = min(parts, (run + 1) * length);
    float sum = 0.f;
    if (column < features) {
#pragma unroll 8
        for (int part = run * length; part < end; ++part) sum += partials[static_cast<int64_t>(part) * features + column];
    }
    runs[run][lane] = sum;
    __syncthreads();
    if (run > 0 || column >= features) return;
    for (int i = 1; i < 32; ++i) sum += runs[i][lane];
    sums[column] += sum;
}
