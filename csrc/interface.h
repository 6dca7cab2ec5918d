// The C interface of the library, mirrored field by field in mpoe_kernels/native_library.py. It needs no torch or
// Python headers, so the library is built without either and works with every version of both.
//
// Arrays are dense, row-major and of the struct's `dtype` unless noted otherwise. The caller guarantees that each has
// the number of elements that the struct's sizes imply; everything else is checked here, before memory is touched.
#pragma once

#include <cstdint>

// The only symbols that the library exports.
#pragma GCC visibility push(default)
extern "C" {

// What every function returns. If it is not kDone, mpoe_message() says why, on the calling thread.
enum MpoeStatus : int { kDone = 0, kBadValue = 1, kNoMemory = 2 };

// y[s] = activation(x[row_index[s]] W_e + bias), and its gradients; see cpu/linear/linear.h.
struct MpoeLinear {
  const char* dtype;       // float32, bfloat16
  const char* activation;  // none, relu, gelu, gelu_tanh, silu
  const char* strategy;    // separable, rebuild, half_left, half_right, chain
  std::int64_t in_features, out_features, tokens, slots, experts;
  std::int64_t iL, jL, a, iC, jC, b, iR, jR;
  // What rows are multiplied by. chain: a permutation of left (0), central (1) and right (2). half_left, half_right: 1
  // if rows meet the half-built weight before the remaining block, else 0; the same for rows of the gradient.
  std::int64_t chain_first, chain_second, chain_third, half_first, transposed_half_first;
  std::int64_t offset_bytes;    // of one offset: 4 or 8
  const void* x;                // [tokens, in_features]
  const void* left;             // [experts, iL, jL, a]
  const void* central;          // [a, iC, jC, b]
  const void* right;            // [experts, b, iR, jR]
  const void* offsets;          // [experts + 1], int32 or int64
  const std::int64_t* rows;     // [slots]; null: slot s reads row s, and slots = tokens
  // Forward:
  const void* bias;  // [out_features] or null
  void* y;           // [slots, out_features]
  void* h;           // [slots * jC, b] or null: saved for the backward, only by strategy separable
  void* z;           // [slots, out_features] or null: the pre-activation
  // Backward:
  const void* grad;        // [slots, out_features]
  const void* kept_h;      // h of the forward; read only by strategy separable
  const void* kept_value;  // [slots, out_features]: y for relu, z for the rest; not read if activation is none
  void *dx, *dleft, *dcentral, *dright, *dbias;  // like x, left, central, right, bias; null: not wanted
};
int mpoe_linear_forward(const MpoeLinear* call);
int mpoe_linear_backward(const MpoeLinear* call);

// A router's logits, best experts and gates, and the gradients of its logits; see cpu/router/router.h.
struct MpoeRouter {
  const char *dtype, *weight_dtype;  // float32, bfloat16 and, but for gradients, float16
  std::int64_t tokens, features, experts;
  std::int64_t top_k, raw;  // raw: 1: gates are probabilities; 0: they sum to 1. Not used by mpoe_router_logits.
  const void* x;            // [tokens, features]
  const void* weight;       // [experts, features], of weight_dtype
  float* logits;            // [tokens, experts]
  std::int64_t* index;      // [tokens, top_k]
  float* gates;             // [tokens, top_k]
  // Gradients:
  const float* grad;   // [tokens, experts]
  void *dx, *dweight;  // like x and weight; null: not wanted
};
int mpoe_gating(const MpoeRouter* call);
int mpoe_router_logits(const MpoeRouter* call);
int mpoe_router_logits_backward(const MpoeRouter* call);

// Slots of (token, choice) pairs, in the order of their experts; see cpu/routing/routing.h.
struct MpoeRoute {
  std::int64_t tokens, top_k, experts;
  std::int64_t capacity;         // most slots per expert; negative: no limit
  const std::int64_t* index;     // [tokens, top_k]
  const bool* token_mask;        // [tokens] or null
  std::int32_t* offsets;         // [experts + 1]
  std::int64_t* token_of_slot;   // [tokens * top_k]
  std::int64_t* slot_of_token;   // [tokens, top_k]
};
int mpoe_route(const MpoeRoute* call);

// out[s] = x[token_of_slot[s]] for the slots before the last offset, 0 for the rest.
struct MpoeDispatch {
  std::int64_t tokens, slots, experts;
  std::int64_t row_bytes, stride_bytes;  // of a row of x, and from one row to the next
  std::int64_t offset_bytes;             // of one offset: 4 or 8
  const void* x;
  const std::int64_t* token_of_slot;  // [slots]
  const void* offsets;                // [experts + 1], int32 or int64
  void* out;  // [slots, row_bytes]
};
int mpoe_dispatch(const MpoeDispatch* call);

// out[t] = sum_k gates[t, k] rows[slot_of_token[t, k]], and its gradients.
struct MpoeCombine {
  const char* dtype;  // float32, float64, bfloat16, float16
  std::int64_t tokens, top_k, slots, features;
  const std::int64_t* slot_of_token;  // [tokens, top_k]
  const void* gates;                  // [tokens, top_k], float32 (float64 for float64); null: all 1
  const void* rows;                   // [slots, features]; among the gradients, only dgates needs it
  void* out;                          // [tokens, features]
  // Gradients:
  const void* grad;  // [tokens, features]
  void* drows;       // [slots, features] or null
  void* dgates;      // like gates, or null
};
int mpoe_combine(const MpoeCombine* call);
int mpoe_combine_backward(const MpoeCombine* call);

// A mixture's forward: mpoe_gating, mpoe_route, the products (up times gate, if there is one; down), mpoe_combine. The
// caller hands each the arrays that the ones before it write.
int mpoe_routed_ffn(
    const MpoeRouter* router, const MpoeRoute* slots, const MpoeLinear* up,
    const MpoeLinear* gate, const MpoeLinear* down, const MpoeCombine* combined);

// o[t, g] = sum_k gates[t, k] act(u[t, g] right_e + bias_e) left_e, and its gradients; see cpu/hidden_experts.
struct MpoeHidden {
  const char* dtype;       // float32, bfloat16
  const char* activation;  // as above
  std::int64_t tokens, features, block, experts, own_groups, top_k;
  const void* u;              // [tokens, features]
  const void* u_gate;         // the same, or null
  const float* gates;         // [tokens, top_k]
  const std::int64_t* index;  // [tokens, top_k]
  const void* right;          // [experts, own_groups, block, block]
  const void* left;           // the same
  const void* right_gate;     // the same; with u_gate
  const void* bias;           // [experts, features] or null
  void* out;                  // [tokens, features]; may be u
  // Gradients:
  const void* grad;  // [tokens, features]
  void *du, *dgates, *dright, *dleft, *dbias, *du_gate, *dright_gate;  // like their namesakes; null: not wanted
};
int mpoe_hidden_experts(const MpoeHidden* call);
// The same, after a router has chosen the experts: it writes the call's gates and index.
int mpoe_routed_hidden_experts(const MpoeRouter* router, const MpoeHidden* call);
int mpoe_hidden_experts_backward(const MpoeHidden* call);

// o[t] = sum_k gates[t, k] act(x[t] up_e^T + bias_e) down_e, and its gradients; see cpu/neurons.
struct MpoeNeurons {
  const char* dtype;       // float32, bfloat16
  const char* activation;  // as above
  std::int64_t tokens, in_features, out_features, neurons, experts, top_k;
  const void* x;              // [tokens, in_features]
  const float* gates;         // [tokens, top_k]
  const std::int64_t* index;  // [tokens, top_k]
  const void* up;             // [experts, neurons, in_features]
  const void* down;           // [experts, neurons, out_features]
  const void* bias;           // [experts, neurons] or null
  const void* gate_up;        // like up, or null
  void* out;                  // [tokens, out_features]
  // Gradients:
  const void* grad;  // [tokens, out_features]
  void *dx, *dgates, *dup, *ddown, *dbias, *dgate_up;  // like their namesakes; null: not wanted
};
int mpoe_neuron_experts(const MpoeNeurons* call);
int mpoe_neuron_experts_backward(const MpoeNeurons* call);

// out[t] = row ids[t] of the table of three blocks; see cpu/embedding/embedding.h.
struct MpoeEmbedding {
  const char* dtype;  // float32, bfloat16
  std::int64_t tokens, num_embeddings, embedding_dim;
  std::int64_t iL, jL, a, iC, jC, b, iR, jR;
  const std::int64_t* ids;  // [tokens]
  const void* left;         // [iL, jL, a]
  const void* central;      // [a, iC, jC, b]
  const void* right;        // [b, iR, jR]
  void* out;                // [tokens, embedding_dim]
};
int mpoe_embedding(const MpoeEmbedding* call);

// The message of this thread's last refused call; never null.
const char* mpoe_message(void);
// "key=value" lines: how the library was built, which instruction set it uses here, and the size of each struct above.
const char* mpoe_build_info(void);

// Makes the kernels use torch's threads, through torch's functions of these types. To be called before any kernel.
typedef int (*MpoeParallelFor)(
    std::int64_t begin, std::int64_t end, std::int64_t grain, void (*function)(std::int64_t, std::int64_t, void*),
    void* context);
typedef int (*MpoeGetNumThreads)(std::uint32_t* count);
void mpoe_use_threads(MpoeParallelFor parallel_for, MpoeGetNumThreads get_num_threads);

}  // extern "C"
#pragma GCC visibility pop
