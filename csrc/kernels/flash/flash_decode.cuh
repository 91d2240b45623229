// Flash attention forward for short queries (decoding), on mma.sync: bound by the bytes of keys and values.
//
// The rows of a tile are the queries of all heads that share a key head, so that keys and values are read once for
// them. A block takes a part of the keys (attn/split.h), each of its warps every kWarps-th 16 of them, with a softmax
// and copies of its own, so that no warp waits for another before the end; then the warps' sums are merged, and those
// of the parts by a second kernel.
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

// What L2 does with what is read once, or is read again by other blocks.
__device__ __forceinline__ uint64_t l2_policy(bool is_read_once) {
  uint64_t once, again;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(again));
  return is_read_once ? once : again;
}
__device__ __forceinline__ void cp_async_chunk(uint32_t destination, const void* source, int valid, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(destination), "l"(source),
               "r"(valid), "l"(policy)
               : "memory");
}

template <class Arch, class T, int kHeadDim, int kWarps_>
struct FlashDecode {
  static constexpr int kWarps = kWarps_, kThreads = kWarps * 32;
  static constexpr int kRows = 16, kKeyTile = 16;  // keys of a warp
  static constexpr int kSteps = kHeadDim / 16;
  using KeyTile = SharedTile<T, kKeyTile, kHeadDim, Arch>;  // of values too
  static constexpr int kStageBytes = 2 * KeyTile::kBytes;
  static constexpr int kStages = kDecodeWarpBytes / kStageBytes;
  static constexpr int kWarpBytes = kStages * kStageBytes;
  // The warps' sums go through the place of keys and values.
  static constexpr int kSumBytes = kWarps * kRows * (kHeadDim + 2) * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = kWarps * kWarpBytes;
  static_assert(kSumBytes <= kSharedBytes && kSharedBytes == decode_shared_bytes(kWarps));
  // A large block is for chips with more than the path's least (runs_large_decode_blocks).
  static_assert(kSharedBytes <= (kWarps > kSmallDecodeBlock.warps ? 227 * 1024 : Arch::kSharedBytes));

  // Starts the copies of 16 rows, by one warp; what lies outside the operand becomes zero. `policy`: of L2.
  static __device__ __forceinline__ void fetch(const KeyTile& tile, const HeadRows<const T>& source, int row0,
                                               uint64_t policy) {
    using Access = typename HeadRows<const T>::Access;
    constexpr int kChunks = KeyTile::kChunksPerRow, kRowStep = 32 / kChunks;
    const int lane = threadIdx.x % 32, first = lane / kChunks, chunk = lane % kChunks, rows = source.rows - row0;
    const int present = min(max(source.cols - chunk * kChunkElements, 0), kChunkElements);
    const T* from = source.data + int64_t{row0 + first} * source.row_stride + chunk * kChunkElements;
    if (source.access == Access::kChunk) {
#pragma unroll
      for (int row = 0; row < kKeyTile; row += kRowStep) {
        cp_async_chunk(tile.base + KeyTile::offset(first + row, chunk), from, first + row < rows ? present * 2 : 0,
                       policy);
        from += kRowStep * source.row_stride;
      }
    } else if (source.access == Access::kWord) {
#pragma unroll 1
      for (int row = 0; row < kKeyTile; row += kRowStep) {
        const int bytes = first + row < rows ? present * 2 : 0;
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          cp_async<4>(tile.base + KeyTile::offset(first + row, chunk) + word * 4, from + word * 2,
                      min(max(bytes - word * 4, 0), 4));
        }
        from += kRowStep * source.row_stride;
      }
    } else {
#pragma unroll 1
      for (int row = first; row < kKeyTile; row += kRowStep) {
        const uint4 x = row < rows ? read_chunk(source, row0 + row, chunk * kChunkElements) : uint4{0, 0, 0, 0};
        store_shared_16(tile.base + KeyTile::offset(row, chunk), x);
      }
    }
  }

  // Fetches the same rows as far as L2, which takes no notice of who writes to them.
  static __device__ __forceinline__ void prefetch(const HeadRows<const T>& source, int row0) {
    constexpr int kLine = 128 / static_cast<int>(sizeof(T)), kLines = kHeadDim / kLine;
    const int lane = threadIdx.x % 32, col = lane % kLines * kLine;
    if (source.col_stride != 1 || col >= source.cols) return;
#pragma unroll
    for (int row = row0 + lane / kLines; row < row0 + kKeyTile; row += 32 / kLines) {
      if (row < source.rows) asm volatile("prefetch.global.L2 [%0];" ::"l"(source.at(row, col)));
    }
  }
};

// Two neighbouring columns of a row, as they stand in an operand; zero past the last.
template <class T>
__device__ __forceinline__ uint32_t read_pair(const HeadRows<const T>& source, int row, int col) {
  const T* const from = source.at(row, col);
  if (col + 1 < source.cols && source.access != HeadRows<const T>::Access::kElement) {
    return *reinterpret_cast<const uint32_t*>(from);
  }
  const uint16_t* const bits = reinterpret_cast<const uint16_t*>(from);
  return (col < source.cols ? bits[0] : 0u) | (col + 1 < source.cols ? uint32_t{bits[source.col_stride]} << 16 : 0u);
}

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

template <class Arch, class T, int kHeadDim, int kWarps>
__global__ void __launch_bounds__(FlashDecode<Arch, T, kHeadDim, kWarps>::kThreads)
    flash_decode_kernel(const __grid_constant__ ForwardParams p, const float scale_log2) {
  using Flash = FlashDecode<Arch, T, kHeadDim, kWarps>;
  using KeyTile = typename Flash::KeyTile;
  using Product = Mma<Arch, T>;
  constexpr int kSteps = Flash::kSteps, kKeyTile = Flash::kKeyTile;
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
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_tile = static_cast<int>(int64_t{tiles} * part / parts) + warp;  // of this warp
  const int end_tile = static_cast<int>(int64_t{tiles} * (part + 1) / parts);

  const uint32_t base = shared_address(shared) + warp * Flash::kWarpBytes;
  const auto key_tile = [&](int stage) { return KeyTile{base + stage * Flash::kStageBytes}; };
  const auto value_tile = [&](int stage) { return KeyTile{base + stage * Flash::kStageBytes + KeyTile::kBytes}; };
  const HeadRows<const T> key(p.key, batch, key_head, p.S, p.E), value(p.value, batch, key_head, p.S, p.Ev);
  const uint64_t policy = l2_policy(row_tiles == 1);
  // A group of copies, also where there is no such tile.
  const auto fetch = [&](int tile, int stage) {
    if (tile < end_tile) {
      Flash::fetch(key_tile(stage), key, tile * kKeyTile, policy);
      Flash::fetch(value_tile(stage), value, tile * kKeyTile, policy);
    }
    cp_async_end_group();
  };
  const auto lane_offset = KeyTile::lane_offset();

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // Memory would be idle while the kernel before ends.
  for (int tile = first_tile; tile < min(end_tile, first_tile + Flash::kStages * kWarps); tile += kWarps) {
    Flash::prefetch(key, tile * kKeyTile);
    Flash::prefetch(value, tile * kKeyTile);
  }
#endif
  wait_for_predecessor();
#pragma unroll
  for (int n = 0; n < Flash::kStages - 1; ++n) fetch(first_tile + n * kWarps, n);

  // This lane's two rows.
  uint32_t query[kSteps][4];
  int64_t mask_offset[2];
  int last_key[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + lane / 4 + half * 8, l = row % L, head = key_head * group + row / L;
    const HeadRows<const T> source(p.query, batch, row < rows ? head : 0, p.L, p.E);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int right = 0; right < 2; ++right) {
        query[k][2 * right + half] = row < rows ? read_pair(source, l, k * 16 + right * 8 + lane % 4 * 2) : 0;
      }
    }
    last_key[half] = p.is_causal ? min(l, keys - 1) : keys - 1;
    mask_offset[half] = batch * p.attn_mask.stride[0] + head * p.attn_mask.stride[1] + l * p.attn_mask.stride[2];
  }
  const bool has_mask = p.mask_kind != MaskKind::kNone;

  float reference[2] = {-FLT_MAX, -FLT_MAX}, sum[2] = {0.f, 0.f};  // sum: this lane's share
  float output[kHeadDim / 8][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int tile = first_tile; tile < end_tile; tile += kWarps) {
    cp_async_wait_groups<Flash::kStages - 2>();
    __syncwarp();  // the other lanes' copies are there, too, and what is filled next has been read
    fetch(tile + (Flash::kStages - 1) * kWarps, stage == 0 ? Flash::kStages - 1 : stage - 1);

    // S = Q K^T for this warp's 16 keys
    float scores[2][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t b[4];
      key_tile(stage).load_b_transposed(b, lane_offset, 0, k);
      Product::add(scores[0], query[k], b[0], b[1]);
      Product::add(scores[1], query[k], b[2], b[3]);
    }

    float highest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int half = i / 2 % 2, column = tile * kKeyTile + i / 4 * 8 + lane % 4 * 2 + i % 2;
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
      value_tile(stage).load_b(b, lane_offset, 0, n);
      Product::add(output[2 * n], probability, b[0], b[1]);
      Product::add(output[2 * n + 1], probability, b[2], b[3]);
    }
    if (++stage == Flash::kStages) stage = 0;
  }

  // The warps' sums through shared memory: outputs | references | sums, for each warp and row.
  let_successor_start();
  cp_async_wait_all();
  __syncthreads();
  float* const outputs = reinterpret_cast<float*>(shared);
  float* const references = outputs + kWarps * Flash::kRows * kHeadDim;
  float* const totals = references + kWarps * Flash::kRows;
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
  for (int row = warp; row < Flash::kRows && row0 + row < rows; row += kWarps) {
    float top = -FLT_MAX, total = 0.f, factor[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, references[w * Flash::kRows + row]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
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
      for (int w = 0; w < kWarps; ++w) x += factor[w] * outputs[(w * Flash::kRows + row) * kHeadDim + col];
      if (parts > 1) {
        p.split_scratch[p.B * p.H * L * parts * 2 + part_row * Ev + col] = x;
      } else {
        *target.at(l, col) = static_cast<T>(total == 0.f ? 0.f : x / total);
      }
    }
  }
}

template <class Arch, class T, int kHeadDim, int kWarps>
cudaError_t launch_flash_decode(const ForwardParams& p, int64_t blocks, cudaStream_t stream) {
  using Flash = FlashDecode<Arch, T, kHeadDim, kWarps>;
  constexpr auto kKernel = flash_decode_kernel<Arch, T, kHeadDim, kWarps>;
  if (const auto error = allow_shared_bytes<kKernel>(Flash::kSharedBytes); error != cudaSuccess) return error;
  return launch_early<kKernel>(dim3(static_cast<unsigned>(blocks)), Flash::kThreads, Flash::kSharedBytes, stream, p,
                               p.scale * kLog2E);
}

// L from 1 to 16, E and Ev from 1 to kHeadDim, no dropout; writes no LSE.
template <class Arch, class T, int kHeadDim>
cudaError_t flash_decode(const ForwardParams& p, cudaStream_t stream) {
  const int64_t blocks = kSmallDecodeBlock.blocks(p) * p.split_parts;
  if (p.S > kMaxPosition || blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (KeySplit::scratch(p) > 0 && p.split_scratch == nullptr) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  int multiprocessors = 0;
  if (const auto error = count_multiprocessors(multiprocessors); error != cudaSuccess) return error;
  const auto error = runs_large_decode_blocks(p, blocks, multiprocessors)
                         ? launch_flash_decode<Arch, T, kHeadDim, kLargeDecodeBlock.warps>(p, blocks, stream)
                         : launch_flash_decode<Arch, T, kHeadDim, kSmallDecodeBlock.warps>(p, blocks, stream);
  if (error != cudaSuccess) return error;
  return combine_parts<Arch, T, kHeadDim>(p, /*log2_of_unit=*/1.f, stream);
}

}  // namespace sdpa
