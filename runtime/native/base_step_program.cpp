// Runs a decode step's list of calls (step_program.h): the same entry points as for one call, one after the other, so
// nothing but the host language's time between them is saved and every number stays the same.
#include <time.h>

#include "step_program.h"

extern "C" {
int base_step_linear(const BaseLinear*, const void* x, void* y, int64_t rows);
int base_step_decode(const BaseDecode*);
void base_step_norm(const BaseNorm*, const void* x, void* y, int64_t rows);
void base_step_gate(const BaseGate*, const void* x, void* y, int64_t rows);
extern const BaseVariant* const base_step_variant;
}

namespace {

int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

void norm(const StepOp& op, int64_t rows) {
    const BaseNorm* n = (const BaseNorm*)op.what;
    const int64_t row_bytes = op.parts * n->width * (n->bfloat16 ? 2 : 4);
    if (op.in_row == row_bytes) return base_step_norm(n, op.in, op.out, rows * op.parts);
    for (int64_t r = 0; r < rows; r++)
        base_step_norm(n, (const char*)op.in + r * op.in_row, (char*)op.out + r * row_bytes, op.parts);
}

int attend(const StepProgram* p, const StepOp& op) {
    BaseDecode job = *(const BaseDecode*)op.what;
    job.tables = p->tables, job.lengths = p->lengths, job.width = p->width, job.rows = p->rows;
    return base_step_decode(&job);
}

int run(const StepProgram* p, const StepOp& op) {
    switch (op.kind) {
        case kNorm: return norm(op, p->rows), 0;
        case kLinear: return base_step_linear((const BaseLinear*)op.what, op.in, op.out, p->rows);
        case kLora: return p->row_slots ? p->lora(op.what, op.out, op.in, p->row_slots, p->rows) : 0;
        case kTurn: {
            const StepTurn* t = (const StepTurn*)op.what;
            return base_step_variant->turn(t, op.out, op.in_row, p->cosines + t->cosines, p->rows), 0;
        }
        case kAttend: return attend(p, op);
        case kGate: return base_step_gate((const BaseGate*)op.what, op.in, op.out, p->rows), 0;
        case kAdd: return base_step_variant->add((const StepAdd*)op.what, op.out, op.in, p->rows), 0;
    }
    return 3;
}

}  // namespace

// 0, or what the first call that failed returned (its kind in the higher bits); what follows it was not run.
extern "C" int base_step_run(const StepProgram* p) {
    int64_t last = p->spent_ns ? now_ns() : 0;
    for (const StepOp* op = p->ops; op < p->ops + p->count; op++) {
        if (const int failed = run(p, *op)) return failed | op->kind << 8;
        if (p->spent_ns) {
            const int64_t now = now_ns();
            p->spent_ns[op->kind] += now - last, last = now;
        }
    }
    return 0;
}
