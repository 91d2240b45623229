// Memory-efficient attention, forward, float32 on tensor cores (sm80 and newer), any head dims.
//
// A block owns kRows queries of one head and kHeadDim columns of their output, a warp whole rows of them. The next keys
// and values are copied as they are while the present ones, taken apart into pairs of float16, are multiplied. An E
// wider than kHeadDim passes through shared memory in chunks; an output wider than kHeadDim is covered by further
// blocks, each of which computes the scores again.
#pragma once

#include <algorithm>

#include "../arch/arch.h"
#include "../attn/block_range.h"
#include "../attn/mask.h"
#include "pair_place.h"
#include "pair_softmax.h"
#include "pair_tile.h"

namespace sdpa {

namespace efficient {

// What a block may have of a multiprocessor.
enum class PairSize {
  kSmall,  // half of its registers, 99 KB
  kLarge,  // all of its registers, so that taking keys and values apart serves twice the queries, and 163 KB: room for
           // two tiles of each, one taken apart while the other is multiplied
  kHuge,   // 227 KB: wide heads have 32 rows a warp as well
};

// Where a warp has 32 rows, what it reads of keys and values serves twice the products.
template <class Arch, int kHeadDim, bool kSplit, PairSize kSize>
struct PairForward {
  static constexpr int kWarps = kSize == PairSize::kSmall ? 4 : 8, kThreads = kWarps * 32;
  static constexpr int kRowBlocks = kHeadDim <= 64 || kSize == PairSize::kHuge ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowBlocks, kRows = kWarps * kWarpRows;
  static constexpr bool kIsRoomy = kSize == PairSize::kLarge || (kSize == PairSize::kHuge && !kSplit);
  static constexpr int kBlocksPerSm = kSize == PairSize::kSmall ? 2 : 1, kBuffers = kIsRoomy ? 2 : 1;
  static constexpr int kKeys = kHeadDim == 128 && (kSplit || kSize != PairSize::kHuge) ? 32
                               : kHeadDim == 32 && kThreads == 256                     ? 128
                                                                                       : 64;  // of a tile
  static constexpr int kStep = 32;                                                            // of the scores at a time
  static constexpr int kTogether = kHeadDim == 128 && kRowBlocks == 2 && kSplit ? 16 : 32;    // see multiply_scores
  static constexpr bool kTakesWide = kHeadDim == kWidestPairs && kSize == PairSize::kSmall;   // E of more than kHeadDim
  using Warp = WarpTile<kRowBlocks, kStep, kHeadDim>;
  using QueryTile = PairTile<kRows, kHeadDim, kThreads, kSplit>;
  using KeyTile = PairTile<kKeys, kHeadDim, kThreads, kSplit>;  // of values too
  static constexpr bool kTakesMask = kSize != PairSize::kHuge;  // a tensor, that is
  // Whether each thread leaves the softmax's state and a column of results in shared memory while it multiplies.
  static constexpr bool kParks = kSize == PairSize::kHuge;
  static constexpr int kParkedBytes = PairSoftmax<Warp>::kBytes + Warp::kRowsOwned * 4;
  // Of an E of more than kHeadDim all chunks of queries stay, if there is room for them.
  static constexpr int kQueryBytes = QueryTile::kBytes + QueryTile::kFactorBytes;
  static constexpr int shared_bytes(int query_chunks) {
    return query_chunks * kQueryBytes + kBuffers * 2 * (KeyTile::kBytes + KeyTile::kFactorBytes) +
           2 * KeyTile::kStagingBytes + 16 + (kParks ? kThreads * kParkedBytes : 0);
  }
  static constexpr int kSharedBytes = shared_bytes(1);
  static_assert(kSharedBytes <= (kSize == PairSize::kSmall   ? Arch::kSharedBytes / 1024
                                 : kSize == PairSize::kLarge ? 163
                                                             : 227) *
                                    1024);
};

// Makes scores of products if they are biased, and takes in what the mask has for them.
template <class Warp, bool kTakesMask, class F>
__device__ __forceinline__ void apply_mask(Scores<Warp>& score, const PairScale& scale, F make_mask, int first_query,
                                           int first_key) {
  const Mask mask = make_mask();
  if (kTakesMask && mask.kind != MaskKind::kNone) {
    if (scale.is_biased) {
#pragma unroll
      for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
        for (int j = 0; j < Warp::kColumnsOwned; ++j) score[i][j] *= scale.to_score;
      }
    }
    mask.read([&](auto bias) {
      const int lane = threadIdx.x % 32;
      // All rows pass through the place of the first: as many reads of every kind of mask are a lot of code.
#pragma unroll 1
      for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
        for (int n = 0; n < Warp::kTiles; ++n) {  // two lanes look at the same four keys
          const float4 b = bias(first_query + Warp::row(i), first_key + 8 * n + lane % 4 / 2 * 4);
          score[0][2 * n] = scale.add_bias(score[0][2 * n], lane % 2 == 0 ? b.x : b.z);
          score[0][2 * n + 1] = scale.add_bias(score[0][2 * n + 1], lane % 2 == 0 ? b.y : b.w);
        }
#pragma unroll
        for (int j = 0; j < Warp::kColumnsOwned; ++j) {
          const float first = score[0][j];
#pragma unroll
          for (int k = 1; k < Warp::kRowsOwned; ++k) score[k - 1][j] = score[k][j];
          score[Warp::kRowsOwned - 1][j] = first;
        }
      }
    });
  } else if (!mask.passes(first_query, first_query + 8 * Warp::kRowsOwned, first_key, first_key + Warp::kColumns)) {
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
  static_assert((Warp::kTiles % 4 == 0 || Warp::kTiles == 2) && Warp::kRowBlocks <= 2);
  constexpr int kTiles = Warp::kTiles < 4 ? Warp::kTiles : 4;
#pragma unroll
  for (int n = 0; n < Warp::kTiles / kTiles; ++n) {
#pragma unroll
    for (int is_odd = 0; is_odd < 2; ++is_odd) {
      const Dropped16 dropped = dropout.draw(static_cast<uint32_t>(batch_head), first_query / 32, first_key / 32 + n,
                                             threadIdx.x % 32 / 4, threadIdx.x % 4 * 2 + is_odd);
#pragma unroll
      for (int i = 0; i < Warp::kRowsOwned; ++i) {  // 8 rows apart, and so are the columns
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const uint32_t word = dropped.word_of(Warp::kRowBlocks == 2 ? i / 2 : first_query / 16 % 2,
                                                kTiles == 2 ? first_key / 16 % 2 : j / 2);
          float& x = score[i][8 * n + 2 * j + is_odd];
          x = word >> (7 + i % 2 * 8 + j % 2 * 16) & 1 ? 0.f : x;
        }
      }
    }
  }
}

template <class Arch, int kHeadDim, bool kSplit, PairSize kSize>
__global__ void __launch_bounds__(PairForward<Arch, kHeadDim, kSplit, kSize>::kThreads,
                                  PairForward<Arch, kHeadDim, kSplit, kSize>::kBlocksPerSm)
    pair_forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ BlockOrder order,
                        int query_chunks) {
  using Shape = PairForward<Arch, kHeadDim, kSplit, kSize>;
  using Warp = typename Shape::Warp;
  using QueryTile = typename Shape::QueryTile;
  using KeyTile = typename Shape::KeyTile;
  constexpr int kKeys = Shape::kKeys;
  if constexpr (kSize == PairSize::kHuge && kIsBeforeSm90) return;  // which has no room for it
  extern __shared__ __align__(128) unsigned char shared[];

  // Which part of the problem. Under causality the last queries have most to do: start them first.
  int tile_index, head_index;
  if (!order.locate(tile_index, head_index)) return;
  const int first_col = blockIdx.z * kHeadDim;
  const auto warp = [] { return fresh_thread_index() / 32; };

  // Shared memory: keys and values, in one or two buffers | keys and values on their way | queries | factors of the
  // rows of all | what block it is, and the softmax's state: the products need all registers.
  const int chunks = Shape::kTakesWide ? static_cast<int>(ceil_div(p.E, kHeadDim)) : 1;
  const int resident = Shape::kTakesWide ? query_chunks : 1;  // all chunks of the queries, or one
  constexpr int kTiles = Shape::kBuffers * 2;
  const uint32_t base = shared_address(shared), key_staging = base + kTiles * KeyTile::kBytes;
  const uint32_t value_staging = key_staging + KeyTile::kStagingBytes;
  const uint32_t query_base = value_staging + KeyTile::kStagingBytes;
  const uint32_t factors = query_base + resident * QueryTile::kBytes;
  const uint32_t query_factors = factors + kTiles * KeyTile::kFactorBytes;
  const uint32_t place = query_factors + resident * QueryTile::kFactorBytes;
  const auto tile = [&](int n) { return KeyTile(base + n * KeyTile::kBytes, factors + n * KeyTile::kFactorBytes); };
  const auto key_tile = [&](int stage) { return tile(2 * stage); };
  const auto value_tile = [&](int stage) { return tile(2 * stage + 1); };
  const auto query_tile = [&](int chunk) {
    const int n = resident == 1 ? 0 : chunk;
    return QueryTile(query_base + n * QueryTile::kBytes, query_factors + n * QueryTile::kFactorBytes);
  };
  const QueryPlace here{p, place};
  if (threadIdx.x == 0) here.put(order, tile_index, head_index, Shape::kRows);
  __syncthreads();
  const auto warp_query = [&] { return here().first_query + warp() * Shape::kWarpRows; };

  const PairScale scale = PairScale::of(p);
  const BlockRange<Shape::kRows, kKeys> range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};
  const auto matters = [&](int first_key) { return range.matters(here().first_query, first_key); };
  const auto fetch_keys = [&](int first_key, int chunk) {
    if (matters(first_key)) KeyTile::fetch(key_staging, here.keys(), first_key, chunk * kHeadDim);
  };
  const auto fetch_values = [&](int first_key) {
    if (matters(first_key)) KeyTile::fetch(value_staging, here.values(), first_key, first_col);
  };
  const auto take_queries = [&](int chunk, int number) {
    query_tile(chunk).take(here.queries(), here().first_query, chunk * kHeadDim, number, scale.query_sign);
  };
  for (int chunk = 0; chunk < resident; ++chunk) query_tile(chunk).start();
  for (int n = 0; n < kTiles; ++n) tile(n).start();
  __syncthreads();
  fetch_keys(0, 0);
  fetch_values(0);
  if (resident == chunks) {
    for (int chunk = 0; chunk < resident; ++chunk) take_queries(chunk, 0);
  }
  const auto take = [&](int stage, int first_key) {
    cp_async_wait_all();
    key_tile(stage).take(key_staging, first_key);
    value_tile(stage).take(value_staging, first_key);
    fetch_keys(first_key + kKeys, 0);
    fetch_values(first_key + kKeys);
  };
  if (Shape::kBuffers == 2 && matters(0)) {
    take(0, 0);
    __syncthreads();
  }

  Results<Warp> result = {};
  PairSoftmax<Warp> softmax = PairSoftmax<Warp>::none();
  const auto parked = [&] { return place + 16 + fresh_thread_index() * Shape::kParkedBytes; };
  const auto park_results = [&] {
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
      store_shared_4(parked() + PairSoftmax<Warp>::kBytes + 4 * i, __float_as_uint(result[i][Warp::kResultsOwned - 1]));
    }
  };
  const auto fetch_parked = [&] {
    softmax.load(parked());
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
      result[i][Warp::kResultsOwned - 1] = load_shared_4(parked() + PairSoftmax<Warp>::kBytes + 4 * i);
    }
  };
  if (Shape::kParks) {
    softmax.store(parked());
    park_results();
  }
#pragma unroll 1
  for (int first_key = 0; matters(first_key); first_key += kKeys) {
    const auto stage = [&] { return Shape::kBuffers == 2 ? first_key / kKeys % 2 : 0; };
    Scores<Warp> score;
    if constexpr (Shape::kTakesWide) {
      static_assert(kKeys == Shape::kStep);
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const int number = first_key + chunk;
        __syncthreads();  // nobody reads the chunk, or the tile, before any more
        cp_async_wait_all();
        key_tile(0).take(key_staging, number);
        const bool is_last = chunk == chunks - 1;
        fetch_keys(is_last ? first_key + kKeys : first_key, is_last ? 0 : chunk + 1);
        if (chunk == 0) {
          value_tile(0).take(value_staging, first_key);
          fetch_values(first_key + kKeys);
        }
        if (resident != chunks) take_queries(chunk, number);
        __syncthreads();
        Scores<Warp> part;
        multiply_scores<kSplit, false, Warp, Shape::kTogether>(part, query_tile(chunk), warp() * Shape::kRowBlocks,
                                                               resident == chunks ? 0 : number, key_tile(0), 0, number,
                                                               static_cast<int>(p.E) - chunk * kHeadDim);
#pragma unroll
        for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
          for (int j = 0; j < Warp::kColumnsOwned; ++j)
            score[i][j] = chunk == 0 ? part[i][j] : score[i][j] + part[i][j];
        }
      }
    } else if constexpr (Shape::kBuffers == 1) {
      __syncthreads();  // every warp is done with the tile before
      take(0, first_key);
      __syncthreads();
    } else if (matters(first_key + kKeys)) {
      take(stage() ^ 1, first_key + kKeys);
    }

#pragma unroll 1
    for (int part = 0; part < kKeys; part += Shape::kStep) {
      // Keys that none of the warp's queries sees.
      if (first_key + part >= p.S || (p.is_causal && first_key + part >= warp_query() + Shape::kWarpRows)) break;
      if constexpr (!Shape::kTakesWide) {
        multiply_scores<kSplit, false, Warp, Shape::kTogether>(score, query_tile(0), warp() * Shape::kRowBlocks, 0,
                                                               key_tile(stage()), part / 16, first_key,
                                                               static_cast<int>(p.E));
      }
      const auto mask = [&] { return Mask::of(p, here().batch, here().head); };
      apply_mask<Warp, Shape::kTakesMask>(score, scale, mask, warp_query(), first_key + part);

      if (Shape::kParks) fetch_parked();
      softmax.take_in(score, scale.to_exponent, result);
      if (Shape::kParks) softmax.store(parked());
      if (p.dropout_p > 0.f) {
        const Dropout dropout = Dropout::make(p.dropout_p, *p.seed);
        drop_scores<Warp>(score, dropout, p.first_batch_head + here().batch * p.H + here().head, warp_query(),
                          first_key + part);
      }
      const int width = static_cast<int>(p.Ev) - first_col;
      const bool has_factors = value_tile(stage()).has_factors(first_key);
      if constexpr (!kSplit) {
        if (!has_factors)
          accumulate_result<Warp>(result, ScorePairs<false, Warp>(score), value_tile(stage()), part / 16, width);
      }
      if (kSplit || has_factors) {
        float unscale[Warp::kRowsOwned];
#pragma unroll
        for (float& x : unscale) x = 1.f;
        if (has_factors) {
          take_on_factors<Warp>(score, value_tile(stage()), part / 16);
          bring_into_range<Warp>(score, unscale);
        }
        // A step's keys are summed up by themselves before they join the others.
        multiply_result<kSplit, Warp>(ScorePairs<kSplit, Warp>(score), value_tile(stage()), part / 16, width,
                                      [&](int i, int c, float x) { result[i][c] = fmaf(x, unscale[i], result[i][c]); });
      }
      if (Shape::kParks) park_results();
    }
    if constexpr (Shape::kBuffers == 2) {
      __syncthreads();  // this tile's place may be filled again, and the next tile is there
    }
  }
  cp_async_wait_all();

  if (Shape::kParks) fetch_parked();
  const float kept = Dropout::make(p.dropout_p, 0).rescale;  // 1 without dropout
  const auto output = Matrix<float>::of(p.output, here().batch, here().head, p.L, p.Ev);
  store_results<Warp>(output, result, warp_query(), first_col, [&](int i) {
    const int row = warp_query() + Warp::row(i);
    const bool keeps_statistics = p.logsumexp != nullptr && blockIdx.z == 0 && threadIdx.x % 4 == 0 && row < p.L;
    const float factor = softmax.finish(i, p, keeps_statistics ? (here().batch * p.H + here().head) * p.L + row : -1);
    if (factor == 0.f) {
#pragma unroll
      for (float& x : result[i]) x = 0.f;  // a NaN in V stays out of empty rows
    }
    return kept * factor * power_of_two(-kShift);
  });
}

template <class Arch, int kHeadDim, bool kSplit, PairSize kSize>
cudaError_t launch_pair_forward(const ForwardParams& p, int multiprocessors, cudaStream_t stream) {
  using Shape = PairForward<Arch, kHeadDim, kSplit, kSize>;
  // There is so much arithmetic to a byte that under causality the longest blocks of all heads may well come first.
  const auto order = BlockOrder::make(ceil_div(p.L, Shape::kRows), p.B * p.H,
                                      p.is_causal ? 0 : p.S * (p.E + p.Ev) * sizeof(float) / p.group);
  // As large as there is room for, but no multiprocessor left without a block.
  if constexpr (kSize != PairSize::kSmall) {
    if (order.blocks() < multiprocessors || p.shared_bytes < Shape::kSharedBytes || p.E > kHeadDim ||
        (!Shape::kTakesMask && p.mask_kind != MaskKind::kNone)) {
      constexpr PairSize kSmaller = kSize == PairSize::kHuge ? PairSize::kLarge : PairSize::kSmall;
      return launch_pair_forward<Arch, kHeadDim, kSplit, kSmaller>(p, multiprocessors, stream);
    }
  }
  constexpr auto kKernel = &pair_forward_kernel<Arch, kHeadDim, kSplit, kSize>;
  if (order.blocks() == 0 || p.Ev == 0) return cudaSuccess;
  int query_chunks = static_cast<int>(ceil_div(p.E, kHeadDim));
  if (p.shared_bytes < Shape::shared_bytes(query_chunks)) query_chunks = 1;
  int most_bytes = Shape::kSharedBytes;
  if constexpr (Shape::kTakesWide) {
    int device = 0;
    if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return error;
    const auto error = cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
  }
  if (const auto error = allow_shared_bytes<kKernel>(most_bytes); error != cudaSuccess) return error;
  const dim3 grid(order.grid_x(), order.grid_y(), static_cast<unsigned>(ceil_div(p.Ev, kHeadDim)));
  kKernel<<<grid, Shape::kThreads, Shape::shared_bytes(query_chunks), stream>>>(p, order, query_chunks);
  return cudaGetLastError();
}

template <class Arch, int kHeadDim, bool kSplit>
cudaError_t launch_pair_forward(const ForwardParams& p, cudaStream_t stream) {
  if (std::max({p.L, p.S, p.B * p.H}) > kMaxPosition || !fits_pairs<kHeadDim>(p)) return cudaErrorInvalidValue;
  int multiprocessors = 0;
  if (const auto error = count_multiprocessors(multiprocessors); error != cudaSuccess) return error;
  constexpr PairSize kMost = kHeadDim == 128 ? PairSize::kHuge : PairSize::kLarge;
  return launch_pair_forward<Arch, kHeadDim, kSplit, kMost>(p, multiprocessors, stream);
}

template <class Arch, int kHeadDim>
cudaError_t pair_forward(const ForwardParams& p, cudaStream_t stream) {
  if constexpr (kHeadDim >= kNarrowestExactPairs) {
    if (!p.allow_tf32) return launch_pair_forward<Arch, kHeadDim, true>(p, stream);
  }
  return launch_pair_forward<Arch, kHeadDim, false>(p, stream);
}

}  // namespace efficient

}  // namespace sdpa
