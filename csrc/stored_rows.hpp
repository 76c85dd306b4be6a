// Kept rows of earlier calls, and which new rows they claim.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "nodes.hpp"

namespace slmfast {

using Place = std::int64_t;  // of a stored row, counted through the spans

// The stored rows as one sequence, though each span lies where it is.
class Stored {
public:
    explicit Stored(const std::vector<StoredSpan>& spans) : spans_(spans) {
        for (const StoredSpan& span : spans) {
            begins_.push_back(size_);
            size_ += static_cast<Place>(span.size);
        }
    }

    struct At {
        const StoredSpan& span;
        std::int64_t row;
    };

    At operator[](Place place) const {
        const auto after = std::upper_bound(begins_.begin(), begins_.end(), place);
        const auto span = static_cast<std::size_t>(after - begins_.begin()) - 1;
        return {spans_[span], place - begins_[span]};
    }

    std::uint64_t fingerprint(Place place) const {
        const auto [span, row] = (*this)[place];
        return span.fingerprints[row];
    }

    // Calls visit(first place, fingerprints, count) for all rows in order; small spans are gathered, large ones are
    // given as they lie.
    template <class Visit>
    void for_each_batch(Visit&& visit) const {
        constexpr std::size_t kLarge = std::size_t{1} << 18;
        std::vector<std::uint64_t> gathered;
        const auto flush = [&](Place end) {
            if (!gathered.empty()) visit(end - static_cast<Place>(gathered.size()), gathered.data(), gathered.size());
            gathered.clear();
        };
        for (std::size_t i = 0; i < spans_.size(); ++i) {
            const StoredSpan& span = spans_[i];
            if (span.size >= kLarge || gathered.size() + span.size > kLarge) flush(begins_[i]);
            if (span.size >= kLarge) {
                visit(begins_[i], span.fingerprints, span.size);
            } else {
                gathered.insert(gathered.end(), span.fingerprints, span.fingerprints + span.size);
            }
        }
        flush(size_);
    }

private:
    const std::vector<StoredSpan>& spans_;
    std::vector<Place> begins_;  // the first place of each span; of several that share one, only the last has rows
    Place size_ = 0;
};

// Writes -1 - p to duplicate_of of each asking row, a first of its text, that stored rows claim; p is the earliest.
void claim_by_stored(const Input& in, const Stored& stored, const Nodes& asking, std::int64_t* duplicate_of);

}  // namespace slmfast
