// How a product of packed operands is cut into tasks, and where a thread packs.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace gcfast::cpu {

inline int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }
inline int64_t padded(int64_t size, int64_t step) { return blocks(size, step) * step; }

// Blocks of rows x columns, as even as the steps allow.
struct Cut {
  struct Side {
    int64_t size, step, most;  // of a block: a multiple of `step`, at most `most` if that is a step
    int64_t steps;             // of a block that is not cut further for the sake of tasks
  };
  int64_t rows, columns, row_blocks, column_blocks;
  Cut(const Side& r, const Side& c, int64_t tasks) {
    const auto pieces = [](const Side& s) { return blocks(s.size, std::max(s.step, s.most / s.step * s.step)); };
    int64_t i = pieces(r), j = pieces(c);
    for (;;) {
      rows = padded(blocks(r.size, i), r.step), columns = padded(blocks(c.size, j), c.step);
      row_blocks = blocks(r.size, rows), column_blocks = blocks(c.size, columns);
      // Packing costs 1 / rows + 1 / columns of the products: the longer side is cut, as long as that is little.
      const bool down = rows > r.steps * r.step, across = columns > c.steps * c.step;
      if (row_blocks * column_blocks >= tasks || !(down || across)) return;
      ++(down && (rows > columns || !across) ? i : j);
    }
  }
};

// Uninitialised memory that begins a cache line.
template <class T> class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<T*>(std::aligned_alloc(64, padded(size * static_cast<int64_t>(sizeof(T)), 64)))) {
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }

 private:
  struct Free { void operator()(T* x) const { std::free(x); } };
  std::unique_ptr<T, Free> data_;
};

}  // namespace gcfast::cpu
