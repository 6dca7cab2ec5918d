// Runs one probe: probe NAME MISTAKE(0|1) ORDER(ascending|descending|random) COPIES(lazy|eager).
// Exit status: 0 right, 1 wrong values, 2 the emulator reports an error (on stderr); sanitizers
// have their own.
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "emulator/probes.cuh"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace {

using Kernel = void (*)(const int*, int*, int, bool);
struct Probe {
  const char* name;
  Kernel kernel;
  unsigned blocks;
  unsigned threads;
  int count;
  std::size_t inputs;
  std::size_t outputs;
  std::size_t shared_ints;
  int (*expected)(const int* in, int i);  // null: the values are not checked
};

const Probe kProbes[] = {
    {"reverse",
     emu_probes::reverse,
     1,
     96,
     96,
     96,
     96,
     96,
     [](const int* in, int i) { return in[95 - i]; }},
    {"neighbours",
     emu_probes::neighbours,
     1,
     128,
     128,
     128,
     128,
     0,
     [](const int* in, int i) { return in[i] + in[i ^ 1]; }},
    {"pipeline",
     emu_probes::pipeline,
     1,
     32,
     3,
     384,
     384,
     256,
     [](const int* in, int i) { return in[i / 128 * 128 + (i + 4) % 128]; }},
    {"meeting",
     emu_probes::meeting,
     1,
     64,
     64,
     64,
     64,
     0,
     [](const int* in, int i) { return in[i]; }},
    {"vote",
     emu_probes::vote,
     1,
     32,
     32,
     32,
     32,
     0,
     [](const int* in, int) {
       unsigned votes = 0;
       for (int i = 0; i < 32; ++i)
         votes |= static_cast<unsigned>(in[i] % 2) << i;
       return static_cast<int>(votes);
     }},
    {"shifted",
     emu_probes::shifted,
     1,
     64,
     64,
     64,
     64,
     0,
     [](const int* in, int i) { return in[i]; }},
    {"partial",
     emu_probes::partial,
     1,
     64,
     64,
     64,
     64,
     64,
     [](const int* in, int i) { return in[i]; }},
    {"padded", emu_probes::padded, 1, 32, 0, 1, 128, 16 * 72 / 2, nullptr},
};

int run(const Probe& probe, bool mistake) {
  std::unique_ptr<int[]> in(new int[probe.inputs]), out(new int[probe.outputs]());
  for (std::size_t i = 0; i < probe.inputs; ++i)
    in[i] = static_cast<int>((i * 7919 + 13) % 1009);
  LAUNCH(probe.kernel,
         dim3(probe.blocks),
         dim3(probe.threads),
         probe.shared_ints * 4,
         nullptr,
         static_cast<const int*>(in.get()),
         out.get(),
         probe.count,
         mistake);
  if (probe.expected == nullptr) {
    const auto& stats = emu::stats();
    const bool conflict_free =
        stats.ldmatrix_wavefronts == 4 * stats.ldmatrix && stats.ldmatrix > 0;
    std::printf("ldmatrix %llu wavefronts %llu\n",
                static_cast<unsigned long long>(stats.ldmatrix),
                static_cast<unsigned long long>(stats.ldmatrix_wavefronts));
    return conflict_free ? 0 : 1;
  }
  for (std::size_t i = 0; i < probe.outputs; ++i) {
    if (out[i] != probe.expected(in.get(), static_cast<int>(i)))
      return 1;
  }
  return 0;
}

}  // namespace

int main(int count, char** words) {
  if (count != 5)
    return 64;
  const std::string order = words[3];
  emu::config().order = order == "ascending"    ? emu::Order::kAscending
                        : order == "descending" ? emu::Order::kDescending
                                                : emu::Order::kRandom;
  emu::config().blocks_descending = order == "descending";
  emu::config().cp_async_lazy = std::string(words[4]) == "lazy";
  for (const auto& probe : kProbes) {
    if (words[1] != std::string(probe.name))
      continue;
    try {
      return run(probe, words[2][0] == '1');
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      return 2;
    }
  }
  return 64;
}
