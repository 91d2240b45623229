// What the math backend takes: everything the input checks let through.
#include "select/describe.h"

namespace sdpa {

const std::vector<Constraint>& math_constraints() {
  static const std::vector<Constraint> list = {
      {"dtype", [](const Problem& p) { return p.dtype != DType::kOther && p.dtype != DType::kBool; }, got_dtype,
       "float64, float32, float16 or bfloat16", "Cast the inputs."},
  };
  return list;
}

}  // namespace sdpa
