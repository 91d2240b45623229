// What the flash backward does row by row, before and after its main kernel: rowsum(dO * O), and dQ from its float32
// sums to its own type. And the layout of these sums.
#pragma once

#include <cuda_runtime.h>

#include "../arch/barrier.h"
#include "../arch/reduction.h"
#include "../attn/block_range.h"
#include "../attn/launch.h"
#include "../attn/params.h"
#include "tile.cuh"

namespace sdpa {

// The variants of the main kernel: what becomes of scores besides causality. Those with a mask take dropout, too;
// kMaskGradient also makes the mask's gradient.
enum class ScoreEdit { kNone, kDropout, kMask, kMaskGradient };
// A tile of a kernel for operands that are plain (see flash_bwd.cuh): its loop copies without a branch.
template <class Tile>
struct Plain : Tile {
  static constexpr bool kIsPlain = true;
};
// And whose blocks walk over all key tiles of a head.
template <class Tile>
struct Walking : Plain<Tile> {
  static constexpr bool kWalks = true;
};
// Whether what does not exist is copied, too, as zeros: without a branch. (A walk goes on after a head's last tile.)
template <class Tile>
constexpr bool kFetchesAll = Tile::kIsPlain && !Tile::kWalks;

constexpr bool has_mask(ScoreEdit edit) {
  return edit == ScoreEdit::kMask || edit == ScoreEdit::kMaskGradient;
}

// Chunks from kFirst on, kPanel or several times as many to kEnd, of all rows of the tile.
template <int kThreads, int kPanel, int kFirst, int kEnd = kFirst + kPanel, class Tile, class U>
__device__ __forceinline__ void copy_panel(const Tile& tile, const HeadRows<U>& source, int row0, unsigned thread) {
  constexpr int kRowStep = kThreads / kPanel;
  // In a padded tile, of eight rows those that are in different banks stand side by side.
  const int number = thread / kPanel, chunk = kFirst + thread % kPanel;
  const int first = kPanel == 4 && Tile::kIsPadded ? (number & ~7) | (number & 7) >> 1 | (number & 1) << 2 : number;
  const uint32_t to = tile.base + Tile::offset(first, chunk);
  const U* from = source.at(row0 + first, 0) + chunk * kChunkElements;
  const int64_t step = kRowStep * source.row_stride;
#pragma unroll
  for (int row = 0; row < Tile::kRows; row += kRowStep, from += step) {
#pragma unroll
    for (int panel = 0; panel < kEnd - kFirst; panel += kPanel) {
      const int rows = (chunk + panel) * kChunkElements < source.cols ? source.rows - row0 - first : 0;
      cp_async_or_zero(to + row * Tile::kRowBytes + panel * kChunkBytes, from + panel * kChunkElements, row < rows);
    }
  }
}

// Copies rows [row0, row0 + kRows) to the tile in order; what lies outside the source becomes zero. As
// SharedTile::fill, but shorter for a source whose rows are whole chunks, as nearly all are: the loop has to do it for
// every tile. kIsPlain: it is such a source.
template <class Arch, int kThreads, bool kIsPlain = false, class Tile, class U>
__device__ __forceinline__ void fetch_rows(const Tile& tile, const HeadRows<U>& source, int row0,
                                           unsigned thread = threadIdx.x) {
  // Chunks of a row that neighbouring threads copy at once.
  constexpr int kEven = Tile::kChunksPerRow & -Tile::kChunksPerRow, kMost = kThreads / 8;
  constexpr int kPanel = Arch::kAsyncCopy && kMost < kEven ? kMost : kEven, kRowStep = kThreads / kPanel;
  if constexpr (Arch::kAsyncCopy && kRowStep % 8 == 0 && Tile::kRows % kRowStep == 0) {
    if constexpr (kIsPlain && kPanel == 4 && Tile::kChunksPerRow == 12) {
      // The fewer rows an instruction touches, the less it costs.
      copy_panel<kThreads, 8, 0>(tile, source, row0, thread);
      copy_panel<kThreads, 4, 8>(tile, source, row0, thread);
      return;
    }
    if (kIsPlain || (source.access == HeadRows<U>::Access::kChunk && source.cols % kChunkElements == 0)) {
      copy_panel<kThreads, kPanel, 0, Tile::kChunksPerRow>(tile, source, row0, thread);
      return;
    }
  }
  static_assert(!kIsPlain || (Arch::kAsyncCopy && kRowStep % 8 == 0));
  tile.template fill<kThreads, InOrder, !Arch::kAsyncCopy>(source, row0, thread);
  fence_block();  // what went through registers comes before an arrival
}

// The rows of (B, H, L) in order, kHeadDim / 8 lanes for each, 8 columns a lane.
template <int kHeadDim>
struct RowSweep {
  static constexpr int kThreads = 256, kLanes = kHeadDim / kChunkElements, kRows = kThreads / kLanes;
  static BlockOrder order(const ForwardParams& p) { return {(p.L + kRows - 1) / kRows, p.B * p.H, 1}; }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(RowSweep<kHeadDim>::kThreads)
    flash_delta_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BlockOrder order,
                       const bool clears) {
  using Sweep = RowSweep<kHeadDim>;
  let_successor_start();
  int tile, batch_head;
  if (!order.locate_quickly(tile, batch_head)) return;
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
  if (row >= p.L) return;
  const int64_t to = int64_t{batch_head} * p.L + row;
  if (col == 0) p.delta[to] = sum;
  if (!clears) return;
  const int present = static_cast<int>(p.E) - col;
  float* const sums = p.grad_query_accum + to * p.E + col;
  if (p.E % 4 == 0) {
    if (present > 0) *reinterpret_cast<float4*>(sums) = {0.f, 0.f, 0.f, 0.f};
    if (present > 4) *reinterpret_cast<float4*>(sums + 4) = {0.f, 0.f, 0.f, 0.f};
  } else {
    for (int i = 0; i < min(present, kChunkElements); ++i) sums[i] = 0.f;
  }
}

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

  // What a block does with sums. One that alone has those of a head may put and get as well: each thread comes back to
  // its own, so nobody has to wait for anybody.
  enum class Step { kAdd, kPut, kGet };

  template <Step kStep>
  static __device__ __forceinline__ void take(float* at, float& value) {
    if constexpr (kStep == Step::kAdd) atomicAdd(at, value);
    if constexpr (kStep == Step::kPut) *at = value;
    if constexpr (kStep == Step::kGet) value = __ldcg(at);  // reductions pass L1 by
  }
  template <Step kStep, class Values>
  static __device__ __forceinline__ void take_tile(float* at, Values& values) {
    const int lane = threadIdx.x % 32;
    if constexpr (kVectorReductions && kStep == Step::kAdd) {
      reduce(at + lane * 4, values);
    } else if constexpr (kVectorReductions) {
      float4& place = reinterpret_cast<float4*>(at)[lane];
      if constexpr (kStep == Step::kPut) {
        place = {values[0], values[1], values[2], values[3]};
      } else {
        const float4 x = __ldcg(&place);
        values[0] = x.x, values[1] = x.y, values[2] = x.z, values[3] = x.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) take<kStep>(at + i * 32 + lane, values[i]);
    }
  }

  // A warp's accumulators of a 16 x 8 tile: rows from row0, columns from 8 * tile.
  // kIsTiled: all rows that exist are tiled.
  template <Step kStep = Step::kAdd, bool kIsTiled = false>
  __device__ __forceinline__ void take_one(float (&values)[4], int row0, int tile) const {
    const int lane = threadIdx.x % 32;
    if (kIsTiled && row0 >= L) return;
    if (kIsTiled || is_tiled(row0)) {
      if (tile * 8 >= E) return;
      take_tile<kStep>(data + int64_t{row0} * E + tile * 128, values);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row0 + lane / 4 + i / 2 * 8;
        const int col = tile * 8 + lane % 4 * 2 + i % 2;
        if (row < L && col < E) take<kStep>(data + int64_t{row} * E + col, values[i]);
      }
    }
  }

  // The same for kRows times 16 rows and some tiles side by side. All of them are there as a rule, and then one branch
  // is enough; one for each would cost more than the reductions themselves.
  template <Step kStep = Step::kAdd, bool kIsTiled = false, int kRows, int kTiles>
  __device__ __forceinline__ void take_rows(float (&values)[kRows][kTiles][4], int row0, int tile) const {
    if ((kIsTiled ? row0 + kRows * 16 <= L : is_tiled(row0 + (kRows - 1) * 16)) && (tile + kTiles) * 8 <= E) {
      float* const at = data + int64_t{row0} * E + tile * 128;
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) take_tile<kStep>(at + m * 16 * E + n * 128, values[m][n]);
      }
    } else {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) take_one<kStep, kIsTiled>(values[m][n], row0 + m * 16, tile + n);
      }
    }
  }
};

// A warp's share of dS K, of kRows blocks of 16 queries from `row_block` on and kTiles / 2 blocks of 16 columns from
// `col_block` on, from dS^T and K of kKeyBlocks blocks of 16 keys.
template <class Product, int kKeyBlocks, int kRows, int kTiles, class ScoreTile, class KeyTile>
__device__ __forceinline__ void add_query_gradient(float (&sum)[kRows][kTiles][4], const ScoreTile& scores,
                                                   const LaneOffset& score_lane, int row_block, const KeyTile& keys,
                                                   const LaneOffset& key_lane, int col_block) {
#pragma unroll
  for (int k = 0; k < kKeyBlocks; ++k) {
    uint32_t a[kRows][4];
#pragma unroll
    for (int m = 0; m < kRows; ++m) scores.load_a_transposed(a[m], score_lane, k, row_block + m);
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      uint32_t b[4];
      keys.load_b(b, key_lane, k, col_block + n);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        Product::add(sum[m][2 * n], a[m], b[0], b[1]);
        Product::add(sum[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// A warp's accumulators of dK or dV, multiplied by `factor`, to their place in a tile.
template <class T, int kKeyBlocks, int kTiles, class Tile>
__device__ __forceinline__ void put_gradient(const float (&sum)[kKeyBlocks][kTiles][4], float factor, const Tile& tile,
                                             int row_block, int col_block) {
#pragma unroll
  for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      float x[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i / 4][i % 4] = sum[m][2 * n + i / 4][i % 4] * factor;
      uint32_t a[4];
      to_operand<T>(a, x[0], x[1]);
      tile.put_a(a, row_block + m, col_block + n);
    }
  }
}

// A warp's accumulators of dQ, all summed up, to their place: rows from row0, columns from 8 * tile. Of whole chunks.
template <class T, int kRows, int kTiles>
__device__ __forceinline__ void write_query_gradient(const float (&values)[kRows][kTiles][4], const HeadRows<T>& target,
                                                     int row0, int tile, float scale) {
  const int lane = threadIdx.x % 32;
  T* const to = target.data + (row0 + lane / 4) * target.row_stride + tile * 8 + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    if (row0 + m * 16 >= target.rows) break;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if ((tile + n) * 8 >= target.cols) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t pair = pack<T>(values[m][n][2 * i] * scale, values[m][n][2 * i + 1] * scale);
        *reinterpret_cast<uint32_t*>(to + (m * 16 + i * 8) * target.row_stride + n * 8) = pair;
      }
    }
  }
}

// Blocks of 16 rows and 32 columns of (B, H, L, E), one for each warp.
template <int kHeadDim>
struct TileSweep {
  static constexpr int kThreads = 256, kWarpsPerRow = kHeadDim / 32, kRows = kThreads / 32 / kWarpsPerRow * 16;
  static BlockOrder order(const ForwardParams& p) { return {(p.L + kRows - 1) / kRows, p.B * p.H, 1}; }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(TileSweep<kHeadDim>::kThreads)
    flash_convert_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BlockOrder order) {
  using Sweep = TileSweep<kHeadDim>;
  wait_for_predecessor();
  int block, batch_head;
  if (!order.locate_quickly(block, batch_head)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, heads = static_cast<int>(p.H);
  const int row0 = block * Sweep::kRows + warp / Sweep::kWarpsPerRow * 16, tile0 = warp % Sweep::kWarpsPerRow * 4;
  if (row0 >= p.L || tile0 * 8 >= p.E) return;
  float values[1][4][4] = {};
  GradQuerySums(p, batch_head).template take_rows<GradQuerySums::Step::kGet>(values, row0, tile0);
  const HeadRows<T> target(p.grad_query, batch_head / heads, batch_head % heads, p.L, p.E);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // A lane has two columns of each of four tiles. The four lanes of a row exchange them, so that each has a chunk.
    uint32_t words[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      words[n] = pack<T>(values[0][n][2 * half] * p.scale, values[0][n][2 * half + 1] * p.scale);
    }
    exchange_in_quad(words);
    const int row = row0 + half * 8 + lane / 4, col = (tile0 + lane % 4) * kChunkElements;
    if (row < p.L && col < p.E) write_chunk(target, row, col, {words[0], words[1], words[2], words[3]});
  }
}

// Of the main kernel's blocks, key_tiles for each key head.
template <class T>
BlockOrder key_order(const BackwardParams& p, int64_t key_tiles) {
  const int64_t bytes_per_key_head = p.group * p.L * (p.E * sizeof(float) + (p.E + p.Ev) * sizeof(T));
  return BlockOrder::make(key_tiles, p.B * (p.H / p.group), bytes_per_key_head);
}

// The kernels before and after the main one. sums: dQ is summed up.
template <class T, int kHeadDim>
cudaError_t launch_delta(const BackwardParams& p, bool sums, cudaStream_t stream) {
  using Sweep = RowSweep<kHeadDim>;
  const BlockOrder rows = Sweep::order(p);
  if (rows.blocks() == 0) return cudaSuccess;
  flash_delta_kernel<T, kHeadDim><<<dim3(rows.grid_x(), rows.grid_y()), Sweep::kThreads, 0, stream>>>(p, rows, sums);
  return cudaGetLastError();
}
template <class T, int kHeadDim>
cudaError_t launch_convert(const BackwardParams& p, cudaStream_t stream) {
  using Tiles = TileSweep<kHeadDim>;
  const BlockOrder tiles = Tiles::order(p);
  if (tiles.blocks() == 0) return cudaSuccess;
  return launch_early<flash_convert_kernel<T, kHeadDim>>(dim3(tiles.grid_x(), tiles.grid_y()), Tiles::kThreads, 0,
                                                         stream, p, tiles);
}

}  // namespace sdpa
