// Narrow tiles (kHeadDim 32) have shared memory for all they work on, and one step's operands are a quad or two a
// thread: they are read into registers while the step before is computed.
#pragma once

#include "tile.h"

namespace sdpa::efficient {

// kColumns rows of a matrix on their way into shared memory.
template <class Tile, class T>
struct InFlight {
  static constexpr int kQuads = Tile::kColumns / 16;
  Quad<T> quad[kQuads];

  // A warp reads 16 rows by 8 columns: transposed stores then hit 32 different banks.
  __device__ static int row() { return fresh_thread_index() % 16; }
  __device__ static int col() { return fresh_thread_index() / 16 * 4; }

  __device__ __forceinline__ void load(const Matrix<const T>& m, int first_row) {
#pragma unroll
    for (int n = 0; n < kQuads; ++n) quad[n] = m.raw_quad_at(first_row + row() + 16 * n, col());
  }
  __device__ __forceinline__ void store_transposed(float* tile) const {
    float* const place = tile + col() * Tile::kColumnStride + place_of(row());
#pragma unroll
    for (int n = 0; n < kQuads; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) place[16 * n + c * Tile::kColumnStride] = to_float(quad[n].at[c]);
    }
  }
  __device__ __forceinline__ void store_rows(float* tile) const {
    float* const place = tile + row() * Tile::kResultStride + col();
#pragma unroll
    for (int n = 0; n < kQuads; ++n) {
      const T* const x = quad[n].at;
      *reinterpret_cast<float4*>(place + 16 * n * Tile::kResultStride) = {to_float(x[0]), to_float(x[1]),
                                                                          to_float(x[2]), to_float(x[3])};
    }
  }
};

}  // namespace sdpa::efficient
