// All pairs of rows, sorted.
#include <algorithm>
#include <limits>
#include <utility>

#include "hamming_join.hpp"
#include "parallel.hpp"
#include "partition.hpp"

namespace slmfast {
namespace {

constexpr std::size_t kBucket = 8192;  // pairs that are sorted at a time, in a core's cache

// The pairs of one thread, in chunks that never move: large ones lie on huge pages, so that millions of pairs cost few
// page faults.
class PairChunks {
public:
    void add(std::uint64_t pair) {
        if (left_ == 0) grow();
        *next_++ = pair;
        --left_;
    }

    template <class Visit>
    void each(Visit&& visit) const {
        for (std::size_t chunk = 0; chunk < chunks_.size(); ++chunk) {
            const std::size_t filled = capacity(chunk) - (chunk + 1 == chunks_.size() ? left_ : 0);
            for (std::size_t at = 0; at < filled; ++at) visit(chunks_[chunk].get()[at]);
        }
    }

    std::size_t size() const {
        std::size_t room = 0;
        for (std::size_t chunk = 0; chunk < chunks_.size(); ++chunk) room += capacity(chunk);
        return room - left_;
    }

    void clear() { *this = PairChunks(); }

private:
    static std::size_t capacity(std::size_t chunk) { return std::size_t{1} << std::min<std::size_t>(10 + chunk, 20); }

    void grow() {
        left_ = capacity(chunks_.size());
        chunks_.emplace_back(left_);
        next_ = chunks_.back().get();
    }

    std::vector<Buffer<std::uint64_t>> chunks_;
    std::uint64_t* next_ = nullptr;
    std::size_t left_ = 0;
};

struct AllPairs : PairSink {
    explicit AllPairs(unsigned threads) : parts(threads) {}

    bool take(unsigned thread, std::uint32_t a, std::uint32_t b) override {
        parts[thread].add(std::uint64_t{a} << 32 | b);
        return true;
    }

    std::vector<PairChunks> parts;
};

// The bits of a pair that differ within one bucket: of its second row all, of its first row those below the bucket's.
struct Digit {
    int shift;
    int width;
};

std::vector<Digit> digits_of(int row_bits, int bucket_shift) {
    constexpr int kMost = 11;  // the counts of a digit stay in a core's nearest cache
    std::vector<Digit> digits;
    for (const auto& [from, bits] : {std::pair{0, row_bits}, std::pair{32, bucket_shift - 32}}) {
        const int passes = (bits + kMost - 1) / kMost;
        for (int pass = 0; pass < passes; ++pass) {
            const int begin = bits * pass / passes;
            digits.push_back({from + begin, bits * (pass + 1) / passes - begin});
        }
    }
    return digits;
}

// Room that a thread keeps from one bucket to the next.
class Room {
public:
    std::uint64_t* of(std::size_t n) {
        if (n > size_) room_ = Buffer<std::uint64_t>(size_ = std::max(n, 2 * kBucket));
        return room_.get();
    }

private:
    std::size_t size_ = 0;
    Buffer<std::uint64_t> room_{0};
};

// Sorts n pairs: digit by digit from the lowest, by way of `room`, or by comparing where they are few.
void sort_bucket(std::uint64_t* pairs, std::size_t n, Room& room, const std::vector<Digit>& digits) {
    constexpr std::size_t kFew = 512;
    if (n < kFew || n > std::numeric_limits<std::uint32_t>::max()) return std::sort(pairs, pairs + n);
    std::uint64_t* from = pairs;
    std::uint64_t* other = room.of(n);
    for (const Digit& digit : digits) {
        const std::uint64_t mask = (std::uint64_t{1} << digit.width) - 1;
        std::uint32_t next[std::size_t{1} << 11] = {};
        for (std::size_t i = 0; i < n; ++i) ++next[from[i] >> digit.shift & mask];
        std::uint32_t total = 0;
        for (std::size_t value = 0; value <= mask; ++value) total += std::exchange(next[value], total);
        for (std::size_t i = 0; i < n; ++i) other[next[from[i] >> digit.shift & mask]++] = from[i];
        std::swap(from, other);
    }
    if (from != pairs) std::copy(from, from + n, pairs);
}

// The parts of all threads in one, sorted: by the first row's highest bits into buckets, and each bucket by itself.
Pairs sorted(std::vector<PairChunks>& parts, std::size_t n, unsigned threads) {
    std::size_t total = 0;
    for (const PairChunks& part : parts) total += part.size();
    int row_bits = 1;
    while (row_bits < 32 && n >> row_bits != 0) ++row_bits;
    int bucket_bits = 1;  // not 0: a shift by all 64 bits of a pair is none
    while (bucket_bits < std::min(12, row_bits) && (total >> bucket_bits) > kBucket) ++bucket_bits;
    const std::size_t buckets = std::size_t{1} << bucket_bits;
    const int shift = 32 + row_bits - bucket_bits;
    std::vector<std::vector<std::size_t>> places(parts.size());  // of each part in each bucket
    parallel_for(parts.size(), threads, 1, [&](std::size_t part, std::size_t, unsigned) {
        std::vector<std::size_t> counts(buckets, 0);
        parts[part].each([&](std::uint64_t pair) { ++counts[pair >> shift]; });
        places[part] = std::move(counts);
    });
    std::vector<std::size_t> begins(buckets + 1, 0);
    for (std::size_t bucket = 0; bucket < buckets; ++bucket) {
        std::size_t end = begins[bucket];
        for (auto& place : places) end += std::exchange(place[bucket], end);
        begins[bucket + 1] = end;
    }
    Pairs all{Buffer<std::uint64_t>(total), total};
    std::uint64_t* to = all.data.get();
    parallel_for(parts.size(), threads, 1, [&](std::size_t part, std::size_t, unsigned) {
        parts[part].each([&, next = places[part].data()](std::uint64_t pair) { to[next[pair >> shift]++] = pair; });
        parts[part].clear();
    });
    const std::vector<Digit> digits = digits_of(row_bits, shift);
    std::vector<Room> rooms(threads);
    parallel_for(buckets, threads, 1, [&](std::size_t bucket, std::size_t, unsigned thread) {
        sort_bucket(to + begins[bucket], begins[bucket + 1] - begins[bucket], rooms[thread], digits);
    });
    return all;
}

}  // namespace

Pairs near_pairs(const std::uint64_t* fingerprints, std::size_t n, int k, unsigned threads, Isa isa) {
    AllPairs pairs(threads);
    self_join(fingerprints, n, k, threads, isa, pairs);
    return sorted(pairs.parts, n, threads);
}

}  // namespace slmfast
