// y = x . w^T, exact: int8 x (M, K), ternary w (N, ceil(K / 16) words of 16 values), int32 y (M, N); M, N >= 1, 1 <= K < 2^24.

#include <cstdint>

namespace {

constexpr int kTile = 128;           // rows of x, and rows of w, that a block multiplies
constexpr int kThreads = 256;        // 16 x 16 threads of 8 x 8 sums each
constexpr int kWords = 4;            // packed words of a row of w in one step over K
constexpr int kQuads = 4 * kWords;   // the same in quads: four int8 values in a register, as __dp4a takes them
constexpr int kPitch = kTile + 4;    // the padding spreads a column of quads over the banks and keeps int4 alignment

// Four 2-bit fields (code + 1), in the low byte, to four int8 codes; 0x80 keeps the borrow within its byte.
__device__ int unpack_quad(uint32_t fields) {
    fields = (fields | fields << 12) & 0x000f000fu;
    fields = (fields | fields << 6) & 0x03030303u;
    return static_cast<int>(((fields | 0x80808080u) - 0x01010101u) ^ 0x80808080u);
}

// Values k .. k + 3 of a row of x, zero from K on. `aligned`: rows start on a multiple of 4 bytes and K is one.
__device__ int load_quad(const int8_t* row, int k, int K, bool aligned) {
    if (aligned) return k < K ? *reinterpret_cast<const int*>(row + k) : 0;
    uint32_t quad = 0;
    for (int i = 0; i < 4; ++i)
        if (k + i < K) quad |= static_cast<uint32_t>(static_cast<uint8_t>(row[k + i])) << (8 * i);
    return static_cast<int>(quad);
}

// The 8 quads of a thread: 4 consecutive rows in each half of the tile.
__device__ void read_rows(const int* quads, int thread, int (&out)[8]) {
    const int4 low = *reinterpret_cast<const int4*>(quads + 4 * thread);
    const int4 high = *reinterpret_cast<const int4*>(quads + kTile / 2 + 4 * thread);
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}

// Where the i-th of a thread's 8 rows lies in the tile.
__device__ int row_in_tile(int thread, int i) { return (i < 4 ? 0 : kTile / 2) + 4 * thread + i % 4; }

}  // namespace

// Grid: (ceil(M / 128), ceil(N / 128)) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
ternary_matmul(const int8_t* __restrict__ x, const uint32_t* __restrict__ w, int32_t* __restrict__ y, int M, int N, int K) {
    __shared__ __align__(16) int x_tile[kQuads][kPitch];
    __shared__ __align__(16) int w_tile[kQuads][kPitch];

    const int64_t first_m = static_cast<int64_t>(blockIdx.x) * kTile;
    const int64_t first_n = static_cast<int64_t>(blockIdx.y) * kTile;
    const int64_t row_words = (K + 15) / 16;
    const bool aligned = K % 4 == 0 && reinterpret_cast<uintptr_t>(x) % 4 == 0;
    const int thread_m = threadIdx.x / 16, thread_n = threadIdx.x % 16;

    int sums[8][8] = {};
    for (int64_t word = 0; word < row_words; word += kWords) {
        for (int i = threadIdx.x; i < kTile * kQuads; i += kThreads) {
            const int row = i / kQuads, quad = i % kQuads;
            const int64_t m = first_m + row;
            x_tile[quad][row] = m < M ? load_quad(x + m * K, static_cast<int>(16 * word) + 4 * quad, K, aligned) : 0;
        }
        for (int i = threadIdx.x; i < kTile * kWords; i += kThreads) {
            const int row = i / kWords, column = i % kWords;
            const int64_t n = first_n + row;
            const bool inside = n < N && word + column < row_words;
            const uint32_t packed = inside ? w[n * row_words + word + column] : 0x55555555u;  // sixteen codes 0
            for (int quad = 0; quad < 4; ++quad)
                w_tile[4 * column + quad][row] = unpack_quad(packed >> (8 * quad) & 0xffu);
        }
        __syncthreads();
        for (int quad = 0; quad < kQuads; ++quad) {
            int x_quads[8], w_quads[8];
            read_rows(x_tile[quad], thread_m, x_quads);
            read_rows(w_tile[quad], thread_n, w_quads);
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) sums[i][j] = __dp4a(x_quads[i], w_quads[j], sums[i][j]);
        }
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int64_t m = first_m + row_in_tile(thread_m, i);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int64_t n = first_n + row_in_tile(thread_n, j);
            if (m < M && n < N) y[m * N + n] = sums[i][j];
        }
    }
}
