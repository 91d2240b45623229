// Products of float32 matrices on tensor cores, as exact as FFMA: what the math backend multiplies by where a chip's
// tensor cores are so much faster that three products of TF32 take less time than one of float32.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sdpa {

// out = scale * a @ b + (adds ? out : 0) for each of `batches`: a is (rows, depth), b (depth, cols), out (rows, cols)
// with neighbouring columns in neighbouring places. Strides are in elements; of a and of b one is 1.
struct Float32Product {
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
};

// Whether float32_product is for this product on the current device. If not, another is faster or at least as exact: a
// tensor core cuts off what it sums up, which shows beside FFMA where a result is a sum of few.
bool takes_float32_product(const Float32Product& product);
cudaError_t float32_product(const Float32Product& product, cudaStream_t stream);

}  // namespace sdpa
