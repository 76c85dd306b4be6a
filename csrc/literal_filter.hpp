// Which of many rules may match a text, told by the literals that each of them cannot do without.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace slmfast {

using Clause = std::vector<std::string>;       // one of these byte strings must occur in the text
using Alternative = std::vector<Clause>;       // each of these clauses must hold
using LiteralRule = std::vector<Alternative>;  // one of these must hold; a rule without any never matches

// An automaton after Aho and Corasick (1975) over all literals: one pass over a text finds all that occur in it. Clauses
// that hold are counted for the alternatives that need them, so a text costs its bytes and its hits, not the rules.
class LiteralFilter {
public:
    // Throws std::invalid_argument for an empty literal or clause, and std::length_error for too many literals.
    explicit LiteralFilter(const std::vector<LiteralRule>& rules);

    // What a thread needs while it goes from text to text.
    struct Scratch {
        explicit Scratch(const LiteralFilter& filter)
            : held(filter.needed_.size()), counted(filter.needs_.size()), missing(filter.needs_.size()) {}
        std::uint64_t text = 0;              // the number of the text, from 1
        std::vector<std::uint64_t> held;     // of each clause the last text in which it held
        std::vector<std::uint64_t> counted;  // of each alternative the last text in which one of its clauses held
        std::vector<std::uint32_t> missing;  // and how many of its clauses had yet to hold there
    };

    // Appends the numbers of the rules that may match the text, ascending; no other rule can.
    void candidates(std::string_view text, Scratch& scratch, std::vector<std::uint32_t>& out) const;

private:
    using Numbers = std::vector<std::uint32_t>;

    void number_bytes(const std::vector<LiteralRule>& rules);
    std::size_t add_literal(const std::string& literal);  // gives its last state
    void add_alternative(Alternative alternative, std::uint32_t rule, std::map<Clause, std::uint32_t>& known);
    void link();
    void count(std::uint32_t clause, Scratch& scratch, std::vector<std::uint32_t>& out) const;

    static constexpr std::uint32_t kHit = std::uint32_t{1} << 31;  // in next_: a literal ends in that state

    std::array<std::uint16_t, 256> byte_number_{};  // bytes that no literal has are 0
    std::size_t width_ = 1;                         // numbers of bytes
    std::vector<std::uint32_t> next_;  // [states x width_]: where the next state's row begins, and kHit
    std::vector<Numbers> ends_;        // of each state: the clauses of the literals that end there
    std::vector<Numbers> needed_;  // of each clause: the alternatives that need it
    Numbers needs_;                // of each alternative: how many clauses it needs
    Numbers rule_;                 // of each alternative: whose it is
    Numbers always_;               // rules with an alternative that needs nothing
};

}  // namespace slmfast
