// Runs one probe: probe NAME MISTAKE(0|1) ORDER(ascending|descending|random) COPIES(lazy|eager).
// Exit status: 0 right, 1 wrong values, 2 the emulator reports an error (on stderr); sanitizers
// have their own.
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "emulator/probes.cuh"

namespace {

struct Probe {
  const char* name;
  void (*kernel)(const int*, int*, int, bool);
  unsigned threads;
  int count;
  std::size_t inputs;
  std::size_t outputs;
  std::size_t shared_ints;
  int (*expected)(const int* in, int i);  // null: the values are not checked
};

int same(const int* in, int i) {
  return in[i];
}
int reversed(const int* in, int i) {
  return in[95 - i];
}
int of_the_next_thread(const int* in, int i) {
  return in[i / 128 * 128 + (i + 4) % 128];
}
int votes(const int* in, int) {
  unsigned odd = 0;
  for (int i = 0; i < 32; ++i)
    odd |= static_cast<unsigned>(in[i] % 2) << i;
  return static_cast<int>(odd);
}

const Probe kProbes[] = {
    {"reverse", emu_probes::reverse, 96, 96, 96, 96, 96, reversed},
    {"pipeline", emu_probes::pipeline, 32, 3, 384, 384, 256, of_the_next_thread},
    {"meeting", emu_probes::meeting, 64, 64, 64, 64, 0, same},
    {"vote", emu_probes::vote, 32, 32, 32, 32, 0, votes},
    {"shifted", emu_probes::shifted, 64, 64, 64, 64, 0, same},
    {"partial", emu_probes::partial, 64, 64, 64, 64, 64, same},
    {"padded", emu_probes::padded, 32, 0, 1, 128, 16 * 72 / 2, nullptr},
};

int run(const Probe& probe, bool mistake) {
  std::unique_ptr<int[]> in(new int[probe.inputs]), out(new int[probe.outputs]());
  for (std::size_t i = 0; i < probe.inputs; ++i)
    in[i] = static_cast<int>((i * 7919 + 13) % 1009);
  LAUNCH(probe.kernel,
         dim3(1),
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
  emu::set_schedule(words[3], words[4]);
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
