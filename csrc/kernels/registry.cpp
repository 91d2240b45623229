#include "registry.h"

#include <algorithm>
#include <set>

namespace sdpa {

#include "variants.inc"

const Variant* find_variant(Backend backend, bool backward, const Problem& problem) {
  const int64_t width = std::max(problem.E, problem.Ev);
  const Variant* best = nullptr;
  for (const Variant& v : variants()) {
    if (v.backend != backend || v.backward != backward || v.dtype != problem.dtype || v.path > problem.capability)
      continue;
    // Memory-efficient kernels walk over head dims wider than their tile; flash kernels hold a row in one tile.
    if (backend == Backend::kFlash && v.head_dim < width) continue;
    if (best != nullptr) {
      const bool v_fits = v.head_dim >= width, best_fits = best->head_dim >= width;
      const bool better_width =
          v_fits != best_fits ? v_fits : (v_fits ? v.head_dim < best->head_dim : v.head_dim > best->head_dim);
      if (v.path < best->path || (v.path == best->path && !better_width)) continue;
    }
    best = &v;
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
