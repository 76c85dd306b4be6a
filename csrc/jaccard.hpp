// Jaccard similarity of two rows over their sets of normalised grams.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "clusters.hpp"

namespace slmfast {

// A set of gram hashes that is emptied without touching it: an entry counts only if it bears the current stamp.
// Open addressing; gram hashes are well mixed, so their low bits are the place.
class GramSet {
public:
    // Empties the set and makes room for `most` grams.
    void clear(std::size_t most) {
        size_ = 0;
        ++stamp_;
        if (entries_.size() >= 2 * most && stamp_ != 0) return;
        std::size_t capacity = entries_.size();
        while (capacity < 2 * most) capacity *= 2;
        entries_.assign(capacity, {});
        stamp_ = 1;
    }

    // Whether the gram was not there yet.
    bool insert(std::uint64_t gram) {
        Entry& entry = entries_[place_of(gram)];
        if (entry.stamp == stamp_) return false;
        entry = {gram, stamp_};
        ++size_;
        return true;
    }

    bool contains(std::uint64_t gram) const { return entries_[place_of(gram)].stamp == stamp_; }

    std::size_t size() const { return size_; }

private:
    struct Entry {
        std::uint64_t gram = 0;
        std::uint32_t stamp = 0;
    };

    // Where the gram stands, or would.
    std::size_t place_of(std::uint64_t gram) const {
        const std::size_t last = entries_.size() - 1;
        std::size_t at = gram & last;
        while (entries_[at].stamp == stamp_ && entries_[at].gram != gram) at = (at + 1) & last;
        return at;
    }

    std::vector<Entry> entries_ = std::vector<Entry>(64);  // a power of two, at most half full
    std::uint32_t stamp_ = 0;
    std::size_t size_ = 0;
};

// Compares rows of columns; each thread has its own. It remembers the grams of the last `a`: callers hold a fixed.
class Jaccard {
public:
    Jaccard(int ngram, Isa isa) : ngram_(ngram), isa_(isa) {}

    // |A and B| / |A or B|; the quotient of two integers in double precision.
    double operator()(const NormalisedTexts& texts_a, std::int64_t a, const NormalisedTexts& texts_b, std::int64_t b) {
        if (a != row_ || texts_a.raw != column_) {
            column_ = texts_a.raw;
            row_ = a;
            texts_a.read(a, first_, isa_);
            known_ = false;
        }
        texts_b.read(b, second_, isa_);
        if (first_ == second_) return 1.0;
        if (!known_) {
            gram_hashes(first_, ngram_, isa_, grams_);
            ours_.clear(grams_.size());
            for (const std::uint64_t gram : grams_) ours_.insert(gram);
            known_ = true;
        }
        gram_hashes(second_, ngram_, isa_, grams_);
        theirs_.clear(grams_.size());
        std::size_t both = 0;
        for (const std::uint64_t gram : grams_) both += theirs_.insert(gram) && ours_.contains(gram);
        return static_cast<double>(both) / static_cast<double>(ours_.size() + theirs_.size() - both);
    }

private:
    int ngram_;
    Isa isa_;
    const TextColumn* column_ = nullptr;  // the last `a`
    std::int64_t row_ = -1;
    bool known_ = false;  // whether its grams are in ours_
    CodePoints first_;
    CodePoints second_;
    std::vector<std::uint64_t> grams_;
    GramSet ours_;
    GramSet theirs_;
};

}  // namespace slmfast
