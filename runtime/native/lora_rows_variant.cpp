// y[i] += B_s (A_s x[i]) for every row i and its slot s. Compiled once per instruction set, with -DVARIANT=name.
//
// Two phases with a barrier between: u = A x divided by rows of A, then y += u B divided by columns of B, both in equal
// shares of work, so that one adapter of rank 64 among fifteen of rank 4 delays no thread. The weights are read from
// memory once for all rows that use them. The order of each sum depends only on its own row and weights: neither the
// other rows of the batch nor the number of threads changes a bit. bfloat16 is widened to float32, summed there and
// rounded once at the end.
#include <cstring>

#include "lora_rows.h"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));

// Not std::min: a shared inline function compiled for one instruction set could end up in the others.
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t kTile = 512;  // columns computed at a time: their sums stay in the L1 cache
constexpr int kRows = 4;        // rows of one slot that are computed in one pass over its weights
// The same for a prompt, whose weights are in the cache after the first rows: as many as have their sums in registers.
constexpr int kPromptRows = kLanes == 16 ? 4 : 3;
constexpr int kExpandRows = 4;       // rows of a prompt that are expanded together
constexpr int64_t kWideIn = 8192;  // inputs up to which a block of A is widened once for all rows of a prompt

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
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
inline float widen(float v) { return v; }
inline float widen(uint16_t v) {
    const uint32_t bits = uint32_t(v) << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
inline void narrow(float* p, float v) { *p = v; }
inline void narrow(uint16_t* p, float v) {  // rounds to nearest even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    *p = v != v ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float sum(Vec v) {
    float lane[kLanes];
    memcpy(lane, &v, sizeof lane);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

// NA rows of A times NX rows of x; every pair has one accumulator, so the order of its sum never varies.
template <int NA, int NX, class T, class X>
inline void dots(const T* a, const X* const* x, int64_t in, float* const* u) {
    Vec acc[NA][NX] = {};
    int64_t i = 0;
    for (; i + kLanes <= in; i += kLanes) {
        Vec xs[NX];
        for (int n = 0; n < NX; n++) xs[n] = load(x[n] + i);
        for (int k = 0; k < NA; k++) {
            // The same element of the next block: while widening, the hardware prefetcher does not run far enough ahead
            // (measured: a fifth faster in bfloat16, no gain in float32).
            if constexpr (sizeof(T) == 2) __builtin_prefetch(a + k * in + i + NA * in, 0, 3);
            const Vec as = load(a + k * in + i);
            for (int n = 0; n < NX; n++) acc[k][n] += as * xs[n];
        }
    }
    for (int k = 0; k < NA; k++)
        for (int n = 0; n < NX; n++) {
            float total = sum(acc[k][n]);
            for (int64_t j = i; j < in; j++) total += widen(a[k * in + j]) * widen(x[n][j]);
            u[n][k] = total;
        }
}

template <class T, class X>
inline void dots_of(int rows, const T* a, const X* const* x, int64_t in, float* const* u) {
    switch (rows) {
        case 1: return dots<kRankBlock, 1>(a, x, in, u);
        case 2: return dots<kRankBlock, 2>(a, x, in, u);
        case 3: return dots<kRankBlock, 3>(a, x, in, u);
        default: return dots<kRankBlock, 4>(a, x, in, u);
    }
}

template <int NX, class T, class X>
inline void shrink_rows(const T* a, const X* const* x, int64_t in, float* const* u, int64_t begin, int64_t end) {
    int64_t k = begin;
    float* at[NX];
    for (; k + kRankBlock <= end; k += kRankBlock) {
        for (int n = 0; n < NX; n++) at[n] = u[n] + k;
        dots<kRankBlock, NX>(a + k * in, x, in, at);
    }
    for (; k < end; k++) {
        for (int n = 0; n < NX; n++) at[n] = u[n] + k;
        dots<1, NX>(a + k * in, x, in, at);
    }
}

inline void widen_all(float* to, const uint16_t* from, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    for (; i < count; i++) to[i] = widen(from[i]);
}

// `shrink` for the rows of a prompt, x: float32 [rows of the step][in]. Every block of A is read, and widened if it is
// bfloat16, once for all rows.
template <class T>
void shrink_prompt(const LoraJob& job, const LoraRun& run, const float* x, int64_t begin, int64_t end) {
    const LoraGroup& group = *job.group;
    const int64_t in = group.in_features;
    const T* a = (const T*)group.memory + group.a_at[run.slot];
    for (int64_t k = begin; k < end; k += kRankBlock) {
        const int64_t ranks = least(kRankBlock, end - k);
        const float* block;
        float wide[sizeof(T) == 4 ? 1 : kRankBlock * kWideIn];
        if constexpr (sizeof(T) == 4) {
            block = a + k * in;
        } else {
            widen_all(wide, a + k * in, ranks * in);
            block = wide;
        }
        for (int64_t r = 0; r < run.count;) {
            const float* xs[kPromptRows];
            float* u[kPromptRows];
            const int n = int(least(kPromptRows, run.count - r));
            for (int i = 0; i < n; i++) {
                xs[i] = x + job.order[run.first + r + i] * in;
                u[i] = job.u + run.u_at + (r + i) * run.ranks + k;
            }
            if (ranks == kRankBlock) {
                dots_of(n, block, xs, in, u);
            } else {
                for (int i = 0; i < n; i++)
                    for (int64_t j = 0; j < ranks; j++) {
                        float* const at[1] = {u[i] + j};
                        dots<1, 1>(block + j * in, xs + i, in, at);
                    }
            }
            r += n;
        }
    }
}

// Computes u for rows [begin, end) of A and all rows of the run.
template <class T>
void shrink(const LoraJob& job, const LoraRun& run, int64_t begin, int64_t end) {
    if (run.count >= kPromptLeast) {
        if constexpr (sizeof(T) == 4) return shrink_prompt<T>(job, run, (const float*)job.x, begin, end);
        if (job.wide && job.group->in_features <= kWideIn) return shrink_prompt<T>(job, run, job.wide, begin, end);
    }
    const LoraGroup& group = *job.group;
    const int64_t in = group.in_features;
    const T* a = (const T*)group.memory + group.a_at[run.slot];
    for (int64_t r = 0; r < run.count;) {
        const T* x[kRows];
        float* u[kRows];
        const int n = int(least(kRows, run.count - r));
        for (int i = 0; i < n; i++) {
            x[i] = (const T*)job.x + job.order[run.first + r + i] * in;
            u[i] = job.u + run.u_at + (r + i) * run.ranks;
        }
        switch (n) {
            case 1: shrink_rows<1>(a, x, in, u, begin, end); break;
            case 2: shrink_rows<2>(a, x, in, u, begin, end); break;
            case 3: shrink_rows<3>(a, x, in, u, begin, end); break;
            default: shrink_rows<4>(a, x, in, u, begin, end);
        }
        r += n;
    }
}

// acc[0..width) += u[0..NK) B[0..NK)[0..width)
template <int NK, class T>
inline void add_ranks(float* acc, const float* u, const T* b, int64_t stride, int64_t width) {
    int64_t c = 0;
    for (; c + kLanes <= width; c += kLanes) {
        Vec s = load(acc + c);
        for (int k = 0; k < NK; k++) {
            if constexpr (sizeof(T) == 2) __builtin_prefetch(b + k * stride + c + NK * stride, 0, 3);
            s += load(b + k * stride + c) * u[k];
        }
        store(acc + c, s);
    }
    for (; c < width; c++) {
        float s = acc[c];
        for (int k = 0; k < NK; k++) s += widen(b[k * stride + c]) * u[k];
        acc[c] = s;
    }
}

template <class T>
inline void add_tile(float* acc, const float* u, const T* b, int64_t rank, int64_t stride, int64_t width) {
    int64_t k = 0;
    for (; k + 4 <= rank; k += 4) add_ranks<4>(acc, u + k, b + k * stride, stride, width);
    for (; k < rank; k++) add_ranks<1>(acc, u + k, b + k * stride, stride, width);
}

// The same for kExpandRows rows of one slot, each with its own sums and u: B is read once for all of them.
template <class T>
inline void add_tile_of_rows(float* const* acc, const float* u, int64_t u_row, const T* b, int64_t rank, int64_t stride,
                             int64_t width) {
    int64_t c = 0;
    for (; c + 2 * kLanes <= width; c += 2 * kLanes) {
        Vec s[kExpandRows][2];
        for (int n = 0; n < kExpandRows; n++) s[n][0] = load(acc[n] + c), s[n][1] = load(acc[n] + c + kLanes);
        for (int64_t k = 0; k < rank; k++) {
            const Vec b0 = load(b + k * stride + c), b1 = load(b + k * stride + c + kLanes);
            for (int n = 0; n < kExpandRows; n++) s[n][0] += b0 * u[n * u_row + k], s[n][1] += b1 * u[n * u_row + k];
        }
        for (int n = 0; n < kExpandRows; n++) store(acc[n] + c, s[n][0]), store(acc[n] + c + kLanes, s[n][1]);
    }
    if (c < width)
        for (int n = 0; n < kExpandRows; n++) add_tile(acc[n] + c, u + n * u_row, b + c, rank, stride, width - c);
}

// Adds to columns [begin, end) of one member, for all rows of the run. u starts at the member's own ranks.
template <class T>
void expand(const LoraJob& job, const LoraRun& run, int member, const float* u, int64_t begin, int64_t end) {
    const LoraGroup& group = *job.group;
    const int64_t at = member * group.slots + run.slot, rank = group.ranks[at];
    const int64_t out = group.columns[member + 1] - group.columns[member], width = group.columns[group.members];
    const T* b = (const T*)group.memory + group.b_at[at];
    for (int64_t c = begin; c < end; c += kTile) {
        const int64_t n = least(kTile, end - c);
        int64_t r = 0;
        for (; run.count >= kPromptLeast && r + kExpandRows <= run.count; r += kExpandRows) {
            T* y[kExpandRows];
            float* acc[kExpandRows];
            float sums[sizeof(T) == 4 ? 1 : kExpandRows][sizeof(T) == 4 ? 1 : kTile];
            for (int i = 0; i < kExpandRows; i++) {
                y[i] = (T*)job.y + job.order[run.first + r + i] * width + group.columns[member] + c;
                if constexpr (sizeof(T) == 4) {
                    acc[i] = y[i];
                } else {
                    acc[i] = sums[i];
                    memset(sums[i], 0, size_t(n) * sizeof(float));
                }
            }
            add_tile_of_rows(acc, u + r * run.ranks, run.ranks, b + c, rank, out, n);
            if constexpr (sizeof(T) == 2)
                for (int i = 0; i < kExpandRows; i++)
                    for (int64_t j = 0; j < n; j++) narrow(y[i] + j, widen(y[i][j]) + acc[i][j]);
        }
        for (; r < run.count; r++) {
            T* y = (T*)job.y + job.order[run.first + r] * width + group.columns[member] + c;
            if constexpr (sizeof(T) == 4) {
                add_tile((float*)y, u + r * run.ranks, b + c, rank, out, n);
            } else {
                float acc[kTile] = {};  // summed separately and added once, as peft does
                add_tile(acc, u + r * run.ranks, b + c, rank, out, n);
                for (int64_t i = 0; i < n; i++) narrow(y + i, widen(y[i]) + acc[i]);
            }
        }
    }
}

template <class T>
void expand_share(const LoraJob& job) {
    const LoraGroup& group = *job.group;
    const LoraRun* const end = job.runs + job.num_runs;
    const double all = end[-1].expand_to, from = all * job.me / job.of, until = all * (job.me + 1) / job.of;
    double done = 0;
    for (const LoraRun* run = job.runs; run < end; run++) {
        const float* u = job.u + run->u_at;
        for (int member = 0; member < group.members; member++) {
            const int64_t rank = group.ranks[member * group.slots + run->slot];
            const int64_t out = group.columns[member + 1] - group.columns[member];
            const double mine = double(rank * out) * row_work(run->count);
            done += mine;
            if (rank) {
                const int64_t begin = lora_part(from, done, mine, out, kColumnBlock);
                const int64_t stop = job.me + 1 == job.of ? out : lora_part(until, done, mine, out, kColumnBlock);
                if (begin < stop) expand<T>(job, *run, member, u, begin, stop);
                u += rank;
            }
        }
    }
}

void shrink_slice(const LoraJob* job, const LoraSlice* slice) {
    if (job->group->bfloat16)
        shrink<uint16_t>(*job, job->runs[slice->run], slice->begin, slice->end);
    else
        shrink<float>(*job, job->runs[slice->run], slice->begin, slice->end);
}

// Thread `me`'s part of x to float32.
void widen_share(const LoraJob* job, int64_t rows, float* wide) {
    const int64_t in = job->group->in_features, from = rows * job->me / job->of, until = rows * (job->me + 1) / job->of;
    widen_all(wide + from * in, (const uint16_t*)job->x + from * in, (until - from) * in);
}

void expand_all(const LoraJob* job) {
    if (job->group->bfloat16)
        expand_share<uint16_t>(*job);
    else
        expand_share<float>(*job);
}

}  // namespace

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
extern "C" {
extern const LoraVariant JOIN(lora_rows_, VARIANT);
const LoraVariant JOIN(lora_rows_, VARIANT) = {widen_share, shrink_slice, expand_all};
}
