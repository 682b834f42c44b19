// Arguments of the LoRA row kernel and the division of one call, shared by the entry point and the variants.
#pragma once
#include <cstdint>

extern "C" {

// One group of linears with a common input (lorapool_runtime.engines.torch.lora.slots.GroupSlab). Tables are [members][slots].
struct LoraGroup {
    const void* memory;      // elements of all slots
    const int32_t* ranks;    // 0: nothing to add
    const int64_t* a_at;     // element offset of A [rank][in]; the A of all members follow each other without a gap
    const int64_t* b_at;     // element offset of B [rank][out of the member]
    const int64_t* columns;  // [members + 1]: the member's columns of y
    int64_t slots;
    int64_t in_features;
    int32_t members;
    int32_t bfloat16;  // elements of memory, x and y: 1 bfloat16, 0 float32
};

// The rows of one slot: order[first .. first + count) are their indices in x and y.
struct LoraRun {
    int64_t slot, first, count;
    int64_t ranks;     // of all members together
    int64_t u_at;      // offset of its shrink products [count][ranks] in u
    double shrink_to;  // work up to and including this run, for splitting among threads
    double expand_to;
};

// The rows of a step, sorted by slot: the same for all groups, except a run's ranks and what is derived from them.
struct LoraRows {
    int64_t* order;  // [rows]
    LoraRun* runs;   // [rows]
    int64_t num_runs;
};

// A part of one run's shrink product.
struct LoraSlice {
    int64_t run, begin, end;  // ranks
    const char *from, *to;    // their weights
};

struct LoraJob {
    const LoraGroup* group;
    void* y;        // [rows][columns[members]], added to in place
    const void* x;  // [rows][in]
    const int64_t* order;
    const LoraRun* runs;
    int64_t num_runs;
    float* u;
    int me, of;  // index of the thread, and number of threads
    const float* wide;  // x widened to float32, for prompts in bfloat16; else null
};

struct LoraVariant {
    void (*widen)(const LoraJob*, int64_t rows, float* wide);
    void (*shrink)(const LoraJob*, const LoraSlice*);
    void (*expand)(const LoraJob*);
};

// For a caller that has threads of its own.
struct LoraCalls {
    // Fills `rows`, whose memory belongs to the caller. Returns 0, or 1 for a slot that does not exist.
    int (*sort)(const int32_t* row_slots, int64_t count, int64_t slots, LoraRows* rows);
    // Stores the group's ranks in the runs [num_runs]. Returns the number of multiplications.
    int64_t (*size)(const LoraGroup* group, LoraRun* runs, int64_t num_runs);
    // Cuts thread `me`'s part of the shrink products into slices of kSliceBytes of weights. Returns their number, at most
    // lora_most_slices.
    int64_t (*slices)(const LoraGroup* group, const LoraRun* runs, int64_t num_runs, int me, int of, LoraSlice* slices);
    // Stores the memory regions of the runs' B matrices [num_runs * members]. Returns their number.
    int64_t (*expanded)(const LoraGroup* group, const LoraRun* runs, int64_t num_runs, const char** begins,
                        const char** ends);
    void (*shrink)(const LoraJob* job, const LoraSlice* slice);
    // The share of thread job->me, after all slices of all threads; adds to y.
    void (*expand)(const LoraJob* job);
};
}

// Cost of reading weights relative to multiplying one row with them; it only divides the work among threads.
constexpr double kReadCost = 4.0;
constexpr int64_t kRankBlock = 4;     // rows of A taken together: one read of x for four products
constexpr int64_t kColumnBlock = 64;  // columns of B that one thread computes together: whole cache lines

constexpr int64_t kPromptLeast = 8;   // rows of one slot that count as a prompt's

constexpr int64_t kSliceBytes = 81920;  // of A: a thread's L2 cache holds several slices

inline int64_t lora_most_slices(int64_t runs, int64_t ranks_of_all_members) {
    return runs * (ranks_of_all_members / kRankBlock + 2);
}

// How many of a run's `units` belong to the work before `share`; the run's work is [to - work, to). Whole blocks.
inline int64_t lora_part(double share, double to, double work, int64_t units, int64_t block) {
    if (share >= to) return units;
    if (share <= to - work) return 0;
    const int64_t done = (int64_t((share - (to - work)) / work * double(units)) + block - 1) / block * block;
    return done < units ? done : units;
}

inline double row_work(int64_t count) { return kReadCost + double(count); }
