// Memory-efficient attention, backward, float16 on Volta's tensor cores, head dims up to kHeadDim; bitwise repeatable
// but for the gradient of a mask that broadcasts. What is computed, and in which kernels, is what efficient_bwd.cuh
// does: delta; a block per tile of keys, for dK and dV; a block per tile of queries, for dQ and the mask's gradient.
//
// A block's own rows (keys and values, or queries and dO) stay in registers; the others come in tiles, which serve both
// the scores or dP and a gradient. P and dS go from one to the other without leaving the registers.
#pragma once

#include <algorithm>

#include "../arch/arch.h"
#include "volta_tile.h"

namespace sdpa {

namespace efficient {

template <class Arch, int kHeadDim>
struct VoltaBackward {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kColumns = 32;
  static constexpr int kBlocksPerSm = 2;
  static constexpr bool kIsEarly = kHeadDim < 128;
  static constexpr bool kHasBothResults = kHeadDim < 128;  // dK and dV: registers for both
  using Warp = VoltaTile<1, kHeadDim == 32 ? 1 : 2, kColumns, kHeadDim>;
  static constexpr int kRows = kWarps * Warp::kRows;
  static constexpr int kTileBytes = Warp::kTileOctets * static_cast<int>(sizeof(Octet));
  static constexpr int kStatisticsBytes = StatisticsTile<kColumns>::kFloats * static_cast<int>(sizeof(float));
  static constexpr int kMaskBytes =
      kWarps * static_cast<int>(sizeof(float)) * std::max(kMaskFloats<false, Warp>, kMaskFloats<true, Warp>);
  using RowA = RowOperand<Warp>;                                      // of S
  using RowB = RowOperand<Warp, kHeadDim == 128 ? 6 : kHeadDim / 8>;  // of dP
  static constexpr int kRestBytes = kThreads * RowB::kRestCount * static_cast<int>(sizeof(Octet));
  static constexpr int kPassageBytes = kThreads * RowA::kPassage * static_cast<int>(sizeof(Octet));
  static constexpr int kSharedBytes =
      kRestBytes + std::max(2 * kTileBytes + kStatisticsBytes + kMaskBytes, kPassageBytes);
  static_assert(kBlocksPerSm * kSharedBytes <= Arch::kSharedBytes);

  // Shared memory: what RowB has there, the two tiles, statistics, each warp's place for a mask.
  __device__ __forceinline__ static Octet* tiles(float4* shared) {
    return reinterpret_cast<Octet*>(shared) + kRestBytes / sizeof(Octet);
  }
  __device__ __forceinline__ static float* statistics(float4* shared) {
    return reinterpret_cast<float*>(tiles(shared)) + 2 * kTileBytes / sizeof(float);
  }
  __device__ __forceinline__ static float* mask_tile(float4* shared) {
    return statistics(shared) + StatisticsTile<kColumns>::kFloats +
           fresh_thread_index() / 32 * (kMaskBytes / kWarps / static_cast<int>(sizeof(float)));
  }
};

constexpr int kVoltaDeltaRows = 128;  // of a block; a quad pair has 8

// Adds up as dP is: where one key has all of a row's probability, dP - delta is then exactly 0. So it is the diagonal
// of a product, of 8 rows by 8.
template <class Arch>
__global__ void __launch_bounds__(kVoltaDeltaRows) volta_delta_kernel(const __grid_constant__ BackwardParams p) {
  const QuadPairLane at{static_cast<int>(threadIdx.x % 32)};
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kVoltaDeltaRows + threadIdx.x / 32 * 32;
  const int64_t row = first + 8 * at.quad_pair() + at.n();
  const bool is_inside = row < p.B * p.H * p.L;
  const int64_t some_row = is_inside ? row : 0, head_index = some_row / p.L;  // all lanes of the warp take part
  const int query = static_cast<int>(some_row % p.L);
  const auto output = OctetMatrix::of(p.output, head_index / p.H, head_index % p.H, p.L, p.Ev);
  const auto grad_output = OctetMatrix::of(p.grad_output, head_index / p.H, head_index % p.H, p.L, p.Ev);
  float product[2][4] = {};
#pragma unroll 2
  for (int col = 0; col < p.Ev; col += 8) {
    const Octet a = grad_output.octet(query, col), b = output.octet(query, col);
    __syncwarp();  // heads need not be aligned alike
    mma_8x8x4<true, 2>(product[0], product[1], 0, a.x, a.y, b.x, b.y);
    mma_8x8x4<true, 2>(product[0], product[1], 0, a.z, a.w, b.z, b.w);
  }
  // The lane has row n() and columns n() - n() % 2 .. n() of it.
  const float left = at.right()  ? (at.high() ? product[1][2] : product[1][0])
                     : at.high() ? product[0][2]
                                 : product[0][0];
  const float right = at.right()  ? (at.high() ? product[1][3] : product[1][1])
                      : at.high() ? product[0][3]
                                  : product[0][1];
  if (is_inside) p.delta[row] = at.odd() ? right : left;
}

template <class Tile>
__device__ __forceinline__ void store_gradient(const Matrix<__half>& gradient, const Tile& t,
                                               const Results<Tile>& result, int first_row, float factor) {
#pragma unroll
  for (int i = 0; i < Tile::kRowsOwned; ++i) {
#pragma unroll
    for (int c = 0; c < Tile::kResultsOwned; c += 4) {
      const float x[4] = {result[i][c] * factor, result[i][c + 1] * factor, result[i][c + 2] * factor,
                          result[i][c + 3] * factor};
      gradient.store(first_row + t.row(i), t.result_column(c), x);
    }
  }
}

// A query's statistics on their way from memory, as they are there: what follows from them waits until they are used.
struct StatisticsInFlight {
  float lse, rest, delta;

  __device__ __forceinline__ void load(const BackwardParams& p, int batch, int head, int query, bool wants_delta) {
    lse = rest = delta = 0.f;
    if (query >= p.L) return;
    const int64_t row = (batch * p.H + head) * p.L + query;
    lse = p.logsumexp[row];
    if (p.logsumexp_rest != nullptr) rest = p.logsumexp_rest[row];
    if (wants_delta) delta = p.delta[row];
  }
  __device__ __forceinline__ QueryStatistics get(const BackwardParams& p) const {
    if (lse == -INFINITY) return {{INFINITY, 0.f}, delta};  // as RowReference::of
    return {{lse, p.logsumexp_rest != nullptr ? rest - product_rest(lse) : 0.f}, delta};
  }
};

// As QueryBlock, for a block whose rows are keys, and for one query head after the other.
template <int kRows, int kWarpRows>
struct KeyBlock {
  int batch, head, first_key;

  // Under causality the first keys have most to do: start them first, those of all heads.
  __device__ __forceinline__ static KeyBlock of(const ForwardParams& p) {
    const unsigned group = static_cast<unsigned>(p.group), key_heads = static_cast<unsigned>(p.H) / group;
    const unsigned heads = static_cast<unsigned>(p.B) * key_heads, tiles = static_cast<unsigned>(ceil_div(p.S, kRows));
    const unsigned head_index = p.is_causal ? blockIdx.x % heads : blockIdx.x / tiles;
    const unsigned tile = p.is_causal ? blockIdx.x / heads : blockIdx.x % tiles;
    return {static_cast<int>(head_index / key_heads), static_cast<int>(head_index % key_heads * group),
            static_cast<int>(tile * kRows)};
  }

  __device__ __forceinline__ void start_anew() { asm volatile("" : "+r"(batch), "+r"(head), "+r"(first_key)); }

  __device__ __forceinline__ int key_head(const ForwardParams& p) const { return head / static_cast<int>(p.group); }
  __device__ __forceinline__ int warp_key() const { return first_key + fresh_thread_index() / 32 * kWarpRows; }
  __device__ __forceinline__ OctetMatrix queries(const BackwardParams& p) {
    start_anew();
    return OctetMatrix::of(p.query, batch, head, p.L, p.E);
  }
  __device__ __forceinline__ OctetMatrix grads(const BackwardParams& p) {
    start_anew();
    return OctetMatrix::of(p.grad_output, batch, head, p.L, p.Ev);
  }
};

// dK and dV, or one of them. Rows are keys, columns queries.
template <class Arch, int kHeadDim, bool kMakesKey, bool kMakesValue>
__global__ void __launch_bounds__(VoltaBackward<Arch, kHeadDim>::kThreads, VoltaBackward<Arch, kHeadDim>::kBlocksPerSm)
    volta_grad_key_value_kernel(const __grid_constant__ BackwardParams p) {
  using Shape = VoltaBackward<Arch, kHeadDim>;
  using Warp = typename Shape::Warp;
  constexpr int kColumns = Shape::kColumns;
  extern __shared__ float4 shared_memory[];
  Octet* const query_tile = Shape::tiles(shared_memory);
  Octet* const grad_output_tile = query_tile + Warp::kTileOctets;
  const StatisticsTile<kColumns> statistics{Shape::statistics(shared_memory)};

  auto block = KeyBlock<Shape::kRows, Warp::kRows>::of(p);
  const bool wants_key = kMakesKey && p.grad_key.data != nullptr;
  const bool wants_value = kMakesValue && p.grad_value.data != nullptr;

  typename Shape::RowA key;
  typename Shape::RowB value;
  const int key_head = block.key_head(p);
  key.load(OctetMatrix::of(p.key, block.batch, key_head, p.S, p.E), block.warp_key(), query_tile, Shape::kThreads);
  if (kMakesKey) {
    value.load(OctetMatrix::of(p.value, block.batch, key_head, p.S, p.Ev), block.warp_key(), query_tile,
               Shape::kThreads, reinterpret_cast<Octet*>(shared_memory));
  }
  Results<Warp> grad_key = {}, grad_value = {};
  OctetsInFlight<Warp, Shape::kThreads, Shape::kIsEarly> queries_in_flight, grads_in_flight;
  StatisticsInFlight statistics_in_flight;
  const auto fetch = [&](int first_query) {
    queries_in_flight.load(block.queries(p), first_query);
    grads_in_flight.load(block.grads(p), first_query);
    if (const int n = fresh_thread_index(); n < kColumns) {
      statistics_in_flight.load(p, block.batch, block.head, first_query + n, wants_key);
    }
  };

#pragma unroll 1
  for (int heads_left = static_cast<int>(p.group); heads_left > 0; --heads_left, ++block.head) {
    const int query_begin = Mask::of(p, 0, 0).query_begin(block.first_key) / kColumns * kColumns;
    fetch(query_begin);
#pragma unroll 1
    for (int first_query = query_begin; first_query < p.L; first_query += kColumns) {
      __syncthreads();  // nobody reads the tiles any more
      queries_in_flight.store(query_tile, block.queries(p), first_query);
      grads_in_flight.store(grad_output_tile, block.grads(p), first_query);
      if (const int n = fresh_thread_index(); n < kColumns) statistics.store(n, statistics_in_flight.get(p));
      __syncthreads();
      const bool is_seen = block.warp_key() < p.S && !(p.is_causal && first_query + kColumns <= block.warp_key());
      ScoreOperand<Warp> probability, grad_score;
      if (is_seen) {
        const Warp t = Warp::of_thread();
        const ScoreOrigin<true> origin{block.warp_key(), first_query};
        Scores<Warp> score = {};
        multiply_scores(score, t, key, query_tile);
        block.start_anew();
        const Mask mask = Mask::of(p, block.batch, block.head);
        scale_and_mask(score, t, p.scale, mask, Shape::mask_tile(shared_memory), origin);
#pragma unroll
        for (int j = 0; j < Warp::kColumnsOwned; ++j) {
          const RowReference reference = statistics.reference(t.column(j));
#pragma unroll
          for (int i = 0; i < Warp::kRowsOwned; ++i) score[i][j] = reference.probability(score[i][j]);
        }
        if (p.dropout_p > 0.f) {  // what is dropped is kept in mind as the sign
          const Dropout dropout = Dropout::make(p.dropout_p, *p.seed);
          for_each_keep(
              t, dropout, p.first_batch_head + block.batch * p.H + block.head, origin,
              [&](int i, int j, bool keep) { score[i][j] = keep ? score[i][j] : copysignf(score[i][j], -1.f); });
        }
        if (kMakesValue) {
          Scores<Warp> kept;
          for_each_score<Warp>([&](int i, int j) { kept[i][j] = signbit(score[i][j]) ? 0.f : score[i][j]; });
          probability = ScoreOperand<Warp>::of(kept, t);
        }
        if (wants_key) {
          Scores<Warp> grad = {};
          multiply_scores(grad, t, value, grad_output_tile);
          if (p.dropout_p > 0.f) {
            const float rescale = Dropout::make(p.dropout_p, 0).rescale;
            for_each_score<Warp>([&](int i, int j) { grad[i][j] *= signbit(score[i][j]) ? 0.f : rescale; });
          }
#pragma unroll
          for (int j = 0; j < Warp::kColumnsOwned; ++j) {
            const float delta = statistics.delta(t.column(j));
#pragma unroll
            for (int i = 0; i < Warp::kRowsOwned; ++i) grad[i][j] = fabsf(score[i][j]) * (grad[i][j] - delta);
          }
          grad_score = ScoreOperand<Warp>::of(grad, t);
        }
      }
      fetch(first_query + kColumns);
      if (is_seen) {
        const Warp t = Warp::of_thread();
        if (wants_value) multiply_result(grad_value, t, probability, grad_output_tile);
        if (wants_key) multiply_result(grad_key, t, grad_score, query_tile);
      }
    }
  }
  --block.head;
  block.start_anew();
  const Warp t = Warp::of_thread();
  if (wants_value) {
    const auto gradient = Matrix<__half>::of(p.grad_value, block.batch, block.key_head(p), p.S, p.Ev);
    const float rescale = p.dropout_p > 0.f ? Dropout::make(p.dropout_p, 0).rescale : 1.f;
    store_gradient(gradient, t, grad_value, block.warp_key(), rescale);
  }
  if (wants_key) {
    const auto gradient = Matrix<__half>::of(p.grad_key, block.batch, block.key_head(p), p.S, p.E);
    store_gradient(gradient, t, grad_key, block.warp_key(), p.scale);
  }
}

// Adds a lane's dS to the mask's gradient. Where the mask broadcasts along the keys a row is summed up first.
template <class Tile>
__device__ __forceinline__ void add_mask_gradient(const BackwardParams& p, const Tile& t, int b, int h,
                                                  ScoreOrigin<false> origin, const Scores<Tile>& grad) {
  const int64_t* const stride = p.grad_mask_stride;
  float* const head = p.grad_mask + b * stride[0] + h * stride[1];
#pragma unroll
  for (int i = 0; i < Tile::kRowsOwned; ++i) {
    const int query = origin.query() + t.row(i);
    float* const row = head + query * stride[2];
    if (stride[3] == 0) {
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < Tile::kColumnsOwned; ++j) sum += grad[i][j];  // what lies outside L x S has P = 0
      sum = Tile::row_sum(sum);
      if (query < p.L && t.is_first_of_row()) atomicAdd(row, sum);
    } else {
#pragma unroll
      for (int j = 0; j < Tile::kColumnsOwned; ++j) {
        const int key = origin.key() + t.column(j);
        if (query < p.L && key < p.S) atomicAdd(row + key * stride[3], grad[i][j]);
      }
    }
  }
}

// dQ and the mask's gradient. Rows are queries, columns keys.
template <class Arch, int kHeadDim>
__global__ void __launch_bounds__(VoltaBackward<Arch, kHeadDim>::kThreads, VoltaBackward<Arch, kHeadDim>::kBlocksPerSm)
    volta_grad_query_kernel(const __grid_constant__ BackwardParams p) {
  using Shape = VoltaBackward<Arch, kHeadDim>;
  using Warp = typename Shape::Warp;
  constexpr int kColumns = Shape::kColumns;
  extern __shared__ float4 shared_memory[];
  Octet* const key_tile = Shape::tiles(shared_memory);
  Octet* const value_tile = key_tile + Warp::kTileOctets;
  auto block = QueryBlock<Shape::kRows, Warp::kRows>::of(p);

  OctetsInFlight<Warp, Shape::kThreads, Shape::kIsEarly> keys_in_flight, values_in_flight;
  const auto fetch = [&](int first_key) {
    keys_in_flight.load(block.keys(p), first_key);
    values_in_flight.load(block.values(p), first_key);
  };

  typename Shape::RowA query;
  typename Shape::RowB grad_output;
  query.load(OctetMatrix::of(p.query, block.batch, block.head, p.L, p.E), block.warp_query(), key_tile,
             Shape::kThreads);
  grad_output.load(OctetMatrix::of(p.grad_output, block.batch, block.head, p.L, p.Ev), block.warp_query(), key_tile,
                   Shape::kThreads, reinterpret_cast<Octet*>(shared_memory));
  RowReference reference[Warp::kRowsOwned];
  float delta[Warp::kRowsOwned];
#pragma unroll
  for (int i = 0; i < Warp::kRowsOwned; ++i) {
    const auto statistics =
        QueryStatistics::of(p, block.head_index(p), block.warp_query() + Warp::of_thread().row(i), true);
    reference[i] = statistics.reference;
    delta[i] = statistics.delta;
  }
  Results<Warp> grad_query = {};

  fetch(0);
#pragma unroll 1
  for (int first_key = 0; first_key < block.key_end(p); first_key += kColumns) {
    __syncthreads();  // nobody reads the tiles any more
    keys_in_flight.store(key_tile, block.keys(p), first_key);
    values_in_flight.store(value_tile, block.values(p), first_key);
    __syncthreads();
    const bool is_seen = first_key < block.warp_key_end(p);
    ScoreOperand<Warp> grad_score;
    if (is_seen) {
      const Warp t = Warp::of_thread();
      const ScoreOrigin<false> origin{block.warp_query(), first_key};
      Scores<Warp> score = {}, grad = {};
      multiply_scores(score, t, query, key_tile);
      block.start_anew();
      scale_and_mask(score, t, p.scale, Mask::of(p, block.batch, block.head), Shape::mask_tile(shared_memory), origin);
      for_each_score<Warp>([&](int i, int j) { score[i][j] = reference[i].probability(score[i][j]); });
      multiply_scores(grad, t, grad_output, value_tile);
      if (p.dropout_p > 0.f) {
        const Dropout dropout = Dropout::make(p.dropout_p, *p.seed);
        for_each_keep(t, dropout, p.first_batch_head + block.head_index(p), origin,
                      [&](int i, int j, bool keep) { grad[i][j] = keep ? grad[i][j] * dropout.rescale : 0.f; });
      }
      for_each_score<Warp>([&](int i, int j) { grad[i][j] = score[i][j] * (grad[i][j] - delta[i]); });
      if (p.grad_mask != nullptr) add_mask_gradient(p, t, block.batch, block.head, origin, grad);
      grad_score = ScoreOperand<Warp>::of(grad, t);
    }
    fetch(first_key + kColumns);
    if (is_seen) multiply_result(grad_query, Warp::of_thread(), grad_score, key_tile);
  }
  if (p.grad_query.data != nullptr) {
    const auto gradient = Matrix<__half>::of(p.grad_query, block.batch, block.head, p.L, p.E);
    store_gradient(gradient, Warp::of_thread(), grad_query, block.warp_query(), p.scale);
  }
}

template <auto kKernel, class Shape>
cudaError_t launch_volta_backward(const BackwardParams& p, int64_t heads, int64_t rows, cudaStream_t stream) {
  if (heads * rows == 0) return cudaSuccess;
  if (const cudaError_t error = allow_shared_bytes<kKernel>(Shape::kSharedBytes); error != cudaSuccess) return error;
  const auto grid = static_cast<unsigned>(heads * ceil_div(rows, Shape::kRows));
  kKernel<<<grid, Shape::kThreads, Shape::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

template <class Arch, int kHeadDim>
cudaError_t volta_backward(const BackwardParams& p, cudaStream_t stream) {
  using Shape = VoltaBackward<Arch, kHeadDim>;
  const bool wants_key = p.grad_key.data != nullptr, wants_value = p.grad_value.data != nullptr;
  const bool wants_query = p.grad_query.data != nullptr || p.grad_mask != nullptr;
  cudaError_t error = is_one_tile<kHeadDim>(p) ? cudaSuccess : cudaErrorInvalidValue;
  if (error != cudaSuccess) return error;
  if (const int64_t rows = p.B * p.H * p.L; rows > 0 && (wants_query || wants_key)) {
    volta_delta_kernel<Arch><<<static_cast<unsigned>(ceil_div(rows, kVoltaDeltaRows)), kVoltaDeltaRows, 0, stream>>>(p);
    if (error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  const auto launch_key_value = [&]<bool kMakesKey, bool kMakesValue>() {
    constexpr auto kKernel = &volta_grad_key_value_kernel<Arch, kHeadDim, kMakesKey, kMakesValue>;
    return launch_volta_backward<kKernel, Shape>(p, p.B * (p.H / p.group), p.S, stream);
  };
  if constexpr (Shape::kHasBothResults) {
    if (wants_key || wants_value) error = launch_key_value.template operator()<true, true>();
  } else {
    if (wants_key) error = launch_key_value.template operator()<true, false>();
    if (wants_value && error == cudaSuccess) error = launch_key_value.template operator()<false, true>();
  }
  if (error != cudaSuccess || !wants_query) return error;
  return launch_volta_backward<&volta_grad_query_kernel<Arch, kHeadDim>, Shape>(p, p.B * p.H, p.L, stream);
}

}  // namespace efficient

}  // namespace sdpa
