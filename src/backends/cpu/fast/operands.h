// SPDX-License-Identifier: Apache-2.0
//
// From the backend's argument structs to what the driver and the kernels take: operands of a
// product, contiguous rows of storage, biases as floats. Used by the operations of this folder.
#pragma once

#include <cstdint>

#include "backend/ops.h"
#include "backends/cpu/fast/grouped_product.h"

namespace penstock::cpu::fast {

// Rows of a (rows, length) tensor with stride 1 along the last axis.
class StorageRows {
 public:
  explicit StorageRows(const TensorView& tensor)
      : data_(static_cast<char*>(tensor.data)),
        type_(element_of(tensor.dtype)),
        row_stride_(tensor.present() ? tensor.stride(0) : 0),
        element_bytes_(size_of(tensor.dtype)) {}

  bool present() const { return data_ != nullptr; }
  Element type() const { return type_; }
  int64_t row_stride() const { return row_stride_; }
  void* at(int64_t row, int64_t col) const {
    return data_ + (row * row_stride_ + col) * element_bytes_;
  }

 private:
  char* data_;
  Element type_;
  int64_t row_stride_;  // in elements
  int64_t element_bytes_;
};

// The operand whose outer axis is an expert's rows, read through `gather` unless that is null.
Operand rows_operand(const TensorView& tensor, const int32_t* gather, int64_t col_begin = 0);
// The operand whose k axis is an expert's rows and whose outer axis is the tensor's columns.
Operand columns_operand(const TensorView& tensor, const int32_t* gather);

// An expert's matrix: rows of it along the outer axis and k along its columns, or the reverse.
Operand matrix_operand(const GroupedMatrix& matrix);
Operand transposed(Operand operand);

// row_to_token of a call, null where row r of an operand is row r.
const int32_t* gather_of(const RowGroups& rows);
const int32_t* gather_of(const RowGroups& rows, RowAccess access);

// Elements begin .. begin + count of an expert's vector as floats.
void read_vector(const GroupedVector& vector, int64_t expert, int64_t begin, int64_t count,
                 float* to);

// Element (expert, begin + i) = or += values[i]. `values` may be overwritten.
struct StridedTarget {
  void* data;
  DType dtype;
  int64_t stride;
};
void write_strided(const RowKernels& kernels, const StridedTarget& target, GradMode mode,
                   float* values, int64_t count);

}  // namespace penstock::cpu::fast
