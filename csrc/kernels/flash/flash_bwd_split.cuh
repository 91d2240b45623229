// The main kernel of the flash backward (see flash_bwd.cuh) for wide heads without mask and dropout. As in
// flash_bwd_wide.cuh several warps share keys, but half of them make P^T and dV, the others dS^T and dK. What a warp
// reads from shared memory for a product is nearer to a square than if each had its share of all products, and while
// some take exponentials the others multiply.
#pragma once

#include <cuda_runtime.h>

#include "../arch/arch.h"
#include "../arch/barrier.h"
#include "../attn/block_range.h"
#include "../attn/launch.h"
#include "../attn/params.h"
#include "../attn/softmax.h"
#include "flash_bwd_rows.cuh"
#include "flash_bwd_wide.cuh"
#include "tile.cuh"

namespace sdpa {

// Tile is a WideTile: kKeyBlocks of a group of 2 * kShares warps; one stage of queries.
template <class Arch, class T, int kHeadDim, class Tile>
struct SplitBackward {
  static constexpr bool kWalks = false;
  static constexpr bool kFewAddresses = Tile::kCols == 192;
  static constexpr int kThreads = Tile::kWarps * 32, kSideWarps = Tile::kWarps / 2, kSideThreads = kThreads / 2;
  static constexpr int kGroups = kSideWarps / Tile::kShares;
  static constexpr int kKeyTile = kGroups * Tile::kKeyBlocks * 16, kQueryTile = Tile::kQueries;
  static constexpr int kShareQueries = kQueryTile / Tile::kShares;       // of a warp, for the scores
  static constexpr int kShareBlocks = Tile::kCols / Tile::kShares / 16;  // 16-column blocks of a warp, for dK or dV
  // dQ: each warp takes kGradRows blocks of 16 queries and a share of the columns, in kPasses for want of registers.
  static constexpr int kGradRows = Tile::kCols / 16 % (Tile::kWarps * 32 / kQueryTile) == 0 ? 2 : 1;
  static constexpr int kQueryGroups = kQueryTile / 16 / kGradRows, kColGroups = Tile::kWarps / kQueryGroups;
  static constexpr int kPasses = Tile::kCols / kColGroups > 48 ? Tile::kCols / kColGroups / 32 : 1;
  static constexpr int kGradQueryBlocks = Tile::kCols / kColGroups / 16 / kPasses;
  static_assert(kShareQueries % 16 == 0 && kShareBlocks * Tile::kShares * 16 == Tile::kCols);
  static_assert(kGradQueryBlocks * kPasses * kColGroups * 16 == Tile::kCols && Tile::kCols <= kHeadDim);

  using KeyTile = SharedTile<T, kKeyTile, Tile::kCols, Arch, kFewAddresses>;      // of values too
  using QueryTile = SharedTile<T, kQueryTile, Tile::kCols, Arch, kFewAddresses>;  // of dO too
  using Range = BlockRange<kQueryTile, kKeyTile>;
  using Barrier = SharedBarrier<Arch>;

  static constexpr int kQueryOffset = 2 * KeyTile::kBytes;
  static constexpr int kScoreOffset = kQueryOffset + (1 + Tile::kGradStages) * QueryTile::kBytes;
  static constexpr int kRowBytes = 2 * kQueryTile * static_cast<int>(sizeof(float));
  using ScoreTile = SharedTile<T, kKeyTile, kQueryTile, Arch>;  // P^T, dS^T
  // dS^T takes the place of P^T where there is none for both.
  static constexpr bool kOneScoreTile = kScoreOffset + 2 * ScoreTile::kBytes + kRowBytes + 256 > Tile::kMaxSharedBytes;
  static constexpr int kRowOffset = kScoreOffset + (kOneScoreTile ? 1 : 2) * ScoreTile::kBytes;  // LSE, delta
  static constexpr int kBarrierOffset = kRowOffset + kRowBytes, kBarriers = 5 + 3 * kGroups;
  static constexpr int kSharedBytes = kBarrierOffset + kBarriers * Barrier::kBytes;
  static_assert(Arch::kAsyncCopy && kSharedBytes <= Tile::kMaxSharedBytes && Tile::kShares > 1 && Tile::kStages == 1);
  // With two stages, `full` has to say that all warps have read the dO before: those that publish rows do.
  static_assert(Tile::kGradStages == 1 || kQueryTile / 32 >= kSideWarps);
};

template <class Arch, class T, int kHeadDim, class Tile>
__global__ void __launch_bounds__(SplitBackward<Arch, T, kHeadDim, Tile>::kThreads, 1)
    split_backward_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BlockOrder order,
                          const __grid_constant__ Dropout, const float scale_log2) {
  using Flash = SplitBackward<Arch, T, kHeadDim, Tile>;
  using KeyTile = typename Flash::KeyTile;
  using QueryTile = typename Flash::QueryTile;
  using ScoreTile = typename Flash::ScoreTile;
  using Barrier = typename Flash::Barrier;
  using Product = Mma<Arch, T>;
  constexpr int kKeyBlocks = Tile::kKeyBlocks, kKeyTile = Flash::kKeyTile, kQueryTile = Flash::kQueryTile;
  constexpr int kThreads = Flash::kThreads, kSideThreads = Flash::kSideThreads, kShareBlocks = Flash::kShareBlocks;
  constexpr int kBlocks = Flash::kShareQueries / 16, kAll = kQueryTile / 16;
  extern __shared__ __align__(1024) unsigned char shared[];

  // No such chip has so much; and ptxas spills.
  if constexpr (kIsBeforeSm90 && Tile::kMaxSharedBytes > 163 * 1024) return;

  // Work of this block: the query tiles of `group` query heads, one head after the other.
  let_successor_start();
  int tile_number, batch_key_head;
  if (!order.locate(tile_number, batch_key_head)) return;
  const int k0 = tile_number * kKeyTile;  // causal: the first tile is the longest
  const int heads = static_cast<int>(p.H), head_group = static_cast<int>(p.group), key_heads = heads / head_group;
  const int batch = batch_key_head / key_heads, key_head = batch_key_head % key_heads;
  const typename Flash::Range range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};

  // Shared memory: key | value | query stages | dO stages | P^T | dS^T | LSE | delta | barriers.
  const uint32_t base = shared_address(shared);
  const KeyTile key_tile{base}, value_tile{base + KeyTile::kBytes};
  const QueryTile query{base + Flash::kQueryOffset};
  const auto grad_tile = [&](int stage) { return QueryTile{query.base + (1 + stage) * QueryTile::kBytes}; };
  const ScoreTile probability_tile{base + Flash::kScoreOffset};
  const ScoreTile score_tile{base + Flash::kRowOffset - ScoreTile::kBytes};
  float* const shared_lse = reinterpret_cast<float*>(shared + Flash::kRowOffset);
  float* const shared_delta = shared_lse + kQueryTile;
  // Warps wait for as little as possible, so that some multiply while others load or take exponentials:
  //   full      a query tile, its dO and their rows of LSE and delta are in place;
  //   complete  dS of all keys is;
  //   done      every warp is through with it;
  //   query_read, grad_read   every warp is through with the query tile, with dO;
  // and for each group of keys:
  //   probabilities_here, scores_here   P, dS is in place;
  //   probabilities_read                every warp of the group is through with P.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool is_for_keys = warp >= Flash::kSideWarps;  // makes dS and dK, not P and dV
  const int share = warp % Tile::kShares, group = warp % Flash::kSideWarps / Tile::kShares;
  const int warp_block = group * kKeyBlocks;  // of 16 keys, in the tile
  const int first_block = share * kBlocks;    // of 16 queries, in the tile
  const auto barrier = [&](int n) { return Barrier{base + Flash::kBarrierOffset + n * Barrier::kBytes}; };
  const Barrier full = barrier(0), complete = barrier(1), done = barrier(2);
  const Barrier query_read = barrier(3), grad_read = barrier(4);
  const Barrier probabilities_here = barrier(5 + group * 3), probabilities_read = barrier(6 + group * 3);
  const Barrier scores_here = barrier(7 + group * 3);
  if (threadIdx.x == 0) {
    full.init(kThreads + kQueryTile / 32 * kWarpArrivals);
    complete.init(Flash::kSideWarps * kWarpArrivals);
    for (int n = 2; n < 5; ++n) barrier(n).init(Tile::kWarps * kWarpArrivals);
    for (int n = 5; n < Flash::kBarriers; n += 3) {
      barrier(n).init(Tile::kShares * kWarpArrivals);
      barrier(n + 1).init(2 * Tile::kShares * kWarpArrivals);
      barrier(n + 2).init(Tile::kShares * kWarpArrivals);
    }
  }
  const auto lane_offset = KeyTile::lane_offset();
  const auto score_lane_offset = ScoreTile::lane_offset();
  // The loop goes over the query tiles of the group's query heads, one head after the other.
  struct Place {
    int head, q0;
  };
  const int length = static_cast<int>(p.L), first_query = range.first_query_tile(k0) * kQueryTile;
  const auto exists = [&](const Place& x) { return x.head < (key_head + 1) * head_group; };
  const auto after = [&](Place x) -> Place {
    x.q0 += kQueryTile;
    return x.q0 < length ? x : Place{x.head + 1, first_query};
  };
  Place here{key_head * head_group, first_query};
  if (first_query >= length) here.head += head_group;

  const auto query_rows = [&](const Place& x) { return HeadRows<const T>(p.query, batch, x.head, p.L, p.E); };
  const auto grad_rows = [&](const Place& x) { return HeadRows<const T>(p.grad_output, batch, x.head, p.L, p.Ev); };
  // LSE and delta of this thread's row. A row that does not exist is all zeros and adds nothing to any gradient.
  const auto read_row = [&](const Place& x) -> float2 {
    const int row = x.q0 + static_cast<int>(threadIdx.x);
    if (!exists(x) || threadIdx.x >= kQueryTile || row >= length) return {0.f, 0.f};
    const int64_t i = int64_t{batch * heads + x.head} * p.L + row;
    return {p.logsumexp[i], p.delta[i]};
  };
  const auto publish_row = [&](const float2& row) {
    if (threadIdx.x >= kQueryTile) return;
    // +inf makes every probability of a row with nothing to attend to 0.
    shared_lse[threadIdx.x] = row.x == -INFINITY ? INFINITY : row.x * kLog2E;
    shared_delta[threadIdx.x] = row.y;
  };

  key_tile.template fill<kThreads>(HeadRows<const T>(p.key, batch, key_head, p.seen_keys, p.E), k0);
  value_tile.template fill<kThreads>(HeadRows<const T>(p.value, batch, key_head, p.seen_keys, p.Ev), k0);
  if (exists(here)) {
    fetch_rows<Arch, kThreads>(query, query_rows(here), here.q0);
    fetch_rows<Arch, kThreads>(grad_tile(0), grad_rows(here), here.q0);
  }
  wait_for_predecessor();  // which makes delta, and zeros where dQ is summed up
  if (exists(here)) publish_row(read_row(here));
  // dQ = dS K
  const auto take_query_gradient = [&](const Place& x) {
    if (p.grad_query.data == nullptr) return;
    constexpr int kColBlocks = Flash::kGradQueryBlocks, kRows = Flash::kGradRows;
    const int query_group = warp / Flash::kColGroups, col_group = warp % Flash::kColGroups;
    const GradQuerySums sums(p, batch * heads + x.head);
#pragma unroll 1
    for (int pass = 0; pass < Flash::kPasses; ++pass) {
      const int first_col = (col_group * Flash::kPasses + pass) * kColBlocks;
      float grad_query[kRows][2 * kColBlocks][4] = {};
      add_query_gradient<Product, kKeyTile / 16>(grad_query, score_tile, score_lane_offset, query_group * kRows,
                                                 key_tile, lane_offset, first_col);
      sums.template take_rows<GradQuerySums::Step::kAdd>(grad_query, x.q0 + query_group * kRows * 16, first_col * 2);
    }
  };
  float sum[kKeyBlocks][2 * kShareBlocks][4] = {};  // dV or dK
  wait_for_copies<Arch>();
  __syncthreads();

  int parity = 0;
  bool is_full = false;
#pragma unroll 1
  for (; exists(here); here = after(here), parity ^= 1) {
    if (!is_full) full.wait(parity ^ 1);
    const int q0 = here.q0;
    const QueryTile grad = grad_tile(parity % Tile::kGradStages);
    // S^T = K Q^T or dP^T = V dO^T
    float scores[kBlocks][kKeyBlocks][2][4] = {};
    const KeyTile keys{(is_for_keys ? value_tile.base : key_tile.base) + warp_block * 16 * KeyTile::kRowBytes};
    const QueryTile queries{(is_for_keys ? grad.base : query.base) + first_block * 16 * QueryTile::kRowBytes};
#pragma unroll
    for (int k = 0; k < Tile::kCols / 16; ++k) {
      uint32_t a[kKeyBlocks][4];
#pragma unroll
      for (int m = 0; m < kKeyBlocks; ++m) keys.load_a(a[m], lane_offset, m, k);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        uint32_t b[4];
        queries.load_b_transposed(b, lane_offset, n, k);
#pragma unroll
        for (int m = 0; m < kKeyBlocks; ++m) {
          Product::add(scores[n][m][0], a[m], b[0], b[1]);
          Product::add(scores[n][m][1], a[m], b[2], b[3]);
        }
      }
    }
    Barrier{is_for_keys ? grad_read.address : query_read.address}.arrive_warp();

    // P^T or dS^T = P^T * (dP^T - delta), in registers and to shared memory
    uint32_t own[kBlocks][kKeyBlocks][4];
    const auto put = [&](const ScoreTile& tile) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int m = 0; m < kKeyBlocks; ++m) tile.put_a(own[n][m], warp_block + m, first_block + n);
      }
    };
    if (!is_for_keys) {
      const Barrier place_free{Flash::kOneScoreTile ? done.address : probabilities_read.address};
      const bool is_free = place_free.test(parity ^ 1);
      const bool is_partial = range.is_partial(q0, k0);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        const int first_row = (first_block + n) * 16 + lane % 4 * 2;
        const float2* const lse = reinterpret_cast<const float2*>(shared_lse + first_row);
        const float2 row[2] = {lse[0], lse[4]};
#pragma unroll
        for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float& score = scores[n][m][i / 4][i % 4];
            score = fmaf(score, scale_log2, i % 2 == 0 ? -row[i / 4].x : -row[i / 4].y);
          }
        }
        if (is_partial) {
          const TileLimit limit = range.limit(q0, k0);
#pragma unroll
          for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const int key = (warp_block + m) * 16 + lane / 4 + i % 4 / 2 * 8;
              if (!limit.sees(first_row + i / 4 * 8 + i % 2, key)) scores[n][m][i / 4][i % 4] = -INFINITY;
            }
          }
        }
#pragma unroll
        for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float& x = scores[n][m][i / 4][i % 4];
            x = exp2_approx(x);
          }
          to_operand<T>(own[n][m], scores[n][m][0], scores[n][m][1]);
        }
      }
      if (!is_free) place_free.wait(parity ^ 1);
      put(probability_tile);
      probabilities_here.arrive_warp();
    } else {
      probabilities_here.wait(parity);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        const int first_row = (first_block + n) * 16 + lane % 4 * 2;
        const float2* const delta = reinterpret_cast<const float2*>(shared_delta + first_row);
        const float2 row[2] = {delta[0], delta[4]};
#pragma unroll
        for (int m = 0; m < kKeyBlocks; ++m) {
          uint32_t a[4];
          probability_tile.load_a(a, score_lane_offset, warp_block + m, first_block + n);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack<T>(a[i]);
            float (&x)[4] = scores[n][m][i / 2];
            x[i % 2 * 2] = pair.x * (x[i % 2 * 2] - row[i / 2].x);
            x[i % 2 * 2 + 1] = pair.y * (x[i % 2 * 2 + 1] - row[i / 2].y);
          }
          to_operand<T>(own[n][m], scores[n][m][0], scores[n][m][1]);
        }
      }
      probabilities_read.arrive_warp();
      if constexpr (Flash::kOneScoreTile) {
        probabilities_read.wait(parity);
      } else {
        done.wait(parity ^ 1);
      }
      put(score_tile);
      scores_here.arrive_warp();
      complete.arrive_warp();
    }

    const Place next = after(here);
    const bool has_next = exists(next);
    const float2 next_row = read_row(next);  // on its way meanwhile
    // The warps that are the last to read a tile copy the next one: to a place of its own at once, else in its place.
    const auto fetch_next = [&](bool in_place) {
      if (!has_next || in_place != (is_for_keys || Tile::kGradStages == 1)) return;
      if (is_for_keys) {
        query_read.wait(parity);
        fetch_rows<Arch, kSideThreads>(query, query_rows(next), next.q0, threadIdx.x % kSideThreads);
      } else {
        grad_read.wait(in_place ? parity : parity ^ 1);
        fetch_rows<Arch, kSideThreads>(grad_tile((parity + 1) % Tile::kGradStages), grad_rows(next), next.q0,
                                       threadIdx.x % kSideThreads);
      }
      full.arrive_with_copies();
    };
    fetch_next(false);

    // dV = P^T dO or dK = dS^T Q, of this warp's keys and columns
    const QueryTile rows{is_for_keys ? query.base : grad.base};
    const auto multiply = [&](const uint32_t (&a)[kKeyBlocks][4], int k) {
#pragma unroll
      for (int n = 0; n < kShareBlocks; ++n) {
        uint32_t b[4];
        rows.load_b(b, lane_offset, k, share * kShareBlocks + n);
#pragma unroll
        for (int m = 0; m < kKeyBlocks; ++m) {
          Product::add(sum[m][2 * n], a[m], b[0], b[1]);
          Product::add(sum[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    };
    uint32_t others[kAll - kBlocks][kKeyBlocks][4];
    const auto take_others = [&] {
      Barrier{is_for_keys ? scores_here.address : probabilities_here.address}.wait(parity);
      const ScoreTile tile{is_for_keys ? score_tile.base : probability_tile.base};
#pragma unroll
      for (int n = 0; n < kAll - kBlocks; ++n) {
#pragma unroll
        for (int m = 0; m < kKeyBlocks; ++m) {
          tile.load_a(others[n][m], score_lane_offset, warp_block + m, (first_block + kBlocks + n) % kAll);
        }
      }
    };
    // Of its own queries and then of those of the other warps of dV or of dK; but those that are to overwrite P^T wait
    // until it is in registers.
    if constexpr (Flash::kOneScoreTile) {
      take_others();
      if (!is_for_keys) probabilities_read.arrive_warp();
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) multiply(own[n], first_block + n);
    if constexpr (!Flash::kOneScoreTile) take_others();
#pragma unroll
    for (int n = 0; n < kAll - kBlocks; ++n) multiply(others[n], (first_block + kBlocks + n) % kAll);
    if (!Flash::kOneScoreTile && !is_for_keys) probabilities_read.arrive_warp();
    Barrier{is_for_keys ? query_read.address : grad_read.address}.arrive_warp();
    fetch_next(true);

    complete.wait(parity);
    if (has_next) {
      publish_row(next_row);
      if (threadIdx.x < kQueryTile) full.arrive_warp();
    }
    take_query_gradient(here);
    if constexpr (Tile::kCols < 256 || kQueryTile < 128) is_full = full.test(parity);  // it spills otherwise
    done.arrive_warp();
  }

  wait_for_copies<Arch>();
  __syncthreads();
  // dK and dV leave through the key and value tiles, where each warp has its keys and columns.
  put_gradient<T>(sum, is_for_keys ? p.scale : 1.f, is_for_keys ? key_tile : value_tile, warp_block,
                  share * kShareBlocks);
  __syncthreads();
  const auto write = [&](const KeyTile& tile, const Operand& operand, int64_t cols) {
    if (operand.data == nullptr) return;
    const HeadRows<T> target(operand, batch, key_head, p.S, cols);
    constexpr int kChunks = KeyTile::kChunksPerRow;
#pragma unroll 1
    for (int i = threadIdx.x; i < kKeyTile * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      if (k0 + row >= target.rows) break;
      write_chunk(target, k0 + row, chunk * kChunkElements, load_shared_16(tile.base + KeyTile::offset(row, chunk)));
    }
  };
  write(key_tile, p.grad_key, p.E);
  write(value_tile, p.grad_value, p.Ev);
}

}  // namespace sdpa
