/* One step of decoding of a Llama: from the ids of one new token for each row of a batch to its logits.
   A step reads every weight once and does little with it, so its speed is that of the memory. The whole step is one call:
   the threads walk through it together, each with its share of the rows of every matrix, and meet at a barrier where one
   needs what another has made. Activations are float32; weights, keys and values are float32 or bfloat16.
   Plain C with the vector extensions of GCC and Clang; no header of any framework. */
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#define LANES 8
#define MOST 8     /* sums that run at a time */
#define AHEAD 4096 /* bytes */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose_vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_vec __attribute__((vector_size(2 * LANES), aligned(2)));

typedef struct { /* of one layer: matrices, then vectors in float32 (bias NULL = none), then the cache (batch, kv head, slot, width) */
    const void *q, *k, *v, *o, *gate, *up, *down;
    const float *norm1, *norm2, *bq, *bk, *bv, *bo, *bgate, *bup, *bdown;
    void *keys, *values;
} Layer;

typedef struct {
    int64_t layers, dim, heads, kv_heads, head_dim, rotary, hidden, vocab, half;
    double eps;
    const Layer *layer;
    const void *embed, *head;
    const float *norm;
    int64_t batch, threads, capacity;
    float *room;              /* room_floats() of them */
    int64_t at, low, high;    /* slot of the new token, and the slots low … high - 1 that are looked at */
    const uint8_t *valid;     /* (batch, capacity), 0 = padding; NULL = every slot holds a token */
    const int64_t *ids;
    const float *cosine, *sine;
    int64_t turn;             /* floats from the angles of one row to those of the next; 0 = all rows share them */
    float *logits;            /* (batch, vocab) */
} Step;

typedef struct { const Step *step; atomic_int count, round, n; } Team;
typedef struct { Team *team; int me; } Member;

static void meet(Team *team) {
    int n = atomic_load_explicit(&team->n, memory_order_relaxed), round = atomic_load(&team->round);
    if (n == 1) return;
    if (atomic_fetch_add(&team->count, 1) == n - 1) {
        atomic_store(&team->count, 0);
        atomic_store(&team->round, round + 1);
        return;
    }
    for (int i = 0; atomic_load_explicit(&team->round, memory_order_acquire) == round; i++) {
        if (i > 4000) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
        else __builtin_ia32_pause();
#endif
    }
}

INLINE float wide(uint16_t x) { uint32_t u = (uint32_t)x << 16; float y; memcpy(&y, &u, 4); return y; }
INLINE float get(const void *p, int64_t i, const int half) { return half ? wide(((const uint16_t *)p)[i]) : ((const float *)p)[i]; }
INLINE vec get_vec(const void *p, int64_t i, const int half) {
    if (half) return (vec)(__builtin_convertvector(*(const half_vec *)((const uint16_t *)p + i), uvec) << 16);
    return *(const loose_vec *)((const float *)p + i);
}
INLINE void put(void *p, int64_t i, float x, const int half) {
    if (!half) { ((float *)p)[i] = x; return; }
    uint32_t u;
    memcpy(&u, &x, 4);
    ((uint16_t *)p)[i] = x != x ? 0x7FC0 : (u + 0x7FFF + ((u >> 16) & 1)) >> 16; /* to the nearest, ties to even */
}
INLINE float total(vec x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
INLINE const char *from(const void *p, int64_t i, const int half) { return (const char *)p + i * (half ? 2 : 4); }

/* exp(x) = 2^k exp(r), |r| <= ln2/2, with a polynomial for exp(r): two units in the last place at most */
INLINE vec exps(vec x) {
    vec k = x * 1.44269504088896341f + 12582912.f; /* 1.5 * 2^23: rounds, and leaves the integer in the low bits */
    ivec power = ((ivec)k - 0x4B400000 + 127) << 23, low = x < -87.33654f, high = x > 88.02969f;
    k -= 12582912.f;
    vec r = x - k * 0.693359375f + k * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    ivec y = (ivec)(p * (vec)power);
    return (vec)((y & ~low & ~high) | ((ivec)((vec){} + INFINITY) & high));
}

/* y[r, b] = w[r] . x[b] for R rows of weights and `rows` rows of the batch; 8 sums run at a time whatever they are.
   Several rows of weights side by side keep more reads of memory under way than one after the other. */
INLINE void dots(const void *w, const float *x, int64_t n, float *y, const int R, const int rows, const int half) {
    const int ways = MOST / (R * rows);
    vec sum[MOST] = {};
    int64_t i = 0;
    for (; i + ways * LANES <= n; i += ways * LANES) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) __builtin_prefetch(from(w, r * n + i, half) + AHEAD);
#pragma GCC unroll 8
        for (int k = 0; k < ways; k++) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                vec a = get_vec(w, r * n + i + k * LANES, half);
#pragma GCC unroll 8
                for (int b = 0; b < rows; b++) sum[(r * rows + b) * ways + k] += a * *(const loose_vec *)(x + b * n + i + k * LANES);
            }
        }
    }
    for (; i + LANES <= n; i += LANES) for (int r = 0; r < R; r++) {
        vec a = get_vec(w, r * n + i, half);
#pragma GCC unroll 8
        for (int b = 0; b < rows; b++) sum[(r * rows + b) * ways] += a * *(const loose_vec *)(x + b * n + i);
    }
#pragma GCC unroll 8
    for (int j = 0; j < R * rows; j++) {
        vec s = sum[j * ways];
#pragma GCC unroll 8
        for (int k = 1; k < ways; k++) s += sum[j * ways + k];
        y[j] = total(s);
    }
    for (; i < n; i++) for (int j = 0; j < R * rows; j++) y[j] += get(w, j / rows * n + i, half) * x[j % rows * n + i];
}

/* y[b, r] (+)= W[r] . x[b] + bias[r] for r0 <= r < r1: four rows of weights at a time, read once for the whole batch */
INLINE void product_of(const void *w, const float *bias, int64_t r0, int64_t r1, const float *x, int64_t n, int64_t batch,
        float *y, int64_t stride, int add, const int half) {
    for (int64_t r = r0, many; r < r1; r += many) {
        many = r1 - r >= 4 ? 4 : 1;
        for (int64_t b = 0, rows; b < batch; b += rows) {
            float out[4 * MOST];
            const float *xb = x + b * n;
            rows = batch - b >= 8 ? 8 : batch - b >= 4 ? 4 : batch - b >= 2 ? 2 : 1;
            for (int64_t k = 0, R; k < many; k += R) {
                const void *row = from(w, (r + k) * n, half);
                float *to = out + k * rows;
                R = many == 1 || rows == 8 ? 1 : rows == 4 ? 2 : 4;
                if (rows == 8) dots(row, xb, n, to, 1, 8, half);
                else if (rows == 4 && R == 2) dots(row, xb, n, to, 2, 4, half);
                else if (rows == 4) dots(row, xb, n, to, 1, 4, half);
                else if (rows == 2 && R == 4) dots(row, xb, n, to, 4, 2, half);
                else if (rows == 2) dots(row, xb, n, to, 1, 2, half);
                else if (R == 4) dots(row, xb, n, to, 4, 1, half);
                else dots(row, xb, n, to, 1, 1, half);
            }
            for (int64_t k = 0; k < many; k++) for (int64_t i = 0; i < rows; i++) {
                float v = out[k * rows + i] + (bias ? bias[r + k] : 0.f), *to = y + (b + i) * stride + r + k;
                *to = add ? *to + v : v;
            }
        }
    }
}

/* compiled once for each type, not once for each of its uses */
static __attribute__((noinline)) void product_f32(const void *w, const float *bias, int64_t r0, int64_t r1, const float *x, int64_t n, int64_t batch, float *y, int64_t stride, int add) {
    product_of(w, bias, r0, r1, x, n, batch, y, stride, add, 0);
}
static __attribute__((noinline)) void product_bf16(const void *w, const float *bias, int64_t r0, int64_t r1, const float *x, int64_t n, int64_t batch, float *y, int64_t stride, int add) {
    product_of(w, bias, r0, r1, x, n, batch, y, stride, add, 1);
}
INLINE void product(const void *w, const float *bias, int64_t r0, int64_t r1, const float *x, int64_t n, int64_t batch, float *y, int64_t stride, int add, int half) {
    (half ? product_bf16 : product_f32)(w, bias, r0, r1, x, n, batch, y, stride, add);
}

static void normed(const float *x, const float *weight, int64_t dim, int64_t batch, double eps, float *y) {
    for (int64_t b = 0; b < batch; b++, x += dim, y += dim) {
        vec sum = {};
        float rest = 0.f;
        int64_t i = 0;
        for (; i + LANES <= dim; i += LANES) { vec v = *(const loose_vec *)(x + i); sum += v * v; }
        for (; i < dim; i++) rest += x[i] * x[i];
        float scale = 1.f / sqrtf((total(sum) + rest) / dim + (float)eps);
        for (i = 0; i < dim; i++) y[i] = x[i] * scale * weight[i];
    }
}

INLINE void turned(float *x, const float *cosine, const float *sine, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i++) {
        float a = x[i], b = x[i + pairs];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + pairs] = b * cosine[i] + a * sine[i];
    }
}

/* one query over the slots low … high - 1 */
INLINE void attend(const Step *s, const float *q, const void *keys, const void *values, const uint8_t *valid, float *score, float *out, const int half) {
    int64_t D = s->head_dim, n = s->high - s->low;
    float most = -INFINITY, scale = 1.f / sqrtf((float)D), sum = 0.f;
    for (int64_t j = 0; j < n; j++) {
        int64_t slot = s->low + j;
        if (valid && !valid[slot]) { score[j] = -INFINITY; continue; }
        dots(from(keys, slot * D, half), q, D, &score[j], 1, 1, half);
        score[j] *= scale;
        if (score[j] > most || score[j] != score[j]) most = score[j];
    }
    memset(out, 0, D * sizeof(float));
    if (most == -INFINITY) return;
    for (int64_t j = 0; j < n; j += LANES) { /* room for a whole vector is left behind the last score */
        vec p = exps(*(loose_vec *)(score + j) - most);
        int64_t k = n - j < LANES ? n - j : LANES;
        memcpy(score + j, &p, k * sizeof(float));
        for (int64_t i = 0; i < k; i++) sum += p[i];
    }
    float share = 1.f / sum;
    int64_t i = 0;
    for (; i + 4 * LANES <= D; i += 4 * LANES) {
        vec acc[4] = {};
        for (int64_t j = 0; j < n; j++) if (score[j] != 0.f) {
            const void *v = from(values, (s->low + j) * D + i, half);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) acc[k] += score[j] * get_vec(v, k * LANES, half);
        }
        for (int k = 0; k < 4; k++) *(loose_vec *)(out + i + k * LANES) = acc[k] * share;
    }
    if (i < D) for (int64_t j = 0; j < n; j++) if (score[j] != 0.f)
        for (int64_t k = i; k < D; k++) out[k] += score[j] * share * get(values, (s->low + j) * D + k, half);
}

static __attribute__((noinline)) void attend_f32(const Step *s, const float *q, const void *keys, const void *values, const uint8_t *valid, float *score, float *out) { attend(s, q, keys, values, valid, score, out, 0); }
static __attribute__((noinline)) void attend_bf16(const Step *s, const float *q, const void *keys, const void *values, const uint8_t *valid, float *score, float *out) { attend(s, q, keys, values, valid, score, out, 1); }

static int64_t up8(int64_t n) { return (n + 7) / 8 * 8; }
static int64_t own_floats(const Step *s) {
    int64_t widest = s->dim > s->heads * s->head_dim ? s->dim : s->heads * s->head_dim;
    return up8(s->batch * (widest > s->hidden ? widest : s->hidden)) + up8(s->capacity + 2 * LANES);
}
static int64_t shared_floats(const Step *s) {
    return up8(s->batch * (s->dim + (2 * s->heads + 2 * s->kv_heads) * s->head_dim + 2 * s->hidden));
}
int64_t step_bytes(void) { return sizeof(Step); }
int64_t room_floats(const Step *s) { return shared_floats(s) + s->threads * own_floats(s); }

static void work(Team *team, int me) {
    const Step *s = team->step;
    const int half = s->half;
    const int64_t n = atomic_load(&team->n), B = s->batch, C = s->dim, D = s->head_dim, Q = s->heads * D, K = s->kv_heads * D, F = s->hidden;
    float *x = s->room, *q = x + B * C, *k = q + B * Q, *v = k + B * K, *mixed = v + B * K, *gate = mixed + B * Q, *up = gate + B * F;
    float *own = s->room + shared_floats(s) + me * own_floats(s), *score = own + own_floats(s) - up8(s->capacity + 2 * LANES);
#define SHARE(rows) (rows) * me / n, (rows) * (me + 1) / n
    if (me == 0) for (int64_t b = 0; b < B; b++) for (int64_t i = 0; i < C; i++) x[b * C + i] = get(s->embed, s->ids[b] * C + i, half);
    for (int64_t l = 0; l < s->layers; l++) {
        const Layer *w = s->layer + l;
        meet(team);
        normed(x, w->norm1, C, B, s->eps, own);
        product(w->q, w->bq, SHARE(Q), own, C, B, q, Q, 0, half);
        product(w->k, w->bk, SHARE(K), own, C, B, k, K, 0, half);
        product(w->v, w->bv, SHARE(K), own, C, B, v, K, 0, half);
        meet(team);
        for (int64_t i = me; i < B * (s->heads + s->kv_heads); i += n) {
            int64_t b = i / (s->heads + s->kv_heads), h = i % (s->heads + s->kv_heads), g = h - s->heads;
            const float *cosine = s->cosine + b * s->turn, *sine = s->sine + b * s->turn;
            if (g < 0) { turned(q + b * Q + h * D, cosine, sine, s->rotary / 2); continue; }
            int64_t slot = ((b * s->kv_heads + g) * s->capacity + s->at) * D;
            turned(k + b * K + g * D, cosine, sine, s->rotary / 2);
            for (int64_t d = 0; d < D; d++) {
                put(w->keys, slot + d, k[b * K + g * D + d], half);
                put(w->values, slot + d, v[b * K + g * D + d], half);
            }
        }
        meet(team);
        for (int64_t i = B * s->heads * me / n; i < B * s->heads * (me + 1) / n; i++) {
            int64_t b = i / s->heads, h = i % s->heads, at = (b * s->kv_heads + h / (s->heads / s->kv_heads)) * s->capacity * D;
            const uint8_t *valid = s->valid ? s->valid + b * s->capacity : 0;
            (half ? attend_bf16 : attend_f32)(s, q + b * Q + h * D, from(w->keys, at, half), from(w->values, at, half), valid, score, mixed + b * Q + h * D);
        }
        meet(team);
        product(w->o, w->bo, SHARE(C), mixed, Q, B, x, C, 1, half);
        meet(team);
        normed(x, w->norm2, C, B, s->eps, own);
        product(w->gate, w->bgate, SHARE(F), own, C, B, gate, F, 0, half);
        product(w->up, w->bup, SHARE(F), own, C, B, up, F, 0, half);
        for (int64_t b = 0; b < B; b++) {
            int64_t i = F * me / n, end = F * (me + 1) / n;
            float *g = gate + b * F, *u = up + b * F;
            for (; i + LANES <= end; i += LANES) {
                vec a = *(loose_vec *)(g + i);
                *(loose_vec *)(g + i) = a / (1.f + exps(-a)) * *(loose_vec *)(u + i);
            }
            for (; i < end; i++) g[i] = g[i] / (1.f + expf(-g[i])) * u[i];
        }
        meet(team);
        product(w->down, w->bdown, SHARE(C), gate, F, B, x, C, 1, half);
    }
    meet(team);
    normed(x, s->norm, C, B, s->eps, own);
    product(s->head, 0, SHARE(s->vocab), own, C, B, s->logits, s->vocab, 0, half);
}

static void *enter(void *arg) {
    Member *m = arg;
    while (!atomic_load_explicit(&m->team->n, memory_order_acquire)) sched_yield(); /* until it is known how many we are */
    work(m->team, m->me);
    return 0;
}

/* Returns how many threads did the work: fewer than asked for where the system gives no more. */
int decode_step(const Step *s) {
    enum { MAX = 256 };
    pthread_t thread[MAX];
    Member member[MAX];
    Team team = {.step = s};
    int n = 1, want = s->threads < 1 ? 1 : s->threads > MAX ? MAX : (int)s->threads;
    for (; n < want; n++) {
        member[n] = (Member){&team, n};
        if (pthread_create(&thread[n], 0, enter, &member[n])) break;
    }
    atomic_store(&team.n, n);
    member[0] = (Member){&team, 0};
    enter(&member[0]);
    for (int i = 1; i < n; i++) pthread_join(thread[i], 0);
    return n;
}
