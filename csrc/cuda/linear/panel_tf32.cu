#include "cuda/linear/panel_launch.cuh"

namespace mpoe::cuda {

void launch_panel_tf32(const PanelArguments& p, const PanelLaunch& launch, cudaStream_t stream) {
  launch_panel<dev::tf32>(p, launch, stream);
}

}  // namespace mpoe::cuda
