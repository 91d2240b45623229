// dQ of the float32 backward on tensor cores: blocks of all key tiles add to it in a float32 scratch, in any order or,
// if the gradients have to be bitwise repeatable, in the order of the key tiles.
#pragma once

#include "../arch/reduction.h"
#include "pair_tile.h"

namespace sdpa::efficient {

// The sums of one head, row after row. But where 16 rows are complete and E is a multiple of 32, each 16 x 32 tile of
// them lies in the order in which a warp holds it, so that a lane adds 16 bytes with each instruction.
struct GradQuerySums {
  float* data;
  int L, E;

  __device__ __forceinline__ GradQuerySums(const BackwardParams& p, int64_t head_index)
      : data(p.grad_query_accum + head_index * p.L * p.E), L(static_cast<int>(p.L)), E(static_cast<int>(p.E)) {}

  __device__ __forceinline__ bool is_tiled(int row0) const { return row0 + 16 <= L && E % 32 == 0; }

  // A warp adds a tile: rows from row0, columns from col0, as multiply_columns has them.
  __device__ __forceinline__ void add(const float (&tile)[4][4], int row0, int col0) const {
    const int lane = threadIdx.x % 32;
    if (col0 >= E) return;
    if (is_tiled(row0)) {
      float* const to = data + int64_t{row0} * E + col0 * 16 + lane * 4;
#pragma unroll
      for (int n = 0; n < 4; ++n) reduce(to + n * 128, tile[n]);
    } else {
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const int row = row0 + lane / 4 + n % 4 / 2 * 8, col = col0 + lane % 4 * 8 + n / 4 * 2 + n % 2;
        if (row < L && col < E) atomicAdd(data + int64_t{row} * E + col, tile[n / 4][n % 4]);
      }
    }
  }

  __device__ __forceinline__ float at(int row, int col) const {
    const int row0 = row & ~15;
    if (!is_tiled(row0)) return data[int64_t{row} * E + col];
    const int n = col % 8 / 2, i = row % 16 / 8 * 2 + col % 2, lane = row % 8 * 4 + col % 32 / 8;
    return data[int64_t{row0} * E + (col & ~31) * 16 + n * 128 + lane * 4 + i];
  }
};

// The blocks of a head's key tiles take turns at a tile of queries. Every chip starts blocks in the order of their
// numbers (CUDA does not promise it), which is that of the key tiles, so the one that is waited for is under way.
struct Turn {
  int* turn;  // null: any order will do

  __device__ __forceinline__ static Turn of(const BackwardParams& p, int64_t head_index, int first_query,
                                            int first_col) {
    if (!p.deterministic) return {nullptr};
    const int64_t tiles = ceil_div(p.L, 16), columns = ceil_div(p.E, 32);
    return {p.grad_query_turns + (head_index * tiles + first_query / 16) * columns + first_col / 32};
  }
  __device__ __forceinline__ void wait_for(int number) const {
    if (turn == nullptr) return;
    if (threadIdx.x == 0) {
      int now;
      do {
        asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
      } while (now != number);
    }
    __syncthreads();
  }
  __device__ __forceinline__ void pass_on(int number) const {
    if (turn == nullptr) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("st.release.gpu.s32 [%0], %1;" ::"l"(turn), "r"(number + 1) : "memory");
  }
};

constexpr int kConvertThreads = 256;

// From the sums to the gradient: its scale, its strides. A thread has four columns of a row.
template <class Unused = void>
__global__ void __launch_bounds__(kConvertThreads) convert_grad_query_kernel(const __grid_constant__ BackwardParams p) {
  const int64_t quads = ceil_div(p.E, 4);
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kConvertThreads + threadIdx.x;
  if (n >= p.B * p.H * p.L * quads) return;
  const int64_t head_index = n / quads / p.L;
  const int row = static_cast<int>(n / quads % p.L), col = static_cast<int>(n % quads) * 4;
  const GradQuerySums sums(p, head_index);
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = col + i < p.E ? sums.at(row, col + i) * p.scale : 0.f;
  Matrix<float>::of(p.grad_query, head_index / p.H, head_index % p.H, p.L, p.E).store(row, col, x);
}

}  // namespace sdpa::efficient
