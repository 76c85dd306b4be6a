#include "stored_rows.hpp"

#include <atomic>
#include <limits>

#include "hamming_join.hpp"
#include "jaccard.hpp"

namespace slmfast {
namespace {

// The earliest stored row that claims each of the asking rows.
class StoredClaims : public PairSink {
public:
    StoredClaims(const Input& in, const Stored& stored, const Nodes& asking)
        : in_(in), stored_(stored), asking_(asking), best_(asking.rows.size()) {
        for (auto& best : best_) best.store(kNone, std::memory_order_relaxed);
        for (unsigned thread = 0; thread < in.options.threads; ++thread)
            scratch_.emplace_back(in.options.ngram, in.options.isa);
    }

    void run(std::int64_t* duplicate_of) {
        stored_.for_each_batch([&](Place first, const std::uint64_t* fingerprints, std::size_t count) {
            first_ = first;
            cross_join(fingerprints, count, asking_.fingerprints.data(), asking_.rows.size(), in_.options.k,
                       in_.options.threads, in_.options.isa, *this);
        });
        for (std::size_t i = 0; i < best_.size(); ++i) {
            const Place place = best_[i].load(std::memory_order_relaxed);
            if (place != kNone) duplicate_of[asking_.rows[i]] = -1 - place;
        }
    }

    bool take(unsigned thread, std::uint32_t a, std::uint32_t b) override {
        const Place candidate = first_ + a;
        Place known = best_[b].load(std::memory_order_relaxed);
        if (candidate >= known || !claims(scratch_[thread], candidate, asking_.rows[b])) return true;
        while (candidate < known && !best_[b].compare_exchange_weak(known, candidate)) {}
        return true;
    }

private:
    static constexpr Place kNone = std::numeric_limits<Place>::max();

    struct Scratch {
        Scratch(int ngram, Isa isa) : jaccard(ngram, isa) {}
        Jaccard jaccard;
        CodePoints one;
        CodePoints two;
    };

    // For rows within k: texts with few grams must be equal, the others similar.
    bool claims(Scratch& scratch, Place place, Row row) const {
        const auto [span, at] = stored_[place];
        if (span.states[at] != in_.states[row]) return false;
        if (in_.states[row] == RowState::full)
            return !in_.options.verified || scratch.jaccard(span.texts, at, in_.texts, row) >= in_.options.verify;
        if (span.fingerprints[at] != in_.fingerprints[row]) return false;
        span.texts.read(at, scratch.one);
        in_.texts.read(row, scratch.two);
        return scratch.one == scratch.two;
    }

    const Input& in_;
    const Stored& stored_;
    const Nodes& asking_;
    Place first_ = 0;  // of the batch being joined
    std::vector<std::atomic<Place>> best_;
    std::vector<Scratch> scratch_;
};

}  // namespace

void claim_by_stored(const Input& in, const Stored& stored, const Nodes& asking, std::int64_t* duplicate_of) {
    StoredClaims(in, stored, asking).run(duplicate_of);
}

}  // namespace slmfast
