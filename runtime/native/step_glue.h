// Rotary embeddings and residual sums, rounded as torch rounds them one operator at a time, so that a row's numbers do
// not depend on whether the program or the model's own code computes it. Included by the variants.
#pragma once

namespace {

// Rounds to the element type. In float32 it keeps the compiler from fusing the product with a later sum into one rounding.
inline Vec rounded(Vec v, const float*) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#else
    asm("" : "+x"(v));
#endif
    return v;
}
inline Vec rounded(Vec v, const uint16_t*) {
    uint16_t narrow[kLanes];
    store(narrow, v);
    return load(narrow);
}

inline float rounded(float v, const float*) {
    asm("" : "+x"(v));
    return v;
}
inline float rounded(float v, const uint16_t*) { return widen(narrowed(v)); }

// x <- x cos + (-second half, first half) sin, in place, over the first `width` elements of each vector.
// cos, sin: [rows][width]
template <class T>
void rotate(T* x, int64_t x_row, int64_t vectors, int64_t head_dim, const T* cos, const T* sin, int64_t width,
            int64_t rows) {
    const int64_t half = width / 2;
    const T* type = nullptr;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t v = 0; v < vectors; v++) {
            T* first = x + r * x_row + v * head_dim;
            T* second = first + half;
            const int64_t whole = half / kLanes * kLanes;
            for (int64_t d = 0; d < whole; d += kLanes) {
                const T* c = cos + r * width + d;
                const T* s = sin + r * width + d;
                const Vec a = load(first + d), b = load(second + d);
                const Vec low = rounded(a * load(c), type) + rounded(-b * load(s), type);
                const Vec high = rounded(b * load(c + half), type) + rounded(a * load(s + half), type);
                store(first + d, low), store(second + d, high);
            }
            for (int64_t d = whole; d < half; d++) {
                const T* c = cos + r * width + d;
                const T* s = sin + r * width + d;
                const float a = widen(first[d]), b = widen(second[d]);
                put(first + d, rounded(a * widen(c[0]), type) + rounded(-b * widen(s[0]), type));
                put(second + d, rounded(b * widen(c[half]), type) + rounded(a * widen(s[half]), type));
            }
        }
}

// to <- to + factor x from
template <class T>
void accumulate(T* to, const T* from, float factor, int64_t count) {
    const T* type = nullptr;
    int64_t i = 0;
    if (factor == 1)
        for (; i + kLanes <= count; i += kLanes) store(to + i, load(to + i) + load(from + i));
    for (; i + kLanes <= count; i += kLanes)
        store(to + i, load(to + i) + rounded(load(from + i) * all(factor), type));
    for (; i < count; i++) put(to + i, widen(to[i]) + rounded(widen(from[i]) * factor, type));
}

}  // namespace
