// One decode step of T3's transformer, a Llama or a GPT-2, in float32: all layers in one parallel region. And its head, and the draw.
//
// At two rows a step is matrix-vector products: every weight is read once and used twice, so memory sets the pace, and
// operators called one by one take longer to call than to run. Here the threads enter once, share out each product's
// outputs, and meet where one's result is the other's input.
//
// Matrices lie as nn.Linear keeps them, [outputs, inputs], or as Int8Linear does: [outputs, inputs / 4] words of four
// weights, the lowest byte first, those at a word's own place in each quarter of the inputs; and a scale for each
// output. The cache lies as StaticEngine keeps it, [rows, heads, capacity, dim].

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <vector>

using Size = int64_t;

// `cpp_engine.py` has the same structures.
struct Matrix {
    const void* numbers;
    const float* scale;  // of each output of 8-bit numbers; none if they are floats
    const float* bias;   // of each output, or none
};

struct Norm {
    const float* weight;
    const float* shift;  // of a LayerNorm; none of an RMSNorm
};

struct Layer {
    Norm input_norm, post_norm;
    Matrix q, k, v, o, gate, up, down;  // without an `up`, the gate's GELU is all there is, as in a GPT-2
    float *keys, *values;
};

struct Model {
    Size n_layers, width, inner, heads, dim, capacity;
    double epsilon;
    const Layer* layers;
    Norm norm;
    const float *cos, *sin;  // [capacity, dim]; the first half of the sines has its sign turned; none: no rotation
};

namespace {

// As wide as the machine's registers: where the compiler has to split a vector, two rows' sums of four outputs no longer
// fit into them.
#ifdef __AVX512F__
constexpr int VECTOR_BYTES = 64;
#else
constexpr int VECTOR_BYTES = 32;
#endif
using Vector = float __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
using Words = int32_t __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
constexpr Size LANES = sizeof(Vector) / sizeof(float);
constexpr Size BLOCK = 4;  // outputs computed together, so that an input once loaded serves four products

const Vector& at(const float* numbers) { return *reinterpret_cast<const Vector*>(numbers); }
Vector& at(float* numbers) { return *reinterpret_cast<Vector*>(numbers); }

float sum(const Vector& v) {
    float total = 0;
    for (Size i = 0; i < LANES; ++i) total += v[i];
    return total;
}

// use(r, o, w[o] . x[r]) for ROWS rows and OUTPUTS outputs; `n` inputs, a multiple of LANES
template <int ROWS, int OUTPUTS, class Use>
void products(const float* w, const float* x, Size n, Use use) {
    Vector partial[ROWS][OUTPUTS] = {};
    for (Size i = 0; i < n; i += LANES)
        for (int o = 0; o < OUTPUTS; ++o)
            for (int r = 0; r < ROWS; ++r) partial[r][o] += at(w + o * n + i) * at(x + r * n + i);
    for (int r = 0; r < ROWS; ++r)
        for (int o = 0; o < OUTPUTS; ++o) use(r, o, sum(partial[r][o]));
}

// The same for words of four 8-bit numbers, whose scale is for `use` to apply; `n` a multiple of 4 LANES
template <int ROWS, int OUTPUTS, class Use>
void products(const int32_t* w, const float* x, Size n, Use use) {
    const Size quarter = n / 4;
    Vector partial[ROWS][OUTPUTS] = {};
    for (Size i = 0; i < quarter; i += LANES)
        for (int o = 0; o < OUTPUTS; ++o) {
            const Words words = *reinterpret_cast<const Words*>(w + o * quarter + i);
            for (int byte = 0; byte < 4; ++byte) {
                const Vector numbers = __builtin_convertvector((words << (24 - 8 * byte)) >> 24, Vector);
                for (int r = 0; r < ROWS; ++r) partial[r][o] += numbers * at(x + r * n + byte * quarter + i);
            }
        }
    for (int r = 0; r < ROWS; ++r)
        for (int o = 0; o < OUTPUTS; ++o) use(r, o, sum(partial[r][o]));
}

// use(row, output, w[output] . x[row]) for all rows and OUTPUTS outputs from `output` on
template <int OUTPUTS, class Number, class Use>
void multiply_rows(const Number* w, const float* x, Size rows, Size n, Size output, Use use) {
    const auto from = [&](Size row) { return [=](Size r, Size o, float y) { use(row + r, output + o, y); }; };
    w += output * (std::is_same_v<Number, float> ? n : n / 4);
    Size row = 0;
    for (; row + 2 <= rows; row += 2) products<2, OUTPUTS>(w, x + row * n, n, from(row));
    if (row < rows) products<1, OUTPUTS>(w, x + row * n, n, from(row));
}

// The same for this thread's share of the outputs, in whole blocks; what is left over is the last thread's.
template <class Number, class Use>
void multiply_share(const Number* w, const float* x, Size rows, Size n, Size outputs, Use use) {
    const Size blocks = outputs / BLOCK, threads = omp_get_num_threads(), thread = omp_get_thread_num();
    for (Size block = blocks * thread / threads; block < blocks * (thread + 1) / threads; ++block)
        multiply_rows<BLOCK>(w, x, rows, n, block * BLOCK, use);
    if (thread == threads - 1)
        for (Size output = blocks * BLOCK; output < outputs; ++output) multiply_rows<1>(w, x, rows, n, output, use);
}

template <class Use>
void multiply(const Matrix& w, const float* x, Size rows, Size n, Size outputs, Use use) {
    const auto added = [&](Size output) { return w.bias ? w.bias[output] : 0; };
    if (w.scale)
        multiply_share(static_cast<const int32_t*>(w.numbers), x, rows, n, outputs, [&](Size row, Size output, float y) {
            use(row, output, y * w.scale[output] + added(output));
        });
    else
        multiply_share(static_cast<const float*>(w.numbers), x, rows, n, outputs,
                       [&](Size row, Size output, float y) { use(row, output, y + added(output)); });
}

void normalize(const float* x, const Norm& norm, double epsilon, Size rows, Size n, float* out) {
    for (Size row = 0; row < rows; ++row, x += n, out += n) {
        Vector total = {}, squares = {};
        float mean = 0;
        if (norm.shift) {
            for (Size i = 0; i < n; i += LANES) total += at(x + i);
            mean = sum(total) / n;
        }
        for (Size i = 0; i < n; i += LANES) squares += (at(x + i) - mean) * (at(x + i) - mean);
        const float scale = 1 / std::sqrt(sum(squares) / n + epsilon);
        for (Size i = 0; i < n; i += LANES) at(out + i) = (at(x + i) - mean) * scale * at(norm.weight + i);
        if (norm.shift)
            for (Size i = 0; i < n; i += LANES) at(out + i) += at(norm.shift + i);
    }
}

float silu(float x) { return x / (1 + std::exp(-x)); }

// GPT-2's, with tanh(u) = 2 / (1 + exp(-2 u)) - 1
float gelu(float x) { return x / (1 + std::exp(-1.5957691216057308f * (x + 0.044715f * x * x * x))); }

// A head's numbers turned by its position; the halves are each other's imaginary part.
void rotate(const float* x, const float* cos, const float* sin, Size dim, float* out) {
    for (Size i = 0; i < dim; ++i) out[i] = x[i] * cos[i] + x[(i + dim / 2) % dim] * sin[i];
}

// The mean of `values` over the slots [0, length), weighted by the softmax of q . keys over those that are visible.
void attend(const float* q, const float* keys, const float* values, const bool* visible, Size length, Size dim,
            float* scores, float* out) {
    const float scale = 1 / std::sqrt(float(dim));
    float highest = -INFINITY;
    for (Size slot = 0; slot < length; ++slot) {
        products<1, 1>(keys + slot * dim, q, dim, [&](Size, Size, float score) { scores[slot] = score * scale; });
        if (!visible[slot]) scores[slot] = -INFINITY;
        highest = std::max(highest, scores[slot]);
    }
    float total = 0;
    std::fill_n(out, dim, 0.0f);
    for (Size slot = 0; slot < length; ++slot) {
        const float weight = std::exp(scores[slot] - highest);
        total += weight;
        for (Size i = 0; i < dim; i += LANES) at(out + i) += weight * at(values + slot * dim + i);
    }
    for (Size i = 0; i < dim; i += LANES) at(out + i) /= total;
}

}  // namespace

// x [rows, width] at the slot `position` -> the last hidden state, in place. A row's positions count without its
// `pads` slots of padding, and it sees those slots that are set in `visible` [rows, capacity].
extern "C" void decode_step(const Model* model, Size rows, Size position, const Size* pads, const bool* visible,
                            float* x, int threads) {
    const Model& m = *model;
    const Size width = m.width, inner = m.inner, dim = m.dim;
    std::vector<float> q(rows * width), k(rows * width), v(rows * width), seen(rows * width), gated(rows * inner);

#pragma omp parallel num_threads(threads)
    {
        std::vector<float> normed(rows * width), turned(dim), scores(position + 1);  // each thread's own
        const auto norm = [&](const Norm& by) { normalize(x, by, m.epsilon, rows, width, normed.data()); };
        const auto into = [width](std::vector<float>& out) {
            return [&out, width](Size row, Size i, float y) { out[row * width + i] = y; };
        };
        const auto residual = [x, width](Size row, Size i, float y) { x[row * width + i] += y; };

        for (Size index = 0; index < m.n_layers; ++index) {
            const Layer& layer = m.layers[index];
            norm(layer.input_norm);
            multiply(layer.q, normed.data(), rows, width, width, into(q));
            multiply(layer.k, normed.data(), rows, width, width, into(k));
            multiply(layer.v, normed.data(), rows, width, width, into(v));
#pragma omp barrier
#pragma omp for
            for (Size head = 0; head < rows * m.heads; ++head) {
                const Size row = head / m.heads, turn = std::max<Size>(position - pads[row], 0) * dim;
                float *keys = layer.keys + head * m.capacity * dim, *values = layer.values + head * m.capacity * dim;
                const float* query = &q[head * dim];
                std::copy_n(&v[head * dim], dim, values + position * dim);
                if (m.cos) {
                    rotate(&k[head * dim], m.cos + turn, m.sin + turn, dim, keys + position * dim);
                    rotate(query, m.cos + turn, m.sin + turn, dim, turned.data());
                    query = turned.data();
                } else {
                    std::copy_n(&k[head * dim], dim, keys + position * dim);
                }
                attend(query, keys, values, visible + row * m.capacity, position + 1, dim, scores.data(),
                       &seen[head * dim]);
            }  // where the threads meet as well
            multiply(layer.o, seen.data(), rows, width, width, residual);
#pragma omp barrier
            norm(layer.post_norm);
            const auto activate = layer.up.numbers ? silu : gelu;
            multiply(layer.gate, normed.data(), rows, width, inner,
                     [&](Size row, Size i, float y) { gated[row * inner + i] = activate(y); });
            if (layer.up.numbers)
                multiply(layer.up, normed.data(), rows, width, inner, [&](Size row, Size i, float y) {
                    gated[row * inner + i] *= y;  // the same thread's as above
                });
#pragma omp barrier
            multiply(layer.down, gated.data(), rows, inner, width, residual);
#pragma omp barrier
        }
#pragma omp single
        {
            norm(m.norm);
            std::copy(normed.begin(), normed.end(), x);
        }
    }
}

// x [rows, n] -> out [rows, outputs]; `bias` may be none
extern "C" void linear(const float* w, const float* bias, Size rows, Size n, Size outputs, const float* x, float* out,
                       int threads) {
    const Matrix matrix = {w, nullptr, bias};
#pragma omp parallel num_threads(threads)
    multiply(matrix, x, rows, n, outputs, [=](Size row, Size o, float y) { out[row * outputs + o] = y; });
}

namespace {

float penalized(float logit, bool seen, float penalty) {
    return !seen ? logit : logit < 0 ? logit * penalty : logit / penalty;
}

void drop_below(std::vector<float>& logits, float least) {
    for (float& logit : logits)
        if (logit < least) logit = -INFINITY;
}

// The k-th largest of the logits.
float last_of(const std::vector<float>& logits, Size k) {
    std::vector<float> sorted(logits);
    std::nth_element(sorted.begin(), sorted.begin() + k - 1, sorted.end(), std::greater<float>());
    return sorted[k - 1];
}

// The least likely of those that stay when the least likely ones that together have no more than 1 - top_p go.
float last_of_nucleus(const std::vector<float>& logits, float top_p) {
    std::vector<float> rising;
    for (const float logit : logits)
        if (logit > -INFINITY) rising.push_back(logit);
    std::sort(rising.begin(), rising.end());
    double total = 0, below = 0;
    for (const float logit : rising) total += std::exp(logit - rising.back());
    for (const float logit : rising) {
        below += std::exp(logit - rising.back());
        if (below > (1 - top_p) * total) return logit;
    }
    return rising.back();
}

}  // namespace

// How a row's token is drawn; as in `cpp_engine.py`.
struct Filters {
    float penalty, temperature, min_p, top_p;
    Size top_k;  // 0: none
    bool penalizes_last;
};

// `sampling.py`'s draw for logits [rows, n] and exponential times of the same shape -> ids [rows]. An id's probability
// matters only beside others', so nothing is normalized, and what min-p drops needs no exponential.
extern "C" void draw(const float* logits, const bool* seen, const float* times, Size rows, Size n,
                     const Filters* filters, Size* ids) {
    const Filters& f = *filters;
    std::vector<float> heated(n);
    for (Size row = 0; row < rows; ++row, logits += n, seen += n, times += n) {
        for (Size i = 0; i < n; ++i)
            heated[i] = (f.penalizes_last ? logits[i] : penalized(logits[i], seen[i], f.penalty)) / f.temperature;
        const bool more = f.top_k || f.top_p < 1 || f.penalizes_last;
        float highest = *std::max_element(heated.begin(), heated.end());
        if (more && f.min_p > 0) drop_below(heated, highest + std::log(f.min_p));
        if (f.top_k && f.top_k < n) drop_below(heated, last_of(heated, f.top_k));
        if (f.top_p < 1) drop_below(heated, last_of_nucleus(heated, f.top_p));
        if (f.penalizes_last) {
            for (Size i = 0; i < n; ++i) heated[i] = penalized(heated[i], seen[i], f.penalty);
            highest = *std::max_element(heated.begin(), heated.end());
        }
        const float min_p = more ? 0 : f.min_p, hopeless = highest + std::log(min_p) - 1e-3f;
        float best = -1;
        for (Size i = 0; i < n; ++i) {
            if (heated[i] < hopeless || heated[i] == -INFINITY) continue;
            const float likelihood = std::exp(heated[i] - highest);
            if (likelihood < min_p || likelihood / times[i] <= best) continue;
            best = likelihood / times[i];
            ids[row] = i;
        }
    }
}
