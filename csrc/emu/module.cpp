// Python's hold on the emulator: schedules, limits of the device, counters, and the memory that blocks need. The kernels
// themselves are the ops mpoe_emulated:: of csrc/cuda/bind_*.cpp, compiled into the same library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "cuda/few.h"
#include "cuda/panel.h"

namespace {

using namespace mpoe::cuda;
using Sizes = std::array<int, 10>;  // iL jL a iC jC b iR jR, in_features, out_features

void configure(const std::string& order, const std::string& copies, std::uint64_t seed) {
  auto& config = emu::config();
  if (order == "ascending") {
    config.order = emu::Order::kAscending;
  } else if (order == "descending") {
    config.order = emu::Order::kDescending;
  } else if (order == "random") {
    config.order = emu::Order::kRandom;
  } else {
    throw std::invalid_argument("order must be ascending, descending or random; got " + order);
  }
  if (copies != "lazy" && copies != "eager") {
    throw std::invalid_argument("copies must be lazy or eager; got " + copies);
  }
  config.blocks_descending = order == "descending";
  config.cp_async_lazy = copies == "lazy";
  config.seed = seed;
}

void limit(std::size_t shared_bytes, int multiprocessors) {
  emu::config().max_shared = shared_bytes;
  emu::config().multiprocessors = multiprocessors;
}

pybind11::dict counters() {
  auto& stats = emu::stats();
  pybind11::dict counts;
  counts["launches"] = stats.launches;
  counts["blocks"] = stats.blocks;
  counts["mma"] = stats.mma;
  counts["ldmatrix"] = stats.ldmatrix;
  counts["wavefronts"] = stats.ldmatrix_wavefronts;
  counts["cp_async"] = stats.cp_async;
  counts["barriers"] = stats.barriers;
  stats = {};
  return counts;
}

Dims dims_of(const Sizes& sizes) {
  Dims dims;
  for (int axis = 0; axis < kAxes; ++axis) dims.size[axis] = sizes[axis];
  dims.in_features = sizes[8];
  dims.out_features = sizes[9];
  return dims;
}

// Shared memory of a block. panel: left, centre, right.
std::size_t panel(int dtype, const Sizes& sizes, bool transposed, const std::array<int, 3>& shape, bool left_first) {
  PanelProduct product;
  product.dtype = static_cast<mpoe::Dtype>(dtype);
  product.dims = dims_of(sizes);
  product.transposed = transposed;
  product.shape = {shape[0], shape[1], shape[2], left_first};
  return panel_bytes(product);
}

// Shared memory of a block. few: left, centre, right, rows.
std::size_t few(int dtype, const Sizes& sizes, const std::array<int, 4>& shape) {
  FewProduct product;
  product.dtype = static_cast<mpoe::Dtype>(dtype);
  product.dims = dims_of(sizes);
  product.shape = {shape[0], shape[1], shape[2], shape[3]};
  return few_bytes(product);
}

}  // namespace

PYBIND11_MODULE(mpoe_emulated, module) {
  const emu::Config usual;
  module.def("configure", &configure, pybind11::arg("order") = "ascending", pybind11::arg("copies") = "lazy",
             pybind11::arg("seed") = 0,
             "Which ready thread runs next (blocks in the same order); cp.async copies at the wait or at issue.");
  module.def("limit", &limit, pybind11::arg("shared_bytes") = usual.max_shared,
             pybind11::arg("multiprocessors") = usual.multiprocessors, "What the device has.");
  module.def("counters", &counters, "What was counted since the last call.");
  module.def("panel_bytes", &panel, "Shared memory of a block of the panel kernel.");
  module.def("few_bytes", &few, "Shared memory of a block of the kernel for few rows.");
}
