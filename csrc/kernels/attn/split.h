// Short queries against long keys: the keys are split over blocks, so that the chip fills, and the parts are combined.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace sdpa {

struct KeySplit {
  static constexpr int64_t kQueryRows = 16;  // of a block: queries times the query heads that share a key head
  static constexpr int64_t kKeyTile = 64;
  static constexpr int64_t kLeastTiles = 4;   // of a part: fewer do not pay for combining
  static constexpr int64_t kBlocksPerSm = 3;  // that run at one time
  static constexpr int64_t kMostParts = 256;
  static constexpr double kWorthwhile = 0.97;  // of the time, for more parts

  int64_t row_tiles, parts;

  static KeySplit of(const ForwardParams& p, int64_t sms) {
    const int64_t row_tiles = (p.L * p.group + kQueryRows - 1) / kQueryRows;
    const int64_t blocks = p.B * p.H / p.group * row_tiles, at_once = sms * kBlocksPerSm;
    const int64_t keys = p.is_causal ? std::min(p.L, p.S) : p.S;
    const int64_t most = std::clamp<int64_t>(keys / (kKeyTile * kLeastTiles), 1, kMostParts);
    // Blocks run in waves, so a few blocks more than fit at one time cost as much as another full wave.
    const auto time = [&](int64_t parts) {
      return static_cast<double>((blocks * parts + at_once - 1) / at_once) / static_cast<double>(parts);
    };
    int64_t best = 1;
    double best_time = time(best);
    for (int64_t parts = 2; parts <= most; ++parts) {
      const double now = time(parts);
      if (now >= kWorthwhile * best_time) continue;
      best = parts;
      best_time = now;
    }
    return {row_tiles, best};
  }

  // Scratch in float32: for each query row and part its reference and its sum; then the outputs, not normalised.
  int64_t scratch(const ForwardParams& p) const { return parts == 1 ? 0 : p.B * p.H * p.L * parts * (p.Ev + 2); }
};

}  // namespace sdpa
