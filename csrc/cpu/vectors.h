// A vector of one instruction set, and a transpose made of them. Included once for each, inside a namespace and a
// `#pragma GCC target`, with GCFAST_VECTOR (bytes of a vector) and GCFAST_VECTORS (of a tile's columns) defined.
// Nothing from the standard library is called here: a function template that is not inlined would be one for all
// instruction sets.

template <class T> struct Lanes {
  typedef T Vec __attribute__((vector_size(GCFAST_VECTOR), aligned(alignof(T)), may_alias));
  static constexpr int width = GCFAST_VECTOR / sizeof(T);
  static constexpr int columns = GCFAST_VECTORS * width;  // of a micro-kernel's tile
};

template <class T, int S> __attribute__((always_inline)) inline void exchange(typename Lanes<T>::Vec* a) {
  constexpr int W = Lanes<T>::width;
  using Mask = decltype(typename Lanes<T>::Vec{} < typename Lanes<T>::Vec{});
  Mask low, high;
#pragma GCC unroll 16
  for (int l = 0; l < W; ++l) low[l] = l & S ? W + l - S : l, high[l] = l & S ? W + l : l + S;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) {
      const typename Lanes<T>::Vec x = a[i], y = a[i + S];
      a[i] = __builtin_shuffle(x, y, low);
      a[i + S] = __builtin_shuffle(x, y, high);
    }
}

// The rows of a matrix `lane` apart, and rows with a list of their places.
template <class T> struct Evenly {
  const T* x;
  int64_t lane;
  const T* operator()(int64_t row) const { return x + row * lane; }
};
template <class T> struct Listed {
  const T* x;
  const int64_t* at;
  const T* operator()(int64_t row) const { return x + at[row]; }
};

// Rows [first, first + rows) x columns, transposed into columns x `to` at out, zero from `rows` on.
template <class T, class Rows>
void transpose(const Rows& in, int64_t first, int64_t rows, int64_t columns, T* out, int64_t to, int64_t ldo) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int W = Lanes<T>::width;
  for (int64_t i = 0; i < to; i += W) {
    const int64_t here = rows - i < W ? rows - i : W, fits = to - i < W ? to - i : W;
    int64_t k = 0;
    if (fits == W)
      for (; k + W <= columns; k += W) {
        Vec a[W];
        for (int r = 0; r < W; ++r) a[r] = r < here ? *reinterpret_cast<const Vec*>(in(first + i + r) + k) : Vec{};
        if constexpr (W == 16) exchange<T, 8>(a);
        if constexpr (W >= 8) exchange<T, 4>(a);
        if constexpr (W >= 4) exchange<T, 2>(a);
        exchange<T, 1>(a);
        for (int r = 0; r < W; ++r) *reinterpret_cast<Vec*>(out + (k + r) * ldo + i) = a[r];
      }
    for (; k < columns; ++k)
      for (int r = 0; r < fits; ++r) out[k * ldo + i + r] = r < here ? in(first + i + r)[k] : T(0);
  }
}

// The same for rows `ld` apart.
template <class T>
void transpose(const T* in, int64_t ld, int64_t rows, int64_t columns, T* out, int64_t to, int64_t ldo) {
  transpose<T>(Evenly<T>{in, ld}, 0, rows, columns, out, to, ldo);
}
