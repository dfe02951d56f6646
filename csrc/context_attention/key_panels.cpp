// Packing of keys and values. What is done for each element is RowOps', the rest moves memory.
#include "key_panels.h"

#include <algorithm>
#include <cstring>

namespace mc {
namespace {

// Entries lie anywhere: nothing but this asks for a panel's rows before they are needed.
void fetch_rows(const char* base, int64_t step, const int64_t* slot, int64_t n, int64_t bytes) {
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(base + slot[i] * step + at);
    }
}

// Two rows of at most kPanel 16-bit numbers, NULL for zeros, as one step of a panel.
void pair_rows(const char* even, const char* odd, int64_t n, char* out) {
    uint16_t low[kPanel] = {}, high[kPanel] = {};
    uint32_t both[kPanel];
    if (n == kPanel) {  // a size that the compiler knows
        if (even) std::memcpy(low, even, sizeof low);
        if (odd) std::memcpy(high, odd, sizeof high);
    } else {
        if (even) std::memcpy(low, even, static_cast<size_t>(2 * n));
        if (odd) std::memcpy(high, odd, static_cast<size_t>(2 * n));
    }
    for (int64_t i = 0; i < kPanel; ++i) both[i] = low[i] | static_cast<uint32_t>(high[i]) << 16;
    std::memcpy(out, both, sizeof both);
}

}  // namespace

KeyPanels::KeyPanels(const mc_context_attention_args& a, const Attention& x, const AttendOps& ops, int type,
                     int64_t heads, int64_t entries)
    : a_(a), x_(x), ops_(ops), type_(type), plain_{x.row.dims, 0, 0, (x.row.dims + kPad - 1) / kPad * kPad} {
    keys_bytes_ = panels_of(entries) * panel_bytes(type, x.row.padded);
    value_bytes_ = whole_panels(entries) * kPanel * element_bytes();
    head_bytes_ = head_bytes(x, type, entries);
    data_ = Scratch<char>(heads * head_bytes_);
}

int64_t KeyPanels::head_bytes(const Attention& x, int type, int64_t entries) {
    const int64_t values = whole_panels(x.row.dims) * (type == kBF16 ? 2 : 4);
    return panels_of(entries) * (panel_bytes(type, x.row.padded) + kPanel * values);
}

int64_t KeyPanels::scratch_floats(const Phases* phases) const {
    return (phases ? kBlock * 2 * x_.row.width + phases->scratch() : 0) + 2 * kPanel * x_.row.padded + plain_.padded;
}

void KeyPanels::pack(const Timeline& timeline, int64_t b, int64_t block, int64_t first, int64_t count,
                     const Phases* phases, float* scratch) {
    const int64_t begin = block * kBlock, end = std::min(begin + kBlock, timeline.entries());
    const int64_t bytes = x_.row.dims * dtype_bytes(x_.dtype);
    const float* phase = scratch;
    if (phases) {
        Entries entries;
        float sigma[kBlock];
        entries.count = end - begin;
        for (int64_t i = 0; i < entries.count; ++i) {
            entries.slot[i] = static_cast<int32_t>(i);
            entries.position[i] = timeline.position[static_cast<size_t>(begin + i)];
            if (a_.sigma) sigma[i] = a_.sigma[b * x_.slots + timeline.slot[static_cast<size_t>(begin + i)]];
        }
        float* far = scratch + kBlock * 2 * x_.row.width;
        phases->entries(ops_, a_.sigma ? sigma : nullptr, entries, far, scratch);
        scratch = far + phases->scratch();
    }
    for (int64_t h = 0; h < count; ++h) {
        const char* k = static_cast<const char*>(a_.k.data) + b * x_.k_stride[0] + (first + h) * x_.k_stride[1];
        const char* v = static_cast<const char*>(a_.v.data) + b * x_.v_stride[0] + (first + h) * x_.v_stride[1];
        char* out = data_.get() + h * head_bytes_ + begin / kPanel * panel_bytes(type_, x_.row.padded);
        for (int64_t i = begin; i < end; i += kPanel, out += panel_bytes(type_, x_.row.padded)) {
            const int64_t n = std::min(kPanel, end - i), more = std::min(kPanel, end - i - n);
            const int64_t* slot = timeline.slot.data() + i;
            fetch_rows(v, x_.v_stride[2], slot, n, bytes);
            fetch_rows(k, x_.k_stride[2], slot + n, more, bytes);
            pack_keys(timeline, k, i, n, phase + (i - begin) * 2 * x_.row.width, scratch, out);
            pack_values(timeline, v, h, i, n, scratch);
        }
    }
}

void KeyPanels::pack_keys(const Timeline& timeline, const char* k, int64_t first, int64_t n, const float* phase,
                          float* scratch, char* out) const {
    const int64_t padded = x_.row.padded;
    float* turned = scratch;
    const int64_t* slot = timeline.slot.data() + first;
    for (int64_t i = 0, run; i < n; i += run) {
        for (run = 1; i + run < n && slot[i + run] == slot[i] + run;) ++run;
        ops_.turn[x_.dtype][x_.interleaved]({k + slot[i] * x_.k_stride[2], x_.k_stride[2], run,
                                             phase + i * 2 * x_.row.width, 1.0f, turned + i * padded, &x_.row});
    }
    const char* rows = reinterpret_cast<const char*>(turned);
    if (type_ == kBF16) {
        char* narrow = reinterpret_cast<char*>(turned + kPanel * padded);
        ops_.store[kBF16](turned, n * padded, 1.0f, narrow);
        rows = narrow;
    }
    pack_panel(type_, rows, padded * element_bytes(), n, padded, type_, out);
}

void KeyPanels::pack_values(const Timeline& timeline, const char* v, int64_t head, int64_t first, int64_t n,
                            float* scratch) {
    const int64_t dims = x_.row.dims, *slot = timeline.slot.data() + first, step = kPanel * element_bytes();
    char* out = const_cast<char*>(values(head, 0, first));
    const auto row = [&](int64_t i) { return i < n ? v + slot[i] * x_.v_stride[2] : nullptr; };
    for (int64_t i = 0; type_ == kBF16 && i < kPanel; i += 2, out += 2 * step) {
        const char *even = row(i), *odd = row(i + 1);
        for (int64_t d = 0; d < dims; d += kPanel) {
            pair_rows(even ? even + 2 * d : nullptr, odd ? odd + 2 * d : nullptr, std::min(kPanel, dims - d),
                      out + d / kPanel * value_bytes_);
        }
    }
    for (int64_t i = 0; type_ == kF32 && i < kPanel; ++i, out += step) {
        if (i < n) ops_.turn[x_.dtype][0]({row(i), 0, 1, nullptr, 1.0f, scratch, &plain_});
        for (int64_t d = 0; d < dims; d += kPanel) {
            const int64_t some = i < n ? std::min(kPanel, dims - d) : 0;
            char* to = out + d / kPanel * value_bytes_;
            std::memcpy(to, scratch + d, static_cast<size_t>(some * 4));
            std::memset(to + some * 4, 0, static_cast<size_t>((kPanel - some) * 4));
        }
    }
}

}  // namespace mc
