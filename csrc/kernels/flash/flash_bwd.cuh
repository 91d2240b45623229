// Flash attention backward on mma.sync, in three kernels:
//   delta     rowsum(dO * O) for each query row (flash_bwd_rows.cuh);
//   main      one block for each key tile of a key head, a loop over the query tiles of the query heads that share it:
//             dK and dV stay in registers, dQ is added up in float32 in global memory. For narrow heads a warp has its
//             keys to itself (flash_bwd_narrow.cuh), for wide heads several share them (flash_bwd_wide.cuh);
//   convert   dQ to its own type, strides and scale (flash_bwd_rows.cuh).
// Where sums must be made in order, dQ and the gradient of a mask that broadcasts have kernels of their own
// (flash_bwd_ordered.cuh), and the main kernel leaves them out.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "../arch/arch.h"
#include "../attn/block_range.h"
#include "../attn/dropout.h"
#include "../attn/launch.h"
#include "../attn/params.h"
#include "../attn/softmax.h"
#include "flash_bwd_narrow.cuh"
#include "flash_bwd_ordered.cuh"
#include "flash_bwd_rows.cuh"
#include "flash_bwd_wide.cuh"

namespace sdpa {

// Flash is NarrowBackward or WideBackward, kKernel its kernel.
template <class Flash, auto kKernel, class T>
cudaError_t launch_main_backward(const BackwardParams& p, cudaStream_t stream) {
  const int64_t key_tiles = (p.S + Flash::kKeyTile - 1) / Flash::kKeyTile;
  const int64_t bytes_per_key_head = p.group * p.L * (p.E * sizeof(float) + (p.E + p.Ev) * sizeof(T));
  const auto order = BlockOrder::make(key_tiles, p.B * (p.H / p.group), bytes_per_key_head);
  if (order.blocks() == 0) return cudaSuccess;
  if (const auto error = allow_shared_bytes<kKernel>(Flash::kSharedBytes); error != cudaSuccess) return error;
  const Dropout dropout = Dropout::make(p.dropout_p, 0);  // the seed is on the device
  kKernel<<<dim3(order.grid_x(), order.grid_y()), Flash::kThreads, Flash::kSharedBytes, stream>>>(p, order, dropout,
                                                                                                  p.scale * kLog2E);
  return cudaGetLastError();
}

template <class Arch, class T, int kHeadDim, ScoreEdit kEdit, bool kSharedMask>
cudaError_t launch_narrow(const BackwardParams& p, cudaStream_t stream) {
  using Tile = NarrowTile<Arch, kHeadDim, kEdit, kSharedMask>;
  return launch_main_backward<NarrowBackward<Arch, T, kHeadDim, Tile, kEdit>,
                              narrow_backward_kernel<Arch, T, kHeadDim, Tile, kEdit>, T>(p, stream);
}
template <class Arch, class T, int kHeadDim, ScoreEdit kEdit>
cudaError_t narrow_backward(const BackwardParams& p, cudaStream_t stream) {
  if constexpr (has_mask(kEdit) && kHeadDim <= 64 && Arch::kAsyncCopy) {
    using Tile = NarrowTile<Arch, kHeadDim, kEdit>;
    using Plain = NarrowBackward<Arch, T, kHeadDim, Tile, kEdit>;
    using Shared = NarrowBackward<Arch, T, kHeadDim, NarrowTile<Arch, kHeadDim, kEdit, true>, kEdit>;
    if (Shared::MaskTile::fits(p)) {
      int device = 0, limit = 0;
      if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return error;
      const auto error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
      if (error != cudaSuccess) return error;
      constexpr int kReserved = 1024;  // bytes of every block
      const auto blocks = [&](int bytes) { return std::min(limit / (bytes + kReserved), Tile::kBlocksPerSm); };
      // The mask's place must not cost a multiprocessor a block, as it would on sm80.
      if (blocks(Shared::kSharedBytes) == blocks(Plain::kSharedBytes)) {
        return launch_narrow<Arch, T, kHeadDim, kEdit, true>(p, stream);
      }
    }
  }
  return launch_narrow<Arch, T, kHeadDim, kEdit, false>(p, stream);
}
template <class Arch, class T, int kHeadDim, ScoreEdit kEdit, class Tile>
cudaError_t launch_wide(const BackwardParams& p, cudaStream_t stream) {
  return launch_main_backward<WideBackward<Arch, T, kHeadDim, Tile, kEdit>,
                              wide_backward_kernel<Arch, T, kHeadDim, Tile, kEdit>, T>(p, stream);
}

// The tile for the shared memory that a block may have: 99 KB on sm86 and sm89, 163 KB on sm80, 227 KB on sm90.
template <class Arch, class T, int kHeadDim, ScoreEdit kEdit>
cudaError_t main_backward(const BackwardParams& p, cudaStream_t stream) {
  if constexpr (kHeadDim <= 64) {
    return narrow_backward<Arch, T, kHeadDim, kEdit>(p, stream);
  } else if constexpr (!Arch::kAsyncCopy) {  // sm75: 64 KB
    using Tile = std::conditional_t<kHeadDim <= 128, WideTile<128, 8, 1, 2, 32, 1, 1, Arch::kSharedBytes>,
                                    WideTile<256, 4, 1, 2, 32, 1, 1, Arch::kSharedBytes>>;
    return launch_wide<Arch, T, kHeadDim, kEdit, Tile>(p, stream);
  } else {
    if constexpr (kHeadDim <= 128) {
      using Large = WideTile<128, 8, 2, 2, 64, 2, 2, 163 * 1024>;
      using Large96 = WideTile<96, 8, 2, 2, 64, 2, 2, 163 * 1024>;
      const bool is_large = p.shared_bytes >= Large::kMaxSharedBytes;
      if (is_large && std::max(p.E, p.Ev) <= 96) return launch_wide<Arch, T, kHeadDim, kEdit, Large96>(p, stream);
      if (is_large) return launch_wide<Arch, T, kHeadDim, kEdit, Large>(p, stream);
      return narrow_backward<Arch, T, kHeadDim, kEdit>(p, stream);
    } else {
      using Small = WideTile<256, 4, 1, 2, 32, 2, 1, 99 * 1024>;
      using Large = WideTile<256, 8, 2, 4, 64, 1, 1, 163 * 1024>;
      // 128 queries read less from shared memory for a product, but leave no registers for a mask.
      using Huge = std::conditional_t<has_mask(kEdit), WideTile<256, 8, 2, 4, 64, 2, 2, 227 * 1024>,
                                      WideTile<256, 8, 2, 4, 128, 1, 1, 227 * 1024>>;
      using Huge192 = WideTile<192, 8, 2, 4, 128, 1, 1, 227 * 1024>;
      const bool is_huge = p.shared_bytes >= Huge::kMaxSharedBytes;
      if (is_huge && std::max(p.E, p.Ev) <= 192) return launch_wide<Arch, T, kHeadDim, kEdit, Huge192>(p, stream);
      if (is_huge) return launch_wide<Arch, T, kHeadDim, kEdit, Huge>(p, stream);
      if (p.shared_bytes >= Large::kMaxSharedBytes) return launch_wide<Arch, T, kHeadDim, kEdit, Large>(p, stream);
      return launch_wide<Arch, T, kHeadDim, kEdit, Small>(p, stream);
    }
  }
}

// Head dims E and Ev from 1 to kHeadDim.
template <class Arch, class T, int kHeadDim>
cudaError_t flash_backward(const BackwardParams& p, cudaStream_t stream) {
  using Sweep = RowSweep<kHeadDim>;
  if (std::max({p.L, p.S, p.B * p.H}) > kMaxPosition) return cudaErrorInvalidValue;
  const BlockOrder rows = Sweep::order(p);
  const dim3 row_grid(rows.grid_x(), rows.grid_y());
  if (rows.blocks() > 0) {
    flash_delta_kernel<T, kHeadDim><<<row_grid, Sweep::kThreads, 0, stream>>>(p, rows);
    if (const auto error = cudaGetLastError(); error != cudaSuccess) return error;
  }

  // What is to be summed up in order leaves the main kernel's share of the work.
  BackwardParams main = p;
  if (p.deterministic && p.grad_query.data != nullptr) {
    const auto error = p.mask_kind == MaskKind::kNone ? launch_query_gradient<Arch, T, kHeadDim, false>(p, stream)
                                                      : launch_query_gradient<Arch, T, kHeadDim, true>(p, stream);
    if (error != cudaSuccess) return error;
    main.grad_query.data = nullptr;
  }
  if (p.deterministic && p.grad_mask != nullptr && sums_mask_gradient(p)) {
    if (const auto error = launch_mask_gradient<Arch, T, kHeadDim>(p, stream); error != cudaSuccess) return error;
    main.grad_mask = nullptr;
  }
  if (main.grad_query.data == nullptr && main.grad_key.data == nullptr && main.grad_value.data == nullptr &&
      main.grad_mask == nullptr) {
    return cudaSuccess;
  }

  const auto run = [&] {
    if (main.grad_mask != nullptr) return main_backward<Arch, T, kHeadDim, ScoreEdit::kMaskGradient>(main, stream);
    if (p.mask_kind != MaskKind::kNone) return main_backward<Arch, T, kHeadDim, ScoreEdit::kMask>(main, stream);
    if (p.dropout_p > 0.f) return main_backward<Arch, T, kHeadDim, ScoreEdit::kDropout>(main, stream);
    return main_backward<Arch, T, kHeadDim, ScoreEdit::kNone>(main, stream);
  };
  const auto error = run();
  if (error != cudaSuccess) return error;
  if (rows.blocks() > 0 && main.grad_query.data != nullptr) {
    flash_convert_kernel<T, kHeadDim><<<row_grid, Sweep::kThreads, 0, stream>>>(p, rows);
    if (const auto error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace sdpa
