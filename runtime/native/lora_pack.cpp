// An adapter's file to its place in the adapter's buffer in one pass over memory: read through a small window that
// stays in the cache, widened, transposed if need be, scaled, rounded to nearest even, and looked at for numbers that
// are not finite. And the plain copy of such a buffer into a slot. No OpenMP: it runs beside a busy engine, and rests
// between pieces when it is told to, so that the engine keeps its cores and most of the memory's bandwidth.
#include <errno.h>
#include <time.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <new>
#include <thread>
#include <vector>

namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));

constexpr int64_t kBlock = 16;             // outputs written together: a cache line of float32
constexpr int64_t kWindow = 128 << 10;     // bytes read at one go: they, and what is made of them, stay in L2
constexpr double kShortestRest_s = 200e-6;  // shorter rests are put together

// --- numbers ---

inline uint32_t bits_of(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}
inline float float_of(uint32_t bits) {
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
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

inline Words sick(Words bits) { return Words((bits & 0x7f800000u) == 0x7f800000u); }
inline Words put(float* to, Floats v) {
    memcpy(to, &v, sizeof v);
    return sick(Words(v));
}
inline Words put(uint16_t* to, Floats v) {
    const Words bits = Words(v), rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Halves high = __builtin_convertvector(rounded >> 16, Halves);
    memcpy(to, &high, sizeof high);
    return sick(bits) | sick(rounded);
}

enum Type : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

void widen_bfloat16(float* to, const uint16_t* from, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = float_of(uint32_t(from[i]) << 16);
}
// Exponent and fraction moved to their places, then multiplied by 2 to the difference of the biases: exact, subnormals
// included.
void widen_float16(float* to, const uint16_t* from, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const uint32_t h = from[i], special = (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
        const uint32_t size = bits_of(float_of((h & 0x7fffu) << 13) * float_of(0x77800000u));
        to[i] = float_of(size | special | (h & 0x8000u) << 16);
    }
}

// --- matrices ---

template <class T>
uint32_t copy(T* to, const float* from, int64_t count, float scale) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < count; i++) bad |= put(to + i, from[i] * scale);
    return bad;
}

// from: [rows][cols], to: [cols][stride], of which the first `rows` of each are written
template <class T>
uint32_t transpose(T* to, const float* from, int64_t rows, int64_t cols, int64_t stride, float scale) {
    Words many = {0, 0, 0, 0};
    uint32_t bad = 0;
    int64_t r = 0;
    for (; r + kBlock <= rows; r += kBlock) {
        int64_t c = 0;
        for (; c + 4 <= cols; c += 4)
            for (int64_t i = r; i < r + kBlock; i += 4) {
                Floats a, b, d, e;
                memcpy(&a, from + i * cols + c, sizeof a);
                memcpy(&b, from + (i + 1) * cols + c, sizeof b);
                memcpy(&d, from + (i + 2) * cols + c, sizeof d);
                memcpy(&e, from + (i + 3) * cols + c, sizeof e);
                const Floats ab = __builtin_shuffle(a, b, Words{0, 4, 1, 5}) * scale;
                const Floats ab2 = __builtin_shuffle(a, b, Words{2, 6, 3, 7}) * scale;
                const Floats de = __builtin_shuffle(d, e, Words{0, 4, 1, 5}) * scale;
                const Floats de2 = __builtin_shuffle(d, e, Words{2, 6, 3, 7}) * scale;
                many |= put(to + c * stride + i, __builtin_shuffle(ab, de, Words{0, 1, 4, 5}));
                many |= put(to + (c + 1) * stride + i, __builtin_shuffle(ab, de, Words{2, 3, 6, 7}));
                many |= put(to + (c + 2) * stride + i, __builtin_shuffle(ab2, de2, Words{0, 1, 4, 5}));
                many |= put(to + (c + 3) * stride + i, __builtin_shuffle(ab2, de2, Words{2, 3, 6, 7}));
            }
        for (; c < cols; c++)
            for (int64_t i = r; i < r + kBlock; i++) bad |= put(to + c * stride + i, from[i * cols + c] * scale);
    }
    for (; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) bad |= put(to + c * stride + r, from[r * cols + c] * scale);
    return bad | many[0] | many[1] | many[2] | many[3];
}

// `rows` rows of a matrix of `stride` rows in all, from row `first` on; to: where the whole matrix begins
template <class T>
bool pack(T* to, const float* from, int64_t first, int64_t rows, int64_t cols, int64_t stride, bool transposed,
          float scale) {
    const uint32_t bad = transposed ? transpose(to + first, from, rows, cols, stride, scale)
                                    : copy(to + first * cols, from, rows * cols, scale);
    return bad == 0;
}

// --- resting ---

double thread_time_s() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return double(now.tv_sec) + double(now.tv_nsec) * 1e-9;
}

// After each piece of work a rest `ratio` times as long as the work was; 0: none.
class Pace {
   public:
    explicit Pace(double ratio) : ratio_(ratio), last_s_(ratio > 0 ? thread_time_s() : 0) {}
    void rest() {
        if (ratio_ <= 0) return;
        const double now_s = thread_time_s();
        owed_s_ += (now_s - last_s_) * ratio_;
        last_s_ = now_s;
        if (owed_s_ < kShortestRest_s) return;
        const timespec pause = {time_t(owed_s_), long((owed_s_ - double(time_t(owed_s_))) * 1e9)};
        nanosleep(&pause, nullptr);
        owed_s_ = 0;
    }

   private:
    double ratio_, last_s_, owed_s_ = 0;
};

// --- files ---

struct Matrix {  // as Python lays it out
    int64_t offset;       // of its first byte in the file
    int64_t type;         // of its numbers there
    int64_t rows, cols;   // there
    int64_t transposed;
    int64_t to;           // element of the buffer where it begins
};

// 0, or an errno; ENODATA where the file ends too early
int read_all(int file, char* to, int64_t size, int64_t offset) {
    while (size > 0) {
        const ssize_t count = pread(file, to, size_t(size), off_t(offset));
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return count < 0 ? errno : ENODATA;
        to += count, offset += count, size -= count;
    }
    return 0;
}

constexpr int64_t kNotFinite = int64_t(1) << 32;

// 0, or an errno, or kNotFinite + its number for a matrix with a number that is not finite
template <class T>
int64_t pack_matrix(int file, T* buffer, const Matrix& m, float scale, int64_t number, std::vector<char>& window,
                    std::vector<float>& wide, Pace& pace) {
    const int64_t size = m.type == kFloat32 ? 4 : 2, width = m.cols * size;
    int64_t step = width > kWindow / kBlock ? kBlock : kWindow / width / kBlock * kBlock;
    if (!m.transposed && width > kWindow / kBlock) step = width > kWindow ? 1 : kWindow / width;
    if (step > m.rows) step = m.rows;
    if (int64_t(window.size()) < step * width) window.resize(size_t(step * width));
    if (size == 2 && int64_t(wide.size()) < step * m.cols) wide.resize(size_t(step * m.cols));
    for (int64_t first = 0; first < m.rows; first += step) {
        const int64_t rows = step < m.rows - first ? step : m.rows - first;
        if (const int failed = read_all(file, window.data(), rows * width, m.offset + first * width)) return failed;
        const float* values = (const float*)window.data();
        if (size == 2) {
            (m.type == kBfloat16 ? widen_bfloat16 : widen_float16)(wide.data(), (const uint16_t*)window.data(),
                                                                    rows * m.cols);
            values = wide.data();
        }
        if (!pack(buffer + m.to, values, first, rows, m.cols, m.rows, m.transposed != 0, scale))
            return kNotFinite + number;
        pace.rest();
    }
    return 0;
}

template <class T>
int64_t pack_some(int file, T* buffer, const Matrix* matrices, const float* scales, int64_t from, int64_t until,
                  double rest) {
    try {
        std::vector<char> window;
        std::vector<float> wide;
        Pace pace(rest);
        for (int64_t i = from; i < until; i++)
            if (const int64_t failed = pack_matrix(file, buffer, matrices[i], scales[i], i, window, wide, pace))
                return failed;
        return 0;
    } catch (const std::bad_alloc&) {
        return ENOMEM;
    }
}

// The same in two threads, each with half of the bytes: the first failure in the order of the matrices.
template <class T>
int64_t pack_file(int file, T* buffer, const Matrix* matrices, const float* scales, int64_t count, int threads,
                  double rest) {
    int64_t whole = 0, half = 0, middle = 0;
    for (int64_t i = 0; i < count; i++) whole += matrices[i].rows * matrices[i].cols;
    while (middle < count && half < whole / 2) half += matrices[middle].rows * matrices[middle].cols, middle++;
    if (threads < 2 || middle == count) return pack_some(file, buffer, matrices, scales, 0, count, rest);
    int64_t second = 0;
    std::thread other;
    try {
        other = std::thread([&] { second = pack_some(file, buffer, matrices, scales, middle, count, rest); });
    } catch (const std::exception&) {  // no thread to be had
        return pack_some(file, buffer, matrices, scales, 0, count, rest);
    }
    const int64_t first = pack_some(file, buffer, matrices, scales, 0, middle, rest);
    other.join();
    return first ? first : second;
}

}  // namespace

extern "C" {

int lora_pack_version() { return 2; }

// from: float32 [rows][cols]; to: the same shape, or [cols][rows]. 0 where every number is finite before and after.
int lora_pack(void* to, const float* from, int64_t rows, int64_t cols, int transposed, float scale, int bfloat16) {
    return bfloat16 ? !pack((uint16_t*)to, from, 0, rows, cols, rows, transposed != 0, scale)
                    : !pack((float*)to, from, 0, rows, cols, rows, transposed != 0, scale);
}

// matrices: [count] of six int64; buffer: float32, or bfloat16's patterns. 0; an errno; 2^32 + the number of the first
// matrix with a number that is not finite before or after.
int64_t lora_pack_file(int file, void* buffer, const void* matrices, const float* scales, int64_t count, int bfloat16,
                       int threads, double rest) {
    return bfloat16 ? pack_file(file, (uint16_t*)buffer, (const Matrix*)matrices, scales, count, threads, rest)
                    : pack_file(file, (float*)buffer, (const Matrix*)matrices, scales, count, threads, rest);
}
}
