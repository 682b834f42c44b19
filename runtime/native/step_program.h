// A whole decode step as a list of calls of the kernels, over buffers that stay where they are.
#pragma once
#include "base_step.h"
#include "lora_rows.h"

extern "C" {

enum StepKind { kNorm, kLinear, kLora, kTurn, kAttend, kGate, kAdd, kStepKinds };

struct StepOp {
    int32_t kind;
    int32_t parts;     // norm: vectors per row
    const void* what;  // BaseNorm, BaseLinear, LoraGroup, StepTurn, BaseDecode, BaseGate, StepAdd
    const void* in;
    void* out;         // turn: what is turned in place
    int64_t in_row;    // bytes (norm) or elements (turn) from one row to the next
};

struct StepProgram {
    const StepOp* ops;
    int64_t count;
    int64_t rows;
    const int32_t* tables;   // [rows][width] block numbers
    const int32_t* lengths;  // [rows], each row's new token included
    int64_t width;
    const StepCosines* cosines;
    const int32_t* row_slots;  // [rows]; null: no row has an adapter
    int64_t slots;             // how many there are
    const LoraCalls* lora;
    float* u;           // [rows][ranks of all members of any group]
    int64_t most_ahead;  // a group whose B matrices take more bytes has none of them fetched ahead
    int64_t* spent_ns;  // [kStepKinds] added to; null: not timed
};
}
