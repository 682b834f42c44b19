// A whole decode step as a list of kernel calls over buffers at fixed addresses.
#pragma once
#include "base_step.h"
#include "lora_rows.h"

extern "C" {

enum StepKind { kNorm, kLinear, kLora, kRotaryEmbedding, kAttend, kGate, kAdd, kStepKinds };

struct StepOp {
    int32_t kind;
    int32_t parts;     // norm: vectors per row
    const void* what;  // BaseNorm, BaseLinear, LoraGroup, StepRotaryEmbedding, BaseDecode, BaseGate, StepAdd
    const void* in;
    void* out;         // rotary embedding: rotated in place, `in` is not used
    int64_t in_row;    // from one row to the next: bytes (norm) or elements (rotary embedding)
};

struct StepProgram {
    const StepOp* ops;
    int64_t count;
    int64_t rows;
    const int32_t* tables;   // [rows][width] block numbers
    const int32_t* lengths;  // [rows], each row's new token included
    int64_t width;
    const StepRotaryTable* rotary_tables;
    const int32_t* row_slots;  // [rows]; null: no row has an adapter
    int64_t slots;             // number of slots
    const LoraCalls* lora;
    float* u;           // [rows][ranks of all members of any group]
    int64_t most_prefetched;  // the B matrices of a group that takes more bytes are not prefetched
    int64_t* spent_ns;  // [kStepKinds], added to; null: not timed
};
}
