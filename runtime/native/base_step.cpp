// The entry points of the base model's CPU kernels, which choose the variant for this processor.
#include <cstring>
#include <new>
#include <vector>

#include <omp.h>

#include "base_step.h"

extern "C" {
#if defined(__x86_64__)
extern const BaseVariant base_step_avx2, base_step_avx512;
#endif
}

namespace {

// The variant for `most` (auto, baseline, avx2 or avx512); null where there is none for it.
const BaseVariant* variant_for(const char* most) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool any = !strcmp(most, "auto");
    if ((any || !strcmp(most, "avx512")) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return &base_step_avx512;
    if ((any || !strcmp(most, "avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &base_step_avx2;
#else
    (void)most;
#endif
    return nullptr;
}

constexpr int64_t kChunk = 1 << 16;  // numbers that a thread examines at a time
constexpr int64_t kSmallWork = 1 << 16;  // multiplications below which waking other threads costs more than it saves

int threads_for(int64_t work) { return work < kSmallWork ? 1 : omp_get_max_threads(); }

thread_local std::vector<float> memory;

// Calls `share(scratch, me, of)` in each thread, with `each` floats of scratch per thread. Returns 1 if memory ran out.
template <class Share>
int with_scratch(int64_t each, int threads, const Share& share) {
    try {
        if (int64_t(memory.size()) < each * threads) memory.resize(size_t(each * threads));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    float* const scratch = memory.data();
    if (threads == 1) return share(scratch, 0, 1), 0;
#pragma omp parallel num_threads(threads)
    share(scratch + each * omp_get_thread_num(), omp_get_thread_num(), omp_get_num_threads());
    return 0;
}

}  // namespace

extern "C" {

const BaseVariant* base_step_variant = variant_for("auto");

int base_step_version() { return 5; }

// Holds these kernels to an instruction set: auto, baseline, avx2 or avx512. Before anything is packed, as the panels'
// width depends on it. 0 where the processor does not have it, and nothing is changed then. There is no baseline
// variant: base_step_isa() is null after it.
int base_step_select(const char* most) {
    const BaseVariant* const chosen = variant_for(most);
    if (!chosen && strcmp(most, "auto") && strcmp(most, "baseline")) return 0;
    base_step_variant = chosen;
    return 1;
}

// Null: there is no variant for this processor, and nothing else may be called.
const char* base_step_isa() { return base_step_variant ? base_step_variant->isa : nullptr; }

int64_t base_step_panel_bytes(int64_t in_features, int64_t out_features, int bfloat16_panels) {
    const int64_t width = 2 * base_step_variant->lanes;
    return (out_features + width - 1) / width * width * in_features * (bfloat16_panels ? 2 : 4);
}

void base_step_pack(const BaseLinear* linear, const float* weight, void* panels) {
    const int64_t count = panels_of(linear, base_step_variant);
    with_scratch(0, threads_for(linear->in_features * linear->out_features), [=](float*, int me, int of) {
        base_step_variant->pack(linear, weight, panels, count * me / of, count * (me + 1) / of);
    });
}

// Returns 1 if every number is exactly representable in bfloat16.
int base_step_fits_bfloat16(const float* weight, int64_t count) {
    int lossy = 0;
#pragma omp parallel for reduction(| : lossy) num_threads(threads_for(count))
    for (int64_t from = 0; from < count; from += kChunk) {
        uint32_t low = 0;
        for (int64_t i = from; i < count && i < from + kChunk; i++) {
            uint32_t bits;
            memcpy(&bits, weight + i, sizeof bits);
            low |= bits;
        }
        lossy |= (low & 0xffffu) != 0;
    }
    return !lossy;
}

int64_t base_step_linear_scratch(const BaseLinear* l, int64_t rows) {
    return l->bfloat16_rows ? (rows < kTile ? rows : kTile) * l->in_features : 0;
}

int64_t base_step_decode_scratch(const BaseDecode* a) {
    int64_t longest = 0;
    for (int64_t i = 0; i < a->rows; i++) longest = a->lengths[i] > longest ? a->lengths[i] : longest;
    return a->heads / a->kv_heads * (2 * a->head_dim + longest + base_step_variant->lanes + 2);
}

// x: [rows][in], y: [rows][out], contiguous. Returns 1 if memory ran out; y is unchanged then.
int base_step_linear(const BaseLinear* linear, const void* x, void* y, int64_t rows) {
    const int threads = threads_for(rows * linear->in_features * linear->out_features);
    return with_scratch(base_step_linear_scratch(linear, rows), threads, [=](float* scratch, int me, int of) {
        const int64_t panels = panels_of(linear, base_step_variant);
        base_step_variant->linear(linear, x, y, rows, scratch, nullptr, panels * me / of, panels * (me + 1) / of, false);
    });
}

int base_step_decode(const BaseDecode* job) {
    int64_t seen = 0;
    for (int64_t i = 0; i < job->rows; i++) seen += job->lengths[i];
    const int threads = threads_for(seen * job->heads * job->head_dim * 2);
    return with_scratch(base_step_decode_scratch(job), threads,
                        [=](float* scratch, int me, int of) { base_step_variant->decode(job, scratch, me, of); });
}

void base_step_norm(const BaseNorm* norm, const void* x, void* y, int64_t rows) {
    with_scratch(0, threads_for(rows * norm->width),
                 [=](float*, int me, int of) { base_step_variant->norm(norm, x, y, rows, me, of); });
}

void base_step_gate(const BaseGate* gate, const void* x, void* y, int64_t rows) {
    with_scratch(0, threads_for(4 * rows * gate->width),
                 [=](float*, int me, int of) { base_step_variant->gate(gate, x, y, rows, me, of); });
}
}
