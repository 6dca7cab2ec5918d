// What the sanitizer programs share: random numbers, arrays whose ends are the ends of their
// allocation, comparison.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "common/types.h"

namespace mpoe {

// Threads of parallel_std.cpp.
void set_threads(int count);

namespace check {

inline int failures = 0;

inline void require(bool condition, const std::string& what) {
  if (condition)
    return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 2654435761u + 88172645463325252u) {}
  std::uint64_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  // In [0, n).
  std::int64_t below(std::int64_t n) {
    return static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(n));
  }
  // In (-1, 1).
  double uniform() {
    return static_cast<double>(static_cast<std::int64_t>(bits() >> 11)) * 0x1p-52 - 1;
  }

 private:
  std::uint64_t state_;
};

// `count` elements that start `shift` elements after a 64-byte aligned address and end where the
// allocation ends.
class Array {
 public:
  Array() = default;
  Array(Dtype dtype, std::int64_t count, std::int64_t shift = 0) : dtype_(dtype), count_(count) {
    const std::size_t bytes = static_cast<std::size_t>((count + shift) * size_of(dtype));
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes) != 0)
      std::abort();
    memory_ = memory;
    data_ = static_cast<char*>(memory) + shift * size_of(dtype);
    std::memset(memory, 0xff, bytes);  // NaN in every dtype
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  Array(Array&& other) noexcept { *this = std::move(other); }
  Array& operator=(Array&& other) noexcept {
    std::swap(dtype_, other.dtype_);
    std::swap(count_, other.count_);
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Array() { std::free(memory_); }

  static Array random(
      Dtype dtype, std::int64_t count, Random& random, double scale = 1, std::int64_t shift = 0) {
    Array array(dtype, count, shift);
    for (std::int64_t i = 0; i < count; ++i)
      array.set(i, scale * random.uniform());
    return array;
  }

  void* data() const { return data_; }
  Dtype dtype() const { return dtype_; }
  std::int64_t count() const { return count_; }
  double get(std::int64_t i) const {
    const char* place = data_ + i * size_of(dtype_);
    if (dtype_ == Dtype::kFloat64)
      return at<double>(place);
    if (dtype_ == Dtype::kFloat32)
      return at<float>(place);
    if (dtype_ == Dtype::kBFloat16)
      return load(BFloat16{at<std::uint16_t>(place)});
    return load(Float16{at<std::uint16_t>(place)});
  }
  void set(std::int64_t i, double value) {
    char* place = data_ + i * size_of(dtype_);
    if (dtype_ == Dtype::kFloat64)
      std::memcpy(place, &value, 8);
    const float single = static_cast<float>(value);
    if (dtype_ == Dtype::kFloat32)
      std::memcpy(place, &single, 4);
    BFloat16 brain;
    Float16 half;
    store(brain, single);
    store(half, single);
    if (dtype_ == Dtype::kBFloat16)
      std::memcpy(place, &brain, 2);
    if (dtype_ == Dtype::kFloat16)
      std::memcpy(place, &half, 2);
  }
  std::vector<double> values() const {
    std::vector<double> all(static_cast<std::size_t>(count_));
    for (std::int64_t i = 0; i < count_; ++i)
      all[i] = get(i);
    return all;
  }
  bool finite() const {
    for (std::int64_t i = 0; i < count_; ++i)
      if (!std::isfinite(get(i)))
        return false;
    return true;
  }
  bool same_bits(const Array& other) const {
    return count_ == other.count_ &&
           (count_ == 0 ||
            std::memcmp(data_, other.data_, static_cast<std::size_t>(count_ * size_of(dtype_))) ==
                0);
  }

 private:
  template <class T>
  static T at(const char* place) {
    T value;
    std::memcpy(&value, place, sizeof(T));
    return value;
  }

  Dtype dtype_ = Dtype::kFloat32;
  std::int64_t count_ = 0;
  void* memory_ = nullptr;
  char* data_ = nullptr;
};

// ||actual - truth|| / ||truth||; infinite if `actual` is not finite everywhere. A truth of zeros
// is compared exactly.
inline double relative_error(const std::vector<double>& actual, const std::vector<double>& truth) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < truth.size(); ++i) {
    if (!std::isfinite(actual[i]))
      return INFINITY;
    difference += (actual[i] - truth[i]) * (actual[i] - truth[i]);
    norm += truth[i] * truth[i];
  }
  return std::sqrt(norm > 0 ? difference / norm : difference);
}

// Of float32 or bfloat16.
inline double tolerance(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 2e-6 : 1.5e-2;
}

inline void require_close(const Array& actual,
                          const std::vector<double>& truth,
                          double allowed,
                          const std::string& what) {
  const bool sizes = actual.count() == static_cast<std::int64_t>(truth.size());
  const double error = sizes ? relative_error(actual.values(), truth) : INFINITY;
  require(error <= allowed, what + ": relative error " + std::to_string(error));
}

// A result of a call, and where its memory begins, see `Array`.
struct Output {
  std::string name;
  Dtype dtype;
  std::int64_t count, shift = 0;
};

inline std::vector<Array> arrays(const std::vector<Output>& outputs) {
  std::vector<Array> all;
  for (const Output& output : outputs)
    all.emplace_back(output.dtype, output.count, output.shift);
  return all;
}

// `run` fills the results, whose memory is NaN: with one thread they are finite everywhere, with
// three they have the same bits.
template <class Run>
void compare(const std::string& what, const std::vector<Output>& outputs, const Run& run) {
  std::vector<Array> before;
  for (const int threads : {1, 3}) {
    set_threads(threads);
    std::vector<Array> results = arrays(outputs);
    run(results);
    for (std::size_t k = 0; k < results.size(); ++k) {
      const std::string name = what + ": " + outputs[k].name;
      if (threads == 1)
        require(results[k].finite(), name + ", not finite");
      else
        require(results[k].same_bits(before[k]), name + ", other bits");
    }
    before = std::move(results);
  }
}

inline const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

// If false, main returns 77: the instruction set that MPOE_CPU_ISA names does not exist here, and
// nothing is run.
inline bool isa_exists() {
  const char* wanted = std::getenv("MPOE_CPU_ISA");
  return wanted == nullptr || std::strcmp(wanted, isa_name(active_isa())) == 0;
}

inline int finish(const char* program) {
  std::printf("%s, %s: %s\n", program, isa_name(active_isa()), failures == 0 ? "passed" : "FAILED");
  return failures == 0 ? 0 : 1;
}

}  // namespace check
}  // namespace mpoe
