// Flash attention forward without mask and dropout, for operands whose rows are whole aligned chunks: flash_fwd.cuh's
// loop, without its other ways to copy. Where rows are short a block takes one query tile after another, and the next
// one's first copies are under way before the last scores of this one are there: what lies before and after the loop
// is 10 to 20 % of a block with 512 keys.
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
#include "flash_fwd_wide_stream.cuh"
#include "forward_parts.cuh"
#include "tile.cuh"
#include "tile_stream.cuh"

namespace sdpa {

constexpr int64_t kMostStreamedKeys = 1024;

template <class Arch, class T, int kHeadDim>
struct FlashForwardStream {
  static constexpr int kPlaces = kHeadDim <= 64 ? 4 : 3;  // of tiles of keys or values, as in flash_fwd.cuh
  static constexpr bool kRotates = kPlaces == 3;
  static constexpr int kWarps = 4, kThreads = kWarps * 32;
  static constexpr int kRowBlocks = 2, kWarpRows = kRowBlocks * 16, kQueryTile = kWarps * kWarpRows;
  static constexpr int kKeyTile = 64;
  static constexpr int kSteps = kHeadDim / 16;  // k-steps of Q K^T
  static constexpr bool kQueryInRegisters = kHeadDim <= 64;
  static constexpr int kBlocksPerSm = kHeadDim <= 32 ? 3 : 2;
  static constexpr bool kTurnsRound = false;
  static constexpr bool kTriesZero =  // see OnlineSoftmax; at 32 it is 1 % slower, and 128 columns may spill
      kHeadDim > 32 && !(kHeadDim == 128 && kIsBeforeSm90);
  // One copy is issued after the first k-step of Q K^T, the other after this one.
  static constexpr int kOtherCopyAfter = kHeadDim <= 32 ? 0 : kHeadDim <= 64 ? 1 : kHeadDim == 128 ? 7 : 4;

  static constexpr int kCols = kHeadDim <= 64 ? kHeadDim : 128;  // of a row in shared memory
  using QueryTile = SharedTile<T, kQueryTile, kCols, Arch>;
  using KeyTile = SharedTile<T, kKeyTile, kCols, Arch>;                          // of values too
  static constexpr bool kRecomputeAddresses = kHeadDim == 128 && kIsBeforeSm90;  // it spills otherwise
  using Stream = TileStream<KeyTile, kThreads, InOrder, kHeadDim, kRecomputeAddresses>;
  using Range = BlockRange<kQueryTile, kKeyTile>;
  static constexpr int kPlaceOffset = QueryTile::kBytes + kPlaces * KeyTile::kBytes;
  static constexpr int kBarrierOffset = kPlaceOffset + 2 * WorkPlace::kBytes;
  using Barrier = SharedBarrier<Arch>;
  static constexpr int kSharedBytes = kBarrierOffset + Barrier::kBytes;
  static_assert(kKeyTile == kWarps * 16);  // the output leaves through a tile of keys, 16 rows of a warp at once
  static_assert(kSharedBytes <= Arch::kSharedBytes);
};

template <class Arch, class T, int kHeadDim>
__global__ void __launch_bounds__(FlashForwardStream<Arch, T, kHeadDim>::kThreads,
                                  FlashForwardStream<Arch, T, kHeadDim>::kBlocksPerSm)
    flash_forward_stream_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ BlockOrder order,
                                const float scale_log2) {
  using Flash = FlashForwardStream<Arch, T, kHeadDim>;
  using Product = Mma<Arch, T>;
  constexpr int kRowBlocks = Flash::kRowBlocks, kKeyTile = Flash::kKeyTile, kSteps = Flash::kSteps;
  constexpr bool kRotates = Flash::kRotates;
  extern __shared__ __align__(1024) unsigned char shared[];

  // Shared memory: query | two stages of keys | two of values (or places in rotation) | what is known of this query
  // tile and the next.
  const uint32_t base = shared_address(shared);
  const typename Flash::QueryTile query_tile{base};
  const auto key_tile = [&](int stage) {
    return typename Flash::KeyTile{base + Flash::QueryTile::kBytes + stage * Flash::KeyTile::kBytes};
  };
  const auto value_tile = [&](int stage) { return key_tile(!kRotates ? 2 + stage : stage == 2 ? 0 : stage + 1); };
  const auto place = [&](int slot) { return WorkPlace{base + Flash::kPlaceOffset + slot * WorkPlace::kBytes}; };
  const auto find_work = [&](int slot, unsigned number) {
    int tile, batch_head;
    order.find(number, tile, batch_head);
    place(slot).put(p, batch_head, static_cast<int>(order.tiles - 1 - tile) * Flash::kQueryTile);  // the longest first
  };
  const auto stream_keys = [&](int slot, int tile, int stage, bool run) {
    Flash::Stream::fill(key_tile(stage), place(slot).key_row(), static_cast<int>(p.key.stride[2] * 2), tile * kKeyTile,
                        static_cast<int>(p.S), static_cast<int>(p.E), run);
  };
  const auto stream_values = [&](int slot, int tile, int stage, bool run) {
    Flash::Stream::fill(value_tile(stage), place(slot).value_row(), static_cast<int>(p.value.stride[2] * 2),
                        tile * kKeyTile, static_cast<int>(p.S), static_cast<int>(p.Ev), run);
  };
  const int warp = threadIdx.x / 32;
  const int warp_block = warp * kRowBlocks;  // of 16 rows, in the query tile
  // A warp fetches its own rows, so that it need not wait for others to be done with theirs.
  const auto stream_query = [&](int slot) {
    fill_warp_rows<kHeadDim>(query_tile, warp * Flash::kWarpRows, Flash::kWarpRows, place(slot).query_row(),
                             static_cast<int>(p.query.stride[2] * 2), place(slot).first_row() + warp * Flash::kWarpRows,
                             static_cast<int>(p.L), static_cast<int>(p.E));
  };
  const auto lane_offset = Flash::KeyTile::lane_offset();
  const unsigned works = static_cast<unsigned>(order.tiles * order.heads);

  const typename Flash::Barrier keys_done{base + Flash::kBarrierOffset};
  if (threadIdx.x == 0) {
    keys_done.init(Flash::kWarps * kWarpArrivals);
    find_work(0, blockIdx.x);
  }
  __syncthreads();
  stream_query(0);
  stream_keys(0, 0, 0, true);
  if constexpr (!kRotates) stream_values(0, 0, 0, true);

  int stage = 0;  // of the keys
  for (unsigned number = blockIdx.x, slot = 0; number < works; number += gridDim.x, slot ^= 1) {
    const int turn = slot;
    const int q0 = place(slot).first_row();
    const typename Flash::Range range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};
    // Keys from here on are seen by no query of the block.
    const int key_end = p.is_causal ? min(range.S, q0 + Flash::kQueryTile) : range.S;
    if constexpr (Flash::kTriesZero) __builtin_assume(key_end > 0);  // or the output is set to zero twice
    const bool is_last_work = number + gridDim.x >= works;

    uint32_t query_registers[Flash::kQueryInRegisters ? kSteps : 1][kRowBlocks][4];
    OnlineSoftmax<kRowBlocks, true> softmax(scale_log2);
    float output[kRowBlocks][kHeadDim / 8][4] = {};

    for (int k0 = 0; k0 < key_end; k0 += kKeyTile) {
      const bool is_last = k0 + kKeyTile >= key_end, has_next = !(is_last && is_last_work);
      const int next_slot = is_last ? slot ^ 1 : slot, next = is_last ? 0 : k0 / kKeyTile + 1;
      const int next_stage = !kRotates ? stage ^ 1 : stage == 0 ? 2 : stage - 1;
      // This tile has landed, and every warp is done with the one before, whose stage is filled next.
      wait_for_copies<Arch>();
      __syncthreads();
      if (k0 == 0) {
        if (threadIdx.x == 0 && !is_last_work) find_work(slot ^ 1, number + gridDim.x);
        if constexpr (Flash::kQueryInRegisters) {
#pragma unroll
          for (int k = 0; k < kSteps; ++k) {
#pragma unroll
            for (int m = 0; m < kRowBlocks; ++m) {
              query_tile.load_a(query_registers[k][m], lane_offset, warp_block + m, k);
            }
          }
        }
      }

      float scores[kRowBlocks][kKeyTile / 8][4] = {};
      multiply_scores<Product, kSteps>(
          scores, key_tile(stage), lane_offset,
          [&](uint32_t (&q)[kRowBlocks][4], int k) {
#pragma unroll
            for (int m = 0; m < kRowBlocks; ++m) {
              if constexpr (Flash::kQueryInRegisters) {
#pragma unroll
                for (int i = 0; i < 4; ++i) q[m][i] = query_registers[k][m][i];
              } else {
                query_tile.load_a(q[m], lane_offset, warp_block + m, k);
              }
            }
          },
          [&](int k) {
            if constexpr (kRotates) {
              if (k == 0) {
                stream_values(slot, k0 / kKeyTile, stage, true);
                cp_async_end_group();
              }
              if (k == Flash::kOtherCopyAfter) stream_keys(next_slot, next, next_stage, has_next);
            } else {
              if (k == 0) stream_keys(next_slot, next, next_stage, has_next);
              if (k == Flash::kOtherCopyAfter) stream_values(next_slot, next, next_stage, has_next);
            }
          });
      if (is_last) {
        keys_done.arrive_warp();
        if (has_next) stream_query(slot ^ 1);
      }

      if (range.is_partial(q0, k0)) hide_unseen(scores, range.limit(q0, k0), warp_block);
      softmax.template see<Flash::kTriesZero>(scores, output, k0 == 0);

      if constexpr (kRotates) {  // the values have landed
        cp_async_wait_groups<0>();
        __syncthreads();
      }
      add_values<T, Product>(output, softmax, scores, value_tile(stage), lane_offset);
      stage = next_stage;
    }

    // O and LSE. The output leaves through the place of the last keys, once every warp is done with them.
    const int warp_row = q0 + warp * Flash::kWarpRows;
    float factors[kRowBlocks][2];
    write_statistics(factors, softmax, p, place(slot).batch_head(), warp_row);
    keys_done.wait(turn);
    write_output<T>(
        output, factors, key_tile(kRotates ? (stage + 1) % 3 : stage ^ 1), [&](int) { return warp; }, p,
        place(slot).output_row(), warp_row);
  }
}

// Flash is FlashForwardStream or FlashForwardWideStream, kKernel its kernel.
template <class Flash, auto kKernel, class T>
cudaError_t launch_forward_stream(const ForwardParams& p, cudaStream_t stream) {
  auto order = forward_order<Flash, T>(p);
  if (std::max({p.L, p.S, p.B * p.H}) > kMaxPosition) return cudaErrorInvalidValue;
  int64_t blocks = order.blocks();
  if (blocks == 0) return cudaSuccess;
  if (const auto error = allow_shared_bytes<kKernel>(Flash::kSharedBytes); error != cudaSuccess) return error;
  int multiprocessors = 0;
  if (const auto error = count_multiprocessors(multiprocessors); error != cudaSuccess) return error;
  const int64_t at_once = multiprocessors * Flash::kBlocksPerSm;
  if (p.S > Flash::kKeyTile && p.S <= kMostStreamedKeys && blocks > at_once) {
    if (!p.is_causal) {
      blocks = at_once;
    } else if (Flash::kTurnsRound && order.tiles <= at_once) {  // a round: all query tiles of some heads
      order.heads_at_once = std::min(order.heads, at_once / order.tiles);
      blocks = order.tiles * order.heads_at_once;
    }
  }
  kKernel<<<static_cast<unsigned>(blocks), Flash::kThreads, Flash::kSharedBytes, stream>>>(p, order, p.scale * kLog2E);
  return cudaGetLastError();
}

// Whether the rows of all operands are whole aligned chunks, with a stride of 32 bits.
inline bool has_whole_chunks(const ForwardParams& p) {
  const auto is_aligned = [](const Operand& x, int64_t cols) {
    const auto bits = reinterpret_cast<uint64_t>(x.data) |
                      static_cast<uint64_t>((x.stride[0] | x.stride[1] | x.stride[2] | cols) * 2);
    return bits % kChunkBytes == 0 && x.stride[3] == 1 && x.stride[2] * 2 == static_cast<int>(x.stride[2] * 2);
  };
  return p.scale > 0.f && p.S > 0 && p.L / 64 * p.B * p.H < BlockOrder::kMaxGridX && is_aligned(p.query, p.E) &&
         is_aligned(p.key, p.E) && is_aligned(p.value, p.Ev) && is_aligned(p.output, p.Ev);
}
// Whether flash_forward_stream takes the call and is the faster one, which it is up to so many keys.
inline bool streams_forward(const ForwardParams& p, int64_t most_keys = kMostStreamedKeys) {
  return p.mask_kind == MaskKind::kNone && p.dropout_p == 0.f && p.S <= most_keys && has_whole_chunks(p);
}

template <class Arch, class T, int kHeadDim, int kWideStages = 2>
cudaError_t flash_forward_stream(const ForwardParams& p, cudaStream_t stream) {
  if constexpr (kHeadDim <= 128) {
    return launch_forward_stream<FlashForwardStream<Arch, T, kHeadDim>, flash_forward_stream_kernel<Arch, T, kHeadDim>,
                                 T>(p, stream);
  } else {
    return launch_forward_stream<FlashForwardWideStream<Arch, T, kHeadDim, kWideStages>,
                                 flash_forward_wide_stream_kernel<Arch, T, kHeadDim, kWideStages>, T>(p, stream);
  }
}

}  // namespace sdpa
