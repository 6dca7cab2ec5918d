// mpoe_embedding: checks, and the kernel of cpu/embedding/embedding.h.
#include "cpu/embedding/embedding.h"

#include "refusal.h"

namespace {

using namespace mpoe;

Embedding checked_inputs(const MpoeEmbedding& call) {
  const Dtype dtype = dtype_named(call.dtype);
  require(
      dtype == Dtype::kFloat32 || dtype == Dtype::kBFloat16, "central must be float32 or bfloat16; got ", call.dtype);
  for (const std::int64_t size : {call.iL, call.jL, call.a, call.iC, call.jC, call.b, call.iR, call.jR})
    require(size >= 1, "left, central and right must have no empty axis");
  const std::int64_t rows = call.iL * call.iC * call.iR, columns = call.jL * call.jC * call.jR;
  require(
      call.num_embeddings >= 0 && call.num_embeddings <= rows, "num_embeddings must lie in 0..", rows, "; got ",
      call.num_embeddings);
  require(
      call.embedding_dim >= 0 && call.embedding_dim <= columns, "embedding_dim must lie in 0..", columns, "; got ",
      call.embedding_dim);
  require_range(call.ids, call.tokens, 0, call.num_embeddings - 1, "ids");
  return {
      .dtype = dtype,
      .tokens = call.tokens,
      .embedding_dim = call.embedding_dim,
      .iL = call.iL,
      .jL = call.jL,
      .a = call.a,
      .iC = call.iC,
      .jC = call.jC,
      .b = call.b,
      .iR = call.iR,
      .jR = call.jR,
      .ids = call.ids,
      .left = call.left,
      .central = call.central,
      .right = call.right,
  };
}

}  // namespace

extern "C" int mpoe_embedding(const MpoeEmbedding* call) {
  return answered([&] { embedding(checked_inputs(*call), call->out); });
}
