// Products of float32 matrices on tensor cores, as exact as FFMA: what the math backend multiplies by where a chip's
// tensor cores are so much faster that three products of TF32 take less time than one of float32. Those of a softmax's
// backward take the softmax as well, which is then not read and written in between; few in depth, by FFMA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attn/params.h"

namespace sdpa {

// What is written of x = scale * a @ b. Those of softmax are for a and b with neighbours along the depth in memory.
enum class ProductResult {
  kSum,           // x + (adds ? out : 0)
  kExponentials,  // exp(x - row_terms), 0 where that is -inf, and the sums of them
  kGradients,     // out * (x - row_terms), where out's rows are in memory as far as their stride goes
};

// For each of `batches`: a is (rows, depth), b (depth, cols), out (rows, cols) with neighbouring columns in
// neighbouring places. Strides are in elements; of a and of b one is 1.
struct Float32Product {
  static constexpr int kSumCols = 32;  // that a number of exp_sums is the sum of

  struct Matrix {
    const float* data = nullptr;
    int64_t batch_stride = 0, row_stride = 0, col_stride = 0;
  };
  Matrix a, b;
  float* out = nullptr;
  int64_t out_batch_stride = 0, out_row_stride = 0;
  int64_t batches = 0, rows = 0, cols = 0, depth = 0;
  float scale = 1.f;
  bool adds = false;
  ProductResult result = ProductResult::kSum;
  const float* row_terms = nullptr;  // (batches, rows)
  float* exp_sums = nullptr;         // (batches, ceil(cols / kSumCols), rows)
};

// Whether float32_product is for this product on the current device. If not, another is faster.
bool takes_float32_product(const Float32Product& product);
cudaError_t float32_product(const Float32Product& product, cudaStream_t stream);

// What a backward needs beside exponentials: grad_output's rows divided by the sum of the row's exponentials, and the
// products of these with output's rows.
struct DividedRows {
  Operand grad_output, output;  // (batches, heads, rows, cols)
  int64_t batches = 0, heads = 0, rows = 0, cols = 0;
  const float* exp_sums = nullptr;  // of a product with `sum_rows` rows, which are these in order
  int64_t sum_rows = 0, sum_cols = 0;
  float* quotients = nullptr;  // (batches, heads, rows, cols)
  float* delta = nullptr;      // (batches, heads, rows)
};
cudaError_t divide_rows(const DividedRows& params, cudaStream_t stream);

}  // namespace sdpa
