// Threads of the host in the place of a warp or a block: a Team of core/inertia.h with a real barrier.
#pragma once
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

class TeamMemory {
 public:
  explicit TeamMemory(int size) : slots(size), size_(size) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned round = round_;
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++round_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return round_ != round; });
    }
  }
  int size() const { return size_; }
  std::vector<double> slots;

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  unsigned round_ = 0;
  int arrived_ = 0;
  const int size_;
};

class ThreadTeam {
 public:
  ThreadTeam(int rank, TeamMemory& memory) : rank_(rank), memory_(&memory) {}
  int rank() const { return rank_; }
  int size() const { return memory_->size(); }
  void sync() const { memory_->wait(); }
  double sum(double v) const {
    return over(v, [](double a, double b) { return a + b; });
  }
  double largest(double v) const {
    return over(v, [](double a, double b) { return a < b ? b : a; });
  }

 private:
  template <class F> double over(double v, F f) const {
    memory_->slots[rank_] = v;
    sync();
    double all = memory_->slots[0];
    for (int i = 1; i < size(); ++i) all = f(all, memory_->slots[i]);
    sync();
    return all;
  }
  int rank_;
  TeamMemory* memory_;
};

// f(team) in each of `size` threads.
template <class F> void with_team(int size, F f) {
  TeamMemory memory(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&memory, &f, rank] { f(ThreadTeam(rank, memory)); });
  for (std::thread& t : threads) t.join();
}
