// SPDX-License-Identifier: Apache-2.0
//
// Token rounding (SonicMoE, arXiv 2512.14080, Algorithm 4): every token takes its top K by
// p = softmax over all experts; then each expert's count f is rounded to a multiple of the tile M.
// Rounding down drops the chosen tokens of least p, rounding up adds the others of largest p; ties
// keep the lower token, NaN ranks last. Nothing is sorted: of an expert's T tokens only one tile is
// undecided (its f mod M last chosen and its M - f mod M first others), and a heap of M finds it.
//   score_te = p_te / sum of p over the token's top K, also where that pair was added; or p_te
#include "backend/count_rounding.h"
#include "backends/cpu/common/routers/pairs.h"

namespace penstock::cpu {
namespace {

enum Mark : uint8_t { kOther, kChosen, kDropped, kAdded };

int64_t aligned(int64_t bytes) { return (bytes + 7) / 8 * 8; }

// keys (T, E), top (T, K), edge (E, M), counts (E), targets (E), marks (T, E); backward and a
// replay need top alone.
struct Layout {
  explicit Layout(const RouteProblem& problem) {
    constexpr int64_t kIndex = sizeof(int32_t);
    const int64_t pairs = problem.num_tokens * problem.num_experts;
    const int64_t tile = problem.options.tile <= problem.num_tokens ? problem.options.tile : 0;
    top = 0;
    keys = aligned(problem.num_tokens * problem.top_k * kIndex);
    edge = keys + aligned(pairs * size_of(problem.dtype));
    counts = edge + aligned(problem.num_experts * tile * kIndex);
    targets = counts + aligned(problem.num_experts * kIndex);
    marks = targets + aligned(problem.num_experts * kIndex);
    bytes = problem.selection == Selection::given ? keys : marks + pairs;
  }

  int64_t top, keys, edge, counts, targets, marks, bytes;
};

int64_t scratch_bytes(const RouteProblem& problem) { return Layout(problem).bytes; }

template <typename Logit>
class TokenRounding {
 public:
  TokenRounding(const RouterForwardArgs& args, const StepLoop& loop)
      : args_(args),
        loop_(loop),
        num_tokens_(args.logits.size(0)),
        num_experts_(args.logits.size(1)) {
    const Layout layout({.options = args.options,
                         .num_tokens = num_tokens_,
                         .num_experts = num_experts_,
                         .top_k = args.top_k,
                         .dtype = args.logits.dtype});
    auto* base = static_cast<std::byte*>(args.workspace.data);
    top_ = reinterpret_cast<int32_t*>(base + layout.top);
    keys_ = reinterpret_cast<Logit*>(base + layout.keys);
    edge_ = reinterpret_cast<int32_t*>(base + layout.edge);
    counts_ = reinterpret_cast<int32_t*>(base + layout.counts);
    targets_ = reinterpret_cast<int32_t*>(base + layout.targets);
    marks_ = reinterpret_cast<uint8_t*>(base + layout.marks);
  }

  void select() {
    for_each_token([&](int64_t token) { choose_token(token); });
    for_each_expert([&](int64_t expert) { count_tokens(expert); });
    const bool rounds = num_tokens_ >= args_.options.tile;
    if (rounds) {
      decide();
      for_each_expert([&](int64_t expert) { mark_edge(expert); });
    }
    lay_out(rounds);
  }

 private:
  template <typename Step>
  void for_each_token(const Step& step) {
    loop_.for_each(num_tokens_, num_experts_ * kWorkPerLogit, step);
  }

  template <typename Step>
  void for_each_expert(const Step& step) {
    const int64_t steps = (num_experts_ + kExpertsPerStep - 1) / kExpertsPerStep;
    loop_.for_each(steps, num_tokens_ * kExpertsPerStep * kWorkPerLogit, [&](int64_t index) {
      const int64_t end = std::min(num_experts_, (index + 1) * kExpertsPerStep);
      for (int64_t expert = index * kExpertsPerStep; expert < end; ++expert) step(expert);
    });
  }

  uint8_t& mark(int64_t token, int64_t expert) { return marks_[token * num_experts_ + expert]; }

  void choose_token(int64_t token) {
    const Logit* logits = row_of<const Logit>(args_.logits, token);
    ranking_softmax(logits, num_experts_, keys_ + token * num_experts_);
    std::fill_n(&mark(token, 0), num_experts_, uint8_t{kOther});
    int32_t* top = top_ + token * args_.top_k;
    choose_top_k(logits, num_experts_, top, args_.top_k);
    for (int32_t k = 0; k < args_.top_k; ++k) mark(token, top[k]) = kChosen;
  }

  void count_tokens(int64_t expert) {
    int32_t count = 0;
    for (int64_t token = 0; token < num_tokens_; ++token) count += mark(token, expert) == kChosen;
    counts_[expert] = count;
  }

  // What every count becomes, where counts alone say so.
  void decide() {
    const uint64_t seed =
        args_.seed.present() ? static_cast<uint64_t>(*args_.seed.as<const int64_t>()) : 0;
    CountRounding rounding(args_.options, num_tokens_, seed);
    for (int64_t expert = 0; expert < num_experts_; ++expert)
      targets_[expert] = rounding.target(static_cast<int32_t>(expert), counts_[expert]);
  }

  // Finds the tokens of the undecided tile and marks those that change sides.
  void mark_edge(int64_t expert) {
    const int64_t tile = args_.options.tile;
    const int64_t rest = counts_[expert] % tile;
    if (rest == 0) return;
    const TokenRank<Logit> rank(keys_, num_experts_, expert);
    FirstTokens leaving(edge_ + expert * tile, rest,
                        [&](int32_t a, int32_t b) { return rank.before(b, a); });
    FirstTokens joining(edge_ + expert * tile + rest, tile - rest,
                        [&](int32_t a, int32_t b) { return rank.before(a, b); });
    for (int64_t token = 0; token < num_tokens_; ++token) {
      const auto index = static_cast<int32_t>(token);
      if (mark(token, expert) == kChosen) {
        leaving.offer(index);
      } else {
        joining.offer(index);
      }
    }
    bool up = targets_[expert] > counts_[expert];
    if (targets_[expert] == kByScore) {
      const auto weight = [&](std::span<const int32_t> tokens) {
        double sum = 0.0;
        for (const int32_t token : tokens) sum += ranking::weight(rank.key(token));
        return sum;
      };
      up = weight(leaving.sorted()) > weight(joining.sorted());
    }
    for (const int32_t token : up ? joining.tokens() : leaving.tokens())
      mark(token, expert) = up ? kAdded : kDropped;
  }

  void lay_out(bool rounds) {
    int32_t* offsets = args_.token_offsets.as<int32_t>();
    for_each_token([&](int64_t token) {
      const uint8_t* row = &mark(token, 0);
      offsets[token + 1] = static_cast<int32_t>(std::count_if(
          row, row + num_experts_, [](uint8_t m) { return m == kChosen || m == kAdded; }));
    });
    counts_to_offsets(args_);
    for_each_token([&](int64_t token) {
      int32_t* next = args_.ids.as<int32_t>() + offsets[token];
      for (int32_t k = 0; k < args_.top_k; ++k) {
        const int32_t expert = top_[token * args_.top_k + k];
        if (mark(token, expert) == kChosen) *next++ = expert;
      }
      for (int64_t expert = 0; expert < num_experts_; ++expert)
        if (mark(token, expert) == kAdded) *next++ = static_cast<int32_t>(expert);
    });
    const int64_t pairs = num_tokens_ * num_experts_;
    finish_pairs(args_,
                 {.dropped = static_cast<int32_t>(std::count(marks_, marks_ + pairs, kDropped)),
                  .added = static_cast<int32_t>(std::count(marks_, marks_ + pairs, kAdded)),
                  .rounded = rounds ? 1 : 0});
  }

  const RouterForwardArgs& args_;
  const StepLoop& loop_;
  int64_t num_tokens_;
  int64_t num_experts_;
  int32_t* top_;      // (T, K)
  Logit* keys_;       // (T, E)
  int32_t* edge_;     // (E, M)
  int32_t* counts_;   // (E)
  int32_t* targets_;  // (E)
  uint8_t* marks_;    // (T, E)
};

// exp(logit_e - largest) / sum over the token's top K.
template <typename Logit>
struct TopKSoftmax {
  TopKSoftmax(const Logit* logits, int64_t num_experts, std::span<const int32_t> top)
      : softmax(logits, num_experts), chosen(top) {
    for (const int32_t expert : top) sum += softmax.exponential(expert);
    if (std::isnan(softmax.denominator)) sum = softmax.denominator;
  }

  double share(int64_t expert) const { return softmax.exponential(expert) / sum; }
  bool is_chosen(int32_t expert) const {
    return std::find(chosen.begin(), chosen.end(), expert) != chosen.end();
  }

  TokenSoftmax<Logit> softmax;
  std::span<const int32_t> chosen;
  double sum = 0.0;
};

template <typename Logit, typename Args>
TopKSoftmax<Logit> top_softmax(const Args& args, int64_t token) {
  const int64_t num_experts = args.logits.size(1);
  const Logit* logits = row_of<const Logit>(args.logits, token);
  int32_t* top = static_cast<int32_t*>(args.workspace.data) + token * args.top_k;
  choose_top_k(logits, num_experts, top, args.top_k);
  return {logits, num_experts, {top, static_cast<size_t>(args.top_k)}};
}

template <typename Logit>
void score_token(const RouterForwardArgs& args, int64_t token) {
  const TopKSoftmax<Logit> shares = top_softmax<Logit>(args, token);
  const RowRange slots = slots_of(args.token_offsets, 0, token);
  const int32_t* ids = args.ids.as<const int32_t>();
  Logit* scores = args.scores.as<Logit>();
  for (int64_t slot = slots.begin; slot < slots.end; ++slot)
    scores[slot] = names_expert(ids[slot], args.logits.size(1))
                       ? static_cast<Logit>(shares.share(ids[slot]))
                       : Logit(0);
}

void forward(const RouterForwardArgs& args, const StepLoop& loop) {
  visit_accumulator(args.logits.dtype, [&]<typename Logit>(StorageTag<Logit>) {
    if (args.selection == Selection::chosen) TokenRounding<Logit>(args, loop).select();
    std::fill_n(args.scores.as<Logit>(), args.scores.numel(), Logit(0));
    if (args.options.scaling == ScoreScaling::plain) return;
    loop.for_each(args.logits.size(0), args.logits.size(1) * kWorkPerLogit,
                  [&](int64_t token) { score_token<Logit>(args, token); });
  });
  if (args.options.scaling == ScoreScaling::plain) score_pairs_by_softmax(args, loop);
}

// d score_e / d logit_j = score_e (1[j = e] - s_j), with s the softmax over the token's top K.
template <typename Logit>
void backward_token(const RouterBackwardArgs& args, int64_t token) {
  const TopKSoftmax<Logit> shares = top_softmax<Logit>(args, token);
  const RowRange slots = slots_of(args.token_offsets, 0, token);
  const int32_t* ids = args.ids.as<const int32_t>();
  const Logit* scores = args.scores.as<const Logit>();
  const Logit* dscores = args.dscores.as<const Logit>();
  double dot = 0.0;
  for (int64_t slot = slots.begin; slot < slots.end; ++slot)
    dot += static_cast<double>(scores[slot]) * static_cast<double>(dscores[slot]);
  Logit* dlogits = row_of<Logit>(args.dlogits, token);
  std::fill_n(dlogits, args.logits.size(1), Logit(0));
  for (const int32_t expert : shares.chosen)
    dlogits[expert] = static_cast<Logit>(shares.share(expert) * (0.0 - dot));
  for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
    if (!names_expert(ids[slot], args.logits.size(1))) continue;
    const double score = static_cast<double>(scores[slot]);
    const double through_sum = shares.is_chosen(ids[slot]) ? dot : 0.0;
    dlogits[ids[slot]] =
        static_cast<Logit>(score * (static_cast<double>(dscores[slot]) - through_sum));
  }
}

void backward(const RouterBackwardArgs& args, const StepLoop& loop) {
  if (args.options.scaling == ScoreScaling::plain) return softmax_pairs_backward(args, loop);
  visit_accumulator(args.logits.dtype, [&]<typename Logit>(StorageTag<Logit>) {
    loop.for_each(args.logits.size(0), args.logits.size(1) * kWorkPerLogit,
                  [&](int64_t token) { backward_token<Logit>(args, token); });
  });
}

}  // namespace

constinit const Router kTokenRounding = {scratch_bytes, forward, backward};

}  // namespace penstock::cpu
