// The entry point of the row kernel: sorts a step's rows by slot, splits the work, and calls the variant for this CPU.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include <omp.h>

#include "lora_rows.h"

extern "C" {
void lora_rows_baseline(const LoraJob*);
#if defined(__x86_64__)
void lora_rows_avx2(const LoraJob*);
void lora_rows_avx512(const LoraJob*);
#endif
}

namespace {

typedef void (*Variant)(const LoraJob*);
struct Choice {
    Variant run;
    const char* name;
};

Choice choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const char* most = getenv("LORAPOOL_NATIVE_ISA");  // tests ask for less than the CPU has
    const bool only_baseline = most && !strcmp(most, "baseline"), no_512 = only_baseline || (most && !strcmp(most, "avx2"));
    if (!no_512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return {lora_rows_avx512, "avx512"};
    if (!only_baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {lora_rows_avx2, "avx2"};
#endif
    return {lora_rows_baseline, "baseline"};
}

const Choice kChoice = choose();
constexpr int64_t kSmallWork = 32768;  // multiplications below which waking other threads costs more than they save

struct Scratch {
    std::vector<int64_t> order;
    std::vector<LoraRun> runs;
    std::vector<float> u;
};
thread_local Scratch scratch;

}  // namespace

extern "C" {

int lora_rows_version() { return 1; }

const char* lora_rows_isa() { return kChoice.name; }

// Adds to y in place. row_slots: [rows], in any order; slots below 0 or without ranks are left alone. Returns 0, or 1
// for a slot that does not exist, 2 where memory ran out; y is untouched then.
int lora_rows_add(const LoraGroup* group, void* y, const void* x, const int32_t* row_slots, int64_t rows) {
    try {
        scratch.order.clear();
        scratch.runs.clear();
        bool sorted = true;
        int64_t last = -1;
        for (int64_t i = 0; i < rows; i++) {
            const int64_t slot = row_slots[i];
            if (slot >= group->slots) return 1;
            if (slot < 0) continue;
            sorted = sorted && slot >= last;
            last = slot;
            scratch.order.push_back(i);
        }
        if (!sorted)
            std::stable_sort(scratch.order.begin(), scratch.order.end(),
                             [row_slots](int64_t a, int64_t b) { return row_slots[a] < row_slots[b]; });
        double shrink = 0, expand = 0;
        int64_t u_size = 0, products = 0;
        for (size_t i = 0; i < scratch.order.size();) {
            LoraRun run = {row_slots[scratch.order[i]], int64_t(i), 0, 0, u_size, 0, 0};
            while (i < scratch.order.size() && row_slots[scratch.order[i]] == run.slot) i++, run.count++;
            int64_t expanded = 0;
            for (int member = 0; member < group->members; member++) {
                const int64_t rank = group->ranks[member * group->slots + run.slot];
                run.ranks += rank;
                expanded += rank * (group->columns[member + 1] - group->columns[member]);
            }
            if (run.ranks == 0) continue;
            run.shrink_to = shrink += double(run.ranks) * row_work(run.count);
            run.expand_to = expand += double(expanded) * row_work(run.count);
            u_size += run.ranks * run.count;
            products += (run.ranks * group->in_features + expanded) * run.count;
            scratch.runs.push_back(run);
        }
        if (scratch.runs.empty()) return 0;
        if (int64_t(scratch.u.size()) < u_size) scratch.u.resize(size_t(u_size));
        const LoraJob job = {group, y, x, scratch.order.data(), scratch.runs.data(), int64_t(scratch.runs.size()),
                             scratch.u.data(), products < kSmallWork ? 1 : omp_get_max_threads()};
        kChoice.run(&job);
        return 0;
    } catch (const std::bad_alloc&) {
        return 2;
    }
}
}
