#include "select/select.h"

#include <sstream>
#include <stdexcept>

namespace sdpa {

const char* name(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kBool:
      return "bool";
    case DType::kOther:
      return "another dtype";
  }
  return "?";
}

const char* name(MaskKind kind) {
  switch (kind) {
    case MaskKind::kNone:
      return "no mask";
    case MaskKind::kBool:
      return "a bool mask";
    case MaskKind::kFloat16:
      return "a float16 mask";
    case MaskKind::kBFloat16:
      return "a bfloat16 mask";
    case MaskKind::kFloat32:
      return "a float32 mask";
    case MaskKind::kFloat64:
      return "a float64 mask";
  }
  return "?";
}

const char* name(DeviceType type) {
  switch (type) {
    case DeviceType::kCPU:
      return "cpu";
    case DeviceType::kCUDA:
      return "cuda";
    case DeviceType::kOther:
      return "another device";
  }
  return "?";
}

const char* name(Backend backend) {
  switch (backend) {
    case Backend::kNone:
      return "None";
    case Backend::kFlash:
      return "Flash attention";
    case Backend::kEfficient:
      return "Memory efficient";
    case Backend::kMath:
      return "Math attention";
  }
  return "?";
}

std::string to_string(const Problem& p) {
  std::ostringstream out;
  out << "Problem(B=" << p.B << ", H=" << p.H << ", key_heads=" << p.key_heads << ", L=" << p.L << ", S=" << p.S
      << ", E=" << p.E << ", Ev=" << p.Ev << ", dtype=" << name(p.dtype) << ", mask=" << name(p.mask_kind)
      << ", is_causal=" << (p.is_causal ? "True" : "False") << ", dropout_p=" << p.dropout_p
      << ", grad_wanted=" << (p.grad_wanted ? "True" : "False") << ", device=" << name(p.device_type);
  if (p.device_type == DeviceType::kCUDA) out << ", capability=sm" << p.capability;
  out << ")";
  return out.str();
}

const std::vector<Constraint>& constraints(Backend backend) {
  switch (backend) {
    case Backend::kFlash:
      return flash_constraints();
    case Backend::kEfficient:
      return efficient_constraints();
    case Backend::kMath:
      return math_constraints();
    case Backend::kNone:
      break;
  }
  throw std::invalid_argument("no backend has the number " + std::to_string(static_cast<int>(backend)));
}

const Constraint* why_not(Backend backend, const Problem& problem) {
  for (const Constraint& constraint : constraints(backend)) {
    if (!constraint.holds(problem)) return &constraint;
  }
  return nullptr;
}

std::string message(const Constraint& constraint, const Problem& problem) {
  if (constraint.message != nullptr) return constraint.message(problem);
  return std::string(constraint.name) + ": got " + constraint.got(problem) + ", needs " + constraint.needs + ". " +
         constraint.fix;
}

bool enabled(Switches switches, Backend backend) {
  for (; switches != 0; switches >>= 4) {
    if ((switches & 0xf) == static_cast<int>(backend)) return true;
  }
  return false;
}

Switches check_switches(Switches switches) {
  int seen = 0;
  for (Switches rest = switches; rest != 0; rest >>= 4) {
    const int backend = static_cast<int>(rest & 0xf);
    if (rest < 0 || backend < 1 || backend > 3 || (seen >> backend & 1)) {
      throw std::invalid_argument(
          "backends must list each of 1 (flash), 2 (memory-efficient), 3 (math) at most once, " +
          std::string("four bits each; got ") + std::to_string(switches));
    }
    seen |= 1 << backend;
  }
  return switches;
}

Backend select(const Problem& problem, Switches switches) {
  for (Switches rest = switches; rest != 0; rest >>= 4) {
    const Backend backend = static_cast<Backend>(rest & 0xf);
    if (why_not(backend, problem) == nullptr) return backend;
  }
  return Backend::kNone;
}

std::vector<std::string> reasons(const Problem& problem, Switches switches) {
  std::vector<std::string> lines;
  for (const Backend backend : {Backend::kEfficient, Backend::kFlash, Backend::kMath}) {  // in the seed's order
    lines.push_back(std::string(name(backend)) + " kernel not used because:");
    if (!enabled(switches, backend)) {
      const char* what = backend == Backend::kEfficient ? "Memory Efficient attention" : name(backend);
      lines.push_back(std::string(what) + " has been runtime disabled.");
      continue;
    }
    for (const Constraint& constraint : constraints(backend)) {
      if (!constraint.holds(problem)) lines.push_back(message(constraint, problem));
    }
  }
  return lines;
}

}  // namespace sdpa
