// Arguments of the base model's CPU kernels, shared by the entry points and the variants per instruction set.
#pragma once
#include <cstdint>

extern "C" {

// y = x W^T + b. A panel holds the weights of 2 * lanes neighbouring outputs as [in][2 * lanes], so that one read of a
// row of it multiplies one input for all of them (as in packed GEMM); the last panel is padded with zeros. In a panel of
// bfloat16, one 32-bit lane holds output j in its low half and output j + lanes in its high half.
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
    const int32_t* lengths;     // [rows] tokens attended to, the row's own included
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides in elements
    int64_t rows, heads, kv_heads, head_dim, width, block_size;
    int64_t window;             // how many of the last tokens are attended to; 0: all
    float scale, softcap;       // softcap 0: none
    int32_t bfloat16;
};

// y = x / rms(x) * weight, row by row. `weight` is float32 and includes any constant that the model adds to it.
struct BaseNorm {
    const float* weight;  // [width]
    int64_t width;
    float epsilon;
    int32_t bfloat16;     // elements of x and y
    int32_t round_first;  // rounds to bfloat16 before the weight is multiplied too, not only after
};

// y = act(gate) * up, where each row of x is gate followed by up.
struct BaseGate {
    int64_t width;  // of gate; x: [rows][2 * width], y: [rows][width]
    int32_t bfloat16;
    int32_t activation;  // 0 SiLU, 1 GELU by tanh
};

// Rotary embedding of some of a row's heads, in place.
struct StepRotaryEmbedding {
    int64_t vectors, head_dim;
    int32_t table;     // index into StepProgram's rotary_tables
    int32_t bfloat16;  // elements of the vectors, cosines and sines: 1 bfloat16, 0 float32
};
// Cosines and sines at the positions of the step's rows.
struct StepRotaryTable {
    const void *cos, *sin;  // [rows][width]
    int64_t width;          // elements of a vector that are rotated; the rest is unchanged
};

// to += factor * from
struct StepAdd {
    int64_t width;
    float factor;
    int32_t bfloat16;
};

// Memory to prefetch into the thread's L2 cache while a linear layer computes.
struct StepPrefetch {
    const char* const* begins;
    const char* const* ends;
    int64_t count;
    int64_t bytes;  // of all regions together
};

constexpr int64_t kTile = 48;  // rows multiplied with a panel at a time; their inputs stay in the L2 cache

// Each function but `pack` and `linear` computes the share of thread `me` of `of`; no sum depends on the number of threads.
struct BaseVariant {
    const char* isa;
    int64_t lanes;
    // float32 [out][in] -> panels [begin, end); `panels` has base_step_panel_bytes bytes
    void (*pack)(const BaseLinear*, const float* weight, void* panels, int64_t begin, int64_t end);
    // Panels [begin, end). scratch: the thread's own, base_step_linear_scratch floats; `kept`: it still holds these rows
    // (at most kTile) from the previous call.
    void (*linear)(const BaseLinear*, const void* x, void* y, int64_t rows, float* scratch, const StepPrefetch*,
                   int64_t begin, int64_t end, bool kept);
    // scratch: the thread's own, base_step_decode_scratch floats
    void (*decode)(const BaseDecode*, float* scratch, int me, int of);
    void (*norm)(const BaseNorm*, const void* x, void* y, int64_t rows, int me, int of);
    void (*gate)(const BaseGate*, const void* x, void* y, int64_t rows, int me, int of);
    void (*rotate)(const StepRotaryEmbedding*, void* x, int64_t x_row, const StepRotaryTable*, int64_t rows, int me, int of);
    void (*add)(const StepAdd*, void* to, const void* from, int64_t rows, int me, int of);
};

inline int64_t panels_of(const BaseLinear* l, const BaseVariant* v) {
    return (l->out_features + 2 * v->lanes - 1) / (2 * v->lanes);
}

extern const BaseVariant* base_step_variant;  // null: there is none for this processor
int64_t base_step_linear_scratch(const BaseLinear*, int64_t rows);
int64_t base_step_decode_scratch(const BaseDecode*);
}
