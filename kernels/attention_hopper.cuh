// What the Hopper attention kernels share: the order of tiles, tiles in swizzled shared memory, products by wgmma.
#pragma once

#include <cmath>

#include "hopper.cuh"

constexpr int kWarpgroup = 128;  // threads
constexpr int kChunk = 64;       // rows of a TMA box, and rows that a warpgroup multiplies
constexpr int kPanel = 64;       // columns of a TMA box: rows of 128 bytes, as the swizzle wants
constexpr int kBox = kChunk * kPanel;
constexpr float kLog2e = 1.4426950408889634f;

// A position in a ring of stages, and the parity of the phase that its barriers are in.
template <int kStages>
struct Ring {
    int stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == kStages) stage = 0, phase ^= 1;
    }
};

// A block's work at a time: some queries or keys of one head. Rank 0 takes longest, a negative one is no tile.
struct Tile {
    int rank, head, batch;
};

// The order of tiles. Heads come in sections, so that what the tiles of a head share stays in the L2 cache. In a
// section the longest tiles come first, so that all multiprocessors end together; a smaller section precedes full ones.
struct TileOrder {
    int heads, all_heads, ranks, section;

    __device__ __forceinline__ TileOrder(int batch, int heads, int ranks, int64_t shared_bytes_per_head)
        : heads(heads), all_heads(batch * heads), ranks(ranks) {
        constexpr int64_t kSectionBytes = 32 << 20;
        const int64_t fitting = kSectionBytes / shared_bytes_per_head;
        section = fitting < 1 ? 1 : fitting < all_heads ? static_cast<int>(fitting) : all_heads;
    }

    __device__ __forceinline__ int tiles() const { return all_heads * ranks; }

    __device__ __forceinline__ Tile tile(int index) const {
        const int from_end = tiles() - 1 - index, first_head = from_end / (section * ranks) * section;
        const int heads_here = min(section, all_heads - first_head), within = from_end - first_head * ranks;
        const int head = first_head + within % heads_here;
        return {ranks - 1 - within / heads_here, head % heads, head / heads};
    }
};

// The next tile of a block of a persistent grid, which asks for one whenever it begins one; its first is blockIdx.x.
// `taken` is zero before and after a launch; launches that share it must not overlap.
__device__ __forceinline__ int next_tile(unsigned int* taken, int tiles) {
    const unsigned int before = atomicAdd(taken, 1u);
    if (before == static_cast<unsigned int>(tiles) - 1) atomicExch(taken, 0u);
    return static_cast<int>(gridDim.x + before);
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Warps of one warpgroup wait for each other, and pairs of warpgroups too; barrier 0 is that of __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Warpgroups issue their products in turns, so that while the tensor cores work for one the others prepare their next.
// Every turn is taken and passed on by each warpgroup equally often; the last one passes the first turn.
template <int kWarpgroups>
struct Turns {
    int warpgroup;

    __device__ __forceinline__ void take() const { named_barrier_sync(1 + warpgroup, 2 * kWarpgroup); }
    __device__ __forceinline__ void pass() const {
        named_barrier_arrive(1 + (warpgroup + 1) % kWarpgroups, 2 * kWarpgroup);
    }
    __device__ __forceinline__ void begin() const {
        if (warpgroup == kWarpgroups - 1) pass();
    }
    // A barrier of the warpgroup's own.
    __device__ __forceinline__ int own_barrier() const { return 1 + kWarpgroups + warpgroup; }
};

// One arrival of each warp.
__device__ __forceinline__ void warp_arrive(uint64_t* barrier) {
    if (threadIdx.x % kWarp == 0) barrier_arrive(barrier);
}

// A tile of kRows x kHeadDim lies in shared memory as panels of 64 columns, a panel as its rows one after another.
// It comes from (batch, seq, width) in boxes of 64 x 64, from `column` of the width on, a multiple of 8 (boxes start on
// 16 bytes, so heads of other lengths are read from a copy with a distance of head_stride between them); rows from seq on
// come as zeros. The map: bf16, sizes {width, seq, batch}, strides of 2 width and 2 width seq bytes, boxes of
// {64, 64, 1}, element strides 1, no interleave, 128-byte swizzle, zeros outside, L2 promotion of 256 bytes.
template <int kRows, int kHeadDim>
__device__ __forceinline__ void load_tile(bf16* tile, const CUtensorMap* map, uint64_t* barrier, int column, int row,
                                          int batch) {
#pragma unroll
    for (int panel = 0; panel < kHeadDim / kPanel; ++panel)
#pragma unroll
        for (int chunk = 0; chunk < kRows / kChunk; ++chunk)
            copy_box_3d(tile + panel * kRows * kPanel + chunk * kBox, map, barrier, column + panel * kPanel,
                        row + chunk * kChunk, batch);
}

// Bytes one after another, a multiple of 16.
__device__ __forceinline__ void load_bytes(void* shared, const void* global, uint64_t* barrier, uint32_t bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

__device__ __forceinline__ int head_stride(int head_dim) { return (head_dim + 7) / 8 * 8; }

// A warpgroup zeroes the columns from head_dim on of its 64 rows: a box reaches into the next head there. One of the
// two factors of a product over the head dimension needs it, for the other may then hold anything finite.
template <int kRows, int kHeadDim>
__device__ __forceinline__ void zero_columns(bf16* rows, int head_dim, int barrier) {
    if (head_dim == kHeadDim) return;
    const int row = threadIdx.x % kWarpgroup / 2;
#pragma unroll 1
    for (int column = head_dim + threadIdx.x % 2; column < kHeadDim; column += 2) {
        const int piece = column % kPanel / 8 ^ row % 8;
        rows[column / kPanel * kRows * kPanel + row * kPanel + piece * 8 + column % 8] = __float2bfloat16(0.f);
    }
    fence_async_proxy();
    named_barrier_sync(barrier, kWarpgroup);
}

// d = a . b or d += a . b: a (64, 16) and b (128, 16) transposed, both in shared memory.
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, add, 1, 1, 0, 0;\n"
        "}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// The same for b (64, 16) transposed.
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, add, 1, 1, 0, 0;\n"
        "}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// The same for a in registers.
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, add, 1, 1, 0;\n"
        "}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

// d += a . b: a (64, 16) in registers, b (16, 128) in shared memory by rows.
__device__ __forceinline__ void wgmma_add(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The same for b (16, 64).
__device__ __forceinline__ void wgmma_add(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// d = a . b^T over the head dimension: a, 64 rows of a tile of kRows, and b, a tile of kColumns rows.
template <int kHeadDim, int kRows, int kColumns>
__device__ __forceinline__ void multiply_transposed(float (&d)[kColumns / 2], const bf16* a, const bf16* b) {
    const uint64_t a_start = swizzled_descriptor(a), b_start = swizzled_descriptor(b);
#pragma unroll
    for (int k = 0; k < kHeadDim; k += 16) {
        const int panel = k / kPanel, column = k % kPanel;
        wgmma(d, a_start + (panel * kRows * kPanel + column) / 8, b_start + (panel * kColumns * kPanel + column) / 8,
              k > 0);
    }
}

// The same for a in registers.
template <int kHeadDim, int kColumns>
__device__ __forceinline__ void multiply_transposed(float (&d)[kColumns / 2], const uint32_t (&a)[kHeadDim / 16][4],
                                                    const bf16* b) {
    const uint64_t b_start = swizzled_descriptor(b);
#pragma unroll
    for (int k = 0; k < kHeadDim; k += 16)
        wgmma(d, a[k / 16], b_start + (k / kPanel * kColumns * kPanel + k % kPanel) / 8, k > 0);
}

// d += a . b: a (64, kRows) in registers, b a tile of kRows rows.
template <int kHeadDim, int kRows>
__device__ __forceinline__ void multiply_add(float (&d)[kHeadDim / 2], const uint32_t (&a)[kRows / 16][4],
                                             const bf16* b) {
    const uint64_t b_start = swizzled_descriptor(b, kRows * kPanel * sizeof(bf16));
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k) wgmma_add(d, a[k], b_start + k * 16 * kPanel / 8);
}

// The result of a product as the left factor of the next, in bf16. A thread holds, of each 8 columns, two of row
// lane / 4 of its warp's 16 rows and two of row lane / 4 + 8, in columns 2 (lane % 4) and the next.
template <int kColumns>
__device__ __forceinline__ void to_left_factor(uint32_t (&a)[kColumns / 16][4], const float (&d)[kColumns / 2]) {
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) a[i / 4][i % 4] = pack_bf16(d[2 * i], d[2 * i + 1]);
}

// A warp's 16 of the 64 rows at `rows` of a tile of kRows, as a left factor.
template <int kHeadDim, int kRows>
__device__ __forceinline__ void load_left_factor(uint32_t (&a)[kHeadDim / 16][4], const bf16* rows) {
    const int lane = threadIdx.x % kWarp, row = threadIdx.x % kWarpgroup / kWarp * 16 + lane % 16;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
        const int column = 16 * k + lane / 16 * 8, piece = column % kPanel / 8 ^ row % 8;
        load_matrix_x4(a[k], shared_address(rows + column / kPanel * kRows * kPanel + row * kPanel + piece * 8));
    }
}

__device__ __forceinline__ void store_matrix_x4(uint32_t shared, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

// Columns column .. column + 7 of a head's row, of which head_dim, a multiple of 4, may be four only. Heads of a multiple
// of eight columns begin on 16 bytes, others on eight.
__device__ __forceinline__ Bf16x8 load_columns(const bf16* row, int column, int head_dim) {
    if (head_dim % 8 == 0) return load8(row + column);
    Bf16x8 v = {};
    uint2* const halves = reinterpret_cast<uint2*>(&v);
    halves[0] = *reinterpret_cast<const uint2*>(row + column);
    if (column + 4 < head_dim) halves[1] = *reinterpret_cast<const uint2*>(row + column + 4);
    return v;
}

__device__ __forceinline__ void store_columns(bf16* row, int column, int head_dim, const Bf16x8& v) {
    if (head_dim % 8 == 0) {
        store8(row + column, v);
        return;
    }
    const uint2* const halves = reinterpret_cast<const uint2*>(&v);
    *reinterpret_cast<uint2*>(row + column) = halves[0];
    if (column + 4 < head_dim) *reinterpret_cast<uint2*>(row + column + 4) = halves[1];
}

// A warp's 16 rows of a product, times a factor for each of a thread's two rows, to `out` in rows of `stride`. They go
// through `scratch`, 16 x 64 values of the warp's own, to be written in vectors; only `rows` rows exist.
template <int kHeadDim>
__device__ __forceinline__ void store_rows(const float (&d)[kHeadDim / 2], float factor0, float factor1, bf16* scratch,
                                           bf16* out, int64_t stride, int rows, int head_dim) {
    constexpr int kPieces = kPanel / 8;
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int panel = 0; panel < kHeadDim / kPanel; ++panel) {
#pragma unroll
        for (int k = 0; k < kPanel / 16; ++k) {
            const float* v = d + panel * kPanel / 2 + 8 * k;
            const uint32_t r[4] = {
                pack_bf16(v[0] * factor0, v[1] * factor0), pack_bf16(v[2] * factor1, v[3] * factor1),
                pack_bf16(v[4] * factor0, v[5] * factor0), pack_bf16(v[6] * factor1, v[7] * factor1)};
            const int row = lane % 16, piece = (2 * k + lane / 16) ^ row % 8;
            store_matrix_x4(shared_address(scratch + row * kPanel + piece * 8), r);
        }
        __syncwarp();
#pragma unroll
        for (int i = lane; i < 16 * kPieces; i += kWarp) {
            const int row = i / kPieces, piece = i % kPieces, column = panel * kPanel + 8 * piece;
            if (row < rows && column < head_dim)
                store_columns(out + row * stride, column, head_dim,
                              load8(scratch + row * kPanel + (piece ^ row % 8) * 8));
        }
        __syncwarp();
    }
}
