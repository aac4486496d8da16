// The heads of a token in inference, and the rotation of its queries and keys.
#pragma once

#include "common.cuh"

namespace {

// Of a model and its cache of keys and values, each (kv_heads, capacity, head_dim).
struct Shape {
    int heads, kv_heads, head_dim, capacity;

    __device__ int features() const { return (heads + 2 * kv_heads) * head_dim; }
};

// The rotation of a feature: x[d] becomes x[d] * cos + x[partner] * sin.
struct Turn {
    float cos, sin;
    int partner;

    Turn() = default;

    // cos, sin: of the position.
    __device__ __forceinline__ Turn(const float* cos_row, const float* sin_row, int d, int head_dim) {
        const int half = head_dim / 2;
        const bool low = d < half;
        partner = low ? d + half : d - half;
        cos = __ldg(cos_row + min(d, partner)), sin = __ldg(sin_row + min(d, partner));
        if (low) sin = -sin;
    }

    __device__ __forceinline__ float operator()(const float* x, int d) const {
        return __ldcg(x + d) * cos + __ldcg(x + partner) * sin;
    }
};

}  // namespace
