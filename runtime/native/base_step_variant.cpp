// The base's linear layers and decode attention. Compiled once per instruction set, with -DVARIANT=name.
//
// Linear: a panel stays in the L1 cache while blocks of rows are multiplied with it; sums stay in registers. A bfloat16
// weight is widened as it is loaded, which is exact, so a float32 base whose weights came from bfloat16 is computed
// exactly and read at half the bytes. Each sum runs over k in order: neither the other rows of the batch nor the number
// of threads changes a bit. Attention: one request and key head at a time, over exactly the tokens it attends to.
#include <cstring>

#include <immintrin.h>

#include "base_step.h"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kBlock = 8;  // rows whose sums fit the registers
#else
constexpr int kLanes = 8;
constexpr int kBlock = 6;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));

inline Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline Vec load(const uint16_t* p) {
    Half h;
    memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, Bits) << 16);
}
inline Bits load_bits(const uint32_t* p) {
    Bits v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline Vec broadcast(const float* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_set1_ps(*p);
#else
    return (Vec)_mm256_broadcast_ss(p);
#endif
}
inline Vec all(float f) { return broadcast(&f); }
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
inline uint16_t narrowed(float v) {  // rounds to nearest even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return v != v ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void store(uint16_t* p, Vec v) {
    const Bits bits = (Bits)v;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits nan = (Bits)(v != v);
    const Half h = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), Half);
    memcpy(p, &h, sizeof h);
}
inline float widen(float v) { return v; }
inline float widen(uint16_t v) {
    const uint32_t bits = uint32_t(v) << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
inline void put(float* p, float v) { *p = v; }
inline void put(uint16_t* p, float v) { *p = narrowed(v); }
inline float sum(Vec v) {
    __m256 half[kLanes / 8];
    memcpy(half, &v, sizeof v);
    __m256 eight = half[0];
    if (kLanes == 16) eight = _mm256_add_ps(eight, half[kLanes / 8 - 1]);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// --- linear ---

// Weight rows are packed kPacked inputs at a time: the block of the panel stays in the L1 cache meanwhile.
constexpr int64_t kPacked = 64;

void pack(const BaseLinear* linear, const float* weight, void* panels, int64_t begin, int64_t end) {
    const int64_t in = linear->in_features, out = linear->out_features, width = 2 * kLanes;
    for (int64_t first = begin * width; first < end * width; first += width)
        for (int64_t k = 0; k < in; k += kPacked)
            for (int64_t j = 0; j < width; j++) {
                const bool there = first + j < out;
                const float* const row = weight + (first + j) * in + k;
                const int64_t at = first * in + k * width, count = in - k < kPacked ? in - k : kPacked;
                if (!linear->bfloat16_panels) {
                    float* const to = (float*)panels + at + j;
                    for (int64_t i = 0; i < count; i++) to[i * width] = there ? row[i] : 0.0f;
                } else {
                    uint16_t* const to = (uint16_t*)panels + at + 2 * (j % kLanes) + j / kLanes;
                    for (int64_t i = 0; i < count; i++) to[i * width] = there ? narrowed(row[i]) : uint16_t(0);
                }
            }
}

// Spreads the prefetches evenly over all runs along k, and within a run over all steps of k.
class Prefetcher {
  public:
    struct Region {
        const char* at;
        const char* end;
        int64_t step;  // bytes prefetched per k, until the end
    };

    Prefetcher(const StepPrefetch* regions, int64_t runs, int64_t in)
        : regions_(regions), region_{nullptr, nullptr, 0}, bytes_(regions ? regions->bytes : 0), runs_(runs), in_(in) {}

    // What the next run along k prefetches; `here` is in the cache already. A region takes whole runs, its share of the
    // remaining runs being its share of the remaining bytes, so that no part of a run prefetches nothing.
    Region& next(const void* here) {
        if (region_.at < region_.end) return region_;
        region_ = {(const char*)here, (const char*)here, 0};
        if (!regions_ || number_ == regions_->count) return region_;
        const char *begin = regions_->begins[number_], *end = regions_->ends[number_];
        const int64_t size = end - begin;
        const int64_t share = size < bytes_ ? size * runs_ / bytes_ : runs_, runs = share > 1 ? share : 1;
        const int64_t step = size / (runs * in_) + 1;
        region_ = {begin, end, step < 64 ? step : 64};
        number_++, bytes_ -= size, runs_ -= runs;
        return region_;
    }

  private:
    const StepPrefetch* regions_;
    Region region_;
    int64_t bytes_, runs_, in_, number_ = 0;  // bytes and runs that are left
};

inline const float* widened(const uint16_t* from, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    for (; i < count; i++) to[i] = widen(from[i]);
    return to;
}

struct PanelPrefetch {
    const char* at;
    int64_t step;  // bytes prefetched per k
};

template <int R, bool kHalf>
__attribute__((always_inline)) inline void rows_of_panel(const float* x, int64_t in, const void* panel,
                                                         PanelPrefetch ahead, Prefetcher::Region& more, Vec (&sums)[kBlock][2]) {
    const char *at = more.at, *const end = more.end;
    const int64_t step = more.step;
    Vec s[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) s[r][0] = s[r][1] = Vec{};
    for (int64_t k = 0; k < in; k++) {
        __builtin_prefetch(ahead.at + k * ahead.step);
        __builtin_prefetch(at, 0, 2);
        at = at < end ? at + step : at;
        Vec low, high;
        if (kHalf) {
            const Bits both = load_bits((const uint32_t*)panel + k * kLanes);
            low = (Vec)(both << 16), high = (Vec)(both & 0xffff0000u);
        } else {
            low = load((const float*)panel + k * 2 * kLanes), high = load((const float*)panel + k * 2 * kLanes + kLanes);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const Vec b = broadcast(x + r * in + k);
            s[r][0] += b * low, s[r][1] += b * high;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[r][0] = s[r][0], sums[r][1] = s[r][1];
    more.at = at;
}

template <bool kHalf>
void block_of_panel(int rows, const float* x, int64_t in, const void* panel, PanelPrefetch ahead, Prefetcher::Region& more,
                    Vec (&sums)[kBlock][2]) {
    switch (rows) {
        case 1: return rows_of_panel<1, kHalf>(x, in, panel, ahead, more, sums);
        case 2: return rows_of_panel<2, kHalf>(x, in, panel, ahead, more, sums);
        case 3: return rows_of_panel<3, kHalf>(x, in, panel, ahead, more, sums);
        case 4: return rows_of_panel<4, kHalf>(x, in, panel, ahead, more, sums);
        case 5: return rows_of_panel<5, kHalf>(x, in, panel, ahead, more, sums);
        case 6: return rows_of_panel<6, kHalf>(x, in, panel, ahead, more, sums);
#if defined(__AVX512F__)
        case 7: return rows_of_panel<7, kHalf>(x, in, panel, ahead, more, sums);
        case 8: return rows_of_panel<8, kHalf>(x, in, panel, ahead, more, sums);
#endif
    }
}

template <bool kHalf, class T>
void panels_of_tile(const BaseLinear* l, const float* x, T* y, int64_t rows, int64_t begin, int64_t end,
                    Prefetcher& prefetcher) {
    const int64_t in = l->in_features, out = l->out_features, width = 2 * kLanes;
    const int64_t bytes = in * width * (kHalf ? 2 : 4), blocks = (rows + kBlock - 1) / kBlock;
    const int64_t panels = (out + width - 1) / width;
    for (int64_t p = begin; p < end; p++) {
        const char* panel = (const char*)l->panels + p * bytes;
        const int64_t column = p * width;
        const bool whole = column + width <= out;
        Vec bias[2] = {};
        if (l->bias) {
            float padded[2 * kLanes] = {};
            memcpy(padded, l->bias + column, 4 * size_t(whole ? width : out - column));
            bias[0] = load(padded), bias[1] = load(padded + kLanes);
        }
        for (int64_t b = 0, row = 0; b < blocks; b++) {
            const int64_t take = (rows - row + blocks - b - 1) / (blocks - b);
            Vec sums[kBlock][2];
            // each block of rows prefetches its part of the next panel, which may belong to this thread's next call
            const PanelPrefetch ahead = p + 1 < panels ? PanelPrefetch{panel + bytes + bytes * b / blocks, bytes / blocks / in + 1}
                                               : PanelPrefetch{panel, 0};
            block_of_panel<kHalf>(int(take), x + row * in, in, panel, ahead, prefetcher.next(panel), sums);
            for (int64_t r = 0; r < take; r++) {
                const Vec low = sums[r][0] + bias[0], high = sums[r][1] + bias[1];
                T* to = y + (row + r) * out + column;
                if (whole) {
                    store(to, low), store(to + kLanes, high);
                } else {
                    float tail[2 * kLanes];
                    store(tail, low), store(tail + kLanes, high);
                    for (int64_t j = 0; j < out - column; j++) put(to + j, tail[j]);
                }
            }
            row += take;
        }
    }
}

template <class T>
void linear_of(const BaseLinear* l, const void* x, T* y, int64_t rows, float* scratch, const StepPrefetch* regions,
               int64_t begin, int64_t end, bool kept) {
    const int64_t in = l->in_features, out = l->out_features;
    Prefetcher prefetcher(regions, (end - begin) * ((rows + kBlock - 1) / kBlock), in);
    for (int64_t row = 0; row < rows; row += kTile) {
        const int64_t take = rows - row < kTile ? rows - row : kTile;
        const float* tile = (const float*)x + row * in;
        if (l->bfloat16_rows) tile = kept ? scratch : widened((const uint16_t*)x + row * in, scratch, take * in);
        if (l->bfloat16_panels)
            panels_of_tile<true>(l, tile, y + row * out, take, begin, end, prefetcher);
        else
            panels_of_tile<false>(l, tile, y + row * out, take, begin, end, prefetcher);
    }
}

void linear(const BaseLinear* l, const void* x, void* y, int64_t rows, float* scratch, const StepPrefetch* regions,
            int64_t begin, int64_t end, bool kept) {
    if (l->bfloat16_rows)
        linear_of(l, x, (uint16_t*)y, rows, scratch, regions, begin, end, kept);
    else
        linear_of(l, x, (float*)y, rows, scratch, regions, begin, end, kept);
}

// --- decode attention ---

// e^x for x <= 0: 2^n times a polynomial of degree 6 on [-ln2/2, ln2/2]; NaN stays NaN, below -87 it is 0.
inline Vec exponential(Vec x) {
    typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
    const Ints tiny = x < -87.0f;
    const Ints usual = x >= -87.0f;
    const Vec safe = (Vec)((Ints)x & usual);
    const Vec shifted = safe * 1.44269504088896341f + 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest whole number
    const Vec n = shifted - 12582912.0f;
    const Vec r = (safe - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Ints power = __builtin_convertvector(n, Ints) << 23;
    const Vec value = (Vec)((Ints)p + power);
    const Ints odd = ~(tiny | usual);  // NaN
    return (Vec)(((Ints)value & usual) | ((Ints)x & odd));
}

}  // namespace

#include "base_step_attend.h"

namespace {

// Work is divided among threads by the tokens that each request attends to, so that a long one delays no thread.
void decode(const BaseDecode* a, float* scratch, int me, int of) {
    constexpr double kEach = 16;  // fixed cost of a request and key head, in tokens
    double all = 0, before = 0;
    for (int64_t row = 0; row < a->rows; row++) all += (a->lengths[row] + kEach) * double(a->kv_heads);
    for (int64_t row = 0; row < a->rows; row++)
        for (int64_t head = 0; head < a->kv_heads; head++) {
            const bool mine = before >= all * me / of && before < all * (me + 1) / of;
            before += a->lengths[row] + kEach;
            if (!mine) continue;
            if (a->bfloat16)
                attend<uint16_t>(a, row, head, scratch);
            else
                attend<float>(a, row, head, scratch);
        }
}

// --- norms and gated activations ---

template <class T>
void norm_row(const BaseNorm* n, const T* x, T* y) {
    const int64_t width = n->width, whole = width - width % kLanes;
    Vec squares = Vec{};
    for (int64_t i = 0; i < whole; i += kLanes) {
        const Vec v = load(x + i);
        squares += v * v;
    }
    float total = sum(squares);
    for (int64_t i = whole; i < width; i++) total += widen(x[i]) * widen(x[i]);
    const float by = 1.0f / __builtin_sqrtf(total / float(width) + n->epsilon);
    for (int64_t i = 0; i < width; i += kLanes) {
        float tail[kLanes] = {}, weights[kLanes] = {};
        const bool full = i < whole;
        if (!full)
            for (int64_t j = i; j < width; j++) tail[j - i] = widen(x[j]), weights[j - i] = n->weight[j];
        Vec v = (full ? load(x + i) : load(tail)) * by;
        if (n->round_first) {
            uint16_t narrow[kLanes];
            store(narrow, v);
            v = load(narrow);
        }
        v *= full ? load(n->weight + i) : load(weights);
        if (full) {
            store(y + i, v);
        } else {
            store(tail, v);
            for (int64_t j = i; j < width; j++) put(y + j, tail[j - i]);
        }
    }
}

void norm(const BaseNorm* n, const void* x, void* y, int64_t rows, int me, int of) {
    for (int64_t row = rows * me / of; row < rows * (me + 1) / of; row++) {
        if (n->bfloat16)
            norm_row(n, (const uint16_t*)x + row * n->width, (uint16_t*)y + row * n->width);
        else
            norm_row(n, (const float*)x + row * n->width, (float*)y + row * n->width);
    }
}

// 1 / (1 + e^-x)
inline Vec logistic(Vec x) {
    typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
    const Ints positive = x > 0.0f;
    const Vec size = (Vec)((Bits)x | 0x80000000u);  // -|x|; NaN stays NaN
    const Vec e = exponential(size);
    const Vec top = (Vec)(((Bits)(Vec{} + 1.0f) & (Bits)positive) | ((Bits)e & ~(Bits)positive));
    return top / (e + 1.0f);
}

// GELU by tanh is x times the logistic function of twice the tanh's argument. In bfloat16 torch's own form, (1 + tanh) / 2,
// is computed: where the tanh is nearly -1, its float32 rounding is visible in the result.
inline Vec gelu(Vec x, bool as_torch) {
    Vec share = logistic((x + x * x * x * 0.044715f) * 1.5957691216057308f);
    if (as_torch) {
        const Vec tangent = 2.0f * share - 1.0f;
        share = 0.5f * (1.0f + tangent);
    }
    return x * share;
}

template <class T>
void gate_row(const BaseGate* job, const T* x, T* y) {
    const int64_t width = job->width;
    for (int64_t i = 0; i < width; i += kLanes) {
        const bool full = i + kLanes <= width;
        float gates[kLanes] = {}, ups[kLanes] = {};
        if (!full)
            for (int64_t j = i; j < width; j++) gates[j - i] = widen(x[j]), ups[j - i] = widen(x[width + j]);
        const Vec g = full ? load(x + i) : load(gates), up = full ? load(x + width + i) : load(ups);
        Vec v = job->activation ? gelu(g, job->bfloat16) : g * logistic(g);
        if (job->bfloat16) {  // rounded before it is multiplied, as two separate operators do
            uint16_t narrow[kLanes];
            store(narrow, v);
            v = load(narrow);
        }
        v *= up;
        if (full) {
            store(y + i, v);
        } else {
            store(gates, v);
            for (int64_t j = i; j < width; j++) put(y + j, gates[j - i]);
        }
    }
}

void gate(const BaseGate* job, const void* x, void* y, int64_t rows, int me, int of) {
    for (int64_t row = rows * me / of; row < rows * (me + 1) / of; row++) {
        if (job->bfloat16)
            gate_row(job, (const uint16_t*)x + row * 2 * job->width, (uint16_t*)y + row * job->width);
        else
            gate_row(job, (const float*)x + row * 2 * job->width, (float*)y + row * job->width);
    }
}

}  // namespace

#include "step_glue.h"

namespace {

template <class T>
void rotary_of(const StepRotaryEmbedding* t, T* x, int64_t x_row, const StepRotaryTable* by, int64_t begin, int64_t end) {
    const int64_t at = begin * by->width;
    rotate(x + begin * x_row, x_row, t->vectors, t->head_dim, (const T*)by->cos + at, (const T*)by->sin + at, by->width,
           end - begin);
}

void rotary(const StepRotaryEmbedding* t, void* x, int64_t x_row, const StepRotaryTable* by, int64_t rows, int me, int of) {
    if (t->bfloat16)
        rotary_of(t, (uint16_t*)x, x_row, by, rows * me / of, rows * (me + 1) / of);
    else
        rotary_of(t, (float*)x, x_row, by, rows * me / of, rows * (me + 1) / of);
}

void add(const StepAdd* a, void* to, const void* from, int64_t rows, int me, int of) {
    const int64_t begin = rows * me / of * a->width, end = rows * (me + 1) / of * a->width;
    if (a->bfloat16)
        accumulate((uint16_t*)to + begin, (const uint16_t*)from + begin, a->factor, end - begin);
    else
        accumulate((float*)to + begin, (const float*)from + begin, a->factor, end - begin);
}

}  // namespace

#define NAME2(name) base_step_##name
#define NAME(name) NAME2(name)
#define TEXT2(name) #name
#define TEXT(name) TEXT2(name)
extern "C" {
extern const BaseVariant NAME(VARIANT);
const BaseVariant NAME(VARIANT) = {TEXT(VARIANT), kLanes, pack, linear, decode, norm, gate, rotary, add};
}
