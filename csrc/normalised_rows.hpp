// The normalised texts of chosen rows as UTF-8, to be stored.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "clusters.hpp"
#include "parallel.hpp"

namespace slmfast {

inline void append_utf8(const CodePoints& text, std::string& out) {
    const auto put = [&](char32_t bits) { out.push_back(static_cast<char>(bits)); };
    const auto follow = [&](char32_t c, int shift) { put(0x80 | (c >> shift & 0x3F)); };
    for (const char32_t c : text) {
        if (c < 0x80) {
            put(c);
        } else if (c < 0x800) {
            put(0xC0 | c >> 6);
            follow(c, 0);
        } else if (c < 0x10000) {
            put(0xE0 | c >> 12);
            follow(c, 6);
            follow(c, 0);
        } else if (c <= 0x10FFFF) {
            put(0xF0 | c >> 18);
            follow(c, 12);
            follow(c, 6);
            follow(c, 0);
        } else {
            throw std::invalid_argument("a row is not normalised");
        }
    }
}

// Writes where each of the n texts begins, and after the last where it ends. The pieces, one after another, are the
// bytes. Rows must not be null.
inline std::vector<std::string> normalised_rows(const NormalisedTexts& texts, const std::int64_t* rows, std::size_t n,
                                                unsigned threads, std::int64_t* offsets) {
    constexpr std::size_t kGrain = 1024;
    std::vector<std::string> pieces((n + kGrain - 1) / kGrain);
    parallel_for(n, threads, kGrain, [&](std::size_t begin, std::size_t end, unsigned) {
        std::string& piece = pieces[begin / kGrain];
        CodePoints text;
        for (std::size_t i = begin; i < end; ++i) {
            texts.read(rows[i], text);
            append_utf8(text, piece);
            offsets[i + 1] = static_cast<std::int64_t>(piece.size());
        }
    });
    offsets[0] = 0;
    std::int64_t before = 0;
    for (std::size_t piece = 0; piece < pieces.size(); ++piece) {
        for (std::size_t i = piece * kGrain; i < std::min(n, (piece + 1) * kGrain); ++i) offsets[i + 1] += before;
        before += static_cast<std::int64_t>(pieces[piece].size());
    }
    return pieces;
}

}  // namespace slmfast
