// What HiFT is made of, in float32 over signals with the channels innermost: 1-D convolutions, and Snake between them.
//
// A library's convolution is made for one length of its input, with machine code of its own, and speech has a new
// length every time; this one takes any. A few frames by 16 outputs stay in registers while their inputs go by: every
// number of the signal that is loaded serves 16 products, every one of the weights as many as there are frames.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

using Size = int64_t;

namespace {

#ifdef __AVX512F__
constexpr int VECTOR_BYTES = 64;
constexpr int FRAMES = 12;
#else
constexpr int VECTOR_BYTES = 32;
constexpr int FRAMES = 6;
#endif
using Vector = float __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
constexpr Size LANES = sizeof(Vector) / sizeof(float);
constexpr Size OUTPUTS = 16;  // computed together; `hift.py` has the same number
constexpr Size VECTORS = OUTPUTS / LANES;
constexpr Size SHARE = 16 * FRAMES;  // frames that a thread takes at once

const Vector& at(const float* numbers) { return *reinterpret_cast<const Vector*>(numbers); }
Vector& at(float* numbers) { return *reinterpret_cast<Vector*>(numbers); }

// N frames by OUTPUTS outputs: x at what the first tap of the first frame reads, w and bias at the first output.
template <int N>
void tile(const float* x, const float* w, const float* bias, Size taps, Size dilation, Size inputs, float* y,
          Size outputs, Size kept) {
    Vector sums[N][VECTORS];
    for (int n = 0; n < N; ++n)
        for (int v = 0; v < VECTORS; ++v) sums[n][v] = at(bias + v * LANES);
    for (Size tap = 0; tap < taps; ++tap, x += dilation * inputs)
        for (Size i = 0; i < inputs; ++i, w += OUTPUTS)
            for (int n = 0; n < N; ++n)
                for (int v = 0; v < VECTORS; ++v) sums[n][v] += x[n * inputs + i] * at(w + v * LANES);
    for (int n = 0; n < N; ++n, y += outputs) {
        float row[OUTPUTS];
        std::memcpy(row, sums[n], sizeof row);
        std::copy_n(row, kept, y);
    }
}

// The nearest multiple of pi taken off, what is left is within a quarter turn, where a few terms of the sine's series
// are exact to rounding; what the turn does to the sign, the square undoes.
Vector squared_sine(const Vector& x) {
    constexpr float NEAREST = 1.5f * (1 << 23);  // what is added to this has no room for a fraction
    constexpr float PI = 3.140625f, MORE_PI = 9.67653589793e-4f;  // together pi; the first times a turn is exact
    const Vector turns = (x * 0.318309886f + NEAREST) - NEAREST;
    const Vector r = (x - turns * PI) - turns * MORE_PI, s = r * r;
    const Vector series =
        1 + s * (-1 / 6.f + s * (1 / 120.f + s * (-1 / 5040.f + s * (1 / 362880.f + s * (-1 / 39916800.f)))));
    return s * series * series;
}

}  // namespace

// y = x + scale * sin(alpha x)^2 over [frames, channels], alpha and scale [channels]; whole vectors of channels.
extern "C" void snake(const float* x, const float* alpha, const float* scale, Size frames, Size channels, float* y,
                      int threads) {
#pragma omp parallel for num_threads(threads)
    for (Size frame = 0; frame < frames; ++frame)
        for (Size c = 0, i = frame * channels; c < channels; c += LANES, i += LANES)
            at(y + i) = at(x + i) + at(scale + c) * squared_sine(at(x + i) * at(alpha + c));
}

// x [rows, frames, inputs], zero before its begin and behind its end -> y [rows, frames, outputs]; the first tap of
// frame t reads frame t - padding. w [blocks of OUTPUTS outputs, taps, inputs, OUTPUTS] and bias [blocks * OUTPUTS].
extern "C" void convolve(const float* x, const float* w, const float* bias, Size rows, Size frames, Size inputs,
                         Size outputs, Size taps, Size dilation, Size padding, float* y, int threads) {
    const Size blocks = (outputs + OUTPUTS - 1) / OUTPUTS, shares = (frames + SHARE - 1) / SHARE;
    const Size reach = (taps - 1) * dilation;

#pragma omp parallel for collapse(3) num_threads(threads)
    for (Size row = 0; row < rows; ++row)
        for (Size block = 0; block < blocks; ++block)
            for (Size share = 0; share < shares; ++share) {
                const float* weights = w + block * taps * inputs * OUTPUTS;
                const float* biases = bias + block * OUTPUTS;
                const float* signal = x + row * frames * inputs;
                float* result = y + row * frames * outputs + block * OUTPUTS;
                const Size kept = std::min(OUTPUTS, outputs - block * OUTPUTS);
                const Size end = std::min(frames, (share + 1) * SHARE);
                for (Size t = share * SHARE; t < end;) {
                    const Size first = t - padding;  // the frame that the first tap reads
                    if (first >= 0 && t + FRAMES <= end && first + FRAMES - 1 + reach < frames) {
                        tile<FRAMES>(signal + first * inputs, weights, biases, taps, dilation, inputs,
                                     result + t * outputs, outputs, kept);
                        t += FRAMES;
                    } else {  // at the signal's ends, a frame at a time, with those taps that are within
                        const Size skipped = first < 0 ? (-first + dilation - 1) / dilation : 0;
                        const Size within = first < frames ? (frames - 1 - first) / dilation + 1 : 0;
                        const Size last = std::max(skipped, std::min(taps, within));
                        tile<1>(signal + (first + skipped * dilation) * inputs, weights + skipped * inputs * OUTPUTS,
                                biases, last - skipped, dilation, inputs, result + t * outputs, outputs, kept);
                        ++t;
                    }
                }
            }
}
