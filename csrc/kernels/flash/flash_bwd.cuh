// Flash attention backward on mma.sync, in three kernels:
//   delta     rowsum(dO * O) for each query row, and zeros for the sums of dQ (flash_bwd_rows.cuh);
//   main      one block for each key tile of a key head, a loop over the query tiles of the query heads that share it:
//             dK and dV stay in registers, dQ is added up in float32 in global memory. For narrow heads a warp has its
//             keys to itself (flash_bwd_narrow.cuh), for wide heads several share them (flash_bwd_wide.cuh, and
//             flash_bwd_split.cuh over 128 columns);
//   convert   dQ to its own type, strides and scale (flash_bwd_rows.cuh).
// Where there are enough heads and few key tiles, a block of the main kernel walks over all key tiles of a head instead
// (walk_pays): nobody else adds to its sums of dQ, so they need no zeros, stay in L2, and leave with the last key tile.
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
#include "flash_bwd_split.cuh"
#include "flash_bwd_wide.cuh"

namespace sdpa {

// Flash is NarrowBackward, WideBackward or SplitBackward, kKernel its kernel.
template <class Flash, auto kKernel, class T>
cudaError_t launch_main_backward(const BackwardParams& p, cudaStream_t stream) {
  const int64_t key_tiles = Flash::kWalks ? 1 : (p.S + Flash::kKeyTile - 1) / Flash::kKeyTile;
  const auto order = key_order<T>(p, key_tiles);
  if (order.blocks() == 0) return cudaSuccess;
  if (const auto error = allow_shared_bytes<kKernel>(Flash::kSharedBytes); error != cudaSuccess) return error;
  const Dropout dropout = Dropout::make(p.dropout_p, 0);  // the seed is on the device
  return launch_early<kKernel>(dim3(order.grid_x(), order.grid_y()), Flash::kThreads, Flash::kSharedBytes, stream, p,
                               order, dropout, p.scale * kLog2E);
}

// Whether all operands' rows are whole 16-byte chunks, and those of dQ whole tiles of its sums: some kernels take no
// others, and are the faster for it.
inline bool is_plain(const BackwardParams& p) {
  const auto in_chunks = [](const Operand& x) {
    uint64_t bits = reinterpret_cast<uint64_t>(x.data);
    for (int d = 0; d < 3; ++d) bits |= static_cast<uint64_t>(x.stride[d]) * 2;
    return x.data == nullptr || (x.stride[3] == 1 && bits % kChunkBytes == 0);
  };
  for (const Operand* x : {&p.query, &p.key, &p.value, &p.grad_output, &p.grad_query, &p.grad_key, &p.grad_value}) {
    if (!in_chunks(*x)) return false;
  }
  return p.L % 16 == 0 && p.E % kChunkElements == 0 && p.Ev % kChunkElements == 0;
}

// Whether blocks had better walk. Fewer blocks leave more of the chip idle at the end, but the less there is to do for
// each row, the more it saves to have no sums to clear and to convert and no block begin for each key tile.
inline cudaError_t walk_pays(const BackwardParams& p, int key_tile, int blocks_per_sm, bool& pays) {
  if (p.mask_kind != MaskKind::kNone || p.dropout_p > 0.f || !is_plain(p)) return cudaSuccess;
  int device = 0, sms = 0, l2_bytes = 0;
  if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const auto error = count_multiprocessors(sms); error != cudaSuccess) return error;
  if (const auto error = cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device); error != cudaSuccess) {
    return error;
  }
  const int64_t heads = p.B * (p.H / p.group), key_tiles = (p.S + key_tile - 1) / key_tile;
  const int64_t at_once = int64_t{sms} * blocks_per_sm;
  if (key_tiles > 1) {
    const int64_t sums = std::min(heads, at_once) * p.group * p.L * p.E * static_cast<int64_t>(sizeof(float));
    if (sums > l2_bytes / 4 * 5) return cudaSuccess;
  }
  const auto share_in_use = [&](int64_t blocks) {
    const int64_t waves = (blocks + at_once - 1) / at_once;
    return static_cast<double>(blocks) / static_cast<double>(waves * at_once);
  };
  const double gain = 1 + (p.is_causal ? 180. : 90.) / static_cast<double>(p.S);
  pays = share_in_use(heads) * gain > share_in_use(heads * key_tiles);
  return cudaSuccess;
}

// The key tile of the kernel that can walk and how many of its blocks a multiprocessor takes.
template <int kHeadDim>
struct WalkSize {
  static constexpr int kKeyTile = 128, kBlocksPerSm = kHeadDim <= 64 ? 2 : 1;
  static constexpr int kSharedBytes = 163 * 1024;
};
// At 32 columns it has no registers for it; at 256 it was slower.
template <class Arch, int kHeadDim, ScoreEdit kEdit>
constexpr bool kCanWalk = Arch::kAsyncCopy && (kHeadDim == 64 || kHeadDim == 128) && kEdit == ScoreEdit::kNone;

template <class Arch, class T, int kHeadDim, ScoreEdit kEdit, class Tile>
cudaError_t launch_narrow_tile(const BackwardParams& p, cudaStream_t stream) {
  return launch_main_backward<NarrowBackward<Arch, T, kHeadDim, Tile, kEdit>,
                              narrow_backward_kernel<Arch, T, kHeadDim, Tile, kEdit>, T>(p, stream);
}
template <class Arch, class T, int kHeadDim, ScoreEdit kEdit, class Tile>
cudaError_t launch_narrow(const BackwardParams& p, cudaStream_t stream) {
  // At 32 columns it is slower, but with dropout; at 128 it spills.
  constexpr bool kHasPlain =
      Arch::kAsyncCopy && !has_mask(kEdit) && (kHeadDim == 64 || (kHeadDim == 32 && kEdit == ScoreEdit::kDropout));
  if constexpr (kHasPlain) {
    if (is_plain(p)) return launch_narrow_tile<Arch, T, kHeadDim, kEdit, Plain<Tile>>(p, stream);
  }
  return launch_narrow_tile<Arch, T, kHeadDim, kEdit, Tile>(p, stream);
}
template <class Arch, class T, int kHeadDim, ScoreEdit kEdit>
cudaError_t narrow_backward(const BackwardParams& p, bool walks, cudaStream_t stream) {
  using Tile = NarrowTile<Arch, kHeadDim, kEdit>;
  if constexpr (kHeadDim <= 64 && kCanWalk<Arch, kHeadDim, kEdit>) {
    if (walks) return launch_narrow_tile<Arch, T, kHeadDim, kEdit, Walking<Tile>>(p, stream);
  }
  if constexpr (kHeadDim == 64 && Arch::kAsyncCopy) {
    if (!fits_twice<NarrowBackward<Arch, T, kHeadDim, Tile, kEdit>>(p)) {
      return launch_narrow<Arch, T, kHeadDim, kEdit, NarrowTile<Arch, kHeadDim, kEdit, false, true>>(p, stream);
    }
  }
  if constexpr (has_mask(kEdit) && kHeadDim <= 64 && Arch::kAsyncCopy) {
    using SharedTile = NarrowTile<Arch, kHeadDim, kEdit, true>;
    using Without = NarrowBackward<Arch, T, kHeadDim, Tile, kEdit>;
    using Shared = NarrowBackward<Arch, T, kHeadDim, SharedTile, kEdit>;
    // The mask's place must not cost a multiprocessor a block, as it would on sm80.
    const auto blocks = [&](int bytes) { return std::min(blocks_that_fit(p, bytes), Tile::kBlocksPerSm); };
    if (Shared::MaskTile::fits(p) && blocks(Shared::kSharedBytes) == blocks(Without::kSharedBytes)) {
      return launch_narrow<Arch, T, kHeadDim, kEdit, SharedTile>(p, stream);
    }
  }
  return launch_narrow<Arch, T, kHeadDim, kEdit, Tile>(p, stream);
}
template <class Arch, class T, int kHeadDim, ScoreEdit kEdit, class Tile>
cudaError_t launch_wide_tile(const BackwardParams& p, cudaStream_t stream) {
  return launch_main_backward<WideBackward<Arch, T, kHeadDim, Tile, kEdit>,
                              wide_backward_kernel<Arch, T, kHeadDim, Tile, kEdit>, T>(p, stream);
}
template <class Arch, class T, int kHeadDim, ScoreEdit kEdit, class Tile>
cudaError_t launch_wide(const BackwardParams& p, bool walks, cudaStream_t stream) {
  if constexpr (kCanWalk<Arch, kHeadDim, kEdit> && Tile::kMaxSharedBytes == WalkSize<kHeadDim>::kSharedBytes) {
    static_assert(WideBackward<Arch, T, kHeadDim, Tile, kEdit>::kKeyTile == WalkSize<kHeadDim>::kKeyTile);
    if (walks) return launch_wide_tile<Arch, T, kHeadDim, kEdit, Walking<Tile>>(p, stream);
  }
  if constexpr (!has_mask(kEdit) && Arch::kAsyncCopy && kHeadDim == 128) {
    if (is_plain(p)) return launch_wide_tile<Arch, T, kHeadDim, kEdit, Plain<Tile>>(p, stream);
  }
  return launch_wide_tile<Arch, T, kHeadDim, kEdit, Tile>(p, stream);
}

template <class Arch, class T, int kHeadDim, class Tile>
cudaError_t launch_split(const BackwardParams& p, cudaStream_t stream) {
  return launch_main_backward<SplitBackward<Arch, T, kHeadDim, Tile>, split_backward_kernel<Arch, T, kHeadDim, Tile>,
                              T>(p, stream);
}

// The tile for the shared memory that a block may have: 99 KB on sm86 and sm89, 163 KB on sm80, 227 KB on sm90.
template <class Arch, class T, int kHeadDim, ScoreEdit kEdit>
cudaError_t main_backward(const BackwardParams& p, bool walks, cudaStream_t stream) {
  if constexpr (kHeadDim <= 64) {
    return narrow_backward<Arch, T, kHeadDim, kEdit>(p, walks, stream);
  } else if constexpr (!Arch::kAsyncCopy) {  // sm75: 64 KB
    using Tile = std::conditional_t<kHeadDim <= 128, WideTile<128, 8, 1, 2, 32, 1, 1, Arch::kSharedBytes>,
                                    WideTile<256, 4, 1, 2, 32, 1, 1, Arch::kSharedBytes>>;
    return launch_wide<Arch, T, kHeadDim, kEdit, Tile>(p, walks, stream);
  } else {
    if constexpr (kHeadDim <= 128) {
      using Large = WideTile<128, 8, 2, 2, 64, 2, 2, 163 * 1024>;
      using Large96 = WideTile<96, 8, 2, 2, 64, 2, 2, 163 * 1024>;
      const bool is_large = p.shared_bytes >= Large::kMaxSharedBytes;
      if (is_large && std::max(p.E, p.Ev) <= 96) {
        return launch_wide<Arch, T, kHeadDim, kEdit, Large96>(p, walks, stream);
      }
      if (is_large) return launch_wide<Arch, T, kHeadDim, kEdit, Large>(p, walks, stream);
      return narrow_backward<Arch, T, kHeadDim, kEdit>(p, walks, stream);
    } else {
      constexpr int kLarge = 163 * 1024, kHuge = 227 * 1024;
      using Small = WideTile<256, 4, 1, 2, 32, 2, 1, 99 * 1024>;
      const bool is_huge = p.shared_bytes >= kHuge, is_large = p.shared_bytes >= kLarge;
      const bool fits_192 = std::max(p.E, p.Ev) <= 192;
      // 128 queries read less from shared memory for a product, but leave no registers for a mask.
      if constexpr (kEdit == ScoreEdit::kNone) {
        if (is_huge && fits_192) {
          return launch_split<Arch, T, kHeadDim, WideTile<192, 8, 2, 2, 128, 1, 2, kHuge>>(p, stream);
        }
        if (is_huge) return launch_split<Arch, T, kHeadDim, WideTile<256, 8, 2, 2, 128, 1, 1, kHuge>>(p, stream);
        if (is_large && fits_192) {
          return launch_split<Arch, T, kHeadDim, WideTile<192, 8, 2, 2, 128, 1, 1, kLarge>>(p, stream);
        }
        if (is_large) return launch_split<Arch, T, kHeadDim, WideTile<256, 8, 2, 2, 64, 1, 1, kLarge>>(p, stream);
      } else {
        using Huge = std::conditional_t<has_mask(kEdit), WideTile<256, 8, 2, 4, 64, 2, 2, kHuge>,
                                        WideTile<256, 8, 2, 4, 128, 1, 1, kHuge>>;
        using Huge192 = WideTile<192, 8, 2, 4, 128, 1, 1, kHuge>;
        using Large192 = WideTile<192, 8, 2, 4, 64, 2, 2, kLarge>;
        using Large = WideTile<256, 8, 2, 4, 64, 1, 1, kLarge>;
        if (is_huge && fits_192) return launch_wide<Arch, T, kHeadDim, kEdit, Huge192>(p, walks, stream);
        if (is_huge) return launch_wide<Arch, T, kHeadDim, kEdit, Huge>(p, walks, stream);
        if (is_large && fits_192) return launch_wide<Arch, T, kHeadDim, kEdit, Large192>(p, walks, stream);
        if (is_large) return launch_wide<Arch, T, kHeadDim, kEdit, Large>(p, walks, stream);
      }
      return launch_wide<Arch, T, kHeadDim, kEdit, Small>(p, walks, stream);
    }
  }
}

// Head dims E and Ev from 1 to kHeadDim.
template <class Arch, class T, int kHeadDim>
cudaError_t flash_backward(const BackwardParams& p, cudaStream_t stream) {
  if (std::max({p.L, p.S, p.B * p.H}) > kMaxPosition) return cudaErrorInvalidValue;
  bool walks = false;
  if constexpr (kCanWalk<Arch, kHeadDim, ScoreEdit::kNone>) {
    using Size = WalkSize<kHeadDim>;
    if (p.shared_bytes >= Size::kSharedBytes) {
      const auto error = walk_pays(p, Size::kKeyTile, Size::kBlocksPerSm, walks);
      if (error != cudaSuccess) return error;
    }
  }
  const bool sums = p.grad_query.data != nullptr && !p.deterministic && !walks;
  if (const auto error = launch_delta<T, kHeadDim>(p, sums, stream); error != cudaSuccess) return error;

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
    if (main.grad_mask != nullptr)
      return main_backward<Arch, T, kHeadDim, ScoreEdit::kMaskGradient>(main, walks, stream);
    if (p.mask_kind != MaskKind::kNone) return main_backward<Arch, T, kHeadDim, ScoreEdit::kMask>(main, walks, stream);
    if (p.dropout_p > 0.f) return main_backward<Arch, T, kHeadDim, ScoreEdit::kDropout>(main, walks, stream);
    return main_backward<Arch, T, kHeadDim, ScoreEdit::kNone>(main, walks, stream);
  };
  const auto error = run();
  return error == cudaSuccess && sums ? launch_convert<T, kHeadDim>(p, stream) : error;
}

}  // namespace sdpa
