// mpoe_cuda::build_info: how this module was built, as "key=value" lines.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

#define MPOE_TEXT(number) #number
#define MPOE_VALUE(number) MPOE_TEXT(number)

std::string build_info() {
  return "version=" MPOE_VERSION "\ntorch=" MPOE_TORCH_VERSION
         "\ncompiler=nvcc " MPOE_VALUE(__CUDACC_VER_MAJOR__) "." MPOE_VALUE(
             __CUDACC_VER_MINOR__) "\narchitectures=" MPOE_CUDA_ARCHITECTURES "\n";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mpoe_cuda, m) {
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mpoe_cuda, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
