// Grouped MPO linear on raw pointers: y[s] = activation(x[row_index[s]] W_e + bias) for the slots s
// of expert e, with W_e[(iL iC iR), (jL jC jR)] = sum_ab left_e[iL, jL, a] central[a, iC, jC, b]
// right_e[b, iR, jR]. All arrays are dense, of `dtype` (float32 or bfloat16) unless noted
// otherwise; products are summed in float32. Results do not depend on the number of threads.
#pragma once

#include <array>
#include <cstdint>
#include <functional>

#include "common/types.h"
#include "cpu/gemm/gemm.h"

namespace mpoe {

struct BlockDims {
  int64_t iL, jL, a, iC, jC, b, iR, jR;
  int64_t in_features,
      out_features;  // true sizes; the products of the factors may exceed them

  int64_t padded_in() const { return iL * iC * iR; }
  int64_t padded_out() const { return jL * jC * jR; }
  // Elements of central, and of one expert's blocks.
  int64_t central_size() const { return a * iC * jC * b; }
  int64_t left_size() const { return iL * jL * a; }
  int64_t right_size() const { return b * iR * jR; }
};

enum class Operand { kLeft, kCentral, kRight };

// What rows are multiplied by, in order, as the caller planned it.
struct ProductOrder {
  std::array<Operand, 3> chain;
  // half_left: rows meet the half-built weight before right; the same of the problem with i and j
  // exchanged, whose rows are those of dz.
  bool half_first, exchanged_half_first;
};

// The products with central of a separable shape, made by the caller between the steps before and
// after them, on rows in the order of central's matrix [a iC, jC b]: of the forward h = t central;
// of the backward dcentral = t^T dh and dt = dh central^T, whichever are wanted. a iC and b are
// whole units (gemm.h).
struct CentralProduct {
  std::function<void()> multiply;
  void* t;   // [N, a iC]: after left
  void* dh;  // [N, jC b]: the gradient before right; backward only
  void* dt;  // [N, a iC]: the gradient after left; backward only
};

struct LinearInputs {
  Dtype dtype;
  BlockDims dims;
  ProductOrder order;
  const void* x;             // [T, I]
  int64_t tokens;            // T
  const void* left;          // [E, iL, jL, a]
  const void* central;       // [a, iC, jC, b]
  const void* right;         // [E, b, iR, jR]
  int64_t experts;           // E
  const int64_t* offsets;    // [E + 1], non-decreasing, the last one <= slots
  const int64_t* row_index;  // [N], each in 0..T-1; null: slot s reads row s
  int64_t slots;             // N
  Activation activation;
  const CentralProduct* product = nullptr;  // null: by the kernels here

  int64_t filled() const { return offsets[experts]; }
  // Slots of an expert.
  int64_t count(int64_t expert) const { return offsets[expert + 1] - offsets[expert]; }
  int64_t most_slots() const {
    int64_t most = 0;
    for (int64_t e = 0; e < experts; ++e)
      most = count(e) > most ? count(e) : most;
    return most;
  }
};

struct LinearForward : LinearInputs {
  const void* bias;  // [F] or null
  void* y;           // [N, F]; slots past the last offset become zero
  void* h;           // [N * jC, b]: result of the central step of a separable shape, or null if
                     // neither the caller nor its product wants it
  void* saved;       // [N, F]: pre-activation, or null
};

struct LinearBackward : LinearInputs {
  const void* grad;   // [N, F]
  const void* h;      // of the forward, or null (separable: required)
  const void* saved;  // output for relu, pre-activation for the rest, null for none
  // Results; null: not needed.
  void* dx;        // [T, I]
  void* dleft;     // like left
  void* dcentral;  // like central
  void* dright;    // like right
  void* dbias;     // [F]
};

// One pair per strategy of the planner; half_right is half_left of a mirrored problem, which the
// caller makes.
//
// Shapes with jL = iR = 1: left per expert, one dense product with central for all slots, right per
// expert.
void separable_forward(const LinearForward& in);
void separable_backward(const LinearBackward& in);
// One slab of one expert's weight at a time, written as the packed operand of the product that
// consumes it.
void rebuild_forward(const LinearForward& in);
void rebuild_backward(const LinearBackward& in);
// left and central contracted per expert, right applied to activations.
void half_left_forward(const LinearForward& in);
void half_left_backward(const LinearBackward& in);
// Only activations are contracted, block by block.
void chain_forward(const LinearForward& in);
void chain_backward(const LinearBackward& in);

}  // namespace mpoe
