// Threads that go through stages of work together.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace duotone {

// Pieces of work in as many shares as there are threads. Each takes those of its own share one after the other, so that what it
// reads lies in a row, and then what others have left: cores are not alike, and not always ours.
class Pieces {
 public:
  static constexpr int64_t SHARES = 16;  // at most; further threads begin where another one does

  // work(i) for every piece that nobody has taken, beginning with those of share `own`; returns how many it did.
  template <class Work>
  int64_t take(int64_t pieces, int64_t threads, int64_t own, const Work& work) {
    const int64_t shares = std::max<int64_t>(1, std::min({threads, pieces, SHARES}));
    int64_t done = 0;
    for (int64_t turn = 0; turn < shares; turn++) {
      const int64_t share = (own + turn) % shares, begin = pieces * share / shares, count = pieces * (share + 1) / shares - begin;
      for (int64_t i; (i = next_[share].taken.fetch_add(1, std::memory_order_relaxed)) < count; done++) work(begin + i);
    }
    return done;
  }

 private:
  struct alignas(64) Next {
    std::atomic<int64_t> taken{0};
  };
  Next next_[SHARES];
};

// A stage is a number of pieces. It ends when all its pieces are done, and only then does anybody begin the next. Waiting is for
// pieces, never for threads: one thread that gets no company does all of them.
class Crew {
 public:
  static constexpr int STAGES = 16;

  class Member {
   public:
    Member(Crew& crew, int64_t number) : crew_(crew), number_(number) {}

    // The next stage: work(i) for each of `pieces`, by some member.
    template <class Work>
    void each(int64_t pieces, const Work& work) {
      Stage& stage = crew_.stage_[at_++];
      const int64_t done = stage.pieces.take(pieces, crew_.threads_, number_, [&](int64_t i) { crew_.attempt(work, i); });
      stage.done.fetch_add(done, std::memory_order_acq_rel);
      for (int turn = 0; stage.done.load(std::memory_order_acquire) < pieces; turn++) wait(turn);
    }

   private:
    Crew& crew_;
    int64_t number_;
    int at_ = 0;
  };

  // Runs all stages, which `work(member)` goes through, on as many threads as torch has.
  template <class Work>
  static void run(const Work& work) {
    Crew crew;
    torch::stable::parallel_for(0, crew.threads_, 1, [&](int64_t, int64_t) {
      Member member(crew, crew.joined_.fetch_add(1, std::memory_order_relaxed));
      work(member);
    });
    if (crew.error_) std::rethrow_exception(crew.error_);
  }

 private:
  struct Stage {
    Pieces pieces;
    alignas(64) std::atomic<int64_t> done{0};
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

  int64_t threads_ = torch::stable::get_num_threads();
  std::atomic<int64_t> joined_{0};
  Stage stage_[STAGES];
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

}  // namespace duotone
