// The normal form (step 1 of the format in simhash.hpp) of the code points whose form is known here and does not depend
// on their neighbours.
#pragma once

namespace slmfast {

constexpr char32_t kForeign = 0xFFFFFFFF;

inline bool between(char32_t c, char32_t first, char32_t last) { return c - first <= last - first; }

// The Latin-1 signs from U+00A0 to U+00BF: themselves, a compatibility character, or 0 for those left to Python.
constexpr char32_t kLatinSigns[32] = {
    0x20, 0xA1, 0xA2, 0xA3, 0xA4, 0xA5,  0xA6, 0xA7, 0,    0xA9, 'a', 0xAB, 0xAC, 0xAD, 0xAE, 0,
    0xB0, 0xB1, '2',  '3',  0,    0x3BC, 0xB6, 0xB7, 0,    '1',  'o', 0xBB, 0,    0,    0,    0xBF,
};

inline char32_t normal_latin(char32_t c) {  // U+0080 to U+00FF
    if (c < 0xA0) return c;
    if (c < 0xC0) return kLatinSigns[c - 0xA0] != 0 ? kLatinSigns[c - 0xA0] : kForeign;
    return c < 0xDF && c != 0xD7 ? c + 0x20 : c;
}

// Ranges in which every code point is its own normal form and never composes with a neighbour from any range here.
inline bool stable_symbol(char32_t c) {
    if (between(c, 0x2000, 0x20FF))
        return between(c, 0x200B, 0x2010) || between(c, 0x2012, 0x2016) || between(c, 0x2018, 0x2023) ||
               between(c, 0x2030, 0x2032) || c == 0x20AC || c == 0x203B;
    if (between(c, 0x2190, 0x222B) || between(c, 0x2231, 0x2328) || between(c, 0x2500, 0x2767)) return true;
    return c == 0xFE0F || between(c, 0x1F300, 0x1F64F) || between(c, 0x1F680, 0x1F6FF) || between(c, 0x1F900, 0x1F9FF);
}

inline bool stable_cjk(char32_t c) {
    return between(c, 0x4E00, 0x9FFF) || between(c, 0x3400, 0x4DBF) || between(c, 0x3001, 0x3029) ||
           between(c, 0x3041, 0x3096) || between(c, 0x30A1, 0x30FE) || between(c, 0xAC00, 0xD7A3) ||
           between(c, 0x20000, 0x2A6DF);
}

inline char32_t normal_letter(char32_t c) {  // Greek without the context-dependent capital sigma, and Cyrillic
    if (between(c, 0x391, 0x3A1) || between(c, 0x3A4, 0x3A9)) return c + 0x20;
    if (between(c, 0x3B1, 0x3C9)) return c;
    if (between(c, 0x410, 0x42F)) return c + 0x20;
    return between(c, 0x430, 0x44F) ? c : kForeign;
}

inline char32_t lower_ascii(char32_t c) { return between(c, 'A', 'Z') ? c + 0x20 : c; }

inline char32_t normal_form(char32_t c) {
    if (c < 0x80) return lower_ascii(c);
    if (stable_cjk(c)) return c;
    if (between(c, 0xFF01, 0xFF5E)) return lower_ascii(c - 0xFEE0);
    if (c < 0x100) return normal_latin(c);
    if (c == 0x3000 || between(c, 0x2000, 0x200A)) return 0x20;
    if (c == 0x2011) return 0x2010;
    if (c == 0xFFE5) return 0xA5;
    if (between(c, 0x2460, 0x2468)) return c - 0x2460 + '1';
    if (stable_symbol(c)) return c;
    return normal_letter(c);
}

// Writes the normal form of a character and moves on; says whether it is unknown here. A settled one is its own.
inline bool write_normal_form(char32_t c, bool settled, char32_t*& to) {
    if (!settled && between(c, 0x2024, 0x2026)) {  // one, two or three dots
        for (char32_t dots = 0x2024; dots <= c; ++dots) *to++ = '.';
        return false;
    }
    const char32_t normal = settled ? c : normal_form(c);
    *to++ = normal;
    return normal == kForeign;
}

}  // namespace slmfast
