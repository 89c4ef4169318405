// One model in one thread block: training and evaluation of populations of the paper's small CNNs on a GPU.
//
// A block of THREADS_PER_BLOCK threads trains one model for one epoch without help from outside. The model's weights and what a
// few images leave behind in its layers lie in shared memory; the optimizer's moments stay in global memory, where the second
// cache holds them. Blocks do not talk to each other, hence a model's bits depend on nothing but itself.
//
// The same source is a program for a CPU: `THREADS ... BARRIER` encloses what the threads of a block do between two barriers, and
// is a loop over the threads where there is no GPU. There the tests compare it with the other engines. -DREVERSED runs the
// threads backwards: if nothing changes, no thread has read what another one wrote between the same two barriers.
//
// It is compiled once for each net (-DNET) and once more for its variational layers (-DNOISY=1). It reads bottom-up: threads,
// numbers, layers, what Python hands over, what lies in shared memory, random numbers, forward and backward pass, optimizers,
// one epoch of training, evaluation, the order of an epoch, and how all this is called.
//
// Short names are those of lanes.cpp: CI and CO are the numbers of input and output channels (or units), H the size of the input,
// K that of the kernel (KK = K * K), P that of the pooling window (Q = P * P), OH the size of the output before pooling, PH after
// it, UH that of the part before it that pooling uses. w are weights, x inputs, y outputs, g gradients of the loss. In a plain
// net all sums are of one kind; in a variational one of two: set 0 are means, set 1 variances.

#ifndef NET
#define NET 0  // 0: CNN small with one channel, 1: with three, 2: CNN large
#endif
#ifndef NOISY
#define NOISY 0  // 1: variational layers
#endif
#ifndef SCALAR
#define SCALAR float  // double: on a CPU, to compare with other engines
#endif

#if !defined(__CUDACC__)
#include <cmath>
#endif
#include "elementary.h"

// ---------------------------------------------------------------------------------------------------------------- threads
// LOCAL is an array of which every thread has its own, kept across barriers; OWN is that of thread t. UNROLL and ROLL say which
// loops become straight code: those whose arrays shall live in registers. More of it than needed would fill the registers.

#if defined(__CUDACC__)
#define DEVICE __device__ __forceinline__
// The assembly hides that t never changes: what depends on it would be kept in registers for an epoch, and fill them.
#define THREADS { int t = threadIdx.x; asm volatile("" : "+r"(t));
#define BARRIER } __syncthreads();
#define LOCAL(type, name, n) type name[n]
#define OWN(name) name
#define UNROLL _Pragma("unroll")
#define ROLL _Pragma("unroll 1")
#define UNROLL_3 _Pragma("unroll 3")
#else
#define DEVICE inline
#if defined(REVERSED)
#define THREADS for (int t = THREADS_PER_BLOCK - 1; t >= 0; --t) {
#else
#define THREADS for (int t = 0; t < THREADS_PER_BLOCK; ++t) {
#endif
#define BARRIER }
#define LOCAL(type, name, n) static thread_local type name##_of[THREADS_PER_BLOCK][n]
#define OWN(name) name##_of[t]
#define UNROLL
#define ROLL
#define UNROLL_3
#endif
#define FOR(i, n) ROLL for (int i = t; i < (n); i += THREADS_PER_BLOCK)  // the threads' share of n things

// ---------------------------------------------------------------------------------------------------------------- numbers

#if !defined(__CUDACC__)  // in double precision the standard library does the work
static inline double root(double x) { return std::sqrt(x); }
static inline double exponential(double x) { return std::exp(x); }
static inline double logarithm(double x) { return std::log(x); }
static inline double hyperbolic_tangent(double x) { return std::tanh(x); }
static inline double logistic(double x) { return 1 / (1 + std::exp(-x)); }
static inline double larger(double a, double b) { return a > b ? a : b; }
static inline void normal_distribution(double x, double& below, double& density) {
    below = 0.5 * std::erfc(-x * 0.70710678118654752), density = std::exp(-0.5 * x * x);
}
#endif

namespace {  // because the builds for several nets live in one process on a CPU

using Real = SCALAR;
struct alignas(2 * sizeof(Real)) Two { Real a, b; };  // read and written at once
struct alignas(4 * sizeof(Real)) Four { Real a, b, c, d; };

enum Activation { TANH, RELU, SIGMOID, GELU };

// y <- activation(y), and its slope there.
DEVICE void activate(int activation, Real& y, Real& slope) {
    if (activation == TANH) y = hyperbolic_tangent(y), slope = 1 - y * y;
    else if (activation == RELU) slope = y > 0 ? 1 : 0, y = y <= 0 ? 0 : y;
    else if (activation == SIGMOID) y = logistic(y), slope = y * (1 - y);
    else {
        Real below, density;
        normal_distribution(y, below, density);
        slope = below + y * Real(0.39894228040143268) * density, y *= below;
    }
}

// ----------------------------------------------------------------------------------------------------------------- layers
// Where a layer's numbers lie, for one image. Rows begin at even places and channels at odd multiples of four, so that pairs and
// fours can be read at once and neighbouring channels lie in different banks of shared memory.

constexpr int SETS = 1 + NOISY, CLASSES = 10;
DEVICE constexpr int up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
DEVICE constexpr int apart(int n) { return up(n, 4) % 8 ? up(n, 4) : up(n, 4) + 4; }

// Convolution of size K without padding, then max-pooling of P x P windows (P = 1: none). LAST: a linear layer comes next.
// A thread calculates GROUP output channels of a window. Kernels lie as [input channel][tap][output channel].
template <int CI_, int H_, int CO_, int K_, int P_, int GROUP_, bool LAST> struct Convolution {
    static constexpr bool SPATIAL = true;
    static constexpr int CI = CI_, H = H_, CO = CO_, K = K_, P = P_, Q = P * P, KK = K * K, GROUP = GROUP_, GROUPS = CO / GROUP;
    static constexpr int OH = H - K + 1, PH = OH / P, UH = PH * P, WINDOWS = PH * PH, OUTPUTS = CO * WINDOWS, WEIGHTS = CO * CI * KK;
    static constexpr int ROW = up(H, 2), CHANNEL = apart(H * ROW), IN = CI * CHANNEL;
    static constexpr int OUT_ROW = LAST ? PH : up(PH, 2), OUT_CHANNEL = LAST ? WINDOWS : apart(PH * OUT_ROW), OUT = CO * OUT_CHANNEL;
    static constexpr int BEFORE_ROW = up(UH, 4), BEFORE = CO * UH * BEFORE_ROW;  // gradients before pooling
    static constexpr int PADDED = GROUP > 2 ? up(GROUP, 4) : GROUP, TAP = GROUPS * PADDED;
    static constexpr int INPUT = GROUP > 2 ? apart(KK * TAP) : (KK * TAP) | 1, ROOM = CI * INPUT;
    static_assert(CO % GROUP == 0 && (GROUP <= 2 || PADDED % 4 == 0), "");

    static DEVICE constexpr int in(int c, int y, int x) { return c * CHANNEL + y * ROW + x; }
    static DEVICE constexpr int out(int c, int y, int x) { return c * OUT_CHANNEL + y * OUT_ROW + x; }
    static DEVICE constexpr int out(int i) { return out(i / WINDOWS, i % WINDOWS / PH, i % PH); }  // the i-th as torch counts
    static DEVICE constexpr int weight(int o, int i, int tap) { return i * INPUT + tap * TAP + o / GROUP * PADDED + o % GROUP; }
    static DEVICE constexpr int weight(int i) { return weight(i / (CI * KK), i / KK % CI, i % KK); }
};

// A fully connected layer.
template <int CI_, int CO_> struct Linear {
    static constexpr bool SPATIAL = false;
    static constexpr int CI = CI_, CO = CO_, OUTPUTS = CO, WEIGHTS = CO * CI, IN = CI, OUT = CO, ROOM = CI * CO, BEFORE = 0;
    static DEVICE constexpr int out(int i) { return i; }
    static DEVICE constexpr int weight(int o, int i) { return i * CO + o; }
    static DEVICE constexpr int weight(int i) { return weight(i / CI, i % CI); }
};

// The nets; how many threads train one, how many images (S) they take at a time, and whether gradients are summed in shared memory.
#if NET == 2
using A = Convolution<3, 32, 16, 3, 2, NOISY ? 4 : 8, false>;
using B = Convolution<16, 15, 32, 3, 2, 4, false>;
using C = Convolution<32, 6, 15, 3, 2, 1, true>;
using D = Linear<60, 20>;
constexpr bool GRADIENTS_SHARED = false;
#define THREADS_PER_BLOCK 288
constexpr int S = NOISY ? 1 : 2;
#else
using A = Convolution<NET ? 3 : 1, 28, 8, 5, 2, NOISY ? 4 : 8, false>;
using B = Convolution<8, 12, 6, 5, 2, 3, false>;
using C = Convolution<6, 4, 4, 2, 1, 1, true>;
using D = Linear<36, 20>;
constexpr bool GRADIENTS_SHARED = true;
#define THREADS_PER_BLOCK (NET ? 192 : 160)
constexpr int S = NET || NOISY ? 2 : 5;
#endif
using E = Linear<20, CLASSES>;
static_assert(A::OUT == B::IN && B::OUT == C::IN && C::OUT == D::IN && D::OUT == E::IN, "");

template <int n> struct Nth;
template <> struct Nth<0> { using type = A; };
template <> struct Nth<1> { using type = B; };
template <> struct Nth<2> { using type = C; };
template <> struct Nth<3> { using type = D; };
template <> struct Nth<4> { using type = E; };
template <int n> using Layer = typename Nth<n>::type;

// Where a layer's weights and biases lie: in shared memory, and (GIVEN) in a model's parameters as Python hands them over, where
// the log variances of all weights and then of the convolutions' biases follow.
template <int n> struct Place {
    using T = Layer<n>;
    using Below = Place<n - 1>;
    static constexpr int WEIGHT = Below::END, BIAS = WEIGHT + up(T::ROOM, 4), END = BIAS + up(T::CO, 4);
    static constexpr int GIVEN = Below::GIVEN_END, GIVEN_BIAS = GIVEN + T::WEIGHTS, GIVEN_END = GIVEN_BIAS + T::CO;
    static constexpr int WEIGHTS = Below::WEIGHTS + T::WEIGHTS, BIASES = Below::BIASES + (T::SPATIAL ? T::CO : 0);  // that carry noise, up to here
};
template <> struct Place<-1> { static constexpr int END = 0, GIVEN_END = 0, WEIGHTS = 0, BIASES = 0; };
constexpr int PLACES = Place<4>::END, PLAIN = Place<4>::GIVEN_END, PARAMETERS = PLAIN + NOISY * (Place<4>::WEIGHTS + Place<4>::BIASES);

// ------------------------------------------------------------------------------------------------- what Python hands over

struct Job {
    int models, samples, batch, epoch, nesterov;            // nesterov: 1 if SGD looks ahead along the momentum
    int dropout_site[4], noise_site[5];                     // 0: that layer draws nothing
    double kl_weight;
    const Real* images;                                     // [samples, channels, H, H]
    const int* labels;                                      // [samples]
    const long long *keys, *dropout_threshold;              // [models, 2], [models]: words
    const int *activation, *adam;                           // [models]; adam: 1, or 0 for SGD
    const Real *rate, *decay, *dropout_scale;               // [models]
    const Real* factor;                                     // [steps of the epoch], of all rates
    const Real *correction1, *correction2;                  // [steps of the epoch]: Adam's 1 / (1 - 0.9^s), 1 / sqrt(1 - 0.999^s)
    const unsigned char* masks;                             // [models, parameters] or null
    Real *weights, *first, *second;                         // [models, parameters], moved in place; second: null without Adam
    Real* gradients;                                        // [models, room for gradients], not used if shared memory holds them
    int *order, *room;                                      // [models, samples]; the second is for sorting
    double *loss, *accuracy;                                // [models]
    unsigned char* predictions;                             // [models, samples], evaluation only, or null
    Real* logits;                                           // [models, samples, CLASSES], evaluation only, or null
    const int* stop;                                        // on a CPU: not 0 when work has to end
};

// ----------------------------------------------------------------------------------------------------------- shared memory

// What a few images leave in a layer: its inputs, which are the outputs of the layer below; slopes of its activations, which
// become gradients before its activations; winners of its pooling windows; d output / d variance.
template <class T> struct Trace {
    alignas(4 * sizeof(Real)) Real x[S][T::IN];
    Real g[S][T::OUT];
    unsigned char winner[T::SPATIAL ? S : 1][T::SPATIAL ? T::OUT : 1];
    Real ratio[NOISY ? S : 1][NOISY ? T::OUT : 1];
};

constexpr int SHARED_GRADIENTS = GRADIENTS_SHARED ? PLACES : 1, BEFORE = B::BEFORE > C::BEFORE ? B::BEFORE : C::BEFORE;

struct Shared {
    alignas(4 * sizeof(Real)) Real w[SETS][PLACES];         // weights, and their variances
    Real gradients[SETS][SHARED_GRADIENTS];
    Trace<A> a; Trace<B> b; Trace<C> c; Trace<D> d; Trace<E> e;
    Real z[S][CLASSES];                                     // outputs of the last layer
    union {  // in turn:
        alignas(4 * sizeof(Real)) Real before[SETS][S][BEFORE];  // gradients before pooling, of one layer at a time
        Real partial[THREADS_PER_BLOCK][A::K];              // sums of one thread each, for the first layer
    };
    int label[S], winner[S];
    Real loss[S];
    double total_loss, total_right;                         // over an epoch
};

// -------------------------------------------------------------------------------------------------------- random numbers

struct Stream {  // of one model
    U key0, key1, epoch;

    DEVICE void draw(U block, U site, U position, U (&word)[4]) const { ::random_words(key0, key1, block, site, position, epoch, word); }

    DEVICE U word(U index, U site, U position) const {
        U w[4];
        draw(index / 4, site, position, w);
        return index % 4 < 2 ? (index % 4 ? w[1] : w[0]) : (index % 4 == 2 ? w[2] : w[3]);
    }

    // The pair of normal numbers of which one has this index.
    DEVICE void pair(U index, U site, U position, F& first, F& second) const {
        U w[4];
        draw(index / 4, site, position, w);
        const bool upper = index % 4 >= 2;
        normal_pair(upper ? w[2] : w[0], upper ? w[3] : w[1], first, second);
    }

    DEVICE Real normal(U index, U site, U position) const {
        F first, second;
        pair(index, site, position, first, second);
        return index % 2 ? second : first;
    }
};

// ------------------------------------------------------------------------------------------------------- one model at work

struct Block {
    const Job& job;
    Shared& s;
    const int model;
    const Stream stream;
    const int activation;

    DEVICE Block(const Job& j, Shared& shared, int m)
        : job(j), s(shared), model(m), stream{(U)(j.keys ? j.keys[2 * m] : 0), (U)(j.keys ? j.keys[2 * m + 1] : 0), (U)j.epoch},
          activation(j.activation[m]) {}

    template <int n> DEVICE Trace<Layer<n>>& trace() const {
        if constexpr (n == 0) return s.a;
        else if constexpr (n == 1) return s.b;
        else if constexpr (n == 2) return s.c;
        else if constexpr (n == 3) return s.d;
        else return s.e;
    }
    template <int n> DEVICE Real* output(int k) const { if constexpr (n < 4) return trace<n + 1>().x[k]; else return s.z[k]; }
    DEVICE Real* gradients(int set) const {
        if constexpr (GRADIENTS_SHARED) return s.gradients[set];
        else return job.gradients + ((size_t)model * SETS + set) * PLACES;
    }
    DEVICE size_t row(int i) const { return (size_t)model * job.samples + i; }      // the place of a sample among those of all models
    DEVICE size_t mine(int i) const { return (size_t)model * PARAMETERS + i; }  // the place of a parameter among those of all models

    // ------------------------------------------------------------------------------------------------------------ forward

    template <bool SHUFFLED> DEVICE void gather(int from, int count) {
        constexpr int fours = A::H * A::H / 4;
        THREADS
            FOR(i, count * A::CI * fours) {
                const int k = i / (A::CI * fours), c = i / fours % A::CI, p = i % fours;
                const size_t sample = SHUFFLED ? job.order[row(from + k)] : from + k;
                ((Four*)(s.a.x[k] + c * A::CHANNEL))[p] = ((const Four*)(job.images + (sample * A::CI + c) * A::H * A::H))[p];
            }
            FOR(k, count) s.label[k] = job.labels[SHUFFLED ? job.order[row(from + k)] : from + k];
        BARRIER
    }

    // GROUP neighbouring weights of a tap.
    template <class T> DEVICE void load_group(const Real* w, Real (&weight)[T::PADDED]) const {
        if constexpr (T::PADDED % 4 == 0)
            UNROLL for (int c = 0; c < T::PADDED; c += 4) {
                const Four v = *(const Four*)(w + c);
                weight[c] = v.a, weight[c + 1] = v.b, weight[c + 2] = v.c, weight[c + 3] = v.d;
            }
        else UNROLL for (int c = 0; c < T::PADDED; ++c) weight[c] = w[c];
    }

    // What a pooling window sees of one input channel; set 1: squared.
    template <class T, int set, int EDGE> DEVICE void load_patch(const Real* x, Real (&patch)[EDGE][EDGE]) const {
        UNROLL for (int r = 0; r < EDGE; ++r) {
            if constexpr (T::P == 2)
                UNROLL for (int c = 0; c < EDGE; c += 2) {
                    const Two v = *(const Two*)(x + r * T::ROW + c);
                    patch[r][c] = v.a, patch[r][c + 1] = v.b;
                }
            else UNROLL for (int c = 0; c < EDGE; ++c) patch[r][c] = x[r * T::ROW + c];
        }
        if constexpr (set == 1) UNROLL for (int r = 0; r < EDGE; ++r) UNROLL for (int c = 0; c < EDGE; ++c) patch[r][c] *= patch[r][c];
    }

    // Means (set 0) or variances (set 1) of one pooling window, for GROUP output channels: all of it in registers.
    template <int n, int set> DEVICE void window(int k, int group, int py, int px, Real (&sum)[Layer<n>::GROUP][Layer<n>::Q]) const {
        using T = Layer<n>;
        constexpr int EDGE = T::K + T::P - 1;
        UNROLL for (int c = 0; c < T::GROUP; ++c) UNROLL for (int q = 0; q < T::Q; ++q) sum[c][q] = s.w[set][Place<n>::BIAS + group * T::GROUP + c];
        ROLL for (int i = 0; i < T::CI; ++i) {
            const Real* w = s.w[set] + Place<n>::WEIGHT + i * T::INPUT + group * T::PADDED;
            Real patch[EDGE][EDGE], weight[T::PADDED];
            load_patch<T, set>(trace<n>().x[k] + T::in(i, T::P * py, T::P * px), patch);
            UNROLL for (int ky = 0; ky < T::K; ++ky) UNROLL for (int kx = 0; kx < T::K; ++kx) {
                load_group<T>(w + (ky * T::K + kx) * T::TAP, weight);
                UNROLL for (int c = 0; c < T::GROUP; ++c) UNROLL for (int q = 0; q < T::Q; ++q)
                    sum[c][q] += weight[c] * patch[ky + q / T::P][kx + q % T::P];
            }
        }
    }

    template <int n> DEVICE void convolve(int count, U position) {
        using T = Layer<n>;
        THREADS
            FOR(i, count * T::GROUPS * T::WINDOWS) {
                const int k = i / (T::GROUPS * T::WINDOWS), group = i / T::WINDOWS % T::GROUPS, at = i % T::WINDOWS, py = at / T::PH, px = at % T::PH;
                Real sum[SETS][T::GROUP][T::Q];
                window<n, 0>(k, group, py, px, sum[0]);
                if constexpr (NOISY) window<n, 1>(k, group, py, px, sum[1]);
                UNROLL for (int c = 0; c < T::GROUP; ++c) finish<n>(k, group * T::GROUP + c, py, px, position + k, sum[0][c], sum[NOISY][c]);
            }
        BARRIER
    }

    // The noise of a window; the numbers of a layer count its outputs before pooling.
    template <int n> DEVICE void draw_noise(int o, int py, int px, U position, Real (&noise)[Layer<n>::Q]) const {
        using T = Layer<n>;
        const U site = (U)job.noise_site[n];
        UNROLL for (int r = 0; r < T::P; ++r) {
            const U index = (o * T::OH + T::P * py + r) * T::OH + T::P * px;
            if constexpr (T::P == 2 && T::OH % 2 == 0) {
                F first, second;
                stream.pair(index, site, position, first, second);
                noise[2 * r] = first, noise[2 * r + 1] = second;
            } else
                UNROLL for (int c = 0; c < T::P; ++c) noise[r * T::P + c] = stream.normal(index + c, site, position);
        }
    }

    // The first largest value of a window wins; a value that is no number makes the window one.
    template <int Q> static DEVICE Real pool(const Real (&value)[Q], int& winner) {
        Real best = value[0], broken = 0;
        UNROLL for (int q = 0; q < Q; ++q) best = larger(best, value[q]), broken = value[q] != value[q] ? value[q] : broken;
        best = broken != broken ? broken : best;
        winner = Q - 1;
        UNROLL for (int q = Q - 2; q >= 0; --q) winner = value[q] == best ? q : winner;
        return best;
    }

    // From the sums of a window to an output: out = mean + sqrt(variance + 1e-15) noise, pooled and activated.
    template <int n> DEVICE void finish(int k, int o, int py, int px, U position, Real (&value)[Layer<n>::Q], const Real (&variance)[Layer<n>::Q]) {
        using T = Layer<n>;
        const int at = T::out(o, py, px);
        Real ratio[T::Q], slope;  // noise, then noise / standard deviation, which is twice d output / d variance
        if constexpr (NOISY) {
            draw_noise<n>(o, py, px, position, ratio);
            UNROLL for (int q = 0; q < T::Q; ++q) {
                const Real deviation = root(variance[q] + Real(1e-15));
                value[q] += deviation * ratio[q], ratio[q] /= deviation;
            }
        }
        int winner;
        Real y = pool(value, winner);
        activate(activation, y, slope);
        output<n>(k)[at] = y, trace<n>().g[k][at] = slope, trace<n>().winner[k][at] = (unsigned char)winner;
        if constexpr (NOISY) {
            Real chosen = ratio[0];
            UNROLL for (int q = 1; q < T::Q; ++q) chosen = winner == q ? ratio[q] : chosen;
            trace<n>().ratio[k][at] = Real(0.5) * chosen;
        }
    }

    template <int n> DEVICE void multiply(int count, U position) {  // a fully connected layer
        using T = Layer<n>;
        Trace<T>& layer = trace<n>();
        THREADS
            FOR(i, count * T::CO) {
                const int k = i / T::CO, o = i % T::CO;
                Real sum[SETS] = {s.w[0][Place<n>::BIAS + o]};
                for (int j = 0; j < T::CI; ++j) {
                    const Real x = layer.x[k][j];
                    sum[0] += s.w[0][Place<n>::WEIGHT + T::weight(o, j)] * x;
                    if constexpr (NOISY) sum[1] += s.w[1][Place<n>::WEIGHT + T::weight(o, j)] * (x * x);
                }
                if constexpr (NOISY) {
                    const Real deviation = root(sum[1] + Real(1e-15)), noise = stream.normal(o, (U)job.noise_site[n], position + k);
                    sum[0] += deviation * noise, layer.ratio[k][o] = Real(0.5) * noise / deviation;
                }
                if constexpr (n < 4) activate(activation, sum[0], layer.g[k][o]);
                output<n>(k)[o] = sum[0];
            }
        BARRIER
    }

    // Dropout as a factor on outputs and slopes: 1 / (1 - p) for what is kept, else 0.
    template <int n> DEVICE void drop(int count, U position) {
        using T = Layer<n>;
        static_assert(T::OUTPUTS % 4 == 0, "");
        const long long threshold = job.dropout_threshold[model];
        const U site = (U)job.dropout_site[n];
        if (!threshold || !site) return;
        THREADS
            FOR(i, count * (T::OUTPUTS / 4)) {
                const int k = i / (T::OUTPUTS / 4), four = i % (T::OUTPUTS / 4);
                U word[4];
                stream.draw(four, site, position + k, word);
                UNROLL for (int c = 0; c < 4; ++c) {
                    const Real factor = word[c] >= threshold ? job.dropout_scale[model] : 0;
                    const int at = T::out(4 * four + c);
                    output<n>(k)[at] *= factor, trace<n>().g[k][at] *= factor;
                }
            }
        BARRIER
    }

    template <int n, bool TRAINING> DEVICE void forward(int count, U position) {
        if constexpr (Layer<n>::SPATIAL) convolve<n>(count, position);
        else multiply<n>(count, position);
        if constexpr (n < 4) {
            if constexpr (TRAINING) drop<n>(count, position);
            forward<n + 1, TRAINING>(count, position);
        }
    }

    // Cross-entropy and its gradient (softmax - target) * scale. The first largest output wins, what is no number above all.
    DEVICE void judge(int count, Real scale) {
        THREADS
            FOR(k, count) {
                const Real* z = s.z[k];
                const int label = s.label[k];
                Real best = z[0], own = z[0], power[CLASSES], sum = 0;
                int winner = 0;
                UNROLL for (int c = 1; c < CLASSES; ++c) {
                    const bool better = z[c] > best || (z[c] != z[c] && best == best);
                    best = better ? z[c] : best, winner = better ? c : winner, own = label == c ? z[c] : own;
                }
                UNROLL for (int c = 0; c < CLASSES; ++c) sum += power[c] = exponential(z[c] - best);
                UNROLL for (int c = 0; c < CLASSES; ++c) s.e.g[k][c] = (power[c] / sum - (label == c ? 1 : 0)) * scale;
                s.loss[k] = logarithm(sum) - (own - best), s.winner[k] = winner;
            }
        BARRIER
        THREADS
            if (t == 0) for (int k = 0; k < count; ++k) s.total_loss += s.loss[k], s.total_right += s.winner[k] == s.label[k];
        BARRIER
    }

    DEVICE void report() {
        THREADS
            if (t == 0) job.loss[model] = s.total_loss / job.samples, job.accuracy[model] = s.total_right / job.samples;
        BARRIER
    }

    // ----------------------------------------------------------------------------------------------------------- backward
    // g holds the gradient with respect to what a layer has given before its activation; times `ratio` it is that with
    // respect to its variance. From layer to layer, slopes become gradients.

    template <int n> DEVICE void backward(int count) {
        if constexpr (n == 0) first_weight_gradient(count);
        else {
            if constexpr (Layer<n>::SPATIAL) convolution_backward<n>(count);
            else linear_backward<n>(count);
            backward<n - 1>(count);
        }
    }

    // A gradient with respect to an input, from those of means and variances, goes to the layer below.
    template <int n> DEVICE void pass_on(int k, int at, Real by_mean, Real by_variance) const {
        trace<n - 1>().g[k][at] *= NOISY ? by_mean + 2 * trace<n>().x[k][at] * by_variance : by_mean;
    }

    template <int n> DEVICE void linear_backward(int count) {
        using T = Layer<n>;
        const Trace<T>& layer = trace<n>();
        THREADS
            FOR(i, T::WEIGHTS) {
                const int o = i % T::CO, j = i / T::CO, at = Place<n>::WEIGHT + T::weight(o, j);
                Real sum[SETS];
                UNROLL for (int set = 0; set < SETS; ++set) sum[set] = gradients(set)[at];
                for (int k = 0; k < count; ++k) {
                    const Real x = layer.x[k][j], g = layer.g[k][o];
                    sum[0] += g * x;
                    if constexpr (NOISY) sum[1] += g * layer.ratio[k][o] * (x * x);
                }
                UNROLL for (int set = 0; set < SETS; ++set) gradients(set)[at] = sum[set];
            }
            FOR(o, T::CO) for (int k = 0; k < count; ++k) gradients(0)[Place<n>::BIAS + o] += layer.g[k][o];
            FOR(i, count * T::CI) {
                const int k = i / T::CI, j = i % T::CI;
                Real sum[2] = {};
                for (int o = 0; o < T::CO; ++o) {
                    const Real g = layer.g[k][o];
                    sum[0] += g * s.w[0][Place<n>::WEIGHT + T::weight(o, j)];
                    if constexpr (NOISY) sum[1] += g * layer.ratio[k][o] * s.w[1][Place<n>::WEIGHT + T::weight(o, j)];
                }
                pass_on<n>(k, j, sum[0], sum[1]);
            }
        BARRIER
    }

    template <int n> DEVICE void convolution_backward(int count) {
        using T = Layer<n>;
        THREADS
            FOR(i, T::WEIGHTS / (T::K * rows<T>())) kernel_gradient<n>(count, i);
            FOR(o, T::CO) bias_gradient<n>(count, o);
            FOR(i, count * T::OUTPUTS) unpool<n>(i / T::OUTPUTS, i % T::OUTPUTS);
        BARRIER
        THREADS
            FOR(i, count * T::CI * T::H) {
                const int j = i % T::CI, k = i / T::CI % count, y = i / T::CI / count;
                Real sum[2][T::H] = {};
                input_gradient<n, 0>(k, j, y, sum[0]);
                if constexpr (NOISY) input_gradient<n, 1>(k, j, y, sum[1]);
                UNROLL for (int x = 0; x < T::H; ++x) pass_on<n>(k, T::in(j, y, x), sum[0][x], sum[1][x]);
            }
        BARRIER
    }

    template <class T> static DEVICE constexpr int rows() { return T::K == 3 ? 3 : 1; }  // of a kernel, to one thread

    // d loss / d weight of some rows of one kernel. Only a window's winner has a gradient.
    template <int n> DEVICE void kernel_gradient(int count, int i) const {
        using T = Layer<n>;
        constexpr int ROWS = rows<T>();
        const int o = i % T::CO, j = i / T::CO % T::CI, top = i / (T::CO * T::CI) * ROWS, at = Place<n>::WEIGHT + T::weight(o, j, top * T::K);
        Real sum[SETS][ROWS * T::K];
        UNROLL for (int set = 0; set < SETS; ++set) UNROLL for (int p = 0; p < ROWS * T::K; ++p) sum[set][p] = gradients(set)[at + p * T::TAP];
        for (int k = 0; k < count; ++k)
            UNROLL for (int p = 0; p < T::WINDOWS; ++p) {
                const int py = p / T::PH, px = p % T::PH, window = T::out(o, py, px), q = T::P == 1 ? 0 : trace<n>().winner[k][window];
                const Real g = trace<n>().g[k][window], by_variance = NOISY ? g * trace<n>().ratio[k][window] : 0;
                const Real* x = trace<n>().x[k] + T::in(j, T::P * py + q / T::P + top, T::P * px + q % T::P);
                UNROLL for (int ky = 0; ky < ROWS; ++ky) UNROLL for (int kx = 0; kx < T::K; ++kx) {
                    const Real value = x[ky * T::ROW + kx];
                    sum[0][ky * T::K + kx] += g * value;
                    if constexpr (NOISY) sum[1][ky * T::K + kx] += by_variance * (value * value);
                }
            }
        UNROLL for (int set = 0; set < SETS; ++set) UNROLL for (int p = 0; p < ROWS * T::K; ++p) gradients(set)[at + p * T::TAP] = sum[set][p];
    }

    template <int n> DEVICE void bias_gradient(int count, int o) const {
        using T = Layer<n>;
        Real sum[SETS] = {};
        for (int k = 0; k < count; ++k)
            for (int p = 0; p < T::WINDOWS; ++p) {
                const int at = T::out(o, p / T::PH, p % T::PH);
                sum[0] += trace<n>().g[k][at];
                if constexpr (NOISY) sum[1] += trace<n>().g[k][at] * trace<n>().ratio[k][at];
            }
        UNROLL for (int set = 0; set < SETS; ++set) gradients(set)[Place<n>::BIAS + o] += sum[set];
    }

    // Three quarters of the gradients before a 2 x 2 pooling are zero.
    template <int n> DEVICE void unpool(int k, int i) const {
        using T = Layer<n>;
        const int o = i / T::WINDOWS, py = i % T::WINDOWS / T::PH, px = i % T::PH, at = T::out(o, py, px), winner = trace<n>().winner[k][at];
        const Real g = trace<n>().g[k][at];
        UNROLL for (int set = 0; set < SETS; ++set) {
            Real* corner = s.before[set][k] + (o * T::UH + T::P * py) * T::BEFORE_ROW + T::P * px;
            const Real own = set ? g * trace<n>().ratio[NOISY ? k : 0][NOISY ? at : 0] : g;
            UNROLL for (int q = 0; q < T::Q; ++q) corner[q / T::P * T::BEFORE_ROW + q % T::P] = q == winner ? own : 0;
        }
    }

    // d loss / d input for a row of one input channel, all of it in registers.
    template <int n, int set> DEVICE void input_gradient(int k, int j, int y, Real (&sum)[Layer<n>::H]) const {
        using T = Layer<n>;
        const int first = y < T::UH ? 0 : y - T::UH + 1, last = y < T::K ? y : T::K - 1;
        ROLL for (int o = 0; o < T::CO; ++o)
            ROLL for (int ky = first; ky <= last; ++ky) {
                Real g[T::BEFORE_ROW];
                const Four* row = (const Four*)(s.before[set][k] + (o * T::UH + y - ky) * T::BEFORE_ROW);
                UNROLL for (int c = 0; c < T::BEFORE_ROW; c += 4) {
                    const Four v = row[c / 4];
                    g[c] = v.a, g[c + 1] = v.b, g[c + 2] = v.c, g[c + 3] = v.d;
                }
                UNROLL for (int kx = 0; kx < T::K; ++kx) {
                    const Real w = s.w[set][Place<n>::WEIGHT + T::weight(o, j, ky * T::K + kx)];
                    UNROLL for (int c = 0; c < T::UH; ++c) sum[c + kx] += g[c] * w;
                }
            }
    }

    // The first layer has few weights and many windows: a thread sums all taps of one kernel (and its bias) over every so many
    // rows of windows, in registers; then the threads' sums are added in a fixed order.
    DEVICE void first_weight_gradient(int count) {
        constexpr int KERNELS = A::CO * A::CI, SHARERS = THREADS_PER_BLOCK / KERNELS;
        static_assert(THREADS_PER_BLOCK % KERNELS == 0, "");
        ROLL for (int set = 0; set < SETS; ++set) {
            LOCAL(Real, sum, A::KK + 1);
            THREADS
                UNROLL for (int p = 0; p <= A::KK; ++p) OWN(sum)[p] = 0;
                ROLL for (int r = t / KERNELS; r < count * A::PH; r += SHARERS)
                    add_row_of_windows(set, r / A::PH, r % A::PH, t % A::CO, t % KERNELS / A::CO, OWN(sum));
            BARRIER
            UNROLL for (int ky = 0; ky <= A::K; ++ky) {  // the row after the last is the bias
                const int width = ky < A::K ? A::K : 1;
                THREADS
                    UNROLL for (int kx = 0; kx < A::K; ++kx) if (kx < width) s.partial[t][kx] = OWN(sum)[ky * A::K + kx];
                BARRIER
                THREADS
                    FOR(i, KERNELS * width) {
                        const int kernel = i / width, o = kernel % A::CO, j = kernel / A::CO, kx = i % width;
                        if (ky == A::K && j) continue;  // every output channel has one bias
                        Real& total = gradients(set)[ky < A::K ? Place<0>::WEIGHT + A::weight(o, j, ky * A::K + kx) : Place<0>::BIAS + o];
                        Real added = 0;
                        for (int r = kernel; r < THREADS_PER_BLOCK; r += KERNELS) added += s.partial[r][kx];
                        total += added;
                    }
                BARRIER
            }
        }
    }

    // Gradients that a row of windows gives to one kernel; the patch of the image that a window sees moves along in registers.
    DEVICE void add_row_of_windows(int set, int k, int py, int o, int j, Real (&sum)[A::KK + 1]) const {
        constexpr int EDGE = A::K + 1;
        static_assert(A::P == 2 && EDGE % 2 == 0, "");
        const Real* x = s.a.x[k] + A::in(j, 2 * py, 0);
        Real patch[EDGE][EDGE];
        auto load = [&](int r, int column, int to) {
            const Two v = *(const Two*)(x + r * A::ROW + column);
            patch[r][to] = set ? v.a * v.a : v.a, patch[r][to + 1] = set ? v.b * v.b : v.b;
        };
        UNROLL for (int r = 0; r < EDGE; ++r) UNROLL for (int c = 0; c < EDGE - 2; c += 2) load(r, c, c + 2);
        UNROLL_3 for (int px = 0; px < A::PH; ++px) {
            const int at = A::out(o, py, px), winner = s.a.winner[k][at];
            const Real g = set ? s.a.g[k][at] * s.a.ratio[NOISY ? k : 0][NOISY ? at : 0] : s.a.g[k][at];
            Real chosen[A::Q];
            UNROLL for (int q = 0; q < A::Q; ++q) chosen[q] = winner == q ? g : 0;
            UNROLL for (int r = 0; r < EDGE; ++r) {
                UNROLL for (int c = 0; c < EDGE - 2; ++c) patch[r][c] = patch[r][c + 2];
                load(r, 2 * px + EDGE - 2, EDGE - 2);
            }
            UNROLL for (int ky = 0; ky < A::K; ++ky) UNROLL for (int kx = 0; kx < A::K; ++kx) UNROLL for (int q = 0; q < A::Q; ++q)
                sum[ky * A::K + kx] += chosen[q] * patch[ky + q / 2][kx + q % 2];
            sum[A::KK] += g;
        }
    }

    // -------------------------------------------------------------------------------------------------- variational weights

    // log alpha = log sigma^2 - 2 ln(|w| + 1e-15), clamped; the clamp stops gradients strictly outside.
    static DEVICE Real log_alpha(Real w, Real log_sigma2, Real bound, bool& inside) {
        const Real raw = log_sigma2 - 2 * logarithm((w < 0 ? -w : w) + Real(1e-15));
        inside = raw >= -bound && raw <= bound;
        return raw < -bound ? -bound : raw > bound ? bound : raw;
    }

    // The variance of a weight's noise, alpha w^2.
    static DEVICE Real variance(Real w, Real log_sigma2, Real bound) {
        bool inside;
        return exponential(log_alpha(w, log_sigma2, bound, inside)) * w * w;
    }

    // ----------------------------------------------------------------------------------------------------------- optimizers

    struct Pace { bool adam; Real rate, decay, correction2; };  // of one model at one step

    DEVICE Pace pace(int step) const {
        const bool adam = job.adam[model];
        return {adam, job.rate[model] * job.factor[step] * (adam ? job.correction1[step] : 1), job.decay[model], job.correction2[step]};
    }

    // One step of Adam or of SGD with momentum 0.9; i is the parameter's place among those of all models.
    DEVICE Real moved(size_t i, Real w, Real gradient, const Pace& pace) const {
        Real g = gradient + pace.decay * w;
        if (job.masks) g *= job.masks[i];
        const Real m = Real(0.9) * job.first[i] + (pace.adam ? Real(0.1) : 1) * g;
        job.first[i] = m;
        if (!pace.adam) return w - pace.rate * (job.nesterov ? Real(0.9) * m + g : m);
        const Real v = Real(0.999) * job.second[i] + Real(0.001) * (g * g);
        job.second[i] = v;
        return w - pace.rate * m / (root(v) * pace.correction2 + Real(1e-8));
    }

    DEVICE void move_plain(int given, int place, const Pace& pace) const {
        s.w[0][place] = moved(mine(given), s.w[0][place], gradients(0)[place], pace);
    }

    // A weight and its log sigma^2: from d loss / d variance to both, through variance = exp(log alpha) w^2, with the gradient of
    // kl_weight * KL, KL = -sum[k1 sigmoid(k2 + k3 log alpha) - ln(1 + exp(-log alpha)) / 2 - k1].
    DEVICE void move_noisy(int given, int given_noise, int place, Real bound, const Pace& pace) const {
        constexpr Real k1 = 0.63576, k2 = 1.8732, k3 = 1.48695;
        const Real w = s.w[0][place], log_sigma2 = job.weights[mine(given_noise)], by_variance = gradients(NOISY)[place];
        bool inside;
        const Real relative = log_alpha(w, log_sigma2, bound, inside), alpha = exponential(relative), sigmoid = logistic(k2 + k3 * relative);
        const Real kl = -k1 * k3 * sigmoid * (1 - sigmoid) - Real(0.5) * logistic(-relative);
        const Real by_log_alpha = inside ? by_variance * (alpha * w * w) + Real(job.kl_weight) * kl : 0;
        const Real sign = w > 0 ? 1 : w < 0 ? -1 : 0, size = (w < 0 ? -w : w) + Real(1e-15);
        const Real next = moved(mine(given), w, gradients(0)[place] + by_variance * alpha * 2 * w - by_log_alpha * 2 * sign / size, pace);
        const Real next_log_sigma2 = moved(mine(given_noise), log_sigma2, by_log_alpha, pace);
        s.w[0][place] = next, job.weights[mine(given_noise)] = next_log_sigma2, s.w[NOISY][place] = variance(next, next_log_sigma2, bound);
    }

    // Calls g(given, given_noise, place, bound) for the thread's share of the parameters; without noise of its own, given_noise is 0.
    template <int n, class G> DEVICE void for_each(int t, G g) const {
        using T = Layer<n>;
        constexpr Real bound = T::SPATIAL ? 8 : 10;
        constexpr int noise = PLAIN + Place<n - 1>::WEIGHTS, bias_noise = PLAIN + Place<4>::WEIGHTS + Place<n - 1>::BIASES;
        FOR(i, T::WEIGHTS) g(Place<n>::GIVEN + i, NOISY ? noise + i : 0, Place<n>::WEIGHT + T::weight(i), bound);
        FOR(o, T::CO) g(Place<n>::GIVEN_BIAS + o, NOISY && T::SPATIAL ? bias_noise + o : 0, Place<n>::BIAS + o, bound);
        if constexpr (n < 4) for_each<n + 1>(t, g);
    }

    DEVICE void update(int step) {
        const Pace now = pace(step);
        THREADS
            for_each<0>(t, [&](int given, int noise, int place, Real bound) {
                if (noise) move_noisy(given, noise, place, bound, now);
                else move_plain(given, place, now);
            });
        BARRIER
    }

    DEVICE void load() {
        THREADS
            FOR(i, SETS * PLACES) s.w[i / PLACES][i % PLACES] = 0;  // also what lies between
            if (t == 0) s.total_loss = s.total_right = 0;
        BARRIER
        THREADS
            for_each<0>(t, [&](int given, int noise, int place, Real bound) {
                const Real w = s.w[0][place] = job.weights[mine(given)];
                if (noise) s.w[NOISY][place] = variance(w, job.weights[mine(noise)], bound);
            });
        BARRIER
    }

    DEVICE void store() {
        THREADS
            for_each<0>(t, [&](int given, int, int place, Real) { job.weights[mine(given)] = s.w[0][place]; });
        BARRIER
    }

    // ------------------------------------------------------------------------------------------------- epochs and evaluation

    DEVICE bool stopped() const {
#if defined(__CUDACC__)
        return false;  // an epoch takes a GPU seconds
#else
        return *(const volatile int*)job.stop;
#endif
    }

    DEVICE bool train() {
        load();
        int step = 0;
        ROLL for (int from = 0; from < job.samples; from += job.batch, ++step) {
            if (stopped()) return false;
            const int batch = job.samples - from < job.batch ? job.samples - from : job.batch;
            THREADS
                FOR(i, SETS * PLACES) gradients(i / PLACES)[i % PLACES] = 0;
            BARRIER
            ROLL for (int part = 0; part < batch; part += S) {
                const int count = batch - part < S ? batch - part : S;
                gather<true>(from + part, count);
                forward<0, true>(count, (U)(from + part));
                judge(count, Real(1) / batch);
                backward<4>(count);
            }
            update(step);
        }
        store();
        report();
        return true;
    }

    DEVICE bool evaluate() {
        load();
        ROLL for (int from = 0; from < job.samples; from += S) {
            if (stopped()) return false;
            const int count = job.samples - from < S ? job.samples - from : S;
            gather<false>(from, count);
            forward<0, false>(count, 0);
            judge(count, 1);
            THREADS
                if (job.predictions) FOR(k, count) job.predictions[row(from + k)] = (unsigned char)s.winner[k];
                if (job.logits) FOR(i, count * CLASSES) job.logits[row(from) * CLASSES + i] = s.z[i / CLASSES][i % CLASSES];
            BARRIER
        }
        report();
        return true;
    }
};

// --------------------------------------------------------------------------------------------------- the order of an epoch
// Sample numbers sorted by their random words, ties by number: a stable radix sort, 4 bits a pass. Every thread owns a stretch of
// the numbers; in each pass it counts the digits there, learns from the sums where its own begin, and moves them.

struct Sorter {
    static constexpr int DIGITS = 16, BITS = 4;
    int start[DIGITS][THREADS_PER_BLOCK], total[DIGITS];

    static DEVICE int digit(const Stream& stream, int number, int shift) { return (int)(stream.word((U)number, 0, 0) >> shift) & (DIGITS - 1); }

    template <class Use> static DEVICE void each(const Stream& stream, int shift, const int* from, int n, int t, Use use) {
        const int stretch = (n + THREADS_PER_BLOCK - 1) / THREADS_PER_BLOCK;
        for (int i = t * stretch; i < (t + 1) * stretch && i < n; ++i) {
            const int number = from ? from[i] : i;
            use(number, digit(stream, number, shift));
        }
    }

    DEVICE void pass(const Stream& stream, int shift, const int* from, int* to, int n) {
        THREADS
            for (int d = 0; d < DIGITS; ++d) start[d][t] = 0;
            each(stream, shift, from, n, t, [&](int, int d) { ++start[d][t]; });
        BARRIER
        THREADS
            FOR(d, DIGITS) {
                total[d] = 0;
                for (int r = 0; r < THREADS_PER_BLOCK; ++r) total[d] += start[d][r];
            }
        BARRIER
        THREADS
            FOR(d, DIGITS) {
                int sum = 0;
                for (int smaller = 0; smaller < d; ++smaller) sum += total[smaller];
                for (int r = 0; r < THREADS_PER_BLOCK; ++r) { const int count = start[d][r]; start[d][r] = sum, sum += count; }
            }
        BARRIER
        THREADS
            each(stream, shift, from, n, t, [&](int number, int d) { to[start[d][t]++] = number; });
        BARRIER
    }

    DEVICE void shuffle(const Job& job, int model) {
        const Stream stream{(U)job.keys[2 * model], (U)job.keys[2 * model + 1], (U)job.epoch};
        int *order = job.order + (size_t)model * job.samples, *room = job.room + (size_t)model * job.samples;
        const int n = job.samples;
        pass(stream, 0, nullptr, room, n);
        ROLL for (int shift = BITS; shift < 32; shift += BITS) {
            const bool odd = shift / BITS % 2;
            pass(stream, shift, odd ? room : order, odd ? order : room, n);
        }
    }
};

}

// ------------------------------------------------------------------------------------------------------- how it is called

constexpr int GRADIENT_SIZE = GRADIENTS_SHARED ? 1 : SETS * PLACES * sizeof(Real);  // bytes of main memory that a model needs

#if defined(__CUDACC__)
extern "C" {
// The sizes of these arrays say what a block needs.
__device__ char threads_per_block[THREADS_PER_BLOCK], shared_bytes[sizeof(Shared)], gradient_bytes[GRADIENT_SIZE];

__global__ void train(const Job job) {
    extern __shared__ __align__(16) char memory[];
    Block(job, *(Shared*)memory, blockIdx.x).train();
}

#if !NOISY
__global__ void evaluate(const Job job) {
    extern __shared__ __align__(16) char memory[];
    Block(job, *(Shared*)memory, blockIdx.x).evaluate();
}
#endif

__global__ void shuffle(const Job job) {
    __shared__ Sorter sorter;
    sorter.shuffle(job, blockIdx.x);
}
}
#else
#include <memory>
#include <new>
template <class Memory, class G> static int each_model(const Job& job, G g) {  // 0: done, 1: stopped, 2: out of memory
    const std::unique_ptr<Memory> memory(new (std::nothrow) Memory());
    if (!memory) return 2;
    for (int model = 0; model < job.models; ++model) if (!g(*memory, model)) return 1;
    return 0;
}
extern "C" {
long long job_size() { return sizeof(Job); }
long long part_size(int part) {  // of what lies in shared memory
    constexpr long long last = sizeof(Shared::before) > sizeof(Shared::partial) ? sizeof(Shared::before) : sizeof(Shared::partial);
    const long long sizes[] = {sizeof(Shared::w), sizeof(Shared::gradients), sizeof(Trace<A>), sizeof(Trace<B>), sizeof(Trace<C>),
                               sizeof(Trace<D>) + sizeof(Trace<E>) + sizeof(Shared::z), last};
    return sizes[part];
}
long long gradient_size() { return GRADIENT_SIZE; }
int train(const Job* job) { return each_model<Shared>(*job, [&](Shared& s, int model) { return Block(*job, s, model).train(); }); }
#if !NOISY
int evaluate(const Job* job) { return each_model<Shared>(*job, [&](Shared& s, int model) { return Block(*job, s, model).evaluate(); }); }
#endif
int shuffle(const Job* job) { return each_model<Sorter>(*job, [&](Sorter& s, int model) { s.shuffle(*job, model); return true; }); }
void normals(unsigned key0, unsigned key1, unsigned site, unsigned position, unsigned epoch, int count, Real* out) {  // what a model draws
    const Stream stream{key0, key1, epoch};
    for (int i = 0; i < count; ++i) out[i] = stream.normal(i, site, position);
}
}
#endif
