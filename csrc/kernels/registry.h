// The variants this build knows, from csrc/kernels/variants.py, and which of them it has compiled for which chips.
#pragma once

#include <string>
#include <vector>

#include "attn/params.h"
#include "select/select.h"

#if defined(SDPA_WITH_CUDA)
#include <cuda_runtime_api.h>
#else
using cudaError_t = int;
using cudaStream_t = void*;
#endif

namespace sdpa {

// A chip a variant was compiled for.
struct Chip {
  int capability;
  bool specific;  // compiled as 90a, say: runs on that chip alone
  bool ptx;       // and on every newer one
  bool runs_on(int device_capability) const {
    if (specific) return capability == device_capability;
    return capability <= device_capability && (ptx || capability / 10 == device_capability / 10);
  }
};

enum class Direction { kForward, kBackward, kDecode };  // decode: forward for short queries, without LSE
const char* name(Direction direction);

struct Variant {
  const char* name;
  Backend backend;
  Direction direction;
  int path;
  DType dtype;
  int head_dim;
  bool sums_grad_query;  // a backward that wants grad_query_accum
  cudaError_t (*launch_forward)(const ForwardParams&, cudaStream_t);
  cudaError_t (*launch_backward)(const BackwardParams&, cudaStream_t);
  std::vector<Chip> chips;  // what this build has compiled it for
  bool compiled_for(int device_capability) const {
    for (const Chip& chip : chips) {
      if (chip.runs_on(device_capability)) return true;
    }
    return false;
  }
};

const std::vector<Variant>& variants();

// The variant that takes the problem: the newest path its capability can run, the smallest tile width that fits. Null
// if there is none, or if this build has not compiled it for the chip (unless the problem is hypothetical).
const Variant* find_variant(Backend backend, bool backward, const Problem& problem);

// What a block may have of shared memory on a chip: the table in the CUDA programming guide.
int shared_bytes_of(int capability);

// The chips this build has kernels of a backend for, as "sm80, sm90a", for messages.
std::string compiled_chips(Backend backend);

}  // namespace sdpa
