#include "registry.h"

#include <algorithm>
#include <set>

#include "attn/split.h"

namespace sdpa {

#include "variants.inc"

const char* name(Direction direction) {
  switch (direction) {
    case Direction::kForward:
      return "forward";
    case Direction::kBackward:
      return "backward";
    case Direction::kDecode:
      return "decode";
  }
  return "";
}

static constexpr int kHopper = 90;

static bool is_decoding(const Problem& p) {
  const int64_t group = p.key_heads == 0 ? 1 : p.H / p.key_heads;
  return !p.grad_wanted && p.dropout_p == 0 && p.L <= kMostDecodedQueries && p.L * group <= kMaxPosition;
}

// A forward whose scores a backward is to find again, bit by bit, needs that backward.
static bool has_backward(const Variant& forward, int64_t width) {
  const int path = forward.path == kHopper ? 80 : forward.path;
  return std::any_of(variants().begin(), variants().end(), [&](const Variant& v) {
    return v.direction == Direction::kBackward && v.backend == forward.backend && v.path == path &&
           v.dtype == forward.dtype && v.head_dim >= width;
  });
}

int shared_bytes_of(int capability) {
  const int kilobytes = capability < 75                                             ? 96
                        : capability < 80                                           ? 64
                        : capability == 86 || capability == 89 || capability >= 120 ? 99
                        : capability < 90                                           ? 163
                                                                                    : 227;
  return kilobytes * 1024;
}

// Hopper's own kernels, where they take the call and are the faster (bench/NOTES.md).
static bool suits_hopper(const Problem& p, bool backward) {
  if (p.capability != kHopper || !p.in_boxes || p.mask_kind != MaskKind::kNone || p.dropout_p > 0) return false;
  const int64_t width = std::max(p.E, p.Ev), fewest_queries = backward ? 1024 : width <= 64 ? 512 : 256;
  // One head alone: its launch failed under racecheck, not known why (bench/NOTES.md).
  if (backward && (p.deterministic || p.B * p.H == 1)) return false;
  return width > 32 && p.L >= fewest_queries && (p.L + 127) / 128 * p.B * p.H < kMaxPosition / 2;
}

// Flash's kernels serve the memory-efficient backend as well, where they take the call: they too hold no more than
// O(B H L).
static bool serves(const Variant& v, Backend backend, bool backward, const Problem& p) {
  if ((v.direction == Direction::kBackward) != backward) return false;
  // What runs here may be PTX of a build for older chips, which is without these kernels.
  if (v.path == kHopper && !(suits_hopper(p, backward) && (p.hypothetical || v.compiled_for(p.device_capability))))
    return false;
  const int64_t width = std::max(p.E, p.Ev);
  if (v.direction == Direction::kDecode && (!is_decoding(p) || v.head_dim < width)) return false;
  // Else a row is one tile wide in flash's kernels; memory-efficient ones walk over head dims wider than theirs.
  if (v.backend != Backend::kFlash) return v.backend == backend;
  if (v.head_dim > 256 && (backend == Backend::kFlash || shared_bytes_of(p.capability) < 163 * 1024)) return false;
  return (backend == Backend::kFlash || backend == Backend::kEfficient) && v.head_dim >= width &&
         (!p.grad_wanted || backward || has_backward(v, width));
}

// The newest path first, then decoding, then tensor cores, then the narrowest tile that holds a row, or the widest.
static bool better(const Variant& a, const Variant& b, int64_t width) {
  if (a.path != b.path) return a.path > b.path;
  if (a.direction != b.direction) return a.direction == Direction::kDecode;
  if (a.backend != b.backend) return a.backend == Backend::kFlash;
  const bool a_fits = a.head_dim >= width, b_fits = b.head_dim >= width;
  if (a_fits != b_fits) return a_fits;
  return a_fits ? a.head_dim < b.head_dim : a.head_dim > b.head_dim;
}

const Variant* find_variant(Backend backend, bool backward, const Problem& problem) {
  const int64_t width = std::max(problem.E, problem.Ev);
  const Variant* best = nullptr;
  for (const Variant& v : variants()) {
    if (v.dtype != problem.dtype || v.path > problem.capability) continue;
    if (serves(v, backend, backward, problem) && (best == nullptr || better(v, *best, width))) best = &v;
  }
  if (best == nullptr || problem.hypothetical || best->compiled_for(problem.device_capability)) return best;
  return nullptr;
}

std::string compiled_chips(Backend backend) {
  std::set<std::string> chips;
  for (const Variant& v : variants()) {
    if (v.backend != backend) continue;
    for (const Chip& chip : v.chips) {
      chips.insert("sm" + std::to_string(chip.capability) + (chip.specific ? "a" : "") + (chip.ptx ? "+PTX" : ""));
    }
  }
  std::string text;
  for (const std::string& chip : chips) text += (text.empty() ? "" : ", ") + chip;
  return text.empty() ? "no chip" : text;
}

}  // namespace sdpa
