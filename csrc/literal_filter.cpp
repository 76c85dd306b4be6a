#include "literal_filter.hpp"

#include <algorithm>
#include <stdexcept>

namespace slmfast {

LiteralFilter::LiteralFilter(const std::vector<LiteralRule>& rules) {
    number_bytes(rules);
    next_.assign(width_, 0);
    ends_.resize(1);
    std::map<Clause, std::uint32_t> known;
    for (std::size_t rule = 0; rule < rules.size(); ++rule)
        for (const Alternative& alternative : rules[rule])
            add_alternative(alternative, static_cast<std::uint32_t>(rule), known);
    always_.erase(std::unique(always_.begin(), always_.end()), always_.end());
    link();
}

void LiteralFilter::number_bytes(const std::vector<LiteralRule>& rules) {
    for (const LiteralRule& rule : rules)
        for (const Alternative& alternative : rule)
            for (const Clause& clause : alternative)
                for (const std::string& literal : clause)
                    for (const char byte : literal) byte_number_[static_cast<unsigned char>(byte)] = 1;
    for (std::uint16_t& number : byte_number_)
        if (number != 0) number = static_cast<std::uint16_t>(width_++);
}

void LiteralFilter::add_alternative(Alternative alternative, std::uint32_t rule,
                                    std::map<Clause, std::uint32_t>& known) {
    for (Clause& clause : alternative) std::sort(clause.begin(), clause.end());
    std::sort(alternative.begin(), alternative.end());
    alternative.erase(std::unique(alternative.begin(), alternative.end()), alternative.end());
    if (alternative.empty()) {
        always_.push_back(rule);
        return;
    }
    for (const Clause& clause : alternative) {
        const auto [at, is_new] = known.emplace(clause, static_cast<std::uint32_t>(needed_.size()));
        if (is_new) {
            if (clause.empty()) throw std::invalid_argument("a clause without literals can't hold");
            needed_.emplace_back();
            for (const std::string& literal : clause) ends_[add_literal(literal)].push_back(at->second);
        }
        needed_[at->second].push_back(static_cast<std::uint32_t>(needs_.size()));
    }
    needs_.push_back(static_cast<std::uint32_t>(alternative.size()));
    rule_.push_back(rule);
}

std::size_t LiteralFilter::add_literal(const std::string& literal) {
    if (literal.empty()) throw std::invalid_argument("an empty literal is in every text");
    std::size_t state = 0;
    for (const char byte : literal) {
        std::uint32_t& edge = next_[state * width_ + byte_number_[static_cast<unsigned char>(byte)]];
        const std::size_t to = edge != 0 ? edge / width_ : ends_.size();
        if (edge == 0) {
            if ((to + 1) * width_ >= kHit) throw std::length_error("the literals are too many");
            edge = static_cast<std::uint32_t>(to * width_);
            ends_.emplace_back();
            next_.resize(ends_.size() * width_, 0);  // the reference is not used after this
        }
        state = to;
    }
    return state;
}

// Edges that are missing in the tree of literals lead where the longest suffix leads that is in the tree.
void LiteralFilter::link() {
    std::vector<std::size_t> suffix(ends_.size(), 0);
    std::vector<std::size_t> order;  // breadth first, so that a state's suffix is ready before it
    order.reserve(ends_.size());
    order.push_back(0);
    for (std::size_t i = 0; i < order.size(); ++i) {
        const std::size_t state = order[i];
        for (std::size_t byte = 1; byte < width_; ++byte) {
            std::uint32_t& edge = next_[state * width_ + byte];
            const std::size_t fallback = state == 0 ? 0 : next_[suffix[state] * width_ + byte] / width_;
            if (edge == 0) {
                edge = static_cast<std::uint32_t>(fallback * width_);
                continue;
            }
            const std::size_t child = edge / width_;
            suffix[child] = fallback;
            order.push_back(child);
        }
        Numbers& ends = ends_[state];
        if (state != 0) ends.insert(ends.end(), ends_[suffix[state]].begin(), ends_[suffix[state]].end());
        std::sort(ends.begin(), ends.end());
        ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
    }
    for (std::uint32_t& edge : next_)
        if (!ends_[edge / width_].empty()) edge |= kHit;
}

void LiteralFilter::candidates(std::string_view text, Scratch& scratch, std::vector<std::uint32_t>& out) const {
    ++scratch.text;
    const std::size_t first = out.size();
    out.insert(out.end(), always_.begin(), always_.end());
    const std::uint32_t* next = next_.data();
    std::size_t row = 0;
    for (const char byte : text) {
        const std::uint32_t edge = next[row + byte_number_[static_cast<unsigned char>(byte)]];
        row = edge & ~kHit;
        if ((edge & kHit) == 0) continue;
        for (const std::uint32_t clause : ends_[row / width_]) count(clause, scratch, out);
    }
    const auto begin = out.begin() + static_cast<std::ptrdiff_t>(first);
    std::sort(begin, out.end());
    out.erase(std::unique(begin, out.end()), out.end());
}

// Notes that a clause holds, and the rules that have an alternative in which nothing is missing any more.
void LiteralFilter::count(std::uint32_t clause, Scratch& scratch, std::vector<std::uint32_t>& out) const {
    if (scratch.held[clause] == scratch.text) return;
    scratch.held[clause] = scratch.text;
    for (const std::uint32_t alternative : needed_[clause]) {
        if (scratch.counted[alternative] != scratch.text) {
            scratch.counted[alternative] = scratch.text;
            scratch.missing[alternative] = needs_[alternative];
        }
        if (--scratch.missing[alternative] == 0) out.push_back(rule_[alternative]);
    }
}

}  // namespace slmfast
