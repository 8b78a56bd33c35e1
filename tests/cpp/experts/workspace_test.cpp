// SPDX-License-Identifier: Apache-2.0
//
// Workspaces are exact: one byte less is refused with nothing written, nothing past the end is
// touched, and the planner's sizes are those of its formula. Bytes kept for backward likewise.
#include <gtest/gtest.h>

#include "backend/registry.h"
#include "experts/workspace_plan.h"
#include "support/backends.h"
#include "support/compare.h"
#include "support/layer_call.h"

namespace penstock::test {
namespace {

int64_t up_to_64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

LayerForm form_of(DType dtype, SavePolicy save = SavePolicy::preactivation,
                  RowSource rows = RowSource::routed) {
  LayerForm form;
  form.dtype = form.grad_dtype = dtype;
  form.config.save = save;
  form.rows = rows;
  return form;
}

class WorkspaceTest : public testing::TestWithParam<Run> {
 protected:
  Context context() const { return context_of(GetParam().backend); }
};

// Buffers that are alive together do not meet, and are aligned.
void expect_apart(const Buffer& a, const Buffer& b) {
  if (a.bytes == 0 || b.bytes == 0) return;
  EXPECT_TRUE(a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset);
  EXPECT_EQ(a.offset % 64, 0);
  EXPECT_EQ(b.offset % 64, 0);
}

TEST_P(WorkspaceTest, LifetimesShareMemory) {
  for (int64_t hidden : {5, 64, 300}) {
    for (int64_t inner : {5, 64, 300}) {
      ExpertsProblem problem;
      problem.hidden_size = hidden;
      problem.intermediate_size = inner;
      problem.num_experts = 3;
      problem.num_tokens = 21;
      problem.num_slots = problem.row_capacity = 63;
      problem.dtype = GetParam().dtype;
      const Backend& backend = select_backend(problem, context());
      const int64_t size = size_of(problem.dtype);

      const ForwardWorkspace forward = plan_forward(problem, backend, context());
      expect_apart(forward.a, forward.y);
      expect_apart(forward.a, forward.scratch);
      expect_apart(forward.y, forward.scratch);
      EXPECT_EQ(forward.a.bytes, 63 * inner * size);
      EXPECT_EQ(forward.y.bytes, 63 * hidden * size);
      EXPECT_LE(forward.bytes, up_to_64(forward.a.bytes) + up_to_64(forward.y.bytes) +
                                   up_to_64(forward.scratch.bytes));

      const BackwardWorkspace backward =
          plan_backward(problem, BackwardPass::whole, backend, context());
      expect_apart(backward.dh, backward.a_scaled);
      expect_apart(backward.dh, backward.partials);
      expect_apart(backward.dh, backward.dx_rows);
      expect_apart(backward.dh, backward.scratch);
      expect_apart(backward.a_scaled, backward.partials);
      expect_apart(backward.a_scaled, backward.scratch);
      expect_apart(backward.partials, backward.scratch);
      expect_apart(backward.dx_rows, backward.scratch);
      EXPECT_EQ(backward.dh.bytes, 63 * 2 * inner * size);
      // dX~ lies over A' and the partial sums.
      const int64_t early = up_to_64(backward.a_scaled.bytes) + up_to_64(backward.partials.bytes);
      EXPECT_LE(backward.bytes, up_to_64(backward.dh.bytes) + up_to_64(backward.scratch.bytes) +
                                    std::max(early, up_to_64(backward.dx_rows.bytes)));
      // H recomputed lies under dH: the policies need the same workspace.
      problem.config.save = SavePolicy::input;
      EXPECT_EQ(backward_workspace_bytes(problem, context()), backward.bytes);
    }
  }
}

TEST_P(WorkspaceTest, TheLowMemoryOrderHoldsABlockOfColumns) {
  ExpertsProblem problem;
  problem.intermediate_size = 8;
  problem.num_experts = 3;
  problem.num_tokens = 21;
  problem.num_slots = problem.row_capacity = 63;
  problem.dtype = GetParam().dtype;
  problem.config.order = LaunchOrder::low_memory;
  const int64_t size = size_of(problem.dtype);
  const std::pair<int64_t, int64_t> hidden_and_block[] = {{100, 100},  {256, 256},   {600, 256},
                                                          {1536, 512}, {4096, 1024}, {4100, 1280}};
  for (const auto& [hidden, block] : hidden_and_block) {
    problem.hidden_size = hidden;
    problem.rows = RowSource::routed;
    const Backend& backend = select_backend(problem, context());
    EXPECT_EQ(columns_at_a_time(problem), block);
    EXPECT_EQ(plan_forward(problem, backend, context()).y.bytes, 63 * block * size);
    EXPECT_EQ(plan_backward(problem, BackwardPass::whole, backend, context()).dx_rows.bytes,
              63 * block * size);
    problem.rows = RowSource::dispatched;
    EXPECT_EQ(columns_at_a_time(problem), hidden);
  }
}

TEST_P(WorkspaceTest, OverwritingHSavesItsBytes) {
  ExpertsProblem problem;
  problem.hidden_size = 96;
  problem.intermediate_size = 64;
  problem.num_experts = 3;
  problem.num_tokens = 32;
  problem.num_slots = problem.row_capacity = 64;
  problem.dtype = GetParam().dtype;
  const int64_t preserved = backward_workspace_bytes(problem, context());
  const int64_t data = backward_data_workspace_bytes(problem, context());
  problem.config.kept_h = KeptH::overwritten;
  EXPECT_EQ(backward_workspace_bytes(problem, context()),
            preserved - 64 * 128 * size_of(problem.dtype));
  EXPECT_EQ(backward_data_workspace_bytes(problem, context()), data);
  problem.config.save = SavePolicy::input;  // the buffer of H computed again is needed
  EXPECT_EQ(backward_workspace_bytes(problem, context()), preserved);
}

TEST_P(WorkspaceTest, DispatchedRowsNeedNoneForOutputs) {
  LayerCall call(form_of(GetParam().dtype, SavePolicy::input, RowSource::dispatched), context());
  const ExpertsProblem problem = problem_of(call.forward_args);
  EXPECT_EQ(problem.rows, RowSource::dispatched);
  const Backend& backend = select_backend(problem, context());
  EXPECT_EQ(plan_forward(problem, backend, context()).y.bytes, 0);
  EXPECT_EQ(plan_backward(problem, BackwardPass::whole, backend, context()).dx_rows.bytes, 0);
}

// Any first byte of a result that is still poison was not written.
TEST_P(WorkspaceTest, OneByteLessIsRefusedAndNothingIsWritten) {
  for (SavePolicy save : {SavePolicy::preactivation, SavePolicy::input}) {
    LayerCall call(form_of(GetParam().dtype, save), context());
    const auto before = call.result_bytes();
    const int64_t forward = forward_workspace_bytes(problem_of(call.forward_args), context());
    Block block(forward);
    for (Workspace workspace : {Workspace{block.data(), forward - 1}, Workspace{nullptr, forward},
                                Workspace{block.data() + 32, forward}}) {
      call.forward_args.workspace = workspace;
      expect_invalid([&] { experts_forward(call.forward_args, context()); },
                     {"workspace", std::to_string(forward).c_str(), "forward_workspace_bytes"});
    }
    EXPECT_EQ(call.result_bytes(), before);
    EXPECT_EQ(block.contents(), Block(forward).contents());

    call.forward();
    const int64_t backward = backward_workspace_bytes(problem_of(call.backward_args), context());
    Block backward_block(backward);
    const auto after_forward = call.result_bytes();
    for (Workspace workspace :
         {Workspace{backward_block.data(), backward - 1}, Workspace{nullptr, backward},
          Workspace{backward_block.data() + 32, backward}}) {
      call.backward_args.workspace = workspace;
      expect_invalid([&] { experts_backward(call.backward_args, context()); },
                     {"workspace", std::to_string(backward).c_str(), "backward_workspace_bytes"});
    }
    EXPECT_EQ(call.result_bytes(), after_forward);
    call.backward();
    call.check_backward();  // exact workspaces between guards
  }
}

TEST_P(WorkspaceTest, TheTwoHalvesAreExactToo) {
  LayerForm form = form_of(GetParam().dtype);
  form.passes = PassForm::delayed;
  LayerCall call(form, context());
  call.forward();
  call.backward();
  call.check_backward();
  const ExpertsProblem problem = problem_of(call.backward_args);
  EXPECT_LT(backward_data_workspace_bytes(problem, context()),
            backward_workspace_bytes(problem, context()));
  EXPECT_EQ(backward_weights_workspace_bytes(problem, context()),
            select_backend(problem, context()).scratch_bytes(problem, context()));
}

TEST_P(WorkspaceTest, AnOutputInsideTheWorkspaceIsRefused) {
  LayerCall call(form_of(GetParam().dtype), context());
  const int64_t bytes = forward_workspace_bytes(problem_of(call.forward_args), context());
  Block block(bytes + call.forward_args.output.bytes());
  call.forward_args.workspace = {block.data(), bytes};
  call.forward_args.output.data = block.data() + bytes / 8 * 8 - 8;
  expect_invalid([&] { experts_forward(call.forward_args, context()); },
                 {"workspace", "overlaps", "output"});
}

INSTANTIATE_TEST_SUITE_P(Cpu, WorkspaceTest, testing::ValuesIn(cpu_runs()),
                         [](const auto& test) { return text_of(test.param); });

TEST(SavedBytes, AreThoseOfTheFormula) {
  ExpertsProblem problem;
  problem.num_tokens = 10;
  problem.hidden_size = 32;
  problem.intermediate_size = 24;
  problem.num_experts = 6;
  problem.num_slots = 20;
  problem.row_capacity = 26;
  problem.dtype = DType::bfloat16;
  const int64_t maps = 20 * (4 + 4) + 20 * 4 + 26 * (4 + 4) + (6 + 7) * 4;
  EXPECT_EQ(saved_bytes(problem), maps + 26 * 48 * 2);
  problem.config.save = SavePolicy::input;
  EXPECT_EQ(saved_bytes(problem), maps);
  problem.config.save = SavePolicy::nothing;
  EXPECT_EQ(saved_bytes(problem), 0);
  problem.config.save = SavePolicy::preactivation;
  problem.config.activation = Activation::relu;
  problem.dtype = DType::float64;
  EXPECT_EQ(saved_bytes(problem), maps + 20 * 4 + 26 * 24 * 8);
  problem.rows = RowSource::dispatched;
  problem.num_slots = 0;
  problem.num_tokens = 26;
  EXPECT_EQ(saved_bytes(problem), 26 * 24 * 8 + 26 * 8 + (6 + 7) * 4);
}

TEST(Queries, RefuseProblemsThatCannotBe) {
  ExpertsProblem problem;
  problem.num_tokens = problem.num_slots = problem.row_capacity = 4;
  problem.hidden_size = problem.intermediate_size = problem.num_experts = 2;
  const auto refuse = [&](auto bend, std::initializer_list<const char*> words) {
    ExpertsProblem bent = problem;
    bend(bent);
    expect_invalid([&] { forward_workspace_bytes(bent, {}); }, words);
    expect_invalid([&] { backward_workspace_bytes(bent, {}); }, words);
    expect_invalid([&] { saved_bytes(bent); }, words);
  };
  refuse([](ExpertsProblem& p) { p.hidden_size = 0; }, {"hidden_size", "1 or more"});
  refuse([](ExpertsProblem& p) { p.num_experts = 0; }, {"num_experts"});
  refuse([](ExpertsProblem& p) { p.num_tokens = -1; }, {"num_tokens", "-1"});
  refuse([](ExpertsProblem& p) { p.num_slots = int64_t{1} << 31; }, {"num_slots", "2147483648"});
  refuse([](ExpertsProblem& p) { p.row_capacity = int64_t{1} << 31; }, {"row_capacity"});
  refuse([](ExpertsProblem& p) { p.dtype = DType::int64; }, {"dtype", "int64"});
  refuse([](ExpertsProblem& p) { p.rows = RowSource::dispatched; }, {"4 slots", "dispatched"});
  refuse(
      [](ExpertsProblem& p) {
        p.config.activation = Activation::swiglu_clamped;
        p.config.clamp_limit = 0;
      },
      {"clamp_limit"});
  problem.config.save = SavePolicy::nothing;
  EXPECT_NO_THROW(forward_workspace_bytes(problem, {}));
  expect_invalid([&] { backward_workspace_bytes(problem, {}); }, {"save", "nothing"});
}

}  // namespace
}  // namespace penstock::test
