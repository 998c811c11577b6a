/* One pass over lists of tensors: sums and updates, by OpenMP threads, for the CPU.
 *
 * Every exported function takes a `struct work` that cpu.py fills (same fields, same order). A tensor is cut into
 * chunks of fixed length, a thread takes a contiguous range of chunks, and the sums of chunks are added serially in
 * order: the results do not depend on the number of threads. Sums are formed in double, so that the square of a
 * float32 neither overflows nor vanishes. Elements are computed in float32; what every element of a tensor shares
 * (1 - beta2, lr / correction, ...) arrives formed in double. State in fewer bits is taken out block by block.
 *
 * No headers: a compiler is all that is needed.
 */

typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef signed char i8;

void *malloc(unsigned long);
void free(void *);

enum { FLOAT32, BFLOAT16, FLOAT16, EIGHT_BITS, RANDOM_BFLOAT16 }; /* storage; the last rounds stochastically */
enum { CHUNK = 16384, BLOCK = 128, WIDEST = 3 };
enum { KEPT = 2 }; /* value of `nesterov`: the direction is also written to `previous` */
enum { STEP, ADVANCE, APPLY }; /* both halves of an update, or one of them */

struct work {
    i64 tensors, threads, kind, state_kind, previous_kind;
    i64 nesterov, divide_change, written; /* flags: see the rules that read them; `written`: state is */
    const i64 *numels;
    void **weights;
    void **grads;
    void **first;     /* momentum, first moment or displacement */
    void **squares;   /* second moment */
    void **previous;  /* previous gradient */
    float **first_scales; /* of blocks of eight-bit state: see rounding.py */
    u32 **squares_scales;
    /* one number per tensor */
    const double *sign;    /* the gradient that rules see is sign g + decay w */
    const double *keep;    /* what the first moment is multiplied by */
    const double *enter;   /* what the gradient is multiplied by on entering it */
    const double *rate;    /* w loses rate times the direction */
    const double *shrink;  /* what w is multiplied by */
    const double *unbias;  /* what sqrt(v) is multiplied by */
    const double *weight_seeds, *state_seeds; /* 32-bit integers, for stochastic rounding; or 0 */
    double decay, beta2, eps;
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

/* 32 random bits for element i: see rounding.py */
INLINE u32 random_bits(u32 seed, i64 i) {
    u32 x = (u32)i * 0x9E3779B9u + seed;
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}

INLINE u16 to_bfloat_at_random(float x, u32 bits) {
    u32 finite = (as_bits(x) & 0x7f800000u) != 0x7f800000u, moved = (as_bits(x) + (bits & 0xffffu)) >> 16;
    return (u16)(finite ? moved : (u32)to_bfloat(x));
}

INLINE float load(const void *x, i64 i, const int kind) {
    if (kind == FLOAT32) return ((const float *)x)[i];
    u16 bits = ((const u16 *)x)[i];
    return kind == FLOAT16 ? from_half(bits) : from_bfloat(bits);
}

INLINE void store(void *x, i64 i, float value, const int kind) {
    if (kind == FLOAT32) ((float *)x)[i] = value;
    else ((u16 *)x)[i] = kind == BFLOAT16 ? to_bfloat(value) : to_half(value);
}

INLINE void *at(void *x, i64 i, const int kind) { return (char *)x + i * (kind == FLOAT32 ? 4 : 2); }

/* ---- state in fewer bits: a block is taken out, worked on in float32, and put back -------------------------------- */

static void decode_signed(const i8 *codes, float scale, i64 count, float *x) {
    for (i64 i = 0; i < count; i++) {
        float q = codes[i];
        x[i] = scale * (q * __builtin_fabsf(q) * (1.0f / 16129.0f));
    }
}

static void encode_signed(const float *x, const u32 *bits, i64 count, i8 *codes, float *scale) {
    u32 most = 0;
    for (i64 i = 0; i < count; i++) {
        u32 magnitude = as_bits(x[i]) & 0x7fffffffu;
        most = magnitude > most ? magnitude : most; /* NaN is larger than every number */
    }
    if (most < (27u << 23)) most = 0; /* below 2^-100, where 16129 / largest might overflow */
    float largest = *scale = as_float(most >= 0x7f800000u ? 0x7fc00000u : most);
    if (!(largest > 0.0f)) {
        for (i64 i = 0; i < count; i++) codes[i] = 0;
        return;
    }
    float factor = 16129.0f / largest;
    for (i64 i = 0; i < count; i++) {
        /* between low^2 and (low + 1)^2: up if the share of the way is more than a random number */
        float y = __builtin_fabsf(x[i]) * factor, low = (float)(int)__builtin_sqrtf(y);
        float random = (float)(int)(bits[i] & 0xffffu) * 0x1p-16f;
        int q = (int)low + (y - low * low > random * (2.0f * low + 1.0f));
        q = q > 127 ? 127 : q;
        codes[i] = (i8)(x[i] < 0.0f ? -q : q);
    }
}

static void decode_positive(const u8 *codes, const u32 *scale, i64 count, float *x) {
    u32 least = scale[0], shift = scale[1];
    for (i64 i = 0; i < count; i++) x[i] = as_float(least + ((u32)codes[i] << shift));
}

static void encode_positive(const float *x, const u32 *bits, i64 count, u8 *codes, u32 *scale) {
    u32 largest = 0, least = 0x7fffffffu, shift = 0;
    for (i64 i = 0; i < count; i++) {
        u32 b = as_bits(x[i]) & 0x7fffffffu;
        largest = b > largest ? b : largest;
        least = b < least ? b : least;
    }
    u32 floor = largest > (12u << 23) ? largest - (12u << 23) : 0;
    least = least < floor ? floor : least;
    if (largest >= 0x7f800000u) least = largest = 0x7fc00000u;
    while ((254u << shift) < largest - least) shift++;
    scale[0] = least; scale[1] = shift;
    for (i64 i = 0; i < count; i++) {
        u32 b = as_bits(x[i]) & 0x7fffffffu, above = b > least ? b - least : 0;
        u32 q = (above + ((bits[i] >> 12) & ((1u << shift) - 1u))) >> shift;
        codes[i] = (u8)(largest == 0x7fc00000u ? 0u : q);
    }
}

static void decode(const struct work *w, i64 t, i64 begin, i64 count, float *m, float *v) {
    if (w->state_kind == BFLOAT16) {
        const u16 *first = (const u16 *)w->first[t] + begin, *squares = v ? (const u16 *)w->squares[t] + begin : 0;
        for (i64 i = 0; i < count; i++) m[i] = from_bfloat(first[i]);
        for (i64 i = 0; i < count && v; i++) v[i] = from_bfloat(squares[i]);
        return;
    }
    decode_signed((const i8 *)w->first[t] + begin, w->first_scales[t][begin / BLOCK], count, m);
    if (v) decode_positive((const u8 *)w->squares[t] + begin, w->squares_scales[t] + begin / BLOCK * 2, count, v);
}

static void encode(const struct work *w, i64 t, i64 begin, i64 count, const float *m, const float *v) {
    u32 bits[BLOCK], seed = (u32)(i64)w->state_seeds[t];
    for (i64 i = 0; i < count; i++) bits[i] = random_bits(seed, begin + i);
    if (w->state_kind == BFLOAT16) {
        u16 *first = (u16 *)w->first[t] + begin, *squares = v ? (u16 *)w->squares[t] + begin : 0;
        for (i64 i = 0; i < count; i++) first[i] = to_bfloat_at_random(m[i], bits[i]);
        for (i64 i = 0; i < count && v; i++) squares[i] = to_bfloat_at_random(v[i], bits[i] >> 16);
        return;
    }
    encode_signed(m, bits, count, (i8 *)w->first[t] + begin, w->first_scales[t] + begin / BLOCK);
    if (v) encode_positive(v, bits, count, (u8 *)w->squares[t] + begin, w->squares_scales[t] + begin / BLOCK * 2);
}

/* ---- chunks ----------------------------------------------------------------------------------------------------- */

/* A rule adds to `sums`; m and v point at the state of element `begin`. */
typedef void (*rule)(const struct work *, i64 t, i64 begin, i64 count, float *m, float *v, double *sums);

INLINE i64 chunks(i64 numel) { return (numel + CHUNK - 1) / CHUNK; }

static void on_state(const struct work *w, rule body, i64 t, i64 begin, i64 count, double *sums) {
    if (w->state_kind == FLOAT32) {
        float *m = w->first ? (float *)w->first[t] + begin : 0, *v = w->squares ? (float *)w->squares[t] + begin : 0;
        body(w, t, begin, count, m, v, sums);
        return;
    }
    float m[BLOCK], v[BLOCK], *squares = w->squares ? v : 0;
    for (i64 stop = begin + count; begin < stop; begin += BLOCK) {
        i64 here = stop - begin < BLOCK ? stop - begin : BLOCK;
        decode(w, t, begin, here, m, squares);
        body(w, t, begin, here, m, squares, sums);
        if (w->written) encode(w, t, begin, here, m, squares);
    }
}

/* Chunks `from` to `to` of all, counted over the tensors in order. */
static void run_range(const struct work *w, rule body, i64 width, i64 from, i64 to, double *partial) {
    i64 before = 0;
    for (i64 t = 0; t < w->tensors && before < to; t++) {
        i64 here = chunks(w->numels[t]);
        i64 c = from > before ? from - before : 0, stop = to - before < here ? to - before : here;
        for (; c < stop; c++) {
            i64 begin = c * CHUNK, left = w->numels[t] - begin;
            double sums[WIDEST] = {0.0, 0.0, 0.0};
            on_state(w, body, t, begin, left < CHUNK ? left : CHUNK, sums);
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
#define BY_KIND(w, call) \
    switch ((w)->kind) { \
        case FLOAT32: { enum { KIND = FLOAT32 }; call; break; } \
        case BFLOAT16: { enum { KIND = BFLOAT16 }; call; break; } \
        default: { enum { KIND = FLOAT16 }; call; break; } \
    }
#define BY_KIND_OF_WEIGHTS(w, call) \
    if ((w)->kind == BFLOAT16 && (w)->weight_seeds) { enum { KIND = RANDOM_BFLOAT16 }; call; } \
    else BY_KIND(w, call)
#define BY_DECAY(w, call) \
    if ((w)->decay != 0.0) { enum { COUPLED = 1 }; call; } \
    else { enum { COUPLED = 0 }; call; }
#define PARAMETERS const struct work *w, i64 t, i64 begin, i64 count, float *restrict m, float *restrict v, double *sums
#define ARGUMENTS w, t, begin, count, m, v, sums
#define RULE(name) static void name(PARAMETERS)

INLINE void store_weight(void *weight, i64 i, float value, i64 place, u32 seed, const int kind) {
    if (kind == RANDOM_BFLOAT16) ((u16 *)weight)[i] = to_bfloat_at_random(value, random_bits(seed, place));
    else store(weight, i, value, kind);
}

/* ---- sums ------------------------------------------------------------------------------------------------------- */

/* <m, g>, <m, m>, <g, g>, or <g, g> alone */
INLINE void alignment(PARAMETERS, const int kind, const int coupled, const int alone) {
    const void *restrict grad = at(w->grads[t], begin, kind);
    const void *restrict weight = coupled ? at(w->weights[t], begin, kind) : 0;
    const float sign = (float)w->sign[t], decay = (float)w->decay;
    double mg = 0.0, mm = 0.0, gg = 0.0;
    #pragma omp simd reduction(+ : mg, mm, gg)
    for (i64 i = 0; i < count; i++) {
        float g32 = sign * load(grad, i, kind);
        if (coupled) g32 += decay * load(weight, i, kind);
        double g = g32;
        gg += g * g;
        if (!alone) {
            double a = m[i];
            mg += a * g;
            mm += a * a;
        }
    }
    if (alone) sums[0] += gg;
    else { sums[0] += mg; sums[1] += mm; sums[2] += gg; }
}
RULE(alignment_rule) { BY_DECAY(w, BY_KIND(w, alignment(ARGUMENTS, KIND, COUPLED, 0))) }
RULE(squared_norm_rule) { BY_DECAY(w, BY_KIND(w, alignment(ARGUMENTS, KIND, COUPLED, 1))) }
int alignment_sums(const struct work *w) { return run(w, alignment_rule, 3); }
int squared_norms(const struct work *w) { return run(w, squared_norm_rule, 1); }

/* |g - g_prev|^2, |m|^2 and |g|^2, and g kept as g_prev. With second moments m is divided by sqrt(v) unbias + eps, and
 * with `divide_change` the difference too. */
INLINE void change(PARAMETERS, const int kind, const int kept, const int second, const int divide) {
    const void *restrict grad = at(w->grads[t], begin, kind);
    void *restrict previous = at(w->previous[t], begin, kept);
    const float sign = (float)w->sign[t], eps = (float)w->eps, unbias = second ? (float)w->unbias[t] : 0.0f;
    double changed = 0.0, moved = 0.0, gg = 0.0;
    #pragma omp simd reduction(+ : changed, moved, gg)
    for (i64 i = 0; i < count; i++) {
        float g = sign * load(grad, i, kind), difference = g - load(previous, i, kept), direction = m[i];
        store(previous, i, g, kept);
        gg += (double)g * (double)g;
        if (second) {
            float denominator = __builtin_sqrtf(v[i]) * unbias + eps;
            direction /= denominator;
            if (divide) difference /= denominator;
        }
        double d = difference, u = direction;
        changed += d * d;
        moved += u * u;
    }
    sums[0] += changed; sums[1] += moved; sums[2] += gg;
}
#define CHANGE(kept) \
    if (!w->squares) { BY_KIND(w, change(ARGUMENTS, KIND, kept, 0, 0)) } \
    else if (!w->divide_change) { BY_KIND(w, change(ARGUMENTS, KIND, kept, 1, 0)) } \
    else { BY_KIND(w, change(ARGUMENTS, KIND, kept, 1, 1)) }
RULE(change_rule) {
    if (w->previous_kind == BFLOAT16) { CHANGE(BFLOAT16) } else { CHANGE(FLOAT32) }
}
int squared_changes(const struct work *w) { return run(w, change_rule, 3); }

/* ---- heavy ball: m = keep m + enter g; w = shrink w - rate m, or with Nesterov's form - rate (enter g + keep m) ---- */

INLINE void momentum(PARAMETERS, const int kind, const int coupled, const int phase, const int nesterov) {
    void *restrict weight = phase == ADVANCE && !coupled ? 0 : at(w->weights[t], begin, kind);
    const void *restrict grad = phase == APPLY ? 0 : at(w->grads[t], begin, kind);
    const float sign = phase == APPLY ? 0.0f : (float)w->sign[t], decay = (float)w->decay;
    const float keep = (float)w->keep[t], enter = (float)w->enter[t];
    const float rate = (float)w->rate[t], shrink = (float)w->shrink[t];
    const u32 seed = kind == RANDOM_BFLOAT16 ? (u32)(i64)w->weight_seeds[t] : 0;
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
            store_weight(weight, i, shrink * x - rate * direction, begin + i, seed, kind);
        }
    }
    sums[0] += mm;
}
#define MOMENTUM_STEP(form) BY_DECAY(w, BY_KIND_OF_WEIGHTS(w, momentum(ARGUMENTS, KIND, COUPLED, STEP, form)))
RULE(momentum_step_rule) {
    if (w->nesterov == KEPT) { MOMENTUM_STEP(KEPT) }
    else if (w->nesterov) { MOMENTUM_STEP(1) }
    else { MOMENTUM_STEP(0) }
}
RULE(momentum_advance_rule) { BY_DECAY(w, BY_KIND(w, momentum(ARGUMENTS, KIND, COUPLED, ADVANCE, 0))) }
RULE(momentum_apply_rule) { BY_KIND_OF_WEIGHTS(w, momentum(ARGUMENTS, KIND, 0, APPLY, 0)) }
int momentum_step(const struct work *w) { return run(w, momentum_step_rule, 0); }
int momentum_advance(const struct work *w) { return run(w, momentum_advance_rule, 1); } /* sums: |m|^2 */
int momentum_apply(const struct work *w) { return run(w, momentum_apply_rule, 0); }

/* ---- surgery: w = w - rate m with the old m; m = keep m + enter w, with w as it is stored -------------------------- */

INLINE void project(PARAMETERS, const int kind) {
    void *restrict weight = at(w->weights[t], begin, kind);
    const float keep = (float)w->keep[t], enter = (float)w->enter[t], rate = (float)w->rate[t];
    #pragma omp simd
    for (i64 i = 0; i < count; i++) {
        float a = m[i];
        store(weight, i, load(weight, i, kind) - rate * a, kind);
        m[i] = keep * a + enter * load(weight, i, kind);
    }
}
RULE(momentum_project_rule) { BY_KIND(w, project(ARGUMENTS, KIND)) }
int momentum_project(const struct work *w) { return run(w, momentum_project_rule, 0); }

/* ---- Adam's form: v = beta2 v + (1 - beta2) g^2 too; w = shrink w - rate m / (sqrt(v) unbias + eps) --------------- */

INLINE void adam(PARAMETERS, const int kind, const int coupled, const int phase) {
    void *restrict weight = phase == ADVANCE && !coupled ? 0 : at(w->weights[t], begin, kind);
    const void *restrict grad = phase == APPLY ? 0 : at(w->grads[t], begin, kind);
    const float sign = phase == APPLY ? 0.0f : (float)w->sign[t], decay = (float)w->decay;
    const float eps = (float)w->eps, unbias = (float)w->unbias[t];
    const float beta2 = (float)w->beta2, rest2 = (float)(1.0 - w->beta2);
    const float keep = (float)w->keep[t], enter = (float)w->enter[t];
    const float rate = (float)w->rate[t], shrink = (float)w->shrink[t];
    const u32 seed = kind == RANDOM_BFLOAT16 ? (u32)(i64)w->weight_seeds[t] : 0;
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
        } else store_weight(weight, i, shrink * x - direction, begin + i, seed, kind);
    }
    sums[0] += mm; sums[1] += uu;
}
RULE(adam_step_rule) { BY_DECAY(w, BY_KIND_OF_WEIGHTS(w, adam(ARGUMENTS, KIND, COUPLED, STEP))) }
RULE(adam_advance_rule) { BY_DECAY(w, BY_KIND(w, adam(ARGUMENTS, KIND, COUPLED, ADVANCE))) }
RULE(adam_apply_rule) { BY_KIND_OF_WEIGHTS(w, adam(ARGUMENTS, KIND, 0, APPLY)) }
int adam_step(const struct work *w) { return run(w, adam_step_rule, 0); }
int adam_advance(const struct work *w) { return run(w, adam_advance_rule, 2); } /* sums: |m|^2, |rate m / (...)|^2 */
int adam_apply(const struct work *w) { return run(w, adam_apply_rule, 0); }

i64 size_of_work(void) { return (i64)sizeof(struct work); }
