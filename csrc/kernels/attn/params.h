// What every attention kernel is given: plain structs, no torch. A kernel launcher has the form
//   cudaError_t launch(const ForwardParams&, cudaStream_t)
// and returns the first CUDA error it met; the caller turns it into an exception.
#pragma once

#include <cstdint>

namespace sdpa {

enum class DType : int { kFloat16, kBFloat16, kFloat32, kFloat64, kBool, kOther };

// The most queries, keys, and batches times heads. Positions are 32 bits wide: 64-bit arithmetic on them would take
// registers from the loops that ask.
constexpr int64_t kMaxPosition = INT32_MAX - 1024;

// A tensor seen as (batch, heads, rows, columns). Strides are in elements and may be anything, 0 included.
struct Operand {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
};

// What is added to the scores before softmax. A bool mask keeps where it is true. No kernel is given
// kFloat64: only math takes it.
enum class MaskKind : int { kNone, kBool, kFloat16, kBFloat16, kFloat32, kFloat64 };

struct ForwardParams {
  Operand query;               // (B, H, L, E)
  Operand key;                 // (B, H / group, S, E)
  Operand value;               // (B, H / group, S, Ev)
  Operand output;              // (B, H, L, Ev)
  Operand attn_mask;           // (B, H, L, S), read in place; stride 0 where it broadcasts
  float* logsumexp = nullptr;  // (B, H, L) contiguous; natural log; -inf for a row with nothing to attend to
  // (B, H, L) contiguous: what rounding took from logsumexp, as a power of two, so that
  //   probability = exp2(score * log2(e) - float(logsumexp * log2(e)) - logsumexp_rest).
  // Without it rows whose scores are 1e4, or a mask of the lowest finite value, have wrong gradients.
  float* logsumexp_rest = nullptr;
  int64_t B = 0, H = 0, L = 0, S = 0, E = 0, Ev = 0;
  int64_t group = 1;            // query heads that share one key head; key head = query head / group
  DType dtype = DType::kOther;  // of query, key, value and output
  MaskKind mask_kind = MaskKind::kNone;
  const uint64_t* mask_blocks = nullptr;   // see mask_blocks.h; null if nothing is known
  int64_t mask_blocks_stride[2] = {0, 0};  // of batch and head
  float scale = 1.f;                       // any finite float, zero and negative too
  bool is_causal = false;                  // top-left aligned: query i sees keys j <= i, also when L != S
  bool allow_tf32 = false;                 // float32 products may be computed in TF32
  float dropout_p = 0.f;
  const int64_t* seed = nullptr;  // device pointer to one number; read only if dropout_p > 0
  int64_t first_batch_head = 0;   // added to b * H + h in the dropout counter (see dropout.h)
  int shared_bytes = 0;           // of shared memory for a block, on the architecture whose code path is taken
  // See split.h; only decode kernels look at them.
  int64_t split_parts = 1;
  float* split_scratch = nullptr;
};

struct BackwardParams : ForwardParams {
  // Keys that some query sees: min(L, S) if causal, else S. Others are read as zeros: rows behind the last query, which
  // fill up a tile, would see them, and make gradients NaN if they are.
  int64_t seen_keys = 0;
  Operand grad_output;  // (B, H, L, Ev)
  // Gradients. data == nullptr: not wanted.
  Operand grad_query;                          // (B, H, L, E)
  Operand grad_key;                            // (B, H / group, S, E)
  Operand grad_value;                          // (B, H / group, S, Ev)
  float* grad_mask = nullptr;                  // float32; zeroed by the caller and added to, through grad_mask_stride
  int64_t grad_mask_stride[4] = {0, 0, 0, 0};  // stride 0 where the mask broadcasts, so that sums land together
  float* delta = nullptr;                      // scratch (B, H, L): rowsum(grad_output * output)
  // scratch (B, H, L, E) contiguous; only if asked for. Zeroed by the caller for the memory-efficient kernels, flash
  // does that itself.
  float* grad_query_accum = nullptr;
  // scratch (B, H, ceil(L / 16), ceil(E / 32)), zeroed by the caller; only if asked for and deterministic
  int* grad_query_turns = nullptr;
  bool deterministic = false;
};

// How many blocks a multiprocessor of the architecture whose code path is taken has room for, each with `bytes` of
// shared memory. One takes 1 KB more than it asks for, and one alone may have all but that.
inline int blocks_that_fit(const ForwardParams& p, int bytes) {
  return (p.shared_bytes + 1024) / (bytes + 1024);
}
template <class Flash>
bool fits_twice(const ForwardParams& p) {
  return blocks_that_fit(p, Flash::kSharedBytes) >= 2;
}

}  // namespace sdpa
