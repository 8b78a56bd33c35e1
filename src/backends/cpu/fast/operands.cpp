// SPDX-License-Identifier: Apache-2.0
//
// See operands.h.
#include "backends/cpu/fast/operands.h"

#include "tensor/dispatch.h"

namespace penstock::cpu::fast {

Operand rows_operand(const TensorView& tensor, const int32_t* gather, int64_t col_begin) {
  Operand operand;
  operand.base = StorageRows(tensor).at(0, col_begin);
  operand.type = element_of(tensor.dtype);
  operand.outer_stride = tensor.stride(0);
  operand.k_stride = 1;
  operand.outer_index = gather;
  return operand;
}

Operand columns_operand(const TensorView& tensor, const int32_t* gather) {
  Operand operand;
  operand.base = tensor.data;
  operand.type = element_of(tensor.dtype);
  operand.outer_stride = 1;
  operand.k_stride = tensor.stride(0);
  operand.k_index = gather;
  return operand;
}

Operand matrix_operand(const GroupedMatrix& matrix) {
  Operand operand;
  operand.base = matrix.data;
  operand.type = element_of(matrix.dtype);
  operand.expert_stride = matrix.expert_stride;
  operand.outer_stride = matrix.row_stride;
  operand.k_stride = matrix.col_stride;
  return operand;
}

Operand transposed(Operand operand) {
  std::swap(operand.outer_stride, operand.k_stride);
  std::swap(operand.outer_index, operand.k_index);
  return operand;
}

const int32_t* gather_of(const RowGroups& rows) {
  return rows.row_to_token.present() ? rows.row_to_token.as<const int32_t>() : nullptr;
}

const int32_t* gather_of(const RowGroups& rows, RowAccess access) {
  return access == RowAccess::gathered ? gather_of(rows) : nullptr;
}

void read_vector(const GroupedVector& vector, int64_t expert, int64_t begin, int64_t count,
                 float* to) {
  visit_floating(vector.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* from = static_cast<const T*>(vector.data) + expert * vector.expert_stride +
                    begin * vector.stride;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(load(from[i * vector.stride]));
  });
}

void write_strided(const RowKernels& kernels, const StridedTarget& target, GradMode mode,
                   float* values, int64_t count) {
  if (target.stride != 1) {
    return visit_floating(target.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      T* to = static_cast<T*>(target.data);
      for (int64_t i = 0; i < count; ++i, to += target.stride) {
        const float before = mode == GradMode::accumulate ? static_cast<float>(load(*to)) : 0.0f;
        store(*to, mode == GradMode::accumulate ? before + values[i] : values[i]);
      }
    });
  }
  const Element type = element_of(target.dtype);
  if (mode == GradMode::accumulate) kernels.add_scaled(type, 1.0f, target.data, values, count);
  kernels.narrow(type, values, target.data, count);
}

}  // namespace penstock::cpu::fast
