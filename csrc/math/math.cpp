#include "math/math.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <limits>

namespace sdpa {
namespace {

using at::Tensor;

constexpr double kNegInf = -std::numeric_limits<double>::infinity();
std::atomic<int64_t> scratch_limit{int64_t{256} << 20};

// The scores of one chunk should stay in cache between the passes over them.
constexpr int64_t kCpuChunkBytes = int64_t{2} << 20, kCudaChunkBytes = int64_t{256} << 20;
// At the most at one time: two float32 matrices and a byte of mask; in the backward a third and a copy in 16 bits.
constexpr int64_t kForwardBytesPerScore = 9;
constexpr int64_t kBackwardBytesPerScore = 13;

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

int64_t chunk_scores(bool cuda, int64_t bytes_per_score) {
  return std::max<int64_t>(1,
                           std::min(cuda ? kCudaChunkBytes : kCpuChunkBytes, scratch_limit.load()) / bytes_per_score);
}

// Calls begin(chunk) before the first rows of a set of heads, step(chunk) for each set of rows, end(chunk) after the
// last.
template <class Begin, class Step, class End>
void for_chunks(const Call& call, int64_t bytes_per_score, Begin begin, Step step, End end) {
  const Shape shape(call);
  const int64_t budget = chunk_scores(call.query.is_cuda(), bytes_per_score);
  // Few rows of many columns, or many whole heads. Causal: an eighth of the rows at a time leaves out nearly half of
  // the columns.
  const int64_t causal_rows = std::max<int64_t>((shape.L + 7) / 8, std::min<int64_t>(shape.L, 128));
  const int64_t most_rows = call.is_causal ? causal_rows : shape.L;
  // On the CPU a head for each thread before more rows.
  const int64_t least_heads = call.query.is_cuda() ? 1 : std::min<int64_t>(at::get_num_threads(), shape.key_heads);
  const int64_t rows = std::clamp<int64_t>(budget / (least_heads * shape.group * shape.S), 1, most_rows);
  // Folding several batches or heads into one product would copy keys that are broadcast over them.
  const auto broadcast = [&](int64_t dim) { return call.key.stride(dim) == 0 || call.value.stride(dim) == 0; };
  int64_t heads = std::clamp<int64_t>(budget / (shape.group * rows * shape.S), 1, shape.key_heads);
  if (broadcast(1)) heads = 1;
  const int64_t steps = (shape.key_heads + heads - 1) / heads;
  heads = (shape.key_heads + steps - 1) / steps;  // of even size
  int64_t batches = 1;
  if (heads == shape.key_heads && !broadcast(0)) {
    batches = std::clamp<int64_t>(budget / (shape.H * rows * shape.S), 1, shape.B);
  }
  for (int64_t b = 0; b < shape.B; b += batches) {
    for (int64_t h = 0; h < shape.key_heads; h += heads) {
      Chunk chunk{b, std::min(batches, shape.B - b), h, std::min(heads, shape.key_heads - h), 0, 0, shape.S};
      begin(chunk);
      for (int64_t row = 0; row < shape.L; row += rows) {
        chunk.row = row;
        chunk.rows = std::min(rows, shape.L - row);
        chunk.columns = call.is_causal ? std::min(shape.S, row + chunk.rows) : shape.S;
        step(chunk);
      }
      end(chunk);
    }
  }
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

// scale * a @ b in the accumulation dtype. float16 and bfloat16 stay what they are on the GPU, where tensor cores
// accumulate in float32; on the CPU they come here converted.
Tensor product(const Tensor& a, const Tensor& b, double scale = 1) {
  if (low_precision(a)) {
    const Tensor none = at::empty({1, 1, 1}, a.options().dtype(at::kFloat)).expand({a.size(0), a.size(1), b.size(2)});
    return at::baddbmm(none, a, b, at::kFloat, /*beta=*/0, /*alpha=*/scale);
  }
  const Tensor none = at::empty({1, 1, 1}, a.options());
  if (one_on_cpu(a)) return at::addmm(none[0], a[0], b[0], /*beta=*/0, /*alpha=*/scale).unsqueeze(0);
  return at::baddbmm(none, a, b, /*beta=*/0, /*alpha=*/scale);
}

// sum += scale * a @ b
void add_product(const Tensor& sum, const Tensor& a, const Tensor& b, double scale = 1) {
  if (low_precision(a)) {
    sum.add_(product(a, b, scale));
  } else if (one_on_cpu(a)) {
    sum[0].addmm_(a[0], b[0], /*beta=*/1, /*alpha=*/scale);
  } else {
    Tensor out = sum;
    at::baddbmm_out(out, sum, a, b, /*beta=*/1, /*alpha=*/scale);
  }
}

// The dtype in which products are taken: the inputs' own where a fast product with float32 accumulation exists.
at::ScalarType product_type(const Tensor& t) {
  return t.is_cuda() && low_precision(t) ? t.scalar_type() : accumulation_type(t);
}

// Scaled and masked scores of a chunk as (batches, heads, rows, columns).
Tensor scores_of(const Call& call, const Tensor& mask, const Chunk& c, const Tensor& query, const Tensor& key,
                 int64_t group) {
  Tensor scores = product(query, key.transpose(1, 2), call.scale);
  Tensor view = scores.view({c.batches, c.key_heads * group, c.rows, c.columns});
  if (mask.defined()) {
    const Tensor part = mask_chunk(mask, c, group);
    if (part.scalar_type() == at::kBool) {
      view.masked_fill_(part.logical_not(), kNegInf);
    } else {
      view.add_(part);
    }
  }
  if (call.is_causal && c.columns > c.row + 1) {
    // Every row of the chunk sees the columns up to its first row.
    const auto options = scores.options().dtype(at::kLong);
    const Tensor columns = at::arange(c.row + 1, c.columns, options), rows = at::arange(c.row, c.row + c.rows, options);
    view.narrow(3, c.row + 1, c.columns - c.row - 1).masked_fill_(columns > rows.unsqueeze(1), kNegInf);
  }
  return view;
}

Tensor keep_of(const Call& call, const Chunk& c, const Shape& shape) {
  const int64_t first = call.first_batch_head + c.batch * shape.H + c.key_head * shape.group;
  const int64_t heads = c.key_heads * shape.group;
  return dropout_keep(call.seed, call.dropout_p, first, c.batches * heads, c.row, c.rows, shape.S)
      .view({c.batches, heads, c.rows, shape.S})
      .narrow(3, 0, c.columns);
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
  const int64_t per_score = p.grad_wanted ? kBackwardBytesPerScore : kForwardBytesPerScore;
  const int64_t one_row = std::max<int64_t>(1, p.key_heads == 0 ? 1 : p.H / p.key_heads) * p.S;
  const int64_t budget = std::max(chunk_scores(p.device_type == DeviceType::kCUDA, per_score), one_row);
  return std::min(p.B * p.H * p.L * p.S, budget) * per_score;
}

void math_forward(const Call& call, Tensor output, Tensor logsumexp) {
  const Shape shape(call);
  const auto type = product_type(call.query);
  const Tensor mask = call.attn_mask.defined() ? unexpanded(call.attn_mask) : Tensor();
  Tensor key, value;
  for_chunks(
      call, kForwardBytesPerScore,
      [&](const Chunk& c) {
        key = key_side(call.key, c).to(type);
        value = key_side(call.value, c).to(type);
      },
      [&](const Chunk& c) {
        const Tensor query = query_side(call.query, c, shape.group).to(type);
        const Tensor k = key.narrow(1, 0, c.columns), v = value.narrow(1, 0, c.columns);
        const Tensor scores = scores_of(call, mask, c, query, k, shape.group);
        Tensor probs = at::softmax(scores, -1);
        Tensor highest;
        if (mask.defined() || logsumexp.defined()) highest = scores.amax(-1, /*keepdim=*/true);
        if (logsumexp.defined()) {
          // The probability of the highest score is 1 / sum(exp(scores - highest)).
          Tensor lse = highest - probs.amax(-1, true).log();
          if (mask.defined()) lse.masked_fill_(highest == kNegInf, kNegInf);
          query_view(logsumexp.unsqueeze(3), c, shape.group).copy_(lse);
        }
        if (call.dropout_p > 0) {
          probs.mul_(keep_of(call, c, shape)).mul_(dropout_rescale(call.dropout_p));
        }
        const int64_t heads = c.batches * c.key_heads;
        Tensor out = product(probs.view({heads, shape.group * c.rows, c.columns}).to(type), v)
                         .view({c.batches, c.key_heads * shape.group, c.rows, output.size(3)});
        if (mask.defined()) out.masked_fill_(highest == kNegInf, 0);
        query_view(output, c, shape.group).copy_(out);
      },
      [](const Chunk&) {});
}

void math_backward(const Call& call, const Tensor& grad_output, const Tensor& logsumexp, const Gradients& grads) {
  const Shape shape(call);
  const auto type = product_type(call.query);
  const auto sum_type = accumulation_type(call.query);
  const Tensor mask = call.attn_mask.defined() ? unexpanded(call.attn_mask) : Tensor();
  Tensor grad_mask = grads.mask.defined() ? unexpanded(grads.mask) : Tensor();
  const Tensor empty_rows = (logsumexp == kNegInf).unsqueeze(3);
  Tensor key, value, grad_key, grad_value;
  for_chunks(
      call, kBackwardBytesPerScore,
      [&](const Chunk& c) {
        key = key_side(call.key, c).to(type);
        value = key_side(call.value, c).to(type);
        grad_key = grad_value = Tensor();
      },
      [&](const Chunk& c) {
        const int64_t heads = c.batches * c.key_heads, group = shape.group;
        const auto flat = [&](const Tensor& t) { return t.reshape({heads, group * c.rows, c.columns}).to(type); };
        const Tensor query = query_side(call.query, c, group).to(type);
        const Tensor grad_out = query_side(grad_output, c, group).to(type);
        const Tensor k = key.narrow(1, 0, c.columns), v = value.narrow(1, 0, c.columns);
        // Not exp(scores - logsumexp): beside scores of 1e4, or a mask of the lowest finite value, the rounding of the
        // logsumexp would be an error of every probability.
        Tensor probs = at::softmax(scores_of(call, mask, c, query, k, group), -1);
        if (mask.defined()) probs.masked_fill_(query_view(empty_rows, c, group), 0);
        // sum += scale * a @ b, where sum has a row for each key; what the first rows give need not be added to zeros.
        const auto accumulate = [&](Tensor& sum, const Tensor& a, const Tensor& b, double scale) {
          if (!sum.defined() && c.columns == shape.S) {
            sum = product(a, b, scale);
            return;
          }
          if (!sum.defined()) sum = at::zeros({heads, shape.S, b.size(2)}, b.options().dtype(sum_type));
          add_product(sum.narrow(1, 0, c.columns), a, b, scale);
        };
        const double rescale = call.dropout_p > 0 ? dropout_rescale(call.dropout_p) : 1;
        const Tensor keep = call.dropout_p > 0 ? keep_of(call, c, shape) : Tensor();
        if (grads.value.defined()) {
          accumulate(grad_value, flat(keep.defined() ? probs * keep : probs).transpose(1, 2), grad_out, rescale);
        }
        Tensor grad_scores;
        {
          Tensor grad_probs = product(grad_out, v.transpose(1, 2), rescale).view(probs.sizes());
          if (keep.defined()) grad_probs.mul_(keep);
          grad_scores = at::_softmax_backward_data(grad_probs, probs, -1, probs.scalar_type());
        }
        probs.reset();
        if (grad_mask.defined()) {
          Tensor part = mask_chunk(grad_mask, c, group);
          std::vector<int64_t> summed;
          for (int64_t d = 0; d < 4; ++d) {
            if (part.size(d) == 1) summed.push_back(d);
          }
          part.add_(summed.empty() ? grad_scores : grad_scores.sum(summed, /*keepdim=*/true));
        }
        const Tensor flat_grad = flat(grad_scores);
        grad_scores.reset();
        if (grads.query.defined()) {
          query_view(grads.query, c, group)
              .copy_(product(flat_grad, k, call.scale)
                         .view({c.batches, c.key_heads * group, c.rows, grads.query.size(3)}));
        }
        if (grads.key.defined()) {
          accumulate(grad_key, flat_grad.transpose(1, 2), query, call.scale);
        }
      },
      [&](const Chunk& c) {
        const auto store = [&](const Tensor& to, const Tensor& sum) {
          if (!to.defined()) return;
          key_view(to, c, shape.S).copy_(sum.view({c.batches, c.key_heads, shape.S, to.size(3)}));
        };
        store(grads.key, grad_key);
        store(grads.value, grad_value);
      });
}

}  // namespace sdpa
