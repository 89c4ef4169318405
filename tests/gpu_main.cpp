// A small training and evaluation by the GPU engine's host build, as a program of its own for the sanitizers of test_gpu.py.
// Every array is exactly as long as the engine may assume.
#include "gpu.cu"
#include <cstdio>
#include <vector>

static unsigned state = 2463534242u;
static unsigned word() { return state ^= state << 13, state ^= state >> 17, state ^= state << 5; }
static std::vector<Real> numbers(size_t n, Real scale) {
    std::vector<Real> values(n);
    for (auto& value : values) value = (Real(word() >> 8) * 0x1p-23f - 1) * scale;
    return values;
}

int main() {
    constexpr int models = 4, samples = 4, batch = 3, steps = 2;  // a whole batch and a part of one
    alignas(32) static Real images[samples * A::CI * A::H * A::H];
    for (auto& pixel : images) pixel = Real(word() >> 8) * 0x1p-23f - 1;
    std::vector<int> labels(samples), activation = {TANH, RELU, SIGMOID, GELU}, adam = {1, 0, 1, 1}, order(models * samples), room(order);
    for (auto& label : labels) label = word() % CLASSES;
    std::vector<long long> keys(2 * models), threshold = {0, 1ll << 31, 1ll << 30, 0};
    for (auto& key : keys) key = word();
    std::vector<Real> rate(models, Real(1e-3)), decay(models, Real(1e-2)), scale = {1, 2, Real(4. / 3), 1}, factor(steps, 1), correction1(steps, 2), correction2(steps, 9);
    std::vector<Real> weights = numbers((size_t)models * PARAMETERS, Real(0.15)), first(weights.size()), second(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) if (i % PARAMETERS >= PLAIN) weights[i] -= 10;  // log variances
    std::vector<unsigned char> masks(weights.size(), 1), predictions(models * samples), gradients(models * gradient_size());
    std::vector<double> loss(models), accuracy(models);
    std::vector<Real> logits(models * samples * CLASSES, Real(1e9));
    const int stop = 0;
    Job job{models, samples, batch, 9, 1, {6, 7, 0, 8}, {1, 2, 3, 4, 5}, 0.1, images, labels.data(), keys.data(), threshold.data(), activation.data(), adam.data(),
            rate.data(), decay.data(), scale.data(), factor.data(), correction1.data(), correction2.data(), masks.data(), weights.data(), first.data(), second.data(),
            (Real*)gradients.data(), order.data(), room.data(), loss.data(), accuracy.data(), predictions.data(), logits.data(), &stop};
    int failed = shuffle(&job) | train(&job);
#if !NOISY
    failed |= evaluate(&job);
    for (Real z : logits) failed |= !(z > -100 && z < 100);
#endif
    for (int model = 0; model < models; ++model) failed |= !(loss[model] > 0 && loss[model] < 100);
    std::puts(failed ? "failed" : "clean");
    return failed;
}
