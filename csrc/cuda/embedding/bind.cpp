// embedding_forward, embedding_backward: checks, allocation, and the launches of embedding.h.
#include "cuda/bind.h"

#include <tuple>

#include "cuda/embedding/embedding.h"

namespace mpoe::cuda {
namespace {

// Dense tensors behind an EmbeddingInputs; must outlive it.
struct Table {
  Tensor ids, left, central, right;

  Table(const Tensor& ids_, const Tensor& left_, const Tensor& central_, const Tensor& right_)
      : ids(dense_index(ids_, 1, "ids")), left(dense(left_)), central(dense(central_)), right(dense(right_)) {
    check_same_device({&central, &ids, &left, &right});
    MPOE_CHECK(
        left.dim() == 4 && central.dim() == 4 && right.dim() == 4 && left.size(0) == 1 && right.size(0) == 1 &&
            left.size(3) == central.size(0) && central.size(3) == right.size(1),
        "blocks must be left [1, iL, jL, a], central [a, iC, jC, b], right [1, b, iR, jR]");
    for (const Tensor* block : {&left, &right})
      MPOE_CHECK(block->scalar_type() == central.scalar_type(), "blocks must have one dtype");
  }

  void fill(EmbeddingInputs& in, int64_t num_embeddings, int64_t embedding_dim, bool tf32) const {
    in.dtype = kernel_dtype(central, "the blocks");
    in.dims = dims_of(left, central, right, num_embeddings, embedding_dim);
    in.tf32 = tf32;
    in.ids = ids.const_data_ptr<int64_t>();
    in.tokens = counted(ids.size(0), "the number of ids");
    in.left = left.const_data_ptr();
    in.central = central.const_data_ptr();
    in.right = right.const_data_ptr();
  }
};

Tensor embedding_forward_op(const Tensor& ids, const Tensor& left, const Tensor& central, const Tensor& right,
                            int64_t num_embeddings, int64_t embedding_dim, bool tf32) {
  const OnDevice device(central);
  const Table table(ids, left, central, right);
  EmbeddingForward in;
  table.fill(in, num_embeddings, embedding_dim, tf32);
  Tensor y = torch::stable::new_empty(central, {in.tokens, embedding_dim});
  in.y = y.mutable_data_ptr();
  const Scratch scratch(central, workspace_bytes(in));
  embedding_forward(in, scratch.data(), device.stream());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> embedding_backward_op(const Tensor& grad, const Tensor& ids, const Tensor& left,
                                                         const Tensor& central, const Tensor& right,
                                                         int64_t num_embeddings, int64_t embedding_dim, bool tf32) {
  const OnDevice device(central);
  const Table table(ids, left, central, right);
  EmbeddingBackward in;
  table.fill(in, num_embeddings, embedding_dim, tf32);
  check_same_device({&central, &grad});
  MPOE_CHECK(
      grad.dim() == 2 && grad.size(0) == in.tokens && grad.size(1) == embedding_dim &&
          grad.scalar_type() == central.scalar_type(),
      "grad must be [", in.tokens, ", ", embedding_dim, "] of the dtype of the blocks");
  const Tensor rows = dense(grad);
  in.grad = rows.const_data_ptr();
  Tensor dleft = torch::stable::new_empty(central, left.sizes());
  Tensor dcentral = torch::stable::new_empty(central, central.sizes());
  Tensor dright = torch::stable::new_empty(central, right.sizes());
  in.dleft = dleft.mutable_data_ptr();
  in.dcentral = dcentral.mutable_data_ptr();
  in.dright = dright.mutable_data_ptr();
  const Scratch scratch(central, workspace_bytes(in));
  embedding_backward(in, scratch.data(), device.stream());
  return {dleft, dcentral, dright};
}

}  // namespace
}  // namespace mpoe::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(MPOE_CUDA_OPS, m) {
  m.def(
      "embedding_forward(Tensor ids, Tensor left, Tensor central, Tensor right, int num_embeddings, int embedding_dim, "
      "bool tf32) -> Tensor");
  m.def(
      "embedding_backward(Tensor grad, Tensor ids, Tensor left, Tensor central, Tensor right, int num_embeddings, "
      "int embedding_dim, bool tf32) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MPOE_CUDA_OPS, MPOE_CUDA_KEY, m) {
  m.impl("embedding_forward", TORCH_BOX(&mpoe::cuda::embedding_forward_op));
  m.impl("embedding_backward", TORCH_BOX(&mpoe::cuda::embedding_backward_op));
}
