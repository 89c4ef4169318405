// Models as SIMD lanes: training and evaluation of populations of the paper's small CNNs on a CPU.
//
// A register holds one number of L different models (L = 16 with AVX-512). Every weight, activation and gradient below is
// such a register-wide value `V`: element l belongs to the l-th model of the block. What a scalar program would do for one
// model, this program does for L models in the same number of instructions. Only `gather`, which turns images into lanes,
// moves numbers from lane to lane; nothing that is calculated does, hence a model's bits depend on nothing but itself.
//
// The file reads bottom-up: vectors, elementary functions, random numbers, activations, layers, what Python hands over, the
// network with its optimizers, one epoch of training, evaluation, the C interface.
//
// Short names, in all layers: CI and CO are the numbers of input and output channels (or units), H and WIDTH the size of the
// input, K that of the kernel (KK = K * K), P that of the pooling window (Q = P * P), OH and OW the output before pooling, PH and
// PW after it, UH and UW the part before it that pooling uses. w and b are weights and biases, x inputs, y outputs, g gradients
// of the loss: gw with respect to weights, gb with respect to biases, gv with respect to the variances of variational layers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#else
#define LANES 4
#endif
#include "elementary.h"

// ---------------------------------------------------------------------------------------------------------------- vectors

constexpr int L = LANES;

#ifndef LANES_SCALAR  // the tests build the same templates in double precision to compare gradients with autograd
#define LANES_SCALAR float
#define LANES_FLOAT 1
#endif

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#define ROLL _Pragma("nounroll")
#else
#define UNROLL _Pragma("GCC unroll 64")
#define ROLL _Pragma("GCC unroll 1")  // for steps that fill the registers: several at once would spill them
#endif

#define PASS static __attribute__((noinline))  // over a layer: by itself, because registers are spent worse in a function of many passes
#define INNER static inline __attribute__((always_inline))

using Scalar = LANES_SCALAR;
using V = Vector<Scalar, L * sizeof(Scalar)>::type;    // one number per model
using D = Vector<double, L * 8>::type;                 // sums over an epoch
using Byte = Vector<int8_t, L>::type;                  // positions within a pooling window, masks
using Mask = decltype(V{} < V{});                      // what a comparison gives: integers as wide as Scalar, 0 or -1

static inline V splat(Scalar s) { return s - V{}; }
static inline V load(const V* p) { return *p; }
static inline V load(const Scalar* p) { return splat(*p); }  // a number that all models share (evaluation)

// A number that several multiply-adds are about to use, in a register: GCC would load it anew for each of them.
static inline V hold(V x) {
#if defined(__AVX512F__) && defined(LANES_FLOAT) && !defined(__clang__)
    asm("" : "+v"(x));
#elif defined(__AVX2__) && defined(LANES_FLOAT) && !defined(__clang__)
    asm("" : "+x"(x));
#endif
    return x;
}

static inline Mask widen(Byte b) {  // GCC would convert bytes one by one
#if defined(__AVX512F__) && defined(LANES_FLOAT)
    return (Mask)_mm512_cvtepi8_epi32((__m128i)b);
#elif defined(__AVX2__) && defined(LANES_FLOAT)
    return (Mask)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(as<int64_t>(b)));
#else
    return to<Mask>(b);
#endif
}

static inline Byte narrow(Mask m) {
#if defined(__AVX512F__) && defined(LANES_FLOAT)
    return (Byte)_mm512_cvtepi32_epi8((__m512i)m);
#else
    return to<Byte>(m);
#endif
}

// In double precision (tests only) the standard library does the work, lane by lane, and a multiply-add may round twice.
template <class G> static inline D each(D x, G g) { for (int l = 0; l < L; ++l) x[l] = g(x[l]); return x; }
static inline D multiply_add(D a, D b, D c) { return a * b + c; }
static inline D larger(D a, D b) { return a > b ? a : b; }
static inline D root(D x) { return each(x, [](double v) { return std::sqrt(v); }); }
static inline D exponential(D x) { return each(x, [](double v) { return std::exp(v); }); }
static inline D logarithm(D x) { return each(x, [](double v) { return std::log(v); }); }
static inline D hyperbolic_tangent(D x) { return each(x, [](double v) { return std::tanh(v); }); }
static inline D logistic(D x) { return each(x, [](double v) { return 1 / (1 + std::exp(-v)); }); }
static inline void normal_distribution(D x, D& below, D& density) {
    below = each(x, [](double v) { return 0.5 * std::erfc(-v * 0.70710678118654752); }), density = exponential(-0.5 * x * x);
}

// ---------------------------------------------------------------------------------------------------------- random numbers
// Philox4x32: even and odd lanes in turn, because a product of two words takes the place of two lanes.

struct Philox {
    W k0[ROUNDS][2], k1[ROUNDS][2];  // round keys of the even [0] and odd [1] lanes

    void seed(const uint32_t keys[L][2]) {
        U a, b;
        for (int l = 0; l < L; ++l) a[l] = keys[l][0], b[l] = keys[l][1];
        for (int r = 0; r < ROUNDS; ++r, a += W0, b += W1) {
            k0[r][0] = as<W>(a), k0[r][1] = as<W>(a) >> 32;
            k1[r][0] = as<W>(b), k1[r][1] = as<W>(b) >> 32;
        }
    }

    // Four words per model. All models have the same counter, so the first round multiplies plain numbers.
    inline void draw(uint32_t block, uint32_t site, uint32_t position, uint32_t epoch, U word[4]) const {
        const uint64_t first = (uint64_t)block * M0, second = (uint64_t)position * M1;
        W half[2][4];
        UNROLL for (int h = 0; h < 2; ++h) {
            W c0 = k0[0][h] ^ ((second >> 32) ^ site), c1 = W{} + second, c2 = k1[0][h] ^ ((first >> 32) ^ epoch), c3 = W{} + first;
            UNROLL for (int r = 1; r < ROUNDS; ++r) philox_round(c0, c1, c2, c3, k0[r][h], k1[r][h]);
            half[h][0] = c0, half[h][1] = c1, half[h][2] = c2, half[h][3] = c3;
        }
        UNROLL for (int i = 0; i < 4; ++i) word[i] = as<U>((half[0][i] & 0xffffffffu) | (half[1][i] << 32));
    }
};

// The normal numbers of a site from `first_number` on, a multiple of four. First many words, then many numbers: either loop
// alone has independent steps that the processor can overlap.
static void normals(const Philox& stream, uint32_t site, uint32_t position, uint32_t epoch, int first_number, int count, V* out) {
    constexpr int CHUNK = 64;
    U word[CHUNK];
    for (int start = 0; start < count; start += CHUNK) {
        const int n = std::min(CHUNK, count - start);
        for (int i = 0; i < n; i += 4) stream.draw((first_number + start + i) / 4, site, position, epoch, word + i);
        for (int i = 0; i < n; i += 2) {
            F first, second;
            normal_pair(word[i], word[i + 1], first, second);
            out[start + i] = to<V>(first);
            if (i + 1 < n) out[start + i + 1] = to<V>(second);
        }
    }
}

// Dropout as a factor on values and slopes: 1/(1-p) for what is kept, else 0.
static void dropout(const Philox& stream, uint32_t site, uint32_t position, uint32_t epoch, U threshold, V scale, int count, V* y, V* slope) {
    for (int i = 0; i < count; i += 4) {
        U word[4];
        stream.draw(i / 4, site, position, epoch, word);
        for (int j = 0; j < 4 && i + j < count; ++j) {
            V factor = to<V>(word[j] >= threshold) * -scale;  // a true comparison is -1
            y[i + j] *= factor, slope[i + j] *= factor;
        }
    }
}

// The order of an epoch: sample numbers sorted by their random words, ties by number (a stable radix sort, 11 bits a pass).
static void shuffled(const std::vector<uint32_t>& words, std::vector<uint32_t>& order) {
    size_t n = words.size();
    std::vector<uint32_t> other(n);
    order.resize(n);
    for (size_t i = 0; i < n; ++i) order[i] = (uint32_t)i;
    for (int shift = 0; shift < 32; shift += 11) {
        std::vector<size_t> start(2049, 0);
        for (size_t i = 0; i < n; ++i) ++start[1 + ((words[i] >> shift) & 2047)];
        for (int d = 0; d < 2048; ++d) start[d + 1] += start[d];
        for (uint32_t i : order) other[start[(words[i] >> shift) & 2047]++] = i;
        order.swap(other);
    }
}

// ------------------------------------------------------------------------------------------------------------- activations

enum Activation { TANH, RELU, SIGMOID, GELU, ACTIVATIONS };

// y <- activation(y), and its slope there, which is all the backward pass needs.
template <class G> static inline void map(V* y, V* slope, int n, G g) { for (int i = 0; i < n; ++i) g(y[i], slope[i]); }

static __attribute__((noinline)) void activate(int activation, V* y, V* slope, int n) {
    switch (activation) {
    case TANH: map(y, slope, n, [](V& v, V& d) { v = hyperbolic_tangent(v), d = multiply_add(-v, v, splat(1)); }); break;
    case RELU: map(y, slope, n, [](V& v, V& d) { d = v > 0 ? splat(1) : V{}, v = v <= 0 ? V{} : v; }); break;
    case SIGMOID: map(y, slope, n, [](V& v, V& d) { v = logistic(v), d = v * (1 - v); }); break;
    default: map(y, slope, n, [](V& v, V& d) {
        V below, density;
        normal_distribution(v, below, density);
        d = multiply_add(v * Scalar(0.39894228040143268), density, below), v = v * below; });
    }
}

// ------------------------------------------------------------------------------------------------------------------ layers

constexpr int divisor(int n, int most) { int d = n; while (d > most || n % d) --d; return d < 1 ? 1 : d; }

// What a layer keeps of its forward pass for its backward pass.
struct Trace {
    V *x, *squares;     // input, and its squares (variational)
    V *y, *slope;       // output after pooling, activation and dropout; its derivative
    V *ratio;           // d output / d variance (variational)
    V *g, *gv;          // gradient with respect to mean and variance, before pooling; g takes the place of slope
    V *noise;           // of the windows at work
    V *tiles, *scratch; // transformed input; room that all layers use in turn
    Byte* where;        // winner of each pooling window
};

// Convolution of size K without padding, then max-pooling of P x P windows (P = 1: none).
template <int CI_, int H_, int W_, int CO_, int K_, int P_> struct Convolution {
    static constexpr int CI = CI_, H = H_, WIDTH = W_, CO = CO_, K = K_, P = P_, Q = P * P, KK = K * K;
    static constexpr int OH = H - K + 1, OW = WIDTH - K + 1, PH = OH / P, PW = OW / P;    // before and after pooling
    static constexpr int UH = PH * P, UW = PW * P;                                        // rows and columns the pooling uses
    static constexpr int INPUTS = CI * H * WIDTH, USED = CO * UH * UW, OUTPUTS = CO * PH * PW;
    static constexpr int WEIGHTS = CO * CI * KK, BIASES = CO;
    static constexpr int TRANSFORMED = 0, ROOM = 0, SCRATCH = USED + INPUTS;
    static constexpr bool NOISY_BIAS = true;
    template <int sets> static constexpr int channels = divisor(CO, 24 / (sets * Q));     // output channels side by side

    // Noise is drawn just before the windows that it disturbs, so that it stays in the first cache: for some rows of windows of these
    // channels or, where rows are not made of whole draws of four numbers, for all of their rows.
    static constexpr bool BY_ROWS = P * OW % 4 == 0 && OH * OW % 4 == 0;
    template <int sets> static constexpr int ROWS = divisor(PH, std::max(1, 384 / (channels<sets> * P * OW)));  // of windows at a time
    static constexpr int NOISE = channels<1> * (BY_ROWS ? std::max(ROWS<1>, ROWS<2>) * P : OH) * OW;
    template <int sets, class Draw> static inline void draw_band(int part, V* noise, Draw draw) {  // draw(first number, how many, where to)
        static_assert(BY_ROWS || channels<sets> * OH * OW % 4 == 0);
        const int o = part / PH * channels<sets>, py = part % PH;
        if constexpr (BY_ROWS)
            for (int c = 0; c < channels<sets> && py % ROWS<sets> == 0; ++c)
                draw((o + c) * OH * OW + P * py * OW, ROWS<sets> * P * OW, noise + c * ROWS<sets> * P * OW);
        else if (py == 0) draw(o * OH * OW, channels<sets> * OH * OW, noise);
    }
    template <int sets> static constexpr int noise_at(int o, int py, int px) {  // of a window's corner
        return BY_ROWS ? (o % channels<sets> * ROWS<sets> + py % ROWS<sets>) * P * OW + P * px : (o % channels<sets> * OH + P * py) * OW + P * px;
    }

    // One window of `channels` output channels at a time stays in registers; `finish` receives it.
    // SETS = 2 convolves two inputs with two kernels side by side: mean and variance of a variational layer.
    template <int SETS, class X, class Meanwhile, class Finish>
    PASS void convolve(const X* const (&x)[SETS], const V* const (&w)[SETS], const V* const (&bias)[SETS], Meanwhile meanwhile, Finish finish) {
        constexpr int channels = Convolution::channels<SETS>;
        constexpr int inputs = divisor(CI, std::max(1, 160 / (SETS * channels * KK)));  // their kernels stay in the first cache
        V row[inputs == CI ? 1 : PW][SETS][channels][Q];
        for (int o = 0; o < CO; o += channels)
            for (int py = 0; py < PH; ++py) {
                meanwhile(o / channels * PH + py, CO / channels * PH);
                for (int i0 = 0; i0 < CI; i0 += inputs)
                    for (int px = 0; px < PW; ++px) {
                        V sum[SETS][channels][Q];
                        UNROLL for (int s = 0; s < SETS; ++s) UNROLL for (int c = 0; c < channels; ++c) UNROLL for (int q = 0; q < Q; ++q)
                            sum[s][c][q] = i0 == 0 ? bias[s][o + c] : row[inputs == CI ? 0 : px][s][c][q];
                        for (int i = i0; i < i0 + inputs; ++i)
                            for (int ky = 0; ky < K; ++ky)
                                UNROLL for (int kx = 0; kx < K; ++kx) UNROLL for (int s = 0; s < SETS; ++s) {
                                    const X* corner = x[s] + (i * H + P * py + ky) * WIDTH + P * px + kx;
                                    V value[Q];
                                    UNROLL for (int q = 0; q < Q; ++q) value[q] = hold(load(corner + (q / P) * WIDTH + q % P));
                                    UNROLL for (int c = 0; c < channels; ++c) {
                                        V weight = w[s][((o + c) * CI + i) * KK + ky * K + kx];
                                        UNROLL for (int q = 0; q < Q; ++q) sum[s][c][q] = multiply_add(weight, value[q], sum[s][c][q]);
                                    }
                                }
                        if (i0 + inputs == CI)
                            UNROLL for (int c = 0; c < channels; ++c) finish(o + c, py, px, [&](int s, int q) -> V { return sum[s][c][q]; });
                        else
                            UNROLL for (int s = 0; s < SETS; ++s) UNROLL for (int c = 0; c < channels; ++c) UNROLL for (int q = 0; q < Q; ++q)
                                row[inputs == CI ? 0 : px][s][c][q] = sum[s][c][q];
                    }
            }
    }

    // The first largest value of a window wins; a value that is no number makes the window one.
    template <class G> INNER V pool(G value, Byte& where) {
        V best = value(0);
        Mask broken = best != best;
        UNROLL for (int q = 1; q < Q; ++q) best = larger(best, value(q)), broken |= value(q) != value(q);
        best = broken ? splat(NAN) : best;
        Mask winner = Mask{} + (Q - 1);
        UNROLL for (int q = Q - 2; q >= 0; --q) winner = value(q) == best ? Mask{} + q : winner;
        where = narrow(winner);
        return best;
    }

    template <class X, class Meanwhile> static void forward(const X* x, const V* w, const V* bias, Trace& t, Meanwhile meanwhile) {
        const X* const inputs[1] = {x};
        const V* const kernels[1] = {w};
        const V* const biases[1] = {bias};
        convolve<1>(inputs, kernels, biases, meanwhile, [&](int o, int py, int px, auto value) {
            int at = (o * PH + py) * PW + px;
            t.y[at] = pool([&](int q) { return value(0, q); }, t.where[at]);
        });
    }

    // One window of out = mean + sqrt(variance + 1e-15) noise.
    template <int sets, class Mean, class Variance> INNER void noisy_window(int o, int py, int px, Mean mean, Variance variance, Trace& t) {
        int at = (o * PH + py) * PW + px;
        const V* noise = t.noise + noise_at<sets>(o, py, px);
        V z[Q], deviation[Q];
        UNROLL for (int q = 0; q < Q; ++q) {
            deviation[q] = root(variance(q) + Scalar(1e-15));
            z[q] = multiply_add(deviation[q], noise[(q / P) * OW + q % P], mean(q));
        }
        Byte where;
        t.y[at] = pool([&](int q) { return z[q]; }, where);
        Mask winner = widen(where);
        V own_noise = noise[0], own_deviation = deviation[0];
        UNROLL for (int q = 1; q < Q; ++q) {
            own_noise = winner == q ? noise[(q / P) * OW + q % P] : own_noise;
            own_deviation = winner == q ? deviation[q] : own_deviation;
        }
        t.where[at] = where, t.ratio[at] = Scalar(0.5) * own_noise / own_deviation;
    }

    template <class Meanwhile, class Draw>
    static void forward_noisy(const V* w, const V* bias, const V* variance, const V* bias_variance, Trace& t, Meanwhile meanwhile, Draw draw) {
        const V* const inputs[2] = {t.x, t.squares};
        const V* const kernels[2] = {w, variance};
        const V* const biases[2] = {bias, bias_variance};
        auto before_band = [&](int part, int parts) { meanwhile(part, parts), draw_band<2>(part, t.noise, draw); };
        convolve<2>(inputs, kernels, biases, before_band, [&](int o, int py, int px, auto value) {
            noisy_window<2>(o, py, px, [&](int q) { return value(0, q); }, [&](int q) { return value(1, q); }, t);
        });
    }

    // Three quarters of the gradients before a 2 x 2 pooling are zero; which ones differs from lane to lane.
    INNER void unpool(const V* g, const Byte* where, V* before) {  // one window; `before` points at its corner
        if constexpr (P == 1) *before = *g;
        else {
            Mask winner = widen(*where);
            UNROLL for (int q = 0; q < Q; ++q) before[(q / P) * UW + q % P] = winner == q ? *g : V{};
        }
    }

    PASS void unpool_all(const V* g, const Byte* where, V* before) {
        for (int o = 0; o < CO; ++o)
            for (int py = 0; py < PH; ++py)
                for (int px = 0; px < PW; ++px) unpool(g + (o * PH + py) * PW + px, where + (o * PH + py) * PW + px, before + (o * UH + P * py) * UW + P * px);
    }

    // d loss / d weight: a row of the kernel for a few channels stays in registers while a strip of the image passes.
    PASS void weight_gradient(const V* x, const V* g, const Byte* where, V* gw) {
        constexpr int channels = divisor(CO, 20 / K);
        constexpr int strip = std::min(PH, std::max(1, 320 / (channels * P * UW)));  // rows of windows
        V before[channels][strip * P][UW];
        for (int o = 0; o < CO; o += channels)
            for (int top = 0; top < PH; top += strip) {
                int rows = std::min(strip, PH - top);
                for (int c = 0; c < channels; ++c)
                    for (int r = 0; r < rows; ++r)
                        for (int px = 0; px < PW; ++px) {
                            int at = ((o + c) * PH + top + r) * PW + px;
                            unpool(g + at, where + at, &before[c][P * r][P * px]);
                        }
                for (int i = 0; i < CI; ++i)
                    for (int ky = 0; ky < K; ++ky) {
                        V* kernel = gw + (o * CI + i) * KK + ky * K;
                        V sum[channels][K];
                        UNROLL for (int c = 0; c < channels; ++c) UNROLL for (int kx = 0; kx < K; ++kx) sum[c][kx] = kernel[c * CI * KK + kx];
                        for (int r = 0; r < rows * P; ++r) {
                            const V* in = x + (i * H + top * P + r + ky) * WIDTH;
                            for (int c0 = 0; c0 < UW; ++c0) {
                                V value[K];
                                UNROLL for (int kx = 0; kx < K; ++kx) value[kx] = hold(in[c0 + kx]);
                                UNROLL for (int c = 0; c < channels; ++c) UNROLL for (int kx = 0; kx < K; ++kx) sum[c][kx] = multiply_add(before[c][r][c0], value[kx], sum[c][kx]);
                            }
                        }
                        UNROLL for (int c = 0; c < channels; ++c) UNROLL for (int kx = 0; kx < K; ++kx) kernel[c * CI * KK + kx] = sum[c][kx];
                    }
            }
    }

    // Adds to d loss / d weight; `finish` receives each d loss / d input, if they are wanted.
    template <bool inward, class Finish>
    static void gradients(const V* x, const V* g, const V* w, V* gw, const Trace& t, Finish finish) {
        weight_gradient(x, g, t.where, gw);
        if constexpr (inward) {
            V *before = t.scratch, *dx = t.scratch + USED;
            unpool_all(g, t.where, before);
            input_gradient(before, w, dx);
            for (int i = 0; i < INPUTS; ++i) finish(i, dx[i]);
        }
    }

    static void bias_gradient(const V* g, V* gb) {
        for (int o = 0; o < CO; ++o) {
            V sum = gb[o];
            for (int i = 0; i < PH * PW; ++i) sum += g[o * PH * PW + i];
            gb[o] = sum;
        }
    }

    // d loss / d input: a row of the input (of a few channels, if it is short) stays in registers while a few output channels pass, which stay in the first cache.
    PASS void input_gradient(const V* before, const V* w, V* dx) {
        constexpr int inputs = divisor(CI, std::max(1, (31 - UW) / WIDTH));
        constexpr int outputs = divisor(CO, std::max(1, 288 / (K * UW)));
        for (int y = 0; y < H; ++y)
            for (int o0 = 0; o0 < CO; o0 += outputs)
                for (int i = 0; i < CI; i += inputs) {
                    V* row = dx + (i * H + y) * WIDTH;
                    V sum[inputs][WIDTH];
                    UNROLL for (int j = 0; j < inputs; ++j) UNROLL for (int c = 0; c < WIDTH; ++c) sum[j][c] = o0 ? row[j * H * WIDTH + c] : V{};
                    const int first = std::max(0, y - UH + 1), last = std::min(K - 1, y);
                    for (int o = o0; o < o0 + outputs; ++o)
                        for (int ky = first; ky <= last; ++ky) {
                            const V* g = before + (o * UH + y - ky) * UW;
                            V value[UW];
                            UNROLL for (int c = 0; c < UW; ++c) value[c] = g[c];
                            UNROLL for (int kx = 0; kx < K; ++kx) UNROLL for (int j = 0; j < inputs; ++j) {
                                V weight = w[(o * CI + i + j) * KK + ky * K + kx];
                                UNROLL for (int c = 0; c < UW; ++c) sum[j][c + kx] = multiply_add(value[c], weight, sum[j][c + kx]);
                            }
                        }
                    UNROLL for (int j = 0; j < inputs; ++j) UNROLL for (int c = 0; c < WIDTH; ++c) row[j * H * WIDTH + c] = sum[j][c];
                }
    }
};

// Of polynomials that are multiplied by way of their values at 0, 1, -1, 2, -2 and infinity. Not members of the template below:
// a dynamic linker shares those by name, and the tests load a build in double precision beside the usual one.
namespace winograd {
constexpr Scalar B[6][6] = {{4, 0, -5, 0, 1, 0}, {0, -4, -4, 1, 1, 0}, {0, 4, -4, -1, 1, 0}, {0, -2, -1, 2, 1, 0}, {0, 2, -1, -2, 1, 0}, {0, 4, 0, -5, 0, 1}};
constexpr Scalar G[6][3] = {{1 / 4., 0, 0}, {-1 / 6., -1 / 6., -1 / 6.}, {-1 / 6., 1 / 6., -1 / 6.}, {1 / 24., 1 / 12., 1 / 6.}, {1 / 24., -1 / 12., 1 / 6.}, {0, 0, 1}};
constexpr Scalar A[4][6] = {{1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 0}, {0, 1, 1, 4, 4, 0}, {0, 1, -1, 8, -8, 1}};
}

// The same for 3 x 3 kernels and 2 x 2 windows after Winograd (Lavin and Gray 2016), along rows: four neighbouring outputs y come from
// tiles d of six neighbouring inputs as y = A [sum over rows and channels of (G w) * (B d)], with half as many products. For each of
// the six points of a tile, these sums are a product of matrices. All of this is linear, so the gradients are the transposed steps:
//     d (G w) = sum over tiles of (A^T dy) * (B d),    d (B d) = sum over output channels of (G w) * (A^T dy).
// The forward pass leaves its tiles B d to the backward pass. Kernels stay transformed for a batch, whose gradients are summed in
// that form and transformed back once. Matrices lie in memory in about the order of reading, because the second cache limits the speed.
template <int CI_, int H_, int W_, int CO_> struct Winograd : Convolution<CI_, H_, W_, CO_, 3, 2> {
    using Direct = Convolution<CI_, H_, W_, CO_, 3, 2>;
    using Direct::CI, Direct::H, Direct::WIDTH, Direct::CO, Direct::K, Direct::Q, Direct::PH, Direct::PW, Direct::UH, Direct::UW;
    static constexpr int POINTS = 6, STEP = 4, ACROSS = UW / STEP, DOWN = UH + K - 1;  // the last two: tiles in a row, rows of tiles
    static constexpr int GROUP = 4, PAIR = 2 * ACROSS;  // channels, and tiles of a pair of rows, whose sums stay in registers
    static constexpr int TRANSFORMED = POINTS * CO * CI * K, TILES = POINTS * CI * DOWN * ACROSS;
    static constexpr int PADDED = (UH + 2) * ACROSS, ROOM = TILES + CO * PADDED;        // gradients with a row of zeros above and below
    static constexpr int PRODUCTS = POINTS * PH * GROUP * PAIR, SCRATCH = std::max(TILES, PRODUCTS + Direct::USED);
    static_assert(UW % STEP == 0 && CO % (2 * GROUP) == 0 && CI % GROUP == 0);

    // Add factor x, where the compiler knows the factor, which is often 0, 1 or -1, and whether there is something to add to.
    INNER void add(V& sum, bool& begun, Scalar factor, V x) {
        if (factor == 0) return;
        if (!begun) sum = factor * x;
        else if (factor == 1 || factor == -1) sum += factor * x;
        else sum = multiply_add(splat(factor), x, sum);
        begun = true;
    }
    template <int n, int m> INNER void apply(const Scalar (&matrix)[n][m], const V (&in)[m], V (&out)[n]) {
        UNROLL for (int i = 0; i < n; ++i) {
            bool begun = false;
            UNROLL for (int j = 0; j < m; ++j) add(out[i], begun, matrix[i][j], in[j]);
        }
    }
    template <int n, int m> INNER void apply_transposed(const Scalar (&matrix)[n][m], const V (&in)[n], V (&out)[m]) {
        UNROLL for (int j = 0; j < m; ++j) {
            bool begun = false;
            UNROLL for (int i = 0; i < n; ++i) add(out[j], begun, matrix[i][j], in[i]);
        }
    }

    static constexpr int kernel_at(int p, int o, int i, int ky) { return (((p * (CO / GROUP) + o / GROUP) * CI + i) * K + ky) * GROUP + o % GROUP; }
    static constexpr int tile_at(int p, int i, int y) { return ((p * CI + i) * DOWN + y) * ACROSS; }
    static constexpr int gradient_at(int o, int y) { return o * PADDED + (1 + y) * ACROSS; }

    PASS void transform_kernels(const V* w, V* u) {
        for (int o = 0; o < CO; ++o)
            for (int i = 0; i < CI; ++i)
                for (int ky = 0; ky < K; ++ky, w += K) {
                    V in[K], out[POINTS];
                    UNROLL for (int k = 0; k < K; ++k) in[k] = w[k];
                    apply(winograd::G, in, out);
                    UNROLL for (int p = 0; p < POINTS; ++p) u[kernel_at(p, o, i, ky)] = out[p];
                }
    }

    PASS void transform_gradients(const V* du, V* gw) {
        for (int o = 0; o < CO; ++o)
            for (int i = 0; i < CI; ++i)
                for (int ky = 0; ky < K; ++ky, gw += K) {
                    V in[POINTS], out[K];
                    UNROLL for (int p = 0; p < POINTS; ++p) in[p] = du[kernel_at(p, o, i, ky)];
                    apply_transposed(winograd::G, in, out);
                    UNROLL for (int k = 0; k < K; ++k) gw[k] += out[k];
                }
    }

    PASS void transform_inputs(const V* x, V* tiles) {
        for (int i = 0; i < CI; ++i)
            for (int y = 0; y < DOWN; ++y)
                UNROLL for (int t = 0; t < ACROSS; ++t) {
                    V in[6], out[POINTS];
                    UNROLL for (int c = 0; c < 6; ++c) in[c] = x[(i * H + y) * WIDTH + STEP * t + c];
                    apply(winograd::B, in, out);
                    UNROLL for (int p = 0; p < POINTS; ++p) tiles[tile_at(p, i, y) + t] = out[p];
                }
    }

    // One step of a product of matrices: a column times a row is added to a block of sums in registers.
    template <int rows, int columns, class Left, class Right> INNER void add_product(V (&sum)[rows][columns], Left left, Right right) {
        V value[columns];
        UNROLL for (int j = 0; j < columns; ++j) value[j] = hold(right(j));
        UNROLL for (int i = 0; i < rows; ++i) {
            V factor = left(i);
            UNROLL for (int j = 0; j < columns; ++j) sum[i][j] = multiply_add(factor, value[j], sum[i][j]);
        }
    }

    // `finish` receives each window.
    template <class Finish> PASS void convolve(const V* x, const V* u, const V* bias, Trace& t, Finish finish) {
        V* products = t.scratch;
        transform_inputs(x, t.tiles);
        for (int o = 0; o < CO; o += GROUP) {
            for (int p = 0; p < POINTS; ++p)
                for (int py = 0; py < PH; ++py) {
                    V sum[GROUP][PAIR] = {};
                    for (int i = 0; i < CI; ++i)
                        ROLL for (int ky = 0; ky < K; ++ky) {
                            const V *kernel = u + kernel_at(p, o, i, ky), *tiles = t.tiles + tile_at(p, i, 2 * py + ky);
                            add_product(sum, [&](int c) { return kernel[c]; }, [&](int j) { return tiles[j]; });
                        }
                    UNROLL for (int c = 0; c < GROUP; ++c) UNROLL for (int j = 0; j < PAIR; ++j) products[((py * GROUP + c) * POINTS + p) * PAIR + j] = sum[c][j];
                }
            for (int py = 0; py < PH; ++py)
                for (int c = 0; c < GROUP; ++c)
                    for (int a = 0; a < ACROSS; ++a) {
                        V in[POINTS], out[2][STEP];
                        UNROLL for (int r = 0; r < 2; ++r) {
                            UNROLL for (int p = 0; p < POINTS; ++p) in[p] = products[((py * GROUP + c) * POINTS + p) * PAIR + r * ACROSS + a];
                            apply(winograd::A, in, out[r]);
                        }
                        UNROLL for (int h = 0; h < 2; ++h)
                            finish(o + c, py, 2 * a + h, [&](int q) -> V { return out[q / 2][2 * h + q % 2] + bias[o + c]; });
                    }
        }
    }

    template <class Meanwhile> static void forward(const V* x, const V* u, const V* bias, Trace& t, Meanwhile) {
        convolve(x, u, bias, t, [&](int o, int py, int px, auto value) {
            int at = (o * PH + py) * PW + px;
            t.y[at] = Direct::pool(value, t.where[at]);
        });
    }

    // The variances are convolved directly: differences would make them less accurate, and some of them negative.
    template <class Meanwhile, class Draw>
    static void forward_noisy(const V* u, const V* bias, const V* variance, const V* bias_variance, Trace& t, Meanwhile, Draw draw) {
        V* means = t.scratch + PRODUCTS;
        convolve(t.x, u, bias, t, [&](int o, int py, int px, auto value) {
            UNROLL for (int q = 0; q < Q; ++q) means[((o * PH + py) * PW + px) * Q + q] = value(q);
        });
        const V *const inputs[1] = {t.squares}, *const kernels[1] = {variance}, *const biases[1] = {bias_variance};
        auto before_band = [&](int part, int) { Direct::template draw_band<1>(part, t.noise, draw); };
        Direct::template convolve<1>(inputs, kernels, biases, before_band, [&](int o, int py, int px, auto value) {
            const V* mean = means + ((o * PH + py) * PW + px) * Q;
            Direct::template noisy_window<1>(o, py, px, [&](int q) { return mean[q]; }, [&](int q) { return value(0, q); }, t);
        });
    }

    // A^T dy for one point: the gradients of four neighbouring outputs, of which pooling lets through one in four.
    PASS void transform_outputs(int p, const V* g, const Byte* where, V* dy) {
        for (int o = 0; o < CO; ++o)
            for (int py = 0; py < PH; ++py)
                UNROLL for (int a = 0; a < ACROSS; ++a) {
                    V sum[2] = {};
                    UNROLL for (int h = 0; h < 2; ++h) {
                        const int at = (o * PH + py) * PW + 2 * a + h;
                        const Mask winner = widen(where[at]);
                        UNROLL for (int q = 0; q < Q; ++q) sum[q / 2] += winner == q ? winograd::A[2 * h + q % 2][p] * g[at] : V{};
                    }
                    UNROLL for (int r = 0; r < 2; ++r) dy[gradient_at(o, 2 * py + r) + a] = sum[r];
                }
    }

    // Adds one point's sums over all tiles to d (G w).
    PASS void kernel_gradient(int p, const V* dy, const V* tiles, V* du) {
        for (int o = 0; o < CO; o += GROUP)
            for (int i = 0; i < CI; i += 2) {
                V sum[GROUP][2 * K], *kernels = du + kernel_at(p, o, i, 0);
                UNROLL for (int c = 0; c < GROUP; ++c) UNROLL for (int k = 0; k < 2 * K; ++k) sum[c][k] = kernels[k * GROUP + c];
                const V *left = dy + gradient_at(o, 0), *right = tiles + tile_at(p, i, 0);
                for (int j = 0; j < UH * ACROSS; ++j) {
                    __builtin_prefetch(kernels + GROUP * 2 * K + j, 1);  // what the next block adds to
                    add_product(sum, [&](int c) { return left[c * PADDED + j]; }, [&](int k) { return right[(k / K * DOWN + k % K) * ACROSS + j]; });
                }
                UNROLL for (int c = 0; c < GROUP; ++c) UNROLL for (int k = 0; k < 2 * K; ++k) kernels[k * GROUP + c] = sum[c][k];
            }
    }

    // d (B d) of one point, two rows of tiles at a time; half of the output channels after the other, whose kernels stay in the first cache.
    PASS void tile_gradient(int p, const V* dy, const V* u, V* back) {
        for (int i = 0; i < CI; i += GROUP)
            for (int half = 0; half < CO; half += CO / 2)
                for (int y = 0; y < DOWN; y += 2) {
                    V sum[GROUP][PAIR];
                    UNROLL for (int c = 0; c < GROUP; ++c) UNROLL for (int j = 0; j < PAIR; ++j) sum[c][j] = half ? back[tile_at(p, i + c, y) + j] : V{};
                    const int first = std::max(0, y - UH + 1), last = std::min(K - 1, y + 1);
                    for (int ky = first; ky <= last; ++ky)
                        for (int o = half; o < half + CO / 2; o += GROUP) {
                            const V *kernel = u + kernel_at(p, o, i, ky), *right = dy + gradient_at(o, y - ky);
                            ROLL for (int b = 0; b < GROUP; ++b)
                                add_product(sum, [&](int c) { return kernel[c * K * GROUP + b]; }, [&](int j) { return right[b * PADDED + j]; });
                        }
                    UNROLL for (int c = 0; c < GROUP; ++c) UNROLL for (int j = 0; j < PAIR; ++j) back[tile_at(p, i + c, y) + j] = sum[c][j];
                }
    }

    // B^T: tiles overlap by two inputs.
    template <class Finish> PASS void transform_back(const V* back, Finish finish) {
        for (int i = 0; i < CI; ++i)
            for (int y = 0; y < H; ++y) {
                V line[WIDTH] = {};
                if (y < DOWN)
                    UNROLL for (int a = 0; a < ACROSS; ++a) {
                        V in[POINTS], out[6];
                        UNROLL for (int p = 0; p < POINTS; ++p) in[p] = back[tile_at(p, i, y) + a];
                        apply_transposed(winograd::B, in, out);
                        UNROLL for (int c = 0; c < 6; ++c) line[STEP * a + c] += out[c];
                    }
                UNROLL for (int c = 0; c < WIDTH; ++c) finish((i * H + y) * WIDTH + c, line[c]);
            }
    }

    template <bool inward, class Finish>
    static void gradients(const V*, const V* g, const V* u, V* du, const Trace& t, Finish finish) {
        V *dy = t.tiles + TILES, *back = t.scratch;  // the gradients of one point, and of all tiles
        for (int p = 0; p < POINTS; ++p) {
            transform_outputs(p, g, t.where, dy);
            kernel_gradient(p, dy, t.tiles, du);
            if constexpr (inward) tile_gradient(p, dy, u, back);
        }
        if constexpr (inward) transform_back(back, finish);
    }
};

// A fully connected layer, the same interface.
template <int CI_, int CO_> struct Linear {
    static constexpr int CI = CI_, CO = CO_;
    static constexpr int INPUTS = CI, NOISE = CO, USED = CO, OUTPUTS = CO, WEIGHTS = CI * CO, BIASES = CO;
    static constexpr int TRANSFORMED = 0, ROOM = 0, SCRATCH = 0;
    static constexpr bool NOISY_BIAS = false;

    PASS void multiply(const V* x, const V* w, const V* bias, V* y) {
        constexpr int outputs = 10;
        static_assert(CO % outputs == 0);
        for (int o = 0; o < CO; o += outputs) {
            V sum[outputs];
            UNROLL for (int c = 0; c < outputs; ++c) sum[c] = bias ? bias[o + c] : V{};
            for (int i = 0; i < CI; ++i) UNROLL for (int c = 0; c < outputs; ++c) sum[c] = multiply_add(w[(o + c) * CI + i], x[i], sum[c]);
            UNROLL for (int c = 0; c < outputs; ++c) y[o + c] = sum[c];
        }
    }

    template <class Meanwhile> static void forward(const V* x, const V* w, const V* bias, Trace& t, Meanwhile) { multiply(x, w, bias, t.y); }

    template <class Meanwhile, class Draw>
    static void forward_noisy(const V* w, const V* bias, const V* variance, const V*, Trace& t, Meanwhile, Draw draw) {
        V total[CO];
        draw(0, CO, t.noise);
        multiply(t.x, w, bias, t.y);
        multiply(t.squares, variance, nullptr, total);
        for (int o = 0; o < CO; ++o) {
            V deviation = root(total[o] + Scalar(1e-15));
            t.y[o] = multiply_add(deviation, t.noise[o], t.y[o]);
            t.ratio[o] = Scalar(0.5) * t.noise[o] / deviation;
        }
    }

    template <bool inward, class Finish>
    PASS void gradients(const V* x, const V* g, const V* w, V* gw, const Trace&, Finish finish) {
        V dx[CI] = {};
        for (int o = 0; o < CO; ++o)
            for (int i = 0; i < CI; ++i) {
                gw[o * CI + i] = multiply_add(g[o], x[i], gw[o * CI + i]);
                dx[i] = multiply_add(g[o], w[o * CI + i], dx[i]);
            }
        for (int i = 0; i < CI; ++i) finish(i, dx[i]);
    }

    static void bias_gradient(const V* g, V* gb) { for (int o = 0; o < CO; ++o) gb[o] += g[o]; }
};

// -------------------------------------------------------------------------------------------------------- the C interface
// One job moves (or evaluates) a population; Python fills it in and calls it once per block of L models, from any thread.

struct Job {
    int64_t architecture, variational;                       // architecture: 0 small 1ch, 1 small 3ch, 2 large
    int64_t models, samples, batch, epoch, steps, nesterov;  // steps: before this epoch; nesterov: 1 if SGD looks ahead
    double kl_weight;
    int64_t dropout_site[4], noise_site[5];                  // 0: that layer draws nothing
    const Scalar* images;                                    // [samples, inputs]
    const int64_t* labels;                                   // [samples]
    const int64_t* keys;                                     // [models, 2], words below 2^32
    const int64_t* activation;                               // [models]
    const double *adam, *rate, *decay, *dropout;             // [models]; adam: 1, or 0 for SGD
    Scalar *weights[18], *first[18], *second[18];            // each [models, size], moved in place; second: Adam only
    const double* factor;                                    // [steps of this epoch], of every model's rate; null: all 1
    const uint8_t* masks[18];                                // each [models, size] or null
    double *loss, *accuracy;                                 // [models]
    uint8_t* predictions;                                    // [models, samples], evaluation only, or null
    Scalar* logits;                                          // [models, samples, 10], evaluation only, or null
};

// ------------------------------------------------------------------------------------------------------------- the network

template <class T> struct Buffer {  // zeroed, aligned memory
    T* data;
    explicit Buffer(size_t n) {
        size_t bytes = (n * sizeof(T) + 127) / 128 * 128 + 128;
        data = static_cast<T*>(std::aligned_alloc(128, bytes));
        if (!data) throw std::bad_alloc();
        std::memset((void*)data, 0, bytes);
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    operator T*() const { return data; }
};

// Take elements of a and b in turns, beginning with their first or their second halves.
template <bool upper, int... l> static inline V interleave(V a, V b, std::integer_sequence<int, l...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (l / 2 + (upper ? L / 2 : 0) + (l % 2 ? L : 0))...);
#else
    return __builtin_shuffle(a, b, Mask{(l / 2 + (upper ? L / 2 : 0) + (l % 2 ? L : 0))...});
#endif
}

// L images become lanes: an L x L transposition is log2(L) rounds of interleaving the upper with the lower half of the rows.
static void gather(const Scalar* const image[L], int inputs, V* x) {
    constexpr std::make_integer_sequence<int, L> lanes{};
    for (int p = 0; p < inputs; p += L) {
        V row[L], other[L];
        UNROLL for (int l = 0; l < L; ++l) std::memcpy(&row[l], image[l] + p, sizeof(V));
        UNROLL for (int round = 1; round < L; round *= 2) {
            UNROLL for (int i = 0; i < L / 2; ++i) {
                other[2 * i] = interleave<false>(row[i], row[i + L / 2], lanes);
                other[2 * i + 1] = interleave<true>(row[i], row[i + L / 2], lanes);
            }
            UNROLL for (int i = 0; i < L; ++i) row[i] = other[i];
        }
        UNROLL for (int l = 0; l < L; ++l) x[p + l] = row[l];
    }
}

// Ask for one of `parts` parts of L images before they are needed: all at once would clog the memory.
static inline void prefetch(const Scalar* const image[L], int inputs, int part, int parts) {
    constexpr int line = 64 / sizeof(Scalar);
    const int share = (inputs / line + parts - 1) / parts, end = std::min(inputs, (part + 1) * share * line);
    for (int p = part * share * line; p < end; p += line)
        for (int l = 0; l < L; ++l) __builtin_prefetch(image[l] + p);
}

// Cross-entropy of L models; gradient = (softmax - target) * scale. The first largest logit wins, NaN above all.
static inline V cross_entropy(const V* z, V label, Scalar scale, V* gradient, V& winner) {
    V best = z[0], own = z[0];
    winner = V{};
    for (int c = 1; c < 10; ++c) {
        Mask better = (z[c] > best) | ((z[c] != z[c]) & (best == best));
        best = better ? z[c] : best, winner = better ? splat(c) : winner;
        own = label == Scalar(c) ? z[c] : own;
    }
    V power[10], sum = V{};
    for (int c = 0; c < 10; ++c) sum += power[c] = exponential(z[c] - best);
    if (gradient)
        for (int c = 0; c < 10; ++c) gradient[c] = (power[c] / sum - (label == Scalar(c) ? splat(1) : V{})) * scale;
    return logarithm(sum) - (own - best);
}

// By squaring, because the C library's own function rounds differently from library to library.
static double power(double base, int64_t exponent) {
    double result = 1;
    for (; exponent; exponent >>= 1, base *= base)
        if (exponent & 1) result *= base;
    return result;
}

// log alpha = log sigma^2 - 2 ln(|w| + 1e-15), clamped; the clamp stops gradients strictly outside.
static inline V log_alpha(V w, V log_sigma2, Scalar bound, Mask& inside) {
    V raw = multiply_add(splat(-2), logarithm((w < 0 ? -w : w) + Scalar(1e-15)), log_sigma2);
    inside = (raw >= -bound) & (raw <= bound);
    return raw < -bound ? splat(-bound) : (raw > bound ? splat(bound) : raw);
}

template <class A, class B, class C, class Fc1, class Fc2> struct Network {
    template <int n> using Layer = std::conditional_t<n == 0, A, std::conditional_t<n == 1, B, std::conditional_t<n == 2, C, std::conditional_t<n == 3, Fc1, Fc2>>>>;

    // Tensors: weight and bias of the five layers, then log sigma^2 of the five weights and of the three convolutions' biases.
    static constexpr int SIZE[18] = {A::WEIGHTS, A::BIASES, B::WEIGHTS, B::BIASES, C::WEIGHTS, C::BIASES, Fc1::WEIGHTS, Fc1::BIASES, Fc2::WEIGHTS, Fc2::BIASES,
                                     A::WEIGHTS, B::WEIGHTS, C::WEIGHTS, Fc1::WEIGHTS, Fc2::WEIGHTS, A::BIASES, B::BIASES, C::BIASES};
    static constexpr int offset(int tensor) { int sum = 0; for (int t = 0; t < tensor; ++t) sum += SIZE[t]; return sum; }
    static constexpr int INPUTS = std::max({B::INPUTS, C::INPUTS, Fc1::INPUTS}), SCRATCH = std::max(B::SCRATCH, C::SCRATCH);
    static constexpr int TRANSFORMED = B::TRANSFORMED;  // no other layer calculates with transformed kernels

    const Job& job;
    const bool noisy;
    const int tensors, parameters;
    Buffer<V> weights, gradient, first, second, variance, image, dx, scratch, transformed;
    Buffer<V> space;
    Buffer<Byte> masks, winners;
    Philox stream;
    Trace trace[5];
    const Scalar* next[L];  // the images after these

    // What may differ between the models of a block.
    Mask activated[ACTIVATIONS];  // which lanes use which activation
    bool present[ACTIVATIONS];
    Mask adam;                    // lanes that use Adam; the others use SGD
    double rate[L];
    V decay, dropout_scale;
    U dropout_threshold;
    bool dropping;

    explicit Network(const Job& j)
        : job(j), noisy(j.variational), tensors(noisy ? 18 : 10), parameters(offset(tensors)), weights(parameters), gradient(parameters), first(parameters),
          second(parameters), variance(offset(10)), image(A::INPUTS), dx(INPUTS), scratch(SCRATCH), transformed((noisy ? 4 : 2) * TRANSFORMED), space(trace_size()), masks(parameters),
          winners(A::OUTPUTS + B::OUTPUTS + C::OUTPUTS + Fc1::OUTPUTS + Fc2::OUTPUTS) {
        V* next = space;
        Byte* winner = winners;
        lay_out<0>(next, winner);
    }

    template <int n> static constexpr size_t layer_size() { return 4 * (size_t)Layer<n>::OUTPUTS + Layer<n>::INPUTS + Layer<n>::NOISE + Layer<n>::ROOM; }
    static constexpr size_t trace_size() { return layer_size<0>() + layer_size<1>() + layer_size<2>() + layer_size<3>() + layer_size<4>(); }

    template <int n> void lay_out(V*& next, Byte*& winner) {
        using T = Layer<n>;
        auto take = [&](int size) { V* p = next; next += size; return p; };
        Trace& t = trace[n];
        t.y = take(T::OUTPUTS), t.slope = t.g = take(T::OUTPUTS), t.tiles = take(T::ROOM), t.scratch = scratch;
        if (noisy) t.ratio = take(T::OUTPUTS), t.gv = take(T::OUTPUTS), t.squares = take(T::INPUTS), t.noise = take(T::NOISE);
        t.where = winner, winner += T::OUTPUTS;
        if constexpr (n == 0) t.x = image; else t.x = trace[n - 1].y;
        if constexpr (n < 4) lay_out<n + 1>(next, winner);
    }

    template <int n> V* weight(V* base) const { return base + offset(2 * n); }
    template <int n> V* bias(V* base) const { return base + offset(2 * n + 1); }

    // What a layer calculates with, and where it adds its gradient; set 0: means, 1: variances.
    template <int n> V* kernel(int set) const {
        if constexpr (Layer<n>::TRANSFORMED) return transformed + 2 * set * TRANSFORMED;
        else return weight<n>(set ? variance : weights);
    }
    template <int n> V* kernel_gradient(int set) const {
        if constexpr (Layer<n>::TRANSFORMED) return transformed + (2 * set + 1) * TRANSFORMED;
        else return gradient + offset(set ? 10 + n : 2 * n);
    }
    template <int n> void transform_kernels() {
        if constexpr (Layer<n>::TRANSFORMED)
            for (int set = 0; set < 1 + noisy; ++set) {
                Layer<n>::transform_kernels(weight<n>(set ? variance : weights), kernel<n>(set));
                std::memset((void*)kernel_gradient<n>(set), 0, TRANSFORMED * sizeof(V));
            }
        if constexpr (n < 4) transform_kernels<n + 1>();
    }
    template <int n> void transform_gradients() {
        if constexpr (Layer<n>::TRANSFORMED)
            for (int set = 0; set < 1 + noisy; ++set) Layer<n>::transform_gradients(kernel_gradient<n>(set), gradient + offset(set ? 10 + n : 2 * n));
        if constexpr (n < 4) transform_gradients<n + 1>();
    }

    // ------------------------------------------------------------------------------------------------ forward and backward

    template <int n> void forward(uint32_t position) {
        using T = Layer<n>;
        Trace& t = trace[n];
        auto meanwhile = [&](int part, int parts) {
            if constexpr (n == 0) prefetch(next, A::INPUTS, part, parts);
        };
        if (noisy) {
            for (int i = 0; i < T::INPUTS; ++i) t.squares[i] = t.x[i] * t.x[i];
            auto draw = [&](int first, int count, V* out) { normals(stream, job.noise_site[n], position, job.epoch, first, count, out); };
            T::forward_noisy(kernel<n>(0), bias<n>(weights), weight<n>(variance), bias<n>(variance), t, meanwhile, draw);
        } else
            T::forward(t.x, kernel<n>(0), bias<n>(weights), t, meanwhile);
        if constexpr (n < 4) {
            activate_all(t.y, t.slope, T::OUTPUTS);
            if (dropping && job.dropout_site[n])
                dropout(stream, job.dropout_site[n], position, job.epoch, dropout_threshold, dropout_scale, T::OUTPUTS, t.y, t.slope);
            forward<n + 1>(position);
        }
    }

    template <int n> void backward() {  // trace[n].g holds the gradient with respect to the pooled outputs
        using T = Layer<n>;
        Trace& t = trace[n];
        V* below = nullptr;  // its slopes become gradients
        if constexpr (n > 0) below = trace[n - 1].g;
        T::bias_gradient(t.g, bias<n>(gradient));
        if (noisy) {
            for (int i = 0; i < T::OUTPUTS; ++i) t.gv[i] = t.g[i] * t.ratio[i];
            if constexpr (T::NOISY_BIAS) T::bias_gradient(t.gv, gradient + offset(15 + n));
            T::template gradients<(n > 0)>(t.x, t.g, kernel<n>(0), kernel_gradient<n>(0), t, [&](int i, V value) { dx[i] = value; });
            if constexpr (T::TRANSFORMED) T::transform_inputs(t.squares, t.tiles);
            T::template gradients<(n > 0)>(t.squares, t.gv, kernel<n>(1), kernel_gradient<n>(1), t,
                                           [&](int i, V value) { below[i] *= multiply_add(2 * t.x[i], value, dx[i]); });
        } else
            T::template gradients<(n > 0)>(t.x, t.g, kernel<n>(0), kernel_gradient<n>(0), t, [&](int i, V value) { below[i] *= value; });
        if constexpr (n > 0) backward<n - 1>();
    }

    // -------------------------------------------------------------------------------------------------- variational weights

    template <class G> void for_each_noisy(G g) const {  // g(weight, variance, log sigma^2, gradients are at the same places; bound)
        auto tensor = [&](int plain, int log_sigma2, Scalar bound) {
            for (int i = 0; i < SIZE[plain]; ++i) g(offset(plain) + i, offset(log_sigma2) + i, bound);
        };
        for (int n = 0; n < 5; ++n) tensor(2 * n, 10 + n, n < 3 ? 8 : 10);
        for (int n = 0; n < 3; ++n) tensor(2 * n + 1, 15 + n, 8);
    }

    void compute_variances() {
        for_each_noisy([&](int plain, int log_sigma2, Scalar bound) {
            V w = weights[plain];
            Mask inside;
            variance[plain] = exponential(log_alpha(w, weights[log_sigma2], bound, inside)) * w * w;
        });
    }

    // From d loss / d variance to weights and log sigma^2, through variance = exp(log alpha) w^2, with the gradient of
    // kl_weight * KL, KL = -sum[k1 sigmoid(k2 + k3 log alpha) - ln(1 + exp(-log alpha)) / 2 - k1].
    __attribute__((noinline)) void chain_variances() {
        constexpr Scalar k1 = 0.63576, k2 = 1.8732, k3 = 1.48695;
        for_each_noisy([&](int plain, int log_sigma2, Scalar bound) {
            V w = weights[plain], size = (w < 0 ? -w : w) + Scalar(1e-15), sign = w > 0 ? splat(1) : (w < 0 ? splat(-1) : V{});
            Mask inside;
            V log_alpha = ::log_alpha(w, weights[log_sigma2], bound, inside), alpha = exponential(log_alpha), by_variance = gradient[log_sigma2];
            V s = logistic(multiply_add(splat(k3), log_alpha, splat(k2)));
            V kl = multiply_add(-k1 * k3 * s, 1 - s, Scalar(-0.5) * logistic(-log_alpha));
            V by_log_alpha = multiply_add(by_variance, alpha * w * w, Scalar(job.kl_weight) * kl);
            by_log_alpha = inside ? by_log_alpha : V{};
            gradient[plain] += multiply_add(by_variance * alpha, 2 * w, by_log_alpha * -2 * sign / size);
            gradient[log_sigma2] = by_log_alpha;
        });
    }

    // ------------------------------------------------------------------------------------------------------------ optimizers

    // With a share of 1 for the gradient and a divisor of 1, Adam's step is that of SGD with momentum; Nesterov's goes on from there.
    __attribute__((noinline)) void update(int64_t step, double factor) {
        const double bias1 = 1 - power(0.9, step);
        const Scalar bias2 = (Scalar)(1 / std::sqrt(1 - power(0.999, step)));
        const V share = adam ? splat(Scalar(0.1)) : splat(1);
        V pace;
        for (int l = 0; l < L; ++l) pace[l] = (Scalar)(rate[l] * factor / (adam[l] ? bias1 : 1));
        for (int t = 0; t < tensors; ++t) {
            const bool masked = job.masks[t];
            for (int i = offset(t); i < offset(t) + SIZE[t]; ++i) {
                V w = weights[i], g = multiply_add(decay, w, gradient[i]);
                if (masked) g *= to<V>(widen(masks[i]));
                V m = multiply_add(splat(0.9), first[i], share * g), v = multiply_add(splat(0.999), second[i], Scalar(0.001) * (g * g));
                V divisor = adam ? multiply_add(root(v), splat(bias2), splat(1e-8)) : splat(1);
                V direction = job.nesterov ? (adam ? m : multiply_add(splat(0.9), m, g)) : m;
                first[i] = m, second[i] = adam ? v : V{}, weights[i] = w - pace * direction / divisor;
            }
        }
    }

    // ------------------------------------------------------------------------------------------- between torch and the lanes

    template <class T, class S> void pack(T* lanes, S* const* stacked, int64_t start) const {
        for (int t = 0; t < tensors; ++t)
            for (int l = 0; l < L && stacked[t]; ++l) {
                const S* model = stacked[t] + std::min(start + l, job.models - 1) * SIZE[t];  // spare lanes repeat the last model
                for (int i = 0; i < SIZE[t]; ++i) lanes[offset(t) + i][l] = model[i];
            }
    }

    template <class T> static T plain(T x) { return x == x ? x : T(NAN); }  // what is no number has many forms, which depend on the processor

    void unpack(const V* lanes, Scalar* const* stacked, int64_t start) const {
        for (int t = 0; t < tensors; ++t)
            for (int l = 0; l < L && start + l < job.models && stacked[t]; ++l)
                for (int i = 0; i < SIZE[t]; ++i) stacked[t][(start + l) * SIZE[t] + i] = plain(lanes[offset(t) + i][l]);
    }

    void take_factors(int64_t start) {
        uint32_t keys[L][2];
        dropping = false;
        for (int a = 0; a < ACTIVATIONS; ++a) activated[a] = Mask{}, present[a] = false;
        for (int l = 0; l < L; ++l) {
            const int64_t m = std::min(start + l, job.models - 1);
            present[job.activation[m]] = true, activated[job.activation[m]][l] = -1;
            if (!job.keys) continue;  // evaluation
            keys[l][0] = (uint32_t)job.keys[2 * m], keys[l][1] = (uint32_t)job.keys[2 * m + 1];
            adam[l] = job.adam[m] ? -1 : 0, rate[l] = job.rate[m], decay[l] = (Scalar)job.decay[m];
            dropout_threshold[l] = (uint32_t)std::floor(job.dropout[m] * 4294967296.0), dropout_scale[l] = (Scalar)(1 / (1 - job.dropout[m]));
            dropping |= job.dropout[m] > 0;
        }
        if (job.keys) stream.seed(keys);
    }

    // Where lanes differ, each activation is calculated for all of them, and each lane takes its own.
    void activate_all(V* y, V* slope, int n) const {
        if (std::count(present, present + ACTIVATIONS, true) == 1) return activate(std::find(present, present + ACTIVATIONS, true) - present, y, slope, n);
        constexpr int CHUNK = 64;
        V input[CHUNK], value[CHUNK], derivative[CHUNK];
        for (int start = 0; start < n; start += CHUNK) {
            const int count = std::min(CHUNK, n - start);
            std::copy(y + start, y + start + count, input);
            for (int a = 0; a < ACTIVATIONS; ++a) {
                if (!present[a]) continue;
                const Mask own = activated[a];
                std::copy(input, input + count, value);
                activate(a, value, derivative, count);
                for (int i = 0; i < count; ++i) y[start + i] = own ? value[i] : y[start + i], slope[start + i] = own ? derivative[i] : slope[start + i];
            }
        }
    }

    // -------------------------------------------------------------------------------------------------------------- one epoch

    void shuffle(std::vector<uint32_t>& order) const {  // [samples, L]
        const size_t n = job.samples;
        std::vector<uint32_t> words(n * L), column(n), sorted;
        for (size_t i = 0; i < n; i += 4) {
            U word[4];
            stream.draw(i / 4, 0, 0, job.epoch, word);
            for (size_t j = i; j < std::min(i + 4, n); ++j)
                for (int l = 0; l < L; ++l) words[l * n + j] = word[j - i][l];
        }
        order.resize(n * L);
        for (int l = 0; l < L; ++l) {
            std::copy(&words[l * n], &words[l * n] + n, column.begin());
            shuffled(column, sorted);
            for (size_t i = 0; i < n; ++i) order[i * L + l] = sorted[i];
        }
    }

    bool train(int64_t start, const volatile int* stop) {
        take_factors(start);
        pack<V, Scalar>(weights, job.weights, start);
        pack<V, Scalar>(first, job.first, start);
        pack<V, Scalar>(second, job.second, start);
        pack<Byte, const uint8_t>(masks, job.masks, start);
        std::vector<uint32_t> order;
        shuffle(order);

        D loss = {}, right = {};
        int64_t step = 0;
        for (int64_t from = 0; from < job.samples; from += job.batch, ++step) {
            if (*stop) return false;
            const int64_t until = std::min(from + job.batch, job.samples);
            std::memset((void*)gradient.data, 0, parameters * sizeof(V));
            if (noisy) compute_variances();
            transform_kernels<0>();
            for (int64_t position = from; position < until; ++position) {
                const Scalar* sample[L];
                V label, winner;
                for (int l = 0; l < L; ++l) {
                    uint32_t now = order[position * L + l], then = order[std::min(position + 1, job.samples - 1) * L + l];
                    sample[l] = job.images + (size_t)now * A::INPUTS, next[l] = job.images + (size_t)then * A::INPUTS;
                    label[l] = (Scalar)job.labels[now];
                }
                gather(sample, A::INPUTS, image);
                forward<0>((uint32_t)position);
                loss += to<D>(cross_entropy(trace[4].y, label, Scalar(1) / Scalar(until - from), trace[4].g, winner));
                right += to<D>(winner == label ? splat(1) : V{});
                backward<4>();
            }
            transform_gradients<0>();
            if (noisy) chain_variances();
            update(job.steps + step + 1, job.factor ? job.factor[step] : 1);
        }
        unpack(weights, job.weights, start);
        unpack(first, job.first, start);
        unpack(second, job.second, start);
        report(start, loss, right);
        return true;
    }

    void report(int64_t start, D loss, D right) const {
        for (int l = 0; l < L && start + l < job.models; ++l)
            job.loss[start + l] = plain(loss[l] / job.samples), job.accuracy[start + l] = right[l] / job.samples;
    }

    // ------------------------------------------------------------------------------------------------------------- evaluation
    // All lanes look at the same image, so the first layer reads single numbers instead of registers.

    template <int n> void forward_plain(const Scalar* shared) {
        using T = Layer<n>;
        Trace& t = trace[n];
        auto nothing = [](int, int) {};
        if constexpr (n == 0) T::forward(shared, weight<n>(weights), bias<n>(weights), t, nothing);
        else T::forward(t.x, kernel<n>(0), bias<n>(weights), t, nothing);
        if constexpr (n < 4) {
            activate_all(t.y, t.slope, T::OUTPUTS);
            forward_plain<n + 1>(nullptr);
        }
    }

    bool evaluate(int64_t start, const volatile int* stop) {
        take_factors(start);
        pack<V, Scalar>(weights, job.weights, start);
        transform_kernels<0>();
        D loss = {}, right = {};
        for (int64_t i = 0; i < job.samples; ++i) {
            if (i % 16 == 0 && *stop) return false;
            forward_plain<0>(job.images + i * A::INPUTS);
            V winner, label = splat((Scalar)job.labels[i]);
            loss += to<D>(cross_entropy(trace[4].y, label, 1, nullptr, winner));
            right += to<D>(winner == label ? splat(1) : V{});
            for (int l = 0; l < L && start + l < job.models; ++l) {
                const int64_t at = (start + l) * job.samples + i;
                if (job.predictions) job.predictions[at] = (uint8_t)winner[l];
                for (int c = 0; c < 10 && job.logits; ++c) job.logits[at * 10 + c] = plain(trace[4].y[c][l]);
            }
        }
        report(start, loss, right);
        return true;
    }
};

using Small1 = Network<Convolution<1, 28, 28, 8, 5, 2>, Convolution<8, 12, 12, 6, 5, 2>, Convolution<6, 4, 4, 4, 2, 1>, Linear<36, 20>, Linear<20, 10>>;
using Small3 = Network<Convolution<3, 28, 28, 8, 5, 2>, Convolution<8, 12, 12, 6, 5, 2>, Convolution<6, 4, 4, 4, 2, 1>, Linear<36, 20>, Linear<20, 10>>;
using Large = Network<Convolution<3, 32, 32, 16, 3, 2>, Winograd<16, 15, 15, 32>, Convolution<32, 6, 6, 15, 3, 2>, Linear<60, 20>, Linear<20, 10>>;

// Denormal numbers (below 1e-38) cost hundreds of cycles each and mean nothing here: they count as zero while a block runs.
struct FlushDenormals {
#if defined(__SSE__) || defined(__x86_64__)
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;
    FlushDenormals() { asm volatile("mrs %0, fpcr" : "=r"(before)); asm volatile("msr fpcr, %0" : : "r"(before | (1ull << 24))); }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#endif
};

enum Result { DONE, STOPPED, UNKNOWN_ARCHITECTURE, OUT_OF_MEMORY };

template <class G> static int with_network(const Job& job, G go) {
    FlushDenormals flush;
    auto run = [&](auto network) { return go(*network) ? DONE : STOPPED; };
    try {
        switch (job.architecture) {
        case 0: return run(std::make_unique<Small1>(job));
        case 1: return run(std::make_unique<Small3>(job));
        case 2: return run(std::make_unique<Large>(job));
        }
    } catch (const std::bad_alloc&) { return OUT_OF_MEMORY; }
    return UNKNOWN_ARCHITECTURE;
}

extern "C" {
int lanes_width() { return L; }
int64_t lanes_job_size() { return sizeof(Job); }
int lanes_train(const Job* job, int64_t start, const volatile int* stop) {
    return with_network(*job, [&](auto& network) { return network.train(start, stop); });
}
int lanes_evaluate(const Job* job, int64_t start, const volatile int* stop) {
    return with_network(*job, [&](auto& network) { return network.evaluate(start, stop); });
}
// Floating-point operations per second of this core, from a tenth of a second of its own time and a product of matrices that
// stays in registers, as in a convolution. Multiply-adds of nothing but registers run at a third of it on some processors.
double lanes_peak() {
    constexpr int rows = L == 8 ? 2 : 4, columns = 4, depth = 8;  // AVX2 has half as many registers
    V left[depth][rows], right[depth][columns], sum[rows][columns] = {};
    for (int k = 0; k < depth; ++k) {
        for (int i = 0; i < rows; ++i) left[k][i] = splat(Scalar(0.5));
        for (int j = 0; j < columns; ++j) right[k][j] = splat(Scalar(0.25));
    }
    auto now = [] { timespec t; clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t); return t.tv_sec + 1e-9 * t.tv_nsec; };
    const double start = now();
    double seconds = 0, operations = 0;
    for (; seconds < 0.1; seconds = now() - start, operations += 10000. * depth * rows * columns * L * 2)
        for (int k = 0; k < 10000 * depth; ++k) {
            V value[columns];
            UNROLL for (int j = 0; j < columns; ++j) value[j] = hold(right[k % depth][j]);
            UNROLL for (int i = 0; i < rows; ++i) {
                V factor = hold(left[k % depth][i]);
                UNROLL for (int j = 0; j < columns; ++j) sum[i][j] = multiply_add(factor, value[j], sum[i][j]);
            }
        }
    V total = V{};
    for (int i = 0; i < rows; ++i) for (int j = 0; j < columns; ++j) total += sum[i][j];
    volatile Scalar used = total[0];
    (void)used;
    return operations / seconds;
}

// For tests: what one model draws.
void lanes_normals(const uint32_t* key, uint32_t site, uint32_t position, uint32_t epoch, int count, Scalar* out) {
    uint32_t keys[L][2];
    for (int l = 0; l < L; ++l) keys[l][0] = key[0], keys[l][1] = key[1];
    Philox stream;
    stream.seed(keys);
    Buffer<V> lanes(count);
    normals(stream, site, position, epoch, 0, count, lanes);
    for (int i = 0; i < count; ++i) out[i] = lanes[i][0];
}
}
