// Flash attention forward for short queries (decoding), on mma.sync: bound by the bytes of keys and values.
//
// The rows of a tile are the queries of all heads that share a key head, so that keys and values are read once for
// them. A block takes a part of the keys (attn/split.h), each of its warps a quarter of every key tile with a softmax
// of its own; the warps' sums are merged at the end, and those of the parts by a second kernel.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>

#include "../arch/arch.h"
#include "../attn/combine.cuh"
#include "../attn/launch.h"
#include "../attn/params.h"
#include "../attn/softmax.h"
#include "../attn/split.h"
#include "score_mask.cuh"
#include "tile.cuh"

namespace sdpa {

template <class Arch, class T, int kHeadDim>
struct FlashDecode {
  static constexpr int kWarps = 4, kThreads = kWarps * 32;
  static constexpr int kRows = kFlashDecodeBlock.rows, kKeyTile = KeySplit::kKeyTile;
  static_assert(kRows == 16 && kKeyTile == kWarps * 16);
  static constexpr int kStages = 3, kAhead = kStages - 1;  // tiles under way while one is computed
  static constexpr int kSteps = kHeadDim / 16;

  using QueryTile = SharedTile<T, kRows, kHeadDim>;
  using KeyTile = SharedTile<T, kKeyTile, kHeadDim>;  // of values too
  static constexpr int kRingBytes = 2 * kStages * KeyTile::kBytes;
  // The query passes through the last stage, the warps' sums through the whole ring.
  static constexpr int kSumBytes = kWarps * kRows * (kHeadDim + 2) * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;
  static_assert(kSharedBytes <= Arch::kSharedBytes);
};

// What is added to a score, in powers of two; -inf where the key takes no part, and else not below what the other
// kernels go down to.
template <class M>
__device__ __forceinline__ float decode_bias(const void* mask, int64_t offset) {
  if constexpr (std::is_same_v<M, bool>) {
    return static_cast<const uint8_t*>(mask)[offset] != 0 ? 0.f : -INFINITY;
  } else {
    const float x = static_cast<float>(static_cast<const M*>(mask)[offset]);
    const float bias = x * kLog2E;
    return x != -INFINITY && bias < kLowestBias ? kLowestBias : bias;  // NaN stays NaN
  }
}
__device__ __forceinline__ float decode_bias(const ForwardParams& p, int64_t offset) {
  switch (p.mask_kind) {
    case MaskKind::kBool:
      return decode_bias<bool>(p.attn_mask.data, offset);
    case MaskKind::kFloat16:
      return decode_bias<__half>(p.attn_mask.data, offset);
    case MaskKind::kBFloat16:
      return decode_bias<__nv_bfloat16>(p.attn_mask.data, offset);
    case MaskKind::kFloat32:
      return decode_bias<float>(p.attn_mask.data, offset);
    default:
      return 0.f;
  }
}

template <class Arch, class T, int kHeadDim>
__global__ void __launch_bounds__(FlashDecode<Arch, T, kHeadDim>::kThreads)
    flash_decode_kernel(const __grid_constant__ ForwardParams p, const float scale_log2) {
  using Flash = FlashDecode<Arch, T, kHeadDim>;
  using Product = Mma<Arch, T>;
  constexpr int kSteps = Flash::kSteps, kKeyTile = Flash::kKeyTile, kThreads = Flash::kThreads;
  extern __shared__ __align__(1024) unsigned char shared[];

  // Work of this block: some keys of a key head, and some of the rows that share it. Row r is query r % L of head
  // r / L of the group.
  const int L = static_cast<int>(p.L), group = static_cast<int>(p.group), key_heads = static_cast<int>(p.H) / group;
  const int rows = L * group, row_tiles = (rows + Flash::kRows - 1) / Flash::kRows;
  const int parts = static_cast<int>(p.split_parts), part = static_cast<int>(blockIdx.x % parts);
  const int row0 = static_cast<int>(blockIdx.x / parts % row_tiles) * Flash::kRows;
  const int batch_key_head = static_cast<int>(blockIdx.x / parts / row_tiles);
  const int batch = batch_key_head / key_heads, key_head = batch_key_head % key_heads;
  const int keys = static_cast<int>(p.is_causal ? min(p.L, p.S) : p.S);
  const int tiles = (keys + kKeyTile - 1) / kKeyTile;
  const int first_tile = static_cast<int>(int64_t{tiles} * part / parts);
  const int end_tile = static_cast<int>(int64_t{tiles} * (part + 1) / parts);

  const uint32_t base = shared_address(shared);
  const auto key_tile = [&](int stage) { return typename Flash::KeyTile{base + stage * Flash::KeyTile::kBytes}; };
  const auto value_tile = [&](int stage) { return key_tile(Flash::kStages + stage); };
  const HeadRows<const T> key(p.key, batch, key_head, p.S, p.E), value(p.value, batch, key_head, p.S, p.Ev);
  const auto fetch = [&](int tile, int stage) {
    key_tile(stage).template fill<kThreads>(key, tile * kKeyTile);
    value_tile(stage).template fill<kThreads>(value, tile * kKeyTile);
  };
  // Tile n of this block, if there is one; a group of copies in any case.
  const auto fetch_group = [&](int n) {
    if (first_tile + n < end_tile) fetch(first_tile + n, n % Flash::kStages);
    cp_async_end_group();
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto lane_offset = Flash::KeyTile::lane_offset();

  wait_for_predecessor();
#pragma unroll
  for (int n = 0; n < Flash::kAhead; ++n) fetch_group(n);
  const typename Flash::QueryTile query_tile{key_tile(Flash::kAhead).base};
  for (int i = threadIdx.x; i < Flash::kRows * Flash::QueryTile::kChunksPerRow; i += kThreads) {
    const int row = i / Flash::QueryTile::kChunksPerRow, chunk = i % Flash::QueryTile::kChunksPerRow;
    uint4 x = {0, 0, 0, 0};
    if (row0 + row < rows && chunk * kChunkElements < p.E) {
      const HeadRows<const T> query(p.query, batch, key_head * group + (row0 + row) / L, p.L, p.E);
      x = read_chunk(query, (row0 + row) % L, chunk * kChunkElements);
    }
    store_shared_16(query_tile.base + Flash::QueryTile::offset(row, chunk), x);
  }
  __syncthreads();
  uint32_t query[kSteps][4];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) query_tile.load_a(query[k], lane_offset, 0, k);

  // Of this lane's two rows.
  int64_t mask_offset[2];
  int last_key[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + lane / 4 + half * 8, l = row % L, head = key_head * group + row / L;
    last_key[half] = p.is_causal ? min(l, keys - 1) : keys - 1;
    mask_offset[half] = batch * p.attn_mask.stride[0] + head * p.attn_mask.stride[1] + l * p.attn_mask.stride[2];
  }
  const bool has_mask = p.mask_kind != MaskKind::kNone;

  float reference[2] = {-FLT_MAX, -FLT_MAX}, sum[2] = {0.f, 0.f};  // sum: this lane's share
  float output[kHeadDim / 8][4] = {};
  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int number = tile - first_tile, stage = number % Flash::kStages;
    // This tile has landed, and every warp is done with the one before, whose stage is filled next.
    cp_async_wait_groups<Flash::kAhead - 1>();
    __syncthreads();
    fetch_group(number + Flash::kAhead);

    // S = Q K^T for this warp's 16 keys
    float scores[2][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t b[4];
      key_tile(stage).load_b_transposed(b, lane_offset, warp, k);
      Product::add(scores[0], query[k], b[0], b[1]);
      Product::add(scores[1], query[k], b[2], b[3]);
    }

    float highest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int half = i / 2 % 2, column = tile * kKeyTile + warp * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2;
      float& score = scores[i / 4][i % 4];
      float bias = column <= last_key[half] ? 0.f : -INFINITY;
      if (has_mask && bias == 0.f && row0 + lane / 4 + half * 8 < rows) {
        bias = decode_bias(p, mask_offset[half] + column * p.attn_mask.stride[3]);
      }
      // What must not be attended to is replaced, so that no NaN in it survives.
      score = bias == -INFINITY ? -INFINITY : fmaf(score, scale_log2, bias);
      highest[half] = fmaxf(highest[half], score);
    }
    bool grows = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = quad_max(highest[half]);
      grows |= highest[half] > reference[half];
    }
    if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float now = fmaxf(highest[half], reference[half]), factor = exp2_approx(reference[half] - now);
        reference[half] = now;
        sum[half] *= factor;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          output[n][2 * half] *= factor;
          output[n][2 * half + 1] *= factor;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& score = scores[i / 4][i % 4];
      score = exp2_approx(score - reference[i / 2 % 2]);
      sum[i / 2 % 2] += score;
    }

    // O += P V
    uint32_t probability[4];
    to_operand<T>(probability, scores[0], scores[1]);
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      uint32_t b[4];
      value_tile(stage).load_b(b, lane_offset, warp, n);
      Product::add(output[2 * n], probability, b[0], b[1]);
      Product::add(output[2 * n + 1], probability, b[2], b[3]);
    }
  }

  // The warps' sums through shared memory: outputs | references | sums, for each warp and row.
  let_successor_start();
  cp_async_wait_all();
  __syncthreads();
  float* const outputs = reinterpret_cast<float*>(shared);
  float* const references = outputs + Flash::kWarps * Flash::kRows * kHeadDim;
  float* const totals = references + Flash::kWarps * Flash::kRows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * Flash::kRows + lane / 4 + half * 8;
    const float total = quad_sum(sum[half]);
    if (lane % 4 == 0) {
      references[row] = reference[half];
      totals[row] = total;
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(outputs + row * kHeadDim + n * 8 + lane % 4 * 2) = {output[n][2 * half],
                                                                                     output[n][2 * half + 1]};
    }
  }
  __syncthreads();
  const int Ev = static_cast<int>(p.Ev);
#pragma unroll 1
  for (int row = warp; row < Flash::kRows && row0 + row < rows; row += Flash::kWarps) {
    float top = -FLT_MAX, total = 0.f, factor[Flash::kWarps];
#pragma unroll
    for (int w = 0; w < Flash::kWarps; ++w) top = fmaxf(top, references[w * Flash::kRows + row]);
#pragma unroll
    for (int w = 0; w < Flash::kWarps; ++w) {
      factor[w] = exp2_approx(references[w * Flash::kRows + row] - top);
      total += factor[w] * totals[w * Flash::kRows + row];
    }
    const int l = (row0 + row) % L, head = key_head * group + (row0 + row) / L;
    const int64_t part_row = ((int64_t{batch} * p.H + head) * L + l) * parts + part;
    if (parts > 1 && lane == 0) {
      float* const statistics = p.split_scratch + part_row * 2;
      statistics[0] = top;
      statistics[1] = total;
    }
    const HeadRows<T> target(p.output, batch, head, p.L, p.Ev);
    for (int col = lane; col < Ev; col += 32) {
      float x = 0.f;
#pragma unroll
      for (int w = 0; w < Flash::kWarps; ++w) x += factor[w] * outputs[(w * Flash::kRows + row) * kHeadDim + col];
      if (parts > 1) {
        p.split_scratch[p.B * p.H * L * parts * 2 + part_row * Ev + col] = x;
      } else {
        *target.at(l, col) = static_cast<T>(total == 0.f ? 0.f : x / total);
      }
    }
  }
}

// L from 1 to 16, E and Ev from 1 to kHeadDim, no dropout; writes no LSE.
template <class Arch, class T, int kHeadDim>
cudaError_t flash_decode(const ForwardParams& p, cudaStream_t stream) {
  using Flash = FlashDecode<Arch, T, kHeadDim>;
  constexpr auto kKernel = flash_decode_kernel<Arch, T, kHeadDim>;
  const int64_t blocks = kFlashDecodeBlock.blocks(p) * p.split_parts;
  if (p.S > INT32_MAX - Flash::kKeyTile || blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (KeySplit::scratch(p) > 0 && p.split_scratch == nullptr) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  if (const auto error = allow_shared_bytes<kKernel>(Flash::kSharedBytes); error != cudaSuccess) return error;
  const auto error = launch_early<kKernel>(dim3(static_cast<unsigned>(blocks)), Flash::kThreads, Flash::kSharedBytes,
                                           stream, p, p.scale * kLog2E);
  if (error != cudaSuccess) return error;
  return combine_parts<Arch, T, kHeadDim>(p, /*log2_of_unit=*/1.f, stream);
}

}  // namespace sdpa
