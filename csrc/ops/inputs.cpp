#include "ops/inputs.h"

#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <ATen/OpMathType.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <sstream>
#include <string>

#if defined(SDPA_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <cuda_runtime_api.h>
#endif

namespace sdpa {
namespace {

using at::Tensor;

void check_dtypes(const Arguments& a) {
  const auto type = a.query.scalar_type();
  TORCH_CHECK(dtype_of(type) != DType::kOther && dtype_of(type) != DType::kBool,
              "scaled_dot_product_attention: query must be float64, float32, float16 or bfloat16, got ", type);
  TORCH_CHECK(a.key.scalar_type() == type && a.value.scalar_type() == type,
              "scaled_dot_product_attention: query, key and value must have one dtype, got query ", type, ", key ",
              a.key.scalar_type(), ", value ", a.value.scalar_type());
  TORCH_CHECK(a.key.device() == a.query.device() && a.value.device() == a.query.device(),
              "scaled_dot_product_attention: query, key and value must be on one device, got query ", a.query.device(),
              ", key ", a.key.device(), ", value ", a.value.device());
  if (!a.attn_mask.defined()) return;
  const auto mask_type = a.attn_mask.scalar_type();
  TORCH_CHECK(
      dtype_of(mask_type) != DType::kOther && (mask_type != at::kDouble || type == at::kDouble),
      "scaled_dot_product_attention: attn_mask must be bool, float32, float16 or bfloat16 (float64 with float64 "
      "inputs), got ",
      mask_type, " with query ", type);
  TORCH_CHECK(a.attn_mask.device() == a.query.device(),
              "scaled_dot_product_attention: attn_mask must be on the query's device, got ", a.attn_mask.device(),
              ", query on ", a.query.device());
}

std::string sizes_of(const Arguments& a) {
  std::ostringstream out;
  out << "query " << a.query.sizes() << ", key " << a.key.sizes() << ", value " << a.value.sizes();
  if (a.attn_mask.defined()) out << ", attn_mask " << a.attn_mask.sizes();
  return out.str();
}

// Expands over leading dims; `heads` is what the tensor's own dim -3 becomes.
Tensor expand_lead(const Tensor& t, const std::vector<int64_t>& lead, int64_t heads) {
  std::vector<int64_t> sizes(lead);
  if (!sizes.empty()) sizes.back() = heads;
  sizes.push_back(t.size(-2));
  sizes.push_back(t.size(-1));
  return t.sizes().equals(sizes) ? t : t.expand(sizes);
}

}  // namespace

std::vector<int64_t> Inputs::shape(std::initializer_list<int64_t> tail) const {
  std::vector<int64_t> sizes(lead);
  sizes.insert(sizes.end(), tail);
  return sizes;
}

bool Inputs::empty() const {
  return L == 0 || std::any_of(lead.begin(), lead.end(), [](int64_t n) { return n == 0; });
}

double scale_of(const Tensor& query, std::optional<double> scale) {
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(query.size(-1), 1))));
}

Inputs check(const Arguments& a) {
  TORCH_CHECK(a.query.dim() >= 2 && a.key.dim() >= 2 && a.value.dim() >= 2,
              "scaled_dot_product_attention: query, key and value need 2 dims or more, got ", sizes_of(a));
  check_dtypes(a);
  TORCH_CHECK(a.dropout_p >= 0 && a.dropout_p <= 1, "scaled_dot_product_attention: dropout_p must be in [0, 1], got ",
              a.dropout_p);
  TORCH_CHECK(!(a.is_causal && a.attn_mask.defined()),
              "scaled_dot_product_attention: is_causal=True and attn_mask (of shape ",
              a.attn_mask.defined() ? a.attn_mask.sizes() : at::IntArrayRef{}, ") must not both be set");
  // In the scores' type: with an infinite scale all of them would be infinite or NaN.
  const bool is_double = a.query.scalar_type() == at::kDouble;
  const double largest = is_double ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  TORCH_CHECK(!a.scale || std::abs(*a.scale) <= largest, "scaled_dot_product_attention: scale must be finite in ",
              is_double ? "float64" : "float32", ", in which scores are computed, got ", a.scale.value_or(0));

  Inputs in;
  in.L = a.query.size(-2);
  in.E = a.query.size(-1);
  in.S = a.key.size(-2);
  in.Ev = a.value.size(-1);
  in.scale = scale_of(a.query, a.scale);
  TORCH_CHECK(a.key.size(-1) == in.E, "scaled_dot_product_attention: query and key must have the same head dim E, got ",
              in.E, " and ", a.key.size(-1), " (", sizes_of(a), ")");
  TORCH_CHECK(a.value.size(-2) == in.S, "scaled_dot_product_attention: key and value must have the same length S, got ",
              in.S, " and ", a.value.size(-2), " (", sizes_of(a), ")");

  auto query_lead = a.query.sizes().slice(0, a.query.dim() - 2).vec();
  auto key_lead = a.key.sizes().slice(0, a.key.dim() - 2).vec();
  auto value_lead = a.value.sizes().slice(0, a.value.dim() - 2).vec();
  int64_t key_heads = 0, value_heads = 0;
  if (a.enable_gqa) {
    TORCH_CHECK(!query_lead.empty() && !key_lead.empty() && !value_lead.empty(),
                "scaled_dot_product_attention: enable_gqa needs a heads dim (3 dims or more), got ", sizes_of(a));
    const int64_t heads = query_lead.back();
    key_heads = key_lead.back();
    value_heads = value_lead.back();
    const auto divides = [&](int64_t n) { return n == 0 ? heads == 0 : heads % n == 0; };
    TORCH_CHECK(
        divides(key_heads) && divides(value_heads),
        "scaled_dot_product_attention: enable_gqa needs query heads to be a multiple of key and value heads, got ",
        heads, " query, ", key_heads, " key and ", value_heads, " value heads");
    TORCH_CHECK(key_heads == value_heads || key_heads == 1 || value_heads == 1,
                "scaled_dot_product_attention: key and value must have the same number of heads (or one), got ",
                key_heads, " and ", value_heads);
    key_lead.back() = value_lead.back() = heads;
  }
  try {
    in.lead = query_lead;
    if (key_lead != in.lead) in.lead = at::infer_size(in.lead, key_lead);
    if (value_lead != in.lead) in.lead = at::infer_size(in.lead, value_lead);
  } catch (const c10::Error&) {
    TORCH_CHECK(false, "scaled_dot_product_attention: the leading dims do not broadcast: ", sizes_of(a),
                a.enable_gqa ? "" : " (with fewer key than query heads, pass enable_gqa=True)");
  }
  if (!a.enable_gqa && !in.lead.empty()) {
    // A head dim of 1 that broadcasts is a group of all heads: nothing to expand.
    key_heads = key_lead.empty() ? 1 : key_lead.back();
    value_heads = value_lead.empty() ? 1 : value_lead.back();
  }
  const int64_t shared_heads = key_heads == 1 ? value_heads : key_heads;
  in.query = expand_lead(a.query, in.lead, in.lead.empty() ? 0 : in.lead.back());
  in.key = expand_lead(a.key, in.lead, shared_heads);
  in.value = expand_lead(a.value, in.lead, shared_heads);
  if (a.attn_mask.defined()) {
    const auto full = in.shape({in.L, in.S});
    bool fits = a.attn_mask.dim() <= static_cast<int64_t>(full.size());
    for (int64_t d = 1; fits && d <= a.attn_mask.dim(); ++d) {
      fits = a.attn_mask.size(-d) == 1 || a.attn_mask.size(-d) == full[full.size() - d];
    }
    TORCH_CHECK(fits, "scaled_dot_product_attention: attn_mask of shape ", a.attn_mask.sizes(),
                " does not broadcast to (N, ..., L, S) = ", at::IntArrayRef(full));
    in.attn_mask = a.attn_mask.expand(full);
    in.mask_broadcasts = a.attn_mask.numel() < in.attn_mask.numel();
  }
  return in;
}

void for_each_4d(const FourDims& tensors, int64_t first_batch_head,
                 const std::function<void(const FourDims&, int64_t)>& body) {
  FourDims views(tensors);
  const int64_t rank = tensors[0].dim();
  if (rank <= 4) {
    for (Tensor& t : views) {
      while (t.defined() && t.dim() < 4) t = t.unsqueeze(0);
    }
    return body(views, first_batch_head);
  }
  // Dims 0 to rank - 4 are one, for a tensor, if each of more than one element follows on the next such.
  const auto folds = [&](const Tensor& t) {
    int64_t before = -1;
    for (int64_t d = 0; d <= rank - 4; ++d) {
      if (t.size(d) == 1) continue;
      if (before >= 0 && t.stride(before) != t.stride(d) * t.size(d)) return false;
      before = d;
    }
    return true;
  };
  if (std::all_of(tensors.begin(), tensors.end(), [&](const Tensor& t) { return !t.defined() || folds(t); })) {
    for (Tensor& t : views) {
      if (!t.defined()) continue;
      std::vector<int64_t> sizes = {1};
      for (int64_t d = 0; d <= rank - 4; ++d) sizes[0] *= t.size(d);
      sizes.insert(sizes.end(), t.sizes().end() - 3, t.sizes().end());
      t = t.view(sizes);  // never a copy, which results would be written to
    }
    return body(views, first_batch_head);
  }
  const int64_t outer = tensors[0].size(0);
  int64_t inner = 1;  // batch x heads pairs in one step
  for (int64_t d = 1; d < rank - 2; ++d) inner *= tensors[0].size(d);
  for (int64_t i = 0; i < outer; ++i) {
    for (size_t n = 0; n < tensors.size(); ++n) views[n] = tensors[n].defined() ? tensors[n].select(0, i) : Tensor();
    for_each_4d(views, first_batch_head + i * inner, body);
  }
}

// The dims of a tensor in the layout of `query`, outermost in memory first.
static std::vector<int64_t> layout_of(const Tensor& query, at::IntArrayRef sizes) {
  const int64_t rank = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> order(rank);
  std::iota(order.begin(), order.end(), 0);
  bool same_lead = query.dim() == rank;
  for (int64_t d = 0; same_lead && d + 1 < rank; ++d) {
    same_lead = query.size(d) == sizes[d] && !(query.stride(d) == 0 && query.size(d) > 1);
  }
  if (same_lead) {
    std::stable_sort(order.begin(), order.end() - 1,
                     [&](int64_t a, int64_t b) { return query.stride(a) > query.stride(b); });
  }
  return order;
}

Tensor empty_in_layout_of(const Tensor& query, const std::vector<int64_t>& sizes) {
  const auto order = layout_of(query, sizes);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[order[i]] = stride;
    stride *= std::max<int64_t>(sizes[order[i]], 1);
  }
  return at::empty_strided(sizes, strides, query.options());
}

Tensor in_layout_of(const Tensor& query, const Tensor& t) {
  const auto order = layout_of(query, t.sizes());
  std::vector<int64_t> back(order.size());
  for (size_t i = 0; i < order.size(); ++i) back[order[i]] = static_cast<int64_t>(i);
  return t.permute(order).contiguous().permute(back);
}

int forced_capability() {
  const char* text = std::getenv("SDPA_FORCE_ARCH");
  if (text == nullptr || *text == '\0') return 0;
  const std::string value(text);
  for (const int known : {70, 75, 80, 86, 90, 100}) {
    if (value == std::to_string(known)) return known;
  }
  TORCH_CHECK(false, "SDPA_FORCE_ARCH must be one of 70, 75, 80, 86, 90, 100; got '", value, "'");
}

static int device_capability(const at::Device& device) {
#if defined(SDPA_WITH_CUDA)
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];
  const int index = device.index();
  TORCH_CHECK(index >= 0 && index < kMaxDevices, "no such CUDA device: ", device);
  int capability = known[index].load(std::memory_order_relaxed);
  if (capability == 0) {
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    capability = 10 * major + minor;
    known[index].store(capability, std::memory_order_relaxed);
  }
  return capability;
#else
  (void)device;
  return 0;  // not known to a build without CUDA, which has no kernels to choose from either
#endif
}

bool is_in_boxes(const Tensor& t) {
  constexpr int64_t kChunk = 16;
  const int64_t size = t.element_size();
  // Not data_ptr(), which a fake tensor refuses.
  const auto* const data = t.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get();
  uint64_t bits = reinterpret_cast<uintptr_t>(data) + t.storage_offset() * size;
  for (int d = 0; d < 3; ++d) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) == 0) return false;
    bits |= t.stride(d) * size;
  }
  bits |= t.size(3) * size;
  return bits % kChunk == 0 && t.stride(3) == 1;
}

Problem describe(const Call& call, Wants wants) {
  Problem p;
  const Tensor &q = call.query, &k = call.key, &v = call.value;
  p.B = q.size(0);
  p.H = q.size(1);
  p.L = q.size(2);
  p.E = q.size(3);
  p.S = k.size(2);
  p.Ev = v.size(3);
  p.key_heads = k.size(1);
  for (int d = 0; d < 4; ++d) {
    p.query_stride[d] = q.stride(d);
    p.key_stride[d] = k.stride(d);
    p.value_stride[d] = v.stride(d);
    if (call.attn_mask.defined()) p.mask_stride[d] = call.attn_mask.stride(d);
  }
  p.dtype = dtype_of(q.scalar_type());
  p.mask_kind = mask_kind_of(call.attn_mask);
  p.is_causal = call.is_causal;
  p.in_boxes = call.scale > 0 && is_in_boxes(q) && is_in_boxes(k) && is_in_boxes(v);
  p.dropout_p = call.dropout_p;
  p.grad_wanted = wants.any_grad;
  p.mask_grad_wanted = wants.mask_grad;
  p.mask_broadcasts = wants.mask_broadcasts;
  p.deterministic = at::globalContext().deterministicAlgorithms();
  p.device_type = q.is_cuda() ? DeviceType::kCUDA : q.is_cpu() ? DeviceType::kCPU : DeviceType::kOther;
  if (q.is_cuda()) {
    p.device_capability = device_capability(q.device());
    const int forced = forced_capability();
    p.capability = forced != 0 ? forced : p.device_capability;
  }
  return p;
}

}  // namespace sdpa
