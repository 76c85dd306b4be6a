// Rows of equal normalised text.
#pragma once

#include <cstdint>

#include "nodes.hpp"

namespace slmfast {

// Writes to first[row], which is the row itself on entry, the first row of equal text where that comes before it, for
// each of the n rows that has a fingerprint. With plain SimHash, rows with enough grams are equal where their
// fingerprints are.
void find_equal_texts(const Input& in, std::int64_t n, std::int64_t* first);

}  // namespace slmfast
