/* Selective scan (Gu & Dao 2023) on a CPU: forward and backward of
     h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t],   y[t] = C[t] . h[t]
   for every channel. Plain C with the vector extensions of GCC and Clang; no header of any framework.
   One vector holds W neighbouring channels, so that sums over the states need no shuffling. The forward pass keeps
   the state before every STEPS-th step; the backward pass walks the pieces from the end, recomputes the states and
   decays of one piece in cache, and adds dB and dC over channels lane by lane. The work is cut by channels and never
   by the number of threads, so that results do not depend on it. This file includes itself, once per type. */
#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define BYTES 64
#else
#define BYTES 32
#endif
#define STEPS 32

#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)

typedef float vec_f32 __attribute__((vector_size(BYTES)));
typedef int32_t int_f32 __attribute__((vector_size(BYTES)));
typedef double vec_f64 __attribute__((vector_size(BYTES)));

/* exp(x) = 2^k exp(r) with r in [-ln2/2, ln2/2] and a polynomial for exp(r): two units in the last place at most.
   Results below the smallest normal number are zero, those beyond 2^127.5 infinite; NaN stays NaN. */
static inline vec_f32 exp_f32(vec_f32 x) {
    vec_f32 k = x * 1.44269504088896341f + 12582912.f; /* 1.5 * 2^23 rounds to an integer and leaves it in the low bits */
    int_f32 power = ((int_f32)k - 0x4B400000 + 127) << 23;
    k -= 12582912.f;
    vec_f32 r = x - k * 0.693359375f;
    r -= k * -2.12194440e-4f;
    vec_f32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    int_f32 y = (int_f32)(p * (vec_f32)power), low = x < -87.33654f, high = x > 88.37626f;
    return (vec_f32)((y & ~low & ~high) | ((int_f32)((vec_f32){} + INFINITY) & high));
}

static inline vec_f64 exp_f64(vec_f64 x) {
    vec_f64 y;
    for (int i = 0; i < (int)(BYTES / sizeof(double)); i++) y[i] = exp(x[i]);
    return y;
}

int64_t lane_bytes(void) { return BYTES; }
int64_t piece_steps(void) { return STEPS; }

#define REAL float
#define SUF f32
#include "selective_scan.c"
#undef REAL
#undef SUF
#define REAL double
#define SUF f64
#include "selective_scan.c"

#else
#define V CAT(vec_, SUF)
#define W ((int64_t)(BYTES / sizeof(REAL)))

/* `steps` rows of W neighbouring channels of a strided tensor; lanes beyond `wide` are zero */
static inline void CAT(load_, SUF)(V *to, const REAL *from, int64_t sl, int64_t sd, int64_t steps, int64_t wide) {
    if (sd == 1 && wide == W) for (int64_t t = 0; t < steps; t++) memcpy(&to[t], from + t * sl, BYTES);
    else for (int64_t t = 0; t < steps; t++) {
        V v = {};
        for (int64_t i = 0; i < wide; i++) v[i] = from[t * sl + i * sd];
        to[t] = v;
    }
}
static inline void CAT(store_, SUF)(REAL *to, const V *from, int64_t sl, int64_t sd, int64_t steps, int64_t wide) {
    if (sd == 1 && wide == W) for (int64_t t = 0; t < steps; t++) memcpy(to + t * sl, &from[t], BYTES);
    else for (int64_t t = 0; t < steps; t++) for (int64_t i = 0; i < wide; i++) to[t * sl + i * sd] = from[t][i];
}

/* dt, u, y (batch, length, channels) with strides; A (channels, N); B, C (batch, length, groups, N), contiguous;
   h0 (batch, channels, N): the first state comes in, the last goes out; kept (batch, pieces, groups, blocks, N, W) or NULL.
   channels = groups * per. Returns 1 where memory ran out. */
int CAT(forward_, SUF)(int64_t batch, int64_t length, int64_t groups, int64_t per, int64_t N, int threads,
        const REAL *dt, const int64_t *sdt, const REAL *u, const int64_t *su, const REAL *A, const REAL *B, const REAL *C,
        REAL *y, const int64_t *sy, REAL *h0, REAL *kept) {
    int64_t blocks = (per + W - 1) / W, chunks = (length + STEPS - 1) / STEPS, failed = 0;
    #pragma omp parallel for num_threads(threads) schedule(static) reduction(|:failed)
    for (int64_t item = 0; item < batch * groups * blocks; item++) {
        int64_t k = item % blocks, g = item / blocks % groups, b = item / blocks / groups;
        int64_t d = g * per + k * W, wide = per - k * W < W ? per - k * W : W;
        V *a = aligned_alloc(BYTES, 2 * N * BYTES), *h = a + N, x[STEPS], s[STEPS], out[STEPS];
        if (!a) { failed = 1; continue; }
        REAL *state = h0 + (b * groups * per + d) * N;
        for (int64_t n = 0; n < N; n++) {
            a[n] = h[n] = (V){};
            for (int64_t i = 0; i < wide; i++) a[n][i] = A[(d + i) * N + n], h[n][i] = state[i * N + n];
        }
        for (int64_t c = 0; c < chunks; c++) {
            int64_t t0 = c * STEPS, steps = length - t0 < STEPS ? length - t0 : STEPS;
            if (kept) memcpy(kept + (((b * chunks + c) * groups + g) * blocks + k) * N * W, h, N * BYTES);
            CAT(load_, SUF)(s, dt + b * sdt[0] + t0 * sdt[1] + d * sdt[2], sdt[1], sdt[2], steps, wide);
            CAT(load_, SUF)(x, u + b * su[0] + t0 * su[1] + d * su[2], su[1], su[2], steps, wide);
            for (int64_t t = 0; t < steps; t++) {
                const REAL *Bt = B + ((b * length + t0 + t) * groups + g) * N, *Ct = C + ((b * length + t0 + t) * groups + g) * N;
                V step = s[t], in = step * x[t], sum = {};
                for (int64_t n = 0; n < N; n++) {
                    h[n] = CAT(exp_, SUF)(step * a[n]) * h[n] + in * Bt[n];
                    sum += h[n] * Ct[n];
                }
                out[t] = sum;
            }
            CAT(store_, SUF)(y + b * sy[0] + t0 * sy[1] + d * sy[2], out, sy[1], sy[2], steps, wide);
        }
        for (int64_t n = 0; n < N; n++) for (int64_t i = 0; i < wide; i++) state[i * N + n] = h[n][i];
        free(a);
    }
    return failed;
}

/* dh (batch, channels, N): the gradient of the last state comes in, that of the first goes out; dA (batch, channels, N)
   and dB, dC (batch, parts, length, groups, N) are partial sums over batch and channels. Returns 1 where memory ran out. */
int CAT(backward_, SUF)(int64_t batch, int64_t length, int64_t groups, int64_t per, int64_t N, int64_t parts, int threads,
        const REAL *dt, const int64_t *sdt, const REAL *u, const int64_t *su, const REAL *A, const REAL *B, const REAL *C,
        const REAL *kept, const REAL *dy, const int64_t *sdy,
        REAL *ddt, const int64_t *sddt, REAL *du, const int64_t *sdu, REAL *dA, REAL *dB, REAL *dC, REAL *dh) {
    int64_t blocks = (per + W - 1) / W, each = (blocks + parts - 1) / parts, chunks = (length + STEPS - 1) / STEPS, failed = 0;
    #pragma omp parallel for num_threads(threads) schedule(static) reduction(|:failed)
    for (int64_t item = 0; item < batch * groups * parts; item++) {
        int64_t part = item % parts, g = item / parts % groups, b = item / parts / groups;
        int64_t k0 = part * each, k1 = k0 + each < blocks ? k0 + each : blocks;
        V x[STEPS], s[STEPS], go[STEPS], ds[STEPS], dx[STEPS];
        /* decays, states (one more row), sums of dB and dC, then per block: A, gradient of the state, gradient of A */
        V *room = aligned_alloc(BYTES, (4 * STEPS + 1 + 3 * each) * N * BYTES);
        if (!room) { failed = 1; continue; }
        V *decay = room, *h = decay + STEPS * N, *sB = h + (STEPS + 1) * N, *sC = sB + STEPS * N, *own = sC + STEPS * N;
        for (int64_t k = k0; k < k1; k++) {
            int64_t d = g * per + k * W, wide = per - k * W < W ? per - k * W : W;
            V *a = own + 3 * (k - k0) * N, *gh = a + N, *ga = gh + N;
            for (int64_t n = 0; n < N; n++) {
                a[n] = gh[n] = ga[n] = (V){};
                for (int64_t i = 0; i < wide; i++) a[n][i] = A[(d + i) * N + n], gh[n][i] = dh[(b * groups * per + d + i) * N + n];
            }
        }
        for (int64_t c = chunks - 1; c >= 0; c--) {
            int64_t t0 = c * STEPS, steps = length - t0 < STEPS ? length - t0 : STEPS;
            memset(sB, 0, 2 * STEPS * N * BYTES);
            for (int64_t k = k0; k < k1; k++) {
                int64_t d = g * per + k * W, wide = per - k * W < W ? per - k * W : W;
                V *a = own + 3 * (k - k0) * N, *gh = a + N, *ga = gh + N;
                CAT(load_, SUF)(s, dt + b * sdt[0] + t0 * sdt[1] + d * sdt[2], sdt[1], sdt[2], steps, wide);
                CAT(load_, SUF)(x, u + b * su[0] + t0 * su[1] + d * su[2], su[1], su[2], steps, wide);
                CAT(load_, SUF)(go, dy + b * sdy[0] + t0 * sdy[1] + d * sdy[2], sdy[1], sdy[2], steps, wide);
                memcpy(h, kept + (((b * chunks + c) * groups + g) * blocks + k) * N * W, N * BYTES);
                for (int64_t t = 0; t < steps; t++) {
                    const REAL *Bt = B + ((b * length + t0 + t) * groups + g) * N;
                    V in = s[t] * x[t];
                    for (int64_t n = 0; n < N; n++) {
                        V e = CAT(exp_, SUF)(s[t] * a[n]);
                        decay[t * N + n] = e;
                        h[(t + 1) * N + n] = e * h[t * N + n] + in * Bt[n];
                    }
                }
                for (int64_t t = steps - 1; t >= 0; t--) {
                    const REAL *Bt = B + ((b * length + t0 + t) * groups + g) * N, *Ct = C + ((b * length + t0 + t) * groups + g) * N;
                    V step = s[t], out = go[t], in = step * x[t], toB = {}, toA = {};
                    for (int64_t n = 0; n < N; n++) {
                        V grad = gh[n] + out * Ct[n], back = grad * decay[t * N + n], w = back * h[t * N + n];
                        sC[t * N + n] += out * h[(t + 1) * N + n];
                        sB[t * N + n] += grad * in;
                        toB += grad * Bt[n];
                        toA += w * a[n];
                        ga[n] += w * step;
                        gh[n] = back;
                    }
                    ds[t] = toA + toB * x[t];
                    dx[t] = toB * step;
                }
                CAT(store_, SUF)(ddt + b * sddt[0] + t0 * sddt[1] + d * sddt[2], ds, sddt[1], sddt[2], steps, wide);
                CAT(store_, SUF)(du + b * sdu[0] + t0 * sdu[1] + d * sdu[2], dx, sdu[1], sdu[2], steps, wide);
            }
            for (int64_t t = 0; t < steps; t++) for (int64_t n = 0; n < N; n++) {
                REAL left = 0, right = 0;
                for (int64_t i = 0; i < W; i++) left += sB[t * N + n][i], right += sC[t * N + n][i];
                int64_t at = (((b * parts + part) * length + t0 + t) * groups + g) * N + n;
                dB[at] = left, dC[at] = right;
            }
        }
        for (int64_t k = k0; k < k1; k++) {
            int64_t d = g * per + k * W, wide = per - k * W < W ? per - k * W : W;
            V *gh = own + 3 * (k - k0) * N + N, *ga = gh + N;
            for (int64_t n = 0; n < N; n++) for (int64_t i = 0; i < wide; i++) {
                int64_t at = (b * groups * per + d + i) * N + n;
                dh[at] = gh[n][i], dA[at] = ga[n][i];
            }
        }
        free(room);
    }
    return failed;
}
#undef V
#undef W
#endif
