// The layout of packed ternary weights in device memory, made for tensor cores.
//
// w (N, K) lies in tiles of 16 rows by 128 columns, 512 bytes each, those of a row of tiles one after another: tile (i, c)
// is the i * ceil(K / 128) + c-th. Rows and columns beyond N and K are code 0. Lane l of a warp owns bytes 16 l to 16 l +
// 15 of a tile, a word for each step of 32 columns. Byte b of word s has in bits 2r and 2r + 1 the code, in two's
// complement, of row 16 i + 8 (r % 2) + l / 4 and column 128 c + 32 s + 16 (r / 2) + 4 (l % 4) + b.
//
// So a word is a lane's fragment of operand a (16, 32) of mma.sync and wgmma, and of two operands b (32, 8) of mma.sync:
// registers 0 and 2 for rows 0 to 7, 1 and 3 for rows 8 to 15. A field at the top of its byte is 64 times the code: the
// sums come out as 64 times the product, which K < 2^18 keeps within int32, and need no correction.
#pragma once

#include "common.cuh"

constexpr int kTileRows = 16;
constexpr int kTileColumns = 128;
constexpr int kTileBytes = 512;
constexpr int kSumShift = 6;

// Register r of a word's fragment: four codes, each 64 times its value.
__device__ __forceinline__ uint32_t unpack_codes(uint32_t word, int r) { return word << (6 - 2 * r) & 0xc0c0c0c0u; }
