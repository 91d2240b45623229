// Flash attention backward on Hopper (see flash_bwd.cuh for its three kernels): the main kernel by wgmma. A block has
// 128 keys, 64 for each of two warpgroups, which keep dK and dV of theirs in registers; one more warp copies boxes of
// queries and dO, and one LSE and delta.
//
// Scores are computed transposed (keys are rows), so that P^T and dS^T leave the accumulators of their products as the
// operand registers of dV += P^T dO and dK += dS^T Q. Only dS goes through shared memory, for dQ = dS K.
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
#include "flash_bwd_rows.cuh"
#include "hopper.cuh"
#include "tile.cuh"

namespace sdpa {

template <class T, int kHeadDim>
struct FlashBackwardSm90 {
  static constexpr int kWarpgroups = 2, kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kRegisters = 240, kCopyRegisters = 24;
  static constexpr int kKeyTile = kWarpgroups * 64, kQueryTile = kHeadDim <= 64 ? 128 : 64;
  static constexpr int kStages = 2;
  static constexpr int kBoxes = kHeadDim / kBoxCols;
  // dQ: each warpgroup has 64 queries and 64 columns.
  static_assert(kQueryTile * kHeadDim == kWarpgroups * 64 * 64);
  using Range = BlockRange<kQueryTile, kKeyTile>;
  using Barrier = SharedBarrier<Sm90>;
  using KeyTile = BoxedTile<T, kKeyTile, kHeadDim, Sm90>;      // of values, too
  using QueryTile = BoxedTile<T, kQueryTile, kHeadDim, Sm90>;  // of dO, too
  using ScoreTile = BoxedTile<T, kKeyTile, kQueryTile, Sm90>;  // dS^T

  // Shared memory: keys | values | stages of queries | of dO | of dS^T | of LSE and delta | barriers.
  static constexpr int kQueryOffset = 2 * KeyTile::kBytes,
                       kScoreOffset = kQueryOffset + 2 * kStages * QueryTile::kBytes;
  static constexpr int kRowOffset = kScoreOffset + kStages * ScoreTile::kBytes;
  static constexpr int kRowBytes = 2 * kQueryTile * static_cast<int>(sizeof(float));
  static constexpr int kBarrierOffset = kRowOffset + kStages * kRowBytes;
  static constexpr int kSharedBytes = kBarrierOffset + (1 + 2 * kStages) * Barrier::kBytes;
  static_assert(kSharedBytes <= Sm90::kSharedBytes);
};

// The query tiles of a block: those of one head that its keys concern, then those of the next that shares the keys.
struct QueryPlaces {
  int head, end_head, q0, first, length;
  __device__ __forceinline__ bool exists() const { return head < end_head; }
  template <int kQueryTile>
  __device__ __forceinline__ void advance() {
    q0 += kQueryTile;
    if (q0 >= length) q0 = first, ++head;
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(FlashBackwardSm90<T, kHeadDim>::kThreads, 1)
    flash_backward_sm90_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BlockOrder order,
                               const __grid_constant__ CUtensorMap query_map,
                               const __grid_constant__ CUtensorMap key_map,
                               const __grid_constant__ CUtensorMap value_map,
                               const __grid_constant__ CUtensorMap grad_map, const float scale_log2) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Flash = FlashBackwardSm90<T, kHeadDim>;
  using Barrier = typename Flash::Barrier;
  using KeyTile = typename Flash::KeyTile;
  using QueryTile = typename Flash::QueryTile;
  using ScoreTile = typename Flash::ScoreTile;
  constexpr int kKeyTile = Flash::kKeyTile, kQueryTile = Flash::kQueryTile, kStages = Flash::kStages;
  extern __shared__ __align__(1024) unsigned char shared[];

  let_successor_start();
  int tile_number, batch_key_head;
  if (!order.locate_quickly(tile_number, batch_key_head)) return;
  const int k0 = tile_number * kKeyTile;  // causal: the first tile is the longest
  const int heads = static_cast<int>(p.H), group = static_cast<int>(p.group), key_heads = heads / group;
  const int batch = batch_key_head / key_heads, key_head = batch_key_head % key_heads;
  const typename Flash::Range range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};
  const int first_query = range.first_query_tile(k0) * kQueryTile;
  QueryPlaces here{key_head * group, (key_head + 1) * group, first_query, first_query, range.L};
  if (first_query >= range.L) here.head = here.end_head;  // nothing to do

  const uint32_t base = shared_address(shared);
  const KeyTile key_tile{base}, value_tile{base + KeyTile::kBytes};
  const auto query_tile = [&](int stage) { return QueryTile{base + Flash::kQueryOffset + stage * QueryTile::kBytes}; };
  const auto grad_tile = [&](int stage) { return query_tile(kStages + stage); };
  const auto score_tile = [&](int stage) { return ScoreTile{base + Flash::kScoreOffset + stage * ScoreTile::kBytes}; };
  const auto rows = [&](int stage) {
    return reinterpret_cast<float*>(shared + Flash::kRowOffset + stage * Flash::kRowBytes);
  };
  const auto barrier = [&](int n) { return Barrier{base + Flash::kBarrierOffset + n * Barrier::kBytes}; };
  const Barrier keys_full = barrier(0);
  const auto full = [&](int stage) { return barrier(1 + 2 * stage); };
  const auto free = [&](int stage) { return barrier(2 + 2 * stage); };
  if (threadIdx.x == 0) {
    keys_full.init(1);
    for (int stage = 0; stage < kStages; ++stage) {
      full(stage).init(1 + kWarpArrivals);
      free(stage).init(Flash::kWarpgroups * 4 * kWarpArrivals);
    }
    fence_barrier_init();
  }
  __syncthreads();

  RingPlace<kStages> place;
  const int warpgroup = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  if (warpgroup < 0) {
    want_fewer_registers<Flash::kCopyRegisters>();
    if (threadIdx.x == 0) {
      const auto copy = [&](const auto& tile, const CUtensorMap& map, int row, int head, Barrier its_full) {
#pragma unroll
        for (int n = 0; n < Flash::kBoxes; ++n) {
          copy_box(tile.box(n).base, map, n * kBoxCols, row, head, batch, its_full.address);
        }
      };
      if (here.exists()) {
        expect_bytes(keys_full.address, 2 * KeyTile::kBytes);
        copy(key_tile, key_map, k0, key_head, keys_full);
        copy(value_tile, value_map, k0, key_head, keys_full);
      }
      for (; here.exists(); here.advance<kQueryTile>(), ++place.number) {
        const int stage = place.stage();
        free(stage).wait(place.parity() ^ 1);
        expect_bytes(full(stage).address, 2 * QueryTile::kBytes);
        copy(query_tile(stage), query_map, here.q0, here.head, full(stage));
        copy(grad_tile(stage), grad_map, here.q0, here.head, full(stage));
      }
    } else if (threadIdx.x / 32 == 1) {
      wait_for_predecessor();  // which makes delta
      for (; here.exists(); here.advance<kQueryTile>(), ++place.number) {
        const int stage = place.stage();
        free(stage).wait(place.parity() ^ 1);
        const int64_t first = int64_t{batch * heads + here.head} * p.L;
#pragma unroll
        for (int i = lane; i < kQueryTile; i += 32) {
          const int row = here.q0 + i;
          const float lse = row < range.L ? p.logsumexp[first + row] : -INFINITY;
          // +inf makes every probability of a row with nothing to attend to 0.
          rows(stage)[i] = lse == -INFINITY ? INFINITY : lse * kLog2E;
          rows(stage)[kQueryTile + i] = row < range.L ? p.delta[first + row] : 0.f;
        }
        full(stage).arrive_warp();
      }
    }
    return;
  }

  want_more_registers<Flash::kRegisters>();
  const int warp = threadIdx.x / 32 % 4;
  const int warp_block = warpgroup * 4 + warp;  // of 16 keys, in the key tile
  float grad_key[kHeadDim / 8][4] = {}, grad_value[kHeadDim / 8][4] = {};
  wait_for_predecessor();  // which makes zeros where dQ is summed up
  if (here.exists()) keys_full.wait(0);
#pragma unroll 1
  for (; here.exists(); here.advance<kQueryTile>(), ++place.number) {
    const int stage = place.stage();
    float scores[kQueryTile / 8][4], grad_scores[kQueryTile / 8][4];
    full(stage).wait(place.parity());
    begin_products();
    multiply_rows<T, kHeadDim / 16>(scores, key_tile.base + warpgroup * 64 * kBoxRowBytes, KeyTile::Box::kBytes,
                                    query_tile(stage).base, QueryTile::Box::kBytes);
    end_products();
    multiply_rows<T, kHeadDim / 16>(grad_scores, value_tile.base + warpgroup * 64 * kBoxRowBytes, KeyTile::Box::kBytes,
                                    grad_tile(stage).base, QueryTile::Box::kBytes);
    end_products();
    wait_for_products<1>();
    pin(scores);
    const float* const lse = rows(stage) + lane % 4 * 2;
    const float* const delta = lse + kQueryTile;
    if (range.is_partial(here.q0, k0)) {
      const TileLimit limit = range.limit(here.q0, k0);
#pragma unroll
      for (int i = 0; i < kQueryTile / 2; ++i) {
        const int query = i / 4 * 8 + lane % 4 * 2 + i % 2, key = warp_block * 16 + lane / 4 + i / 2 % 2 * 8;
        if (!limit.sees(query, key)) scores[i / 4][i % 4] = -INFINITY;
      }
      pin(scores);  // else ptxas asks all tiles
    }
#pragma unroll
    for (int n = 0; n < kQueryTile / 8; ++n) {
      const float2 its = *reinterpret_cast<const float2*>(lse + n * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = exp2_approx(fmaf(scores[n][i], scale_log2, i % 2 == 0 ? -its.x : -its.y));
      }
    }
    uint32_t probability[kQueryTile / 16][4];
#pragma unroll
    for (int k = 0; k < kQueryTile / 16; ++k) to_operand<T>(probability[k], scores[2 * k], scores[2 * k + 1]);
    wait_for_products<0>();
    pin(grad_scores);
    pin(grad_value);
    begin_products();
    multiply_cols<T, QueryTile::Box::kBytes>(grad_value, probability, grad_tile(stage).base);
    end_products();

    // dS^T = P^T * (dP^T - delta), of the rounded P^T: in float32 there is no room for it
    uint32_t change[kQueryTile / 16][4];
#pragma unroll
    for (int k = 0; k < kQueryTile / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 its = *reinterpret_cast<const float2*>(delta + (2 * k + i / 2) * 8);
        const float2 pair = unpack<T>(probability[k][i]);
        float* const x = &grad_scores[2 * k + i / 2][i % 2 * 2];
        change[k][i] = pack<T>(pair.x * (x[0] - its.x), pair.y * (x[1] - its.y));
      }
      score_tile(stage).box(k / 4).put_a(change[k], warp_block, k % 4);
    }
    fence_shared_for_products();
    pin(grad_key);
    begin_products();
    multiply_cols<T, QueryTile::Box::kBytes>(grad_key, change, query_tile(stage).base);
    end_products();
    sync_threads<Flash::kWarpgroups * 128>(1);  // dS^T of all keys is there
    // dQ = dS K, of 64 queries and 64 columns
    constexpr bool kSplitsColumns = kHeadDim > 64;
    float grad_query[1][8][4];
    begin_products();
    multiply_transposed<T, kKeyTile / 16>(grad_query[0], score_tile(stage).box(kSplitsColumns ? 0 : warpgroup).base,
                                          key_tile.box(kSplitsColumns ? warpgroup : 0).base);
    end_products();
    wait_for_products<1>();
    pin(grad_key);
    pin(grad_value);
    free(stage).arrive_warp();
    wait_for_products<0>();
    pin(grad_query[0]);
    if (p.grad_query.data != nullptr) {
      const GradQuerySums sums(p, batch * heads + here.head);
      sums.take_rows(grad_query, here.q0 + (kSplitsColumns ? 0 : warpgroup * 64) + warp * 16,
                     kSplitsColumns ? warpgroup * 8 : 0);
    }
  }

  const auto write = [&](const float (&values)[kHeadDim / 8][4], float factor, const Operand& operand, int64_t cols) {
    if (operand.data == nullptr) return;
    const uint64_t target =
        reinterpret_cast<uint64_t>(operand.data) + (batch * operand.stride[0] + key_head * operand.stride[1]) * 2;
    const float factors[2] = {factor, factor};
    write_rows<T>(values, factors, target, static_cast<int>(operand.stride[2] * 2), k0 + warp_block * 16, range.S,
                  static_cast<int>(cols));
  };
  write(grad_key, p.scale, p.grad_key, p.E);
  write(grad_value, 1.f, p.grad_value, p.Ev);
#endif
}

// For calls without mask and dropout, whose operands, dO and gradients tensor maps can describe, and whose sums may be
// in any order.
template <class T, int kHeadDim>
cudaError_t launch_backward_sm90(const BackwardParams& p, cudaStream_t stream) {
  using Flash = FlashBackwardSm90<T, kHeadDim>;
  constexpr auto kKernel = flash_backward_sm90_kernel<T, kHeadDim>;
  if (std::max({p.L, p.S, p.B * p.H}) > kMaxPosition) return cudaErrorInvalidValue;
  const auto order = key_order<T>(p, (p.S + Flash::kKeyTile - 1) / Flash::kKeyTile);
  CUtensorMap maps[4];
  if (order.blocks() > BlockOrder::kMaxGridX ||
      !describe_in_boxes<T>(maps[0], p.query, p.B, p.H, p.L, p.E, Flash::kQueryTile) ||
      !describe_in_boxes<T>(maps[1], p.key, p.B, p.H / p.group, p.seen_keys, p.E, Flash::kKeyTile) ||
      !describe_in_boxes<T>(maps[2], p.value, p.B, p.H / p.group, p.seen_keys, p.Ev, Flash::kKeyTile) ||
      !describe_in_boxes<T>(maps[3], p.grad_output, p.B, p.H, p.L, p.Ev, Flash::kQueryTile)) {
    return cudaErrorInvalidValue;
  }
  const bool sums = p.grad_query.data != nullptr;
  if (const auto error = launch_delta<T, kHeadDim>(p, sums, stream); error != cudaSuccess) return error;
  if (const auto error = allow_shared_bytes<kKernel>(Flash::kSharedBytes); error != cudaSuccess) return error;
  const auto error = launch_early<kKernel>(dim3(order.grid_x()), Flash::kThreads, Flash::kSharedBytes, stream, p, order,
                                           maps[0], maps[1], maps[2], maps[3], p.scale * kLog2E);
  return error == cudaSuccess && sums ? launch_convert<T, kHeadDim>(p, stream) : error;
}

// Head dims E and Ev from 1 to kHeadDim.
template <class T, int kHeadDim>
cudaError_t flash_backward_sm90(const BackwardParams& p, cudaStream_t stream) {
  static_assert(kHeadDim == 128);
  return std::max(p.E, p.Ev) <= 64 ? launch_backward_sm90<T, 64>(p, stream) : launch_backward_sm90<T, 128>(p, stream);
}

}  // namespace sdpa
