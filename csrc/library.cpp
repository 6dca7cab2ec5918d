// mpoe_native::build_info: what this module was built from and which instructions it uses here.
// Private ops of the backends; the public mpoe:: ops, with fake and autograd, are defined in Python.
#include <torch/csrc/stable/library.h>

#include <string>

#include "common/cpu_features.h"

namespace {

// "key=value" lines.
std::string build_info() {
  std::string text = "version=" MPOE_VERSION "\ntorch=" MPOE_TORCH_VERSION "\n";
#if defined(__clang__)
  text += "compiler=clang " __clang_version__ "\n";
#else
  text += "compiler=gcc " __VERSION__ "\n";
#endif
#if defined(__x86_64__)
  text += "isa_compiled=generic avx2 avx512 avx512bf16\n";
#else
  text += "isa_compiled=generic\n";
#endif
  text += std::string("isa_detected=") + mpoe::isa_name(mpoe::detected_isa()) + "\n";
  text += std::string("isa_used=") + mpoe::isa_name(mpoe::active_isa()) + "\n";
  return text;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mpoe_native, m) { m.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(mpoe_native, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }
