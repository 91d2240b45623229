// Which tiles of the L x S scores a block visits, which of them need a predicate, and in what order blocks take work.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace sdpa {

// The predicate of one tile, in coordinates of the tile. It is only asked for in tiles that need it.
struct TileLimit {
  int keys;      // keys of the tile that exist
  int diagonal;  // causal: key column c is seen by query row r if c <= r + diagonal; else so large that it always is
  __device__ __forceinline__ bool sees(int row, int col) const { return col < keys && col <= row + diagonal; }
};

template <int kQueryTile, int kKeyTile>
struct BlockRange {
  int L, S;
  bool is_causal;

  static __device__ __forceinline__ int up(int x, int tile) { return (x + tile - 1) / tile; }

  // Whether the tile at (q0, k0) has a score that is attended to. Cheap enough to be a loop's condition; a loop over
  // key tiles ends with the first that does not matter.
  __device__ __forceinline__ bool matters(int q0, int k0) const {
    return k0 < S && (!is_causal || k0 < q0 + kQueryTile);
  }
  // Backward, key tile at k0: query tiles [first_query_tile, query_tiles).
  __device__ __forceinline__ int first_query_tile(int k0) const {
    return is_causal ? min(k0 / kQueryTile, query_tiles()) : 0;
  }
  __device__ __forceinline__ int query_tiles() const { return up(L, kQueryTile); }

  // Whether the tile needs the predicate.
  __device__ __forceinline__ bool is_partial(int q0, int k0) const {
    return k0 + kKeyTile > S || (is_causal && k0 + kKeyTile > q0 + 1);
  }
  __device__ __forceinline__ TileLimit limit(int q0, int k0) const {
    return {min(S - k0, kKeyTile), is_causal ? min(q0 - k0, kKeyTile) : kKeyTile};
  }
};

// Blocks of some heads run side by side, so that what these heads share (keys and values in the forward, queries in
// the backward) stays in L2; within such a group the tiles go in the given order, for causal the longest first, so
// that the chip does not wait for a few long blocks at the end.
struct BlockOrder {
  static constexpr int64_t kL2Share = 16 << 20;  // bytes
  static constexpr int64_t kMaxGridX = 1 << 30;

  int64_t tiles, heads, heads_at_once;

  static BlockOrder make(int64_t tiles, int64_t heads, int64_t bytes_per_head) {
    const int64_t fit = kL2Share / std::max<int64_t>(bytes_per_head, 1);
    const int64_t most = std::clamp<int64_t>(fit, 1, std::max<int64_t>(heads, 1));
    // The last group had better be whole: under causality it begins with its longest blocks when the others have
    // nothing left but short ones. (64 heads of 96 columns: 10 at once take 1.10 times as long as 8.)
    int64_t best = most;
    const auto missing = [&](int64_t n) { return (n - heads % n) % n; };
    for (int64_t n = most - 1; n >= (most + 1) / 2; --n) {
      if (missing(n) * best < missing(best) * n) best = n;
    }
    return {tiles, heads, best};
  }
  int64_t blocks() const { return tiles * heads; }
  // Block numbers go past what one grid dimension holds; blocks beyond the last have nothing to do.
  unsigned grid_x() const { return static_cast<unsigned>(std::min(blocks(), kMaxGridX)); }
  unsigned grid_y() const { return static_cast<unsigned>((blocks() + kMaxGridX - 1) / kMaxGridX); }

#if defined(__CUDACC__)
  // False for a block without work.
  __device__ __forceinline__ bool locate(int& tile, int& head) const {
    const int64_t block = blockIdx.y * static_cast<int64_t>(gridDim.x) + blockIdx.x;
    if (block >= tiles * heads) return false;
    const int64_t group = block / (tiles * heads_at_once), rest = block % (tiles * heads_at_once);
    const int64_t here = min(heads_at_once, heads - group * heads_at_once);
    tile = static_cast<int>(rest / here);
    head = static_cast<int>(group * heads_at_once + rest % here);
    return true;
  }
  // The same with 32-bit divisions where they do: those of 64 bits are a thousand clocks of a short block.
  __device__ __forceinline__ bool locate_quickly(int& tile, int& head) const {
    if (tiles * heads > UINT32_MAX) return locate(tile, head);
    const uint32_t block = blockIdx.y * gridDim.x + blockIdx.x;
    if (block >= static_cast<uint32_t>(tiles * heads)) return false;
    find(block, tile, head);
    return true;
  }
  // The work of a block, where 32 bits can number the blocks.
  __device__ __forceinline__ void find(uint32_t block, int& tile, int& head) const {
    const uint32_t at_once = static_cast<uint32_t>(heads_at_once),
                   group_blocks = static_cast<uint32_t>(tiles) * at_once;
    const uint32_t group = block / group_blocks, rest = block % group_blocks;
    const uint32_t here = min(at_once, static_cast<uint32_t>(heads) - group * at_once);
    tile = static_cast<int>(rest / here);
    head = static_cast<int>(group * at_once + rest % here);
  }
#endif
};

}  // namespace sdpa
