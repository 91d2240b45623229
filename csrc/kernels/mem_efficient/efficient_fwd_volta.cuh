// Memory-efficient attention, forward, float16 on Volta's tensor cores, head dims up to kHeadDim.
//
// A block owns kRows queries of one head, a warp whole rows of them, which stay in its registers; tiles of keys and of
// values take turns: while one is multiplied the other is on its way from memory, in registers, since there is no
// asynchronous copy.
#pragma once

#include <algorithm>

#include "../arch/arch.h"
#include "volta_tile.h"

namespace sdpa {

namespace efficient {

template <class Arch, int kHeadDim>
struct VoltaForward {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kRowBlocks = kHeadDim == 64 ? 2 : 1, kShare = kHeadDim == 32 ? 1 : 2, kKeys = 32;
  static constexpr int kBlocksPerSm = kHeadDim == 32 ? 3 : 2;
  using Warp = VoltaTile<kRowBlocks, kShare, kKeys, kHeadDim>;
  static constexpr int kRows = kWarps * Warp::kRows;
  static constexpr int kTileBytes = Warp::kTileOctets * static_cast<int>(sizeof(Octet));
  static constexpr int kMaskBytes = kWarps * kMaskFloats<false, Warp> * static_cast<int>(sizeof(float));
  static constexpr int kOperandBytes = kThreads * RowOperand<Warp>::kPassage * static_cast<int>(sizeof(Octet));
  static constexpr int kSharedBytes = std::max(2 * kTileBytes + kMaskBytes, kOperandBytes);
  static_assert(kBlocksPerSm * kSharedBytes <= Arch::kSharedBytes);
};

template <class Arch, int kHeadDim>
__global__ void __launch_bounds__(VoltaForward<Arch, kHeadDim>::kThreads, VoltaForward<Arch, kHeadDim>::kBlocksPerSm)
    volta_forward_kernel(const __grid_constant__ ForwardParams p) {
  using Shape = VoltaForward<Arch, kHeadDim>;
  using Warp = typename Shape::Warp;
  extern __shared__ float4 shared_memory[];
  Octet* const key_tile = reinterpret_cast<Octet*>(shared_memory);
  Octet* const value_tile = key_tile + Warp::kTileOctets;
  const auto mask_tile = [&] {
    return reinterpret_cast<float*>(value_tile + Warp::kTileOctets) +
           fresh_thread_index() / 32 * kMaskFloats<false, Warp>;
  };
  auto block = QueryBlock<Shape::kRows, Warp::kRows>::of(p);

  RowOperand<Warp> query;
  query.load(OctetMatrix::of(p.query, block.batch, block.head, p.L, p.E), block.warp_query(), key_tile,
             Shape::kThreads);
  __syncthreads();  // everyone has read what the keys are written over
  Results<Warp> result = {};
  RowSoftmax<Warp> softmax = RowSoftmax<Warp>::none();

  OctetsInFlight<Warp, Shape::kThreads> in_flight;
  in_flight.load(block.keys(p), 0);
  in_flight.store(key_tile, block.keys(p), 0);
#pragma unroll 1
  for (int first_key = 0; first_key < block.key_end(p); first_key += Shape::kKeys) {
    __syncthreads();  // the keys are there, and nobody reads the values before any more
    in_flight.load(block.values(p), first_key);
    ScoreOperand<Warp> probability;
    if (first_key < block.warp_key_end(p)) {
      const Warp t = Warp::of_thread();
      Scores<Warp> score = {};
      multiply_scores(score, t, query, key_tile);
      block.start_anew();
      const ScoreOrigin<false> origin{block.warp_query(), first_key};
      scale_and_mask(score, t, p.scale, Mask::of(p, block.batch, block.head), mask_tile(), origin);
      float rescale[Warp::kRowsOwned];
      softmax.take_in(score, rescale);
      if (p.dropout_p > 0.f) {
        const Dropout dropout = Dropout::make(p.dropout_p, *p.seed);
        for_each_keep(t, dropout, p.first_batch_head + block.head_index(p), origin,
                      [&](int i, int j, bool keep) { score[i][j] = keep ? score[i][j] : 0.f; });
      }
      probability = ScoreOperand<Warp>::of(score, t);
      bool has_moved = false;  // some row's maximum
#pragma unroll
      for (int i = 0; i < Warp::kRowsOwned; ++i) has_moved |= rescale[i] != 1.f;
      if (__any_sync(~0u, has_moved)) {
#pragma unroll
        for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
          for (int c = 0; c < Warp::kResultsOwned; ++c) result[i][c] *= rescale[i];
        }
      }
    }
    in_flight.store(value_tile, block.values(p), first_key);
    __syncthreads();  // the values are there, and nobody reads the keys any more
    in_flight.load(block.keys(p), first_key + Shape::kKeys);
    if (first_key < block.warp_key_end(p)) multiply_result(result, Warp::of_thread(), probability, value_tile);
    in_flight.store(key_tile, block.keys(p), first_key + Shape::kKeys);
  }

  const float kept = p.dropout_p > 0.f ? Dropout::make(p.dropout_p, 0).rescale : 1.f;
  const auto output = Matrix<__half>::of(p.output, block.batch, block.head, p.L, p.Ev);
  const Warp t = Warp::of_thread();
#pragma unroll
  for (int i = 0; i < Warp::kRowsOwned; ++i) {
    const int row = block.warp_query() + t.row(i);
    const float sum = Warp::row_sum(softmax.sum[i]);
    const bool is_empty = softmax.maximum[i] == -INFINITY && sum == 0.f;
    const float factor = kept / sum;
#pragma unroll
    for (int c = 0; c < Warp::kResultsOwned; c += 4) {
      float x[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) x[n] = is_empty ? 0.f : result[i][c + n] * factor;
      output.store(row, t.result_column(c), x);
    }
    if (p.logsumexp != nullptr && t.is_first_of_row() && row < p.L) {
      store_statistics(p, block.head_index(p) * p.L + row, softmax.maximum[i], sum, is_empty);
    }
  }
}

template <class Arch, int kHeadDim>
cudaError_t volta_forward(const ForwardParams& p, cudaStream_t stream) {
  using Shape = VoltaForward<Arch, kHeadDim>;
  constexpr auto kKernel = &volta_forward_kernel<Arch, kHeadDim>;
  if (!is_one_tile<kHeadDim>(p)) return cudaErrorInvalidValue;
  if (p.B * p.H * p.L == 0 || p.Ev == 0) return cudaSuccess;
  if (const cudaError_t error = allow_shared_bytes<kKernel>(Shape::kSharedBytes); error != cudaSuccess) return error;
  const auto grid = static_cast<unsigned>(p.B * p.H * ceil_div(p.L, Shape::kRows));
  kKernel<<<grid, Shape::kThreads, Shape::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace efficient

}  // namespace sdpa
