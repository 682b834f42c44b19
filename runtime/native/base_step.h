// What the base's own kernels for CPU are asked: shared by the entry point and its variants per instruction set.
#pragma once
#include <cstdint>

extern "C" {

// y = x W^T + b. The weight lies in panels of `2 * lanes` outputs (zeros behind the last), each [in][2 * lanes]; of
// bfloat16 weights one 32-bit lane holds output j in its low half and output j + lanes in its high half.
struct BaseLinear {
    const void* panels;
    const float* bias;  // [out] or null
    int64_t in_features, out_features;
    int32_t bfloat16_panels;
    int32_t bfloat16_rows;  // elements of x and y: 1 bfloat16, 0 float32
};

// One token per row attends to its own request's paged keys and values, the token's own (k, v) written there first.
struct BaseDecode {
    const void *q, *k, *v;      // [rows][heads or kv_heads][head_dim] by the strides below, head_dim contiguous
    void* out;                  // [rows][heads][head_dim]
    void *keys, *values;        // one layer: [blocks][block_size][kv_heads][head_dim]
    const int32_t* tables;      // [rows][width] block numbers
    const int32_t* lengths;     // [rows] tokens to see, the row's own included
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides in elements
    int64_t rows, heads, kv_heads, head_dim, width, block_size;
    int64_t window;             // tokens seen at most; 0: all
    float scale, softcap;       // softcap 0: none
    int32_t bfloat16;
};

// y = x / rms(x) * weight, row by row. `weight` is float32 and holds whatever the model adds to its own.
struct BaseNorm {
    const float* weight;  // [width]
    int64_t width;
    float epsilon;
    int32_t bfloat16;     // elements of x and y
    int32_t round_first;  // to bfloat16 before the weight is multiplied, not only after
};

// y = act(gate) * up, where x holds gate and up side by side.
struct BaseGate {
    int64_t width;  // of gate; x: [rows][2 * width], y: [rows][width]
    int32_t bfloat16;
    int32_t activation;  // 0 SiLU, 1 GELU by tanh
};

// Rotary embeddings over some of a row's vectors; the cosines and sines are those of the step's positions.
struct StepTurn {
    int64_t vectors, head_dim;
    int32_t cosines;   // which of the step's
    int32_t bfloat16;  // elements of the vectors, cosines and sines
};
struct StepCosines {
    const void *cos, *sin;  // [rows][turned]
    int64_t turned;         // elements of a vector; those behind stay as they are
};

// to += factor * from
struct StepAdd {
    int64_t width;
    float factor;
    int32_t bfloat16;
};

// Memory that is needed soon: fetched into the thread's second cache while a linear layer computes.
struct StepAhead {
    const char* const* begins;
    const char* const* ends;
    int64_t count;
    int64_t bytes;  // of all
};

constexpr int64_t kTile = 48;  // rows that pass over a panel while their inputs stay in the second cache

// Each function but `pack` and `linear` computes the share of thread `me` of `of`; no sum depends on how many there are.
struct BaseVariant {
    const char* isa;
    int64_t lanes;
    // float32 [out][in] -> panels [begin, end) of them; `panels` holds base_step_panel_bytes
    void (*pack)(const BaseLinear*, const float* weight, void* panels, int64_t begin, int64_t end);
    // Panels [begin, end). scratch: the thread's own, base_step_linear_scratch floats; `kept`: it still holds these rows
    // (no more than kTile) from the last call.
    void (*linear)(const BaseLinear*, const void* x, void* y, int64_t rows, float* scratch, const StepAhead*,
                   int64_t begin, int64_t end, bool kept);
    // scratch: the thread's own, base_step_decode_scratch floats
    void (*decode)(const BaseDecode*, float* scratch, int me, int of);
    void (*norm)(const BaseNorm*, const void* x, void* y, int64_t rows, int me, int of);
    void (*gate)(const BaseGate*, const void* x, void* y, int64_t rows, int me, int of);
    void (*turn)(const StepTurn*, void* x, int64_t x_row, const StepCosines*, int64_t rows, int me, int of);
    void (*add)(const StepAdd*, void* to, const void* from, int64_t rows, int me, int of);
};

inline int64_t panels_of(const BaseLinear* l, const BaseVariant* v) {
    return (l->out_features + 2 * v->lanes - 1) / (2 * v->lanes);
}

extern const BaseVariant* base_step_variant;  // null: none for this processor
int64_t base_step_linear_scratch(const BaseLinear*, int64_t rows);
int64_t base_step_decode_scratch(const BaseDecode*);
}
