// Memory-efficient attention, backward, float32 on tensor cores (sm80 and newer), any head dims. What is computed:
// see efficient_bwd.cuh. Three kernels:
//   delta     rowsum(dO * O) for each query;
//   main      a block for each tile of keys, which walks over the queries of all heads that share it: dK and dV stay in
//             registers, dQ is added up in a scratch (tf32_grad_query.h);
//   convert   dQ from the scratch to its place.
// The main kernel computes the scores transposed (keys are rows), so that P^T and dS^T leave the accumulators of their
// products as operands of dV += P^T dO and dK += dS^T Q. Only dS goes through shared memory, for dQ = dS K. Gradients
// wider than kHeadDim are covered by further blocks, and operands wider than that pass by in chunks.
#pragma once

#include <algorithm>

#include "../arch/arch.h"
#include "../attn/block_range.h"
#include "../attn/mask.h"
#include "statistics.h"
#include "tf32_grad_query.h"
#include "tf32_tile.h"

namespace sdpa {

namespace efficient {

template <class Arch, int kHeadDim>
struct Tf32Backward {
  static constexpr int kWarps = 4, kThreads = kWarps * 32, kKeys = 16 * kWarps;
  static constexpr int kQueries = 2048 / kHeadDim;  // so that each warp has a 16 x 32 tile of dQ
  static constexpr int kTogether = 1;
  using Warp = WarpTile<1, kQueries, kHeadDim>;
  using KeyTile = FloatTile<kKeys, kHeadDim>;       // of values too
  using QueryTile = FloatTile<kQueries, kHeadDim>;  // of dO too
  // dS and, before it is there, mask entries: rows are queries, columns keys.
  static constexpr int kScoreStride = (kKeys + 4) * 4, kScoreBytes = kQueries * kScoreStride;
  static constexpr int kStatisticsBytes = StatisticsTile<kQueries>::kFloats * 4;
  static constexpr int kSharedBytes = 2 * KeyTile::kBytes + 3 * QueryTile::kBytes + kScoreBytes + kStatisticsBytes;
  static_assert(kSharedBytes <= Arch::kSharedBytes);
  static_assert(kQueries >= 16 && kQueries / 16 * (kHeadDim / 32) == kWarps);
};

// delta, as the diagonal of O dO^T by the products that dP is made of: where one key has all of a row's probability,
// dP - delta is then 0, or next to it.
template <class Arch, int kHeadDim, bool kSplit>
__global__ void __launch_bounds__(128)
    tf32_delta_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BlockOrder order) {
  using Tile = FloatTile<64, kHeadDim>;
  using Warp = WarpTile<1, 16, kHeadDim>;
  extern __shared__ __align__(16) unsigned char shared[];
  int tile_index, head_index;
  if (!order.locate(tile_index, head_index)) return;
  const int64_t b = head_index / p.H, h = head_index % p.H;
  const int first_query = tile_index * 64, warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const Tile output_tile{shared_address(shared)}, grad_tile{output_tile.base + Tile::kBytes};
  const FloatTile<16, kHeadDim> warp_grad{grad_tile.base + warp_row * Tile::kRowBytes};

  Scores<Warp> product = {};
#pragma unroll 1
  for (int e = 0; e < p.Ev; e += kHeadDim) {
    __syncthreads();
    output_tile.template fill<128>(Matrix<const float>::of(p.output, b, h, p.L, p.Ev), first_query, e);
    grad_tile.template fill<128>(Matrix<const float>::of(p.grad_output, b, h, p.L, p.Ev), first_query, e);
    cp_async_wait_all();
    __syncthreads();
    multiply_scores<kSplit, false, Warp>(product, output_tile, warp_row, warp_grad, static_cast<int>(p.Ev) - e);
  }
#pragma unroll
  for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
    for (int j = 0; j < Warp::kColumnsOwned; ++j) {
      const int query = first_query + warp_row + Warp::row(i);
      if (Warp::row(i) == Warp::column(j) && query < p.L) p.delta[int64_t{head_index} * p.L + query] = product[i][j];
    }
  }
}

// Scales transposed products to scores and adds what the mask has for them. A mask tensor's part goes through the
// warp's own 16 columns of the score tile.
template <class Warp, int kStride>
__device__ __forceinline__ void scale_and_mask_transposed(Scores<Warp>& score, float scale, const Mask& mask,
                                                          uint32_t base, int first_query, int first_key) {
#pragma unroll
  for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
    for (int j = 0; j < Warp::kColumnsOwned; ++j) score[i][j] = __fmul_rn(score[i][j], scale);
  }
  if (mask.kind != MaskKind::kNone) {
    const int lane = threadIdx.x % 32;
    mask.read([&](auto bias) {
#pragma unroll 2
      for (int query = lane / 4; query < Warp::kColumns; query += 8) {
        const float4 b = bias(first_query + query, first_key + lane % 4 * 4);
        store_shared_16(base + query * kStride + lane % 4 * 16,
                        {__float_as_uint(b.x), __float_as_uint(b.y), __float_as_uint(b.z), __float_as_uint(b.w)});
      }
    });
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
      for (int j = 0; j < Warp::kColumnsOwned; ++j) {
        score[i][j] = Mask::add(score[i][j], load_shared_4(base + Warp::column(j) * kStride + Warp::row(i) * 4));
      }
    }
    __syncwarp();
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

// Where key n of eight stands in the score tile: an operand `a` read from there has its k in the order of
// FloatTile::load_rows.
__device__ __forceinline__ int score_place(int key) {
  return (key & ~7) | (key & 6) >> 1 | (key & 1) << 2;
}

// Adds a tile of dS to the mask's gradient. A warp has every fourth query, a lane two keys. Where the mask broadcasts
// along the keys they are summed up first. dS is 0 outside L x S.
template <class Shape>
__device__ __forceinline__ void add_mask_gradient(const BackwardParams& p, int batch, int head, int first_query,
                                                  int first_key, uint32_t score_base) {
  const int64_t* const stride = p.grad_mask_stride;
  const int lane = threadIdx.x % 32;
  float* const to = p.grad_mask + batch * stride[0] + head * stride[1];
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < min(Shape::kQueries, static_cast<int>(p.L) - first_query);
       row += Shape::kWarps) {
    float* const to_row = to + (first_query + row) * stride[2];
    float sum = 0.f;
#pragma unroll
    for (int key = 0; key < Shape::kKeys; key += 32) {
      const float x = load_shared_4(score_base + row * Shape::kScoreStride + score_place(key + lane) * 4);
      sum += x;
      if (stride[3] != 0 && first_key + key + lane < p.S) atomicAdd(to_row + (first_key + key + lane) * stride[3], x);
    }
    if (stride[3] != 0) continue;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) atomicAdd(to_row, sum);
  }
}

template <class Arch, int kHeadDim, bool kSplit>
__global__ void __launch_bounds__(Tf32Backward<Arch, kHeadDim>::kThreads, 2)
    tf32_backward_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BlockOrder order) {
  using Shape = Tf32Backward<Arch, kHeadDim>;
  using Warp = typename Shape::Warp;
  constexpr int kThreads = Shape::kThreads, kQueries = Shape::kQueries;
  extern __shared__ __align__(16) unsigned char shared[];

  // Which part of the problem. Under causality the first keys have most to do, and come first as it is.
  int tile_index, key_head_index;
  if (!order.locate(tile_index, key_head_index)) return;
  const int first_key = tile_index * Shape::kKeys, first_col = blockIdx.z * kHeadDim;
  const int group = static_cast<int>(p.group), key_heads = static_cast<int>(p.H) / group;
  int batch = key_head_index / key_heads, key_head = key_head_index % key_heads;
  const int warp_row = fresh_thread_index() / 32 * 16;
  const BlockRange<kQueries, Shape::kKeys> range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};
  const auto query_begin = [&] { return range.first_query_tile(first_key) * kQueries; };
  const bool is_wide = kHeadDim == kWidestTf32 && (p.E > kHeadDim || p.Ev > kHeadDim);

  // Shared memory: keys | values | two stages of queries | dO | dS | statistics.
  const typename Shape::KeyTile key_tile{shared_address(shared)}, value_tile{key_tile.base + Shape::KeyTile::kBytes};
  const auto query_tile = [&](int stage) {
    return typename Shape::QueryTile{value_tile.base + Shape::KeyTile::kBytes + stage * Shape::QueryTile::kBytes};
  };
  const typename Shape::QueryTile grad_tile = query_tile(2);
  const uint32_t score_base = query_tile(3).base;
  const StatisticsTile<kQueries> statistics{
      reinterpret_cast<float*>(shared + Shape::kSharedBytes - Shape::kStatisticsBytes)};

  // Addresses start anew from the parameters wherever they are used: the products need their registers.
  const auto start_anew = [&] { asm volatile("" : "+r"(batch), "+r"(key_head)); };
  const auto fetch_keys = [&](int e) {
    const auto key = Matrix<const float>::of(p.key, batch, key_head, p.S, p.E);
    key_tile.template fill<kThreads, (kHeadDim < 128)>(key, first_key, e);
  };
  const auto fetch_values = [&](int e) {
    const auto value = Matrix<const float>::of(p.value, batch, key_head, p.S, p.Ev);
    value_tile.template fill<kThreads, (kHeadDim < 128)>(value, first_key, e);
  };
  const auto fetch_queries = [&](int stage, int head, int first_query, int e) {
    const auto query = Matrix<const float>::of(p.query, batch, head, p.L, p.E);
    query_tile(stage).template fill<kThreads, (kHeadDim < 128)>(query, first_query, e);
  };
  const auto fetch_grads = [&](int head, int first_query, int e) {
    const auto grad = Matrix<const float>::of(p.grad_output, batch, head, p.L, p.Ev);
    grad_tile.template fill<kThreads, (kHeadDim < 128)>(grad, first_query, e);
  };
  const auto land = [] {
    cp_async_wait_all();
    __syncthreads();
  };
  const auto statistics_of = [&](int head, int first_query) {
    const int row = fresh_thread_index();
    return row < kQueries ? QueryStatistics::of(p, int64_t{batch} * p.H + head, first_query + row, true)
                          : QueryStatistics{};
  };
  const auto publish = [&](const QueryStatistics& s) {
    if (threadIdx.x < kQueries) statistics.store(threadIdx.x, s);
  };

  Results<Warp> grad_key = {}, grad_value = {};
  int head = key_head * group, first_query = query_begin();
  if (first_query < p.L) {
    if (!is_wide) {
      fetch_keys(0);
      fetch_values(0);
      fetch_queries(0, head, first_query, 0);
      fetch_grads(head, first_query, 0);
    }
    publish(statistics_of(head, first_query));
  }

#pragma unroll 1
  for (int stage = 0; first_query < p.L && head < (key_head + 1) * group; stage ^= 1) {
    // This step's tiles have landed, and every warp is done with the step before.
    land();
    start_anew();
    const bool is_last_of_head = first_query + kQueries >= p.L;
    const int next_head = is_last_of_head ? head + 1 : head;
    const int next_query = is_last_of_head ? query_begin() : first_query + kQueries;
    const bool has_next = next_head < (key_head + 1) * group;
    if (!is_wide && has_next) fetch_queries(stage ^ 1, next_head, next_query, 0);

    // P^T
    Scores<Warp> probability = {}, grad = {};
#pragma unroll 1
    for (int e = 0; e < (kHeadDim == kWidestTf32 ? p.E : 1); e += kHeadDim) {
      if (is_wide) {
        __syncthreads();  // nobody reads the chunk before any more
        fetch_keys(e);
        fetch_queries(stage, head, first_query, e);
        land();
      }
      multiply_scores<kSplit, true, Warp>(probability, key_tile, warp_row, query_tile(stage),
                                          static_cast<int>(p.E) - e);
    }
    start_anew();
    scale_and_mask_transposed<Warp, Shape::kScoreStride>(probability, p.scale, Mask::of(p, batch, head),
                                                         score_base + warp_row * 4, first_query, first_key + warp_row);
#pragma unroll
    for (int j = 0; j < Warp::kColumnsOwned; ++j) {
      const RowReference reference = statistics.reference(Warp::column(j));
#pragma unroll
      for (int i = 0; i < Warp::kRowsOwned; ++i) probability[i][j] = reference.probability(probability[i][j]);
    }

    // dP^T
#pragma unroll 1
    for (int e = 0; e < (kHeadDim == kWidestTf32 ? p.Ev : 1); e += kHeadDim) {
      if (is_wide) {
        __syncthreads();
        fetch_values(e);
        fetch_grads(head, first_query, e);
        land();
      }
      multiply_scores<kSplit, false, Warp>(grad, value_tile, warp_row, grad_tile, static_cast<int>(p.Ev) - e);
    }
    if (is_wide) {  // the columns that this block's gradients are made of
      __syncthreads();
      fetch_keys(first_col);
      fetch_queries(stage, head, first_query, first_col);
      fetch_grads(head, first_query, first_col);
      land();
    }

    // dS^T, in the place of dP^T; then dV += P^T dO, of what dropout keeps
    const bool drops = p.dropout_p > 0.f;
    uint32_t kept = ~0u;
    const Dropout dropout = Dropout::make(p.dropout_p, drops ? *p.seed : 0);
    if (drops) {
      kept = kept_scores<Warp>(dropout, p.first_batch_head + int64_t{batch} * p.H + head, first_query,
                               first_key + warp_row);
    }
#pragma unroll
    for (int j = 0; j < Warp::kColumnsOwned; ++j) {
      const float delta = statistics.delta(Warp::column(j));
#pragma unroll
      for (int i = 0; i < Warp::kRowsOwned; ++i) {
        const bool keeps = kept >> (j / 2 * 4 + i * 2 + j % 2) & 1;
        grad[i][j] = probability[i][j] * ((keeps ? grad[i][j] * dropout.rescale : 0.f) - delta);
        probability[i][j] = keeps ? probability[i][j] : 0.f;
      }
    }
    multiply_result<kSplit, Shape::kTogether, Warp>(probability, grad_tile, static_cast<int>(p.Ev) - first_col,
                                                    [&](int i, int c, float x) { grad_value[i][c] += x; });

    // dK += dS^T Q
    const uint32_t score_column = score_base + score_place(warp_row + Warp::row(0)) * 4;
#pragma unroll
    for (int j = 0; j < Warp::kColumnsOwned; ++j) {
#pragma unroll
      for (int i = 0; i < Warp::kRowsOwned; ++i) {
        store_shared_4(score_column + Warp::column(j) * Shape::kScoreStride + i * 32, __float_as_uint(grad[i][j]));
      }
    }
    multiply_result<kSplit, Shape::kTogether, Warp>(grad, query_tile(stage), static_cast<int>(p.E) - first_col,
                                                    [&](int i, int c, float x) { grad_key[i][c] += x; });

    __syncthreads();  // dS is complete; dO and the statistics are free
    start_anew();
    if (!is_wide && has_next) fetch_grads(next_head, next_query, 0);
    const QueryStatistics next = has_next ? statistics_of(next_head, next_query) : QueryStatistics{};

    if (p.grad_mask != nullptr && blockIdx.z == 0) {
      add_mask_gradient<Shape>(p, batch, head, first_query, first_key, score_base);
    }
    // dQ = dS K, a 16 x 32 tile for each warp
    if (p.grad_query.data != nullptr && first_col < p.E) {
      const int warp = fresh_thread_index() / 32;
      const int row = warp % (kQueries / 16) * 16, col = warp / (kQueries / 16) * 32;
      const FloatTile<kQueries, Shape::kKeys> score_tile{score_base};
      float tile[4][4] = {};
#pragma unroll
      for (int first = 0; first < Shape::kKeys; first += kRowsTogether) {
        Tf32Sum sum[1][4];
#pragma unroll
        for (int k = first; k < first + kRowsTogether; k += 8) {
          Tf32A<kSplit> a[1];
          Tf32B<kSplit> b[4];
          score_tile.load_a(a[0], row, k);
          key_tile.load_rows(b, k, col);
          multiply_add(sum, a, b, 0);
        }
#pragma unroll
        for (int n = 0; n < 16; ++n) tile[n / 4][n % 4] += sum[0][n / 4].template value<kSplit>(n % 4);
      }
      const int64_t head_index = int64_t{batch} * p.H + head;
      const Turn turn = Turn::of(p, head_index, first_query, first_col);
      turn.wait_for(tile_index);
      GradQuerySums(p, head_index).add(tile, first_query + row, first_col + col);
      turn.pass_on(tile_index);
    }
    publish(next);
    head = next_head;
    first_query = next_query;
  }
  cp_async_wait_all();

  const float kept = Dropout::make(p.dropout_p, 0).rescale;  // 1 without dropout
  if (p.grad_value.data != nullptr) {
    const auto gradient = Matrix<float>::of(p.grad_value, batch, key_head, p.S, p.Ev);
    store_results<Warp>(gradient, grad_value, first_key + warp_row, first_col, [&](int) { return kept; });
  }
  if (p.grad_key.data != nullptr) {
    const auto gradient = Matrix<float>::of(p.grad_key, batch, key_head, p.S, p.E);
    store_results<Warp>(gradient, grad_key, first_key + warp_row, first_col, [&](int) { return p.scale; });
  }
}

template <class Arch, int kHeadDim, bool kSplit>
cudaError_t launch_tf32_backward(const BackwardParams& p, cudaStream_t stream) {
  using Shape = Tf32Backward<Arch, kHeadDim>;
  constexpr auto kDelta = &tf32_delta_kernel<Arch, kHeadDim, kSplit>;
  constexpr auto kMain = &tf32_backward_kernel<Arch, kHeadDim, kSplit>;
  constexpr int kDeltaBytes = 2 * FloatTile<64, kHeadDim>::kBytes;
  static_assert(kDeltaBytes <= Arch::kSharedBytes);
  const bool wants_query = p.grad_query.data != nullptr;
  if (std::max({p.L, p.S, p.B * p.H}) > kMaxPosition || !fits_tf32<kHeadDim>(p)) return cudaErrorInvalidValue;
  if (wants_query && (p.grad_query_accum == nullptr || (p.deterministic && p.grad_query_turns == nullptr))) {
    return cudaErrorInvalidValue;
  }
  cudaError_t error = cudaSuccess;

  if (const BlockOrder rows{ceil_div(p.L, 64), p.B * p.H, 1}; rows.blocks() > 0) {
    if (error = allow_shared_bytes<kDelta>(kDeltaBytes); error != cudaSuccess) return error;
    kDelta<<<dim3(rows.grid_x(), rows.grid_y()), 128, kDeltaBytes, stream>>>(p, rows);
    if (error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  const int64_t bytes_per_key_head = p.group * p.L * (2 * p.E + p.Ev) * sizeof(float);
  const auto order = BlockOrder::make(ceil_div(p.S, Shape::kKeys), p.B * (p.H / p.group), bytes_per_key_head);
  if (order.blocks() > 0) {
    if (error = allow_shared_bytes<kMain>(Shape::kSharedBytes); error != cudaSuccess) return error;
    const dim3 grid(order.grid_x(), order.grid_y(), static_cast<unsigned>(ceil_div(std::max(p.E, p.Ev), kHeadDim)));
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

// Wants grad_query_accum wherever dQ is wanted, and grad_query_turns too if deterministic.
template <class Arch, int kHeadDim>
cudaError_t tf32_backward(const BackwardParams& p, cudaStream_t stream) {
  if constexpr (kHeadDim >= kNarrowestExactTf32) {
    if (!p.allow_tf32) return launch_tf32_backward<Arch, kHeadDim, true>(p, stream);
  }
  return launch_tf32_backward<Arch, kHeadDim, false>(p, stream);
}

}  // namespace efficient

}  // namespace sdpa
