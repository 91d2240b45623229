// Memory-efficient attention, backward, float32 on tensor cores (sm80 and newer), any head dims. What is computed:
// see efficient_bwd.cuh. Three kernels:
//   delta     rowsum(dO * O) for each query;
//   main      a block for each tile of keys, which walks over the queries of all heads that share it: dK and dV stay in
//             registers, dQ is added up in a scratch (pair_grad_query.h);
//   convert   dQ from the scratch to its place.
// The main kernel computes the scores transposed (keys are rows), so that P^T and dS^T leave the accumulators of their
// products as operands of dV += P^T dO and dK += dS^T Q. Only dS goes through shared memory, for dQ = dS K. Gradients
// wider than kHeadDim are covered by further blocks, and operands wider than that pass by in chunks.
#pragma once

#include <algorithm>

#include "../arch/arch.h"
#include "../attn/block_range.h"
#include "../attn/mask.h"
#include "pair_grad_query.h"
#include "pair_place.h"
#include "pair_softmax.h"
#include "pair_tile.h"

namespace sdpa {

namespace efficient {

template <class Arch, int kHeadDim, bool kSplit>
struct PairBackward {
  static constexpr int kWarps = 4, kThreads = kWarps * 32, kKeys = 16 * kWarps;
  static constexpr int kQueries = kHeadDim <= 64 ? 64 : 16;
  using Warp = WarpTile<1, kQueries, kHeadDim>;
  using KeyTile = PairTile<kKeys, kHeadDim, kThreads, kSplit>;       // of values too
  using QueryTile = PairTile<kQueries, kHeadDim, kThreads, kSplit>;  // of dO too
  // dS takes the place of dO, mask entries that of the next dO on its way.
  static constexpr int kScoreBytes = kQueries * kKeys * 4;
  static constexpr int kGradBytes = std::max(QueryTile::kBytes, kScoreBytes);
  static constexpr int kGradStagingBytes = std::max(QueryTile::kStagingBytes, kScoreBytes);
  static constexpr int kFactorBytes = 2 * (KeyTile::kFactorBytes + QueryTile::kFactorBytes);
  static constexpr int kStatisticsBytes = StatisticsTile<kQueries>::kFloats * 4;
  static constexpr int kSharedBytes = 2 * KeyTile::kBytes + QueryTile::kBytes + kGradBytes + QueryTile::kStagingBytes +
                                      kGradStagingBytes + kFactorBytes + kStatisticsBytes + 16;
  static_assert(kSharedBytes <= Arch::kSharedBytes);
  // Each warp has 16 rows and kGradColumns columns of dQ.
  static constexpr int kGradColumns = kHeadDim * (kQueries / 16) / kWarps;
  static_assert(kGradColumns % 32 == 0);
};

// delta, as the diagonal of O dO^T by the products that dP is made of: where one key has all of a row's probability,
// dP - delta is then 0, or next to it.
template <class Arch, int kHeadDim, bool kSplit>
__global__ void __launch_bounds__(128)
    pair_delta_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BlockOrder order) {
  using Tile = PairTile<64, kHeadDim, 128, kSplit>;
  using Warp = WarpTile<1, 16, kHeadDim>;
  extern __shared__ __align__(128) unsigned char shared[];
  int tile_index, head_index;
  if (!order.locate(tile_index, head_index)) return;
  const int64_t b = head_index / p.H, h = head_index % p.H;
  const int first_query = tile_index * 64, warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t base = shared_address(shared), factors = base + 2 * Tile::kBytes;
  const Tile output_tile(base, factors), grad_tile(base + Tile::kBytes, factors + Tile::kFactorBytes);
  output_tile.start();
  grad_tile.start();

  Scores<Warp> product = {};
  sum_chunks<Warp>(product, static_cast<int>(p.Ev), [&](Scores<Warp>& part, int e) {
    __syncthreads();
    output_tile.take(Matrix<const float>::of(p.output, b, h, p.L, p.Ev), first_query, e, e);
    grad_tile.take(Matrix<const float>::of(p.grad_output, b, h, p.L, p.Ev), first_query, e, e);
    __syncthreads();
    multiply_scores<kSplit, false, Warp>(part, output_tile, warp, e, grad_tile, warp, e, static_cast<int>(p.Ev) - e);
  });
#pragma unroll
  for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
    for (int j = 0; j < Warp::kColumnsOwned; ++j) {
      const int query = first_query + 16 * warp + Warp::row(i);
      if (Warp::row(i) == Warp::column(j) && query < p.L) {
        p.delta[int64_t{head_index} * p.L + query] = product[i][j] * power_of_two(-2 * kShift);
      }
    }
  }
}

// As apply_mask, for transposed products. A mask tensor's part goes through the warp's own place in shared memory, 16
// keys for each query.
template <class Warp, class F>
__device__ __forceinline__ void apply_mask_transposed(Scores<Warp>& score, const PairScale& scale, F make_mask,
                                                      uint32_t base, int first_query, int first_key) {
  const auto place = [base](int query, int key) {
    return base + query * 64 + (key / 4 ^ query / 2 % 4) * 16 + key % 4 * 4;
  };
  const Mask mask = make_mask();
  if (mask.kind != MaskKind::kNone) {
    const int lane = threadIdx.x % 32;
    mask.read([&](auto bias) {
#pragma unroll 2
      for (int query = lane / 4; query < Warp::kColumns; query += 8) {
        const float4 b = bias(first_query + query, first_key + lane % 4 * 4);
        store_shared_16(place(query, lane % 4 * 4),
                        {__float_as_uint(b.x), __float_as_uint(b.y), __float_as_uint(b.z), __float_as_uint(b.w)});
      }
    });
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
      for (int j = 0; j < Warp::kColumnsOwned; ++j) {
        const float bias = load_shared_4(place(Warp::column(j), Warp::row(i)));
        score[i][j] = scale.add_bias(scale.is_biased ? score[i][j] * scale.to_score : score[i][j], bias);
      }
    }
  } else if (!mask.passes(first_query, first_query + Warp::kColumns, first_key, first_key + 16)) {
    const TileLimit limit{min(mask.S - first_key, 16), mask.is_causal ? min(first_query - first_key, 16) : 16};
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
      for (int j = 0; j < Warp::kColumnsOwned; ++j) {
        if (!limit.sees(Warp::column(j), Warp::row(i))) score[i][j] = -INFINITY;
      }
    }
  }
}

// Which of a warp's transposed scores dropout keeps: bit 4 n + i for element i of 8-query tile n. A lane has scores of
// two draws in every 32 queries (see dropout.h), half of them since it has 16 keys.
template <class Warp>
__device__ __forceinline__ uint32_t kept_scores(const Dropout& dropout, int64_t batch_head, int first_query,
                                                int first_key) {
  static_assert(4 * Warp::kTiles <= 32);
  uint32_t dropped = 0;
#pragma unroll
  for (int n = 0; n < Warp::kTiles; n += 4) {
#pragma unroll
    for (int is_odd = 0; is_odd < 2; ++is_odd) {
      const Dropped16 drawn = dropout.draw(static_cast<uint32_t>(batch_head), first_query / 32 + n / 4, first_key / 32,
                                           threadIdx.x % 4 * 2 + is_odd, threadIdx.x % 32 / 4);
#pragma unroll
      for (int tile = n; tile < n + 4 && tile < Warp::kTiles; ++tile) {
        const uint32_t word = drawn.word_of(Warp::kTiles < 4 ? first_query / 16 % 2 : tile / 2 % 2, first_key / 16 % 2);
        dropped |= (word >> (7 + tile % 2 * 8) & 1) << (4 * tile + is_odd);           // the lane's first key
        dropped |= (word >> (7 + tile % 2 * 8 + 16) & 1) << (4 * tile + 2 + is_odd);  // and its second, 8 further
      }
    }
  }
  return ~dropped;
}

// Where dS of (query, key) stands: rows of kKeys floats, their 16-byte chunks permuted so that neither a warp that
// writes keys nor one that reads queries meets itself in a bank.
template <int kKeys>
__device__ __forceinline__ uint32_t score_place(int query, int key) {
  return query * kKeys * 4 + (key / 4 ^ ((query ^ query / 4) & 3) * 2) * 16 + key % 4 * 4;
}

// Adds a tile of dS to the mask's gradient. A warp has every fourth query, a lane two keys. Where the mask broadcasts
// along the keys they are summed up first. dS is 0 outside L x S. It has the keys' factors.
template <class Shape>
__device__ __forceinline__ void add_mask_gradient(const BackwardParams& p, int batch, int head, int first_query,
                                                  int first_key, uint32_t score_base,
                                                  const typename Shape::KeyTile& key_tile, bool has_factors) {
  const int64_t* const stride = p.grad_mask_stride;
  const int lane = threadIdx.x % 32;
  float* const to = p.grad_mask + batch * stride[0] + head * stride[1];
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < min(Shape::kQueries, static_cast<int>(p.L) - first_query);
       row += Shape::kWarps) {
    float* const to_row = to + (first_query + row) * stride[2];
    float sum = 0.f;
#pragma unroll
    for (int key = lane; key < Shape::kKeys; key += 32) {
      float x = load_shared_4(score_base + score_place<Shape::kKeys>(row, key));
      if (has_factors) x /= key_tile.factor(key);
      sum += x;
      if (stride[3] != 0 && first_key + key < p.S) atomicAdd(to_row + (first_key + key) * stride[3], x);
    }
    if (stride[3] != 0) continue;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) atomicAdd(to_row, sum);
  }
}

template <class Arch, int kHeadDim, bool kSplit>
__global__ void __launch_bounds__(PairBackward<Arch, kHeadDim, kSplit>::kThreads, 2)
    pair_backward_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BlockOrder order) {
  using Shape = PairBackward<Arch, kHeadDim, kSplit>;
  using Warp = typename Shape::Warp;
  using KeyTile = typename Shape::KeyTile;
  using QueryTile = typename Shape::QueryTile;
  constexpr int kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  extern __shared__ __align__(128) unsigned char shared[];

  // Which part of the problem. Under causality the first keys have most to do, and come first as it is.
  int tile_index, key_head_index;
  if (!order.locate(tile_index, key_head_index)) return;
  const int first_key = tile_index * kKeys;
  const auto first_col = [] { return static_cast<int>(blockIdx.z) * kHeadDim; };
  const int group = static_cast<int>(p.group), key_heads = static_cast<int>(p.H) / group;
  const BlockRange<kQueries, kKeys> range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};
  const auto query_begin = [&] { return range.first_query_tile(first_key) * kQueries; };
  const bool is_wide = kHeadDim == kWidestPairs && (p.E > kHeadDim || p.Ev > kHeadDim);
  const auto warp = [] { return fresh_thread_index() / 32; };
  const PairScale scale = PairScale::of(p);

  // Shared memory: keys, values, queries, dO (later dS), queries on their way, mask entries (later dO on its way),
  // factors, statistics.
  const uint32_t base = shared_address(shared), query_base = base + 2 * KeyTile::kBytes;
  const uint32_t score_base = query_base + QueryTile::kBytes, query_staging = score_base + Shape::kGradBytes;
  const uint32_t grad_staging = query_staging + QueryTile::kStagingBytes;
  const uint32_t key_factors = grad_staging + Shape::kGradStagingBytes;
  const uint32_t query_factors = key_factors + 2 * KeyTile::kFactorBytes;
  const KeyTile key_tile(base, key_factors);
  const KeyTile value_tile(base + KeyTile::kBytes, key_factors + KeyTile::kFactorBytes);
  const QueryTile query_tile(query_base, query_factors);
  const QueryTile grad_tile(score_base, query_factors + QueryTile::kFactorBytes);
  const StatisticsTile<kQueries> statistics{
      reinterpret_cast<float*>(shared + Shape::kSharedBytes - Shape::kStatisticsBytes - 16)};
  // And which head it is: the products need all registers.
  const uint32_t place = base + Shape::kSharedBytes - 16;
  const KeyPlace here{p, place};
  if (threadIdx.x == 0) here.put(key_head_index, key_heads);
  __syncthreads();
  const auto publish = [&](const QueryStatistics& s) {
    if (threadIdx.x < kQueries) statistics.store(threadIdx.x, s);
  };

  Results<Warp> grad_key = {}, grad_value = {};
  int head = here().key_head * group, first_query = query_begin();
  const auto fetch_queries = [&](int head, int first_query) {
    QueryTile::fetch(query_staging, here.queries(head), first_query, 0);
  };
  const auto fetch_grads = [&](int head, int first_query) {
    QueryTile::fetch(grad_staging, here.grads(head), first_query, 0);
  };
  key_tile.start();
  value_tile.start();
  query_tile.start();
  grad_tile.start();
  __syncthreads();
  if (first_query < p.L) {
    if (!is_wide) {
      fetch_queries(head, first_query);
      fetch_grads(head, first_query);
      key_tile.take(here.keys(), first_key, 0, 0);
      value_tile.take(here.values(), first_key, 0, 0);
    }
    publish(here.statistics<kQueries>(head, first_query));
  }

#pragma unroll 1
  for (int step = 0; first_query < p.L && head < (here().key_head + 1) * group; ++step) {
    cp_async_wait_all();
    __syncthreads();  // every warp is done with the step before
    const bool is_last_of_head = first_query + kQueries >= p.L;
    const int next_head = is_last_of_head ? head + 1 : head;
    const int next_query = is_last_of_head ? query_begin() : first_query + kQueries;
    const bool has_next = next_head < (here().key_head + 1) * group;
    if (!is_wide) {
      query_tile.take(query_staging, step, scale.query_sign);
      grad_tile.take(grad_staging, step);
      if (has_next) fetch_queries(next_head, next_query);
      __syncthreads();
    }

    // P^T
    Scores<Warp> probability, grad;
    if (!is_wide) {
      multiply_scores<kSplit, true, Warp>(probability, key_tile, warp(), 0, query_tile, 0, step, static_cast<int>(p.E));
    } else {
      sum_chunks<Warp>(probability, static_cast<int>(p.E), [&](Scores<Warp>& part, int e) {
        __syncthreads();  // nobody reads the chunk before any more
        key_tile.take(here.keys(), first_key, e, step);
        query_tile.take(here.queries(head), first_query, e, step, scale.query_sign);
        __syncthreads();
        multiply_scores<kSplit, true, Warp>(part, key_tile, warp(), step, query_tile, 0, step,
                                            static_cast<int>(p.E) - e);
      });
    }
    const auto mask = [&] { return Mask::of(p, here().batch, head); };
    apply_mask_transposed<Warp>(probability, scale, mask, grad_staging + warp() * kQueries * 64, first_query,
                                first_key + 16 * warp());
#pragma unroll
    for (int j = 0; j < Warp::kColumnsOwned; ++j) {
      const RowReference reference = statistics.reference(Warp::column(j));
#pragma unroll
      for (int i = 0; i < Warp::kRowsOwned; ++i) {
        probability[i][j] = pair_probability(probability[i][j], scale.to_exponent, reference);
      }
    }

    // dP^T
    if (!is_wide) {
      multiply_scores<kSplit, false, Warp>(grad, value_tile, warp(), 0, grad_tile, 0, step, static_cast<int>(p.Ev));
    } else {
      sum_chunks<Warp>(grad, static_cast<int>(p.Ev), [&](Scores<Warp>& part, int e) {
        __syncthreads();
        value_tile.take(here.values(), first_key, e, step);
        grad_tile.take(here.grads(head), first_query, e, step);
        __syncthreads();
        multiply_scores<kSplit, false, Warp>(part, value_tile, warp(), step, grad_tile, 0, step,
                                             static_cast<int>(p.Ev) - e);
      });
      __syncthreads();  // then the columns that this block's gradients are made of
      key_tile.take(here.keys(), first_key, first_col(), step);
      query_tile.take(here.queries(head), first_query, first_col(), step, scale.query_sign);
      grad_tile.take(here.grads(head), first_query, first_col(), step);
      __syncthreads();
    }

    // dS^T, in the place of dP^T; then dV += P^T dO, of what dropout keeps
    const bool drops = p.dropout_p > 0.f;
    uint32_t kept = ~0u;
    const Dropout dropout = Dropout::make(p.dropout_p, drops ? *p.seed : 0);
    if (drops) {
      kept = kept_scores<Warp>(dropout, p.first_batch_head + int64_t{here().batch} * p.H + head, first_query,
                               first_key + 16 * warp());
    }
    const float grad_scale = dropout.rescale * power_of_two(-2 * kShift);
#pragma unroll
    for (int j = 0; j < Warp::kColumnsOwned; ++j) {
      const float delta = statistics.delta(Warp::column(j));
#pragma unroll
      for (int i = 0; i < Warp::kRowsOwned; ++i) {
        const bool keeps = kept >> (j / 2 * 4 + i * 2 + j % 2) & 1;
        grad[i][j] = probability[i][j] * ((keeps ? grad[i][j] * grad_scale : 0.f) - delta);
        probability[i][j] = keeps ? probability[i][j] : 0.f;
      }
    }
    float unscale[Warp::kRowsOwned];
    if (grad_tile.has_factors(step)) take_on_factors<Warp>(probability, grad_tile);
    bring_into_range<Warp>(probability, unscale);
    multiply_result<kSplit, Warp>(
        ScorePairs<kSplit, Warp>(probability), grad_tile, 0, static_cast<int>(p.Ev) - first_col(),
        [&](int i, int c, float x) { grad_value[i][c] = fmaf(x, unscale[i], grad_value[i][c]); });

    __syncthreads();  // nobody reads dO or mask entries any more
    if (!is_wide && has_next) fetch_grads(next_head, next_query);
    const QueryStatistics next = has_next ? here.statistics<kQueries>(next_head, next_query) : QueryStatistics{};

    // dK += dS^T Q
    const bool keys_have_factors = key_tile.has_factors(is_wide ? step : 0);
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
      const int key = 16 * warp() + Warp::row(i);
      const float factor = keys_have_factors ? key_tile.factor(key) : 1.f;
#pragma unroll
      for (int j = 0; j < Warp::kColumnsOwned; ++j) {
        store_shared_4(score_base + score_place<kKeys>(Warp::column(j), key), __float_as_uint(grad[i][j] * factor));
      }
    }
    if (query_tile.has_factors(step)) take_on_factors<Warp>(grad, query_tile);
    bring_into_range<Warp>(grad, unscale);
    multiply_result<kSplit, Warp>(ScorePairs<kSplit, Warp>(grad), query_tile, 0, static_cast<int>(p.E) - first_col(),
                                  [&](int i, int c, float x) { grad_key[i][c] = fmaf(x, unscale[i], grad_key[i][c]); });
    __syncthreads();  // dS is complete
    publish(next);

    if (p.grad_mask != nullptr && blockIdx.z == 0) {
      add_mask_gradient<Shape>(p, here().batch, head, first_query, first_key, score_base, key_tile, keys_have_factors);
    }
    // dQ = dS K
    if (p.grad_query.data != nullptr && first_col() < p.E) {
      constexpr int kRowBlocks = kQueries / 16;
      const int row = warp() % kRowBlocks * 16, col = warp() / kRowBlocks * Shape::kGradColumns;
      const int64_t head_index = int64_t{here().batch} * p.H + head;
      const Turn turn = Turn::of(p, head_index, first_query, first_col());
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
      bring_into_range<Rows>(score, unscale);
      const ScorePairs<kSplit, Rows> operand(score);
      turn.wait_for(tile_index);
      const GradQuerySums sums(p, head_index);
#pragma unroll
      for (int block = 0; block < Shape::kGradColumns / 32; ++block) {
        float tile[4][4];
        multiply_columns<kSplit, Rows>(operand, key_tile, col / 32 + block, [&](int n, int i, float x) {
          tile[n][i] = x * (unscale[i / 2] * power_of_two(-kShift));
        });
        sums.add(tile, first_query + row, first_col() + col + 32 * block);
      }
      turn.pass_on(tile_index);
    }
    head = next_head;
    first_query = next_query;
  }
  cp_async_wait_all();

  const float kept = Dropout::make(p.dropout_p, 0).rescale;  // 1 without dropout
  if (p.grad_value.data != nullptr) {
    const auto gradient = Matrix<float>::of(p.grad_value, here().batch, here().key_head, p.S, p.Ev);
    store_results<Warp>(gradient, grad_value, first_key + 16 * warp(), first_col(),
                        [&](int) { return kept * power_of_two(-kShift); });
  }
  if (p.grad_key.data != nullptr) {
    const auto gradient = Matrix<float>::of(p.grad_key, here().batch, here().key_head, p.S, p.E);
    store_results<Warp>(gradient, grad_key, first_key + 16 * warp(), first_col(),
                        [&](int) { return fabsf(p.scale) * power_of_two(-kShift); });
  }
}

// columns: of the gradients, that one block of the main kernel makes.
template <class Arch, int kHeadDim, bool kSplit, class Shape, auto kMain>
cudaError_t launch_pair_kernels(const BackwardParams& p, int columns, cudaStream_t stream) {
  constexpr auto kDelta = &pair_delta_kernel<Arch, kHeadDim, kSplit>;
  using DeltaTile = PairTile<64, kHeadDim, 128, kSplit>;
  constexpr int kDeltaBytes = 2 * (DeltaTile::kBytes + DeltaTile::kFactorBytes);
  static_assert(kDeltaBytes <= Arch::kSharedBytes);
  const bool wants_query = p.grad_query.data != nullptr;
  if (std::max({p.L, p.S, p.B * p.H}) > kMaxPosition) return cudaErrorInvalidValue;
  if (wants_query && (p.grad_query_accum == nullptr || (p.deterministic && p.grad_query_turns == nullptr))) {
    return cudaErrorInvalidValue;
  }
  cudaError_t error = cudaSuccess;

  if (const BlockOrder rows{ceil_div(p.L, 64), p.B * p.H, 1}; rows.blocks() > 0) {
    if (error = allow_shared_bytes<kDelta>(kDeltaBytes); error != cudaSuccess) return error;
    kDelta<<<dim3(rows.grid_x(), rows.grid_y()), 128, kDeltaBytes, stream>>>(p, rows);
    if (error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  // Under causality the longest blocks of all heads come first (see efficient_fwd_pair.cuh).
  const int64_t bytes_per_key_head = p.is_causal ? 0 : p.group * p.L * (2 * p.E + p.Ev) * sizeof(float);
  const auto order = BlockOrder::make(ceil_div(p.S, Shape::kKeys), p.B * (p.H / p.group), bytes_per_key_head);
  if (order.blocks() > 0) {
    if (error = allow_shared_bytes<kMain>(Shape::kSharedBytes); error != cudaSuccess) return error;
    const dim3 grid(order.grid_x(), order.grid_y(), static_cast<unsigned>(ceil_div(std::max(p.E, p.Ev), columns)));
    kMain<<<grid, Shape::kThreads, Shape::kSharedBytes, stream>>>(p, order);
    if (error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  if (const int64_t quads = p.B * p.H * p.L * ceil_div(p.E, 4); quads > 0 && wants_query) {
    const unsigned blocks = static_cast<unsigned>(ceil_div(quads, kConvertThreads));
    convert_grad_query_kernel<><<<blocks, kConvertThreads, 0, stream>>>(p);
    error = cudaGetLastError();
  }
  return error;
}

template <class Arch, int kHeadDim, bool kSplit>
cudaError_t launch_pair_backward(const BackwardParams& p, cudaStream_t stream) {
  if (!fits_pairs<kHeadDim>(p)) return cudaErrorInvalidValue;
  return launch_pair_kernels<Arch, kHeadDim, kSplit, PairBackward<Arch, kHeadDim, kSplit>,
                             &pair_backward_kernel<Arch, kHeadDim, kSplit>>(p, kHeadDim, stream);
}

// Wants grad_query_accum wherever dQ is wanted, and grad_query_turns too if deterministic.
template <class Arch, int kHeadDim>
cudaError_t pair_backward(const BackwardParams& p, cudaStream_t stream) {
  if constexpr (kHeadDim >= kNarrowestExactPairs) {
    if (!p.allow_tf32) return launch_pair_backward<Arch, kHeadDim, true>(p, stream);
  }
  return launch_pair_backward<Arch, kHeadDim, false>(p, stream);
}

}  // namespace efficient

}  // namespace sdpa
