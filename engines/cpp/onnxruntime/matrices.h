// What the operators on matrices share: inputs whose last two axes are those of a matrix; the others count matrices.
#pragma once

#include "matmul/matmul.h"
#include "onnxruntime/op.h"

namespace {

struct Matrices : Tensor {
  bool readable() const { return shape.rank >= 2 && shape.rank <= kMaxRank; }
  int64_t rows(bool transposed = false) const { return shape.sizes[shape.rank - (transposed ? 1 : 2)]; }
  int64_t columns(bool transposed = false) const { return shape.sizes[shape.rank - (transposed ? 2 : 1)]; }
  // The size of an axis, counted from the last one that counts matrices; 1 before the first.
  int64_t axis(size_t back) const { return back + 2 < shape.rank ? shape.sizes[shape.rank - 3 - back] : 1; }
  size_t axes() const {  // without those of size 1 in front
    size_t count = shape.rank - 2;
    while (count && axis(count - 1) == 1) --count;
    return count;
  }
  int64_t count() const {
    int64_t product = 1;
    for (size_t i = 0; i < axes(); ++i) product *= axis(i);
    return product;
  }
};

// Find all axes of the output but the last two: of the axes that count matrices, each input must have those of the
// input with most of them, or only the last ones. Returns their product, or -1 where an input doesn't fit.
template <size_t n>
int64_t broadcast(const Matrices (&inputs)[n], Shape* shape) {
  const Matrices* most = inputs;
  shape->rank = 0;
  for (const Matrices& input : inputs) {
    if (input.axes() > most->axes()) most = &input;
    if (input.shape.rank > shape->rank) shape->rank = input.shape.rank;
  }
  for (size_t axis = 0; axis + 2 < shape->rank; ++axis) {
    for (const Matrices& input : inputs) {
      if (axis < input.axes() && input.axis(axis) != most->axis(axis)) return -1;
    }
    shape->sizes[shape->rank - 3 - axis] = most->axis(axis);
  }
  return most->count();
}

constexpr const char* kUnfit = "the matrices of one input must be as many as the other's, or as its last axes say";

// An input that is a constant of the graph, packed as the a or b of a product when the session is made.
struct PackedConstant {
  void* data;  // null where the input is not constant

  ~PackedConstant() { free(data); }

  OrtStatus* pack(const OrtApi& api, const OrtKernelInfo* info, size_t input, bool transposed, bool b) {
    int constant = 0;
    const OrtValue* value = nullptr;
    MDNET_TRY(api.KernelInfoGetConstantInput_tensor(info, input, &constant, &value));
    if (!constant) return nullptr;
    Matrices matrices;
    MDNET_TRY(matrices.read(api, value));
    if (!matrices.readable()) return nullptr;  // compute will refuse it
    const int64_t rows = matrices.rows(transposed), columns = matrices.columns(transposed), count = matrices.count();
    if (!rows || !columns || !count) return nullptr;  // nothing to pack
    MdnetMatmul call = {};
    call.batch = call.a_matrices = call.b_matrices = count;
    call.rows = b ? 1 : rows;
    call.inner = b ? rows : columns;
    call.columns = b ? columns : 1;
    (b ? call.b : call.a) = matrices.floats();
    call.a_transposed = call.b_transposed = transposed;
    data = mdnet_matmul_pack(&call, b);
    return data ? nullptr : api.CreateStatus(ORT_FAIL, "no memory to pack a constant matrix");
  }
};

}  // namespace
