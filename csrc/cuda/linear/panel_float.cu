#include "cuda/linear/panel_launch.cuh"

namespace mpoe::cuda {

void launch_panel_float(const PanelArguments& p, const PanelLaunch& launch, cudaStream_t stream) {
  launch_panel<float>(p, launch, stream);
}

}  // namespace mpoe::cuda
