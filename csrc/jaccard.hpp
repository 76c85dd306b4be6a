// Jaccard similarity of two rows over their sets of normalised grams.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "clusters.hpp"

namespace slmfast {

// Compares rows of columns; each thread has its own. It remembers the grams of the last `a`: callers hold a fixed.
class Jaccard {
public:
    Jaccard(int ngram, Isa isa) : ngram_(ngram), isa_(isa) {}

    // |A and B| / |A or B|; the quotient of two integers in double precision.
    double operator()(const NormalisedTexts& texts_a, std::int64_t a, const NormalisedTexts& texts_b, std::int64_t b) {
        if (a != first_.row || texts_a.raw != first_.column) first_.read(texts_a, a);
        second_.read(texts_b, b);
        if (first_.text == second_.text) return 1.0;
        const std::vector<std::uint64_t>& ours = first_.sorted_grams(ngram_, isa_);
        const std::vector<std::uint64_t>& theirs = second_.sorted_grams(ngram_, isa_);
        std::size_t both = 0;
        for (auto x = ours.begin(), y = theirs.begin(); x != ours.end() && y != theirs.end();) {
            if (*x == *y) ++both;
            const bool step_x = *x <= *y;
            const bool step_y = *y <= *x;
            x += step_x;
            y += step_y;
        }
        const std::size_t either = ours.size() + theirs.size() - both;
        return static_cast<double>(both) / static_cast<double>(either);
    }

private:
    struct Side {
        const TextColumn* column = nullptr;
        std::int64_t row = -1;
        CodePoints text;
        std::vector<std::uint64_t> grams;  // of text, or still empty

        void read(const NormalisedTexts& texts, std::int64_t from) {
            column = texts.raw;
            row = from;
            grams.clear();
            texts.read(from, text);
        }

        const std::vector<std::uint64_t>& sorted_grams(int ngram, Isa isa) {
            if (!grams.empty()) return grams;
            gram_hashes(text, ngram, isa, grams);
            std::sort(grams.begin(), grams.end());
            grams.erase(std::unique(grams.begin(), grams.end()), grams.end());
            return grams;
        }
    };

    int ngram_;
    Isa isa_;
    Side first_;
    Side second_;
};

}  // namespace slmfast
