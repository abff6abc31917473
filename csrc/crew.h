// Threads that go through stages of work together.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>
#include <thread>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace duotone {

// A stage is a number of pieces; whoever is free takes the next. It ends when all its pieces are done, and only then does
// anybody begin the next. Waiting is for pieces, never for threads: one thread that gets no company does all of them.
class Crew {
 public:
  static constexpr int STAGES = 16;

  class Member {
   public:
    explicit Member(Crew& crew) : crew_(crew) {}

    // The next stage: work(i) for each of `pieces`, by some member.
    template <class Work>
    void each(int64_t pieces, const Work& work) {
      Stage& stage = crew_.stage_[at_++];
      int64_t done = 0;
      for (int64_t i; (i = stage.next.fetch_add(1, std::memory_order_relaxed)) < pieces; done++) crew_.attempt(work, i);
      stage.done.fetch_add(done, std::memory_order_acq_rel);
      for (int turn = 0; stage.done.load(std::memory_order_acquire) < pieces; turn++) wait(turn);
    }

   private:
    Crew& crew_;
    int at_ = 0;
  };

  // Runs all stages, which `work(member)` goes through, on as many threads as torch has.
  template <class Work>
  static void run(const Work& work) {
    Crew crew;
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
      Member member(crew);
      work(member);
    });
    if (crew.error_) std::rethrow_exception(crew.error_);
  }

 private:
  struct alignas(64) Stage {
    std::atomic<int64_t> next{0}, done{0};
  };

  // A piece that throws is done, or all others would wait for it; the first one's error is everybody's.
  template <class Work>
  void attempt(const Work& work, int64_t piece) {
    try {
      if (!failed_.load(std::memory_order_relaxed)) work(piece);
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }

  // A stage's last piece is a matter of microseconds, unless its thread has lost its core.
  static void wait(int turn) {
    if (turn > 4096) std::this_thread::yield();
#if defined(__x86_64__) && defined(__GNUC__)
    else _mm_pause();
#endif
  }

  Stage stage_[STAGES];
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

}  // namespace duotone
