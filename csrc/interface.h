// The C interface of the library: what mpoe_kernels/native_interface.py declares too, field by field. It needs no
// headers of torch or Python, so that the library is built without either and serves every version of both.
//
// Arrays are dense and row-major, of the struct's `dtype` unless said otherwise. The caller has made sure that each holds as
// many elements as the sizes in the struct say; everything else is checked here, before memory is touched.
#pragma once

#include <cstdint>

// The only names that the library shows.
#pragma GCC visibility push(default)
extern "C" {

// What a function returns; unless it is kDone, mpoe_message() says why, in the thread that called.
enum MpoeStatus : int { kDone = 0, kBadValue = 1, kNoMemory = 2 };

// y[s] = activation(x[row_index[s]] W_e + bias), and its gradients; see cpu/linear/linear.h.
struct MpoeLinear {
  const char* dtype;       // float32, bfloat16
  const char* activation;  // none, relu, gelu, gelu_tanh, silu
  const char* strategy;    // separable, rebuild, half_left, half_right, chain
  std::int64_t in_features, out_features, tokens, slots, experts;
  std::int64_t iL, jL, a, iC, jC, b, iR, jR;
  std::int64_t offset_bytes;    // of one of the offsets: 4 or 8
  const void* x;                // [tokens, in_features]
  const void* left;             // [experts, iL, jL, a]
  const void* central;          // [a, iC, jC, b]
  const void* right;            // [experts, b, iR, jR]
  const void* offsets;          // [experts + 1], int32 or int64
  const std::int64_t* rows;     // [slots]; null: slot s reads row s, and slots = tokens
  // Forward:
  const void* bias;  // [out_features] or null
  void* y;           // [slots, out_features]
  void* h;           // [slots * jC, b] or null: kept for the backward, by strategy separable alone
  void* z;           // [slots, out_features] or null: the pre-activation
  // Backward:
  const void* grad;        // [slots, out_features]
  const void* kept_h;      // h of the forward; read by strategy separable
  const void* kept_value;  // [slots, out_features]: y for relu, z for the rest; not read where activation is none
  void *dx, *dleft, *dcentral, *dright, *dbias;  // as x, left, central, right, bias; null where not wanted
};
int mpoe_linear_forward(const MpoeLinear* call);
int mpoe_linear_backward(const MpoeLinear* call);

// Logits, best experts and gates of few tokens; see cpu/routing/routing.h.
struct MpoeGating {
  const char *dtype, *weight_dtype;  // float32, bfloat16, float16
  std::int64_t tokens, features, experts, top_k;
  std::int64_t raw;     // 1: gates are probabilities; 0: they sum to 1
  const void* x;        // [tokens, features]
  const void* weight;   // [experts, features], of weight_dtype
  float* logits;        // [tokens, experts]
  std::int64_t* index;  // [tokens, top_k]
  float* gates;         // [tokens, top_k]
};
int mpoe_gating(const MpoeGating* call);

// Slots of (token, choice) pairs, in the order of their experts; see cpu/routing/routing.h.
struct MpoeRoute {
  std::int64_t tokens, top_k, experts;
  std::int64_t capacity;         // most slots of an expert; negative: no limit
  const std::int64_t* index;     // [tokens, top_k]
  const bool* token_mask;        // [tokens] or null
  std::int32_t* offsets;         // [experts + 1]
  std::int64_t* token_of_slot;   // [tokens * top_k]
  std::int64_t* slot_of_token;   // [tokens, top_k]
};
int mpoe_route(const MpoeRoute* call);

// out[s] = x[token_of_slot[s]] for the slots before the last offset, 0 in those past it.
struct MpoeDispatch {
  std::int64_t tokens, slots, experts;
  std::int64_t row_bytes, stride_bytes;  // of a row of x, and from one row to the next
  std::int64_t offset_bytes;             // of one of the offsets: 4 or 8
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
  const void* rows;                   // [slots, features]; of the gradients, those of the gates alone read it
  void* out;                          // [tokens, features]
  // Gradients:
  const void* grad;  // [tokens, features]
  void* drows;       // [slots, features] or null
  void* dgates;      // as gates, or null
};
int mpoe_combine(const MpoeCombine* call);
int mpoe_combine_backward(const MpoeCombine* call);

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
  void* out;                  // [tokens, features]
  // Gradients:
  const void* grad;  // [tokens, features]
  void *du, *dgates, *dright, *dleft, *dbias, *du_gate, *dright_gate;  // as their names; null where not wanted
};
int mpoe_hidden_experts(const MpoeHidden* call);
// The experts that a router chooses: its results are the call's gates and index.
int mpoe_routed_hidden_experts(const MpoeGating* router, const MpoeHidden* call);
int mpoe_hidden_experts_backward(const MpoeHidden* call);

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

// The last refusal of this thread; never null.
const char* mpoe_message(void);
// "key=value" lines: what the library was built from, which instructions it uses here, the bytes of each struct above.
const char* mpoe_build_info(void);

// Threads are torch's: its functions of these types, in any order before the first call that computes.
typedef int (*MpoeParallelFor)(
    std::int64_t begin, std::int64_t end, std::int64_t grain, void (*function)(std::int64_t, std::int64_t, void*),
    void* context);
typedef int (*MpoeGetNumThreads)(std::uint32_t* count);
void mpoe_use_threads(MpoeParallelFor parallel_for, MpoeGetNumThreads get_num_threads);

}  // extern "C"
#pragma GCC visibility pop
