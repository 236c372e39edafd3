// What the operators on matrices share: inputs whose last two axes are a matrix's and whose other axes count matrices.
#pragma once

#include "matmul/matmul.h"
#include "onnxruntime/tensor.h"

namespace {

struct Matrices {
  const void* data;
  Shape shape;

  bool readable() const { return shape.rank >= 2 && shape.rank <= kMaxRank; }
  int64_t rows(bool transposed) const { return shape.sizes[shape.rank - (transposed ? 1 : 2)]; }
  int64_t columns(bool transposed) const { return shape.sizes[shape.rank - (transposed ? 2 : 1)]; }
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

// The shape of what is made of some inputs, all but its last two axes; the product of those, or -1 where the inputs
// don't fit: those of one input must be all axes of the others' that count matrices, or the last of them.
inline int64_t broadcast(const Matrices* inputs, size_t count, Shape* shape) {
  const Matrices* most = inputs;
  shape->rank = 0;
  for (size_t i = 0; i < count; ++i) {
    if (inputs[i].axes() > most->axes()) most = inputs + i;
    if (inputs[i].shape.rank > shape->rank) shape->rank = inputs[i].shape.rank;
  }
  for (size_t axis = 0; axis + 2 < shape->rank; ++axis) {
    for (size_t i = 0; i < count; ++i) {
      if (axis < inputs[i].axes() && inputs[i].axis(axis) != most->axis(axis)) return -1;
    }
    shape->sizes[shape->rank - 3 - axis] = most->axis(axis);
  }
  return most->count();
}

constexpr const char* kUnfit = "the matrices of one input must be as many as the other's, or as its last axes say";

// Pack an input of a node, as the a or b of a product, where it is a constant of the graph; otherwise leave `packed`
// null.
inline OrtStatus* pack_constant(const OrtApi& api, const OrtKernelInfo* info, size_t input, bool transposed, bool b,
                                void** packed) {
  int constant = 0;
  const OrtValue* value = nullptr;
  MDNET_TRY(api.KernelInfoGetConstantInput_tensor(info, input, &constant, &value));
  if (!constant) return nullptr;
  Matrices matrices;
  MDNET_TRY(read_value(api, value, &matrices.data, &matrices.shape));
  if (!matrices.readable()) return nullptr;  // for compute to refuse
  const int64_t rows = matrices.rows(transposed), columns = matrices.columns(transposed), count = matrices.count();
  if (!rows || !columns || !count) return nullptr;  // nothing will read it
  MdnetProduct call = {};
  call.batch = call.a_matrices = call.b_matrices = count;
  call.rows = b ? 1 : rows;
  call.inner = b ? rows : columns;
  call.columns = b ? columns : 1;
  (b ? call.b : call.a) = static_cast<const float*>(matrices.data);
  call.a_transposed = call.b_transposed = transposed;
  *packed = mdnet_product_pack(&call, b);
  return *packed ? nullptr : api.CreateStatus(ORT_FAIL, "no memory to pack a constant matrix");
}

}  // namespace
