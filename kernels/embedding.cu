// Embedding: x (tokens, hidden) bf16 = rows `ids` of an f32 table (vocab, hidden); its gradient, in a fixed order.
//
// The gradient goes by the tokens sorted by (id, position), cut in pieces of at most 32 tokens of one id. A piece's sum
// is added to the id's row when the id has no other piece, and is else kept as a partial row; then the partial rows of
// each such id are added up. The host prepares, from the ids of a micro-batch:
//   order (tokens,): the positions sorted by (id, position): a counting sort.
//   pieces (<= tokens, 4): {first index in order, count, id, partial row or kNoPartial}, longest pieces first; a piece
//     of one token has its position in place of the index.
//   split (<= tokens / 33, 4): {id, first partial row, number of partial rows, 0} of each id of more than 32 tokens.
//   counts (2,): the numbers of pieces and of split ids.
// partials: f32, (tokens / 16, hidden) at most, 1 row at least.

#include "common.cuh"

namespace {

constexpr int kEmbedThreads = 256;
constexpr int kEmbedWarps = kEmbedThreads / kWarp;
constexpr int kPieceColumns = 8 * kWarp;  // of hidden that a warp sums
constexpr int kSplitColumns = 4 * kWarp;  // of hidden that a block adds up
constexpr int kBatch = 4;                 // rows that a warp loads at a time
constexpr int kSplitThreads = 512;
constexpr int kSplitWarps = kSplitThreads / kWarp;
constexpr int kSplitBatch = 8;   // partial rows that a warp loads at a time
constexpr int kPieceBlocks = 5;  // of the piece kernel that a multiprocessor has registers for
constexpr uint32_t kNoPartial = 0xffffffffu;

__device__ __forceinline__ void unpack(const uint4& v, float (&x)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        x[2 * j] = __uint_as_float(words[j] << 16);
        x[2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
    }
}

__device__ __forceinline__ uint4 pack(const float (&x)[8]) {
    return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

__device__ __forceinline__ void load_row8(const float* p, float (&x)[8]) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__device__ __forceinline__ void store_row8(float* p, const float (&x)[8]) {
    reinterpret_cast<float4*>(p)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(p)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ void load_row8(const bf16* p, float (&x)[8]) {
    unpack(*reinterpret_cast<const uint4*>(p), x);
}

__device__ __forceinline__ void store_row8(bf16* p, const float (&x)[8]) { *reinterpret_cast<uint4*>(p) = pack(x); }

__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

__device__ __forceinline__ float4 load4(const bf16* p) {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    return make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u), __uint_as_float(v.y << 16),
                       __uint_as_float(v.y & 0xffff0000u));
}

__device__ __forceinline__ void store4(float* p, const float4& x) { *reinterpret_cast<float4*>(p) = x; }

__device__ __forceinline__ void store4(bf16* p, const float4& x) {
    *reinterpret_cast<uint2*>(p) = make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
}

__device__ __forceinline__ float4 sum4(const float4& a, const float4& b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Each warp takes pieces times chunks of 256 columns, one after the other.
template <typename T>
__device__ __forceinline__ void sum_pieces(const bf16* dx, const uint32_t* order, const uint4* pieces,
                                           const uint32_t* counts, T* dtable, float* partials, int hidden) {
    const int lane = threadIdx.x % kWarp;
    const int chunks = (hidden + kPieceColumns - 1) / kPieceColumns;
    const int64_t items = static_cast<int64_t>(counts[0]) * chunks;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kEmbedWarps;
    int64_t item = static_cast<int64_t>(blockIdx.x) * kEmbedWarps + threadIdx.x / kWarp;
    for (; item < items; item += step) {
        const uint4 piece = pieces[item / chunks];
        const int column = static_cast<int>(item % chunks) * kPieceColumns + 8 * lane;
        const int count = static_cast<int>(piece.y);
        const uint32_t token = count == 1 ? piece.x : lane < count ? order[piece.x + lane] : 0;
        const bool inside = column < hidden;
        T* row = dtable + static_cast<int64_t>(piece.z) * hidden + column;
        float sum[8] = {};
        if (piece.w == kNoPartial && inside) load_row8(row, sum);
        for (int first = 0; first < count; first += kBatch) {
            uint4 batch[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int64_t source = __shfl_sync(0xffffffffu, token, first + i);
                batch[i] = make_uint4(0, 0, 0, 0);
                if (first + i < count && inside)
                    batch[i] = *reinterpret_cast<const uint4*>(dx + source * hidden + column);
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                float x[8];
                unpack(batch[i], x);
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[j] += x[j];
            }
        }
        if (!inside) continue;
        if (piece.w == kNoPartial)
            store_row8(row, sum);
        else
            store_row8(partials + static_cast<int64_t>(piece.w) * hidden + column, sum);
    }
}

// Each block takes split ids times chunks of 128 columns: warp i adds up partial rows i, i + 16, ..., then the
// sums of the warps are added up.
template <typename T>
__device__ __forceinline__ void add_partials(const uint4* split, const uint32_t* counts, const float* partials,
                                             T* dtable, int hidden) {
    __shared__ float4 sums[kSplitWarps][kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int chunks = (hidden + kSplitColumns - 1) / kSplitColumns;
    const int64_t items = static_cast<int64_t>(counts[1]) * chunks;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const uint4 id = split[item / chunks];
        const int column = static_cast<int>(item % chunks) * kSplitColumns + 4 * lane, rows = static_cast<int>(id.z);
        const bool inside = column < hidden;
        const float* first = partials + static_cast<int64_t>(id.y) * hidden + column;
        T* row = dtable + static_cast<int64_t>(id.x) * hidden + column;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        if (inside && warp == 0) sum = load4(row);
        for (int i = warp; i < rows; i += kSplitBatch * kSplitWarps) {
            float4 batch[kSplitBatch];
#pragma unroll
            for (int j = 0; j < kSplitBatch; ++j) {
                const int r = i + j * kSplitWarps;
                batch[j] = make_float4(0.f, 0.f, 0.f, 0.f);
                if (inside && r < rows) batch[j] = load4(first + static_cast<int64_t>(r) * hidden);
            }
#pragma unroll
            for (int j = 0; j < kSplitBatch; ++j) sum = sum4(sum, batch[j]);
        }
        sums[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && inside) {
#pragma unroll
            for (int i = 1; i < kSplitWarps; ++i) sum = sum4(sum, sums[i][lane]);
            store4(row, sum);
        }
        __syncthreads();
    }
}

}  // namespace

// x = bf16(table[ids]). Grid: ceil(tokens / 8). Block: 256, a warp for each token.
extern "C" __global__ void __launch_bounds__(kEmbedThreads)
embed(const uint32_t* __restrict__ ids, const float* __restrict__ table, bf16* __restrict__ x, int tokens, int hidden) {
    const int64_t token = static_cast<int64_t>(blockIdx.x) * kEmbedWarps + threadIdx.x / kWarp;
    if (token >= tokens) return;
    const float* row = table + static_cast<int64_t>(ids[token]) * hidden;
#pragma unroll 4
    for (int column = 8 * (threadIdx.x % kWarp); column < hidden; column += kPieceColumns) {
        float values[8];
        load_row8(row + column, values);
        __stcs(reinterpret_cast<uint4*>(x + token * hidden + column), pack(values));  // the table stays in L2
    }
}

// First the pieces: dtable rows of ids in one piece, partial rows of the others. Grid: any, 16 blocks a multiprocessor
// are good. Block: 256.
extern "C" __global__ void __launch_bounds__(kEmbedThreads, kPieceBlocks)
embed_backward_f32(const bf16* __restrict__ dx, const uint32_t* __restrict__ order, const uint4* __restrict__ pieces,
                   const uint32_t* __restrict__ counts, float* __restrict__ dtable, float* __restrict__ partials,
                   int hidden) {
    sum_pieces(dx, order, pieces, counts, dtable, partials, hidden);
}

extern "C" __global__ void __launch_bounds__(kEmbedThreads, kPieceBlocks)
embed_backward_bf16(const bf16* __restrict__ dx, const uint32_t* __restrict__ order, const uint4* __restrict__ pieces,
                    const uint32_t* __restrict__ counts, bf16* __restrict__ dtable, float* __restrict__ partials,
                    int hidden) {
    sum_pieces(dx, order, pieces, counts, dtable, partials, hidden);
}

// Then the partial rows. Grid: any, 2 blocks a multiprocessor are good. Block: 512.
extern "C" __global__ void __launch_bounds__(kSplitThreads, 2)
embed_backward_finish_f32(const uint4* __restrict__ split, const uint32_t* __restrict__ counts,
                          const float* __restrict__ partials, float* __restrict__ dtable, int hidden) {
    add_partials(split, counts, partials, dtable, hidden);
}

extern "C" __global__ void __launch_bounds__(kSplitThreads, 2)
embed_backward_finish_bf16(const uint4* __restrict__ split, const uint32_t* __restrict__ counts,
                           const float* __restrict__ partials, bf16* __restrict__ dtable, int hidden) {
    add_partials(split, counts, partials, dtable, hidden);
}
