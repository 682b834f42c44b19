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

int sort_rows(const int32_t* row_slots, int64_t count, int64_t slots, LoraRows* rows) {
    int64_t taken = 0, last = -1;
    bool sorted = true;
    for (int64_t i = 0; i < count; i++) {
        const int64_t slot = row_slots[i];
        if (slot >= slots) return 1;
        if (slot < 0) continue;
        sorted = sorted && slot >= last;
        last = slot;
        rows->order[taken++] = i;
    }
    if (!sorted)
        std::stable_sort(rows->order, rows->order + taken,
                         [row_slots](int64_t a, int64_t b) { return row_slots[a] < row_slots[b]; });
    rows->num_runs = 0;
    for (int64_t i = 0; i < taken;) {
        LoraRun run = {row_slots[rows->order[i]], i, 0, 0, 0, 0, 0};
        while (i < taken && row_slots[rows->order[i]] == run.slot) i++, run.count++;
        rows->runs[rows->num_runs++] = run;
    }
    return 0;
}

int64_t size_runs(const LoraGroup* group, LoraRun* runs, int64_t num_runs) {
    double shrink = 0, expand = 0;
    int64_t u_size = 0, products = 0;
    for (LoraRun* run = runs; run < runs + num_runs; run++) {
        int64_t expanded = 0;
        run->ranks = 0;
        for (int member = 0; member < group->members; member++) {
            const int64_t rank = group->ranks[member * group->slots + run->slot];
            run->ranks += rank;
            expanded += rank * (group->columns[member + 1] - group->columns[member]);
        }
        run->u_at = u_size;
        run->shrink_to = shrink += double(run->ranks) * row_work(run->count);
        run->expand_to = expand += double(expanded) * row_work(run->count);
        u_size += run->ranks * run->count;
        products += (run->ranks * group->in_features + expanded) * run->count;
    }
    return products;
}

int64_t weights_of(const LoraGroup* group, const LoraRun* runs, int64_t num_runs, const char** begins,
                   const char** ends) {
    const int64_t size = group->bfloat16 ? 2 : 4;
    const char* const memory = (const char*)group->memory;
    int64_t pieces = 0;
    for (const LoraRun* run = runs; run < runs + num_runs; run++) {
        if (run->ranks == 0) continue;
        begins[pieces] = memory + group->a_at[run->slot] * size;
        ends[pieces] = begins[pieces] + run->ranks * group->in_features * size;
        pieces++;
        for (int member = 0; member < group->members; member++) {
            const int64_t at = member * group->slots + run->slot;
            if (group->ranks[at] == 0) continue;
            begins[pieces] = memory + group->b_at[at] * size;
            ends[pieces] = begins[pieces] + group->ranks[at] * (group->columns[member + 1] - group->columns[member]) * size;
            pieces++;
        }
    }
    return pieces;
}

void meet_in_region(void*) {
#pragma omp barrier
}

}  // namespace

extern "C" {

int lora_rows_version() { return 2; }

const char* lora_rows_isa() { return kChoice.name; }

const LoraCalls* lora_rows_calls() {
    static const LoraCalls calls = {sort_rows, size_runs, weights_of, kChoice.run};
    return &calls;
}

// Adds to y in place. row_slots: [rows], in any order; slots below 0 or without ranks are left alone. Returns 0, or 1
// for a slot that does not exist, 2 where memory ran out; y is untouched then.
int lora_rows_add(const LoraGroup* group, void* y, const void* x, const int32_t* row_slots, int64_t rows) {
    try {
        if (int64_t(scratch.order.size()) < rows) scratch.order.resize(size_t(rows)), scratch.runs.resize(size_t(rows));
        LoraRows sorted = {scratch.order.data(), scratch.runs.data(), 0};
        if (sort_rows(row_slots, rows, group->slots, &sorted)) return 1;
        const int64_t products = size_runs(group, sorted.runs, sorted.num_runs);
        if (products == 0) return 0;
        const LoraRun& last = sorted.runs[sorted.num_runs - 1];
        const int64_t u_size = last.u_at + last.ranks * last.count;
        if (int64_t(scratch.u.size()) < u_size) scratch.u.resize(size_t(u_size));
        const int threads = products < kSmallWork ? 1 : omp_get_max_threads();
        const LoraJob job = {group, y, x, sorted.order, sorted.runs, sorted.num_runs, scratch.u.data(), 0, 1,
                             meet_in_region, nullptr};
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            LoraJob mine = job;
            mine.me = omp_get_thread_num(), mine.of = omp_get_num_threads();
            kChoice.run(&mine);
        }
        return 0;
    } catch (const std::bad_alloc&) {
        return 2;
    }
}
}
