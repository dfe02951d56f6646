/* Splices a KV cache through the C ABI: 32 entries in its middle become one, and the tail closes up and is turned to
 * its new positions, in place. Then checks the result against a cache written at its final positions from scratch.
 *
 * Build where the package is installed (in Python's words: importable), and run:
 *
 *   cc -std=c99 splice_cache.c $(python -m mc_kernels --cflags --libs) -lm -o splice_cache
 *   ./splice_cache
 *
 * `python -m mc_kernels --pkgconfigdir` names the folder of mc_kernels.pc, for pkg-config and CMake.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "mc_kernels.h"

enum { LAYERS = 2, HEADS = 3, SLOTS = 256, DIM = 64, HALF = DIM / 2, LENGTH = 250 };
enum { START = 100, REMOVE = 32, INSERT = 1, AFTER = LENGTH - REMOVE + INSERT };

/* Any value that says where it stands. */
static float raw(int layer, int head, int entry, int d) {
    return sinf(1.0f + layer + 3.0f * head + 0.7f * entry + 0.1f * d);
}

/* A contiguous view [n0, n1, n2, n3, DIM], or with n0 = 0 [n1, n2, n3, DIM]. */
static mc_tensor view(float *data, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
    const int64_t size[5] = {n0, n1, n2, n3, DIM};
    mc_tensor out = {0};
    int64_t step = 1;
    int first = n0 == 0, i;
    out.data = data;
    out.dtype = MC_F32;
    out.ndim = 5 - first;
    for (i = 4; i >= first; --i) {
        out.size[i - first] = size[i];
        out.stride[i - first] = step;
        step *= size[i];
    }
    return out;
}

static void turn(float *key, const double *inv_freq, int position) {
    for (int b = 0; b < HALF; ++b) {
        const double angle = position * inv_freq[b], x = key[b], y = key[b + HALF];
        key[b] = (float)(x * cos(angle) - y * sin(angle));
        key[b + HALF] = (float)(y * cos(angle) + x * sin(angle));
    }
}

int main(void) {
    const size_t count = (size_t)LAYERS * HEADS * SLOTS * DIM, fresh = (size_t)LAYERS * HEADS * INSERT * DIM;
    float *k = calloc(count, sizeof *k), *v = calloc(count, sizeof *v);
    float *k_new = malloc(fresh * sizeof *k_new), *v_new = malloc(fresh * sizeof *v_new);
    double inv_freq[HALF], worst = 0;
    int entry, d, head, layer;

    if (!k || !v || !k_new || !v_new) return 2;
    for (d = 0; d < HALF; ++d) inv_freq[d] = pow(10000.0, -2.0 * d / DIM);
    for (layer = 0; layer < LAYERS; ++layer) {
        for (head = 0; head < HEADS; ++head) {
            const int row = layer * HEADS + head;
            for (entry = 0; entry < LENGTH; ++entry) {
                float *key = k + ((size_t)row * SLOTS + entry) * DIM, *value = v + ((size_t)row * SLOTS + entry) * DIM;
                for (d = 0; d < DIM; ++d) key[d] = value[d] = raw(layer, head, entry, d);
                turn(key, inv_freq, entry); /* keys are stored rotated, at their rank */
            }
            for (d = 0; d < DIM; ++d) k_new[row * DIM + d] = v_new[row * DIM + d] = raw(layer, head, LENGTH, d);
        }
    }

    /* One edit: entries [START, START + REMOVE) go, one comes; what lies behind moves left by REMOVE - INSERT. */
    const int64_t segments[3] = {START + REMOVE, START + INSERT, LENGTH - START - REMOVE};
    const int64_t stays[3] = {0, 0, START};
    const int64_t insert_slots[INSERT] = {START};
    const int64_t offsets[2][5] = {{0, 0, 0, 0, 0}, {1, 1, INSERT, LENGTH, AFTER}};
    mc_kv_splice_args args = {0};
    args.struct_size = sizeof args;
    args.k = view(k, LAYERS, 1, HEADS, SLOTS);
    args.v = view(v, LAYERS, 1, HEADS, SLOTS);
    args.k_new = view(k_new, 0, LAYERS, HEADS, INSERT);
    args.v_new = view(v_new, 0, LAYERS, HEADS, INSERT);
    args.n_plans = 1;
    args.offsets = offsets[0];
    args.segments = segments;
    args.stays = stays;
    args.insert_slots = insert_slots;
    args.inv_freq = inv_freq;
    args.inv_freq_rows = 1;
    args.half = HALF;
    args.attention_scaling = 1.0;
    if (mc_kv_splice_cpu(&args, 0) != MC_OK) {
        fprintf(stderr, "mc_kv_splice_cpu: %s\n", mc_last_error());
        return 1;
    }

    for (layer = 0; layer < LAYERS; ++layer) {
        for (head = 0; head < HEADS; ++head) {
            for (entry = 0; entry < AFTER; ++entry) {
                const int before = entry < START ? entry : entry == START ? LENGTH : entry + REMOVE - INSERT;
                const size_t at = ((size_t)(layer * HEADS + head) * SLOTS + entry) * DIM;
                float key[DIM];
                for (d = 0; d < DIM; ++d) key[d] = raw(layer, head, before, d);
                turn(key, inv_freq, entry);
                for (d = 0; d < DIM; ++d) {
                    worst = fmax(worst, fabs(key[d] - k[at + d]));
                    if (v[at + d] != raw(layer, head, before, d)) {
                        fprintf(stderr, "value [%d, %d, %d, %d] is wrong\n", layer, head, entry, d);
                        return 1;
                    }
                }
            }
        }
    }
    printf("mc_kernels %s (%s): %d entries before, %d after; largest error of a key %.1e\n", mc_version(), mc_cpu_isa(),
           LENGTH, AFTER, worst);
    free(k);
    free(v);
    free(k_new);
    free(v_new);
    return worst < 1e-6 ? 0 : 1;
}
