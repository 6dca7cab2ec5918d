// What the bindings of the kernels share. They need no torch: a tensor is given by its address,
// None for one that is left out. Arrays are dense, row-major and of the call's dtype unless noted
// otherwise. The caller guarantees that each has the number of elements that the sizes imply;
// everything else is checked before memory is touched: a function that refuses its arguments raises
// ValueError, one without memory MemoryError. The GIL is released while kernels run.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "common/types.h"
#include "cpu/gemm/gemm.h"

namespace mpoe {

// A tensor's address; converts to a pointer of any type.
struct Address {
  std::uintptr_t value = 0;

  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
  bool is_given() const { return value != 0; }
};

template <std::size_t Count>
using Addresses = std::array<Address, Count>;
template <std::size_t Count>
using Sizes = std::array<int64_t, Count>;
using WithoutGil = pybind11::call_guard<pybind11::gil_scoped_release>;

// Becomes a ValueError.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition)
    refuse(parts...);
}

Dtype dtype_named(std::string_view name);
// One that the GEMM kernels take.
Dtype gemm_dtype_named(std::string_view name);
Activation activation_named(std::string_view name);

// Slots and tokens become addresses: a wrong one must not be dereferenced.
void require_range(
    const int64_t* values, int64_t count, int64_t low, int64_t high, const char* name);

// The expert_offsets of a call as int64: [experts + 1], starting at 0, non-decreasing, at most
// `slots`.
std::vector<int64_t> checked_offsets(Address offsets,
                                     int64_t offset_bytes,
                                     int64_t experts,
                                     int64_t slots);

// Each adds an op's functions to the module.
void bind_threads(pybind11::module_& module);
void bind_routing(pybind11::module_& module);
void bind_router(pybind11::module_& module);
void bind_linear(pybind11::module_& module);
void bind_experts(pybind11::module_& module);
void bind_ffn(pybind11::module_& module);

}  // namespace mpoe

template <>
struct pybind11::detail::type_caster<mpoe::Address> {
  PYBIND11_TYPE_CASTER(mpoe::Address, const_name("int | None"));

  bool load(handle source, bool) {
    if (source.is_none())
      return true;
    if (!PyLong_Check(source.ptr()))
      return false;
    value.value = static_cast<std::uintptr_t>(PyLong_AsUnsignedLongLong(source.ptr()));
    if (PyErr_Occurred() == nullptr)
      return true;
    PyErr_Clear();
    return false;
  }
};
