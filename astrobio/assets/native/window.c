/* Sliding-window softmax attention, forward, float32: see notebook 34_attention.window. */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#define Q 24   /* queries of a panel */
#define N 96   /* keys between two rescalings */
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define INLINE static inline __attribute__((always_inline))
typedef float vf __attribute__((vector_size(32), aligned(4)));
typedef int32_t vi __attribute__((vector_size(32), aligned(4)));
#define AT(p) (*(vf *)(p))

INLINE vf pick(vi c, vf a, vf b) { return (vf)((c & (vi)a) | (~c & (vi)b)); }

INLINE vf exp8(vf x) {
    const vf least = (vf){0} - 87.f;
    vi under = x < least;
    x = pick(under, least, x);
    vf n = (x * 1.44269504f + 12582912.f) - 12582912.f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * (r * r) + r + 1.f) * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    return (vf)(~under & (vi)p);
}

INLINE void scores(const int n, const float *q, const float *k, int64_t sk, int64_t D, float *s) {
    vf a[4][3];
    for (int j = 0; j < n; j++) for (int i = 0; i < 3; i++) a[j][i] = (vf){0};
    for (int64_t d = 0; d < D; d++) {
        vf x = AT(q + d * Q), y = AT(q + d * Q + 8), z = AT(q + d * Q + 16);
        for (int j = 0; j < n; j++) { float c = k[j * sk + d]; a[j][0] += x * c; a[j][1] += y * c; a[j][2] += z * c; }
    }
    for (int j = 0; j < n; j++) for (int i = 0; i < 3; i++) AT(s + j * Q + 8 * i) = a[j][i];
}

INLINE void values(const int w, const float *p, const float *v, int64_t sv, int64_t n, const float *fade, float *o, int64_t so) {
    vf a[6][2];
    for (int r = 0; r < 6; r++) for (int i = 0; i < w; i++) a[r][i] = (vf){0};
    for (int64_t j = 0; j < n; j++) {
        vf x = AT(v + j * sv), y = w > 1 ? AT(v + j * sv + 8) : x;
        for (int r = 0; r < 6; r++) { float c = p[j * Q + r]; a[r][0] += x * c; if (w > 1) a[r][1] += y * c; }
    }
    for (int r = 0; r < 6; r++) for (int i = 0; i < w; i++) AT(o + r * so + 8 * i) = AT(o + r * so + 8 * i) * fade[r] + a[r][i];
}

typedef struct {
    const float *q, *k, *v; float *o, *lse; const uint8_t *mask;
    int64_t B, H, K, T, S, D, Dv, window, global, causal;
    int64_t sq[3], sk[3], sv[3], so[3];   /* strides of batch, head, position */
    float scale; int64_t units, next;
} Call;

typedef struct { /* per query: window [lo, hi), global keys below gl, running maximum and sum; and the bounds over the panel */
    int32_t lo[Q], hi[Q], gl[Q];
    float m[Q], sum[Q], fade[Q];
    int64_t lo_min, lo_max, hi_min, hi_max, gl_max;
} Panel;

static void softmax(Panel *a, float *s, int64_t j0, int64_t n, const uint8_t *mask) {
    const vf none = (vf){0} - 1e30f;
    vf top[3];
    for (int i = 0; i < 3; i++) top[i] = AT(a->m + 8 * i);
    for (int64_t j = 0; j < n; j++) {
        int32_t x = (int32_t)(j0 + j);
        vf *row = (vf *)(s + j * Q);
        if (mask && !mask[x]) { row[0] = row[1] = row[2] = none; continue; }
        int inside = x >= a->lo_max && x < a->hi_min;
        for (int i = 0; i < 3; i++) {
            if (!inside) {
                vi at = (vi){0} + x, see = ((at >= *(vi *)(a->lo + 8 * i)) & (at < *(vi *)(a->hi + 8 * i))) | (at < *(vi *)(a->gl + 8 * i));
                row[i] = pick(see, row[i], none);
            }
            top[i] = pick(row[i] > top[i], row[i], top[i]);
        }
    }
    for (int i = 0; i < 3; i++) {
        vf base = pick(top[i] > -1e29f, top[i], (vf){0}), fade = exp8(AT(a->m + 8 * i) - base), sum = (vf){0};
        for (int64_t j = 0; j < n; j++) { vf *x = (vf *)(s + j * Q) + i; *x = exp8(*x - base); sum += *x; }
        AT(a->m + 8 * i) = top[i];
        AT(a->sum + 8 * i) = AT(a->sum + 8 * i) * fade + sum;
        AT(a->fade + 8 * i) = fade;
    }
}

static void bounds(Panel *a, const Call *c, int64_t t0, int64_t rows) {
    a->lo_min = a->hi_min = c->S;
    a->lo_max = a->hi_max = a->gl_max = 0;
    for (int64_t r = 0; r < Q; r++) {
        int64_t p = c->S - c->T + t0 + r, end = c->causal ? MAX(p + 1, 0) : c->S, all = p < c->global;
        a->lo[r] = r >= rows ? 0 : (int32_t)(all ? 0 : MAX(0, p - c->window + 1));
        a->hi[r] = r >= rows ? 0 : (int32_t)MIN(end, all ? c->S : p + c->window);
        a->gl[r] = r >= rows ? 0 : (int32_t)MIN(c->global, end);
        a->lo_max = MAX(a->lo_max, a->lo[r]); a->hi_min = MIN(a->hi_min, a->hi[r]);
        a->hi_max = MAX(a->hi_max, a->hi[r]); a->gl_max = MAX(a->gl_max, a->gl[r]);
        if (r < rows) a->lo_min = MIN(a->lo_min, a->lo[r]);
        a->m[r] = -1e30f; a->sum[r] = 0;
    }
}

static void panel(const Call *c, int64_t b, int64_t h, int64_t t0, float *buf) {
    const int64_t D = c->D, Dv = c->Dv, W = (Dv + 7) / 8 * 8, S = c->S, group = c->H / c->K, rows = MIN(Q, c->T - t0);
    float *qt = buf, *s = qt + D * Q, *o = s + N * Q, *vb = o + Q * W;
    const float *q = c->q + b * c->sq[0] + h * c->sq[1] + t0 * c->sq[2];
    const float *k = c->k + b * c->sk[0] + h / group * c->sk[1], *v = c->v + b * c->sv[0] + h / group * c->sv[1];
    const uint8_t *mask = c->mask ? c->mask + b * S : 0;
    Panel a;
    bounds(&a, c, t0, rows);
    for (int64_t r = 0; r < Q; r++) for (int64_t d = 0; d < D; d++) qt[d * Q + r] = r < rows ? q[r * c->sq[2] + d] * c->scale : 0;
    memset(o, 0, Q * W * sizeof(float));
    int64_t from[2] = {0, MAX(a.lo_min, a.gl_max)}, to[2] = {a.gl_max, a.hi_max};
    for (int part = 0; part < 2; part++) for (int64_t j0 = from[part]; j0 < to[part]; j0 += N) {
        int64_t n = MIN(N, to[part] - j0), j = 0, sx = c->sv[2];
        for (; j + 4 <= n; j += 4) scores(4, qt, k + (j0 + j) * c->sk[2], c->sk[2], D, s + j * Q);
        for (; j < n; j++) scores(1, qt, k + (j0 + j) * c->sk[2], c->sk[2], D, s + j * Q);
        softmax(&a, s, j0, n, mask);
        const float *x = v + j0 * sx;
        if (mask || W != Dv) { /* widths that are no multiple of eight; values that must not count even if they are NaN */
            for (j = 0; j < n; j++) {
                memset(vb + j * W, 0, W * sizeof(float));
                if (!mask || mask[j0 + j]) memcpy(vb + j * W, x + j * sx, Dv * sizeof(float));
            }
            x = vb; sx = W;
        }
        for (int64_t r = 0, d; r < rows; r += 6) {
            for (d = 0; d + 16 <= W; d += 16) values(2, s + r, x + d, sx, n, a.fade + r, o + r * W + d, W);
            if (d < W) values(1, s + r, x + d, sx, n, a.fade + r, o + r * W + d, W);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        int some = !(a.sum[r] == 0);
        float *dst = c->o + b * c->so[0] + h * c->so[1] + (t0 + r) * c->so[2];
        for (int64_t d = 0; d < Dv; d++) dst[d] = some ? o[r * W + d] / a.sum[r] : 0;
        c->lse[(b * c->H + h) * c->T + t0 + r] = some ? a.m[r] + logf(a.sum[r]) : -INFINITY;
    }
}

static void *work(void *arg) {
    Call *c = arg;
    int64_t W = (c->Dv + 7) / 8 * 8, per = (c->T + Q - 1) / Q, u;
    float *buf = malloc(((c->D + W + N) * Q + N * W) * sizeof(float));
    if (!buf) return (void *)1;
    while ((u = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED)) < c->units) panel(c, u / per / c->H, u / per % c->H, u % per * Q, buf);
    free(buf);
    return 0;
}

int window_forward(const float *q, const float *k, const float *v, float *o, float *lse, const uint8_t *mask,
                   const int64_t *size, const int64_t *stride, float scale, int threads) {
    Call c = {.q = q, .k = k, .v = v, .o = o, .lse = lse, .mask = mask, .scale = scale};
    memcpy(&c.B, size, 10 * sizeof(int64_t));
    memcpy(c.sq, stride, 12 * sizeof(int64_t));
    c.units = c.B * c.H * ((c.T + Q - 1) / Q);
    int failed = 0;
#ifdef _OPENMP
    #pragma omp parallel num_threads(threads) reduction(|:failed)
    failed |= work(&c) != 0;
#else
    pthread_t id[256];
    int n = 0;
    while (n + 1 < MIN(threads, 256) && !pthread_create(&id[n], 0, work, &c)) n++;
    failed = work(&c) != 0;
    while (n--) pthread_join(id[n], 0);
#endif
    return failed && c.next < c.units;
}
