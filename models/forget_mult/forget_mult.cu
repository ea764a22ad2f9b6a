// The recurrence over time and the QRNN's pooling for a GPU; launched by cuda.py, which says what the arguments are.
//
// Arrays are time first and contiguous. A thread owns W neighbouring columns, walks over the steps, and keeps their
// states in registers: each number is read once and written once, neighbouring threads read neighbouring addresses.
// NVRTC compiles this without headers.

typedef long long Index;

struct Bfloat16 {
    unsigned short bits;
};

template <class T> struct WideOf {
    typedef float Type;
};
template <> struct WideOf<double> {
    typedef double Type;
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(Bfloat16 value) { return __uint_as_float((unsigned)value.bits << 16); }

__device__ __forceinline__ void narrow(float value, float &out) { out = value; }
__device__ __forceinline__ void narrow(double value, double &out) { out = value; }
__device__ __forceinline__ void narrow(float value, Bfloat16 &out) {
    unsigned bits = __float_as_uint(value);
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;  // rounding would make some of them infinite
    out.bits = nan ? 0x7fc0 : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

__device__ __forceinline__ float exponential(float value) { return expf(value); }
__device__ __forceinline__ double exponential(double value) { return exp(value); }
__device__ __forceinline__ float hyperbolic(float value) { return tanhf(value); }
__device__ __forceinline__ double hyperbolic(double value) { return tanh(value); }
__device__ __forceinline__ float soft(float value) { return fmaxf(value, 0.0f) + log1pf(expf(-fabsf(value))); }
__device__ __forceinline__ double soft(double value) { return fmax(value, 0.0) + log1p(exp(-fabs(value))); }

template <class A> __device__ __forceinline__ A sigmoid(A value) { return A(1) / (A(1) + exponential(-value)); }

// W neighbours, read and written in one instruction.
template <class T, int W> struct __align__(sizeof(T) * W) Pack {
    T values[W];
};

template <class T, int W> __device__ __forceinline__ Pack<T, W> load(const T *from) {
    return *reinterpret_cast<const Pack<T, W> *>(from);
}

template <class T, int W> __device__ __forceinline__ void store(T *to, const Pack<T, W> &pack) {
    *reinterpret_cast<Pack<T, W> *>(to) = pack;
}

template <int W> __device__ __forceinline__ Index first_column() {
    return ((Index)blockIdx.x * blockDim.x + threadIdx.x) * W;
}

// h_t = g_t x_t + (1 - g_t) h_{t-1} if MIX, else h_t = g_t h_{t-1} + x_t.
template <class T, int W, bool MIX>
__device__ __forceinline__ void forward(const T *gate, const T *x, const typename WideOf<T>::Type *initial, T *h,
                                        Index steps, Index columns, int reverse) {
    typedef typename WideOf<T>::Type A;
    const Index column = first_column<W>();
    if (column >= columns) return;
    Pack<A, W> state = load<A, W>(initial + column);
    const Index stride = reverse ? -columns : columns;
    Index at = reverse ? (steps - 1) * columns + column : column;
#pragma unroll 4
    for (Index step = 0; step < steps; ++step, at += stride) {
        const Pack<T, W> gates = load<T, W>(gate + at), values = load<T, W>(x + at);
        Pack<T, W> out;
#pragma unroll
        for (int w = 0; w < W; ++w) {
            const A g = widen(gates.values[w]), value = widen(values.values[w]);
            state.values[w] = MIX ? state.values[w] + g * (value - state.values[w]) : g * state.values[w] + value;
            narrow(state.values[w], out.values[w]);
        }
        store<T, W>(h + at, out);
    }
}

// The gradients by gate, x and the state before the first step, given slope, that by h.
template <class T, int W, bool MIX>
__device__ __forceinline__ void
backward(const T *slope, const T *gate, const T *x, const T *h, const typename WideOf<T>::Type *initial, T *d_gate,
         T *d_x, typename WideOf<T>::Type *d_initial, Index steps, Index columns, int reverse) {
    typedef typename WideOf<T>::Type A;
    const Index column = first_column<W>();
    if (column >= columns) return;
    const Pack<A, W> first = load<A, W>(initial + column);
    Pack<A, W> sums;
#pragma unroll
    for (int w = 0; w < W; ++w) sums.values[w] = A(0);
    const Index stride = reverse ? columns : -columns;  // to the step before, from whose h this one was made
    Index at = reverse ? column : (steps - 1) * columns + column;
#pragma unroll 4
    for (Index step = steps - 1; step >= 0; --step, at += stride) {
        const Pack<T, W> slopes = load<T, W>(slope + at), gates = load<T, W>(gate + at);
        Pack<T, W> values = gates, old = gates, to_gate, to_x;
        if (MIX) values = load<T, W>(x + at);
        if (step > 0) old = load<T, W>(h + at + stride);
#pragma unroll
        for (int w = 0; w < W; ++w) {
            const A before = step > 0 ? A(widen(old.values[w])) : first.values[w];
            const A total = widen(slopes.values[w]) + sums.values[w], g = widen(gates.values[w]);
            narrow(MIX ? total * (widen(values.values[w]) - before) : total * before, to_gate.values[w]);
            narrow(MIX ? total * g : total, to_x.values[w]);
            sums.values[w] = MIX ? total - total * g : total * g;
        }
        store<T, W>(d_gate + at, to_gate);
        store<T, W>(d_x + at, to_x);
    }
    store<A, W>(d_initial + column, sums);
}

template <class A> __device__ __forceinline__ A candidate_of(int kind, A raw) {
    return kind == 0 ? hyperbolic(raw) : kind == 1 ? sigmoid(raw) : kind == 2 ? soft(raw) : exponential(raw);
}

template <class A> __device__ __forceinline__ A candidate_slope(int kind, A raw, A value) {
    return kind == 0 ? A(1) - value * value : kind == 1 ? value * (A(1) - value) : kind == 2 ? sigmoid(raw) : value;
}

// Steps whose loads start before the first of them is computed; activations have branches, which stop the compiler.
#define AHEAD 4

// The raw gates z, f, o, i of a column at a step, `features` apart, and the part of the update that is made.
template <class T, int KINDS> struct Row {
    T gates[KINDS];
    bool allowed;
    __device__ __forceinline__ void read(const T *from, Index features, const unsigned char *update, Index at) {
#pragma unroll
        for (int kind = 0; kind < KINDS; ++kind) gates[kind] = from[kind * features];
        allowed = !update || update[at];
    }
};

// Where a column's gates lie in the first row, of KINDS * features for each of the batch.
template <int KINDS> __device__ __forceinline__ Index gates_at(Index column, Index features) {
    return column / features * features * KINDS + column % features;
}

// c_t = c_{t-1} + m_t f_t (z_t - c_{t-1}), or with KINDS == 4 c_t = c_{t-1} + m_t (i_t z_t - (1 - f_t) c_{t-1}), and
// output o_t c_t; m_t: keep where `update` is set, 0 where not. Without o (KINDS == 2) only c is written.
template <class T, int KINDS>
__device__ __forceinline__ void pool(const T *gates, const typename WideOf<T>::Type *initial,
                                     const unsigned char *update, typename WideOf<T>::Type *c,
                                     typename WideOf<T>::Type *output, Index steps, Index columns, Index features,
                                     typename WideOf<T>::Type keep, int candidate, int reverse) {
    typedef typename WideOf<T>::Type A;
    const Index column = first_column<1>();
    if (column >= columns) return;
    A state = initial[column];
    const Index stride = reverse ? -columns : columns;
    Index at = reverse ? (steps - 1) * columns + column : column;
    const T *row = gates + gates_at<KINDS>(column, features) + (at - column) * KINDS;
    for (Index done = 0; done < steps; done += AHEAD) {
        Row<T, KINDS> rows[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; ++u)
            if (done + u < steps) rows[u].read(row + u * stride * KINDS, features, update, at + u * stride);
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            if (done + u >= steps) break;
            const A z = candidate_of<A>(candidate, widen(rows[u].gates[0])), f = sigmoid<A>(widen(rows[u].gates[1]));
            const A m = rows[u].allowed ? keep : A(0);
            if (KINDS == 4) {
                const A i = sigmoid<A>(widen(rows[u].gates[KINDS - 1]));
                state += m * (i * z - (A(1) - f) * state);
            } else {
                state += m * f * (z - state);
            }
            c[at] = state;
            if (KINDS > 2) output[at] = state * sigmoid<A>(widen(rows[u].gates[KINDS > 2 ? 2 : 0]));
            at += stride;
        }
        row += AHEAD * stride * KINDS;
    }
}

// The gradients by the raw gates, from which activations are made again, and by the state before the first step;
// d_output: by the output; carried: by c after the last step at first, by that state in the end.
template <class T, int KINDS>
__device__ __forceinline__ void
pool_back(const typename WideOf<T>::Type *d_output, const T *gates, const typename WideOf<T>::Type *initial,
          const unsigned char *update, const typename WideOf<T>::Type *c, T *d_gates,
          typename WideOf<T>::Type *carried, Index steps, Index columns, Index features,
          typename WideOf<T>::Type keep, int candidate, int reverse) {
    typedef typename WideOf<T>::Type A;
    const Index column = first_column<1>();
    if (column >= columns) return;
    A sums = carried[column];
    const Index stride = reverse ? columns : -columns;
    Index at = reverse ? column : (steps - 1) * columns + column;
    Index row = gates_at<KINDS>(column, features) + (at - column) * KINDS;
    A state = c[at];
    for (Index left = steps; left > 0; left -= AHEAD) {
        Row<T, KINDS> rows[AHEAD];
        A outer[AHEAD], old[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            if (left <= u) continue;
            rows[u].read(gates + row + u * stride * KINDS, features, update, at + u * stride);
            outer[u] = d_output[at + u * stride];
            old[u] = left - u > 1 ? c[at + (u + 1) * stride] : initial[column];
        }
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            if (left <= u) break;
            T *slopes = d_gates + row;
            const A raw = widen(rows[u].gates[0]), z = candidate_of<A>(candidate, raw);
            const A f = sigmoid<A>(widen(rows[u].gates[1]));
            A total = outer[u];
            if (KINDS > 2) {
                const A o = sigmoid<A>(widen(rows[u].gates[KINDS > 2 ? 2 : 0]));
                narrow(total * state * o * (A(1) - o), slopes[2 * features]);
                total *= o;
            }
            total += sums;
            const A d = total * (rows[u].allowed ? keep : A(0));
            A d_z;
            if (KINDS == 4) {
                const A i = sigmoid<A>(widen(rows[u].gates[KINDS - 1]));
                d_z = d * i;
                narrow(d * z * i * (A(1) - i), slopes[3 * features]);
                narrow(d * old[u] * f * (A(1) - f), slopes[features]);
                sums = total - d * (A(1) - f);
            } else {
                d_z = d * f;
                narrow(d * (z - old[u]) * f * (A(1) - f), slopes[features]);
                sums = total - d * f;
            }
            narrow(d_z * candidate_slope<A>(candidate, raw, z), slopes[0]);
            state = old[u];
            at += stride;
            row += stride * KINDS;
        }
    }
    carried[column] = sums;
}

// __restrict__ lets the loads of later steps start before this step's stores; the compiler wants it on the entries.
#define IN(T) const T *__restrict__
#define OUT(T) T *__restrict__
#define WIDE(T) WideOf<T>::Type
#define RECURRENCE(NAME, T, W, MIX)                                                                                    \
    extern "C" __global__ void forward_##NAME(IN(T) gate, IN(T) x, IN(WIDE(T)) initial, OUT(T) h, Index steps,         \
                                              Index columns, int reverse) {                                            \
        forward<T, W, MIX>(gate, x, initial, h, steps, columns, reverse);                                              \
    }                                                                                                                  \
    extern "C" __global__ void backward_##NAME(IN(T) slope, IN(T) gate, IN(T) x, IN(T) h, IN(WIDE(T)) initial,         \
                                               OUT(T) d_gate, OUT(T) d_x, OUT(WIDE(T)) d_initial, Index steps,         \
                                               Index columns, int reverse) {                                           \
        backward<T, W, MIX>(slope, gate, x, h, initial, d_gate, d_x, d_initial, steps, columns, reverse);              \
    }
#define POOLING(NAME, T, KINDS)                                                                                        \
    extern "C" __global__ void pool_##NAME(IN(T) gates, IN(WIDE(T)) initial, IN(unsigned char) update,                 \
                                           OUT(WIDE(T)) c, OUT(WIDE(T)) output, Index steps, Index columns,            \
                                           Index features, WIDE(T) keep, int candidate, int reverse) {                 \
        pool<T, KINDS>(gates, initial, update, c, output, steps, columns, features, keep, candidate, reverse);         \
    }                                                                                                                  \
    extern "C" __global__ void pool_back_##NAME(IN(WIDE(T)) d_output, IN(T) gates, IN(WIDE(T)) initial,                \
                                                IN(unsigned char) update, IN(WIDE(T)) c, OUT(T) d_gates,               \
                                                OUT(WIDE(T)) carried, Index steps, Index columns, Index features,      \
                                                WIDE(T) keep, int candidate, int reverse) {                            \
        pool_back<T, KINDS>(d_output, gates, initial, update, c, d_gates, carried, steps, columns, features, keep,     \
                            candidate, reverse);                                                                       \
    }
#define ALL_OF(NAME, T, W)                                                                                             \
    RECURRENCE(mix_##NAME##_1, T, 1, true)                                                                             \
    RECURRENCE(mix_##NAME##_##W, T, W, true)                                                                           \
    RECURRENCE(sum_##NAME##_1, T, 1, false)                                                                            \
    RECURRENCE(sum_##NAME##_##W, T, W, false)                                                                          \
    POOLING(NAME##_2, T, 2)                                                                                            \
    POOLING(NAME##_3, T, 3)                                                                                            \
    POOLING(NAME##_4, T, 4)

ALL_OF(float32, float, 4)
ALL_OF(float64, double, 2)
ALL_OF(bfloat16, Bfloat16, 4)
