// Decode attention of one row and key head. Included by base_step_variant.cpp, which defines the vector types.
//
// Keys and values are read once for up to kHeads heads that share them. float32: scores of all tokens, then one softmax.
// bfloat16 is rounded where torch's operators round it, which keeps log-probabilities nearest to the stock model's: as in
// its fused attention, or under a soft cap as in transformers' code.
#pragma once
#include <cstring>

#include "base_step.h"

namespace {

constexpr int64_t kKeys = 512;  // keys in one block, as in torch's fused attention, whose rounding depends on it
constexpr int kHeads = 4;       // that share a pass over keys or values

// The cached tokens that a row and key head attends to; the constructor writes the row's own token.
template <class T>
struct Context {
    T *keys, *values;
    const int32_t* table;
    int64_t step, size, first, length;

    Context(const BaseDecode* a, int64_t row, int64_t kv_head) {
        keys = (T*)a->keys + kv_head * a->head_dim, values = (T*)a->values + kv_head * a->head_dim;
        table = a->tables + row * a->width, step = a->kv_heads * a->head_dim, size = a->block_size;
        length = a->lengths[row], first = a->window && length > a->window ? length - a->window : 0;
        int64_t own;
        offsets(length - 1, 1, &own);
        const size_t bytes = sizeof(T) * size_t(a->head_dim);
        memcpy(keys + own, (const T*)a->k + row * a->k_row + kv_head * a->k_head, bytes);
        memcpy(values + own, (const T*)a->v + row * a->v_row + kv_head * a->v_head, bytes);
    }

    int64_t attended() const { return length - first; }

    // at: [count], element offsets of the keys and values of the tokens from `begin` on
    void offsets(int64_t begin, int64_t count, int64_t* at) const {
        int64_t block = begin / size, offset = begin % size;
        for (int64_t t = 0; t < count; t++) {
            at[t] = (table[block] * size + offset) * step;
            if (++offset == size) offset = 0, block++;
        }
    }
};

// scores[g][t] = q[g] . keys[at[t]]
template <int G, class T>
void score_of(const float* q, const T* keys, const int64_t* at, int64_t count, int64_t dim, float* scores,
              int64_t stride) {
    for (int64_t t = 0; t < count; t++) {
        Vec s[G] = {};
        for (int64_t d = 0; d < dim; d += kLanes) {
            const Vec key = load(keys + at[t] + d);
            for (int g = 0; g < G; g++) s[g] += load(q + g * dim + d) * key;
        }
        for (int g = 0; g < G; g++) scores[g * stride + t] = sum(s[g]);
    }
}

template <class T>
void score(int heads, const float* q, const T* keys, const int64_t* at, int64_t count, int64_t dim, float* scores,
           int64_t stride) {
    switch (heads) {
        case 1: return score_of<1>(q, keys, at, count, dim, scores, stride);
        case 2: return score_of<2>(q, keys, at, count, dim, scores, stride);
        case 3: return score_of<3>(q, keys, at, count, dim, scores, stride);
        default: return score_of<4>(q, keys, at, count, dim, scores, stride);
    }
}

// sums[g] += weights[g][t] * values[at[t]], one t after the other
template <int G, class T>
void mix_of(float* sums, const T* values, const int64_t* at, int64_t count, int64_t dim, const float* weights,
            int64_t stride) {
    for (int64_t d = 0; d < dim; d += 2 * kLanes) {  // the last pair is the same vector twice where dim is odd
        const int64_t next = d + kLanes < dim ? d + kLanes : d;
        Vec s[G][2];
        for (int g = 0; g < G; g++) s[g][0] = load(sums + g * dim + d), s[g][1] = load(sums + g * dim + next);
        for (int64_t t = 0; t < count; t++) {
            const Vec low = load(values + at[t] + d), high = load(values + at[t] + next);
            for (int g = 0; g < G; g++) {
                const Vec weight = broadcast(weights + g * stride + t);
                s[g][0] += weight * low, s[g][1] += weight * high;
            }
        }
        for (int g = 0; g < G; g++) store(sums + g * dim + d, s[g][0]), store(sums + g * dim + next, s[g][1]);
    }
}

template <class T>
void mix(int heads, float* sums, const T* values, const int64_t* at, int64_t count, int64_t dim, const float* weights,
         int64_t stride) {
    switch (heads) {
        case 1: return mix_of<1>(sums, values, at, count, dim, weights, stride);
        case 2: return mix_of<2>(sums, values, at, count, dim, weights, stride);
        case 3: return mix_of<3>(sums, values, at, count, dim, weights, stride);
        default: return mix_of<4>(sums, values, at, count, dim, weights, stride);
    }
}

// Scores of one head -> weights that add up to 1; the array has room for a whole vector after `count`.
void weigh(float* s, int64_t count, float softcap) {
    if (softcap != 0)
        for (int64_t t = 0; t < count; t++) s[t] = __builtin_tanhf(s[t]) * softcap;
    float peak = s[0];
    for (int64_t t = 1; t < count; t++) peak = s[t] > peak || s[t] != s[t] ? s[t] : peak;
    for (int64_t t = count; t % kLanes; t++) s[t] = -1e30f;
    Vec total = Vec{};
    for (int64_t t = 0; t < count; t += kLanes) {
        const Vec e = exponential(load(s + t) - peak);
        store(s + t, e), total += e;
    }
    const float whole = sum(total);
    for (int64_t t = 0; t < count; t++) s[t] /= whole;
}

// e^x for x <= 0 to the eight bits that bfloat16 keeps, as torch's attention computes it for whole vectors of that type
// (Malossi et al., Fast exponential computation on SIMD architectures, 2015): the bits of 2^y are those of
// 2^23 (y + 127 - K) as a whole number, K a polynomial of y's fraction. Underflow gives 0, NaN stays NaN.
inline Vec coarse_exponential(Vec x) {
    typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
    constexpr float kLeast = -87.3365478515625f;  // the logarithm of the least normal number
    const Ints tiny = x < kLeast, usual = x >= kLeast;
    Vec y = (Vec)((Ints)x & usual) * 1.44269502162933349609375f;
    asm("" : "+v"(y));  // rounded here: not to be fused with what follows
    const Vec cut = __builtin_convertvector(__builtin_convertvector(y, Ints), Vec);
    const Vec fraction = y - (cut - (Vec)((Ints)(cut > y) & (Ints)(Vec{} + 1.0f)));
    Vec k = fraction * -0.079204240219773236f + -0.22433836478672356f;
    k = k * fraction + 0.30354260500649682f;
    k = k * fraction + 0.00010703434948458272f;
    const Ints value = __builtin_convertvector((y - k) * 8388608.0f + 1065353216.0f, Ints);
    const Ints odd = ~(tiny | usual);  // NaN
    return (Vec)((value & usual) | ((Ints)x & odd));
}

inline float rounded(float v) { return widen(narrowed(v)); }
inline Vec rounded(Vec v) {
    uint16_t narrow[kLanes];
    store(narrow, v);
    return load(narrow);
}

// Scores of one head and one block of keys -> weights rounded to bfloat16, relative to the greatest score so far, as in
// torch's fused attention. `peak` and `whole`, the sum of the weights in float32, are carried from block to block.
// Returns the factor by which the sums of the earlier blocks must be multiplied (online softmax).
float weigh_as_torch(float* s, int64_t count, float scale, float& peak, float& whole) {
    const int64_t vectors = count - count % kLanes;
    Vec most = Vec{} + peak;
    for (int64_t t = 0; t < vectors; t += kLanes) {
        const Vec v = load(s + t) * scale;
        const Bits more = (Bits)(v > most) | (Bits)(v != v);
        most = (Vec)(((Bits)v & more) | ((Bits)most & ~more));
        store(s + t, v);
    }
    float lanes[kLanes], now = peak;
    store(lanes, most);
    for (int i = 0; i < kLanes; i++) now = lanes[i] > now || lanes[i] != lanes[i] ? lanes[i] : now;
    for (int64_t t = vectors; t < count; t++) {
        s[t] *= scale;
        now = s[t] > now || s[t] != s[t] ? s[t] : now;
    }
    Vec total = Vec{};
    for (int64_t t = 0; t < vectors; t += kLanes) {
        const Vec e = coarse_exponential(load(s + t) - now);
        total += e, store(s + t, rounded(e));
    }
    float all_of = sum(total);
    for (int64_t t = vectors; t < count; t++) {
        const float e = __builtin_expf(s[t] - now);
        all_of += e, s[t] = rounded(e);
    }
    const float fade = __builtin_expf(peak - now);
    whole = all_of + fade * whole, peak = now;
    return fade;
}

// The same under a soft cap, for all keys at once, operator by operator as transformers writes it: each of them rounds.
void weigh_as_transformers(float* s, int64_t count, float scale, float softcap) {
    float peak = -__builtin_inff(), whole = 0;
    for (int64_t t = 0; t < count; t++) {
        s[t] = rounded(rounded(rounded(s[t]) * scale) / softcap);
        s[t] = rounded(rounded(__builtin_tanhf(s[t])) * softcap);
        peak = s[t] > peak || s[t] != s[t] ? s[t] : peak;
    }
    for (int64_t t = 0; t < count; t++) whole += s[t] = __builtin_expf(s[t] - peak);
    for (int64_t t = 0; t < count; t++) s[t] = rounded(s[t] / whole);
}

template <class T>
void widened_queries(const BaseDecode* a, int64_t row, int64_t first_head, int heads, float by, float* to) {
    for (int g = 0; g < heads; g++) {
        const T* q = (const T*)a->q + row * a->q_row + (first_head + g) * a->q_head;
        for (int64_t d = 0; d < a->head_dim; d += kLanes) store(to + g * a->head_dim + d, load(q + d) * by);
    }
}

// scratch: for each head of the group 2 * head_dim + length + kLanes
template <class T>
void attend(const BaseDecode* a, int64_t row, int64_t kv_head, float* scratch) {
    const Context<T> context(a, row, kv_head);
    const int64_t dim = a->head_dim, group = a->heads / a->kv_heads, attended = context.attended();
    constexpr bool kFloat = sizeof(T) == 4;
    const bool at_once = kFloat || a->softcap != 0;  // the weights depend on all scores
    const int64_t stride = at_once ? (attended + kLanes - 1) / kLanes * kLanes : attended < kKeys ? attended : kKeys;
    const float fold = !kFloat ? 1.0f : a->softcap != 0 ? a->scale / a->softcap : a->scale;
    int64_t at[kKeys];
    for (int64_t head = 0; head < group; head += kHeads) {
        const int heads = int(group - head < kHeads ? group - head : kHeads);
        float *queries = scratch, *sums = queries + heads * dim;  // [heads][dim] each
        float* scores = sums + heads * dim;                       // [heads][stride]
        float peaks[kHeads], wholes[kHeads];
        widened_queries<T>(a, row, kv_head * group + head, heads, fold, queries);
        memset(sums, 0, 4 * size_t(heads * dim));
        for (int g = 0; g < kHeads; g++) peaks[g] = -__builtin_inff(), wholes[g] = 0;
        for (int64_t begin = 0; begin < attended; begin += kKeys) {
            const int64_t count = attended - begin < kKeys ? attended - begin : kKeys;
            context.offsets(context.first + begin, count, at);
            score(heads, queries, context.keys, at, count, dim, scores + (at_once ? begin : 0), stride);
            if (at_once) continue;
            for (int g = 0; g < heads; g++) {
                const float fade = weigh_as_torch(scores + g * stride, count, a->scale, peaks[g], wholes[g]);
                if (begin)
                    for (int64_t d = 0; d < dim; d++) sums[g * dim + d] *= fade;
            }
            mix(heads, sums, context.values, at, count, dim, scores, stride);
        }
        if (at_once) {
            for (int g = 0; g < heads; g++)
                if (kFloat)
                    weigh(scores + g * stride, attended, a->softcap);
                else
                    weigh_as_transformers(scores + g * stride, attended, a->scale, a->softcap);
            for (int64_t begin = 0; begin < attended; begin += kKeys) {
                const int64_t count = attended - begin < kKeys ? attended - begin : kKeys;
                if (attended > kKeys) context.offsets(context.first + begin, count, at);
                mix(heads, sums, context.values, at, count, dim, scores + begin, stride);
            }
        }
        T* out = (T*)a->out + (row * a->heads + kv_head * group + head) * dim;
        for (int g = 0; g < heads; g++) {
            const float by = at_once ? 1.0f : 1.0f / wholes[g];
            for (int64_t d = 0; d < dim; d += kLanes) store(out + g * dim + d, load(sums + g * dim + d) * by);
        }
    }
}

}  // namespace
