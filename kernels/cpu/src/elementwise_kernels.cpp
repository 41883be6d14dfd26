// Normalisation, activation, addition and rotation: one pass over the data, in floats, rounded when stored.
#include "elementwise.h"

#include "search.h"
#include "vec.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

// x[0:size] += more[0:size], rounded to T.
template <class T>
void accumulate(T* x, const T* more, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(x + i, load(x + i) + load(more + i));
  if (i < size) {
    const int count = static_cast<int>(size - i);
    store_some(x + i, load_some(x + i, count) + load_some(more + i, count), count);
  }
}

// The sum of (x - shift)^2, in four chains so that additions do not wait for each other.
template <class T>
float sum_of_squares(const T* x, int64_t size, float shift) {
  Vec total[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    for (int chain = 0; chain < 4; ++chain) {
      const Vec v = load(x + i + chain * kLanes) - shift;
      total[chain] += v * v;
    }
  }
  for (; i + kLanes <= size; i += kLanes) {
    const Vec v = load(x + i) - shift;
    total[0] += v * v;
  }
  float rest = 0;
  for (; i < size; ++i) rest += (to_float(x[i]) - shift) * (to_float(x[i]) - shift);
  return sum((total[0] + total[1]) + (total[2] + total[3])) + rest;
}

template <class T>
float sum_of(const T* x, int64_t size) {
  Vec total[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    for (int chain = 0; chain < 4; ++chain) total[chain] += load(x + i + chain * kLanes);
  }
  for (; i + kLanes <= size; i += kLanes) total[0] += load(x + i);
  float rest = 0;
  for (; i < size; ++i) rest += to_float(x[i]);
  return sum((total[0] + total[1]) + (total[2] + total[3])) + rest;
}

template <class T>
void rms_norm_rows(const RmsNormArgs& args, Team& team) {
  int64_t first, last;
  team.part(args.rows, 1, &first, &last);
  const T* weight = static_cast<const T*>(args.weight);
  const bool rounds_first = args.rounds_before_weight != 0;
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    T* out = static_cast<T*>(args.out) + row * args.out_stride;
    if (args.residual != nullptr) {
      T* residual = static_cast<T*>(args.residual) + row * args.size;
      accumulate(residual, x, args.size);
      x = residual;
    }
    const float mean = sum_of_squares(x, args.size, 0.0f) / static_cast<float>(args.size);
    const float scale = 1.0f / std::sqrt(mean + args.eps);
    const auto scaled = [&](Vec v, Vec w) {
      const Vec normed = v * scale;
      return (rounds_first ? rounded<T>(normed) : normed) * (w + args.weight_offset);
    };
    int64_t i = 0;
    for (; i + kLanes <= args.size; i += kLanes) store(out + i, scaled(load(x + i), load(weight + i)));
    if (i < args.size) {
      const int count = static_cast<int>(args.size - i);
      store_some(out + i, scaled(load_some(x + i, count), load_some(weight + i, count)), count);
    }
  }
}

template <class T>
void layer_norm_rows(const LayerNormArgs& args, Team& team) {
  int64_t first, last;
  team.part(args.rows, 1, &first, &last);
  const T* weight = static_cast<const T*>(args.weight);
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    T* out = static_cast<T*>(args.out) + row * args.out_stride;
    if (args.residual != nullptr) {
      T* residual = static_cast<T*>(args.residual) + row * args.size;
      accumulate(residual, x, args.size);
      x = residual;
    }
    const float mean = sum_of(x, args.size) / static_cast<float>(args.size);
    const float variance = sum_of_squares(x, args.size, mean) / static_cast<float>(args.size);
    const float scale = 1.0f / std::sqrt(variance + args.eps);
    for (int64_t i = 0; i < args.size; i += kLanes) {
      const int count = args.size - i < kLanes ? static_cast<int>(args.size - i) : kLanes;
      Vec v = ((count == kLanes ? load(x + i) : load_some(x + i, count)) - mean) * scale;
      if (weight != nullptr) v *= count == kLanes ? load(weight + i) : load_some(weight + i, count);
      if (bias != nullptr) v += count == kLanes ? load(bias + i) : load_some(bias + i, count);
      if (count == kLanes) {
        store(out + i, v);
      } else {
        store_some(out + i, v, count);
      }
    }
  }
}

// x * sigmoid(z), with z = x for silu and 2 sqrt(2/pi) (x + 0.044715 x^3) for gelu's tanh form.
template <int activation>
ISF_MEMBER Vec activated(Vec x) {
  const Vec z = activation == 0 ? x : (x + 0.044715f * x * x * x) * 1.5957691216f;
  return x / (exp(-z) + 1.0f);
}

template <class T, int activation>
void gated_rows(const GatedArgs& args, Team& team) {
  constexpr int64_t kChunk = 512;  // a row is shared by threads when there are few
  const int64_t chunks = (args.size + kChunk - 1) / kChunk;
  int64_t first, last;
  team.part(args.rows * chunks, 1, &first, &last);
  for (int64_t item = first; item < last; ++item) {
    const int64_t row = item / chunks, begin = item % chunks * kChunk;
    const int64_t end = begin + kChunk < args.size ? begin + kChunk : args.size;
    const T* gate = static_cast<const T*>(args.gate_up) + row * args.in_stride;
    const T* up = gate + args.size;
    T* out = static_cast<T*>(args.out) + row * args.out_stride;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store(out + i, activated<activation>(load(gate + i)) * load(up + i));
    if (i < end) {
      const int count = static_cast<int>(end - i);
      const Vec v = activated<activation>(load_some(gate + i, count)) * load_some(up + i, count);
      store_some(out + i, v, count);
    }
  }
}

template <class T>
void add_part(const AddArgs& args, Team& team) {
  int64_t i, last;
  team.part(args.count, 64, &i, &last);
  const T* a = static_cast<const T*>(args.a);
  const T* b = static_cast<const T*>(args.b);
  T* out = static_cast<T*>(args.out);
  for (; i + kLanes <= last; i += kLanes) store(out + i, load(a + i) + load(b + i));
  if (i < last) {
    const int count = static_cast<int>(last - i);
    store_some(out + i, load_some(a + i, count) + load_some(b + i, count), count);
  }
}

// Cosines and sines of a token's angles from `i` on, all or the first `count` of a vector, from either source.
template <class T>
struct Angles {
  const T* cos;
  const T* sin;
  const float* table;
  int64_t half;

  ISF_MEMBER Vec cosines(int64_t i) const { return table != nullptr ? load(table + i) : load(cos + i); }
  ISF_MEMBER Vec sines(int64_t i) const { return table != nullptr ? load(table + half + i) : load(sin + i); }
  ISF_MEMBER Vec cosines(int64_t i, int count) const {
    return table != nullptr ? load_some(table + i, count) : load_some(cos + i, count);
  }
  ISF_MEMBER Vec sines(int64_t i, int count) const {
    return table != nullptr ? load_some(table + half + i, count) : load_some(sin + i, count);
  }
};

// Rotates one head: element i with element i + half; what lies past 2 * half is copied.
template <class T>
void rotate_head(T* out, const T* x, const Angles<T>& angles, int64_t head_dim) {
  const int64_t half = angles.half;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec cos = angles.cosines(i), sin = angles.sines(i);
    const Vec low = load(x + i), high = load(x + half + i);
    store(out + i, low * cos - high * sin);
    store(out + half + i, high * cos + low * sin);
  }
  if (i < half) {
    const int count = static_cast<int>(half - i);
    const Vec cos = angles.cosines(i, count), sin = angles.sines(i, count);
    const Vec low = load_some(x + i, count), high = load_some(x + half + i, count);
    store_some(out + i, low * cos - high * sin, count);
    store_some(out + half + i, high * cos + low * sin, count);
  }
  if (2 * half < head_dim) std::memcpy(out + 2 * half, x + 2 * half, (head_dim - 2 * half) * sizeof(T));
}

template <class T>
void rotary_tokens(const RotaryArgs& args, Team& team) {
  int64_t first, last;
  team.part(args.num_tokens, 1, &first, &last);
  const int64_t half = args.rotary_dim / 2, head_dim = args.head_dim;
  for (int64_t token = first; token < last; ++token) {
    Angles<T> angles{nullptr, nullptr, nullptr, half};
    if (args.table != nullptr) {
      angles.table = args.table + args.positions[token] * args.rotary_dim;
    } else {
      const int64_t row = args.positions != nullptr ? args.positions[token] : token;
      angles.cos = static_cast<const T*>(args.cos) + row * args.angle_stride;
      angles.sin = static_cast<const T*>(args.sin) + row * args.angle_stride;
    }
    const T* q = static_cast<const T*>(args.qkv) + token * args.qkv_stride;
    const T* k = q + args.num_heads * head_dim;
    const T* v = k + args.num_kv_heads * head_dim;
    T* q_out = static_cast<T*>(args.q_out) + token * args.num_heads * head_dim;
    for (int64_t head = 0; head < args.num_heads; ++head) {
      rotate_head(q_out + head * head_dim, q + head * head_dim, angles, head_dim);
    }
    const int64_t slot = args.slot_mapping[token];
    if (slot < 0) continue;
    const int64_t place = slot / args.block_size * args.block_stride + slot % args.block_size * args.slot_stride;
    for (int64_t head = 0; head < args.num_kv_heads; ++head) {
      T* k_slot = static_cast<T*>(args.k_cache) + place + head * args.head_stride;
      T* v_slot = static_cast<T*>(args.v_cache) + place + head * args.head_stride;
      rotate_head(k_slot, k + head * head_dim, angles, head_dim);
      std::memcpy(v_slot, v + head * head_dim, head_dim * sizeof(T));
    }
  }
}

template <class T>
void gated_typed(const GatedArgs& args, Team& team) {
  if (args.activation == 0) {
    gated_rows<T, 0>(args, team);
  } else {
    gated_rows<T, 1>(args, team);
  }
}

// One function for every element type of `kernel`.
#define ISF_TYPED(name, Args, kernel)                     \
  void name(const Args& args, Team& team) {               \
    switch (args.dtype) {                                 \
      case kFloat32: kernel<float>(args, team); break;    \
      case kBFloat16: kernel<bf16>(args, team); break;    \
      default: kernel<fp16>(args, team); break;           \
    }                                                     \
  }

ISF_TYPED(rms_norm, RmsNormArgs, rms_norm_rows)
ISF_TYPED(layer_norm, LayerNormArgs, layer_norm_rows)
ISF_TYPED(gated, GatedArgs, gated_typed)
ISF_TYPED(add, AddArgs, add_part)
ISF_TYPED(rotary, RotaryArgs, rotary_tokens)
ISF_TYPED(argmax, ArgmaxArgs, argmax_rows)
ISF_TYPED(topk, TopKArgs, topk_rows)

}  // namespace

extern const ElementwiseKernels elementwise_kernels = {rms_norm, layer_norm, gated, add, rotary, argmax, topk};

}  // namespace ISF_LEVEL
}  // namespace isf
