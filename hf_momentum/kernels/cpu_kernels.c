/* One pass over lists of tensors: sums and updates, by OpenMP threads, for the CPU.
 *
 * Every exported function takes a `struct work` that cpu.py fills (same fields, same order). A tensor is cut into
 * chunks of fixed length, a thread takes a contiguous range of chunks, and the sums of chunks are added serially in
 * order: the results do not depend on the number of threads. Sums are formed in double, so that the square of a
 * float32 neither overflows nor vanishes. Elements are computed in float32; what every element of a tensor shares
 * (1 - beta2, lr / correction, ...) arrives formed in double.
 *
 * No headers: a compiler is all that is needed.
 */

typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;

void *malloc(unsigned long);
void free(void *);

enum { FLOAT32, BFLOAT16, FLOAT16 }; /* storage of parameters and gradients; state is float32 */
enum { CHUNK = 16384, WIDEST = 3 };
enum { KEPT = 2 }; /* value of `nesterov`: the direction is also written to `previous` */
enum { STEP, ADVANCE, APPLY }; /* both halves of an update, or one of them */

struct work {
    i64 tensors, threads, kind, previous_kind;
    i64 nesterov, second, divide_change; /* flags: see the rules that read them */
    const i64 *numels;
    void **weights;
    void **grads;
    float **first;    /* momentum, first moment or displacement */
    float **squares;  /* second moment */
    void **previous;  /* previous gradient */
    /* one number per tensor */
    const double *keep;    /* what the first moment is multiplied by */
    const double *enter;   /* what the gradient is multiplied by on entering it */
    const double *rate;    /* w loses rate times the direction */
    const double *shrink;  /* what w is multiplied by */
    const double *unbias;  /* what sqrt(v) is multiplied by */
    double sign, decay;    /* the gradient that rules see is sign g + decay w */
    double beta2, eps;
    double *sums;          /* [tensors, width] */
};

#define INLINE static inline __attribute__((always_inline))

/* ---- storage ---------------------------------------------------------------------------------------------------- */

INLINE float as_float(u32 bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }
INLINE u32 as_bits(float x) { u32 bits; __builtin_memcpy(&bits, &x, 4); return bits; }

INLINE float from_half(u16 h) {
    u32 magnitude = (u32)(h & 0x7fff) << 13, sign = (u32)(h & 0x8000) << 16;
    u32 normal = magnitude + (112u << 23);
    u32 special = magnitude | 0x7f800000u;
    /* a subnormal has no leading one: put one in front and take it away again, exactly */
    u32 subnormal = as_bits(as_float((113u << 23) | magnitude) - 0x1p-14f);
    u32 bits = magnitude >= (0x7c00u << 13) ? special : magnitude < (0x0400u << 13) ? subnormal : normal;
    return as_float(bits | sign);
}

INLINE u16 to_half(float x) {
    u32 bits = as_bits(x), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
    u32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    /* 0.5 has its last bit where half-precision subnormals have theirs: the addition rounds */
    u32 subnormal = as_bits(as_float(magnitude < 0x38800000u ? magnitude : 0u) + 0.5f) - as_bits(0.5f);
    u32 half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half; /* from halfway above the largest number on */
    half = magnitude > 0x7f800000u ? 0x7e00u : half;  /* NaN */
    return (u16)(half | sign);
}

INLINE float from_bfloat(u16 b) { return as_float((u32)b << 16); }

INLINE u16 to_bfloat(float x) {
    u32 bits = as_bits(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (u16)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

INLINE float load(const void *x, i64 i, const int kind) {
    if (kind == FLOAT32) return ((const float *)x)[i];
    u16 bits = ((const u16 *)x)[i];
    return kind == BFLOAT16 ? from_bfloat(bits) : from_half(bits);
}

INLINE void store(void *x, i64 i, float value, const int kind) {
    if (kind == FLOAT32) ((float *)x)[i] = value;
    else ((u16 *)x)[i] = kind == BFLOAT16 ? to_bfloat(value) : to_half(value);
}

INLINE void *at(void *x, i64 i, const int kind) { return (char *)x + i * (kind == FLOAT32 ? 4 : 2); }

/* ---- chunks ----------------------------------------------------------------------------------------------------- */

typedef void (*rule)(const struct work *, i64 tensor, i64 begin, i64 count, double *sums);

INLINE i64 chunks(i64 numel) { return (numel + CHUNK - 1) / CHUNK; }

/* Chunks `from` to `to` of all, counted over the tensors in order. */
static void run_range(const struct work *w, rule body, i64 width, i64 from, i64 to, double *partial) {
    i64 before = 0;
    for (i64 t = 0; t < w->tensors && before < to; t++) {
        i64 here = chunks(w->numels[t]);
        i64 c = from > before ? from - before : 0, stop = to - before < here ? to - before : here;
        for (; c < stop; c++) {
            i64 begin = c * CHUNK, left = w->numels[t] - begin;
            double sums[WIDEST] = {0.0, 0.0, 0.0};
            body(w, t, begin, left < CHUNK ? left : CHUNK, sums);
            for (i64 k = 0; k < width; k++) partial[(before + c) * width + k] = sums[k];
        }
        before += here;
    }
}

/* 0, or 1 where memory for the partial sums is wanting; nothing has been changed then. */
static int run(const struct work *w, rule body, i64 width) {
    i64 total = 0, threads = w->threads;
    for (i64 t = 0; t < w->tensors; t++) total += chunks(w->numels[t]);
    double *partial = width ? malloc((unsigned long)(total * width + 1) * sizeof(double)) : 0;
    if (width && !partial) return 1;
    #pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (i64 part = 0; part < threads; part++)
        run_range(w, body, width, total * part / threads, total * (part + 1) / threads, partial);
    for (i64 t = 0, c = 0; t < w->tensors && width; t++) {
        for (i64 k = 0; k < width; k++) w->sums[t * width + k] = 0.0;
        for (i64 stop = c + chunks(w->numels[t]); c < stop; c++)
            for (i64 k = 0; k < width; k++) w->sums[t * width + k] += partial[c * width + k];
    }
    free(partial);
    return 0;
}

/* The same body once per storage, with the storage known to the compiler. */
#define BY_KIND(kind, call) \
    switch (kind) { \
        case FLOAT32: { enum { KIND = FLOAT32 }; call; break; } \
        case BFLOAT16: { enum { KIND = BFLOAT16 }; call; break; } \
        default: { enum { KIND = FLOAT16 }; call; break; } \
    }
#define BY_KIND_AND_DECAY(w, body, ...) \
    if ((w)->decay != 0.0) { BY_KIND((w)->kind, body(w, t, begin, count, sums, KIND, 1, ##__VA_ARGS__)) } \
    else { BY_KIND((w)->kind, body(w, t, begin, count, sums, KIND, 0, ##__VA_ARGS__)) }
#define ARGUMENTS const struct work *w, i64 t, i64 begin, i64 count, double *sums
#define RULE(name) static void name(ARGUMENTS)

/* ---- sums ------------------------------------------------------------------------------------------------------- */

/* <x, g>, <x, x>, <g, g> */
INLINE void alignment(ARGUMENTS, const int kind, const int coupled) {
    const float *restrict x = w->first[t] + begin;
    const void *restrict grad = at(w->grads[t], begin, kind);
    const void *restrict weight = coupled ? at(w->weights[t], begin, kind) : 0;
    const float sign = (float)w->sign, decay = (float)w->decay;
    double xg = 0.0, xx = 0.0, gg = 0.0;
    #pragma omp simd reduction(+ : xg, xx, gg)
    for (i64 i = 0; i < count; i++) {
        float g32 = sign * load(grad, i, kind);
        if (coupled) g32 += decay * load(weight, i, kind);
        double a = x[i], g = g32;
        xg += a * g;
        xx += a * a;
        gg += g * g;
    }
    sums[0] = xg; sums[1] = xx; sums[2] = gg;
}
RULE(alignment_rule) { BY_KIND_AND_DECAY(w, alignment) }
int alignment_sums(const struct work *w) { return run(w, alignment_rule, 3); }

/* |g - g_prev|^2 and |x|^2, and g kept as g_prev. With second moments x is divided by sqrt(v) unbias + eps, and with
 * `divide_change` the difference too. */
INLINE void change(ARGUMENTS, const int kind, const int kept, const int second, const int divide) {
    const void *restrict grad = at(w->grads[t], begin, kind);
    void *restrict previous = at(w->previous[t], begin, kept);
    const float *restrict x = w->first[t] + begin;
    const float *restrict v = second ? w->squares[t] + begin : 0;
    const float sign = (float)w->sign, eps = (float)w->eps, unbias = second ? (float)w->unbias[t] : 0.0f;
    double changed = 0.0, moved = 0.0;
    #pragma omp simd reduction(+ : changed, moved)
    for (i64 i = 0; i < count; i++) {
        float g = sign * load(grad, i, kind), difference = g - load(previous, i, kept), direction = x[i];
        store(previous, i, g, kept);
        if (second) {
            float denominator = __builtin_sqrtf(v[i]) * unbias + eps;
            direction /= denominator;
            if (divide) difference /= denominator;
        }
        double d = difference, u = direction;
        changed += d * d;
        moved += u * u;
    }
    sums[0] = changed; sums[1] = moved;
}
#define CHANGE(kept) \
    if (!w->second) { BY_KIND(w->kind, change(w, t, begin, count, sums, KIND, kept, 0, 0)) } \
    else if (!w->divide_change) { BY_KIND(w->kind, change(w, t, begin, count, sums, KIND, kept, 1, 0)) } \
    else { BY_KIND(w->kind, change(w, t, begin, count, sums, KIND, kept, 1, 1)) }
RULE(change_rule) {
    if (w->previous_kind == BFLOAT16) { CHANGE(BFLOAT16) } else { CHANGE(FLOAT32) }
}
int squared_changes(const struct work *w) { return run(w, change_rule, 2); }

/* ---- heavy ball: m = keep m + enter g; w = shrink w - rate m, or with Nesterov's form - rate (enter g + keep m) ---- */

INLINE void momentum(ARGUMENTS, const int kind, const int coupled, const int phase, const int nesterov) {
    void *restrict weight = phase == ADVANCE && !coupled ? 0 : at(w->weights[t], begin, kind);
    const void *restrict grad = phase == APPLY ? 0 : at(w->grads[t], begin, kind);
    float *restrict m = w->first[t] + begin;
    const float sign = (float)w->sign, decay = (float)w->decay;
    const float keep = phase == APPLY ? 0.0f : (float)w->keep[t], enter = phase == APPLY ? 0.0f : (float)w->enter[t];
    const float rate = phase == ADVANCE ? 0.0f : (float)w->rate[t];
    const float shrink = phase == ADVANCE ? 0.0f : (float)w->shrink[t];
    float *restrict kept = nesterov == KEPT ? (float *)w->previous[t] + begin : 0;
    double mm = 0.0;
    #pragma omp simd reduction(+ : mm)
    for (i64 i = 0; i < count; i++) {
        float x = phase == ADVANCE && !coupled ? 0.0f : load(weight, i, kind), a = m[i], g = 0.0f;
        if (phase != APPLY) {
            g = sign * load(grad, i, kind);
            if (coupled) g += decay * x;
            g *= enter;
            a = keep * a + g;
            m[i] = a;
        }
        if (phase == ADVANCE) mm += (double)a * (double)a;
        else {
            float direction = nesterov ? g + keep * a : a;
            if (nesterov == KEPT) kept[i] = direction;
            store(weight, i, shrink * x - rate * direction, kind);
        }
    }
    sums[0] = mm;
}
RULE(momentum_step_rule) {
    if (w->nesterov == KEPT) { BY_KIND_AND_DECAY(w, momentum, STEP, KEPT) }
    else if (w->nesterov) { BY_KIND_AND_DECAY(w, momentum, STEP, 1) }
    else { BY_KIND_AND_DECAY(w, momentum, STEP, 0) }
}
RULE(momentum_advance_rule) { BY_KIND_AND_DECAY(w, momentum, ADVANCE, 0) }
RULE(momentum_apply_rule) { BY_KIND(w->kind, momentum(w, t, begin, count, sums, KIND, 0, APPLY, 0)) }
int momentum_step(const struct work *w) { return run(w, momentum_step_rule, 0); }
int momentum_advance(const struct work *w) { return run(w, momentum_advance_rule, 1); } /* sums: |m|^2 */
int momentum_apply(const struct work *w) { return run(w, momentum_apply_rule, 0); }

/* ---- Adam's form: v = beta2 v + (1 - beta2) g^2 too; w = shrink w - rate m / (sqrt(v) unbias + eps) --------------- */

INLINE void adam(ARGUMENTS, const int kind, const int coupled, const int phase) {
    void *restrict weight = phase == ADVANCE && !coupled ? 0 : at(w->weights[t], begin, kind);
    const void *restrict grad = phase == APPLY ? 0 : at(w->grads[t], begin, kind);
    float *restrict m = w->first[t] + begin, *restrict v = w->squares[t] + begin;
    const float sign = (float)w->sign, decay = (float)w->decay, eps = (float)w->eps, unbias = (float)w->unbias[t];
    const float beta2 = (float)w->beta2, rest2 = (float)(1.0 - w->beta2);
    const float keep = phase == APPLY ? 0.0f : (float)w->keep[t], enter = phase == APPLY ? 0.0f : (float)w->enter[t];
    const float rate = (float)w->rate[t];
    const float shrink = phase == ADVANCE ? 0.0f : (float)w->shrink[t];
    double mm = 0.0, uu = 0.0;
    #pragma omp simd reduction(+ : mm, uu)
    for (i64 i = 0; i < count; i++) {
        float x = phase == ADVANCE && !coupled ? 0.0f : load(weight, i, kind), a = m[i], b = v[i];
        if (phase != APPLY) {
            float g = sign * load(grad, i, kind);
            if (coupled) g += decay * x;
            a = keep * a + enter * g;
            b = beta2 * b + rest2 * (g * g);
            m[i] = a;
            v[i] = b;
        }
        float direction = rate * a / (__builtin_sqrtf(b) * unbias + eps);
        if (phase == ADVANCE) {
            mm += (double)a * (double)a;
            uu += (double)direction * (double)direction;
        } else store(weight, i, shrink * x - direction, kind);
    }
    sums[0] = mm; sums[1] = uu;
}
RULE(adam_step_rule) { BY_KIND_AND_DECAY(w, adam, STEP) }
RULE(adam_advance_rule) { BY_KIND_AND_DECAY(w, adam, ADVANCE) }
RULE(adam_apply_rule) { BY_KIND(w->kind, adam(w, t, begin, count, sums, KIND, 0, APPLY)) }
int adam_step(const struct work *w) { return run(w, adam_step_rule, 0); }
int adam_advance(const struct work *w) { return run(w, adam_advance_rule, 2); } /* sums: |m|^2, |rate m / (...)|^2 */
int adam_apply(const struct work *w) { return run(w, adam_apply_rule, 0); }

i64 size_of_work(void) { return (i64)sizeof(struct work); }
