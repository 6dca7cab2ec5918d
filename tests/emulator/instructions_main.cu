// Every instruction that tests/emulator/twins.h and intrinsics.h imitate, on inputs whose results
// are exact: prints one line of hexadecimal numbers for each. Compiled with the emulator and with
// nvcc, it must print the same lines (tests/device/test_device_instructions.py).
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/device.cuh"

namespace {

using Words = std::vector<uint32_t>;

// in and out of every kernel: 32-bit words, the same number for each lane of one warp.

// Small integers: products and sums are exact, in whatever order tensor cores add.
template <class T>
__global__ void mma(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  uint32_t a[4];
  uint32_t b[2];
  float d[4];
  for (int i = 0; i < 4; ++i)
    a[i] = in[lane * 10 + i];
  for (int i = 0; i < 2; ++i)
    b[i] = in[lane * 10 + 4 + i];
  for (int i = 0; i < 4; ++i)
    d[i] = __uint_as_float(in[lane * 10 + 6 + i]);
  dev::mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i)
    memcpy(out + lane * 4 + i, d + i, 4);
}

template <bool kTransposed>
__global__ void ldmatrix(const uint32_t* in, uint32_t* out) {
  DYN_SHARED(uint32_t, rows);
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i)
    rows[lane * 4 + i] = in[lane * 4 + i];
  __syncthreads();
  uint32_t r[4];
  // Lanes pass rows in an order that is not memory's.
  const dev::Shared row = dev::shared_address(rows + (lane * 5 % 32) * 4);
  if (kTransposed) {
    dev::ldmatrix_x4_trans(r, row);
  } else {
    dev::ldmatrix_x4(r, row);
  }
  for (int i = 0; i < 4; ++i)
    out[lane * 4 + i] = r[i];
}

// Every third lane's copy becomes zeros.
__global__ void cp_async(const uint32_t* in, uint32_t* out) {
  DYN_SHARED(uint32_t, stage);
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i)
    stage[lane * 4 + i] = 0xffffffffu;
  dev::cp_async16(dev::shared_address(stage + lane * 4), in + lane * 4, lane % 3 != 0);
  dev::cp_async_commit();
  dev::cp_async_wait<0>();
  __syncthreads();
  const int other = 31 - lane;
  for (int i = 0; i < 4; ++i)
    out[lane * 4 + i] = stage[other * 4 + i];
}

__global__ void roundings(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) {
    const float value = __uint_as_float(in[lane * 8 + i]);
    const auto brain = dev::from_float<dev::bf16>(value);
    const auto half = dev::from_float<dev::fp16>(value);
    uint16_t bits[2];
    memcpy(bits, &brain, 2);
    memcpy(bits + 1, &half, 2);
    out[lane * 8 + i] = bits[0] | static_cast<uint32_t>(bits[1]) << 16;
  }
}

__global__ void lanes(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  const int value = static_cast<int>(in[lane]);
  int got[5];
  got[0] = __shfl_sync(dev::kFullWarp, value, 7);
  got[1] = __shfl_xor_sync(dev::kFullWarp, value, 5);
  got[2] = __shfl_up_sync(dev::kFullWarp, value, 3u);
  got[3] = static_cast<int>(__ballot_sync(dev::kFullWarp, value % 3 == 0));
  got[4] = static_cast<int>(__match_any_sync(dev::kFullWarp, value % 5));
  for (int i = 0; i < 5; ++i)
    out[lane * 5 + i] = static_cast<uint32_t>(got[i]);
}

class Buffer {
 public:
  explicit Buffer(const Words& words) : words_(words) {
#if defined(MPOE_CUDA_EMULATED)
    data_ = words_.data();
#else
    check(cudaMalloc(&data_, bytes()));
    check(cudaMemcpy(data_, words_.data(), bytes(), cudaMemcpyHostToDevice));
#endif
  }
  uint32_t* data() const { return data_; }
  const Words& fetch() {
#if !defined(MPOE_CUDA_EMULATED)
    check(cudaGetLastError());
    check(cudaMemcpy(words_.data(), data_, bytes(), cudaMemcpyDeviceToHost));
#endif
    return words_;
  }

 private:
#if !defined(MPOE_CUDA_EMULATED)
  static void check(cudaError_t error) {
    if (error == cudaSuccess)
      return;
    std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
    std::exit(2);
  }
  std::size_t bytes() const { return words_.size() * sizeof(uint32_t); }
#endif
  Words words_;
  uint32_t* data_ = nullptr;
};

using Kernel = void (*)(const uint32_t*, uint32_t*);
void run(const char* name, Kernel kernel, const Words& in, int out_per_lane) {
  Buffer from(in), to(Words(static_cast<std::size_t>(32 * out_per_lane), 0xdeadbeefu));
  LAUNCH(kernel,
         dim3(1),
         dim3(32),
         1024,
         nullptr,
         static_cast<const uint32_t*>(from.data()),
         to.data());
  std::printf("%s", name);
  for (const uint32_t word : to.fetch())
    std::printf(" %08x", word);
  std::printf("\n");
}

// Numbers that look random, the same everywhere.
uint32_t scrambled(uint32_t i) {
  i = (i ^ (i >> 16)) * 0x45d9f3bu;
  i = (i ^ (i >> 16)) * 0x45d9f3bu;
  return i ^ (i >> 16);
}
Words scrambled_words(int per_lane, uint32_t seed) {
  Words words;
  for (int i = 0; i < 32 * per_lane; ++i)
    words.push_back(scrambled(seed + static_cast<uint32_t>(i)));
  return words;
}
uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
// A small integer as bfloat16 (the upper half of its float32) or, also exactly, as float16.
uint32_t half_word(int value, bool brain) {
  if (brain)
    return bits_of(static_cast<float>(value)) >> 16;
  const uint32_t bits = bits_of(static_cast<float>(value));
  if ((bits & 0x7fffffffu) == 0)
    return 0;
  return (bits >> 16 & 0x8000u) | (((bits >> 13 & 0x3ffffu) - (112u << 10)) & 0x7fffu);
}
Words factors(bool brain, uint32_t seed) {  // of bfloat16, or float16
  const auto small = [&](uint32_t i) {
    return static_cast<int>(scrambled(seed + i) % 17) - 8;
  };
  Words words;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    for (uint32_t i = 0; i < 6; ++i) {
      const uint32_t at = lane * 100 + i * 2;
      words.push_back(half_word(small(at), brain) | half_word(small(at + 1), brain) << 16);
    }
    for (uint32_t i = 0; i < 4; ++i)
      words.push_back(bits_of(static_cast<float>(small(lane * 100 + 50 + i) * 3)));
  }
  return words;
}
// Ties, neighbours of ties, subnormal and large numbers; finite, as NaN has several encodings.
Words roundable() {
  Words words = scrambled_words(8, 11);
  for (std::size_t i = 0; i < words.size(); ++i) {
    if (i % 4 == 1)
      words[i] = (words[i] & 0xffff0000u) | 0x8000u;
    if (i % 4 == 2)
      words[i] = (words[i] & 0xffffe000u) | 0x1000u;
    if (i % 4 == 3)
      words[i] = (words[i] & 0x87ffffffu) | 0x38000000u;  // where float16 is subnormal or small
    if ((words[i] & 0x7f800000u) == 0x7f800000u)
      words[i] ^= 0x40000000u;
  }
  return words;
}

}  // namespace

int main() {
  run("mma.bf16", mma<dev::bf16>, factors(true, 1), 4);
  run("mma.fp16", mma<dev::fp16>, factors(false, 2), 4);
  run("ldmatrix", ldmatrix<false>, scrambled_words(4, 4), 4);
  run("ldmatrix.trans", ldmatrix<true>, scrambled_words(4, 5), 4);
  run("cp.async", cp_async, scrambled_words(4, 6), 4);
  run("roundings", roundings, roundable(), 8);
  run("lanes", lanes, scrambled_words(1, 7), 5);
  return 0;
}
