// A matrix of an adapter's file to its place in the adapter's buffer, in one pass: transposed if need be, scaled,
// rounded to nearest even, and looked at for numbers that are not finite. No threads: it runs beside a busy engine.
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kBlock = 16;  // outputs written together: a cache line of float32

inline uint32_t bits_of(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}
// All exponent bits set: infinite or not a number.
inline uint32_t sick(uint32_t bits) { return (bits & 0x7f800000u) == 0x7f800000u; }

inline uint32_t put(float* to, float v) {
    *to = v;
    return sick(bits_of(v));
}
inline uint32_t put(uint16_t* to, float v) {
    const uint32_t bits = bits_of(v), rounded = bits + 0x7fff + ((bits >> 16) & 1);
    *to = uint16_t(rounded >> 16);
    return sick(bits) | sick(rounded);  // the largest float32 numbers round to infinity
}

template <class T>
uint32_t copy(T* to, const float* from, int64_t count, float scale) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < count; i++) bad |= put(to + i, from[i] * scale);
    return bad;
}

// from: [rows][cols], to: [cols][rows]
template <class T>
uint32_t transpose(T* to, const float* from, int64_t rows, int64_t cols, float scale) {
    uint32_t bad = 0;
    int64_t r = 0;
    for (; r + kBlock <= rows; r += kBlock)
        for (int64_t c = 0; c < cols; c++)
            for (int64_t i = 0; i < kBlock; i++) bad |= put(to + c * rows + r + i, from[(r + i) * cols + c] * scale);
    for (; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) bad |= put(to + c * rows + r, from[r * cols + c] * scale);
    return bad;
}

template <class T>
int pack(T* to, const float* from, int64_t rows, int64_t cols, int transposed, float scale) {
    return int(transposed ? transpose(to, from, rows, cols, scale) : copy(to, from, rows * cols, scale));
}

}  // namespace

extern "C" {

int lora_pack_version() { return 1; }

// from: float32 [rows][cols]; to: the same shape, or [cols][rows]. 0 where every number is finite before and after.
int lora_pack(void* to, const float* from, int64_t rows, int64_t cols, int transposed, float scale, int bfloat16) {
    return bfloat16 ? pack((uint16_t*)to, from, rows, cols, transposed, scale)
                    : pack((float*)to, from, rows, cols, transposed, scale);
}
}
