// SPDX-License-Identifier: Apache-2.0
// _C.format: the tile stream's constants and functions, and sizes of a split.
#include <stdexcept>
#include <vector>

#include "bindings/module.h"
#include "format/pack.h"
#include "format/tile_stream.h"

namespace py = pybind11;

namespace spense::bindings {

void add_format(py::module_& parent) {
  using namespace spense::format;
  py::module_ m = parent.def_submodule("format", "The tile stream (csrc/format/tile_stream.h).");
  m.attr("LAYOUT_VERSION") = kLayoutVersion;
  m.attr("TILE_ROWS") = kTileRows;
  m.attr("SPARSE_UNIT_COLUMNS") = kSparseUnitColumns;
  m.attr("DENSE_UNIT_COLUMNS") = kDenseUnitColumns;
  m.attr("SPARSE_UNIT_BYTES") = kSparseUnitBytes;
  m.attr("DENSE_UNIT_BYTES") = kDenseUnitBytes;
  m.attr("BLOCK_BYTES") = kBlockBytes;
  m.attr("VALUE_BYTES") = kValueBytes;
  m.attr("METADATA_BYTES") = kMetadataBytes;
  m.attr("TILE_TABLE_COLUMNS") = kTileTableColumns;
  m.attr("GRANULE") = kGranule;
  m.attr("EMPTY_NIBBLE") = kEmptyNibble;
  m.def("padded_k", &padded_k, py::arg("k"));
  m.def("tile_count", &tile_count, py::arg("n"));
  m.def("sparse_units", &sparse_units, py::arg("sparse_columns"));
  m.def("dense_units", &dense_units, py::arg("k"), py::arg("sparse_unit_count"));
  m.def("tile_bytes", &tile_bytes, py::arg("sparse_unit_count"), py::arg("dense_unit_count"));
  m.def("unit_offset", &unit_offset, py::arg("unit"), py::arg("sparse_unit_count"));
  m.def("value_offset", &value_offset, py::arg("row"), py::arg("position"));
  m.def("metadata_offset", &metadata_offset, py::arg("row"), py::arg("column"));
  m.def("make_nibble", &make_nibble, py::arg("first"), py::arg("second"));
  m.def("legal_nibble", &legal_nibble, py::arg("nibble"));
  m.def(
      "payload_sizes",
      [](int64_t n, int64_t k, const std::vector<int64_t>& dense_width, int64_t k_shards) {
        const SplitDesc split{n, k, k_shards, dense_width.data()};
        if (n < 1 || static_cast<int64_t>(dense_width.size()) != tile_count(n)) {
          throw std::invalid_argument("payload_sizes: dense_width: expected one width a tile");
        }
        if (const Status status = check_split(split); !status.ok()) {
          throw std::invalid_argument("payload_sizes: " + status.message());
        }
        const PayloadSizes sizes = PayloadLayout(split).sizes();
        return py::dict(py::arg("values") = sizes.values, py::arg("indices") = sizes.indices,
                        py::arg("dense") = sizes.dense, py::arg("packed") = sizes.packed,
                        py::arg("tiles") = sizes.tiles);
      },
      py::arg("n"), py::arg("k"), py::arg("dense_width"), py::arg("k_shards") = 1,
      "Bytes of values, indices, dense and the packed form, and the number of tiles.");
}

}  // namespace spense::bindings
