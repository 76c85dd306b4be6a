// A part of a file as memory. Unlike Python's mmap it keeps no descriptor, so that there may be more of them than the
// system lets a process open files.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <system_error>

namespace slmfast {

class MappedBytes {
public:
    // The bytes [begin, end) of an open file, begin < end, none of them behind its end. Throws std::system_error.
    MappedBytes(int file, std::int64_t begin, std::int64_t end) {
        if (begin < 0 || begin >= end) throw std::invalid_argument("there is nothing to map");
        const std::int64_t skipped = begin % sysconf(_SC_PAGESIZE);
        mapped_ = static_cast<std::size_t>(end - begin + skipped);
        memory_ = mmap(nullptr, mapped_, PROT_READ, MAP_SHARED, file, static_cast<off_t>(begin - skipped));
        if (memory_ == MAP_FAILED) throw std::system_error(errno, std::generic_category());
        data_ = static_cast<const unsigned char*>(memory_) + skipped;
        size_ = static_cast<std::size_t>(end - begin);
    }
    MappedBytes(const MappedBytes&) = delete;
    MappedBytes& operator=(const MappedBytes&) = delete;
    ~MappedBytes() { munmap(memory_, mapped_); }

    const unsigned char* data() const { return data_; }
    std::size_t size() const { return size_; }

private:
    void* memory_ = nullptr;
    std::size_t mapped_ = 0;
    const unsigned char* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace slmfast
