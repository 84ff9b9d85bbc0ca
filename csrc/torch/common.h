// SPDX-License-Identifier: Apache-2.0
// What the ops of all devices share beyond checks: views of tensors, splits, payload sizes.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "format/pack.h"
#include "torch/checks.h"

namespace spense::ops {

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Elements between two rows; a single row may carry any stride.
inline int64_t row_stride(const Tensor& x) { return x.size(0) > 1 ? x.stride(0) : x.size(1); }

// The first `columns` of every row. Not aten::narrow: the result must not be known to autograd as
// a view.
inline Tensor first_columns(const Tensor& padded, int64_t columns) {
  const int64_t sizes[] = {padded.size(0), columns};
  const int64_t strides[] = {padded.size(1), 1};
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(padded.get(), 2, sizes, strides, 0, &view));
  return Tensor(view);
}

inline void throw_unless_ok(const char* op, const format::Status& status) {
  if (!status.ok())
    throw std::runtime_error("spense::" + std::string(op) + ": " + status.message());
}

// Rows that get quantised, [m, k] in a float dtype, and their gather, int32 [k] or none: checks all
// save what takes reading gather.
inline void check_rows_to_quantize(const TensorArg& x, const std::optional<Tensor>& gather) {
  check_rows(x);
  float_type(x, x.tensor.scalar_type());
  const std::string columns = std::string(x.name) + ".shape[1]";
  check_at_least_one({x.op, columns.c_str()}, x.tensor.size(1));
  if (!gather) return;
  const TensorArg arg{{x.op, "gather"}, *gather};
  check_dtype(arg, {ScalarType::Int});
  check_shape(arg, {x.tensor.size(1)});
  check_contiguous(arg);
  check_same_device(arg, x);
}

// The split as pack and unpack get it. `widths` must outlive the result.
inline format::PayloadLayout payload_layout(const char* op, const std::vector<int64_t>& widths,
                                            int64_t n, int64_t k, int64_t k_shards) {
  check_at_least_one({op, "n"}, n);
  if (static_cast<int64_t>(widths.size()) != format::tile_count(n)) {
    Arg{op, "dense_width"}.fail("expected ", format::tile_count(n),
                                " widths (one for each 128 rows of n), got ", widths.size());
  }
  const format::SplitDesc split{n, k, k_shards, widths.data()};
  throw_unless_ok(op, format::check_split(split));
  return format::PayloadLayout(split);
}

inline void check_bytes(const TensorArg& arg, int64_t expected) {
  check_dtype(arg, {ScalarType::Byte});
  check_shape(arg, {expected});
  check_contiguous(arg);
}

inline void check_payload_arrays(const Tensor& values, const Tensor& indices, const Tensor& dense,
                                 const format::PayloadSizes& sizes) {
  constexpr const char* op = "pack";
  check_bytes(SPENSE_ARG(op, values), sizes.values);
  check_bytes(SPENSE_ARG(op, indices), sizes.indices);
  check_bytes(SPENSE_ARG(op, dense), sizes.dense);
  check_same_device(SPENSE_ARG(op, indices), SPENSE_ARG(op, values));
  check_same_device(SPENSE_ARG(op, dense), SPENSE_ARG(op, values));
}

// Checks unpack's arguments, save what takes reading w_tiles, and returns the split.
inline format::PayloadLayout check_unpack(const Tensor& w_packed, const Tensor& w_tiles,
                                          const std::vector<int64_t>& dense_width, int64_t n,
                                          int64_t k, int64_t k_shards, int64_t layout) {
  constexpr const char* op = "unpack";
  check_layout(op, layout);
  format::PayloadLayout payload = payload_layout(op, dense_width, n, k, k_shards);
  check_packed(SPENSE_ARG(op, w_packed), SPENSE_ARG(op, w_tiles), n);
  check_same_device(SPENSE_ARG(op, w_tiles), SPENSE_ARG(op, w_packed));
  check_shape(SPENSE_ARG(op, w_packed), {payload.sizes().packed});
  return payload;
}

}  // namespace spense::ops
