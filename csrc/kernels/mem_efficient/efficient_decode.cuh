// Memory-efficient attention forward for short queries (decoding), in float32 arithmetic on any chip from sm_70 up: as
// accurate as the dot products of eager, and bound by the bytes of keys and values.
//
// The rows of a tile are the queries of all heads that share a key head, so that keys and values are read once for
// them. A block takes a part of the keys (attn/split.h) and its warps take turns at its tiles, each with a softmax of
// its own; keys and values go straight from memory to registers, the next tile's while this one is worked on. The
// warps' sums are merged at the end, and those of the parts by a second kernel. No sum is long: a dot product is split
// over eight lanes, and results pass to shared memory every few tiles.
#pragma once

#include <cfloat>
#include <cmath>

#include "../arch/arch.h"
#include "../attn/combine.cuh"
#include "../attn/softmax.h"
#include "../attn/split.h"
#include "tile.h"

namespace sdpa {

namespace efficient {

template <class Arch, int kHeadDim>
struct Decode {
  static constexpr int kWarps = 4, kThreads = kWarps * 32;
  static constexpr DecodeBlock kBlock = efficient_decode_block(Arch::kId, kHeadDim);
  static constexpr int kRows = kBlock.rows, kBlocksPerSm = kBlock.per_sm;
  static_assert(kRows == 8);  // after a product's sums over eight lanes each of them is left with a row
  static constexpr int kLanesPerKey = 8, kKeysAtOnce = 32 / kLanesPerKey;
  // Of a warp's tile. A lane then holds eight groups of four floats of the keys, and as many of the values.
  static constexpr int kKeys = 1024 / kHeadDim, kKeysOwned = kKeys / kKeysAtOnce, kKeyQuads = kHeadDim / 32;
  static constexpr int kLanesPerValue = kHeadDim / 4 < 32 ? kHeadDim / 4 : 32, kValuesAtOnce = 32 / kLanesPerValue;
  static constexpr int kValuesOwned = kKeys / kValuesAtOnce, kValueQuads = kHeadDim / 4 / kLanesPerValue;
  static_assert(KeySplit::kKeyTile % (kWarps * kKeys) == 0);
  static constexpr int kChains = kHeadDim > 128 ? 2 : 1;  // separate sums of a lane's share of a dot product
  static constexpr int kTilesTogether = 8;                // summed up in registers
};

// Four neighbouring elements as they are in memory: halves unpacked would take twice the registers.
template <class T>
struct RawQuad {
  float word[4];

  __device__ __forceinline__ float at(int n) const { return word[n]; }
  __device__ __forceinline__ void set(int n, float x) { word[n] = x; }
};
template <>
struct RawQuad<__half> {
  uint32_t word[2];

  __device__ __forceinline__ float at(int n) const {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word[n / 2] >> n % 2 * 16)));
  }
  __device__ __forceinline__ void set(int n, uint32_t bits) {
    word[n / 2] = n % 2 == 0 ? bits : word[n / 2] | bits << 16;
  }
};

// Four elements, or one, if n < end, else zero. In assembler so that the loads stay in this order and each makes its
// own predicate: those of a whole tile, and all addresses at once, took registers that the kernel lacks.
__device__ __forceinline__ void load_if(RawQuad<float>& to, const float* from, int n, int end) {
  asm volatile(
      "{ .reg .pred p; setp.lt.s32 p, %5, %6; mov.f32 %0, 0f00000000; mov.f32 %1, %0; mov.f32 %2, %0; mov.f32 %3, %0;\n"
      "@p ld.global.nc.v4.f32 {%0,%1,%2,%3}, [%4]; }"
      : "=&f"(to.word[0]), "=&f"(to.word[1]), "=&f"(to.word[2]), "=&f"(to.word[3])
      : "l"(from), "r"(n), "r"(end));
}
__device__ __forceinline__ void load_if(RawQuad<__half>& to, const __half* from, int n, int end) {
  asm volatile(
      "{ .reg .pred p; setp.lt.s32 p, %3, %4; mov.u32 %0, 0; mov.u32 %1, 0;\n"
      "@p ld.global.nc.v2.u32 {%0,%1}, [%2]; }"
      : "=&r"(to.word[0]), "=&r"(to.word[1])
      : "l"(from), "r"(n), "r"(end));
}
__device__ __forceinline__ float load_one_if(const float* from, int n, int end) {
  float x;
  asm volatile(
      "{ .reg .pred p; setp.lt.s32 p, %2, %3; mov.f32 %0, 0f00000000;\n"
      "@p ld.global.nc.f32 %0, [%1]; }"
      : "=&f"(x)
      : "l"(from), "r"(n), "r"(end));
  return x;
}
__device__ __forceinline__ uint32_t load_one_if(const __half* from, int n, int end) {
  uint32_t bits;
  asm volatile(
      "{ .reg .pred p; setp.lt.s32 p, %2, %3; mov.u32 %0, 0;\n"
      "@p ld.global.nc.u16 %0, [%1]; }"
      : "=&r"(bits)
      : "l"(from), "r"(n), "r"(end));
  return bits;
}

// Of rows row, row + kRowStep, ...: the groups of four columns from col, col + kColStep, ... Zero where there is none.
template <int kRowStep, int kColStep, class T, int kCount, int kQuads>
__device__ __forceinline__ void load_quads(RawQuad<T> (&to)[kCount][kQuads], const Matrix<const T>& m, int row,
                                           int col) {
  const T* from = m.at(row, col);
  const auto cols_left = [&](int i) { return row + i * kRowStep < m.rows ? m.cols - col : 0; };
  if (m.quads && m.cols % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i, from += kRowStep * m.row_stride) {
#pragma unroll
      for (int c = 0; c < kQuads; ++c) load_if(to[i][c], from + c * kColStep, c * kColStep, cols_left(i));
    }
  } else {
    int64_t col_stride = m.col_stride;
    asm volatile("" : "+l"(col_stride));  // its multiples are not worth a kernel's registers
#pragma unroll
    for (int i = 0; i < kCount; ++i, from += kRowStep * m.row_stride) {
#pragma unroll
      for (int n = 0; n < 4 * kQuads; ++n) {
        const int c = n / 4 * kColStep + n % 4;
        to[i][n / 4].set(n % 4, load_one_if(from + c * col_stride, c, cols_left(i)));
      }
    }
  }
}

// What a mask tensor holds for a query's score with a key, to be made a bias when it is needed.
struct MaskRow {
  const char* data;
  int64_t key_stride;  // in bytes
  MaskKind kind;

  __device__ static MaskRow of(const ForwardParams& p, int64_t b, int64_t h, int64_t l) {
    const int64_t* const stride = p.attn_mask.stride;
    const int bytes = p.mask_kind == MaskKind::kFloat32 ? 4 : p.mask_kind == MaskKind::kBool ? 1 : 2;
    return {static_cast<const char*>(p.attn_mask.data) + (b * stride[0] + h * stride[1] + l * stride[2]) * bytes,
            stride[3] * bytes, p.mask_kind};
  }
  __device__ __forceinline__ uint32_t bits(int key) const {
    const char* const from = data + key * key_stride;
    if (kind == MaskKind::kNone) return 0;
    if (kind == MaskKind::kFloat32) return *reinterpret_cast<const uint32_t*>(from);
    if (kind == MaskKind::kBool) return *reinterpret_cast<const uint8_t*>(from);
    return *reinterpret_cast<const uint16_t*>(from);
  }
  __device__ __forceinline__ float bias(uint32_t bits) const {
    if (kind == MaskKind::kNone) return 0.f;
    if (kind == MaskKind::kFloat32) return __uint_as_float(bits);
    if (kind == MaskKind::kBool) return bits != 0 ? 0.f : -INFINITY;
    if (kind == MaskKind::kBFloat16) return __uint_as_float(bits << 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
};

template <class Arch, class T, int kHeadDim>
__global__ void __launch_bounds__(Decode<Arch, kHeadDim>::kThreads, Decode<Arch, kHeadDim>::kBlocksPerSm)
    decode_kernel(const __grid_constant__ ForwardParams p) {
  using Shape = Decode<Arch, kHeadDim>;
  constexpr int kWarps = Shape::kWarps, kRows = Shape::kRows, kKeys = Shape::kKeys, kKeysOwned = Shape::kKeysOwned;
  constexpr int kChains = Shape::kChains;
  constexpr float kSlack = 5.f;  // a row's reference is raised only when a score is that much above it
  __shared__ float4 queries[kRows][kHeadDim / 4], probabilities[kWarps][kKeys][kRows / 4];
  __shared__ float4 results[kWarps * Shape::kValuesAtOnce][kRows][kHeadDim / 4];
  __shared__ float references[kWarps][kRows], totals[kWarps][kRows];

  // Work of this block: some keys of a key head, and some of the rows that share it. Row r is query r % L of head
  // r / L of the group.
  const int L = static_cast<int>(p.L), group = static_cast<int>(p.group), key_heads = static_cast<int>(p.H) / group;
  const int rows = L * group, row_tiles = (rows + kRows - 1) / kRows, parts = static_cast<int>(p.split_parts);
  const int row0 = static_cast<int>(blockIdx.x % row_tiles) * kRows;
  const int part = static_cast<int>(blockIdx.x / row_tiles % parts);
  const int batch_key_head = static_cast<int>(blockIdx.x / row_tiles / parts);
  const int batch = batch_key_head / key_heads, key_head = batch_key_head % key_heads;
  const int keys = static_cast<int>(p.is_causal ? min(p.L, p.S) : p.S);
  const int64_t split_tiles = ceil_div(keys, KeySplit::kKeyTile);
  constexpr int kTilesPerSplit = KeySplit::kKeyTile / kKeys;
  const int first_tile = static_cast<int>(split_tiles * part / parts) * kTilesPerSplit;
  const int end_tile =
      min(static_cast<int>(split_tiles * (part + 1) / parts) * kTilesPerSplit, static_cast<int>(ceil_div(keys, kKeys)));

  const auto key = Matrix<const T>::of(p.key, batch, key_head, keys, p.E);
  const auto value = Matrix<const T>::of(p.value, batch, key_head, keys, p.Ev);
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // known to be a warp's

  // This lane's place among keys, and among values and their results; the row it does the softmax of.
  const int key_row = lane / Shape::kLanesPerKey, key_quad = lane % Shape::kLanesPerKey;
  const int value_row = lane / Shape::kLanesPerValue, value_quad = lane % Shape::kLanesPerValue;
  const int own_row = row0 + lane % kRows, own_query = own_row % L;
  const int last_key = own_row >= rows ? -1 : p.is_causal ? min(own_query, keys - 1) : keys - 1;
  const auto mask = MaskRow::of(p, batch, key_head * group + min(own_row, rows - 1) / L, own_query);

  RawQuad<T> k[kKeysOwned][Shape::kKeyQuads], v[Shape::kValuesOwned][Shape::kValueQuads];
  uint32_t mask_bits[kKeysOwned];
  const auto key_of = [&](int tile, int i) { return tile * kKeys + i * Shape::kKeysAtOnce + key_row; };
  const auto fetch_keys = [&](int tile) {
    if (tile >= end_tile) return;
#pragma unroll
    for (int i = 0; i < kKeysOwned; ++i) {
      mask_bits[i] = key_of(tile, i) <= last_key ? mask.bits(key_of(tile, i)) : 0;
    }
    load_quads<Shape::kKeysAtOnce, 32>(k, key, key_of(tile, 0), 4 * key_quad);
  };
  const auto fetch_values = [&](int tile) {
    if (tile >= end_tile) return;
    load_quads<Shape::kValuesAtOnce, 128>(v, value, tile * kKeys + value_row, 4 * value_quad);
  };
  wait_for_predecessor();
  fetch_keys(first_tile + warp);
  fetch_values(first_tile + warp);

  for (int i = threadIdx.x; i < kRows * kHeadDim / 4; i += Shape::kThreads) {
    const int row = i / (kHeadDim / 4), quad = i % (kHeadDim / 4);
    float4 x = {0.f, 0.f, 0.f, 0.f};
    if (row0 + row < rows && 4 * quad < p.E) {
      const int head = key_head * group + (row0 + row) / L;
      x = Matrix<const T>::of(p.query, batch, head, p.L, p.E).quad_at((row0 + row) % L, 4 * quad);
    }
    queries[row][quad] = x;
  }
  // Only this lane touches its results before the last barrier.
  const auto each_result = [&](auto f) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Shape::kValueQuads; ++c) {
        f(results[warp * Shape::kValuesAtOnce + value_row][r][value_quad + 32 * c], r, c);
      }
    }
  };
  each_result([](float4& x, int, int) { x = {0.f, 0.f, 0.f, 0.f}; });
  __syncthreads();

  float result[kRows][Shape::kValueQuads][4] = {};
  // Of this lane's row; the sums are over this lane's keys. The reference is finite, so that exp(-inf - reference) is
  // 0.
  float reference = -FLT_MAX, sum = 0.f, total = 0.f;
  int tiles_done = 0;
#pragma unroll 1
  for (int tile = first_tile + warp; tile < end_tile; tile += kWarps) {
    // This lane's share of the dot products,
    float product[kChains][kRows][kKeysOwned] = {};
#pragma unroll
    for (int c = 0; c < Shape::kKeyQuads; ++c) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 q = queries[r][c * Shape::kLanesPerKey + key_quad];
#pragma unroll
        for (int i = 0; i < kKeysOwned; ++i) {
          float& x = product[c % kChains][r][i];
          x = fmaf(q.x, k[i][c].at(0), x);
          x = fmaf(q.y, k[i][c].at(1), x);
          x = fmaf(q.z, k[i][c].at(2), x);
          x = fmaf(q.w, k[i][c].at(3), x);
        }
      }
    }
    // and their sums over the eight lanes, halving the rows that a lane holds at each step.
    float score[kKeysOwned];
#pragma unroll
    for (int i = 0; i < kKeysOwned; ++i) {
      float x[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        x[r] = kChains == 1 ? product[0][r][i] : product[0][r][i] + product[kChains - 1][r][i];
      }
#pragma unroll
      for (int half = kRows / 2; half > 0; half /= 2) {
        const bool is_upper = (lane & half) != 0;
#pragma unroll
        for (int r = 0; r < half; ++r) {
          const float given = is_upper ? x[r] : x[r + half], kept = is_upper ? x[r + half] : x[r];
          x[r] = kept + __shfl_xor_sync(0xffffffffu, given, half);
        }
      }
      // Natural units, as in scale_and_mask of tile.h. What must not be attended to is replaced, so that no NaN in it
      // survives.
      const float bias = mask.bias(mask_bits[i]);
      const bool takes_part = key_of(tile, i) <= last_key && bias != -INFINITY;
      score[i] = takes_part ? fmaf(x[0], p.scale, bias) : -INFINITY;
    }
    fetch_keys(tile + kWarps);

    float highest = score[0];
#pragma unroll
    for (int i = 1; i < kKeysOwned; ++i) highest = fmaxf(highest, score[i]);
    if (__any_sync(0xffffffffu, highest > reference + kSlack)) {
#pragma unroll
      for (int lanes = Shape::kLanesPerKey; lanes < 32; lanes *= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, lanes));
      }
      const float now = fmaxf(highest, reference), factor = exp2_approx((reference - now) * kLog2E);
      reference = now;
      sum *= factor;
      total *= factor;
      each_result([&](float4& x, int r, int c) {
        const float f = __shfl_sync(0xffffffffu, factor, r);
        x = {x.x * f, x.y * f, x.z * f, x.w * f};
#pragma unroll
        for (int n = 0; n < 4; ++n) result[r][c][n] *= f;
      });
    }
#pragma unroll
    for (int i = 0; i < kKeysOwned; ++i) {
      const float probability = exp2_approx((score[i] - reference) * kLog2E);
      sum += probability;
      reinterpret_cast<float*>(probabilities[warp][i * Shape::kKeysAtOnce + key_row])[lane % kRows] = probability;
    }
    __syncwarp();

    // O += P V
#pragma unroll
    for (int i = 0; i < Shape::kValuesOwned; ++i) {
      const float4* const from = probabilities[warp][i * Shape::kValuesAtOnce + value_row];
      const float4 low = from[0], high = from[1];
      const float probability[kRows] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int c = 0; c < Shape::kValueQuads; ++c) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float x = v[i][c].at(n);
#pragma unroll
          for (int r = 0; r < kRows; ++r) result[r][c][n] = fmaf(probability[r], x, result[r][c][n]);
        }
      }
    }
    __syncwarp();  // the probabilities' place may be filled again
    fetch_values(tile + kWarps);

    if (++tiles_done % Shape::kTilesTogether == 0 || tile + kWarps >= end_tile) {
      each_result([&](float4& x, int r, int c) {
        float (&own)[4] = result[r][c];
        x = {x.x + own[0], x.y + own[1], x.z + own[2], x.w + own[3]};
        own[0] = own[1] = own[2] = own[3] = 0.f;
      });
      total += sum;
      sum = 0.f;
    }
  }

  // The warps' sums.
  let_successor_start();
#pragma unroll
  for (int lanes = Shape::kLanesPerKey; lanes < 32; lanes *= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
  if (lane < kRows) {
    references[warp][lane] = reference;
    totals[warp][lane] = total;
  }
  __syncthreads();
  const int Ev = static_cast<int>(p.Ev);
#pragma unroll 1
  for (int row = warp; row < kRows && row0 + row < rows; row += kWarps) {
    float top = -FLT_MAX, factor[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, references[w][row]);
    total = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      factor[w] = exp2_approx((references[w][row] - top) * kLog2E);
      total += factor[w] * totals[w][row];
    }
    const int l = (row0 + row) % L, head = key_head * group + (row0 + row) / L;
    const int64_t part_row = ((int64_t{batch} * p.H + head) * L + l) * parts + part;
    if (parts > 1 && lane == 0) {
      float* const statistics = p.split_scratch + part_row * 2;
      statistics[0] = top;
      statistics[1] = total;
    }
    const auto output = Matrix<T>::of(p.output, batch, head, p.L, p.Ev);
    for (int col = lane; col < Ev; col += 32) {
      float x = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
#pragma unroll
        for (int n = 0; n < Shape::kValuesAtOnce; ++n) {
          x += factor[w] * reinterpret_cast<const float*>(results[w * Shape::kValuesAtOnce + n][row])[col];
        }
      }
      if (parts > 1) {
        p.split_scratch[p.B * p.H * L * parts * 2 + part_row * Ev + col] = x;
      } else {
        *output.at(l, col) = from_float<T>(total == 0.f ? 0.f : x / total);  // a NaN in V stays out of empty rows
      }
    }
  }
}

}  // namespace efficient

// L from 1 to 16, E and Ev from 1 to kHeadDim, no dropout; writes no LSE.
template <class Arch, class T, int kHeadDim>
cudaError_t efficient_decode(const ForwardParams& p, cudaStream_t stream) {
  using Shape = efficient::Decode<Arch, kHeadDim>;
  const int64_t blocks = Shape::kBlock.blocks(p) * p.split_parts;
  if (p.E > kHeadDim || p.Ev > kHeadDim || p.S > kMaxPosition || blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (KeySplit::scratch(p) > 0 && p.split_scratch == nullptr) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  const cudaError_t error = launch_early<efficient::decode_kernel<Arch, T, kHeadDim>>(
      dim3(static_cast<unsigned>(blocks)), Shape::kThreads, 0, stream, p);
  if (error != cudaSuccess) return error;
  return combine_parts<Arch, T, kHeadDim>(p, kLog2E, stream);
}

}  // namespace sdpa
