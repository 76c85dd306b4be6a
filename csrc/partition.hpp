// Cutting fingerprints into groups by a block of their bits: radix partitions in place, through scratch, and in parallel.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "parallel.hpp"

namespace slmfast {

// Fingerprints and where they stood in the caller's array.
struct Group {
    std::uint64_t* fp = nullptr;
    std::uint32_t* id = nullptr;
    std::size_t size = 0;

    Group part(std::size_t begin, std::size_t end) const { return {fp + begin, id + begin, end - begin}; }
};

// A set of bits, and how its value becomes the number of a group. Neighbouring bits are taken as they are, so that
// groups of different value never meet; scattered bits are hashed, and kSlackBits are spent on parting collisions.
class Block {
public:
    explicit Block(std::uint64_t mask) : mask_(mask), width_(__builtin_popcountll(mask)) {
        const int lowest = __builtin_ctzll(mask);
        const std::uint64_t run = mask >> lowest;
        if ((run & (run + 1)) == 0) {
            multiplier_ = std::uint64_t{1} << (64 - width_ - lowest);
        } else {
            multiplier_ = 0x9e3779b97f4a7c15u;
            width_ = std::min(width_ + kSlackBits, 64);
        }
    }

    std::uint64_t mask() const { return mask_; }

    // Key bits after which a group can hardly be cut further by this block.
    int width() const { return width_; }

    // Some key bits of a value: `bits` after the first `consumed`. A copy of its own in a loop stays in registers, where
    // a block might change with every fingerprint that is written.
    struct Key {
        std::uint64_t mask;
        std::uint64_t multiplier;
        int shift;

        std::size_t operator()(std::uint64_t value) const {
            return static_cast<std::size_t>((value & mask) * multiplier >> shift);
        }
    };

    // consumed + bits <= width, bits > 0.
    Key key(int consumed, int bits) const { return {mask_, multiplier_ << consumed, 64 - bits}; }

private:
    static constexpr int kSlackBits = 2;

    std::uint64_t mask_;
    std::uint64_t multiplier_;
    int width_;
};

// Fills begins[0 .. 2^bits] with where each part starts.
inline void count_parts(const Group& group, const Block& block, int consumed, int bits, std::uint32_t* begins) {
    const std::size_t parts = std::size_t{1} << bits;
    const Block::Key key = block.key(consumed, bits);
    std::fill(begins, begins + parts + 1, 0u);
    for (std::size_t i = 0; i < group.size; ++i) ++begins[key(group.fp[i]) + 1];
    for (std::size_t part = 0; part < parts; ++part) begins[part + 1] += begins[part];
}

// Moves a group part by part to `to`, which has room for it. `next` holds each part's begin, and then its end.
inline void scatter_parts(const Group& group, const Block& block, int consumed, int bits, std::uint32_t* next,
                          const Group& to) {
    const Block::Key key = block.key(consumed, bits);
    for (std::size_t i = 0; i < group.size; ++i) {
        const std::uint64_t value = group.fp[i];
        const std::uint32_t place = next[key(value)]++;
        to.fp[place] = value;
        to.id[place] = group.id[i];
    }
}

// The same in place, for groups too large to copy. Slower: each move waits for the one before it.
inline void swap_parts(const Group& group, const Block& block, int consumed, int bits, const std::uint32_t* begins,
                       std::uint32_t* next) {
    const Block::Key key = block.key(consumed, bits);
    for (std::size_t part = 0; part < std::size_t{1} << bits; ++part) {
        while (next[part] < begins[part + 1]) {
            const std::uint32_t here = next[part];
            const std::size_t home = key(group.fp[here]);
            const std::uint32_t there = next[home]++;
            if (home == part) continue;
            std::swap(group.fp[here], group.fp[there]);
            std::swap(group.id[here], group.id[there]);
        }
    }
}

// Uninitialised memory, on huge pages where the system has them: a partition writes to thousands of places at once.
template <class T>
class Buffer {
public:
    explicit Buffer(std::size_t n) {
        constexpr std::size_t kHugePage = std::size_t{1} << 21;
        const std::size_t bytes = n * sizeof(T);
        const std::size_t alignment = bytes < kHugePage ? 64 : kHugePage;
        data_.reset(static_cast<T*>(::operator new[](bytes, std::align_val_t{alignment})));
        data_.get_deleter().alignment = std::align_val_t{alignment};
#if defined(__linux__)
        if (alignment == kHugePage) madvise(data_.get(), bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
    }

    T* get() const { return data_.get(); }

private:
    struct Free {
        std::align_val_t alignment{64};
        void operator()(T* data) const { ::operator delete[](data, alignment); }
    };

    std::unique_ptr<T[], Free> data_;
};

// One thread's writes to many parts of a large array. Each part's next 16 entries wait in a line of their own, and go out
// together past the caches: written one by one they would cost a cache line and an address translation each.
class LineWriter {
public:
    LineWriter(std::uint64_t* fp, std::uint32_t* id, std::vector<std::uint32_t> begins)
        : fp_(fp), id_(id), begins_(begins), next_(std::move(begins)), lines_(next_.size()) {}

    void write(std::size_t part, std::uint64_t value, std::uint32_t id) {
        const std::uint32_t place = next_[part]++;
        Line& line = lines_.get()[part];
        line.fp[place % kEntries] = value;
        line.id[place % kEntries] = id;
        if (place % kEntries == kEntries - 1) flush(part, line, place + 1);
    }

    // Writes out what still waits.
    void finish() {
        for (std::size_t part = 0; part < next_.size(); ++part)
            if (next_[part] % kEntries != 0) flush(part, lines_.get()[part], next_[part]);
#if defined(__SSE2__)
        _mm_sfence();  // streamed lines are in order with nothing until then
#endif
    }

private:
    static constexpr std::uint32_t kEntries = 16;

    struct alignas(64) Line {
        std::uint64_t fp[kEntries];
        std::uint32_t id[kEntries];
    };

    void flush(std::size_t part, const Line& line, std::uint32_t end) {
        const std::uint32_t from = (end - 1) / kEntries * kEntries;
        const std::uint32_t begin = std::max(from, begins_[part]);  // what lies before is another part's
        if (end - begin == kEntries) {
            stream(fp_ + begin, line.fp, sizeof line.fp);
            stream(id_ + begin, line.id, sizeof line.id);
        } else {
            std::copy(line.fp + (begin - from), line.fp + (end - from), fp_ + begin);
            std::copy(line.id + (begin - from), line.id + (end - from), id_ + begin);
        }
    }

    // Both ends are 64-byte aligned.
    static void stream(void* to, const void* from, std::size_t bytes) {
#if defined(__SSE2__)
        for (std::size_t i = 0; i < bytes / sizeof(__m128i); ++i)
            _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_load_si128(static_cast<const __m128i*>(from) + i));
#else
        std::memcpy(to, from, bytes);
#endif
    }

    std::uint64_t* fp_;
    std::uint32_t* id_;
    std::vector<std::uint32_t> begins_;
    std::vector<std::uint32_t> next_;
    Buffer<Line> lines_;
};

// A copy of the caller's fingerprints, grouped by the key of one block after another.
class Side {
public:
    Side(const std::uint64_t* source, std::size_t n) : source_(source), n_(n), fp_(n), id_(n) {}

    Group all() {
        std::copy(source_, source_ + n_, fp_.get());
        for (std::size_t i = 0; i < n_; ++i) id_.get()[i] = static_cast<std::uint32_t>(i);
        return {fp_.get(), id_.get(), n_};
    }

    Group part(std::size_t number) const {
        const std::size_t begin = begins_[number];
        return {fp_.get() + begin, id_.get() + begin, begins_[number + 1] - begin};
    }

    // Each slice of the source counts, then writes to places reserved for it: no two threads write one place.
    void scatter(const Block& block, int bits, unsigned threads) {
        const std::size_t parts = std::size_t{1} << bits;
        const Block::Key key = block.key(0, bits);
        const std::size_t slices = threads;
        const std::size_t step = (n_ + slices - 1) / slices;
        const auto slice = [&](std::size_t s, auto&& visit) {
            const std::size_t end = std::min(n_, (s + 1) * step);
            for (std::size_t i = std::min(n_, s * step); i < end; ++i) visit(i, source_[i]);
        };
        std::vector<std::vector<std::uint32_t>> places(slices);
        parallel_for(slices, threads, 1, [&](std::size_t s, std::size_t, unsigned) {
            std::vector<std::uint32_t> counts(parts, 0);
            slice(s, [counts = counts.data(), key](std::size_t, std::uint64_t value) { ++counts[key(value)]; });
            places[s] = std::move(counts);
        });
        begins_.assign(parts + 1, 0);
        std::uint32_t total = 0;
        for (std::size_t part = 0; part < parts; ++part) {
            begins_[part] = total;
            for (std::size_t s = 0; s < slices; ++s) total += std::exchange(places[s][part], total);
        }
        begins_[parts] = total;
        parallel_for(slices, threads, 1, [&](std::size_t s, std::size_t, unsigned) {
            if (bits > kFewParts) {
                LineWriter writer(fp_.get(), id_.get(), std::move(places[s]));
                slice(s, [&](std::size_t i, std::uint64_t value) {
                    writer.write(key(value), value, static_cast<std::uint32_t>(i));
                });
                writer.finish();
            } else {
                slice(s, [key, next = places[s].data(), fp = fp_.get(), id = id_.get()](std::size_t i, std::uint64_t value) {
                    const std::uint32_t place = next[key(value)]++;
                    // The next line of this part, which by the time it is written to will have come.
                    __builtin_prefetch(fp + place + 8, 1);
                    __builtin_prefetch(id + place + 16, 1);
                    fp[place] = value;
                    id[place] = static_cast<std::uint32_t>(i);
                });
            }
        });
    }

private:
    static constexpr int kFewParts = 8;  // up to 2^8 parts the caches collect the writes as well

    const std::uint64_t* source_;
    std::size_t n_;
    Buffer<std::uint64_t> fp_;
    Buffer<std::uint32_t> id_;
    std::vector<std::size_t> begins_;
};

}  // namespace slmfast
