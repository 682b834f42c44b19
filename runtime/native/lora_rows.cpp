// The entry points of the LoRA row kernel: sort a step's rows by slot, divide the work, and call the chosen variant.
#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include <omp.h>

#include "lora_rows.h"

extern "C" {
extern const LoraVariant lora_rows_baseline;
#if defined(__x86_64__)
extern const LoraVariant lora_rows_avx2, lora_rows_avx512;
#endif
}

namespace {

struct Choice {
    const LoraVariant* variant;
    const char* name;
};

// The variant for `most` (auto, baseline, avx2 or avx512); a null one where the processor does not have it.
Choice choice_for(const char* most) {
    const bool any = !strcmp(most, "auto");
#if defined(__x86_64__)
    __builtin_cpu_init();
    if ((any || !strcmp(most, "avx512")) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return {&lora_rows_avx512, "avx512"};
    if ((any || !strcmp(most, "avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return {&lora_rows_avx2, "avx2"};
#endif
    if (any || !strcmp(most, "baseline")) return {&lora_rows_baseline, "baseline"};
    return {nullptr, nullptr};
}

Choice chosen = choice_for("auto");
constexpr int64_t kSmallWork = 32768;  // multiplications below which waking other threads costs more than it saves

struct Scratch {
    std::vector<int64_t> order;
    std::vector<LoraRun> runs;
    std::vector<float> u, wide;
    std::vector<LoraSlice> slices;  // [threads][lora_most_slices]
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

int64_t slices_of(const LoraGroup* group, const LoraRun* runs, int64_t num_runs, int me, int of, LoraSlice* slices) {
    const int64_t size = group->bfloat16 ? 2 : 4, row = group->in_features * size;
    const int64_t most = kSliceBytes / row / kRankBlock > 0 ? kSliceBytes / row / kRankBlock * kRankBlock : kRankBlock;
    const double all = runs[num_runs - 1].shrink_to, from = all * me / of, until = all * (me + 1) / of;
    int64_t count = 0;
    for (int64_t number = 0; number < num_runs; number++) {
        const LoraRun& run = runs[number];
        if (run.ranks == 0) continue;
        const double mine = double(run.ranks) * row_work(run.count);
        const int64_t begin = lora_part(from, run.shrink_to, mine, run.ranks, kRankBlock);
        const int64_t end = me + 1 == of ? run.ranks : lora_part(until, run.shrink_to, mine, run.ranks, kRankBlock);
        const char* a = (const char*)group->memory + group->a_at[run.slot] * size;
        for (int64_t k = begin; k < end; k += most) {
            const int64_t stop = k + most < end ? k + most : end;
            slices[count++] = {number, k, stop, a + k * row, a + stop * row};
        }
    }
    return count;
}

int64_t expanded_of(const LoraGroup* group, const LoraRun* runs, int64_t num_runs, const char** begins,
                    const char** ends) {
    const int64_t size = group->bfloat16 ? 2 : 4;
    int64_t count = 0;
    for (const LoraRun* run = runs; run < runs + num_runs; run++)
        for (int member = 0; member < group->members; member++) {
            const int64_t at = member * group->slots + run->slot;
            if (group->ranks[at] == 0) continue;
            begins[count] = (const char*)group->memory + group->b_at[at] * size;
            ends[count] = begins[count] + group->ranks[at] * (group->columns[member + 1] - group->columns[member]) * size;
            count++;
        }
    return count;
}

}  // namespace

extern "C" {

int lora_rows_version() { return 4; }

// Holds the kernel to an instruction set: auto, baseline, avx2 or avx512. 0 where the processor does not have it, and
// nothing is changed then.
int lora_rows_select(const char* most) {
    const Choice choice = choice_for(most);
    if (!choice.variant) return 0;
    chosen = choice;
    return 1;
}

const char* lora_rows_isa() { return chosen.name; }

// As chosen at the time of the call.
const LoraCalls* lora_rows_calls() {
    static LoraCalls calls;
    calls = {sort_rows, size_runs, slices_of, expanded_of, chosen.variant->shrink, chosen.variant->expand};
    return &calls;
}

// Adds to y in place. row_slots: [rows], in any order; rows of slots below 0 or without ranks are unchanged. Returns 0; 1
// for a slot that does not exist; 2 if memory ran out. y is unchanged in the latter cases.
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
        int64_t ranks = 0, longest = 0;
        for (int64_t i = 0; i < sorted.num_runs; i++) {
            ranks = std::max(ranks, sorted.runs[i].ranks);
            longest = std::max(longest, sorted.runs[i].count);
        }
        const bool widens = group->bfloat16 && longest >= kPromptLeast;
        if (widens) scratch.wide.resize(std::max(scratch.wide.size(), size_t(rows * group->in_features)));
        float* const wide = widens ? scratch.wide.data() : nullptr;
        const int64_t most = lora_most_slices(sorted.num_runs, ranks);
        if (int64_t(scratch.slices.size()) < most * threads) scratch.slices.resize(size_t(most * threads));
        LoraSlice* const slices = scratch.slices.data();
        const LoraJob job = {group, y, x, sorted.order, sorted.runs, sorted.num_runs, scratch.u.data(), 0, 1, wide};
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            LoraJob mine = job;
            mine.me = omp_get_thread_num(), mine.of = omp_get_num_threads();
            if (wide) {
                chosen.variant->widen(&mine, rows, wide);
#pragma omp barrier
            }
            LoraSlice* const own = slices + most * mine.me;
            const int64_t count = slices_of(group, mine.runs, mine.num_runs, mine.me, mine.of, own);
            for (int64_t i = 0; i < count; i++) chosen.variant->shrink(&mine, own + i);
#pragma omp barrier
            chosen.variant->expand(&mine);
        }
        return 0;
    } catch (const std::bad_alloc&) {
        return 2;
    }
}
}
