// What the flash backward does row by row, before and after its main kernel: rowsum(dO * O), and dQ from its float32
// sums to its own type. And the layout of these sums.
#pragma once

#include <cuda_runtime.h>

#include "../attn/block_range.h"
#include "../attn/params.h"
#include "tile.cuh"

namespace sdpa {

// The variants of the main kernel: what becomes of scores besides causality. Those with a mask take dropout, too;
// kMaskGradient also makes the mask's gradient.
enum class ScoreEdit { kNone, kDropout, kMask, kMaskGradient };
constexpr bool has_mask(ScoreEdit edit) {
  return edit == ScoreEdit::kMask || edit == ScoreEdit::kMaskGradient;
}

// The rows of (B, H, L) in order, kHeadDim / 8 lanes for each, 8 columns a lane.
template <int kHeadDim>
struct RowSweep {
  static constexpr int kThreads = 256, kLanes = kHeadDim / kChunkElements, kRows = kThreads / kLanes;
  static BlockOrder order(const ForwardParams& p) { return {(p.L + kRows - 1) / kRows, p.B * p.H, 1}; }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(RowSweep<kHeadDim>::kThreads)
    flash_delta_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BlockOrder order) {
  using Sweep = RowSweep<kHeadDim>;
  int tile, batch_head;
  if (!order.locate(tile, batch_head)) return;
  const int heads = static_cast<int>(p.H), batch = batch_head / heads, head = batch_head % heads;
  const HeadRows<const T> output(p.output, batch, head, p.L, p.Ev), grad(p.grad_output, batch, head, p.L, p.Ev);
  const int row = tile * Sweep::kRows + static_cast<int>(threadIdx.x / Sweep::kLanes);
  const int col = threadIdx.x % Sweep::kLanes * kChunkElements;
  float sum = 0.f;
  if (row < p.L) {
    const uint4 o = read_chunk(output, row, col), g = read_chunk(grad, row, col);
    const uint32_t o_words[4] = {o.x, o.y, o.z, o.w}, g_words[4] = {g.x, g.y, g.z, g.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = unpack<T>(o_words[i]), b = unpack<T>(g_words[i]);
      sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
    }
  }
#pragma unroll
  for (int distance = Sweep::kLanes / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  if (row < p.L && col == 0) p.delta[int64_t{batch_head} * p.L + row] = sum;
}

// Adds two or four floats to a place aligned to as many, where the chip can in one reduction. Both ways do the same;
// this is not a code path, so it need not be a template parameter.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kVectorReductions = true;
__device__ __forceinline__ void reduce(float* to, const float (&x)[2]) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x[0]), "f"(x[1]) : "memory");
}
__device__ __forceinline__ void reduce(float* to, const float (&x)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3])
               : "memory");
}
#else
constexpr bool kVectorReductions = false;
template <int kCount>
__device__ __forceinline__ void reduce(float* to, const float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) atomicAdd(to + i, x[i]);
}
#endif

// The mask's gradient straight from the accumulators of dS^T, for a gradient whose rows lie as most do, on chips where
// the reductions of a lane's neighbouring keys (RowRuns<kKeyBlocks>) are one. Elsewhere: add_mask_gradient.
template <int kKeyBlocks>
struct MaskGradientRuns {
  static __device__ __forceinline__ bool fit(const BackwardParams& p) {
    const int64_t* const stride = p.grad_mask_stride;
    const uint64_t bits = reinterpret_cast<uint64_t>(p.grad_mask) | static_cast<uint64_t>(p.S * 4) |
                          static_cast<uint64_t>((stride[0] | stride[1] | stride[2]) * 4);
    return kVectorReductions && stride[3] == 1 && stride[2] != 0 && bits % 16 == 0;
  }
  // 16 queries: accumulators n and n + 1. `query` and `key` are this lane's first.
  template <int kCols>
  static __device__ __forceinline__ void add(const float (&scores)[kKeyBlocks][kCols][4], int n,
                                             const BackwardParams& p, int batch, int head, int query, int key) {
    if (key >= p.S) return;
    const int64_t* const stride = p.grad_mask_stride;
    float* const to = p.grad_mask + batch * stride[0] + head * stride[1] + query * stride[2] + key;
    add(scores, n, to, stride[2], static_cast<int>(p.L) - query);
  }
  // The same; `to` is the place of this lane's first query and key, and `rows` queries from there on exist.
  template <int kCols>
  static __device__ __forceinline__ void add(const float (&scores)[kKeyBlocks][kCols][4], int n, float* to,
                                             int64_t query_stride, int rows) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i / 2 * 8 + i % 2;
      float run[2 * kKeyBlocks];
#pragma unroll
      for (int m = 0; m < kKeyBlocks; ++m) {
        run[2 * m] = scores[m][n + i / 2][i % 2];
        run[2 * m + 1] = scores[m][n + i / 2][i % 2 + 2];
      }
      if (row < rows) reduce(to + row * query_stride, run);
    }
  }
};

// dQ of one head in float32, row after row. But where 16 rows are complete and E is a multiple of 8, each 16 x 8 tile
// of them lies in the order in which a warp holds it, so that a warp adds to neighbouring bytes with each instruction.
struct GradQuerySums {
  float* data;
  int L, E;

  __device__ __forceinline__ GradQuerySums(const BackwardParams& p, int batch_head)
      : data(p.grad_query_accum + int64_t{batch_head} * p.L * p.E),
        L(static_cast<int>(p.L)),
        E(static_cast<int>(p.E)) {}

  __device__ __forceinline__ bool is_tiled(int row0) const { return row0 + 16 <= L && E % 8 == 0; }

  static __device__ __forceinline__ void add_tile(float* to, const float (&values)[4]) {
    const int lane = threadIdx.x % 32;
    if constexpr (kVectorReductions) {
      reduce(to + lane * 4, values);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) atomicAdd(to + i * 32 + lane, values[i]);
    }
  }

  // A warp adds the accumulators of a 16 x 8 tile: rows from row0, columns from 8 * tile.
  __device__ __forceinline__ void add(const float (&values)[4], int row0, int tile) const {
    const int lane = threadIdx.x % 32;
    if (is_tiled(row0)) {
      if (tile * 8 >= E) return;
      add_tile(data + int64_t{row0} * E + tile * 128, values);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row0 + lane / 4 + i / 2 * 8;
        const int col = tile * 8 + lane % 4 * 2 + i % 2;
        if (row < L && col < E) atomicAdd(data + int64_t{row} * E + col, values[i]);
      }
    }
  }

  // The same for kRows times 16 rows and some tiles side by side. All of them are there as a rule, and then one branch
  // is enough; one for each would cost more than the reductions themselves.
  template <int kRows, int kTiles>
  __device__ __forceinline__ void add_rows(const float (&values)[kRows][kTiles][4], int row0, int tile) const {
    if (is_tiled(row0 + (kRows - 1) * 16) && (tile + kTiles) * 8 <= E) {
      float* const to = data + int64_t{row0} * E + tile * 128;
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) add_tile(to + m * 16 * E + n * 128, values[m][n]);
      }
    } else {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) add(values[m][n], row0 + m * 16, tile + n);
      }
    }
  }

  __device__ __forceinline__ float at(int row, int col) const {
    const int row0 = row - row % 16;
    if (!is_tiled(row0)) return data[int64_t{row} * E + col];
    const int r = row % 16, i = r / 8 * 2 + col % 2, lane = r % 8 * 4 + col % 8 / 2;
    return data[int64_t{row0} * E + col / 8 * 128 + (kVectorReductions ? lane * 4 + i : i * 32 + lane)];
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(RowSweep<kHeadDim>::kThreads)
    flash_convert_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BlockOrder order) {
  using Sweep = RowSweep<kHeadDim>;
  int tile, batch_head;
  if (!order.locate(tile, batch_head)) return;
  const int heads = static_cast<int>(p.H);
  const int row = tile * Sweep::kRows + static_cast<int>(threadIdx.x / Sweep::kLanes);
  const int col = threadIdx.x % Sweep::kLanes * kChunkElements, present = static_cast<int>(p.E) - col;
  if (row >= p.L || present <= 0) return;
  const GradQuerySums sums(p, batch_head);
  float x[kChunkElements];
#pragma unroll
  for (int i = 0; i < kChunkElements; ++i) x[i] = i < present ? sums.at(row, col + i) * p.scale : 0.f;
  write_chunk(HeadRows<T>(p.grad_query, batch_head / heads, batch_head % heads, p.L, p.E), row, col,
              {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])});
}

}  // namespace sdpa
