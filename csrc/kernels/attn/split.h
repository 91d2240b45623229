// Short queries against long keys: the keys are split over blocks, so that the chip fills, and the parts are combined.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace sdpa {

constexpr int64_t kMostDecodedQueries = 16;  // of a call that decode kernels take

// What a block of a decode kernel takes.
struct DecodeBlock {
  int64_t rows;       // queries times the query heads that share a key head
  int64_t per_sm;     // how many run on a multiprocessor at one time
  int64_t most_keys;  // float32 sums of more lose bits
  int warps = 0;      // of flash's

  int64_t row_tiles(const ForwardParams& p) const { return (p.L * p.group + rows - 1) / rows; }
  // Without those that the keys are split over.
  int64_t blocks(const ForwardParams& p) const { return p.B * p.H / p.group * row_tiles(p); }
};
// Flash: one large block on each multiprocessor where all run at one time, else two small ones, of which one copies
// while the other starts or ends.
constexpr DecodeBlock kSmallDecodeBlock{16, 2, kMaxPosition, 4}, kLargeDecodeBlock{16, 1, kMaxPosition, 8};
constexpr int kDecodeWarpBytes = 24 * 1024;  // of keys and values that a warp has or waits for
constexpr int decode_shared_bytes(int warps) {
  return warps * kDecodeWarpBytes;
}
inline bool runs_large_decode_blocks(const ForwardParams& p, int64_t blocks, int64_t sms) {
  return blocks <= sms && p.shared_bytes >= decode_shared_bytes(kLargeDecodeBlock.warps);
}
// Older chips need fewer loads in flight, and Volta has no uniform registers.
constexpr DecodeBlock efficient_decode_block(int path, int head_dim) {
  return {8, path < 80 || head_dim > 128 ? 2 : 3, 16384};
}

struct KeySplit {
  static constexpr int64_t kKeyTile = 64;
  static constexpr int64_t kLeastTiles = 4;  // of a part: fewer do not pay for combining
  static constexpr int64_t kMostParts = 256;
  static constexpr double kWorthwhile = 0.95;  // of the time, for more parts

  // How many parts are best.
  static int64_t parts(const ForwardParams& p, const DecodeBlock& block, int64_t sms) {
    const int64_t blocks = block.blocks(p), at_once = sms * block.per_sm;
    const int64_t keys = p.is_causal ? std::min(p.L, p.S) : p.S;
    const int64_t most = std::clamp<int64_t>(keys / (kKeyTile * kLeastTiles), 1, kMostParts);
    const int64_t least = std::min((keys - 1) / block.most_keys + 1, most);
    // Blocks run in waves, so a few blocks more than fit at one time cost as much as another full wave.
    const auto time = [&](int64_t parts) {
      return static_cast<double>((blocks * parts + at_once - 1) / at_once) / static_cast<double>(parts);
    };
    int64_t best = least;
    double best_time = time(best);
    for (int64_t parts = least + 1; parts <= most; ++parts) {
      const double now = time(parts);
      if (now >= kWorthwhile * best_time) continue;
      best = parts;
      best_time = now;
    }
    return best;
  }

  // The same for flash's kernel.
  static int64_t flash_parts(const ForwardParams& p, int64_t sms) {
    const int64_t of_large = parts(p, kLargeDecodeBlock, sms);
    return runs_large_decode_blocks(p, kLargeDecodeBlock.blocks(p) * of_large, sms) ? of_large
                                                                                    : parts(p, kSmallDecodeBlock, sms);
  }

  // Scratch in float32: for each query row and part its reference and its sum; then the outputs, not normalised.
  static int64_t scratch(const ForwardParams& p) {
    return p.split_parts == 1 ? 0 : p.B * p.H * p.L * p.split_parts * (p.Ev + 2);
  }
};

}  // namespace sdpa
