#include "attn/softmax_rows.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>

#include "arch/arch.h"
#include "attn/dropout.h"
#include "attn/mask.h"
#include "attn/softmax.h"

namespace sdpa {
namespace {

constexpr int kChunks = 8;  // of four columns, in a thread's registers at once

__device__ float exponential(float x) {
  return exp2_approx(x * kLog2E);
}

// What softmax needs of a row: its highest score, sum(exp(score - highest)), sum(exp(score - highest) * grad_prob).
struct RowSums {
  float highest = -INFINITY, total = 0.f, weighted = 0.f;

  __device__ void raise(float to) {
    if (to <= highest) return;
    const float factor = exponential(highest - to);
    highest = to;
    total *= factor;
    weighted *= factor;
  }
  __device__ void add(float score, float grad) {
    if (score == -INFINITY) return;  // whatever its gradient is
    const float e = exponential(score - highest);
    total += e;
    weighted += e * grad;
  }
  __device__ void merge(RowSums other) {
    const float top = fmaxf(highest, other.highest);
    raise(top);
    other.raise(top);
    total += other.total;
    weighted += other.weighted;
  }
  __device__ RowSums of_lane(int distance) const {
    return {__shfl_xor_sync(0xffffffffu, highest, distance), __shfl_xor_sync(0xffffffffu, total, distance),
            __shfl_xor_sync(0xffffffffu, weighted, distance)};
  }
};

// The threads that share a row: a warp, or else the whole block.
template <int kLanes>
struct RowGroup {
  static constexpr int kRows = kLanes == 32 ? 8 : 1;  // of a block
  static constexpr int kThreads = kRows * kLanes;
  static constexpr int kColumns = kLanes * 4 * kChunks;  // held at once

  static __device__ void sync() {
    if constexpr (kLanes == 32) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
  static __device__ RowSums merged(RowSums sums) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sums.merge(sums.of_lane(distance));
    if constexpr (kLanes > 32) {
      __shared__ RowSums of_warp[kLanes / 32];
      if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sums;
      __syncthreads();
      sums = of_warp[0];
      for (int warp = 1; warp < kLanes / 32; ++warp) sums.merge(of_warp[warp]);
    }
    return sums;
  }
};

__device__ void store(float* row, int64_t column, float4 x, DType dtype) {
  if (dtype == DType::kFloat32) {
    *reinterpret_cast<float4*>(row + column) = x;
  } else if (dtype == DType::kFloat16) {
    __half2* const to = reinterpret_cast<__half2*>(row) + column / 2;
    to[0] = __floats2half2_rn(x.x, x.y);
    to[1] = __floats2half2_rn(x.z, x.w);
  } else {
    __nv_bfloat162* const to = reinterpret_cast<__nv_bfloat162*>(row) + column / 2;
    to[0] = __floats2bfloat162_rn(x.x, x.y);
    to[1] = __floats2bfloat162_rn(x.z, x.w);
  }
}

template <int kLanes, bool kBackward>
__global__ void __launch_bounds__(RowGroup<kLanes>::kThreads, kBackward ? 2 : 3)
    softmax_rows_kernel(const __grid_constant__ SoftmaxRows p) {
  using Group = RowGroup<kLanes>;
  constexpr int kStep = kLanes * 4, kTile = Group::kColumns;
  const int64_t line = int64_t{blockIdx.x} * Group::kRows + threadIdx.x / kLanes;
  if (line >= p.batches * p.heads * p.rows) return;
  const int lane = threadIdx.x % kLanes, row = static_cast<int>(p.row + line % p.rows);
  const int64_t batch = p.batch + line / p.rows / p.heads, head = p.head + line / p.rows % p.heads;
  float* const scores = p.scores + line * p.pitch;
  float* const grads = kBackward ? p.grad_probs + line * p.pitch : nullptr;
  const int columns = static_cast<int>(p.S);

  const bool drops = p.dropout_p > 0.f;
  const Dropout dropout = Dropout::make(p.dropout_p, drops ? *p.seed : 0);
  const uint32_t batch_head = static_cast<uint32_t>(p.first_batch_head + batch * p.H + head);
  // Bit i says whether dropout keeps column + i. Eight lanes have 32 neighbouring columns; each draws for every eighth
  // of them (see dropout.h), and all lanes of the warp see what became of all.
  const auto kept_of = [&](uint32_t column) {
    Dropout here = dropout;
    constexpr bool kSpills = kIsBeforeSm90 && (kBackward || kChip >= 75);
    if constexpr (kSpills) here = Dropout::make_anew(p.dropout_p, p.seed);
    const Philox x = here.numbers(batch_head, row / 32, Dropout::column_word(column / 32, row % 8, lane % 8));
    const auto below = [&](uint32_t word) { return here.below(__funnelshift_l(word, word, ~row & 8)); };
    const uint32_t left = below(row & 16 ? x.word[2] : x.word[0]), right = below(row & 16 ? x.word[3] : x.word[1]);
    const auto all = [](uint32_t x) { return __ballot_sync(0xffffffffu, x & 1); };
    const uint32_t octets[4] = {all(left), all(left >> 16), all(right), all(right >> 16)};
    const uint32_t of_left = lane & 2 ? octets[1] : octets[0], of_right = lane & 2 ? octets[3] : octets[2];
    return ~((lane & 4 ? of_right : of_left) ^ here.keeps) >> (lane % 32 / 8 * 8 + lane % 2 * 4) & 15u;
  };
  const auto drop = [](float4& x, uint32_t kept) {
    if (!(kept & 1)) x.x = 0.f;
    if (!(kept & 2)) x.y = 0.f;
    if (!(kept & 4)) x.z = 0.f;
    if (!(kept & 8)) x.w = 0.f;
  };

  const Mask mask = Mask::of(p, batch, head);
  float4 x[kChunks], g[kBackward ? kChunks : 1];
  uint32_t kept = 0xffffffffu;  // four bits a chunk
  const auto read = [&](int tile) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int column = tile + i * kStep + lane * 4;
      if (column >= columns) break;
      x[i] = *reinterpret_cast<const float4*>(scores + column);
      if constexpr (kBackward) g[i] = *reinterpret_cast<const float4*>(grads + column);
    }
    mask.read([&](auto bias) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int column = tile + i * kStep + lane * 4;
        if (column >= columns) break;
        const float4 b = bias(row, column);
        x[i] = {Mask::add(x[i].x, b.x), Mask::add(x[i].y, b.y), Mask::add(x[i].z, b.z), Mask::add(x[i].w, b.w)};
      }
    });
    if (!drops) return;
    kept = 0;
#pragma unroll 1
    for (int i = 0; i < kChunks && tile + i * kStep + lane / 32 * 128 < columns; ++i) {  // the warp's first column
      kept |= kept_of(tile + i * kStep + lane * 4) << 4 * i;
    }
    if constexpr (kBackward) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) drop(g[i], kept >> 4 * i);
    }
  };

  RowSums sums;
  for (int tile = 0; tile < columns; tile += kTile) {
    read(tile);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (tile + i * kStep + lane * 4 >= columns) break;
      sums.raise(fmaxf(fmaxf(x[i].x, x[i].y), fmaxf(x[i].z, x[i].w)));
      const float4 d = kBackward ? g[kBackward ? i : 0] : float4{};
      sums.add(x[i].x, d.x);
      sums.add(x[i].y, d.y);
      sums.add(x[i].z, d.z);
      sums.add(x[i].w, d.w);
    }
  }
  sums = Group::merged(sums);

  const bool empty = sums.highest == -INFINITY && sums.total == 0.f;  // nothing to attend to
  const float factor = empty ? 0.f : 1.f / sums.total;
  [[maybe_unused]] const float mean = sums.weighted * factor;
  if (!kBackward && lane == 0 && p.logsumexp != nullptr) {
    float* const to = p.logsumexp + batch * p.logsumexp_stride[0] + head * p.logsumexp_stride[1];
    to[row * p.logsumexp_stride[2]] = empty ? -INFINITY : sums.highest + logf(sums.total);
  }

  for (int tile = 0; tile < columns; tile += kTile) {
    if (columns > kTile) read(tile);
    // Smaller elements than those read may overwrite what a neighbour has yet to read.
    Group::sync();
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int column = tile + i * kStep + lane * 4;
      if (column >= columns) break;
      const auto probability = [&](float score) {
        return score == -INFINITY ? 0.f : exponential(score - sums.highest) * factor;
      };
      float4 prob = {probability(x[i].x), probability(x[i].y), probability(x[i].z), probability(x[i].w)};
      if constexpr (kBackward) {
        const auto gradient = [&](float score, float q, float d) { return score == -INFINITY ? 0.f : q * (d - mean); };
        store(grads, column,
              {gradient(x[i].x, prob.x, g[i].x), gradient(x[i].y, prob.y, g[i].y), gradient(x[i].z, prob.z, g[i].z),
               gradient(x[i].w, prob.w, g[i].w)},
              p.grad_dtype);
      }
      drop(prob, kept >> 4 * i);
      store(scores, column, prob, p.dtype);
    }
  }
}

template <int kLanes, bool kBackward>
cudaError_t launch(const SoftmaxRows& p, cudaStream_t stream) {
  using Group = RowGroup<kLanes>;
  const int64_t blocks = (p.batches * p.heads * p.rows + Group::kRows - 1) / Group::kRows;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  softmax_rows_kernel<kLanes, kBackward><<<static_cast<unsigned>(blocks), Group::kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <bool kBackward>
cudaError_t launch(const SoftmaxRows& p, cudaStream_t stream) {
  if (p.S <= RowGroup<32>::kColumns) return launch<32, kBackward>(p, stream);
  if (p.S <= RowGroup<64>::kColumns) return launch<64, kBackward>(p, stream);
  if (p.S <= RowGroup<128>::kColumns) return launch<128, kBackward>(p, stream);
  return launch<256, kBackward>(p, stream);
}

}  // namespace

cudaError_t softmax_rows(const SoftmaxRows& p, cudaStream_t stream) {
  if (p.batches * p.heads * p.rows * p.S == 0) return cudaSuccess;
  if (p.pitch % SoftmaxRows::kPitchStep != 0 || p.pitch < p.S || p.S > INT32_MAX - RowGroup<256>::kColumns ||
      p.L > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  return p.grad_probs != nullptr ? launch<true>(p, stream) : launch<false>(p, stream);
}

bool softmax_rows_runs_here() {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, softmax_rows_kernel<32, false>) == cudaSuccess) return true;
  cudaGetLastError();  // it was a question
  return false;
}

}  // namespace sdpa
