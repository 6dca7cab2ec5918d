// Small kernels with one mistake each, switched on at run time: what the emulator and the
// sanitizers must detect.
#pragma once
#include "cuda/device.cuh"
#include "cuda/tile.cuh"

namespace emu_probes {

using mpoe::cuda::Fragments;

// out = in, reversed, through shared memory. Mistake: no barrier between writing and reading.
inline __global__ void reverse(const int* in, int* out, int count, bool mistake) {
  DYN_SHARED(int, values);
  const int i = threadIdx.x;
  if (i < count)
    values[i] = in[i];
  if (!mistake)
    __syncthreads();
  if (i < count)
    out[i] = values[count - 1 - i];
}

// Copies through two stages of cp.async. Mistake: the wait leaves one copy too many in flight.
inline __global__ void pipeline(const int* in, int* out, int steps, bool mistake) {
  DYN_SHARED(int, stages);  // [2][4 * 32 threads]
  const int width = 4 * 32;
  const int mine = 4 * static_cast<int>(threadIdx.x);
  const auto load = [&](int step) {
    const dev::Shared to = dev::shared_address(stages + step % 2 * width + mine);
    if (step < steps)
      dev::cp_async16(to, in + step * width + mine, true);
    dev::cp_async_commit();
  };
  load(0);
  for (int step = 0; step < steps; ++step) {
    load(step + 1);
    if (mistake) {
      dev::cp_async_wait<2>();
    } else {
      dev::cp_async_wait<1>();
    }
    __syncthreads();
    for (int k = 0; k < 4; ++k)
      out[step * width + mine + k] = stages[step % 2 * width + (mine + k + 4) % width];
    __syncthreads();
  }
}

// Mistake: the two halves of the block wait at different barriers.
inline __global__ void meeting(const int* in, int* out, int count, bool mistake) {
  const int i = threadIdx.x;
  if (mistake && i >= count / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[i] = in[i];
}

// Mistake: a lane leaves before the warp's vote that names it.
inline __global__ void vote(const int* in, int* out, int, bool mistake) {
  const int i = threadIdx.x;
  if (mistake && i == 3)
    return;
  out[i] = static_cast<int>(__ballot_sync(dev::kFullWarp, in[i] % 2));
}

// Mistake: reads one element past the end of global memory.
inline __global__ void shifted(const int* in, int* out, int count, bool mistake) {
  const int i = threadIdx.x;
  if (i < count)
    out[i] = in[i + (mistake ? 1 : 0)];
}

// Mistake: reads shared memory that nobody wrote.
inline __global__ void partial(const int* in, int* out, int count, bool mistake) {
  DYN_SHARED(int, values);
  const int i = threadIdx.x;
  if (i < count - (mistake ? 1 : 0))
    values[i] = in[i];
  __syncthreads();
  if (i < count)
    out[i] = values[i];
}

// Fragments of a 16 x 64 tile read by one warp. Mistake: rows of the tile are not padded, so that
// their banks collide.
inline __global__ void padded(const int*, int* out, int, bool mistake) {
  using T = dev::bf16;
  DYN_SHARED(T, tile);
  const int lane = threadIdx.x;
  const int stride = mistake ? 64 : mpoe::cuda::padded_stride<T>(64);
  for (int i = lane; i < 16 * 64; i += 32)
    tile[i / 64 * stride + i % 64] = dev::from_float<T>(static_cast<float>(i % 64));
  __syncthreads();
  for (int k = 0; k < 64; k += 16) {
    Fragments<T>::A a;
    Fragments<T>::load_a<true>(a, mpoe::cuda::InShared<T>(tile), stride, 0, k, lane);
    out[k / 16 * 32 + lane] = static_cast<int>(a.r[0]);
  }
}

}  // namespace emu_probes
