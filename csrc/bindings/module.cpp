// The Python module mpoe_kernels._C: what it reports about itself, and the checks that its
// functions share.
#include "bindings/bindings.h"

#include <new>
#include <string>

#include "common/cpu_features.h"
#include "cpu/routing/routing.h"

namespace mpoe {
namespace {

// "key=value" lines: how the library was built, and which instruction set it uses here.
std::string build_info() {
  std::string text = "version=" MPOE_VERSION "\ntorch=any\nbindings=" MPOE_BINDINGS "\n";
#if defined(__clang__)
  text += "compiler=clang " __clang_version__ "\n";
#else
  text += "compiler=gcc " __VERSION__ "\n";
#endif
#if defined(__x86_64__)
  text += "isa_compiled=generic avx2 avx512 avx512bf16 amx\n";
#else
  text += "isa_compiled=generic\n";
#endif
  text += std::string("isa_detected=") + isa_name(detected_isa()) + "\n";
  text += std::string("isa_used=") + isa_name(active_isa()) + "\n";
  return text;
}

void translate_no_memory(std::exception_ptr thrown) {
  try {
    std::rethrow_exception(thrown);
  } catch (const std::bad_alloc&) {
    PyErr_SetString(PyExc_MemoryError,
                    "the native kernels got no memory for what they compute with");
  }
}

}  // namespace

Dtype dtype_named(std::string_view name) {
  if (name == "float32")
    return Dtype::kFloat32;
  if (name == "bfloat16")
    return Dtype::kBFloat16;
  if (name == "float16")
    return Dtype::kFloat16;
  if (name == "float64")
    return Dtype::kFloat64;
  refuse("dtype must be float32, bfloat16, float16 or float64; got ", name);
}

Dtype gemm_dtype_named(std::string_view name) {
  const Dtype dtype = dtype_named(name);
  require(dtype == Dtype::kFloat32 || dtype == Dtype::kBFloat16,
          "x must be float32 or bfloat16; got ",
          name);
  return dtype;
}

Activation activation_named(std::string_view name) {
  if (name == "none")
    return Activation::kNone;
  if (name == "relu")
    return Activation::kRelu;
  if (name == "gelu")
    return Activation::kGelu;
  if (name == "gelu_tanh" || name == "gelu_new")
    return Activation::kGeluTanh;
  if (name == "silu")
    return Activation::kSilu;
  refuse("unknown activation ", name);
}

void require_range(
    const int64_t* values, int64_t count, int64_t low, int64_t high, const char* name) {
  const int64_t bad = first_outside(values, count, low, high);
  if (bad >= 0)
    refuse(name, " must lie in ", low, "..", high, "; got ", values[bad]);
}

std::vector<int64_t> checked_offsets(Address offsets,
                                     int64_t offset_bytes,
                                     int64_t experts,
                                     int64_t slots) {
  require(
      experts >= 1, "expert_offsets must be [E + 1] for at least one expert; got E = ", experts);
  require(offset_bytes == 4 || offset_bytes == 8, "expert_offsets must be int32 or int64");
  const int32_t* narrow = offsets;
  const int64_t* wide = offsets;
  std::vector<int64_t> values(experts + 1);
  int64_t before = 0;
  for (int64_t e = 0; e <= experts; ++e) {
    const int64_t value = offset_bytes == 4 ? narrow[e] : wide[e];
    require(value >= before && value <= slots && (e > 0 || value == 0),
            "expert_offsets must start at 0, not fall, and end at ",
            slots,
            " at most; got ",
            value);
    values[e] = value;
    before = value;
  }
  return values;
}

}  // namespace mpoe

PYBIND11_MODULE(_C, module) {
  pybind11::register_local_exception_translator(mpoe::translate_no_memory);
  module.def("build_info", mpoe::build_info);
  mpoe::bind_threads(module);
  mpoe::bind_routing(module);
  mpoe::bind_router(module);
  mpoe::bind_linear(module);
  mpoe::bind_experts(module);
  mpoe::bind_ffn(module);
}
