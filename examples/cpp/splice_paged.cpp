// Splices a paged KV cache on a GPU through the C ABI, without Python: 32 entries in the middle of each sequence become
// one, and the tail closes up and is turned to its new positions, in place, all layers and sequences in one launch. Then
// checks every entry against a cache written at its final positions from scratch.
//
// Build from the project's folder, after `pip install -e .` with nvcc on the path has made the library, and run:
//
//   nvcc -std=c++17 examples/cpp/splice_paged.cpp -Icsrc/include -Lmc_kernels/_native -lmc_kernels_cuda
//     -Xlinker -rpath,$PWD/mc_kernels/_native -o splice_paged      (one line)
//   ./splice_paged
//
// Exit status: 0 all entries are right, 1 something is wrong, 77 there is no CUDA device.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "mc_kernels.h"

namespace {

constexpr int kLayers = 4, kSequences = 2, kHeads = 3, kDim = 64, kHalf = kDim / 2, kPage = 16, kPagesEach = 16;
constexpr int kPages = kSequences * kPagesEach + 1, kRows = kLayers * kSequences;
constexpr int kLength = 250, kStart = 100, kRemove = 32, kInsert = 1, kAfter = kLength - kRemove + kInsert;

void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
}

template <class T>
class OnDevice {
public:
    explicit OnDevice(const std::vector<T>& from) : size_(from.size()) {
        check(cudaMalloc(&data_, size_ * sizeof(T)), "cudaMalloc");
        check(cudaMemcpy(data_, from.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "copy to the device");
    }
    ~OnDevice() { cudaFree(data_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

    T* get() const { return data_; }
    std::vector<T> back() const {
        std::vector<T> out(size_);
        check(cudaMemcpy(out.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "copy from the device");
        return out;
    }

private:
    T* data_ = nullptr;
    size_t size_;
};

// Any value that says where it stands.
float raw(int row, int head, int entry, int d) { return std::sin(1.0f + row + 3.0f * head + 0.7f * entry + 0.1f * d); }

// The raw key of an entry, turned to a position.
std::vector<float> key_at(int row, int head, int entry, int position, const std::vector<double>& inv_freq) {
    std::vector<float> key(kDim);
    for (int b = 0; b < kHalf; ++b) {
        const double angle = position * inv_freq[b], x = raw(row, head, entry, b), y = raw(row, head, entry, b + kHalf);
        key[b] = static_cast<float>(x * std::cos(angle) - y * std::sin(angle));
        key[b + kHalf] = static_cast<float>(y * std::cos(angle) + x * std::sin(angle));
    }
    return key;
}

// Where element 0 of an entry lies in [layers, pages, heads, page, dim].
size_t at(const std::vector<int32_t>& table, int row, int head, int slot) {
    const int layer = row / kSequences, page = table[row % kSequences * kPagesEach + slot / kPage];
    return (((static_cast<size_t>(layer) * kPages + page) * kHeads + head) * kPage + slot % kPage) * kDim;
}

// A contiguous view.
mc_tensor view(void* data, int32_t dtype, std::vector<int64_t> size) {
    mc_tensor out = {};
    out.data = data;
    out.dtype = dtype;
    out.ndim = static_cast<int32_t>(size.size());
    int64_t step = 1;
    for (int i = out.ndim - 1; i >= 0; --i) {
        out.size[i] = size[static_cast<size_t>(i)];
        out.stride[i] = step;
        step *= out.size[i];
    }
    return out;
}

}  // namespace

int main() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::fprintf(stderr, "no CUDA device: nothing was run\n");
        return 77;
    }
    std::vector<double> inv_freq(kHalf);
    for (int b = 0; b < kHalf; ++b) inv_freq[b] = std::pow(10000.0, -2.0 * b / kDim);
    // Pages of the two sequences are interleaved, last page first; page 0 belongs to nobody.
    std::vector<int32_t> table(kSequences * kPagesEach);
    for (int i = 0; i < kSequences * kPagesEach; ++i) {
        table[static_cast<size_t>(i % kSequences * kPagesEach + i / kSequences)] = kPages - 1 - i;
    }
    const size_t count = static_cast<size_t>(kLayers) * kPages * kHeads * kPage * kDim;
    std::vector<float> k(count, NAN), v(count, NAN), fresh(static_cast<size_t>(kRows) * kHeads * kDim);
    for (int row = 0; row < kRows; ++row) {
        for (int head = 0; head < kHeads; ++head) {
            for (int entry = 0; entry < kLength; ++entry) {
                const size_t to = at(table, row, head, entry);
                const std::vector<float> key = key_at(row, head, entry, entry, inv_freq);
                std::copy(key.begin(), key.end(), k.begin() + static_cast<std::ptrdiff_t>(to));
                for (int d = 0; d < kDim; ++d) v[to + d] = raw(row, head, entry, d);
            }
            for (int d = 0; d < kDim; ++d) fresh[(row * kHeads + head) * kDim + d] = raw(row, head, kLength, d);
        }
    }
    const OnDevice<float> k_device(k), v_device(v), fresh_device(fresh);
    const OnDevice<int32_t> table_device(table);
    const OnDevice<double> freq_device(inv_freq);

    // One edit: entries [kStart, kStart + kRemove) go, one comes, what lies behind moves left. The plan stays on the host.
    const int64_t segments[3] = {kStart + kRemove, kStart + kInsert, kLength - kStart - kRemove};
    const int64_t stays[3] = {0, 0, kStart}, insert_slots[kInsert] = {kStart};
    const int64_t offsets[2][5] = {{0, 0, 0, 0, 0}, {1, 1, kInsert, kLength, kAfter}};
    mc_kv_splice_args args = {};
    args.struct_size = sizeof args;
    args.k = view(k_device.get(), MC_F32, {kLayers, kPages, kHeads, kPage, kDim});
    args.v = view(v_device.get(), MC_F32, {kLayers, kPages, kHeads, kPage, kDim});
    args.k_new = view(fresh_device.get(), MC_F32, {kRows, kHeads, kInsert, kDim});
    args.v_new = args.k_new;
    args.table = view(table_device.get(), MC_I32, {kSequences, kPagesEach});
    args.n_plans = 1;
    args.offsets = offsets[0];
    args.segments = segments;
    args.stays = stays;
    args.insert_slots = insert_slots;
    args.inv_freq = freq_device.get();
    args.inv_freq_rows = 1;
    args.half = kHalf;
    args.attention_scaling = 1.0;
    cudaStream_t stream;
    check(cudaStreamCreate(&stream), "cudaStreamCreate");
    if (mc_kv_splice_cuda(&args, nullptr, 0, stream) != MC_OK) {
        std::fprintf(stderr, "mc_kv_splice_cuda: %s\n", mc_cuda_last_error());
        return 1;
    }
    check(cudaStreamSynchronize(stream), "the splice");
    k = k_device.back();
    v = v_device.back();

    double worst = 0;
    for (int row = 0; row < kRows; ++row) {
        for (int head = 0; head < kHeads; ++head) {
            for (int slot = 0; slot < kAfter; ++slot) {
                const int entry = slot < kStart ? slot : slot == kStart ? kLength : slot + kRemove - kInsert;
                const size_t from = at(table, row, head, slot);
                const std::vector<float> key = key_at(row, head, entry, slot, inv_freq);
                for (int d = 0; d < kDim; ++d) {
                    const double error = std::fabs(static_cast<double>(key[static_cast<size_t>(d)]) - k[from + d]);
                    if (!(error <= 1e-6) || v[from + d] != raw(row, head, entry, d)) {
                        std::fprintf(stderr, "row %d, head %d, slot %d, dimension %d is wrong\n", row, head, slot, d);
                        return 1;
                    }
                    worst = std::max(worst, error);
                }
            }
        }
    }
    for (size_t i = 0; i < static_cast<size_t>(kHeads) * kPage * kDim; ++i) {
        if (!std::isnan(k[i]) || !std::isnan(v[i])) {
            std::fprintf(stderr, "a page that belongs to no sequence was written\n");
            return 1;
        }
    }
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");
    std::printf("mc_kernels %s (sm %s): %d entries before, %d after; largest error of a key %.1e\n", mc_cuda_version(),
                mc_cuda_architectures(), kLength, kAfter, worst);
    return 0;
}
