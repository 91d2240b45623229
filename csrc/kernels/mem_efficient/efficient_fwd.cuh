// Memory-efficient attention, forward: float32 arithmetic, any head dims, any chip from sm_70 up. (float32 tensors on
// sm_80 and newer: efficient_fwd_pair.cuh. float16 on sm_70, up to head dim 128: efficient_fwd_volta.cuh.)
//
// A block owns kRows queries of one head and kHeadDim columns of their output, and walks over the keys in tiles.
// Scores accumulate over chunks of E that pass through shared memory. An output wider than kHeadDim is covered by
// further blocks, each of which computes the scores again.
#pragma once

#include "../arch/arch.h"
#include "../attn/mask.h"
#include "efficient_fwd_pair.cuh"
#include "efficient_fwd_pair_wide.cuh"
#include "efficient_fwd_volta.cuh"
#include "in_flight.h"
#include "statistics.h"
#include "tile.h"

namespace sdpa {

namespace efficient {

template <class Arch, int kHeadDim>
constexpr int kForwardColumns = kHasFewRegisters<Arch>              ? kHeadDim / 2
                                : kHeadDim == 32 || !kHasRoom<Arch> ? 32
                                                                    : 64;

template <class Arch, int kHeadDim>
struct ForwardTile : Tile<kHeadDim, kForwardColumns<Arch, kHeadDim>> {
  using Base = Tile<kHeadDim, kForwardColumns<Arch, kHeadDim>>;
  static constexpr int kSharedBytes =
      Base::kSharedBytes +
      (Base::kIsNarrow ? (Base::kColumnTile + 2 * Base::kResultTile) * static_cast<int>(sizeof(float)) : 0);
};

// Two blocks a multiprocessor where it has the memory (not on sm70): 255 registers a thread, and one block computes
// while the other waits for its tiles.
template <class Arch, class T, int kHeadDim>
__global__ void __launch_bounds__(ForwardTile<Arch, kHeadDim>::kThreads, 2)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  using Tile = typename ForwardTile<Arch, kHeadDim>::Base;
  extern __shared__ float4 shared_memory[];
  float* const query_tile = reinterpret_cast<float*>(shared_memory);
  float* const probability_tile = query_tile + Tile::kRowTile;
  float* key_tile = probability_tile + Tile::kScoreTile;  // narrow: two of these, and behind them two for values
  float* value_tile = Tile::kIsNarrow ? key_tile + 2 * Tile::kColumnTile : key_tile;
  int other_key_tile = Tile::kColumnTile, other_value_tile = Tile::kResultTile;
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
  const DropoutOf<Arch> dropout(p);

  Results<Tile> result = {};
  RowSoftmax<Tile> softmax = RowSoftmax<Tile>::none();
  InFlight<Tile, T> keys, values;
  if constexpr (Tile::kIsNarrow) {
    stage_transposed<Tile, Tile::kRows>(query_tile, query, first_query, 0);
    keys.load(key, 0);
    values.load(value, 0);
  }

  const int key_end = mask.key_end(first_query + Tile::kRows);
  for (int first_key = 0; first_key < key_end; first_key += Tile::kColumns) {
    const bool is_masked = !mask.passes(first_query, first_query + Tile::kRows, first_key, first_key + Tile::kColumns);
    if (is_masked) stage_mask<false, Tile>(probability_tile, mask, first_query, first_key);

    // Scores. A query tile that is one chunk wide stays where it is.
    Scores<Tile> score = {};
    if constexpr (Tile::kIsNarrow) {
      keys.store_transposed(key_tile);
      values.store_rows(value_tile);
      __syncthreads();  // also: nobody reads the other two tiles any more
      keys.load(key, first_key + Tile::kColumns);
      values.load(value, first_key + Tile::kColumns);
      multiply_scores(score, t, query_tile, key_tile, query.cols);
    } else {
      for (int e = 0; e < query.cols; e += kHeadDim) {
        if (first_key == 0 || query.cols > kHeadDim) {
          stage_transposed<Tile, Tile::kRows>(query_tile, query, first_query, e);
        }
        stage_transposed<Tile, Tile::kColumns>(key_tile, key, first_key, e);
        __syncthreads();
        multiply_scores(score, t, query_tile, key_tile, query.cols - e);
        __syncthreads();
      }
    }
    scale_and_mask(score, t, p.scale, is_masked, probability_tile);

    float rescale[Tile::kRowsOwned];
    softmax.take_in(score, rescale);
    if (p.dropout_p > 0.f) {
      for_each_keep<false, Tile>(dropout(), p.first_batch_head + head_index, first_query, first_key,
                                 [&](int i, int j, bool keep) { score[i][j] = keep ? score[i][j] : 0.f; });
    }

    store_scores(probability_tile, t, score);
    if constexpr (Tile::kIsNarrow) {
      __syncwarp();
    } else {
      stage_rows<Tile>(value_tile, value, first_key, first_col);
      __syncthreads();
    }
    // A tile is summed up by itself before it joins the others: a float32 sum over thousands of keys, one after the
    // other, would lose several bits.
    Results<Tile> tile_result = {};
    multiply_result(tile_result, t, probability_tile, value_tile, key_end - first_key, value.cols - first_col);
#pragma unroll
    for (int i = 0; i < Tile::kRowsOwned; ++i) {
#pragma unroll
      for (int c = 0; c < Tile::kResultsOwned; ++c) result[i][c] = fmaf(result[i][c], rescale[i], tile_result[i][c]);
    }
    if constexpr (Tile::kIsNarrow) {
      key_tile += other_key_tile;
      value_tile += other_value_tile;
      other_key_tile = -other_key_tile;
      other_value_tile = -other_value_tile;
    } else {
      __syncthreads();
    }
  }

#pragma unroll
  for (int i = 0; i < Tile::kRowsOwned; ++i) {
    const int row = first_query + t.row(i);
    const float sum = Tile::row_sum(softmax.sum[i]);
    const bool is_empty = softmax.maximum[i] == -INFINITY && sum == 0.f;
    const float factor = (p.dropout_p > 0.f ? dropout().rescale : 1.f) / sum;
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      float x[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] = is_empty ? 0.f : result[i][4 * g + c] * factor;
      output.store(row, first_col + t.result_column(4 * g), x);
    }
    if (p.logsumexp != nullptr && blockIdx.y == 0 && t.x == 0 && row < p.L) {
      store_statistics(p, head_index * p.L + row, softmax.maximum[i], sum, is_empty);
    }
  }
}

template <class Arch, class T, int kHeadDim>
cudaError_t ffma_forward(const ForwardParams& p, cudaStream_t stream) {
  using Tile = ForwardTile<Arch, kHeadDim>;
  static_assert(Tile::kSharedBytes <= Arch::kSharedBytes);
  constexpr auto kKernel = &forward_kernel<Arch, T, kHeadDim>;
  if (Tile::kIsNarrow && (p.E > kHeadDim || p.Ev > kHeadDim)) return cudaErrorInvalidValue;
  if (p.B * p.H * p.L == 0 || p.Ev == 0) return cudaSuccess;
  const cudaError_t error = allow_shared_bytes<kKernel>(Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(p.B * p.H * ceil_div(p.L, Tile::kRows)),
                  static_cast<unsigned>(ceil_div(p.Ev, kHeadDim)));
  kKernel<<<grid, Tile::kThreads, Tile::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace efficient

template <class Arch, class T, int kHeadDim>
cudaError_t efficient_forward(const ForwardParams& p, cudaStream_t stream) {
  if constexpr (efficient::kHasPairs<Arch, T>) {
    if constexpr (kHeadDim < efficient::kNarrowestExactPairs) {
      if (!p.allow_tf32) return efficient::ffma_forward<Arch, T, kHeadDim>(p, stream);
    }
    if constexpr (kHeadDim == efficient::kWidestPairs) {
      if (p.allow_tf32 && efficient::takes_wide<false>(p)) return efficient::wide_pair_forward<false>(p, stream);
      if (!p.allow_tf32 && efficient::takes_wide<true>(p)) return efficient::wide_pair_forward<true>(p, stream);
    }
    return efficient::pair_forward<Arch, kHeadDim>(p, stream);
  } else if constexpr (efficient::kHasVolta<Arch, T> && kHeadDim < efficient::kWidestVolta) {
    return efficient::volta_forward<Arch, kHeadDim>(p, stream);
  } else {
    if constexpr (efficient::kHasVolta<Arch, T>) {
      if (efficient::is_one_tile<kHeadDim>(p)) return efficient::volta_forward<Arch, kHeadDim>(p, stream);
    }
    return efficient::ffma_forward<Arch, T, kHeadDim>(p, stream);
  }
}

}  // namespace sdpa
