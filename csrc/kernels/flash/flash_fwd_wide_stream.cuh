// flash_fwd_stream.cuh for head dims over 160: two warps share 32 rows as in flash_fwd_wide.cuh, but four such teams
// share the keys and values, whose copies from L2 are what 64 rows a block wait for. There are two tiles of each, and
// warps wait at barriers in shared memory for what they need, so that teams need not be in step.
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
#include "tile.cuh"
#include "tile_stream.cuh"

namespace sdpa {

// kStages: of keys and of values. With one, each is copied while the other is multiplied.
template <class Arch, class T, int kHeadDim, int kStages_ = 2>
struct FlashForwardWideStream {
  static constexpr int kStages = kStages_;
  static constexpr int kSides = 2, kTeams = 4, kWarps = kTeams * kSides, kThreads = kWarps * 32;
  static constexpr int kRowBlocks = 2, kTeamRows = kRowBlocks * 16, kQueryTile = kTeams * kTeamRows, kKeyTile = 64;
  static constexpr int kSteps = kHeadDim / 16;                // k-steps of Q K^T
  static constexpr int kBlocks = kHeadDim / 16 / kSides;      // 16-column blocks of a warp's output: every second
  static constexpr int kKeyBlocks = kKeyTile / 16 / kSides;   // 16-key blocks of a warp's scores
  static constexpr int kHeldSteps = kHeadDim == 192 ? 4 : 0;  // of the query, in registers
  static constexpr int kBlocksPerSm = 1;
  static constexpr bool kTurnsRound = true;  // rounds of blocks go to and fro

  using QueryTile = SharedTile<T, kQueryTile, kHeadDim, Arch, true>;
  using KeyTile = SharedTile<T, kKeyTile, kHeadDim, Arch, true>;      // of values too
  using ProbabilityTile = SharedTile<T, kQueryTile, kKeyTile, Arch>;  // of the keys of both warps
  using Stream = TileStream<KeyTile, kThreads, InOrder, kHeadDim>;
  using Range = BlockRange<kQueryTile, kKeyTile>;
  using Barrier = SharedBarrier<Arch>;

  static constexpr int kKeyOffset = QueryTile::kBytes, kValueOffset = kKeyOffset + kStages * KeyTile::kBytes;
  static constexpr int kProbabilityOffset = kValueOffset + kStages * KeyTile::kBytes;
  // Of the rest some is for one stage only: at 192 columns, with two, ptxas makes of it a loop that is 10 % slower.
  static constexpr bool kOneStage = kStages == 1;
  // Where the warps of a team tell each other their maxima and sums: if not in P's place, they wait for each other less
  // often.
  static constexpr int kExchangeOffset = kProbabilityOffset + (kOneStage ? ProbabilityTile::kBytes : 0);
  static constexpr int kExchangeBytes = kOneStage ? 2 * kRowBlocks * kSides * 32 * static_cast<int>(sizeof(float))
                                                  : kTeamRows * ProbabilityTile::kRowBytes;  // of a team
  static constexpr int kPlaceOffset = kExchangeOffset + kTeams * kExchangeBytes;
  // So many works are looked up at once, which takes a warp no longer than one (170 instructions, four divisions one
  // after the other). And warps may still be at the work before.
  static constexpr int kKnownWorks = kOneStage ? 32 : 1, kPlaces = kOneStage ? 64 : 3;
  static constexpr int kBarrierOffset = kPlaceOffset + kPlaces * WorkPlace::kBytes;
  static constexpr int kSharedBytes = kBarrierOffset + (8 + kTeams) * Barrier::kBytes;
};

// fill_warp_rows with fewer instructions, as store_blocks is store_rows: what a work needs once is 7 % of one with 512
// keys. (With these, narrow heads' kernels are no faster, and some spill.)
//
// Rows [from, from + kCount) of a tile, by one warp, from rows row0, row0 + 1, ... of the head whose first row is at
// `source`; rows from `rows` on and columns from `cols` on become zero. `from` is a multiple of 8.
template <int kColumns, int kCount, class Tile>
__device__ __forceinline__ void fill_query_rows(const Tile& tile, int from, uint64_t source, int row_bytes, int row0,
                                                int rows, int cols) {
  constexpr int kChunks = kColumns / kChunkElements;
  constexpr int kPanel = (kChunks & -kChunks) < 32 ? (kChunks & -kChunks) : 32, kRowStep = 32 / kPanel;
  const int lane = threadIdx.x % 32, first = lane / kPanel;
#pragma unroll
  for (int panel = 0; panel < kChunks; panel += kPanel) {
    const int chunk = panel + lane % kPanel, left = chunk * kChunkElements < cols ? rows - row0 - first : 0;
    const uint32_t to = tile.base + from * Tile::kRowBytes + Tile::offset(first, chunk);
    uint64_t address = source + int64_t{row0 + first} * row_bytes + chunk * kChunkBytes;
#pragma unroll
    for (int row = 0; row < kCount; row += kRowStep, address += int64_t{kRowStep} * row_bytes) {
      cp_async_16_if(true, Tile::below(to, row), address, row < left);
    }
  }
}

// A warp's accumulators [kFirst, kFirst + kCount), every kColStep-th block of 16 columns from `col_block` on of 16
// rows, rounded to T and written in whole aligned chunks to rows row0, row0 + 1, ... of the head whose first row is at
// `target`. They pass through the block_row-th 16 rows of a tile, which nobody else may use meanwhile.
template <class T, int kFirst, int kCount, int kColStep, class Tile, int kColTiles>
__device__ __forceinline__ void store_blocks(const Tile& tile, int block_row, const float (&values)[kColTiles][4],
                                             uint64_t target, int row_bytes, int row0, int rows, int cols,
                                             int col_block) {
  constexpr int kPanel = kCount <= 4 ? 4 : kCount <= 8 ? 8 : 16;  // lanes that write a row, a chunk each
  constexpr int kRowStep = 32 / kPanel;
  static_assert(kFirst % 2 == 0 && kCount % 2 == 0 && kCount <= Tile::kChunksPerRow);
  const int lane = threadIdx.x % 32, i = lane % kPanel, first = lane / kPanel;
  const int chunk = (col_block + (kFirst + i) / 2 * kColStep) * 2 + i % 2;
  const uint32_t rows_here = tile.base + block_row * 16 * Tile::kRowBytes;
  const uint32_t put = rows_here + Tile::offset(lane / 4, 0) + lane % 4 * 4, get = rows_here + Tile::offset(first, i);
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kCount; n += 2) {
    uint32_t a[4];
    to_operand<T>(a, values[kFirst + n], values[kFirst + n + 1]);
#pragma unroll
    for (int j = 0; j < 4; ++j) store_shared_4(Tile::below(Tile::beside(put, n + j / 2), j % 2 * 8), a[j]);
  }
  __syncwarp();
  const int left = i < kCount && chunk * kChunkElements < cols ? rows - row0 - first : 0;
  uint64_t address = target + int64_t{row0 + first} * row_bytes + chunk * kChunkBytes;
#pragma unroll
  for (int row = 0; row < 16; row += kRowStep, address += int64_t{kRowStep} * row_bytes) {
    const uint4 v = load_shared_16(Tile::below(get, row));
    if (row < left) store_global_16(address, v);
  }
}

template <class Arch, class T, int kHeadDim, int kStages = 2>
__global__ void __launch_bounds__(FlashForwardWideStream<Arch, T, kHeadDim, kStages>::kThreads, 1)
    flash_forward_wide_stream_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ BlockOrder order,
                                     const float scale_log2) {
  using Flash = FlashForwardWideStream<Arch, T, kHeadDim, kStages>;
  using Product = Mma<Arch, T>;
  constexpr int kRowBlocks = Flash::kRowBlocks, kKeyTile = Flash::kKeyTile, kThreads = Flash::kThreads;
  constexpr int kKeyBlocks = Flash::kKeyBlocks, kBlocks = Flash::kBlocks, kSides = Flash::kSides;
  constexpr int kTeamRows = Flash::kTeamRows;
  extern __shared__ __align__(1024) unsigned char shared[];

  const uint32_t base = shared_address(shared);
  const typename Flash::QueryTile query_tile{base};
  const auto key_tile = [&](int stage) {
    return typename Flash::KeyTile{base + Flash::kKeyOffset + stage * Flash::KeyTile::kBytes};
  };
  const auto value_tile = [&](int stage) { return key_tile(kStages + stage); };
  const typename Flash::ProbabilityTile probability_tile{base + Flash::kProbabilityOffset};
  const auto place = [&](int slot) { return WorkPlace{base + Flash::kPlaceOffset + slot * WorkPlace::kBytes}; };
  const auto barrier = [&](int number) {
    return typename Flash::Barrier{base + Flash::kBarrierOffset + number * Flash::Barrier::kBytes};
  };
  // A tile has landed; every warp is done with it.
  const auto keys_here = [&](int stage) { return barrier(stage); };
  const auto values_here = [&](int stage) { return barrier(2 + stage); };
  const auto keys_free = [&](int stage) { return barrier(4 + stage); };
  const auto values_free = [&](int stage) { return barrier(6 + stage); };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int side = warp % kSides, team = warp / kSides;  // side: which half of the keys and columns
  const int team_block = team * kRowBlocks;              // of 16 rows, in the query tile
  const auto query_here = barrier(8 + team);
  float* const exchange = reinterpret_cast<float*>(shared + Flash::kExchangeOffset + team * Flash::kExchangeBytes);
  const auto lane_offset = Flash::KeyTile::lane_offset();
  const auto probability_offset = Flash::ProbabilityTile::lane_offset();
  // This warp's blocks of columns are side, side + 2, ...: the lane's offset takes the first step.
  const LaneOffset value_offset{lane_offset.rows_first ^ side * 2 * kChunkBytes, 0};

  const unsigned works = static_cast<unsigned>(order.tiles * order.heads);
  // Work in rounds of the grid, to and fro, since what comes first is the longest if causal.
  const auto work = [&](unsigned round) {
    return round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  };
  const auto find_work = [&](int slot, unsigned number) {
    int tile, batch_head;
    order.find(number, tile, batch_head);
    place(slot).put(p, batch_head, static_cast<int>(order.tiles - 1 - tile) * Flash::kQueryTile);  // the longest first
  };
  const auto find_works = [&](unsigned round) {  // from this one on, one a lane
    round += lane;
    if (work(round) < works) find_work(round % Flash::kPlaces, work(round));
  };
  // Tile number `count` of those that the block sees: stages take turns, and their barriers' phases.
  const auto stream_keys = [&](int slot, int k0, int count, bool run) {
    keys_free(count % kStages).wait(count / kStages % 2 ^ 1);
    Flash::Stream::fill(key_tile(count % kStages), place(slot).key_row(), static_cast<int>(p.key.stride[2] * 2), k0,
                        static_cast<int>(p.S), static_cast<int>(p.E), run);
    keys_here(count % kStages).arrive_with_copies();
  };
  const auto stream_values = [&](int slot, int k0, int count, bool run) {
    values_free(count % kStages).wait(count / kStages % 2 ^ 1);
    Flash::Stream::fill(value_tile(count % kStages), place(slot).value_row(), static_cast<int>(p.value.stride[2] * 2),
                        k0, static_cast<int>(p.S), static_cast<int>(p.Ev), run);
    values_here(count % kStages).arrive_with_copies();
  };
  const auto stream_query = [&](int slot) {
    const int row = team * kTeamRows + side * (kTeamRows / 2);
    fill_query_rows<kHeadDim, kTeamRows / 2>(query_tile, row, place(slot).query_row(),
                                             static_cast<int>(p.query.stride[2] * 2), place(slot).first_row() + row,
                                             static_cast<int>(p.L), static_cast<int>(p.E));
    query_here.arrive_with_copies();
  };

  if (threadIdx.x == 0) {
    for (int i = 0; i < 4; ++i) barrier(i).init(kThreads);
    for (int i = 4; i < 8; ++i) barrier(i).init(Flash::kWarps * kWarpArrivals);
    for (int i = 0; i < Flash::kTeams; ++i) barrier(8 + i).init(64);
    if constexpr (!Flash::kOneStage) find_work(0, blockIdx.x);
  }
  if (Flash::kOneStage && warp == 0) find_works(0);
  __syncthreads();
  stream_query(0);
  stream_keys(0, 0, 0, true);
  if constexpr (kStages == 2) stream_values(0, 0, 0, true);

  int count = 0;
  for (unsigned slot = 0, round = 0; work(round) < works; ++round) {
    const unsigned turn = round % 2, after = slot == Flash::kPlaces - 1 ? 0 : slot + 1;
    const bool is_last_work = work(round + 1) >= works;
    if constexpr (Flash::kOneStage) {
      if (warp == 0 && (round + 1) % Flash::kKnownWorks == 0) find_works(round + 1);
    } else {
      if (threadIdx.x == 0 && !is_last_work) find_work(after, work(round + 1));
    }
    const int q0 = place(slot).first_row(), team_row = q0 + team_block * 16;
    const typename Flash::Range range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};
    // Keys from here on are seen by no query of the block.
    const int key_end = p.is_causal ? min(range.S, q0 + Flash::kQueryTile) : range.S;
    if constexpr (Flash::kOneStage) __builtin_assume(key_end > 0);  // or the output is set to zero twice

    OnlineSoftmax<kRowBlocks, true> softmax(scale_log2);
    float output[kRowBlocks][2 * kBlocks][4] = {};
    query_here.wait(turn);
    uint32_t held[Flash::kHeldSteps > 0 ? Flash::kHeldSteps : 1][kRowBlocks][4];
#pragma unroll
    for (int k = 0; k < Flash::kHeldSteps; ++k) {
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) query_tile.load_a(held[k][m], lane_offset, team_block + m, k);
    }

    for (int k0 = 0; k0 < key_end; k0 += kKeyTile, ++count) {
      const bool is_last = k0 + kKeyTile >= key_end, has_next = !(is_last && is_last_work);
      const int stage = count % kStages, phase = count / kStages % 2;
      const int next_slot = is_last ? after : slot, next = is_last ? 0 : k0 + kKeyTile;
      // The last tile, of which the team sees nothing.
      if (p.is_causal && (Flash::kOneStage || is_last_work) && k0 >= team_row + kTeamRows) {
        if constexpr (Flash::kOneStage) {
          keys_here(stage).wait(phase);
          stream_values(slot, k0, count, true);
          keys_free(stage).arrive_warp();
          sync_threads<64>(1 + team);  // both warps are done with the query
          if (has_next) {
            stream_query(after);
            stream_keys(next_slot, next, count + 1, true);
          }
          values_free(stage).arrive_warp();
          ++count;
        }
        break;
      }

      // S = Q K^T
      float scores[kRowBlocks][2 * kKeyBlocks][4] = {};
      const auto keys = key_tile(stage);
      keys_here(stage).wait(phase);
#pragma unroll
      for (int k = 0; k < Flash::kSteps; ++k) {
        uint32_t q[kRowBlocks][4];
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          if (k >= Flash::kHeldSteps) {
            query_tile.load_a(q[m], lane_offset, team_block + m, k);
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) q[m][i] = held[k][m][i];
          }
        }
#pragma unroll
        for (int n = 0; n < kKeyBlocks; ++n) {
          uint32_t b[4];
          keys.load_b_transposed(b, lane_offset, side * kKeyBlocks + n, k);
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) {
            Product::add(scores[m][2 * n], q[m], b[0], b[1]);
            Product::add(scores[m][2 * n + 1], q[m], b[2], b[3]);
          }
        }
        if (k == 2) {  // while the tensor cores are busy
          if constexpr (kStages == 2) {
            stream_keys(next_slot, next, count + 1, has_next);
          } else {
            stream_values(slot, k0, count, true);
          }
        }
      }
      keys_free(stage).arrive_warp();

      // What must not be attended to is replaced, so that no NaN in it survives.
      if (range.is_partial(q0, k0)) {
        const TileLimit limit = range.limit(q0, k0);
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
          for (int n = 0; n < 2 * kKeyBlocks; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int row = (team_block + m) * 16 + lane / 4 + i / 2 * 8;
              const int key = (side * 2 * kKeyBlocks + n) * 8 + lane % 4 * 2 + i % 2;
              if (!limit.sees(row, key)) scores[m][n][i] = -INFINITY;
            }
          }
        }
      }

      // Both warps of a team must have the same references.
      bool outgrown;
      if (k0 == 0) {
        softmax.start_at_0();
        outgrown = softmax.is_far_from_0(scores);
      } else {
        outgrown = softmax.has_outgrown(scores);
      }
      if (sync_threads_or<64>(1 + team, outgrown)) {
        float highest[kRowBlocks][2];
        softmax.find_highest(highest, scores);
#pragma unroll
        for (int i = 0; i < 2 * kRowBlocks; ++i) {
          if (lane % 4 == 0) exchange[side * 32 + i * 8 + lane / 4] = highest[i / 2][i % 2];
        }
        sync_threads<64>(1 + team);
#pragma unroll
        for (int i = 0; i < 2 * kRowBlocks; ++i) {
          float& x = highest[i / 2][i % 2];
          x = fmaxf(x, exchange[(side ^ 1) * 32 + i * 8 + lane / 4]);
        }
        if constexpr (!Flash::kOneStage) sync_threads<64>(1 + team);
        if (k0 == 0 || __any_sync(0xffffffffu, softmax.exceeds(highest)))
          softmax.template raise<true>(highest, output, k0 == 0);
      }
      if (is_last && has_next) stream_query(after);  // both are done with this one

      const bool has_values = values_here(stage).test(phase);
      uint32_t probability[kKeyBlocks][kRowBlocks][4];  // of this warp's half of the keys
#pragma unroll
      for (int k = 0; k < kKeyBlocks; ++k) {
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          softmax.exponentiate(scores[m][2 * k], m);
          softmax.exponentiate(scores[m][2 * k + 1], m);
          to_operand<T>(probability[k][m], scores[m][2 * k], scores[m][2 * k + 1]);
          probability_tile.put_a(probability[k][m], team_block + m, side * kKeyBlocks + k);
        }
      }
      arrive_threads<64>(5 + team * 2 + (side ^ 1));  // P is there for the other warp

      // O += P V for 16 keys of the tile.
      const auto values = value_tile(stage);
      const auto add_values = [&](const uint32_t (&a)[kRowBlocks][4], int key_block) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          uint32_t b[4];
          values.load_b(b, value_offset, key_block, kSides * n);
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) {
            Product::add(output[m][2 * n], a[m], b[0], b[1]);
            Product::add(output[m][2 * n + 1], a[m], b[2], b[3]);
          }
        }
      };
      if constexpr (kStages == 1) {
        if (has_next) stream_keys(next_slot, next, count + 1, true);
      }
      if (!has_values) values_here(stage).wait(phase);
#pragma unroll
      for (int k = 0; k < kKeyBlocks; ++k) {
        add_values(probability[k], side * kKeyBlocks + k);
        if (kStages == 2 && k == 0) stream_values(next_slot, next, count + 1, has_next);
      }
      sync_threads<64>(5 + team * 2 + side);
#pragma unroll
      for (int k = 0; k < kKeyBlocks; ++k) {
        uint32_t others[kRowBlocks][4];
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          probability_tile.load_a(others[m], probability_offset, team_block + m, (side ^ 1) * kKeyBlocks + k);
        }
        add_values(others, (side ^ 1) * kKeyBlocks + k);
      }
      values_free(stage).arrive_warp();
    }

    // The sums of all keys. Lanes of both warps of a team hold the same rows.
    if constexpr (!Flash::kOneStage) sync_threads<64>(1 + team);
#pragma unroll
    for (int i = 0; i < 2 * kRowBlocks; ++i) exchange[(i * 2 + side) * 32 + lane] = softmax.sum[i / 2][i % 2];
    sync_threads<64>(1 + team);  // and both are done with P
#pragma unroll
    for (int i = 0; i < 2 * kRowBlocks; ++i) {  // in the same order in both
      softmax.sum[i / 2][i % 2] = exchange[i * 2 * 32 + lane] + exchange[(i * 2 + 1) * 32 + lane];
    }

    // O and LSE. The output leaves through the place of P.
    float factors[kRowBlocks][2], logsumexp, rest;
    softmax.finish_all(factors, logsumexp, rest);
    const int row = team_row + lane / 2 % 2 * 16 + lane % 2 * 8 + lane / 4;
    const int64_t i = int64_t{place(slot).batch_head()} * p.L + row;
    if (side == 0 && row < p.L && p.logsumexp != nullptr) p.logsumexp[i] = logsumexp;
    if (side == 0 && row < p.L && p.logsumexp_rest != nullptr) p.logsumexp_rest[i] = rest;
    const uint64_t target = place(slot).output_row();
    const auto store = [&]<int kFirst, int kCount>(int m) {
      store_blocks<T, kFirst, kCount, kSides>(probability_tile, team_block + side, output[m], target,
                                              static_cast<int>(p.output.stride[2] * 2), team_row + m * 16,
                                              static_cast<int>(p.L), static_cast<int>(p.Ev), side);
    };
    if constexpr (!Flash::kOneStage) sync_threads<64>(1 + team);
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) output[m][n][i] *= factors[m][i / 2];
      }
      store.template operator()<0, 8>(m);
      store.template operator()<8, 2 * kBlocks - 8>(m);
    }
    slot = after;
  }
  cp_async_wait_all();  // a warp that leaves early has copies on their way that others wait for
}

}  // namespace sdpa
