// Flash attention forward on Hopper: a warp copies boxes of keys and values to shared memory, and warpgroups of 64
// queries each multiply them by wgmma. A warpgroup's scores of the next tile are on their way while it takes the
// exponentials of this one, and the warpgroups take turns, so that one is at its exponentials while another multiplies.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "../arch/arch.h"
#include "../arch/barrier.h"
#include "../arch/mma.h"
#include "../arch/tensor_copy.h"
#include "../arch/wgmma.h"
#include "../attn/block_range.h"
#include "../attn/launch.h"
#include "../attn/params.h"
#include "../attn/softmax.h"
#include "forward_parts.cuh"
#include "hopper.cuh"
#include "tile.cuh"

namespace sdpa {

template <class T, int kHeadDim>
struct FlashForwardSm90 {
  static constexpr int kWarpgroups = kHeadDim <= 64 ? 3 : 2;  // that multiply; one more copies
  static constexpr int kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kRegisters = kWarpgroups == 3 ? 160 : 240, kCopyRegisters = kWarpgroups == 3 ? 32 : 24;
  static constexpr int kQueryTile = kWarpgroups * 64, kKeyTile = kHeadDim <= 128 ? 128 : kHeadDim <= 192 ? 112 : 64;
  static constexpr int kStages = 2;
  // Whether a tile's sums tell that its scores are out of range, rather than a look at them before their exponentials:
  // 4 to 10 % faster at 128 columns, slower at 64.
  static constexpr bool kTestsSums = kHeadDim > 64;
  static constexpr int kBoxes = kHeadDim / kBoxCols;
  using Range = BlockRange<kQueryTile, kKeyTile>;
  using Barrier = SharedBarrier<Sm90>;

  // Shared memory: query | stages of keys | of values | barriers.
  using QueryTile = BoxedTile<T, kQueryTile, kHeadDim, Sm90>;
  using KeyTile = BoxedTile<T, kKeyTile, kHeadDim, Sm90>;  // of values, too
  static constexpr int kBarrierOffset = QueryTile::kBytes + 2 * kStages * KeyTile::kBytes;
  static constexpr int kSharedBytes = kBarrierOffset + 2 * (1 + 2 * kStages) * Barrier::kBytes;
  static_assert(kSharedBytes <= Sm90::kSharedBytes);

  // Tiles of keys are taken from the last to the first, so that those that need a predicate come first.
  static __device__ __forceinline__ int last_tile(const ForwardWork& work) {
    return (work.key_end - 1) / kKeyTile * kKeyTile;
  }
};

// The works of a block, one after the other: query tiles of a head. Under causality it takes them in pairs, a tile and
// the one as far from the other end, so that all pairs have about as many keys.
struct ForwardWorks {
  const BlockOrder& order;  // of query tiles or, under causality, of pairs
  uint32_t number = blockIdx.x;
  bool is_second = false;

  // False if there is no other.
  template <int kQueryTile>
  __device__ __forceinline__ bool next(const ForwardParams& p, ForwardWork& work) {
    const int last_tile = (static_cast<int>(p.L) - 1) / kQueryTile;
    if (number >= static_cast<uint32_t>(order.tiles * order.heads)) return false;
    int tile;
    order.find(number, tile, work.batch_head);
    work.take<kQueryTile>(p, is_second ? tile : last_tile - tile);
    is_second = p.is_causal && !is_second && tile != last_tile - tile;
    if (!is_second) number += gridDim.x;
    return true;
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(FlashForwardSm90<T, kHeadDim>::kThreads, 1)
    flash_forward_sm90_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ BlockOrder order,
                              const __grid_constant__ CUtensorMap query_map,
                              const __grid_constant__ CUtensorMap key_map,
                              const __grid_constant__ CUtensorMap value_map, const float scale_log2) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Flash = FlashForwardSm90<T, kHeadDim>;
  using Barrier = typename Flash::Barrier;
  using QueryTile = typename Flash::QueryTile;
  using KeyTile = typename Flash::KeyTile;
  constexpr int kKeyTile = Flash::kKeyTile, kStages = Flash::kStages;
  extern __shared__ __align__(1024) unsigned char shared[];

  const uint32_t base = shared_address(shared);
  const QueryTile query_tile{base};
  const auto key_tile = [&](int stage) { return KeyTile{base + QueryTile::kBytes + stage * KeyTile::kBytes}; };
  const auto value_tile = [&](int stage) { return key_tile(kStages + stage); };
  // Two barriers for each: it is full, it is free.
  const auto barrier = [&](int n) { return Barrier{base + Flash::kBarrierOffset + n * Barrier::kBytes}; };
  const Barrier query_full = barrier(0), query_free = barrier(1);
  const auto keys_full = [&](int stage) { return barrier(2 + 2 * stage); };
  const auto keys_free = [&](int stage) { return barrier(3 + 2 * stage); };
  const auto values_full = [&](int stage) { return keys_full(kStages + stage); };
  const auto values_free = [&](int stage) { return keys_free(kStages + stage); };
  if (threadIdx.x == 0) {
    for (int n = 0; n < 2 * (1 + 2 * kStages); ++n) {
      barrier(n).init(n % 2 == 0 ? 1 : Flash::kWarpgroups * 4 * kWarpArrivals);
    }
    fence_barrier_init();
  }
  __syncthreads();

  ForwardWorks works{order};
  ForwardWork work;
  RingPlace<kStages> place;
  int query_parity = 0;
  const int warpgroup = threadIdx.x / 128 - 1;
  if (warpgroup < 0) {
    want_fewer_registers<Flash::kCopyRegisters>();
    if (threadIdx.x != 0) return;
    const auto copy = [&](const auto& tile, const CUtensorMap& map, int row, int head, Barrier full) {
      expect_bytes(full.address, tile.kBytes);
#pragma unroll
      for (int n = 0; n < Flash::kBoxes; ++n) {
        copy_box(tile.box(n).base, map, n * kBoxCols, row, head, work.batch, full.address);
      }
    };
    for (; works.next<Flash::kQueryTile>(p, work); query_parity ^= 1) {
      query_free.wait(query_parity ^ 1);
      copy(query_tile, query_map, work.q0, work.head, query_full);
      for (int k0 = Flash::last_tile(work); k0 >= 0; k0 -= kKeyTile, ++place.number) {
        const int stage = place.stage(), parity = place.parity();
        keys_free(stage).wait(parity ^ 1);
        copy(key_tile(stage), key_map, k0, work.key_head, keys_full(stage));
        values_free(stage).wait(parity ^ 1);
        copy(value_tile(stage), value_map, k0, work.key_head, values_full(stage));
      }
    }
    return;
  }

  want_more_registers<Flash::kRegisters>();
  const int warp_block = warpgroup * 4 + threadIdx.x / 32 % 4;  // of 16 rows, in the query tile
  const typename Flash::Range range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};
  // Turns: a warpgroup's begins when the one before it has issued its products.
  constexpr int kFirstTurn = 1, kTwoGroups = 256;
  const auto take_turn = [&] { sync_threads<kTwoGroups>(kFirstTurn + warpgroup); };
  const auto give_turn = [&] {
    arrive_threads<kTwoGroups>(kFirstTurn + (warpgroup + 1 == Flash::kWarpgroups ? 0 : warpgroup + 1));
  };
  if (warpgroup == Flash::kWarpgroups - 1) give_turn();

#pragma unroll 1
  for (; works.next<Flash::kQueryTile>(p, work); query_parity ^= 1) {
    int k0 = Flash::last_tile(work);
    OnlineSoftmax<1, true> softmax(scale_log2);
    float output[1][kHeadDim / 8][4] = {};
    float scores[1][kKeyTile / 8][4];
    uint32_t probability[kKeyTile / 16][4];
    const auto multiply_scores = [&](int stage) {
      multiply_rows<T, kHeadDim / 16>(scores[0], query_tile.base + warpgroup * 64 * kBoxRowBytes,
                                      QueryTile::Box::kBytes, key_tile(stage).base, KeyTile::Box::kBytes);
      end_products();
    };
    const auto add_values = [&](int stage) {
      multiply_cols<T, KeyTile::Box::kBytes>(output[0], probability, value_tile(stage).base);
      end_products();
    };
    const auto free_keys = [&] {
      keys_free(place.stage()).arrive_warp();
      if (k0 == 0) query_free.arrive_warp();
    };
    const auto hide = [&] { hide_unseen(scores, range.limit(work.q0, k0), warp_block); };
    const auto raise = [&](const float (&highest)[1][2]) {
      wait_for_products<0>();  // those of the output, too
      pin(output[0]);
      softmax.raise(highest, output);
    };
    // In place. If asked to test: false, and nothing done to the sums, where a lane's share of a row has a sum that is
    // not below kMost.
    const auto exponentiate = [&](auto tests) {
      constexpr float kMost = std::is_same_v<T, __half> ? 0x1p15f : 0x1p60f;
      float sum[2] = {};
#pragma unroll
      for (int i = 0; i < kKeyTile / 2; ++i) {
        float& x = scores[0][i / 4][i % 4];
        x = exp2_approx(fmaf(x, scale_log2, -softmax.reference[0][i / 2 % 2]));
        sum[i / 2 % 2] += x;
      }
      if (tests && !__all_sync(0xffffffffu, sum[0] < kMost && sum[1] < kMost)) return false;
      softmax.sum[0][0] += sum[0], softmax.sum[0][1] += sum[1];
      return true;
    };
    // The same for a tile of which it was false: with higher references. The scores are gone, so a warp makes its own
    // again, by itself.
    const auto exponentiate_anew = [&] {
      wait_for_products<0>();  // whose registers are wanted
      pin(output[0]);
      const int thread = fresh_thread_index(), row_block = thread / 32 - 4, lane = thread % 32;
      const LaneOffset lane_offset{KeyTile::Box::offset(lane % 16, lane / 16),
                                   KeyTile::Box::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2)};
      const KeyTile keys = key_tile(place.stage());
#pragma unroll
      for (int i = 0; i < kKeyTile / 2; ++i) scores[0][i / 4][i % 4] = 0.f;
#pragma unroll 1
      for (int k = 0; k < kHeadDim / 16; ++k) {
        uint32_t a[4];
        query_tile.load_a(a, lane_offset, row_block, k);
#pragma unroll
        for (int n = 0; n < kKeyTile / 16; ++n) {
          uint32_t b[4];
          keys.load_b_transposed(b, lane_offset, n, k);
          Mma<Sm80, T>::add(scores[0][2 * n], a, b[0], b[1]);
          Mma<Sm80, T>::add(scores[0][2 * n + 1], a, b[2], b[3]);
        }
      }
      float highest[1][2];
      softmax.find_highest(highest, scores);
      softmax.raise(highest, output);
      exponentiate(std::false_type{});
    };
    const auto round = [&] {
#pragma unroll
      for (int k = 0; k < kKeyTile / 16; ++k) to_operand<T>(probability[k], scores[0][2 * k], scores[0][2 * k + 1]);
    };

    query_full.wait(query_parity);
    keys_full(place.stage()).wait(place.parity());
    take_turn();
    begin_products();
    multiply_scores(place.stage());
    give_turn();
    wait_for_products<0>();
    pin(scores[0]);
    free_keys();
    if (k0 + kKeyTile > work.full_end) hide();
    softmax.see<true>(scores, output, true);
    exponentiate(std::false_type{});
    round();

    const auto take_tile = [&](auto is_partial) {
      const auto last = place;
      ++place.number;
      k0 -= kKeyTile;
      values_full(last.stage()).wait(last.parity());  // here, since ptxas wants no branch among products
      keys_full(place.stage()).wait(place.parity());
      take_turn();
      pin(output[0]);
      begin_products();
      multiply_scores(place.stage());
      add_values(last.stage());
      give_turn();
      wait_for_products<1>();
      pin(scores[0]);
      if constexpr (is_partial) hide();
      // Of rows that have seen nothing so far the references are far from what is to come.
      if (!Flash::kTestsSums || is_partial) {
        if (is_partial || __any_sync(0xffffffffu, softmax.has_outgrown(scores))) {
          float highest[1][2];
          softmax.find_highest(highest, scores);
          if (__any_sync(0xffffffffu, softmax.exceeds(highest))) raise(highest);
        }
        free_keys();
        exponentiate(std::false_type{});
      } else {
        if (!exponentiate(std::true_type{})) exponentiate_anew();
        free_keys();
      }
      wait_for_products<0>();
      pin(output[0]);
      values_free(last.stage()).arrive_warp();
      round();
    };
#pragma unroll 1
    while (k0 > 0 && k0 > work.full_end) take_tile(std::true_type{});
#pragma unroll 1
    while (k0 > 0) take_tile(std::false_type{});

    values_full(place.stage()).wait(place.parity());
    pin(output[0]);
    begin_products();
    add_values(place.stage());
    float factors[2];
    const int lane = threadIdx.x % 32, warp_row = work.q0 + warp_block * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float logsumexp, rest;
      factors[half] = softmax.finish(0, half, logsumexp, rest);
      const int row = warp_row + half * 8 + lane / 4;
      const int64_t i = int64_t{work.batch_head} * p.L + row;
      const bool writes = lane % 4 == 0 && row < p.L;
      if (writes && p.logsumexp != nullptr) p.logsumexp[i] = logsumexp;
      if (writes && p.logsumexp_rest != nullptr) p.logsumexp_rest[i] = rest;
    }
    wait_for_products<0>();
    pin(output[0]);
    values_free(place.stage()).arrive_warp();
    ++place.number;
    const uint64_t target = reinterpret_cast<uint64_t>(p.output.data) +
                            (work.batch * p.output.stride[0] + work.head * p.output.stride[1]) * 2;
    write_rows<T>(output[0], factors, target, static_cast<int>(p.output.stride[2] * 2), warp_row, range.L,
                  static_cast<int>(p.Ev));
  }
#endif
}

// For calls without mask and dropout, with a positive scale, whose operands tensor maps can describe.
template <class T, int kHeadDim>
cudaError_t launch_forward_sm90(const ForwardParams& p, cudaStream_t stream) {
  using Flash = FlashForwardSm90<T, kHeadDim>;
  constexpr auto kKernel = flash_forward_sm90_kernel<T, kHeadDim>;
  if (std::max({p.L, p.S, p.B * p.H}) > kMaxPosition) return cudaErrorInvalidValue;
  auto order = forward_order<Flash, T>(p);
  if (p.is_causal) order.tiles = (order.tiles + 1) / 2;  // pairs of them
  if (order.blocks() == 0) return cudaSuccess;
  CUtensorMap maps[3];
  if (order.blocks() > BlockOrder::kMaxGridX ||
      !describe_in_boxes<T>(maps[0], p.query, p.B, p.H, p.L, p.E, Flash::kQueryTile) ||
      !describe_in_boxes<T>(maps[1], p.key, p.B, p.H / p.group, p.S, p.E, Flash::kKeyTile) ||
      !describe_in_boxes<T>(maps[2], p.value, p.B, p.H / p.group, p.S, p.Ev, Flash::kKeyTile)) {
    return cudaErrorInvalidValue;
  }
  int multiprocessors = 0;
  if (const auto error = count_multiprocessors(multiprocessors); error != cudaSuccess) return error;
  if (const auto error = allow_shared_bytes<kKernel>(Flash::kSharedBytes); error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(order.blocks(), multiprocessors));
  kKernel<<<blocks, Flash::kThreads, Flash::kSharedBytes, stream>>>(p, order, maps[0], maps[1], maps[2],
                                                                    p.scale * kLog2E);
  return cudaGetLastError();
}

// Head dims E and Ev from 1 to kHeadDim.
template <class T, int kHeadDim>
cudaError_t flash_forward_sm90(const ForwardParams& p, cudaStream_t stream) {
  static_assert(kHeadDim == 128 || kHeadDim == 256);
  if constexpr (kHeadDim == 256) {
    if (std::max(p.E, p.Ev) <= 192) return launch_forward_sm90<T, 192>(p, stream);
  } else {
    if (std::max(p.E, p.Ev) <= 64) return launch_forward_sm90<T, 64>(p, stream);
  }
  return launch_forward_sm90<T, kHeadDim>(p, stream);
}

}  // namespace sdpa
