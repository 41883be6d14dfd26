// Packing, unpacking and quantising weights, and rows of them by token id.
#include "linear_pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "dispatch.h"
#include "entry.h"
#include "linear_layout.h"
#include "transpose.h"

ISF_FAMILY(TransposeKernels, transpose_kernels)

namespace isf {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line

// The rows of one half panel that a slab holds: lanes [first, last), of which the first is row `row` of the slab.
struct Lanes {
  int64_t panel, half, first, last, row;
};

template <class Visit>
void for_lanes(const PackedLayout& layout, const PackArgs& args, Team& team, Visit visit) {
  int64_t begin, end;
  team.part(layout.panels, 1, &begin, &end);
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t start = layout.first_row(panel, half);
      const int64_t first = std::max<int64_t>(args.row0 - start, 0);
      const int64_t last = std::min<int64_t>(args.row0 + args.rows - start, layout.num_rows(panel, half));
      if (first < last) visit(Lanes{panel, half, first, last, start + first - args.row0});
    }
  }
}

// A cell is what lies together in both forms: the `unit` elements of a row at neighbouring columns. The cells of a half
// panel are transposed in tiles of one cache line of every row, so that each line is read or written once.
template <class Cell, bool kUnpack>
void copy_tile(Cell* packed, char* plain, int64_t stride, int64_t count) {
  constexpr int64_t kCells = kLine / sizeof(Cell);
  Cell tile[kCells][kHalf] = {};
  Cell line[kCells];
  if (kUnpack) {
    for (int64_t c = 0; c < kCells; ++c) std::memcpy(tile[c], packed + c * kPanelColumns, count * sizeof(Cell));
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    if (!kUnpack) std::memcpy(line, plain + lane * stride, kLine);
    for (int64_t c = 0; c < kCells; ++c) {
      if (kUnpack) line[c] = tile[c][lane]; else tile[c][lane] = line[c];
    }
    if (kUnpack) std::memcpy(plain + lane * stride, line, kLine);
  }
  if (kUnpack) return;
  if (count == kHalf) {
    for (int64_t c = 0; c < kCells; ++c) std::memcpy(packed + c * kPanelColumns, tile[c], sizeof tile[c]);
  } else {
    for (int64_t c = 0; c < kCells; ++c) std::memcpy(packed + c * kPanelColumns, tile[c], count * sizeof(Cell));
  }
}

// Whether a kernel did it: it takes full half panels of 32-bit cells that lie at cache lines.
template <class Cell>
bool pack_lines(Cell* packed, const void* plain, int64_t stride, int64_t count, int64_t lines) {
  const auto kernel = transpose_kernels().half_panel;
  if (sizeof(Cell) != 4 || kernel == nullptr || count != kHalf || reinterpret_cast<uintptr_t>(packed) % kLine != 0) {
    return false;
  }
  kernel(reinterpret_cast<uint32_t*>(packed), static_cast<const char*>(plain), stride, lines);
  return true;
}

template <class T, class Cell, bool kUnpack>
void copy_slab(const PackArgs& args, Team& team) {
  const PackedLayout layout = packed_layout(args.dtype, args.n, args.k, args.segments);
  constexpr int64_t unit = sizeof(Cell) / sizeof(T), step = kLine / sizeof(T);
  for_lanes(layout, args, team, [&](const Lanes& lanes) {
    const int64_t count = lanes.last - lanes.first;
    T* packed = static_cast<T*>(args.packed) + layout.first_element(lanes.panel, lanes.half, lanes.first);
    T* plain = static_cast<T*>(args.plain) + lanes.row * args.ld;
    const int64_t tiled = args.col0 % unit == 0 ? args.cols / step * step : 0, stride = args.ld * sizeof(T);
    Cell* cells = reinterpret_cast<Cell*>(packed) + args.col0 / unit * kPanelColumns;
    if (kUnpack || !pack_lines(cells, plain, stride, count, tiled / step)) {
      for (int64_t c = 0; c < tiled; c += step, cells += step / unit * kPanelColumns) {
        copy_tile<Cell, kUnpack>(cells, reinterpret_cast<char*>(plain + c), stride, count);
      }
    }
    for (int64_t c = tiled; c < args.cols; ++c) {
      const int64_t col = args.col0 + c;
      T* line = packed + col / unit * kPanelColumns * unit + col % unit;
      for (int64_t lane = 0; lane < count; ++lane) {
        T& there = line[lane * unit];
        T& here = plain[lane * args.ld + c];
        if (kUnpack) here = there; else there = here;
      }
    }
  });
}

template <bool kUnpack>
void copy_body(const PackArgs& args, Team& team) {
  switch (args.dtype) {
    case kFloat32: return copy_slab<uint32_t, uint32_t, kUnpack>(args, team);
    case kInt8: return copy_slab<uint8_t, uint32_t, kUnpack>(args, team);
    case kBFloat16: return copy_slab<uint16_t, uint32_t, kUnpack>(args, team);
    default: return copy_slab<uint16_t, uint16_t, kUnpack>(args, team);
  }
}

struct Group {
  int64_t first, last;  // columns of the weight
  float* scale;
};

template <class Visit>
void for_groups(const PackedLayout& layout, const PackArgs& args, int64_t panel, int64_t column, Visit visit) {
  const int64_t size = args.group == 0 ? args.k : args.group;
  const int64_t groups = (args.k + size - 1) / size;
  for (int64_t g = args.col0 / size; g * size < args.col0 + args.cols; ++g) {
    visit(Group{g * size, std::min(args.k, (g + 1) * size), args.scales + (panel * groups + g) * kPanelColumns + column});
  }
  (void)layout;
}

// The largest magnitude: without their sign, the bits of floating-point numbers are in the order of their values.
template <class T, class Bits>
float largest_magnitude(const T* values, int64_t count) {
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max();
  Bits largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, values + i, sizeof bits);
    largest = std::max<Bits>(largest, bits & kMagnitude);
  }
  T value;
  std::memcpy(&value, &largest, sizeof value);
  return to_float(value);
}

// Codes of four columns at a time, which lie together.
template <class T>
void quantize_group(const T* values, int64_t count, float inverse, int8_t* packed) {
  constexpr int64_t kBlock = 64;
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t block = std::min(kBlock, count - first);
    int8_t codes[kBlock];
    for (int64_t i = 0; i < block; ++i) {
      const float code = (to_float(values[first + i]) * inverse + kWhole) - kWhole;
      codes[i] = static_cast<int8_t>(static_cast<int32_t>(std::min(127.0f, std::max(-127.0f, code))));
    }
    int64_t i = 0;
    for (; i + 4 <= block; i += 4) std::memcpy(packed + (first + i) * kPanelColumns, codes + i, 4);
    for (; i < block; ++i) packed[(first + i) / 4 * 4 * kPanelColumns + i % 4] = codes[i];
  }
}

template <class T, class Bits>
void quantize_slab(const PackArgs& args, Team& team) {
  const PackedLayout layout = packed_layout(kInt8, args.n, args.k, args.segments);
  for_lanes(layout, args, team, [&](const Lanes& lanes) {
    for (int64_t lane = lanes.first; lane < lanes.last; ++lane) {
      const T* row = static_cast<const T*>(args.plain) + (lanes.row + lane - lanes.first) * args.ld - args.col0;
      int8_t* packed = static_cast<int8_t*>(args.packed) + layout.first_element(lanes.panel, lanes.half, lane);
      for_groups(layout, args, lanes.panel, lanes.half * kHalf + lane, [&](const Group& group) {
        const float largest = largest_magnitude<T, Bits>(row + group.first, group.last - group.first);
        *group.scale = largest / 127.0f;
        const float inverse = std::min(127.0f / largest, std::numeric_limits<float>::max());  // zeros stay zeros
        quantize_group(row + group.first, group.last - group.first, inverse, packed + group.first * kPanelColumns);
      });
    }
  });
}

template <class T>
void dequantize_slab(const PackArgs& args, Team& team) {
  const PackedLayout layout = packed_layout(kInt8, args.n, args.k, args.segments);
  for_lanes(layout, args, team, [&](const Lanes& lanes) {
    for (int64_t lane = lanes.first; lane < lanes.last; ++lane) {
      T* row = static_cast<T*>(args.plain) + (lanes.row + lane - lanes.first) * args.ld - args.col0;
      const int8_t* packed = static_cast<int8_t*>(args.packed) + layout.first_element(lanes.panel, lanes.half, lane);
      for_groups(layout, args, lanes.panel, lanes.half * kHalf + lane, [&](const Group& group) {
        const int64_t first = std::max(group.first, args.col0), last = std::min(group.last, args.col0 + args.cols);
        for (int64_t c = first; c < last; ++c) {
          row[c] = from_float<T>(packed[c / 4 * kPanelColumns * 4 + c % 4] * *group.scale);
        }
      });
    }
  });
}

template <class T>
void gather_rows(const PackedEmbeddingArgs& args, Team& team) {
  const PackedLayout layout = packed_layout(args.dtype, args.n, args.k, 1);
  int64_t begin, end;
  team.part(args.m, 1, &begin, &end);
  for (int64_t i = begin; i < end; ++i) {
    T* out = static_cast<T*>(args.out) + i * args.ldo;
    const int64_t row = args.ids[i] - args.first;
    if (row < 0 || row >= args.n) {
      std::fill(out, out + args.k, T(0));
      continue;
    }
    if (args.dtype == kCompactBFloat16) {
      const char* panel = static_cast<const char*>(args.packed) + row / kPanelColumns * layout.panel_bytes;
      compact_row(panel, row % kPanelColumns / kHalf, row % kHalf, args.k, reinterpret_cast<uint16_t*>(out));
      continue;
    }
    const T* packed = static_cast<const T*>(args.packed) +
                      layout.first_element(row / kPanelColumns, row % kPanelColumns / kHalf, row % kHalf);
    for (int64_t c = 0; c < args.k; c += layout.unit, packed += kPanelColumns * layout.unit) {
      for (int64_t j = 0; j < layout.unit && c + j < args.k; ++j) out[c + j] = packed[j];
    }
  }
}

}  // namespace

void linear_pack_body(const PackArgs& args, Team& team) { copy_body<false>(args, team); }
void linear_unpack_body(const PackArgs& args, Team& team) { copy_body<true>(args, team); }

void linear_quantize_body(const PackArgs& args, Team& team) {
  switch (args.dtype) {
    case kFloat32: return quantize_slab<float, int32_t>(args, team);
    case kBFloat16: return quantize_slab<bf16, int16_t>(args, team);
    default: return quantize_slab<fp16, int16_t>(args, team);
  }
}

void linear_dequantize_body(const PackArgs& args, Team& team) {
  switch (args.dtype) {
    case kFloat32: return dequantize_slab<float>(args, team);
    case kBFloat16: return dequantize_slab<bf16>(args, team);
    default: return dequantize_slab<fp16>(args, team);
  }
}

void packed_embedding_body(const PackedEmbeddingArgs& args, Team& team) {
  if (args.dtype == kFloat32) return gather_rows<uint32_t>(args, team);
  return gather_rows<uint16_t>(args, team);
}

}  // namespace isf

// Bytes of the packed weight, zeroed by the caller before packing: padding must stay zero.
extern "C" ISF_EXPORT int64_t isf_packed_bytes(int32_t dtype, int64_t n, int64_t k, int64_t segments) {
  const isf::PackedLayout layout = isf::packed_layout(dtype, n, k, segments);
  return layout.panels * layout.panel_bytes + isf::kPackedSlack;
}

// Bytes from the start of a panel to the start of the next.
extern "C" ISF_EXPORT int64_t isf_panel_bytes(int32_t dtype, int64_t k) {
  return isf::packed_layout(dtype, isf::kPanelColumns, k, 1).panel_bytes;
}

// Panels of the packed weight; scales are [panels, groups, 32].
extern "C" ISF_EXPORT int64_t isf_packed_panels(int32_t dtype, int64_t n, int64_t k, int64_t segments) {
  return isf::packed_layout(dtype, n, k, segments).panels;
}

ISF_ENTRY(linear_pack, PackArgs, args->rows * args->cols * 4)
ISF_ENTRY(linear_unpack, PackArgs, args->rows * args->cols * 4)
ISF_ENTRY(linear_quantize, PackArgs, args->rows * args->cols * 4)
ISF_ENTRY(linear_dequantize, PackArgs, args->rows * args->cols * 4)
ISF_ENTRY(packed_embedding, PackedEmbeddingArgs, args->m * args->k * 32)
