// SPDX-License-Identifier: Apache-2.0
#include "mapping_watch.h"

#include <sys/stat.h>

#include <cerrno>
#include <mutex>
#include <system_error>
#include <vector>

namespace tcmu {

namespace {

struct Announced {
  MappingWatch* watch;
  void* start;
};

std::mutex lock;
std::vector<MappingWatch*> watches;
std::vector<Announced> announced;

}  // namespace

MappingWatch::MappingWatch(int fd) {
  struct stat facts;
  if (fstat(fd, &facts) < 0) throw std::system_error(errno, std::generic_category(), "fstat");
  device_ = facts.st_dev;
  inode_ = facts.st_ino;
}

void MappingWatch::begin() {
  std::lock_guard guard(lock);
  watches.push_back(this);
}

void MappingWatch::end() {
  std::lock_guard guard(lock);
  std::erase(watches, this);
  std::erase_if(announced, [this](const Announced& each) { return each.watch == this; });
}

void MappingWatch::announce(int fd, void* start, size_t bytes) {
  struct stat facts;
  if (fstat(fd, &facts) < 0) return;
  std::lock_guard guard(lock);
  for (MappingWatch* watch : watches) {
    if (watch->device_ != facts.st_dev || watch->inode_ != facts.st_ino) continue;
    announced.push_back({watch, start});
    watch->mapped(start, bytes);
  }
}

void MappingWatch::withdraw(void* start) {
  std::lock_guard guard(lock);
  for (const Announced& each : announced)
    if (each.start == start) each.watch->unmapping(start);
  std::erase_if(announced, [start](const Announced& each) { return each.start == start; });
}

}  // namespace tcmu
