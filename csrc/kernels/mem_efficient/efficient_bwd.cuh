// Memory-efficient attention, backward: float32 arithmetic, any head dims, any chip from sm_70 up; bitwise
// repeatable but for the gradient of a mask that broadcasts. (float32 tensors on sm_80 and newer:
// efficient_bwd_pair.cuh. float16 on sm_70, up to head dim 128: efficient_bwd_volta.cuh.)
//
// With f the dropout factor of a score (0 or rescale) and delta = rowsum(dO * O):
//   P = exp(score - LSE)   dP = dO V^T   dS = P * (f * dP - delta)
//   dV = (f * P)^T dO      dK = scale * dS^T Q      dQ = scale * dS K      d(mask) = dS
// Three kernels: delta; a block per tile of keys that walks over the queries, for dK and dV; a block per tile of
// queries that walks over the keys, for dQ and the mask's gradient. The second walk costs scores and dP once more, and
// buys that no two blocks add to the same number. Gradients wider than kHeadDim are covered by further blocks.
#pragma once

#include <algorithm>

#include "../arch/arch.h"
#include "../attn/mask.h"
#include "efficient_bwd_pair.cuh"
#include "efficient_bwd_pair_wide.cuh"
#include "efficient_bwd_volta.cuh"
#include "in_flight.h"
#include "statistics.h"
#include "tile.h"

namespace sdpa {

namespace efficient {

constexpr int kDeltaThreads = 128;
constexpr int kDeltaLanes = 8;  // that share a row

// Adds up in the order in which dP is: where one key has all of a row's probability, dP - delta is then exactly 0.
template <class T>
__global__ void __launch_bounds__(kDeltaThreads) delta_kernel(const __grid_constant__ BackwardParams p) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kDeltaThreads + threadIdx.x) / kDeltaLanes;
  const int lane = threadIdx.x % kDeltaLanes;
  const bool is_inside = row < p.B * p.H * p.L;
  const int64_t some_row = is_inside ? row : 0;  // all lanes of the warp take part
  const int64_t head_index = some_row / p.L, b = head_index / p.H, h = head_index % p.H;
  const int query = static_cast<int>(some_row % p.L);
  const auto output = Matrix<const T>::of(p.output, b, h, p.L, p.Ev);
  const auto grad_output = Matrix<const T>::of(p.grad_output, b, h, p.L, p.Ev);
  float sum = 0.f;
  for (int first_col = 0; first_col < output.cols; first_col += 4 * kDeltaLanes) {
    const int col = first_col + 4 * lane;
    const float4 x = output.quad_at(query, col), y = grad_output.quad_at(query, col);
#pragma unroll
    for (int owner = 0; owner < kDeltaLanes; ++owner) {
      const float with_mine = fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, sum))));
      sum = __shfl_sync(~0u, with_mine, owner, kDeltaLanes);
    }
  }
  if (is_inside && lane == 0) p.delta[row] = sum;
}

template <int kRows, int kColumns>
__device__ __forceinline__ void clear(float (&x)[kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) x[i][j] = 0.f;
  }
}

// How a backward kernel shares its tiles. Up to kHeadDim 64, where an operand is likely to be one chunk wide, tiles of
// few columns leave shared memory for both row operands, which then are staged once and stay; and registers for two
// gradients. At 128 one place serves both in turn. A narrow tile has places of their own for all column operands too.
template <int kHeadDim>
constexpr int kBackwardColumns = kHeadDim == 32   ? 16
                                 : kHeadDim == 64 ? 32
                                                  : 64;

template <class Arch, int kHeadDim>
struct BackwardTile : Tile<kHeadDim, kBackwardColumns<kHeadDim>> {
  using Base = Tile<kHeadDim, kBackwardColumns<kHeadDim>>;
  static constexpr bool kKeepsRows = kHeadDim <= 64 && kHasRoom<Arch>;
  static constexpr int kMoreFloats = (kKeepsRows ? Base::kRowTile : 0) +
                                     (Base::kIsNarrow ? Base::kColumnTile + 2 * Base::kResultTile : 0) +
                                     StatisticsTile<Base::kRows>::kFloats;
  static constexpr int kSharedBytes = Base::kSharedBytes + kMoreFloats * static_cast<int>(sizeof(float));
};

// product = rows * columns^T, for the tiles at first_row and first_column, through all chunks of their width. The rows
// are there already if they were staged before and stay; in a narrow tile everything is.
template <class Tile, class T>
__device__ __forceinline__ void tile_product(Scores<Tile>& product, const Tile& t, float* row_tile, float* column_tile,
                                             const Matrix<const T>& rows, const Matrix<const T>& columns, int first_row,
                                             int first_column, bool has_rows) {
  clear(product);
  if constexpr (Tile::kIsNarrow) {
    multiply_scores(product, t, row_tile, column_tile, rows.cols);
  } else {
#pragma unroll 1
    for (int e = 0; e < rows.cols; e += Tile::kWidth) {
      __syncthreads();  // nobody reads the tiles any more
      if (!has_rows) stage_transposed<Tile, Tile::kRows>(row_tile, rows, first_row, e);
      stage_transposed<Tile, Tile::kColumns>(column_tile, columns, first_column, e);
      __syncthreads();
      multiply_scores(product, t, row_tile, column_tile, rows.cols - e);
    }
  }
}

// Brings the rows that a gradient is made of next, and shows the warp's scores to all its lanes.
template <class Tile, class T>
__device__ __forceinline__ void prepare_result(float* tile, const Matrix<const T>& m, int first_row, int first_col) {
  if constexpr (Tile::kIsNarrow) {
    __syncwarp();
  } else {
    __syncthreads();  // nobody reads the tile any more
    stage_rows<Tile>(tile, m, first_row, first_col);
    __syncthreads();
  }
}

template <class Tile, class T>
__device__ __forceinline__ void store_gradient(const Matrix<T>& gradient, const Tile& t, const Results<Tile>& result,
                                               int first_row, int first_col, float factor, bool adds = false) {
#pragma unroll
  for (int i = 0; i < Tile::kRowsOwned; ++i) {
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      float x[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] = result[i][4 * g + c] * factor;
      if (adds) {
        const int row = first_row + t.row(i), col = first_col + t.result_column(4 * g);
        const float4 sum = row < gradient.rows ? gradient.quad_at(row, col) : float4{};
        x[0] += sum.x;
        x[1] += sum.y;
        x[2] += sum.z;
        x[3] += sum.w;
      }
      gradient.store(first_row + t.row(i), first_col + t.result_column(4 * g), x);
    }
  }
}

// Which of the two a launch makes: both, unless registers are too few for two results.
enum class KeyGradients { kBoth, kKey, kValue };

// dK and dV. The tile's rows are keys, its columns queries.
template <class Arch, class T, int kHeadDim, KeyGradients kWhich>
__global__ void __launch_bounds__(BackwardTile<Arch, kHeadDim>::kThreads, 2)
    grad_key_value_kernel(const __grid_constant__ BackwardParams p) {
  using Shape = BackwardTile<Arch, kHeadDim>;
  using Tile = typename Shape::Base;
  constexpr int kRowsOwned = Tile::kRowsOwned, kColumnsOwned = Tile::kColumnsOwned;
  extern __shared__ float4 shared_memory[];
  float* const key_tile = reinterpret_cast<float*>(shared_memory);
  float* const value_tile = key_tile + (Shape::kKeepsRows ? Tile::kRowTile : 0);
  float* const query_tile = value_tile + Tile::kRowTile;
  float* const score_tile = query_tile + Tile::kColumnTile;
  float* const grad_output_tile = Tile::kIsNarrow ? score_tile + Tile::kScoreTile : query_tile;
  float* const query_rows = Tile::kIsNarrow ? grad_output_tile + Tile::kColumnTile : query_tile;
  float* const grad_output_rows = Tile::kIsNarrow ? query_rows + Tile::kResultTile : query_tile;
  const StatisticsTile<Tile::kColumns> statistics{Tile::kIsNarrow ? grad_output_rows + Tile::kResultTile
                                                                  : score_tile + Tile::kScoreTile};
  const Tile t = Tile::of_thread();

  const int64_t key_heads = p.H / p.group;
  const int64_t heads = p.B * key_heads;
  const int key_tiles = static_cast<int>(ceil_div(p.S, Tile::kRows));
  // Under causality the first keys have most to do: start them first, those of all heads.
  const int64_t head_index = p.is_causal ? blockIdx.x % heads : blockIdx.x / key_tiles;
  const int tile_index = static_cast<int>(p.is_causal ? blockIdx.x / heads : blockIdx.x % key_tiles);
  const int64_t b = head_index / key_heads, key_head = head_index % key_heads;
  const int first_key = tile_index * Tile::kRows;
  const int first_col = blockIdx.y * kHeadDim;

  const auto key = Matrix<const T>::of(p.key, b, key_head, p.S, p.E);
  const auto value = Matrix<const T>::of(p.value, b, key_head, p.S, p.Ev);
  const Dropout dropout = Dropout::make(p.dropout_p, p.dropout_p > 0.f ? *p.seed : 0);
  const float rescale = p.dropout_p > 0.f ? dropout.rescale : 1.f;
  const bool wants_key = kWhich != KeyGradients::kValue && p.grad_key.data != nullptr && first_col < p.E;
  const bool wants_value = kWhich != KeyGradients::kKey && p.grad_value.data != nullptr && first_col < p.Ev;

  Results<Tile> grad_key = {}, grad_value = {};
  bool has_rows = false;
  InFlight<Tile, T> queries, grad_outputs;
  if constexpr (Tile::kIsNarrow) {
    stage_transposed<Tile, Tile::kRows>(key_tile, key, first_key, 0);
    stage_transposed<Tile, Tile::kRows>(value_tile, value, first_key, 0);
  }
#pragma unroll 1
  for (int64_t h = key_head * p.group; h < (key_head + 1) * p.group; ++h) {
    const auto query = Matrix<const T>::of(p.query, b, h, p.L, p.E);
    const auto grad_output = Matrix<const T>::of(p.grad_output, b, h, p.L, p.Ev);
    const Mask mask = Mask::of(p, b, h);
    const int query_begin = mask.query_begin(first_key) / Tile::kColumns * Tile::kColumns;
    const int64_t query_head = b * p.H + h;
    QueryStatistics next = QueryStatistics::of(p, query_head, query_begin + fresh_thread_index(), wants_key);
    if constexpr (Tile::kIsNarrow) {
      queries.load(query, query_begin);
      grad_outputs.load(grad_output, query_begin);
    }
#pragma unroll 1
    for (int first_query = query_begin; first_query < query.rows; first_query += Tile::kColumns) {
      const int depth = query.rows - first_query;
      __syncthreads();  // nobody reads the tiles any more
      if (fresh_thread_index() < Tile::kColumns) statistics.store(fresh_thread_index(), next);
      next = QueryStatistics::of(p, query_head, first_query + Tile::kColumns + fresh_thread_index(), wants_key);
      if constexpr (Tile::kIsNarrow) {
        queries.store_transposed(query_tile);
        queries.store_rows(query_rows);
        grad_outputs.store_transposed(grad_output_tile);
        grad_outputs.store_rows(grad_output_rows);
        __syncthreads();
        queries.load(query, first_query + Tile::kColumns);
        grad_outputs.load(grad_output, first_query + Tile::kColumns);
      }
      const bool is_masked =
          !mask.passes(first_query, first_query + Tile::kColumns, first_key, first_key + Tile::kRows);
      if (is_masked) stage_mask<true, Tile>(score_tile, mask, first_query, first_key);
      Scores<Tile> score;
      tile_product(score, t, key_tile, query_tile, key, query, first_key, first_query, has_rows && p.E <= kHeadDim);
      scale_and_mask(score, t, p.scale, is_masked, score_tile);
#pragma unroll
      for (int j = 0; j < kColumnsOwned; ++j) {
        const RowReference reference = statistics.reference(t.column(j));
#pragma unroll
        for (int i = 0; i < kRowsOwned; ++i) score[i][j] = reference.probability(score[i][j]);
      }
      // P waits in shared memory, each thread's where that thread finds it, while dP takes its registers. What dropout
      // drops is drawn now, when there are registers for it, and kept as the sign.
      if (p.dropout_p > 0.f) {
        for_each_keep<true, Tile>(
            dropout, p.first_batch_head + query_head, first_query, first_key,
            [&](int i, int j, bool keep) { score[i][j] = keep ? score[i][j] : copysignf(score[i][j], -1.f); });
      }
      store_scores(score_tile, t, score);
      if (wants_key) {
        tile_product(score, t, value_tile, grad_output_tile, value, grad_output, first_key, first_query,
                     has_rows && p.Ev <= kHeadDim);
      }
      if (p.dropout_p > 0.f) {
#pragma unroll
        for (int j = 0; j < kColumnsOwned; ++j) {
#pragma unroll
          for (int g = 0; g < 2; ++g) {
            const float4 place = score_quad(score_tile, t, j, g);
            const float probability[4] = {place.x, place.y, place.z, place.w};
#pragma unroll
            for (int n = 0; n < 4; ++n) score[4 * g + n][j] *= signbit(probability[n]) ? 0.f : rescale;
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kColumnsOwned; ++j) {
        const float delta = statistics.delta(t.column(j));
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          const float4 place = score_quad(score_tile, t, j, g);
          const float probability[4] = {place.x, place.y, place.z, place.w};
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            float& grad = score[4 * g + n][j];
            grad = fabsf(probability[n]) * (grad - delta);
          }
        }
      }
      if (p.dropout_p > 0.f) drop_negative<Tile>(score_tile);
      if (wants_value) {
        prepare_result<Tile>(grad_output_rows, grad_output, first_query, first_col);
        multiply_result(grad_value, t, score_tile, grad_output_rows, depth, value.cols - first_col);
      }
      if (wants_key) {
        __syncwarp();
        store_scores(score_tile, t, score);
        prepare_result<Tile>(query_rows, query, first_query, first_col);
        multiply_result(grad_key, t, score_tile, query_rows, depth, key.cols - first_col);
      }
      has_rows = Shape::kKeepsRows;
    }
  }
  if (wants_value) {
    const auto gradient = Matrix<T>::of(p.grad_value, b, key_head, p.S, p.Ev);
    store_gradient(gradient, t, grad_value, first_key, first_col, rescale);
  }
  if (wants_key) {
    const auto gradient = Matrix<T>::of(p.grad_key, b, key_head, p.S, p.E);
    store_gradient(gradient, t, grad_key, first_key, first_col, p.scale);
  }
}

// Adds a thread's dS to the mask's gradient. Where the mask broadcasts along the keys a row is summed up first.
template <class Tile>
__device__ __forceinline__ void add_mask_gradient(const BackwardParams& p, const Tile& t, int64_t b, int64_t h,
                                                  int first_query, int first_key, const Scores<Tile>& grad) {
  const int64_t* const stride = p.grad_mask_stride;
  float* const head = p.grad_mask + b * stride[0] + h * stride[1];
#pragma unroll
  for (int i = 0; i < Tile::kRowsOwned; ++i) {
    const int query = first_query + t.row(i);
    float* const row = head + query * stride[2];
    if (stride[3] == 0) {
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < Tile::kColumnsOwned; ++j) sum += grad[i][j];  // what lies outside L x S has P = 0
      sum = Tile::row_sum(sum);
      if (query < p.L && t.x == 0) atomicAdd(row, sum);
    } else {
#pragma unroll
      for (int j = 0; j < Tile::kColumnsOwned; ++j) {
        const int key = first_key + t.column(j);
        if (query < p.L && key < p.S) atomicAdd(row + key * stride[3], grad[i][j]);
      }
    }
  }
}

// dQ and the mask's gradient. The tile's rows are queries, its columns keys.
template <class Arch, class T, int kHeadDim>
__global__ void __launch_bounds__(BackwardTile<Arch, kHeadDim>::kThreads, 2)
    grad_query_kernel(const __grid_constant__ BackwardParams p) {
  using Shape = BackwardTile<Arch, kHeadDim>;
  using Tile = typename Shape::Base;
  constexpr int kRowsOwned = Tile::kRowsOwned, kColumnsOwned = Tile::kColumnsOwned;
  extern __shared__ float4 shared_memory[];
  float* const query_tile = reinterpret_cast<float*>(shared_memory);
  float* const grad_output_tile = query_tile + (Shape::kKeepsRows ? Tile::kRowTile : 0);
  float* const key_tile = grad_output_tile + Tile::kRowTile;
  float* const score_tile = key_tile + Tile::kColumnTile;
  float* const value_tile = Tile::kIsNarrow ? score_tile + Tile::kScoreTile : key_tile;
  float* const key_rows = Tile::kIsNarrow ? value_tile + Tile::kColumnTile : key_tile;
  const StatisticsTile<Tile::kRows> statistics{Tile::kIsNarrow ? key_rows + Tile::kResultTile
                                                               : score_tile + Tile::kScoreTile};
  const Tile t = Tile::of_thread();

  const int64_t heads = p.B * p.H;
  const int query_tiles = static_cast<int>(ceil_div(p.L, Tile::kRows));
  const int64_t head_index = p.is_causal ? blockIdx.x % heads : blockIdx.x / query_tiles;
  const int tile_index =
      p.is_causal ? query_tiles - 1 - static_cast<int>(blockIdx.x / heads) : blockIdx.x % query_tiles;
  const int64_t b = head_index / p.H, h = head_index % p.H;
  const int first_query = tile_index * Tile::kRows;
  const int first_col = blockIdx.y * kHeadDim;

  const auto query = Matrix<const T>::of(p.query, b, h, p.L, p.E);
  const auto key = Matrix<const T>::of(p.key, b, h / p.group, p.S, p.E);
  const auto value = Matrix<const T>::of(p.value, b, h / p.group, p.S, p.Ev);
  const auto grad_output = Matrix<const T>::of(p.grad_output, b, h, p.L, p.Ev);
  const Mask mask = Mask::of(p, b, h);
  const DropoutOf<Arch> dropout_of(p);

  // As in the forward, a float32 sum over many keys would lose bits if all were added one after the other. So what
  // some keys give is added to the gradient in memory, which is this block's alone. What is rounded to 16 bits in the
  // end does not show it.
  constexpr bool kFolds = sizeof(T) == 4;
  constexpr int kKeysTogether = 256;
  Results<Tile> grad_query = {};
  bool is_first = true;
  const auto fold = [&] {
    const auto gradient = Matrix<T>::of(p.grad_query, b, h, p.L, p.E);
    store_gradient(gradient, t, grad_query, first_query, first_col, p.scale, /*adds=*/kFolds && !is_first);
    clear(grad_query);
    is_first = false;
  };
  for (int n = fresh_thread_index(); n < Tile::kRows; n += Tile::kThreads) {
    statistics.store(place_of(n), QueryStatistics::of(p, head_index, first_query + n, true));
  }
  bool has_rows = false;
  const int key_end = mask.key_end(first_query + Tile::kRows);
  InFlight<Tile, T> keys, values;
  if constexpr (Tile::kIsNarrow) {
    stage_transposed<Tile, Tile::kRows>(query_tile, query, first_query, 0);
    stage_transposed<Tile, Tile::kRows>(grad_output_tile, grad_output, first_query, 0);
    keys.load(key, 0);
    values.load(value, 0);
  }
#pragma unroll 1
  for (int first_key = 0; first_key < key_end; first_key += Tile::kColumns) {
    const bool is_masked = !mask.passes(first_query, first_query + Tile::kRows, first_key, first_key + Tile::kColumns);
    if (is_masked) stage_mask<false, Tile>(score_tile, mask, first_query, first_key);
    if constexpr (Tile::kIsNarrow) {
      __syncthreads();
      keys.store_transposed(key_tile);
      keys.store_rows(key_rows);
      values.store_transposed(value_tile);
      __syncthreads();
      keys.load(key, first_key + Tile::kColumns);
      values.load(value, first_key + Tile::kColumns);
    }
    Scores<Tile> score;
    tile_product(score, t, query_tile, key_tile, query, key, first_query, first_key, has_rows && p.E <= kHeadDim);
    scale_and_mask(score, t, p.scale, is_masked, score_tile);
#pragma unroll
    for (int i = 0; i < kRowsOwned; ++i) {
      const RowReference reference = statistics.reference(t.row_place(i));
#pragma unroll
      for (int j = 0; j < kColumnsOwned; ++j) score[i][j] = reference.probability(score[i][j]);
    }
    // P waits in shared memory, each thread's where that thread finds it, while dP takes its registers.
    store_scores(score_tile, t, score);
    tile_product(score, t, grad_output_tile, value_tile, grad_output, value, first_query, first_key,
                 has_rows && p.Ev <= kHeadDim);
    if (p.dropout_p > 0.f) {
      const Dropout dropout = dropout_of();
      for_each_keep<false, Tile>(
          dropout, p.first_batch_head + head_index, first_query, first_key,
          [&](int i, int j, bool keep) { score[i][j] = keep ? score[i][j] * dropout.rescale : 0.f; });
    }
    float delta[kRowsOwned];
#pragma unroll
    for (int i = 0; i < kRowsOwned; ++i) delta[i] = statistics.delta(t.row_place(i));
#pragma unroll
    for (int j = 0; j < kColumnsOwned; ++j) {
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const float4 place = score_quad(score_tile, t, j, g);
        const float probability[4] = {place.x, place.y, place.z, place.w};
#pragma unroll
        for (int n = 0; n < 4; ++n) score[4 * g + n][j] = probability[n] * (score[4 * g + n][j] - delta[4 * g + n]);
      }
    }
    has_rows = Shape::kKeepsRows;
    if (p.grad_mask != nullptr && blockIdx.y == 0) add_mask_gradient(p, t, b, h, first_query, first_key, score);
    if (p.grad_query.data != nullptr) {
      store_scores(score_tile, t, score);
      prepare_result<Tile>(key_rows, key, first_key, first_col);
      multiply_result(grad_query, t, score_tile, key_rows, key_end - first_key, key.cols - first_col);
      if (kFolds && (first_key + Tile::kColumns) % kKeysTogether == 0) fold();
    }
  }
  if (p.grad_query.data != nullptr) fold();
}

template <class Arch, class T, int kHeadDim, KeyGradients kWhich>
cudaError_t launch_key_gradients(const BackwardParams& p, int64_t width, cudaStream_t stream) {
  using Tile = BackwardTile<Arch, kHeadDim>;
  constexpr auto kKernel = &grad_key_value_kernel<Arch, T, kHeadDim, kWhich>;
  const int64_t heads = p.B * (p.H / p.group);
  if (heads * p.S * width == 0) return cudaSuccess;
  const cudaError_t error = allow_shared_bytes<kKernel>(Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(heads * ceil_div(p.S, Tile::kRows)),
                  static_cast<unsigned>(ceil_div(width, kHeadDim)));
  kKernel<<<grid, Tile::kThreads, Tile::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

template <class Arch, class T, int kHeadDim>
cudaError_t ffma_backward(const BackwardParams& p, cudaStream_t stream) {
  using Tile = BackwardTile<Arch, kHeadDim>;
  static_assert(Tile::kSharedBytes <= Arch::kSharedBytes);
  if (Tile::kIsNarrow && (p.E > kHeadDim || p.Ev > kHeadDim)) return cudaErrorInvalidValue;
  const auto width_blocks = [](int64_t width) { return static_cast<unsigned>(ceil_div(width, kHeadDim)); };
  const bool wants_query = p.grad_query.data != nullptr, wants_key = p.grad_key.data != nullptr;
  const bool wants_value = p.grad_value.data != nullptr, wants_mask = p.grad_mask != nullptr;
  cudaError_t error = cudaSuccess;

  if (const int64_t rows = p.B * p.H * p.L; rows > 0 && (wants_query || wants_key || wants_mask)) {
    const int64_t blocks = ceil_div(rows * kDeltaLanes, kDeltaThreads);
    delta_kernel<T><<<static_cast<unsigned>(blocks), kDeltaThreads, 0, stream>>>(p);
    if (error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  if constexpr (kHasFewRegisters<Arch>) {
    error = launch_key_gradients<Arch, T, kHeadDim, KeyGradients::kKey>(p, wants_key ? p.E : 0, stream);
    if (error != cudaSuccess) return error;
    error = launch_key_gradients<Arch, T, kHeadDim, KeyGradients::kValue>(p, wants_value ? p.Ev : 0, stream);
  } else {
    const int64_t width = std::max(wants_key ? p.E : 0, wants_value ? p.Ev : 0);
    error = launch_key_gradients<Arch, T, kHeadDim, KeyGradients::kBoth>(p, width, stream);
  }
  if (error != cudaSuccess) return error;
  if (const int64_t heads = p.B * p.H; heads * p.L > 0 && (wants_query || wants_mask)) {
    constexpr auto kKernel = &grad_query_kernel<Arch, T, kHeadDim>;
    error = allow_shared_bytes<kKernel>(Tile::kSharedBytes);
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>(heads * ceil_div(p.L, Tile::kRows)), wants_query ? width_blocks(p.E) : 1);
    kKernel<<<grid, Tile::kThreads, Tile::kSharedBytes, stream>>>(p);
    error = cudaGetLastError();
  }
  return error;
}

}  // namespace efficient

template <class Arch, class T, int kHeadDim>
cudaError_t efficient_backward(const BackwardParams& p, cudaStream_t stream) {
  if constexpr (efficient::kHasPairs<Arch, T>) {
    if constexpr (kHeadDim < efficient::kNarrowestExactPairs) {
      if (!p.allow_tf32) return efficient::ffma_backward<Arch, T, kHeadDim>(p, stream);
    }
    if constexpr (kHeadDim == efficient::kWidestPairs) {
      if (p.allow_tf32 && efficient::takes_wide_backward<false>(p)) {
        return efficient::wide_pair_backward<Arch, false>(p, stream);
      }
      if (!p.allow_tf32 && efficient::takes_wide_backward<true>(p)) {
        return efficient::wide_pair_backward<Arch, true>(p, stream);
      }
    }
    return efficient::pair_backward<Arch, kHeadDim>(p, stream);
  } else if constexpr (efficient::kHasVolta<Arch, T> && kHeadDim < efficient::kWidestVolta) {
    return efficient::volta_backward<Arch, kHeadDim>(p, stream);
  } else {
    if constexpr (efficient::kHasVolta<Arch, T>) {
      if (efficient::is_one_tile<kHeadDim>(p)) return efficient::volta_backward<Arch, kHeadDim>(p, stream);
    }
    return efficient::ffma_backward<Arch, T, kHeadDim>(p, stream);
  }
}

}  // namespace sdpa
