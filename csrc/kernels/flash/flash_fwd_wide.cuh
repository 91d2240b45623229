// Flash attention forward for head dims over 128, where the output of 32 rows is too much for one warp's registers.
//
// Two warps, four beyond 256 columns, share 32 query rows. Each computes the scores of its share of the keys and the
// output of its share of the columns, so that every fragment read from shared memory still feeds 32 rows; P of the
// other keys comes from the other warps through shared memory. There is room for one tile of keys and one of values:
// values are fetched during Q K^T, the next keys during P V. Where there is no room for P, it passes through the place
// of the keys in between.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "../arch/arch.h"
#include "../arch/barrier.h"
#include "../attn/block_range.h"
#include "../attn/launch.h"
#include "../attn/params.h"
#include "../attn/softmax.h"
#include "bool_mask.cuh"
#include "flash_fwd_stream.cuh"
#include "score_change.h"
#include "score_dropout.cuh"
#include "score_mask.cuh"
#include "tile.cuh"
#include "tile_stream.cuh"

namespace sdpa {

// kHeadDim: columns computed, a multiple of 32. kChange: kNone, kDropout or kAnyMask. kTeams: of warps that share rows.
// kLarge: for chips that give a block more shared memory than every chip with this path does.
template <class Arch, class T, int kHeadDim, ScoreChange kChange, int kTeams, bool kLarge>
struct FlashForwardWide {
  static constexpr int kSides = kHeadDim <= 256 ? 2 : 4;  // warps of a team
  static constexpr int kThreads = kTeams * kSides * 32;
  static constexpr int kRowBlocks = 2;  // 16-row blocks of a team
  static constexpr int kQueryTile = kTeams * kRowBlocks * 16, kKeyTile = 64;
  static constexpr int kSteps = kHeadDim / 16;               // k-steps of Q K^T
  static constexpr int kBlocks = kHeadDim / 16 / kSides;     // 16-column blocks of a warp's output: every kSides-th
  static constexpr int kKeyBlocks = kKeyTile / 16 / kSides;  // 16-key blocks of a warp's scores
  static constexpr int kBlocksPerSm = kSides == 2 && kTeams == 2 ? 2 : 1;
  static constexpr int kMaxSharedBytes = kSides == 4                                 ? (kTeams == 1 ? 163 : 227) * 1024
                                         : kLarge || (kTeams == 4 && kHeadDim > 192) ? 163 * 1024
                                                                                     : Arch::kSharedBytes;
  // Whether P has a place of its own, so that only the two warps of a team wait for each other's P.
  static constexpr bool kOwnPlace = (kHeadDim <= 192 && kTeams == 2) || kLarge;
  static_assert(!kOwnPlace || kSides == 2);
  static constexpr int kEarlyMaskWords = 4;  // of a row, in registers during Q K^T

  static constexpr int kCols = (kHeadDim + 63) / 64 * 64;
  using QueryTile = SharedTile<T, kQueryTile, kCols, Arch, true>;
  using KeyTile = SharedTile<T, kKeyTile, kCols, Arch, true>;         // of values too
  using ProbabilityTile = SharedTile<T, kQueryTile, kKeyTile, Arch>;  // in the place of the keys, or its own
  using KeyOrder = std::conditional_t<kChange == ScoreChange::kAnyMask, ColumnRuns<kKeyTile>, InOrder>;
  using Stream = TileStream<KeyTile, kThreads, KeyOrder, kHeadDim>;
  using Range = BlockRange<kQueryTile, kKeyTile>;

  static constexpr int kKeyOffset = QueryTile::kBytes, kValueOffset = kKeyOffset + KeyTile::kBytes;
  static constexpr int kEndOffset = kValueOffset + KeyTile::kBytes;
  static constexpr int kProbabilityOffset = kOwnPlace ? kEndOffset : kKeyOffset;
  static constexpr int kMapOffset = kEndOffset + (kOwnPlace ? ProbabilityTile::kBytes : 0);
  static constexpr int kPlaceOffset = kMapOffset + (kChange == ScoreChange::kAnyMask ? TileMap::kBytes : 0);
  static constexpr int kSharedBytes = kPlaceOffset + HeadPlace::kBytes;
  static_assert(kSharedBytes <= kMaxSharedBytes);
  static_assert(kHeadDim % 32 == 0 && ProbabilityTile::kBytes <= KeyTile::kBytes);

  // The key in column n * 8 + lane % 4 * 2 + i % 2 of a tile's scores.
  static __device__ __forceinline__ int key(int lane, int n, int i) {
    return KeyOrder::key(n * 8) + KeyOrder::key(lane % 4 * 2) + i % 2;
  }
};

template <class Arch, class T, int kHeadDim, ScoreChange kChange, int kTeams, bool kLarge>
__global__ void __launch_bounds__(FlashForwardWide<Arch, T, kHeadDim, kChange, kTeams, kLarge>::kThreads,
                                  FlashForwardWide<Arch, T, kHeadDim, kChange, kTeams, kLarge>::kBlocksPerSm)
    flash_forward_wide_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ BlockOrder order,
                              const __grid_constant__ Dropout dropout, const float scale_log2) {
  using Flash = FlashForwardWide<Arch, T, kHeadDim, kChange, kTeams, kLarge>;
  using Product = Mma<Arch, T>;
  constexpr int kRowBlocks = Flash::kRowBlocks, kKeyTile = Flash::kKeyTile, kThreads = Flash::kThreads;
  constexpr int kKeyBlocks = Flash::kKeyBlocks, kBlocks = Flash::kBlocks, kSides = Flash::kSides;
  constexpr bool kHasMask = kChange == ScoreChange::kAnyMask;
  extern __shared__ __align__(1024) unsigned char shared[];

  // Work of this block.
  int tile_number, batch_head;
  if (!order.locate_quickly(tile_number, batch_head)) return;
  const int q0 = static_cast<int>(order.tiles - 1 - tile_number) * Flash::kQueryTile;  // causal: the longest first
  const int heads = static_cast<int>(p.H);
  if constexpr (kHasMask) batch_head = side_by_side(p, batch_head, heads);
  int batch = batch_head / heads, head = batch_head % heads, key_head = head / static_cast<int>(p.group);
  const typename Flash::Range range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};

  // Shared memory: query | keys, then P | values | map of a mask. The output leaves through the query's place.
  const uint32_t base = shared_address(shared);
  const typename Flash::QueryTile query_tile{base};
  const typename Flash::KeyTile key_tile{base + Flash::kKeyOffset}, value_tile{base + Flash::kValueOffset};
  const typename Flash::ProbabilityTile probability_tile{base + Flash::kProbabilityOffset};
  // The mask's variant has no registers for addresses that would stay valid over the loop.
  const auto start_anew = [&] {
    if constexpr (kHasMask) asm volatile("" : "+r"(batch), "+r"(head), "+r"(key_head));
  };
  using Stream = typename Flash::Stream;
  const HeadPlace place{base + Flash::kPlaceOffset};
  if (threadIdx.x == 0) {
    place.put(Stream::first_row(p.key, batch, key_head, p.E), Stream::first_row(p.value, batch, key_head, p.Ev), batch,
              head, key_head);
  }
  __syncthreads();
  const auto fetch = [&](const typename Flash::KeyTile& to, const Operand& x, int64_t cols, int tile) {
    const HeadRows<const T> rows(x, place.batch(), place.key_head(), p.S, cols);
    to.template fill<kThreads, typename Flash::KeyOrder, true>(rows, tile * kKeyTile);
  };
  const auto stream_keys = [&](int tile, bool run) {
    Stream::fill(key_tile, place.key_row(), static_cast<int>(p.key.stride[2] * 2), tile * kKeyTile, range.S,
                 static_cast<int>(p.E), run);
  };
  const auto stream_values = [&](int tile, bool run) {
    Stream::fill(value_tile, place.value_row(), static_cast<int>(p.value.stride[2] * 2), tile * kKeyTile, range.S,
                 static_cast<int>(p.Ev), run);
  };
  // Keys from here on are seen by no query of the block.
  const int key_end = p.is_causal ? min(range.S, q0 + Flash::kQueryTile) : range.S;
  const TileMap map{reinterpret_cast<uint16_t*>(shared + Flash::kMapOffset)};
  bool is_mixed = false;  // the mask is known to leave no tile out
  const auto next_tile = [&](int tile) {
    if constexpr (kHasMask) {
      if (is_mixed) return tile;
      while (tile * kKeyTile < key_end && !map.any(tile)) ++tile;
    }
    return tile;
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int side = warp % kSides;                     // which share of the keys and columns
  const int team_block = warp / kSides * kRowBlocks;  // of 16 rows, in the query tile
  const int team_row = q0 + team_block * 16;
  const auto lane_offset = Flash::KeyTile::lane_offset();
  const auto probability_offset = Flash::ProbabilityTile::lane_offset();
  // This warp's blocks of columns are side, side + kSides, ...: the lane's offset takes the first step.
  const LaneOffset value_offset{lane_offset.rows_first ^ side * 2 * kChunkBytes, 0};

  using QueryStream = TileStream<typename Flash::QueryTile, kThreads, InOrder, kHeadDim>;
  if (const uint64_t row = QueryStream::first_row(p.query, batch, head, p.E); row != 0) {
    QueryStream::fill(query_tile, row, static_cast<int>(p.query.stride[2] * 2), q0, range.L, static_cast<int>(p.E),
                      true);
  } else {
    query_tile.template fill<kThreads>(HeadRows<const T>(p.query, batch, head, p.L, p.E), q0);
  }
  if constexpr (kHasMask) is_mixed = map.template fill<kThreads, kKeyTile, Flash::kQueryTile>(p, batch, head, q0);
  const int first_tile = next_tile(0);
  if (first_tile * kKeyTile < key_end) {
    if (!place.streams()) fetch(key_tile, p.key, p.E, first_tile);
    stream_keys(first_tile, place.streams());
  }
  if (p.scale <= 0.f) {
    wait_for_copies<Arch>();
    __syncthreads();
    constexpr int kRows = Flash::kQueryTile / (kThreads / 32);
    fold_scale_sign(query_tile, warp * kRows, kRows, p.scale);
  }

  OnlineSoftmax<kRowBlocks, kChange != ScoreChange::kAnyMask> softmax(
      kHasMask && mask_scales(p.mask_kind) ? 1.f : scale_log2);
  float output[kRowBlocks][2 * kBlocks][4] = {};

  for (int tile = first_tile, next; tile * kKeyTile < key_end; tile = next) {
    const int k0 = tile * kKeyTile;
    next = next_tile(tile + 1);
    const bool streams = place.streams();
    // The keys have landed, and every warp is done with the values of the tile before.
    wait_for_copies<Arch>();
    __syncthreads();
    if (!streams) fetch(value_tile, p.value, p.Ev, tile);
    if constexpr (kHasMask) {
      if (streams) stream_values(tile, true);
    }

    const int query = team_row + lane / 4, key = k0 + Flash::key(lane, side * 2 * kKeyBlocks, 0);  // the lane's first
    FloatMask<kRowBlocks, 2 * kKeyBlocks, Flash::kEarlyMaskWords, true> mask;
    if constexpr (kHasMask) mask.read_early(p, batch, head, query, key);

    // S = Q K^T
    float scores[kRowBlocks][2 * kKeyBlocks][4] = {};
#pragma unroll
    for (int k = 0; k < Flash::kSteps; ++k) {
      uint32_t q[kRowBlocks][4];
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) query_tile.load_a(q[m], lane_offset, team_block + m, k);
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
        uint32_t b[4];
        key_tile.load_b_transposed(b, lane_offset, side * kKeyBlocks + n, k);
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          Product::add(scores[m][2 * n], q[m], b[0], b[1]);
          Product::add(scores[m][2 * n + 1], q[m], b[2], b[3]);
        }
      }
      if (!kHasMask && k == 0) stream_values(tile, streams);  // while the tensor cores are busy
    }

    // What must not be attended to is replaced, so that no NaN in it survives.
    start_anew();
    if constexpr (kHasMask) mask.apply(scores, p, batch, head, query, key, scale_log2);
    if (range.is_partial(q0, k0)) {
      const TileLimit limit = range.limit(q0, k0);
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int n = 0; n < 2 * kKeyBlocks; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = (team_block + m) * 16 + lane / 4 + i / 2 * 8;
            if (!limit.sees(row, Flash::key(lane, side * 2 * kKeyBlocks + n, i))) scores[m][n][i] = -INFINITY;
          }
        }
      }
    }

    // All warps of a team must have the same references. If P takes the keys' place, every warp must be done with
    // them first.
    const int team = warp / kSides;
    const auto sync_sharers = [&] {
      if constexpr (Flash::kOwnPlace) {
        sync_threads<64>(1 + team);
      } else {
        __syncthreads();
      }
    };
    const bool outgrown = softmax.has_outgrown(scores);
    if (Flash::kOwnPlace ? sync_threads_or<64>(1 + team, outgrown) : __syncthreads_or(outgrown)) {
      float highest[kRowBlocks][2];
      softmax.find_highest(highest, scores);
      // A row of floats for each warp, where P of the team's rows will be.
      constexpr int kTeamBytes = kRowBlocks * 16 * Flash::ProbabilityTile::kRowBytes;
      float* const exchange = reinterpret_cast<float*>(shared + Flash::kProbabilityOffset + team * kTeamBytes);
#pragma unroll
      for (int i = 0; i < 2 * kRowBlocks; ++i) {
        if (lane % 4 == 0) exchange[side * 32 + i * 8 + lane / 4] = highest[i / 2][i % 2];
      }
      sync_sharers();
#pragma unroll
      for (int i = 0; i < 2 * kRowBlocks; ++i) {
        float& x = highest[i / 2][i % 2];
#pragma unroll
        for (int other = 1; other < kSides; ++other) x = fmaxf(x, exchange[(side ^ other) * 32 + i * 8 + lane / 4]);
      }
      sync_sharers();
      if (__any_sync(0xffffffffu, softmax.exceeds(highest))) softmax.raise(highest, output);
    }

    if constexpr (kHasMask) {
      if (p.dropout_p > 0.f) {
        const Dropout draw = dropout.with_seed(*p.seed);
        uint32_t dropped[kRowBlocks];
        dropped_columns(dropped, draw, static_cast<uint32_t>(p.first_batch_head) + batch * heads + head, team_row, key);
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          dropped[m] >>= side * 8 * kKeyBlocks;
#pragma unroll
          for (int i = 0; i < 8 * kKeyBlocks; ++i) {
            if (dropped[m] >> i & 1) softmax.take_out(scores[m][i / 4][i % 4], m, i % 4 / 2);
          }
        }
      }
    }

    uint32_t probability[kKeyBlocks][kRowBlocks][4];  // of this warp's half of the keys
    DroppedBlock<false, false, true> dropped_block;
    if constexpr (kChange == ScoreChange::kDropout) {
      static_assert(kKeyBlocks <= 2 && kRowBlocks <= 2);
      const Dropout draw = dropout.with_seed(*p.seed);
      asm volatile("" : "+r"(batch), "+r"(head));  // what is made of them does not stay in registers
      dropped_block.draw(draw, static_cast<uint32_t>(p.first_batch_head) + batch * heads + head, team_row / 32,
                         (k0 + side * kKeyBlocks * 16) / 32, kRowBlocks == 1 && team_row / 16 % 2 == 1,
                         kKeyBlocks == 1 && side % 2 == 1);
    }
#pragma unroll
    for (int k = 0; k < kKeyBlocks; ++k) {
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        softmax.exponentiate(scores[m][2 * k], m);
        softmax.exponentiate(scores[m][2 * k + 1], m);
        to_operand<T>(probability[k][m], scores[m][2 * k], scores[m][2 * k + 1]);
        if constexpr (kChange == ScoreChange::kDropout) dropped_block.drop(probability[k][m], dropout, m, k);
        probability_tile.put_a(probability[k][m], team_block + m, side * kKeyBlocks + k);
      }
    }
    wait_for_copies<Arch>();
    __syncthreads();  // P is complete, the values have landed, and every warp is done with the keys

    // O += P V for 16 keys of the tile.
    const auto add_values = [&](const uint32_t (&a)[kRowBlocks][4], int key_block) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        uint32_t b[4];
        value_tile.load_b(b, value_offset, key_block, kSides * n);
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          Product::add(output[m][2 * n], a[m], b[0], b[1]);
          Product::add(output[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    };
    const auto load_others = [&](uint32_t (&a)[kRowBlocks][4], int other, int k) {
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        probability_tile.load_a(a[m], probability_offset, team_block + m, (side ^ other) * kKeyBlocks + k);
      }
    };
    const bool has_next = next * kKeyTile < key_end, streams_next = has_next && place.streams();
    if constexpr (Flash::kOwnPlace) {
      if (has_next && !streams_next) fetch(key_tile, p.key, p.E, next);
#pragma unroll
      for (int k = 0; k < kKeyBlocks; ++k) {
        add_values(probability[k], side * kKeyBlocks + k);
        if (k == 0) stream_keys(next, streams_next);
      }
#pragma unroll
      for (int k = 0; k < kKeyBlocks; ++k) {
        uint32_t others[kRowBlocks][4];
        load_others(others, 1, k);
        add_values(others, (side ^ 1) * kKeyBlocks + k);
      }
    } else {
      uint32_t others[kSides][kKeyBlocks][kRowBlocks][4];  // from 1 on
#pragma unroll
      for (int other = 1; other < kSides; ++other) {
#pragma unroll
        for (int k = 0; k < kKeyBlocks; ++k) load_others(others[other][k], other, k);
      }
      __syncthreads();  // P has been read
      if (has_next && !streams_next) fetch(key_tile, p.key, p.E, next);
      if constexpr (kHasMask) {
        if (streams_next) stream_keys(next, true);
      }
#pragma unroll
      for (int k = 0; k < kKeyBlocks; ++k) {
        add_values(probability[k], side * kKeyBlocks + k);
        if (!kHasMask && k == 0) stream_keys(next, streams_next);
      }
#pragma unroll
      for (int other = 1; other < kSides; ++other) {
#pragma unroll
        for (int k = 0; k < kKeyBlocks; ++k) add_values(others[other][k], (side ^ other) * kKeyBlocks + k);
      }
    }
  }

  // The sums of all keys. Lanes of the warps of a team hold the same rows.
  wait_for_copies<Arch>();
  __syncthreads();
  float* const exchange = reinterpret_cast<float*>(shared + Flash::kKeyOffset);
#pragma unroll
  for (int i = 0; i < 2 * kRowBlocks; ++i) exchange[i * kThreads + threadIdx.x] = softmax.sum[i / 2][i % 2];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2 * kRowBlocks; ++i) {  // in the same order in all
    const float* const sums = exchange + i * kThreads + threadIdx.x % 32 + warp / kSides * (kSides * 32);
    float sum = sums[0];
#pragma unroll
    for (int other = 1; other < kSides; ++other) sum += sums[32 * other];
    softmax.sum[i / 2][i % 2] = sum;
  }

  // O and LSE.
  batch = place.batch(), head = place.head();
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float logsumexp, rest;
      float factor = softmax.finish(m, half, logsumexp, rest);
      if constexpr (kChange != ScoreChange::kNone) factor *= dropout.rescale;  // 1 without dropout
#pragma unroll
      for (int n = 0; n < 2 * kBlocks; ++n) {
        output[m][n][2 * half] *= factor;
        output[m][n][2 * half + 1] *= factor;
      }
      const int row = team_row + m * 16 + half * 8 + lane / 4;
      const bool writes = side == 0 && lane % 4 == 0 && row < p.L;
      const int64_t i = int64_t{batch * heads + head} * p.L + row;
      if (writes && p.logsumexp != nullptr) p.logsumexp[i] = logsumexp;
      if (writes && p.logsumexp_rest != nullptr) p.logsumexp_rest[i] = rest;
    }
  }
  const HeadRows<T> target(p.output, batch, head, p.L, p.Ev);
  query_tile.template store<kRowBlocks, InOrder, kSides>(output, team_block, target, team_row, side);
}

// Flash is FlashForward or FlashForwardWide, kKernel its kernel.
template <class Flash, auto kKernel, class T>
cudaError_t launch_flash_forward(const ForwardParams& p, cudaStream_t stream) {
  const float scale_log2 = p.scale == 0.f ? kLog2E : std::fabs(p.scale) * kLog2E;  // see fold_scale_sign
  const Dropout dropout = Dropout::make(p.dropout_p, 0);                           // the seed is on the device
  return launch_query_tiles<Flash, kKernel, T>(p, stream, dropout, scale_log2);
}

template <class Arch, class T, int kHeadDim, ScoreChange kChange, int kTeams = 2, bool kLarge = false>
cudaError_t launch_wide_forward(const ForwardParams& p, cudaStream_t stream) {
  return launch_flash_forward<FlashForwardWide<Arch, T, kHeadDim, kChange, kTeams, kLarge>,
                              flash_forward_wide_kernel<Arch, T, kHeadDim, kChange, kTeams, kLarge>, T>(p, stream);
}

// Blocks of four warps, or of eight if only one of those fits.
template <class Arch, class T, int kHeadDim, ScoreChange kChange>
cudaError_t launch_wide_forward_in_either_size(const ForwardParams& p, cudaStream_t stream) {
  using Eight = FlashForwardWide<Arch, T, kHeadDim, kChange, 4, false>;
  bool wants_eight = false;
  if (const auto error = wants_eight_warps<FlashForwardWide<Arch, T, kHeadDim, kChange, 2, false>, T>(p, wants_eight);
      error != cudaSuccess) {
    return error;
  }
  return wants_eight && p.shared_bytes >= Eight::kMaxSharedBytes
             ? launch_wide_forward<Arch, T, kHeadDim, kChange, 4>(p, stream)
             : launch_wide_forward<Arch, T, kHeadDim, kChange>(p, stream);
}

// Up to 256 columns; to 160 without mask and dropout they are flash_fwd.cuh's.
template <class Arch, class T, int kHeadDim>
cudaError_t flash_forward_wide(const ForwardParams& p, cudaStream_t stream) {
  if (p.mask_kind != MaskKind::kNone) {
    return launch_wide_forward_in_either_size<Arch, T, kHeadDim, ScoreChange::kAnyMask>(p, stream);
  }
  if (p.dropout_p > 0.f) return launch_wide_forward_in_either_size<Arch, T, kHeadDim, ScoreChange::kDropout>(p, stream);
  if constexpr (kHeadDim > 160) {
    // Its blocks have twice the rows of those below, and have to occupy the chip as well.
    using Large = FlashForwardWideStream<Arch, T, kHeadDim>;
    using OneStage = FlashForwardWideStream<Arch, T, kHeadDim, 1>;
    int multiprocessors = 0;
    if (const auto error = count_multiprocessors(multiprocessors); error != cudaSuccess) return error;
    if (streams_forward(p, kMaxPosition) &&
        2 * ((p.L + Large::kQueryTile - 1) / Large::kQueryTile) * p.B * p.H > multiprocessors) {
      if (p.shared_bytes >= Large::kSharedBytes) return flash_forward_stream<Arch, T, kHeadDim>(p, stream);
      if constexpr (kHeadDim > 192) {
        if (p.shared_bytes >= OneStage::kSharedBytes) return flash_forward_stream<Arch, T, kHeadDim, 1>(p, stream);
      }
    }
  }
  if constexpr (kHeadDim <= 160) {
    return cudaErrorInvalidValue;
  } else if constexpr (kHeadDim <= 192) {
    return launch_wide_forward_in_either_size<Arch, T, kHeadDim, ScoreChange::kNone>(p, stream);
  } else {
    using Large = FlashForwardWide<Arch, T, kHeadDim, ScoreChange::kNone, 2, true>;
    return p.shared_bytes >= Large::kMaxSharedBytes
               ? launch_wide_forward<Arch, T, kHeadDim, ScoreChange::kNone, 2, true>(p, stream)
               : launch_wide_forward<Arch, T, kHeadDim, ScoreChange::kNone>(p, stream);
  }
}

// Up to 512 columns. One team a block where shared memory (163 KB on sm80, 227 KB on sm90) or the chip's
// multiprocessors want it. Chips with 99 KB have no place for it.
template <class Arch, class T, int kTeams>
cudaError_t flash_forward_teams(const ForwardParams& p, cudaStream_t stream) {
  return p.mask_kind == MaskKind::kNone && p.dropout_p == 0.f
             ? launch_wide_forward<Arch, T, 512, ScoreChange::kNone, kTeams>(p, stream)
             : launch_wide_forward<Arch, T, 512, ScoreChange::kAnyMask, kTeams>(p, stream);  // and dropout
}
template <class Arch, class T>
cudaError_t flash_forward_widest(const ForwardParams& p, cudaStream_t stream) {
  using Large = FlashForwardWide<Arch, T, 512, ScoreChange::kAnyMask, 2, false>;
  int multiprocessors = 0;
  if (const auto error = count_multiprocessors(multiprocessors); error != cudaSuccess) return error;
  const bool fills = (p.L + Large::kQueryTile - 1) / Large::kQueryTile * p.B * p.H >= multiprocessors;
  return fills && p.shared_bytes >= Large::kMaxSharedBytes ? flash_forward_teams<Arch, T, 2>(p, stream)
                                                           : flash_forward_teams<Arch, T, 1>(p, stream);
}

}  // namespace sdpa
