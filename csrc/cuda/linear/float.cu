#include "cuda/linear/launch.cuh"

namespace mpoe::cuda {

void launch_panel_float(const PanelArguments& p, const PanelLaunch& launch, cudaStream_t stream) {
  launch_panel<float>(p, launch, stream);
}
void launch_gradient_float(const GradientArguments& p, dim3 grid, bool of_right, cudaStream_t stream) {
  launch_gradient<float>(p, grid, of_right, stream);
}

}  // namespace mpoe::cuda
