// Bodies of hidden_experts.h. Included by one file per instruction set, which defines MPOE_HIDDEN,
// the name of its table. Nothing here may use inline functions that other files share.
#include "cpu/hidden_experts/rows.h"

namespace mpoe {
namespace {

// Consecutive pieces of a part's scratch memory. Zeros but for what is `raw`: products read
// padding.
struct Scratch {
  float* next;
  float* raw(int64_t count) {
    float* piece = next;
    next += (count + 15) / 16 * 16;
    return piece;
  }
  float* floats(int64_t count) {
    float* piece = raw(count);
    std::memset(piece, 0, count * sizeof(float));
    return piece;
  }
  template <class T>
  T* elements(int64_t count) {
    return reinterpret_cast<T*>(floats((count * static_cast<int64_t>(sizeof(T)) + 3) / 4));
  }
};

// tile [rows, wide] = a [rows, b] times packed panels.
template <class T>
void product(const GemmKernels& gemm,
             const Sizes& s,
             const T* a,
             int64_t rows,
             const float* panels,
             float* tile) {
  // Equal tiles, except for AMX, which is slow to start and uses whole tiles.
  const int64_t parts =
      gemm.best_rows == kMaxRows ? 1 : (rows + gemm.best_rows - 1) / gemm.best_rows;
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t first = rows * p / parts, count = rows * (p + 1) / parts - first;
    for (int64_t c = 0; c < s.wide; c += kPanel)
      gemm.multiply_rows(count,
                         s.units,
                         a + first * s.stride,
                         s.stride / s.unit,
                         panels + c * s.units,
                         tile + first * s.wide + c,
                         s.wide,
                         false);
  }
}

// `vectors` of one row of that product, from an unpacked block [b, b] on. Not inlined:
// tests/native/test_hot_loops.py finds it.
template <class T, int vectors>
[[gnu::noinline]] void few_columns(const Sizes& s, const T* row, const T* block, float* out) {
  Floats sum[vectors] = {};
  for (int64_t i = 0; i < s.block; ++i) {
    const Floats value = splat_of(row + i);
    for (int v = 0; v < vectors; ++v)
      sum[v] = multiply_add(value, load_floats(block + i * s.block + v * kWidth), sum[v]);
  }
  for (int v = 0; v < vectors; ++v)
    store_floats(out + v * kWidth, sum[v]);
}

// The same for few rows with an unpacked block.
template <class T>
void product_of_few(const Sizes& s, const T* a, int64_t rows, const T* block, float* tile) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = a + r * s.stride;
    float* out = tile + r * s.wide;
    int64_t c = 0;
    for (; c + 4 * kWidth <= s.block; c += 4 * kWidth)
      few_columns<T, 4>(s, row, block + c, out + c);
    for (; c + kWidth <= s.block; c += kWidth)
      few_columns<T, 1>(s, row, block + c, out + c);
    for (; c < s.block; ++c) {
      float sum = 0;
      for (int64_t i = 0; i < s.block; ++i)
        sum += load(row[i]) * load(block[i * s.block + c]);
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

// Fetches the blocks that are used next, piece by piece between products: all at once would wait
// for each other.
template <class T>
class NextBlocks {
 public:
  NextBlocks(const HiddenExperts& in, const Tile& tile, int64_t expert, int64_t group) {
    if (in.own_groups > 1 && group + 1 < tile.last_group) {
      ++group;
    } else {
      group = tile.first_group;
      if (++expert == in.experts)
        return;
    }
    right_ = block_of<T>(in, in.right, expert, group);
    left_ = block_of<T>(in, in.left, expert, group);
    piece_ = (in.block * in.block + 1) / 2;
  }
  // The next half of a block; called four times.
  void fetch() {
    const T* const block = half_ < 2 ? right_ : left_;
    prefetch_to_read<2>(block + half_ % 2 * piece_, piece_ * static_cast<int64_t>(sizeof(T)));
    ++half_;
  }

 private:
  const T *right_ = nullptr, *left_ = nullptr;
  int64_t piece_ = 0, half_ = 0;
};

template <Activation kind, class T>
void activate_rows(const Sizes& s, int64_t rows, const float* z, const float* factor, T* h) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < s.wide; c += kWidth) {
      Floats value = activate<kind>(load_floats(z + r * s.wide + c));
      if (factor != nullptr)
        value = value * load_floats(factor + r * s.wide + c);
      store_floats(h + r * s.stride + c, value);
    }
}

// z += the expert's bias for each row's group
template <class T>
void add_bias(
    const HiddenExperts& in, const Sizes& s, int64_t expert, const Chunk& chunk, float* z) {
  if (in.bias == nullptr)
    return;
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const T* bias =
        static_cast<const T*>(in.bias) + expert * in.features + chunk.groups[r] * s.block;
    for (int64_t c = 0; c < s.block; ++c)
      z[r * s.wide + c] += load(bias[c]);
  }
}

template <class T>
void forward(const GemmKernels& gemm,
             const HiddenExperts& in,
             const HiddenSlots& sorted,
             const HiddenPart& part,
             void* out) {
  const Sizes s(gemm, in.block);
  const bool gated = in.u_gate != nullptr;
  Scratch scratch{part.scratch};
  const int64_t tile_tokens = least(sorted.tile_tokens, in.tokens), most = rows_at_once(in, sorted);
  const int64_t panel = most > kFewRows ? s.units * s.wide : 0;
  float* sum = scratch.raw(sorted.together * tile_tokens * s.wide);
  float *z = scratch.floats(most * s.wide), *value = scratch.floats(most * s.wide);
  float *right = scratch.floats(panel), *left = scratch.floats(panel),
        *right_gate = scratch.floats(panel);
  T *rows_u = scratch.elements<T>(most * s.stride), *h = scratch.elements<T>(most * s.stride);
  const auto times =
      [&](const T* a, int64_t rows, bool few, const float* panels, const T* block, float* tile) {
        if (few)
          product_of_few(s, a, rows, block, tile);
        else
          product(gemm, s, a, rows, panels, tile);
      };
  for_each_tile(in, sorted, part, [&](const Tile& tile, int64_t number) {
    for_each_chunk(in, s, sorted, tile, number, [&](int64_t e, const Chunk& chunk) {
      const int64_t rows = chunk.rows, group = chunk.group, width = fetched(in, s, tile, chunk);
      const T *r = block_of<T>(in, in.right, e, group), *l = block_of<T>(in, in.left, e, group);
      const T* rg = gated ? block_of<T>(in, in.right_gate, e, group) : nullptr;
      const bool few = chunk.all <= kFewRows, begins = chunk.begins && !few;
      NextBlocks<T> next(in, tile, e, group);
      if (begins) {
        next.fetch();
        gemm.pack(right, s.units, r, s.block, s.block, s.block);
        gemm.pack(left, s.units, l, s.block, s.block, s.block);
        if (gated)
          gemm.pack(right_gate, s.units, rg, s.block, s.block, s.block);
      }
      gather(in, s, in.u, chunk, width, rows_u);
      times(rows_u, rows, few, right, r, gated ? value : z);
      if (begins)
        next.fetch();
      if (gated) {
        gather(in, s, in.u_gate, chunk, width, rows_u);
        times(rows_u, rows, few, right_gate, rg, z);
      }
      add_bias<T>(in, s, e, chunk, z);
      with_activation(in.activation, [&](auto kind) {
        activate_rows<decltype(kind)::value>(s, rows, z, gated ? value : nullptr, h);
      });
      if (begins)
        next.fetch();
      times(h, rows, few, left, l, z);
      if (begins)
        next.fetch();
      add_rows<T>(in, s, tile, chunk, z, in.gates, sum, out);
    });
    store_missing<T>(in, s, sorted, tile, out);
  });
}

// core [b, b] (adds: +)= a^T d over rows, both operands [rows, b].
template <class T>
void add_outer(const GemmKernels& gemm,
               const Sizes& s,
               const T* a,
               const T* d,
               int64_t rows,
               float* panels_a,
               float* panels_d,
               float* tile,
               float* core,
               bool adds) {
  const int64_t units = (rows + s.unit - 1) / s.unit;
  gemm.pack(panels_a, units, a, s.stride, rows, s.block);
  gemm.pack(panels_d, units, d, s.stride, rows, s.block);
  for (int64_t i = 0; i < s.block; i += kPanel) {
    const int64_t count = least(kPanel, s.block - i),
                  parts = (count + gemm.best_rows - 1) / gemm.best_rows;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t first = count * p / parts, some = count * (p + 1) / parts - first;
      for (int64_t c = 0; c < s.block; c += kPanel) {
        const bool whole = c + kPanel <= s.block;
        float* target = core + (i + first) * s.block + c;
        gemm.multiply_columns(some,
                              units,
                              panels_a + i * units + first,
                              panels_d + c * units,
                              whole ? target : tile,
                              whole ? s.block : kPanel,
                              whole && adds);
        for (int64_t r = 0; !whole && r < some; ++r)
          for (int64_t j = 0; c + j < s.block; ++j) {
            float& sum = target[r * s.block + j];
            sum = (adds ? sum : 0.0f) + tile[r * kPanel + j];
          }
      }
    }
  }
}

// Where the rows of a chunk's gradients are.
template <class T>
struct GradientRows {
  const float* dh;     // of act(z) (times value), before the gate's factor
  const float* value;  // u R; read if gated
  float* z;            // pre-activations, replaced by their gradients
  T* h;                // the expert's hidden rows times their gates
  T *dvalue, *dz;      // gradients of value (if gated) and z
};

// Everything between the products of a chunk's backward, and <h, dh>: the gradients of its gates.
template <Activation kind, bool gated, class T>
void turn_back(const HiddenExperts& in,
               const Sizes& s,
               const Chunk& chunk,
               const GradientRows<T>& rows,
               float* slot_gates) {
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const Floats gate = splat(in.gates[chunk.slots[r]]);
    Floats products = {};
    for (int64_t c = 0; c < s.wide; c += kWidth) {
      const int64_t at = r * s.wide + c, to = r * s.stride + c;
      const Floats z = load_floats(rows.z + at), dh = load_floats(rows.dh + at),
                   act = activate<kind>(z);
      Floats h = act, down = gate * dh;
      if constexpr (gated) {
        const Floats value = load_floats(rows.value + at);
        h = act * value;
        store_floats(rows.dvalue + to, down * act);
        down = down * value;
      }
      products = multiply_add(h, dh, products);
      store_floats(rows.h + to, gate * h);
      const Floats dz = deactivate<kind>(down, z);
      store_floats(rows.z + at, dz);
      store_floats(rows.dz + to, dz);
    }
    if (slot_gates != nullptr)
      slot_gates[chunk.groups[r] * in.tokens * in.top_k + chunk.slots[r]] = sum_of(products);
  }
}

template <class T>
void backward(const GemmKernels& gemm,
              const HiddenExperts& in,
              const HiddenSlots& sorted,
              const HiddenPart& part,
              const void* grad,
              const HiddenExpertsGradients& out) {
  const Sizes s(gemm, in.block);
  const bool gated = in.u_gate != nullptr;
  const bool shared = in.own_groups == 1;
  const int64_t square = s.block * s.block, kinds = gated ? 3 : 2;
  Scratch scratch{part.scratch};
  const int64_t tile_tokens = least(sorted.tile_tokens, in.tokens), panel = s.units * s.wide;
  const int64_t sums = sorted.together * tile_tokens * s.wide;
  float *du = scratch.raw(sums), *du_gate = scratch.raw(gated ? sums : 0);
  const int64_t tile_size = rows_at_once(in, sorted) * s.wide,
                rows_size = rows_at_once(in, sorted) * s.stride;
  float *z = scratch.floats(tile_size), *value = scratch.floats(tile_size),
        *dh = scratch.floats(tile_size);
  float *right = scratch.floats(panel), *left = scratch.floats(panel),
        *back = scratch.floats(panel);
  float *right_gate = scratch.floats(panel), *back_gate = scratch.floats(panel);
  float *panels_a = scratch.floats(tile_size), *panels_d = scratch.floats(tile_size);
  float* odd = scratch.floats(kMaxRows * kPanel);
  T *rows_u = scratch.elements<T>(rows_size), *rows_gate = scratch.elements<T>(rows_size);
  T *rows_do = scratch.elements<T>(rows_size), *h = scratch.elements<T>(rows_size);
  T *dz = scratch.elements<T>(rows_size), *dvalue = gated ? scratch.elements<T>(rows_size) : dz;
  // Whether the sums of its cores hold something
  std::uint8_t* begun = scratch.elements<std::uint8_t>(in.experts);
  void* const results[] = {out.dright, out.dleft, out.dright_gate};
  // [E, groups together, wide]
  float* dbias = scratch.floats(out.dbias == nullptr ? 0 : in.experts * sorted.together * s.wide);

  for_each_tile(in, sorted, part, [&](const Tile& tile, int64_t number) {
    const int64_t together = tile.last_group - tile.first_group;
    for_each_chunk(in, s, sorted, tile, number, [&](int64_t e, const Chunk& chunk) {
      const int64_t rows = chunk.rows, group = chunk.group, width = fetched(in, s, tile, chunk);
      float* cores = part.cores + (shared ? e * kinds * square : 0);
      const bool adds = shared ? begun[e] != 0 : !chunk.begins;
      begun[e] = 1;
      NextBlocks<T> next(in, tile, e, group);
      if (chunk.begins) {
        next.fetch();
        const T* r = block_of<T>(in, in.right, e, group);
        gemm.pack(right, s.units, r, s.block, s.block, s.block);
        if (out.du != nullptr)
          gemm.pack_transposed(back, s.units, r, s.block, s.block, s.block);
        gemm.pack_transposed(
            left, s.units, block_of<T>(in, in.left, e, group), s.block, s.block, s.block);
        if (gated) {
          const T* rg = block_of<T>(in, in.right_gate, e, group);
          gemm.pack(right_gate, s.units, rg, s.block, s.block, s.block);
          if (out.du_gate != nullptr)
            gemm.pack_transposed(back_gate, s.units, rg, s.block, s.block, s.block);
        }
      }
      gather(in, s, in.u, chunk, width, rows_u);
      gather(in, s, grad, chunk, width, rows_do);
      product(gemm, s, rows_u, rows, right, gated ? value : z);
      if (gated) {
        gather(in, s, in.u_gate, chunk, width, rows_gate);
        product(gemm, s, rows_gate, rows, right_gate, z);
      }
      add_bias<T>(in, s, e, chunk, z);
      if (chunk.begins)
        next.fetch();
      product(gemm, s, rows_do, rows, left, dh);  // not yet times the gate
      if (chunk.begins)
        next.fetch();
      const GradientRows<T> turned{dh, value, z, h, dvalue, dz};
      with_activation(in.activation, [&](auto kind) {
        if (gated)
          turn_back<decltype(kind)::value, true>(in, s, chunk, turned, part.slot_gates);
        else
          turn_back<decltype(kind)::value, false>(in, s, chunk, turned, part.slot_gates);
      });
      const auto add_core = [&](int64_t kind, const T* a, const T* d) {
        add_outer(gemm, s, a, d, rows, panels_a, panels_d, odd, cores + kind * square, adds);
      };
      if (out.dleft != nullptr)
        add_core(1, h, rows_do);
      if (chunk.begins)
        next.fetch();
      if (out.dbias != nullptr)
        for (int64_t r = 0; r < rows; ++r) {
          float* target = dbias + (e * together + chunk.groups[r] - tile.first_group) * s.wide;
          for (int64_t c = 0; c < s.wide; ++c)
            target[c] += z[r * s.wide + c];
        }
      if (out.dright != nullptr)
        add_core(0, rows_u, dvalue);
      if (out.du != nullptr) {
        product(gemm, s, dvalue, rows, back, value);
        add_rows<T>(in, s, tile, chunk, value, nullptr, du, out.du);
      }
      if (gated && out.dright_gate != nullptr)
        add_core(2, rows_gate, dz);
      if (gated && out.du_gate != nullptr) {
        product(gemm, s, dz, rows, back_gate, value);
        add_rows<T>(in, s, tile, chunk, value, nullptr, du_gate, out.du_gate);
      }
      if (shared || !chunk.ends)
        return;
      for (int64_t kind = 0; kind < kinds; ++kind)
        if (results[kind] != nullptr)
          store_row(cores + kind * square,
                    static_cast<T*>(results[kind]) + (e * in.own_groups + group) * square,
                    square);
    });
    if (out.du != nullptr)
      store_missing<T>(in, s, sorted, tile, out.du);
    if (out.du_gate != nullptr)
      store_missing<T>(in, s, sorted, tile, out.du_gate);
    if (number + 1 < sorted.tiles)
      return;
    for (int64_t e = 0; out.dbias != nullptr && e < in.experts; ++e)
      for (int64_t g = 0; g < together; ++g) {
        float* own = dbias + (e * together + g) * s.wide;
        store_row(own,
                  static_cast<T*>(out.dbias) + e * in.features + (tile.first_group + g) * s.block,
                  s.block);
        std::memset(own, 0, s.wide * sizeof(float));
      }
    for (int64_t e = 0; !shared && e < in.experts; ++e)
      for (int64_t kind = 0; !sorted.used[e] && kind < kinds; ++kind)
        if (results[kind] != nullptr)
          std::memset(
              static_cast<T*>(results[kind]) + (e * in.own_groups + tile.first_group) * square,
              0,
              together * square * sizeof(T));
  });
}

}  // namespace

const HiddenKernels MPOE_HIDDEN[2] = {
    {forward<float>, backward<float>},
    {forward<BFloat16>, backward<BFloat16>},
};

}  // namespace mpoe
