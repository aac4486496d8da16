// What the gradient norm and AdamW share: the table of tensors in device memory.
#pragma once

#include <cstdint>

constexpr int kOptimizerBlock = 16384;  // elements of one tensor that a thread block handles

constexpr uint32_t kDecay = 1;         // weight decay applies
constexpr uint32_t kBf16Gradient = 2;  // the gradient is bf16, not f32
constexpr uint32_t kKeepGradient = 4;  // AdamW does not zero the gradient (the next step's first product overwrites it)

// Its elements are blocks first_block .. first_block + ceil(count / 16384) - 1. count is a multiple of 8, every pointer
// a multiple of 16.
struct OptimizerTensor {
    float* weights;
    void* gradient;
    void* m;
    void* v;
    float* m_scale;  // 8-bit moments only: one scale for each 256 elements
    float* v_scale;
    int64_t count;
    uint32_t first_block;
    uint32_t flags;
};
