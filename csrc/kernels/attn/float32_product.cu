// A float32 number is the sum of two TF32 and a rest below 2^-23 of it. Of the four products of two numbers' parts the
// three larger are taken. Tiles of a and b lie in shared memory as they are; each warp splits what it multiplies.
//
// A tensor core cuts off where FFMA rounds. So the products of the first parts, which are nearly all of a result, are
// summed up 16 or 32 at a time and these sums added by FADD; the others, 2^-11 as large, stay on the tensor cores.
#include "attn/float32_product.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "arch/arch.h"
#include "arch/mma.h"
#include "arch/shared_memory.h"
#include "attn/launch.h"
#include "attn/softmax.h"

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
  static_assert(kSharedBytes <= Sm80::kSharedBytes);
};

// How the products of a result are summed up. By mma the smaller ones have a chain of sums of their own, or go with the
// larger: fewer registers and additions, and as long as results are sums of many the error stays below FFMA's. What a
// tensor core cuts off shows where they are sums of few.
enum class SumBy { kFfma, kTwoChains, kOneChain };

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

// Which of the results of 8 rows and 4 pairs of columns a lane has: those that mma gives it, or, by FFMA, such that the
// next lane reads the same of a and the next but one the same of b: so shared memory serves 16 lanes at once.
template <bool kByFfma>
struct LanePlace {
  static constexpr int kSecondPairs = kByFfma ? 4 : 2;  // how far the other lanes with the row are, besides 1
  int row, pair;
  __device__ __forceinline__ explicit LanePlace(int lane)
      : row(kByFfma ? lane / 2 % 2 + lane / 8 * 2 : lane / 4), pair(kByFfma ? lane % 2 + lane / 4 % 2 * 2 : lane % 4) {}
};

// Adds a step of the products of a warp's lines, both along the depth.
template <class A, class B>
__device__ __forceinline__ void multiply_by_ffma(float (&sums)[2][4][4], uint32_t a_tile, int a_line, uint32_t b_tile,
                                                 int b_line) {
  const uint32_t a_place = A::offset(a_line, 0), b_place = B::offset(b_line, 0);
  const auto read = [](uint32_t address) {
    const uint4 x = load_shared_16(address);
    return float4{__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)};
  };
#pragma unroll
  for (int quad = 0; quad < kDepth / 4; ++quad) {
    float4 a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = read(a_tile + (a_place ^ quad * 16) + i * 8 * A::kRowBytes);
#pragma unroll
    for (int line = 0; line < 8; ++line) {
      const int n = line / 2, c = line % 2;
      const float4 b = read(b_tile + (b_place ^ (quad ^ c) * 16) + (n * 8 + c) * B::kRowBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& sum = sums[i / 2][n][i % 2 * 2 + c];
        sum = fmaf(a[i].w, b.w, fmaf(a[i].z, b.z, fmaf(a[i].y, b.y, fmaf(a[i].x, b.x, sum))));
      }
    }
  }
}

// As many as registers and shared memory are enough for.
template <ProductResult kResult, SumBy kSumBy>
constexpr int kBlocksPerSm = kIsBeforeSm90                                                  ? 2
                             : kSumBy == SumBy::kOneChain && kResult == ProductResult::kSum ? 4
                                                                                            : 3;

template <bool kAAlongDepth, bool kBAlongDepth, ProductResult kResult, SumBy kSumBy>
__global__ void __launch_bounds__(ProductTile<kAAlongDepth, kBAlongDepth>::kThreads, kBlocksPerSm<kResult, kSumBy>)
    float32_product_kernel(const __grid_constant__ Float32Product p, const unsigned row_tiles,
                           const unsigned col_tiles) {
  constexpr bool kByFfma = kSumBy == SumBy::kFfma, kOneChain = kSumBy == SumBy::kOneChain;
  constexpr int kChain = kOneChain ? 32 : 16;  // products summed up by a tensor core at a time
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
  if constexpr (kResult == ProductResult::kGradients) {  // what the end waits for
    static_assert(Tile::kThreads == Tile::kRows * 2 && Tile::kCols == 64, "128 bytes each");
    const int row = first_row + threadIdx.x / 2, col = first_col + threadIdx.x % 2 * 32;
    const float* const from = p.out + batch * p.out_batch_stride + row * p.out_row_stride + col;
    if (row < rows && col < cols) asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
  }
  fetch(base);
  fetch(base + Tile::kStageBytes);
  uint32_t stage = base;
#pragma unroll 1
  for (; left > -2 * kDepth; stage = stage == base + kLast ? base : stage + Tile::kStageBytes) {
    cp_async_wait_groups<1>();
    __syncthreads();
    fetch(stage == base ? base + kLast : stage - Tile::kStageBytes);
    if (!has_results) continue;
    if constexpr (kByFfma) {
      const LanePlace<true> place(threadIdx.x % 32);
      multiply_by_ffma<A, B>(sums, stage, warp_row + place.row, stage + A::kBytes, warp_col + place.pair * 2);
    } else {
#pragma unroll
      for (int first = 0; first < kDepth; first += kChain) {
        float firsts[2][4][4] = {};
        float (&others)[2][4][4] = kOneChain ? firsts : rests;
#pragma unroll
        for (int eight = first; eight < first + kChain; eight += 8) {
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
              Product::add(others[0][n + i], upper.rest, b0, b1);
              Product::add(others[1][n + i], lower.rest, b0, b1);
              Product::add(firsts[0][n + i], upper.first, b0, b1);
              Product::add(firsts[1][n + i], lower.first, b0, b1);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float b0 = right.rest[2 * i], b1 = right.rest[2 * i + 1];
              Product::add(others[0][n + i], upper.first, b0, b1);
              Product::add(others[1][n + i], lower.first, b0, b1);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 32; ++i) sums[i / 16][i / 4 % 4][i % 4] += firsts[i / 16][i / 4 % 4][i % 4];
      }
    }
  }

  // Infinities have no parts, and numbers just below them are rounded to them: where a result is not finite, float32
  // tells what it is.
  const LanePlace<kByFfma> place(threadIdx.x % 32);
  uint32_t unknown = 0;  // a bit for each of this thread's results
  float* const out = p.out + batch * p.out_batch_stride;
  const auto row_of = [&](int i) { return first_row + warp_row + i * 8 + place.row; };
  const auto col_of = [&](int n) { return first_col + warp_col + n * 8 + place.pair * 2; };
  const auto term_of = [&](int row) {
    if (kResult == ProductResult::kSum) return 0.f;
    const float term = p.row_terms[batch * p.rows + row];
    return kResult == ProductResult::kExponentials && term == -INFINITY ? INFINITY : term;
  };
  const bool adds = kResult == ProductResult::kSum && p.adds;
  const auto result = [&](float x, float term, float before) {
    if constexpr (kResult == ProductResult::kSum) return fmaf(p.scale, x, before);
    // Rounded before the difference is taken, as the scores were whose logsumexp the term is.
    const float difference = __fmul_rn(p.scale, x) - term;
    return kResult == ProductResult::kGradients ? before * difference : exp2_approx(difference * kLog2E);
  };
  // All that is read before the first is written: the compiler must take them for one place.
  float terms[4] = {};
  float2 exponentials[4][4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (kResult == ProductResult::kSum || row_of(i) >= rows) continue;
    terms[i] = term_of(row_of(i));
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (kResult != ProductResult::kGradients || col_of(n) >= cols) continue;
      exponentials[i][n] = *reinterpret_cast<const float2*>(out + row_of(i) * p.out_row_stride + col_of(n));
    }
  }
  float exp_sums[4] = {};
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
        x[c] = sums[i / 2][n][i % 2 * 2 + c] + (kByFfma || kOneChain ? 0.f : rests[i / 2][n][i % 2 * 2 + c]);
        is_known[c] = kByFfma || isfinite(x[c]);
        if (!is_known[c]) unknown |= 1u << ((i * 4 + n) * 2 + c);
      }
      float* const to = out + row * p.out_row_stride + col;
      const float2 e = exponentials[i][n];
      if (is_known[0] && is_known[1] && col + 1 < cols) {
        const float2 before = adds ? *reinterpret_cast<const float2*>(to) : e;
        const float2 y = {result(x[0], terms[i], before.x), result(x[1], terms[i], before.y)};
        *reinterpret_cast<float2*>(to) = y;
        exp_sums[i] += y.x + y.y;
      } else {
        if (is_known[0] && col < cols) exp_sums[i] += to[0] = result(x[0], terms[i], adds ? to[0] : e.x);
        if (is_known[1] && col + 1 < cols) exp_sums[i] += to[1] = result(x[1], terms[i], adds ? to[1] : e.y);
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
    const float last = result(sum, term_of(row), kResult == ProductResult::kGradients || adds ? *to : 0.f);
    *to = last;
#pragma unroll
    for (int i = 0; i < 4; ++i) exp_sums[i] += i == number / 8 ? last : 0.f;
  }
  if constexpr (kResult == ProductResult::kExponentials) {
    constexpr int kSumCols = Float32Product::kSumCols;
    static_assert(kSumCols == 32, "a warp's columns");
    const int64_t group = (first_col + warp_col) / kSumCols;
    float* const to = p.exp_sums + (batch * ((cols + kSumCols - 1) / kSumCols) + group) * p.rows;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      exp_sums[i] += __shfl_xor_sync(0xffffffffu, exp_sums[i], 1);
      exp_sums[i] += __shfl_xor_sync(0xffffffffu, exp_sums[i], place.kSecondPairs);
      if (has_results && place.pair == 0 && row_of(i) < rows) to[row_of(i)] = exp_sums[i];
    }
  }
}

template <bool kAAlongDepth, bool kBAlongDepth, ProductResult kResult, SumBy kSumBy>
cudaError_t launch(const Float32Product& p, cudaStream_t stream) {
  using Tile = ProductTile<kAAlongDepth, kBAlongDepth>;
  constexpr auto kKernel = float32_product_kernel<kAAlongDepth, kBAlongDepth, kResult, kSumBy>;
  const int64_t row_tiles = (p.rows + Tile::kRows - 1) / Tile::kRows;
  const int64_t col_tiles = (p.cols + Tile::kCols - 1) / Tile::kCols;
  if (row_tiles * col_tiles * p.batches > INT32_MAX) return cudaErrorInvalidValue;
  if (const auto error = allow_shared_bytes<kKernel>(Tile::kSharedBytes); error != cudaSuccess) return error;
  kKernel<<<static_cast<unsigned>(row_tiles * col_tiles * p.batches), Tile::kThreads, Tile::kSharedBytes, stream>>>(
      p, static_cast<unsigned>(row_tiles), static_cast<unsigned>(col_tiles));
  return cudaGetLastError();
}

// From this depth on by tensor cores, and from that one on in one chain.
constexpr int64_t kShallowestByMma = 64, kShallowestInOneChain = 128;

bool is_along_depth(const Float32Product& p) {
  return p.a.col_stride == 1 && p.b.row_stride == 1 && p.b.col_stride != 1;
}

template <bool kAAlongDepth, bool kBAlongDepth, ProductResult kResult = ProductResult::kSum>
cudaError_t launch_by_depth(const Float32Product& p, cudaStream_t stream) {
  if (p.depth >= kShallowestInOneChain) {
    return launch<kAAlongDepth, kBAlongDepth, kResult, SumBy::kOneChain>(p, stream);
  }
  if constexpr (kAAlongDepth && kBAlongDepth) {
    if (p.depth < kShallowestByMma) return launch<true, true, kResult, SumBy::kFfma>(p, stream);
  }
  return launch<kAAlongDepth, kBAlongDepth, kResult, SumBy::kTwoChains>(p, stream);
}

constexpr int kDividingWarps = 8;  // of a block, a row each: neighbours in exp_sums share what is read

__global__ void __launch_bounds__(kDividingWarps * 32) divide_rows_kernel(const __grid_constant__ DividedRows p) {
  const int64_t line = int64_t{blockIdx.x} * kDividingWarps + threadIdx.x / 32;
  if (line >= p.batches * p.heads * p.rows) return;
  const int lane = threadIdx.x % 32;
  const auto summed = [](float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
  };
  const float* const sums = p.exp_sums + line / p.sum_rows * p.sum_cols * p.sum_rows + line % p.sum_rows;
  float sum = 0.f;
  for (int64_t group = lane; group < p.sum_cols; group += 32) sum += sums[group * p.sum_rows];
  sum = summed(sum);
  const float factor = sum == 0.f ? 0.f : 1.f / sum;  // 0: nothing to attend to

  const int64_t batch = line / p.rows / p.heads, head = line / p.rows % p.heads, row = line % p.rows;
  const auto row_of = [&](const Operand& x) {
    return static_cast<const float*>(x.data) + batch * x.stride[0] + head * x.stride[1] + row * x.stride[2];
  };
  const float *const grad = row_of(p.grad_output), *const output = row_of(p.output);
  float delta = 0.f;
  for (int64_t col = lane; col < p.cols; col += 32) {
    const float quotient = grad[col * p.grad_output.stride[3]] * factor;
    p.quotients[line * p.cols + col] = quotient;
    delta = fmaf(quotient, output[col * p.output.stride[3]], delta);
  }
  delta = summed(delta);
  if (lane == 0) p.delta[line] = delta;
}

// Whether the current device's tensor cores multiply TF32 more than three times as fast as it does FFMA, which those
// of chips for consumers do not, and the kernels were compiled for it.
cudaError_t find_tensor_cores(int device, bool& are_fast) {
  int major = 0, minor = 0;
  if (const auto error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  if (const auto error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) return error;
  cudaFuncAttributes of{};
  if (cudaFuncGetAttributes(&of, float32_product_kernel<true, true, ProductResult::kSum, SumBy::kOneChain>) !=
      cudaSuccess) {
    cudaGetLastError();  // it was a question
  }
  are_fast = ((major == 8 && minor == 0) || major == 9 || major == 10) && of.ptxVersion >= 80;
  return cudaSuccess;
}

}  // namespace

bool takes_float32_product(const Float32Product& p) {
  constexpr int64_t kFewestRows = 64, kFewestCols = 32, kShallowest = 16;
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
  const bool along_depth = is_along_depth(p);
  const bool is_known_order =
      along_depth || (p.result == ProductResult::kSum && (p.a.col_stride == 1 || p.b.col_stride == 1));
  return is_known_order && in_quads(p.a) && in_quads(p.b) && out_in_pairs &&
         p.depth >= (along_depth ? kShallowest : kShallowestByMma) && p.rows >= kFewestRows && p.cols >= kFewestCols &&
         std::max({p.depth, p.rows, p.cols}) <= INT32_MAX - 128 && asked_once<find_tensor_cores>();
}

cudaError_t float32_product(const Float32Product& p, cudaStream_t stream) {
  if (p.batches == 0 || p.rows == 0 || p.cols == 0) return cudaSuccess;
  if (p.result == ProductResult::kExponentials) {
    return launch_by_depth<true, true, ProductResult::kExponentials>(p, stream);
  }
  if (p.result == ProductResult::kGradients) return launch_by_depth<true, true, ProductResult::kGradients>(p, stream);
  if (is_along_depth(p)) return launch_by_depth<true, true>(p, stream);
  return p.a.col_stride == 1 ? launch_by_depth<true, false>(p, stream) : launch_by_depth<false, false>(p, stream);
}

cudaError_t divide_rows(const DividedRows& p, cudaStream_t stream) {
  const int64_t blocks = (p.batches * p.heads * p.rows + kDividingWarps - 1) / kDividingWarps;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  divide_rows_kernel<<<static_cast<unsigned>(blocks), kDividingWarps * 32, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace sdpa
