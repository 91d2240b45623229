#include "math/math.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#if defined(SDPA_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "attn/float32_product.h"
#include "attn/softmax_rows.h"
#endif

#include "math/cpu_softmax.h"

namespace sdpa {
namespace {

using at::Tensor;

constexpr double kNegInf = -std::numeric_limits<double>::infinity();
std::atomic<int64_t> scratch_limit{int64_t{256} << 20};

// On the CPU the scores of one chunk should stay in a core's cache between the passes over them.
constexpr int64_t kCpuChunkBytes = int64_t{2} << 20;

// One step of the walk: some batches (all heads of each) or some heads of one batch, and some query rows.
struct Chunk {
  int64_t batch, batches, key_head, key_heads, row, rows, columns;
};

bool low_precision(const Tensor& t) {
  return t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16;
}
at::ScalarType accumulation_type(const Tensor& t) {
  return at::toOpMathType(t.scalar_type());
}

struct Shape {
  int64_t B, H, L, S, group, key_heads;
  explicit Shape(const Call& c)
      : B(c.query.size(0)),
        H(c.query.size(1)),
        L(c.query.size(2)),
        S(c.key.size(2)),
        group(H / std::max<int64_t>(c.key.size(1), 1)),
        key_heads(c.key.size(1)) {}
};

// Whose softmax it is: ATen's, or our own, which works in place, on the CPU or as a kernel on a GPU.
enum class SoftmaxBy { kATen, kCpu, kGpu };

SoftmaxBy softmax_by(const Tensor& t) {
  if (t.scalar_type() == at::kDouble) return SoftmaxBy::kATen;
  if (t.is_cpu()) return SoftmaxBy::kCpu;
#if defined(SDPA_WITH_CUDA)
  if (t.is_cuda() && softmax_rows_runs_here()) return SoftmaxBy::kGpu;
#endif
  return SoftmaxBy::kATen;
}

// What is held of each score at one time: scores, which become probabilities, and in the backward, but for a softmax
// within the products, the gradients of these, which become those of the scores. Besides, with our softmax a byte of
// dropout on a CPU, and on a GPU the latter in 16 bits for the gradient of a mask; with ATen's, that byte and what a
// GPU multiplies in 16 bits.
int64_t bytes_per_score(SoftmaxBy by, bool both, bool mask_grad, bool is_double) {
  const int64_t more = by == SoftmaxBy::kATen ? 3 : by == SoftmaxBy::kCpu ? 1 : both && mask_grad ? 2 : 0;
  return (both ? 2 : 1) * (is_double ? 8 : 4) + more;
}

// How many threads take heads of their own, since there are enough: their scores stay in their caches, and they wait
// for each other once. With 1 the operations within a chunk are parallel.
int64_t workers_for(bool cuda, int64_t independent, int64_t bytes_of_row) {
  const int64_t threads = cuda ? 1 : at::get_num_threads();
  return independent >= threads && scratch_limit / threads >= bytes_of_row ? threads : 1;
}
int64_t chunk_scores(bool cuda, int64_t workers, int64_t bytes_per_score) {
  const int64_t limit = scratch_limit / workers;
  // Workers or not, a core each.
  const int64_t bytes = cuda ? limit : std::min(kCpuChunkBytes * (at::get_num_threads() / workers), limit);
  return std::max<int64_t>(1, bytes / bytes_per_score);
}

// Which sets of heads have nothing to add to the same place: all, unless the gradient of a mask is broadcast.
struct Independent {
  bool batches = true, heads = true;
};

// A worker's memory for scores and their gradients, which all its sets of heads use: with fresh pages for each set the
// CPU takes a tenth longer.
struct Scratch {
  Tensor scores, grads;
};

// Calls heads_of(scratch, chunk, for_rows) for each set of heads, where for_rows(step) calls step(chunk) for each set
// of their rows.
template <class Heads>
void for_chunks(const Call& call, int64_t bytes_per_score, Independent independent, Heads heads_of) {
  const Shape shape(call);
  const bool cuda = call.query.is_cuda();
  const int64_t row_scores = shape.group * shape.S;
  const int64_t workers =
      workers_for(cuda, (independent.batches ? shape.B : 1) * (independent.heads ? shape.key_heads : 1),
                  row_scores * bytes_per_score);
  const int64_t budget = chunk_scores(cuda, workers, bytes_per_score);
  // Few rows of many columns, or many whole heads. Causal: an eighth of the rows at a time leaves out nearly half of
  // the columns.
  const int64_t causal_rows = std::max<int64_t>((shape.L + 7) / 8, std::min<int64_t>(shape.L, 128));
  const int64_t most_rows = call.is_causal ? causal_rows : shape.L;
  // On the CPU a head for each thread before more rows.
  const int64_t least_heads = cuda || workers > 1 ? 1 : std::min<int64_t>(at::get_num_threads(), shape.key_heads);
  int64_t rows = std::clamp<int64_t>(budget / (least_heads * row_scores), 1, most_rows);
  const int64_t row_steps = (shape.L + rows - 1) / rows;
  rows = (shape.L + row_steps - 1) / row_steps;  // of even size
  // Folding several batches or heads into one product would copy keys that are broadcast over them.
  const auto broadcast = [&](int64_t dim) { return call.key.stride(dim) == 0 || call.value.stride(dim) == 0; };
  // Not so many that a worker has none.
  const int64_t all_heads = shape.B * shape.key_heads;
  const int64_t most_heads = (all_heads + workers - 1) / workers;
  int64_t heads = std::clamp<int64_t>(budget / (rows * row_scores), 1, std::min(shape.key_heads, most_heads));
  if (broadcast(1)) heads = 1;
  const int64_t head_steps = (shape.key_heads + heads - 1) / heads;
  heads = (shape.key_heads + head_steps - 1) / head_steps;  // of even size
  int64_t batches = 1;
  if (heads == shape.key_heads && !broadcast(0)) {
    batches = std::clamp<int64_t>(budget / (shape.key_heads * rows * row_scores), 1,
                                  std::max<int64_t>(1, most_heads / shape.key_heads));
  }
  const int64_t batch_steps = (shape.B + batches - 1) / batches;
  const auto take = [&](Scratch& scratch, int64_t batch_step, int64_t head_step) {
    const int64_t b = batch_step * batches, h = head_step * heads;
    Chunk chunk{b, std::min(batches, shape.B - b), h, std::min(heads, shape.key_heads - h), 0, rows, shape.S};
    heads_of(scratch, chunk, [&](auto step) {
      for (int64_t row = 0; row < shape.L; row += rows) {
        chunk.row = row;
        chunk.rows = std::min(rows, shape.L - row);
        chunk.columns = call.is_causal ? std::min(shape.S, row + chunk.rows) : shape.S;
        step(chunk);
      }
    });
  };
  // Sets that depend on each other are one worker's.
  const int64_t batch_sets = independent.batches ? batch_steps : 1, head_sets = independent.heads ? head_steps : 1;
  const auto take_set = [&](Scratch& scratch, int64_t set) {
    for (int64_t b = set / head_sets; b < batch_steps; b += batch_sets) {
      for (int64_t h = set % head_sets; h < head_steps; h += head_sets) take(scratch, b, h);
    }
  };
  if (workers == 1) {
    Scratch scratch;
    for (int64_t set = 0; set < batch_sets * head_sets; ++set) take_set(scratch, set);
    return;
  }
  at::parallel_for(0, batch_sets * head_sets, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below;  // as the thread that called is, which others do not inherit
    Scratch scratch;
    for (int64_t set = begin; set < end; ++set) take_set(scratch, set);
  });
}

// Some batches, heads and rows of a 4-dim tensor: one view instead of three, which on a GPU is host time that counts.
Tensor part_of(const Tensor& t, int64_t batch, int64_t batches, int64_t head, int64_t heads, int64_t row,
               int64_t rows) {
  const int64_t offset = batch * t.stride(0) + head * t.stride(1) + row * t.stride(2);
  return t.as_strided({batches, heads, rows, t.size(3)}, t.strides(), t.storage_offset() + offset);
}
// The chunk of a (B, H, L, D) tensor: (batches, key_heads * group, rows, D), a view.
Tensor query_view(const Tensor& t, const Chunk& c, int64_t group) {
  return part_of(t, c.batch, c.batches, c.key_head * group, c.key_heads * group, c.row, c.rows);
}
// The same as (batches * key_heads, group * rows, D).
Tensor query_side(const Tensor& t, const Chunk& c, int64_t group) {
  return query_view(t, c, group).reshape({c.batches * c.key_heads, group * c.rows, t.size(3)});
}
// Of a (B, key heads, S, D) tensor: (batches, key_heads, columns, D), a view.
Tensor key_view(const Tensor& t, const Chunk& c, int64_t columns) {
  return part_of(t, c.batch, c.batches, c.key_head, c.key_heads, 0, columns);
}
// The same as (batches * key_heads, columns, D).
Tensor key_side(const Tensor& t, const Chunk& c) {
  return key_view(t, c, c.columns).reshape({c.batches * c.key_heads, c.columns, t.size(3)});
}

// Dims that were expanded go back to size 1, so that elementwise work on a broadcast mask is not multiplied.
Tensor unexpanded(Tensor t) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.stride(d) == 0 && t.size(d) > 1) t = t.narrow(d, 0, 1);
  }
  return t;
}
Tensor mask_chunk(const Tensor& mask, const Chunk& c, int64_t group) {
  const auto cut = [&](Tensor t, int64_t dim, int64_t start, int64_t size) {
    return t.size(dim) == 1 ? t : t.narrow(dim, start, size);
  };
  Tensor t = cut(mask, 0, c.batch, c.batches);
  t = cut(t, 1, c.key_head * group, c.key_heads * group);
  return cut(cut(t, 2, c.row, c.rows), 3, 0, c.columns);
}

// A batch of one keeps a single core busy on the CPU, a plain matrix product all of them.
bool one_on_cpu(const Tensor& a) {
  return a.is_cpu() && a.size(0) == 1;
}

#if defined(SDPA_WITH_CUDA)
Float32Product float32_product_of(const Tensor& out, const Tensor& a, const Tensor& b, double scale) {
  const auto matrix = [](const Tensor& t) -> Float32Product::Matrix {
    return {t.const_data_ptr<float>(), t.stride(0), t.stride(1), t.stride(2)};
  };
  Float32Product product;
  product.a = matrix(a), product.b = matrix(b);
  product.out = out.data_ptr<float>();
  product.out_batch_stride = out.stride(0), product.out_row_stride = out.stride(1);
  product.batches = a.size(0), product.rows = a.size(1), product.cols = b.size(2), product.depth = a.size(2);
  product.scale = static_cast<float>(scale);
  return product;
}

// multiply in float32, where a kernel of our own does it; with beta 0 or 1.
bool multiply_on_tensor_cores(const Tensor& out, const Tensor& a, const Tensor& b, double scale, double beta) {
  if (!a.is_cuda() || a.scalar_type() != at::kFloat || out.stride(2) != 1 || tf32_is_allowed()) return false;
  Float32Product product = float32_product_of(out, a, b, scale);
  product.adds = beta != 0;
  if (!takes_float32_product(product)) return false;
  C10_CUDA_CHECK(float32_product(product, c10::cuda::getCurrentCUDAStream()));
  return true;
}
#endif

// out = scale * a @ b + beta * out, where out is in the accumulation dtype. float16 and bfloat16 stay what they are on
// the GPU, where tensor cores accumulate in float32; on the CPU they come here converted. (The product that returns its
// result would first fill it from its first argument.)
void multiply(Tensor out, const Tensor& a, const Tensor& b, double scale, double beta = 0) {
#if defined(SDPA_WITH_CUDA)
  if (multiply_on_tensor_cores(out, a, b, scale, beta)) return;
#endif
  if (low_precision(a)) {
    at::baddbmm_out(out, out, a, b, at::kFloat, beta, scale);
  } else if (one_on_cpu(a)) {
    Tensor only = out[0];
    at::addmm_out(only, only, a[0], b[0], beta, scale);
  } else {
    at::baddbmm_out(out, out, a, b, beta, scale);
  }
}

// Where a product's rows belong, a view of the result (batches, heads, rows, D), as the product gives them, (sets,
// rows, D), if it can go straight there; else undefined.
Tensor direct(const Tensor& view, int64_t sets, at::ScalarType product_type) {
  if (view.size(0) * view.size(1) != sets || view.scalar_type() != product_type || view.stride(3) != 1) return {};
  const bool is_one_run = view.size(0) == 1 || view.stride(0) == view.size(1) * view.stride(1);
  if (sets != 1 && (view.is_cpu() || !is_one_run)) return {};
  return view.as_strided({sets, view.size(2), view.size(3)}, {view.stride(1), view.stride(2), 1});
}

Tensor product(const Tensor& a, const Tensor& b, double scale) {
  Tensor out = at::empty({a.size(0), a.size(1), b.size(2)}, a.options().dtype(accumulation_type(a)));
  multiply(out, a, b, scale);
  return out;
}

// From one row of scores to the next.
int64_t pitch_of(SoftmaxBy by, int64_t columns) {
  int64_t step = by == SoftmaxBy::kCpu ? CpuSoftmax::kPitchStep : 1;
#if defined(SDPA_WITH_CUDA)
  if (by == SoftmaxBy::kGpu) step = SoftmaxRows::kPitchStep;
#endif
  return (columns + step - 1) / step * step;
}
// Scores in memory that is used again for every set of rows: pages that are fresh each time are most of a product's
// time. Without such memory it is new. The rows are `pitch` long, of which the product is the first columns.
Tensor product_in(const Tensor& memory, const Tensor& a, const Tensor& b, double scale, int64_t pitch) {
  const int64_t count = a.size(0) * a.size(1) * pitch;
  const Tensor all =
      memory.defined() ? memory.narrow(0, 0, count) : at::empty({count}, a.options().dtype(accumulation_type(a)));
  const Tensor out = all.view({a.size(0), a.size(1), pitch});
  multiply(out.narrow(2, 0, b.size(2)), a, b, scale);
  return out;
}

// The dtype in which products are taken: the inputs' own where a fast product with float32 accumulation exists.
at::ScalarType product_type(const Tensor& t) {
  return t.is_cuda() && low_precision(t) ? t.scalar_type() : accumulation_type(t);
}

// For the scores of a set of heads' rows, as many as are taken at one time. Our GPU softmax has new memory each time.
Tensor memory_for(Tensor& memory, const Call& call, SoftmaxBy by, const Chunk& c) {
  if (by == SoftmaxBy::kGpu) return Tensor();
  const int64_t group = call.query.size(1) / call.key.size(1);
  const int64_t count = c.batches * c.key_heads * group * c.rows * pitch_of(by, c.columns);
  if (!memory.defined() || memory.numel() < count) {
    memory = at::empty({count}, call.query.options().dtype(accumulation_type(call.query)));
  }
  return memory;
}

// Masks the scaled scores of a chunk, (batches, heads, rows, columns).
void mask_scores(const Call& call, const Tensor& mask, const Chunk& c, Tensor scores, int64_t group) {
  if (mask.defined()) {
    const Tensor part = mask_chunk(mask, c, group);
    if (part.scalar_type() == at::kBool) {
      // (masked_fill_ branches on every entry.)
      at::where_out(scores, part, scores, at::scalar_tensor(kNegInf, scores.options().device(at::kCPU)));
    } else {
      scores.add_(part);
    }
  }
  if (call.is_causal && c.columns > c.row + 1) {
    // Every row of the chunk sees the columns up to its first row.
    const auto options = scores.options().dtype(at::kLong);
    const Tensor columns = at::arange(c.row + 1, c.columns, options), rows = at::arange(c.row, c.row + c.rows, options);
    scores.narrow(3, c.row + 1, c.columns - c.row - 1).masked_fill_(columns > rows.unsqueeze(1), kNegInf);
  }
}

Tensor keep_of(const Call& call, const Chunk& c, const Shape& shape) {
  const int64_t first = call.first_batch_head + c.batch * shape.H + c.key_head * shape.group;
  const int64_t heads = c.key_heads * shape.group;
  return dropout_keep(call.seed, call.dropout_p, first, c.batches * heads, c.row, c.rows, shape.S)
      .view({c.batches, heads, c.rows, shape.S})
      .narrow(3, 0, c.columns);
}

// grad_mask, if defined: the chunk's part, not broadcast. Returns whether some row has nothing to attend to.
bool softmax_on_cpu(const Call& call, const Tensor& whole_mask, const Chunk& c, const Shape& shape,
                    const Tensor& scores, const Tensor& grad_probs, const Tensor& grad_mask, const Tensor& logsumexp) {
  CpuSoftmax rows;
  rows.batches = c.batches, rows.heads = c.key_heads * shape.group, rows.rows = c.rows;
  rows.columns = c.columns, rows.pitch = scores.size(2);
  rows.scores = scores.data_ptr<float>();
  if (grad_probs.defined()) rows.grad_probs = grad_probs.data_ptr<float>();
  if (grad_mask.defined()) {
    rows.grad_mask = grad_mask.data_ptr<float>();
    for (int d = 0; d < 3; ++d) rows.grad_mask_stride[d] = grad_mask.stride(d);
  }
  if (call.is_causal) rows.diagonal = c.row;
  Tensor mask, keep;
  if (whole_mask.defined()) {
    mask = mask_chunk(whole_mask, c, shape.group);
    if (mask.scalar_type() != at::kBool) mask = mask.to(at::kFloat);
    if (mask.size(3) != c.columns || mask.stride(3) != 1) {
      mask = mask.expand({mask.size(0), mask.size(1), mask.size(2), c.columns}).contiguous();
    }
    for (int d = 0; d < 3; ++d) rows.mask_stride[d] = mask.size(d) == 1 ? 0 : mask.stride(d);
    if (mask.scalar_type() == at::kBool) {
      rows.takes_part = reinterpret_cast<const uint8_t*>(mask.const_data_ptr<bool>());
    } else {
      rows.bias = mask.const_data_ptr<float>();
    }
  }
  if (call.dropout_p > 0) {
    keep = keep_of(call, c, shape);
    rows.keep = keep.const_data_ptr<uint8_t>();
    rows.keep_pitch = shape.S;
  }
  if (logsumexp.defined()) {
    const Tensor part = query_view(logsumexp.unsqueeze(3), c, shape.group);
    rows.logsumexp = part.data_ptr<float>();
    for (int d = 0; d < 3; ++d) rows.logsumexp_stride[d] = part.stride(d);
  }
  return softmax_on_cpu(rows);
}

// A chunk's softmax in the backward, within its products: E = exp(scores - logsumexp), which is P but for a factor of
// the row, what rounding took from the logsumexp. grad_out is divided by the row's sum of E instead, so that
// dV = E^T grad_out and dS = E * (grad_out V^T - delta), delta = rowsum(grad_out * output).
struct ProductSoftmax {
  Tensor exponentials;  // (heads, rows, columns), padded
  Tensor grad_out;      // (heads, rows, Ev)
  Tensor delta;         // (heads, rows)
};

#if defined(SDPA_WITH_CUDA)

void softmax_on_gpu(const Call& call, const Chunk& c, const Shape& shape, const Tensor& scores,
                    const Tensor& grad_probs, at::ScalarType grad_type, const Tensor& logsumexp) {
  SoftmaxRows params;
  fill(params, call);
  params.S = c.columns;
  params.batch = c.batch;
  params.batches = c.batches;
  params.head = c.key_head * shape.group;
  params.heads = c.key_heads * shape.group;
  params.row = c.row;
  params.rows = c.rows;
  params.pitch = scores.size(2);
  params.scores = scores.data_ptr<float>();
  if (grad_probs.defined()) {
    params.grad_probs = grad_probs.data_ptr<float>();
    params.grad_dtype = dtype_of(grad_type);
  }
  if (logsumexp.defined()) {
    params.logsumexp = logsumexp.data_ptr<float>();
    for (int d = 0; d < 3; ++d) params.logsumexp_stride[d] = logsumexp.stride(d);
  }
  C10_CUDA_CHECK(softmax_rows(params, c10::cuda::getCurrentCUDAStream()));
}

// query and k: (heads, rows or columns, E); grad_output, output (.., Ev) and logsumexp (.., 1): views of 4 dims.
ProductSoftmax product_softmax(const Tensor& query, const Tensor& k, double scale, const Tensor& grad_output,
                               const Tensor& output, const Tensor& logsumexp) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t heads = query.size(0), rows = query.size(1), columns = k.size(1);
  const int64_t sum_columns = (columns + Float32Product::kSumCols - 1) / Float32Product::kSumCols;
  const Tensor row_lse = logsumexp.contiguous(), keys = k.transpose(1, 2),
               memory = at::empty({heads, rows, pitch_of(SoftmaxBy::kGpu, columns)}, query.options());
  const Tensor sums = at::empty({heads, sum_columns, rows}, memory.options());
  Float32Product product = float32_product_of(memory, query, keys, scale);
  product.result = ProductResult::kExponentials;
  product.row_terms = row_lse.const_data_ptr<float>();
  product.exp_sums = sums.data_ptr<float>();
  C10_CUDA_CHECK(float32_product(product, stream));

  const ProductSoftmax softmax{memory.narrow(2, 0, columns), at::empty({heads, rows, output.size(3)}, memory.options()),
                               at::empty({heads, rows}, memory.options())};
  DividedRows divided;
  divided.grad_output = operand(grad_output);
  divided.output = operand(output);
  divided.batches = output.size(0), divided.heads = output.size(1);
  divided.rows = output.size(2), divided.cols = output.size(3);
  divided.exp_sums = product.exp_sums;
  divided.sum_rows = rows, divided.sum_cols = sum_columns;
  divided.quotients = softmax.grad_out.data_ptr<float>();
  divided.delta = softmax.delta.data_ptr<float>();
  C10_CUDA_CHECK(divide_rows(divided, stream));
  return softmax;
}
// The gradients of the scores, in place of the exponentials.
Tensor in_place_gradients(const ProductSoftmax& softmax, const Tensor& v) {
  Float32Product product = float32_product_of(softmax.exponentials, softmax.grad_out, v.transpose(1, 2), 1);
  product.result = ProductResult::kGradients;
  product.row_terms = softmax.delta.const_data_ptr<float>();
  C10_CUDA_CHECK(float32_product(product, c10::cuda::getCurrentCUDAStream()));
  return softmax.exponentials;
}

#endif

// The softmax of a chunk's scores as product_in leaves them, in place, and of grad_probs, if defined, its derivative,
// which on a CPU is added to grad_mask, if defined. `mask`: the call's, unexpanded. Returns whether some row is known
// to have nothing to attend to.
bool softmax_in_place(const Call& call, const Tensor& mask, const Chunk& c, const Shape& shape, const Tensor& scores,
                      const Tensor& grad_probs, [[maybe_unused]] at::ScalarType grad_type, const Tensor& grad_mask,
                      const Tensor& logsumexp) {
#if defined(SDPA_WITH_CUDA)
  if (scores.is_cuda()) {
    softmax_on_gpu(call, c, shape, scores, grad_probs, grad_type, logsumexp);
    return false;
  }
#endif
  return softmax_on_cpu(call, mask, c, shape, scores, grad_probs, grad_mask, logsumexp);
}
// What it leaves: elements of this type at the start of each row.
Tensor in_place_result(const Tensor& padded, at::ScalarType type, int64_t columns) {
  return padded.view(type).narrow(2, 0, columns);
}

// Whether the backward's softmax is within its products, for so many rows of a head's: then of each score memory holds
// one number, not two, and these are not read and written once more. Only where the forward's scores are products of
// our own as well, so the very same: the output goes with them.
bool has_product_softmax(const Call& call, int64_t rows) {
#if defined(SDPA_WITH_CUDA)
  const bool is_plain = !call.attn_mask.defined() && !call.is_causal && call.dropout_p == 0;
  if (!is_plain || !call.query.is_cuda() || call.query.scalar_type() != at::kFloat || tf32_is_allowed()) return false;
  const Shape shape(call);
  const auto takes = [&](const Tensor& a, const Tensor& b) {
    Float32Product product;
    product.a = {a.const_data_ptr<float>(), a.stride(0) | a.stride(1), a.stride(2), a.stride(3)};
    product.b = {b.const_data_ptr<float>(), b.stride(0) | b.stride(1), b.stride(3), b.stride(2)};
    product.rows = rows, product.cols = shape.S, product.depth = a.size(3);
    product.result = ProductResult::kExponentials;
    return product.depth % 4 == 0 && takes_float32_product(product);  // copies, too, are in fours
  };
  return takes(call.query, call.key) && takes(call.value, call.value);  // the latter by a contiguous matrix
#else
  static_cast<void>(call), static_cast<void>(rows);
  return false;
#endif
}

}  // namespace

int64_t math_scratch_limit() {
  return scratch_limit;
}

void set_math_scratch_limit(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes > 0, "the math backend's scratch limit must be a positive number of bytes, got ", bytes);
  scratch_limit = bytes;
}

int64_t math_scratch_bytes(const Problem& p) {
  const bool cuda = p.device_type == DeviceType::kCUDA, is_double = p.dtype == DType::kFloat64;
#if defined(SDPA_WITH_CUDA)
  constexpr auto kOnGpu = SoftmaxBy::kGpu;
#else
  constexpr auto kOnGpu = SoftmaxBy::kATen;
#endif
  const SoftmaxBy by = is_double ? SoftmaxBy::kATen : cuda ? kOnGpu : SoftmaxBy::kCpu;
  const int64_t per_score = bytes_per_score(by, p.grad_wanted, p.mask_grad_wanted, is_double);
  const int64_t one_row = std::max<int64_t>(1, p.key_heads == 0 ? 1 : p.H / p.key_heads) * p.S;
  const int64_t workers = workers_for(cuda, p.B * p.key_heads, one_row * per_score);
  const int64_t budget = std::max(chunk_scores(cuda, workers, per_score), one_row);
  return std::min(p.B * p.H * p.L * p.S, workers * budget) * per_score;
}

void math_forward(const Call& call, Tensor output, Tensor logsumexp) {
  const Shape shape(call);
  const auto type = product_type(call.query);
  const SoftmaxBy by = softmax_by(call.query);
  const Tensor mask = call.attn_mask.defined() ? unexpanded(call.attn_mask) : Tensor();
  const double rescale = call.dropout_p > 0 ? dropout_rescale(call.dropout_p) : 1;
  const int64_t score_bytes = bytes_per_score(by, false, false, type == at::kDouble);
  // Our CPU softmax tells by the LSE which rows have nothing to attend to, where nobody else wants it, too. Without a
  // mask their scores are all -inf.
  Tensor lse = logsumexp;
  if (by == SoftmaxBy::kCpu && !lse.defined()) {
    lse = at::empty({shape.B, shape.H, shape.L}, call.query.options().dtype(at::kFloat));
  }
  for_chunks(call, score_bytes, {}, [&](Scratch& scratch, const Chunk& all_rows, const auto& for_rows) {
    const Tensor key = key_side(call.key, all_rows).to(type), value = key_side(call.value, all_rows).to(type);
    const Tensor memory = memory_for(scratch.scores, call, by, all_rows);
    for_rows([&](const Chunk& c) {
      const int64_t heads = c.batches * c.key_heads, rows = shape.group * c.rows;
      const Tensor query = query_side(call.query, c, shape.group).to(type);
      const Tensor k = key.narrow(1, 0, c.columns), v = value.narrow(1, 0, c.columns);
      const int64_t pitch = pitch_of(by, c.columns);
      const Tensor scores = product_in(memory, query, k.transpose(1, 2), call.scale, pitch);
      Tensor probs, empty;  // rows with nothing to attend to, if there may be some
      if (by != SoftmaxBy::kATen) {
        if (softmax_in_place(call, mask, c, shape, scores, Tensor(), type, Tensor(), lse)) {
          empty = query_view(lse.unsqueeze(3), c, shape.group) == kNegInf;
        }
        probs = in_place_result(scores, type, c.columns);
      } else {
        probs = scores.view({c.batches, c.key_heads * shape.group, c.rows, c.columns});
        mask_scores(call, mask, c, probs, shape.group);
        Tensor highest;
        if (mask.defined() || logsumexp.defined()) highest = probs.amax(-1, /*keepdim=*/true);
        if (mask.defined()) empty = highest == kNegInf;
        at::_softmax_out(probs, probs, -1, /*half_to_float=*/false);
        if (logsumexp.defined()) {
          // The probability of the highest score is 1 / sum(exp(scores - highest)).
          Tensor of_rows = highest - probs.amax(-1, true).log();
          if (mask.defined()) of_rows.masked_fill_(empty, kNegInf);
          query_view(logsumexp.unsqueeze(3), c, shape.group).copy_(of_rows);
        }
        if (call.dropout_p > 0) probs.mul_(keep_of(call, c, shape));
        probs = probs.view({heads, rows, c.columns}).to(type);
      }
      Tensor target = query_view(output, c, shape.group);
      if (const Tensor straight = direct(target, heads, accumulation_type(call.query)); straight.defined()) {
        multiply(straight, probs, v, rescale);
        if (empty.defined()) target.masked_fill_(empty, 0);
        return;
      }
      Tensor out = product(probs, v, rescale).view(target.sizes());
      if (empty.defined()) out.masked_fill_(empty, 0);
      target.copy_(out);
    });
  });
}

void math_backward(const Call& call, const Tensor& grad_output, [[maybe_unused]] const Tensor& output,
                   const Tensor& logsumexp, const Gradients& grads) {
  const Shape shape(call);
  const auto type = product_type(call.query);
  const auto sum_type = accumulation_type(call.query);
  const Tensor mask = call.attn_mask.defined() ? unexpanded(call.attn_mask) : Tensor();
  Tensor grad_mask = grads.mask.defined() ? unexpanded(grads.mask) : Tensor();
  const SoftmaxBy by = softmax_by(call.query);
  const double rescale = call.dropout_p > 0 ? dropout_rescale(call.dropout_p) : 1;
  // A look at all rows costs less than two passes over the gradients of a chunk.
  Tensor empty_rows = mask.defined() && by != SoftmaxBy::kGpu ? (logsumexp == kNegInf).unsqueeze(3) : Tensor();
  if (empty_rows.defined() && empty_rows.is_cpu() && !empty_rows.any().item<bool>()) empty_rows.reset();
  const int64_t score_bytes =
      bytes_per_score(by, !has_product_softmax(call, shape.group * shape.L), grads.mask.defined(), type == at::kDouble);
  Independent independent;
  if (grad_mask.defined()) independent = {grad_mask.size(0) == shape.B, grad_mask.size(1) == shape.H};
  for_chunks(call, score_bytes, independent, [&](Scratch& scratch, const Chunk& all_rows, const auto& for_rows) {
    const Tensor key = key_side(call.key, all_rows).to(type), value = key_side(call.value, all_rows).to(type);
    const Tensor memory = memory_for(scratch.scores, call, by, all_rows);
    const Tensor grad_memory = memory_for(scratch.grads, call, by, all_rows);
    Tensor grad_key, grad_value;
    for_rows([&](const Chunk& c) {
      const int64_t heads = c.batches * c.key_heads, group = shape.group, rows = group * c.rows;
      const bool in_products = has_product_softmax(call, rows);  // a chunk may be too small
      const std::vector<int64_t> four_dims = {c.batches, c.key_heads * group, c.rows, c.columns};
      const Tensor query = query_side(call.query, c, group).to(type);
      Tensor grad_out = in_products ? Tensor() : query_side(grad_output, c, group).to(type);
      const Tensor k = key.narrow(1, 0, c.columns), v = value.narrow(1, 0, c.columns);
      // Of shape (heads, rows, columns). The mask's gradient wants those of the scores unrounded.
      Tensor probs, grad_scores, own_grad_mask;  // the latter where it has been added to
      const auto grad_type = grad_mask.defined() ? sum_type : type;
      ProductSoftmax softmax;
      if (in_products) {
#if defined(SDPA_WITH_CUDA)
        softmax = product_softmax(query, k, call.scale, query_view(grad_output, c, group), query_view(output, c, group),
                                  query_view(logsumexp.unsqueeze(3), c, group));
        probs = softmax.exponentials, grad_out = softmax.grad_out;
#endif
      } else {
        const Tensor empty = empty_rows.defined() ? query_view(empty_rows, c, group) : Tensor();
        if (empty.defined()) grad_out = grad_out.masked_fill(empty.reshape({heads, rows, 1}), 0);
        const int64_t pitch = pitch_of(by, c.columns);
        const Tensor scores = product_in(memory, query, k.transpose(1, 2), call.scale, pitch);
        const Tensor grad_probs = product_in(grad_memory, grad_out, v.transpose(1, 2), rescale, pitch);
        if (by != SoftmaxBy::kATen) {
          if (grad_mask.defined() && by == SoftmaxBy::kCpu) {
            const Tensor part = mask_chunk(grad_mask, c, group);
            if (part.sizes() == at::IntArrayRef(four_dims) && part.stride(3) == 1) own_grad_mask = part;
          }
          softmax_in_place(call, mask, c, shape, scores, grad_probs, grad_type, own_grad_mask, Tensor());
          probs = in_place_result(scores, type, c.columns);
          grad_scores = in_place_result(grad_probs, grad_type, c.columns);
        } else {
          probs = scores.view(four_dims), grad_scores = grad_probs.view(four_dims);
          mask_scores(call, mask, c, probs, group);
          // A row with nothing to attend to gets a score, so that no NaN enters, and no gradient.
          if (empty.defined()) probs.narrow(3, 0, 1).masked_fill_(empty, 0);
          // Not exp(scores - logsumexp): beside scores of 1e4, or a mask of the lowest finite value, the rounding of
          // the logsumexp would be an error of every probability.
          at::_softmax_out(probs, probs, -1, /*half_to_float=*/false);
          const Tensor keep = call.dropout_p > 0 ? keep_of(call, c, shape) : Tensor();
          if (keep.defined()) grad_scores.mul_(keep);
          at::_softmax_backward_data_out(grad_scores, grad_scores, probs, -1, probs.scalar_type());
          if (keep.defined()) probs.mul_(keep);
          probs = probs.view({heads, rows, c.columns}).to(type);
          grad_scores = grad_scores.view({heads, rows, c.columns}).to(grad_type);
        }
      }
      // sum += scale * a @ b, where sum has a row for each key; what the first rows give need not be added to zeros.
      const auto accumulate = [&](Tensor& sum, const Tensor& target, const Tensor& a, const Tensor& b, double scale) {
        double beta = 1;
        if (!sum.defined()) {
          sum = direct(key_view(target, all_rows, shape.S), heads, sum_type);
          if (!sum.defined()) sum = at::empty({heads, shape.S, b.size(2)}, b.options().dtype(sum_type));
          if (c.columns == shape.S) {
            beta = 0;
          } else {
            sum.zero_();
          }
        }
        multiply(sum.narrow(1, 0, c.columns), a, b, scale, beta);
      };
      if (grads.value.defined()) accumulate(grad_value, grads.value, probs.transpose(1, 2), grad_out, rescale);
      if (in_products && (grads.query.defined() || grads.key.defined())) {
#if defined(SDPA_WITH_CUDA)
        grad_scores = in_place_gradients(softmax, v);
#endif
      }
      probs.reset();
      if (grad_mask.defined() && !own_grad_mask.defined()) {
        Tensor part = mask_chunk(grad_mask, c, group);
        const Tensor whole = grad_scores.view(four_dims);
        std::vector<int64_t> summed;
        for (int64_t d = 0; d < 4; ++d) {
          if (part.size(d) == 1 && whole.size(d) > 1) summed.push_back(d);
        }
        part.add_(summed.empty() ? whole : whole.sum(summed, /*keepdim=*/true));
        grad_scores = grad_scores.to(type);
      }
      if (grads.query.defined()) {
        const Tensor target = query_view(grads.query, c, group);
        if (const Tensor straight = direct(target, heads, sum_type); straight.defined()) {
          multiply(straight, grad_scores, k, call.scale);
        } else {
          target.copy_(product(grad_scores, k, call.scale).view(target.sizes()));
        }
      }
      if (grads.key.defined()) accumulate(grad_key, grads.key, grad_scores.transpose(1, 2), query, call.scale);
    });
    const auto store = [&](const Tensor& target, const Tensor& sum) {
      if (!target.defined()) return;
      const Tensor view = key_view(target, all_rows, shape.S);
      if (!sum.is_alias_of(view)) view.copy_(sum.view(view.sizes()));
    };
    store(grads.key, grad_key);
    store(grads.value, grad_value);
  });
}

}  // namespace sdpa
