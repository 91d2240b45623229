// The main kernel of the flash backward (see flash_bwd.cuh) for narrow heads: a warp keeps dK and dV of its keys whole.
//
// It computes the scores transposed (keys are rows), so that P^T and dS^T leave the accumulators of their products as
// the operand registers of dV += P^T dO and dK += dS^T Q. Only dS goes through shared memory, for dS K.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "../arch/arch.h"
#include "../attn/block_range.h"
#include "../attn/launch.h"
#include "../attn/params.h"
#include "../attn/softmax.h"
#include "flash_bwd_rows.cuh"
#include "score_dropout.cuh"
#include "score_mask_bwd.cuh"
#include "tile.cuh"

namespace sdpa {

// dK and dV take kKeyBlocks * kHeadDim registers of a lane; the rest follows from that. A long key tile keeps the
// number of float32 additions to dQ low: every key tile adds to every dQ row once.
// kSharedMask_: the mask is one that SharedMask takes.
// kSmall: a multiprocessor of 100 KB has room for two blocks at 64 columns.
template <class Arch, int kHeadDim, ScoreEdit kEdit, bool kSharedMask_ = false, bool kSmall = false>
struct NarrowTile {
  static constexpr bool kSharedMask = kSharedMask_, kWalks = false, kIsPlain = false;
  static constexpr int kWarps = kHeadDim <= 64 ? 4 : 8;
  static constexpr int kKeyBlocks = kHeadDim <= 64 ? 2 : 1;  // 16-key blocks of a warp
  static constexpr int kQueries = kSmall ? 32 : 64;
  // Queries whose scores are in registers at once: 32 where there is room.
  static constexpr int kStep = has_mask(kEdit) ? 16 : 32;
  static constexpr int kStages = kSmall ? 1 : 2, kGradStages = kHeadDim <= 64 && !kSmall ? 2 : 1;  // of queries, of dO
  static constexpr bool kValueInRegisters = kHeadDim > 64;  // there is no room for it in 99 KB of shared memory
  static constexpr int kEarlyMaskWords = kHeadDim > 32 ? kKeyBlocks : kEdit == ScoreEdit::kMaskGradient ? 0 : 1;
  // Dropout: whether its numbers are drawn before the scores are there, how (see DroppedBlock), and whether what a
  // head's draws have in common stays in registers, uniform ones at best. Other settings spill.
  static constexpr bool kDrawsEarly = kHeadDim > 64, kPacksDropped = kIsBeforeSm90 || kHeadDim > 64;
  static constexpr bool kKeepsDraws = kHeadDim == (kIsBeforeSm90 ? 64 : 32);
  // Whether a tile that is selected is looked up once, for all that want to know the next (see QueryTiles). This tile
  // at 64 columns was 2 to 5 % slower with it.
  static constexpr bool kCarriesNext = kHeadDim != 64 || kSharedMask || kSmall;
  static constexpr int kBlocksPerSm = kHeadDim <= 32 ? 3 : kHeadDim <= 64 ? 2 : 1;
};

// Head dims to 64. There are 64 KB of shared memory, and copies go through registers, which a second stage would not
// hide: more warps do.
template <int kHeadDim, ScoreEdit kEdit>
struct NarrowTile<Sm75, kHeadDim, kEdit, false, false> {
  static constexpr bool kSharedMask = false, kWalks = false, kIsPlain = false;
  static constexpr int kWarps = 8, kKeyBlocks = 1;
  static constexpr int kQueries = kHeadDim <= 32 ? 128 : 64;
  static constexpr int kStep = kEdit == ScoreEdit::kNone ? 32 : 16;
  static constexpr int kStages = 1, kGradStages = 1;
  static constexpr bool kValueInRegisters = true;
  static constexpr int kEarlyMaskWords = kKeyBlocks;
  static constexpr bool kDrawsEarly = false, kPacksDropped = kHeadDim > 32, kKeepsDraws = false;
  static constexpr bool kCarriesNext = true;
  static constexpr int kBlocksPerSm = 1;
};

template <class Arch, class T, int kHeadDim, class Tile, ScoreEdit kEdit>
struct NarrowBackward {
  static constexpr bool kHasMask = has_mask(kEdit), kWalks = Tile::kWalks;
  static constexpr int kWarps = Tile::kWarps, kThreads = kWarps * 32;
  static constexpr int kKeyBlocks = Tile::kKeyBlocks;
  static constexpr int kKeyTile = kWarps * kKeyBlocks * 16;
  static constexpr int kQueryTile = Tile::kQueries;
  static constexpr bool kSpills = kWalks && kChip > 80 && kChip < 90;  // with 32 queries at once
  static constexpr int kStep = kSpills ? 16 : Tile::kStep;
  static constexpr int kStages = Tile::kStages, kGradStages = Tile::kGradStages;
  static constexpr int kSteps = kHeadDim / 16;  // k-steps of Q K^T and dO V^T

  // dQ: each warp takes 32 queries and a share of the columns.
  static constexpr int kQueryGroups = kQueryTile / 32, kColGroups = kWarps / kQueryGroups;
  static constexpr int kGradQueryBlocks = kHeadDim / kColGroups / 16;  // 16-column blocks of a warp
  static_assert(kQueryTile % kStep == 0 && kGradQueryBlocks * kColGroups * 16 == kHeadDim);

  using KeyTile = SharedTile<T, kKeyTile, kHeadDim, Arch>;      // of values too
  using QueryTile = SharedTile<T, kQueryTile, kHeadDim, Arch>;  // of dO too
  using ScoreTile = SharedTile<T, kKeyTile, kQueryTile, Arch>;  // dS^T

  using KeyOrder = std::conditional_t<kHasMask, RowRuns<kKeyBlocks>, InOrder>;
  using Range = BlockRange<kQueryTile, kKeyTile>;

  static constexpr int kQueryOffset = KeyTile::kBytes * (Tile::kValueInRegisters ? 1 : 2);
  static constexpr int kScoreOffset = kQueryOffset + (kStages + kGradStages) * QueryTile::kBytes;
  using MaskTile = SharedMask<kQueryTile, kKeyTile>;
  static constexpr int kMaskOffset = kScoreOffset + ScoreTile::kBytes;
  static constexpr int kRowOffset = kMaskOffset + (Tile::kSharedMask ? MaskTile::kBytes : 0);
  static constexpr int kPlaceOffset = kRowOffset + (kHasMask ? 3 : 2) * kQueryTile * static_cast<int>(sizeof(float));
  static constexpr bool kSelects = kEdit == ScoreEdit::kMask;  // leaves out query tiles
  using Selected = QueryTiles<kQueryTile, kKeyTile, kHeadDim == 64 && Arch::kAsyncCopy ? 160 : 512>;
  static constexpr int kSelectedOffset = kPlaceOffset + (kEdit == ScoreEdit::kMaskGradient ? 16 : 0);
  static constexpr bool kReadsOrigin = kFetchesAll<Tile> && kEdit == ScoreEdit::kDropout;
  static constexpr int kOriginOffset = kSelectedOffset + (kSelects ? Selected::kBytes : 0);
  static constexpr int kSharedBytes = kOriginOffset + (kReadsOrigin ? 16 : 0);
  static_assert(kSharedBytes <= Arch::kSharedBytes);
};

template <class Arch, class T, int kHeadDim, class Tile, ScoreEdit kEdit>
__global__ void __launch_bounds__(NarrowBackward<Arch, T, kHeadDim, Tile, kEdit>::kThreads, Tile::kBlocksPerSm)
    narrow_backward_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BlockOrder order,
                           const __grid_constant__ Dropout dropout, const float scale_log2) {
  using Flash = NarrowBackward<Arch, T, kHeadDim, Tile, kEdit>;
  using KeyOrder = typename Flash::KeyOrder;

  using Product = Mma<Arch, T>;
  constexpr bool kHasMask = Flash::kHasMask, kDrops = kEdit == ScoreEdit::kDropout;
  constexpr int kKeyBlocks = Flash::kKeyBlocks, kKeyTile = Flash::kKeyTile, kQueryTile = Flash::kQueryTile;
  constexpr int kThreads = Flash::kThreads, kSteps = Flash::kSteps, kStep = Flash::kStep;
  extern __shared__ __align__(1024) unsigned char shared[];

  // Work of this block: the query tiles of `group` query heads, one head after the other.
  let_successor_start();
  int tile_number, batch_key_head;
  if (!order.locate(tile_number, batch_key_head)) return;
  int k0 = tile_number * kKeyTile;  // causal: the first tile is the longest
  const int heads = static_cast<int>(p.H), group = static_cast<int>(p.group), key_heads = heads / group;
  if constexpr (kHasMask) batch_key_head = side_by_side(p, batch_key_head, key_heads);
  int batch = batch_key_head / key_heads, key_head = batch_key_head % key_heads;
  const typename Flash::Range range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};

  // Shared memory: key | value, unless in registers | query stages | dO stages | dS^T | mask, if so | LSE | delta |
  // rest of LSE | where in the mask's gradient the tile of scores begins.
  const uint32_t base = shared_address(shared);
  const typename Flash::KeyTile key_tile{base};
  // Values on their way into registers pass through the keys' place.
  const typename Flash::KeyTile value_tile{base + (Tile::kValueInRegisters ? 0 : Flash::KeyTile::kBytes)};
  const auto query_tile = [&](int stage) {
    return typename Flash::QueryTile{base + Flash::kQueryOffset + stage * Flash::QueryTile::kBytes};
  };
  const auto grad_tile = [&](int stage) { return query_tile(Flash::kStages + stage); };
  const typename Flash::ScoreTile score_tile{base + Flash::kScoreOffset};
  const typename Flash::MaskTile mask_tile{base + Flash::kMaskOffset};
  float* const shared_lse = reinterpret_cast<float*>(shared + Flash::kRowOffset);
  float* const shared_delta = shared_lse + kQueryTile;
  float* const shared_rest = shared_delta + kQueryTile;
  float** const shared_place = reinterpret_cast<float**>(shared + Flash::kPlaceOffset);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_block = warp * kKeyBlocks;  // of 16 keys, in the key tile
  const auto lane_offset = Flash::KeyTile::lane_offset();
  // Some variants have no registers for addresses that would stay valid over the loop: from here on they are computed
  // from their origins again.
  constexpr bool kStartsAnew = kHasMask || kFetchesAll<Tile> ||
                               (kEdit == ScoreEdit::kNone && (kIsBeforeSm90 ? kHeadDim == 64 : kHeadDim == 128));
  const auto start_anew = [&] {
    if constexpr (Flash::kReadsOrigin) {
      const uint32_t origin = base + Flash::kOriginOffset;
      batch = load_shared_4(origin), key_head = load_shared_4(origin + 4), k0 = load_shared_4(origin + 8);
    } else if constexpr (kStartsAnew) {
      asm volatile("" : "+r"(batch), "+r"(key_head), "+r"(k0));
    }
  };
  if (Flash::kReadsOrigin && threadIdx.x == 0) {
    const auto word = [](int x) { return static_cast<uint32_t>(x); };
    store_shared_16(base + Flash::kOriginOffset, {word(batch), word(key_head), word(k0), 0});
  }

  // The loop goes over the query tiles of the group's query heads, one head after the other. For the mask's gradient
  // each batch starts at another tile, so that those which share it do not add to the same place at once. Places are
  // counted on, since divisions would stand before all else in a tile.
  struct Place {
    int head, q0;
  };
  const int length = static_cast<int>(p.L);
  const auto first_query = [&] { return range.first_query_tile(k0) * kQueryTile; };
  const typename Flash::Selected selected{base + Flash::kSelectedOffset};
  if constexpr (Flash::kSelects) selected.template fill<kThreads>(p, batch, key_head * group, k0);
  const auto start_of = [&](int head) -> Place {
    if constexpr (kEdit == ScoreEdit::kMaskGradient) {
      const int tiles = range.query_tiles() - range.first_query_tile(k0);
      return {head, first_query() + (tiles > 0 ? batch % tiles : 0) * kQueryTile};
    }
    return {head, Flash::kSelects ? selected.from(0) * kQueryTile : first_query()};
  };
  const auto exists = [&](const Place& x) { return x.head < (key_head + 1) * group; };
  Place here = start_of(key_head * group);
  const int turn = here.q0;  // of the mask's gradient
  const auto after = [&](Place x) {
    x.q0 += kQueryTile;
    if constexpr (Flash::kSelects) x.q0 = selected.from(x.q0 / kQueryTile) * kQueryTile;
    if constexpr (kEdit == ScoreEdit::kMaskGradient) {
      if (x.q0 >= length) x.q0 = first_query();
      if (x.q0 == turn) ++x.head;
    } else if (x.q0 >= length) {
      x = start_of(x.head + 1);
    }
    return x;
  };
  if ((Flash::kSelects ? here.q0 : first_query()) >= length) here.head += group;  // nothing to do
  constexpr bool kCarriesNext = (Flash::kSelects && Tile::kCarriesNext) || (kFetchesAll<Tile> && !kIsBeforeSm90);
  Place carried = here;
  const auto following = [&] {
    if constexpr (kCarriesNext) return carried;
    return after(here);
  };
  int parity = 0;  // of the place's number
  const auto fetch = [&](const auto& tile, const Operand& operand, int64_t cols, const Place& x) {
    const HeadRows<const T> rows(operand, batch, x.head, kFetchesAll<Tile> && !exists(x) ? 0 : p.L, cols);
    // No registers for what a thread's places have in common.
    const unsigned thread = kFetchesAll<Tile> ? fresh_thread_index() : threadIdx.x;
    fetch_rows<Arch, kThreads, Tile::kIsPlain>(tile, rows, x.q0, thread);
  };
  const auto fetch_query = [&](const Place& x, int stage) {
    fetch(query_tile(stage % Flash::kStages), p.query, p.E, x);
  };
  const auto fetch_grad = [&](const Place& x, int stage) {
    fetch(grad_tile(stage % Flash::kGradStages), p.grad_output, p.Ev, x);
  };
  const auto fetch_mask = [&](const Place& x) {
    if constexpr (Tile::kSharedMask) mask_tile.template fill<kThreads>(p, batch, x.head, x.q0, k0);
  };
  // LSE, delta and rest of LSE of this thread's row. A row that does not exist is all zeros and adds nothing to any
  // gradient, if only its probabilities are finite, which a mask may prevent.
  const auto read_row = [&](const Place& x) -> float3 {
    const int row = x.q0 + static_cast<int>(threadIdx.x);
    if (!exists(x) || threadIdx.x >= kQueryTile || row >= length) return {kHasMask ? -INFINITY : 0.f, 0.f, 0.f};
    const int64_t i = int64_t{batch * heads + x.head} * p.L + row;
    return {p.logsumexp[i], p.delta[i], kHasMask && p.logsumexp_rest != nullptr ? p.logsumexp_rest[i] : 0.f};
  };
  const auto publish_row = [&](const float3& row, const Place& x) {
    if (kEdit == ScoreEdit::kMaskGradient && threadIdx.x == 0) {
      const int64_t* const stride = p.grad_mask_stride;
      *shared_place = p.grad_mask + batch * stride[0] + x.head * stride[1] + x.q0 * stride[2] + k0;
    }
    if (threadIdx.x >= kQueryTile) return;
    // +inf makes every probability of a row with nothing to attend to 0.
    const float lse = kDrops ? fmaf(row.x, kLog2E, -dropout.log2_rescale) : row.x * kLog2E;
    shared_lse[threadIdx.x] = row.x == -INFINITY ? INFINITY : lse;
    shared_delta[threadIdx.x] = kDrops ? row.y * dropout.chance : row.y;  // see DroppedKeys::gradient
    if constexpr (kHasMask) shared_rest[threadIdx.x] = row.z;
  };

  value_tile.template fill<kThreads, KeyOrder>(HeadRows<const T>(p.value, batch, key_head, p.seen_keys, p.Ev), k0);
  uint32_t value_registers[Tile::kValueInRegisters ? kSteps : 1][kKeyBlocks][4];
  if constexpr (Tile::kValueInRegisters) {
    wait_for_copies<Arch>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int m = 0; m < kKeyBlocks; ++m) value_tile.load_a(value_registers[k][m], lane_offset, warp_block + m, k);
    }
    __syncthreads();
  }
  key_tile.template fill<kThreads, KeyOrder>(HeadRows<const T>(p.key, batch, key_head, p.seen_keys, p.E), k0);

  static_assert(!Tile::kWalks || !Tile::kValueInRegisters);
  constexpr bool kMaskGradient = kEdit == ScoreEdit::kMaskGradient;
  float grad_key[kKeyBlocks][kHeadDim / 8][4] = {}, grad_value[kKeyBlocks][kHeadDim / 8][4] = {};

  if (exists(here)) {
    fetch_query(here, 0);
    fetch_grad(here, 0);
    fetch_mask(here);
  }
  wait_for_predecessor();  // which makes delta, and zeros where dQ is summed up
  if (exists(here)) publish_row(read_row(here), here);
  [[maybe_unused]] DrawsOfHead draws;
  [[maybe_unused]] int head_drawn = -1;
#pragma unroll 1
  while (true) {
#pragma unroll 1
    for (; exists(here); here = following(), parity ^= 1) {
      if constexpr (kCarriesNext) carried = after(here);
      if constexpr (!Flash::kReadsOrigin) start_anew();
      // This query tile has landed; every warp is done with the one before, its stage and its dS.
      wait_for_copies<Arch>();
      __syncthreads();
      if constexpr (Flash::kReadsOrigin) start_anew();
      if constexpr (kDrops && Tile::kKeepsDraws) {
        // Whether a head begins: what costs no register where the origin is read, what does not spill elsewhere.
        if (Flash::kReadsOrigin ? here.q0 == first_query() : here.head != head_drawn) {
          head_drawn = here.head;
          const uint32_t batch_head = static_cast<uint32_t>(p.first_batch_head) + batch * heads + here.head;
          draws = DrawsOfHead::make(dropout.with_seed(*p.seed), batch_head);
        }
      }
      if (const Place next = following(); kFetchesAll<Tile> || exists(next)) {
        if constexpr (Flash::kStages > 1) fetch_query(next, parity + 1);
        if constexpr (Flash::kGradStages > 1) fetch_grad(next, parity + 1);
      }

      const int q0 = here.q0;
      const auto query = query_tile(parity % Flash::kStages), grad = grad_tile(parity % Flash::kGradStages);

      const bool mask_from_registers = kMaskGradient && MaskGradientRuns<kKeyBlocks>::fit(p) &&
                                       q0 + kQueryTile <= range.L && k0 + kKeyTile <= range.S;
      const bool drops = kDrops || (kHasMask && p.dropout_p > 0.f);
      int steps = kQueryTile / kStep;
      constexpr bool kRollsDropout = kHeadDim > 64;
      constexpr bool kRolls = kHasMask || (kDrops && kRollsDropout) || !Arch::kAsyncCopy;
      if constexpr (kRolls) asm volatile("" : "+r"(steps));  // keeps the loop rolled, where unrolling it spills
      constexpr int kUnroll = kRolls || (Tile::kWalks && kIsBeforeSm90) ? 1 : kQueryTile / kStep;
#pragma unroll kUnroll
      for (int step = 0; step < steps; ++step) {
        TransposedMask<kKeyBlocks, kStep / 8, Tile::kEarlyMaskWords> mask;
        if constexpr (kHasMask && !Tile::kSharedMask) {
          mask.read_early(p, batch, here.head, q0 + step * kStep + lane % 4 * 2,
                          k0 + KeyOrder::key(warp_block * 16 + lane / 4));
        }

        DroppedKeys<T, kHasMask, kKeyBlocks, kStep, Tile::kPacksDropped> dropped;
        const auto draw_dropped = [&](int k) {
          // What is made of these does not stay in registers.
          if constexpr (Flash::kReadsOrigin) {
            start_anew();
          } else {
            asm volatile("" : "+r"(batch), "+r"(key_head), "+r"(k0));
          }
          const uint32_t batch_head = static_cast<uint32_t>(p.first_batch_head) + batch * heads + here.head;
          if constexpr (kDrops && Tile::kKeepsDraws) {
            dropped.draw(dropout, draws, q0 + step * kStep + k * 16, k0 + warp_block * 16, k);
            return;
          }
          dropped.draw(dropout.with_seed(*p.seed), batch_head, q0 + step * kStep + k * 16, k0 + warp_block * 16, k);
        };
        if constexpr (kDrops && Tile::kDrawsEarly) draw_dropped(0);

        // S^T = K Q^T and dP^T = V dO^T, side by side: twice as many independent mma in flight
        float scores[kKeyBlocks][kStep / 8][4] = {}, grad_scores[kKeyBlocks][kStep / 8][4] = {};
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          uint32_t key[kKeyBlocks][4];
          uint32_t (&value)[kKeyBlocks][4] = value_registers[Tile::kValueInRegisters ? k : 0];
#pragma unroll
          for (int m = 0; m < kKeyBlocks; ++m) {
            key_tile.load_a(key[m], lane_offset, warp_block + m, k);
            if constexpr (!Tile::kValueInRegisters) value_tile.load_a(value[m], lane_offset, warp_block + m, k);
          }
#pragma unroll
          for (int n = 0; n < kStep / 16; ++n) {
            uint32_t b[4], c[4];
            query.load_b_transposed(b, lane_offset, step * (kStep / 16) + n, k);
            grad.load_b_transposed(c, lane_offset, step * (kStep / 16) + n, k);
#pragma unroll
            for (int m = 0; m < kKeyBlocks; ++m) {
              Product::add(scores[m][2 * n], key[m], b[0], b[1]);
              Product::add(scores[m][2 * n + 1], key[m], b[2], b[3]);
              Product::add(grad_scores[m][2 * n], value[m], c[0], c[1]);
              Product::add(grad_scores[m][2 * n + 1], value[m], c[2], c[3]);
            }
          }
        }

        // log2 of P^T, -inf where a query must not attend
        if constexpr (Tile::kSharedMask) {
          const int row = step * kStep + lane % 4 * 2;
          transposed_log2_probability<true>(
              scores, p.mask_kind, scale_log2, shared_lse + row, shared_rest + row,
              [&](auto& run) { mask_tile.read(run, row, KeyOrder::key(warp_block * 16 + lane / 4)); });
        } else if constexpr (kHasMask) {
          start_anew();
          mask.log2_probability(scores, p, batch, here.head, q0 + step * kStep + lane % 4 * 2,
                                k0 + KeyOrder::key(warp_block * 16 + lane / 4), scale_log2,
                                shared_lse + step * kStep + lane % 4 * 2, shared_rest + step * kStep + lane % 4 * 2);
        } else {
#pragma unroll
          for (int n = 0; n < kStep / 8; ++n) {
            const float2 lse = *reinterpret_cast<const float2*>(shared_lse + step * kStep + n * 8 + lane % 4 * 2);
#pragma unroll
            for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                scores[m][n][i] = fmaf(scores[m][n][i], scale_log2, i % 2 == 0 ? -lse.x : -lse.y);
              }
            }
          }
        }

        if (range.is_partial(q0, k0)) {
          const TileLimit limit = range.limit(q0, k0);
#pragma unroll
          for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
            for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const int key = KeyOrder::key((warp_block + m) * 16 + lane / 4 + i / 2 * 8);
                const int row = step * kStep + n * 8 + lane % 4 * 2 + i % 2;
                if (!limit.sees(row, key)) scores[m][n][i] = -INFINITY;
              }
            }
          }
        }

        // 16 queries at a time: dV += P^T dO, dS^T = P^T * (dP^T - delta), dK += dS^T Q
#pragma unroll
        for (int k = 0; k < kStep / 16; ++k) {
          const int query_block = step * (kStep / 16) + k;
          uint32_t a[kKeyBlocks][4];
          float2 deltas[2];
          const auto read_deltas = [&] {
            const float2* const delta = reinterpret_cast<const float2*>(shared_delta + query_block * 16 + lane % 4 * 2);
            deltas[0] = delta[0], deltas[1] = delta[4];
          };
          if constexpr (kDrops) read_deltas();
          if (drops && !(kDrops && Tile::kDrawsEarly)) draw_dropped(k);
#pragma unroll
          for (int m = 0; m < kKeyBlocks; ++m) {
            float (&left)[4] = scores[m][2 * k], (&right)[4] = scores[m][2 * k + 1];
#pragma unroll
            for (int i = 0; i < 4; ++i) left[i] = exp2_approx(left[i]), right[i] = exp2_approx(right[i]);
            float (&grad_left)[4] = grad_scores[m][2 * k], (&grad_right)[4] = grad_scores[m][2 * k + 1];
            if constexpr (kDrops) {
              dropped.gradient(a[m], left, right, grad_left, grad_right, deltas, dropout, m, k);
            } else if (drops) {
              dropped.drop(a[m], left, right, grad_left, grad_right, dropout.rescale, m);
            } else {
              to_operand<T>(a[m], left, right);
            }
          }

#pragma unroll
          for (int n = 0; n < kHeadDim / 16; ++n) {
            uint32_t b[4];
            grad.load_b(b, lane_offset, query_block, n);
#pragma unroll
            for (int m = 0; m < kKeyBlocks; ++m) {
              Product::add(grad_value[m][2 * n], a[m], b[0], b[1]);
              Product::add(grad_value[m][2 * n + 1], a[m], b[2], b[3]);
            }
          }
          if constexpr (!kDrops) read_deltas();
#pragma unroll
          for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
            for (int i = 0; i < 8 && !kDrops; ++i) {
              const float2& row = deltas[i / 4];
              scores[m][2 * k + i / 4][i % 4] *= grad_scores[m][2 * k + i / 4][i % 4] - (i % 2 == 0 ? row.x : row.y);
            }
            to_operand<T>(a[m], scores[m][2 * k], scores[m][2 * k + 1]);
            score_tile.put_a(a[m], warp_block + m, query_block);
          }
          if constexpr (kMaskGradient) {
            if (mask_from_registers) {
              const int row = query_block * 16 + lane % 4 * 2, key = KeyOrder::key(warp_block * 16 + lane / 4);
              const int64_t stride = p.grad_mask_stride[2];
              MaskGradientRuns<kKeyBlocks>::add(scores, 2 * k, *shared_place + row * stride + key, stride, kQueryTile);
            }
          }
#pragma unroll
          for (int n = 0; n < kHeadDim / 16; ++n) {
            uint32_t b[4];
            query.load_b(b, lane_offset, query_block, n);
#pragma unroll
            for (int m = 0; m < kKeyBlocks; ++m) {
              Product::add(grad_key[m][2 * n], a[m], b[0], b[1]);
              Product::add(grad_key[m][2 * n + 1], a[m], b[2], b[3]);
            }
          }
        }
      }

      __syncthreads();  // dS is complete; query, dO, LSE and delta are free
      start_anew();
      const Place next = following();
      if (kFetchesAll<Tile> || exists(next)) {
        if constexpr (Flash::kStages == 1) fetch_query(next, 0);
        if constexpr (Flash::kGradStages == 1) fetch_grad(next, 0);
        fetch_mask(next);
      }
      const float3 next_row = read_row(next);  // on its way while dQ is computed

      if constexpr (kMaskGradient) {
        if (!mask_from_registers) {
          add_mask_gradient<T, Flash::kWarps, KeyOrder>(score_tile, p, batch, here.head, q0, k0);
        }
      }

      // dQ = dS K
      if (p.grad_query.data != nullptr) {
        constexpr int kBlocks = Flash::kGradQueryBlocks;
        const int query_group = warp / Flash::kColGroups, col_group = warp % Flash::kColGroups;
        const auto score_lane_offset = Flash::ScoreTile::lane_offset();
        float grad_query[2][2 * kBlocks][4] = {};
        const GradQuerySums sums(p, batch * heads + here.head);
        using Step = GradQuerySums::Step;
        // Of a walk: whether this is the first and the last key tile that these queries see.
        const bool is_first = k0 == 0, is_last = !range.matters(q0, k0 + kKeyTile);
        const int row0 = q0 + query_group * 32, tile0 = col_group * 2 * kBlocks;
        if (Tile::kWalks && is_last && !is_first) sums.template take_rows<Step::kGet, true>(grad_query, row0, tile0);
#pragma unroll
        for (int k = 0; k < kKeyTile / 16; ++k) {
          uint32_t a[2][4];
#pragma unroll
          for (int m = 0; m < 2; ++m) score_tile.load_a_transposed(a[m], score_lane_offset, k, query_group * 2 + m);
#pragma unroll
          for (int n = 0; n < kBlocks; ++n) {
            uint32_t b[4];
            key_tile.load_b(b, lane_offset, k, col_group * kBlocks + n);
#pragma unroll
            for (int m = 0; m < 2; ++m) {
              Product::add(grad_query[m][2 * n], a[m], b[0], b[1]);
              Product::add(grad_query[m][2 * n + 1], a[m], b[2], b[3]);
            }
          }
        }
        if (Tile::kWalks && is_last) {
          const HeadRows<T> target(p.grad_query, batch, here.head, p.L, p.E);
          write_query_gradient(grad_query, target, row0, tile0, p.scale);
        } else if (Tile::kWalks && is_first) {
          sums.template take_rows<Step::kPut, true>(grad_query, row0, tile0);
        } else {
          sums.template take_rows<Step::kAdd, Tile::kIsPlain && !kDrops>(grad_query, row0, tile0);
        }
      }
      publish_row(next_row, following());
    }

    // dK and dV leave through the key tile, where each warp has its rows.
    wait_for_copies<Arch>();
    __syncthreads();
    // What the next key tile needs is computed from its origins: the loop above has no registers to keep it.
    if constexpr (Tile::kWalks) asm volatile("" : "+r"(batch), "+r"(key_head), "+r"(k0));
    const int warp_row = k0 + warp_block * 16;
    bool goes_on = false;
    float3 row{};
    if constexpr (Tile::kWalks) {
      k0 += kKeyTile;
      goes_on = k0 < p.S;
      here = start_of(goes_on && first_query() < length ? key_head * group : (key_head + 1) * group);
      if (exists(here)) {
        fetch_query(here, parity);
        fetch_grad(here, parity);
        row = read_row(here);
      }
    }
    if (p.grad_value.data != nullptr) {
      if constexpr (kHasMask) {
#pragma unroll
        for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
          for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) grad_value[m][n][i] *= dropout.rescale;  // 1 without dropout
          }
        }
      }

      const HeadRows<T> target(p.grad_value, batch, key_head, p.S, p.Ev);
      key_tile.template store<kKeyBlocks, KeyOrder>(grad_value, warp_block, target, warp_row);
    }
    if (p.grad_key.data != nullptr) {
#pragma unroll
      for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) grad_key[m][n][i] *= p.scale;
        }
      }
      const HeadRows<T> target(p.grad_key, batch, key_head, p.S, p.E);
      key_tile.template store<kKeyBlocks, KeyOrder>(grad_key, warp_block, target, warp_row);
    }
    if (!goes_on) return;
    __syncthreads();
    fetch_rows<Arch, kThreads, Tile::kWalks>(key_tile, HeadRows<const T>(p.key, batch, key_head, p.seen_keys, p.E), k0);
    fetch_rows<Arch, kThreads, Tile::kWalks>(value_tile, HeadRows<const T>(p.value, batch, key_head, p.seen_keys, p.Ev),
                                             k0);
    publish_row(row, here);
#pragma unroll
    for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) grad_key[m][n][i] = grad_value[m][n][i] = 0.f;
      }
    }
  }
}

}  // namespace sdpa
