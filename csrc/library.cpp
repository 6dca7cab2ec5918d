// What the library reports about itself, and the checks that all functions of its interface share.
#include <cstring>

#include "common/cpu_features.h"
#include "cpu/routing/routing.h"
#include "refusal.h"

namespace mpoe {
namespace {

thread_local std::string message;

std::string build_info() {
  std::string text = "version=" MPOE_VERSION "\ntorch=any\n";
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
  text += "struct_bytes=";
  const char* space = "";
  for (const std::size_t bytes :
       {sizeof(MpoeLinear), sizeof(MpoeRouter), sizeof(MpoeRoute), sizeof(MpoeDispatch), sizeof(MpoeCombine),
        sizeof(MpoeHidden), sizeof(MpoeNeurons), sizeof(MpoeEmbedding)}) {
    text += space + std::to_string(bytes);
    space = " ";
  }
  text += "\n";
  return text;
}

}  // namespace

void set_message(std::string text) { message = std::move(text); }

Dtype dtype_named(const char* name) {
  if (std::strcmp(name, "float32") == 0) return Dtype::kFloat32;
  if (std::strcmp(name, "bfloat16") == 0) return Dtype::kBFloat16;
  if (std::strcmp(name, "float16") == 0) return Dtype::kFloat16;
  if (std::strcmp(name, "float64") == 0) return Dtype::kFloat64;
  refuse("dtype must be float32, bfloat16, float16 or float64; got ", name);
}

Activation activation_named(const char* name) {
  if (std::strcmp(name, "none") == 0) return Activation::kNone;
  if (std::strcmp(name, "relu") == 0) return Activation::kRelu;
  if (std::strcmp(name, "gelu") == 0) return Activation::kGelu;
  if (std::strcmp(name, "gelu_tanh") == 0 || std::strcmp(name, "gelu_new") == 0) return Activation::kGeluTanh;
  if (std::strcmp(name, "silu") == 0) return Activation::kSilu;
  refuse("unknown activation ", name);
}

void require_range(
    const std::int64_t* values, std::int64_t count, std::int64_t low, std::int64_t high, const char* name) {
  const std::int64_t bad = first_outside(values, count, low, high);
  if (bad >= 0) refuse(name, " must lie in ", low, "..", high, "; got ", values[bad]);
}

std::vector<std::int64_t> checked_offsets(
    const void* offsets, std::int64_t offset_bytes, std::int64_t experts, std::int64_t slots) {
  require(experts >= 1, "expert_offsets must be [E + 1] for at least one expert; got E = ", experts);
  require(offset_bytes == 4 || offset_bytes == 8, "expert_offsets must be int32 or int64");
  std::vector<std::int64_t> values(static_cast<std::size_t>(experts + 1));
  std::int64_t before = 0;
  for (std::int64_t e = 0; e <= experts; ++e) {
    const std::int64_t value = offset_bytes == 4 ? static_cast<const std::int32_t*>(offsets)[e]
                                                 : static_cast<const std::int64_t*>(offsets)[e];
    require(
        value >= before && value <= slots && (e > 0 || value == 0), "expert_offsets must start at 0, not fall, and end at ",
        slots, " at most; got ", value);
    values[static_cast<std::size_t>(e)] = before = value;
  }
  return values;
}

}  // namespace mpoe

extern "C" {

const char* mpoe_message() { return mpoe::message.c_str(); }

const char* mpoe_build_info() {
  static const std::string text = mpoe::build_info();
  return text.c_str();
}

}  // extern "C"
