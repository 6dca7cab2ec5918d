// Launches of one dtype.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/experts/rows.cuh"
#include "cuda/experts/weights.cuh"

namespace mpoe::cuda {

template <class T, bool kByUnit, bool kGated>
void launch_rows(const ExpertsLaunches& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.slice * p.top_k * p.tiles)), block(kExpertsThreads);
  const std::size_t stages = stage_elements<T>() * sizeof(T);
  const ExpertsArguments& arguments = p;
  if (p.is_backward) {
    LAUNCH((experts_rows_kernel<T, kByUnit, kGated>), grid, block, stages, stream, arguments);
    return check_launch("experts_rows");
  }
  const int h_stride = padded_stride<T>((p.units + kExpertsRows - 1) / kExpertsRows * kExpertsRows);
  const std::size_t bytes = stages + static_cast<std::size_t>(kExpertsRows * h_stride) * sizeof(T);
  const std::size_t limit = dev::limits().shared_bytes, own = sizeof(SlotTile::Shared);
  if (bytes + own > limit) {
    throw std::invalid_argument("experts of " + std::to_string(p.units) + " hidden units need " +
                                std::to_string(bytes + own) + " bytes of shared memory; the device has " +
                                std::to_string(limit));
  }
  LAUNCH((experts_forward_kernel<T, kByUnit, kGated>), grid, block, bytes, stream, arguments, h_stride);
  check_launch("experts_forward");
}

template <class T>
void launch(const ExpertsLaunches& p, cudaStream_t stream) {
  const ExpertsArguments& arguments = p;
  const unsigned experts = static_cast<unsigned>(p.experts);
  if (p.gated()) {
    p.by_unit ? launch_rows<T, true, true>(p, stream) : launch_rows<T, false, true>(p, stream);
  } else {
    p.by_unit ? launch_rows<T, true, false>(p, stream) : launch_rows<T, false, false>(p, stream);
  }
  if (p.weights.tiles > 0) {
    LAUNCH(experts_weights_kernel<T>,
           dim3(experts * static_cast<unsigned>((p.own > 1 ? p.slice : 1) * p.weights.tiles), 3,
                static_cast<unsigned>(p.weights.shares)),
           dim3(kExpertsThreads), stage_elements<T>() * sizeof(T), stream, arguments, p.weights);
    check_launch("experts_weights");
  }
  if (p.dbias) {
    const unsigned units = static_cast<unsigned>(p.slice * p.units + 31) / 32;
    LAUNCH(experts_bias_kernel<T>, dim3(experts, units), dim3(kExpertsThreads), 0, stream, arguments,
           p.gated() ? p.dz : p.dvalue, p.dbias);
    check_launch("experts_bias");
  }
  if (p.first_group + p.slice < p.groups) return;
  int64_t largest = 0;
  for (const PartsSum& sum : p.parts.of) largest = std::max(largest, sum.size);
  if (largest == 0) return;
  LAUNCH(parts_sums_kernel<T>, dim3(static_cast<unsigned>((largest + kExpertsThreads - 1) / kExpertsThreads), 4),
         dim3(kExpertsThreads), 0, stream, p.parts);
  check_launch("parts_sums");
}

}  // namespace mpoe::cuda
