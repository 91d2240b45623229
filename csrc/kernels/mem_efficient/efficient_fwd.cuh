// Memory-efficient attention, forward: float32 arithmetic, any head dims, any chip from sm_70 up.
//
// A block owns kRows queries of one head and kHeadDim columns of their output, and walks over the keys in tiles of 64.
// Scores accumulate over chunks of E that pass through shared memory. An output wider than kHeadDim is covered by
// further blocks, each of which computes the scores again.
#pragma once

#include "../arch/arch.h"
#include "../attn/mask.h"
#include "tile.h"

namespace sdpa {

namespace efficient {

// Two blocks a multiprocessor where it has the memory (not on sm70): 255 registers a thread, and one block computes
// while the other waits for its tiles.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(Tile<kHeadDim>::kThreads, 2) forward_kernel(const __grid_constant__ ForwardParams p) {
  using Tile = Tile<kHeadDim>;
  constexpr int kRowsOwned = Tile::kRowsOwned, kColumnsOwned = Tile::kColumnsOwned;
  extern __shared__ float4 shared_memory[];
  float* const query_tile = reinterpret_cast<float*>(shared_memory);
  float* const key_value_tile = query_tile + Tile::kRowTile;
  float* const probability_tile = key_value_tile + Tile::kColumnTile;
  const Tile t = Tile::of_thread();

  // Which part of the problem. Under causality the last queries have most to do: start them first, those of all heads.
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
  const auto output = Matrix<T>::of(p.output, b, h, p.L, p.Ev);
  const Mask mask = Mask::of(p, b, h);
  const Dropout dropout = Dropout::make(p.dropout_p, p.dropout_p > 0.f ? *p.seed : 0);

  Results<Tile> result = {};
  float row_max[kRowsOwned], row_sum[kRowsOwned];  // the sum is this thread's share, the maximum that of the row
#pragma unroll
  for (int i = 0; i < kRowsOwned; ++i) {
    row_max[i] = -INFINITY;
    row_sum[i] = 0.f;
  }

  const int key_end = mask.key_end(first_query + Tile::kRows);
  for (int first_key = 0; first_key < key_end; first_key += Tile::kColumns) {
    const bool is_masked = !mask.passes(first_query, first_query + Tile::kRows, first_key, first_key + Tile::kColumns);
    if (is_masked) stage_mask<false, Tile>(probability_tile, mask, first_query, first_key);

    // Scores. A query tile that is one chunk wide stays where it is.
    Scores<Tile> score = {};
    for (int e = 0; e < query.cols; e += kHeadDim) {
      if (first_key == 0 || query.cols > kHeadDim)
        stage_transposed<Tile, Tile::kRows>(query_tile, query, first_query, e);
      stage_transposed<Tile, Tile::kColumns>(key_value_tile, key, first_key, e);
      __syncthreads();
      multiply_scores(score, t, query_tile, key_value_tile, query.cols - e);
      __syncthreads();
    }
    scale_and_mask(score, t, p.scale, is_masked, probability_tile);

    // Online softmax.
#pragma unroll
    for (int i = 0; i < kRowsOwned; ++i) {
      float tile_max = score[i][0];
#pragma unroll
      for (int j = 1; j < kColumnsOwned; ++j) tile_max = fmaxf(tile_max, score[i][j]);
      const float new_max = fmaxf(row_max[i], Tile::row_max(tile_max));
      const float reference = new_max == -INFINITY ? 0.f : new_max;  // -inf - -inf would be NaN
      const float rescale = fast_exp2((row_max[i] - reference) * kLog2E);
      row_max[i] = new_max;
      row_sum[i] *= rescale;
#pragma unroll
      for (int j = 0; j < kColumnsOwned; ++j) {
        score[i][j] = fast_exp2((score[i][j] - reference) * kLog2E);
        row_sum[i] += score[i][j];
      }
#pragma unroll
      for (int c = 0; c < Tile::kResultsOwned; ++c) result[i][c] *= rescale;
    }
    if (p.dropout_p > 0.f) {
      for_each_keep<false, Tile>(dropout, p.first_batch_head + head_index, first_query, first_key,
                                 [&](int i, int j, bool keep) { score[i][j] = keep ? score[i][j] : 0.f; });
    }

    store_scores(probability_tile, t, score);
    stage_rows<Tile>(key_value_tile, value, first_key, first_col);
    __syncthreads();
    multiply_result(result, t, probability_tile, key_value_tile, key_end - first_key, value.cols - first_col);
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < kRowsOwned; ++i) {
    const int row = first_query + t.row(i);
    const float sum = Tile::row_sum(row_sum[i]);
    const bool is_empty = row_max[i] == -INFINITY && sum == 0.f;
    const float factor = is_empty ? 0.f : (p.dropout_p > 0.f ? dropout.rescale : 1.f) / sum;
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      float x[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] = result[i][4 * g + c] * factor;
      output.store(row, first_col + t.result_column(4 * g), x);
    }
    if (p.logsumexp != nullptr && blockIdx.y == 0 && t.x == 0 && row < p.L) {
      p.logsumexp[head_index * p.L + row] = is_empty ? -INFINITY : row_max[i] + logf(sum);
    }
  }
}

}  // namespace efficient

template <class Arch, class T, int kHeadDim>
cudaError_t efficient_forward(const ForwardParams& p, cudaStream_t stream) {
  using Tile = efficient::Tile<kHeadDim>;
  static_assert(Tile::kSharedBytes <= Arch::kSharedBytes);
  constexpr auto kKernel = &efficient::forward_kernel<T, kHeadDim>;
  if (p.B * p.H * p.L == 0 || p.Ev == 0) return cudaSuccess;
  if (const cudaError_t error = efficient::allow_shared_memory<kKernel, Tile::kSharedBytes>(); error != cudaSuccess) {
    return error;
  }
  const dim3 grid(static_cast<unsigned>(p.B * p.H * efficient::ceil_div(p.L, Tile::kRows)),
                  static_cast<unsigned>(efficient::ceil_div(p.Ev, kHeadDim)));
  kKernel<<<grid, Tile::kThreads, Tile::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace sdpa
