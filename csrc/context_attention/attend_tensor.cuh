// Attention of up to 8 T rows to a range of slots on tensor cores: 16-bit heads of 64 or 128 dimensions that turn whole
// or not at all, over a cache of their dtype or of fp8. See kernel.cuh.
//
// A warp takes 16 slots at a time, on its own: keys and values go from memory into the operands' registers (fragments.cuh),
// the next slots' keys while these slots' values are awaited. Of a tile, lane 4 g + c has
//   keys      slots g and g + 8, every fourth piece of 8 dimensions from piece c: both members of the pairs that turn
//   scores    slots g and g + 8 of rows 2c and 2c + 1 of each 8
//   values    slots 2c, 2c + 1, 2c + 8, 2c + 9, pieces g and g + 8; sums: the same dimensions of rows 2c and 2c + 1
#pragma once

#include "tile_slots.cuh"

namespace mc::cuda {

constexpr int kTensorThreads = 128;

// A row, as its lane has it, turned. c: the lane's piece.
template <class E, int D>
MC_DEVICE void turn_row(const AttendCall& call, const Bands& bands, int c, int64_t position, float sigma, bool damped,
                        Quad (&row)[D / 32]) {
    const auto turn = [&](int band, float& x, float& y) {
        float cos, sin;
        cos_sin_16(turn_of(position, bands.step[band]), cos, sin);
        if (damped) {
            const float damp = bands.damping(band, sigma);
            cos *= damp;
            sin *= damp;
        }
        const float a = x * cos - y * sin;
        y = y * cos + x * sin;
        x = a;
    };
    if (call.interleaved) {
#pragma unroll
        for (int j = 0; j < D / 32; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float x = low_of<E>(row[j].x[i]), y = high_of<E>(row[j].x[i]);
                turn(16 * j + 4 * c + i, x, y);
                row[j].x[i] = pack_pair<E>(x, y);
            }
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < D / 64; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t &first = row[j].x[i], &second = row[j + D / 64].x[i];
            float x0 = low_of<E>(first), x1 = high_of<E>(first), y0 = low_of<E>(second), y1 = high_of<E>(second);
            turn(32 * j + 8 * c + 2 * i, x0, y0);
            turn(32 * j + 8 * c + 2 * i + 1, x1, y1);
            first = pack_pair<E>(x0, x1);
            second = pack_pair<E>(y0, y1);
        }
    }
}

// Of rows 2c and 2c + 1 of each 8.
template <int D, int T>
struct Running {
    float top[T][2], total[T][2];
    float sums[T][D / 16][4];
};

// Scores x [T][slot g: rows 2c, 2c + 1; slot g + 8] become probabilities' weights, as the product with values wants them.
template <class E, int D, int T>
MC_DEVICE void soften(float (&x)[T][4], Running<D, T>& state, uint32_t (&weights)[T][2]) {
#pragma unroll
    for (int t = 0; t < T; ++t) {
        float shrink[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float top = max(x[t][r], x[t][2 + r]);
            for (int lanes = 4; lanes < 32; lanes *= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, lanes));
            top = max(top, state.top[t][r]);
            shrink[r] = share(state.top[t][r], top);
            x[t][r] = share(x[t][r], top);
            x[t][2 + r] = share(x[t][2 + r], top);
            state.total[t][r] = state.total[t][r] * shrink[r] + (x[t][r] + x[t][2 + r]);
            state.top[t][r] = top;
        }
#pragma unroll
        for (int m = 0; m < D / 16; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) state.sums[t][m][i] *= shrink[i % 2];
        }
        weights[t][0] = transpose_8x8(pack_pair<E>(x[t][0], x[t][1]));
        weights[t][1] = transpose_8x8(pack_pair<E>(x[t][2], x[t][3]));
    }
}

template <class E, class S, int D, int T>
MC_DEVICE void add_values(const typename Piece<E, S>::Loaded (&values)[4][D / 64], const uint32_t (&weights)[T][2],
                          Running<D, T>& state) {
#pragma unroll
    for (int j = 0; j < D / 64; ++j) {
        Quad of[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) of[i] = Piece<E, S>::of(values[i][j]);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            const uint32_t a = of[0].x[m], b = of[1].x[m], c = of[2].x[m], d = of[3].x[m];
#pragma unroll
            for (int t = 0; t < T; ++t) {
                multiply_16x8x16<E>(state.sums[t][4 * j + m], lower_halves(a, b), upper_halves(a, b),
                                    lower_halves(c, d), upper_halves(c, d), weights[t][0], weights[t][1]);
            }
        }
    }
}

// What the warps have, joined.
template <class E, class S, int D, int T>
MC_DEVICE void join_warps(const AttendCall& c, const Part& p, SharedMemory& shared, const Running<D, T>& state) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int warps = static_cast<int>(blockDim.x) / 32;
    constexpr int kRows = 8 * T;
    const Span<float> tops = shared.take<float>(warps * kRows), totals = shared.take<float>(warps * kRows);
    const Span<float> sums = shared.take<float>(warps * kRows * D);
#pragma unroll
    for (int t = 0; t < T; ++t) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float total = state.total[t][r];
            for (int lanes = 4; lanes < 32; lanes *= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
            const int at = warp * kRows + 8 * t + 2 * (lane % 4) + r;
            if (lane < 4) {
                tops[at] = state.top[t][r];
                totals[at] = total;
            }
#pragma unroll
            for (int m = 0; m < D / 16; ++m) {
                const int dim = m / 4 * 64 + lane / 4 * 8 + m % 4 * 2;
                sums[at * D + dim] = state.sums[t][m][r];
                sums[at * D + dim + 1] = state.sums[t][m][2 + r];
            }
        }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < p.count * D; i += static_cast<int>(blockDim.x)) {
        const int row = i / D, dim = i % D;
        float top = -MC_INFINITY, total = 0.0f, sum = 0.0f;
        for (int w = 0; w < warps; ++w) top = max(top, tops[w * kRows + row]);
        for (int w = 0; w < warps; ++w) {
            const float weight = share(tops[w * kRows + row], top);
            total += weight * totals[w * kRows + row];
            sum += weight * sums[(w * kRows + row) * D + dim];
        }
        store_result<E, S>(c, p, row, dim, sum, top, total);
    }
}

// Queries of E, keys and values of S.
template <class E, class S, int D, int T>
__global__ void __launch_bounds__(kTensorThreads, T == 1 ? 3 : 2)
    attend_tensor(const __grid_constant__ AttendCall call) {
    MC_SHARED_MEMORY(memory);
    SharedMemory shared(memory);
    const Part p = part_of(call, static_cast<int>(blockIdx.x), 8 * T);
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, c = lane % 4;
    const int step = kTileSlots * static_cast<int>(blockDim.x) / 32;
    const bool turns = call.inv_freq != nullptr;

    // All that the block begins with is on its way together, one latency and not one after another: the first keys, even
    // if no row sees them, their positions, the queries, theirs, and the frequencies.
    using Stored = Piece<E, S>;
    const char *k = p.keys(call), *v = p.values(call);
    int tile = p.low + kTileSlots * (static_cast<int>(threadIdx.x) / 32);
    typename Stored::Loaded keys[2][D / 32];
    load_keys<D>(call, k, {tile + g < p.high, tile + g + 8 < p.high}, tile + g, c, keys);
    Slots now(call, p, tile + g);
    Quad query[T][D / 32];
    int64_t own[T];
#pragma unroll
    for (int t = 0; t < T; ++t) {
        const int row = 8 * t + g;
        const char* from = p.queries(call, min(row, p.count - 1)) + 16 * c;
#pragma unroll
        for (int j = 0; j < D / 32; ++j) query[t][j] = row < p.count ? read_constant<Quad>(from + 64 * j) : Quad{};
        own[t] = p.position(call, row);
    }
    const Bands bands = Bands::take(call, shared);
    bands.fill(call);
    __syncthreads();

    const Span<Quad> queries = shared.take<Quad>(T * D / 32 * 32);  // [T][D / 32][lanes]
    int64_t at[T][2], latest = -1;
    Running<D, T> state;
#pragma unroll
    for (int t = 0; t < T; ++t) {
        if (turns) turn_row<E, D>(call, bands, c, own[t], 0.0f, false, query[t]);
        latest = max(latest, own[t]);
        if (threadIdx.x < 32) {
#pragma unroll
            for (int j = 0; j < D / 32; ++j) queries[(t * (D / 32) + j) * 32 + lane] = query[t][j];
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            at[t][r] = __shfl_sync(0xffffffffu, own[t], 4 * (2 * c + r));
            state.top[t][r] = -MC_INFINITY;
            state.total[t][r] = 0.0f;
        }
#pragma unroll
        for (int m = 0; m < D / 16; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) state.sums[t][m][i] = 0.0f;
        }
    }
    for (int lanes = 4; lanes < 32; lanes *= 2) latest = max(latest, __shfl_xor_sync(0xffffffffu, latest, lanes));
    __syncthreads();

    const float scale = scale_of<S>(call, p);
    for (; tile < p.high; tile += step) {
        const Slots next(call, p, tile + step + g);
        const unsigned seen[2] = {__ballot_sync(0xffffffffu, now.seen(0, latest)),
                                  __ballot_sync(0xffffffffu, now.seen(1, latest))};
        const bool some = (seen[0] | seen[1]) != 0;
        typename Stored::Loaded values[4][D / 64];
        uint32_t weights[T][2];
        float x[T][4] = {};
        const Extras bias(call, p, call.bias, tile + g);
        if (some) {
            const Extras sigma(call, p, call.sigma, tile + g);
            Quad turned[2][D / 32];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int j = 0; j < D / 32; ++j) turned[i][j] = Stored::of(keys[i][j]);
                if (turns) turn_row<E, D>(call, bands, c, now.at[i], sigma.x[i], call.sigma != nullptr, turned[i]);
            }
#pragma unroll
            for (int t = 0; t < T; ++t) {
                for (int j = 0; j < D / 32; ++j) {
                    multiply<E>(x[t], turned[0][j], turned[1][j], queries[(t * (D / 32) + j) * 32 + lane]);
                }
            }
        }
        // On their way together, 8 KB a warp at D = 128; not before the keys have turned, which takes the registers.
        load_values<D>(call, v, seen, tile, lane, values);
        load_keys<D>(call, k, {next.seen(0, latest), next.seen(1, latest)}, tile + step + g, c, keys);
#pragma unroll
        for (int t = 0; t < T; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = 8 * t + 2 * c + i % 2, s = tile + g + i / 2 * 8;
                const bool visible = now.at[i / 2] >= 0 && now.at[i / 2] <= at[t][i % 2];
                x[t][i] = visible ? x[t][i] * scale + bias.x[i / 2] : -MC_INFINITY;
                if (call.logits && row < p.count && s < p.high) {
                    write(call.logits + p.index(call, row) * call.slots + s, x[t][i]);
                }
            }
        }
        if (some) {
            soften<E, D, T>(x, state, weights);
            add_values<E, S, D, T>(values, weights, state);
        }
        now = next;
    }
    join_warps<E, S, D, T>(call, p, shared, state);
}

template <int D, int T>
int64_t tensor_shared_bytes(int threads, int64_t half) {
    return Bands::bytes(half) + shared_bytes_of<Quad>(T * D / 32 * 32) +
           2 * shared_bytes_of<float>(threads / 32 * 8 * T) + shared_bytes_of<float>(threads / 32 * 8 * T * D);
}

}  // namespace mc::cuda
