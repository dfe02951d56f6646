// The arguments of kv_splice, checked, and what follows from them for addressing.
#pragma once

#include "tensor.h"

namespace mc {

// k and v as the kernel sees them. A row is (layer, b); `blocks` are its pages, or the whole row as one of S slots.
struct Cache {
    char *k, *v;
    int dtype;
    int64_t bytes;  // of an element
    int64_t layers, batch, heads, slots, dim;
    int64_t block;                     // slots of a page; S where there are no pages
    int64_t k_stride[4], v_stride[4];  // bytes: layer, b or page, head, slot
    const mc_tensor* table;            // nullptr: contiguous
};

// Throws Error for whatever the ABI promises to refuse. Nothing has been written then.
// table_readable: false where the table lies in device memory; page ids are then not looked at.
Cache check_kv_splice(const mc_kv_splice_args& a, bool table_readable = true);

}  // namespace mc
