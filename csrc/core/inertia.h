// How many eigenvalues of a Gram exceed a shift: G - s I = L D L^T, eliminated without pivoting (core/rank_bounds.h
// says why that is sound), and from it the rank of a matrix with bounds on both sides.
//
// One source for the CPU, where a Team is a single thread and a lane of V a matrix, and for the GPU, where a Team is a
// warp or a block on one matrix in shared memory. Left-looking in R columns at a time, so that products of R x R tiles
// in registers are nearly all of the work. A Team has rank(), size(), sync() and sum(), L::larger() over its threads;
// every thread calls every function, and decisions are the same in all of them.
#pragma once
#include <cstdint>

#include "double_double.h"
#include "rank_bounds.h"

namespace gcfast {

struct Alone {
  static GCFAST_HD int rank() { return 0; }
  static GCFAST_HD int size() { return 1; }
  static GCFAST_HD void sync() {}
  template <class V> static GCFAST_HD V sum(const V& v) { return v; }
  template <class V> static GCFAST_HD V largest(const V& v) { return v; }
};

template <class V> struct Pivots {
  V positive;  // how many
  V size;      // sum |d_k| l_ik^2
  V square;    // sum l_ik^2
};

// Memory for one elimination: Num numbers in rows of `ld`. Above the diagonal and in `diagonal` lies G, below it L.
// A thread's tile has `Own` rows (columns in invert()) of the R at a time: R where it is alone, 1 where a team is to
// have a part for each of its threads.
template <class Num, int R, int Own = R> struct Elimination {
  using V = Lane<Num>;
  using Op = Arithmetic<Num>;
  using L = Lanes<V>;
  int n, padded, ld;
  Num *a, *diagonal, *pivot, *w, *block;

  static GCFAST_HD int padded_size(int n) { return (n + R - 1) / R * R; }
  static GCFAST_HD int stride(int n) { return padded_size(n) | 1; }  // odd: no bank of memory twice in a column
  static GCFAST_HD int64_t numbers(int n) {
    const int64_t p = padded_size(n);
    return p * stride(n) + (2 + R) * p + R * R;
  }
  GCFAST_HD Elimination(int size, Num* memory)
      : n(size), padded(padded_size(size)), ld(stride(size)), a(memory),
        diagonal(a + static_cast<int64_t>(padded) * ld), pivot(diagonal + padded), w(pivot + padded),
        block(w + R * padded) {}

  GCFAST_HD Num& at(int i, int j) const { return a[static_cast<int64_t>(i) * ld + j]; }
  GCFAST_HD Num& gram(int i, int j) const { return i == j ? diagonal[i] : i > j ? at(j, i) : at(i, j); }

  // ||G||_F^2 / trace^2
  template <class Team> GCFAST_HD V frobenius_square(const Team& team, const V& inverse_trace) const {
    V sum{};
    for (int j = team.rank(); j < n; j += team.size()) {
      V row{};
      for (int i = 0; i < j; ++i) {
        const V g = Op::head(at(i, j)) * inverse_trace;
        row = row + g * g;
      }
      const V g = Op::head(diagonal[j]) * inverse_trace;
      sum = sum + (row + row + g * g);
    }
    return team.sum(sum);
  }

  template <class Team> GCFAST_HD V trace(const Team& team) const {
    V sum{};
    for (int j = team.rank(); j < n; j += team.size()) sum = sum + Op::head(diagonal[j]);
    return team.sum(sum);
  }

  // v^T G v / v^T v after three power steps from a vector of no particular direction.
  template <class Team> GCFAST_HD V rayleigh(const Team& team, const V& inverse_trace) const {
    Num *v = w, *y = w + padded;
    for (int i = team.rank(); i < n; i += team.size()) {
      const double golden = 0.6180339887498949 * (i + 1);
      v[i] = Op::of(V{} + (golden - static_cast<int>(golden) + (i % 2 ? 0.5 : -1.5)));
    }
    V quotient{};
    for (int step = 0; step < 4; ++step) {
      team.sync();
      V vv{}, vy{};
      for (int i = team.rank(); i < n; i += team.size()) {
        V s = Op::head(diagonal[i]) * Op::head(v[i]);
        for (int j = 0; j < i; ++j) s = s + Op::head(at(j, i)) * Op::head(v[j]);
        for (int j = i + 1; j < n; ++j) s = s + Op::head(at(i, j)) * Op::head(v[j]);
        vv = vv + Op::head(v[i]) * Op::head(v[i]);
        vy = vy + Op::head(v[i]) * s;
        y[i] = Op::of(s * inverse_trace);
      }
      quotient = team.sum(vy) / team.sum(vv);
      Num* const old = v;
      v = y, y = old;
    }
    team.sync();
    return quotient;
  }

  // `keep`: one or zero a pivot; a column of L whose pivot is not kept is zero. All are kept by default.
  template <class Team>
  GCFAST_HD Pivots<V> eliminate(const Team& team, const V& shift, const V& least_pivot, const V* keep = nullptr) const {
    Pivots<V> out{V{}, V{}, V{}};
    const int threads = team.size();
    for (int j0 = 0; j0 < padded; j0 += R) {
      for (int k = team.rank(); k < j0; k += threads) {
        GCFAST_UNROLL
        for (int c = 0; c < R; ++c) w[k * R + c] = Op::product(at(j0 + c, k), pivot[k]);
      }
      team.sync();
      // rows at and below the block: G - s I - L D L^T so far
      for (int first = j0 + team.rank(); first < padded; first += Own * threads) {
        Num x[Own][R];
        const Num* row[Own];
        GCFAST_UNROLL
        for (int r = 0; r < Own; ++r) {
          const int i = first + r * threads < padded ? first + r * threads : padded - 1;
          row[r] = &at(i, 0);
          GCFAST_UNROLL
          for (int c = 0; c < R; ++c)
            x[r][c] = i == j0 + c ? (i < n ? Op::difference(diagonal[i], shift) : Op::of(V{} + 1.0)) : gram(i, j0 + c);
        }
        for (int k = 0; k < j0; ++k) {
          GCFAST_UNROLL
          for (int r = 0; r < Own; ++r) {
            GCFAST_UNROLL
            for (int c = 0; c < R; ++c) x[r][c] = Op::sub_product(x[r][c], row[r][k], w[k * R + c]);
          }
        }
        GCFAST_UNROLL
        for (int r = 0; r < Own; ++r) {
          const int i = first + r * threads;
          GCFAST_UNROLL
          for (int c = 0; c < R; ++c)
            if (i < j0 + R)
              block[(i - j0) * R + c] = x[r][c];
            else if (i < padded)
              at(i, j0 + c) = x[r][c];
        }
      }
      team.sync();
      // the square on the diagonal, by every thread for itself
      Num l[R][R], ld_[R][R], inverse[R];
      V size[R];
      GCFAST_UNROLL
      for (int c = 0; c < R; ++c) {
        Num d = block[c * R + c];
        GCFAST_UNROLL
        for (int b = 0; b < c; ++b) d = Op::sub_product(d, l[c][b], ld_[c][b]);
        inverse[c] = Op::reciprocal(d);
        if (keep) inverse[c] = Op::of(keep[j0 + c] > 0 ? Op::head(inverse[c]) : V{});
        size[c] = L::magnitude(Op::head(d));
        V own_square{};
        GCFAST_UNROLL
        for (int r = c + 1; r < R; ++r) {
          Num x = block[r * R + c];
          GCFAST_UNROLL
          for (int b = 0; b < c; ++b) x = Op::sub_product(x, l[r][b], ld_[c][b]);
          l[r][c] = Op::product(x, inverse[c]);
          ld_[r][c] = Op::product(l[r][c], d);
          own_square = own_square + Op::head(l[r][c]) * Op::head(l[r][c]);
        }
        const V own = size[c] + size[c] * own_square;
        if (team.rank() == 0) {
          pivot[j0 + c] = d;
          GCFAST_UNROLL
          for (int r = c + 1; r < R; ++r) at(j0 + r, j0 + c) = l[r][c];
          if (j0 + c < n) {
            out.positive = out.positive + L::one_if_positive(Op::head(d));
            // a pivot near underflow would let a multiplier overflow: no bound then
            out.size = out.size + own + L::infinite_unless_above(size[c], least_pivot);
            out.square = out.square + (own_square + 1.0);
          }
        }
      }
      // and the rows below it
      for (int i = j0 + R + team.rank(); i < padded; i += threads) {
        Num x[R];
        GCFAST_UNROLL
        for (int c = 0; c < R; ++c) {
          x[c] = at(i, j0 + c);
          GCFAST_UNROLL
          for (int b = 0; b < c; ++b) x[c] = Op::sub_product(x[c], x[b], ld_[c][b]);
          x[c] = Op::product(x[c], inverse[c]);
          at(i, j0 + c) = x[c];
          const V square = Op::head(x[c]) * Op::head(x[c]);
          out.size = out.size + size[c] * square;
          out.square = out.square + square;
        }
      }
      team.sync();
    }
    return {team.sum(out.positive), team.sum(out.size), team.sum(out.square)};
  }

  struct Inverse {
    V square, scaled_square;  // ||L^-1||_F^2; the least known bound of ||D^(-1/2) L^-1||_2^2
  };
  // L^-1, in V, in the place of L.
  template <class Team> GCFAST_HD void invert(const Team& team) const {
    const int threads = team.size();
    for (int i0 = 0; i0 < padded; i0 += R) {
      V own[R][R];  // the inverse of the square on the diagonal
      GCFAST_UNROLL
      for (int c = 0; c < R; ++c) {
        GCFAST_UNROLL
        for (int r = 0; r < R; ++r) {
          if (r <= c) {
            own[r][c] = V{} + (r == c ? 1.0 : 0.0);
            continue;
          }
          V s = -Op::head(at(i0 + r, i0 + c));
          GCFAST_UNROLL
          for (int b = c + 1; b < r; ++b) s = s - Op::head(at(i0 + r, i0 + b)) * own[b][c];
          own[r][c] = s;
        }
      }
      for (int j0 = Own * team.rank(); j0 < i0; j0 += Own * threads) {
        V x[R][Own];
        GCFAST_UNROLL
        for (int c = 0; c < Own; ++c) {
          GCFAST_UNROLL
          for (int r = 0; r < R; ++r) {
            x[r][c] = -Op::head(at(i0 + r, j0 + c));
            GCFAST_UNROLL
            for (int b = c + 1; b < Own; ++b)
              x[r][c] = x[r][c] - Op::head(at(i0 + r, j0 + b)) * Op::head(at(j0 + b, j0 + c));
          }
        }
        for (int k = j0 + Own; k < i0; ++k) {
          GCFAST_UNROLL
          for (int r = 0; r < R; ++r) {
            GCFAST_UNROLL
            for (int c = 0; c < Own; ++c) x[r][c] = x[r][c] - Op::head(at(i0 + r, k)) * Op::head(at(k, j0 + c));
          }
        }
        GCFAST_UNROLL
        for (int c = 0; c < Own; ++c) {
          GCFAST_UNROLL
          for (int r = 0; r < R; ++r) {
            GCFAST_UNROLL
            for (int b = 0; b < r; ++b) x[r][c] = x[r][c] - Op::head(at(i0 + r, i0 + b)) * x[b][c];
            w[(j0 + c) * R + r] = Op::of(x[r][c]);
          }
        }
      }
      team.sync();
      for (int j = team.rank(); j < i0; j += threads) {
        GCFAST_UNROLL
        for (int r = 0; r < R; ++r) at(i0 + r, j) = w[j * R + r];
      }
      if (team.rank() == 0) {
        GCFAST_UNROLL
        for (int r = 1; r < R; ++r) {
          GCFAST_UNROLL
          for (int c = 0; c < r; ++c) at(i0 + r, i0 + c) = Op::of(own[r][c]);
        }
      }
      team.sync();
    }
  }

  // After invert(), all pivots positive.
  template <class Team> GCFAST_HD Inverse inverse_norms(const Team& team) const {
    const int threads = team.size();
    for (int i = team.rank(); i < n; i += threads) w[i] = Op::of(L::root(1.0 / Op::head(pivot[i])));
    team.sync();
    Inverse out{V{}, V{}};
    V scaled{}, row_largest{}, column_largest{};
    for (int i = team.rank(); i < n; i += threads) {
      const V scale = Op::head(w[i]);
      V row{}, column = scale, square{};
      for (int j = 0; j < i; ++j) {
        const V y = Op::head(at(i, j));
        row = row + L::magnitude(y);
        square = square + y * y;
      }
      for (int k = i + 1; k < n; ++k) column = column + L::magnitude(Op::head(at(k, i))) * Op::head(w[k]);
      out.square = out.square + (square + 1.0);
      scaled = scaled + (square + 1.0) * (scale * scale);
      row_largest = L::larger(row_largest, scale * (row + 1.0));
      column_largest = L::larger(column_largest, column);
    }
    out.square = team.sum(out.square);
    scaled = team.sum(scaled);
    const V product = team.largest(row_largest) * team.largest(column_largest);
    out.scaled_square = L::smaller(product, scaled);  // a NaN stays in `scaled`
    team.sync();
    return out;
  }

  // The rank of every lane's matrix, G being there, ||G - B B^T|| <= gram_error. A lane's verdict is added to, never
  // weakened, and `bounds` is what was known of its matrix; its rank stays -1 where this precision does not decide.
  // The inertia is taken a little above the tolerance and, unless that finds all n, a little below it; where the
  // counts differ, sigma_max is bounded more sharply, by an inertia just above it, and the count above is taken
  // again. Double-double comes after double, which has mostly proved a lower bound: there the count below may be all
  // that is missing, and comes first.
  template <class Team>
  GCFAST_HD void examine(const Team& team, int64_t m, const V& gram_error, const RankOptions* options,
                         RankBounds* bounds, RankVerdict* verdict) const {
    enum Step { above, below, top };
    constexpr int kLanes = L::count;
    constexpr bool kDoubled = sizeof(Num) != sizeof(V);
    const V traces = trace(team), inverse_trace = 1.0 / traces, least_pivot = traces * 0x1p-206;
    const V squares = frobenius_square(team, inverse_trace);
    double low[kLanes], high[kLanes], shifts[kLanes];  // what the rank is at least and at most, as far as can be told
    bool open[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const double t = L::get(traces, l);
      bounds[l] = RankBounds(n, m, kDoubled, t, t * sqrt(L::get(squares, l)), L::get(gram_error, l), options[l]);
      open[l] = verdict[l].rank < 0 && t >= kLeastTrace && t <= kLargestTrace;
      low[l] = verdict[l].lower, high[l] = n + 1;
      if (open[l] && bounds[l].none()) {
        verdict[l].rank = verdict[l].lower = verdict[l].upper = 0;
        open[l] = false;
      }
    }
    bool well_known = false;  // sigma_max from below
    for (int s = 0; s < 4; ++s) {
      const Step step = s == 2 ? top : s == 3 || (s == 0) != kDoubled ? above : below;
      bool any = false, resolve = false;
      for (int l = 0; l < kLanes; ++l) resolve = resolve || (open[l] && bounds[l].may_resolve());
      if (resolve && !well_known && step != above) {
        const V quotient = rayleigh(team, inverse_trace);
        for (int l = 0; l < kLanes; ++l) bounds[l].rayleigh(L::get(quotient, l));
        well_known = true;
      }
      V shift = traces;  // any will do for the lanes that are left out
      bool in[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        in[l] = open[l] && ((step == above && s < 3) || bounds[l].resolves());
        shifts[l] = step == above   ? bounds[l].shift_above()
                    : step == below ? bounds[l].shift_below()
                                    : bounds[l].shift_of_top();
        if (in[l]) L::set(shift, l, shifts[l]);
        any = any || in[l];
      }
      if (!any) continue;
      const Pivots<V> pivots = eliminate(team, shift, least_pivot);
      bool full[kLanes], any_full = false;
      for (int l = 0; l < kLanes; ++l) {
        full[l] = false;
        if (!in[l]) continue;
        RankBounds& b = bounds[l];
        const double count = L::get(pivots.positive, l), size = L::get(pivots.size, l);
        if (step == above) {
          const bool proved = b.from_below(shifts[l], size);
          if (proved) verdict[l].lower = fmax(verdict[l].lower, count);
          if (b.from_below(shifts[l], size, b.part())) low[l] = fmax(low[l], count);
          full[l] = proved && count == n;
          any_full = any_full || full[l];
        } else if (step == below) {
          if (b.from_above(shifts[l], size)) verdict[l].upper = fmin(verdict[l].upper, count);
          if (b.from_above(shifts[l], size, b.part())) high[l] = count;
        } else if (count == 0) {
          b.largest_at_most(shifts[l] + b.error(size, shifts[l]));
        }
        if (full[l] || low[l] == high[l]) {
          verdict[l].rank = full[l] ? n : low[l];
          open[l] = false;
        }
      }
      if (!any_full) continue;
      invert(team);
      const Inverse inverse = inverse_norms(team);
      for (int l = 0; l < kLanes; ++l) {
        if (!full[l]) continue;
        const double least = bounds[l].sigma_min(shifts[l], L::get(pivots.size, l), L::get(pivots.square, l),
                                                 L::get(inverse.square, l), L::get(inverse.scaled_square, l));
        verdict[l].sigma_min_lower = fmax(verdict[l].sigma_min_lower, least);
      }
    }
    for (int l = 0; l < kLanes; ++l)
      if (L::get(traces, l) <= kLargestTrace && L::get(traces, l) >= kLeastTrace)
        verdict[l].sigma_max_upper = fmin(verdict[l].sigma_max_upper, bounds[l].sigma_max());
  }
};

}  // namespace gcfast
