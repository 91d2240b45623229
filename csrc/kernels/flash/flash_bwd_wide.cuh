// The main kernel of the flash backward (see flash_bwd.cuh) for wide heads: several warps share a group of keys. Each
// computes the scores of these keys with its share of the queries, and keeps its share of the columns of dK and dV. So
// P^T and dS^T both go through shared memory, and what a warp reads from there for a product is nearer to a square,
// which is less of it: shared memory is what bounds the backward at these head dims.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "../arch/arch.h"
#include "../arch/barrier.h"
#include "../attn/block_range.h"
#include "../attn/launch.h"
#include "../attn/params.h"
#include "../attn/softmax.h"
#include "flash_bwd_rows.cuh"
#include "score_dropout.cuh"
#include "score_mask_bwd.cuh"
#include "tile.cuh"

namespace sdpa {

// kCols: columns that are computed. kKeyBlocks: 16-key blocks of a group of kShares warps. kStages: of queries and of
// dO. kMaxSharedBytes: what the chip lets a block have.
template <int kCols_, int kWarps_, int kKeyBlocks_, int kShares_, int kQueries_, int kStages_, int kGradStages_,
          int kMaxSharedBytes_>
struct WideTile {
  static constexpr int kCols = kCols_, kWarps = kWarps_, kKeyBlocks = kKeyBlocks_, kShares = kShares_;
  static constexpr int kQueries = kQueries_, kStages = kStages_, kGradStages = kGradStages_;
  static constexpr int kMaxSharedBytes = kMaxSharedBytes_;
  static constexpr bool kWalks = false, kIsPlain = false;
};

template <class Arch, class T, int kHeadDim, class Tile, ScoreEdit kEdit>
struct WideBackward {
  static constexpr bool kHasMask = has_mask(kEdit), kWalks = Tile::kWalks;
  // In 64 KB there is a place for three quarters of the values' columns, if LSE and delta are where P^T is later. The
  // others are in registers, and come and go through the queries' place.
  static constexpr bool kSplitsValue = !Arch::kAsyncCopy && kHeadDim > 128;
  // Of a row in shared memory. Rows of 192 columns are slower padded (7.77 ms where this takes 7.06), those of 96
  // faster.
  static constexpr int kRowCols = Arch::kAsyncCopy ? Tile::kCols : kHeadDim;
  static constexpr bool kIsOdd = kRowCols < kHeadDim, kFewAddresses = kRowCols == 192;
  static constexpr int kSharedValueCols = kSplitsValue ? kHeadDim / 4 * 3 : kRowCols;
  static constexpr int kThreads = Tile::kWarps * 32, kGroups = Tile::kWarps / Tile::kShares;
  static constexpr int kKeyTile = kGroups * Tile::kKeyBlocks * 16, kQueryTile = Tile::kQueries;
  static constexpr int kShareQueries = kQueryTile / Tile::kShares;       // of a warp, for the scores
  static constexpr int kShareBlocks = Tile::kCols / Tile::kShares / 16;  // 16-column blocks of a warp, for dK and dV
  // dQ: each warp takes kGradRows blocks of 16 queries and a share of the columns, in kPasses for want of registers.
  static constexpr int kGradRows = Tile::kCols / 16 % (Tile::kWarps * 32 / kQueryTile) == 0 ? 2 : 1;
  static constexpr int kQueryGroups = kQueryTile / 16 / kGradRows, kColGroups = Tile::kWarps / kQueryGroups;
  static constexpr int kPassCols = kSplitsValue && kEdit == ScoreEdit::kMaskGradient ? 16 : 32;
  static constexpr int kPasses = Tile::kCols / kColGroups > 48 ? Tile::kCols / kColGroups / kPassCols : 1;
  static constexpr int kGradQueryBlocks = Tile::kCols / kColGroups / 16 / kPasses;
  static_assert(kShareQueries % 16 == 0 && kShareBlocks * Tile::kShares * 16 == Tile::kCols);
  static_assert(kGradQueryBlocks * kPasses * kColGroups * 16 == Tile::kCols && Tile::kCols <= kHeadDim);

  using KeyTile = SharedTile<T, kKeyTile, kRowCols, Arch, kFewAddresses>;      // of values too, if whole
  using QueryTile = SharedTile<T, kQueryTile, kRowCols, Arch, kFewAddresses>;  // of dO too
  using KeyOrder = std::conditional_t<kHasMask, RowRuns<Tile::kKeyBlocks>, InOrder>;
  using Range = BlockRange<kQueryTile, kKeyTile>;
  using Barrier = SharedBarrier<Arch>;

  using ValueTile = SharedTile<T, kKeyTile, kSharedValueCols, Arch, kSplitsValue || kFewAddresses>;
  static constexpr int kQueryOffset = KeyTile::kBytes + ValueTile::kBytes;
  static constexpr int kScoreOffset = kQueryOffset + (Tile::kStages + Tile::kGradStages) * QueryTile::kBytes;
  static constexpr bool kPadsScores =
      kIsOdd &&
      kScoreOffset + 4 * kKeyTile * (kQueryTile + kChunkElements) + kQueryTile * 12 + 64 <= Tile::kMaxSharedBytes;
  using ScoreTile = SharedTile<T, kKeyTile, kQueryTile, Arch, false, kPadsScores>;  // P^T, dS^T
  static constexpr int kRowBytes = (kHasMask ? 3 : 2) * kQueryTile * static_cast<int>(sizeof(float));
  static constexpr int kScoreEnd = kScoreOffset + 2 * ScoreTile::kBytes;
  static constexpr int kRowOffset = kSplitsValue ? kScoreOffset : kScoreEnd;  // LSE, delta, rest of LSE
  static constexpr int kBarriers = Barrier::kIsReal ? 5 : 0;
  static constexpr int kBarrierOffset = kScoreEnd + (kSplitsValue ? 0 : kRowBytes);
  static constexpr int kSelectedOffset = kBarrierOffset + kBarriers * Barrier::kBytes;
  using Selected = QueryTiles<kQueryTile, kKeyTile, Tile::kCols == 192 ? 160 : 512>;
  static constexpr bool kSelects = kEdit == ScoreEdit::kMask && !kSplitsValue;  // leaves out query tiles, given room
  static constexpr int kSharedBytes = kSelectedOffset + (kSelects ? Selected::kBytes : 0);
  static_assert(kSharedBytes <= Tile::kMaxSharedBytes);
  static_assert(!kSplitsValue || (KeyTile::kBytes <= kScoreOffset - kQueryOffset && kRowBytes <= ScoreTile::kBytes));
};

template <class Arch, class T, int kHeadDim, class Tile, ScoreEdit kEdit>
__global__ void __launch_bounds__(WideBackward<Arch, T, kHeadDim, Tile, kEdit>::kThreads, 1)
    wide_backward_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BlockOrder order,
                         const __grid_constant__ Dropout dropout, const float scale_log2) {
  using Flash = WideBackward<Arch, T, kHeadDim, Tile, kEdit>;
  using KeyOrder = typename Flash::KeyOrder;
  using Barrier = typename Flash::Barrier;
  using Product = Mma<Arch, T>;
  constexpr bool kHasMask = Flash::kHasMask, kDrops = kEdit == ScoreEdit::kDropout;
  constexpr int kKeyBlocks = Tile::kKeyBlocks, kKeyTile = Flash::kKeyTile, kQueryTile = Flash::kQueryTile;
  constexpr int kThreads = Flash::kThreads, kShareBlocks = Flash::kShareBlocks;
  extern __shared__ __align__(1024) unsigned char shared[];

  // On sm80, and at 128 columns with a mask, the others have no registers for it.
  constexpr bool kAsksAhead =
      kEdit == ScoreEdit::kNone || !(kIsBeforeSm90 || (kEdit == ScoreEdit::kMask && kHeadDim == 128));

  // Work of this block: the query tiles of `group` query heads, one head after the other.
  let_successor_start();
  int tile_number, batch_key_head;
  if (!order.locate(tile_number, batch_key_head)) return;
  int k0 = tile_number * kKeyTile;  // causal: the first tile is the longest
  const int heads = static_cast<int>(p.H), group = static_cast<int>(p.group), key_heads = heads / group;
  if constexpr (kHasMask) batch_key_head = side_by_side(p, batch_key_head, key_heads);
  int batch = batch_key_head / key_heads, key_head = batch_key_head % key_heads;
  const typename Flash::Range range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};

  // Shared memory: key | value | query stages | dO stages | P^T | dS^T | LSE | delta | rest of LSE
  // | barriers.
  const uint32_t base = shared_address(shared);
  const typename Flash::KeyTile key_tile{base};
  const typename Flash::ValueTile value_tile{base + Flash::KeyTile::kBytes};
  const auto query_tile = [&](int stage) {
    return typename Flash::QueryTile{base + Flash::kQueryOffset + stage * Flash::QueryTile::kBytes};
  };
  const auto grad_tile = [&](int stage) { return query_tile(Tile::kStages + stage); };
  const typename Flash::ScoreTile probability_tile{base + Flash::kScoreOffset};
  const typename Flash::ScoreTile score_tile{base + Flash::kScoreOffset + Flash::ScoreTile::kBytes};
  float* const shared_lse = reinterpret_cast<float*>(shared + Flash::kRowOffset);
  float* const shared_delta = shared_lse + kQueryTile;
  float* const shared_rest = shared_delta + kQueryTile;
  // Warps wait for as little as possible, so that some multiply while others load or take exponentials:
  //   full      a query tile, its dO and their rows of LSE and delta are in place;
  //   complete  P and dS of all keys are;
  //   done      every warp is through with these, and so with the query tile;
  //   grad_read, query_read   the part of `done` after which a tile with one stage is overwritten.
  const auto barrier = [&](int n) { return Barrier{base + Flash::kBarrierOffset + n * Barrier::kBytes}; };
  const Barrier full = barrier(0), complete = barrier(1), done = barrier(2);
  const Barrier grad_read = barrier(3), query_read = barrier(4);
  if (threadIdx.x == 0) {
    full.init(kThreads + kQueryTile / 32 * kWarpArrivals);
    constexpr int kArrivals = Tile::kWarps * kWarpArrivals;
    complete.init(kArrivals), done.init(kArrivals), grad_read.init(kArrivals), query_read.init(kArrivals);
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int share = warp % Tile::kShares, warp_block = warp / Tile::kShares * kKeyBlocks;  // of 16 keys, in the tile
  const auto lane_offset = Flash::KeyTile::lane_offset();
  const auto score_lane_offset = Flash::ScoreTile::lane_offset();
  // The loop goes over the query tiles of the group's query heads, one head after the other. Places are counted on,
  // since a division for each would cost more than all else that is not arithmetic.
  struct Place {
    int head, q0;
  };
  const int length = static_cast<int>(p.L);
  const auto first_query = [&] { return range.first_query_tile(k0) * kQueryTile; };
  const auto exists = [&](const Place& x) { return x.head < (key_head + 1) * group; };
  // Every other key tile of a walk goes back over the queries, so that it begins with the sums of dQ that were used
  // last.
  const auto goes_back = [&] { return Tile::kWalks && k0 / kKeyTile % 2 == 1; };
  const typename Flash::Selected selected{base + Flash::kSelectedOffset};
  if constexpr (Flash::kSelects) selected.template fill<kThreads>(p, batch, key_head * group, k0);
  const auto first_of = [&](int head) -> Place {
    if constexpr (Flash::kSelects) return {head, selected.from(0) * kQueryTile};
    return {head, goes_back() ? (range.query_tiles() - 1) * kQueryTile : first_query()};
  };
  const auto after = [&](Place x) {
    if (goes_back()) {
      x.q0 -= kQueryTile;
      if (x.q0 < first_query()) x = first_of(x.head + 1);
    } else {
      x.q0 += kQueryTile;
      if constexpr (Flash::kSelects) x.q0 = selected.from(x.q0 / kQueryTile) * kQueryTile;
      if (x.q0 >= length) x = first_of(x.head + 1);
    }
    return x;
  };
  Place here = first_of(key_head * group);
  bool has_work = here.q0 < length;
  if constexpr (kEdit == ScoreEdit::kMask &&
                !Flash::kSelects) {  // key padding that hides the whole tile from all heads
    const bool same_for_all = group == 1 || p.attn_mask.stride[1] == 0;
    if (same_for_all && !any_key_takes_part<kKeyTile>(p, batch, here.head, k0)) has_work = false;
  }
  if (!has_work) here.head += group;
  // Whether the next place is looked up once, for all that want to know it. Where tiles are selected (see QueryTiles)
  // at 128 columns sm80 has no registers for it, and the largest tile of 163 KB was 2 % slower.
  constexpr bool kIsLargest = Tile::kCols == 256 && Tile::kMaxSharedBytes == 163 * 1024;
  constexpr bool kCarriesNext =
      kFetchesAll<Tile> || (Flash::kSelects && !kIsLargest && !(kIsBeforeSm90 && kHeadDim == 128));
  Place carried = here;
  const auto following = [&] {
    if constexpr (kCarriesNext) return carried;
    return after(here);
  };
  // The mask's variant has no registers for addresses that would stay valid over the loop: from here on they are
  // computed from their origins again.
  int parity = 0;
  const auto start_anew = [&] {
    if constexpr (kHasMask || (kDrops && kHeadDim > 128) || Flash::kSplitsValue || (kFetchesAll<Tile> && kIsBeforeSm90))
      asm volatile("" : "+r"(batch), "+r"(key_head), "+r"(k0), "+r"(here.head), "+r"(here.q0), "+r"(parity));
  };
  const auto fetch = [&](const auto& tile, const Operand& operand, int64_t cols, const Place& x) {
    const HeadRows<const T> rows(operand, batch, x.head, kFetchesAll<Tile> && !exists(x) ? 0 : p.L, cols);
    fetch_rows<Arch, kThreads, Tile::kIsPlain>(tile, rows, x.q0);
  };
  const auto fetch_query = [&](const Place& x, int stage) {
    fetch(query_tile(stage % Tile::kStages), p.query, p.E, x);
  };
  const auto fetch_grad = [&](const Place& x, int stage) {
    fetch(grad_tile(stage % Tile::kGradStages), p.grad_output, p.Ev, x);
  };
  // LSE, delta and rest of LSE of this thread's row. A row that does not exist is all zeros and adds nothing to any
  // gradient, if only its probabilities are finite, which a mask may prevent.
  const auto read_row = [&](const Place& x) -> float3 {
    const int row = x.q0 + static_cast<int>(threadIdx.x);
    if (!exists(x) || threadIdx.x >= kQueryTile || row >= length) return {kHasMask ? -INFINITY : 0.f, 0.f, 0.f};
    const int64_t i = int64_t{batch * heads + x.head} * p.L + row;
    return {p.logsumexp[i], p.delta[i], kHasMask && p.logsumexp_rest != nullptr ? p.logsumexp_rest[i] : 0.f};
  };
  const auto publish_row = [&](const float3& row) {
    if (threadIdx.x >= kQueryTile) return;
    // +inf makes every probability of a row with nothing to attend to 0.
    const float lse = kDrops ? fmaf(row.x, kLog2E, -dropout.log2_rescale) : row.x * kLog2E;
    shared_lse[threadIdx.x] = row.x == -INFINITY ? INFINITY : lse;
    shared_delta[threadIdx.x] = kDrops ? row.y * dropout.chance : row.y;  // see DroppedKeys::gradient
    if constexpr (kHasMask) shared_rest[threadIdx.x] = row.z;
  };

  const auto fetch_keys = [&] {
    const HeadRows<const T> key(p.key, batch, key_head, p.seen_keys, p.E),
        value(p.value, batch, key_head, p.seen_keys, p.Ev);
    if constexpr (Tile::kIsPlain) {
      fetch_rows<Arch, kThreads, true>(key_tile, key, k0);
      fetch_rows<Arch, kThreads, true>(value_tile, value, k0);
    } else {
      key_tile.template fill<kThreads, KeyOrder>(key, k0);
      value_tile.template fill<kThreads, KeyOrder>(value, k0);
    }
  };
  fetch_keys();
  const auto value_offset = Flash::ValueTile::lane_offset();
  bool mask_from_registers = false;
  if constexpr (kEdit == ScoreEdit::kMaskGradient && !Flash::kSplitsValue) {
    mask_from_registers = MaskGradientRuns<kKeyBlocks>::fit(p);
  }
  constexpr int kSplit = Flash::kSharedValueCols / 16, kRight = (Flash::kRowCols - Flash::kSharedValueCols) / 16;
  uint32_t right_values[kRight > 0 ? kRight : 1][kKeyBlocks][4];
  if constexpr (kRight > 0) {
    using RightTile = SharedTile<T, kKeyTile, kRight * 16, Arch>;
    const RightTile right{base + Flash::kQueryOffset};
    HeadRows<const T> value(p.value, batch, key_head, p.seen_keys, p.Ev);
    value.data += Flash::kSharedValueCols * value.col_stride;
    value.cols -= Flash::kSharedValueCols;
    right.template fill<kThreads, KeyOrder>(value, k0);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kRight; ++k) {
#pragma unroll
      for (int m = 0; m < kKeyBlocks; ++m) {
        right.load_a(right_values[k][m], RightTile::lane_offset(), warp_block + m, k);
      }
    }
    __syncthreads();
  }
  float grad_key[kKeyBlocks][2 * kShareBlocks][4] = {}, grad_value[kKeyBlocks][2 * kShareBlocks][4] = {};

  if (exists(here)) {
    fetch_query(here, 0);
    fetch_grad(here, 0);
  }
  wait_for_predecessor();  // which makes delta, and zeros where dQ is summed up
  if (exists(here)) publish_row(read_row(here));
  // dQ = dS K
  const auto take_query_gradient = [&](const Place& x) {
    if (p.grad_query.data == nullptr) return;
    constexpr int kBlocks = Flash::kGradQueryBlocks, kRows = Flash::kGradRows;
    const int query_group = warp / Flash::kColGroups, col_group = warp % Flash::kColGroups;
    const GradQuerySums sums(p, batch * heads + x.head);
    // Of a walk: whether this is the first and the last key tile that these queries see.
    const bool is_first = k0 == 0, is_last = !range.matters(x.q0, k0 + kKeyTile);
#pragma unroll 1
    for (int pass = 0; pass < Flash::kPasses; ++pass) {
      const int first_block = (col_group * Flash::kPasses + pass) * kBlocks;
      const int row0 = x.q0 + query_group * kRows * 16;
      float grad_query[kRows][2 * kBlocks][4] = {};
      if (Tile::kWalks && is_last && !is_first) {
        sums.template take_rows<GradQuerySums::Step::kGet, true>(grad_query, row0, first_block * 2);
      }
      add_query_gradient<Product, kKeyTile / 16>(grad_query, score_tile, score_lane_offset, query_group * kRows,
                                                 key_tile, lane_offset, first_block);
      if (Tile::kWalks && is_last) {
        const HeadRows<T> target(p.grad_query, batch, x.head, p.L, p.E);
        write_query_gradient(grad_query, target, row0, first_block * 2, p.scale);
      } else if (Tile::kWalks && is_first) {
        sums.template take_rows<GradQuerySums::Step::kPut, true>(grad_query, row0, first_block * 2);
      } else {
        sums.template take_rows<GradQuerySums::Step::kAdd, Tile::kIsPlain>(grad_query, row0, first_block * 2);
      }
    }
  };

  const auto write = [&](const typename Flash::KeyTile& tile, const Operand& operand, int64_t cols, int first_key) {
    if (operand.data == nullptr) return;
    const HeadRows<T> target(operand, batch, key_head, p.S, cols);
    constexpr int kChunks = Flash::KeyTile::kChunksPerRow;
#pragma unroll 1
    for (int i = threadIdx.x; i < kKeyTile * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks, to = first_key + KeyOrder::key(row);
      if (to >= target.rows) continue;
      const uint4 v = load_shared_16(tile.base + Flash::KeyTile::offset(row, chunk));
      if constexpr (Tile::kIsPlain) {
        T* const place = target.data + to * target.row_stride + chunk * kChunkElements;
        if (chunk * kChunkElements < target.cols) *reinterpret_cast<uint4*>(place) = v;
      } else {
        write_chunk(target, to, chunk * kChunkElements, v);
      }
    }
  };
  wait_for_copies<Arch>();
  __syncthreads();
  // Of 96 columns there is room for the keys in registers, as operands of K Q^T.
  constexpr bool kKeepsKeys = kFetchesAll<Tile> && Tile::kCols == 96 && kEdit == ScoreEdit::kNone;
  uint32_t kept_keys[kKeepsKeys ? Tile::kCols / 16 : 1][kKeyBlocks][4];
  if constexpr (kKeepsKeys) {
#pragma unroll
    for (int k = 0; k < Tile::kCols / 16; ++k) {
#pragma unroll
      for (int m = 0; m < kKeyBlocks; ++m) key_tile.load_a(kept_keys[k][m], lane_offset, warp_block + m, k);
    }
  }
  bool is_full = false;
#pragma unroll 1
  while (true) {
#pragma unroll 1
    for (; exists(here); here = following(), parity ^= 1) {
      if constexpr (kCarriesNext) carried = after(here);
      start_anew();
      if (!is_full) full.wait(parity ^ 1);
      const int q0 = here.q0;
      const auto query = query_tile(parity % Tile::kStages), grad = grad_tile(parity % Tile::kGradStages);

      const bool drops = kDrops || (kHasMask && p.dropout_p > 0.f);
      constexpr int kBlocks = Flash::kShareQueries / 16;
      const int first_block = share * kBlocks;  // of 16 queries, in the tile
      // By 16 queries. The entries of a bool mask, which has no gradient, are read before the products, those of others
      // would take too many registers.
      TransposedMask<kKeyBlocks, 2, kEdit == ScoreEdit::kMask && !Flash::kSplitsValue ? 1 : 0> mask[kBlocks];
      if constexpr (kHasMask) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          mask[n].read_early(p, batch, here.head, q0 + (first_block + n) * 16 + lane % 4 * 2,
                             k0 + KeyOrder::key(warp_block * 16 + lane / 4));
        }
      }

      // Tiles that begin with this warp's rows: fewer additions of addresses, but on sm80 a mask leaves no registers.
      constexpr int kBegins = kEdit == ScoreEdit::kMask && !kVectorReductions ? 0 : 1;
      const int key_begin = kBegins * warp_block, query_begin = kBegins * first_block;
      const typename Flash::KeyTile key_rows{key_tile.base + key_begin * 16 * Flash::KeyTile::kRowBytes};
      const typename Flash::ValueTile value_rows{value_tile.base + key_begin * 16 * Flash::ValueTile::kRowBytes};
      const typename Flash::QueryTile query_rows{query.base + query_begin * 16 * Flash::QueryTile::kRowBytes};
      const typename Flash::QueryTile grad_rows{grad.base + query_begin * 16 * Flash::QueryTile::kRowBytes};
      // S^T = K Q^T and dP^T = V dO^T, side by side: twice as many independent mma in flight
      float scores[kBlocks][kKeyBlocks][2][4] = {}, grad_scores[kBlocks][kKeyBlocks][2][4] = {};
#pragma unroll
      for (int k = 0; k < Tile::kCols / 16; ++k) {
        uint32_t (&key)[kKeyBlocks][4] = kept_keys[kKeepsKeys ? k : 0];
        uint32_t value[kKeyBlocks][4];
#pragma unroll
        for (int m = 0; m < kKeyBlocks; ++m) {
          if constexpr (!kKeepsKeys) key_rows.load_a(key[m], lane_offset, warp_block - key_begin + m, k);
          if (k < kSplit) {
            value_rows.load_a(value[m], value_offset, warp_block - key_begin + m, k);
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) value[m][i] = right_values[k - kSplit][m][i];
          }
        }
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          uint32_t b[4], c[4];
          query_rows.load_b_transposed(b, lane_offset, first_block - query_begin + n, k);
          grad_rows.load_b_transposed(c, lane_offset, first_block - query_begin + n, k);
#pragma unroll
          for (int m = 0; m < kKeyBlocks; ++m) {
            Product::add(scores[n][m][0], key[m], b[0], b[1]);
            Product::add(scores[n][m][1], key[m], b[2], b[3]);
            Product::add(grad_scores[n][m][0], value[m], c[0], c[1]);
            Product::add(grad_scores[n][m][1], value[m], c[2], c[3]);
          }
        }
      }

      start_anew();
      const bool is_done = kAsksAhead && done.test(parity ^ 1);
      const bool is_partial = range.is_partial(q0, k0);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        const int first_row = (first_block + n) * 16 + lane % 4 * 2;
        // log2 of P^T, -inf where a query must not attend
        if constexpr (kHasMask) {
          mask[n].log2_probability(scores[n], p, batch, here.head, q0 + first_row,
                                   k0 + KeyOrder::key(warp_block * 16 + lane / 4), scale_log2, shared_lse + first_row,
                                   shared_rest + first_row);
        } else {
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
        }
        if (is_partial) {
          const TileLimit limit = range.limit(q0, k0);
#pragma unroll
          for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const int key = KeyOrder::key((warp_block + m) * 16 + lane / 4 + i % 4 / 2 * 8);
              if (!limit.sees(first_row + i / 4 * 8 + i % 2, key)) scores[n][m][i / 4][i % 4] = -INFINITY;
            }
          }
        }
      }

      // P^T and dS^T = P^T * (dP^T - delta) to shared memory. This warp's share stays in registers, too, if no mask
      // needs them.
      constexpr bool kKeepsShare = !kHasMask;
      uint32_t own_probabilities[kBlocks][kKeyBlocks][4], own_scores[kBlocks][kKeyBlocks][4];
      DroppedKeys<T, kHasMask, kKeyBlocks, Flash::kShareQueries, Flash::kSplitsValue> dropped;
      float2 deltas[2];
      const auto read_deltas = [&](int query_block) {
        const float2* const delta = reinterpret_cast<const float2*>(shared_delta + query_block * 16 + lane % 4 * 2);
        deltas[0] = delta[0], deltas[1] = delta[4];
      };
      static_assert(!Flash::kSplitsValue || kBlocks == 1);
      if constexpr (Flash::kSplitsValue) read_deltas(first_block);  // P^T takes their place
      if (!is_done) done.wait(parity ^ 1);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        const int query_block = first_block + n, first_row = query_block * 16 + lane % 4 * 2;
        if constexpr (!Flash::kSplitsValue) read_deltas(query_block);
        if (drops) {
          start_anew();
          const uint32_t batch_head = static_cast<uint32_t>(p.first_batch_head) + batch * heads + here.head;
          dropped.draw(dropout.with_seed(*p.seed), batch_head, q0 + query_block * 16, k0 + warp_block * 16, n);
        }
#pragma unroll
        for (int m = 0; m < kKeyBlocks; ++m) {
          float (&left)[4] = scores[n][m][0], (&right)[4] = scores[n][m][1];
#pragma unroll
          for (int i = 0; i < 4; ++i) left[i] = exp2_approx(left[i]), right[i] = exp2_approx(right[i]);
          uint32_t (&a)[4] = own_probabilities[n][m], (&b)[4] = own_scores[n][m];
          if constexpr (kDrops) {
            dropped.gradient(a, left, right, grad_scores[n][m][0], grad_scores[n][m][1], deltas, dropout, m, n);
          } else if (drops) {
            dropped.drop(a, left, right, grad_scores[n][m][0], grad_scores[n][m][1], dropout.rescale, m);
          } else {
            to_operand<T>(a, left, right);
          }
          probability_tile.put_a(a, warp_block + m, query_block);
#pragma unroll
          for (int i = 0; i < 8 && !kDrops; ++i) {
            const float2& row = deltas[i / 4];
            scores[n][m][i / 4][i % 4] *= grad_scores[n][m][i / 4][i % 4] - (i % 2 == 0 ? row.x : row.y);
          }
          to_operand<T>(b, left, right);
          score_tile.put_a(b, warp_block + m, query_block);
        }
        if (mask_from_registers) {
          MaskGradientRuns<kKeyBlocks>::add(scores[n], 0, p, batch, here.head, q0 + first_row,
                                            k0 + KeyOrder::key(warp_block * 16 + lane / 4));
        }
      }
      complete.arrive_warp();
      start_anew();
      const Place next = following();
      const auto fetch_ahead = [&] {
        if (!kFetchesAll<Tile> && !exists(next)) return;
        if constexpr (Tile::kStages > 1) fetch_query(next, parity + 1);
        if constexpr (Tile::kGradStages > 1) fetch_grad(next, parity + 1);
      };
      if constexpr (!kFetchesAll<Tile>) fetch_ahead();
      float3 next_row;
      if constexpr (!Flash::kSplitsValue) next_row = read_row(next);  // on its way meanwhile

      // Of this warp's keys and columns: sum += scores * rows of block k of 16 queries
      const auto multiply = [&](float (&sum)[kKeyBlocks][2 * kShareBlocks][4], const uint32_t (&a)[kKeyBlocks][4],
                                const typename Flash::QueryTile& rows, int k) {
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
      constexpr int kAll = kQueryTile / 16, kFirst = kKeepsShare ? kBlocks : 0;
      // Where dO has one place, the next fills it as soon as all warps are through with this one.
      constexpr bool kFetchesEarly = Tile::kGradStages == 1 && kEdit == ScoreEdit::kNone;
      const auto multiply_others = [&](float (&sum)[kKeyBlocks][2 * kShareBlocks][4],
                                       const typename Flash::ScoreTile& tile, const typename Flash::QueryTile& rows,
                                       int begin, int end) {
#pragma unroll
        for (int i = begin; i < end; ++i) {
          const int k = kKeepsShare ? (first_block + i) % kAll : i;
          uint32_t a[kKeyBlocks][4];
#pragma unroll
          for (int m = 0; m < kKeyBlocks; ++m) tile.load_a(a[m], score_lane_offset, warp_block + m, k);
          multiply(sum, a, rows, k);
        }
      };
      if constexpr (kKeepsShare) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) multiply(grad_value, own_probabilities[n], grad, first_block + n);
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) multiply(grad_key, own_scores[n], query, first_block + n);
      }
      if constexpr (kFetchesAll<Tile>) fetch_ahead();
      sync_threads<Tile::kShares * 32>(1 + warp / Tile::kShares);  // the other shares of these keys are there
      multiply_others(grad_value, probability_tile, grad, kFirst, kAll);
      if constexpr (Tile::kGradStages == 1) grad_read.arrive_warp();
      multiply_others(grad_key, score_tile, query, kFirst, kFetchesEarly ? kFirst + 1 : kAll);
      if constexpr (kFetchesEarly) {
        if (const Place next = following(); kFetchesAll<Tile> || exists(next)) {
          grad_read.wait(parity);
          fetch_grad(next, 0);
        }
        multiply_others(grad_key, score_tile, query, kFirst + 1, kAll);
      }
      if constexpr (Tile::kStages == 1) query_read.arrive_warp();

      if constexpr (Flash::kSplitsValue) next_row = read_row(next);
      complete.wait(parity);
      if constexpr (kEdit == ScoreEdit::kMaskGradient) {
        if (!mask_from_registers) add_mask_gradient<T, Tile::kWarps, KeyOrder>(score_tile, p, batch, here.head, q0, k0);
      }
      if (const Place next = following(); kFetchesAll<Tile> || exists(next)) {
        publish_row(next_row);
        if (threadIdx.x < kQueryTile) full.arrive_warp();
        if constexpr (Tile::kGradStages == 1 && !kFetchesEarly) {
          grad_read.wait(parity);
          fetch_grad(next, 0);
        }
        if constexpr (Tile::kStages == 1) {
          query_read.wait(parity);
          fetch_query(next, 0);
        }
        full.arrive_with_copies();
      }
      take_query_gradient(here);
      is_full = kAsksAhead && full.test(parity);
      done.arrive_warp();
    }

    wait_for_copies<Arch>();
    __syncthreads();
    // What the next key tile needs is computed from its origins: the loop above has no registers to keep it.
    if constexpr (Tile::kWalks) asm volatile("" : "+r"(batch), "+r"(key_head), "+r"(k0));
    const int first_key = k0;
    bool goes_on = false;
    float3 row{};
    if constexpr (Tile::kWalks) {
      k0 += kKeyTile;
      goes_on = k0 < p.S;
      here = first_of(key_head * group);
      if (first_query() >= length) here.head += group;
      if (goes_on && exists(here)) {
        fetch_query(here, parity);
        fetch_grad(here, parity);
        row = read_row(here);
      }
    }
    const typename Flash::KeyTile grad_value_tile{base + (kRight > 0 ? Flash::kQueryOffset : Flash::KeyTile::kBytes)};
    // dK and dV leave through the key and value tiles, where each warp has its keys and columns.
    put_gradient<T>(grad_key, p.scale, key_tile, warp_block, share * kShareBlocks);
    put_gradient<T>(grad_value, kHasMask ? dropout.rescale : 1.f, grad_value_tile, warp_block, share * kShareBlocks);
    __syncthreads();
    write(key_tile, p.grad_key, p.E, first_key);
    write(grad_value_tile, p.grad_value, p.Ev, first_key);
    if (!goes_on) return;
    __syncthreads();
    fetch_keys();
#pragma unroll
    for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * kShareBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) grad_key[m][n][i] = grad_value[m][n][i] = 0.f;
      }
    }
    if (exists(here)) {
      publish_row(row);
      if (threadIdx.x < kQueryTile) full.arrive_warp();
      full.arrive_with_copies();
    }
  }
}

}  // namespace sdpa
