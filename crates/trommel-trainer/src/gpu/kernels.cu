// The kernels of a GPU's passes; `twins.rs` says the same in Rust. They are compiled once, for the first model on a GPU.
//
// A row is one position of a batch, in `f32` or `bf16`; sums are in `f32` and in an order that depends on nothing but the shape.
// Indices that can exceed 2^32 are `size_t`. No header is included, so that no toolkit need be installed beside the compiler.

typedef unsigned short bf16;
typedef unsigned int u32;

#define NONE __int_as_float(0xff800000) // minus infinity

// Numbers that a thread takes at once, in one access of 8 or 16 bytes where there are four.
template <int N> struct Pack {
    float x[N];
};

template <int N> __device__ inline Pack<N> get(const float *from) {
    Pack<N> pack;
    if constexpr (N == 4) {
        float4 four = *(const float4 *)from;
        pack.x[0] = four.x, pack.x[1] = four.y, pack.x[2] = four.z, pack.x[3] = four.w;
    } else {
        pack.x[0] = *from;
    }
    return pack;
}

template <int N> __device__ inline Pack<N> get(const bf16 *from) {
    Pack<N> pack;
    if constexpr (N == 4) {
        uint2 four = *(const uint2 *)from;
        pack.x[0] = __uint_as_float(four.x << 16), pack.x[1] = __uint_as_float(four.x & 0xffff0000);
        pack.x[2] = __uint_as_float(four.y << 16), pack.x[3] = __uint_as_float(four.y & 0xffff0000);
    } else {
        pack.x[0] = __uint_as_float((u32)*from << 16);
    }
    return pack;
}

template <int N> __device__ inline void put(float *to, Pack<N> pack) {
    if constexpr (N == 4)
        *(float4 *)to = make_float4(pack.x[0], pack.x[1], pack.x[2], pack.x[3]);
    else
        *to = pack.x[0];
}

// To the nearest, ties to even; what is not a number stays none.
__device__ inline u32 rounded(float value) {
    u32 bits = __float_as_uint(value);
    return (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <int N> __device__ inline void put(bf16 *to, Pack<N> pack) {
    if constexpr (N == 4)
        *(uint2 *)to = make_uint2(rounded(pack.x[0]) | rounded(pack.x[1]) << 16, rounded(pack.x[2]) | rounded(pack.x[3]) << 16);
    else
        *to = rounded(pack.x[0]);
}

#define EACH for (int i = 0; i < N; i++)

// The sum of the values of a warp, in each of its threads.
__device__ inline float sum_of_warp(float value) {
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
}

// The same of all threads of a block, of at most 32 warps, all of them whole.
__device__ float sum(float value) {
    __shared__ float warps[32];
    value = sum_of_warp(value);
    __syncthreads(); // an earlier sum may still be read
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    return sum_of_warp(threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : 0.0f);
}

// The largest of some numbers, and the sum of their exponentials relative to it.
struct Tower {
    float top, total;
};

// That of two sets; of no numbers it is {-inf, 0}.
__device__ inline Tower both(Tower a, Tower b) {
    float top = fmaxf(a.top, b.top);
    if (top == NONE) return a;
    return {top, a.total * __expf(a.top - top) + b.total * __expf(b.top - top)};
}

// stream = x + branch; rows = stream / root mean square * gain. One block per row.
template <typename T, int N>
__device__ void norm(const float *x, const T *branch, const float *gain, float epsilon, int width, float *stream, T *rows,
                     float *inverse) {
    size_t at = (size_t)blockIdx.x * width;
    float squares = 0;
    for (int j = threadIdx.x * N; j < width; j += blockDim.x * N) {
        Pack<N> value = get<N>(x + at + j);
        if (branch) {
            Pack<N> more = get<N>(branch + at + j);
            EACH value.x[i] += more.x[i];
        }
        put<N>(stream + at + j, value);
        EACH squares += value.x[i] * value.x[i];
    }
    float scale = 1.0f / sqrtf(sum(squares) / width + epsilon);
    for (int j = threadIdx.x * N; j < width; j += blockDim.x * N) {
        Pack<N> value = get<N>(stream + at + j), factor = get<N>(gain + j);
        EACH value.x[i] *= scale * factor.x[i];
        put<N>(rows + at + j, value);
    }
    if (threadIdx.x == 0) inverse[blockIdx.x] = scale;
}

// Adds the gradient of the norm's input to `stream_gradient`, and leaves the gradient of the gain summed over this block's rows.
template <typename T, int N>
__device__ void norm_backward(const float *x, const float *inverse, const float *gain, const T *gradient, int width, int rows,
                              int first, float *stream_gradient, T *stream_rows, float *gain_parts) {
    extern __shared__ float gains[]; // (width); each thread touches its own columns only
    for (int j = threadIdx.x * N; j < width; j += blockDim.x * N) EACH gains[j + i] = 0;
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        size_t at = (size_t)row * width;
        float scale = inverse[row], dot = 0;
        for (int j = threadIdx.x * N; j < width; j += blockDim.x * N) {
            Pack<N> g = get<N>(gradient + at + j), value = get<N>(x + at + j), factor = get<N>(gain + j);
            EACH {
                dot += g.x[i] * factor.x[i] * value.x[i];
                gains[j + i] += g.x[i] * value.x[i] * scale;
            }
        }
        dot = sum(dot) * scale * scale * scale / width;
        for (int j = threadIdx.x * N; j < width; j += blockDim.x * N) {
            Pack<N> g = get<N>(gradient + at + j), value = get<N>(x + at + j), factor = get<N>(gain + j), out;
            EACH out.x[i] = g.x[i] * factor.x[i] * scale - value.x[i] * dot;
            if (!first) {
                Pack<N> before = get<N>(stream_gradient + at + j);
                EACH out.x[i] += before.x[i];
            }
            put<N>(stream_gradient + at + j, out);
            put<N>(stream_rows + at + j, out);
        }
    }
    for (int j = threadIdx.x * N; j < width; j += blockDim.x * N)
        EACH gain_parts[(size_t)blockIdx.x * width + j + i] = gains[j + i];
}

// total[j] += the sum of column j. Blocks of 32 columns by 16 rows.
extern "C" __global__ void add_columns(const float *parts, int rows, int width, float *total) {
    __shared__ float sums[16][32];
    int j = blockIdx.x * 32 + threadIdx.x;
    float value = 0;
    if (j < width)
        for (int row = threadIdx.y; row < rows; row += 16) value += parts[(size_t)row * width + j];
    sums[threadIdx.y][threadIdx.x] = value;
    __syncthreads();
    if (threadIdx.y == 0 && j < width) {
        for (int row = 1; row < 16; row++) value += sums[row][threadIdx.x];
        total[j] += value;
    }
}

// Where a thread's pairs of halves lie in packed rows (sequences, time, 3, heads, head) and in the parts (3, sequences, heads, time,
// head), and their angles; keys and queries are turned, values are not.
template <int N> struct Pairs {
    size_t packed, own;
    int part;
    bool none;
    Pack<N> cosine, sine;

    __device__ Pairs(const float *cosines, const float *sines, int sequences, int time, int heads, int half) {
        size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * N, rows = (size_t)sequences * time;
        none = i >= rows * 3 * heads * half;
        if (none) return;
        int j = i % half, head = i / half % heads;
        part = i / half / heads % 3;
        size_t row = i / half / heads / 3;
        int position = row % time, sequence = row / time;
        packed = ((row * 3 + part) * heads + head) * 2 * half + j;
        own = (((size_t)sequence * heads + head) * time + position) * 2 * half + j;
        cosine = get<N>(cosines + position * half + j), sine = get<N>(sines + position * half + j);
        if (part == 2) EACH cosine.x[i] = 1, sine.x[i] = 0;
    }
};

template <typename T, int N>
__device__ void split_heads(const T *qkv, const float *cosines, const float *sines, int sequences, int time, int heads, int half,
                            T *out) {
    Pairs<N> at(cosines, sines, sequences, time, heads, half);
    if (at.none) return;
    Pack<N> left = get<N>(qkv + at.packed), right = get<N>(qkv + at.packed + half), x, y;
    EACH x.x[i] = left.x[i] * at.cosine.x[i] - right.x[i] * at.sine.x[i];
    EACH y.x[i] = right.x[i] * at.cosine.x[i] + left.x[i] * at.sine.x[i];
    T *to = out + (size_t)at.part * sequences * heads * time * 2 * half + at.own;
    put<N>(to, x);
    put<N>(to + half, y);
}

// The way back, for gradients.
template <typename T, int N>
__device__ void join_heads(const T *q, const T *k, const T *v, const float *cosines, const float *sines, int sequences, int time,
                           int heads, int half, T *qkv) {
    Pairs<N> at(cosines, sines, sequences, time, heads, half);
    if (at.none) return;
    const T *from = (at.part == 0 ? q : at.part == 1 ? k : v) + at.own;
    Pack<N> left = get<N>(from), right = get<N>(from + half), x, y;
    EACH x.x[i] = left.x[i] * at.cosine.x[i] + right.x[i] * at.sine.x[i];
    EACH y.x[i] = right.x[i] * at.cosine.x[i] - left.x[i] * at.sine.x[i];
    put<N>(qkv + at.packed, x);
    put<N>(qkv + at.packed + half, y);
}

// (outer, a, b, inner) to (outer, b, a, inner).
template <typename T, int N> __device__ void swap(const T *x, size_t outer, int a, int b, int inner, T *out) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (i >= outer * a * b * inner) return;
    size_t j = i % inner, row = i / inner;
    size_t second = row % b, first = row / b % a, block = row / b / a;
    put<N>(out + ((block * b + second) * a + first) * inner + j, get<N>(x + i));
}

// The keys that a query sees, of those that its block of queries meets. One warp per query.
struct Seen {
    size_t at;
    int first, query, end;

    __device__ Seen(const u32 *starts, int rows, int time, int heads, int queries) {
        int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
        at = (size_t)row * time;
        query = row % time;
        end = row < rows ? min(time, (query / queries + 1) * queries) : 0;
        first = row < rows ? starts[(size_t)(row / time / heads) * time + query] : 0;
    }
    __device__ bool sees(int key) const { return first <= key && key <= query; }
};

// The shares of attention of one query over the keys from the start of its document to itself; zero elsewhere in the keys of its
// block of queries, and beyond them nothing is written.
template <typename T, int N>
__device__ void softmax(const float *scores, const u32 *starts, float scale, int rows, int time, int heads, int queries,
                        T *shares) {
    Seen seen(starts, rows, time, heads, queries);
    int lane = threadIdx.x % 32;
    Tower tower = {NONE, 0};
    for (int j = seen.first + lane; j <= seen.query && j < seen.end; j += 32)
        tower = both(tower, {scores[seen.at + j] * scale, 1});
    for (int offset = 16; offset > 0; offset /= 2)
        tower = both(tower, {__shfl_xor_sync(~0u, tower.top, offset), __shfl_xor_sync(~0u, tower.total, offset)});
    float share = 1.0f / tower.total;
    for (int j = lane * N; j < seen.end; j += 32 * N) {
        Pack<N> pack = {};
        if (j + N > seen.first && j <= seen.query) {
            pack = get<N>(scores + seen.at + j);
            EACH pack.x[i] = seen.sees(j + i) ? __expf(pack.x[i] * scale - tower.top) * share : 0.0f;
        }
        put<N>(shares + seen.at + j, pack);
    }
}

// From the gradient of the shares to that of the scores before they are scaled.
template <typename T, int N>
__device__ void softmax_backward(const T *shares, const float *gradient, const u32 *starts, float scale, int rows, int time,
                                 int heads, int queries, T *scores) {
    Seen seen(starts, rows, time, heads, queries);
    int lane = threadIdx.x % 32;
    float dot = 0;
    for (int j = seen.first / N * N + lane * N; j <= seen.query && j < seen.end; j += 32 * N) {
        Pack<N> p = get<N>(shares + seen.at + j), g = get<N>(gradient + seen.at + j);
        EACH dot += seen.sees(j + i) ? p.x[i] * g.x[i] : 0.0f;
    }
    dot = sum_of_warp(dot);
    for (int j = lane * N; j < seen.end; j += 32 * N) {
        Pack<N> pack = {};
        if (j + N > seen.first && j <= seen.query) {
            Pack<N> p = get<N>(shares + seen.at + j), g = get<N>(gradient + seen.at + j);
            EACH pack.x[i] = seen.sees(j + i) ? p.x[i] * (g.x[i] - dot) * scale : 0.0f;
        }
        put<N>(scores + seen.at + j, pack);
    }
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// gelu(x) = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), the tanh form.
#define GELU_SCALE 0.7978845608028654f
#define GELU_CUBE 0.044715f
__device__ inline float gelu_gate(float x) { return sigmoid(2 * GELU_SCALE * (x + GELU_CUBE * x * x * x)); }

// packed (rows, gated ? 2 * mlp : mlp) to (rows, mlp).
template <typename T, int N> __device__ void activate(const T *packed, int gated, size_t rows, int mlp, T *out) {
    size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (at >= rows * mlp) return;
    size_t from = gated ? at / mlp * 2 * mlp + at % mlp : at;
    Pack<N> x = get<N>(packed + from);
    if (gated) {
        Pack<N> up = get<N>(packed + from + mlp);
        EACH x.x[i] *= sigmoid(x.x[i]) * up.x[i];
    } else {
        EACH x.x[i] *= gelu_gate(x.x[i]);
    }
    put<N>(out + at, x);
}

template <typename T, int N>
__device__ void activate_backward(const T *packed, const T *gradient, int gated, size_t rows, int mlp, T *out, T *packed_gradient) {
    size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (at >= rows * mlp) return;
    size_t from = gated ? at / mlp * 2 * mlp + at % mlp : at;
    Pack<N> x = get<N>(packed + from), g = get<N>(gradient + at), value, slope;
    if (gated) {
        Pack<N> up = get<N>(packed + from + mlp), up_slope;
        EACH {
            float s = sigmoid(x.x[i]), silu = x.x[i] * s;
            value.x[i] = silu * up.x[i];
            slope.x[i] = g.x[i] * up.x[i] * (s + silu * (1 - s));
            up_slope.x[i] = g.x[i] * silu;
        }
        put<N>(packed_gradient + from + mlp, up_slope);
    } else {
        EACH {
            float s = gelu_gate(x.x[i]), inner = 2 * GELU_SCALE * (1 + 3 * GELU_CUBE * x.x[i] * x.x[i]);
            value.x[i] = x.x[i] * s;
            slope.x[i] = g.x[i] * (s + x.x[i] * s * (1 - s) * inner);
        }
    }
    put<N>(out + at, value);
    put<N>(packed_gradient + from, slope);
}

// The loss of one row of logits, and `scale` times its gradient; 0xffffffff is no target.
template <typename T, int N>
__device__ void cross_entropy(const float *logits, const u32 *targets, float scale, int vocab, float *losses, T *gradient) {
    __shared__ Tower towers[32];
    size_t at = (size_t)blockIdx.x * vocab;
    u32 target = targets[blockIdx.x];
    bool none = target == 0xffffffff;
    Tower tower = {NONE, 0};
    for (int j = threadIdx.x * N; j < vocab && !none; j += blockDim.x * N) {
        Pack<N> pack = get<N>(logits + at + j);
        float top = pack.x[0];
        EACH top = fmaxf(top, pack.x[i]);
        float total = 0;
        EACH total += __expf(pack.x[i] - top);
        tower = both(tower, {top, total});
    }
    for (int offset = 16; offset > 0; offset /= 2)
        tower = both(tower, {__shfl_xor_sync(~0u, tower.top, offset), __shfl_xor_sync(~0u, tower.total, offset)});
    if (threadIdx.x % 32 == 0) towers[threadIdx.x / 32] = tower;
    __syncthreads();
    tower = towers[0];
    for (int warp = 1; warp < blockDim.x / 32; warp++) tower = both(tower, towers[warp]);
    if (threadIdx.x == 0) losses[blockIdx.x] = none ? 0 : logf(tower.total) + tower.top - logits[at + target];
    if (!gradient) return;
    float share = scale / tower.total;
    for (int j = threadIdx.x * N; j < vocab; j += blockDim.x * N) {
        Pack<N> pack = {};
        if (!none) {
            pack = get<N>(logits + at + j);
            EACH pack.x[i] = __expf(pack.x[i] - tower.top) * share - (j + i == target ? scale : 0.0f);
        }
        put<N>(gradient + at + j, pack);
    }
}

// Adds the rows of each token, in their order, to its row of the table. One block per distinct token: `tokens[i]` stands at the
// places `order[bounds[i]..bounds[i + 1]]`.
extern "C" __global__ void add_rows(const float *rows, const u32 *tokens, const u32 *bounds, const u32 *order, int width,
                                    float *table) {
    float *to = table + (size_t)tokens[blockIdx.x] * width;
    u32 first = bounds[blockIdx.x], end = bounds[blockIdx.x + 1];
    for (int j = threadIdx.x; j < width; j += blockDim.x) {
        float value = 0;
        for (u32 i = first; i < end; i++) value += rows[(size_t)order[i] * width + j];
        to[j] += value;
    }
}

// The MLPs of up to 16 experts, (experts, numbers), each a sum of the basis (capacity, numbers) by its coefficients.
template <typename T, int N>
__device__ void mix(const float *alpha, const float *basis, int experts, int capacity, size_t numbers, T *out) {
    size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (at >= numbers) return;
    Pack<N> sums[16] = {};
    for (int r = 0; r < capacity; r++) {
        Pack<N> part = get<N>(basis + r * numbers + at);
#pragma unroll
        for (int e = 0; e < 16; e++) {
            float share = e < experts ? alpha[e * capacity + r] : 0.0f;
            EACH sums[e].x[i] += share * part.x[i];
        }
    }
#pragma unroll
    for (int e = 0; e < 16; e++)
        if (e < experts) put<N>(out + e * numbers + at, sums[e]);
}

// Each block's share of the sum of squares.
template <int N> __device__ void squares(const float *x, size_t len, float *parts) {
    float value = 0;
    size_t step = (size_t)gridDim.x * blockDim.x * N;
    for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * N; at < len; at += step) {
        Pack<N> pack = get<N>(x + at);
        EACH value += pack.x[i] * pack.x[i];
    }
    value = sum(value);
    if (threadIdx.x == 0) parts[blockIdx.x] = value;
}

// As `trommel_kernels::adamw::step`, of `part` numbers for each row of blocks; `rates`, if there are any, multiply the learning rate
// of each part.
template <int N>
__device__ void adamw(float *parameters, const float *gradient, float *m, float *v, size_t part, float learning_rate, float decay,
                      float beta1, float beta2, float epsilon, float correction1, float correction2, float gradient_scale,
                      const float *rates) {
    size_t first = blockIdx.y * part, step = (size_t)gridDim.x * blockDim.x * N;
    float rate = learning_rate * (rates ? rates[blockIdx.y] : 1.0f);
    for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * N; at < part; at += step) {
        Pack<N> g = get<N>(gradient + first + at), p = get<N>(parameters + first + at);
        Pack<N> mean = get<N>(m + first + at), square = get<N>(v + first + at);
        EACH {
            g.x[i] *= gradient_scale;
            mean.x[i] = beta1 * mean.x[i] + (1 - beta1) * g.x[i];
            square.x[i] = beta2 * square.x[i] + (1 - beta2) * g.x[i] * g.x[i];
            float change = mean.x[i] / correction1 / (sqrtf(square.x[i] / correction2) + epsilon);
            p.x[i] -= rate * (change + decay * p.x[i]);
        }
        put<N>(parameters + first + at, p);
        put<N>(m + first + at, mean);
        put<N>(v + first + at, square);
    }
}

// Kernels for `f32` only, by ones and by fours.
#define NUMBERS(N)                                                                                                             \
    extern "C" __global__ void squares_f32_##N(const float *x, size_t len, float *parts) { squares<N>(x, len, parts); }        \
    extern "C" __global__ void adamw_f32_##N(float *parameters, const float *gradient, float *m, float *v, size_t part,        \
                                             float learning_rate, float decay, float beta1, float beta2, float epsilon,        \
                                             float correction1, float correction2, float gradient_scale,                       \
                                             const float *rates) {                                                             \
        adamw<N>(parameters, gradient, m, v, part, learning_rate, decay, beta1, beta2, epsilon, correction1, correction2,      \
                 gradient_scale, rates);                                                                                       \
    }

NUMBERS(1)
NUMBERS(4)

// Each kernel for rows of either type, by ones and by fours.
#define KERNELS(T, N, form)                                                                                                    \
    extern "C" __global__ void norm_##form(const float *x, const T *branch, const float *gain, float epsilon, int width, float \
                                           *stream, T *rows, float *inverse) {                                                 \
        norm<T, N>(x, branch, gain, epsilon, width, stream, rows, inverse);                                                    \
    }                                                                                                                          \
    extern "C" __global__ void norm_backward_##form(const float *x, const float *inverse, const float *gain, const T           \
                                                    *gradient, int width, int rows, int first, float *stream_gradient, T       \
                                                    *stream_rows, float *gain_parts) {                                         \
        norm_backward<T, N>(x, inverse, gain, gradient, width, rows, first, stream_gradient, stream_rows, gain_parts);         \
    }                                                                                                                          \
    extern "C" __global__ void split_heads_##form(const T *qkv, const float *cosines, const float *sines, int sequences, int   \
                                                  time, int heads, int half, T *out) {                                         \
        split_heads<T, N>(qkv, cosines, sines, sequences, time, heads, half, out);                                             \
    }                                                                                                                          \
    extern "C" __global__ void join_heads_##form(const T *q, const T *k, const T *v, const float *cosines, const float *sines, \
                                                 int sequences, int time, int heads, int half, T *qkv) {                       \
        join_heads<T, N>(q, k, v, cosines, sines, sequences, time, heads, half, qkv);                                          \
    }                                                                                                                          \
    extern "C" __global__ void mix_##form(const float *alpha, const float *basis, int experts, int capacity, size_t numbers,   \
                                          T *out) {                                                                            \
        mix<T, N>(alpha, basis, experts, capacity, numbers, out);                                                              \
    }                                                                                                                          \
    extern "C" __global__ void swap_##form(const T *x, size_t outer, int a, int b, int inner, T *out) {                        \
        swap<T, N>(x, outer, a, b, inner, out);                                                                                \
    }                                                                                                                          \
    extern "C" __global__ void softmax_##form(const float *scores, const u32 *starts, float scale, int rows, int time, int     \
                                              heads, int queries, T *shares) {                                                 \
        softmax<T, N>(scores, starts, scale, rows, time, heads, queries, shares);                                              \
    }                                                                                                                          \
    extern "C" __global__ void softmax_backward_##form(const T *shares, const float *gradient, const u32 *starts, float scale, \
                                                       int rows, int time, int heads, int queries, T *scores) {                \
        softmax_backward<T, N>(shares, gradient, starts, scale, rows, time, heads, queries, scores);                           \
    }                                                                                                                          \
    extern "C" __global__ void activate_##form(const T *packed, int gated, size_t rows, int mlp, T *out) {                     \
        activate<T, N>(packed, gated, rows, mlp, out);                                                                         \
    }                                                                                                                          \
    extern "C" __global__ void activate_backward_##form(const T *packed, const T *gradient, int gated, size_t rows, int mlp, T \
                                                        *out, T *packed_gradient) {                                            \
        activate_backward<T, N>(packed, gradient, gated, rows, mlp, out, packed_gradient);                                     \
    }                                                                                                                          \
    extern "C" __global__ void cross_entropy_##form(const float *logits, const u32 *targets, float scale, int vocab, float     \
                                                    *losses, T *gradient) {                                                    \
        cross_entropy<T, N>(logits, targets, scale, vocab, losses, gradient);                                                  \
    }                                                                                                                          \

KERNELS(float, 1, f32_1)
KERNELS(float, 4, f32_4)
KERNELS(bf16, 1, bf16_1)
KERNELS(bf16, 4, bf16_4)
