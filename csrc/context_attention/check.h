// The arguments of context_attention, checked, and what follows from them for addressing.
#pragma once

#include "attend.h"
#include "tensor.h"

namespace mc {

struct Attention {
    int dtype;
    int64_t batch, heads, kv_heads, queries, slots;
    int64_t rows;  // queries that a KV head serves: heads / kv_heads * queries, numbered (head of the group, query)
    RowShape row;
    int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];  // bytes: b, head, query or slot
    bool interleaved;
    bool fp8;  // k and v are MC_F8E4M3
};

// Throws Error for whatever the ABI promises to refuse. Nothing has been written then. fp8: a cache may be of it.
Attention check_context_attention(const mc_context_attention_args& a, bool fp8 = false);

}  // namespace mc
