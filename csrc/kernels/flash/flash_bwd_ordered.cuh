// The two gradients that the main kernel of the flash backward adds up by reductions in no fixed order, each by a
// kernel whose blocks own what they write and sum it up in order, at the price of computing the scores again:
//   query     dQ: a block takes a query tile and walks the key tiles;
//   mask      the gradient of a mask that broadcasts: a block takes a tile of this gradient and walks all tiles of
//             scores that share it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "../arch/arch.h"
#include "../attn/block_range.h"
#include "../attn/launch.h"
#include "../attn/params.h"
#include "../attn/softmax.h"
#include "flash_bwd_rows.cuh"
#include "score_dropout.cuh"
#include "score_mask.cuh"
#include "tile.cuh"

namespace sdpa {

// A warp's 16 rows of dS for its keys of a tile, all of them or an even share. Here queries are the rows of the scores,
// and keys stand in their order, which is that of the numbers of attn/dropout.h.
template <class Arch, class T, int kHeadDim, int kKeys, bool kHasMask>
struct ScoreGradient {
  using Scores = float[kKeys / 8][4];
  float lse[2], delta[2], rest[2];

  // `row` is the warp's first.
  __device__ __forceinline__ void read_rows(const BackwardParams& p, int batch_head, int row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + half * 8 + static_cast<int>(threadIdx.x % 32 / 4);
      const int64_t i = int64_t{batch_head} * p.L + r;
      const float x = r < p.L ? p.logsumexp[i] : -INFINITY;
      // +inf makes every probability of a row with nothing to attend to 0.
      lse[half] = x == -INFINITY ? INFINITY : __fmul_rn(x, kLog2E);
      delta[half] = r < p.L ? p.delta[i] : 0.f;
      rest[half] = kHasMask && r < p.L && p.logsumexp_rest != nullptr ? p.logsumexp_rest[i] : 0.f;
    }
  }

  // The tiles are in shared memory, at the block's first query and this warp's first key; q0 and k0 are their numbers.
  // `row_block`: this warp's 16 rows.
  template <class QueryTile, class KeyTile>
  __device__ __forceinline__ void compute(Scores& scores, const QueryTile& query, const QueryTile& grad,
                                          const KeyTile& key, const KeyTile& value, const BackwardParams& p,
                                          const Dropout& dropout, int batch, int head, int row_block, int q0, int k0,
                                          float scale_log2) const {
    using Product = Mma<Arch, T>;
    const int lane = threadIdx.x % 32;
    const auto lane_offset = KeyTile::lane_offset();
    Scores grad_scores = {};
#pragma unroll
    for (int n = 0; n < kKeys / 2; ++n) scores[n / 4][n % 4] = 0.f;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t a[4], c[4];
      query.load_a(a, lane_offset, row_block, k);
      grad.load_a(c, lane_offset, row_block, k);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4], d[4];
        key.load_b_transposed(b, lane_offset, n, k);
        value.load_b_transposed(d, lane_offset, n, k);
        Product::add(scores[2 * n], a, b[0], b[1]);
        Product::add(scores[2 * n + 1], a, b[2], b[3]);
        Product::add(grad_scores[2 * n], c, d[0], d[1]);
        Product::add(grad_scores[2 * n + 1], c, d[2], d[3]);
      }
    }

    // Addresses into the mask are computed anew in every tile: they do not fit beside dQ.
    if constexpr (kHasMask) asm volatile("" : "+r"(batch), "+r"(head), "+r"(q0));
    const int row0 = q0 + row_block * 16;
    log2_probability(scores, p, batch, head, row0 + lane / 4, k0 + lane % 4 * 2, scale_log2);
    const bool is_partial = k0 + kKeys > p.S || (p.is_causal && k0 + kKeys > row0 + 1);
    const TileLimit limit{static_cast<int>(min(p.S - k0, int64_t{kKeys})), p.is_causal ? row0 - k0 : kKeys};
    const bool drops = p.dropout_p > 0.f;
    DroppedBlock<false, false> dropped;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      if (is_partial) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!limit.sees(lane / 4 + i / 2 * 8, n * 8 + lane % 4 * 2 + i % 2)) scores[n][i] = -INFINITY;
        }
      }
      if (drops) {
        if (n % 4 == 0) {
          const Dropout draw = dropout.with_seed(*p.seed);
          const uint32_t batch_head = static_cast<uint32_t>(p.first_batch_head + int64_t{batch} * p.H + head);
          dropped.draw(draw, batch_head, row0 / 32, (k0 + n * 8) / 32, row0 / 16 % 2 == 1,
                       kKeys % 32 != 0 && k0 / 16 % 2 == 1);
        }
        if (n % 2 == 0) dropped.drop(grad_scores[n], grad_scores[n + 1], dropout, 0, n / 2 % 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) grad_scores[n][i] *= dropout.rescale;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = exp2_approx(scores[n][i]) * (grad_scores[n][i] - delta[i / 2]);
    }
  }

 private:
  // Of P, from scores; -inf where the mask lets nothing through. `query` and `key` are this lane's first.
  __device__ __forceinline__ void log2_probability(Scores& scores, const BackwardParams& p, int batch, int head,
                                                   int query, int key, float scale_log2) const {
    const auto plain = [&](float& score, int i) { score = fmaf(score, scale_log2, -lse[i / 2]); };
    const auto with_mask = [&]<class M>(const M*) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        if constexpr (std::is_void_v<M>) {
#pragma unroll
          for (int i = 0; i < 4; ++i) plain(scores[n][i], i);
        } else {
          MaskRun<M, 2> run[2];
          HeadMask<M>(p, batch, head).read(run, query, key + n * 8, [](int r) { return r * 8; });
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& score = scores[n][i];
            if constexpr (sizeof(M) == 1) {
              plain(score, i);
              if (!run[i / 2].takes_part(i % 2)) score = -INFINITY;
            } else {
              score = run[i / 2].template apply<false>(score, scale_log2, i % 2) - lse[i / 2] - rest[i / 2];
            }
          }
        }
      }
    };
    if constexpr (kHasMask) {
      with_mask_type(p.mask_kind, with_mask);
    } else {
      with_mask(static_cast<const void*>(nullptr));
    }
  }
};

// kShares: warps that share 16 rows, each with its own keys.
template <class Arch, class T, int kHeadDim, int kWarps, int kShares_, int kKeys_, int kStages_>
struct OrderedTile {
  static constexpr int kShares = kShares_, kShareKeys = kKeys_ / kShares_;
  static constexpr int kKeys = kKeys_, kStages = kStages_, kThreads = kWarps * 32, kQueries = kWarps / kShares * 16;
  using QueryTile = SharedTile<T, kQueries, kHeadDim, Arch>;  // of dO too
  using KeyTile = SharedTile<T, kKeys, kHeadDim, Arch>;       // of values too

  static __device__ __forceinline__ KeyTile share(const KeyTile& tile, int number) {
    return {tile.base + number * kShareKeys * KeyTile::kRowBytes};
  }
};

// In 64 KB no more than 32 queries and 32 keys have a place.
template <class Arch, int kHeadDim>
constexpr int kOrderedShares = !Arch::kAsyncCopy && kHeadDim > 128 ? 2 : 1;

// Shared memory: query | dO | stages of (key | value).
template <class Arch, class T, int kHeadDim>
struct QueryOrderedTile
    : OrderedTile<Arch, T, kHeadDim, 4, kOrderedShares<Arch, kHeadDim>,
                  kHeadDim <= (Arch::kAsyncCopy ? 128 : 64) ? 64 : 32, kHeadDim <= 128 && Arch::kAsyncCopy ? 2 : 1> {
  using Tile = QueryOrderedTile::OrderedTile;
  static constexpr int kStageBytes = 2 * Tile::KeyTile::kBytes;
  static constexpr int kSharedBytes = 2 * Tile::QueryTile::kBytes + Tile::kStages * kStageBytes;
  static_assert(kSharedBytes <= Arch::kSharedBytes);
};

template <class Arch, class T, int kHeadDim, bool kHasMask>
__global__ void __launch_bounds__(QueryOrderedTile<Arch, T, kHeadDim>::kThreads, 2)
    query_gradient_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BlockOrder order,
                          const __grid_constant__ Dropout dropout, const float scale_log2) {
  using Tile = QueryOrderedTile<Arch, T, kHeadDim>;
  constexpr int kKeys = Tile::kKeys, kShareKeys = Tile::kShareKeys, kThreads = Tile::kThreads;
  extern __shared__ __align__(1024) unsigned char shared[];

  int tile_number, batch_head;
  if (!order.locate(tile_number, batch_head)) return;
  const int q0 = (static_cast<int>(order.tiles) - 1 - tile_number) * Tile::kQueries;  // causal: the longest first
  const int heads = static_cast<int>(p.H), batch = batch_head / heads, head = batch_head % heads;
  const int key_head = head / static_cast<int>(p.group), warp = threadIdx.x / 32;
  const int row_block = warp / Tile::kShares, share = warp % Tile::kShares;
  const BlockRange<Tile::kQueries, kKeys> range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};

  const uint32_t base = shared_address(shared);
  const typename Tile::QueryTile query{base}, grad{base + Tile::QueryTile::kBytes};
  const auto key_tile = [&](int stage) {
    return typename Tile::KeyTile{base + 2 * Tile::QueryTile::kBytes + stage * Tile::kStageBytes};
  };
  const auto value_tile = [&](int stage) {
    return typename Tile::KeyTile{key_tile(stage).base + Tile::KeyTile::kBytes};
  };
  const auto fetch = [&](int k0) {
    const int stage = k0 / kKeys % Tile::kStages;
    key_tile(stage).template fill<kThreads>(HeadRows<const T>(p.key, batch, key_head, p.seen_keys, p.E), k0);
    value_tile(stage).template fill<kThreads>(HeadRows<const T>(p.value, batch, key_head, p.seen_keys, p.Ev), k0);
  };
  query.template fill<kThreads>(HeadRows<const T>(p.query, batch, head, p.L, p.E), q0);
  grad.template fill<kThreads>(HeadRows<const T>(p.grad_output, batch, head, p.L, p.Ev), q0);
  if (range.matters(q0, 0)) fetch(0);
  ScoreGradient<Arch, T, kHeadDim, kShareKeys, kHasMask> score_gradient;
  score_gradient.read_rows(p, batch_head, q0 + row_block * 16);

  const auto lane_offset = Tile::KeyTile::lane_offset();
  float grad_query[1][kHeadDim / 8][4] = {};
#pragma unroll 1
  for (int k0 = 0; range.matters(q0, k0); k0 += kKeys) {
    wait_for_copies<Arch>();
    __syncthreads();
    const bool has_next = range.matters(q0, k0 + kKeys);
    if (Tile::kStages > 1 && has_next) fetch(k0 + kKeys);
    const int stage = k0 / kKeys % Tile::kStages;
    const auto keys = Tile::share(key_tile(stage), share), values = Tile::share(value_tile(stage), share);
    float scores[kShareKeys / 8][4];
    score_gradient.compute(scores, query, grad, keys, values, p, dropout, batch, head, row_block, q0,
                           k0 + share * kShareKeys, scale_log2);
#pragma unroll
    for (int k = 0; k < kShareKeys / 16; ++k) {
      uint32_t a[4];
      to_operand<T>(a, scores[2 * k], scores[2 * k + 1]);
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t b[4];
        keys.load_b(b, lane_offset, k, n);
        Mma<Arch, T>::add(grad_query[0][2 * n], a, b[0], b[1]);
        Mma<Arch, T>::add(grad_query[0][2 * n + 1], a, b[2], b[3]);
      }
    }
    if (Tile::kStages == 1 && has_next) {
      __syncthreads();
      fetch(k0 + kKeys);
    }
  }

  wait_for_copies<Arch>();
  __syncthreads();
  if constexpr (Tile::kShares == 2) {  // the other warp's sums, through the place of keys and values
    constexpr int kRowThreads = kThreads / 2;
    static_assert(kRowThreads * kHeadDim / 2 * sizeof(float) <= Tile::kStageBytes);
    float* const sums =
        reinterpret_cast<float*>(shared + 2 * Tile::QueryTile::kBytes) + row_block * 32 + threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      if (share == 1) sums[i * kRowThreads] = grad_query[0][i / 4][i % 4];
    }
    __syncthreads();
    if (share == 1) return;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) grad_query[0][i / 4][i % 4] += sums[i * kRowThreads];
  }
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) grad_query[0][n][i] *= p.scale;
  }
  query.template store<1>(grad_query, row_block, HeadRows<T>(p.grad_query, batch, head, p.L, p.E), q0 + row_block * 16);
}

// What shares one tile of the mask's gradient. Counts are 1 where the gradient has that dimension itself.
struct MaskSums {
  int batches, heads, query_tiles, key_tiles;  // to be summed over
  int own_heads, own_query_tiles, own_key_tiles;
};

// Shared memory: stages of (query | dO | key | value).
template <class Arch, class T, int kHeadDim>
struct MaskOrderedTile
    : OrderedTile<Arch, T, kHeadDim, kHeadDim <= (Arch::kAsyncCopy ? 128 : 64) ? 8 : 4, kOrderedShares<Arch, kHeadDim>,
                  kHeadDim <= 128 ? 64 : 32, kHeadDim <= (Arch::kAsyncCopy ? 64 : 32) ? 2 : 1> {
  using Tile = MaskOrderedTile::OrderedTile;
  static constexpr int kStageBytes = 2 * (Tile::QueryTile::kBytes + Tile::KeyTile::kBytes);
  static constexpr int kSharedBytes = Tile::kStages * kStageBytes;
  static_assert(kSharedBytes <= Arch::kSharedBytes);
};

template <class Arch, class T, int kHeadDim>
__global__ void __launch_bounds__(MaskOrderedTile<Arch, T, kHeadDim>::kThreads, 1)
    mask_gradient_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ MaskSums sums,
                         const __grid_constant__ Dropout dropout, const float scale_log2) {
  using Tile = MaskOrderedTile<Arch, T, kHeadDim>;
  constexpr int kKeys = Tile::kKeys, kShareKeys = Tile::kShareKeys, kThreads = Tile::kThreads;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_block = warp / Tile::kShares, share = warp % Tile::kShares;

  // This block's tile; heads last, so that blocks that share queries or keys run side by side.
  int64_t number = blockIdx.x;
  const auto take = [&](int count) {
    const int part = static_cast<int>(number % count);
    number /= count;
    return part;
  };
  const int own_key_tile = take(sums.own_key_tiles), own_query_tile = take(sums.own_query_tiles);
  const int own_head = take(sums.own_heads), own_batch = static_cast<int>(number);

  const int items = sums.batches * sums.heads * sums.query_tiles * sums.key_tiles;
  struct Place {
    int batch, head, q0, k0;
  };
  const auto place = [&](int item) -> Place {
    number = item;
    const int batch = own_batch + take(sums.batches), head = own_head + take(sums.heads);
    const int query_tile = own_query_tile + take(sums.query_tiles), key_tile = own_key_tile + take(sums.key_tiles);
    return {batch, head, query_tile * Tile::kQueries, key_tile * kKeys};
  };
  const uint32_t base = shared_address(shared);
  const auto query_tile = [&](int stage, int n) {
    return typename Tile::QueryTile{base + stage * Tile::kStageBytes + n * Tile::QueryTile::kBytes};
  };
  const auto key_tile = [&](int stage, int n) {
    return typename Tile::KeyTile{base + stage * Tile::kStageBytes + 2 * Tile::QueryTile::kBytes +
                                  n * Tile::KeyTile::kBytes};
  };
  const auto fetch = [&](int item) {
    const Place at = place(item);
    const int stage = item % Tile::kStages, key_head = at.head / static_cast<int>(p.group);
    query_tile(stage, 0).template fill<kThreads>(HeadRows<const T>(p.query, at.batch, at.head, p.L, p.E), at.q0);
    query_tile(stage, 1).template fill<kThreads>(HeadRows<const T>(p.grad_output, at.batch, at.head, p.L, p.Ev), at.q0);
    key_tile(stage, 0).template fill<kThreads>(HeadRows<const T>(p.key, at.batch, key_head, p.seen_keys, p.E), at.k0);
    key_tile(stage, 1).template fill<kThreads>(HeadRows<const T>(p.value, at.batch, key_head, p.seen_keys, p.Ev),
                                               at.k0);
  };

  float total[kShareKeys / 8][4] = {};
  fetch(0);
#pragma unroll 1
  for (int item = 0; item < items; ++item) {
    wait_for_copies<Arch>();
    __syncthreads();
    if (Tile::kStages > 1 && item + 1 < items) fetch(item + 1);
    const Place at = place(item);
    const int stage = item % Tile::kStages;
    ScoreGradient<Arch, T, kHeadDim, kShareKeys, true> score_gradient;
    score_gradient.read_rows(p, at.batch * static_cast<int>(p.H) + at.head, at.q0 + row_block * 16);
    float scores[kShareKeys / 8][4];
    score_gradient.compute(scores, query_tile(stage, 0), query_tile(stage, 1), Tile::share(key_tile(stage, 0), share),
                           Tile::share(key_tile(stage, 1), share), p, dropout, at.batch, at.head, row_block, at.q0,
                           at.k0 + share * kShareKeys, scale_log2);
#pragma unroll
    for (int n = 0; n < kShareKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) total[n][i] += scores[n][i];
    }
    if (Tile::kStages == 1 && item + 1 < items) {
      __syncthreads();
      fetch(item + 1);
    }
  }

  // dS is zero outside L x S. What the mask broadcasts over inside the tile is summed up as well, in shared memory.
  __syncthreads();
  float* const rows = reinterpret_cast<float*>(shared);
  constexpr int kPitch = kKeys + 2;
  static_assert(Tile::kQueries * kPitch * static_cast<int>(sizeof(float)) <= Tile::kSharedBytes);
#pragma unroll
  for (int n = 0; n < kShareKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row_block * 16 + lane / 4 + i / 2 * 8, col = share * kShareKeys + n * 8 + lane % 4 * 2 + i % 2;
      rows[row * kPitch + col] = total[n][i];
    }
  }
  __syncthreads();
  const int64_t* const stride = p.grad_mask_stride;
  const int q0 = own_query_tile * Tile::kQueries, k0 = own_key_tile * kKeys;
  const int height = stride[2] == 0 ? 1 : Tile::kQueries, width = stride[3] == 0 ? 1 : kKeys;
  float* const to = p.grad_mask + own_batch * stride[0] + own_head * stride[1] + q0 * stride[2] + k0 * stride[3];
  for (int i = threadIdx.x; i < height * width; i += kThreads) {
    const int row = i / width, col = i % width;
    if (q0 + row >= p.L || k0 + col >= p.S) continue;
    float sum = 0.f;
    for (int r = row; r < (height == 1 ? Tile::kQueries : row + 1); ++r) {
      for (int c = col; c < (width == 1 ? kKeys : col + 1); ++c) sum += rows[r * kPitch + c];
    }
    to[row * stride[2] + col * stride[3]] += sum;  // this block's alone, in this launch
  }
}

// Whether the mask broadcasts, so that its gradient is a sum over blocks.
inline bool sums_mask_gradient(const BackwardParams& p) {
  const int64_t sizes[4] = {p.B, p.H, p.L, p.S};
  for (int d = 0; d < 4; ++d) {
    if (p.grad_mask_stride[d] == 0 && sizes[d] > 1) return true;
  }
  return false;
}

// dQ, complete. `delta` must be there.
template <class Arch, class T, int kHeadDim, bool kHasMask>
cudaError_t launch_query_gradient(const BackwardParams& p, cudaStream_t stream) {
  using Tile = QueryOrderedTile<Arch, T, kHeadDim>;
  constexpr auto kKernel = query_gradient_kernel<Arch, T, kHeadDim, kHasMask>;
  const auto order =
      BlockOrder::make((p.L + Tile::kQueries - 1) / Tile::kQueries, p.B * p.H, p.S * (p.E + p.Ev) * sizeof(T));
  if (order.blocks() == 0) return cudaSuccess;
  if (const auto error = allow_shared_bytes<kKernel>(Tile::kSharedBytes); error != cudaSuccess) return error;
  kKernel<<<dim3(order.grid_x(), order.grid_y()), Tile::kThreads, Tile::kSharedBytes, stream>>>(
      p, order, Dropout::make(p.dropout_p, 0), p.scale * kLog2E);
  return cudaGetLastError();
}

// Adds to the gradient of the mask all that this call gives, if sums are to be made.
template <class Arch, class T, int kHeadDim>
cudaError_t launch_mask_gradient(const BackwardParams& p, cudaStream_t stream) {
  using Tile = MaskOrderedTile<Arch, T, kHeadDim>;
  constexpr auto kKernel = mask_gradient_kernel<Arch, T, kHeadDim>;
  const int64_t counts[4] = {p.B, p.H, (p.L + Tile::kQueries - 1) / Tile::kQueries,
                             (p.S + Tile::kKeys - 1) / Tile::kKeys};
  int64_t blocks = 1, items = 1;
  int own[4], summed[4];
  for (int d = 0; d < 4; ++d) {
    const bool is_summed = p.grad_mask_stride[d] == 0;
    own[d] = is_summed ? 1 : static_cast<int>(counts[d]);
    summed[d] = is_summed ? static_cast<int>(counts[d]) : 1;
    blocks *= own[d];
    items *= summed[d];
  }
  if (blocks == 0 || items == 0) return cudaSuccess;  // zeros, which the caller wrote
  if (std::max(blocks, items) > kMaxPosition) return cudaErrorInvalidValue;
  if (const auto error = allow_shared_bytes<kKernel>(Tile::kSharedBytes); error != cudaSuccess) return error;
  const MaskSums sums{summed[0], summed[1], summed[2], summed[3], own[1], own[2], own[3]};
  kKernel<<<static_cast<unsigned>(blocks), Tile::kThreads, Tile::kSharedBytes, stream>>>(
      p, sums, Dropout::make(p.dropout_p, 0), p.scale * kLog2E);
  return cudaGetLastError();
}

}  // namespace sdpa
