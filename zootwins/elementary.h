// Elementary functions and random numbers, once for all engines: the source below calculates with one number (float, on a CPU
// or under CUDA) or, where LANES is defined, with LANES numbers at once (vectors of GCC and clang).
//
// The same bits everywhere: only operations that IEEE 754 rounds in one way (sums, products, quotients, roots and fused
// multiply-adds) and integers, in the order written here. To compile with -ffp-contract=off (nvcc and NVRTC: -fmad=false for
// these bits, or fused freely where they do not matter): a product that is to be added without rounding says multiply_add.
// Numbers below 1e-38 count as zero wherever the caller has set the processor so; NaN has the bits that the processor likes.
// Near-minimax polynomials fitted for this file; errors are a few units in the last place. NaN comes out as NaN.

#pragma once

#if defined(__CUDACC__)
#define ELEMENTARY static __device__ __forceinline__
#else
#define ELEMENTARY static inline
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#endif

// ------------------------------------------------------------------------------------------------------ numbers and vectors

#if defined(LANES)
template <class T, int bytes> struct Vector { typedef T type __attribute__((vector_size(bytes))); };
using F = Vector<float, LANES * 4>::type;      // single precision
using I = Vector<int32_t, LANES * 4>::type;    // small integers, and what a comparison gives: 0 or -1
using U = Vector<uint32_t, LANES * 4>::type;   // random words
using W = Vector<uint64_t, LANES * 4>::type;   // random words of every other lane, in the low halves
template <class T, class S> ELEMENTARY T to(S s) { return __builtin_convertvector(s, T); }
#else
using F = float;
using I = int;
using U = unsigned;
using W = unsigned long long;                  // a random word, in the low half
template <class T, class S> ELEMENTARY T to(S s) { return (T)s; }
#endif

template <class T, class S> ELEMENTARY T as(S s) { T t; static_assert(sizeof t == sizeof s, ""); memcpy(&t, &s, sizeof t); return t; }  // its bits
ELEMENTARY F number(float x) { return x - F{}; }

// multiply_add: a b + c, rounded once. larger, smaller: b if one of them is NaN; GCC would compare and blend.
// multiply: 32 x 32 -> 64 bits of the low halves.
#if defined(LANES) && defined(__AVX512F__)
static_assert(LANES == 16, "");
ELEMENTARY F multiply_add(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
ELEMENTARY F root(F x) { return (F)_mm512_sqrt_ps((__m512)x); }
ELEMENTARY F larger(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
ELEMENTARY F smaller(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
ELEMENTARY W multiply(W a, unsigned m) { return (W)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32((int)m)); }
#elif defined(LANES) && defined(__AVX2__) && defined(__FMA__)
static_assert(LANES == 8, "");
ELEMENTARY F multiply_add(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
ELEMENTARY F root(F x) { return (F)_mm256_sqrt_ps((__m256)x); }
ELEMENTARY F larger(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
ELEMENTARY F smaller(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
ELEMENTARY W multiply(W a, unsigned m) { return (W)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32((int)m)); }
#elif defined(LANES)
#if defined(__aarch64__)
static_assert(LANES == 4, "");
ELEMENTARY F multiply_add(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
ELEMENTARY F root(F x) { return (F)vsqrtq_f32((float32x4_t)x); }
#else  // any processor; without an instruction for it, the C library does a multiply-add in software
ELEMENTARY F multiply_add(F a, F b, F c) { for (int l = 0; l < LANES; ++l) c[l] = __builtin_fmaf(a[l], b[l], c[l]); return c; }
ELEMENTARY F root(F x) { for (int l = 0; l < LANES; ++l) x[l] = __builtin_sqrtf(x[l]); return x; }
#endif
ELEMENTARY F larger(F a, F b) { return a > b ? a : b; }
ELEMENTARY F smaller(F a, F b) { return a < b ? a : b; }
ELEMENTARY W multiply(W a, unsigned m) { return (a & 0xffffffffu) * (uint64_t)m; }
#else
ELEMENTARY F larger(F a, F b) { return a > b ? a : b; }
ELEMENTARY F smaller(F a, F b) { return a < b ? a : b; }
ELEMENTARY W multiply(W a, unsigned m) { return (W)(U)a * m; }
#if defined(__CUDACC__)
ELEMENTARY F multiply_add(F a, F b, F c) { return fmaf(a, b, c); }
ELEMENTARY F root(F x) { return sqrtf(x); }
#else
ELEMENTARY F multiply_add(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
ELEMENTARY F root(F x) { return __builtin_sqrtf(x); }
#endif
#endif

ELEMENTARY F polynomial(F, F sum) { return sum; }  // by Horner's rule, the highest coefficient first
template <class... Rest> ELEMENTARY F polynomial(F x, F sum, float next, Rest... rest) { return polynomial(x, multiply_add(sum, x, number(next)), rest...); }
template <class... Rest> ELEMENTARY F polynomial(F x, float first, Rest... rest) { return polynomial(x, number(first), rest...); }

// ---------------------------------------------------------------------------------------------------------------- functions

ELEMENTARY F reciprocal(F x) { return 1.0f / x; }

ELEMENTARY F exponential_within(F x) {  // |x| at most 87
    const F magic = number(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
    F shifted = multiply_add(x, number(1.44269504f), magic), n = shifted - magic;
    F r = multiply_add(n, number(2.12194440e-4f), multiply_add(n, number(-0.693359375f), x));
    F p = polynomial(r, 0.00138142198f, 0.00836889887f, 0.0416684058f, 0.166665191f, 0.499999933f, 1.0f, 1.0f);
    return p * as<F>((as<I>(shifted) << 23) + 0x3f800000);
}

ELEMENTARY F exponential(F x) {  // saturates at exp(-87) and exp(87)
    return exponential_within(smaller(number(87.0f), larger(number(-87.0f), x)));
}

ELEMENTARY F logarithm_of_normal(F x) {
    I bits = as<I>(x);
    I e = (bits - 0x3f3504f3) >> 23;  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
    F n = to<F>(e);
    F f = as<F>(bits - (e << 23)) - 1.0f, s = f * f;
    F p0 = polynomial(f, -0.250008211f, 0.333333317f), p1 = polynomial(f, -0.166233565f, 0.200012267f);
    F p2 = polynomial(f, -0.131601951f, 0.142017625f), p3 = polynomial(f, -0.0763442991f, 0.127615504f);
    F p = multiply_add(multiply_add(p3, s, p2), s * s, multiply_add(p1, s, p0));
    F low = multiply_add(n, number(-2.12194440e-4f), multiply_add(p * f, s, -0.5f * s));
    return multiply_add(n, number(0.693359375f), low + f);
}

ELEMENTARY F logarithm(F x) {  // of positive numbers that are not denormal
    F result = logarithm_of_normal(x);
    return x == x ? result : x;
}

// Far from zero 1 - 2 / (exp(2 |x|) + 1), rounded once: Adam sees the slope 1 - tanh^2 of saturated units, however small.
ELEMENTARY F hyperbolic_tangent(F x) {
    const I sign = as<I>(x) & (-2147483647 - 1);
    F a = as<F>(as<I>(x) ^ sign), s = x * x;
    F far = multiply_add(number(-2.0f), reciprocal(1.0f + exponential_within(2.0f * smaller(number(10.0f), a))), number(1.0f));
    F p = polynomial(s, -0.00551516718f, 0.0204694235f, -0.0536880245f, 0.133308304f, -0.333332598f);
    return a < 0.65f ? multiply_add(p * s, x, x) : as<F>(as<I>(far) | sign);
}

ELEMENTARY F logistic(F x) { return reciprocal(1.0f + exponential(-x)); }

// For a standard normal number: the probability of one below x, and its density there times sqrt(2 pi), exp(-x^2 / 2).
ELEMENTARY void normal_distribution(F x, F& below, F& density) {
    F a = smaller(number(13.0f), as<F>(as<I>(x) & 2147483647)), t = reciprocal(polynomial(a, 0.3f, 1.0f));
    F p = polynomial(t, 0.0360363047f, -0.158713625f, 0.208964615f, -0.0560959011f, 0.129843424f, 0.0995230627f, 0.120816892f, 0.119625166f);
    density = exponential_within(-0.5f * a * a);
    F tail = p * t * density;
    below = x < 0.0f ? tail : 1.0f - tail;
}

ELEMENTARY void sine_cosine(F turns, F& sine, F& cosine) {  // of 2 pi turns, 0 <= turns <= 1
    const F magic = number(12582912.0f);
    F shifted = multiply_add(turns, number(4.0f), magic);
    I quarter = as<I>(shifted);
    F f = multiply_add(shifted - magic, number(-0.25f), turns);  // exact, within an eighth of a turn
    F s = f * f;
    F a = polynomial(s, -75.3916494f, 81.5923172f, -41.3416613f, 6.28318529f) * f;
    F b = polynomial(s, 59.2443807f, -85.4437001f, 64.9393261f, -19.7392087f, 1.0f);
    I odd = -(quarter & 1);
    F sin0 = odd ? b : a, cos0 = odd ? a : b;
    sine = as<F>(as<I>(sin0) ^ ((quarter & 2) << 30));
    cosine = as<F>(as<I>(cos0) ^ (((quarter + 1) & 2) << 30));
}

// ---------------------------------------------------------------------------------------------------------- random numbers
// Philox4x32 with 7 rounds: four words = f(key of the model, counter of block, site, position and epoch). Words live in the
// low halves of 64-bit numbers, because processors multiply 32 x 32 -> 64 bits there; the high halves hold rubbish.

constexpr int ROUNDS = 7;
constexpr unsigned M0 = 0xD2511F53u, M1 = 0xCD9E8D57u, W0 = 0x9E3779B9u, W1 = 0xBB67AE85u;

ELEMENTARY void philox_round(W& c0, W& c1, W& c2, W& c3, W k0, W k1) {
    W p0 = multiply(c0, M0), p1 = multiply(c2, M1);
    c0 = (p1 >> 32) ^ c1 ^ k0, c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ k1, c3 = p0;
}

#if !defined(LANES)
ELEMENTARY void random_words(U k0, U k1, U block, U site, U position, U epoch, U (&word)[4]) {
    W c0 = block, c1 = site, c2 = position, c3 = epoch;
    for (int r = 0; r < ROUNDS; ++r, k0 += W0, k1 += W1) philox_round(c0, c1, c2, c3, k0, k1);
    word[0] = (U)c0, word[1] = (U)c1, word[2] = (U)c2, word[3] = (U)c3;
}
#endif

// The nearest number; compilers that convert words by halves themselves round them twice.
ELEMENTARY F word_to_number(U x) {
#if defined(LANES) && !defined(__AVX512F__)
    return to<F>(as<I>(x >> 16)) * 65536.0f + to<F>(as<I>(x & 0xffffu));
#else
    return to<F>(x);
#endif
}

ELEMENTARY F uniform(U x) { return multiply_add(word_to_number(x), number(0x1p-32f), number(0x1p-33f)); }

// Box-Muller: two words give two independent standard normal numbers.
ELEMENTARY void normal_pair(U a, U b, F& first, F& second) {
    F square = larger(-2.0f * logarithm_of_normal(uniform(a)), F{}), radius = root(square);
    F sine, cosine;
    sine_cosine(uniform(b), sine, cosine);
    first = radius * cosine, second = radius * sine;
}
