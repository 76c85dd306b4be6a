// UTF-8 to normalised code points with AVX-512: 64 bytes of ASCII or 16 characters of any kind at a time.
//
// The lead bytes of 64 are compressed to the front, each lane gathers its character's bytes by a permutation, and the
// lengths that the leads announce are checked against where the next lead stands (after Clausecker and Lemire,
// "Transcoding Unicode characters with AVX-512 instructions", 2023).
#pragma once

#if defined(__x86_64__)

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "normal_form.hpp"
#include "simhash.hpp"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header, on registers it means to leave undefined
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace slmfast {

#define SLMFAST_VBMI2 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,bmi,popcnt")))

SLMFAST_VBMI2 inline __m512i all_lanes(std::uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }

SLMFAST_VBMI2 inline __mmask16 lanes_between(__m512i c, std::uint32_t first, std::uint32_t last) {
    return _mm512_cmple_epu32_mask(_mm512_sub_epi32(c, all_lanes(first)), all_lanes(last - first));
}

// 64 bytes of ASCII, of which `count` matter; writes whole vectors of 16 code points.
template <bool Normalise>
SLMFAST_VBMI2 inline void widen_ascii(__m512i bytes, std::size_t count, char32_t* to) {
    if (Normalise) {
        const __mmask64 capital = _mm512_cmplt_epu8_mask(_mm512_sub_epi8(bytes, _mm512_set1_epi8('A')),
                                                         _mm512_set1_epi8('Z' - 'A' + 1));
        bytes = _mm512_mask_add_epi8(bytes, capital, bytes, _mm512_set1_epi8(0x20));
    }
    _mm512_storeu_si512(to, _mm512_cvtepu8_epi32(_mm512_castsi512_si128(bytes)));
    if (count > 16) _mm512_storeu_si512(to + 16, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 1)));
    if (count > 32) _mm512_storeu_si512(to + 32, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 2)));
    if (count > 48) _mm512_storeu_si512(to + 48, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(bytes, 3)));
}

// Up to 16 characters, one a lane, and how many bytes they take. No characters: the bytes are not UTF-8.
struct Characters {
    __m512i code_points;
    std::size_t count;
    std::size_t bytes;
};

// The first characters of `size` bytes (at most 64), all of them whole; `more` says that the text goes on behind.
SLMFAST_VBMI2 inline Characters characters_of(__m512i bytes, std::size_t size, bool more) {
    const Characters none{_mm512_setzero_si512(), 0, 0};
    const __mmask64 valid = size == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << size) - 1;
    const __mmask64 leads = valid & ~_mm512_cmplt_epi8_mask(bytes, _mm512_set1_epi8(static_cast<char>(0xC0)));
    if ((leads & 1) == 0) return none;
    const __m512i places = _mm512_set_epi8(  //
        63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41, 40, 39, 38, 37, 36,
        35, 34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7,
        6, 5, 4, 3, 2, 1, 0);
    const auto all = static_cast<unsigned>(__builtin_popcountll(leads));
    // Where each character begins, and where the next one does.
    const __m128i begins = _mm512_castsi512_si128(_mm512_maskz_compress_epi8(leads, places));
    __m128i ends = _mm512_castsi512_si128(_mm512_maskz_compress_epi8(leads & (leads - 1), places));
    unsigned count = 16;
    if (all <= 16) {
        ends = _mm_mask_mov_epi8(ends, static_cast<__mmask16>(1u << (all - 1)), _mm_set1_epi8(static_cast<char>(size)));
        count = more ? all - 1 : all;  // the last one may go on behind
        if (count == 0) return none;
    }
    const auto active = static_cast<__mmask16>((1u << count) - 1);
    const __m512i begin = _mm512_cvtepu8_epi32(begins);
    const __m512i length = _mm512_sub_epi32(_mm512_cvtepu8_epi32(ends), begin);
    // Each lane's four bytes from where it begins, the first lowest.
    const __m512i spread = _mm512_mullo_epi32(begin, all_lanes(0x01010101));
    const __m512i w = _mm512_permutexvar_epi8(_mm512_add_epi8(spread, all_lanes(0x03020100)), bytes);
    const __m512i lead = _mm512_and_si512(w, all_lanes(0xFF));
    const __m512i second = _mm512_and_si512(_mm512_srli_epi32(w, 8), all_lanes(0x3F));
    const __m512i third = _mm512_and_si512(_mm512_srli_epi32(w, 16), all_lanes(0x3F));
    const __m512i fourth = _mm512_and_si512(_mm512_srli_epi32(w, 24), all_lanes(0x3F));

    const __mmask16 one = lanes_between(lead, 0x00, 0x7F);
    const __mmask16 two = lanes_between(lead, 0xC2, 0xDF);
    const __mmask16 three = lanes_between(lead, 0xE0, 0xEF);
    const __mmask16 four = lanes_between(lead, 0xF0, 0xF4);
    const __m512i two_bytes =
        _mm512_or_si512(_mm512_slli_epi32(_mm512_and_si512(lead, all_lanes(0x1F)), 6), second);
    const __m512i three_bytes = _mm512_or_si512(
        _mm512_slli_epi32(_mm512_and_si512(lead, all_lanes(0x0F)), 12), _mm512_or_si512(_mm512_slli_epi32(second, 6), third));
    const __m512i four_bytes = _mm512_or_si512(
        _mm512_or_si512(_mm512_slli_epi32(_mm512_and_si512(lead, all_lanes(0x07)), 18), _mm512_slli_epi32(second, 12)),
        _mm512_or_si512(_mm512_slli_epi32(third, 6), fourth));
    __m512i c = lead;
    c = _mm512_mask_mov_epi32(c, two, two_bytes);
    c = _mm512_mask_mov_epi32(c, three, three_bytes);
    c = _mm512_mask_mov_epi32(c, four, four_bytes);

    const __mmask16 good = static_cast<__mmask16>(
        (one & _mm512_cmpeq_epi32_mask(length, all_lanes(1))) | (two & _mm512_cmpeq_epi32_mask(length, all_lanes(2))) |
        (three & _mm512_cmpeq_epi32_mask(length, all_lanes(3)) & ~lanes_between(c, 0, 0x7FF) &
         ~lanes_between(c, 0xD800, 0xDFFF)) |
        (four & _mm512_cmpeq_epi32_mask(length, all_lanes(4)) & lanes_between(c, 0x10000, 0x10FFFF)));
    if ((active & ~good) != 0) return none;
    alignas(16) unsigned char end_of[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(end_of), ends);
    return {c, count, end_of[count - 1]};
}

// Writes the normal forms of the characters; says whether one of them is not known here.
SLMFAST_VBMI2 inline bool write_normal(const Characters& from, char32_t*& to) {
    __m512i c = from.code_points;
    const __mmask16 wide = lanes_between(c, 0xFF01, 0xFF5E);
    c = _mm512_mask_sub_epi32(c, wide, c, all_lanes(0xFEE0));
    const __mmask16 capital = lanes_between(c, 'A', 'Z');
    c = _mm512_mask_add_epi32(c, capital, c, all_lanes(0x20));
    const __mmask16 known = static_cast<__mmask16>(lanes_between(c, 0, 0x7F) | lanes_between(c, 0x4E00, 0x9FFF) |
                                                   lanes_between(c, 0x3001, 0x3029) | lanes_between(c, 0x2018, 0x2023));
    const auto active = (1u << from.count) - 1;
    _mm512_storeu_si512(to, c);
    const unsigned others = active & ~known;
    if (others == 0) {
        to += from.count;
        return false;
    }
    alignas(64) char32_t characters[16];
    _mm512_store_si512(characters, c);
    bool foreign = false;
    for (std::size_t i = 0; i < from.count; ++i) {
        const bool settled = (others >> i & 1) == 0;
        foreign |= write_normal_form(characters[i], settled, to);
    }
    return foreign;
}

template <bool Normalise>
SLMFAST_VBMI2 Decoded read_avx512(std::string_view text, CodePoints& out) {
    constexpr std::size_t kBytes = 64;
    char32_t* to = out.room(text.size() + kBytes);
    bool foreign = false;
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t left = text.size() - at;
        const std::size_t size = left < kBytes ? left : kBytes;
        const __mmask64 valid = size == kBytes ? ~std::uint64_t{0} : (std::uint64_t{1} << size) - 1;
        const __m512i bytes = _mm512_maskz_loadu_epi8(valid, text.data() + at);
        if (_mm512_movepi8_mask(bytes) == 0) {
            widen_ascii<Normalise>(bytes, size, to);
            at += size;
            to += size;
            continue;
        }
        const Characters characters = characters_of(bytes, size, left > kBytes);
        if (characters.count == 0) return Decoded::invalid;
        at += characters.bytes;
        if (Normalise) {
            foreign |= write_normal(characters, to);
        } else {
            _mm512_storeu_si512(to, characters.code_points);
            to += characters.count;
        }
    }
    out.set_size(static_cast<std::size_t>(to - out.data()));
    return foreign ? Decoded::foreign : Decoded::ok;
}

}  // namespace slmfast

#endif
