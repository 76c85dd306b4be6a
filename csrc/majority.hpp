// The majority of votes, bit by bit: step 4 of the format in simhash.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.hpp"

namespace slmfast {

// The majority of votes[0, count). count > 0.
std::uint64_t majority(const std::uint64_t* votes, std::size_t count, Isa isa);

#if defined(__x86_64__)
// The majority of the hashes of `count` windows of three code points, the i-th of c[i], c[i + 1] and c[i + 2] (step 3).
// None of them is stored. Reads up to kReadBeyond code points behind the last. count > 0; needs Isa::avx512.
std::uint64_t trigram_majority_avx512(const char32_t* c, std::size_t count);
#endif

}  // namespace slmfast
