// Packed ternary tiles of w (N, K) from and to row-major words of 16 codes (N, K / 16) or int8 (N, K); K % 32 == 0.

#include "ternary_tiles.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 4;  // tiles that a warp has under way

// Field j of byte i to field i of byte j, of two bits each.
__device__ __forceinline__ uint32_t transpose_fields(uint32_t v) {
    uint32_t t = (v >> 6 ^ v) & 0x00cc00ccu;
    v ^= t ^ t << 6;
    t = (v >> 12 ^ v) & 0x0000f0f0u;
    return v ^ t ^ t << 12;
}

// Byte j of word i to byte i of word j.
__device__ __forceinline__ void transpose_bytes(uint32_t (&v)[4]) {
    const uint32_t low0 = __byte_perm(v[0], v[1], 0x5140), high0 = __byte_perm(v[0], v[1], 0x7362);
    const uint32_t low1 = __byte_perm(v[2], v[3], 0x5140), high1 = __byte_perm(v[2], v[3], 0x7362);
    v[0] = __byte_perm(low0, low1, 0x5410), v[1] = __byte_perm(low0, low1, 0x7632);
    v[2] = __byte_perm(high0, high1, 0x5410), v[3] = __byte_perm(high0, high1, 0x7632);
}

// Fields of code + 1 to fields of the code, and back.
__device__ __forceinline__ uint32_t to_code(uint32_t v) { return ~v & (~(v << 1) | 0x55555555u); }

__device__ __forceinline__ uint32_t from_code(uint32_t v) {
    return (~v & 0x55555555u) | ((v ^ v << 1) & 0xaaaaaaaau);
}

__device__ __forceinline__ int chunk_count(int K) { return (K + kTileColumns - 1) / kTileColumns; }

// Tiles are fewer than 2^31.
__device__ __forceinline__ int tile_count(int N, int K) { return (N + kTileRows - 1) / kTileRows * chunk_count(K); }

// Where the tile's first code is; below, tiles are walked one by one without a division.
struct Place {
    int row, column;

    __device__ __forceinline__ Place(int tile, int chunks)
        : row(tile / chunks * kTileRows), column(tile % chunks * kTileColumns) {}

    __device__ __forceinline__ void advance(int K) {
        column += kTileColumns;
        if (column >= K) column = 0, row += kTileRows;
    }
};

__device__ __forceinline__ int warp_index() { return blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp; }

__device__ __forceinline__ int warp_count() { return gridDim.x * (kThreads / kWarp); }

}  // namespace

// All: pointers lie on 16 bytes. Grid: ceil(tiles / 32) blocks (fewer are right too) of 256 threads, where tiles is
// ceil(N / 16) * ceil(K / 128); no dynamic shared memory.

// Words of rows beyond N and of columns beyond K become code 0.
extern "C" __global__ void __launch_bounds__(kThreads)
tiles_from_words(const uint32_t* __restrict__ words, uint4* __restrict__ w, int N, int K) {
    const int lane = threadIdx.x % kWarp, chunks = chunk_count(K), tiles = tile_count(N, K);
    const int64_t stride = K / 16;
    for (int tile = warp_index() * kBatch; tile < tiles; tile += warp_count() * kBatch) {
        Place p(tile, chunks);
        // The lane's 32 columns are those of step lane % 4, in rows lane / 4 and lane / 4 + 8.
        uint2 in[kBatch][2];
#pragma unroll
        for (int t = 0; t < kBatch; ++t) {
            const int column = p.column + lane % 4 * 32;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = p.row + lane / 4 + 8 * h;
                in[t][h] = make_uint2(0x55555555u, 0x55555555u);
                if (row < N && column < K)
                    in[t][h] = __ldcs(reinterpret_cast<const uint2*>(words + row * stride + column / 16));
            }
            p.advance(K);
        }
#pragma unroll
        for (int t = 0; t < kBatch; ++t) {
            uint32_t out[4] = {in[t][0].x, in[t][1].x, in[t][0].y, in[t][1].y};  // by r
            transpose_bytes(out);
#pragma unroll
            for (int q = 0; q < 4; ++q) out[q] = to_code(transpose_fields(out[q]));
            transpose_quad(out);
            if (tile + t < tiles)
                w[(tile + t) * static_cast<int64_t>(kWarp) + lane] = make_uint4(out[0], out[1], out[2], out[3]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads)
words_from_tiles(const uint4* __restrict__ w, uint32_t* __restrict__ words, int N, int K) {
    const int lane = threadIdx.x % kWarp, chunks = chunk_count(K), tiles = tile_count(N, K);
    const int64_t stride = K / 16;
    for (int tile = warp_index() * kBatch; tile < tiles; tile += warp_count() * kBatch) {
        Place p(tile, chunks);
        uint4 in[kBatch] = {};
#pragma unroll
        for (int t = 0; t < kBatch; ++t)
            if (tile + t < tiles) in[t] = __ldcs(w + (tile + t) * static_cast<int64_t>(kWarp) + lane);
#pragma unroll
        for (int t = 0; t < kBatch; ++t) {
            uint32_t v[4] = {in[t].x, in[t].y, in[t].z, in[t].w};
            transpose_quad(v);
#pragma unroll
            for (int q = 0; q < 4; ++q) v[q] = from_code(transpose_fields(v[q]));
            transpose_bytes(v);
            const int column = p.column + lane % 4 * 32;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = p.row + lane / 4 + 8 * h;
                if (row < N && column < K)
                    *reinterpret_cast<uint2*>(words + row * stride + column / 16) =
                        make_uint2(v[h], v[h + 2]);
            }
            p.advance(K);
        }
    }
}

// Codes are -1, 0 or 1.
extern "C" __global__ void __launch_bounds__(kThreads)
tiles_from_codes(const int8_t* __restrict__ codes, uint4* __restrict__ w, int N, int K) {
    const int lane = threadIdx.x % kWarp, chunks = chunk_count(K), tiles = tile_count(N, K);
    for (int tile = warp_index(); tile < tiles; tile += warp_count()) {
        const Place p(tile, chunks);
        // Part q of 16 columns is that of step q / 2 and r / 2 == q % 2; the lane reads parts lane % 4 and lane % 4 + 4
        // and, after the exchange, has columns 4 (lane % 4) on of all eight.
        uint32_t in[2][2][4] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int g = 0; g < 2; ++g) {
                const int row = p.row + lane / 4 + 8 * h, column = p.column + (4 * g + lane % 4) * 16;
                if (row < N && column < K) {
                    const uint4 v =
                        __ldcs(reinterpret_cast<const uint4*>(codes + static_cast<int64_t>(row) * K + column));
                    in[h][g][0] = v.x, in[h][g][1] = v.y, in[h][g][2] = v.z, in[h][g][3] = v.w;
                }
            }
        uint32_t out[4] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int g = 0; g < 2; ++g) {
                transpose_quad(in[h][g]);
#pragma unroll
                for (int q = 0; q < 4; ++q) out[2 * g + q / 2] |= (in[h][g][q] & 0x03030303u) << 2 * (q % 2 * 2 + h);
            }
        w[tile * static_cast<int64_t>(kWarp) + lane] = make_uint4(out[0], out[1], out[2], out[3]);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads)
codes_from_tiles(const uint4* __restrict__ w, int8_t* __restrict__ codes, int N, int K) {
    const int lane = threadIdx.x % kWarp, chunks = chunk_count(K), tiles = tile_count(N, K);
    for (int tile = warp_index(); tile < tiles; tile += warp_count()) {
        const Place p(tile, chunks);
        const uint4 packed = __ldcs(w + tile * static_cast<int64_t>(kWarp) + lane);
        const uint32_t in[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int g = 0; g < 2; ++g) {
                uint32_t out[4];
#pragma unroll
                for (int q = 0; q < 4; ++q) {
                    const uint32_t fields = in[2 * g + q / 2] >> 2 * (q % 2 * 2 + h) & 0x03030303u;
                    out[q] = fields | (fields >> 1 & 0x01010101u) * 255u;  // 3 to 255
                }
                transpose_quad(out);
                const int row = p.row + lane / 4 + 8 * h, column = p.column + (4 * g + lane % 4) * 16;
                if (row < N && column < K)
                    *reinterpret_cast<uint4*>(codes + static_cast<int64_t>(row) * K + column) =
                        make_uint4(out[0], out[1], out[2], out[3]);
            }
    }
}
