// Tiles in shared memory: rows padded to avoid bank conflicts, and the fragments that mma.sync
// takes from them.
#pragma once
#include "cuda/device.cuh"

namespace mpoe::cuda {

// BM x BN results per block of (BM / WM) (BN / WN) warps; 64 bytes of the inner index at a time.
template <class T, int BM, int BN, int WM, int WN>
struct Tile {
  static constexpr int kM = BM;
  static constexpr int kN = BN;
  static constexpr int kK = 64 / static_cast<int>(sizeof(T));
  static constexpr int kWarpM = WM;
  static constexpr int kWarpN = WN;
  static constexpr int kWarpsN = BN / WN;
  static constexpr int kThreads = 32 * (BM / WM) * (BN / WN);
  static constexpr int kRowTiles = WM / 16;
  static constexpr int kColumnTiles = WN / 8;
  static_assert(WM % 16 == 0 && WN % 16 == 0 && BM % WM == 0 && BN % WN == 0);
};

// Row stride of a tile, in elements, for rows of `width` elements. The number of 16-byte chunks per
// row is made odd: eight rows then start in different groups of four banks (ldmatrix, and 32-bit
// reads of rows g, columns t).
template <class T>
__host__ __device__ constexpr int padded_stride(int width) {
  const int per_chunk = 16 / static_cast<int>(sizeof(T));
  return ((width + per_chunk - 1) / per_chunk | 1) * per_chunk;
}

// A place in shared memory, also as the address that instructions take.
template <class T>
struct InShared {
  T* data;
  dev::Shared address;

  __device__ __forceinline__ explicit InShared(T* place)
      : InShared(place, dev::shared_address(place)) {}
  __device__ __forceinline__ InShared operator+(int elements) const {
    return {data + elements,
            address + static_cast<dev::Shared>(elements) * static_cast<dev::Shared>(sizeof(T))};
  }

 private:
  __device__ __forceinline__ InShared(T* place, dev::Shared own) : data(place), address(own) {}
};

// Fragments of 16-bit tiles. A tile is [mn][k] (k_major) or [k][mn].
template <class T>
struct Fragments {
  static constexpr int kStep = 16;
  static constexpr bool kPartialSums = false;
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[2];
  };

  template <bool kMajor>
  static __device__ __forceinline__ void load_a(
      A& a, InShared<T> tile, int stride, int m, int k, int lane) {
    const int part = lane >> 3,
              row = lane & 7;  // matrices: (m, k) (m + 8, k) (m, k + 8) (m + 8, k + 8)
    const int dm = (part & 1) * 8;
    const int dk = (part >> 1) * 8;
    if (kMajor) {
      dev::ldmatrix_x4(a.r, (tile + (m + dm + row) * stride + k + dk).address);
    } else {
      dev::ldmatrix_x4_trans(a.r, (tile + (k + dk + row) * stride + m + dm).address);
    }
  }
  // Columns n .. n + 15 as two fragments.
  template <bool kMajor>
  static __device__ __forceinline__ void load_b(
      B& b0, B& b1, InShared<T> tile, int stride, int n, int k, int lane) {
    const int part = lane >> 3,
              row = lane & 7;  // matrices: (k, n) (k + 8, n) (k, n + 8) (k + 8, n + 8)
    const int dk = (part & 1) * 8;
    const int dn = (part >> 1) * 8;
    uint32_t r[4];
    if (kMajor) {
      dev::ldmatrix_x4(r, (tile + (n + dn + row) * stride + k + dk).address);
    } else {
      dev::ldmatrix_x4_trans(r, (tile + (k + dk + row) * stride + n + dn).address);
    }
    b0.r[0] = r[0];
    b0.r[1] = r[1];
    b1.r[0] = r[2];
    b1.r[1] = r[3];
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b) {
    dev::mma_m16n8k16<T>(d, a.r, b.r);
  }
};

// float32 without tensor cores: every product and sum is one rounded fused multiply-add. A thread
// holds the same results as with mma.sync: rows g, g + 8 and columns 2t, 2t + 1 of every 16 x 8
// tile (g = lane / 4, t = lane % 4).
template <>
struct Fragments<float> {
  static constexpr int kStep = 4;
  static constexpr bool kPartialSums = true;  // one sum of thousands of terms would lose digits
  struct A {
    dev::Pack<float, kStep> row[2];
  };
  struct B {
    dev::Pack<float, kStep> column[2];
  };

  template <bool kMajor>
  static __device__ __forceinline__ void load_a(
      A& a, InShared<float> tile, int stride, int m, int k, int lane) {
    const int g = lane >> 2;
    UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = m + g + half * 8;
      if (kMajor) {
        a.row[half] = dev::load<kStep>(tile.data + row * stride + k);
      } else {
        UNROLL
        for (int i = 0; i < kStep; ++i)
          a.row[half].v[i] = tile.data[(k + i) * stride + row];
      }
    }
  }
  template <bool kMajor>
  static __device__ __forceinline__ void load_columns(
      B& b, InShared<float> tile, int stride, int column, int k) {
    if (kMajor) {
      b.column[0] = dev::load<kStep>(tile.data + column * stride + k);
      b.column[1] = dev::load<kStep>(tile.data + (column + 1) * stride + k);
    } else {
      UNROLL
      for (int i = 0; i < kStep; ++i) {
        const auto pair = dev::load<2>(tile.data + (k + i) * stride + column);
        b.column[0].v[i] = pair.v[0];
        b.column[1].v[i] = pair.v[1];
      }
    }
  }
  template <bool kMajor>
  static __device__ __forceinline__ void load_b(
      B& b0, B& b1, InShared<float> tile, int stride, int n, int k, int lane) {
    const int column = n + (lane & 3) * 2;
    load_columns<kMajor>(b0, tile, stride, column, k);
    load_columns<kMajor>(b1, tile, stride, column + 8, k);
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b) {
    UNROLL
    for (int i = 0; i < kStep; ++i) {
      d[0] = fmaf(a.row[0].v[i], b.column[0].v[i], d[0]);
      d[1] = fmaf(a.row[0].v[i], b.column[1].v[i], d[1]);
      d[2] = fmaf(a.row[1].v[i], b.column[0].v[i], d[2]);
      d[3] = fmaf(a.row[1].v[i], b.column[1].v[i], d[3]);
    }
  }
};

}  // namespace mpoe::cuda
