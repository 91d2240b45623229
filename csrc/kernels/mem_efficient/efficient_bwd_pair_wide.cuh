// Memory-efficient attention, backward, float32 on tensor cores (sm80 and newer), head dims of 129 to 256, in the 227
// KB that a block may have from sm90 on. As efficient_bwd_pair.cuh, but two warps share keys: each makes P^T and dS^T
// of half of a tile's queries, then, with those of both, half of the columns of dV and dK. Queries and dO on their way
// come to where the tile before them was.
#pragma once

#include "efficient_bwd_pair.cuh"
#include "pair_wide.h"

namespace sdpa {

namespace efficient {

template <bool kSplit>
struct WidePairBackward {
  static constexpr int kWarps = 8, kThreads = kWarps * 32, kKeys = 64, kQueries = 32, kHalf = kQueries / 2;
  using Warp = HalfTile<1, kHalf>;
  using KeyTile = PairTile<kKeys, kWideColumns, kThreads, kSplit>;       // of values too
  using QueryTile = PairTile<kQueries, kWideColumns, kThreads, kSplit>;  // of dO too
  static constexpr int kTileBytes = std::max(QueryTile::kBytes, QueryTile::kStagingBytes);
  using ScorePart = SharedTile<__half, 16, kQueries>;  // of two warps' P^T or dS^T
  static constexpr int kPairBytes = 2 * ScorePart::kBytes, kScoreBytes = kQueries * kKeys * 4;
  static constexpr int kFactorBytes = 2 * (KeyTile::kFactorBytes + QueryTile::kFactorBytes);
  static constexpr int kStatisticsBytes = StatisticsTile<kQueries>::kFloats * 4;
  static constexpr int kSharedBytes = 2 * KeyTile::kBytes + 2 * kTileBytes + kScoreBytes + kWarps * kPairBytes +
                                      kFactorBytes + kWarps / 2 * SharedRows<Warp>::kBytes + kStatisticsBytes + 16;
  static_assert(kSharedBytes <= 227 * 1024);
  // Each warp has 16 rows and kGradColumns columns of dQ.
  static constexpr int kGradColumns = kWideColumns * (kQueries / 16) / kWarps;
};

// A warp's scores, brought into float16's range by their rows' maxima (see bring_into_range), as operand `own`, and to
// where the other warp finds its `other`.
template <bool kSplit, class Warp, class Part>
__device__ __forceinline__ void share_scores(HalfPair<kSplit, 4>& own, Scores<Warp>& score,
                                             const float (&most)[Warp::kRowsOwned], float (&inverse)[Warp::kRowsOwned],
                                             uint32_t base, int half) {
  scale_into_range<Warp>(score, most, inverse);
  own = ScorePairs<kSplit, Warp>(score).a[0][0];
  Part{base}.put_a(own.big, 0, half);
  if constexpr (kSplit) Part{base + Part::kBytes}.put_a(own.small, 0, half);
}
template <bool kSplit, class Part>
__device__ __forceinline__ void load_other(HalfPair<kSplit, 4>& other, uint32_t base, int half) {
  const LaneOffset lane = Part::lane_offset();
  Part{base}.load_a(other.big, lane, 0, half ^ 1);
  if constexpr (kSplit) Part{base + Part::kBytes}.load_a(other.small, lane, 0, half ^ 1);
}

template <bool kSplit>
__global__ void __launch_bounds__(WidePairBackward<kSplit>::kThreads, 1)
    wide_pair_backward_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BlockOrder order) {
  using Shape = WidePairBackward<kSplit>;
  using Warp = typename Shape::Warp;
  using KeyTile = typename Shape::KeyTile;
  using QueryTile = typename Shape::QueryTile;
  using ScorePart = typename Shape::ScorePart;
  constexpr int kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  if constexpr (kIsBeforeSm90) return;  // which has no room for it
  extern __shared__ __align__(512) unsigned char wide_shared[];

  // Which part of the problem. Under causality the first keys have most to do, and come first as it is.
  int tile_index, key_head_index;
  if (!order.locate(tile_index, key_head_index)) return;
  const int first_key = tile_index * kKeys;
  const int group = static_cast<int>(p.group), key_heads = static_cast<int>(p.H) / group;
  const BlockRange<kQueries, kKeys> range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};
  const auto query_begin = [&] { return range.first_query_tile(first_key) * kQueries; };
  const auto warp = [] { return fresh_thread_index() / 32; };
  const auto half = [&] { return warp() % 2; };
  const PairScale scale = PairScale::of(p);

  // Shared memory: keys | values | queries | dO | dS | P^T and dS^T of two warps (first mask entries) | factors |
  // maxima of rows | which head it is | statistics.
  const uint32_t base = shared_address(wide_shared), query_base = base + 2 * KeyTile::kBytes;
  const uint32_t grad_base = query_base + Shape::kTileBytes, score_base = grad_base + Shape::kTileBytes;
  const uint32_t pair_base = score_base + Shape::kScoreBytes, factors = pair_base + Shape::kWarps * Shape::kPairBytes;
  const uint32_t query_factors = factors + 2 * KeyTile::kFactorBytes;
  const uint32_t maxima = factors + Shape::kFactorBytes;
  const uint32_t place = maxima + Shape::kWarps / 2 * SharedRows<Warp>::kBytes;
  const KeyTile key_tile(base, factors), value_tile(base + KeyTile::kBytes, factors + KeyTile::kFactorBytes);
  const QueryTile query_tile(query_base, query_factors);
  const QueryTile grad_tile(grad_base, query_factors + QueryTile::kFactorBytes);
  const auto shared_scores = [&](int n) { return pair_base + (warp() / 2 * 2 + n) * Shape::kPairBytes; };
  const auto rows = [&] {
    return SharedRows<Warp>{1 + warp() / 2, half(), maxima + warp() / 2 * SharedRows<Warp>::kBytes};
  };
  const StatisticsTile<kQueries> statistics{
      reinterpret_cast<float*>(wide_shared + Shape::kSharedBytes - Shape::kStatisticsBytes)};
  const KeyPlace here{p, place};
  if (threadIdx.x == 0) here.put(key_head_index, key_heads);
  key_tile.start();
  value_tile.start();
  query_tile.start();
  grad_tile.start();
  __syncthreads();
  const auto fetch = [&](int head, int first_query) {
    query_tile.fetch_in_place(here.queries(head), first_query, 0);
    grad_tile.fetch_in_place(here.grads(head), first_query, 0);
  };
  const auto publish = [&](const QueryStatistics& s) {
    if (threadIdx.x < kQueries) statistics.store(threadIdx.x, s);
  };

  Results<Warp> grad_key = {}, grad_value = {};
  int head = here().key_head * group, first_query = query_begin();
  if (first_query < p.L) {
    fetch(head, first_query);
    key_tile.take(here.keys(), first_key, 0, 0);
    value_tile.take(here.values(), first_key, 0, 0);
    publish(here.statistics<kQueries>(head, first_query));
  }

#pragma unroll 1
  for (int step = 0; first_query < p.L && head < (here().key_head + 1) * group; ++step) {
    cp_async_wait_all();
    query_tile.take_in_place(step, scale.query_sign);
    grad_tile.take_in_place(step);
    __syncthreads();
    const bool is_last_of_head = first_query + kQueries >= p.L;
    const int next_head = is_last_of_head ? head + 1 : head;
    const int next_query = is_last_of_head ? query_begin() : first_query + kQueries;
    const bool has_next = next_head < (here().key_head + 1) * group;

    // P^T and dP^T, of this warp's queries
    Scores<Warp> probability, grad;
    const auto warp_key = [&] { return first_key + warp() / 2 * 16; };
    const auto warp_query = [&] { return first_query + half() * Shape::kHalf; };
    multiply_wide_scores<kSplit, true, Warp>(probability, key_tile, warp() / 2, 0, query_tile, half(), step,
                                             static_cast<int>(p.E));
    const auto mask = [&] { return Mask::of(p, here().batch, head); };
    apply_mask_transposed<Warp>(probability, scale, mask, shared_scores(half()), warp_query(), warp_key());
    const auto query_of = [&](int j) { return half() * Shape::kHalf + Warp::column(j); };
#pragma unroll
    for (int j = 0; j < Warp::kColumnsOwned; ++j) {
      const RowReference reference = statistics.reference(query_of(j));
#pragma unroll
      for (int i = 0; i < Warp::kRowsOwned; ++i) {
        probability[i][j] = pair_probability(probability[i][j], scale.to_exponent, reference);
      }
    }
    multiply_wide_scores<kSplit, false, Warp>(grad, value_tile, warp() / 2, 0, grad_tile, half(), step,
                                              static_cast<int>(p.Ev));

    // dS^T, in the place of dP^T
    const bool drops = p.dropout_p > 0.f;
    uint32_t kept = ~0u;
    const Dropout dropout = Dropout::make(p.dropout_p, drops ? *p.seed : 0);
    if (drops) {
      kept =
          kept_scores<Warp>(dropout, p.first_batch_head + int64_t{here().batch} * p.H + head, warp_query(), warp_key());
    }
    const float grad_scale = dropout.rescale * power_of_two(-2 * kShift);
#pragma unroll
    for (int j = 0; j < Warp::kColumnsOwned; ++j) {
      const float delta = statistics.delta(query_of(j));
#pragma unroll
      for (int i = 0; i < Warp::kRowsOwned; ++i) {
        const bool keeps = kept >> (j / 2 * 4 + i * 2 + j % 2) & 1;
        grad[i][j] = probability[i][j] * ((keeps ? grad[i][j] * grad_scale : 0.f) - delta);
        probability[i][j] = keeps ? probability[i][j] : 0.f;
      }
    }
    const bool keys_have_factors = key_tile.has_factors(0);
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
      const int key = 16 * (warp() / 2) + Warp::row(i);
      const float factor = keys_have_factors ? key_tile.factor(key) : 1.f;
#pragma unroll
      for (int j = 0; j < Warp::kColumnsOwned; ++j) {
        store_shared_4(score_base + score_place<kKeys>(query_of(j), key), __float_as_uint(grad[i][j] * factor));
      }
    }
    if (grad_tile.has_factors(step)) take_on_factors<Warp>(probability, grad_tile, half());
    if (query_tile.has_factors(step)) take_on_factors<Warp>(grad, query_tile, half());
    HalfPair<kSplit, 4> own_probability[1], own_grad[1], other[1];
    float unscale_value[Warp::kRowsOwned], unscale_key[Warp::kRowsOwned];
    {
      float most[2][Warp::kRowsOwned];
      find_largest<Warp>(probability, most[0]);
      find_largest<Warp>(grad, most[1]);
      rows().find_row_max(most);
      share_scores<kSplit, Warp, ScorePart>(own_probability[0], probability, most[0], unscale_value, shared_scores(0),
                                            half());
      share_scores<kSplit, Warp, ScorePart>(own_grad[0], grad, most[1], unscale_key, shared_scores(1), half());
    }
    __syncthreads();  // P and dS are complete
    const QueryStatistics next = has_next ? here.statistics<kQueries>(next_head, next_query) : QueryStatistics{};

    // dV += P^T dO, dK += dS^T Q
    const auto add = [&](Results<Warp>& result, const HalfPair<kSplit, 4>(&own)[1], const QueryTile& tile,
                         int64_t width, const float (&unscale)[Warp::kRowsOwned], int n) {
      load_other<kSplit, ScorePart>(other[0], shared_scores(n), half());
      multiply_half_result<kSplit, false, Warp>(
          own, other, tile, half(), static_cast<int>(width), [](int, int) { return 0.f; },
          [&](int i, int c, float x) { result[i][c] = fmaf(x, unscale[i], result[i][c]); });
    };
    add(grad_value, own_probability, grad_tile, p.Ev, unscale_value, 0);
    add(grad_key, own_grad, query_tile, p.E, unscale_key, 1);
    __syncthreads();  // nobody reads queries, dO or statistics any more
    if (has_next) fetch(next_head, next_query);
    publish(next);

    if (p.grad_mask != nullptr) {
      add_mask_gradient<Shape>(p, here().batch, head, first_query, first_key, score_base, key_tile, keys_have_factors);
    }
    // dQ = dS K
    if (p.grad_query.data != nullptr) {
      constexpr int kRowBlocks = kQueries / 16;
      const int row = warp() % kRowBlocks * 16, col = warp() / kRowBlocks * Shape::kGradColumns;
      const auto head_index = [&] { return int64_t{here().batch} * p.H + head; };
      const auto turn = [&] { return Turn::of(p, head_index(), first_query, 0); };
      using Rows = WarpTile<1, kKeys, Shape::kGradColumns>;
      Scores<Rows> score;
#pragma unroll
      for (int i = 0; i < Rows::kRowsOwned; ++i) {
#pragma unroll
        for (int j = 0; j < Rows::kColumnsOwned; j += 2) {
          const float2 x = load_shared_8(score_base + score_place<kKeys>(row + Rows::row(i), Rows::column(j)));
          score[i][j] = x.x;
          score[i][j + 1] = x.y;
        }
      }
      float unscale[Rows::kRowsOwned];
      bring_into_range<Rows>(score, unscale);
      const ScorePairs<kSplit, Rows> operand(score);
#pragma unroll
      for (int block = 0; block < Shape::kGradColumns / 32; ++block) {
        float tile[4][4];
        multiply_columns<kSplit, Rows>(operand, key_tile, col / 32 + block, [&](int n, int i, float x) {
          tile[n][i] = x * (unscale[i / 2] * power_of_two(-kShift));
        });
        if (block == 0) turn().wait_for(tile_index);
        GradQuerySums(p, head_index()).add(tile, first_query + row, col + 32 * block);
      }
      turn().pass_on(tile_index);
    }
    head = next_head;
    first_query = next_query;
  }
  cp_async_wait_all();

  const float kept = Dropout::make(p.dropout_p, 0).rescale;  // 1 without dropout
  const int first_row = first_key + warp() / 2 * 16;
  if (p.grad_value.data != nullptr) {
    const auto gradient = Matrix<float>::of(p.grad_value, here().batch, here().key_head, p.S, p.Ev);
    store_results<Warp>(gradient, grad_value, first_row, half() * 32,
                        [&](int) { return kept * power_of_two(-kShift); });
  }
  if (p.grad_key.data != nullptr) {
    const auto gradient = Matrix<float>::of(p.grad_key, here().batch, here().key_head, p.S, p.E);
    store_results<Warp>(gradient, grad_key, first_row, half() * 32,
                        [&](int) { return fabsf(p.scale) * power_of_two(-kShift); });
  }
}

// Whether these kernels take a problem.
template <bool kSplit>
bool takes_wide_backward(const BackwardParams& p) {
  const int64_t width = std::max(p.E, p.Ev);
  return width > kWidestPairs && width <= kWideColumns && p.shared_bytes >= WidePairBackward<kSplit>::kSharedBytes;
}

template <class Arch, bool kSplit>
cudaError_t wide_pair_backward(const BackwardParams& p, cudaStream_t stream) {
  return launch_pair_kernels<Arch, kWidestPairs, kSplit, WidePairBackward<kSplit>, &wide_pair_backward_kernel<kSplit>>(
      p, kWideColumns, stream);
}

}  // namespace efficient

}  // namespace sdpa
