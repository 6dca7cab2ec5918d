#include "cpu/neurons/neurons.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/buffer.h"
#include "common/cpu_features.h"
#include "common/parallel.h"
#include "cpu/gemm/multiply.h"
#include "cpu/routing/routing.h"

namespace mpoe {
namespace {

using std::int64_t;

// Of an expert: packing its weights costs more than reading them in place
constexpr int64_t kFewRows = 8;
constexpr int64_t kBlockBytes =
    384 * 1024;                          // of rows that are gathered at once, if that is a tile's
constexpr int64_t kSumFloats = 1 << 19;  // of sums that stay in the cache
constexpr int64_t kHiddenElements = 1 << 23;  // of h that the forward keeps at once

const NeuronKernels& neuron_kernels(Dtype dtype) {
  return MPOE_TABLE_IN_USE(kNeurons)[dtype == Dtype::kBFloat16 ? 1 : 0];
}

// The slots that have an expert, by expert and token.
struct SortedSlots {
  std::vector<int64_t> slots, owners;  // t * K + k, and t
  std::vector<int64_t> offsets;        // [E + 1]
  std::vector<int64_t> used;           // experts with slots

  explicit SortedSlots(const NeuronExperts& in)
      : slots(in.tokens * in.top_k), offsets(in.experts + 1) {
    slots.resize(sort_pairs(
        in.index, {0, in.tokens * in.top_k}, in.experts, 0, offsets.data(), slots.data()));
    for (const int64_t slot : slots)
      owners.push_back(slot / in.top_k);
    for (int64_t e = 0; e < in.experts; ++e)
      if (rows(e) > 0)
        used.push_back(e);
  }
  int64_t count() const { return static_cast<int64_t>(slots.size()); }
  int64_t rows(int64_t e) const { return offsets[e + 1] - offsets[e]; }
};

// Some neurons of one expert, whole panels but for the last.
struct Part {
  int64_t expert, first, count;
};

template <class T>
class Neurons {
 public:
  Neurons(const GemmKernels& gemm, const NeuronExperts& in)
      : gemm_(gemm),
        kernels_(neuron_kernels(in.dtype)),
        in_(in),
        sorted_(in),
        panels_(ceil_divide(in.neurons, kPanel)),
        stride_(row_stride(gemm, in.neurons)) {
    const int64_t size = sizeof(T), widest = std::max(in.in_features, in.out_features),
                  tile = gemm.best_rows;
    for (const int64_t e : sorted_.used)
      most_ = std::max(most_, sorted_.rows(e));
    block_ = std::clamp<int64_t>(
        kBlockBytes / std::max<int64_t>(1, widest * size) / tile * tile, tile, 8 * tile);
    block_ = std::min(block_, most_);
    // A few parts per thread, so that none waits long for the last.
    const int64_t used = static_cast<int64_t>(sorted_.used.size()), threads = num_threads();
    const int64_t wanted = threads == 1 || used == 0 ? 1 : ceil_divide(4 * threads, used);
    part_ = ceil_divide(panels_, std::min(wanted, panels_)) * kPanel;
    for (const int64_t e : sorted_.used)
      for (int64_t first = 0; first < in.neurons; first += part_)
        parts_.push_back({e, first, std::min(part_, in.neurons - first)});
  }

  void forward(T* out) {
    Buffer<T> hidden = slot_rows();
    share_out(parts(), [&] {
      return [&, work = Work(*this)](int64_t number) mutable {
        const Part& part = parts_[number];
        work.begin(part);
        work.for_each_block(part, [&](int64_t first, int64_t rows) {
          work.products(part, first, rows);
          for (int64_t c = 0; c < part.count; c += kPanel) {
            NeuronTile tile = work.tile(part, rows, c);
            tile.h = hidden.get() + first * stride_ + part.first + c;
            tile.h_stride = stride_;
            kernels_.activate(in_.activation, tile);
          }
        });
      };
    });
    collect({{hidden.get(), static_cast<const T*>(in_.down)}}, in_.out_features, out);
  }

  void backward(const T* grad, const NeuronExpertsGradients& out) {
    const int64_t m = in_.neurons;
    const bool gated = in_.gate_up != nullptr;
    Buffer<T> dz = slot_rows(), dvalue = gated ? slot_rows() : Buffer<T>();
    Buffer<float> dgates(panels_ * sorted_.count());
    share_out(parts(), [&] {
      return [&, work = Work(*this), back = Back(*this)](int64_t number) mutable {
        const Part& part = parts_[number];
        work.begin(part);
        back.begin(part);
        work.for_each_block(part, [&](int64_t first, int64_t rows) {
          const bool adds = first > sorted_.offsets[part.expert];
          back.product(part, grad, first, rows);
          work.products(part, first, rows);
          T* const own_dz = dz.get() + first * stride_ + part.first;
          T* const own_dvalue = gated ? dvalue.get() + first * stride_ + part.first : own_dz;
          for (int64_t c = 0; c < part.count; c += kPanel) {
            NeuronTile tile = work.tile(part, rows, c);
            tile.dh = back.dh.get() + c * block_;
            tile.h = back.h.get() + c;
            tile.h_stride = back.h_stride;
            tile.dz = own_dz + c;
            tile.dvalue = own_dvalue + c;
            tile.stride = stride_;
            tile.dbias = back.dbias.get() + c;
            tile.dgates = dgates.get() + (part.first + c) / kPanel * sorted_.count() + first;
            kernels_.turn_back(in_.activation, tile);
          }
          if (out.ddown != nullptr) {
            back.turn(rows, back.rows.get(), back.rows_stride, in_.out_features);
            back.add(part, back.h.get(), back.h_stride, rows, in_.out_features, back.ddown, adds);
          }
          if (out.dup != nullptr || out.dgate_up != nullptr)
            back.turn(rows, work.rows.get(), work.rows_stride, in_.in_features);
          if (out.dup != nullptr)
            back.add(part, own_dvalue, stride_, rows, in_.in_features, back.dup, adds);
          if (out.dgate_up != nullptr)
            back.add(part, own_dz, stride_, rows, in_.in_features, back.dgate_up, adds);
        });
        const int64_t row = part.expert * m + part.first;
        store(part, back.dup, in_.in_features, out.dup, row);
        store(part, back.ddown, in_.out_features, out.ddown, row);
        store(part, back.dgate_up, in_.in_features, out.dgate_up, row);
        if (out.dbias != nullptr)
          gemm_.round_row(back.dbias.get(), static_cast<T*>(out.dbias) + row, part.count);
      };
    });
    for (int64_t e = 0; e < in_.experts; ++e) {
      if (sorted_.rows(e) > 0)
        continue;
      clear(out.dup, e, m * in_.in_features);
      clear(out.ddown, e, m * in_.out_features);
      clear(out.dgate_up, e, m * in_.in_features);
      clear(out.dbias, e, m);
    }
    if (out.dgates != nullptr) {
      std::fill_n(out.dgates, in_.tokens * in_.top_k, 0.0f);
      for (int64_t p = 0; p < panels_; ++p)
        for (int64_t s = 0; s < sorted_.count(); ++s)
          out.dgates[sorted_.slots[s]] += dgates.get()[p * sorted_.count() + s];
    }
    if (out.dx == nullptr)
      return;
    std::vector<Term> terms{{(gated ? dvalue : dz).get(), static_cast<const T*>(in_.up)}};
    if (gated)
      terms.push_back({dz.get(), static_cast<const T*>(in_.gate_up)});
    collect(terms, in_.in_features, static_cast<T*>(out.dx));
  }

 private:
  int64_t parts() const { return static_cast<int64_t>(parts_.size()); }
  bool few(int64_t expert) const { return sorted_.rows(expert) <= kFewRows; }
  // Memory for packed weights, if an expert needs it.
  Buffer<T> for_panels(int64_t elements) const {
    return Buffer<T>(most_ <= kFewRows ? 0 : elements);
  }

  // [slots, stride_], zero where products read beyond m.
  Buffer<T> slot_rows() const {
    Buffer<T> rows(sorted_.count() * stride_);
    for (int64_t k = in_.neurons; k < padded_k(gemm_, in_.neurons); ++k)
      for (int64_t s = 0; s < sorted_.count(); ++s)
        rows.get()[s * stride_ + k] = T{};
    return rows;
  }

  void gather(
      const T* from, int64_t width, int64_t first, int64_t rows, T* to, int64_t stride) const {
    constexpr int64_t kAhead = 4, kLine = 64 / sizeof(T);
    for (int64_t r = 0; r < rows; ++r) {
      if (r + kAhead < rows) {
        const T* const later = from + sorted_.owners[first + r + kAhead] * width;
        for (int64_t c = 0; c < std::min<int64_t>(width, 8 * kLine); c += kLine)
          __builtin_prefetch(later + c);
      }
      std::memcpy(to + r * stride, from + sorted_.owners[first + r] * width, width * sizeof(T));
      for (int64_t c = width; c < padded_k(gemm_, width); ++c)
        to[r * stride + c] = T{};
    }
  }

  // Asks for weights that are read once: many lines come at a time, more than by reading them row
  // by row.
  static void fetch(const T* weights, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(weights + i, 0, 2);
  }

  // Packed weights of a part, as the right operand of products with rows of `width` elements.
  void pack_weights(const Part& part, const void* weights, int64_t width, T* panels) const {
    const T* const own =
        static_cast<const T*>(weights) + (part.expert * in_.neurons + part.first) * width;
    gemm_.pack_transposed(
        panels, padded_k(gemm_, width) / gemm_.unit, own, width, width, part.count);
  }

  // tiles [panels, block_, 32] = rows times a part's weights: packed, or in place for few rows.
  void multiply(const Part& part,
                const T* a,
                int64_t stride,
                int64_t rows,
                int64_t width,
                const void* weights,
                const T* panels,
                float* tiles) const {
    const T* const own =
        static_cast<const T*>(weights) + (part.expert * in_.neurons + part.first) * width;
    const int64_t k = padded_k(gemm_, width);
    if (few(part.expert))
      fetch(own, part.count * width);
    for (int64_t c = 0; c < part.count; c += kPanel) {
      float* const tile = tiles + c * block_;
      if (few(part.expert))
        gemm_.multiply_dots(rows,
                            std::min(kPanel, part.count - c),
                            width,
                            a,
                            stride,
                            own + c * width,
                            width,
                            tile,
                            kPanel);
      else
        for_each_tile(rows, kStripRows, [&](int64_t first, int64_t count) {
          multiply_rows(gemm_,
                        count,
                        k / gemm_.unit,
                        a + first * stride,
                        stride,
                        panels + c * k,
                        tile + first * kPanel,
                        false,
                        part.count - c);
        });
    }
  }

  // One thread's scratch for x up^T and x gate_up^T.
  struct Work {
    explicit Work(const Neurons& all)
        : all(all),
          rows_stride(row_stride(all.gemm_, all.in_.in_features)),
          rows(all.block_ * rows_stride),
          panels(all.for_panels(all.part_ * padded_k(all.gemm_, all.in_.in_features))),
          gate_panels(all.for_panels(all.in_.gate_up == nullptr
                                         ? 0
                                         : all.part_ * padded_k(all.gemm_, all.in_.in_features))),
          z(all.part_ * all.block_),
          value(all.in_.gate_up == nullptr ? 0 : all.part_ * all.block_),
          gates(all.block_) {}

    void begin(const Part& part) {
      if (all.few(part.expert))
        return;
      all.pack_weights(part, all.in_.up, all.in_.in_features, panels.get());
      if (all.in_.gate_up != nullptr)
        all.pack_weights(part, all.in_.gate_up, all.in_.in_features, gate_panels.get());
    }
    // f(first slot, rows)
    template <class F>
    void for_each_block(const Part& part, const F& f) const {
      const int64_t last = all.sorted_.offsets[part.expert + 1];
      for (int64_t first = all.sorted_.offsets[part.expert]; first < last; first += all.block_)
        f(first, std::min(all.block_, last - first));
    }
    void products(const Part& part, int64_t first, int64_t count) {
      const NeuronExperts& in = all.in_;
      const bool gated = in.gate_up != nullptr;
      all.gather(
          static_cast<const T*>(in.x), in.in_features, first, count, rows.get(), rows_stride);
      for (int64_t r = 0; r < count; ++r)
        gates.get()[r] = in.gates[all.sorted_.slots[first + r]];
      const auto times = [&](const void* weights, const T* packed, float* tiles) {
        all.multiply(part, rows.get(), rows_stride, count, in.in_features, weights, packed, tiles);
      };
      times(in.up, panels.get(), (gated ? value : z).get());
      if (gated)
        times(in.gate_up, gate_panels.get(), z.get());
    }
    NeuronTile tile(const Part& part, int64_t count, int64_t c) const {
      NeuronTile tile{};
      tile.rows = count;
      tile.columns = std::min(kPanel, part.count - c);
      tile.z = z.get() + c * all.block_;
      if (all.in_.gate_up != nullptr)
        tile.value = value.get() + c * all.block_;
      tile.gates = gates.get();
      if (all.in_.bias != nullptr)
        tile.bias =
            static_cast<const T*>(all.in_.bias) + part.expert * all.in_.neurons + part.first + c;
      return tile;
    }

    const Neurons& all;
    const int64_t rows_stride;
    Buffer<T> rows, panels, gate_panels;
    Buffer<float> z, value, gates;
  };

  // One thread's scratch for gradients of a part.
  struct Back {
    explicit Back(const Neurons& all)
        : all(all),
          rows_stride(row_stride(all.gemm_, all.in_.out_features)),
          h_stride(row_stride(all.gemm_, all.part_)),
          widest(std::max(all.in_.in_features, all.in_.out_features)),
          rows(all.block_ * rows_stride),
          panels(all.for_panels(all.part_ * padded_k(all.gemm_, all.in_.out_features))),
          h(all.block_ * h_stride),
          left(all.part_ * padded_k(all.gemm_, all.block_)),
          right(round_up(widest, kPanel) * padded_k(all.gemm_, all.block_)),
          dh(all.part_ * all.block_),
          dbias(all.part_),
          dup(all.part_ * round_up(all.in_.in_features, kPanel)),
          ddown(all.part_ * round_up(all.in_.out_features, kPanel)),
          dgate_up(all.in_.gate_up == nullptr ? 0
                                              : all.part_ * round_up(all.in_.in_features, kPanel)) {
    }

    void begin(const Part& part) {
      std::fill_n(dbias.get(), all.part_, 0.0f);
      if (!all.few(part.expert))
        all.pack_weights(part, all.in_.down, all.in_.out_features, panels.get());
    }
    // dh = grad down^T
    void product(const Part& part, const T* grad, int64_t first, int64_t count) {
      const int64_t width = all.in_.out_features;
      all.gather(grad, width, first, count, rows.get(), rows_stride);
      all.multiply(
          part, rows.get(), rows_stride, count, width, all.in_.down, panels.get(), dh.get());
    }
    // Packs the right operand of `add`.
    void turn(int64_t count, const T* b, int64_t stride, int64_t width) {
      all.gemm_.pack(right.get(), ceil_divide(count, all.gemm_.unit), b, stride, count, width);
    }
    // sum [part, width] (adds: +)= a^T b over `count` rows
    void add(const Part& part,
             const T* a,
             int64_t stride,
             int64_t count,
             int64_t width,
             Buffer<float>& sum,
             bool adds) {
      const GemmKernels& gemm = all.gemm_;
      const int64_t units = ceil_divide(count, gemm.unit), panel = units * gemm.unit * kPanel;
      const int64_t sum_stride = round_up(width, kPanel);
      gemm.pack(left.get(), units, a, stride, count, part.count);
      for (int64_t p = 0; p * kPanel < width; ++p)
        for_column_tiles(gemm,
                         part.count,
                         units,
                         left.get(),
                         1,
                         [&](const T* columns, int64_t first, int64_t tile, int64_t) {
                           multiply_columns(gemm,
                                            tile,
                                            units,
                                            columns,
                                            right.get() + p * panel,
                                            sum.get() + first * sum_stride + p * kPanel,
                                            sum_stride,
                                            adds);
                         });
    }

    const Neurons& all;
    const int64_t rows_stride, h_stride, widest;
    Buffer<T> rows, panels, h, left, right;
    Buffer<float> dh, dbias, dup, ddown, dgate_up;
  };

  void store(const Part& part, Buffer<float>& sum, int64_t width, void* out, int64_t row) const {
    if (out == nullptr)
      return;
    for (int64_t j = 0; j < part.count; ++j)
      gemm_.round_row(
          sum.get() + j * round_up(width, kPanel), static_cast<T*>(out) + (row + j) * width, width);
  }
  void clear(void* out, int64_t expert, int64_t size) const {
    if (out != nullptr)
      std::memset(static_cast<T*>(out) + expert * size, 0, size * sizeof(T));
  }

  // Rows of slots [slots, stride_] and the weights [E, m, width] that they meet.
  struct Term {
    const T *rows, *weights;
  };

  // out [T, width] = for each token, the sum of its slots' products.
  void collect(const std::vector<Term>& terms, int64_t width, T* out) const {
    if (in_.tokens == 0)
      return;
    const int64_t threads = num_threads(), m = in_.neurons, k = padded_k(gemm_, m);
    const int64_t most = round_up(ceil_divide(width, threads), kPanel);
    const int64_t step =
        std::clamp(kSumFloats / in_.tokens / kPanel * kPanel, kPanel, std::max(kPanel, most));
    share_out(ceil_divide(width, step), [&] {
      return [&, sums = Buffer<float>(in_.tokens * step), panels = for_panels(step * k)](
                 int64_t number) mutable {
        const int64_t first = number * step, columns = std::min(step, width - first);
        std::fill_n(sums.get(), in_.tokens * step, 0.0f);
        for (const int64_t e : sorted_.used)
          for (const Term& term : terms) {
            const T* const weights = term.weights + e * m * width + first;
            const T* const rows = term.rows + sorted_.offsets[e] * stride_;
            const int64_t* const owners = sorted_.owners.data() + sorted_.offsets[e];
            if (few(e)) {
              for (int64_t j = 0; j < m; ++j)
                fetch(weights + j * width, columns);
              kernels_.add_products(rows,
                                    stride_,
                                    sorted_.rows(e),
                                    owners,
                                    weights,
                                    width,
                                    m,
                                    columns,
                                    sums.get(),
                                    step);
            } else
              add_packed(rows,
                         sorted_.rows(e),
                         owners,
                         weights,
                         width,
                         columns,
                         panels.get(),
                         sums.get(),
                         step);
          }
        for (int64_t t = 0; t < in_.tokens; ++t)
          gemm_.round_row(sums.get() + t * step, out + t * width + first, columns);
      };
    });
  }
  void add_packed(const T* rows,
                  int64_t count,
                  const int64_t* owners,
                  const T* weights,
                  int64_t width,
                  int64_t columns,
                  T* panels,
                  float* sums,
                  int64_t step) const {
    const int64_t k = padded_k(gemm_, in_.neurons);
    alignas(64) float tile[kStripRows * kPanel];
    gemm_.pack(panels, k / gemm_.unit, weights, width, in_.neurons, columns);
    for_each_tile(count, kStripRows, [&](int64_t first, int64_t some) {
      for (int64_t c = 0; c < columns; c += kPanel) {
        multiply_rows(gemm_,
                      some,
                      k / gemm_.unit,
                      rows + first * stride_,
                      stride_,
                      panels + c * k,
                      tile,
                      false);
        kernels_.add_rows(tile, some, owners + first, sums + c, step);
      }
    });
  }

  const GemmKernels& gemm_;
  const NeuronKernels& kernels_;
  const NeuronExperts& in_;
  const SortedSlots sorted_;
  const int64_t panels_, stride_;
  int64_t most_ = 0;      // rows of an expert
  int64_t block_, part_;  // rows gathered at once; neurons of a part
  std::vector<Part> parts_;
};

}  // namespace

void neuron_experts(const NeuronExperts& in, void* out) {
  // A piece of the tokens at a time: h of all would be [T K, m].
  const int64_t most =
      std::max<int64_t>(1, kHiddenElements / std::max<int64_t>(1, in.top_k * in.neurons));
  with_element_type(in.dtype, [&]<class T>(const GemmKernels& gemm, T) {
    for (int64_t first = 0; first < in.tokens; first += most) {
      NeuronExperts piece = in;
      piece.tokens = std::min(most, in.tokens - first);
      piece.x = static_cast<const T*>(in.x) + first * in.in_features;
      piece.gates += first * in.top_k;
      piece.index += first * in.top_k;
      Neurons<T>(gemm, piece).forward(static_cast<T*>(out) + first * in.out_features);
    }
  });
}

void neuron_experts_backward(const NeuronExperts& in,
                             const void* grad,
                             const NeuronExpertsGradients& out) {
  with_element_type(in.dtype, [&]<class T>(const GemmKernels& gemm, T) {
    Neurons<T>(gemm, in).backward(static_cast<const T*>(grad), out);
  });
}

}  // namespace mpoe
