// Runs a decode step's list of calls (step_program.h) in one parallel region. After each call the threads wait for each
// other at a spinning barrier: a parallel region or a lock per call would cost more than many of the calls. The kernels
// are those that are otherwise called one by one, and no sum depends on the number of threads, so no number changes.
#include <atomic>
#include <new>
#include <vector>

#include <omp.h>
#include <sched.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "step_program.h"

namespace {

int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// A barrier for `of` threads that spins, and yields only after kSpins turns.
class SpinBarrier {
  public:
    explicit SpinBarrier(int of) : of_(of) {}
    void wait() {
        if (of_ == 1) return;
        const int round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == of_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++)
            if (spins < kSpins)
                relax();
            else
                sched_yield();  // another process has a core of ours
    }

  private:
    static constexpr int kSpins = 20000;
    const int of_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> round_{0};
};

// The working memory of one step; allocated before any thread starts.
struct Step {
    const StepProgram* p;
    std::vector<int64_t> order;
    std::vector<LoraRun> runs;  // [of][rows]: each thread has a copy, in which it stores a group's ranks
    LoraRows rows;
    std::vector<const char*> regions;  // [of][begins and ends of all B, begins and ends of the next prefetch][most_regions]
    int64_t most_regions = 0;
    std::vector<LoraSlice> slices;  // [of][most_slices]
    int64_t most_slices = 0;
    std::vector<float> scratch;
    int64_t each = 0;  // floats of scratch per thread
};

thread_local Step step;

template <class T>
void grow(std::vector<T>& vector, int64_t size) {
    if (int64_t(vector.size()) < size) vector.resize(size_t(size));
}

// Sizes the working memory for this step and sorts its rows by slot. Returns 1 for a slot that does not exist.
int prepare(const StepProgram* p, int of) {
    step.p = p;
    step.each = 0;
    int64_t members = 0, ranks = 0;
    for (const StepOp* op = p->ops; op < p->ops + p->count; op++) {
        int64_t need = 0;
        if (op->kind == kLinear) need = base_step_linear_scratch((const BaseLinear*)op->what, p->rows);
        if (op->kind == kAttend) {
            BaseDecode job = *(const BaseDecode*)op->what;
            job.rows = p->rows, job.lengths = p->lengths;
            need = base_step_decode_scratch(&job);
        }
        step.each = need > step.each ? need : step.each;
        if (op->kind == kLora && p->row_slots) {
            const LoraGroup* group = (const LoraGroup*)op->what;
            members = group->members > members ? group->members : members;
            for (int64_t i = 0; i < p->rows; i++) {
                int64_t all = 0;
                for (int m = 0; m < group->members && p->row_slots[i] >= 0; m++)
                    all += group->ranks[m * group->slots + p->row_slots[i]];
                ranks = all > ranks ? all : ranks;
            }
        }
    }
    step.each = (step.each + 15) / 16 * 16;
    grow(step.scratch, step.each * of);
    step.rows.num_runs = 0;
    if (!p->row_slots) return 0;
    grow(step.order, p->rows);  // by itself: with fewer threads than before, more rows need no more runs
    grow(step.runs, p->rows * of);
    step.most_regions = p->rows * members + 1;
    grow(step.regions, 4 * of * step.most_regions);
    step.most_slices = lora_most_slices(p->rows, ranks);
    grow(step.slices, of * step.most_slices);
    step.rows.order = step.order.data(), step.rows.runs = step.runs.data();
    const int failed = p->lora->sort(p->row_slots, p->rows, p->slots, &step.rows);
    for (int thread = 1; thread < of; thread++)
        for (int64_t i = 0; i < step.rows.num_runs; i++) step.runs[size_t(thread * p->rows + i)] = step.runs[size_t(i)];
    return failed;
}

// Runs one thread's share of every call of the program.
class Worker {
  public:
    Worker(const Step& of_all, SpinBarrier* barrier, int me, int of)
        : step_(of_all), p_(of_all.p), barrier_(barrier), me_(me), of_(of) {
        scratch_ = const_cast<float*>(step_.scratch.data()) + me * step_.each;
        runs_ = const_cast<LoraRun*>(step_.runs.data()) + me * p_->rows;
        regions_ = const_cast<const char**>(step_.regions.data()) + 4 * me * step_.most_regions;
        slices_ = const_cast<LoraSlice*>(step_.slices.data()) + me * step_.most_slices;
    }

    void run() {
        const bool timed = me_ == 0 && p_->spent_ns;
        int64_t last = timed ? now_ns() : 0;
        for (const StepOp* op = p_->ops; op < p_->ops + p_->count; op++) {
            one(*op);
            barrier_->wait();
            if (timed) {
                const int64_t now = now_ns();
                p_->spent_ns[op->kind] += now - last, last = now;
            }
        }
    }

  private:
    void one(const StepOp& op) {
        const BaseVariant* v = base_step_variant;
        switch (op.kind) {
            case kNorm: return norm(op);
            case kLinear: return linear(op);
            case kLora: return lora(op);
            case kRotaryEmbedding: {
                const StepRotaryEmbedding* t = (const StepRotaryEmbedding*)op.what;
                return v->rotate(t, op.out, op.in_row, p_->rotary_tables + t->table, p_->rows, me_, of_);
            }
            case kAttend: {
                BaseDecode job = *(const BaseDecode*)op.what;
                job.tables = p_->tables, job.lengths = p_->lengths, job.width = p_->width, job.rows = p_->rows;
                return v->decode(&job, scratch_, me_, of_);
            }
            case kGate: return v->gate((const BaseGate*)op.what, op.in, op.out, p_->rows, me_, of_);
            case kAdd: return v->add((const StepAdd*)op.what, op.out, op.in, p_->rows, me_, of_);
        }
    }

    // A layer of many rows is bound by arithmetic, its LoRA by memory. So LoRA's shrink product is cut into slices, and
    // the layer's panels are computed between them: while some panels are computed, the weights of the next slice are
    // prefetched, and with them a part of what the expand product needs.
    void linear(const StepOp& op) {
        const BaseVariant* v = base_step_variant;
        const BaseLinear* l = (const BaseLinear*)op.what;
        const int64_t panels = panels_of(l, v), begin = panels * me_ / of_, end = panels * (me_ + 1) / of_;
        const StepOp* next = &op + 1;
        int64_t slices = 0;
        LoraJob job = {};
        lora_ = false;
        if (next < p_->ops + p_->count && next->kind == kLora && step_.rows.num_runs) {
            job = lora_job(*next);
            lora_ = p_->lora->size(job.group, runs_, job.num_runs) > 0;
            if (lora_) slices = p_->lora->slices(job.group, runs_, job.num_runs, me_, of_, slices_);
        }
        const StepPrefetch later = lora_ ? expanded(job.group) : StepPrefetch{};
        for (int64_t i = 0; i <= slices; i++) {
            const int64_t from = begin + (end - begin) * i / (slices + 1), to = begin + (end - begin) * (i + 1) / (slices + 1);
            const StepPrefetch next_regions = prefetch(i < slices ? slices_ + i : nullptr, later, i, slices + 1);
            if (from < to)
                v->linear(l, op.in, op.out, p_->rows, scratch_, &next_regions, from, to, from > begin && p_->rows <= kTile);
            if (i < slices) p_->lora->shrink(&job, slices_ + i);
        }
    }

    LoraJob lora_job(const StepOp& op) const {
        const int64_t count = step_.rows.num_runs;
        return {(const LoraGroup*)op.what, op.out, op.in, step_.order.data(), runs_, count, p_->u, me_, of_, nullptr};
    }

    // The B matrices of the group's runs, unless they are too large to stay in the cache.
    StepPrefetch expanded(const LoraGroup* group) {
        const char **begins = regions_, **ends = regions_ + step_.most_regions;
        StepPrefetch all = {begins, ends, p_->lora->expanded(group, runs_, step_.rows.num_runs, begins, ends), 0};
        for (int64_t i = 0; i < all.count; i++) all.bytes += ends[i] - begins[i];
        if (all.bytes > p_->most_prefetched) all.count = all.bytes = 0;
        return all;
    }

    // The slice's weights, and part `number` of `of` of this thread's share of `later`.
    StepPrefetch prefetch(const LoraSlice* slice, const StepPrefetch& later, int64_t number, int64_t of) {
        const char **begins = regions_ + 2 * step_.most_regions, **ends = begins + step_.most_regions;
        StepPrefetch soon = {begins, ends, 0, 0};
        const auto take = [&](const char* from, const char* to) {
            begins[soon.count] = from, ends[soon.count++] = to, soon.bytes += to - from;
        };
        if (slice) take(slice->from, slice->to);
        const int64_t share = later.bytes * (me_ + 1) / of_ - later.bytes * me_ / of_, first = later.bytes * me_ / of_;
        const int64_t from = first + share * number / of, to = first + share * (number + 1) / of;
        for (int64_t i = 0, passed = 0; i < later.count && passed < to; passed += later.ends[i] - later.begins[i], i++) {
            const int64_t size = later.ends[i] - later.begins[i];
            const int64_t low = from > passed ? from - passed : 0, high = to - passed < size ? to - passed : size;
            if (low < high) take(later.begins[i] + low, later.begins[i] + high);
        }
        return soon;
    }

    void norm(const StepOp& op) {
        const BaseNorm* n = (const BaseNorm*)op.what;
        const int64_t row_bytes = op.parts * n->width * (n->bfloat16 ? 2 : 4);
        if (op.in_row == row_bytes)
            return base_step_variant->norm(n, op.in, op.out, p_->rows * op.parts, me_, of_);
        for (int64_t r = p_->rows * me_ / of_; r < p_->rows * (me_ + 1) / of_; r++)
            base_step_variant->norm(n, (const char*)op.in + r * op.in_row, (char*)op.out + r * row_bytes, op.parts, 0, 1);
    }

    void lora(const StepOp& op) {
        if (!lora_) return;
        const LoraJob job = lora_job(op);
        p_->lora->expand(&job);
    }

    const Step& step_;
    const StepProgram* p_;
    SpinBarrier* barrier_;
    int me_, of_;
    float* scratch_;
    LoraRun* runs_;
    const char** regions_;
    LoraSlice* slices_;
    bool lora_ = false;  // the previous linear layer has adapters in this step
};

}  // namespace

// Returns 0; 1 for a slot that does not exist; 2 if memory ran out. Nothing was computed in the latter cases.
extern "C" int base_step_run(const StepProgram* p) {
    const int most = omp_get_max_threads();
    try {
        if (const int failed = prepare(p, most)) return failed;
    } catch (const std::bad_alloc&) {
        return 2;
    }
    const Step& prepared = step;
    if (most == 1) {
        SpinBarrier alone(1);
        return Worker(prepared, &alone, 0, 1).run(), 0;
    }
    SpinBarrier* barrier = nullptr;
    alignas(64) unsigned char place[sizeof(SpinBarrier)];
#pragma omp parallel num_threads(most)
    {
#pragma omp single
        barrier = new (place) SpinBarrier(omp_get_num_threads());
        Worker(prepared, barrier, omp_get_thread_num(), omp_get_num_threads()).run();
    }
    return 0;
}
