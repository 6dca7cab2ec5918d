// First each expert's neurons: its rows of x are gathered into a block that stays in the cache and
// meet its packed weights; h, times the gate, is kept per slot, [T K, m]. Then the output, some
// columns at a time: expert by expert, rows of h meet those columns of its weights and are added to
// float32 sums of their tokens, all of which stay in the cache. The gradient of x is the same sum,
// of dz and right. Weight gradients are sums over an expert's rows. An expert with few rows reads
// its weights in place.
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/buffer.h"
#include "common/parallel.h"
#include "cpu/experts/kernels.h"
#include "cpu/gemm/multiply.h"

namespace mpoe {
namespace {

// Of an expert: packing its weights costs more than reading them in place.
constexpr int64_t kFewRows = 8;
constexpr int64_t kBlockBytes = 384 * 1024;   // of rows that are gathered at once, if a tile's fit
constexpr int64_t kSumFloats = 1 << 19;       // of sums that stay in the cache
constexpr int64_t kHiddenElements = 1 << 23;  // of h that the forward keeps at once

// Some neurons of one expert, whole panels but for the last.
struct Part {
  int64_t expert, first, count;
};

template <class T>
class Neurons {
 public:
  Neurons(const GemmKernels& gemm, const NeuronExperts& in)
      : gemm_(gemm),
        kernels_(expert_kernels(in.dtype)),
        in_(in),
        sorted_(in, std::max<int64_t>(1, in.tokens)),
        slots_(sorted_.view()),
        panels_(ceil_divide(in.neurons, kPanel)),
        stride_(row_stride(gemm, in.neurons)) {
    const std::vector<int64_t>& used = sorted_.used_experts();
    for (const int64_t e : used)
      most_ = std::max(most_, sorted_.rows(e));
    const int64_t tile = gemm.best_rows;
    const int64_t row = std::max(in.in_features, in.out_features) * size_of(in.dtype);
    const int64_t rows = kBlockBytes / std::max<int64_t>(1, row) / tile * tile;
    block_ = std::min(std::clamp<int64_t>(rows, tile, 8 * tile), most_);
    // A few parts per thread, so that none waits long for the last.
    const int64_t threads = num_threads();
    int64_t wanted = 1;
    if (threads > 1 && !used.empty())
      wanted = ceil_divide(4 * threads, std::ssize(used));
    part_ = ceil_divide(panels_, std::min(wanted, panels_)) * kPanel;
    for (const int64_t e : used)
      for (int64_t first = 0; first < in.neurons; first += part_)
        parts_.push_back({e, first, std::min(part_, in.neurons - first)});
  }

  void forward(T* out) {
    Buffer<T> hidden = slot_rows();
    share_out(std::ssize(parts_), [&] {
      return [&, work = Work(*this)](int64_t number) mutable {
        activate(parts_[number], work, hidden.get());
      };
    });
    collect({{hidden.get(), static_cast<const T*>(in_.left)}}, in_.out_features, out);
  }

  void backward(const T* grad, const ExpertsGradients& out) {
    Buffer<T> dz = slot_rows();
    Buffer<T> dvalue = in_.gated() ? slot_rows() : Buffer<T>();
    const SlotGradients rows{dz.get(), in_.gated() ? dvalue.get() : dz.get()};
    Buffer<float> dgates(panels_ * sorted_.count());
    share_out(std::ssize(parts_), [&] {
      return [&, work = Work(*this), back = Back(*this)](int64_t number) mutable {
        turn_back(parts_[number], work, back, grad, rows, dgates.get(), out);
        store_part(parts_[number], back, out);
      };
    });
    clear_unused(out);
    if (out.dgates != nullptr)
      add_gates(dgates.get(), out.dgates);
    if (out.dx == nullptr)
      return;
    std::vector<Term> terms{{rows.dvalue, static_cast<const T*>(in_.right)}};
    if (in_.gated())
      terms.push_back({rows.dz, static_cast<const T*>(in_.right_gate)});
    collect(terms, in_.in_features, static_cast<T*>(out.dx));
  }

 private:
  struct Work;
  struct Back;
  // Of slots [slots, stride_].
  struct SlotGradients {
    T* dz;
    T* dvalue;
  };

  bool few(int64_t expert) const { return sorted_.rows(expert) <= kFewRows; }
  // Memory for packed weights, if an expert needs it.
  Buffer<T> for_panels(int64_t elements) const {
    return Buffer<T>(most_ <= kFewRows ? 0 : elements);
  }
  // The same for a part's.
  Buffer<T> panels_of(int64_t width) const { return for_panels(part_ * padded_k(gemm_, width)); }

  // [slots, stride_], zero where products read beyond m.
  Buffer<T> slot_rows() const {
    Buffer<T> rows(sorted_.count() * stride_);
    for (int64_t k = in_.neurons; k < padded_k(gemm_, in_.neurons); ++k)
      for (int64_t s = 0; s < sorted_.count(); ++s)
        rows.get()[s * stride_ + k] = T{};
    return rows;
  }

  // Some slots' rows of a matrix [T, width], gathered, and packed weights that they meet.
  struct Gathered {
    Gathered(const Neurons& all, int64_t width)
        : width(width),
          stride(row_stride(all.gemm_, width)),
          rows(all.block_ * stride),
          panels(all.panels_of(width)) {}

    const int64_t width, stride;
    Buffer<T> rows, panels;
  };

  // f(first slot, rows)
  template <class F>
  void for_each_block(const Part& part, const F& f) const {
    const int64_t last = slots_.offsets[part.expert + 1];
    for (int64_t first = slots_.offsets[part.expert]; first < last; first += block_)
      f(first, std::min(block_, last - first));
  }

  // hidden [slots, stride_] = h of a part, times the gates.
  void activate(const Part& part, Work& work, T* hidden) const {
    work.begin(part);
    for_each_block(part, [&](int64_t first, int64_t rows) {
      work.products(part, first, rows);
      for (int64_t c = 0; c < part.count; c += kPanel) {
        NeuronTile tile = work.tile(part, rows, c);
        tile.h = hidden + first * stride_ + part.first + c;
        tile.h_stride = stride_;
        kernels_.activate(in_.activation, tile);
      }
    });
  }

  // A part's gradients: of its slots in `slot_gradients`, of its weights in `back`.
  void turn_back(const Part& part,
                 Work& work,
                 Back& back,
                 const T* grad,
                 const SlotGradients& slot_gradients,
                 float* dgates,
                 const ExpertsGradients& out) const {
    work.begin(part);
    back.begin(part);
    for_each_block(part, [&](int64_t first, int64_t rows) {
      back.product(part, grad, first, rows);
      work.products(part, first, rows);
      const int64_t place = first * stride_ + part.first;
      T* const dz = slot_gradients.dz + place;
      T* const dvalue = slot_gradients.dvalue + place;
      for (int64_t c = 0; c < part.count; c += kPanel) {
        NeuronTile tile = work.tile(part, rows, c);
        tile.dh = back.dh.get() + c * block_;
        tile.h = back.h.get() + c;
        tile.h_stride = back.h_stride;
        tile.dz = dz + c;
        tile.dvalue = dvalue + c;
        tile.stride = stride_;
        tile.dbias = back.dbias.get() + c;
        tile.dgates = dgates + (part.first + c) / kPanel * sorted_.count() + first;
        kernels_.turn_back(in_.activation, tile);
      }
      const bool adds = first > slots_.offsets[part.expert];
      if (out.dleft != nullptr) {
        back.turn(rows, back.grad);
        back.add(part, back.h.get(), back.h_stride, rows, in_.out_features, back.dleft, adds);
      }
      if (out.dright != nullptr || out.dright_gate != nullptr)
        back.turn(rows, work.x);
      if (out.dright != nullptr)
        back.add(part, dvalue, stride_, rows, in_.in_features, back.dright, adds);
      if (out.dright_gate != nullptr)
        back.add(part, dz, stride_, rows, in_.in_features, back.dright_gate, adds);
    });
  }

  void store_part(const Part& part, Back& back, const ExpertsGradients& out) const {
    const int64_t row = part.expert * in_.neurons + part.first;
    store(part, back.dright, in_.in_features, out.dright, row);
    store(part, back.dleft, in_.out_features, out.dleft, row);
    store(part, back.dright_gate, in_.in_features, out.dright_gate, row);
    if (out.dbias != nullptr)
      gemm_.round_row(back.dbias.get(), static_cast<T*>(out.dbias) + row, part.count);
  }

  void clear_unused(const ExpertsGradients& out) const {
    for (int64_t e = 0; e < in_.experts; ++e) {
      if (sorted_.rows(e) > 0)
        continue;
      clear(out.dright, e, in_.neurons * in_.in_features);
      clear(out.dleft, e, in_.neurons * in_.out_features);
      clear(out.dright_gate, e, in_.neurons * in_.in_features);
      clear(out.dbias, e, in_.neurons);
    }
  }

  // dgates [T, K] from those of every panel of neurons, in the order of slots.
  void add_gates(const float* of_panels, float* dgates) const {
    std::fill_n(dgates, in_.tokens * in_.top_k, 0.0f);
    for (int64_t p = 0; p < panels_; ++p)
      for (int64_t s = 0; s < sorted_.count(); ++s)
        dgates[slots_.slots[s]] += of_panels[p * sorted_.count() + s];
  }

  void gather(const void* matrix, int64_t first, int64_t rows, Gathered& to) const {
    constexpr int64_t kAhead = 4, kLine = 64 / sizeof(T);
    const T* const from = static_cast<const T*>(matrix);
    const int64_t width = to.width;
    for (int64_t r = 0; r < rows; ++r) {
      if (r + kAhead < rows) {
        const T* const later = from + slots_.owners[first + r + kAhead] * width;
        for (int64_t c = 0; c < std::min<int64_t>(width, 8 * kLine); c += kLine)
          __builtin_prefetch(later + c);
      }
      T* const row = to.rows.get() + r * to.stride;
      std::memcpy(row, from + slots_.owners[first + r] * width, width * sizeof(T));
      std::fill(row + width, row + padded_k(gemm_, width), T{});
    }
  }

  // Asks for weights that are read once: many lines come at a time, more than by reading them row
  // by row.
  static void fetch(const T* weights, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int64_t{sizeof(T)})
      __builtin_prefetch(weights + i, 0, 2);
  }

  const T* weights_of(const Part& part, const void* weights, int64_t width) const {
    return static_cast<const T*>(weights) + (part.expert * in_.neurons + part.first) * width;
  }
  // Packed weights of a part, as the right operand of products with rows of `width` elements;
  // nothing for few rows.
  void pack_weights(const Part& part, const void* weights, int64_t width, Buffer<T>& panels) const {
    if (!few(part.expert))
      gemm_.pack_transposed(panels.get(),
                            padded_k(gemm_, width) / gemm_.unit,
                            weights_of(part, weights, width),
                            width,
                            width,
                            part.count);
  }

  // tiles [panels, block_, 32] = rows times a part's weights: packed, or in place for few rows.
  void multiply(const Part& part,
                const Gathered& a,
                int64_t rows,
                const void* weights,
                const Buffer<T>& panels,
                Buffer<float>& tiles) const {
    const int64_t width = a.width, stride = a.stride;
    const T* const own = weights_of(part, weights, width);
    const int64_t k = padded_k(gemm_, width);
    if (few(part.expert))
      fetch(own, part.count * width);
    for (int64_t c = 0; c < part.count; c += kPanel) {
      float* const tile = tiles.get() + c * block_;
      if (few(part.expert))
        gemm_.multiply_dots(rows,
                            std::min(kPanel, part.count - c),
                            width,
                            a.rows.get(),
                            stride,
                            own + c * width,
                            width,
                            tile,
                            kPanel);
      else
        for_each_tile(rows, kStripRows, [&](int64_t first, int64_t count) {
          multiply_rows_any_length(gemm_,
                                   count,
                                   k / gemm_.unit,
                                   a.rows.get() + first * stride,
                                   stride,
                                   panels.get() + c * k,
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
          x(all, all.in_.in_features),
          gate_panels(all.in_.gated() ? all.panels_of(x.width) : Buffer<T>()),
          z(all.part_ * all.block_),
          value(!all.in_.gated() ? 0 : all.part_ * all.block_),
          gates(all.block_) {}

    void begin(const Part& part) {
      all.pack_weights(part, all.in_.right, x.width, x.panels);
      if (all.in_.gated())
        all.pack_weights(part, all.in_.right_gate, x.width, gate_panels);
    }
    void products(const Part& part, int64_t first, int64_t count) {
      const NeuronExperts& in = all.in_;
      all.gather(in.x, first, count, x);
      for (int64_t r = 0; r < count; ++r)
        gates.get()[r] = in.gates[all.slots_.slots[first + r]];
      all.multiply(part, x, count, in.right, x.panels, in.gated() ? value : z);
      if (in.gated())
        all.multiply(part, x, count, in.right_gate, gate_panels, z);
    }
    NeuronTile tile(const Part& part, int64_t count, int64_t c) const {
      NeuronTile tile{};
      tile.rows = count;
      tile.columns = std::min(kPanel, part.count - c);
      tile.z = z.get() + c * all.block_;
      if (all.in_.gated())
        tile.value = value.get() + c * all.block_;
      tile.gates = gates.get();
      if (all.in_.bias != nullptr)
        tile.bias =
            static_cast<const T*>(all.in_.bias) + part.expert * all.in_.neurons + part.first + c;
      return tile;
    }

    const Neurons& all;
    Gathered x;
    Buffer<T> gate_panels;
    Buffer<float> z, value, gates;
  };

  // One thread's scratch for gradients of a part.
  struct Back {
    explicit Back(const Neurons& all)
        : all(all),
          h_stride(row_stride(all.gemm_, all.part_)),
          widest(std::max(all.in_.in_features, all.in_.out_features)),
          grad(all, all.in_.out_features),
          h(all.block_ * h_stride),
          left(all.part_ * padded_k(all.gemm_, all.block_)),
          right(round_up(widest, kPanel) * padded_k(all.gemm_, all.block_)),
          dh(all.part_ * all.block_),
          dbias(all.part_),
          dright(all.part_ * round_up(all.in_.in_features, kPanel)),
          dleft(all.part_ * round_up(all.in_.out_features, kPanel)),
          dright_gate(!all.in_.gated() ? 0 : all.part_ * round_up(all.in_.in_features, kPanel)) {}

    void begin(const Part& part) {
      std::fill_n(dbias.get(), all.part_, 0.0f);
      all.pack_weights(part, all.in_.left, grad.width, grad.panels);
    }
    // dh = grad down^T
    void product(const Part& part, const T* rows, int64_t first, int64_t count) {
      all.gather(rows, first, count, grad);
      all.multiply(part, grad, count, all.in_.left, grad.panels, dh);
    }
    // Packs the right operand of `add`.
    void turn(int64_t count, const Gathered& b) {
      const int64_t units = ceil_divide(count, all.gemm_.unit);
      all.gemm_.pack(right.get(), units, b.rows.get(), b.stride, count, b.width);
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
        add_column_products(gemm,
                            part.count,
                            units,
                            left.get(),
                            right.get() + p * panel,
                            1,
                            sum.get() + p * kPanel,
                            sum_stride,
                            0,
                            adds);
    }

    const Neurons& all;
    const int64_t h_stride, widest;
    Gathered grad;
    Buffer<T> h, left, right;
    Buffer<float> dh, dbias, dright, dleft, dright_gate;
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
        for (const int64_t e : sorted_.used_experts())
          for (const Term& term : terms) {
            const T* const weights = term.weights + e * m * width + first;
            const T* const rows = term.rows + slots_.offsets[e] * stride_;
            const int64_t* const owners = slots_.owners + slots_.offsets[e];
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
        multiply_rows_any_length(gemm_,
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
  const ExpertKernels& kernels_;
  const NeuronExperts& in_;
  const SortedSlots sorted_;
  const SlotsView& slots_;
  const int64_t panels_, stride_;
  int64_t most_ = 0;      // rows of an expert
  int64_t block_, part_;  // rows gathered at once; neurons of a part
  std::vector<Part> parts_;
};

}  // namespace

void experts_forward(const NeuronExperts& in, void* out) {
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

void experts_backward(const NeuronExperts& in, const void* grad, const ExpertsGradients& out) {
  with_element_type(in.dtype, [&]<class T>(const GemmKernels& gemm, T) {
    Neurons<T>(gemm, in).backward(static_cast<const T*>(grad), out);
  });
}

}  // namespace mpoe
