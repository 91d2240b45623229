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
  static constexpr int64_t kBlocksPerSm = 4;  // wanted in all
  static constexpr int64_t kMostParts = 256;

  int64_t row_tiles, parts;

  static KeySplit of(const ForwardParams& p, int64_t sms) {
    const int64_t row_tiles = (p.L * p.group + kQueryRows - 1) / kQueryRows;
    const int64_t blocks = std::max<int64_t>(p.B * p.H / p.group * row_tiles, 1);
    const int64_t keys = p.is_causal ? std::min(p.L, p.S) : p.S;
    const int64_t most = std::max<int64_t>(keys / (kKeyTile * kLeastTiles), 1);
    return {row_tiles, std::clamp<int64_t>(sms * kBlocksPerSm / blocks, 1, std::min(most, kMostParts))};
  }

  // Scratch in float32: for each query row and part the output, not normalised, its reference and its sum.
  int64_t scratch(const ForwardParams& p) const { return parts == 1 ? 0 : p.B * p.H * p.L * parts * (p.Ev + 2); }
};

}  // namespace sdpa
