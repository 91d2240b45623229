// Which backend takes a problem. In the manner of PyTorch's sdp_utils: a priority list, switches per thread, and per
// backend a list of named constraints.
#pragma once

#include <string>
#include <vector>

#include "select/problem.h"

namespace sdpa {

enum class Backend : int { kNone = 0, kFlash = 1, kEfficient = 2, kMath = 3 };
constexpr Backend kBackends[] = {Backend::kFlash, Backend::kEfficient, Backend::kMath};
const char* name(Backend backend);  // "Flash attention", as warnings say it

// What a backend asks of a problem. `holds` runs on every call and only compares numbers; the texts are made when
// somebody asks.
struct Constraint {
  const char* name;
  bool (*holds)(const Problem&);
  std::string (*got)(const Problem&);
  const char* needs;
  const char* fix;
  // One sentence for the warning, in torch's words where torch has the same constraint; null: made from the above.
  std::string (*message)(const Problem&) = nullptr;
};

// Each stands next to its backend.
const std::vector<Constraint>& flash_constraints();
const std::vector<Constraint>& efficient_constraints();
const std::vector<Constraint>& math_constraints();
const std::vector<Constraint>& constraints(Backend backend);

// The first constraint that does not hold, or null.
const Constraint* why_not(Backend backend, const Problem& problem);
std::string message(const Constraint& constraint, const Problem& problem);

// Which backends may be taken, best first: four bits each, the first in the lowest. A plain number, because it travels
// as an argument of the op into compiled graphs.
using Switches = int64_t;
constexpr Switches kAllBackends = 0x321;  // flash, memory-efficient, math
bool enabled(Switches switches, Backend backend);
Switches check_switches(Switches switches);  // throws std::invalid_argument

// The first enabled backend all of whose constraints hold, or kNone.
Backend select(const Problem& problem, Switches switches);

// One line per reason why nothing was left, for warnings.
std::vector<std::string> reasons(const Problem& problem, Switches switches);

}  // namespace sdpa
