// Bool masks in the forward: what is known of whole key tiles, and a lane's entries as bits.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "../attn/mask_blocks.h"
#include "../attn/params.h"
#include "score_mask.cuh"

namespace sdpa {

// Forward: in which of the first key tiles anything takes part, and in which all, as far as it is known: of a bool mask
// that is the same for every query (key padding), or whose blocks have been looked through. Read once by the whole
// block, so that the loop over tiles need not wait for it.
struct TileMap {
  static constexpr int kTiles = 3072;  // of those after that nothing is known
  static constexpr int kTogether = 8;  // tiles of one entry: in the low byte any, in the high byte all
  static constexpr int kBytes = kTiles / kTogether * static_cast<int>(sizeof(uint16_t));

  uint16_t* entries;

  // All threads of the block; ends with a barrier. Of padding; a warp reads an entry's tiles at once, 16 keys a lane.
  template <int kThreads, int kKeys>
  __device__ __forceinline__ void fill(const ForwardParams& p, int batch, int head) const {
    if (is_padding(p)) read_padding<kThreads, kKeys>(p, batch, head);
    __syncthreads();
  }
  // The same of any mask, or none, for kQueries queries from q0 on. Returns whether there is no tile in which nothing
  // or everything takes part, as far as is known: then nobody need ask.
  template <int kThreads, int kKeys, int kQueries>
  __device__ __forceinline__ bool fill(const ForwardParams& p, int batch, int head, int q0) const {
    bool is_mixed = true;
    if (p.mask_blocks != nullptr) {
      const MaskBlocks blocks(p, batch, head);
      const int count = (min((static_cast<int>(p.S) + kKeys - 1) / kKeys, kTiles) + kTogether - 1) / kTogether;
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const uint64_t word = blocks.template word_of<kQueries>(q0, i / 2);
        const auto any = static_cast<uint32_t>(word) >> i % 2 * 16,
                   all = static_cast<uint32_t>(word >> 32) >> i % 2 * 16;
        uint32_t entry = 0;
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
          const uint32_t tile = 3u << 2 * n;
          entry |= ((any & tile) != 0 ? 1u << n : 0) | ((all & tile) == tile ? 256u << n : 0);
        }
        entries[i] = static_cast<uint16_t>(entry);
        // Blocks that do not exist count as all, and have nothing.
        const uint32_t exist = 0xffu >> max((i + 1) * kTogether - (static_cast<int>(p.S) + kKeys - 1) / kKeys, 0);
        is_mixed &= (entry & exist) == exist && (entry >> 8 & exist) == 0;
      }
    } else if (is_padding(p)) {
      read_padding<kThreads, kKeys>(p, batch, head);
      is_mixed = false;
    }
    return __syncthreads_and(is_mixed);
  }

  __device__ __forceinline__ bool any(int tile) const {
    return tile >= kTiles || (entries[tile / kTogether] >> tile % kTogether & 1) != 0;
  }
  __device__ __forceinline__ bool all(int tile) const {
    return tile < kTiles && (entries[tile / kTogether] >> (tile % kTogether + 8) & 1) != 0;
  }

 private:
  static __device__ __forceinline__ bool is_padding(const ForwardParams& p) {
    return p.mask_kind == MaskKind::kBool && p.attn_mask.stride[2] == 0;
  }
  template <int kThreads, int kKeys>
  __device__ __forceinline__ void read_padding(const ForwardParams& p, int batch, int head) const {
    static_assert(kKeys * kTogether == 32 * 16 && kKeys == 2 * MaskBlocks::kKeys);
    const HeadMask<uint8_t> mask(p, batch, head);
    const int lane = threadIdx.x % 32, tiles = min((mask.S + kKeys - 1) / kKeys, kTiles);
    for (int first = threadIdx.x / 32 * kTogether; first < tiles; first += kThreads / 32 * kTogether) {
      const int key = first * kKeys + lane * 16;
      MaskRun<uint8_t, 16> run[1] = {};
      if (key < mask.S) mask.read(run, 0, key, [](int) { return 0; });
      const uint32_t any =
          __ballot_sync(0xffffffffu, (run[0].words[0] | run[0].words[1] | run[0].words[2] | run[0].words[3]) != 0);
      const uint32_t all = __ballot_sync(0xffffffffu, run[0].keeps_all());
      const uint32_t tile_any = any >> lane % kTogether * 4 & 15, tile_all = all >> lane % kTogether * 4 & 15;
      const uint32_t entry =
          (__ballot_sync(0xffffffffu, tile_any != 0) & 0xff) | (__ballot_sync(0xffffffffu, tile_all == 15) & 0xff) << 8;
      if (lane == 0) entries[first / kTogether] = static_cast<uint16_t>(entry);
    }
  }
};

// Forward, key padding: the tiles in which something takes part, one after the other, so that the loop over tiles comes
// to the next without a search. In shared memory.
struct TileList {
  static constexpr int kTiles = 2304;  // of those after that all are taken
  static constexpr int kBytes = kTiles + 16;
  // A step to the next tile has seven bits. So one is taken that need not be where so many would be left out, if these
  // end with a group of 32.
  static constexpr int kMostLeftOut = 90;
  uint32_t address;

  // By one warp, from a complete map.
  __device__ __forceinline__ void make(const TileMap& map, int tiles) const {
    static_assert(kTiles % 32 == 0 && kTiles <= TileMap::kTiles && kMostLeftOut + 32 < 128);
    const int lane = threadIdx.x % 32, known = min(tiles, kTiles);
    int listed = 0, last = -1;
    for (int first = 0; first < known; first += 32) {
      const int tile = first + lane, end = min(first + 32, known) - 1;
      const bool is_last_known = end + 1 < tiles && end + 1 == kTiles;
      uint32_t taken = __ballot_sync(0xffffffffu, tile < known && map.any(tile));
      if (is_last_known || (taken == 0 && end - last > kMostLeftOut)) taken |= 1u << (end - first);
      if (taken >> lane & 1) {
        const uint32_t before = taken & ((1u << lane) - 1);
        const int previous = before != 0 ? first + 31 - __clz(static_cast<int>(before)) : last;
        put(listed + __popc(before), (tile - previous) * 2 + map.all(tile));
      }
      listed += __popc(taken);
      if (taken != 0) last = first + 31 - __clz(static_cast<int>(taken));
    }
    // The end is no further from the last tile than this step.
    const int step = tiles > kTiles ? 2 : 254;
    for (int number = listed + lane; number < kBytes; number += 32) put(number, step);
  }
  // Twice the number of tiles from the one before to the number-th, and one more if all its keys take part.
  __device__ __forceinline__ uint32_t step(int number) const {
    uint32_t step;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(step) : "r"(address + min(number, kBytes - 1)));
    return step;
  }

 private:
  __device__ __forceinline__ void put(int number, int step) const {
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(address + number), "r"(step) : "memory");
  }
};

// Forward, a bool mask that is the same for every query: the entries of kKeys keys in shared memory.
template <int kKeys>
struct PaddingTile {
  static constexpr int kBytes = kKeys;
  uint32_t base;

  // Complete after wait_for_copies and a barrier.
  __device__ __forceinline__ void fill(const ForwardParams& p, int batch, int head, int key0) const {
    const HeadMask<uint8_t> mask(p, batch, head);
    const int thread = threadIdx.x, present = mask.S - key0;
    if (mask.is_aligned(4)) {
      if (thread < kKeys / 4) {
        cp_async<4>(base + thread * 4, mask.data + key0 + thread * 4, min(max(present - thread * 4, 0), 4));
      }
    } else if (thread < kKeys) {
      const uint32_t entry = thread < present ? __ldg(mask.data + (int64_t{key0} + thread) * mask.key_stride) : 0;
      asm volatile("st.shared.u8 [%0], %1;" ::"r"(base + thread), "r"(entry) : "memory");
    }
  }
  // Keys in order.
  template <int kRowBlocks, int kCols>
  __device__ __forceinline__ void apply(float (&scores)[kRowBlocks][kCols][4]) const {
#pragma unroll
    for (int n = 0; n < kCols; ++n) {
      uint32_t pair;
      asm volatile("ld.shared.u16 %0, [%1];" : "=r"(pair) : "r"(base + n * 8 + threadIdx.x % 4 * 2));
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[m][n][i] = (pair & 0xffu << i % 2 * 8) != 0 ? scores[m][n][i] : -INFINITY;
        }
      }
    }
  }
};

// Forward, bool mask: this lane's entries for a tile of 64 keys, 16 keys of each of its rows. They are fetched a tile
// ahead and wait as one bit each.
template <int kRowBlocks>
struct BoolMask {
  static constexpr int kRuns = 2 * kRowBlocks, kKeys = 16;
  static_assert(kRuns <= 4);
  static constexpr uint32_t kAll = ((1u << kRuns) - 1) * 0x11111111u;
  MaskRun<uint8_t, kKeys> run[kRuns];
  uint32_t bits[2];
  bool is_wide;

  static __device__ __forceinline__ constexpr int offset(int n) { return n * 8; }

  // `query` and `key` are this lane's first. Only wide loads go ahead: single bytes would take too many registers.
  __device__ __forceinline__ void fetch(const ForwardParams& p, int batch, int head, int query, int key) {
    const HeadMask<uint8_t> mask(p, batch, head);
    is_wide = mask.is_aligned(kKeys) && key + kKeys <= mask.S;
    if (!is_wide) return;
#pragma unroll
    for (int row = 0; row < kRuns; ++row) {
      run[row].read_wide(mask.data + min(query + offset(row), mask.L - 1) * mask.query_stride + key);
    }
  }
  // After fetch, with the same arguments. Bit `row` of byte n % 4 of bits[n / 8] says whether key n takes part, four
  // bits further up if n % 8 > 3.
  __device__ __forceinline__ void settle(const ForwardParams& p, int batch, int head, int query, int key) {
    bits[0] = bits[1] = 0;
    if (!is_wide) {
      const HeadMask<uint8_t> mask(p, batch, head);
#pragma unroll 1
      for (int row = 0; row < kRuns; ++row) {
        const uint8_t* const from =
            mask.data + min(query + offset(row), mask.L - 1) * mask.query_stride + key * mask.key_stride;
#pragma unroll
        for (int n = 0; n < kKeys; ++n) {
          const bool takes_part = key + n < mask.S && __ldg(from + n * mask.key_stride) != 0;
          bits[n / 8] |= takes_part ? 1u << (n % 4 * 8 + n % 8 / 4 * 4) << row : 0u;
        }
      }
      return;
    }
    uint32_t seen = 0;
#pragma unroll
    for (int row = 0; row < kRuns; ++row) {
#pragma unroll
      for (int n = 0; n < 4; ++n) seen |= run[row].words[n];
    }
    if ((seen & 0xfefefefeu) != 0) {  // true is 1 as a rule, but any other byte than 0 is true as well
#pragma unroll
      for (int row = 0; row < kRuns; ++row) {
#pragma unroll
        for (int n = 0; n < 4; ++n) run[row].words[n] = __vcmpne4(run[row].words[n], 0) & 0x01010101u;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int row = 0; row < kRuns; ++row) bits[half] += run[row].words[2 * half + n] << (4 * n + row);
      }
    }
  }
  // Whether any score of the warp takes part.
  __device__ __forceinline__ bool any() const { return __any_sync(0xffffffffu, (bits[0] | bits[1]) != 0); }

  template <int kCols>
  __device__ __forceinline__ void apply(float (&scores)[kRowBlocks][kCols][4]) const {
    static_assert(2 * kCols == kKeys);
    if (__all_sync(0xffffffffu, (bits[0] & bits[1]) == kAll)) return;
#pragma unroll
    for (int row = 0; row < kRuns; ++row) {
#pragma unroll
      for (int n = 0; n < kKeys; ++n) {
        const uint32_t bit = 1u << (n % 4 * 8 + n % 8 / 4 * 4 + row);
        float& score = scores[row / 2][n / 2][row % 2 * 2 + n % 2];
        score = (bits[n / 8] & bit) != 0 ? score : -INFINITY;
      }
    }
  }
};

}  // namespace sdpa
