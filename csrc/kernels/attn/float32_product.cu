// A float32 number is the sum of two TF32 and a rest below 2^-23 of it. Of the four products of two numbers' parts the
// three larger are taken. Tiles of a and b lie in shared memory as they are; each warp splits what it multiplies.
//
// A tensor core cuts off where FFMA rounds. So the products of the first parts, which are nearly all of a result, are
// summed up 16 at a time and these sums added by FADD; the others, 2^-11 as large, stay on the tensor cores.
#include "attn/float32_product.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "arch/arch.h"
#include "arch/mma.h"
#include "arch/shared_memory.h"
#include "attn/launch.h"

namespace sdpa {
namespace {

constexpr int kDepth = 32;  // of a step

// kLines lines of a step: rows of a, or columns of b. kAlongDepth: whether neighbours in depth are neighbours in
// memory, or else lines are. In shared memory they stand as in global memory, such that what a warp reads at once does
// not meet in a bank: with the chunks of 16 bytes of a row exchanged for ldmatrix, or with padded rows.
template <int kLines, bool kAlongDepth, int kThreads>
struct OperandTile {
  static constexpr int kRowLength = kAlongDepth ? kDepth : kLines, kRows = kAlongDepth ? kLines : kDepth;
  static constexpr int kRowBytes = (kAlongDepth ? kDepth : kLines + 8) * 4, kBytes = kRows * kRowBytes;
  static constexpr int kQuadsPerRow = kRowLength / 4, kRowStep = kThreads / kQuadsPerRow, kQuads = kRows / kRowStep;
  static_assert(kThreads % kQuadsPerRow == 0 && kRows % kRowStep == 0 && kRowStep % 8 == 0 && kLines % 32 == 0);

  __device__ __forceinline__ static uint32_t offset(int row, int quad) {
    return row * kRowBytes + (kAlongDepth ? quad ^ row % 8 : quad) * 16;
  }
  // Starts to copy a step, this thread's share. Beyond `rows` and `columns` there are zeros.
  __device__ __forceinline__ static void fetch(uint32_t tile, const float* from, int64_t row_stride, int rows,
                                               int columns) {
    const int thread = fresh_thread_index(), row = thread / kQuadsPerRow, quad = thread % kQuadsPerRow;
    const int present = min(max(columns - quad * 4, 0), 4) * 4;
    const uint32_t to = tile + offset(row, quad);
    from += row * row_stride + quad * 4;
#pragma unroll
    for (int i = 0; i < kQuads; ++i, from += kRowStep * row_stride) {
      cp_async<16>(to + i * kRowStep * kRowBytes, from, row + i * kRowStep < rows ? present : 0);
    }
  }

  // Where this lane reads operand a of 16 lines and 8 in depth, or two operands b of 8 lines each. By ldmatrix it gives
  // the address of a row of one of four matrices of 8 lines and 4 in depth: of a they follow each other along the lines
  // first, of b along the depth.
  template <bool kIsA>
  __device__ __forceinline__ static uint32_t lane_place(int first_line) {
    const int lane = threadIdx.x % 32;
    if constexpr (kAlongDepth) {
      const int first = lane / 8 % 2, second = lane / 16;
      return offset(first_line + lane % 8 + (kIsA ? first : second) * 8, kIsA ? second : first);
    } else {
      return lane % 4 * kRowBytes + (first_line + lane / 4) * 4;
    }
  }
  // `lines`: how far behind lane_place, a multiple of 16; depth: a multiple of 8.
  template <bool kIsA>
  __device__ __forceinline__ static void load(float (&x)[4], uint32_t tile, uint32_t place, int lines, int depth) {
    if constexpr (kAlongDepth) {
      uint32_t r[4];
      ldmatrix(r, tile + (place ^ depth * 4) + lines * kRowBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(r[i]);
    } else {
      const uint32_t from = tile + place + lines * 4 + depth * kRowBytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int line = kIsA ? i % 2 : i / 2, row = kIsA ? i / 2 : i % 2;  // in eights and in fours
        x[i] = __int_as_float(load_shared_4(from + line * 32 + row * 4 * kRowBytes));
      }
    }
  }
};

// A block has 64 rows and columns, each of its warps 32 by 32.
template <bool kAAlongDepth, bool kBAlongDepth>
struct ProductTile {
  static constexpr int kRows = 64, kCols = 64, kColWarps = kCols / 32, kThreads = kRows / 32 * kColWarps * 32;
  using A = OperandTile<kRows, kAAlongDepth, kThreads>;
  using B = OperandTile<kCols, kBAlongDepth, kThreads>;
  static constexpr int kStageBytes = A::kBytes + B::kBytes, kSharedBytes = 3 * kStageBytes;
};

// Rounded to TF32 and what that leaves, which is exact.
struct Split {
  float first[4], rest[4];
  __device__ __forceinline__ explicit Split(const float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      first[i] = __uint_as_float((__float_as_uint(x[i]) + 0x1000u) & 0xffffe000u);
      rest[i] = x[i] - first[i];
    }
  }
};

template <bool kAAlongDepth, bool kBAlongDepth>
__global__ void __launch_bounds__(ProductTile<kAAlongDepth, kBAlongDepth>::kThreads, kIsBeforeSm90 ? 2 : 3)
    float32_product_kernel(const __grid_constant__ Float32Product p, const unsigned row_tiles,
                           const unsigned col_tiles) {
  using Tile = ProductTile<kAAlongDepth, kBAlongDepth>;
  using A = typename Tile::A;
  using B = typename Tile::B;
  if constexpr (kChip != 0 && kChip < 80) return;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t base = shared_address(shared);

  const int first_col = static_cast<int>(blockIdx.x % col_tiles) * Tile::kCols;
  const int first_row = static_cast<int>(blockIdx.x / col_tiles % row_tiles) * Tile::kRows;
  const int64_t batch = blockIdx.x / col_tiles / row_tiles;
  const int rows = static_cast<int>(p.rows), cols = static_cast<int>(p.cols);
  const int64_t a_stride = kAAlongDepth ? p.a.row_stride : p.a.col_stride;
  const int64_t b_stride = kBAlongDepth ? p.b.col_stride : p.b.row_stride;
  // What is fetched next, and how much of the depth is left from there on.
  const float* a = p.a.data + batch * p.a.batch_stride + first_row * p.a.row_stride;
  const float* b = p.b.data + batch * p.b.batch_stride + first_col * p.b.col_stride;
  int left = static_cast<int>(p.depth);
  const auto fetch = [&](uint32_t stage) {
    const int a_lines = rows - first_row, b_lines = cols - first_col;
    A::fetch(stage, a, a_stride, kAAlongDepth ? a_lines : left, kAAlongDepth ? left : a_lines);
    B::fetch(stage + A::kBytes, b, b_stride, kBAlongDepth ? b_lines : left, kBAlongDepth ? left : b_lines);
    cp_async_end_group();
    a += kDepth * (kAAlongDepth ? 1 : a_stride);
    b += kDepth * (kBAlongDepth ? 1 : b_stride);
    left -= kDepth;
  };

  const int warp = threadIdx.x / 32;
  const int warp_row = warp / Tile::kColWarps * 32, warp_col = warp % Tile::kColWarps * 32;
  const uint32_t a_place = A::template lane_place<true>(warp_row);
  const uint32_t b_place = B::template lane_place<false>(warp_col);

  const bool has_results = first_row + warp_row < rows && first_col + warp_col < cols;

  using Product = Mma<Sm80, float>;
  float sums[2][4][4] = {}, rests[2][4][4] = {};
  // Two of three stages are on their way.
  constexpr uint32_t kLast = 2 * Tile::kStageBytes;
  fetch(base);
  fetch(base + Tile::kStageBytes);
  uint32_t stage = base;
#pragma unroll 1
  for (; left > -2 * kDepth; stage = stage == base + kLast ? base : stage + Tile::kStageBytes) {
    cp_async_wait_groups<1>();
    __syncthreads();
    fetch(stage == base ? base + kLast : stage - Tile::kStageBytes);
    if (!has_results) continue;
#pragma unroll
    for (int sixteen = 0; sixteen < kDepth; sixteen += 16) {
      float firsts[2][4][4] = {};
#pragma unroll
      for (int eight = sixteen; eight < sixteen + 16; eight += 8) {
        float x[4];
        A::template load<true>(x, stage, a_place, 0, eight);
        const Split upper(x);
        A::template load<true>(x, stage, a_place, 16, eight);
        const Split lower(x);
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
          B::template load<false>(x, stage + A::kBytes, b_place, n * 8, eight);
          const Split right(x);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float b0 = right.first[2 * i], b1 = right.first[2 * i + 1];
            Product::add(rests[0][n + i], upper.rest, b0, b1);
            Product::add(rests[1][n + i], lower.rest, b0, b1);
            Product::add(firsts[0][n + i], upper.first, b0, b1);
            Product::add(firsts[1][n + i], lower.first, b0, b1);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float b0 = right.rest[2 * i], b1 = right.rest[2 * i + 1];
            Product::add(rests[0][n + i], upper.first, b0, b1);
            Product::add(rests[1][n + i], lower.first, b0, b1);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 32; ++i) sums[i / 16][i / 4 % 4][i % 4] += firsts[i / 16][i / 4 % 4][i % 4];
    }
  }

  // Infinities have no parts, and numbers just below them are rounded to them: where a result is not finite, float32
  // tells what it is.
  const int lane = threadIdx.x % 32;
  uint32_t unknown = 0;  // a bit for each of this thread's results
  float* const out = p.out + batch * p.out_batch_stride;
  const auto row_of = [&](int i) { return first_row + warp_row + i * 8 + lane / 4; };
  const auto col_of = [&](int n) { return first_col + warp_col + n * 8 + lane % 4 * 2; };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = row_of(i);
    if (row >= rows) continue;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int col = col_of(n);
      float x[2];
      bool is_known[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        x[c] = sums[i / 2][n][i % 2 * 2 + c] + rests[i / 2][n][i % 2 * 2 + c];
        is_known[c] = isfinite(x[c]);
        if (!is_known[c]) unknown |= 1u << ((i * 4 + n) * 2 + c);
      }
      float* const to = out + row * p.out_row_stride + col;
      if (is_known[0] && is_known[1] && col + 1 < cols) {
        const float2 before = p.adds ? *reinterpret_cast<const float2*>(to) : float2{0.f, 0.f};
        *reinterpret_cast<float2*>(to) = {fmaf(p.scale, x[0], before.x), fmaf(p.scale, x[1], before.y)};
      } else {
        if (is_known[0] && col < cols) to[0] = fmaf(p.scale, x[0], p.adds ? to[0] : 0.f);
        if (is_known[1] && col + 1 < cols) to[1] = fmaf(p.scale, x[1], p.adds ? to[1] : 0.f);
      }
    }
  }
#pragma unroll 1
  while (unknown != 0) {
    const int number = __ffs(unknown) - 1;
    unknown &= unknown - 1;
    const int row = row_of(number / 8), col = col_of(number / 2 % 4) + number % 2;
    if (col >= cols) continue;
    const float* x = p.a.data + batch * p.a.batch_stride + row * p.a.row_stride;
    const float* y = p.b.data + batch * p.b.batch_stride + col * p.b.col_stride;
    float sum = 0.f;
#pragma unroll 1
    for (int k = 0; k < p.depth && !isnan(sum); ++k, x += p.a.col_stride, y += p.b.row_stride) sum = fmaf(*x, *y, sum);
    float* const to = out + row * p.out_row_stride + col;
    *to = fmaf(p.scale, sum, p.adds ? *to : 0.f);
  }
}

template <bool kAAlongDepth, bool kBAlongDepth>
cudaError_t launch(const Float32Product& p, cudaStream_t stream) {
  using Tile = ProductTile<kAAlongDepth, kBAlongDepth>;
  constexpr auto kKernel = float32_product_kernel<kAAlongDepth, kBAlongDepth>;
  const int64_t row_tiles = (p.rows + Tile::kRows - 1) / Tile::kRows;
  const int64_t col_tiles = (p.cols + Tile::kCols - 1) / Tile::kCols;
  if (row_tiles * col_tiles * p.batches > INT32_MAX) return cudaErrorInvalidValue;
  if (const auto error = allow_shared_bytes<kKernel>(Tile::kSharedBytes); error != cudaSuccess) return error;
  kKernel<<<static_cast<unsigned>(row_tiles * col_tiles * p.batches), Tile::kThreads, Tile::kSharedBytes, stream>>>(
      p, static_cast<unsigned>(row_tiles), static_cast<unsigned>(col_tiles));
  return cudaGetLastError();
}

// Whether the current device's tensor cores multiply TF32 more than three times as fast as it does FFMA, which those
// of chips for consumers do not, and the kernels were compiled for it.
cudaError_t find_tensor_cores(int device, bool& are_fast) {
  int major = 0, minor = 0;
  if (const auto error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  if (const auto error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) return error;
  cudaFuncAttributes of{};
  if (cudaFuncGetAttributes(&of, float32_product_kernel<true, true>) != cudaSuccess) {
    cudaGetLastError();  // it was a question
  }
  are_fast = ((major == 8 && minor == 0) || major == 9 || major == 10) && of.ptxVersion >= 80;
  return cudaSuccess;
}

}  // namespace

bool takes_float32_product(const Float32Product& p) {
  constexpr int64_t kShallowest = 64, kFewestRows = 64, kFewestCols = 32;
  // Of four numbers, along the rows or the columns: -1 if neither.
  const auto stride_of_lines = [](const Float32Product::Matrix& m) {
    return m.col_stride == 1 ? m.row_stride : m.row_stride == 1 ? m.col_stride : -1;
  };
  const auto is_aligned = [](const float* data, int64_t strides, int elements) {
    return (static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) / sizeof(float)) | strides) % elements == 0;
  };
  const auto in_quads = [&](const Float32Product::Matrix& m) {
    return is_aligned(m.data, m.batch_stride | stride_of_lines(m), 4);
  };
  const bool out_in_pairs = is_aligned(p.out, p.out_batch_stride | p.out_row_stride, 2);
  const bool is_known_order = p.a.col_stride == 1 || p.b.col_stride == 1;
  return is_known_order && in_quads(p.a) && in_quads(p.b) && out_in_pairs && p.depth >= kShallowest &&
         p.rows >= kFewestRows && p.cols >= kFewestCols && std::max({p.depth, p.rows, p.cols}) <= INT32_MAX - 128 &&
         asked_once<find_tensor_cores>();
}

cudaError_t float32_product(const Float32Product& p, cudaStream_t stream) {
  if (p.batches == 0 || p.rows == 0 || p.cols == 0) return cudaSuccess;
  const bool a_along_depth = p.a.col_stride == 1, b_along_depth = p.b.row_stride == 1 && p.b.col_stride != 1;
  if (!a_along_depth) return launch<false, false>(p, stream);
  return b_along_depth ? launch<true, true>(p, stream) : launch<true, false>(p, stream);
}

}  // namespace sdpa
