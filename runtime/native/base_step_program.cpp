// Runs a decode step's list of calls (step_program.h) in one parallel region. The threads meet after each call by a
// counter that they watch: a region or a lock of its own for each call would cost more than many of the calls. The
// kernels are the same as those called one by one, and no sum depends on the number of threads: so no number changes.
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

class Meeting {
  public:
    explicit Meeting(int of) : of_(of) {}
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
                sched_yield();  // somebody else has the other's core
    }

  private:
    static constexpr int kSpins = 20000;
    const int of_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> round_{0};
};

void meet(void* meeting) { ((Meeting*)meeting)->wait(); }

// What one step needs beside its buffers; allocated before any thread starts.
struct Step {
    const StepProgram* p;
    std::vector<int64_t> order;
    std::vector<LoraRun> runs;  // [of][rows]: each thread fills in the ranks of a group by itself
    LoraRows rows;
    std::vector<const char*> pieces;  // [of][begins, ends][rows * (members + 1)]
    int64_t most_pieces = 0;
    std::vector<float> scratch;
    int64_t each = 0;  // floats of scratch per thread
};

thread_local Step step;

int prepare(const StepProgram* p, int of) {
    step.p = p;
    step.each = 0;
    int64_t members = 0;
    for (const StepOp* op = p->ops; op < p->ops + p->count; op++) {
        int64_t need = 0;
        if (op->kind == kLinear) need = base_step_linear_scratch((const BaseLinear*)op->what, p->rows);
        if (op->kind == kAttend) {
            BaseDecode job = *(const BaseDecode*)op->what;
            job.rows = p->rows, job.lengths = p->lengths;
            need = base_step_decode_scratch(&job);
        }
        step.each = need > step.each ? need : step.each;
        if (op->kind == kLora && ((const LoraGroup*)op->what)->members > members)
            members = ((const LoraGroup*)op->what)->members;
    }
    step.each = (step.each + 15) / 16 * 16;
    if (int64_t(step.scratch.size()) < step.each * of) step.scratch.resize(size_t(step.each * of));
    step.rows.num_runs = 0;
    if (!p->row_slots) return 0;
    if (int64_t(step.runs.size()) < p->rows * of) step.order.resize(size_t(p->rows)), step.runs.resize(size_t(p->rows * of));
    step.most_pieces = p->rows * (members + 1);
    if (int64_t(step.pieces.size()) < 2 * of * step.most_pieces) step.pieces.resize(size_t(2 * of * step.most_pieces));
    step.rows.order = step.order.data(), step.rows.runs = step.runs.data();
    const int failed = p->lora->sort(p->row_slots, p->rows, p->slots, &step.rows);
    for (int thread = 1; thread < of; thread++)
        for (int64_t i = 0; i < step.rows.num_runs; i++) step.runs[size_t(thread * p->rows + i)] = step.runs[size_t(i)];
    return failed;
}

// One thread's way through the program.
class Worker {
  public:
    Worker(const Step& of_all, Meeting* meeting, int me, int of)
        : step_(of_all), p_(of_all.p), meeting_(meeting), me_(me), of_(of) {
        scratch_ = const_cast<float*>(step_.scratch.data()) + me * step_.each;
        runs_ = const_cast<LoraRun*>(step_.runs.data()) + me * p_->rows;
        begins_ = const_cast<const char**>(step_.pieces.data()) + 2 * me * step_.most_pieces;
    }

    void run() {
        const bool timed = me_ == 0 && p_->spent_ns;
        int64_t last = timed ? now_ns() : 0;
        for (const StepOp* op = p_->ops; op < p_->ops + p_->count; op++) {
            one(*op);
            // a layer's LoRA reads what the layer read, and meets the others itself before it adds to its output
            if (!(op->kind == kLinear && op + 1 < p_->ops + p_->count && op[1].kind == kLora)) meeting_->wait();
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
            case kTurn: {
                const StepTurn* t = (const StepTurn*)op.what;
                return v->turn(t, op.out, op.in_row, p_->cosines + t->cosines, p_->rows, me_, of_);
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

    // While a layer computes, the weights of its LoRA come in from memory: the one is bound by the other's idle part.
    void linear(const StepOp& op) {
        const StepOp* next = &op + 1;
        StepAhead soon = {begins_, begins_ + step_.most_pieces, 0, 0};
        if (next < p_->ops + p_->count && next->kind == kLora && step_.rows.num_runs) {
            const LoraGroup* group = (const LoraGroup*)next->what;
            p_->lora->size(group, runs_, step_.rows.num_runs);
            soon.count = p_->lora->weights(group, runs_, step_.rows.num_runs, begins_, begins_ + step_.most_pieces);
            for (int64_t i = 0; i < soon.count; i++) soon.bytes += soon.ends[i] - soon.begins[i];
            if (soon.bytes > p_->most_ahead) soon.bytes = 0;
        }
        base_step_variant->linear((const BaseLinear*)op.what, op.in, op.out, p_->rows, scratch_, &soon, me_, of_);
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
        const LoraGroup* group = (const LoraGroup*)op.what;
        const int64_t count = step_.rows.num_runs;
        if (!count || !p_->lora->size(group, runs_, count)) return;
        const LoraJob job = {group, op.out, op.in, step_.order.data(), runs_, count, p_->u, me_, of_, meet, meeting_};
        p_->lora->share(&job);
    }

    const Step& step_;
    const StepProgram* p_;
    Meeting* meeting_;
    int me_, of_;
    float* scratch_;
    LoraRun* runs_;
    const char** begins_;
};

}  // namespace

// 0, 1 for a slot that does not exist, 2 where memory ran out; nothing was computed then.
extern "C" int base_step_run(const StepProgram* p) {
    const int most = omp_get_max_threads();
    try {
        if (const int failed = prepare(p, most)) return failed;
    } catch (const std::bad_alloc&) {
        return 2;
    }
    const Step& prepared = step;
    if (most == 1) {
        Meeting alone(1);
        return Worker(prepared, &alone, 0, 1).run(), 0;
    }
    Meeting* meeting = nullptr;
    alignas(64) unsigned char place[sizeof(Meeting)];
#pragma omp parallel num_threads(most)
    {
#pragma omp single
        meeting = new (place) Meeting(omp_get_num_threads());
        Worker(prepared, meeting, omp_get_thread_num(), omp_get_num_threads()).run();
    }
    return 0;
}
