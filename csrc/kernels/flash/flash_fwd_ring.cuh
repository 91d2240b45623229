// Flash attention forward without a mask or with one of keys, or with dropout, for operands whose rows are whole
// aligned chunks and for many keys: flash_fwd.cuh's loop by twice the warps. Of a tile's copies, which take 10 to 20 %
// of the time, each warp has half as many, and no warp waits for the others: barriers in shared memory tell what has
// landed and what may be overwritten.
#pragma once

#include <cuda_runtime.h>

#include "../arch/arch.h"
#include "../arch/barrier.h"
#include "../attn/block_range.h"
#include "../attn/launch.h"
#include "../attn/params.h"
#include "../attn/softmax.h"
#include "bool_mask.cuh"
#include "forward_parts.cuh"
#include "score_change.h"
#include "score_dropout.cuh"
#include "tile.cuh"
#include "tile_stream.cuh"

namespace sdpa {

// kChange: kNone, kDropout or kKeyPadding.
template <class Arch, class T, int kHeadDim, ScoreChange kChange>
struct FlashForwardRing {
  static constexpr bool kPadding = kChange == ScoreChange::kKeyPadding, kDrops = kChange == ScoreChange::kDropout;
  static constexpr int kWarps = 8, kThreads = kWarps * 32;
  static constexpr int kRowBlocks = 2, kWarpRows = kRowBlocks * 16, kQueryTile = kWarps * kWarpRows;
  static constexpr int kKeyTile = 64;
  static constexpr int kSteps = kHeadDim / 16;  // k-steps of Q K^T
  // Tiles in shared memory, and how many of them are on their way while one is worked on.
  static constexpr int kStages = kHeadDim > 96 ? 3 : 4, kAhead = kStages / 2;
  // After which k-step of Q K^T that tile's copies are issued.
  static constexpr int kKeysAfter = 0, kValuesAfter = 2;
  // Where the head's keys and values are: in registers, or, where there are none left, in shared memory, as is what a
  // mask wants to know.
  static constexpr bool kRowsInPlace = kHeadDim > 96 || kDrops, kHasPlace = kRowsInPlace || kPadding;
  using QueryTile = SharedTile<T, kQueryTile, kHeadDim, Arch>;
  using KeyTile = SharedTile<T, kKeyTile, kHeadDim, Arch>;  // of values too
  using KeyOrder = std::conditional_t<kDrops, PairedOctets, InOrder>;
  using Range = BlockRange<kQueryTile, kKeyTile>;
  using Barrier = SharedBarrier<Arch>;
  static constexpr int kBarrierOffset = QueryTile::kBytes + 2 * kStages * KeyTile::kBytes;
  static constexpr int kPlaceOffset = kBarrierOffset + 2 * kStages * Barrier::kBytes;
  static constexpr int kListOffset = kPlaceOffset + (kHasPlace ? HeadPlace::kBytes : 0);
  using MaskTile = PaddingTile<kKeyTile>;
  static constexpr int kMaskOffset = kListOffset + (kPadding ? TileList::kBytes : 0);
  static_assert(TileMap::kBytes <= KeyTile::kBytes);
  static constexpr int kSharedBytes = kMaskOffset + (kPadding ? kStages * MaskTile::kBytes : 0);
  static_assert(kSharedBytes <= 163 * 1024);
};

template <class Arch, class T, int kHeadDim, ScoreChange kChange>
__global__ void __launch_bounds__(FlashForwardRing<Arch, T, kHeadDim, kChange>::kThreads, 1)
    flash_forward_ring_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ BlockOrder order,
                              const __grid_constant__ Dropout dropout, const float scale_log2) {
  using Flash = FlashForwardRing<Arch, T, kHeadDim, kChange>;
  constexpr bool kPadding = Flash::kPadding;
  using KeyTile = typename Flash::KeyTile;
  using Product = Mma<Arch, T>;
  constexpr int kRowBlocks = Flash::kRowBlocks, kKeyTile = Flash::kKeyTile, kSteps = Flash::kSteps;
  constexpr int kStages = Flash::kStages;
  extern __shared__ __align__(1024) unsigned char shared[];

  ForwardWork work{};
  if (!work.find<Flash::kQueryTile>(p, order)) return;
  const int q0 = work.q0, key_end = work.key_end, full_end = work.full_end, key_head = work.key_head;
  const int heads = static_cast<int>(p.H);
  int batch = work.batch, head = work.head;
  const typename Flash::Range range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};

  // Shared memory: query | stages of keys and values | their barriers. The output leaves through the query's place.
  const uint32_t base = shared_address(shared);
  const typename Flash::QueryTile query_tile{base};
  const auto key_tile = [&](int stage) {
    return KeyTile{base + Flash::QueryTile::kBytes + stage * 2 * KeyTile::kBytes};
  };
  const auto value_tile = [&](int stage) { return KeyTile{key_tile(stage).base + KeyTile::kBytes}; };
  const auto full = [&](int stage) {
    return typename Flash::Barrier{base + Flash::kBarrierOffset + stage * 2 * Flash::Barrier::kBytes};
  };
  const auto free = [&](int stage) { return typename Flash::Barrier{full(stage).address + Flash::Barrier::kBytes}; };
  if (threadIdx.x < kStages) {
    full(threadIdx.x).init(Flash::kThreads);
    free(threadIdx.x).init(Flash::kWarps * kWarpArrivals);
  }
  using Stream = TileStream<typename Flash::QueryTile, Flash::kThreads, InOrder, kHeadDim>;
  const uint64_t own_key_row = Stream::first_row(p.key, batch, key_head, p.E);
  const uint64_t own_value_row = Stream::first_row(p.value, batch, key_head, p.Ev);
  const HeadPlace place{base + Flash::kPlaceOffset};
  if (Flash::kHasPlace && threadIdx.x == 0) place.put(own_key_row, own_value_row, batch, head, key_head);
  const auto key_row = [&] { return Flash::kRowsInPlace ? place.key_row() : own_key_row; };
  const auto value_row = [&] { return Flash::kRowsInPlace ? place.value_row() : own_value_row; };
  const auto mask_tile = [&](int stage) {
    return typename Flash::MaskTile{base + Flash::kMaskOffset + stage * Flash::MaskTile::kBytes};
  };
  // First keys of tiles, of padding with the lowest bit set if all the tile's keys take part.
  const TileList list{base + Flash::kListOffset};
  const auto first_key = [](int tile) { return kPadding ? tile & -kKeyTile : tile; };
  const auto next_tile = [&](int tile, int number) {
    if constexpr (kPadding) {
      const uint32_t step = list.step(number);
      return first_key(tile) + static_cast<int>(step / 2 * kKeyTile + step % 2);
    } else {
      return tile + kKeyTile;
    }
  };
  if constexpr (kPadding) {
    const TileMap map{reinterpret_cast<uint16_t*>(shared + Flash::QueryTile::kBytes)};  // where keys come later
    map.template fill<Flash::kThreads, kKeyTile>(p, batch, head);
    if (threadIdx.x < 32) list.make(map, (range.S + kKeyTile - 1) / kKeyTile);
  }
  __syncthreads();

  const int warp = threadIdx.x / 32;
  const int warp_block = warp * kRowBlocks;  // of 16 rows, in the query tile
  const int warp_row = q0 + warp * Flash::kWarpRows;
  const auto stream_keys = [&](int k0, int stage) {
    fill_share<Flash::kWarps, typename Flash::KeyOrder>(key_tile(stage), key_row(),
                                                        static_cast<int>(p.key.stride[2] * 2), k0, range.S,
                                                        static_cast<int>(p.E), k0 < key_end);
  };
  const auto stream_values = [&](int k0, int stage, bool needs_mask) {
    fill_share<Flash::kWarps, typename Flash::KeyOrder>(value_tile(stage), value_row(),
                                                        static_cast<int>(p.value.stride[2] * 2), k0, range.S,
                                                        static_cast<int>(p.Ev), k0 < key_end);
    if constexpr (kPadding) {
      if (k0 < key_end && needs_mask) {
        mask_tile(stage).fill(p, place.batch(), place.head(), k0);
        fence_block();
      }
    }
    full(stage).arrive_with_copies();
  };
  fill_warp_rows<kHeadDim>(query_tile, warp * Flash::kWarpRows, Flash::kWarpRows,
                           Stream::first_row(p.query, batch, head, p.E), static_cast<int>(p.query.stride[2] * 2),
                           warp_row, range.L, static_cast<int>(p.E));
  cp_async_end_group();
  // The tiles that are on their way, and the next one to be copied, the number-th.
  int on_way[Flash::kAhead], ahead = next_tile(-kKeyTile, 0), number = Flash::kAhead;
#pragma unroll
  for (int stage = 0; stage < Flash::kAhead; ++stage) {
    stream_keys(first_key(ahead), stage);
    stream_values(first_key(ahead), stage, first_key(ahead) == ahead);
    on_way[stage] = ahead;
    ahead = next_tile(ahead, stage + 1);
  }
  cp_async_end_group();
  cp_async_wait_groups<1>();
  __syncwarp();

  const auto lane_offset = KeyTile::lane_offset();
  OnlineSoftmax<kRowBlocks, true> softmax(scale_log2);
  float output[kRowBlocks][kHeadDim / 8][4] = {};
  int stage = 0, parity = 0, next_stage = Flash::kAhead, next_parity = 1;
#pragma unroll 1
  while (first_key(on_way[0]) < key_end) {
    const int k0 = first_key(on_way[0]), copied = kPadding ? first_key(ahead) : k0 + Flash::kAhead * kKeyTile;
    const bool needs_mask = kPadding && k0 == on_way[0];
    [[maybe_unused]] int after = 0;
    if constexpr (kPadding && kIsBeforeSm90) {  // it spills otherwise
      free(next_stage).wait(next_parity);
      full(stage).wait(parity);
    } else {  // one after the other the answers would take twice as long
      const bool is_free = free(next_stage).test(next_parity), is_full = full(stage).test(parity);
      if (!is_free) free(next_stage).wait(next_parity);
      if (!is_full) full(stage).wait(parity);
    }
    const KeyTile keys = key_tile(stage), values = value_tile(stage);

    float scores[kRowBlocks][kKeyTile / 8][4] = {};
    multiply_scores<Product, kSteps>(
        scores, keys, lane_offset,
        [&](uint32_t (&q)[kRowBlocks][4], int k) {
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) query_tile.load_a(q[m], lane_offset, warp_block + m, k);
        },
        [&](int k) {
          if (k == Flash::kKeysAfter) stream_keys(copied, next_stage);
          if (k == Flash::kValuesAfter) stream_values(copied, next_stage, kPadding && copied == ahead);
          if (kPadding && k == Flash::kValuesAfter) after = next_tile(ahead, ++number);
        });
    if constexpr (kPadding) {
      if (needs_mask) mask_tile(stage).apply(scores);
    }
    if (k0 + kKeyTile > full_end) hide_unseen<typename Flash::KeyOrder>(scores, range.limit(q0, k0), warp_block);
    softmax.see(scores, output, k0 == 0);

    if constexpr (Flash::kDrops) {
      DroppedBlock<false, false, true> dropped;  // of 32 keys
#pragma unroll
      for (int k = 0; k < kKeyTile / 16; ++k) {
        if (k % 2 == 0) {
          const uint32_t batch_head = static_cast<uint32_t>(p.first_batch_head) + place.batch() * heads + place.head();
          dropped.draw(dropout.with_seed(*p.seed), batch_head, q0 / 32 + fresh_thread_index() / 32, (k0 + k * 16) / 32);
        }
        uint32_t probability[kRowBlocks][4];
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          softmax.exponentiate(scores[m][2 * k], m);
          softmax.exponentiate(scores[m][2 * k + 1], m);
          to_operand<T>(probability[m], scores[m][2 * k], scores[m][2 * k + 1]);
          dropped.drop_paired(probability[m], dropout, m, k % 2);
        }
        add_products<Product>(output, probability, values, lane_offset, k);
      }
    } else {
      add_values<T, Product>(output, softmax, scores, values, lane_offset);
    }
    free(stage).arrive_warp();
    if constexpr (kPadding) {
#pragma unroll
      for (int i = 0; i + 1 < Flash::kAhead; ++i) on_way[i] = on_way[i + 1];
      on_way[Flash::kAhead - 1] = ahead;
      ahead = after;
    } else {
      on_way[0] += kKeyTile;
    }
    if (++stage == kStages) stage = 0, parity ^= 1;
    if (++next_stage == kStages) next_stage = 0, next_parity ^= 1;
  }

  // O and LSE.
  if constexpr (Flash::kHasPlace) batch = place.batch(), head = place.head();
  float factors[kRowBlocks][2];
  write_statistics(factors, softmax, p, batch * heads + head, warp_row);
  if constexpr (Flash::kDrops) {
#pragma unroll
    for (int i = 0; i < 4; ++i) factors[i / 2][i % 2] *= dropout.rescale;
  }
  write_output<T>(
      output, factors, query_tile, [&](int m) { return warp_block + m; }, p,
      Stream::first_row(p.output, batch, head, p.Ev), warp_row);
}

// For what has_whole_chunks takes. `done` tells whether it has room here and enough to do.
template <class Arch, class T, int kHeadDim, ScoreChange kChange>
cudaError_t flash_forward_ring(const ForwardParams& p, cudaStream_t stream, bool& done) {
  using Flash = FlashForwardRing<Arch, T, kHeadDim, kChange>;
  constexpr auto kKernel = flash_forward_ring_kernel<Arch, T, kHeadDim, kChange>;
  int multiprocessors = 0;
  if (const auto error = count_multiprocessors(multiprocessors); error != cudaSuccess) return error;
  done = p.shared_bytes >= Flash::kSharedBytes && forward_order<Flash, T>(p).blocks() >= multiprocessors;
  return done ? launch_query_tiles<Flash, kKernel, T>(p, stream, Dropout::make(p.dropout_p, 0), p.scale * kLog2E)
              : cudaSuccess;
}

}  // namespace sdpa
