// The emulated kernels behind a C interface, for tests that load them with ctypes. Every call returns 0, or 1 with a
// message in mpoe_emu_error().
#include <cstdlib>
#include <stdexcept>

#include "cuda/embedding.h"
#include "cuda/few.h"
#include "cuda/linear.h"
#include "cuda/panel.h"
#include "cuda/pointwise.h"
#include "cuda/routing.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace mpoe::cuda;

thread_local std::string last_error;

template <class F>
int guarded(F&& call) {
  try {
    call();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

// Scratch memory of exactly the asked size, full of NaN.
struct Scratch {
  explicit Scratch(std::size_t bytes) : data(std::aligned_alloc(256, bytes ? bytes : 256)) {
    if (!data) throw std::bad_alloc();
    std::memset(data, 0xff, bytes);
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data;
};

// sizes: dtype, activation, tf32, E, N, I, F, then iL jL a iC jC b iR jR. pointers: x left central right offsets row_index.
void fill(LinearInputs& p, const int64_t* sizes, const char* program, void* const* pointers) {
  p.dtype = static_cast<mpoe::Dtype>(sizes[0]);
  p.activation = static_cast<int>(sizes[1]);
  p.tf32 = sizes[2] != 0;
  p.experts = static_cast<int>(sizes[3]);
  p.slots = static_cast<int>(sizes[4]);
  p.dims.in_features = static_cast<int>(sizes[5]);
  p.dims.out_features = static_cast<int>(sizes[6]);
  for (int axis = 0; axis < kAxes; ++axis) p.dims.size[axis] = static_cast<int>(sizes[7 + axis]);
  p.program = program;
  p.x = pointers[0];
  p.left = pointers[1];
  p.central = pointers[2];
  p.right = pointers[3];
  p.offsets = static_cast<const int*>(pointers[4]);
  p.row_index = static_cast<const int64_t*>(pointers[5]);
}

}  // namespace

EXPORT const char* mpoe_emu_error() { return last_error.c_str(); }

// order: 0 ascending, 1 descending (blocks too), 2 random. lazy: cp.async copies at the wait, else at issue.
EXPORT void mpoe_emu_config(int order, int lazy, int seed, int planted) {
  auto& config = emu::config();
  config.order = static_cast<emu::Order>(order);
  config.blocks_descending = order == 1;
  config.cp_async_lazy = lazy != 0;
  config.seed = static_cast<std::uint64_t>(seed);
  config.planted = planted;
}

EXPORT void mpoe_emu_limits(int64_t shared_bytes, int multiprocessors) {
  emu::config().max_shared = static_cast<std::size_t>(shared_bytes);
  emu::config().multiprocessors = multiprocessors;
}

// launches, blocks, mma, ldmatrix, wavefronts of ldmatrix, cp.async, barriers; counted since the last call.
EXPORT void mpoe_emu_stats(int64_t* out) {
  auto& stats = emu::stats();
  const std::uint64_t values[] = {stats.launches, stats.blocks,   stats.mma,     stats.ldmatrix,
                                  stats.ldmatrix_wavefronts, stats.cp_async, stats.barriers};
  for (int i = 0; i < 7; ++i) out[i] = static_cast<int64_t>(values[i]);
  stats = {};
}

// Further pointers: bias y h saved. workspace receives the bytes that were needed.
EXPORT int mpoe_emu_linear_forward(const int64_t* sizes, const char* program, void* const* pointers, int64_t* workspace) {
  return guarded([&] {
    LinearForward p;
    fill(p, sizes, program, pointers);
    p.bias = pointers[6];
    p.y = pointers[7];
    p.h = pointers[8];
    p.saved = pointers[9];
    const std::size_t bytes = workspace_bytes(p);
    *workspace = static_cast<int64_t>(bytes);
    const Scratch scratch(bytes);
    linear_forward(p, scratch.data, nullptr);
  });
}

// Further pointers: grad h saved dx dleft dcentral dright dbias.
EXPORT int mpoe_emu_linear_backward(const int64_t* sizes, const char* program, void* const* pointers, int64_t* workspace) {
  return guarded([&] {
    LinearBackward p;
    fill(p, sizes, program, pointers);
    p.grad = pointers[6];
    p.h = pointers[7];
    p.saved = pointers[8];
    p.dx = pointers[9];
    p.dleft = pointers[10];
    p.dcentral = pointers[11];
    p.dright = pointers[12];
    p.dbias = pointers[13];
    const std::size_t bytes = workspace_bytes(p);
    *workspace = static_cast<int64_t>(bytes);
    const Scratch scratch(bytes);
    linear_backward(p, scratch.data, nullptr);
  });
}

// panel: left, centre, right, left_first.
EXPORT int mpoe_emu_panel_bytes(const int64_t* sizes, int transposed, const int64_t* panel, int64_t* bytes) {
  return guarded([&] {
    PanelProduct product;
    product.dtype = static_cast<mpoe::Dtype>(sizes[0]);
    product.tf32 = sizes[2] != 0;
    for (int axis = 0; axis < kAxes; ++axis) product.dims.size[axis] = static_cast<int>(sizes[7 + axis]);
    product.transposed = transposed != 0;
    product.shape = {static_cast<int>(panel[0]), static_cast<int>(panel[1]), static_cast<int>(panel[2]), panel[3] != 0};
    *bytes = static_cast<int64_t>(panel_bytes(product));
  });
}

// few: left, centre, right, rows. pointers: x left central right expert_of_slot row_index bias y saved.
EXPORT int mpoe_emu_few(const int64_t* sizes, const int64_t* few, void* const* pointers) {
  return guarded([&] {
    LinearInputs inputs;
    fill(inputs, sizes, "", pointers);
    FewProduct product;
    product.dtype = inputs.dtype;
    product.dims = inputs.dims;
    product.shape = {static_cast<int>(few[0]), static_cast<int>(few[1]), static_cast<int>(few[2]),
                     static_cast<int>(few[3])};
    product.x = inputs.x;
    product.left = inputs.left;
    product.central = inputs.central;
    product.right = inputs.right;
    product.experts = inputs.experts;
    product.expert_of_slot = static_cast<const int64_t*>(pointers[4]);
    product.row_index = inputs.row_index;
    product.slots = inputs.slots;
    product.y = pointers[7];
    product.epilogue = {pointers[6], inputs.activation, pointers[8]};
    few_product(product, nullptr);
  });
}

EXPORT int mpoe_emu_few_bytes(const int64_t* sizes, const int64_t* few, int64_t* bytes) {
  return guarded([&] {
    FewProduct product;
    product.dtype = static_cast<mpoe::Dtype>(sizes[0]);
    for (int axis = 0; axis < kAxes; ++axis) product.dims.size[axis] = static_cast<int>(sizes[7 + axis]);
    product.shape = {static_cast<int>(few[0]), static_cast<int>(few[1]), static_cast<int>(few[2]),
                     static_cast<int>(few[3])};
    *bytes = static_cast<int64_t>(few_bytes(product));
  });
}

// sizes: dtype, T, I, F, then iL jL a iC jC b iR jR. pointers: ids left central right, then y, or grad dleft dcentral
// dright where backward is not 0.
EXPORT int mpoe_emu_embedding(const int64_t* sizes, void* const* pointers, int backward) {
  return guarded([&] {
    const auto fill_embedding = [&](EmbeddingInputs& p) {
      p.dtype = static_cast<mpoe::Dtype>(sizes[0]);
      p.tokens = static_cast<int>(sizes[1]);
      p.dims.in_features = static_cast<int>(sizes[2]);
      p.dims.out_features = static_cast<int>(sizes[3]);
      for (int axis = 0; axis < kAxes; ++axis) p.dims.size[axis] = static_cast<int>(sizes[4 + axis]);
      p.ids = static_cast<const int64_t*>(pointers[0]);
      p.left = pointers[1];
      p.central = pointers[2];
      p.right = pointers[3];
    };
    if (backward) {
      EmbeddingBackward p;
      fill_embedding(p);
      p.grad = pointers[4];
      p.dleft = pointers[5];
      p.dcentral = pointers[6];
      p.dright = pointers[7];
      const Scratch scratch(workspace_bytes(p));
      embedding_backward(p, scratch.data, nullptr);
    } else {
      EmbeddingForward p;
      fill_embedding(p);
      p.y = pointers[4];
      const Scratch scratch(workspace_bytes(p));
      embedding_forward(p, scratch.data, nullptr);
    }
  });
}

EXPORT int mpoe_emu_sum_rows(int dtype, const void* rows, const int64_t* order, const int64_t* starts, void* out,
                             int tokens, int columns) {
  return guarded([&] { sum_rows(static_cast<mpoe::Dtype>(dtype), rows, order, starts, out, tokens, columns, nullptr); });
}

EXPORT int mpoe_emu_gate(int dtype, const void* logits, float* probabilities, float* weights, int64_t* index, int tokens,
                         int experts, int top_k, int renormalize) {
  return guarded([&] {
    gate(static_cast<mpoe::Dtype>(dtype), logits, probabilities, weights, index, tokens, experts, top_k,
         renormalize != 0, nullptr);
  });
}

EXPORT int mpoe_emu_route(const int64_t* index, const bool* token_mask, int tokens, int top_k, int experts, int capacity,
                          int* offsets, int64_t* token_of_slot, int64_t* slot_of_token) {
  return guarded([&] {
    const Route p{index, token_mask, tokens, top_k, experts, capacity, offsets, token_of_slot, slot_of_token};
    const Scratch scratch(route_workspace_bytes(p));
    route(p, scratch.data, nullptr);
  });
}

EXPORT int mpoe_emu_dispatch(int dtype, const void* x, int64_t x_stride, const int64_t* token_of_slot, const int* filled,
                             void* out, int slots, int columns) {
  return guarded([&] {
    dispatch(static_cast<mpoe::Dtype>(dtype), x, x_stride, token_of_slot, filled, out, slots, columns, nullptr);
  });
}

EXPORT int mpoe_emu_combine(int dtype, const void* rows, const int64_t* slot_of_token, const float* gates, void* out,
                            int tokens, int top_k, int columns) {
  return guarded([&] {
    combine(static_cast<mpoe::Dtype>(dtype), rows, slot_of_token, gates, out, tokens, top_k, columns, nullptr);
  });
}

EXPORT int mpoe_emu_combine_backward(int dtype, const void* grad, const void* rows, const int64_t* token_of_slot,
                                     const int64_t* slot_of_token, const float* gates, void* drows, float* dgates,
                                     int slots, int top_k, int columns) {
  return guarded([&] {
    combine_backward(static_cast<mpoe::Dtype>(dtype), grad, rows, token_of_slot, slot_of_token, gates, drows, dgates,
                     slots, top_k, columns, nullptr);
  });
}
