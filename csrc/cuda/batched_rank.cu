// Rank of many matrices, one a team in shared memory (core/rank_team.h): a warp up to 32 rows, a block of about a
// thread a row above. All matrices in double; those left open are listed on the device, and a second kernel takes the
// list in double-double, so that the host waits for nothing.
//
// Counted, not measured, for 4,096 matrices of full rank on an H100 (132 multiprocessors, 31 matrices each; 64 FMAs and
// 128 bytes of shared memory a clock and multiprocessor, 1.7 GHz). The Gram is n^2 m / 2 FMAs, an elimination and the
// inverse n^3 / 6 each. A warp reads a Gram's tile in 8 to 12 clocks for 16 FMAs a thread, theirs in 6 for 4: shared
// memory bounds both.
//   32 x 32   FMAs 16 K + 2 * 5.5 K, issued with the tiles' idle threads 33 K + 2 * 16 K: 1.0 K clocks a matrix, of
//             shared memory 2 K. The chain of dependent steps is some 25 K (8 blocks of columns of 1.3 K each in
//             elimination and inverse, and the Gram) for 14 matrices at once (15 KB each): 1.8 K. 31 of them: 0.04 ms.
//   64 x 128  FMAs 262 K + 2 * 44 K, issued 393 K (17 of 24 places of the tiles are taken) + 2 * 130 K: 10 K clocks a
//             matrix, of shared memory 20 K; the chain is some 45 K for 4 at once (46 KB each), 11 K. 0.35 ms.
// float32 and float64 take the same: the reads (134 and 268 MB for 64 x 128: 0.05 and 0.1 ms) hide behind them. What
// double-double takes costs 7 to 15 operations an FMA, with fewer matrices at once: some ten times as much.
#include "batched_rank.h"

#include <algorithm>
#include <utility>

#include "../core/rank_team.h"
#include "check.h"

namespace gcfast::cuda {
namespace {

constexpr int kWarpRows = 32, kWarps = 2;  // warps a block, each with its own matrix
constexpr int kMostThreads = 192;          // of a block on one matrix
constexpr int64_t kMostBlocks = 1 << 30;
constexpr int kReserved = 1 << 10;  // bytes of shared memory that the system takes from every block

// Teams are device code; nvcc reads them for the host as well, with the functions that take them.
#if defined(__CUDA_ARCH__)
#define GCFAST_ON_DEVICE(expression, otherwise) (expression)
#else
#define GCFAST_ON_DEVICE(expression, otherwise) (otherwise)
#endif

struct Warp {
  static constexpr int kTeams = kWarps, kThreads = 32 * kWarps, kScratch = 0;
  GCFAST_HD explicit Warp(double*) {}
  static GCFAST_HD int rank() { return GCFAST_ON_DEVICE(static_cast<int>(threadIdx.x % 32), 0); }
  static GCFAST_HD int size() { return 32; }
  static GCFAST_HD void sync() { GCFAST_ON_DEVICE(__syncwarp(), void()); }
  // By exchange: the same in every thread.
  static GCFAST_HD double exchanged(double v, int mask) {
    return GCFAST_ON_DEVICE(__shfl_xor_sync(0xffffffffu, v, mask), v + mask);
  }
  static GCFAST_HD double sum(double v) {
    GCFAST_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) v += exchanged(v, mask);
    return v;
  }
  static GCFAST_HD double largest(double v) {
    GCFAST_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) v = Lanes<double>::larger(v, exchanged(v, mask));
    return v;
  }
};

struct Block {
  static constexpr int kTeams = 1, kThreads = kMostThreads, kScratch = kMostThreads / 32;
  double* scratch;
  GCFAST_HD explicit Block(double* memory) : scratch(memory) {}
  static GCFAST_HD int rank() { return GCFAST_ON_DEVICE(static_cast<int>(threadIdx.x), 0); }
  static GCFAST_HD int size() { return GCFAST_ON_DEVICE(static_cast<int>(blockDim.x), 1); }
  static GCFAST_HD void sync() { GCFAST_ON_DEVICE(__syncthreads(), void()); }
  GCFAST_HD double sum(double v) const {
    put(Warp::sum(v));
    double all = scratch[0];
    for (int w = 1; w < size() / 32; ++w) all += scratch[w];
    sync();
    return all;
  }
  GCFAST_HD double largest(double v) const {
    put(Warp::largest(v));
    double all = scratch[0];
    for (int w = 1; w < size() / 32; ++w) all = Lanes<double>::larger(all, scratch[w]);
    sync();
    return all;
  }

 private:
  GCFAST_HD void put(double of_warp) const {
    if (rank() % 32 == 0) scratch[rank() / 32] = of_warp;
    sync();
  }
};

// Blocks a multiprocessor that registers must allow: as many as shared memory holds of the largest matrices but one.
template <bool Doubled, class Team> constexpr int kResident = Doubled ? 1 : Team::kTeams > 1 ? 8 : 2;

// How a launch divides shared memory. No columns: no room in it for double-double.
struct Room {
  int columns, bytes;  // a team's
};

template <class T, bool Doubled, class Team>
__global__ void __launch_bounds__(Team::kThreads, kResident<Doubled, Team>)
    batched_rank_kernel(const RankTask<T> task, const Room room, unsigned long long* count, int64_t* list) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int index = Team::kTeams == 1 ? 0 : threadIdx.x / 32;
  unsigned char* const memory = shared + index * room.bytes;
  const Team team(reinterpret_cast<double*>(shared + room.bytes));  // a block's; a warp needs none
  const int64_t total = Doubled ? static_cast<int64_t>(*count) : task.batch;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * Team::kTeams + index; i < total;
       i += static_cast<int64_t>(gridDim.x) * Team::kTeams) {
    if (Doubled) {
      rank_in_double_double(team, task, list[i], room.columns, room.columns > 0 ? memory : nullptr);
    } else if (!rank_in_double(team, task, i, room.columns, memory) && team.rank() == 0) {
      list[atomicAdd(count, 1ull)] = i;
    }
    team.sync();
  }
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  GCFAST_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Panels are as long as fits, within `most`.
template <bool Doubled> Room room_for(int n, int64_t m, int most, int64_t bytes) {
  int columns = most;
  while (columns > 4 && (columns / 2 >= m || team_bytes<Doubled>(n, columns) > bytes)) columns /= 2;
  const int64_t used = team_bytes<Doubled>(n, columns);
  return used <= bytes ? Room{columns, static_cast<int>(used)} : Room{0, 0};
}

template <class T, bool Doubled, class Team>
void launch(const RankTask<T>& task, const BatchedRankArgs<T>& a, int shared_block, int shared_processor,
            int processors) {
  const int scratch = 8 * Team::kScratch;
  const Room room = room_for<Doubled>(task.n, task.m, 16, shared_block / Team::kTeams - scratch);
  const int bytes = room.bytes * Team::kTeams + scratch;
  const int threads = Team::kTeams > 1 ? Team::kThreads : (task.n + 31) / 32 * 32;
  int64_t blocks = std::min((task.batch + Team::kTeams - 1) / Team::kTeams, kMostBlocks);
  if (Doubled) {  // one wave: how long the list is, only the device knows
    const int resident = std::max(1, std::min(shared_processor / (bytes + kReserved), 2048 / threads));
    blocks = std::min<int64_t>(blocks, static_cast<int64_t>(processors) * resident);
  }
  const auto kernel = &batched_rank_kernel<T, Doubled, Team>;
  GCFAST_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  auto* count = reinterpret_cast<unsigned long long*>(a.scratch);
  int64_t* list = a.scratch + 1;
  RankTask<T> argument = task;
  Room division = room;
  void* arguments[] = {&argument, &division, &count, &list};
  GCFAST_CUDA_CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                                     dim3(threads), arguments, bytes, static_cast<cudaStream_t>(a.stream)));
}

template <class T> void run(const BatchedRankArgs<T>& a) {
  const bool wide = a.n <= a.m;
  const int64_t n = std::min(a.n, a.m);
  const DeviceGuard guard(a.device);
  if (n > batched_rank_limit(a.device)) throw std::runtime_error("batched_rank: a matrix does not fit shared memory");
  const RankTask<T> task{a.a, a.batch, std::max(a.n, a.m), a.batch_stride, wide ? a.row_stride : a.column_stride,
                         wide ? a.column_stride : a.row_stride, a.atol, a.rtol, a.rank, a.lower, a.upper,
                         a.sigma_min_lower, a.sigma_max_upper, static_cast<int>(n)};
  const int shared_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, a.device);
  const int shared_processor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, a.device);
  const int processors = attribute(cudaDevAttrMultiProcessorCount, a.device);
  GCFAST_CUDA_CHECK(cudaMemsetAsync(a.scratch, 0, sizeof(int64_t), static_cast<cudaStream_t>(a.stream)));
  if (n <= kWarpRows) {
    launch<T, false, Warp>(task, a, shared_block, shared_processor, processors);
    launch<T, true, Warp>(task, a, shared_block, shared_processor, processors);
  } else {
    launch<T, false, Block>(task, a, shared_block, shared_processor, processors);
    launch<T, true, Block>(task, a, shared_block, shared_processor, processors);
  }
}

}  // namespace

void batched_rank(const BatchedRankArgs<float>& a) { run(a); }
void batched_rank(const BatchedRankArgs<double>& a) { run(a); }

int batched_rank_limit(int device) {
  const int bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - 8 * Block::kScratch;
  int n = kWarpRows;
  while (n < kMostThreads && team_bytes<false>(n + 1, 4) <= bytes) ++n;
  return n;
}

}  // namespace gcfast::cuda
