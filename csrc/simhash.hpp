// SimHash fingerprints (Charikar 2002; Manku, Jain and Das Sarma 2007) of character n-grams: the frozen format.
//
// Format version 1. A fingerprint stored by one version of this program must equal that of every other, so whatever
// changes one bit below must raise kFormatVersion.
//
//  1. Normalisation. t = NFKC(t); then t = NFKC(lower(t)) until it stays, at most 8 times. Lower case is Unicode's full
//     mapping. Assigned characters never change their normalisation (Unicode's stability policy), so the format does
//     not depend on the version of Unicode except on characters that one of two versions does not know.
//  2. Grams. Over the L code points of the normalised text, the windows of m = min(n, L) code points, 1 <= n <= 9.
//     L = 0 has no grams.
//  3. Gram hash. Code points are packed three to a word, first lowest: w = c0 | c1 << 21 | c2 << 42, absent ones 0.
//     h = mix(w0); then for each further word h = mix(h ^ w). All arithmetic is modulo 2^64:
//         mix(z): z += 0x9e3779b97f4a7c15; z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
//                 z = (z ^ z >> 27) * 0x94d049bb133111eb; return z ^ z >> 31
//     (the output function of SplitMix64: Steele, Lea and Flood 2014, constants by Stafford). It is a bijection, so up
//     to n = 3 different grams have different hashes.
//  4. Majority. Each gram votes as often as it occurs. Bit b is 1 where more than half of the votes have it set, 0
//     where fewer do; on a tie it is b & 1, so that even counts do not pull every bit to 0.
//  5. An empty text has the fingerprint 0. Empty texts and nulls match nothing, and a text with fewer than 4 distinct
//     grams matches only an equal normalised text: the clustering sees to both.
//
// Test vectors, n = 3:
//     ""     0000000000000000
//     "a"    4f5da978776a9db1
//     "ab"   9fb3844fe632c73c
//     "ABC"  31be0ed090436848  (the hash of the one gram "abc")
//     "abcd" a0ba2efa9022e828  (two votes: ties everywhere the grams differ)
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "isa.hpp"
#include "text_column.hpp"

namespace slmfast {

constexpr std::uint32_t kFormatVersion = 1;
constexpr int kMaxNgram = 9;
constexpr int kEnoughFeatures = 4;  // fewer distinct grams: exact match only

// Thrown by the core when a row is not valid UTF-8; names the row.
struct BadText : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

enum class RowState : std::uint8_t {
    null = 0,
    empty = 1,
    few = 2,      // under kEnoughFeatures distinct grams
    full = 3,     // the common case
    foreign = 4,  // holds code points that this file does not normalise: no fingerprint yet
};

enum class Decoded { ok, foreign, invalid };

constexpr std::size_t kReadBeyond = 32;  // code points behind a text that may be read, though nothing comes of them

// A text's code points in memory that is used again for the next text, and not cleared between.
class CodePoints {
public:
    // Room for `capacity` code points, whose number set_size then tells, and for kReadBeyond more.
    char32_t* room(std::size_t capacity) {
        if (capacity > capacity_) {
            data_.reset(new char32_t[capacity + kReadBeyond]);
            capacity_ = capacity;
        }
        size_ = 0;
        return data_.get();
    }
    void set_size(std::size_t size) { size_ = size; }

    const char32_t* data() const { return data_.get(); }
    const char32_t* begin() const { return data_.get(); }
    const char32_t* end() const { return data_.get() + size_; }
    std::size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }

    friend bool operator==(const CodePoints& a, const CodePoints& b) {
        return std::equal(a.begin(), a.end(), b.begin(), b.end());
    }

private:
    std::unique_ptr<char32_t[]> data_;
    std::size_t capacity_ = 0;
    std::size_t size_ = 0;
};

inline std::uint64_t mix(std::uint64_t z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// Decodes UTF-8 and normalises it (step 1) where every code point is one whose normal form is known here and does not
// depend on its neighbours; else says `foreign`. Bad UTF-8 (overlong, surrogate, truncated) is `invalid`.
Decoded normalise(std::string_view text, CodePoints& out, Isa isa = Isa::scalar);

// Decodes UTF-8 that is already normalised.
Decoded decode(std::string_view text, CodePoints& out, Isa isa = Isa::scalar);

// Hashes of all grams in order of occurrence (steps 2 and 3).
void gram_hashes(const CodePoints& text, int ngram, Isa isa, std::vector<std::uint64_t>& out);

// Fingerprints and states of all rows. `normalised` says that the texts have been through step 1.
// Foreign rows get fingerprint 0. Throws BadText naming the first row that is not UTF-8.
void fingerprints(const TextColumn& texts, bool normalised, int ngram, unsigned threads, Isa isa,
                  std::uint64_t* out, RowState* states);

}  // namespace slmfast
