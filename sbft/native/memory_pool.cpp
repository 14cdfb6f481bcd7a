// An allocator for CPU tensors of 64 KiB and more: freed memory is kept and reused, but the pool never holds more than was in
// use at once. See memory_pool.py.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <list>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t kSmallest = size_t{64} << 10;  // smaller ones are left to malloc
const size_t kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));  // 4 KiB on x86, up to 64 on ARM
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kWaste = 16;  // a kept block is reused if it exceeds the request by at most 1/16

size_t up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Block {
  void* start;
  size_t length;
};

// Blocks of memory from the kernel, in use or kept. All functions may be called by many threads.
class Pool {
 public:
  // Returns null if the kernel has no more memory.
  void* take(size_t asked) {
    const std::lock_guard<std::mutex> guard(mutex);
    Block block{nullptr, up(asked, kPage)};
    const auto kept = kept_by_length_.lower_bound(block.length);
    if (kept != kept_by_length_.end() && kept->first - block.length <= block.length / kWaste) {
      block = *kept->second;
      forget(kept->second);
    } else {
      while (!kept_.empty() && in_use_ + kept_bytes_ + block.length > std::max(peak_, in_use_ + block.length)) drop_oldest();
      block.start = map(block.length);
      if (block.start == nullptr) {
        drop_all();
        block.start = map(block.length);
      }
      if (block.start == nullptr) return nullptr;
    }
    in_use_ += block.length;
    peak_ = std::max(peak_, in_use_);
    length_of_[block.start] = block.length;
    return block.start;
  }

  // Returns false if the memory was not taken from this pool.
  bool give_back(void* start) {
    const std::lock_guard<std::mutex> guard(mutex);
    const auto entry = length_of_.find(start);
    if (entry == length_of_.end()) return false;
    const size_t length = entry->second;
    length_of_.erase(entry);
    in_use_ -= length;
    kept_bytes_ += length;
    kept_.push_back({start, length});
    kept_by_length_.emplace(length, std::prev(kept_.end()));
    return true;
  }

  // Returns all kept memory to the kernel, and resets the peak.
  void trim() {
    const std::lock_guard<std::mutex> guard(mutex);
    drop_all();
    peak_ = in_use_;
  }

  void read(int64_t* in_use, int64_t* kept, int64_t* peak) {
    const std::lock_guard<std::mutex> guard(mutex);
    *in_use = static_cast<int64_t>(in_use_);
    *kept = static_cast<int64_t>(kept_bytes_);
    *peak = static_cast<int64_t>(peak_);
  }

  std::mutex mutex;

 private:
  using Kept = std::list<Block>;  // in the order in which they were given back

  void forget(Kept::iterator block) {
    auto [first, last] = kept_by_length_.equal_range(block->length);
    while (first != last && first->second != block) ++first;
    kept_by_length_.erase(first);
    kept_bytes_ -= block->length;
    kept_.erase(block);
  }

  void drop_oldest() {
    const Block block = kept_.front();
    forget(kept_.begin());
    munmap(block.start, block.length);
  }

  void drop_all() {
    while (!kept_.empty()) drop_oldest();
  }

  // Uses pages of 2 MiB where they fit: the kernel clears pages on first touch, and is much faster at one large page.
  static void* map(size_t length) {
    const size_t slack = length >= kHugePage ? kHugePage - kPage : 0;
    void* mapped = mmap(nullptr, length + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    if (slack == 0) return mapped;
    char* const first = static_cast<char*>(mapped);
    char* const start = reinterpret_cast<char*>(up(reinterpret_cast<uintptr_t>(first), kHugePage));
    char* const end = first + length + slack;
    if (start > first) munmap(first, static_cast<size_t>(start - first));
    if (end > start + length) munmap(start + length, static_cast<size_t>(end - (start + length)));
    madvise(start, length / kHugePage * kHugePage, MADV_HUGEPAGE);  // a kernel without them gives small ones
    return start;
  }

  size_t in_use_ = 0;
  size_t kept_bytes_ = 0;
  size_t peak_ = 0;  // of what was in use
  Kept kept_;
  std::multimap<size_t, Kept::iterator> kept_by_length_;
  std::unordered_map<void*, size_t> length_of_;  // of the blocks in use
};

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: tensors may outlive everything
  return *instance;
}

// Torch also calls this, through raw_deallocate, for memory from an allocator that was set before ours.
void free_block(void* data) {
  if (data == nullptr) return;
  c10::profiledCPUMemoryReporter().Delete(data);
  if (!pool().give_back(data)) c10::free_cpu(data);
}

class PoolAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    void* const data = size < kSmallest ? nullptr : pool().take(size);
    // If there is no more memory, torch's own allocator raises the error.
    if (data == nullptr) return c10::GetDefaultCPUAllocator()->allocate(size);
    c10::profiledCPUMemoryReporter().New(data, size);
    return {data, data, &free_block, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};

}  // namespace

extern "C" {

// Without this, a worker that is forked while another thread is in the pool would find it locked forever.
void sbft_pool_use() {
  pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
  c10::SetCPUAllocator(new PoolAllocator, 1);
}

void sbft_pool_trim() { pool().trim(); }

void sbft_pool_read(int64_t* in_use, int64_t* kept, int64_t* peak) { pool().read(in_use, kept, peak); }
}
