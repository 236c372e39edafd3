// As many vectors as a vector has lanes, transposed or summed in registers.
#pragma once

#include <stddef.h>

#include <utility>

namespace MDNET_NAMESPACE {

// Blocks of Step lanes, from `a` and `b` in turn: their even blocks (High = false) or their odd ones.
template <int Step, bool High, typename V, size_t... I>
inline V blocks(V a, V b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  if constexpr (High) {
    return __builtin_shufflevector(a, b, (int(I) & Step ? n + int(I) : int(I) + Step)...);
  } else {
    return __builtin_shufflevector(a, b, (int(I) & Step ? n + int(I) - Step : int(I))...);
  }
}

template <int Step, typename V, int N>
inline void transpose_stage(V (&rows)[N]) {
  if constexpr (Step < N) {
    using All = std::make_index_sequence<N>;
    for (int i = 0; i < N; ++i) {
      if (i & Step) continue;
      const V a = rows[i], b = rows[i + Step];
      rows[i] = blocks<Step, false>(a, b, All{});
      rows[i + Step] = blocks<Step, true>(a, b, All{});
    }
    transpose_stage<2 * Step>(rows);
  }
}

// rows[i][j] becomes rows[j][i].
template <typename V, int N>
inline void transpose(V (&rows)[N]) {
  transpose_stage<1>(rows);
}

// Stages of `sum_lanes`: To / From rows become one. What the stages 1 to n leave of each n rows, the stages n to N take
// as N / n rows.
template <int From, int To, typename V>
inline void sum_stages(V* rows) {
  if constexpr (From < To) {
    using All = std::make_index_sequence<sizeof(V) / sizeof(rows[0][0])>;
    for (int i = 0; i < To / From / 2; ++i) {
      const V a = rows[2 * i], b = rows[2 * i + 1];
      rows[i] = blocks<From, false>(a, b, All{}) + blocks<From, true>(a, b, All{});
    }
    sum_stages<2 * From, To>(rows);
  }
}

// The sums over the lanes of each row: lane i of the result belongs to rows[i]. Overwrites the rows.
template <typename V, int N>
inline V sum_lanes(V (&rows)[N]) {
  sum_stages<1, N>(rows);
  return rows[0];
}

}  // namespace MDNET_NAMESPACE
