// SPDX-License-Identifier: Apache-2.0
//
// Hostile cases 7 to 12: values that are not numbers, ids that name no expert, garbage in memory.
#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "call.h"

namespace penstock::hostile {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

class HostileValues : public Hostile {};

TEST_P(HostileValues, Case07_too_many_slots) {
  const int64_t slots = cases::case_7::num_tokens * cases::case_7::top_k;
  Layer layer = make_layer(cases::case_4::shape, dtype());
  Call call(layer, context());
  // Views of impossible extent over a few bytes: whoever reads an id before checking faults.
  call.routing.num_tokens = cases::case_7::num_tokens;
  call.routing.top_k = static_cast<int32_t>(cases::case_7::top_k);
  call.routing.scores.shape[0] = call.routing.ids.shape[0] = slots;
  call.plan.top_k = call.routing.top_k;
  for (TensorView* view : {&call.plan.row_to_token, &call.plan.row_to_slot, &call.plan.slot_to_row})
    view->shape[0] = slots;
  const std::string message =
      error_of([&] { build_plan(call.routing, call.plan, Workspace{}, context()); },
               ErrorCode::invalid_argument);
  EXPECT_NE(message.find(std::to_string(slots)), std::string::npos) << message;
  EXPECT_TRUE(call.guards_intact());
}

// The bytes of row `row` of a result with `rows` rows.
Bytes row_of(const Call& call, const char* name, int64_t row, int64_t rows) {
  const Bytes bytes = call.bytes(name);
  const int64_t length = static_cast<int64_t>(bytes.size()) / rows;
  return {bytes.begin() + row * length, bytes.begin() + (row + 1) * length};
}

void check_one_bad_token(double bad, DType dtype, const Context& context) {
  const int64_t bad_token = cases::case_8::token;
  const Layer clean = make_layer(cases::case_8::shape, dtype);
  Layer dirty = clean;
  dirty.x[static_cast<size_t>(bad_token * clean.shape.hidden_size + 3)] = bad;
  Call expected(clean, context), call(dirty, context);
  expected.run();
  call.run();
  for (int64_t token = 0; token < clean.shape.num_tokens; ++token) {
    if (token == bad_token) continue;
    for (const char* name : {"output", "dx", "dscores"})
      EXPECT_TRUE(row_of(call, name, token, clean.shape.num_tokens) ==
                  row_of(expected, name, token, clean.shape.num_tokens))
          << name << " of token " << token;
  }
  std::set<int32_t> touched;
  for (int32_t k = 0; k < clean.shape.top_k; ++k)
    touched.insert(clean.ids[static_cast<size_t>(bad_token * clean.shape.top_k + k)]);
  const std::vector<double> dw1 = call.values("dw1");
  const size_t per_expert = dw1.size() / static_cast<size_t>(clean.shape.num_experts);
  for (int32_t e = 0; e < clean.shape.num_experts; ++e) {
    const auto begin = dw1.begin() + static_cast<int64_t>(per_expert) * e;
    const bool finite = std::all_of(begin, begin + static_cast<int64_t>(per_expert),
                                    [](double v) { return std::isfinite(v); });
    EXPECT_EQ(finite, touched.count(e) == 0) << "dW1 of expert " << e;
    if (touched.count(e) != 0) continue;
    for (const char* name : {"dw1", "dw2", "db1", "db2"})
      EXPECT_TRUE(row_of(call, name, e, clean.shape.num_experts) ==
                  row_of(expected, name, e, clean.shape.num_experts))
          << name << " of expert " << e;
  }
  const Bytes output = row_of(call, "output", bad_token, clean.shape.num_tokens);
  const std::vector<double> row = loaded(output, dtype);
  EXPECT_TRUE(std::any_of(row.begin(), row.end(), [](double v) { return !std::isfinite(v); }));
}

TEST_P(HostileValues, Case08_one_bad_token) {
  for (double bad : {kNaN, kInfinity, -kInfinity}) check_one_bad_token(bad, dtype(), context());
}

struct Routed {
  std::vector<int32_t> ids;
  std::vector<double> scores;
};

Routed route(RouterKind kind, const std::vector<double>& logits, DType dtype,
             const Context& context) {
  const cases::Shape& shape = cases::case_9::shape;
  const int64_t T = shape.num_tokens, E = shape.num_experts, K = shape.top_k;
  Buffer in(T * E * size_of(dtype)), scores(T * K * size_of(dtype), 0xA7), ids(T * K * 4, 0xA7);
  store(logits, dtype, in.data());
  RouterForwardArgs args;
  args.kind = kind;
  args.logits = TensorView::contiguous(in.data(), dtype, {T, E});
  args.scores = TensorView::contiguous(scores.data(), dtype, {T, K});
  args.ids = TensorView::contiguous(ids.data(), DType::int32, {T, K});
  router_forward(args, context);
  EXPECT_TRUE(scores.guards_intact() && ids.guards_intact());
  const auto* first = reinterpret_cast<const int32_t*>(ids.data());
  return {{first, first + T * K}, loaded(scores.data(), T * K, dtype)};
}

constexpr RouterKind kRouters[] = {RouterKind::softmax_topk, RouterKind::topk_softmax,
                                   RouterKind::topk_softmax_normalized};

TEST_P(HostileValues, Case09_strange_logits) {
  const cases::Shape& shape = cases::case_9::shape;
  const int32_t E = static_cast<int32_t>(shape.num_experts), K = shape.top_k;
  std::vector<double> logits(static_cast<size_t>(shape.num_tokens * E), 0.25);  // token 4: equal
  for (int32_t e = 0; e < E; ++e) {
    logits[static_cast<size_t>(e)] = kNaN;                         // token 0: all NaN
    logits[static_cast<size_t>(E + e)] = -kInfinity;               // token 1: all -inf
    logits[static_cast<size_t>(2 * E + e)] = e == 0 ? kNaN : -e;   // token 2: the first NaN
    logits[static_cast<size_t>(3 * E + e)] = e == 6 ? 1.0 : kNaN;  // token 3: the last a number
  }
  const std::vector<std::vector<int32_t>> expected = {
      {0, 1, 2}, {0, 1, 2}, {1, 2, 3}, {6, 0, 1}, {0, 1, 2}};
  for (RouterKind kind : kRouters) {
    SCOPED_TRACE(name_of(kind));
    const Routed routed = route(kind, logits, accumulator_of(dtype()), context());
    for (int32_t t = 0; t < shape.num_tokens; ++t) {
      const auto first = routed.ids.begin() + t * K;
      EXPECT_TRUE(std::equal(first, first + K, expected[static_cast<size_t>(t)].begin()))
          << "token " << t;
    }
    const bool over_all = kind != RouterKind::softmax_topk;
    for (int32_t k = 0; k < K; ++k) {
      EXPECT_TRUE(std::isnan(routed.scores[static_cast<size_t>(k)]));
      EXPECT_TRUE(std::isnan(routed.scores[static_cast<size_t>(K + k)]));
      EXPECT_EQ(std::isnan(routed.scores[static_cast<size_t>(2 * K + k)]), over_all);
      EXPECT_TRUE(std::isnan(routed.scores[static_cast<size_t>(3 * K + k)]));
      const double equal = kind == RouterKind::topk_softmax ? 1.0 / E : 1.0 / K;
      EXPECT_NEAR(routed.scores[static_cast<size_t>(4 * K + k)], equal, 1e-6);
    }
  }
}

TEST_P(HostileValues, Case09_infinite_logit) {
  const cases::Shape& shape = cases::case_9::shape;
  std::vector<double> logits(static_cast<size_t>(shape.num_tokens * shape.num_experts), 0.0);
  logits[2] = kInfinity;
  for (RouterKind kind : kRouters) {
    const Routed routed = route(kind, logits, accumulator_of(dtype()), context());
    EXPECT_EQ(routed.ids[0], 2);
    EXPECT_EQ(routed.ids[1], 0);
    EXPECT_EQ(routed.ids[2], 1);
  }
}

TEST_P(HostileValues, Case10_garbage_in_memory) {
  Layer layer = make_layer(cases::case_10::shape, dtype());
  for (size_t slot = 0; slot < layer.ids.size(); slot += cases::case_10::skipped_every)
    layer.ids[slot] = -1;  // rows at the end stay unused
  const int64_t live =
      std::count_if(layer.ids.begin(), layer.ids.end(), [](int32_t id) { return id >= 0; });
  std::map<std::string, Bytes> first;
  for (int64_t poison : cases::case_10::poisons) {
    Call call(layer, context(), static_cast<uint8_t>(poison));
    call.run();
    expect_near_statement(call, layer);
    auto results = call.all_results();
    const size_t row_bytes = results["h"].size() / static_cast<size_t>(layer.num_slots());
    for (size_t i = static_cast<size_t>(live) * row_bytes; i < results["h"].size(); ++i)
      ASSERT_EQ(results["h"][i], poison) << "a row that does not exist was written";
    results.erase("h");
    if (first.empty()) first = results;
    expect_same_bits(results, first);
  }
}

TEST_P(HostileValues, Case11_ids_that_skip) {
  Layer layer = make_layer(cases::case_11::shape, dtype());
  const int32_t E = static_cast<int32_t>(layer.shape.num_experts);
  const int32_t strange[] = {-1, E, E + 1, std::numeric_limits<int32_t>::max()};
  for (size_t i = 0; i < std::size(strange); ++i) layer.ids[i * 3] = strange[i];
  layer.ids[13] = layer.ids[14] = layer.ids[12] = -1;  // a token without experts
  Call call(layer, context());
  call.run();
  expect_near_statement(call, layer);
  for (size_t slot = 0; slot < layer.ids.size(); ++slot) {
    if (layer.ids[slot] < 0 || layer.ids[slot] >= E) {
      EXPECT_EQ(call.values("dscores")[slot], 0.0) << "slot " << slot;
    }
  }
}

TEST_P(HostileValues, Case11_trusted_ids_are_memory_safe) {
  Layer layer = make_layer(cases::case_11::shape, dtype());
  layer.ids[0] = -2;
  layer.ids[3] = std::numeric_limits<int32_t>::min();
  layer.ids[6] = layer.ids[7] = 2;  // a duplicate is one more row
  Call call(layer, context());
  call.run();
  expect_near_statement(call, layer);
}

TEST_P(HostileValues, Case11_checked_ids_are_refused) {
  const Layer good = make_layer(cases::case_11::shape, dtype());
  const size_t K = static_cast<size_t>(good.shape.top_k);
  Layer negative = good, duplicate = good, skipping = good;
  negative.ids[5 * K] = -2;
  duplicate.ids[7 * K + 1] = duplicate.ids[7 * K];
  skipping.ids[4 * K] = skipping.ids[4 * K + 1] = -1;  // twice -1 is not a duplicate
  Context checked = context();
  checked.id_checks = IdChecks::checked;

  Call first(negative, checked), second(duplicate, checked), third(skipping, checked);
  const auto before = first.buffer("slot_to_row").copy();
  const std::string message = error_of([&] { first.build_plan(); }, ErrorCode::invalid_argument);
  EXPECT_NE(message.find("-2"), std::string::npos) << message;
  EXPECT_NE(message.find("5"), std::string::npos) << message;
  EXPECT_TRUE(first.buffer("slot_to_row").copy() == before) << "the plan was written";
  EXPECT_NE(error_of([&] { second.build_plan(); }, ErrorCode::invalid_argument).find("7"),
            std::string::npos);
  third.run();
  expect_near_statement(third, skipping);
}

TEST_P(HostileValues, Case12_routing_weights) {
  Layer layer = make_layer(cases::case_12::shape, dtype());
  const DType type = accumulator_of(dtype());
  const double tiny = type == DType::float64 ? 0x1p-1070 : 0x1p-140;
  const double pairs[][2] = {{0.0, 0.0},  {-1.5, 0.5},  {1.0, -1.0},     {tiny, tiny},
                             {-0.0, 2.0}, {-tiny, 1.0}, {100.0, -100.0}, {0.0, 1.0}};
  for (size_t token = 0; token < std::size(pairs); ++token) {
    layer.scores[2 * token] = pairs[token][0];
    layer.scores[2 * token + 1] = pairs[token][1];
  }
  Call call(layer, context());
  call.run();
  expect_near_statement(call, layer);
  // dS does not depend on the scores, so a zero, tiny or huge one must not change its bits.
  Layer plain = layer;
  std::fill(plain.scores.begin(), plain.scores.end(), 1.0);
  Call other(plain, context());
  other.run();
  EXPECT_TRUE(call.bytes("dscores") == other.bytes("dscores"));
}

PENSTOCK_EVERY_DOOR(HostileValues);

}  // namespace
}  // namespace penstock::hostile
