// The last step of a decode kernel: combines the parts that the keys were split into (split.h).
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>

#include "launch.h"
#include "params.h"
#include "softmax.h"
#include "split.h"

namespace sdpa {

constexpr int kCombineThreads = 256;

// A block for each query row; each of its warps sums some of the parts. A part's reference, times log2_of_unit, is an
// exponent of two.
template <class Arch, class T, int kHeadDim>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ ForwardParams p, const float log2_of_unit) {
  constexpr int kWarps = kCombineThreads / 32, kCols = kHeadDim / 32;
  __shared__ float weights[KeySplit::kMostParts], sums[kWarps][kHeadDim];
  let_successor_start();  // which waits for this kernel in its turn
  wait_for_predecessor();
  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int parts = static_cast<int>(p.split_parts), Ev = static_cast<int>(p.Ev);
  const float2* const statistics = reinterpret_cast<const float2*>(p.split_scratch) + row * parts;
  const float* const outputs = p.split_scratch + p.B * p.H * p.L * parts * 2 + row * parts * Ev;

  // A warp's first outputs are on their way while the weights are made.
  constexpr int kAhead = 2;
  float ahead[kAhead][kCols];
#pragma unroll
  for (int n = 0; n < kAhead; ++n) {
    const int part = warp + n * kWarps;
#pragma unroll
    for (int i = 0; i < kCols; ++i) {
      const int col = lane + i * 32;
      ahead[n][i] = part < parts && col < Ev ? outputs[int64_t{part} * Ev + col] : 0.f;
    }
  }
  float top = -FLT_MAX, total = 0.f;
  for (int part = lane; part < parts; part += 32) top = fmaxf(top, statistics[part].x);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, distance));
  for (int part = lane; part < parts; part += 32) {
    const float weight = exp2_approx((statistics[part].x - top) * log2_of_unit);
    total += weight * statistics[part].y;
    if (warp == 0) weights[part] = weight;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
  __syncthreads();

  float sum[kCols] = {};
#pragma unroll
  for (int n = 0; n < kAhead; ++n) {
    const int part = warp + n * kWarps;
    const float weight = part < parts ? weights[part] : 0.f;
#pragma unroll
    for (int i = 0; i < kCols; ++i) sum[i] += weight * ahead[n][i];
  }
#pragma unroll 4
  for (int part = warp + kAhead * kWarps; part < parts; part += kWarps) {
#pragma unroll
    for (int i = 0; i < kCols; ++i) {
      if (lane + i * 32 < Ev) sum[i] += weights[part] * outputs[int64_t{part} * Ev + lane + i * 32];
    }
  }
#pragma unroll
  for (int i = 0; i < kCols; ++i) sums[warp][lane + i * 32] = sum[i];
  __syncthreads();
  const Operand& o = p.output;
  T* const target =
      static_cast<T*>(o.data) + row / p.L / p.H * o.stride[0] + row / p.L % p.H * o.stride[1] + row % p.L * o.stride[2];
  for (int col = threadIdx.x; col < Ev; col += kCombineThreads) {
    float x = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x += sums[w][col];
    target[col * o.stride[3]] = static_cast<T>(total == 0.f ? 0.f : x / total);  // a NaN in V stays out of empty rows
  }
}

template <class Arch, class T, int kHeadDim>
cudaError_t combine_parts(const ForwardParams& p, float log2_of_unit, cudaStream_t stream) {
  const int64_t rows = p.B * p.H * p.L;
  if (p.split_parts == 1) return cudaSuccess;
  if (rows > INT32_MAX || p.split_parts > KeySplit::kMostParts) return cudaErrorInvalidValue;
  return launch_early<combine_kernel<Arch, T, kHeadDim>>(dim3(static_cast<unsigned>(rows)), kCombineThreads, 0, stream,
                                                         p, log2_of_unit);
}

}  // namespace sdpa
