// Memory-efficient attention, forward, float32 on tensor cores (sm80 and newer), any head dims.
//
// A block owns kRows queries of one head and kHeadDim columns of their output, a warp whole rows of them; keys and
// values come through a ring of two stages. An E wider than kHeadDim passes through shared memory in chunks; an output
// wider than kHeadDim is covered by further blocks, each of which computes the scores again.
#pragma once

#include <algorithm>

#include "../arch/arch.h"
#include "../attn/block_range.h"
#include "../attn/mask.h"
#include "statistics.h"
#include "tf32_tile.h"

namespace sdpa {

namespace efficient {

constexpr int kBiasStride = 160;  // bytes of a row of 32 mask entries, padded

// Up to kHeadDim 64 a warp has registers for 32 rows, and what it reads of keys and values serves twice the products.
template <class Arch, int kHeadDim>
struct Tf32Forward {
  static constexpr int kWarps = 4, kThreads = kWarps * 32;
  static constexpr int kRowBlocks = kHeadDim <= 64 ? 2 : 1, kWarpRows = 16 * kRowBlocks, kRows = kWarps * kWarpRows;
  static constexpr int kKeys = 32;
  static constexpr int kTogether = kRowBlocks == 1 ? 2 : 1;  // see multiply_result
  static constexpr int kBlocksPerSm = 2;
  using Warp = WarpTile<kRowBlocks, kKeys, kHeadDim>;
  using QueryTile = FloatTile<kRows, kHeadDim>;
  using KeyTile = FloatTile<kKeys, kHeadDim>;  // of values too
  // A mask tensor's entries have a place of their own, or that of the keys they belong to.
  static constexpr int kBiasBytes = kRows * kBiasStride;
  static constexpr bool kBiasInKeys = kHeadDim > 64;
  static_assert(!kBiasInKeys || kBiasBytes <= KeyTile::kBytes);
  static constexpr int kSharedBytes = QueryTile::kBytes + 4 * KeyTile::kBytes + (kBiasInKeys ? 0 : kBiasBytes);
  static_assert(kSharedBytes <= Arch::kSharedBytes);
};

// Scales products to scores, as scale_and_mask in tile.h does, and adds what the mask has for them. A mask tensor's
// part goes through the warp's own place in shared memory: there are no registers for loads under way.
template <class Warp>
__device__ __forceinline__ void scale_and_mask(Scores<Warp>& score, float scale, const Mask& mask, uint32_t bias_base,
                                               int first_query, int first_key) {
#pragma unroll
  for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
    for (int j = 0; j < Warp::kColumnsOwned; ++j) score[i][j] = __fmul_rn(score[i][j], scale);
  }
  constexpr int kRows = 8 * Warp::kRowsOwned;
  if (mask.kind != MaskKind::kNone) {
    const int lane = threadIdx.x % 32;
    mask.read([&](auto bias) {
#pragma unroll 2
      for (int row = lane / 8; row < kRows; row += 4) {
        const float4 b = bias(first_query + row, first_key + lane % 8 * 4);
        store_shared_16(bias_base + row * kBiasStride + lane % 8 * 16,
                        {__float_as_uint(b.x), __float_as_uint(b.y), __float_as_uint(b.z), __float_as_uint(b.w)});
      }
    });
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
      for (int j = 0; j < Warp::kColumnsOwned; j += 2) {
        const float2 b = load_shared_8(bias_base + Warp::row(i) * kBiasStride + Warp::column(j) * 4);
        score[i][j] = Mask::add(score[i][j], b.x);
        score[i][j + 1] = Mask::add(score[i][j + 1], b.y);
      }
    }
    __syncwarp();  // the place may be filled again
  } else if (!mask.passes(first_query, first_query + kRows, first_key, first_key + Warp::kColumns)) {
    const TileLimit limit{min(mask.S - first_key, Warp::kColumns),
                          mask.is_causal ? min(first_query - first_key, Warp::kColumns) : Warp::kColumns};
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
      for (int j = 0; j < Warp::kColumnsOwned; ++j) {
        if (!limit.sees(Warp::row(i), Warp::column(j))) score[i][j] = -INFINITY;
      }
    }
  }
}

// Makes 0 of the scores that dropout drops (see dropout.h). A lane has scores of two draws in every 32 keys, all of
// them if it has 32 queries' rows.
template <class Warp>
__device__ __forceinline__ void drop_scores(Scores<Warp>& score, const Dropout& dropout, int64_t batch_head,
                                            int first_query, int first_key) {
  static_assert(Warp::kTiles % 4 == 0 && Warp::kRowBlocks <= 2);
#pragma unroll
  for (int n = 0; n < Warp::kTiles / 4; ++n) {
#pragma unroll
    for (int is_odd = 0; is_odd < 2; ++is_odd) {
      const Dropped16 dropped = dropout.draw(static_cast<uint32_t>(batch_head), first_query / 32, first_key / 32 + n,
                                             threadIdx.x % 32 / 4, threadIdx.x % 4 * 2 + is_odd);
#pragma unroll
      for (int i = 0; i < Warp::kRowsOwned; ++i) {  // 8 rows apart, and so are the columns
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t word = dropped.word_of(Warp::kRowBlocks == 2 ? i / 2 : first_query / 16 % 2, j / 2);
          float& x = score[i][8 * n + 2 * j + is_odd];
          x = word >> (7 + i % 2 * 8 + j % 2 * 16) & 1 ? 0.f : x;
        }
      }
    }
  }
}

template <class Arch, int kHeadDim, bool kSplit>
__global__ void __launch_bounds__(Tf32Forward<Arch, kHeadDim>::kThreads, Tf32Forward<Arch, kHeadDim>::kBlocksPerSm)
    tf32_forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ BlockOrder order) {
  using Shape = Tf32Forward<Arch, kHeadDim>;
  using Warp = typename Shape::Warp;
  constexpr int kThreads = Shape::kThreads, kKeys = Shape::kKeys;
  extern __shared__ __align__(16) unsigned char shared[];

  // Which part of the problem. Under causality the last queries have most to do: start them first.
  int tile_index, head_index;
  if (!order.locate(tile_index, head_index)) return;
  const int first_query = (static_cast<int>(order.tiles) - 1 - tile_index) * Shape::kRows;
  const int heads = static_cast<int>(p.H), group = static_cast<int>(p.group);
  int batch = head_index / heads, head = head_index % heads, key_head = head / group;
  const int first_col = blockIdx.z * kHeadDim;
  const int warp_row = static_cast<int>(threadIdx.x / 32) * Shape::kWarpRows;

  const typename Shape::QueryTile query_tile{shared_address(shared)};
  const auto key_tile = [&](int stage) {
    return typename Shape::KeyTile{query_tile.base + Shape::QueryTile::kBytes + stage * Shape::KeyTile::kBytes};
  };
  const auto value_tile = [&](int stage) { return key_tile(2 + stage); };

  // Where the products need all registers, addresses start anew from the parameters wherever they are used.
  const auto start_anew = [&] {
    if constexpr (kSplit && kHeadDim == 64) asm volatile("" : "+r"(batch), "+r"(head), "+r"(key_head));
  };
  const auto fetch_queries = [&](int first_e) {
    query_tile.template fill<kThreads>(Matrix<const float>::of(p.query, batch, head, p.L, p.E), first_query, first_e);
  };
  const auto fetch_keys = [&](int stage, int first_key, int first_e) {
    const auto key = Matrix<const float>::of(p.key, batch, key_head, p.S, p.E);
    key_tile(stage).template fill<kThreads>(key, first_key, first_e);
  };
  const auto fetch_values = [&](int stage, int first_key) {
    const auto value = Matrix<const float>::of(p.value, batch, key_head, p.S, p.Ev);
    value_tile(stage).template fill<kThreads>(value, first_key, first_col);
  };

  const auto land = [] {
    cp_async_wait_all();
    __syncthreads();
  };

  const int head_dim = static_cast<int>(p.E);
  const bool is_one_chunk = kHeadDim != kWidestTf32 || head_dim <= kHeadDim;
  const BlockRange<Shape::kRows, kKeys> range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};
  if (is_one_chunk) {
    fetch_queries(0);
    fetch_keys(0, 0, 0);
  }
  fetch_values(0, 0);

  Results<Warp> result = {};
  RowSoftmax<Warp> softmax = RowSoftmax<Warp>::none();
  for (int first_key = 0, stage = 0; range.matters(first_query, first_key); first_key += kKeys, stage ^= 1) {
    // This tile has landed, and every warp is done with the one before, whose stage is filled next.
    land();
    start_anew();
    if (!kSplit && is_one_chunk && first_key == 0) {
      query_tile.template round<kThreads>();
      __syncthreads();
    }
    if (range.matters(first_query, first_key + kKeys)) {
      if (is_one_chunk) fetch_keys(stage ^ 1, first_key + kKeys, 0);
      fetch_values(stage ^ 1, first_key + kKeys);
    }

    Scores<Warp> score = {};
#pragma unroll 1
    for (int e = 0; e < (kHeadDim == kWidestTf32 ? head_dim : 1); e += kHeadDim) {
      if (!is_one_chunk) {
        __syncthreads();  // nobody reads the chunk before any more
        fetch_queries(e);
        fetch_keys(stage, first_key, e);
        land();
        if (!kSplit) {
          query_tile.template round<kThreads>();
          __syncthreads();
        }
      }
      multiply_scores<kSplit, false, Warp, !kSplit>(score, query_tile, warp_row, key_tile(stage), head_dim - e);
    }
    start_anew();
    if (Shape::kBiasInKeys && p.mask_kind != MaskKind::kNone) __syncthreads();  // nobody reads the keys any more
    const uint32_t bias_base = key_tile(Shape::kBiasInKeys ? stage : 4).base + warp_row * kBiasStride;
    scale_and_mask<Warp>(score, p.scale, Mask::of(p, batch, head), bias_base, first_query + warp_row, first_key);

    float rescale[Warp::kRowsOwned];
    softmax.take_in(score, rescale);
    if (p.dropout_p > 0.f) {
      const Dropout dropout = Dropout::make(p.dropout_p, *p.seed);
      drop_scores<Warp>(score, dropout, p.first_batch_head + head_index, first_query + warp_row, first_key);
    }
    // A tile is summed up by itself before it joins the others, and what it joins is rescaled on the way.
    const int width = static_cast<int>(p.Ev) - first_col;
    multiply_result<kSplit, Shape::kTogether, Warp>(score, value_tile(stage), width, [&](int i, int c, float x) {
      result[i][c] = fmaf(result[i][c], rescale[i], x);
    });
  }
  cp_async_wait_all();

  const float kept = Dropout::make(p.dropout_p, 0).rescale;  // 1 without dropout
  const auto output = Matrix<float>::of(p.output, batch, head, p.L, p.Ev);
  store_results<Warp>(output, result, first_query + warp_row, first_col, [&](int i) {
    const int row = first_query + warp_row + Warp::row(i);
    const float sum = Warp::row_sum(softmax.sum[i]);
    const bool is_empty = softmax.maximum[i] == -INFINITY && sum == 0.f;
    if (p.logsumexp != nullptr && blockIdx.z == 0 && threadIdx.x % 4 == 0 && row < p.L) {
      store_statistics(p, int64_t{head_index} * p.L + row, softmax.maximum[i], sum, is_empty);
    }
    if (!is_empty) return kept / sum;
#pragma unroll
    for (float& x : result[i]) x = 0.f;  // a NaN in V stays out of empty rows
    return 0.f;
  });
}

template <class Arch, int kHeadDim, bool kSplit>
cudaError_t launch_tf32_forward(const ForwardParams& p, cudaStream_t stream) {
  using Shape = Tf32Forward<Arch, kHeadDim>;
  constexpr auto kKernel = &tf32_forward_kernel<Arch, kHeadDim, kSplit>;
  if (std::max({p.L, p.S, p.B * p.H}) > kMaxPosition || !fits_tf32<kHeadDim>(p)) return cudaErrorInvalidValue;
  const auto order =
      BlockOrder::make(ceil_div(p.L, Shape::kRows), p.B * p.H, p.S * (p.E + p.Ev) * sizeof(float) / p.group);
  if (order.blocks() == 0 || p.Ev == 0) return cudaSuccess;
  if (const cudaError_t error = allow_shared_bytes<kKernel>(Shape::kSharedBytes); error != cudaSuccess) return error;
  const dim3 grid(order.grid_x(), order.grid_y(), static_cast<unsigned>(ceil_div(p.Ev, kHeadDim)));
  kKernel<<<grid, Shape::kThreads, Shape::kSharedBytes, stream>>>(p, order);
  return cudaGetLastError();
}

template <class Arch, int kHeadDim>
cudaError_t tf32_forward(const ForwardParams& p, cudaStream_t stream) {
  if constexpr (kHeadDim >= kNarrowestExactTf32) {
    if (!p.allow_tf32) return launch_tf32_forward<Arch, kHeadDim, true>(p, stream);
  }
  return launch_tf32_forward<Arch, kHeadDim, false>(p, stream);
}

}  // namespace efficient

}  // namespace sdpa
