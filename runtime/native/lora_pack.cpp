// Reads an adapter's file into the adapter's buffer in one pass over memory: through a small window that stays in the
// cache, widened, transposed if necessary, scaled, rounded to nearest even, and checked for numbers that are not finite or too large.
// Also copies such a buffer into a slot. It uses no OpenMP: it runs concurrently with the engine, and can pause between
// chunks, so that the engine keeps its cores and most of the memory bandwidth.
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
constexpr int64_t kWindow = 128 << 10;     // bytes read at a time: they and the numbers made of them stay in the L2 cache
constexpr double kShortestPause_s = 200e-6;  // shorter pauses are added up

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
constexpr uint32_t kMagnitude = 0x7fffffffu, kTooLarge = 0x49800000u;  // 2^20, pack.py's TOO_LARGE
// Infinite, not a number, or 2^20 and more: the exponents of the first two are the largest.
inline uint32_t too_large(uint32_t bits) { return (bits & kMagnitude) >= kTooLarge; }

inline uint32_t put(float* to, float v) {
    *to = v;
    return too_large(bits_of(v));
}
inline uint32_t put(uint16_t* to, float v) {
    const uint32_t bits = bits_of(v), rounded = bits + 0x7fff + ((bits >> 16) & 1);
    *to = uint16_t(rounded >> 16);
    return too_large(bits) | too_large(rounded);
}

inline Words too_large(Words bits) { return Words((bits & kMagnitude) >= kTooLarge); }
inline Words put(float* to, Floats v) {
    memcpy(to, &v, sizeof v);
    return too_large(Words(v));
}
inline Words put(uint16_t* to, Floats v) {
    const Words bits = Words(v), rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Halves high = __builtin_convertvector(rounded >> 16, Halves);
    memcpy(to, &high, sizeof high);
    return too_large(bits) | too_large(rounded);
}

enum Type : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

void widen_bfloat16(float* to, const uint16_t* from, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = float_of(uint32_t(from[i]) << 16);
}
// Shifts exponent and fraction into place and multiplies by 2 to the difference of the exponent biases: exact, also for
// subnormal numbers.
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

// Packs `rows` rows, from row `first` on, of a matrix of `stride` rows; to: the start of the whole matrix.
template <class T>
bool pack(T* to, const float* from, int64_t first, int64_t rows, int64_t cols, int64_t stride, bool transposed,
          float scale) {
    const uint32_t bad = transposed ? transpose(to + first, from, rows, cols, stride, scale)
                                    : copy(to + first * cols, from, rows * cols, scale);
    return bad == 0;
}

// --- pausing ---

double thread_time_s() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return double(now.tv_sec) + double(now.tv_nsec) * 1e-9;
}

// Pauses after each chunk of work, `ratio` times as long as the work took; 0: never.
class Pause {
   public:
    explicit Pause(double ratio) : ratio_(ratio), last_s_(ratio > 0 ? thread_time_s() : 0) {}
    void after_chunk() {
        if (ratio_ <= 0) return;
        const double now_s = thread_time_s();
        owed_s_ += (now_s - last_s_) * ratio_;
        last_s_ = now_s;
        if (owed_s_ < kShortestPause_s) return;
        const timespec pause = {time_t(owed_s_), long((owed_s_ - double(time_t(owed_s_))) * 1e9)};
        nanosleep(&pause, nullptr);
        owed_s_ = 0;
    }

   private:
    double ratio_, last_s_, owed_s_ = 0;
};

// --- files ---

struct Matrix {  // a row of `weights.pack.MATRIX_FIELDS`
    int64_t offset;       // of its first byte in the file
    int64_t type;         // of its numbers in the file
    int64_t rows, cols;   // its shape in the file
    int64_t transposed;
    int64_t to;           // its first element in the buffer
};

// Returns 0 or an errno; ENODATA if the file ends too early.
int read_all(int file, char* to, int64_t size, int64_t offset) {
    while (size > 0) {
        const ssize_t count = pread(file, to, size_t(size), off_t(offset));
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return count < 0 ? errno : ENODATA;
        to += count, offset += count, size -= count;
    }
    return 0;
}

constexpr int64_t kUnusable = int64_t(1) << 32;

// Returns 0, an errno, or kUnusable + `number` for a matrix with a number that is not finite or too large.
template <class T>
int64_t pack_matrix(int file, T* buffer, const Matrix& m, float scale, int64_t number, std::vector<char>& window,
                    std::vector<float>& wide, Pause& pause) {
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
            return kUnusable + number;
        pause.after_chunk();
    }
    return 0;
}

template <class T>
int64_t pack_some(int file, T* buffer, const Matrix* matrices, const float* scales, int64_t from, int64_t until,
                  double pause_ratio) {
    try {
        std::vector<char> window;
        std::vector<float> wide;
        Pause pause(pause_ratio);
        for (int64_t i = from; i < until; i++)
            if (const int64_t failed = pack_matrix(file, buffer, matrices[i], scales[i], i, window, wide, pause))
                return failed;
        return 0;
    } catch (const std::bad_alloc&) {
        return ENOMEM;
    }
}

// The same in two threads, each with half of the bytes. Returns the first failure in the order of the matrices.
template <class T>
int64_t pack_file(int file, T* buffer, const Matrix* matrices, const float* scales, int64_t count, int threads,
                  double pause_ratio) {
    int64_t whole = 0, half = 0, middle = 0;
    for (int64_t i = 0; i < count; i++) whole += matrices[i].rows * matrices[i].cols;
    while (middle < count && half < whole / 2) half += matrices[middle].rows * matrices[middle].cols, middle++;
    if (threads < 2 || middle == count) return pack_some(file, buffer, matrices, scales, 0, count, pause_ratio);
    int64_t second = 0;
    std::thread other;
    try {
        other = std::thread([&] { second = pack_some(file, buffer, matrices, scales, middle, count, pause_ratio); });
    } catch (const std::exception&) {  // no thread could be started
        return pack_some(file, buffer, matrices, scales, 0, count, pause_ratio);
    }
    const int64_t first = pack_some(file, buffer, matrices, scales, 0, middle, pause_ratio);
    other.join();
    return first ? first : second;
}

}  // namespace

extern "C" {

int lora_pack_version() { return 3; }

// from: float32 [rows][cols]; to: the same shape, or [cols][rows]. Returns 0 if every number is finite and not too large.
int lora_pack(void* to, const float* from, int64_t rows, int64_t cols, int transposed, float scale, int bfloat16) {
    return bfloat16 ? !pack((uint16_t*)to, from, 0, rows, cols, rows, transposed != 0, scale)
                    : !pack((float*)to, from, 0, rows, cols, rows, transposed != 0, scale);
}

// matrices: [count] of six int64; buffer: float32, or bfloat16's bit patterns. Returns 0; an errno; 2^32 + the index of
// the first matrix with a number that is not finite or too large.
int64_t lora_pack_file(int file, void* buffer, const void* matrices, const float* scales, int64_t count, int bfloat16,
                       int threads, double pause_ratio) {
    return bfloat16 ? pack_file(file, (uint16_t*)buffer, (const Matrix*)matrices, scales, count, threads, pause_ratio)
                    : pack_file(file, (float*)buffer, (const Matrix*)matrices, scales, count, threads, pause_ratio);
}
}
