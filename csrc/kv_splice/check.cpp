// Checks of mc_kv_splice_cpu and mc_kv_splice_cuda. Whatever could make the kernel leave the caller's memory is refused here.
#include "check.h"

#include <algorithm>

namespace mc {
namespace {

std::string at(const char* name, int64_t i) { return std::string(name) + "[" + std::to_string(i) + "]: "; }

int64_t table_entry(const mc_tensor& t, int64_t b, int64_t page) {
    const int64_t i = b * t.stride[0] + page * t.stride[1];
    return t.dtype == MC_I32 ? static_cast<const int32_t*>(t.data)[i] : static_cast<const int64_t*>(t.data)[i];
}

Cache check_tensors(const mc_kv_splice_args& a) {
    check_view("k", a.k, 5);
    check_view("v", a.v, 5);
    check_view("k_new", a.k_new, 4);
    check_view("v_new", a.v_new, 4);
    check_dtype("v", a.v, "k", a.k);
    check_dtype("k_new", a.k_new, "k", a.k);
    check_dtype("v_new", a.v_new, "k", a.k);
    check_sizes("v", a.v, {a.k.size[0], a.k.size[1], a.k.size[2], a.k.size[3], a.k.size[4]});
    check_no_overlap("k", a.k);
    check_no_overlap("v", a.v);
    if (!is_empty(a.k) && a.k.data == a.v.data) invalid("v: expected memory apart from k, got the same address");

    Cache c{};
    c.k = static_cast<char*>(a.k.data);
    c.v = static_cast<char*>(a.v.data);
    c.dtype = a.k.dtype;
    c.bytes = dtype_bytes(c.dtype);
    c.layers = a.k.size[0];
    c.heads = a.k.size[2];
    c.block = a.k.size[3];
    c.dim = a.k.size[4];
    c.batch = a.k.size[1];
    c.slots = c.block;
    if (a.table.ndim != 0) {
        if (a.table.ndim != 2) invalid("table: expected 2 dimensions, got " + std::to_string(a.table.ndim));
        if (a.table.dtype != MC_I32 && a.table.dtype != MC_I64) {
            throw Error(MC_INVALID_DTYPE,
                        "table: expected dtype MC_I32 or MC_I64, got " + std::to_string(a.table.dtype));
        }
        if (a.table.size[0] < 0 || a.table.size[1] < 0)
            invalid("table: expected sizes >= 0, got " + shape_text(a.table));
        if (!is_empty(a.table) && !a.table.data) invalid("table: expected an address, got NULL");
        if (c.block < 1) invalid("k: expected pages of at least 1 slot, got shape " + shape_text(a.k));
        c.table = &a.table;
        c.batch = a.table.size[0];
        c.slots = a.table.size[1] * c.block;
    }
    for (int i = 0; i < 4; ++i) {
        c.k_stride[i] = a.k.stride[i] * c.bytes;
        c.v_stride[i] = a.v.stride[i] * c.bytes;
    }
    const int64_t rows = c.layers * c.batch;
    check_sizes("k_new", a.k_new, {rows, c.heads, -1, c.dim});
    check_sizes("v_new", a.v_new, {rows, c.heads, a.k_new.size[2], c.dim});
    return c;
}

void check_segments(const char* name, const int64_t* s, int64_t first, int64_t end, int64_t length,
                    int64_t new_length) {
    for (int64_t i = first; i < end; ++i) {
        const int64_t source = s[3 * i], destination = s[3 * i + 1], count = s[3 * i + 2];
        if (count < 0 || source < 0 || destination < 0 || count > length - source || count > new_length - destination) {
            invalid(at(name, i) + "expected slots within " + std::to_string(length) + " before and " +
                    std::to_string(new_length) + " after, got (" + std::to_string(source) + ", " +
                    std::to_string(destination) + ", " + std::to_string(count) + ")");
        }
    }
}

void check_plans(const mc_kv_splice_args& a, const Cache& c) {
    if (a.n_plans < 1) invalid("n_plans: expected at least 1, got " + std::to_string(a.n_plans));
    if (!a.offsets) invalid("offsets: expected an array [n_plans + 1, 5], got NULL");
    if (!a.rows && a.n_plans > 1) invalid("rows: expected the plan of each row with several plans, got NULL");
    static const char* const columns[5] = {"segments", "stays", "insert_slots", "positions", "new_positions"};
    for (int i = 0; i < 5; ++i) {
        for (int64_t p = 0; p <= a.n_plans; ++p) {
            const int64_t here = a.offsets[5 * p + i], before = p ? a.offsets[5 * (p - 1) + i] : 0;
            if (here < before || (p == 0 && here != 0)) {
                invalid(at("offsets", p) + "expected " + (p ? "at least " : "") + std::to_string(before) +
                        " in column " + columns[i] + ", got " + std::to_string(here));
            }
        }
    }
    const int64_t* total = a.offsets + 5 * a.n_plans;
    const int64_t* const arrays[3] = {a.segments, a.stays, a.insert_slots};
    for (int i = 0; i < 3; ++i) {
        if (total[i] && !arrays[i]) invalid(std::string(columns[i]) + ": expected an array, got NULL");
    }
    for (int64_t p = 0; p < a.n_plans; ++p) {
        const int64_t *low = a.offsets + 5 * p, *high = low + 5;
        const int64_t length = high[3] - low[3], new_length = high[4] - low[4];
        if (std::max(length, new_length) > c.slots) {
            invalid(at("offsets", p + 1) + "expected lengths of at most " + std::to_string(c.slots) +
                    ", the slots of the cache, got " + std::to_string(length) + " and " + std::to_string(new_length));
        }
        if (high[2] - low[2] > a.k_new.size[2]) {
            invalid("k_new: expected at least " + std::to_string(high[2] - low[2]) + " entries, those of plan " +
                    std::to_string(p) + ", got " + std::to_string(a.k_new.size[2]));
        }
        check_segments("segments", a.segments, low[0], high[0], length, new_length);
        check_segments("stays", a.stays, low[1], high[1], length, new_length);
        for (int64_t i = low[2]; i < high[2]; ++i) {
            if (a.insert_slots[i] < 0 || a.insert_slots[i] >= new_length) {
                invalid(at("insert_slots", i) + "expected 0.." + std::to_string(new_length - 1) + ", got " +
                        std::to_string(a.insert_slots[i]));
            }
        }
    }
    for (int64_t r = 0; a.rows && r < c.layers * c.batch; ++r) {
        if (a.rows[r] < -1 || a.rows[r] >= a.n_plans) {
            invalid(at("rows", r) + "expected -1.." + std::to_string(a.n_plans - 1) + ", got " +
                    std::to_string(a.rows[r]));
        }
    }
}

void check_rotation(const mc_kv_splice_args& a, const Cache& c) {
    if (a.inv_freq_rows == 0) return;
    if (a.half < 0 || 2 * a.half > c.dim) {
        invalid("half: expected 0.." + std::to_string(c.dim / 2) + " (D/2), got " + std::to_string(a.half));
    }
    if (a.inv_freq_rows != 1 && a.inv_freq_rows != c.layers * c.batch) {
        invalid("inv_freq_rows: expected 0, 1 or R = " + std::to_string(c.layers * c.batch) + ", got " +
                std::to_string(a.inv_freq_rows));
    }
    if (!a.inv_freq && a.half) invalid("inv_freq: expected an array, got NULL");
    if (!a.positions && !a.new_positions) return;
    const int64_t* total = a.offsets + 5 * a.n_plans;  // of an empty array the address may be NULL
    if (!a.positions && total[3]) invalid("positions: expected an array as new_positions, got NULL");
    if (!a.new_positions && total[4]) invalid("new_positions: expected an array as positions, got NULL");
}

// Page ids of every slot that an edited row has in use, before or after.
void check_pages(const mc_kv_splice_args& a, const Cache& c) {
    if (!c.table) return;
    for (int64_t r = 0; r < c.layers * c.batch; ++r) {
        const int64_t p = a.rows ? a.rows[r] : 0, b = r % c.batch;
        if (p < 0 || (!a.rows && r >= c.batch)) continue;
        const int64_t *low = a.offsets + 5 * p, *high = low + 5;
        const int64_t used = std::max(high[3] - low[3], high[4] - low[4]);
        for (int64_t page = 0; page * c.block < used; ++page) {
            const int64_t id = table_entry(a.table, b, page);
            if (id < 0 || id >= a.k.size[1]) {
                invalid("table[" + std::to_string(b) + ", " + std::to_string(page) + "]: expected 0.." +
                        std::to_string(a.k.size[1] - 1) + ", got " + std::to_string(id));
            }
        }
    }
}

}  // namespace

Cache check_kv_splice(const mc_kv_splice_args& a, bool table_readable) {
    if (a.struct_size != sizeof(mc_kv_splice_args)) {
        invalid("struct_size: expected " + std::to_string(sizeof(mc_kv_splice_args)) + ", got " +
                std::to_string(a.struct_size) + " (another version of mc_kernels.h?)");
    }
    const Cache c = check_tensors(a);
    check_plans(a, c);
    check_rotation(a, c);
    if (table_readable) check_pages(a, c);
    return c;
}

}  // namespace mc
