// Where the pieces of rows lie, on the device: pieces_source.h for CUDA kernels. See pieces.h.
#pragma once
#include "common/device.cuh"
#include "gather/pieces.h"

namespace lutra {
namespace cuda {

constexpr int kPieceNumbers = 64;  // of the kinds: they travel as arguments of kernels

struct DevicePieces {
  PieceKind kind;
  int m;
  int64_t rows;
  const uint8_t* codes;
  int64_t code_bytes;
  const int32_t* remap;
  int64_t table_rows;
  int64_t a[kPieceNumbers];

  // The row of piece j of row x (robe: the element; the sign goes to *odd), or -1 where a stored address lies outside.
  __device__ __forceinline__ int64_t address(int64_t x, int j, bool* odd) const {
    *odd = false;
    switch (kind) {
      case PieceKind::codes: {
        const int bits = static_cast<int>(a[1]);
        const uint8_t* c = codes + x * code_bytes;
        const int64_t base = static_cast<int64_t>(j) << bits;
        if (bits == 8) return base + c[j];
        if (bits == 4) return base + (c[j >> 1] >> (j & 1) * 4 & 15);
        const int first = j * bits >> 3, last = (j * bits + bits - 1) >> 3;
        uint32_t word = 0;
        for (int i = last; i >= first; --i) word = word << 8 | c[i];
        return base + (word >> (j * bits & 7) & ((1u << bits) - 1));
      }
      case PieceKind::digits: {
        const uint32_t q = static_cast<uint32_t>(a[1]);
        uint32_t v = static_cast<uint32_t>(x);
        for (int i = 0; i < j; ++i) v /= q;
        return j * a[2] + (j + 1 < m ? v % q : v);  // the last digit is all that is left
      }
      case PieceKind::qr: {
        const uint32_t c = static_cast<uint32_t>(a[0]), v = static_cast<uint32_t>(x);
        return j == 0 ? v / c : a[1] + v % c;
      }
      case PieceKind::hash: {
        const uint64_t v = static_cast<uint64_t>(x) % kPiecePrime;
        const uint64_t h = (static_cast<uint64_t>(a[2 + j]) * v + static_cast<uint64_t>(a[2 + m + j])) % kPiecePrime;
        return static_cast<uint32_t>(h) % static_cast<uint32_t>(a[1]);
      }
      case PieceKind::robe: {
        const uint64_t v = static_cast<uint64_t>(x) % kPiecePrime, k = static_cast<uint64_t>(j);
        const uint64_t h =
            (static_cast<uint64_t>(a[2]) * v + static_cast<uint64_t>(a[3]) * k + static_cast<uint64_t>(a[4])) %
            kPiecePrime;
        const uint64_t g =
            (static_cast<uint64_t>(a[5]) * v + static_cast<uint64_t>(a[6]) * k + static_cast<uint64_t>(a[7])) %
            kPiecePrime;
        *odd = g & 1;
        return static_cast<uint32_t>(h) % static_cast<uint32_t>(a[1]);
      }
      case PieceKind::modulo: return static_cast<uint32_t>(x) % static_cast<uint32_t>(a[0]);
      default: {
        const uint32_t s = static_cast<uint32_t>(a[0]), v = static_cast<uint32_t>(x);
        const int64_t row = static_cast<int64_t>(remap[v / s]) * a[0] + v % s;
        return row >= 0 && row < table_rows ? row : -1;
      }
    }
  }
};

// The numbers are read on the host; at most kPieceNumbers.
inline DevicePieces device_pieces(const PieceSource& s, int64_t count) {
  if (count > kPieceNumbers) throw std::length_error("lutra: CUDA takes at most 64 numbers of pieces");
  DevicePieces d{s.kind, static_cast<int>(s.m), s.rows, s.codes, s.code_bytes, s.remap, s.table_rows, {}};
  for (int64_t i = 0; i < count; ++i) d.a[i] = s.numbers[i];
  return d;
}

}  // namespace cuda
}  // namespace lutra
