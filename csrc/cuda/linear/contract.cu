#include "cuda/linear/contract.h"

#include <stdexcept>
#include <string>

#include "cuda/device.cuh"

namespace mpoe::cuda {

void check_launch(const char* what) {
  const auto error = cudaGetLastError();
  if (error) throw std::runtime_error(std::string(what) + " could not be launched: " + cudaGetErrorString(error));
}

}  // namespace mpoe::cuda
