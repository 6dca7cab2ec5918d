// The forward and the backward of hidden-side experts. For each chunk of rows of one expert and group
// (hidden_rows.h), in the names of the members below, R and L being its right and its left block:
//
//              without a gate             gated experts
//   forward                               value = x R
//              z = x R + bias             z = x_gate R_gate + bias
//              h = act(z)                 h = act(z) value
//              out += gates h L           the same
//   backward   dh = grad L^T              the same
//              dz = gates dh act'(z)      dz = gates dh value act'(z)
//              dvalue = dz                dvalue = gates dh act(z)
//              dgates = <h, dh>           the same
//              dleft += (gates h)^T grad  the same
//              dright += x^T dvalue       and dright_gate += x_gate^T dz
//              dx += dvalue R^T           and dx_gate += dz R_gate^T
//              dbias += dz                the same
//
// Part of the bodies of each instruction set; nothing here may use inline functions that other files
// share.
#pragma once

#include "cpu/experts/hidden_rows.h"
#include "cpu/experts/turn_back.h"

namespace mpoe {
namespace {

// Of an expert: packing its blocks costs more than reading them per row.
constexpr int64_t kFewHiddenRows = 3;

// `vectors` of one row times an unpacked block [b, b] from a column on. Not inlined:
// tests/native/test_hot_loops.py finds it.
template <class T, int vectors>
[[gnu::noinline]] void few_columns(const T* row, const T* block, int64_t size, float* out) {
  Floats sum[vectors] = {};
  for (int64_t i = 0; i < size; ++i) {
    const Floats value = splat_of(row + i);
    for (int v = 0; v < vectors; ++v)
      sum[v] = multiply_add(value, load_floats(block + i * size + v * kWidth), sum[v]);
  }
  for (int v = 0; v < vectors; ++v)
    store_floats(out + v * kWidth, sum[v]);
}

// out [b] = row times an unpacked block.
template <class T>
void row_times_block(const T* row, const T* block, int64_t size, float* out) {
  int64_t c = 0;
  for (; c + 4 * kWidth <= size; c += 4 * kWidth)
    few_columns<T, 4>(row, block + c, size, out + c);
  for (; c + kWidth <= size; c += kWidth)
    few_columns<T, 1>(row, block + c, size, out + c);
  for (; c < size; ++c) {
    float sum = 0;
    for (int64_t i = 0; i < size; ++i)
      sum += load(row[i]) * load(block[i * size + c]);
    out[c] = sum;
  }
}

// Fetches the blocks that are used next, piece by piece between products: all at once would wait
// for each other.
template <class T>
class NextBlocks {
 public:
  // Null: there are none.
  NextBlocks(const T* right, const T* left, int64_t size)
      : right_(right), left_(left), piece_(right == nullptr ? 0 : (size + 1) / 2) {}
  // The next half of a block; called four times.
  void fetch() {
    const T* const block = half_ < 2 ? right_ : left_;
    prefetch_to_read<2>(block + half_ % 2 * piece_, bytes_of<T>(piece_));
    ++half_;
  }

 private:
  const T* const right_;
  const T* const left_;
  const int64_t piece_;
  int64_t half_ = 0;
};

// Products with the blocks of one expert and group.
class HiddenProducts : protected HiddenPass {
 protected:
  using HiddenPass::HiddenPass;

  // Scratch memory for the rows of a chunk.
  template <class T>
  T* operands() {
    return scratch_.elements<T>(most_rows_ * stride_);
  }
  float* tiles() { return scratch_.floats(most_rows_ * wide_); }

  // Of the chunk after this one. `begins`: these blocks were not in use before.
  template <class T>
  NextBlocks<T> next_blocks(const Tile& tile, const Chunk& chunk, bool begins) const {
    int64_t expert = chunk.expert;
    int64_t group = chunk.group + 1;
    if (shared_ || group == tile.last_group) {
      ++expert;
      group = tile.first_group;
    }
    if (!begins || expert == in_.experts)
      return {nullptr, nullptr, 0};
    return {block_of<T>(in_.right, expert, group), block_of<T>(in_.left, expert, group), square_};
  }

  template <class T>
  void pack(float* panels, const void* blocks, const Chunk& chunk) const {
    const T* const block = block_of<T>(blocks, chunk.expert, chunk.group);
    gemm_.pack(panels, units_, block, block_, block_, block_);
  }
  template <class T>
  void pack_transposed(float* panels, const void* blocks, const Chunk& chunk) const {
    const T* const block = block_of<T>(blocks, chunk.expert, chunk.group);
    gemm_.pack_transposed(panels, units_, block, block_, block_, block_);
  }

  // tile [rows, wide] = a [rows, b] times packed panels.
  template <class T>
  void multiply(const T* a, int64_t rows, const float* panels, float* tile) const {
    // Equal tiles, except for AMX, which is slow to start and uses whole tiles.
    const int64_t most = gemm_.best_rows;
    const int64_t parts = most == kMaxRows ? 1 : (rows + most - 1) / most;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t first = rows * p / parts;
      const int64_t count = rows * (p + 1) / parts - first;
      for (int64_t c = 0; c < wide_; c += kPanel)
        gemm_.multiply_rows(count,
                            units_,
                            a + first * stride_,
                            stride_ / unit_,
                            panels + c * units_,
                            tile + first * wide_ + c,
                            wide_,
                            false);
    }
  }

  // z += the expert's bias for each row's group
  template <class T>
  void add_bias(const Chunk& chunk, float* z) const {
    if (in_.bias == nullptr)
      return;
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const T* const bias =
          static_cast<const T*>(in_.bias) + chunk.expert * in_.features + chunk.groups[r] * block_;
      for (int64_t c = 0; c < block_; ++c)
        z[r * wide_ + c] += load(bias[c]);
    }
  }
};

template <class T>
class HiddenForward : HiddenProducts {
 public:
  HiddenForward(const GemmKernels& gemm,
                const HiddenExperts& in,
                const SlotsView& sorted,
                const HiddenPart& part)
      : HiddenProducts(gemm, in, sorted, part),
        panel_(most_rows_ > kFewHiddenRows ? units_ * wide_ : 0) {}

  int64_t scratch() const { return scratch_.used(); }

  void run(T* out) {
    for_each_tile([&](const Tile& tile) {
      for_each_chunk(tile, [&](const Chunk& chunk) {
        compute(tile, chunk);
        add_rows(tile, chunk, z_, in_.gates, sum_, out);
      });
      store_missing(tile, out);
    });
  }

 private:
  // z = the chunk's output, before its gates.
  void compute(const Tile& tile, const Chunk& chunk) {
    const int64_t width = fetched(tile, chunk);
    const bool packs = chunk.begins && chunk.all > kFewHiddenRows;
    NextBlocks<T> next = next_blocks<T>(tile, chunk, packs);
    next.fetch();
    if (packs) {
      pack<T>(right_, in_.right, chunk);
      pack<T>(left_, in_.left, chunk);
      if (gated_)
        pack<T>(right_gate_, in_.right_gate, chunk);
    }
    gather(in_.x, chunk, width, rows_);
    multiply_by_blocks(chunk, rows_, in_.right, right_, gated_ ? value_ : z_);
    next.fetch();
    if (gated_) {
      gather(in_.x_gate, chunk, width, rows_);
      multiply_by_blocks(chunk, rows_, in_.right_gate, right_gate_, z_);
    }
    add_bias<T>(chunk, z_);
    with_activation(in_.activation,
                    [&](auto kind) { activate_rows<decltype(kind)::value>(chunk.rows); });
    next.fetch();
    multiply_by_blocks(chunk, h_, in_.left, left_, z_);
    next.fetch();
  }

  // tile = rows times the blocks of a chunk: packed, or in place for few rows.
  void multiply_by_blocks(
      const Chunk& chunk, const T* rows, const void* blocks, const float* panels, float* tile) {
    if (chunk.all > kFewHiddenRows) {
      multiply(rows, chunk.rows, panels, tile);
      return;
    }
    const T* const block = block_of<T>(blocks, chunk.expert, chunk.group);
    for (int64_t r = 0; r < chunk.rows; ++r)
      row_times_block(rows + r * stride_, block, block_, tile + r * wide_);
  }

  template <Activation kind>
  void activate_rows(int64_t rows) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < wide_; c += kWidth) {
        Floats value = activate<kind>(load_floats(z_ + r * wide_ + c));
        if (gated_)
          value = value * load_floats(value_ + r * wide_ + c);
        store_floats(h_ + r * stride_ + c, value);
      }
  }

  const int64_t panel_;
  float* const sum_ = scratch_.raw(tile_sums_);
  float* const z_ = tiles();
  float* const value_ = tiles();  // x R of gated experts
  float* const right_ = scratch_.floats(panel_);
  float* const left_ = scratch_.floats(panel_);
  float* const right_gate_ = scratch_.floats(panel_);
  T* const rows_ = operands<T>();
  T* const h_ = operands<T>();
};

template <class T>
class HiddenBackward : HiddenProducts {
 public:
  HiddenBackward(const GemmKernels& gemm,
                 const HiddenExperts& in,
                 const SlotsView& sorted,
                 const HiddenPart& part,
                 const void* grad,
                 const ExpertsGradients& out)
      : HiddenProducts(gemm, in, sorted, part), grad_(grad), out_(out) {}

  int64_t scratch() const { return scratch_.used(); }

  void run() {
    for_each_tile([&](const Tile& tile) {
      for_each_chunk(tile, [&](const Chunk& chunk) {
        compute(tile, chunk);
        if (!shared_ && chunk.ends)
          store_blocks(chunk);
      });
      if (out_.dx != nullptr)
        store_missing(tile, static_cast<T*>(out_.dx));
      if (out_.dx_gate != nullptr)
        store_missing(tile, static_cast<T*>(out_.dx_gate));
      if (tile.number + 1 < sorted_.tiles)
        return;
      if (out_.dbias != nullptr)
        store_bias(tile);
      if (!shared_)
        clear_blocks_of_unused(tile);
    });
  }

 private:
  // The number of a block's gradient among those of its expert.
  enum Core { kRight, kLeft, kRightGate };

  int64_t cores() const { return gated_ ? 3 : 2; }
  void* result(int64_t core) const {
    void* const results[] = {out_.dright, out_.dleft, out_.dright_gate};
    return results[core];
  }

  void compute(const Tile& tile, const Chunk& chunk) {
    const int64_t rows = chunk.rows;
    NextBlocks<T> next = next_blocks<T>(tile, chunk, chunk.begins);
    next.fetch();
    if (chunk.begins)
      pack_blocks(chunk);
    recompute(chunk, fetched(tile, chunk));
    next.fetch();
    multiply(rows_grad_, rows, left_turned_, dh_);
    next.fetch();
    with_activation(in_.activation, [&](auto kind) {
      if (gated_)
        turn_rows_back<decltype(kind)::value, true>(chunk);
      else
        turn_rows_back<decltype(kind)::value, false>(chunk);
    });
    if (out_.dleft != nullptr)
      add_core(chunk, kLeft, h_, rows_grad_);
    next.fetch();
    if (out_.dbias != nullptr)
      add_bias_gradient(tile, chunk);
    if (out_.dright != nullptr)
      add_core(chunk, kRight, rows_x_, dvalue_);
    if (out_.dx != nullptr) {
      multiply(dvalue_, rows, right_turned_, value_);
      add_rows(tile, chunk, value_, nullptr, dx_, static_cast<T*>(out_.dx));
    }
    if (gated_ && out_.dright_gate != nullptr)
      add_core(chunk, kRightGate, rows_gate_, dz_);
    if (gated_ && out_.dx_gate != nullptr) {
      multiply(dz_, rows, right_gate_turned_, value_);
      add_rows(tile, chunk, value_, nullptr, dx_gate_, static_cast<T*>(out_.dx_gate));
    }
    begun_[chunk.expert] = 1;
  }

  void pack_blocks(const Chunk& chunk) {
    pack<T>(right_, in_.right, chunk);
    pack_transposed<T>(left_turned_, in_.left, chunk);
    if (out_.dx != nullptr)
      pack_transposed<T>(right_turned_, in_.right, chunk);
    if (!gated_)
      return;
    pack<T>(right_gate_, in_.right_gate, chunk);
    if (out_.dx_gate != nullptr)
      pack_transposed<T>(right_gate_turned_, in_.right_gate, chunk);
  }

  // The rows of a chunk, their pre-activations and, of gated experts, their values.
  void recompute(const Chunk& chunk, int64_t width) {
    gather(in_.x, chunk, width, rows_x_);
    gather(grad_, chunk, width, rows_grad_);
    multiply(rows_x_, chunk.rows, right_, gated_ ? value_ : z_);
    if (gated_) {
      gather(in_.x_gate, chunk, width, rows_gate_);
      multiply(rows_gate_, chunk.rows, right_gate_, z_);
    }
    add_bias<T>(chunk, z_);
  }

  // Everything between the products: h times its gate, the gradients of value and z, and <h, dh>,
  // the gradients of the gates.
  template <Activation kind, bool gated>
  void turn_rows_back(const Chunk& chunk) {
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const Floats gate = splat(in_.gates[chunk.slots[r]]);
      Floats products = {};
      for (int64_t c = 0; c < wide_; c += kWidth) {
        const int64_t at = r * wide_ + c;
        const int64_t to = r * stride_ + c;
        const Floats dh = load_floats(dh_ + at);
        Floats value = {};
        if constexpr (gated)
          value = load_floats(value_ + at);
        const TurnedBack turned =
            turn_back<kind>(load_floats(z_ + at), dh, gate, gated ? &value : nullptr);
        if constexpr (gated)
          store_floats(dvalue_ + to, turned.dvalue);
        products = multiply_add(turned.h, dh, products);
        store_floats(h_ + to, gate * turned.h);
        store_floats(z_ + at, turned.dz);
        store_floats(dz_ + to, turned.dz);
      }
      if (part_.slot_gates != nullptr)
        part_.slot_gates[chunk.groups[r] * in_.tokens * in_.top_k + chunk.slots[r]] =
            sum_of(products);
    }
  }

  // Sums of a block's gradients [b, b].
  float* sums_of(const Chunk& chunk, int64_t core) const {
    return part_.cores + ((shared_ ? chunk.expert : 0) * cores() + core) * square_;
  }

  // sum [b, b] (adds: +)= a^T d over rows, both operands [rows, b].
  void add_core(const Chunk& chunk, Core core, const T* a, const T* d) {
    const bool adds = shared_ ? begun_[chunk.expert] != 0 : !chunk.begins;
    const int64_t units = (chunk.rows + unit_ - 1) / unit_;
    gemm_.pack(panels_a_, units, a, stride_, chunk.rows, block_);
    gemm_.pack(panels_d_, units, d, stride_, chunk.rows, block_);
    for (int64_t i = 0; i < block_; i += kPanel) {
      const int64_t count = least(kPanel, block_ - i);
      const int64_t parts = (count + gemm_.best_rows - 1) / gemm_.best_rows;
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t first = count * p / parts;
        add_core_rows(count * (p + 1) / parts - first,
                      units,
                      panels_a_ + i * units + first,
                      sums_of(chunk, core) + (i + first) * block_,
                      adds);
      }
    }
  }
  // The same for `rows` rows of it.
  void add_core_rows(int64_t rows, int64_t units, const float* a, float* sums, bool adds) {
    for (int64_t c = 0; c < block_; c += kPanel) {
      const float* const d = panels_d_ + c * units;
      float* const target = sums + c;
      if (c + kPanel <= block_) {
        gemm_.multiply_columns(rows, units, a, d, target, block_, adds);
        continue;
      }
      gemm_.multiply_columns(rows, units, a, d, edge_, kPanel, false);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; c + j < block_; ++j) {
          float& sum = target[r * block_ + j];
          sum = (adds ? sum : 0.0f) + edge_[r * kPanel + j];
        }
    }
  }

  float* bias_sums(const Tile& tile, int64_t expert, int64_t group) const {
    return dbias_ + (expert * tile.groups() + group - tile.first_group) * wide_;
  }
  void add_bias_gradient(const Tile& tile, const Chunk& chunk) {
    for (int64_t r = 0; r < chunk.rows; ++r) {
      float* const target = bias_sums(tile, chunk.expert, chunk.groups[r]);
      for (int64_t c = 0; c < wide_; ++c)
        target[c] += z_[r * wide_ + c];
    }
  }
  void store_bias(const Tile& tile) {
    for (int64_t e = 0; e < in_.experts; ++e)
      for (int64_t group = tile.first_group; group < tile.last_group; ++group) {
        float* const sums = bias_sums(tile, e, group);
        store_row(sums, static_cast<T*>(out_.dbias) + e * in_.features + group * block_, block_);
        std::memset(sums, 0, bytes_of<float>(wide_));
      }
  }

  // Gradients of groups' own blocks.
  void store_blocks(const Chunk& chunk) {
    const int64_t place = (chunk.expert * in_.own_groups + chunk.group) * square_;
    for (int64_t core = 0; core < cores(); ++core)
      if (result(core) != nullptr)
        store_row(sums_of(chunk, core), static_cast<T*>(result(core)) + place, square_);
  }
  void clear_blocks_of_unused(const Tile& tile) {
    for (int64_t e = 0; e < in_.experts; ++e) {
      if (sorted_.offsets[e + 1] > sorted_.offsets[e])
        continue;
      const int64_t place = (e * in_.own_groups + tile.first_group) * square_;
      for (int64_t core = 0; core < cores(); ++core)
        if (result(core) != nullptr)
          std::memset(
              static_cast<T*>(result(core)) + place, 0, bytes_of<T>(tile.groups() * square_));
    }
  }

  const void* const grad_;
  const ExpertsGradients& out_;
  const int64_t panel_ = units_ * wide_;  // of packed panels of a block
  float* const dx_ = scratch_.raw(tile_sums_);
  float* const dx_gate_ = scratch_.raw(gated_ ? tile_sums_ : 0);
  float* const z_ = tiles();      // pre-activations, replaced by their gradients
  float* const value_ = tiles();  // x R of gated experts; later rows of dx
  float* const dh_ = tiles();     // of act(z) (times value), before the gate's factor
  // Packed panels, turned: of the transpose.
  float* const right_ = scratch_.floats(panel_);
  float* const left_turned_ = scratch_.floats(panel_);
  float* const right_turned_ = scratch_.floats(panel_);
  float* const right_gate_ = scratch_.floats(panel_);
  float* const right_gate_turned_ = scratch_.floats(panel_);
  float* const panels_a_ = tiles();  // see add_core
  float* const panels_d_ = tiles();
  float* const edge_ = scratch_.floats(kMaxRows * kPanel);  // columns past the last whole panel
  T* const rows_x_ = operands<T>();
  T* const rows_gate_ = operands<T>();
  T* const rows_grad_ = operands<T>();
  T* const h_ = operands<T>();  // times the gates
  T* const dz_ = operands<T>();
  T* const dvalue_ = gated_ ? operands<T>() : dz_;
  // Whether the sums of an expert's cores hold something.
  uint8_t* const begun_ = scratch_.elements<uint8_t>(in_.experts);
  // [E, groups together, wide]
  float* const dbias_ =
      scratch_.floats(out_.dbias == nullptr ? 0 : in_.experts * part_.together * wide_);
};

template <class T>
int64_t forward(const GemmKernels& gemm,
                const HiddenExperts& in,
                const SlotsView& sorted,
                const HiddenPart& part,
                void* out) {
  HiddenForward<T> pass(gemm, in, sorted, part);
  if (part.scratch != nullptr)
    pass.run(static_cast<T*>(out));
  return pass.scratch();
}

template <class T>
int64_t backward(const GemmKernels& gemm,
                 const HiddenExperts& in,
                 const SlotsView& sorted,
                 const HiddenPart& part,
                 const void* grad,
                 const ExpertsGradients& out) {
  HiddenBackward<T> pass(gemm, in, sorted, part, grad, out);
  if (part.scratch != nullptr)
    pass.run();
  return pass.scratch();
}

}  // namespace
}  // namespace mpoe
