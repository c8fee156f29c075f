#pragma once
#include <cstddef>
#include <string>

namespace gcfast::cuda {

struct Status {
  int driver, runtime, count;
  std::string archs, error;
};
struct Device {
  std::string name;
  int major, minor, multiprocessors;
  std::size_t total_bytes, shared_bytes_per_block;
};

Status status();
Device device(int index);

}  // namespace gcfast::cuda
