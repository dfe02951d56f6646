/* C ABI of the MegaContext kernels: plain C99, no Python, no torch.
 *
 * A call takes views of the caller's memory, returns a status and keeps no reference to anything. It reports what is
 * wrong before it writes: a status other than MC_OK from an argument check means that nothing has changed. All sizes,
 * strides and counts are 64-bit; strides are in elements.
 *
 * Threads. Every function may be called from several threads at once. The kernels run on threads that the host lends
 * (mc_set_parallel_runner) or else share one small pool of worker threads, started when the first job is large enough
 * for it and asleep between jobs; a caller that finds the pool in use does its work alone. After fork() the child starts
 * a pool of its own. The library must not be unloaded.
 *
 * Memory. What a function says it takes is freed at its end; of blocks of 64 KB and more a thread keeps up to 32 MB for its
 * next call.
 */
#ifndef MC_KERNELS_H
#define MC_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define MC_API __attribute__((visibility("default")))
#else
#define MC_API
#endif

#define MC_VERSION "0.1.0"
#define MC_MAX_DIMS 5

/* Status codes. */
enum {
    MC_OK = 0,
    MC_INVALID_ARGUMENT = 1, /* a value, shape, stride or index; the text names the argument */
    MC_INVALID_DTYPE = 2,    /* a dtype that the op does not take, or that differs from another argument's */
    MC_UNAVAILABLE = 3,      /* an instruction set that was asked for is unknown or not on this machine */
    MC_OUT_OF_MEMORY = 4,    /* no memory for scratch; nothing was written */
    MC_DEVICE_ERROR = 5      /* the CUDA runtime refused a launch; what was launched before it may have written */
};

/* Dtype codes. */
enum {
    MC_F32 = 0,  /* IEEE binary32 */
    MC_F16 = 1,  /* IEEE binary16 */
    MC_BF16 = 2, /* the upper half of a binary32 */
    MC_I32 = 3,
    MC_I64 = 4,
    MC_F8E4M3 = 5 /* a byte: sign, 4 bits of exponent, 3 of mantissa; no infinities, 0x7f and 0xff are NaN. Of caches only */
};

/* A strided view. Zero-initialised it means "absent" where an argument is optional. */
typedef struct mc_tensor {
    void* data;                  /* address of element [0, ..., 0]; any alignment; not read if a size is 0 */
    int32_t dtype;               /* MC_F32, ... */
    int32_t ndim;                /* dimensions in use; 0: absent */
    int64_t size[MC_MAX_DIMS];   /* size[0] is the outermost dimension; [ndim, MC_MAX_DIMS) is not read */
    int64_t stride[MC_MAX_DIMS]; /* in elements, >= 0 */
} mc_tensor;

/* What the last call of this thread that did not return MC_OK had to say. Valid until this thread's next failure. */
MC_API const char* mc_last_error(void);

/* Version of the library, "major.minor.patch". */
MC_API const char* mc_version(void);

/* Name of the instruction set level in use: "scalar", "avx2" (with FMA and F16C), "avx512" (F, BW, DQ, VL), "avx512bf16"
 * (and VNNI) or "amx" (tiles of bf16, on top of avx512bf16); on a 64-bit Arm "neon", "neondot" (dot products of bytes) or
 * "neonbf16" (and of mixed signs, and of bf16). The best that processor and operating system have, unless the environment
 * variable MC_CPU_ISA or mc_set_cpu_isa names one. "avx512bf16", "amx" and "neonbf16" multiply bf16 matrices and do all
 * else as avx512 and neondot. On Linux the choice asks for the permission to use AMX's tiles, for the whole process.
 * "amx-emulated", amx's code on tiles in plain C++ for tests, is slow, there on every machine and never the choice. NULL,
 * with a text in mc_last_error, if MC_CPU_ISA names a level that is unknown or not there; every kernel then returns
 * MC_UNAVAILABLE. */
MC_API const char* mc_cpu_isa(void);

/* Whether the level called `name` is in this build and can run here: 1 or 0. */
MC_API int32_t mc_cpu_isa_available(const char* name);

/* Use the level called `name` from now on in the whole process; NULL goes back to the choice at start. MC_UNAVAILABLE
 * if it is unknown or not there; the level in use then stays. Meant for tests. */
MC_API int32_t mc_set_cpu_isa(const char* name);

/* Runs task(context, i) once for each i in [0, n_tasks), in any order and on any threads, several at a time; returns
 * when all are done. n_threads: how many threads are worth using, at least 2; fewer, even one, give the same result. It
 * may be called from several threads at once. A task may last as long as the call that it is part of (the layers of a
 * decoder gather their threads once) and wait for another that has begun, never for one that has not. Tasks do not call
 * back and do not throw. */
typedef void (*mc_parallel_runner)(void* host, int64_t n_tasks, int32_t n_threads,
                                   void (*task)(void* context, int64_t i), void* context);

/* The threads of the host, an inference engine or an application, run the kernels from now on in the whole process:
 * `run` is called, with `host`, by every call whose work is large enough for more than one thread. Two pools of threads
 * on the same cores delay each other, most of all where one of them spins. NULL goes back to the library's own pool.
 * A call that is in progress in another thread may use the earlier runner until it returns. A child of fork() has the
 * library's own pool until it sets a runner. MC_OUT_OF_MEMORY: nothing has changed. */
MC_API int32_t mc_set_parallel_runner(mc_parallel_runner run, void* host);

/* Entries of a KV cache are removed, inserted and moved in place, for all layers, sequences and heads in one call:
 *
 *   survivors   k[r,h,dst] <- R(new_positions[dst] - positions[src]) k[r,h,src]    v[r,h,dst] <- v[r,h,src]
 *   inserted    k[r,h,slot_j] <- R(new_positions[slot_j]) k_new[r,h,j] * attention_scaling
 *               v[r,h,slot_j] <- v_new[r,h,j]
 *
 * R(.) rotates pairs of dimensions (RoPE) or, with inv_freq_rows = 0, is nothing. Where a survivor's position does not
 * change its bits are kept. Angles are reduced to a quarter turn in fp64, rotations computed in fp32 and rounded once.
 *
 * Row r = layer * B + b. A plan says what happens in a row; all rows share one, or `rows` names each row's. Only
 * survivors and the inserted entries of a row's own plan are read, only their destinations written. Auxiliary memory:
 * some kilobytes a thread. */
typedef struct mc_kv_splice_args {
    size_t struct_size; /* sizeof(mc_kv_splice_args) */

    /* The cache, written. f32, f16 or bf16, all four tensors the same; the last dimension contiguous; no two indices of
     * one view name the same element. Without rotation elements are moved as they are, whatever they mean: a cache of
     * single bytes goes as one of 16-bit elements with half the dimensions and strides.
     *   table absent:  k, v [L, B, Hkv, S, D]
     *   table given:   k, v [L, P, Hkv, page_size, D], and S below is max_pages * page_size
     * k and v may be interleaved views of one allocation but must share no element; that is the caller's duty and only
     * equal addresses are noticed. */
    mc_tensor k, v;

    /* [R, Hkv, M, D] with R = L * B, keys unrotated. M is at least every plan's number of insertions; entries beyond a
     * plan's own are not read. May share memory with each other, not with k or v. */
    mc_tensor k_new, v_new;

    /* [B, max_pages] i32 or i64, or absent: slot s of sequence b is row s % page_size of page table[b, s / page_size].
     * A page that is written must not be used twice. Entries beyond a sequence's slots are not read. */
    mc_tensor table;

    /* The plans, contiguous arrays. Entry p of `offsets` [n_plans + 1, 5] says where plan p's part begins, entry p + 1
     * where it ends: in segments, stays, insert_slots, positions and new_positions. The last two columns count slots:
     * the lengths of the cache before and after, slots [0, length) being in use. */
    int64_t n_plans;
    const int64_t* offsets;
    const int64_t* rows;     /* [R] plan of each row, -1: left alone. NULL: plan 0 for all (n_plans = 1) */
    const int64_t* segments; /* [n, 3] (source slot, destination slot, count) of the survivors that move, in an order
                                in which they can be executed one after the other, each with memmove's semantics:
                                those that move left ascending, then those that move right descending */
    const int64_t* stays;    /* [n, 3] (slot, slot, count) of those that keep their slot; read with rotation only */
    const int64_t* insert_slots; /* [sum of M_p] slot of each inserted entry */

    /* Positions by slot; both or neither (of an empty one the address may be NULL). NULL: an entry's position is its
     * slot. Not read without rotation. */
    const int64_t *positions, *new_positions;

    int64_t inv_freq_rows;    /* 0: nothing is rotated; 1: inv_freq is [half]; R: it is [R, half] */
    const double* inv_freq;   /* contiguous, radians per position */
    int64_t half;             /* half of the rotated dimensions, 2 * half <= D; dimensions beyond pass unchanged */
    int32_t interleaved;      /* 0: pairs (b, b + half), as Llama in Hugging Face layout; 1: (2b, 2b + 1), as GPT-J */
    double attention_scaling; /* magnitude of inserted keys (all their dimensions); 1 for most models */
} mc_kv_splice_args;

/* n_threads: at most this many threads, the caller included; 0: OMP_NUM_THREADS, or one a processor. Small jobs run on
 * the caller alone. The result does not depend on it. Empty plans, caches and batches are legal and write nothing. */
MC_API int32_t mc_kv_splice_cpu(const mc_kv_splice_args* args, int32_t n_threads);

/* Attention of T queries a sequence to the slots of a cache, rotary embedding applied to queries and, while they are
 * read, to keys. With g = Hq / Hkv:
 *
 *   logits[b,h,t,s] = scale * <R(q_pos[b,t]) q[b,h,t], damp(sigma[b,s]) R(kv_pos[b,s]) k[b,h/g,s]> + kv_bias[b,s]
 *   visible[b,t,s]  = 0 <= kv_pos[b,s] <= q_pos[b,t]
 *   p = softmax over visible s;  out = p v;  lse = log sum exp of visible logits;  mass[b,s] = sum over h and t of p
 *
 * R(.) rotates the first 2 * half dimensions in pairs (RoPE; the others pass unchanged: partial rotary) and multiplies
 * all of them by attention_scaling; without inv_freq it is nothing. damp multiplies pair i by
 * exp(-(inv_freq[i] sigma)^2 / 2), exactly 1 where sigma is 0 (the expected rotation over positions spread by sigma).
 *
 * A query that sees nothing, or only entries with a bias of -infinity, gives out = 0 and lse = -infinity. Slots that no
 * query of their sequence sees are not read (empty ones have position -1); mass is 0 there. The sum of mass[b] is Hq
 * times the number of b's queries that see something. Sums are fp32, angles reduced in fp64, out is rounded once.
 *
 * Few queries (decoding, insertion) make one pass over k and v. Memory: some kilobytes a thread, 64 * B * Hq * T * D floats
 * at most for partial results, and where mass is wanted B * Hq * T * S floats, 64 MB at most. Many queries (prefill) multiply
 * in tiles with keys and values that are packed before, of as many heads as 32 MB hold, or of one (4 * S * D of q's dtype, of
 * f32 where that is multiplied). Memory: that, some hundred kilobytes a thread, and where mass is wanted a float for each slot
 * and some tens of queries and heads. Tables of phases (two of some thousand positions, from which those of all positions follow)
 * are kept between calls, for the last 4 different inv_freq: usually 1 MB each, 16 MB at most. */
typedef struct mc_context_attention_args {
    size_t struct_size; /* sizeof(mc_context_attention_args) */

    /* q [B, Hq, T, D]; k, v [B, Hkv, S, D], keys unrotated. f32, f16 or bf16, all the same; D >= 1, contiguous; Hkv
     * divides Hq. On a CUDA device k and v may both be MC_F8E4M3, see k_scale. */
    mc_tensor q, k, v;

    const int64_t* q_pos;  /* [B, T] contiguous */
    const int64_t* kv_pos; /* [B, S] contiguous; below 0: an empty slot. Any value up to 2^53 */

    const double* inv_freq;   /* [half] radians per position, or NULL: nothing is rotated (then half = 0) */
    int64_t half;             /* half of the rotated dimensions, 2 * half <= D */
    int32_t interleaved;      /* 0: pairs (i, i + half), as Llama in Hugging Face layout; 1: (2i, 2i + 1), as GPT-J */
    double attention_scaling; /* magnitude of rotated vectors (YaRN); 1 for most models. Not read without inv_freq */

    const float* sigma;   /* [B, S] contiguous, or NULL: nothing is damped. Needs inv_freq */
    const float* kv_bias; /* [B, S] contiguous, or NULL */
    double scale;         /* of the logits; usually D^-1/2 */

    /* Written; apart from each other and from what is read, which is the caller's duty. */
    mc_tensor out; /* [B, Hq, T, D], q's dtype, last dimension contiguous, no element named twice */
    float* lse;    /* [B, Hq, T] contiguous, natural logarithm */
    float* mass;   /* [B, S] contiguous, or NULL: not wanted */

    /* [Hkv] contiguous: an element of k or v of MC_F8E4M3 stands for itself times its head's. NULL, both, with any other
     * dtype. */
    const float *k_scale, *v_scale;
} mc_context_attention_args;

/* Sums are fp32. Where all is bf16 and the instruction set level multiplies bf16, many queries are multiplied so, and on
 * level avx512bf16 (not amx, where fp32 is faster) few queries of heads of 64 or 128 dimensions that turn whole and by halves:
 * turned queries and keys and what the softmax gives an entry are rounded to it (and subnormal numbers taken for zero).
 * n_threads: as for mc_kv_splice_cpu. The result does not depend on it. B, T or S may be 0; with S = 0 all queries see
 * nothing. */
MC_API int32_t mc_context_attention_cpu(const mc_context_attention_args* args, int32_t n_threads);

/* Weights of learned pooling, for L layers, Hkv KV heads, blocks of K entries of D elements and G gists a block. f32,
 * f16 or bf16, all four the same, not necessarily the data's; the last dimension contiguous. */
typedef struct mc_gist_pool_weights {
    mc_tensor w; /* [L, Hkv, G, 2D] */
    mc_tensor b; /* [L, Hkv, G, K] */
    mc_tensor m; /* [L, Hkv, 2D, 2D] */
    mc_tensor c; /* [L, Hkv, 2D] */
} mc_gist_pool_weights;

/* Blocks of K keys and values are pooled into G gists each. Per row's layer and head, with x_j = [k_j; v_j]:
 *
 *   n_j = x_j / sqrt(mean(x_j^2) + 1e-12)     p_g = softmax_j(n_j . w_g + b_gj)
 *   y_g = sum_j p_gj x_j                      [k_gist_g; v_gist_g] = y_g + y_g M + c
 *
 * Sums are fp32, gists are rounded once. Memory: some tens of kilobytes a thread, more with many gists. */
typedef struct mc_gist_pool_args {
    size_t struct_size; /* sizeof(mc_gist_pool_args) */

    /* [R, Hkv, N, K, D], keys unrotated; f32, f16 or bf16, both the same; K, D >= 1, D contiguous. R is a multiple of
     * the weights' L, row r has the weights of layer r / (R / L). */
    mc_tensor k, v;
    mc_gist_pool_weights weights;

    /* [R, Hkv, N, G, D], k's dtype, D contiguous, no element named twice. Written; apart from each other and from what
     * is read, which is the caller's duty. */
    mc_tensor k_gist, v_gist;
} mc_gist_pool_args;

/* Sums are fp32. Where data and weights are bf16 and the instruction set level multiplies bf16, an entry's weight and what is
 * multiplied with M may be rounded to it (and subnormal numbers taken for zero).
 * n_threads: as for mc_kv_splice_cpu. The result does not depend on it. R, Hkv or N may be 0. */
MC_API int32_t mc_gist_pool_cpu(const mc_gist_pool_args* args, int32_t n_threads);

/* Entries of a cache are pooled, as by mc_gist_pool_cpu, and gists take their place, in all layers, sequences and heads:
 *
 *   1. the K entries in the slots children[i] are pooled into G gists, for each of n_blocks blocks
 *   2. entries move, one segment after the other, each with memmove's semantics
 *   3. gist g of block i is written to slot gist_slots[i, g]
 *
 * Each step sees what the one before has left, so gist slots and destinations may be slots of children. */
typedef struct mc_collapse_args {
    size_t struct_size; /* sizeof(mc_collapse_args) */

    /* [L, B, Hkv, S, D], keys unrotated, written; as for mc_kv_splice_args, without pages. L and Hkv are the
     * weights'. */
    mc_tensor k, v;
    mc_gist_pool_weights weights;

    int64_t n_blocks;
    const int64_t* children;   /* [n_blocks, K] contiguous: slots in timeline order, 0..S-1 */
    const int64_t* gist_slots; /* [n_blocks, G] contiguous: 0..S-1, each at most once */

    int64_t n_segments;
    const int64_t* segments; /* [n_segments, 3] contiguous: (source slot, destination slot, count), within 0..S-1 */
} mc_collapse_args;

/* n_threads: as for mc_kv_splice_cpu. The result does not depend on it. n_blocks or n_segments may be 0, and L, B, Hkv. */
MC_API int32_t mc_collapse_cpu(const mc_collapse_args* args, int32_t n_threads);

/* A weight [O, E] once more, in fewer bytes: codes of 4 or 8 bits with a scale and an offset for each 32 elements of a row,
 * as quantised files hold them,
 *
 *   weight[o, i] = scale[o, i / 32] * code[o, i] + offset[o, i / 32]      E % 32 = 0
 *
 * Codes begin at 0. Rows lie together in groups of 16, the last one filled up with anything. A group is E / 32 blocks of
 * 384 bytes, or with 8 bits 640: of its 32 elements first 4 times 32 words of 16 bits, of which word 2 r + e of part q has
 * in its bits 4 k to 4 k + 3 the code of row r and element 8 q + 2 k + e; with 8 bits these are the lower four, and as many
 * words with the upper four follow; then scale [16] f32 and offset [16] f32 by row. */
typedef struct mc_packed_weight {
    const void* data; /* a multiple of 4, of 64 it is faster; NULL: absent */
    int32_t bits;     /* 4 or 8 */
} mc_packed_weight;

/* A linear map, with what a decoder layer does before and after it, in one read of the weight:
 *
 *   n[r] = x[r], or with a norm x[r] / sqrt(mean(x[r]^2) + eps) * norm      (RMS norm)
 *   y[r] = weight n[r] + bias
 *   out[r] = y[r], or with swiglu silu(y[r, :O/2]) * y[r, O/2:]; then + residual[r]
 *
 * Everything between x and out is fp32, rounded once. The weight is read as it lies and not copied: for the handful of
 * rows of a decode step it is one stream, once for up to 24 rows; more it meets in matrix products, of bf16 where x and
 * weight are that and the level multiplies it, else of fp32. Memory: N * E floats, E + O for norm and bias, and for a weight
 * that is widened 64 of its rows for each thread. */
typedef struct mc_fused_linear_args {
    size_t struct_size; /* sizeof(mc_fused_linear_args) */

    /* x [N, E] and weight [O, E], f32, f16 or bf16, each its own; last dimension contiguous. O is even with swiglu. */
    mc_tensor x, weight;
    mc_packed_weight packed; /* absent, or the weight before it was rounded, which is the caller's duty; see below */

    mc_tensor norm;     /* [E] gain, or absent: no norm. f32, f16 or bf16, contiguous */
    double eps;         /* finite, >= 0. Not read without norm */
    mc_tensor bias;     /* [O] or absent. f32, f16 or bf16, contiguous */
    int32_t swiglu;     /* 0 or 1: M = O or O/2 outputs, of which the gate's rows of the weight come first */
    mc_tensor residual; /* [N, M] or absent. x's dtype, last dimension contiguous */

    /* [N, M] in x's dtype, last dimension contiguous, no element named twice; written. Apart from all inputs. */
    mc_tensor out;
} mc_fused_linear_args;

/* Sums are fp32. Where x and weight are bf16 and the instruction set level multiplies bf16, a normed x is rounded to it
 * (and subnormal numbers are taken for zero).
 * A few rows of x (up to 8, 4 or 3 for 4 bits, 8, 4 or 1 for 8 bits, by the level: as many as make it faster), where x and
 * weight are both bf16 or both f32 and all numbers are finite, are multiplied with `packed`, whose numbers are not rounded; x,
 * normed, is rounded to 2^-16 (bf16) or 2^-24 (f32) of the largest of each 32 elements, and 32 that are all below 1e-30 are
 * taken for zeros. In all other cases the weight is read.
 * n_threads: as for mc_kv_splice_cpu. The result does not depend on it, nor on which other rows x has; on how many there
 * are it may depend within rounding. Sizes may be 0; with E = 0, y is the bias. */
MC_API int32_t mc_fused_linear_cpu(const mc_fused_linear_args* args, int32_t n_threads);

/* Weights of one layer of a Llama-family decoder: f32, f16 or bf16, each its own; matrices with a contiguous last dimension,
 * vectors contiguous. */
typedef struct mc_decoder_layer {
    mc_tensor attention_norm; /* [E] gain */
    mc_tensor qkv;            /* [(Hq + 2 Hkv) D, E]: rows of all query heads, of all key heads, of all value heads */
    mc_tensor qkv_bias;       /* [(Hq + 2 Hkv) D] or absent */
    mc_tensor q_norm, k_norm; /* [D] gains of every query head and of every key head, or both absent */
    mc_tensor out;            /* [E, Hq D] */
    mc_tensor out_bias;       /* [E] or absent */
    mc_tensor ffn_norm;       /* [E] gain */
    mc_tensor gate_up;        /* [2F, E]: the gate's rows, then the up projection's */
    mc_tensor down;           /* [E, F] */
    mc_packed_weight qkv_packed, out_packed, gate_up_packed, down_packed; /* each absent or as for mc_fused_linear_cpu */
} mc_decoder_layer;

/* Entries run through L layers of a decoder over a cache of slots, layer by layer. With norm(x, g) =
 * x / sqrt(mean(x^2) + eps) * g:
 *
 *   q, k, v = qkv norm(x, attention_norm) + qkv_bias       q = norm(q, q_norm), k = norm(k, k_norm) in each head
 *   cache[l, b, :, slots[b,t]] <- k, v                     unrotated
 *   x = x + out attention(q, cache[l, :, :, 0..used-1]) + out_bias
 *   x = x + down (silu(gate) * up),  gate, up = gate_up norm(x, ffn_norm)
 *
 * It is what mc_fused_linear_cpu and mc_context_attention_cpu compute, called one after the other: results have the same
 * bits. What passes between them is rounded to x's dtype; so is a normed q, k or result, once. */
typedef struct mc_decoder_layers_args {
    size_t struct_size; /* sizeof(mc_decoder_layers_args) */
    size_t layer_size;  /* sizeof(mc_decoder_layer) */

    int64_t n_layers;               /* L >= 0 */
    const mc_decoder_layer* layers; /* [L], all of the same shapes */
    double eps;                     /* of all norms; finite, >= 0 */
    mc_tensor final_norm;           /* [E] gain, or absent: out = norm(x after the last layer, final_norm) */
    mc_tensor head;                 /* [V, E], or absent: logits = head out of each sequence's last entry */
    mc_packed_weight head_packed;   /* or absent: as for mc_fused_linear_cpu */

    /* [B T, E], row b T + t is entry t of sequence b; f32, f16 or bf16, last dimension contiguous. */
    mc_tensor x;
    const int64_t* positions; /* [B, T] contiguous; below 0: the entry sees nothing */

    /* [L, B, Hkv, S, D] in x's dtype, last dimension contiguous, no element named twice; written in the slots given. Apart
     * from each other and from all else, which is the caller's duty. */
    mc_tensor k, v;
    const int64_t* slots;  /* [B, T] contiguous, 0..S-1: where an entry's keys and values go, before any entry attends.
                              Of several in one slot the last stays */
    int64_t used;          /* slots [0, used) are attended to, 0 <= used <= S */
    const int64_t* kv_pos; /* [B, used] contiguous, as for mc_context_attention_cpu, those of the entries included */
    const float* kv_bias;  /* [B, used] contiguous, or NULL */

    const double* inv_freq; /* this and the following: as for mc_context_attention_cpu */
    int64_t half;
    int32_t interleaved;
    double attention_scaling;
    double scale;

    mc_tensor out; /* [B T, E] in x's dtype, as x; written. Apart from all that is read */
    float* mass;   /* [L, B, used] contiguous, or NULL: attention probability by slot, summed over heads and entries */
    mc_tensor logits; /* [B, V] in x's dtype, last dimension contiguous; written. Absent where there is no head; with one
                         T >= 1 */
} mc_decoder_layers_args;

/* Meant for any number of entries of bf16 where the level multiplies that, else for some tens. Memory: B T rows of what passes between the parts, and theirs.
 * n_threads: as for mc_kv_splice_cpu. The result does not depend on it. L, B, T, S or used may be 0. With
 * MC_OUT_OF_MEMORY slots, out, mass and logits may have been written. */
MC_API int32_t mc_decoder_layers_cpu(const mc_decoder_layers_args* args, int32_t n_threads);

/* LensNet: what each of N entries would gain expanded and cost collapsed, in nats.
 *
 * With x_n = entry_n / rms(entry_n), norm(x, g) = x / rms(x) * g, H heads of width d / H, W[h] the rows of head h:
 *
 *   z_m = w_in (query_m / rms(query_m))                                                  m < Q
 *   P times: A[h,m] = (d/H)^-1/2 read_k[h]^T (read_q norm(z_m, read_norm))[h]
 *            c[h,m] = sum over n of softmax_n(A[h,m] . x_n) x_n
 *            z_m += read_out concat_h(read_v[h] c[h,m])
 *            z_m += mlp_down (silu(gate) * up),  gate, up = mlp_gate_up norm(z_m, mlp_norm)
 *   s_m = norm(z_m, score_norm);  a[n,h,m] = (d/H)^-1/2 x_n . score_q[h]^T (score_k s_m)[h]
 *   f_n = [softmax_m(a[n,h,m]) (score_v s_m)[h] by h, logsumexp_m(a[n,h,m]) - log Q by h, direct x_n, features_n]
 *   out_n = head_out silu(head_in f_n + head_bias) + head_out_bias, exactly 0 where not legal
 *
 * rms(x) = sqrt(mean(x^2) + 1e-12). Entries are read P + 1 times, each time against at most H Q + J vectors; nothing of
 * size N x d exists. Sums are fp32. Memory: 4 * 16 * H * Q * E bytes at most for partial sums, some hundred kilobytes a
 * thread, and 4 * 3 * H * Q * E bytes for absorbed weights. */
typedef struct mc_lens_score_args {
    size_t struct_size; /* sizeof(mc_lens_score_args) */

    /* All views: last dimension contiguous, other strides free. entries and queries are f32, f16 or bf16, both the
     * same; features and out f32; the weights f32, f16 or bf16, all the same. E, d, Q >= 1, Q <= 16, J <= 16; N, P, f,
     * dv, J, F and hidden may be 0. */
    mc_tensor entries;  /* [N, E] */
    mc_tensor features; /* [N, F] */
    mc_tensor queries;  /* [Q, E] */

    mc_tensor w_in;          /* [d, E] */
    mc_tensor read_norm;     /* [P, d] */
    mc_tensor read_q;        /* [P, d, d] */
    mc_tensor read_k;        /* [P, d, E] */
    mc_tensor read_v;        /* [P, d, E] */
    mc_tensor read_out;      /* [P, d, d] */
    mc_tensor mlp_norm;      /* [P, d] */
    mc_tensor mlp_gate_up;   /* [P, 2 f, d] gate rows first */
    mc_tensor mlp_down;      /* [P, d, f] */
    mc_tensor score_norm;    /* [d] */
    mc_tensor score_q;       /* [d, E] */
    mc_tensor score_k;       /* [d, d] */
    mc_tensor score_v;       /* [H dv, d] */
    mc_tensor direct;        /* [J, E] */
    mc_tensor head_in;       /* [hidden, X], X = H dv + H + J + F in the order of f_n */
    mc_tensor head_bias;     /* [hidden] */
    mc_tensor head_out;      /* [2, hidden] */
    mc_tensor head_out_bias; /* [2] */
    int64_t n_heads;         /* H, divides d and H dv */

    const uint8_t* legal; /* [N, 2] contiguous, 0: not legal; NULL: all are */

    /* [N, 2] written, no element named twice: gain of expanding, cost of collapsing. Apart from what is read, which is
     * the caller's duty; only equal addresses are noticed. */
    mc_tensor out;
} mc_lens_score_args;

/* Sums are fp32. So is what entries are multiplied with, unless entries and weights are bf16 and the instruction set level
 * multiplies bf16: then the vectors that meet the entries, and the entries' weights in a read pass, are rounded to it (and
 * subnormal ones taken for zero). On matrix tiles z, the queries' vectors and f are then rounded to the sum of two bf16.
 * n_threads: as for mc_kv_splice_cpu. The result does not depend on it. N = 0 writes nothing. */
MC_API int32_t mc_lens_score_cpu(const mc_lens_score_args* args, int32_t n_threads);

/* A small transformer compresses windows of K embeddings into G gists (GistNet). With
 * norm(x, g) = x / sqrt(mean(x^2) + 1e-12) * g, per window:
 *
 *   h_j = w_in norm(x_j, 1) + level_emb[min(level, n_levels) - 1]                               [K, Eg]
 *   per layer:  q, k, v = qkv norm(h, attn_norm) in heads of width d = Eg / n_heads; q, k rotated at positions 0..K-1,
 *               pairs (i, i + d/2), angle position * rope_theta^(-2i/d); every j attends to every j, scale d^-1/2
 *               h += attn_out attention;  h += down (silu(gate f) * (up f)) with f = norm(h, ffn_norm)
 *   s = norm(h, final_norm)
 *   pooled_g    softmax: sum_j softmax_j(<pool_q_g, s_j> Eg^-1/2) s_j;  mean: mean_j s_j;
 *               cls: pool_q_0 + the level's embedding runs along as entry K of the window, s of that entry
 *   base = norm(mean_j x_j - (level == 1 ? mu : 0), target_rms);  out_g = norm(base + w_out pooled_g, gain * target_rms)
 *
 * Sums are fp32. Inputs of matrix products are fp32 too, unless blocks and weights are bf16 and the instruction set level
 * multiplies bf16: then they are rounded to it (and subnormal ones taken for zero). */
enum { MC_POOL_SOFTMAX = 0, MC_POOL_MEAN = 1, MC_POOL_CLS = 2 };

/* f32, f16 or bf16, all the same; last dimensions contiguous. Linear layers are [out, in]. */
typedef struct mc_gist_encode_weights {
    size_t struct_size;   /* sizeof(mc_gist_encode_weights) */
    mc_tensor mu;         /* [E] */
    mc_tensor w_in;       /* [Eg, E] */
    mc_tensor level_emb;  /* [n_levels, Eg] */
    mc_tensor attn_norm;  /* [layers, Eg] */
    mc_tensor qkv;        /* [layers, 3 Eg, Eg] rows of queries, keys, values in this order, heads contiguous */
    mc_tensor attn_out;   /* [layers, Eg, Eg] */
    mc_tensor ffn_norm;   /* [layers, Eg] */
    mc_tensor gate_up;    /* [layers, 2 F, Eg] gate rows first */
    mc_tensor down;       /* [layers, Eg, F] */
    mc_tensor final_norm; /* [Eg] */
    mc_tensor pool_q;     /* [G, Eg]; G = 1 unless pool is MC_POOL_SOFTMAX */
    mc_tensor w_out;      /* [E, Eg] */
    mc_tensor gain;       /* [1] */
    int64_t n_heads;      /* Eg / n_heads is even */
    int32_t pool;         /* MC_POOL_SOFTMAX, ... */
    double rope_theta, target_rms; /* > 0 */
} mc_gist_encode_weights;

/* Weights as the kernel reads them, for blocks of `dtype`. Packing costs a few times a read of the weights, about what
 * encoding a window does. `packed` is an address that is a multiple of 64, of as many bytes as
 * mc_gist_encode_packed_bytes writes to *bytes. What is packed depends on the instruction set level in use: it is for this
 * machine, at this level or one that multiplies the same types, and for this version of the library. */
MC_API int32_t mc_gist_encode_packed_bytes(const mc_gist_encode_weights* weights, int32_t dtype, int64_t* bytes);
MC_API int32_t mc_gist_encode_pack_cpu(const mc_gist_encode_weights* weights, int32_t dtype, void* packed,
                                       int64_t bytes, int32_t n_threads);

typedef struct mc_gist_encode_args {
    size_t struct_size; /* sizeof(mc_gist_encode_args) */

    const void* packed; /* what mc_gist_encode_pack_cpu has written; the weights themselves are not needed any more */
    int64_t packed_bytes;

    mc_tensor blocks; /* [N, K, E] f32, f16 or bf16, last dimension contiguous; windows may overlap; K >= 1 */
    mc_tensor out;    /* [N, G, E] blocks' dtype, last dimension contiguous, no element named twice; written. Apart from
                         all that is read, which is the caller's duty: only blocks' own address is noticed */
    int64_t level;    /* of the gists, >= 1; at level 1 blocks are of tokens, and mu is taken off */
} mc_gist_encode_args;

/* n_threads: as for mc_kv_splice_cpu. A window's gists depend on neither it nor the other windows. N may be 0. Memory
 * beside packed weights: about 3 MB a thread, more for windows of more than some hundred entries. */
MC_API int32_t mc_gist_encode_cpu(const mc_gist_encode_args* args, int32_t n_threads);

/* The same operations on a CUDA device, in a library of its own, libmc_kernels_cuda. Views are of device memory, and so
 * are arrays that are said to be; all else is read before the call returns.
 *
 * stream: a cudaStream_t (or CUstream) of the current device, NULL for its default stream. A call launches on it and
 * returns: it never waits for the device, allocates nothing, leaves the current device as it is, and may be captured in
 * a graph. What the work reads must stay as it is until the stream has passed it.
 * workspace: device memory on a multiple of 16 for the call alone, of at least as many bytes as mc_..._cuda_workspace
 * writes to *bytes for these arguments; NULL where that is 0. Its contents need not be set and are not kept.
 *
 * Arguments are checked as on a CPU, apart from what lies in device memory. Sizes and strides whose index does not fit
 * 32 bits where the device counts in 32 are MC_INVALID_ARGUMENT. */

/* What the last call of this thread into libmc_kernels_cuda that did not return MC_OK had to say. */
MC_API const char* mc_cuda_last_error(void);

/* Version of libmc_kernels_cuda, and the architectures that it holds machine code for, as "80;90a;100". */
MC_API const char* mc_cuda_version(void);
MC_API const char* mc_cuda_architectures(void);

/* k, v, k_new, v_new, the table's data, positions, new_positions and inv_freq are device memory; offsets, rows, segments,
 * stays and insert_slots are not. Page ids in the table are not looked at: the caller's duty. Plans of some dozen edits
 * travel with the launch and need no workspace. */
MC_API int32_t mc_kv_splice_cuda_workspace(const mc_kv_splice_args* args, int64_t* bytes);
MC_API int32_t mc_kv_splice_cuda(const mc_kv_splice_args* args, void* workspace, int64_t workspace_bytes, void* stream);

/* Needs no workspace. K * 32 + D * 64 bytes and some thousand must fit 160 KB of shared memory. */
MC_API int32_t mc_gist_pool_cuda(const mc_gist_pool_args* args, void* stream);

/* children, gist_slots and segments are not device memory. Some dozen blocks need no workspace. */
MC_API int32_t mc_collapse_cuda_workspace(const mc_collapse_args* args, int64_t* bytes);
MC_API int32_t mc_collapse_cuda(const mc_collapse_args* args, void* workspace, int64_t workspace_bytes, void* stream);

/* All but n_heads is device memory. H Q + J is at most 128; d, f and the head's X are bound by shared memory (160 KB):
 * X * 256 bytes beside 110 KB, or 64 bytes for each of max(d, f). All blocks of the launch are on the device at once. */
MC_API int32_t mc_lens_score_cuda_workspace(const mc_lens_score_args* args, int64_t* bytes);
MC_API int32_t mc_lens_score_cuda(const mc_lens_score_args* args, void* workspace, int64_t workspace_bytes,
                                  void* stream);

/* q, k, v, q_pos, kv_pos, inv_freq, sigma, kv_bias, out, lse and mass are device memory; D <= 256. Where mass is wanted, the
 * workspace has B * Hq * T * S floats. Meant for few queries a sequence, as the CPU's: each 16 rows (queries times heads of a
 * group; 4 where D is neither 64 nor 128, in fp32, and off 16 bytes) read the keys again. Heads of 64 or 128 dimensions of
 * 16 bits multiply in their dtype: rotated queries and keys and the softmax's weights are rounded to it, sums are fp32. So
 * do keys and values of MC_F8E4M3 under queries of 16 bits, in the queries' dtype, 8 rows at a time; their scales multiply
 * logits and results in fp32. k_scale and v_scale are device memory. */
MC_API int32_t mc_context_attention_cuda_workspace(const mc_context_attention_args* args, int64_t* bytes);
MC_API int32_t mc_context_attention_cuda(const mc_context_attention_args* args, void* workspace, int64_t workspace_bytes,
                                         void* stream);

/* The weights, as they lie in device memory (`packed` and `packed_bytes` of args are not read), blocks and out are device
 * memory; heads of up to 128 dimensions. Where blocks and weights are of one 16-bit dtype and rows begin on 16 bytes,
 * products take it and activations are rounded to it; sums are fp32. Windows of some hundred rows together go through in
 * one cooperative launch, thousands by groups that stay with a multiprocessor. The workspace is enough on any device, and
 * does not grow beyond some hundred thousand rows of blocks: 291 MB for E 576, Eg 512, F 1792 and one gist. */
MC_API int32_t mc_gist_encode_cuda_workspace(const mc_gist_encode_weights* weights, const mc_gist_encode_args* args,
                                             int64_t* bytes);
MC_API int32_t mc_gist_encode_cuda(const mc_gist_encode_weights* weights, const mc_gist_encode_args* args,
                                   void* workspace, int64_t workspace_bytes, void* stream);

/* Refocus without the host: from scores to an edited cache, as work of the stream alone. Two launches, whose grids and
 * memory depend on nothing but the sizes below: a decode step that refocuses can be captured in one graph.
 *
 * A Working Context of N entries in timeline order fills S slots of a cache, the slots 0..N-1. An entry is a node (level,
 * index) of a tree with K = block_size children a node: a token (level 0), or a gist, which covers K^level tokens from
 * index * K^level on. Entries tile the history. Each refocus changes it by one level here and there:
 *
 *   a gist may open if the K entries below it are in the store (store_keys), and it does not rest. With g its score's
 *     first number it has the weight   g - min_gain + tie(0.5 e)
 *     and is a candidate if that is > 0. Gists that would be but for the store are listed in `wanted`.
 *   K siblings, all of them there, may close into their parent if the parent is in the tree (counts), no pinned range meets
 *     it, none of them is a candidate to open, and it does not rest. With c the sum of the second numbers of their scores
 *     (K tokens have one, their first's), u = c + (hysteresis - min_gain), it has the weight
 *     max(u, 0) + tie(2 + u / (1 + |u|) + 0.5 e)   and is a candidate.
 *
 * e is the end of the node's (of the parent's) span as a share of the history, tie(x) = 1e-9 x. Scores are clipped to
 * +-1000, NaN is 0. All in fp64, each operation rounded once. Of all candidates the m heaviest are (opened or) left open,
 * the others (left closed or) closed, with m = floor((budget - N) / (K - 1)) + the number of groups that may close; of equal
 * weights those later in the history are heavier. At most max_edits nodes change: then as many groups close as are over
 * the budget, those of least weight; of the changes that are left (r) and the free nodes (f) the heaviest r, or (r + f) / 2
 * where r > f, of the gists chosen open, and groups close to make room for them.
 *
 * This is what mc_runtime/focus/allocator.py decides for the same candidates, all other nodes frozen, to the last bit: it
 * is the oracle. Nodes that changed in cycle t rest in the cycles t + 1 .. t + cooldown.
 *
 * The cache is then edited as by mc_kv_splice (slots discipline, the plan that SplicePlan.from_edits makes of the edits):
 * a group closes into the gist that mc_gist_pool makes of its keys and values, in all layers and heads; an opened gist's
 * children come from the store. Entries that get a new slot keep their bits. A caller that means to compute an inserted
 * entry's keys and values by a forward of the base model has its slot in `inserted`. */
typedef struct mc_refocus_args {
    size_t struct_size; /* sizeof(mc_refocus_args) */

    /* [L, Hkv, S, D], keys unrotated; f32, f16 or bf16, all four the same; D contiguous. k and v are written; as for
     * mc_kv_splice_args. The store has any number of rows, apart from the cache. */
    mc_tensor k, v, k_store, v_store;

    /* Weights of the gists of level 1, 2, ..., of one gist a block of K = block_size; the last one's serve the levels above
     * too. n_weights is 1..4. */
    int64_t n_weights;
    const mc_gist_pool_weights* weights;

    /* Everything below but numbers is device memory, contiguous, read when the work runs; what it says is the caller's duty.
     * The Working Context, updated: by rank, entries beyond N unused, ... */
    int32_t* levels; /* [S] */
    int64_t* index;  /* [S] */
    int64_t* slots;  /* [S] of ranks 0..N-1 a permutation of 0..N-1 */
    int32_t* born;   /* [S] t: by its parent's opening in cycle t, -t: by its children's closing, 0: neither */
    /* ... by slot: */
    int64_t* pos; /* [S] ranks, -1 where empty. Written where the layout changes */
    float* bias;  /* [S] log-weight: gists gist_bias, tokens 0, empty slots 0; or NULL */
    /* ... and in numbers [8]: N and the cycle (both updated: the first refocus is cycle 1), then written: gists opened, groups
     * closed, slots over the budget that nothing could free, entries moved, entries inserted, gists wanted. */
    int64_t* state;

    const int64_t* counts; /* [n_levels + 1] tokens of history, then nodes of level 1, 2, ... in the tree */
    int64_t n_levels;
    const int64_t* pinned; /* [n_pinned, 2] token ranges start, stop that stay as they are; empty ones pin nothing */
    int64_t n_pinned;
    /* Gists whose children are in the store, each in K rows that follow each other. */
    const int64_t* store_keys; /* [n_store] index * K^level * 64 + level, ascending; fill up with INT64_MAX */
    const int32_t* store_rows; /* [n_store] of the first child */
    int64_t n_store;
    const float* scores; /* [S, 2] by slot: nats gained by opening, lost by closing (mc_lens_score's out) */

    int64_t block_size;         /* K >= 2 */
    int64_t budget;             /* 0..S entries */
    int64_t cooldown;           /* cycles */
    int64_t max_edits;          /* nodes; -1: any */
    double min_gain, hysteresis; /* nats, 0..1e9 */
    double gist_bias;

    /* Written: what has been done, numbers of it in the state. */
    int32_t* edits;    /* [S, 3] (start, remove, insert) in ranks of before, ascending */
    int32_t* inserted; /* [S, 2] slot, row of the store or -1 - g: the gist of the g-th closed group; in timeline order */
    int32_t* moves;    /* [S, 2] slot before, slot after of the entries that got another */
    int32_t* children; /* [S / K, K] slots before of the g-th closed group's entries */
    int64_t* wanted;   /* [n_wanted] keys of gists, in timeline order, as many as there is room for */
    int64_t n_wanted;
} mc_refocus_args;

/* The workspace has some 50 bytes a slot, and a gist of every layer and head for every K slots. */
MC_API int32_t mc_refocus_cuda_workspace(const mc_refocus_args* args, int64_t* bytes);
MC_API int32_t mc_refocus_cuda(const mc_refocus_args* args, void* workspace, int64_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* MC_KERNELS_H */
