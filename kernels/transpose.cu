// Transposed operands of fp8 backward products: of bytes as they are (ternary codes, e4m3 gradients), and of int8 input
// codes with a factor a token to e4m3.

#include "row.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128;
constexpr int kRangeThreads = 1024;
constexpr float kRangeFloor = 1e-30f;  // 3.5 / F stays finite

// Byte `column` of each of four rows, as four codes.
__device__ __forceinline__ uint32_t gather_codes(const uint32_t (&rows)[4], int column) {
    const uint32_t select = column | (column + 4) << 4;
    return __byte_perm(__byte_perm(rows[0], rows[1], select), __byte_perm(rows[2], rows[3], select), 0x5410);
}

// Byte `column` (code + 128) of each of four rows, as four e4m3 of code * factor: under the exponent of 2^23 a byte is
// a number of f32.
__device__ __forceinline__ uint32_t gather_fp8(const uint32_t (&rows)[4], const float (&factor)[4], int column) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        x[i] = (__uint_as_float(__byte_perm(rows[i], 0x4b000000u, 0x7540 | column)) - 8388736.f) * factor[i];
    return pack_fp8(x[0], x[1]) | pack_fp8(x[2], x[3]) << 16;
}

// A tile of in (rows, columns) to out (columns, padded_rows). A thread reads 16 bytes of four rows and gathers them by
// columns into 16 words of four rows each; in shared memory column n is 32 words, in groups of four whose places are
// permuted by n / 16, so that neither the words going in nor the groups coming out meet in a bank.
template <bool kFp8>
__device__ __forceinline__ void transpose_tile(const int8_t* __restrict__ in, void* __restrict__ out, int rows,
                                               int padded_rows, int columns, const float (&factor)[4]) {
    __shared__ uint4 tile[kTile * 8];
    const int first_column = blockIdx.y * kTile, first_row = blockIdx.x * kTile;
    const int lane8 = threadIdx.x % 8, quad = threadIdx.x / 8;  // 16 columns, four rows
    const int column = first_column + 16 * lane8;

    uint32_t words[4][4];  // [four columns][row]
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = first_row + 4 * quad + i;
        uint4 read = {};
        if (row < rows && column < columns)
            read = *reinterpret_cast<const uint4*>(in + static_cast<int64_t>(row) * columns + column);
        const uint32_t flip = kFp8 ? 0x80808080u : 0u;
        words[0][i] = read.x ^ flip, words[1][i] = read.y ^ flip, words[2][i] = read.z ^ flip;
        words[3][i] = read.w ^ flip;
    }
    uint32_t* const place = reinterpret_cast<uint32_t*>(tile + 16 * lane8 * 8 + (quad / 4 ^ lane8)) + quad % 4;
#pragma unroll
    for (int i = 0; i < 16; ++i)
        place[i * 32] = kFp8 ? gather_fp8(words[i / 4], factor, i % 4) : gather_codes(words[i / 4], i % 4);
    __syncthreads();

    const int row = first_row + 16 * lane8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int n = quad + 32 * i;
        if (first_column + n < columns && row < padded_rows)
            *reinterpret_cast<uint4*>(static_cast<int8_t*>(out) +
                                      static_cast<int64_t>(first_column + n) * padded_rows + row) =
                tile[n * 8 + (lane8 ^ n / 16)];
    }
}

}  // namespace

// out (columns, padded_rows) = in (rows, columns), zeros from `rows` on; columns and padded_rows are multiples of
// 16. Grid: (ceil(padded_rows / 128), ceil(columns / 128)) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(kThreads)
transpose_bytes(const int8_t* in, int8_t* out, int rows, int padded_rows, int columns) {
    transpose_tile<false>(in, out, rows, padded_rows, columns, {});
}

// out (features, padded_tokens) e4m3 = codes (tokens, features) * factor (tokens,), zeros from `tokens` on. Grid and
// sizes as of transpose_bytes.
extern "C" __global__ void __launch_bounds__(kThreads)
transpose_inputs(const int8_t* codes, const float* __restrict__ factor, void* out, int tokens, int padded_tokens,
                 int features) {
    const int token = blockIdx.x * kTile + threadIdx.x / 8 * 4;
    float of_token[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) of_token[i] = token + i < tokens ? factor[token + i] : 0.f;
    transpose_tile<true>(codes, out, tokens, padded_tokens, features, of_token);
}

// A token's part in a weight gradient has the size dscale * xscale. With F = max(1e-30, its largest) and b the smallest
// of the `segments` w_scale: factor (tokens,) = 3.5 * dscale * xscale / F, and *undo = F / (3.5 * 3.5 * b) makes up for
// it and for the b and 3.5 of e4m3 gradients. Grid: one block of 1024 threads. dscale and xscale lie on 16 bytes.
extern "C" __global__ void __launch_bounds__(kRangeThreads)
token_factors(const float* __restrict__ dscale, const float* __restrict__ xscale, const float* __restrict__ w_scale,
              int segments, float* __restrict__ factor, float* __restrict__ undo, int tokens) {
    __shared__ uint32_t maxima[kWarp];
    float max = 0.f;
    const float4* d4 = reinterpret_cast<const float4*>(dscale);
    const float4* x4 = reinterpret_cast<const float4*>(xscale);
#pragma unroll 4
    for (int i = threadIdx.x; i < tokens / 4; i += kRangeThreads) {
        const float4 d = d4[i], x = x4[i];
        max = max_abs(max_abs(max_abs(max_abs(max, d.x * x.x), d.y * x.y), d.z * x.z), d.w * x.w);
    }
    const int tail = tokens / 4 * 4 + threadIdx.x;
    if (tail < tokens) max = max_abs(max, dscale[tail] * xscale[tail]);
    // Not negative, or NaN, which as bits is the largest of all.
    uint32_t bits = __reduce_max_sync(0xffffffffu, __float_as_uint(max));
    if (threadIdx.x % kWarp == 0) maxima[threadIdx.x / kWarp] = bits;
    __syncthreads();
    max = __uint_as_float(__reduce_max_sync(0xffffffffu, maxima[threadIdx.x % kWarp]));
    max = max < kRangeFloor ? kRangeFloor : max;
    const float scale = kFp8PerCode / max;
    for (int i = threadIdx.x; i < tokens; i += kRangeThreads) factor[i] = dscale[i] * xscale[i] * scale;
    if (threadIdx.x > 0) return;
    float b = w_scale[0];
    for (int i = 1; i < segments; ++i) b = smaller(b, w_scale[i]);
    *undo = max / (kFp8PerCode * kFp8PerCode * b);
}
