#include "cuda/linear/launch.cuh"

namespace mpoe::cuda {

void launch_panel_float16(const PanelArguments& p, const PanelLaunch& launch, cudaStream_t stream) {
  launch_panel<dev::fp16>(p, launch, stream);
}
void launch_gradient_float16(const GradientArguments& p, dim3 grid, bool of_right, cudaStream_t stream) {
  launch_gradient<dev::fp16>(p, grid, of_right, stream);
}

}  // namespace mpoe::cuda
