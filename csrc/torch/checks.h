// SPDX-License-Identifier: Apache-2.0
// Checks of op arguments. Every failure reads
//   spense::<op>: <argument>: expected <what>, got <what>
// and spense_kernels/_fake.py raises the same words, so eager and compiled callers see one text.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/types.h"
#include "format/tile_stream.h"

namespace spense::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One argument of one op, for messages. Made by SPENSE_ARG, which takes the variable once.
struct Arg {
  const char* op;
  const char* name;

  template <typename... Words>
  [[noreturn]] void fail(const Words&... words) const {
    std::ostringstream text;
    text << "spense::" << op << ": " << name << ": ";
    (text << ... << words);
    throw std::runtime_error(text.str());
  }
};

struct TensorArg : Arg {
  const Tensor& tensor;
};

#define SPENSE_ARG(op, variable) \
  ::spense::ops::TensorArg { {op, #variable}, variable }

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    default:
      return torch::headeronly::toString(type);
  }
}

inline void check_dtype(const TensorArg& arg, std::initializer_list<ScalarType> expected) {
  const ScalarType got = arg.tensor.scalar_type();
  std::string names;
  for (ScalarType type : expected) {
    if (type == got) return;
    names += (names.empty() ? "" : " or ") + std::string(dtype_name(type));
  }
  arg.fail("expected dtype ", names, ", got ", dtype_name(got));
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

inline void check_dim(const TensorArg& arg, int64_t expected) {
  if (arg.tensor.dim() == expected) return;
  arg.fail("expected ", expected, " dimensions, got ", arg.tensor.dim());
}

inline void check_shape(const TensorArg& arg, std::initializer_list<int64_t> expected) {
  bool same = arg.tensor.dim() == static_cast<int64_t>(expected.size());
  std::string text = "[";
  int64_t i = 0;
  for (int64_t size : expected) {
    same = same && arg.tensor.size(i) == size;
    text += (i++ ? ", " : "") + std::to_string(size);
  }
  if (!same) arg.fail("expected shape ", text, "], got ", shape_text(arg.tensor));
}

inline void check_contiguous(const TensorArg& arg) {
  if (arg.tensor.is_contiguous()) return;
  std::string strides;
  for (int64_t stride : arg.tensor.strides()) {
    strides += (strides.empty() ? "" : ", ") + std::to_string(stride);
  }
  arg.fail("expected a contiguous tensor, got strides [", strides, "] for shape ",
           shape_text(arg.tensor));
}

// Rows may lie apart, elements of a row may not.
inline void check_rows(const TensorArg& arg) {
  check_dim(arg, 2);
  const Tensor& t = arg.tensor;
  if (t.numel() > 0 && t.size(1) > 1 && t.stride(1) != 1) {
    arg.fail("expected stride 1 in the last dimension, got ", t.stride(1));
  }
}

inline void check_aligned(const TensorArg& arg, uintptr_t bytes) {
  const auto past = reinterpret_cast<uintptr_t>(arg.tensor.const_data_ptr()) % bytes;
  if (past && arg.tensor.numel()) {
    arg.fail("expected data aligned to ", bytes, " bytes, got an address ", past, " bytes behind");
  }
}

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  const std::string index = std::to_string(tensor.get_device_index());
  if (tensor.is_cuda()) return "cuda:" + index;
  return "device type " + std::to_string(static_cast<int>(tensor.device().type())) + ":" + index;
}

inline void check_same_device(const TensorArg& arg, const TensorArg& first) {
  if (arg.tensor.device() == first.tensor.device()) return;
  arg.fail("expected device ", device_text(first.tensor), " as of ", first.name, ", got ",
           device_text(arg.tensor));
}

inline void check_at_least_one(const Arg& arg, int64_t value) {
  if (value < 1) arg.fail("expected at least 1, got ", value);
}

inline void check_layout(const char* op, int64_t layout) {
  if (layout == format::kLayoutVersion) return;
  Arg{op, "layout"}.fail("expected ", format::kLayoutVersion, " (tile stream version ",
                         format::kLayoutVersion, "), got ", layout);
}

// The row length of x against the k that the weight was packed for.
inline void check_columns(const TensorArg& arg, int64_t k) {
  if (arg.tensor.size(1) != k) {
    arg.fail("expected ", k, " columns (k), got ", arg.tensor.size(1));
  }
}

// What hybrid_gemm and unpack can say about a packed weight without reading it.
inline void check_packed(const TensorArg& w_packed, const TensorArg& w_tiles, int64_t n) {
  check_dtype(w_packed, {ScalarType::Byte});
  check_dim(w_packed, 1);
  check_contiguous(w_packed);
  if (w_packed.tensor.numel() % format::kBlockBytes) {
    w_packed.fail("expected a multiple of ", format::kBlockBytes, " bytes, got ",
                  w_packed.tensor.numel());
  }
  check_dtype(w_tiles, {ScalarType::Int});
  check_shape(w_tiles, {format::tile_count(n) + 1, format::kTileTableColumns});
  check_contiguous(w_tiles);
}

inline FloatType float_type(const Arg& arg, ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return FloatType::kBFloat16;
    case ScalarType::Half:
      return FloatType::kFloat16;
    case ScalarType::Float:
      return FloatType::kFloat32;
    default:
      arg.fail("expected dtype bfloat16 or float16 or float32, got ", dtype_name(type));
  }
}

// Tensors of hybrid_gemm; the same on every device.
inline void check_hybrid_gemm(const Tensor& x, const Tensor& w_packed, const Tensor& w_tiles,
                              const Tensor& x_scale, const Tensor& w_scale,
                              const std::optional<Tensor>& bias, int64_t n, int64_t k,
                              int64_t layout) {
  constexpr const char* op = "hybrid_gemm";
  check_layout(op, layout);
  check_at_least_one({op, "n"}, n);
  check_at_least_one({op, "k"}, k);
  const TensorArg x_arg = SPENSE_ARG(op, x);
  check_dtype(x_arg, {ScalarType::Float8_e4m3fn});
  check_rows(x_arg);
  check_columns(x_arg, k);
  check_packed(SPENSE_ARG(op, w_packed), SPENSE_ARG(op, w_tiles), n);
  const TensorArg scale = SPENSE_ARG(op, x_scale);
  check_dtype(scale, {ScalarType::Float});
  check_dim(scale, 1);
  if (x_scale.size(0) != 1 && x_scale.size(0) != x.size(0)) {
    scale.fail("expected shape [", x.size(0), "] or [1], got ", shape_text(x_scale));
  }
  check_contiguous(scale);
  check_dtype(SPENSE_ARG(op, w_scale), {ScalarType::Float});
  check_shape(SPENSE_ARG(op, w_scale), {n});
  check_contiguous(SPENSE_ARG(op, w_scale));
  check_same_device(SPENSE_ARG(op, w_packed), x_arg);
  check_same_device(SPENSE_ARG(op, w_tiles), x_arg);
  check_same_device(scale, x_arg);
  check_same_device(SPENSE_ARG(op, w_scale), x_arg);
  if (bias) {
    const TensorArg bias_arg{{op, "bias"}, *bias};
    check_dtype(bias_arg, {ScalarType::Float});
    check_shape(bias_arg, {n});
    check_contiguous(bias_arg);
    check_same_device(bias_arg, x_arg);
  }
}

}  // namespace spense::ops
