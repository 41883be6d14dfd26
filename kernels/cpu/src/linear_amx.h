// Multiplication by tiles (AMX). Part of one level's linear_kernels.cpp.
//
// Two tiles of 16 rows meet the two halves of a panel in four tiles of sums. A tile multiplication sums 32 (bf16) or 64
// (int8) values of k from zero and adds that to the tile of sums, so that a row's result is one chain over k, whatever
// the number of rows: the same instructions serve one row and thousands.
#pragma once
#include "linear_int8.h"
#include "linear_panels.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3: sums; 4 and 5: rows of x; 6 and 7: halves of a panel.
ISF_INLINE void configure_tiles(int64_t upper, int64_t lower) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64;
  config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(upper);
  config.rows[2] = config.rows[3] = config.rows[5] = static_cast<uint8_t>(lower);
  config.rows[6] = config.rows[7] = 16;
  _tile_loadconfig(&config);
}

ISF_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// To [32 rows][32], floats or integers.
template <class T>
ISF_MEMBER void store_sums(T* to) {
  _tile_stored(0, to, 128);
  _tile_stored(1, to + 16, 128);
  _tile_stored(2, to + 16 * 32, 128);
  _tile_stored(3, to + 16 * 32 + 16, 128);
}

constexpr int64_t kTileBytes = 1024;

template <class Steps>
class TileFormat {
 public:
  static constexpr int64_t kRows = 32, kStepBytes = Steps::kStepBytes;

  TileFormat(const LinearArgs& args, const PackedLayout& layout, const Activations& to)
      : args_(args), depth_(layout.k_padded), to_(to) {
    const int64_t row_bytes = args.ldx * 2;
    packs_ = args.activation_dtype != kBFloat16 || args.norm_weight != nullptr || depth_ != args.k ||
             (args.m > 1 && row_bytes % kConflict == 0) || (args.m > 32 && args.n >= kManyColumns);
    rows_ = packs_ ? to.data : static_cast<const char*>(args.x);
    row_bytes_ = packs_ ? depth_ * 2 : row_bytes;
    stride_ = packs_ ? 64 : row_bytes;
    step_ = packs_ ? kTileBytes : 64;
  }
  ~TileFormat() { _tile_release(); }

  // Whether the rows of a block stay in the first-level cache, past which a panel is loaded.
  ISF_MEMBER static bool keeps_rows(int64_t rows) { return rows > 16; }
  ISF_MEMBER bool packs() const { return packs_; }
  ISF_MEMBER int64_t row_bytes() const { return depth_ * 2; }

  // A block of 16 rows is [k_padded / 32][16 rows][32], tile after tile.
  ISF_MEMBER void pack(int64_t i) {
    const bf16* row = load_row<bf16>(args_, i, depth_, to_.row);
    char* out = to_.data + i / 16 * 16 * depth_ * 2 + i % 16 * 64;
    for (int64_t c = 0; c < depth_; c += 32) std::memcpy(out + c / 32 * kTileBytes, row + c, 64);
  }

  // The rows of one block at once, so that its tiles are written from front to back.
  ISF_MEMBER void pack_block(int64_t first, int64_t last) {
    const bf16* rows[16];
    for (int64_t i = first; i < last; ++i) {
      rows[i - first] = load_row<bf16>(args_, i, depth_, static_cast<bf16*>(to_.row) + (i - first) * depth_);
    }
    char* out = to_.data + first * depth_ * 2;
    for (int64_t c = 0; c < depth_; c += 32, out += kTileBytes) {
      for (int64_t i = 0; i < last - first; ++i) std::memcpy(out + i * 64, rows[i] + c, 64);
    }
  }

  ISF_MEMBER void multiply(const Block& block, const char* weight, Ahead ahead, Unfinished& unfinished, float* sums) {
    configure(block.rows);
    const char* upper = rows_ + block.row * row_bytes_;
    if (block.rows <= 16) {
      multiply_one(upper, weight, ahead, unfinished, sums);
    } else {
      multiply_two(upper, upper + 16 * row_bytes_, weight, ahead, unfinished, sums);
    }
  }

  // One slice of k of a plain panel. What is read again soon, a panel or the rows, stays in the first-level cache, and
  // the other is loaded past it. Sums of the slices before come from `waiting`, which may be `sums`. Every step brings
  // on `meanwhile` by one.
  template <bool kKeepsPanel, class Meanwhile>
  ISF_MEMBER void multiply_slice(const Block& block, const Slice& slice, const char* weight, Ahead ahead,
                                 Meanwhile& meanwhile, Unfinished& unfinished, const float* waiting, float* sums) {
    configure(block.rows);
    const char* upper = rows_ + block.row * row_bytes_ + slice.k / 32 * step_;
    const char* lower = upper + (block.rows > 16 ? 16 * row_bytes_ : 0);
    if (slice.is_first) {
      zero_sums();
    } else {
      _tile_loadd(0, waiting, 128);
      _tile_loadd(1, waiting + 16, 128);
      _tile_loadd(2, waiting + 16 * 32, 128);
      _tile_loadd(3, waiting + 16 * 32 + 16, 128);
    }
    for (int64_t c = 0; c < slice.depth; c += 32, upper += step_, lower += step_, weight += kExpandedStepBytes) {
      fetch(ahead);
      meanwhile.step();
      if (kKeepsPanel) {
        _tile_stream_loadd(4, upper, stride_);
        _tile_loadd(6, weight, 128);
        _tile_loadd(7, weight + 64, 128);
        _tile_stream_loadd(5, lower, stride_);
      } else {
        _tile_loadd(4, upper, stride_);
        _tile_stream_loadd(6, weight, 128);
        _tile_stream_loadd(7, weight + 64, 128);
        _tile_loadd(5, lower, stride_);
      }
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      if (slice.is_last) {
        unfinished.fetch_places(2);
        unfinished.step(2);
      }
    }
    store_sums(sums);
  }

  // Where the rows of a block are from column k on.
  ISF_MEMBER const char* rows_at(int64_t row, int64_t k) const { return rows_ + row * row_bytes_ + k / 32 * step_; }

 private:
  static constexpr int64_t kConflict = 2048;     // rows so far apart share few cache sets
  static constexpr int64_t kManyColumns = 1024;  // from here on a packed copy of many rows is read often enough

  void configure(int64_t rows) {
    if (rows == configured_) return;
    configured_ = rows;
    configure_tiles(std::min<int64_t>(rows, 16), std::max<int64_t>(rows - 16, 1));
  }

  ISF_MEMBER void multiply_one(const char* upper, const char* panel, Ahead& ahead, Unfinished& unfinished,
                               float* sums) const {
    Steps source(panel, depth_ / 32);
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t c = 0; c < depth_; c += 32, upper += step_) {
      if (!Steps::kFetches) fetch(ahead);
      const char* weight = source.next();
      _tile_loadd(4, upper, stride_);
      _tile_loadd(6, weight, 128);
      _tile_loadd(7, weight + 64, 128);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      unfinished.step(1);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
  }

  ISF_MEMBER void multiply_two(const char* upper, const char* lower, const char* panel, Ahead& ahead,
                               Unfinished& unfinished, float* sums) const {
    Steps source(panel, depth_ / 32);
    zero_sums();
    for (int64_t c = 0; c < depth_; c += 32, upper += step_, lower += step_) {
      if (!Steps::kFetches) fetch(ahead);
      const char* weight = source.next();
      _tile_loadd(4, upper, stride_);
      _tile_stream_loadd(6, weight, 128);
      _tile_stream_loadd(7, weight + 64, 128);
      _tile_loadd(5, lower, stride_);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      unfinished.step(2);
    }
    store_sums(sums);
  }

  const LinearArgs& args_;
  const int64_t depth_;
  const Activations to_;
  bool packs_;
  const char* rows_;
  int64_t row_bytes_, stride_, step_;
  int64_t configured_ = 0;
};

// int8: the two digits of 16 rows take the place of two blocks of rows. The last tile of a panel may reach into what
// follows it: there the digits are zero.
class DigitTileFormat {
 public:
  static constexpr int64_t kRows = 16, kStepBytes = 2 * kTileBytes;

  DigitTileFormat(const LinearArgs& args, const PackedLayout&, const Activations& to)
      : args_(args), depth_(round_up(args.k, 64)), groups_(num_groups(args)), to_(to) {}
  ~DigitTileFormat() { _tile_release(); }

  ISF_MEMBER static bool keeps_rows(int64_t) { return false; }
  ISF_MEMBER bool packs() const { return true; }
  ISF_MEMBER int64_t row_bytes() const { return depth_ * 2; }

  // A block of 16 rows is [depth / 64][2 digits][16 rows][64].
  ISF_MEMBER void pack(int64_t i) {
    const float* row = load_row<float>(args_, i, depth_, to_.row);
    float inverse;
    to_.row_scales[i] = digit_scale(row, args_.k, &inverse);
    char* out = to_.data + i / 16 * 16 * depth_ * 2 + i % 16 * 64;
    for (int64_t c = 0; c < depth_; c += 64, out += 2 * kTileBytes) {
      for (int64_t j = 0; j < 64; ++j) {
        const Digits digits = digits_of(row[c + j], inverse);
        out[j] = digits.high;
        out[kTileBytes + j] = digits.low;
      }
    }
  }

  ISF_MEMBER void multiply(const Block& block, const char* weight, Ahead ahead, Unfinished& unfinished, float* sums) {
    const int64_t row = block.row, rows = block.rows;
    configure(rows);
    const int64_t group = args_.group == 0 ? depth_ : args_.group;
    const char* digits = to_.data + row * depth_ * 2;
    const float* scales = args_.scales + block.panel * groups_ * kPanelColumns;
    std::memset(sums, 0, static_cast<size_t>(rows) * kPanelColumns * sizeof(float));
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t first = g * group / 64, last = std::min(depth_, (g + 1) * group) / 64;
      alignas(64) int32_t products[2 * 16 * kPanelColumns];
      multiply_group(digits + first * 2 * kTileBytes, weight + first * kStepBytes, last - first, ahead, unfinished,
                     products);
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t* high = products + r * kPanelColumns;
        add_digits(high, high + 16 * kPanelColumns, scales + g * kPanelColumns, sums + r * kPanelColumns);
      }
    }
    scale_rows(sums, to_.row_scales + row, rows);
  }

 private:
  void configure(int64_t rows) {
    if (rows == configured_) return;
    configured_ = rows;
    configure_tiles(rows, rows);
  }

  ISF_MEMBER static void multiply_group(const char* digits, const char* weight, int64_t steps, Ahead& ahead,
                                        Unfinished& unfinished, int32_t* products) {
    zero_sums();
    for (int64_t step = 0; step < steps; ++step, digits += 2 * kTileBytes, weight += kStepBytes) {
      fetch(ahead);
      _tile_loadd(4, digits, 64);
      _tile_loadd(6, weight, 128);
      _tile_loadd(7, weight + 64, 128);
      _tile_loadd(5, digits + kTileBytes, 64);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
      unfinished.step(1);
    }
    store_sums(products);
  }

  const LinearArgs& args_;
  const int64_t depth_, groups_;
  const Activations to_;
  int64_t configured_ = 0;
};

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
