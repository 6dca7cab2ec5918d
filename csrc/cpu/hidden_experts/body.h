// Bodies of hidden_experts.h. Included by one file per instruction set, which defines MPOE_HIDDEN, the name of its
// table. Nothing here may use inline functions that other files share.
#include "cpu/hidden_experts/rows.h"

namespace mpoe {
namespace {

// Consecutive pieces of a part's scratch memory, which is zero at first.
struct Scratch {
  float* next;
  float* floats(int64_t count) {
    float* piece = next;
    next += (count + 15) / 16 * 16;
    return piece;
  }
  template <class T>
  T* elements(int64_t count) {
    return reinterpret_cast<T*>(floats((count * static_cast<int64_t>(sizeof(T)) + 3) / 4));
  }
};

// tile [rows, wide] = a [rows, b] times packed panels.
template <class T>
void product(const GemmKernels& gemm, const Sizes& s, const T* a, int64_t rows, const float* panels, float* tile) {
  // Equal tiles, except for AMX, which is slow to start and uses whole tiles.
  const int64_t parts = gemm.best_rows == kMaxRows ? 1 : (rows + gemm.best_rows - 1) / gemm.best_rows;
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t first = rows * p / parts, count = rows * (p + 1) / parts - first;
    for (int64_t c = 0; c < s.wide; c += kPanel)
      gemm.multiply_rows(
          count, s.units, a + first * s.stride, s.stride / s.unit, panels + c * s.units, tile + first * s.wide + c,
          s.wide, false);
  }
}

// The same for few rows with an unpacked block [b, b].
template <class T>
void product_of_few(const Sizes& s, const T* a, int64_t rows, const T* block, float* tile) {
  constexpr int64_t kTogether = 4 * kWidth;
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = a + r * s.stride;
    float* out = tile + r * s.wide;
    int64_t c = 0;
    for (; c + kTogether <= s.block; c += kTogether) {
      Floats sum[4] = {};
      for (int64_t i = 0; i < s.block; ++i) {
        const Floats value = splat(load(row[i]));
        for (int v = 0; v < 4; ++v)
          sum[v] = multiply_add(value, load_floats(block + i * s.block + c + v * kWidth), sum[v]);
      }
      for (int v = 0; v < 4; ++v) store_floats(out + c + v * kWidth, sum[v]);
    }
    for (; c < s.block; ++c) {
      float sum = 0;
      for (int64_t i = 0; i < s.block; ++i) sum += load(row[i]) * load(block[i * s.block + c]);
      out[c] = sum;
    }
  }
}

// The block of one expert and group.
template <class T>
const T* block_of(const HiddenExperts& in, const void* blocks, int64_t expert, int64_t group) {
  const int64_t own = in.own_groups == 1 ? expert : expert * in.own_groups + group;
  return static_cast<const T*>(blocks) + own * in.block * in.block;
}

template <Activation kind, class T>
void activate_rows(const Sizes& s, int64_t rows, const float* z, const float* factor, T* h) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < s.wide; c += kWidth) {
      Floats value = activate<kind>(load_floats(z + r * s.wide + c));
      if (factor != nullptr) value = value * load_floats(factor + r * s.wide + c);
      store_floats(h + r * s.stride + c, value);
    }
}

// dz = d act'(z), where `d` is the gradient of the activation's output.
template <Activation kind>
void deactivate_rows(const Sizes& s, int64_t rows, const float* d, float* z) {
  for (int64_t c = 0; c < rows * s.wide; c += kWidth)
    store_floats(z + c, deactivate<kind>(load_floats(d + c), load_floats(z + c)));
}

// f(constant of the activation)
template <Activation kind>
struct Kind {
  static constexpr Activation value = kind;
};
template <class F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kNone: return f(Kind<Activation::kNone>{});
    case Activation::kRelu: return f(Kind<Activation::kRelu>{});
    case Activation::kGelu: return f(Kind<Activation::kGelu>{});
    case Activation::kGeluTanh: return f(Kind<Activation::kGeluTanh>{});
    case Activation::kSilu: return f(Kind<Activation::kSilu>{});
  }
}

// z += the expert's bias for each row's group
template <class T>
void add_bias(const HiddenExperts& in, const Sizes& s, int64_t expert, const Chunk& chunk, float* z) {
  if (in.bias == nullptr) return;
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const T* bias = static_cast<const T*>(in.bias) + expert * in.features + chunk.groups[r] * s.block;
    for (int64_t c = 0; c < s.block; ++c) z[r * s.wide + c] += load(bias[c]);
  }
}

template <class T>
void forward(
    const GemmKernels& gemm, const HiddenExperts& in, const HiddenSlots& sorted, const HiddenPart& part, void* out) {
  const Sizes s(gemm, in.block);
  const bool gated = in.u_gate != nullptr;
  Scratch scratch{part.scratch};
  const int64_t tile_tokens = least(sorted.tile_tokens, in.tokens), most = rows_at_once(in, sorted);
  const int64_t panel = most > kFewRows ? s.units * s.wide : 0;
  float* sum = scratch.floats(sorted.together * tile_tokens * s.wide);
  float *z = scratch.floats(most * s.wide), *value = scratch.floats(most * s.wide);
  float *right = scratch.floats(panel), *left = scratch.floats(panel), *right_gate = scratch.floats(panel);
  T *rows_u = scratch.elements<T>(most * s.stride), *h = scratch.elements<T>(most * s.stride);
  const auto times = [&](const T* a, int64_t rows, bool few, const float* panels, const T* block, float* tile) {
    if (few)
      product_of_few(s, a, rows, block, tile);
    else
      product(gemm, s, a, rows, panels, tile);
  };
  for_each_tile(in, sorted, part, [&](const Tile& tile, int64_t number) {
    for_each_chunk(in, s, sorted, tile, number, [&](int64_t e, const Chunk& chunk, bool first, int64_t all) {
      const int64_t rows = chunk.rows, group = tile.first_group;
      const T *r = block_of<T>(in, in.right, e, group), *l = block_of<T>(in, in.left, e, group);
      const T* rg = gated ? block_of<T>(in, in.right_gate, e, group) : nullptr;
      const bool few = all <= kFewRows;
      if (first && !few && (e + 1 < in.experts || group + 1 < in.groups())) {
        const int64_t next_expert = e + 1 < in.experts ? e + 1 : 0, next_group = e + 1 < in.experts ? group : group + 1;
        const int64_t bytes = s.block * s.block * static_cast<int64_t>(sizeof(T));
        prefetch_to_read<2>(block_of<T>(in, in.right, next_expert, next_group), bytes);
        prefetch_to_read<2>(block_of<T>(in, in.left, next_expert, next_group), bytes);
      }
      if (first && !few) {
        gemm.pack(right, s.units, r, s.block, s.block, s.block);
        gemm.pack(left, s.units, l, s.block, s.block, s.block);
        if (gated) gemm.pack(right_gate, s.units, rg, s.block, s.block, s.block);
      }
      gather(in, s, in.u, chunk, rows_u);
      times(rows_u, rows, few, right, r, gated ? value : z);
      if (gated) {
        gather(in, s, in.u_gate, chunk, rows_u);
        times(rows_u, rows, few, right_gate, rg, z);
      }
      add_bias<T>(in, s, e, chunk, z);
      with_activation(in.activation, [&](auto kind) {
        activate_rows<decltype(kind)::value>(s, rows, z, gated ? value : nullptr, h);
      });
      times(h, rows, few, left, l, z);
      add_rows<T>(in, s, tile, chunk, z, in.gates, sum, out);
    });
    store_missing<T>(in, s, sorted, tile, out);
  });
}

// core [b, b] += a^T d over rows, both operands [rows, b].
template <class T>
void add_outer(
    const GemmKernels& gemm, const Sizes& s, const T* a, const T* d, int64_t rows, float* panels_a, float* panels_d,
    float* tile, float* core) {
  const int64_t units = (rows + s.unit - 1) / s.unit;
  gemm.pack(panels_a, units, a, s.stride, rows, s.block);
  gemm.pack(panels_d, units, d, s.stride, rows, s.block);
  for (int64_t i = 0; i < s.block; i += kPanel) {
    const int64_t count = least(kPanel, s.block - i), parts = (count + gemm.best_rows - 1) / gemm.best_rows;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t first = count * p / parts, some = count * (p + 1) / parts - first;
      for (int64_t c = 0; c < s.block; c += kPanel) {
        const bool whole = c + kPanel <= s.block;
        float* target = core + (i + first) * s.block + c;
        gemm.multiply_columns(
            some, units, panels_a + i * units + first, panels_d + c * units, whole ? target : tile,
            whole ? s.block : kPanel, whole);
        for (int64_t r = 0; !whole && r < some; ++r)
          for (int64_t j = 0; c + j < s.block; ++j) target[r * s.block + j] += tile[r * kPanel + j];
      }
    }
  }
}

template <class T>
void round_rows(const Sizes& s, const Chunk& chunk, const float* from, const float* gates, T* out) {
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const Floats gate = splat(gates == nullptr ? 1.0f : gates[chunk.slots[r]]);
    for (int64_t c = 0; c < s.wide; c += kWidth)
      store_floats(out + r * s.stride + c, gate * load_floats(from + r * s.wide + c));
  }
}

template <class T>
void backward(
    const GemmKernels& gemm, const HiddenExperts& in, const HiddenSlots& sorted, const HiddenPart& part,
    const void* grad, const HiddenExpertsGradients& out) {
  const Sizes s(gemm, in.block);
  const bool gated = in.u_gate != nullptr;
  const int64_t square = s.block * s.block, kinds = gated ? 3 : 2, pairs = in.tokens * in.top_k;
  Scratch scratch{part.scratch};
  const int64_t tile_tokens = least(sorted.tile_tokens, in.tokens), panel = s.units * s.wide;
  const int64_t sums = sorted.together * tile_tokens * s.wide;
  float *du = scratch.floats(sums), *du_gate = scratch.floats(gated ? sums : 0);
  const int64_t tile_size = rows_at_once(in, sorted) * s.wide, rows_size = rows_at_once(in, sorted) * s.stride;
  float *z = scratch.floats(tile_size), *value = scratch.floats(tile_size), *act = scratch.floats(tile_size);
  float *dh = scratch.floats(tile_size), *product_tile = scratch.floats(tile_size);
  float *right = scratch.floats(panel), *left = scratch.floats(panel), *back = scratch.floats(panel);
  float *right_gate = scratch.floats(panel), *back_gate = scratch.floats(panel);
  float *panels_a = scratch.floats(tile_size), *panels_d = scratch.floats(tile_size);
  float* odd = scratch.floats(kMaxRows * kPanel);
  T *rows_u = scratch.elements<T>(rows_size), *rows_gate = scratch.elements<T>(rows_size);
  T *rows_do = scratch.elements<T>(rows_size), *operand = scratch.elements<T>(rows_size);
  // [E, groups together, wide]
  float* dbias = scratch.floats(out.dbias == nullptr ? 0 : in.experts * sorted.together * s.wide);

  for_each_tile(in, sorted, part, [&](const Tile& tile, int64_t number) {
    const int64_t group = tile.first_group, together = tile.last_group - group;
    for_each_chunk(in, s, sorted, tile, number, [&](int64_t e, const Chunk& chunk, bool first, int64_t) {
      const int64_t rows = chunk.rows;
      float* cores = part.cores + e * kinds * square;
      if (first) {
        const T* r = block_of<T>(in, in.right, e, group);
        gemm.pack(right, s.units, r, s.block, s.block, s.block);
        if (out.du != nullptr) gemm.pack_transposed(back, s.units, r, s.block, s.block, s.block);
        gemm.pack_transposed(left, s.units, block_of<T>(in, in.left, e, group), s.block, s.block, s.block);
        if (gated) {
          const T* rg = block_of<T>(in, in.right_gate, e, group);
          gemm.pack(right_gate, s.units, rg, s.block, s.block, s.block);
          if (out.du_gate != nullptr) gemm.pack_transposed(back_gate, s.units, rg, s.block, s.block, s.block);
        }
      }
      gather(in, s, in.u, chunk, rows_u);
      gather(in, s, grad, chunk, rows_do);
      product(gemm, s, rows_u, rows, right, gated ? value : z);
      if (gated) {
        gather(in, s, in.u_gate, chunk, rows_gate);
        product(gemm, s, rows_gate, rows, right_gate, z);
      }
      add_bias<T>(in, s, e, chunk, z);
      product(gemm, s, rows_do, rows, left, dh);  // not yet times the gate
      with_activation(in.activation, [&](auto kind) {
        for (int64_t c = 0; c < rows * s.wide; c += kWidth)
          store_floats(act + c, activate<decltype(kind)::value>(load_floats(z + c)));
      });
      float* h = act;
      if (gated) {
        h = product_tile;
        for (int64_t c = 0; c < rows * s.wide; c += kWidth)
          store_floats(h + c, load_floats(act + c) * load_floats(value + c));
      }
      if (part.slot_gates != nullptr) {
        for (int64_t r = 0; r < rows; ++r) {
          Floats sums = {};
          for (int64_t c = 0; c < s.wide; c += kWidth)
            sums = multiply_add(load_floats(h + r * s.wide + c), load_floats(dh + r * s.wide + c), sums);
          float total = 0;
          for (int i = 0; i < kWidth; ++i) total += sums[i];
          part.slot_gates[chunk.groups[r] * pairs + chunk.slots[r]] = total;
        }
      }
      if (out.dleft != nullptr) {
        round_rows(s, chunk, h, in.gates, operand);
        add_outer(gemm, s, operand, rows_do, rows, panels_a, panels_d, odd, cores + square);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const Floats gate = splat(in.gates[chunk.slots[r]]);
        for (int64_t c = r * s.wide; c < (r + 1) * s.wide; c += kWidth) {
          const Floats gated_dh = gate * load_floats(dh + c);
          if (gated) {  // act becomes the gradient of u R, dh that of the activation
            const Floats factor = load_floats(value + c);
            store_floats(act + c, gated_dh * load_floats(act + c));
            store_floats(dh + c, gated_dh * factor);
          } else {
            store_floats(dh + c, gated_dh);
          }
        }
      }
      with_activation(in.activation, [&](auto kind) { deactivate_rows<decltype(kind)::value>(s, rows, dh, z); });
      if (out.dbias != nullptr)
        for (int64_t r = 0; r < rows; ++r) {
          float* target = dbias + (e * together + chunk.groups[r] - group) * s.wide;
          for (int64_t c = 0; c < s.wide; ++c) target[c] += z[r * s.wide + c];
        }
      round_rows<T>(s, chunk, gated ? act : z, nullptr, operand);
      if (out.dright != nullptr) add_outer(gemm, s, rows_u, operand, rows, panels_a, panels_d, odd, cores);
      if (out.du != nullptr) {
        product(gemm, s, operand, rows, back, value);
        add_rows<T>(in, s, tile, chunk, value, nullptr, du, out.du);
      }
      if (!gated) return;
      round_rows<T>(s, chunk, z, nullptr, operand);
      if (out.dright_gate != nullptr)
        add_outer(gemm, s, rows_gate, operand, rows, panels_a, panels_d, odd, cores + 2 * square);
      if (out.du_gate != nullptr) {
        product(gemm, s, operand, rows, back_gate, value);
        add_rows<T>(in, s, tile, chunk, value, nullptr, du_gate, out.du_gate);
      }
    });
    if (out.du != nullptr) store_missing<T>(in, s, sorted, tile, out.du);
    if (out.du_gate != nullptr) store_missing<T>(in, s, sorted, tile, out.du_gate);
    if (number + 1 < sorted.tiles) return;
    for (int64_t e = 0; out.dbias != nullptr && e < in.experts; ++e)
      for (int64_t g = 0; g < together; ++g) {
        float* own = dbias + (e * together + g) * s.wide;
        store_row(own, static_cast<T*>(out.dbias) + e * in.features + (group + g) * s.block, s.block);
        std::memset(own, 0, s.wide * sizeof(float));
      }
    if (in.own_groups == 1) return;
    void* const results[] = {out.dright, out.dleft, out.dright_gate};
    for (int64_t e = 0; e < in.experts; ++e)
      for (int64_t kind = 0; kind < kinds; ++kind) {
        T* const result = static_cast<T*>(results[kind]);
        if (result == nullptr) continue;
        T* const own = result + (e * in.own_groups + group) * square;
        if (!sorted.used[e]) {
          std::memset(own, 0, square * sizeof(T));
          continue;
        }
        float* core = part.cores + (e * kinds + kind) * square;
        store_row(core, own, square);
        std::memset(core, 0, square * sizeof(float));
      }
  });
}

template <class T>
void sum_parts(const float* parts, int64_t count, int64_t stride, void* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    float sum = 0;
    for (int64_t p = 0; p < count; ++p) sum += parts[p * stride + i];
    store(static_cast<T*>(out)[i], sum);
  }
}

}  // namespace

const HiddenKernels MPOE_HIDDEN[2] = {
    {forward<float>, backward<float>, sum_parts<float>},
    {forward<BFloat16>, backward<BFloat16>, sum_parts<BFloat16>},
};

}  // namespace mpoe
