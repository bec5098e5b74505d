/* Exact softmax attention, full, causal or within a sliding window, forward and backward, float32: see notebook 34_attention.window. */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#define Q 24   /* queries of a panel: three registers */
#define P 4    /* panels of a block, at most */
#define M (P * Q)
#define N 96   /* keys of a block, a multiple of six */
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define UP(a, b) (((a) + (b) - 1) / (b) * (b))
#define INLINE static inline __attribute__((always_inline))
typedef float vf __attribute__((vector_size(32), aligned(4)));
typedef float wide __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32), aligned(4)));
#define AT(p) (*(vf *)(p))
#ifdef __AVX__
#define KEEP(x) __asm__("" : "+x"(x)) /* in a register: GCC would read it again from memory for every product */
#else
#define KEEP(x)
#endif

INLINE vf pick(vi c, vf a, vf b) { return (vf)((c & (vi)a) | (~c & (vi)b)); }

INLINE vf higher(vf a, vf b) { /* b where either is NaN */
#ifdef __AVX__
    return (vf)__builtin_ia32_maxps256((wide)a, (wide)b);
#else
    return pick(a > b, a, b);
#endif
}

INLINE vf power(vf x) { /* 2^x for x <= 126, relative error 1e-7; zero below -126.5 */
    const vf least = (vf){0} - 127.f;
    x = higher(least, x);
    vf t = x + 12583039.f, r = x - (t - 12583039.f);
    vf p = r * 1.3276472028e-3f + 9.6755414798e-3f;
    p = p * r + 5.5507132747e-2f;
    p = p * r + 2.4022119721e-1f;
    p = p * r + 6.9314696706e-1f;
    return (p * r + 1.0000000717f) * (vf)((vi)t << 23);
}

/* s (n keys, 24 queries) = k (n, D) q (D, 24) */
INLINE void scores(const int n, const float *q, const float *k, int64_t sk, int64_t D, float *s, int64_t ss) {
    vf a[4][3];
    for (int j = 0; j < n; j++) for (int i = 0; i < 3; i++) a[j][i] = (vf){0};
    for (int64_t d = 0; d < D; d++) {
        vf x = AT(q + d * Q), y = AT(q + d * Q + 8), z = AT(q + d * Q + 16);
        KEEP(x); KEEP(y); KEEP(z);
        for (int j = 0; j < n; j++) { float c = k[j * sk + d]; a[j][0] += x * c; a[j][1] += y * c; a[j][2] += z * c; }
    }
    for (int j = 0; j < n; j++) for (int i = 0; i < 3; i++) AT(s + j * ss + 8 * i) = a[j][i];
}

static void all_scores(const float *q, const float *k, int64_t sk, int64_t n, int64_t D, float *s, int64_t ss) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        if (j + 8 <= n) for (int64_t i = 4; i < 8; i++) for (int64_t d = 0; d < D; d += 16) __builtin_prefetch(k + (j + i) * sk + d);
        scores(4, q, k + j * sk, sk, D, s + j * ss, ss);
    }
    if (n - j == 3) scores(3, q, k + j * sk, sk, D, s + j * ss, ss);
    else if (n - j == 2) scores(2, q, k + j * sk, sk, D, s + j * ss, ss);
    else if (n - j == 1) scores(1, q, k + j * sk, sk, D, s + j * ss, ss);
}

/* c (6, 8 w) = c fade + sum over n of a (6, n) b (n, 8 w); fade 0: one */
INLINE void tile(const int w, const float *a, int64_t sr, int64_t sn, const float *b, int64_t n, const float *fade, float *c, int64_t sc) {
    vf x[6][2];
    for (int r = 0; r < 6; r++) for (int i = 0; i < w; i++) x[r][i] = (vf){0};
    for (int64_t j = 0; j < n; j++) {
        vf y = AT(b + j * 8 * w), z = w > 1 ? AT(b + j * 8 * w + 8) : y;
        for (int r = 0; r < 6; r++) { float f = a[r * sr + j * sn]; x[r][0] += y * f; if (w > 1) x[r][1] += z * f; }
    }
    for (int r = 0; r < 6; r++) for (int i = 0; i < w; i++) {
        vf *o = (vf *)(c + r * sc + 8 * i);
        *o = (fade ? *o * fade[r] : *o) + x[r][i];
    }
}

/* Rows of width D as strips of 16 columns, and one of 8 where W wants it: what `tile` takes as b. Masked rows become zero, whatever they hold. */
static void strips(float *to, int64_t rows, const float *x, int64_t sx, int64_t n, int64_t D, int64_t W, float factor, const uint8_t *mask) {
    for (int64_t d0 = 0; d0 < W; d0 += 16) {
        int64_t w = MIN(16, W - d0), have = MIN(w, D - d0);
        float *dst = to + d0 * rows;
        for (int64_t j = 0; j < n; j++, dst += w) {
            const float *src = x + j * sx + d0;
            if (mask && !mask[j]) memset(dst, 0, w * sizeof(float));
            else if (have == 16) { AT(dst) = AT(src) * factor; AT(dst + 8) = AT(src + 8) * factor; }
            else for (int64_t d = 0; d < w; d++) dst[d] = d < have ? src[d] * factor : 0;
        }
    }
}

static void turn(float *to, const float *x, int64_t sx, int64_t rows, int64_t D, float factor) { /* panels (D, 24) of rows */
    for (int64_t r0 = 0; r0 < rows; r0 += 8) {
        float *dst = to + r0 / Q * D * Q + r0 % Q;
        if (r0 + 8 <= rows) for (int64_t d = 0; d < D; d++) {
            const float *y = x + r0 * sx + d;
            AT(dst + d * Q) = (vf){y[0], y[sx], y[2 * sx], y[3 * sx], y[4 * sx], y[5 * sx], y[6 * sx], y[7 * sx]} * factor;
        }
        else for (int64_t r = 0; r < 8; r++) for (int64_t d = 0; d < D; d++) dst[d * Q + r] = r0 + r < rows ? x[(r0 + r) * sx + d] * factor : 0;
    }
    for (int64_t r = UP(rows, 8); r < UP(rows, Q); r++) for (int64_t d = 0; d < D; d++) to[r / Q * D * Q + d * Q + r % Q] = 0;
}

typedef struct { int64_t g, t, rows, p, k, S, first, last; } Block; /* head of the group, first query, queries, position of the first, first key, keys of the document; keys it sees */

typedef struct {
    const float *q, *k, *v; float *o, *lse; const uint8_t *mask; const float *go; float *dq, *dk, *dv;
    int64_t B, H, K, T, S, D, Dv, window, global, causal, docs;
    int64_t sq[3], sk[3], sv[3], so[3], sgo[3], sdq[3], sdk[3], sdv[3];   /* strides of batch, head, position */
    float scale; int64_t units, next;
    Block *block; int64_t blocks, parts, *part; float *slots; int64_t slot;
} Call;

typedef struct { /* per query: window [lo, hi), global keys below gl, running maximum and sum; and the bounds over the panel */
    int32_t lo[Q], hi[Q], gl[Q];
    float m[Q], sum[Q], fade[Q];
    int64_t lo_min, lo_max, hi_min, hi_max, gl_max;
} Panel;

INLINE void panel_range(const Panel *a, int part, int64_t *from, int64_t *to) {
    *from = part ? MAX(a->lo_min, a->gl_max) : 0;
    *to = part ? a->hi_max : a->gl_max;
}

static void bounds(Panel *a, const Call *c, const Block *b, int64_t r0) {
    int64_t rows = MAX(0, MIN(Q, b->rows - r0));
    a->lo_min = a->hi_min = b->S;
    a->lo_max = a->hi_max = a->gl_max = 0;
    for (int64_t r = 0; r < Q; r++) {
        int64_t p = b->p + r0 + r, end = c->causal ? MAX(p + 1, 0) : b->S, all = p < c->global;
        a->lo[r] = r >= rows ? 0 : (int32_t)(all ? 0 : MIN(b->S, MAX(0, p - c->window + 1)));
        a->hi[r] = r >= rows ? 0 : (int32_t)MAX(0, MIN(end, all ? b->S : p + c->window));
        a->gl[r] = r >= rows ? 0 : (int32_t)MIN(MIN(c->global, end), b->S);
        a->m[r] = -1e30f; a->sum[r] = 0;
        if (r >= rows) continue;
        a->lo_min = MIN(a->lo_min, a->lo[r]); a->lo_max = MAX(a->lo_max, a->lo[r]);
        a->hi_min = MIN(a->hi_min, a->hi[r]); a->hi_max = MAX(a->hi_max, a->hi[r]);
        a->gl_max = MAX(a->gl_max, a->gl[r]);
    }
}

INLINE vi seen(const Panel *a, int i, int32_t j) {
    vi at = (vi){0} + j;
    return ((at >= *(vi *)(a->lo + 8 * i)) & (at < *(vi *)(a->hi + 8 * i))) | (at < *(vi *)(a->gl + 8 * i));
}

static void softmax(Panel *a, float *s, int64_t j0, int64_t n, const uint8_t *mask) {
    const vf none = (vf){0} - 1e30f;
    vf top[3], base[3], sum[3];
    for (int i = 0; i < 3; i++) top[i] = AT(a->m + 8 * i);
    for (int64_t j = 0; j < n; j++) {
        int32_t x = (int32_t)(j0 + j);
        vf *row = (vf *)(s + j * Q);
        if (mask && !mask[x]) { row[0] = row[1] = row[2] = none; continue; }
        int inside = x >= a->lo_max && x < a->hi_min;
        for (int i = 0; i < 3; i++) {
            if (!inside) row[i] = pick(seen(a, i, x), row[i], none);
            top[i] = higher(row[i], top[i]);
        }
    }
    for (int i = 0; i < 3; i++) {
        base[i] = pick(top[i] > -1e29f, top[i], (vf){0});
        AT(a->fade + 8 * i) = power(AT(a->m + 8 * i) - base[i]);
        AT(a->m + 8 * i) = top[i];
        sum[i] = (vf){0};
    }
    for (int64_t j = 0; j < n; j++) for (int i = 0; i < 3; i++) { vf *x = (vf *)(s + j * Q) + i; *x = power(*x - base[i]); sum[i] += *x; }
    for (int i = 0; i < 3; i++) AT(a->sum + 8 * i) = AT(a->sum + 8 * i) * AT(a->fade + 8 * i) + sum[i];
}

/* The keys [*from, *to) within [a, b) that rows r … r + 5 of a panel see in this part. */
INLINE void six(const Panel *x, int part, int64_t r, int64_t a, int64_t b, int64_t *from, int64_t *to) {
    int64_t lo = b, hi = a;
    for (int64_t i = r; i < r + 6; i++) {
        int64_t l = part ? x->lo[i] : 0, h = part ? x->hi[i] : x->gl[i];
        if (h > l) { lo = MIN(lo, l); hi = MAX(hi, h); }
    }
    *from = MAX(a, lo); *to = MAX(*from, MIN(b, hi));
}

static void forward_block(const Call *c, int64_t b, int64_t kh, const Block *x, float *buf) {
    const int64_t D = c->D, Dv = c->Dv, W = UP(Dv, 8), h = kh * (c->H / c->K) + x->g, panels = (x->rows + Q - 1) / Q;
    float *qt = buf, *s = qt + D * M, *o = s + N * Q, *vs = o + M * W;
    const float *q = c->q + b * c->sq[0] + h * c->sq[1] + x->t * c->sq[2];
    const float *k = c->k + b * c->sk[0] + kh * c->sk[1] + x->k * c->sk[2], *v = c->v + b * c->sv[0] + kh * c->sv[1] + x->k * c->sv[2];
    const uint8_t *mask = c->mask ? c->mask + b * c->S + x->k : 0;
    Panel a[P];
    turn(qt, q, c->sq[2], x->rows, D, c->scale * 1.44269504f);
    memset(o, 0, panels * Q * W * sizeof(float));
    for (int64_t i = 0; i < panels; i++) bounds(&a[i], c, x, i * Q);
    for (int part = 0; part < 2; part++) {
        int64_t from = x->S, to = 0, u, w;
        for (int64_t i = 0; i < panels; i++) { panel_range(&a[i], part, &u, &w); if (u < w) { from = MIN(from, u); to = MAX(to, w); } }
        for (int64_t j0 = from; j0 < to; j0 += N) {
            int64_t n = MIN(N, to - j0);
            if (mask && !memchr(mask + j0, 1, n)) continue;
            strips(vs, N, v + j0 * c->sv[2], c->sv[2], n, Dv, W, 1, mask ? mask + j0 : 0);
            for (int64_t i = 0; i < panels; i++) {
                panel_range(&a[i], part, &u, &w);
                int64_t from = MAX(u, j0), to = MIN(w, j0 + n);
                if (from >= to) continue;
                all_scores(qt + i * D * Q, k + from * c->sk[2], c->sk[2], to - from, D, s, Q);
                softmax(&a[i], s, from, to - from, mask);
                int64_t lo[4], hi[4];
                for (int64_t r = 0; r < 4; r++) six(&a[i], part, r * 6, from, to, lo + r, hi + r);
                for (int64_t d = 0; d < W; d += 16) for (int64_t r = 0; r < 4; r++) {
                    float *f = a[i].fade + r * 6, *p = s + (lo[r] - from) * Q + r * 6, *y = o + (i * Q + r * 6) * W + d;
                    if (d + 16 <= W) tile(2, p, 1, Q, vs + d * N + (lo[r] - j0) * 16, hi[r] - lo[r], f, y, W);
                    else tile(1, p, 1, Q, vs + d * N + (lo[r] - j0) * 8, hi[r] - lo[r], f, y, W);
                }
            }
        }
    }
    for (int64_t r = 0; r < x->rows; r++) {
        float sum = a[r / Q].sum[r % Q], *dst = c->o + b * c->so[0] + h * c->so[1] + (x->t + r) * c->so[2];
        float share = sum == 0 ? 0 : 1 / sum;
        for (int64_t d = 0; d < Dv; d++) dst[d] = o[r * W + d] * share;
        c->lse[(b * c->H + h) * c->T + x->t + r] = sum == 0 ? -INFINITY : a[r / Q].m[r % Q] * 0.69314718f + logf(sum);
    }
}

static void backward_block(const Call *c, int64_t b, int64_t kh, const Block *x, float *buf, float *slot, int64_t first, int64_t keys) {
    const int64_t D = c->D, Dv = c->Dv, W = UP(D, 8), Wv = UP(Dv, 8), h = kh * (c->H / c->K) + x->g, panels = (x->rows + Q - 1) / Q, R = panels * Q;
    float *qt = buf, *gt = qt + D * M, *qs = gt + Dv * M, *gs = qs + W * M, *dq = gs + Wv * M, *ks = dq + W * M, *dp = ks + W * N, *p = dp + N * Q, *ds = p + N * M;
    const float *q = c->q + b * c->sq[0] + h * c->sq[1] + x->t * c->sq[2], *go = c->go + b * c->sgo[0] + h * c->sgo[1] + x->t * c->sgo[2];
    const float *o = c->o + b * c->so[0] + h * c->so[1] + x->t * c->so[2], *lse = c->lse + (b * c->H + h) * c->T + x->t;
    const float *k = c->k + b * c->sk[0] + kh * c->sk[1] + x->k * c->sk[2], *v = c->v + b * c->sv[0] + kh * c->sv[1] + x->k * c->sv[2];
    const uint8_t *mask = c->mask ? c->mask + b * c->S + x->k : 0;
    float *dk = slot + (x->k - first) * W, *dv = slot + keys * W + (x->k - first) * Wv, level[M], delta[M];
    Panel a[P];
    turn(qt, q, c->sq[2], x->rows, D, c->scale * 1.44269504f);
    turn(gt, go, c->sgo[2], x->rows, Dv, 1);
    strips(qs, M, q, c->sq[2], x->rows, D, W, c->scale, 0);
    strips(gs, M, go, c->sgo[2], x->rows, Dv, Wv, 1, 0);
    memset(dq, 0, R * W * sizeof(float));
    for (int64_t i = 0; i < panels; i++) bounds(&a[i], c, x, i * Q);
    for (int64_t r = 0; r < R; r++) {
        float sum = 0;
        if (r < x->rows) for (int64_t d = 0; d < Dv; d++) sum += go[r * c->sgo[2] + d] * o[r * c->so[2] + d];
        delta[r] = sum;
        level[r] = r < x->rows && lse[r] != -INFINITY ? lse[r] * 1.44269504f : 1e30f;
    }
    for (int part = 0; part < 2; part++) {
        int64_t from = x->S, to = 0, u, w;
        for (int64_t i = 0; i < panels; i++) { panel_range(&a[i], part, &u, &w); if (u < w) { from = MIN(from, u); to = MAX(to, w); } }
        for (int64_t j0 = from; j0 < to; j0 += N) {
            int64_t n = MIN(N, to - j0), n6 = UP(n, 6), lo[N / 6], hi[N / 6];
            if (mask && !memchr(mask + j0, 1, n)) continue;
            strips(ks, N, k + j0 * c->sk[2], c->sk[2], n, D, W, 1, mask ? mask + j0 : 0);
            for (int64_t g = 0; g < n6 / 6; g++) lo[g] = R, hi[g] = 0;
            for (int64_t i = 0; i < panels; i++) {
                panel_range(&a[i], part, &u, &w);
                int64_t from = MIN(MAX(u, j0), j0 + n), to = MAX(from, MIN(w, j0 + n));
                float *pi = p + i * Q, *si = ds + i * Q;
                all_scores(qt + i * D * Q, k + from * c->sk[2], c->sk[2], to - from, D, pi + (from - j0) * R, R);
                all_scores(gt + i * Dv * Q, v + from * c->sv[2], c->sv[2], to - from, Dv, dp, Q);
                for (int64_t j = j0; j < j0 + n6; j++) {
                    vf *y = (vf *)(pi + (j - j0) * R), *z = (vf *)(si + (j - j0) * R), *e = (vf *)(dp + (j - from) * Q);
                    if (j < from || j >= to || (mask && !mask[j])) { for (int f = 0; f < 3; f++) y[f] = z[f] = (vf){0}; continue; }
                    int inside = j >= a[i].lo_max && j < a[i].hi_min;
                    for (int f = 0; f < 3; f++) {
                        vf weight = power(y[f] - AT(level + i * Q + 8 * f)), slope = weight * (e[f] - AT(delta + i * Q + 8 * f));
                        if (!inside) { vi see = seen(&a[i], f, (int32_t)j); weight = (vf)(see & (vi)weight); slope = (vf)(see & (vi)slope); }
                        y[f] = weight; z[f] = slope;
                    }
                }
                for (int64_t r = 0; r < Q; r++) { /* which rows meet the six keys of a group */
                    int64_t l = MAX(part ? a[i].lo[r] : 0, from), e = MIN(part ? a[i].hi[r] : a[i].gl[r], to);
                    if (l < e) for (int64_t g = (l - j0) / 6; g <= (e - 1 - j0) / 6; g++) { lo[g] = MIN(lo[g], i * Q + r); hi[g] = i * Q + r + 1; }
                }
            }
            for (int64_t d = 0; d < Wv; d += 16) for (int64_t g = 0; g < n6 / 6; g++) if (lo[g] < hi[g]) {
                float *y = p + g * 6 * R + lo[g], *z = dv + (j0 + g * 6) * Wv + d;
                if (d + 16 <= Wv) tile(2, y, R, 1, gs + d * M + lo[g] * 16, hi[g] - lo[g], 0, z, Wv);
                else tile(1, y, R, 1, gs + d * M + lo[g] * 8, hi[g] - lo[g], 0, z, Wv);
            }
            for (int64_t d = 0; d < W; d += 16) for (int64_t g = 0; g < n6 / 6; g++) if (lo[g] < hi[g]) {
                float *y = ds + g * 6 * R + lo[g], *z = dk + (j0 + g * 6) * W + d;
                if (d + 16 <= W) tile(2, y, R, 1, qs + d * M + lo[g] * 16, hi[g] - lo[g], 0, z, W);
                else tile(1, y, R, 1, qs + d * M + lo[g] * 8, hi[g] - lo[g], 0, z, W);
            }
            for (int64_t d = 0; d < W; d += 16) for (int64_t r = 0; r < R; r += 6) {
                six(&a[r / Q], part, r % Q, j0, j0 + n, &u, &w);
                if (u >= w) continue;
                float *y = ds + (u - j0) * R + r, *z = dq + r * W + d;
                if (d + 16 <= W) tile(2, y, 1, R, ks + d * N + (u - j0) * 16, w - u, 0, z, W);
                else tile(1, y, 1, R, ks + d * N + (u - j0) * 8, w - u, 0, z, W);
            }
        }
    }
    for (int64_t r = 0; r < x->rows; r++) {
        float *dst = c->dq + b * c->sdq[0] + h * c->sdq[1] + (x->t + r) * c->sdq[2];
        for (int64_t d = 0; d < D; d++) dst[d] = dq[r * W + d] * c->scale;
    }
}

/* The gradients of keys [j0, j1): the sum over the parts of the queries, in their order. */
static void gather(const Call *c, int64_t b, int64_t kh, int64_t j0, int64_t j1, const float *slots) {
    const int64_t W = UP(c->D, 8), Wv = UP(c->Dv, 8);
    for (int which = 0; which < 2; which++) for (int64_t j = j0; j < j1; j++) {
        int64_t w = which ? Wv : W, width = which ? c->Dv : c->D, any = 0;
        const int64_t *s = which ? c->sdv : c->sdk;
        float *dst = (which ? c->dv : c->dk) + b * s[0] + kh * s[1] + j * s[2];
        for (int64_t i = 0; i < c->parts; i++) {
            const int64_t *part = c->part + 3 * i, keys = part[2] - part[1] + 6;
            if (j < part[1] || j >= part[2]) continue;
            const float *src = slots + i * c->slot + (which ? keys * W : 0) + (j - part[1]) * w;
            if (any++) for (int64_t d = 0; d < width; d++) dst[d] += src[d];
            else memcpy(dst, src, width * sizeof(float));
        }
        if (!any) memset(dst, 0, width * sizeof(float));
    }
}

static float *space(int64_t n) { void *p; return posix_memalign(&p, 64, MAX(n, 1) * sizeof(float)) ? 0 : p; }
INLINE int64_t ticket(Call *c) { return __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED); }

static void *forward_work(void *arg) {
    Call *c = arg;
    int64_t W = UP(c->Dv, 8), u;
    float *buf = space((c->D + W) * M + N * Q + N * W);
    if (!buf) return (void *)1;
    while ((u = ticket(c)) < c->units) forward_block(c, u / c->blocks / c->K, u / c->blocks % c->K, c->block + c->blocks - 1 - u % c->blocks, buf);
    free(buf);
    return 0;
}

static void *backward_work(void *arg) { /* a unit is a part of the queries of one key head */
    Call *c = arg;
    int64_t W = UP(c->D, 8), Wv = UP(c->Dv, 8), u;
    float *buf = space((c->D + c->Dv + 2 * W + Wv) * M + N * (W + Q + 2 * M)), *own = c->slots ? c->slots : space(c->slot);
    if (!buf || !own) { free(buf); if (!c->slots) free(own); return (void *)1; }
    while ((u = ticket(c)) < c->units) {
        int64_t head = u / c->parts, i = u % c->parts, *part = c->part + 3 * i, keys = part[2] - part[1] + 6;
        float *slot = c->slots ? c->slots + u * c->slot : own;
        memset(slot, 0, keys * (W + Wv) * sizeof(float));
        for (int64_t j = part[0]; j < part[3]; j++) backward_block(c, head / c->K, head % c->K, c->block + j, buf, slot, part[1], keys);
        if (!c->slots) gather(c, head / c->K, head % c->K, 0, c->S, slot);
    }
    free(buf);
    if (!c->slots) free(own);
    return 0;
}

static void *gather_work(void *arg) {
    Call *c = arg;
    int64_t per = (c->S + 255) / 256, u;
    while ((u = ticket(c)) < c->units) {
        int64_t head = u / per, j = u % per * 256;
        gather(c, head / c->K, head % c->K, j, MIN(j + 256, c->S), c->slots + head * c->parts * c->slot);
    }
    return 0;
}

static int crew(void *(*work)(void *), Call *c, int64_t units, int threads) { /* not zero: there was no memory */
    int failed = 0;
    c->units = units; c->next = 0;
#ifdef _OPENMP
    #pragma omp parallel num_threads(threads) reduction(|:failed)
    failed |= work(c) != 0;
#else
    pthread_t id[256];
    int n = 0;
    while (n + 1 < MIN(threads, 256) && !pthread_create(&id[n], 0, work, c)) n++;
    failed = work(c) != 0;
    while (n--) pthread_join(id[n], 0);
#endif
    return failed && c->next < c->units;
}

/* Blocks of queries, document after document and head after head of a group, the same for all key heads. */
static int cut(Call *c, const int64_t *cu, int64_t groups) {
    int64_t n = 0;
    for (int64_t i = 0; i < c->docs; i++) { int64_t T = cu ? cu[i + 1] - cu[i] : c->T; n += groups * ((T + M - 1) / M); }
    if (!(c->block = malloc(MAX(n, 1) * sizeof(Block)))) return 1;
    for (int64_t i = 0; i < c->docs; i++) {
        const int64_t *ck = cu ? cu + c->docs + 1 : 0;
        int64_t t0 = cu ? cu[i] : 0, T = cu ? cu[i + 1] - t0 : c->T, k0 = cu ? ck[i] : 0, S = cu ? ck[i + 1] - k0 : c->S, pieces = (T + M - 1) / M;
        int64_t rows = pieces ? UP((T + pieces - 1) / pieces, Q) : 0;
        for (int64_t g = 0; g < groups; g++) for (int64_t t = 0; t < T; t += rows) {
            Block *x = c->block + c->blocks++;
            *x = (Block){g, t0 + t, MIN(rows, T - t), S - T + t, k0, S, k0 + S, k0};
            for (int64_t r = 0; r < x->rows; r += Q) {
                Panel a; int64_t u, w;
                bounds(&a, c, x, r);
                for (int part = 0; part < 2; part++) {
                    panel_range(&a, part, &u, &w);
                    if (u < w) { x->first = MIN(x->first, k0 + u); x->last = MAX(x->last, k0 + w); }
                }
            }
        }
    }
    return 0;
}

int window_forward(const float *q, const float *k, const float *v, float *o, float *lse, const uint8_t *mask, const int64_t *cu,
                   const int64_t *size, const int64_t *stride, float scale, int threads) {
    Call c = {.q = q, .k = k, .v = v, .o = o, .lse = lse, .mask = mask, .scale = scale};
    memcpy(&c.B, size, 11 * sizeof(int64_t));
    memcpy(c.sq, stride, 12 * sizeof(int64_t));
    int failed = cut(&c, cu, c.H / c.K);
    if (!failed) failed = crew(forward_work, &c, c.B * c.K * c.blocks, threads);
    free(c.block);
    return failed;
}

int window_backward(const float *q, const float *k, const float *v, float *o, float *lse, const uint8_t *mask, const int64_t *cu,
                    const float *go, float *dq, float *dk, float *dv, const int64_t *size, const int64_t *stride, float scale, int threads) {
    Call c = {.q = q, .k = k, .v = v, .o = o, .lse = lse, .mask = mask, .go = go, .dq = dq, .dk = dk, .dv = dv, .scale = scale};
    memcpy(&c.B, size, 11 * sizeof(int64_t));
    memcpy(c.sq, stride, 24 * sizeof(int64_t));
    int64_t heads = c.B * c.K, even = threads;
    for (int64_t r = heads; r; ) { int64_t t = even % r; even = r; r = t; } /* greatest common divisor */
    c.parts = heads >= 4 * threads ? 1 : MIN(threads / even, (2 * threads + heads - 1) / heads);
    int failed = cut(&c, cu, c.H / c.K) || !(c.part = malloc((3 * c.parts + 1) * sizeof(int64_t)));
    if (!failed) {
        double all = 0, done = 0;
        for (int64_t i = 0; i < c.blocks; i++) all += MAX(0, c.block[i].last - c.block[i].first) + 24;
        for (int64_t i = 0, j = 0; i < c.parts; i++) {
            int64_t *part = c.part + 3 * i, first = c.S, last = 0;
            for (part[0] = j; j < c.blocks && (i + 1 == c.parts || done * c.parts < all * (i + 1)); j++) {
                Block *x = c.block + j;
                if (x->first < x->last) { first = MIN(first, x->first); last = MAX(last, x->last); }
                done += MAX(0, x->last - x->first) + 24;
            }
            part[1] = first; part[2] = MAX(first, last); part[3] = j;
            c.slot = MAX(c.slot, (part[2] - first + 6) * (UP(c.D, 8) + UP(c.Dv, 8)));
        }
        if (c.parts > 1) failed = !(c.slots = space(heads * c.parts * c.slot));
    }
    if (!failed) failed = crew(backward_work, &c, heads * c.parts, threads);
    if (!failed && c.parts > 1) failed = crew(gather_work, &c, heads * ((c.S + 255) / 256), threads);
    free(c.block); free(c.part); free(c.slots);
    return failed;
}
