// What each build of kernel_per_isa.cpp offers to winograd.cpp, and the layout of what is packed for it.
//
// A position is one of the 6 x 6 places of a transformed tile. The products of all channels at one position are a
// matrix product: tiles x channels by channels x outputs.
//   weights: panels of `columns` outputs; in a panel position after position; at a position strips of as many outputs
//            as a build multiplies at a time; in a strip channel after channel (in bfloat16 pair after pair), the
//            outputs side by side. Missing channels and outputs are 0.
//   weights that stay bytes: in a panel strip after strip; a row of a strip (one channel or pair, all its outputs) has
//            nine parts, one for each tap. kZero is added to each.
#pragma once

#include "winograd/winograd.h"

// A rectangle of tiles of one image, and which panels of its outputs are made.
struct WinogradBlock {
  int64_t image, first_row, first_column, rows, columns;  // in tiles
  int64_t first_panel, panels;
};

struct WinogradKernel {
  static constexpr int64_t kTile = 4, kPositions = 36, kTaps = 9;
  static constexpr int kZero = 128;

  int64_t columns;        // outputs of a panel
  int64_t channels;       // that are processed at a time: their number is rounded up to a multiple
  int64_t tiles;          // of a block at most; twice as many where weights are transformed for each block
  int64_t element_bytes;  // of a transformed value

  // The panels of all weights.
  void (*pack)(const float* w, int64_t channels, int64_t outputs, void* panels);
  void (*pack_bytes)(const int8_t* w, int64_t channels, int64_t outputs, uint8_t* panels);
  // y in a block. `scratch` has the bytes that scratch_bytes() says.
  void (*run)(const MdnetWinograd& call, const WinogradBlock& block, char* scratch);
  int64_t (*scratch_bytes)(const MdnetWinogradWeights& weights, int64_t tiles);
};

struct MdnetWinogradWeights {
  const WinogradKernel* kernel;
  int64_t channels, outputs;
  const char* panels;   // behind this structure, in the same allocation
  const float* scales;  // likewise, of each output, where weights stay bytes; or null
};
