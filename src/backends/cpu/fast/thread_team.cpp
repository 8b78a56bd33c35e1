// SPDX-License-Identifier: Apache-2.0
//
// A team is a fixed number of helpers that sleep on one condition variable. A job is open while
// its caller works on it: helpers that wake in time join, late ones find it closed and sleep on,
// so a short job never waits for a slow wake-up. Idle teams wait in a list, by size.
//
// Helpers are detached and the list is never destroyed: the process may end, or fork, at any time
// without joining anything. In a forked child the helpers are gone, so the list is emptied there
// (what it held stays reachable, which leak checkers look for).
#include "backends/cpu/fast/thread_team.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "penstock/error.h"

namespace penstock::cpu::fast {
namespace {

struct Job {
  Job(int64_t num_tasks, TaskFunction task_function) : tasks(num_tasks), function(task_function) {}

  void work(int32_t worker) {
    for (;;) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      function(task, worker);
    }
  }

  const int64_t tasks;
  const TaskFunction function;
  std::atomic<int64_t> next{0};
};

// Signals are for the application's own threads.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  BlockedSignals(const BlockedSignals&) = delete;
  BlockedSignals& operator=(const BlockedSignals&) = delete;

 private:
  sigset_t before_;
};

class Team {
 public:
  // Throws std::system_error, with no helper left running, if a thread cannot be had.
  static std::shared_ptr<Team> start(int32_t helpers) {
    auto team = std::make_shared<Team>(helpers);
    const BlockedSignals blocked;
    try {
      for (int32_t worker = 1; worker <= helpers; ++worker)
        std::thread([team, worker] { team->help(worker); }).detach();
    } catch (...) {
      team->stop();
      throw;
    }
    return team;
  }

  explicit Team(int32_t helpers) : helpers_(helpers) {}

  int32_t helpers() const { return helpers_; }

  void run(Job& job) {
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      ++jobs_started_;
    }
    wake_.notify_all();
    job.work(0);
    std::unique_lock lock(mutex_);
    job_ = nullptr;
    done_.wait(lock, [this] { return joined_ == 0; });
  }

 private:
  void help(int32_t worker) {
    uint64_t last_seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stopping_ || (job_ && jobs_started_ != last_seen); });
      if (stopping_) return;
      last_seen = jobs_started_;
      Job& job = *job_;
      ++joined_;
      lock.unlock();
      job.work(worker);
      lock.lock();
      if (--joined_ == 0) done_.notify_one();
    }
  }

  void stop() {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    wake_.notify_all();
  }

  const int32_t helpers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  Job* job_ = nullptr;
  uint64_t jobs_started_ = 0;
  int32_t joined_ = 0;
  bool stopping_ = false;
};

class IdleTeams {
 public:
  static IdleTeams& instance() {
    static IdleTeams* const teams = make();
    return *teams;
  }

  std::shared_ptr<Team> take(int32_t helpers) {
    const std::lock_guard lock(mutex_);
    const auto found = std::find_if(idle_.rbegin(), idle_.rend(), [&](const auto& team) {
      return team->helpers() == helpers;
    });
    if (found == idle_.rend()) return nullptr;
    auto team = *found;
    idle_.erase(std::next(found).base());
    return team;
  }

  // A team from before a fork has no helpers in the child: it is not kept there.
  void put_back(std::shared_ptr<Team> team, uint64_t generation) {
    const std::lock_guard lock(mutex_);
    (generation == generation_ ? idle_ : lost_).push_back(std::move(team));
  }

  uint64_t generation() {
    const std::lock_guard lock(mutex_);
    return generation_;
  }

 private:
  static IdleTeams* make() {
    auto* const teams = new IdleTeams;
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().forget_and_unlock(); });
    return teams;
  }

  void forget_and_unlock() {
    lost_.insert(lost_.end(), idle_.begin(), idle_.end());
    idle_.clear();
    ++generation_;
    mutex_.unlock();
  }

  std::mutex mutex_;
  std::vector<std::shared_ptr<Team>> idle_;
  std::vector<std::shared_ptr<Team>> lost_;
  uint64_t generation_ = 0;
};

std::shared_ptr<Team> start_team(int32_t helpers) {
  try {
    return Team::start(helpers);
  } catch (const std::system_error& error) {
    throw Error(ErrorCode::device_error,
                {"threads of the fast CPU backend", error.what(),
                 std::to_string(helpers) + " more threads",
                 "Ask for fewer threads, or raise the limit on the process's threads."});
  }
}

}  // namespace

void parallel_for(int32_t threads, int64_t tasks, TaskFunction function) {
  Job job(tasks, function);
  const int32_t workers = static_cast<int32_t>(std::min<int64_t>(threads, tasks));
  if (workers <= 1) return job.work(0);

  IdleTeams& idle = IdleTeams::instance();
  const uint64_t generation = idle.generation();
  std::shared_ptr<Team> team = idle.take(threads - 1);
  if (!team) team = start_team(threads - 1);
  team->run(job);
  idle.put_back(std::move(team), generation);
}

int32_t thread_count(int32_t requested) {
  if (requested > 0) return requested;
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
  return std::max(1, static_cast<int32_t>(std::thread::hardware_concurrency()));
}

int32_t threads_worth(int32_t threads, int64_t work) {
  constexpr int64_t kWorthWaking = 1 << 18;  // 10 us or more, about what waking a thread costs
  return work < kWorthWaking ? 1 : threads;
}

}  // namespace penstock::cpu::fast
