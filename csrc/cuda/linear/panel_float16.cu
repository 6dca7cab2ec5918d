#include "cuda/linear/panel_launch.cuh"

namespace mpoe::cuda {

void launch_panel_float16(const PanelArguments& p, const PanelLaunch& launch, cudaStream_t stream) {
  launch_panel<dev::fp16>(p, launch, stream);
}

}  // namespace mpoe::cuda
