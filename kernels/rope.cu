// Rotary embedding in place: the first rotated_heads heads (queries and keys) of qkv (rows, row_features) bf16, rows = batch
// * seq; pairs (i, i + head_dim / 2) turn by the angle of position row % seq; cos, sin (>= seq, head_dim / 2) f32.

#include "common.cuh"

namespace {

// kWidth consecutive features of a head and the cosines or sines that go with them, in the widest accesses they allow.
template <int kWidth>
struct alignas(2 * kWidth) Features {
    __nv_bfloat162 pair[kWidth / 2];
};

template <int kWidth>
struct alignas(kWidth == 2 ? 8 : 16) Angles {
    float2 pair[kWidth / 2];
};

// Turns the heads of one row in shared memory, a warp at work.
template <int kWidth>
__device__ __forceinline__ void turn(bf16* row, const float* __restrict__ cos, const float* __restrict__ sin, int heads,
                                     int half, float direction) {
    const int groups = half / kWidth;  // of a head's pairs
    const int lane = threadIdx.x % kWarp;
    int head = lane / groups, group = lane % groups;
    const int head_step = kWarp / groups, group_step = kWarp % groups;
#pragma unroll 4
    for (int item = lane; item < heads * groups; item += kWarp) {
        bf16* first = row + head * 2 * half + group * kWidth;
        auto low = *reinterpret_cast<const Features<kWidth>*>(first);
        auto high = *reinterpret_cast<const Features<kWidth>*>(first + half);
        const auto c = *reinterpret_cast<const Angles<kWidth>*>(cos + group * kWidth);
        const auto s = *reinterpret_cast<const Angles<kWidth>*>(sin + group * kWidth);
#pragma unroll
        for (int j = 0; j < kWidth / 2; ++j) {
            const float2 a = __bfloat1622float2(low.pair[j]), b = __bfloat1622float2(high.pair[j]);
            const float2 sine = make_float2(direction * s.pair[j].x, direction * s.pair[j].y);
            low.pair[j] = __floats2bfloat162_rn(a.x * c.pair[j].x - b.x * sine.x, a.y * c.pair[j].y - b.y * sine.y);
            high.pair[j] = __floats2bfloat162_rn(b.x * c.pair[j].x + a.x * sine.x, b.y * c.pair[j].y + a.y * sine.y);
        }
        *reinterpret_cast<Features<kWidth>*>(first) = low;
        *reinterpret_cast<Features<kWidth>*>(first + half) = high;
        head += head_step, group += group_step;
        if (group >= groups) group -= groups, ++head;
    }
}

}  // namespace

// direction 1 forward, -1 backward. A warp a row, through shared memory, so that global accesses are whole vectors for any
// head_dim. Any grid of blocks of whole warps, as many as the device holds at a time are best; dynamic shared memory
// 16 * ceil(rotated_heads * head_dim / 8) bytes a warp.
extern "C" __global__ void __launch_bounds__(128)
rope(bf16* qkv, const float* __restrict__ cos, const float* __restrict__ sin, int rows, int seq, int rotated_heads,
     int row_features, int head_dim, float direction) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
    const int vectors = (rotated_heads * head_dim + 7) / 8;  // the last may reach into the next head
    bf16* staged = reinterpret_cast<bf16*>(shared) + threadIdx.x / kWarp * vectors * 8;
    const int half = head_dim / 2;
    const int step = gridDim.x * warps;
    int row = blockIdx.x * warps + threadIdx.x / kWarp;

    if (row < rows) {
        const bf16* p = qkv + static_cast<int64_t>(row) * row_features;
        for (int v = lane; v < vectors; v += kWarp) copy_async16(shared_address(staged + 8 * v), p + 8 * v);
    }
    for (; row < rows; row += step) {
        copy_async_commit();
        copy_async_wait<0>();
        __syncwarp();
        const int angles = row % seq * half;
        if (half % 8 == 0)
            turn<8>(staged, cos + angles, sin + angles, rotated_heads, half, direction);
        else
            turn<2>(staged, cos + angles, sin + angles, rotated_heads, half, direction);
        __syncwarp();
        bf16* p = qkv + static_cast<int64_t>(row) * row_features;
        const bf16* next = p + static_cast<int64_t>(step) * row_features;
        const bool more = row + step < rows;
#pragma unroll 4
        for (int v = lane; v < vectors; v += kWarp) {
            store8(p + 8 * v, load8(staged + 8 * v));
            if (more) copy_async16(shared_address(staged + 8 * v), next + 8 * v);
        }
    }
}
