#include "decoder_layer.h"

#include <algorithm>
#include <cstring>

#include "crew.h"
#include "entry.h"
#include "layer_operations.h"

namespace isf {
namespace {

// Of the ends of a model, in their order: the first two before the layers, the others behind them.
enum EndOperation : int { kEmbed, kSumEmbedding, kNorm, kHead, kGreatest, kEndOperations };
constexpr int64_t kEndsBefore = 2;

// Rows up to which layers are run by a crew: from 256 on a panel is no unit of work (linear_blocking.h). Sums over
// ranks of more than few rows want all threads at once.
constexpr int64_t kCrewRows = 255;

// All operations of a step in a row; of layers those that are there.
class Operations {
 public:
  Operations(const DecoderLayersArgs& args, bool prepares)
      : args_(args),
        ends_(args.ends),
        step_(*args.layers[0]->step),
        group_(args.layers[0]->group),
        prepares_(prepares),
        first_of_layers_(args.has_ends ? kEndsBefore : 0) {
    const Layer first = layer_at(0);
    for (int operation = 0; operation < kOperations; ++operation) {
      if (first.is_there(operation)) kinds_[num_kinds_++] = operation;
    }
    behind_layers_ = first_of_layers_ + args.num_layers * num_kinds_;
  }

  int64_t behind_layers() const { return behind_layers_; }
  int64_t count() const { return behind_layers_ + (args_.has_ends ? kEndOperations - kEndsBefore : 0); }

  bool is_there(int64_t operation) const {
    if (is_of_layer(operation) || end(operation) == kEmbed) return true;
    if (end(operation) == kSumEmbedding) return group_ != nullptr;
    return ends_.num_logits > 0 && (end(operation) != kGreatest || ends_.vocabulary > 0);
  }

  // Into how many parts a crew of `threads` cuts an operation.
  int num_parts(int64_t operation, int threads) const {
    if (is_of_layer(operation)) return layer_of(operation).num_parts(kind(operation), threads);
    if (is_cut_end(operation, threads)) return kSharesPerThread * threads;
    return end(operation) == kSumEmbedding || end(operation) == kHead ? 1 : threads;
  }

  void run_part(const CrewPart& part, int64_t operation, int threads) const {
    if (!is_there(operation)) return;
    if (is_of_layer(operation)) {
      const Layer layer = layer_of(operation);
      Team one_of = layer.team_of(kind(operation), part, threads);
      return layer.run(kind(operation), one_of);
    }
    Team one_of = is_cut_end(operation, threads) ? team_of_share(part, ends_.head, threads)
                                                 : Team(part.part, part.num_parts, nullptr);
    run_end(operation, one_of);
  }

  void run(int64_t operation, Team& team) const {
    if (is_of_layer(operation)) return layer_of(operation).run(kind(operation), team);
    run_end(operation, team);
  }

 private:
  bool is_of_layer(int64_t operation) const { return operation >= first_of_layers_ && operation < behind_layers_; }
  int kind(int64_t operation) const { return kinds_[(operation - first_of_layers_) % num_kinds_]; }
  int64_t end(int64_t operation) const {
    return operation < first_of_layers_ ? operation : kEndsBefore + operation - behind_layers_;
  }
  bool is_cut_end(int64_t operation, int threads) const {
    return end(operation) == kHead && has_panels_for(ends_.head, threads);
  }

  Layer layer_of(int64_t operation) const { return layer_at((operation - first_of_layers_) / num_kinds_); }
  Layer layer_at(int64_t index) const {
    return Layer(*args_.layers[index], index == 0 ? step_.hidden : step_.out, prepares_);
  }

  void run_end(int64_t operation, Team& team) const {
    switch (end(operation)) {
      case kEmbed: return embed(team);
      case kSumEmbedding: return sum_embedding(team);
      case kNorm: return norm(team);
      case kHead: return project(team);
      default: return find_greatest(team);
    }
  }

  void embed(Team& team) const {
    PackedEmbeddingArgs embedding = ends_.embedding;
    embedding.ids = ends_.ids;
    embedding.out = step_.hidden;
    embedding.m = step_.num_tokens;
    if (ends_.table == nullptr) return packed_embedding_body(embedding, team);
    const int64_t row_bytes = embedding.k * (embedding.dtype == kFloat32 ? 4 : 2);
    int64_t first, last;
    team.part(embedding.m, 1, &first, &last);
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = embedding.ids[i] - embedding.first;
      char* out = static_cast<char*>(embedding.out) + i * row_bytes;
      if (row >= 0 && row < embedding.n) {
        std::memcpy(out, static_cast<const char*>(ends_.table) + row * row_bytes, row_bytes);
      } else {  // another rank's
        std::memset(out, 0, row_bytes);
      }
    }
  }

  void sum_embedding(Team& team) const {
    const int64_t count = step_.num_tokens * ends_.norm.size;
    shm_all_reduce_body(ShmAllReduceArgs{group_, step_.hidden, count, ends_.norm.dtype, 0}, team);
  }

  // The rows whose logits are wanted, to where the input of the first layer was.
  void norm(Team& team) const {
    const int64_t row_bytes = ends_.norm.size * (ends_.norm.dtype == kFloat32 ? 4 : 2);
    int64_t first, last;
    team.part(ends_.num_logits, 1, &first, &last);
    for (int64_t i = first; i < last; ++i) {
      RmsNormArgs row = ends_.norm;
      row.x = static_cast<const char*>(step_.out) + ends_.rows[i] * row_bytes;
      row.out = static_cast<char*>(step_.hidden) + i * row_bytes;
      row.rows = 1;
      Team alone(0, 1, nullptr);
      rms_norm_body(row, alone);
    }
  }

  void project(Team& team) const {
    LinearArgs head = ends_.head;
    head.x = step_.hidden;
    head.out = ends_.logits;
    head.workspace = step_.workspace;
    head.m = ends_.num_logits;
    head.ldx = head.k;
    head.ldo = head.n;
    linear_body(head, team);
  }

  void find_greatest(Team& team) const {
    const int64_t stride = ends_.head.n;
    const ArgmaxArgs argmax{ends_.logits,      ends_.places, ends_.values, nullptr, ends_.num_logits,
                            ends_.vocabulary, stride,       kFloat32,     1};
    argmax_body(argmax, team);
  }

  const DecoderLayersArgs& args_;
  const ModelEnds& ends_;
  const LayerStep& step_;
  ShmGroup* const group_;
  const bool prepares_;
  const int64_t first_of_layers_;
  int64_t behind_layers_;
  int kinds_[kOperations], num_kinds_ = 0;
};

// Operations [first, last).
struct Stretch {
  const Operations& operations;
  int64_t first, last;
  int threads;
};

void run_at_barriers(Team& team, const void* context) {
  const Stretch& own = *static_cast<const Stretch*>(context);
  for (int64_t operation = own.first; operation < own.last; ++operation) {
    if (!own.operations.is_there(operation)) continue;
    own.operations.run(operation, team);
    team.barrier();
  }
}

int crew_parts(const void* context, int64_t index) {
  const Stretch& own = *static_cast<const Stretch*>(context);
  return own.operations.num_parts(own.first + index, own.threads);
}

void run_crew_part(const void* context, const CrewPart& part) {
  const Stretch& own = *static_cast<const Stretch*>(context);
  own.operations.run_part(part, own.first + part.operation, own.threads);
}

void run_as_crew(const Stretch& stretch) {
  Crew crew(CrewWork{stretch.last - stretch.first, crew_parts, run_crew_part, &stretch});
  const auto work = [](Team& team, const void* own) { static_cast<Crew*>(const_cast<void*>(own))->work(team.rank); };
  run_team(stretch.threads, work, &crew);
}

void run_stretch(const Stretch& stretch, bool is_for_crew) {
  if (stretch.first == stretch.last) return;
  if (is_for_crew) return run_as_crew(stretch);
  run_team(stretch.threads, run_at_barriers, &stretch);
}

// What a linear layer needs for so many rows and for fewer.
int64_t workspace_of(const LinearArgs& linear, int64_t rows, int threads) {
  LinearArgs own = linear;
  int64_t most = 0;
  for (const int64_t each : {rows, kCrewRows, kPrivateRows}) {  // fewer rows are cut in another way, and may need more
    own.m = std::min(rows, each);
    most = std::max(most, linear_workspace(own, threads));
  }
  return most;
}

}  // namespace
}  // namespace isf

extern "C" {

ISF_EXPORT int64_t isf_sizeof_decoder_layer() { return sizeof(isf::DecoderLayerArgs); }
ISF_EXPORT int64_t isf_sizeof_decoder_layers() { return sizeof(isf::DecoderLayersArgs); }

// Bytes of workspace for the tokens of a layer's step on so many threads, and for `head` (or null) behind it.
ISF_EXPORT int64_t isf_decoder_layer_workspace(const isf::DecoderLayerArgs* args, const isf::LinearArgs* head,
                                               int32_t threads) {
  const int64_t rows = args->step->num_tokens;
  int64_t most = 0;
  for (const isf::LinearArgs* each : {&args->qkv, &args->o, &args->gate_up, &args->down}) {
    most = std::max(most, isf::workspace_of(*each, rows, threads));
  }
  const int64_t own = reinterpret_cast<intptr_t>(isf::Layer(*args, nullptr, false).linear) -
                      reinterpret_cast<intptr_t>(args->step->workspace) + most;
  return head == nullptr ? own : std::max(own, isf::workspace_of(*head, rows, threads));
}

// Returns 0, or what the ranks' group failed with.
ISF_EXPORT int32_t isf_decoder_layers(const isf::DecoderLayersArgs* args, int32_t threads) {
  const isf::DecoderLayerArgs& first = *args->layers[0];
  const int64_t num_tokens = first.step->num_tokens;
  const bool are_few = num_tokens <= isf::kPrivateRows;
  const bool is_crew = threads > 1 && (are_few || (first.group == nullptr && num_tokens <= isf::kCrewRows));
  const isf::Operations operations(*args, is_crew && !are_few);
  const int64_t behind = operations.behind_layers(), all = operations.count();
  if (are_few) {
    isf::run_stretch({operations, 0, all, threads}, is_crew);
  } else {  // of many tokens, few may have logits
    isf::run_stretch({operations, 0, behind, threads}, is_crew);
    isf::run_stretch({operations, behind, all, threads}, threads > 1 && args->ends.num_logits <= isf::kPrivateRows);
  }
  return first.group != nullptr ? first.group->failure : 0;
}
}
