// Memory-efficient attention, forward, float32 on tensor cores (sm80 and newer), head dims of 129 to 256.
//
// As efficient_fwd_pair.cuh, but two warps share rows: each makes the scores of half of a tile's keys, then, with
// probabilities of both, half of the output's columns. So the scores are made once, and the output stays in registers.
// Keys on their way come to where the tile before them was while the values are multiplied, and values likewise.
#pragma once

#include "efficient_fwd_pair.cuh"
#include "pair_wide.h"

namespace sdpa {

namespace efficient {

template <bool kSplit, int kRowBlocks_>
struct WidePairForward {
  static constexpr int kRowBlocks = kRowBlocks_, kWarps = 8, kThreads = kWarps * 32;
  static constexpr int kWarpRows = 16 * kRowBlocks, kRows = kWarps / 2 * kWarpRows;
  static constexpr int kKeys = 32, kHalf = kKeys / 2;  // of a tile, and a warp's
  using Warp = HalfTile<kRowBlocks, kHalf>;
  using QueryTile = PairTile<kRows, kWideColumns, kThreads, kSplit>;
  using KeyTile = PairTile<kKeys, kWideColumns, kThreads, kSplit>;  // of values too
  static constexpr int kTileBytes = std::max(KeyTile::kBytes, KeyTile::kStagingBytes);
  using ScorePart = SharedTile<__half, kWarpRows, kKeys>;  // of two warps' probabilities
  static constexpr int kParts = kSplit ? 2 : 1, kPairBytes = kParts * ScorePart::kBytes;
  static constexpr bool kTakesMask = kRowBlocks == 1 || !kSplit;  // a tensor, that is
  // Columns of results that each thread leaves, with the softmax's state, in shared memory while it multiplies.
  static constexpr int kParkedColumns = kRowBlocks == 2 ? 2 : 0;
  static constexpr bool kParks = kParkedColumns > 0;
  static constexpr int kParkedBytes = PairSoftmax<Warp>::kBytes + kParkedColumns * Warp::kRowsOwned * 4;
  static constexpr int kSharedBytes =
      QueryTile::kBytes + 2 * kTileBytes + kWarps / 2 * kPairBytes + QueryTile::kFactorBytes +
      2 * KeyTile::kFactorBytes + kWarps / 2 * SharedRows<Warp>::kBytes + 16 + (kParks ? kThreads * kParkedBytes : 0);
  static_assert(kSharedBytes <= (kRowBlocks == 1 ? 163 : 227) * 1024);
};

template <bool kSplit, int kRowBlocks>
__global__ void __launch_bounds__(WidePairForward<kSplit, kRowBlocks>::kThreads, 1)
    wide_pair_forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ BlockOrder order) {
  using Shape = WidePairForward<kSplit, kRowBlocks>;
  using Warp = typename Shape::Warp;
  using QueryTile = typename Shape::QueryTile;
  using KeyTile = typename Shape::KeyTile;
  using ScorePart = typename Shape::ScorePart;
  if constexpr (kRowBlocks == 2 && kSplit && kIsBeforeSm90) return;  // which has no room for it
  extern __shared__ __align__(512) unsigned char wide_shared[];

  int tile_index, head_index;
  if (!order.locate(tile_index, head_index)) return;
  const auto warp = [] { return fresh_thread_index() / 32; };
  const auto half = [&] { return warp() % 2; };

  // Shared memory: queries | keys | values | probabilities | factors of the rows | maxima of rows | what block it is,
  // and the softmax's state: the products need all registers.
  const uint32_t base = shared_address(wide_shared), key_base = base + QueryTile::kBytes;
  const uint32_t value_base = key_base + Shape::kTileBytes, score_base = value_base + Shape::kTileBytes;
  const uint32_t factors = score_base + Shape::kWarps / 2 * Shape::kPairBytes;
  const uint32_t key_factors = factors + QueryTile::kFactorBytes;
  const uint32_t value_factors = key_factors + KeyTile::kFactorBytes, maxima = value_factors + KeyTile::kFactorBytes;
  const uint32_t place = maxima + Shape::kWarps / 2 * SharedRows<Warp>::kBytes;
  const QueryTile query_tile(base, factors);
  const KeyTile key_tile(key_base, key_factors), value_tile(value_base, value_factors);
  const auto probabilities = [&](int part) {
    return ScorePart{score_base + warp() / 2 * Shape::kPairBytes + part * ScorePart::kBytes};
  };
  const auto rows = [&] {
    return SharedRows<Warp>{1 + warp() / 2, half(), maxima + warp() / 2 * SharedRows<Warp>::kBytes};
  };
  const QueryPlace here{p, place};
  if (threadIdx.x == 0) here.put(order, tile_index, head_index, Shape::kRows);
  query_tile.start();
  key_tile.start();
  value_tile.start();
  __syncthreads();
  const auto warp_query = [&] { return here().first_query + warp() / 2 * Shape::kWarpRows; };

  const PairScale scale = PairScale::of(p);
  const BlockRange<Shape::kRows, Shape::kKeys> range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};
  const auto matters = [&](int first_key) { return range.matters(here().first_query, first_key); };
  const auto fetch_keys = [&](int first_key) {
    if (matters(first_key)) key_tile.fetch_in_place(here.keys(), first_key, 0);
  };
  const auto take_keys = [&](int first_key) {
    cp_async_wait_all();
    if (matters(first_key)) key_tile.take_in_place(first_key);
  };
  fetch_keys(0);
  query_tile.take(here.queries(), here().first_query, 0, 0, scale.query_sign);

  Results<Warp> result = {};
  PairSoftmax<Warp> softmax = PairSoftmax<Warp>::none();
  const auto parked = [&] { return place + 16 + fresh_thread_index() * Shape::kParkedBytes; };
  const auto parked_result = [&](int i, int n) {
    return parked() + PairSoftmax<Warp>::kBytes + (n * Warp::kRowsOwned + i) * 4;
  };
  const auto park = [&] {
    softmax.store(parked());
#pragma unroll
    for (int n = 0; n < Shape::kParkedColumns; ++n) {
#pragma unroll
      for (int i = 0; i < Warp::kRowsOwned; ++i) {
        store_shared_4(parked_result(i, n), __float_as_uint(result[i][Warp::kResultsOwned - 1 - n]));
      }
    }
  };
  const auto fetch_parked = [&] {
    softmax.load(parked());
#pragma unroll
    for (int n = 0; n < Shape::kParkedColumns; ++n) {
#pragma unroll
      for (int i = 0; i < Warp::kRowsOwned; ++i)
        result[i][Warp::kResultsOwned - 1 - n] = load_shared_4(parked_result(i, n));
    }
  };
  if (Shape::kParks) park();
  take_keys(0);
#pragma unroll 1
  for (int first_key = 0; matters(first_key); first_key += Shape::kKeys) {
    __syncthreads();  // the keys are there, and nobody reads values any more
    value_tile.fetch_in_place(here.values(), first_key, 0);
    // Whether one of its queries sees some key.
    const bool sees = kForRacecheck || !p.is_causal || first_key < warp_query() + Shape::kWarpRows;
    Scores<Warp> score;
    if (sees) {
      multiply_wide_scores<kSplit, false, Warp>(score, query_tile, warp() / 2 * kRowBlocks, 0, key_tile, half(),
                                                first_key, static_cast<int>(p.E));
    }
    cp_async_wait_all();
    value_tile.take_in_place(first_key);

    HalfPair<kSplit, 4> own[kRowBlocks];
    const auto share = [&] {
      const ScorePairs<kSplit, Warp> pairs(score);
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        own[m] = pairs.a[0][m];
        probabilities(0).put_a(own[m].big, m, half());
        if constexpr (kSplit) probabilities(1).put_a(own[m].small, m, half());
      }
    };
    if (sees) {
      const int own_key = first_key + half() * Shape::kHalf;
      const auto mask = [&] { return Mask::of(p, here().batch, here().head); };
      apply_mask<Warp, Shape::kTakesMask>(score, scale, mask, warp_query(), own_key);
      if (Shape::kParks) fetch_parked();
      softmax.take_in(score, scale.to_exponent, result, rows());
      if (Shape::kParks) park();
      if (p.dropout_p > 0.f) {
        const Dropout dropout = Dropout::make(p.dropout_p, *p.seed);
        drop_scores<Warp>(score, dropout, p.first_batch_head + here().batch * p.H + here().head, warp_query(), own_key);
      }
      share();
    }
    __syncthreads();  // probabilities and values are there, and nobody reads keys any more
    fetch_keys(first_key + Shape::kKeys);
    if (sees) {
      float unscale[Warp::kRowsOwned];
#pragma unroll
      for (float& x : unscale) x = 1.f;
      const bool has_factors = value_tile.has_factors(first_key);
      if (has_factors) {
        take_on_factors<Warp>(score, value_tile, half());
        bring_into_range<Warp>(score, unscale, rows().set(1));
        share();
        sync_threads<64>(rows().barrier);
      }
      HalfPair<kSplit, 4> other[kRowBlocks];
      const LaneOffset lane = ScorePart::lane_offset();
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        probabilities(0).load_a(other[m].big, lane, m, half() ^ 1);
        if constexpr (kSplit) probabilities(1).load_a(other[m].small, lane, m, half() ^ 1);
      }
      const auto is_parked = [](int c) { return c >= Warp::kResultsOwned - Shape::kParkedColumns; };
      const auto parked_place = [&](int i, int c) { return parked_result(i, Warp::kResultsOwned - 1 - c); };
      const auto start = [&](int i, int c) { return is_parked(c) ? load_shared_4(parked_place(i, c)) : result[i][c]; };
      const auto keep = [&](int i, int c, float x) {
        if (is_parked(c)) {
          store_shared_4(parked_place(i, c), __float_as_uint(x));
        } else {
          result[i][c] = x;
        }
      };
      if constexpr (!kSplit) {
        if (!has_factors) {
          multiply_half_result<false, true, Warp>(own, other, value_tile, half(), static_cast<int>(p.Ev), start, keep);
        }
      }
      if (kSplit || has_factors) {
        // A tile's keys are summed up by themselves before they join the others.
        multiply_half_result<kSplit, false, Warp>(
            own, other, value_tile, half(), static_cast<int>(p.Ev), start,
            [&](int i, int c, float x) { keep(i, c, fmaf(x, unscale[i], start(i, c))); });
      }
    }
    take_keys(first_key + Shape::kKeys);
  }
  cp_async_wait_all();
  __syncthreads();  // nobody reads maxima any more

  if (Shape::kParks) fetch_parked();
  {
    float sum[Warp::kRowsOwned];
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) sum[i] = Warp::row_sum(softmax.sum[i]);
    rows().exchange(sum, [&](int i, float other) { softmax.sum[i] = threadIdx.x % 4 == 0 ? sum[i] + other : 0.f; });
  }
  const float kept = Dropout::make(p.dropout_p, 0).rescale;  // 1 without dropout
  const auto output = Matrix<float>::of(p.output, here().batch, here().head, p.L, p.Ev);
  store_results<Warp>(output, result, warp_query(), half() * 32, [&](int i) {
    const int row = warp_query() + Warp::row(i);
    const bool keeps_statistics = p.logsumexp != nullptr && half() == 0 && threadIdx.x % 4 == 0 && row < p.L;
    const float factor = softmax.finish(i, p, keeps_statistics ? (here().batch * p.H + here().head) * p.L + row : -1);
    if (factor == 0.f) {
#pragma unroll
      for (float& x : result[i]) x = 0.f;  // a NaN in V stays out of empty rows
    }
    return kept * factor * power_of_two(-kShift);
  });
}

// Whether these kernels take a problem.
template <bool kSplit>
bool takes_wide(const ForwardParams& p) {
  const int64_t width = std::max(p.E, p.Ev);
  return width > kWidestPairs && width <= kWideColumns && p.shared_bytes >= WidePairForward<kSplit, 1>::kSharedBytes;
}

template <bool kSplit, int kRowBlocks>
cudaError_t launch_wide_pair_forward(const ForwardParams& p, int multiprocessors, cudaStream_t stream) {
  using Shape = WidePairForward<kSplit, kRowBlocks>;
  const auto order = BlockOrder::make(ceil_div(p.L, Shape::kRows), p.B * p.H,
                                      p.is_causal ? 0 : p.S * (p.E + p.Ev) * sizeof(float) / p.group);
  if constexpr (kRowBlocks == 2) {
    if (order.blocks() < multiprocessors || p.shared_bytes < Shape::kSharedBytes ||
        (!Shape::kTakesMask && p.mask_kind != MaskKind::kNone)) {
      return launch_wide_pair_forward<kSplit, 1>(p, multiprocessors, stream);
    }
  }
  if (order.blocks() == 0) return cudaSuccess;
  constexpr auto kKernel = &wide_pair_forward_kernel<kSplit, kRowBlocks>;
  if (const auto error = allow_shared_bytes<kKernel>(Shape::kSharedBytes); error != cudaSuccess) return error;
  kKernel<<<dim3(order.grid_x(), order.grid_y()), Shape::kThreads, Shape::kSharedBytes, stream>>>(p, order);
  return cudaGetLastError();
}

template <bool kSplit>
cudaError_t wide_pair_forward(const ForwardParams& p, cudaStream_t stream) {
  if (std::max({p.L, p.S, p.B * p.H}) > kMaxPosition) return cudaErrorInvalidValue;
  int multiprocessors = 0;
  if (const auto error = count_multiprocessors(multiprocessors); error != cudaSuccess) return error;
  return launch_wide_pair_forward<kSplit, 2>(p, multiprocessors, stream);
}

}  // namespace efficient

}  // namespace sdpa
