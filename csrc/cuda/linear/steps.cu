#include "cuda/linear/steps.h"

namespace mpoe::cuda {
namespace {

Axes only_in(const Named& p, const Named& q) {
  Axes found;
  for (const Axis axis : p.axes()) {
    if (!q.has(axis)) found.push_back(axis);
  }
  return found;
}
Axes in_both(const Named& p, const Named& q) {
  Axes found;
  for (const Axis axis : p.axes()) {
    if (q.has(axis)) found.push_back(axis);
  }
  return found;
}

int fitting(int64_t extent) {
  if (extent > 0x7fffffff) throw std::invalid_argument("a dimension of " + std::to_string(extent) + " is too large");
  return static_cast<int>(extent);
}

void launch(const Context& context, const ContractArguments& arguments) {
  contract(context.dtype, context.tf32, arguments, context.stream);
}

}  // namespace

void rows_times_block(const Context& context, const Named& rows, const Named& block, const Named& out,
                      const int64_t* row_index, bool zero_tail, const Epilogue& epilogue) {
  const MapPair m = map_pair(sorted(only_in(rows, block), rows), context.dims, rows, out, true);
  const MapPair k = map_pair(sorted(in_both(rows, block), rows), context.dims, rows, block, false);
  const MapPair n = map_pair(sorted(only_in(block, rows), out), context.dims, out, block, false);
  ContractArguments p;
  p.slot_axis = kSlotsInRows;
  p.a = operand_of(rows, m.first, k.first, true, context.dtype, row_index);
  p.b = operand_of(block, n.second, k.second, false, context.dtype);
  p.out = output_of(out, m.second, n.first, true, false, context.dtype, epilogue);
  const bool shared = block.outer == 0;
  p.groups.offsets = context.offsets;
  p.groups.step = shared ? context.experts : 1;
  p.groups.count = shared ? 1 : context.experts;
  p.groups.per_slot = fitting(m.inner);
  p.groups.slots = context.slots;
  p.groups.zero_tail = zero_tail;
  fitting(m.inner * context.slots);
  p.n = fitting(n.inner);
  p.k = fitting(k.inner);
  launch(context, p);
}

void block_gradient(const Context& context, const Named& rows, const Named& grads, const Named& out,
                    const int64_t* row_index) {
  const MapPair m = map_pair(sorted(in_both(rows, out), rows), context.dims, rows, out, false);
  const MapPair k = map_pair(sorted(in_both(rows, grads), rows), context.dims, rows, grads, true);
  const MapPair n = map_pair(sorted(in_both(grads, out), out), context.dims, out, grads, false);
  const bool shared = out.outer == 0;
  ContractArguments p;
  p.slot_axis = kSlotsInner;
  p.a = operand_of(rows, m.first, k.first, true, context.dtype, row_index);
  p.b = operand_of(grads, n.second, k.second, true, context.dtype);
  p.out = output_of(out, m.second, n.first, false, shared, context.dtype);
  p.out.accumulate = shared;
  p.groups.offsets = context.offsets;
  p.groups.step = shared ? context.experts : 1;
  p.groups.count = shared ? 1 : context.experts;
  p.groups.per_slot = fitting(k.inner);
  fitting(k.inner * context.slots);
  p.m = fitting(m.inner);
  p.n = fitting(n.inner);
  launch(context, p);
}

void merge_blocks(const Context& context, const Named& first, const Named& second, const Named& out) {
  const bool shared = out.outer == 0;
  const MapPair m = map_pair(sorted(only_in(first, second), out), context.dims, out, first, false);
  const MapPair k = map_pair(sorted(in_both(first, second), second), context.dims, first, second, shared);
  const MapPair n = map_pair(sorted(only_in(second, first), out), context.dims, out, second, false);
  ContractArguments r;
  r.slot_axis = kNoSlots;
  r.a = operand_of(first, m.second, k.first, shared, context.dtype);
  r.b = operand_of(second, n.second, k.second, shared, context.dtype);
  r.out = output_of(out, m.first, n.first, false, shared, context.dtype);
  r.out.accumulate = shared;
  r.groups.offsets = shared ? nullptr : context.offsets;
  r.groups.count = shared ? 1 : context.experts;
  r.m = fitting(m.inner);
  r.n = fitting(n.inner);
  r.k = fitting(shared ? k.inner * context.experts : k.inner);
  launch(context, r);
}

}  // namespace mpoe::cuda
