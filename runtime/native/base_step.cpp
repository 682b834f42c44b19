// The entry points of the base's kernels for CPU: chooses the variant for this processor, once.
#include <cstdlib>
#include <cstring>
#include <new>

#include <omp.h>

#include "base_step.h"

extern "C" {
#if defined(__x86_64__)
extern const BaseVariant base_step_avx2, base_step_avx512;
#endif
}

namespace {

const BaseVariant* choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const char* most = getenv("LORAPOOL_NATIVE_ISA");  // tests ask for less than the CPU has
    if (most && !strcmp(most, "baseline")) return nullptr;
    const bool no_512 = most && !strcmp(most, "avx2");
    if (!no_512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return &base_step_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &base_step_avx2;
#endif
    return nullptr;
}

const BaseVariant* const kVariant = choose();
constexpr int64_t kSmallWork = 1 << 16;  // multiplications below which waking other threads costs more than they save

}  // namespace

extern "C" {

extern const BaseVariant* const base_step_variant;
const BaseVariant* const base_step_variant = kVariant;

int base_step_version() { return 3; }

// Null: this processor has none of the instruction sets these kernels are for; nothing else may be called then.
const char* base_step_isa() { return kVariant ? kVariant->isa : nullptr; }

int64_t base_step_panel_bytes(int64_t in_features, int64_t out_features, int bfloat16_panels) {
    const int64_t width = 2 * kVariant->lanes;
    return (out_features + width - 1) / width * width * in_features * (bfloat16_panels ? 2 : 4);
}

void base_step_pack(const BaseLinear* linear, const float* weight, void* panels) {
    kVariant->pack(linear, weight, panels);
}

// x: [rows][in], y: [rows][out], contiguous. Returns 1 where memory ran out; y is untouched then.
int base_step_linear(const BaseLinear* linear, const void* x, void* y, int64_t rows) {
    try {
        const bool small = rows * linear->in_features * linear->out_features < kSmallWork;
        kVariant->linear(linear, x, y, rows, small ? 1 : omp_get_max_threads());
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

int base_step_decode(const BaseDecode* job) {
    try {
        int64_t seen = 0;
        for (int64_t i = 0; i < job->rows; i++) seen += job->lengths[i];
        const bool small = seen * job->heads * job->head_dim * 2 < kSmallWork;
        kVariant->decode(job, small ? 1 : omp_get_max_threads());
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

void base_step_norm(const BaseNorm* norm, const void* x, void* y, int64_t rows) {
    kVariant->norm(norm, x, y, rows, rows * norm->width < kSmallWork ? 1 : omp_get_max_threads());
}

void base_step_gate(const BaseGate* gate, const void* x, void* y, int64_t rows) {
    kVariant->gate(gate, x, y, rows, rows * gate->width < kSmallWork / 4 ? 1 : omp_get_max_threads());
}
}
