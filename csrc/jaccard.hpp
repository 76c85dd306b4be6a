// Jaccard similarity of two rows over their sets of normalised grams.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "clusters.hpp"

namespace slmfast {

// Compares rows of one column; each thread has its own. It remembers the grams of the last `a`: callers hold a fixed.
class Jaccard {
public:
    Jaccard(const NormalisedTexts& texts, int ngram, Isa isa) : texts_(texts), ngram_(ngram), isa_(isa) {}

    // |A and B| / |A or B|; the quotient of two integers in double precision.
    double operator()(std::int64_t a, std::int64_t b) {
        if (a != remembered_) {
            read(a, first_);
            remembered_ = a;
        }
        read(b, second_);
        std::size_t both = 0;
        for (auto x = first_.begin(), y = second_.begin(); x != first_.end() && y != second_.end();) {
            if (*x == *y) ++both;
            const bool step_x = *x <= *y;
            const bool step_y = *y <= *x;
            x += step_x;
            y += step_y;
        }
        const std::size_t either = first_.size() + second_.size() - both;
        return static_cast<double>(both) / static_cast<double>(either);
    }

private:
    void read(std::int64_t row, std::vector<std::uint64_t>& grams) {
        texts_.read(row, text_);
        gram_hashes(text_, ngram_, isa_, grams);
        std::sort(grams.begin(), grams.end());
        grams.erase(std::unique(grams.begin(), grams.end()), grams.end());
    }

    NormalisedTexts texts_;
    int ngram_;
    Isa isa_;
    std::int64_t remembered_ = -1;
    CodePoints text_;
    std::vector<std::uint64_t> first_;
    std::vector<std::uint64_t> second_;
};

}  // namespace slmfast
