// An f32 value as a pair of bf16 values, high + low, which hold 16 of its bits: tensor cores multiply a . b as
// high . high + high . low + low . high.
#pragma once

#include "common.cuh"

namespace {

__device__ __forceinline__ void split(float x, bf16& high, bf16& low) {
    high = __float2bfloat16_rn(x);
    low = __float2bfloat16_rn(x - __bfloat162float(high));
}

// Two values in a register each.
__device__ __forceinline__ void split(float a, float b, uint32_t& high, uint32_t& low) {
    high = pack_bf16(a, b);
    low = pack_bf16(a - __uint_as_float(high << 16), b - __uint_as_float(high & 0xffff0000u));
}

}  // namespace
