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
  static constexpr int kRowBlocks = kHeadDim == 128 ? 1 : 2, kShare = 2, kKeys = 32;
  static constexpr int kBlocksPerSm = kHeadDim == 32 ? 3 : 2;
  using Warp = VoltaTile<kRowBlocks, kShare, kKeys, kHeadDim>;
  static constexpr int kRows = kWarps * Warp::kRows;
  static constexpr int kTileBytes = Warp::kTileOctets * static_cast<int>(sizeof(Octet));
  static constexpr int kMaskBytes = kWarps * kMaskFloats<false, Warp> * static_cast<int>(sizeof(float));
  static constexpr int kOperandBytes = kThreads * RowOperand<Warp>::kCount * static_cast<int>(sizeof(Octet));
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
  float* const mask_tile =
      reinterpret_cast<float*>(value_tile + Warp::kTileOctets) + threadIdx.x / 32 * kMaskFloats<false, Warp>;
  const Warp t = Warp::of_thread();

  // Which part of the problem. Under causality the last queries have most to do: start them first, those of all heads.
  const int64_t heads = p.B * p.H;
  const int query_tiles = static_cast<int>(ceil_div(p.L, Shape::kRows));
  const int head_index = static_cast<int>(p.is_causal ? blockIdx.x % heads : blockIdx.x / query_tiles);
  const int tile_index =
      p.is_causal ? query_tiles - 1 - static_cast<int>(blockIdx.x / heads) : blockIdx.x % query_tiles;
  int batch = head_index / static_cast<int>(p.H), head = head_index % static_cast<int>(p.H);
  const int first_query = tile_index * Shape::kRows;
  const int warp_query = first_query + static_cast<int>(threadIdx.x / 32) * Warp::kRows;

  // Addresses start anew from the parameters wherever they are used: the products need their registers.
  const auto start_anew = [&] { asm volatile("" : "+r"(batch), "+r"(head)); };
  const auto keys = [&] {
    start_anew();
    return OctetMatrix::of(p.key, batch, head / p.group, p.S, p.E);
  };
  const auto values = [&] {
    start_anew();
    return OctetMatrix::of(p.value, batch, head / p.group, p.S, p.Ev);
  };

  RowOperand<Warp> query;
  query.load(OctetMatrix::of(p.query, batch, head, p.L, p.E), warp_query, key_tile, Shape::kThreads);
  __syncthreads();  // everyone has read what the keys are written over
  Results<Warp> result = {};
  RowSoftmax<Warp> softmax = RowSoftmax<Warp>::none();

  const auto key_end = [&](int query_end) { return Mask::of(p, 0, 0).key_end(query_end); };
  const int block_key_end = key_end(first_query + Shape::kRows);
  const int warp_key_end = warp_query < p.L ? key_end(warp_query + Warp::kRows) : 0;
  OctetsInFlight<Warp, Shape::kThreads> in_flight;
  in_flight.load(keys(), 0);
  in_flight.store(key_tile, keys(), 0);
#pragma unroll 1
  for (int first_key = 0; first_key < block_key_end; first_key += Shape::kKeys) {
    __syncthreads();  // the keys are there, and nobody reads the values before any more
    in_flight.load(values(), first_key);
    ScoreOperand<Warp> probability;
    if (first_key < warp_key_end) {
      Scores<Warp> score = {};
      multiply_scores(score, t, query, key_tile);
      start_anew();
      const ScoreOrigin<false> origin{warp_query, first_key};
      scale_and_mask(score, t, p.scale, Mask::of(p, batch, head), mask_tile, origin);
      float rescale[Warp::kRowsOwned];
      softmax.take_in(score, rescale);
      if (p.dropout_p > 0.f) {
        const Dropout dropout = Dropout::make(p.dropout_p, *p.seed);
        for_each_keep(t, dropout, p.first_batch_head + head_index, origin,
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
    in_flight.store(value_tile, values(), first_key);
    __syncthreads();  // the values are there, and nobody reads the keys any more
    in_flight.load(keys(), first_key + Shape::kKeys);
    if (first_key < warp_key_end) multiply_result(result, t, probability, value_tile);
    in_flight.store(key_tile, keys(), first_key + Shape::kKeys);
  }

  const float kept = p.dropout_p > 0.f ? Dropout::make(p.dropout_p, 0).rescale : 1.f;
  const auto output = Matrix<__half>::of(p.output, batch, head, p.L, p.Ev);
#pragma unroll
  for (int i = 0; i < Warp::kRowsOwned; ++i) {
    const int row = warp_query + t.row(i);
    const float sum = Warp::row_sum(softmax.sum[i]);
    const bool is_empty = softmax.maximum[i] == -INFINITY && sum == 0.f;
    const float factor = is_empty ? 0.f : kept / sum;
#pragma unroll
    for (int c = 0; c < Warp::kResultsOwned; c += 4) {
      const float x[4] = {result[i][c] * factor, result[i][c + 1] * factor, result[i][c + 2] * factor,
                          result[i][c + 3] * factor};
      output.store(row, t.result_column(c), x);
    }
    if (p.logsumexp != nullptr && t.is_first_of_row() && row < p.L) {
      store_statistics(p, head_index * p.L + row, softmax.maximum[i], sum, is_empty);
    }
  }
}

template <class Arch, int kHeadDim>
cudaError_t volta_forward(const ForwardParams& p, cudaStream_t stream) {
  using Shape = VoltaForward<Arch, kHeadDim>;
  constexpr auto kKernel = &volta_forward_kernel<Arch, kHeadDim>;
  if (p.B * p.H * p.L == 0 || p.Ev == 0) return cudaSuccess;
  if (const cudaError_t error = allow_shared_bytes<kKernel>(Shape::kSharedBytes); error != cudaSuccess) return error;
  const auto grid = static_cast<unsigned>(p.B * p.H * ceil_div(p.L, Shape::kRows));
  kKernel<<<grid, Shape::kThreads, Shape::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace efficient

}  // namespace sdpa
