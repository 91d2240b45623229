// Flash attention forward on mma.sync: one block for each query tile of a head, a loop over key tiles.
//
// A warp owns whole query rows: scores, softmax and output of a row never leave it. Keys and values come through a
// two-stage ring of cp.async copies, with one barrier per key tile, or through fewer places with two (kPlaces). P goes
// from the accumulators of Q K^T straight into the operand registers of P V. Head dims over 128: flash_fwd_wide.cuh,
// but on sm75 they are here, with one place for keys and values in turn.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "../arch/arch.h"
#include "../attn/block_range.h"
#include "../attn/launch.h"
#include "../attn/params.h"
#include "../attn/softmax.h"
#include "bool_mask.cuh"
#include "flash_fwd_ring.cuh"
#include "flash_fwd_stream.cuh"
#include "flash_fwd_tensor.cuh"
#include "flash_fwd_wide.cuh"
#include "forward_parts.cuh"
#include "score_change.h"
#include "score_dropout.cuh"
#include "score_mask.cuh"
#include "tile.cuh"
#include "tile_stream.cuh"

namespace sdpa {

// 32 rows a warp rather than 16: a key or value fragment read from shared memory then feeds twice the mma, and shared
// memory bandwidth is what a 16-row warp runs out of first. But where copies go through registers, more warps hide
// them better, and a second stage would not.
//
// kPlaces, of tiles of keys or values in shared memory, so that a multiprocessor has room for eight warps:
//   4: two stages of each.
//   3: in rotation. A tile's values are copied while its scores are made, the next keys all the while. At 128 columns
//      two blocks take 162 KB, an A100's all, and four places were no faster.
//   2: one each, copied while the other is multiplied. At 128 columns it is for twice the warps, in 99 KB.
//   1: for the keys, then for the values.
// Without cp.async nothing is copied meanwhile, and there are 2, or 1 over 128 columns.
template <class Arch, int kHeadDim>
constexpr int kDefaultPlaces = !Arch::kAsyncCopy                  ? (kHeadDim > 128 ? 1 : 2)
                               : kHeadDim > 64 && kHeadDim <= 128 ? 3
                                                                  : 4;

template <class Arch, int kHeadDim, ScoreChange kChange, int kPlaces = kDefaultPlaces<Arch, kHeadDim>>
struct FlashForwardTile {
  static constexpr bool kOnePlace = kPlaces == 1;
  static constexpr int kWarps = kPlaces == 2 && kHeadDim <= 128 ? 8 : 4;
  static constexpr int kRowBlocks = Arch::kAsyncCopy ? 2 : 1;  // 16-row blocks of a warp
  static constexpr int kKeys = kHeadDim > 128 && !kOnePlace ? 32 : 64;
  static constexpr int kStages = kPlaces == 4 ? 2 : 1;  // of keys and of values
  // Keys whose scores are in registers at once, and a row's float mask entries in registers meanwhile.
  static constexpr bool kIsWideDropout = kChange == ScoreChange::kDropout && kHeadDim > 64;
  static constexpr int kStep =
      (kChange == ScoreChange::kFloatMask && kHeadDim != 64) || (kIsWideDropout && kHeadDim == 128 && kPlaces == 2)
          ? 32
          : kKeys;
  static constexpr int kEarlyMaskWords = kHeadDim == 64 ? 8 : 4;
  // At 128 the output fills the registers, and the variants that need more read the query from shared memory, too.
  static constexpr bool kIsPlain = kChange == ScoreChange::kNone || kChange == ScoreChange::kKeyPadding;
  static constexpr bool kQueryInRegisters = kHeadDim == 32   ? kIsPlain
                                            : kHeadDim == 64 ? Arch::kAsyncCopy && kChange != ScoreChange::kFloatMask
                                                             : kHeadDim == 80 && kIsPlain;
  static constexpr int kBlocksPerSm = !Arch::kAsyncCopy || kWarps == 8 ? 1 : kHeadDim <= 32 ? 3 : 2;
  // One copy is issued after the first k-step of Q K^T, the other after this one: what does not spill at 128.
  static constexpr int kOtherCopyAfter = kHeadDim <= 32                       ? 0
                                         : kHeadDim <= 64                     ? 1
                                         : kChange == ScoreChange::kFloatMask ? 2
                                                                              : 4;
  static constexpr bool kKeysAmongValues = kPlaces == 3 && kIsWideDropout;  // they are copied after P V's first 32 keys
  // What else keeps variants from spilling.
  static constexpr bool kStreamsQuery = Arch::kAsyncCopy && kHeadDim <= (kIsPlain ? 96 : 64);
  static constexpr bool kRecomputeAddresses =
      (kHeadDim == 96 && kChange == ScoreChange::kDropout) || (kHeadDim == 128 && Arch::kAsyncCopy);
  static constexpr bool kFewAddresses = kIsWideDropout && kStep == kKeys;
  // See OnlineSoftmax. With dropout it spills at 128 on sm80.
  static constexpr bool kFewInstructions =
      kChange != ScoreChange::kFloatMask && kChange != ScoreChange::kAnyMask && !(kIsWideDropout && kStep < kKeys);
  static constexpr bool kKeepsDraws = kHeadDim <= 64;  // what they have in common, in registers, over the loop
};

// kPlain: for operands whose rows are whole aligned chunks (see has_whole_chunks), so that the loop has no other way to
// copy.
template <class Arch, class T, int kHeadDim, ScoreChange kChange, int kPlaces = kDefaultPlaces<Arch, kHeadDim>,
          bool kPlain = false>
struct FlashForward {
  using Tile = FlashForwardTile<Arch, kHeadDim, kChange, kPlaces>;
  static constexpr bool kRotates = kPlaces == 3, kInTurn = Arch::kAsyncCopy && kPlaces == 2;
  static constexpr int kThreads = Tile::kWarps * 32;
  static constexpr int kRowBlocks = Tile::kRowBlocks;
  static constexpr int kWarpRows = kRowBlocks * 16;
  static constexpr int kQueryTile = Tile::kWarps * kWarpRows;
  static constexpr int kKeyTile = Tile::kKeys;
  static constexpr int kStages = Tile::kStages;
  static constexpr int kSteps = kHeadDim / 16;                    // k-steps of Q K^T
  static constexpr bool kAny = kChange == ScoreChange::kAnyMask;  // any mask or none, and dropout or none
  static constexpr bool kBool = kChange == ScoreChange::kBoolMask, kFloat = kChange == ScoreChange::kFloatMask || kAny;
  static constexpr bool kPadding = kChange == ScoreChange::kKeyPadding;

  // Of a row in shared memory.
  static constexpr int kCols = kHeadDim <= 64 ? kHeadDim : kHeadDim <= 128 ? 128 : kHeadDim <= 192 ? 192 : 256;
  static constexpr bool kFewAddresses =
      (kBool && (kHeadDim < 128 || Arch::kAsyncCopy)) || kFloat || kCols >= 192 || Tile::kFewAddresses;
  using QueryTile = SharedTile<T, kQueryTile, kCols, Arch, kFewAddresses>;
  using KeyTile = SharedTile<T, kKeyTile, kCols, Arch, kFewAddresses>;  // of values too
  using KeyOrder = std::conditional_t<kBool || kFloat, ColumnRuns<kKeyTile>,
                                      std::conditional_t<kChange == ScoreChange::kDropout, PairedOctets, InOrder>>;
  // Plain, they spill otherwise.
  static constexpr bool kRecomputePlain = kPlain && kHeadDim == (kIsBeforeSm90 ? 32 : 64) &&
                                          kChange == (kIsBeforeSm90 ? ScoreChange::kNone : ScoreChange::kDropout);
  using Stream = TileStream<KeyTile, kThreads, KeyOrder, kHeadDim, Tile::kRecomputeAddresses || kRecomputePlain>;
  using Range = BlockRange<kQueryTile, kKeyTile>;
  using MaskTile = PaddingTile<kKeyTile>;
  static constexpr bool kHasMap = (kPadding || kBool) && Arch::kAsyncCopy;  // elsewhere there is no room
  // Of padding at 64 columns a list, which is the faster. (At 32 it spills, beyond there is no room beside a second
  // block.) The map that it is made from is where keys come later.
  static constexpr bool kHasList = kPadding && kHasMap && kHeadDim == 64;
  static constexpr int kListOffset = QueryTile::kBytes + kPlaces * KeyTile::kBytes;
  static constexpr int kMapOffset = kHasList ? QueryTile::kBytes : kListOffset;
  static constexpr bool kHasPlace = Arch::kAsyncCopy;  // elsewhere there is no room
  static_assert(kHasPlace || !kPlain);
  static constexpr int kPlaceOffset = kListOffset + (kHasList ? TileList::kBytes : kHasMap ? TileMap::kBytes : 0);
  static constexpr int kPaddingOffset = kPlaceOffset + (kHasPlace ? HeadPlace::kBytes : 0);
  static constexpr int kSharedBytes = kPaddingOffset + (kPadding ? 2 * MaskTile::kBytes : 0);
  static_assert(kSharedBytes <= Arch::kSharedBytes);
  static_assert(Tile::kOtherCopyAfter < kSteps);
  static_assert(kHeadDim % 16 == 0 && kHeadDim <= kCols && kKeyTile % 16 == 0);
  static_assert(!(kBool || kFloat) || kKeyTile == 64);  // a lane's keys are one block column of the dropout's numbers

  // The key in column n * 8 + lane % 4 * 2 + i % 2 of the scores.
  static __device__ __forceinline__ int key(int lane, int n, int i) {
    return KeyOrder::key(n * 8) + KeyOrder::key(lane % 4 * 2) + KeyOrder::key(i % 2);
  }
};

template <class Arch, class T, int kHeadDim, ScoreChange kChange, int kPlaces = kDefaultPlaces<Arch, kHeadDim>,
          bool kPlain = false>
__global__ void __launch_bounds__(FlashForward<Arch, T, kHeadDim, kChange, kPlaces, kPlain>::kThreads,
                                  FlashForwardTile<Arch, kHeadDim, kChange, kPlaces>::kBlocksPerSm)
    flash_forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ BlockOrder order,
                         const __grid_constant__ Dropout dropout, const float scale_log2) {
  using Flash = FlashForward<Arch, T, kHeadDim, kChange, kPlaces, kPlain>;
  using Tile = typename Flash::Tile;
  constexpr bool kRotates = Flash::kRotates, kInTurn = Flash::kInTurn;
  using Product = Mma<Arch, T>;
  constexpr int kRowBlocks = Flash::kRowBlocks, kKeyTile = Flash::kKeyTile, kSteps = Flash::kSteps;
  constexpr int kThreads = Flash::kThreads, kStep = Tile::kStep;
  constexpr bool kHasMask = Flash::kBool || Flash::kFloat;
  extern __shared__ __align__(1024) unsigned char shared[];

  // Work of this block.
  int tile_number, batch_head;
  if (!order.locate_quickly(tile_number, batch_head)) return;
  const int query_tiles = static_cast<int>(order.tiles);
  const int q0 = (query_tiles - 1 - tile_number) * Flash::kQueryTile;  // causal: the last tile is the longest
  const int heads = static_cast<int>(p.H);
  if constexpr (kHasMask) batch_head = side_by_side(p, batch_head, heads);
  int batch = batch_head / heads;
  int head = batch_head % heads;
  int key_head = head / static_cast<int>(p.group);
  // With a mask no call is causal. Of kBoolMask to know it spares registers.
  const typename Flash::Range range{static_cast<int>(p.L), static_cast<int>(p.S), Flash::kBool ? false : p.is_causal};

  // Shared memory: query | key stages | value stages, or places. The output leaves through the query's place.
  const uint32_t base = shared_address(shared);
  const typename Flash::QueryTile query_tile{base};
  const auto key_tile = [&](int stage) {
    return typename Flash::KeyTile{base + Flash::QueryTile::kBytes + stage * Flash::KeyTile::kBytes};
  };
  const auto value_tile = [&](int stage) {
    return key_tile(Tile::kOnePlace || kRotates ? stage : Flash::kStages + stage);
  };
  using Stream = typename Flash::Stream;
  const HeadPlace place{base + Flash::kPlaceOffset};
  if constexpr (Flash::kHasPlace) {
    if (threadIdx.x == 0) {
      place.put(Stream::first_row(p.key, batch, key_head, p.E), Stream::first_row(p.value, batch, key_head, p.Ev),
                batch, head, key_head);
    }
    __syncthreads();
  }
  // Keys from here on are seen by no query of the block.
  const int key_end = !Flash::kBool && p.is_causal ? min(range.S, q0 + Flash::kQueryTile) : range.S;
  const auto stream_keys = [&](int tile, int stage, bool run) {
    Stream::fill(key_tile(stage), place.key_row(), static_cast<int>(p.key.stride[2] * 2), tile * kKeyTile, range.S,
                 static_cast<int>(p.E), run);
  };
  const auto stream_values = [&](int tile, int stage, bool run) {
    Stream::fill(value_tile(stage), place.value_row(), static_cast<int>(p.value.stride[2] * 2), tile * kKeyTile,
                 range.S, static_cast<int>(p.Ev), run);
  };
  // Of operands that a TileStream does not take.
  const auto fetch_values = [&](int tile, int stage) {
    if constexpr (Tile::kOnePlace) asm volatile("" : "+r"(batch), "+r"(key_head));
    const HeadRows<const T> value(p.value, batch, key_head, p.S, p.Ev);
    value_tile(stage).template fill<kThreads, typename Flash::KeyOrder, true>(value, tile * kKeyTile);
  };
  const auto fetch_keys = [&](int tile, int stage) {
    if constexpr (Flash::kHasPlace) batch = place.batch(), key_head = place.key_head();
    if constexpr (Tile::kOnePlace) asm volatile("" : "+r"(batch), "+r"(key_head));
    const HeadRows<const T> key(p.key, batch, key_head, p.S, p.E);
    key_tile(stage).template fill<kThreads, typename Flash::KeyOrder, true>(key, tile * kKeyTile);
  };
  const auto fetch = [&](int tile, int stage) {
    fetch_keys(tile, stage);
    if constexpr (Flash::kStages == 2 || (!Arch::kAsyncCopy && !Tile::kOnePlace)) fetch_values(tile, stage);
  };
  // The first tile from this one on that has a key to attend to, as far as that is cheap to know.
  const TileMap map{reinterpret_cast<uint16_t*>(shared + Flash::kMapOffset)};
  bool is_mixed = false;  // a bool mask is known to leave no tile out, and none as it is
  constexpr bool kKnowsMixed =
      Flash::kBool && !(kHeadDim == 128 && kChip > (kPlain ? 75 : 80) && kChip < 90);  // where it spills
  const auto next_tile = [&](int tile) {
    if constexpr (Flash::kHasMap) {
      if (kKnowsMixed && is_mixed) return tile;
      while (tile * kKeyTile < key_end && !map.any(tile)) ++tile;
    } else if constexpr (Flash::kAny) {
      while (tile * kKeyTile < key_end && !any_key_takes_part<kKeyTile>(p, batch, head, tile * kKeyTile)) ++tile;
    }
    return tile;
  };
  const auto mask_tile = [&](int stage) {
    return typename Flash::MaskTile{base + Flash::kPaddingOffset + stage * Flash::MaskTile::kBytes};
  };
  const auto fetch_mask = [&](int tile, int stage, bool passes) {
    if constexpr (Flash::kPadding) {
      if (!passes) mask_tile(stage).fill(p, place.batch(), place.head(), tile * kKeyTile);
    }
  };
  const auto passes_all = [&](int tile) { return Flash::kHasMap && !(kKnowsMixed && is_mixed) && map.all(tile); };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_block = warp * kRowBlocks;  // of 16 rows, in the query tile
  const auto lane_offset = Flash::KeyTile::lane_offset();

  using QueryStream = TileStream<typename Flash::QueryTile, kThreads, InOrder, kHeadDim>;
  const uint64_t query_row = Tile::kStreamsQuery ? QueryStream::first_row(p.query, batch, head, p.E) : 0;
  if ((kPlain && Tile::kStreamsQuery) || query_row != 0) {
    QueryStream::fill(query_tile, query_row, static_cast<int>(p.query.stride[2] * 2), q0, range.L,
                      static_cast<int>(p.E), true);
  } else {
    query_tile.template fill<kThreads>(HeadRows<const T>(p.query, batch, head, p.L, p.E), q0);
  }
  if constexpr (Flash::kPadding && Flash::kHasMap) map.template fill<kThreads, kKeyTile>(p, batch, head);
  const TileList list{base + Flash::kListOffset};
  if constexpr (Flash::kHasList) {
    if (threadIdx.x < 32) list.make(map, (range.S + kKeyTile - 1) / kKeyTile);
    __syncthreads();
  }
  if constexpr (Flash::kBool && Flash::kHasMap) {
    is_mixed = map.template fill<kThreads, kKeyTile, Flash::kQueryTile>(p, batch, head, q0);
  }
  int listed = 0;
  const auto next_listed = [&](int tile, bool& takes_all) {
    const uint32_t step = list.step(listed++);
    takes_all = step % 2 != 0;
    return tile + static_cast<int>(step / 2);
  };
  bool listed_passes = false;
  const int first_tile = Flash::kHasList ? next_listed(-1, listed_passes) : next_tile(0);
  const auto first_passes = [&] { return Flash::kHasList ? listed_passes : Flash::kPadding && map.all(first_tile); };
  if (first_tile * kKeyTile < key_end) {
    if (kPlain || (Flash::kHasPlace && place.streams())) {
      stream_keys(first_tile, 0, true);
      if constexpr (Flash::kStages == 2) stream_values(first_tile, 0, true);
    } else {
      fetch(first_tile, 0);
    }
    fetch_mask(first_tile, 0, first_passes());
  }
  wait_for_copies<Arch>();
  __syncthreads();
  if (p.scale <= 0.f) fold_scale_sign(query_tile, warp * Flash::kWarpRows, Flash::kWarpRows, p.scale);

  uint32_t query_registers[Tile::kQueryInRegisters ? kSteps : 1][kRowBlocks][4];
  if constexpr (Tile::kQueryInRegisters) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) query_tile.load_a(query_registers[k][m], lane_offset, warp_block + m, k);
    }
  }

  OnlineSoftmax<kRowBlocks, Tile::kFewInstructions> softmax(
      Flash::kFloat && (!Flash::kAny || mask_scales(p.mask_kind)) ? 1.f : scale_log2);
  float output[kRowBlocks][kHeadDim / 8][4] = {};

  // This lane's first row and, in tile `tile`, first key.
  const auto first_row = [&] {
    unsigned thread = threadIdx.x;
    if constexpr (kHasMask) asm volatile("" : "+r"(thread));
    return static_cast<int>(q0 + thread / 32 * Flash::kWarpRows + thread % 32 / 4);
  };
  const auto first_key = [&](int tile, int step) { return tile * kKeyTile + Flash::key(lane, step * (kStep / 8), 0); };
  BoolMask<kRowBlocks> bool_mask;
  // Registers are short: what is seldom asked for is read, or made, again.
  const auto recall_head = [&] {
    if constexpr (Flash::kBool && Flash::kHasPlace) {
      batch = place.batch(), head = place.head();
    } else {
      asm volatile("" : "+r"(head), "+r"(batch));
    }
  };
  bool passes = false;  // the mask is known not to touch this tile
  if constexpr (Flash::kPadding) passes = first_passes();
  if constexpr (Flash::kBool) {
    passes = passes_all(first_tile);
    bool_mask.fetch(p, batch, head, first_row(), first_key(first_tile, 0));
  }

  [[maybe_unused]] AlongColumns draws;
  if constexpr (kChange == ScoreChange::kDropout && Tile::kKeepsDraws) {
    draws = AlongColumns::make(dropout.with_seed(*p.seed), static_cast<uint32_t>(p.first_batch_head) + batch_head,
                               (q0 / 16 + warp_block) / 2);
    draws.first ^= DroppedBlock<false, false, true>::column_word(0);
    asm volatile("" : "+r"(draws.first), "+r"(draws.second));
#pragma unroll
    for (auto& x : draws.third) asm volatile("" : "+r"(x));
  }
  // kRotates: the place of this tile's keys (0), values (1) and the next keys (2).
  [[maybe_unused]] int first_place = 0;
  const auto turn_places = [&] {
    if constexpr (kRotates && Flash::kHasMap) first_place = first_place == 0 ? 2 : first_place - 1;
  };
  for (int tile = first_tile, next, parity = 0; tile * kKeyTile < key_end; tile = next, parity ^= 1, turn_places()) {
    const int k0 = tile * kKeyTile;
    const auto place_of = [&](int item) {
      if constexpr (Flash::kHasMap) {
        const int i = first_place + item;
        return i < 3 ? i : i - 3;
      }
      unsigned i = tile;  // no tile is left out
      asm volatile("" : "+r"(i));
      i = 2 * i + item;
      return static_cast<int>(i - __umulhi(i, 0xaaaaaaabu) / 2 * 3);
    };
    const int stage = Flash::kStages == 1 ? 0 : Flash::kHasMap ? parity : tile % Flash::kStages;
    const auto key_stage = [&] { return kRotates ? place_of(0) : stage; };
    const auto value_stage = [&] { return kRotates ? place_of(1) : stage; };
    const auto next_key_stage = [&] { return kRotates ? place_of(2) : kInTurn ? 0 : stage ^ 1; };
    const bool streams = kPlain || (Flash::kHasPlace && place.streams());
    bool next_passes = false;
    next = Flash::kHasList ? next_listed(tile, next_passes) : next_tile(tile + 1);
    if constexpr (Flash::kPadding && !Flash::kHasList) next_passes = map.all(next);
    // This tile has landed, and every warp is done with the one before, whose stage is filled next.
    wait_for_copies<Arch>();
    __syncthreads();
    const bool has_next = next * kKeyTile < key_end, streams_next = streams && has_next;
    if constexpr (kRotates || kInTurn) {
      if (!streams) fetch_values(tile, value_stage());
    }
    if (Arch::kAsyncCopy && has_next) {
      if constexpr (Flash::kStages == 2) {
        if (!streams) fetch(next, stage ^ 1);
      } else if constexpr (kRotates) {
        if (!streams) fetch_keys(next, next_key_stage());
      }
      fetch_mask(next, parity ^ 1, next_passes);
    }
    if constexpr (Flash::kBool && Flash::kStages == 2) {
      stream_keys(next, stage ^ 1, streams_next);
      stream_values(next, stage ^ 1, streams_next);
    } else if constexpr (Flash::kBool && Arch::kAsyncCopy) {
      stream_values(tile, value_stage(), streams);
      cp_async_end_group();
      if constexpr (kRotates) stream_keys(next, next_key_stage(), streams_next);
    }
    // The values have landed; or, if kInTurn, every warp is done with the keys, and the next ones take their place.
    const auto turn_to_values = [&](int step) {
      if constexpr (kRotates || kInTurn) {
        if (step == 0) cp_async_wait_groups<0>();
        if (step == 0 || kInTurn) __syncthreads();
        if (kInTurn && step == kKeyTile / kStep - 1 && has_next && !streams) fetch_keys(next, 0);
      }
    };

    const bool drops = kHasMask && p.dropout_p > 0.f;
    const auto turn_to_next = [&] {
      if constexpr (Flash::kPadding) passes = next_passes;
      if constexpr (Flash::kBool) {  // these loads are on their way while the block waits for the next tile
        recall_head();
        if constexpr (kHeadDim == 128 && Arch::kAsyncCopy) {  // kept from above it spills
          next = tile;
          asm volatile("" : "+r"(next));
          next = next_tile(next + 1);
        }
        passes = passes_all(next);
        if (!passes) bool_mask.fetch(p, batch, head, first_row(), first_key(next, 0));
      }
      if constexpr (!Arch::kAsyncCopy) {
        __syncthreads();
        if (has_next) fetch(next, 0);
      }
    };
    if constexpr (Flash::kBool) {
      if (!passes) {
        recall_head();
        bool_mask.settle(p, batch, head, first_row(), first_key(tile, 0));
      }
      if (!passes && !bool_mask.any()) {  // of this warp's scores
        turn_to_values(0);
        if constexpr (kInTurn) stream_keys(next, 0, streams_next);
        turn_to_next();
        continue;
      }
    }

    uint32_t dropped_of_rows[kRowBlocks];
#pragma unroll 1
    for (int step = 0; step < kKeyTile / kStep; ++step) {
      FloatMask<kRowBlocks, kStep / 8, Tile::kEarlyMaskWords, Flash::kAny> float_mask;
      if constexpr (Flash::kFloat) {
        asm volatile("" : "+r"(head), "+r"(batch));  // addresses start anew in each step
        float_mask.read_early(p, batch, head, first_row(), first_key(tile, step));
      }

      // S = Q K^T
      float scores[kRowBlocks][kStep / 8][4] = {};
      const auto keys = key_tile(key_stage());
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t (&q)[kRowBlocks][4] = query_registers[Tile::kQueryInRegisters ? k : 0];
        if constexpr (!Tile::kQueryInRegisters) {
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) query_tile.load_a(q[m], lane_offset, warp_block + m, k);
        }
#pragma unroll
        for (int n = 0; n < kStep / 16; ++n) {
          uint32_t b[4];
          keys.load_b_transposed(b, lane_offset, step * (kStep / 16) + n, k);
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) {
            Product::add(scores[m][2 * n], q[m], b[0], b[1]);
            Product::add(scores[m][2 * n + 1], q[m], b[2], b[3]);
          }
        }
        // The next tile's copies are issued while the tensor cores are busy.
        if constexpr (Flash::kStages == 2 && !Flash::kBool) {
          if (k == 0) stream_keys(next, stage ^ 1, streams_next && step == 0);
          if (k == Tile::kOtherCopyAfter) stream_values(next, stage ^ 1, streams_next && step == 0);
        } else if constexpr (Arch::kAsyncCopy && !Flash::kBool) {
          if (k == 0) {
            stream_values(tile, value_stage(), streams && step == 0);
            cp_async_end_group();
          }
          if (kRotates && !Tile::kKeysAmongValues && k == Tile::kOtherCopyAfter) {
            stream_keys(next, next_key_stage(), streams_next && step == 0);
          }
        }
      }

      if constexpr (Tile::kOnePlace) {
        __syncthreads();
        fetch_values(tile, 0);
      }

      // What must not be attended to is replaced, so that no NaN in it survives.
      if constexpr (Flash::kBool) {
        if (!passes) bool_mask.apply(scores);
      }
      if constexpr (Flash::kPadding) {
        if (!passes) mask_tile(parity).apply(scores);
      }
      if constexpr (Flash::kFloat) {
        asm volatile("" : "+r"(head), "+r"(batch));
        float_mask.apply(scores, p, batch, head, first_row(), first_key(tile, step), scale_log2);
      }
      if (range.is_partial(q0, k0)) {
        const TileLimit limit = range.limit(q0, k0);
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
          for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int row = (warp_block + m) * 16 + lane / 4 + i / 2 * 8;
              if (!limit.sees(row, Flash::key(lane, step * (kStep / 8) + n, i))) scores[m][n][i] = -INFINITY;
            }
          }
        }
      }

      softmax.see(scores, output);

      if (drops) {
        const Dropout draw = dropout.with_seed(*p.seed);
        recall_head();
        if (step == 0) {
          dropped_columns(dropped_of_rows, draw, static_cast<uint32_t>(p.first_batch_head) + batch * heads + head,
                          q0 + warp_block * 16, first_key(tile, 0));
        }
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
          for (int i = 0; i < kStep / 2; ++i) {
            const bool drops_it = dropped_of_rows[m] >> (step * (kStep / 2) + i) & 1;
            if (drops_it) softmax.take_out(scores[m][i / 4][i % 4], m, i % 4 / 2);
          }
        }
      }

      if constexpr (Tile::kOnePlace) __syncthreads();
      turn_to_values(step);
      // O += P V. Each 16 keys' exp2 stand right before their mma, so that the two pipes overlap.
      const auto values = value_tile(value_stage());
      DroppedBlock<false, false, true> dropped;  // of 32 keys
#pragma unroll
      for (int k = 0; k < kStep / 16; ++k) {
        if constexpr (kChange == ScoreChange::kDropout) {
          if (k % 2 == 0) {
            const int block = q0 / 16 + warp_block, block_col = (k0 + step * kStep + k * 16) / 32;
            if constexpr (Tile::kKeepsDraws) {
              const auto numbers = [&](uint32_t n) { return draws.numbers<true>(block_col * 64 + n); };
              dropped.draw(dropout, numbers, kRowBlocks == 1 && block % 2 == 1, false);
            } else {
              asm volatile("" : "+r"(batch), "+r"(head));  // what is made of them does not stay in registers
              dropped.draw(dropout.with_seed(*p.seed), static_cast<uint32_t>(p.first_batch_head) + batch * heads + head,
                           block / 2, block_col, kRowBlocks == 1 && block % 2 == 1);
            }
          }
        }
        uint32_t probability[kRowBlocks][4];
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          softmax.exponentiate(scores[m][2 * k], m);
          softmax.exponentiate(scores[m][2 * k + 1], m);
          to_operand<T>(probability[m], scores[m][2 * k], scores[m][2 * k + 1]);
          if constexpr (kChange == ScoreChange::kDropout) dropped.drop_paired(probability[m], dropout, m, k % 2);
        }
        add_products<Product>(output, probability, values, lane_offset, step * (kStep / 16) + k);
        if (kInTurn ? k == 0 : Tile::kKeysAmongValues && k == 1) {
          stream_keys(next, next_key_stage(), streams_next && (kRotates ? step == 0 : step == kKeyTile / kStep - 1));
        }
      }
    }
    turn_to_next();
  }

  // O and LSE.
  if constexpr (Flash::kHasPlace) batch = place.batch(), head = place.head();
  const int warp_row = q0 + warp * Flash::kWarpRows;
  if constexpr (kPlain) {
    float factors[kRowBlocks][2];
    write_statistics(factors, softmax, p, batch * heads + head, warp_row);
#pragma unroll
    for (int i = 0; i < 2 * kRowBlocks && kChange != ScoreChange::kNone; ++i) {
      factors[i / 2][i % 2] *= dropout.rescale;  // 1 without dropout
    }
    const auto row_block = [&](int m) { return warp_block + m; };
    write_output<T>(output, factors, query_tile, row_block, p, Stream::first_row(p.output, batch, head, p.Ev),
                    warp_row);
  } else {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float logsumexp, rest = 0.f;
        float factor = kChange != ScoreChange::kNone ? softmax.finish(m, half, logsumexp, rest)
                                                     : softmax.finish(m, half, logsumexp);
        if constexpr (kChange != ScoreChange::kNone) factor *= dropout.rescale;  // 1 without dropout
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          output[m][n][2 * half] *= factor;
          output[m][n][2 * half + 1] *= factor;
        }
        const int row = warp_row + m * 16 + half * 8 + lane / 4;
        const bool writes = lane % 4 == 0 && row < p.L;
        const int64_t i = int64_t{batch * heads + head} * p.L + row;
        if (writes && p.logsumexp != nullptr) p.logsumexp[i] = logsumexp;
        if (writes && p.logsumexp_rest != nullptr) p.logsumexp_rest[i] = rest;
      }
    }
    query_tile.template store<kRowBlocks>(output, warp_block, HeadRows<T>(p.output, batch, head, p.L, p.Ev), warp_row);
  }
}

template <class Arch, class T, int kHeadDim, ScoreChange kChange, int kPlaces = kDefaultPlaces<Arch, kHeadDim>>
cudaError_t launch_with_places(const ForwardParams& p, cudaStream_t stream) {
  // At 128 columns without a mask it spills, nor is it wanted: other kernels take nearly all such calls.
  constexpr bool kHasMask = kChange != ScoreChange::kNone && kChange != ScoreChange::kDropout;
  if constexpr (Arch::kAsyncCopy && (kHeadDim <= 96 || (kHeadDim == 128 && kHasMask))) {
    if (has_whole_chunks(p)) {
      return launch_flash_forward<FlashForward<Arch, T, kHeadDim, kChange, kPlaces, true>,
                                  flash_forward_kernel<Arch, T, kHeadDim, kChange, kPlaces, true>, T>(p, stream);
    }
  }
  return launch_flash_forward<FlashForward<Arch, T, kHeadDim, kChange, kPlaces>,
                              flash_forward_kernel<Arch, T, kHeadDim, kChange, kPlaces>, T>(p, stream);
}

template <class Arch, class T, int kHeadDim, ScoreChange kChange>
cudaError_t launch_narrow_forward(const ForwardParams& p, cudaStream_t stream) {
  if constexpr (Arch::kAsyncCopy && kHeadDim > 64) {
    using Flash = FlashForward<Arch, T, kHeadDim, kChange>;
    bool takes_turns = false;
    if constexpr (kHeadDim <= 128) {
      if (const auto error = wants_eight_warps<Flash, T>(p, takes_turns); error != cudaSuccess) return error;
    } else {
      takes_turns = !fits_twice<Flash>(p) && fits_twice<FlashForward<Arch, T, kHeadDim, kChange, 2>>(p);
    }
    if (takes_turns) return launch_with_places<Arch, T, kHeadDim, kChange, 2>(p, stream);
  }
  return launch_with_places<Arch, T, kHeadDim, kChange>(p, stream);
}

template <class Arch, class T, int kHeadDim>
cudaError_t flash_forward_narrow(const ForwardParams& p, cudaStream_t stream) {
  if constexpr (Arch::kAsyncCopy) {
    const bool can_stream = fits_twice<FlashForwardStream<Arch, T, kHeadDim>>(p);
    if constexpr (kHeadDim == 96 || kHeadDim == 128) {  // at 64 columns it is hardly faster
      if (streams_forward(p, kMaxPosition)) {
        bool done;
        auto error = flash_forward_tensor<Arch, T, kHeadDim>(p, stream, done);
        if (!done && error == cudaSuccess && p.S > kMostStreamedKeys) {
          error = flash_forward_ring<Arch, T, kHeadDim, ScoreChange::kNone>(p, stream, done);
        }
        if (done || error != cudaSuccess) return error;
      }
    }
    if (can_stream && streams_forward(p)) return flash_forward_stream<Arch, T, kHeadDim>(p, stream);
  }
  if (p.mask_kind == MaskKind::kNone) {
    if constexpr (Arch::kAsyncCopy && (kHeadDim == 96 || kHeadDim == 128)) {
      if (p.dropout_p > 0.f && p.S > kMostStreamedKeys && has_whole_chunks(p)) {
        bool done;
        const auto error = flash_forward_ring<Arch, T, kHeadDim, ScoreChange::kDropout>(p, stream, done);
        if (done || error != cudaSuccess) return error;
      }
    }
    return p.dropout_p == 0.f ? launch_narrow_forward<Arch, T, kHeadDim, ScoreChange::kNone>(p, stream)
                              : launch_narrow_forward<Arch, T, kHeadDim, ScoreChange::kDropout>(p, stream);
  }
  if constexpr (Arch::kAsyncCopy) {
    if (p.mask_kind == MaskKind::kBool && p.attn_mask.stride[2] == 0 && p.dropout_p == 0.f) {
      if constexpr (kHeadDim == 96 || kHeadDim == 128) {
        if (p.S > kMostStreamedKeys && has_whole_chunks(p)) {
          bool done;
          const auto error = flash_forward_ring<Arch, T, kHeadDim, ScoreChange::kKeyPadding>(p, stream, done);
          if (done || error != cudaSuccess) return error;
        }
      }
      return launch_narrow_forward<Arch, T, kHeadDim, ScoreChange::kKeyPadding>(p, stream);
    }
  }
  constexpr int kBoolHeadDim = kHeadDim == 96 ? 128 : kHeadDim;  // at 96 it spills
  return p.mask_kind == MaskKind::kBool
             ? launch_narrow_forward<Arch, T, kBoolHeadDim, ScoreChange::kBoolMask>(p, stream)
             : launch_narrow_forward<Arch, T, kHeadDim, ScoreChange::kFloatMask>(p, stream);
}

template <class Arch, class T, int kHeadDim>
cudaError_t flash_forward_one_place(const ForwardParams& p, cudaStream_t stream) {
  return p.mask_kind == MaskKind::kNone && p.dropout_p == 0.f
             ? launch_narrow_forward<Arch, T, kHeadDim, ScoreChange::kNone>(p, stream)
             : launch_narrow_forward<Arch, T, kHeadDim, ScoreChange::kAnyMask>(p, stream);
}

// Head dims E and Ev from 1 to kHeadDim.
template <class Arch, class T, int kHeadDim>
cudaError_t flash_forward(const ForwardParams& p, cudaStream_t stream) {
  if constexpr (kHeadDim > 256) {
    static_assert(kHeadDim == 512);
    return flash_forward_widest<Arch, T>(p, stream);
  } else if constexpr (kHeadDim > 128) {
    static_assert(kHeadDim == 256);
    const int64_t columns = std::max(p.E, p.Ev);
    if constexpr (!Arch::kAsyncCopy) {
      return columns <= 192 ? flash_forward_one_place<Arch, T, 192>(p, stream)
                            : flash_forward_one_place<Arch, T, 256>(p, stream);
    } else {
      // At 160 columns the output of 32 rows just fits into one warp's registers, if nothing else is in them.
      if (columns <= 160 && p.mask_kind == MaskKind::kNone && p.dropout_p == 0.f) {
        return launch_narrow_forward<Arch, T, 160, ScoreChange::kNone>(p, stream);
      }
      return columns <= 160   ? flash_forward_wide<Arch, T, 160>(p, stream)
             : columns <= 192 ? flash_forward_wide<Arch, T, 192>(p, stream)
                              : flash_forward_wide<Arch, T, 256>(p, stream);
    }
  } else {
    if constexpr (kHeadDim == 128 && Arch::kAsyncCopy) {
      const int64_t columns = std::max(p.E, p.Ev);
      if (columns <= 80) return flash_forward_narrow<Arch, T, 80>(p, stream);
      if (columns <= 96) return flash_forward_narrow<Arch, T, 96>(p, stream);
    }
    return flash_forward_narrow<Arch, T, kHeadDim>(p, stream);
  }
}

}  // namespace sdpa
