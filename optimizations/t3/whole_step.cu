// One decode step of T3's transformer in one launch, for one or two rows against weights in 8 bits.
//
// A step of many kernels waits between them: the last sums, their way to memory, the next kernel's start. Here all
// processors stay for the whole step. One warp of each streams the processor's share of all weights, and its part of
// the cache, through a ring in shared memory, in the order of their use and as far ahead as the ring is long, whatever
// the others wait for. Those hand their results on through words that carry a tag: whoever needs one asks for it until
// the tag is the wanted one. So there is no barrier, and no fence: a result and the news that it is there are one.
//
// Processor p of WIDTH / 8 does, in each layer, where head = p / 8 and rank = p % 8,
//     4 pairs of that head's queries, keys and values (a pair is what a rotation mixes), of every row,
//     a part of that head's cached slots for one row, and then a part of what the parts give together,
//     8 outputs of the attention's product, which are added to the residual stream that it keeps of these 8,
//     INNER / (WIDTH / 8) inner activations,
//     8 outputs of the last product, added to the same 8.
//
// A product is exact but for the rows' rounding to 23 bits: a warp takes an eighth of the inputs, scales its part of a
// row so that it fits three digits in 8 bits, and multiplies them by the weights on the matrix units, whose sums are
// integers. So a step repeats bit for bit, and its sums do not depend on the order in which processors come.
//
// Compiled with LAYERS, WIDTH (1024), INNER (one to four times 1024), HEADS of 64, ROWS (1 or 2), GPT2 (0: a Llama, 1),
// STAGES of the ring, and what the caller has room for: SHARED_BYTES, MAIL_BYTES, NUMBERS of a layer.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int HEAD = 64, OWN = 8, WARPS = 8, TILE_BYTES = 1024;
constexpr int PARTS = 8 / ROWS;                     // of a head's slots, for one row
constexpr int INNER_OF_PROCESSOR = INNER / (WIDTH / OWN);
constexpr int INNER_TILES = INNER_OF_PROCESSOR / OWN;
constexpr int INNER_CHUNKS = INNER / TILE_BYTES;
constexpr int GATED_TILES = GPT2 ? INNER_TILES : 2 * INNER_TILES;
constexpr int SLOTS = 64;                           // of the cache in one stage of the ring
constexpr int STRIDE = TILE_BYTES + 64;             // of a tile's rows in the ring: no two lanes want the same bank
constexpr int STAGE = OWN * STRIDE;
constexpr float NEVER = -1e30f;
static_assert(WIDTH == TILE_BYTES && WIDTH == HEADS * HEAD && INNER % WIDTH == 0 && INNER <= 4 * WIDTH);

struct Layer {                                      // everything on the device
    const u8 *query, *key, *value, *out, *gate, *up, *down;  // 8-bit weights; a GPT-2 has no `gate`
    u16 *keys, *values;                             // [ROWS, HEADS, capacity, HEAD] bfloat16
};

enum Numbers : int {                                // where a layer's vectors begin
    FIRST_GAIN = 0,
    SECOND_GAIN = FIRST_GAIN + WIDTH,
    QKV_SCALE = SECOND_GAIN + WIDTH,
    OUT_SCALE = QKV_SCALE + 3 * WIDTH,
    INNER_SCALE = OUT_SCALE + WIDTH,
    DOWN_SCALE = INNER_SCALE + (GPT2 ? 1 : 2) * INNER,
    // a GPT-2's alone: weights times the norm's gain; weights times its shift, and bias; biases
    QKV_OF_GAIN = DOWN_SCALE + WIDTH,
    QKV_SHIFT = QKV_OF_GAIN + 3 * WIDTH,
    INNER_OF_GAIN = QKV_SHIFT + 3 * WIDTH,
    INNER_SHIFT = INNER_OF_GAIN + INNER,
    OUT_BIAS = INNER_SHIFT + INNER,
    DOWN_BIAS = OUT_BIAS + WIDTH,
    N_NUMBERS = GPT2 ? DOWN_BIAS + WIDTH : QKV_OF_GAIN,
};
static_assert(N_NUMBERS == NUMBERS);

struct Mail {                                       // what processors hand on: a number below, the tag above
    u64 query[ROWS * WIDTH], key[ROWS * WIDTH], value[ROWS * WIDTH];
    u64 part[ROWS * HEADS * PARTS * (HEAD + 4)];    // of attention: sums, the highest score, the total thrice
    u64 attended[ROWS * WIDTH], middle[ROWS * WIDTH], stream[ROWS * WIDTH];
    u64 inner[INNER];                               // both rows' bfloat16 in one number
};

static_assert(sizeof(Mail) <= MAIL_BYTES);

struct Shared {
    u64 full[STAGES], empty[STAGES];
    alignas(16) u32 digits[WARPS][INNER_CHUNKS][3 * ROWS][32];
    float qkv[WARPS][3][ROWS][OWN], own[WARPS][ROWS][OWN], inner[WARPS][GATED_TILES][ROWS][OWN];
    alignas(16) float sums[2][ROWS][WARPS], squares[2][ROWS][WARPS];  // for both norms
    alignas(16) float peaks[WARPS], totals[WARPS], attended[WARPS][HEAD];
    alignas(128) u8 ring[STAGES][STAGE];
};
static_assert(sizeof(Shared) <= SHARED_BYTES);

struct Step {
    const Layer *layers;
    const float *numbers;                           // [LAYERS, N_NUMBERS]
    Mail *mail;                                     // zeros before the first step
    u32 *tags;                                      // [1]: the last tag that was used
    const float *embeds;                            // [ROWS, WIDTH]
    const u16 *positions;                           // a GPT-2's learned ones [capacity, WIDTH] bfloat16
    const u16 *cos, *sin;                           // a Llama's [capacity, HEAD] bfloat16: the second halves are read
    const long *position, *pads;                    // [1] the newest token's slot, [ROWS]
    const u8 *valid;                                // [ROWS, capacity]: 0 where a row's padding is
    float *stream;                                  // out: [ROWS, WIDTH]
    long capacity;
    float epsilon;
};

// -- small things -------------------------------------------------------------------------------------------------

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }
__device__ inline int head() { return blockIdx.x / 8; }
__device__ inline int rank() { return blockIdx.x % 8; }

__device__ inline void together() { asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory"); }

__device__ inline float power(float x) {            // of two
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline u16 rounded(float x) {            // to bfloat16
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ inline float widened(u32 x) { return __uint_as_float(x << 16); }

__device__ inline float activation(float x) {       // silu, and GPT-2's gelu with tanh(u) = 2 / (1 + exp(-2 u)) - 1
    float u = GPT2 ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x;
    return __fdividef(x, 1 + __expf(-u));
}

__device__ inline float sum_of(const float (&x)[WARPS]) {
    const float4 a = *(const float4 *)x, b = *(const float4 *)(x + 4);
    return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
}

// -- words with a tag ---------------------------------------------------------------------------------------------

__device__ inline u64 asked(const u64 *from) {
    u64 word;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from));
    return word;
}

// Lanes that hand on fill whole sectors of 32 bytes together, or it would take the memory much longer.
__device__ inline void hand_on(u64 *to, u32 number, u32 tag) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"((u64)tag << 32 | number));
}

__device__ inline void hand_on(u64 *to, float number, u32 tag) { hand_on(to, __float_as_uint(number), tag); }

template <int N, typename Where>
__device__ inline void receive(u32 (&numbers)[N], u32 tag, Where where) {
    bool there;
    do {
        u64 words[N];
        there = true;
#pragma unroll
        for (int i = 0; i < N; i++) words[i] = asked(where(i));
#pragma unroll
        for (int i = 0; i < N; i++) {
            there &= (u32)(words[i] >> 32) == tag;
            numbers[i] = (u32)words[i];
        }
    } while (!__all_sync(~0u, there));
}

// -- the ring -----------------------------------------------------------------------------------------------------

__device__ inline u32 address(const void *shared) { return (u32)__cvta_generic_to_shared(shared); }

__device__ inline void wait_for(u64 *barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(address(barrier)), "r"(parity) : "memory");
    } while (!done);
}

struct Turn {                                       // which stage of the ring comes next, and the round's parity
    int stage = 0;
    u32 round = 0;
    __device__ Turn after(int n) const {            // n of at most STAGES
        Turn then = {stage + n, round};
        if (then.stage >= STAGES) then.stage -= STAGES, then.round ^= 1;
        return then;
    }
};

__device__ inline void copy(u8 *to, const u8 *from, u32 n_bytes, u64 *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(address(to)), "l"(from), "r"(n_bytes), "r"(address(barrier)) : "memory");
}

__device__ inline u64 *next_empty(Shared &shared, Turn turn, u32 n_bytes) {
    u64 *full = &shared.full[turn.stage];
    wait_for(&shared.empty[turn.stage], turn.round ^ 1);
    if (lane() == 0)
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(full)), "r"(n_bytes)
                     : "memory");
    __syncwarp();
    return full;
}

// A tile: TILE_BYTES of each of 8 outputs. `from(n)` is where those of output n begin.
template <typename From>
__device__ inline void fetch_tile(Shared &shared, Turn &turn, From from) {
    u64 *full = next_empty(shared, turn, OWN * TILE_BYTES);
    if (lane() < OWN) copy(&shared.ring[turn.stage][lane() * STRIDE], from(lane()), TILE_BYTES, full);
    turn = turn.after(1);
}

__device__ inline void fetch_slots(Shared &shared, Turn &turn, const u16 *from, int n) {
    u64 *full = next_empty(shared, turn, n * HEAD * 2);
    if (lane() == 0) copy(shared.ring[turn.stage], (const u8 *)from, n * HEAD * 2, full);
    turn = turn.after(1);
}

// The next n stages are full, n of at most 32: each of the first lanes waits for one.
__device__ inline void await_stages(Shared &shared, Turn turn, int n) {
    if (lane() < n) {
        Turn mine = turn.after(lane());
        wait_for(&shared.full[mine.stage], mine.round);
    }
    __syncwarp();
}

// And may be filled again, as all that was read from them has come, `last` too: words come in the order of the reading.
__device__ inline void free_stages(Shared &shared, Turn &turn, int n, u32 last) {
    if (__any_sync(~0u, last == 0x80808080u)) __nanosleep(0);  // so that somebody wants it: no weight is -128
    if (lane() < n)
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(&shared.empty[turn.after(lane()).stage]))
                     : "memory");
    turn = turn.after(n);
}

struct Slots {                                      // a processor's part of its head's cache
    int first, n;
    __device__ Slots(int filled) {
        int each = (filled + PARTS - 1) / PARTS;
        first = min(rank() % PARTS * each, filled);
        n = min(each, filled - first);
    }
};

__device__ void fetch_all(Shared &shared, const Step &step, int filled) {
    Turn turn;
    Slots slots(filled);
    long pairs = (long)(head() * HEAD + rank() * 4) * WIDTH;
    long first_slot = ((rank() / PARTS * HEADS + head()) * step.capacity + slots.first) * HEAD;
    auto pair = [&](const u8 *weight) {
        return [=](int n) { return weight + pairs + (long)(n % 4 + n / 4 * (HEAD / 2)) * WIDTH; };
    };
    auto rows = [&](const u8 *weight, long first, long inputs) {
        return [=](int n) { return weight + (first + n) * inputs; };
    };
    Layer next = step.layers[0];
    for (int l = 0; l < LAYERS; l++) {
        const Layer layer = next;
        next = step.layers[min(l + 1, LAYERS - 1)];
        fetch_tile(shared, turn, pair(layer.query));
        fetch_tile(shared, turn, pair(layer.key));
        fetch_tile(shared, turn, pair(layer.value));
        for (int done = 0; done < slots.n; done += SLOTS) {
            fetch_slots(shared, turn, layer.keys + first_slot + done * HEAD, min(SLOTS, slots.n - done));
            fetch_slots(shared, turn, layer.values + first_slot + done * HEAD, min(SLOTS, slots.n - done));
        }
        fetch_tile(shared, turn, rows(layer.out, blockIdx.x * OWN, WIDTH));
        for (int i = 0; i < INNER_TILES; i++) {
            long first = blockIdx.x * INNER_OF_PROCESSOR + i * OWN;
            if (!GPT2) fetch_tile(shared, turn, rows(layer.gate, first, WIDTH));
            fetch_tile(shared, turn, rows(layer.up, first, WIDTH));
        }
        for (int c = 0; c < INNER_CHUNKS; c++)
            fetch_tile(shared, turn, rows(layer.down + c * TILE_BYTES, blockIdx.x * OWN, INNER));
    }
}

// -- products -----------------------------------------------------------------------------------------------------

struct Words {                                      // a lane's weights of a tile: of one output, two times 4 words
    uint4 block[2];
};

template <int TILES, int CHUNKS>
__device__ inline void take_tiles(Shared &shared, Turn &turn, Words (&words)[TILES][CHUNKS]) {
    await_stages(shared, turn, TILES * CHUNKS);
#pragma unroll
    for (int i = 0; i < TILES * CHUNKS; i++) {
        const u8 *at = &shared.ring[turn.after(i).stage][lane() / 4 * STRIDE + warp() * 128 + lane() % 4 * 16];
        words[i / CHUNKS][i % CHUNKS] = {*(const uint4 *)at, *(const uint4 *)(at + 64)};
    }
    free_stages(shared, turn, TILES * CHUNKS, words[TILES - 1][CHUNKS - 1].block[1].w);
}

__device__ inline void multiply(int (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Three digits of each number, every digit's four in one word: digits[d] has the d-th of x[0] to x[3].
__device__ inline void split(const float (&x)[4], float per_unit, u32 (&digits)[3]) {
    u32 n[4];                                       // whole numbers below 2 ** 22 either way, raised above 0
#pragma unroll
    for (int q = 0; q < 4; q++) n[q] = __float_as_uint(fmaf(x[q], per_unit, 0x1p23f + 0x408080));
    u32 low = __byte_perm(n[0], n[1], 0x5140), other_low = __byte_perm(n[2], n[3], 0x5140);
    u32 high = __byte_perm(n[0], n[1], 0x0062), other_high = __byte_perm(n[2], n[3], 0x0062);
    digits[0] = __byte_perm(low, other_low, 0x5410) ^ 0x80808080u;
    digits[1] = __byte_perm(low, other_low, 0x7632) ^ 0x80808080u;
    digits[2] = (__byte_perm(high, other_high, 0x5410) | 0x80808080u) - 0x40404040u ^ 0x80808080u;
}

// This warp's share of TILES tiles times the rows: sums[TILES][ROWS][OWN]. A lane's x is what its word of a tile wants.
template <int TILES, int CHUNKS>
__device__ inline void products(Shared &shared, const Words (&weights)[TILES][CHUNKS],
                                const float (&x)[ROWS][CHUNKS][4], float *sums) {
    constexpr float MOST = 4e6f;                    // three digits reach to 4,161,535, as `split` makes them
    constexpr int COUPLES = (TILES + 1) / 2;
    constexpr int APART = COUPLES >= 4 ? 1 : 4 / COUPLES;  // sums that do not wait for one another
    int t = lane() % 4, row = lane() / 4;
    float unit[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float highest = 1e-30f;
#pragma unroll
        for (int i = 0; i < 4 * CHUNKS; i++) highest = fmaxf(highest, fabsf(x[r][i / 4][i % 4]));
        float peak = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(highest)));
        float per_unit = __fdividef(MOST, peak);
        unit[r] = peak * (1 / MOST);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            u32 digits[3];
            split(x[r][c], per_unit, digits);
#pragma unroll
            for (int d = 0; d < 3; d++) shared.digits[warp()][c][3 * r + d][lane()] = digits[d];
        }
    }
    __syncwarp();
    // Digits are columns 0 to 2 for the first row, 4 to 6 for the second.
    bool has_digit = row % 4 < 3 && row / 4 < ROWS;
    int totals[COUPLES][APART][4] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const uint4 *digits = (const uint4 *)shared.digits[warp()][c][has_digit ? row / 4 * 3 + row % 4 : 0];
#pragma unroll
        for (int b = 0; b < 2; b++) {
            uint4 k = has_digit ? digits[4 * b + t] : uint4{0, 0, 0, 0};
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int p = 0; p < COUPLES; p++) {
                    const uint4 w = weights[2 * p][c].block[b];
                    uint4 v = {0, 0, 0, 0};
                    if (2 * p + 1 < TILES) v = weights[2 * p + 1 < TILES ? 2 * p + 1 : 0][c].block[b];
                    int(&sum)[4] = totals[p][(c * 2 + b) % APART];
                    if (half) multiply(sum, w.z, v.z, w.w, v.w, k.z, k.w);
                    else multiply(sum, w.x, v.x, w.y, v.y, k.x, k.y);
                }
        }
    }
    // Lanes 0 and 1 of four have the first row's sums, 2 and 3 the second's: of low and middle digits, of high ones.
    float own = ROWS == 2 && t / 2 ? unit[ROWS - 1] : unit[0];
    float first = t % 2 ? 65536 * own : own, second = t % 2 ? 0 : 256 * own;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        int a = 0, b = 0;
#pragma unroll
        for (int apart = 0; apart < APART; apart++) {
            a += totals[i / 2][apart][i % 2 * 2];
            b += totals[i / 2][apart][i % 2 * 2 + 1];
        }
        float sum = a * first + b * second;
        sum += __shfl_xor_sync(~0u, sum, 1);
        if (t % 2 == 0 && t / 2 < ROWS) sums[(i * ROWS + t / 2) * OWN + row] = sum;
    }
}

// The warps' sums of one value, which LANES lanes of a warp fetch together.
template <int LANES>
__device__ inline float all_warps(const float *first, int stride) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS / LANES; i++) sum += first[(threadIdx.x % LANES + i * LANES) * stride];
#pragma unroll
    for (int lanes = LANES / 2; lanes; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    return sum;
}

// -- norms --------------------------------------------------------------------------------------------------------

// A warp's share of the rows' sums and of those of their squares, for norm `which`.
__device__ inline void keep_moments(Shared &shared, int which, const float (&x)[ROWS][1][4]) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float(&n)[4] = x[r][0];
        float sum = (n[0] + n[1]) + (n[2] + n[3]), squares = (n[0] * n[0] + n[1] * n[1]) + (n[2] * n[2] + n[3] * n[3]);
#pragma unroll
        for (int lanes = 16; lanes; lanes /= 2) {
            if (GPT2) sum += __shfl_xor_sync(~0u, sum, lanes);
            squares += __shfl_xor_sync(~0u, squares, lanes);
        }
        if (lane() == 0) shared.sums[which][r][warp()] = sum, shared.squares[which][r][warp()] = squares;
    }
}

struct Norm {                                       // of a row: what an output of a product behind it needs
    float mean, scale;
    __device__ Norm(const Shared &shared, int which, int r, float epsilon) {
        mean = GPT2 ? sum_of(shared.sums[which][r]) / WIDTH : 0;
        scale = rsqrtf(sum_of(shared.squares[which][r]) / WIDTH - mean * mean + epsilon);
    }
};

// -- what a thread is for -----------------------------------------------------------------------------------------

struct Role {
    // Queries, keys, values: a warp has a row's 8 of one of the three, 4 lanes have one.
    int what, head_row, d;
    bool heads;
    // The residual stream: 8 lanes keep one number.
    int own_row, own_output;
    bool keeps;
    // Inner activations: 4 lanes have one, the lanes beside them the other row's.
    int inner_row, inner_output;
    bool activates;

    __device__ Role() {
        what = warp() / ROWS, head_row = warp() % ROWS, heads = what < 3;
        d = lane() / 16 * (HEAD / 2) + rank() * 4 + lane() / 4 % 4;
        own_row = threadIdx.x / 64, own_output = blockIdx.x * OWN + threadIdx.x / 8 % OWN, keeps = own_row < ROWS;
        inner_row = threadIdx.x / 4 % ROWS, inner_output = threadIdx.x / 4 / ROWS;
        activates = inner_output < INNER_OF_PROCESSOR;
        if (!activates) inner_output = 0;
    }
};

struct Vectors {                                    // what a thread needs of a layer's numbers
    float first_gain[4], second_gain[4], qkv_scale, out_scale, inner_scale, up_scale, down_scale;
    float qkv_of_gain, qkv_shift, inner_of_gain, inner_shift, out_bias, down_bias;
    u16 *kept;                                      // the cache of its keys or values

    __device__ void load(const Step &step, const Role &role, int l) {
        const float *numbers = step.numbers + (long)l * N_NUMBERS;
        int output = (role.heads ? role.what : 0) * WIDTH + head() * HEAD + role.d;
        int inner = blockIdx.x * INNER_OF_PROCESSOR + role.inner_output;
#pragma unroll
        for (int q = 0; q < 4; q++) {
            first_gain[q] = numbers[FIRST_GAIN + q * (WIDTH / 4) + threadIdx.x];
            second_gain[q] = numbers[SECOND_GAIN + q * (WIDTH / 4) + threadIdx.x];
        }
        qkv_scale = numbers[QKV_SCALE + output], out_scale = numbers[OUT_SCALE + role.own_output];
        inner_scale = numbers[INNER_SCALE + inner], down_scale = numbers[DOWN_SCALE + role.own_output];
        if (GPT2) {
            qkv_of_gain = numbers[QKV_OF_GAIN + output], qkv_shift = numbers[QKV_SHIFT + output];
            inner_of_gain = numbers[INNER_OF_GAIN + inner], inner_shift = numbers[INNER_SHIFT + inner];
            out_bias = numbers[OUT_BIAS + role.own_output], down_bias = numbers[DOWN_BIAS + role.own_output];
        } else {
            up_scale = numbers[INNER_SCALE + INNER + inner];
        }
        kept = role.what == 1 ? step.layers[l].keys : step.layers[l].values;
    }
};

// An output of a product with a normalized row.
__device__ inline float normed(float product, const Norm &norm, float scale, float of_gain, float shift) {
    return GPT2 ? (product * scale - norm.mean * of_gain) * norm.scale + shift : product * scale * norm.scale;
}

// -- attention ----------------------------------------------------------------------------------------------------

// A lane has an eighth of a head: 8 numbers, or the 4 words of as many in bfloat16.
__device__ inline float number(const uint4 &words, int i) {
    u32 pair = i / 2 == 0 ? words.x : i / 2 == 1 ? words.y : i / 2 == 2 ? words.z : words.w;
    return i % 2 ? __uint_as_float(pair & 0xffff0000u) : widened(pair);
}

__device__ inline float over_head(float sum) {
#pragma unroll
    for (int lanes = 4; lanes; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    return sum;
}

struct Attention {                                  // of one row's query over a part of its head's slots
    static constexpr int AT_ONCE = 4;               // slots of 8 lanes: two of each of two stages
    Shared &shared;
    const Slots slots;
    u64 seen = 0;                                   // bit i of a lane: its i-th slot holds a token of the row
    uint4 keys[AT_ONCE], values[AT_ONCE];
    float peak, total, sum[8];

    __device__ Attention(Shared &shared, const Step &step, int filled) : shared(shared), slots(filled) {
        const u8 *valid = step.valid + rank() / PARTS * step.capacity + slots.first;
#pragma unroll 4
        for (int i = 0; i < 64; i++) {
            int slot = i * (SLOTS / 2) + threadIdx.x / 8;
            if (slot < slots.n && valid[slot]) seen |= 1ull << i;
        }
    }
    __device__ bool is_newest() const { return rank() % PARTS == PARTS - 1 && warp() == WARPS - 1; }

    // Stages of keys and of values that come next, of at most two times SLOTS; `first` is a lane's first slot's number.
    __device__ int stages(int first) const { return 2 * max(0, min(2, (slots.n + SLOTS - 1) / SLOTS - first / 2)); }

    __device__ void take(Turn &turn, int first) {
        await_stages(shared, turn, stages(first));
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            keys[i] = values[i] = {0, 0, 0, 0};
            if (seen >> (first + i) & 1) {
                int at = i % 2 * (32 * WARPS) + threadIdx.x;
                keys[i] = ((const uint4 *)shared.ring[turn.after(i / 2 * 2).stage])[at];
                values[i] = ((const uint4 *)shared.ring[turn.after(i / 2 * 2 + 1).stage])[at];
            }
        }
        u32 last = 0;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) last ^= keys[i].w ^ values[i].w;
        free_stages(shared, turn, stages(first), last);
    }

    __device__ void add(const float (&query)[8], int first) {
        float scores[AT_ONCE], highest = peak;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            float score = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) score += query[j] * number(keys[i], j);
            scores[i] = over_head(score);
            if (!(seen >> (first + i) & 1)) scores[i] = NEVER;
            highest = max(highest, scores[i]);
        }
        highest = max(highest, __shfl_xor_sync(~0u, highest, 8));
        highest = max(highest, __shfl_xor_sync(~0u, highest, 16));
        float fade = power(peak - highest);
        peak = highest;
        total *= fade;
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] *= fade;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            float share = scores[i] == NEVER ? 0 : power(scores[i] - highest);
            total += share;
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += share * number(values[i], j);
        }
    }

    // Half of the numbers for the lanes with that bit, half for those without.
    template <int N>
    __device__ void share_out(int bit) {
        bool upper = lane() & bit;
#pragma unroll
        for (int j = 0; j < N; j++) {
            float theirs = upper ? sum[j] : sum[j + N];
            sum[j] = upper ? sum[j + N] : sum[j];
            sum[j] += __shfl_xor_sync(~0u, theirs, bit);
        }
        total += __shfl_xor_sync(~0u, total, bit);
    }

    // The part's sums, its highest score and its total to `to`.
    __device__ void run(Turn &turn, const Mail &mail, u64 *to, u32 tag) {
        int at = rank() / PARTS * WIDTH + head() * HEAD + lane() % 8 * 8;
        float query[8];
        take(turn, 0);
        if (is_newest()) {                          // which goes where there is least to do
            u32 numbers[24];
            receive(numbers, tag, [&](int i) {
                return (i < 8 ? mail.query : i < 16 ? mail.key : mail.value) + at + i % 8;
            });
            float score = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                query[j] = __uint_as_float(numbers[j]);
                score += query[j] * __uint_as_float(numbers[8 + j]);
                sum[j] = lane() < 8 ? __uint_as_float(numbers[16 + j]) : 0;
            }
            peak = over_head(score), total = lane() < 8;
        } else {
            u32 numbers[8];
            receive(numbers, tag, [&](int i) { return mail.query + at + i; });
            peak = NEVER, total = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) query[j] = __uint_as_float(numbers[j]), sum[j] = 0;
        }
        add(query, 0);
        for (int first = AT_ONCE; stages(first); first += AT_ONCE) {
            take(turn, first);
            add(query, first);
        }
        share_out<4>(8);
        share_out<2>(16);
        *(float2 *)&shared.attended[warp()][lane() % 8 * 8 + lane() / 8 % 2 * 4 + lane() / 16 * 2] = {sum[0], sum[1]};
        if (lane() == 0) shared.peaks[warp()] = peak, shared.totals[warp()] = total;
        together();
        int d = threadIdx.x / 4;
        float highest = NEVER, all = 0, part = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) highest = max(highest, shared.peaks[w]);
#pragma unroll
        for (int i = 0; i < WARPS; i += 4) {
            int w = i + threadIdx.x % 4;
            float share = power(shared.peaks[w] - highest);
            all += share * shared.totals[w];
            part += share * shared.attended[w][d];
        }
#pragma unroll
        for (int lanes = 2; lanes; lanes /= 2) {
            all += __shfl_xor_sync(~0u, all, lanes);
            part += __shfl_xor_sync(~0u, part, lanes);
        }
        if (threadIdx.x % 4 == 0) hand_on(to + d, part, tag);
        if (threadIdx.x < 4) hand_on(to + HEAD + threadIdx.x, threadIdx.x ? all : highest, tag);
    }
};

// All parts of a head together, of as many of its numbers as there are parts for: a lane has one part of one number.
__device__ inline void join_parts(const u64 *parts, u64 *attended, u32 tag) {
    constexpr int SHARE = HEAD / PARTS;
    if (threadIdx.x >= HEAD) return;
    int other = threadIdx.x % PARTS, d = rank() % PARTS * SHARE + threadIdx.x / PARTS;
    u32 numbers[3];
    receive(numbers, tag, [=](int i) { return parts + other * (HEAD + 4) + (i ? HEAD + i - 1 : d); });
    float sum = __uint_as_float(numbers[0]), peak = __uint_as_float(numbers[1]), total = __uint_as_float(numbers[2]);
    float highest = peak;
#pragma unroll
    for (int lanes = PARTS / 2; lanes; lanes /= 2) highest = max(highest, __shfl_xor_sync(~0u, highest, lanes));
    float share = power(peak - highest);
    sum *= share, total *= share;
#pragma unroll
    for (int lanes = PARTS / 2; lanes; lanes /= 2) {
        sum += __shfl_xor_sync(~0u, sum, lanes);
        total += __shfl_xor_sync(~0u, total, lanes);
    }
    if (other == 0) hand_on(attended + d, __fdividef(sum, total), tag);
}

// -- a step -------------------------------------------------------------------------------------------------------

__device__ void work(Shared &shared, const Step &step, u32 tag, int filled) {
    const int word = threadIdx.x;                   // of WIDTH / 4 that a row has
    const Role role;
    Mail &mail = *step.mail;
    Turn turn;
    Attention attention(shared, step, filled);
    u64 *parts = mail.part + (rank() / PARTS * HEADS + head()) * PARTS * (HEAD + 4);
    u64 *attended = mail.attended + rank() / PARTS * WIDTH + head() * HEAD;
    long place[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) place[r] = max(filled - step.pads[r], 0l);

    auto entering = [&](int r, int k) {             // what the first layer reads
        float x = step.embeds[r * WIDTH + k];
        return GPT2 ? x + widened(step.positions[place[r] * WIDTH + k]) : x;
    };
    auto rows_of = [&](const u64 *from, u32 wanted, float (&x)[ROWS][1][4]) {
        u32 numbers[4 * ROWS];
        receive(numbers, wanted, [=](int i) { return from + i / 4 * WIDTH + i % 4 * (WIDTH / 4) + word; });
#pragma unroll
        for (int i = 0; i < 4 * ROWS; i++) x[i / 4][0][i % 4] = __uint_as_float(numbers[i]);
    };
    auto times = [&](const float (&x)[ROWS][1][4], const float (&gain)[4], float (&y)[ROWS][1][4]) {
#pragma unroll
        for (int i = 0; i < 4 * ROWS; i++) y[i / 4][0][i % 4] = x[i / 4][0][i % 4] * gain[i % 4];
    };

    float cosine = 1, sine = 0;                     // of the pair that this thread rotates
    if (!GPT2 && role.heads && role.what < 2) {
        long angle = place[role.head_row] * HEAD + HEAD / 2 + role.d % (HEAD / 2);
        cosine = widened(step.cos[angle]), sine = widened(step.sin[angle]) * (role.d < HEAD / 2 ? -1 : 1);
    }
    int head_at = role.head_row * WIDTH + head() * HEAD + role.d, own_at = role.own_row * WIDTH + role.own_output;
    long slot_at = ((role.head_row * HEADS + head()) * step.capacity + filled) * HEAD + role.d;
    float residual = role.keeps ? entering(role.own_row, role.own_output) : 0;
    Vectors next;
    next.load(step, role, 0);

    for (int l = 0; l < LAYERS; l++, tag++) {
        const Vectors now = next;
        next.load(step, role, min(l + 1, LAYERS - 1));
        auto add = [&](float scale, float bias) {   // to the residual stream
            together();
            if (!role.keeps) return;
            float product = all_warps<8>(&shared.own[0][role.own_row][threadIdx.x / 8 % OWN], ROWS * OWN);
            residual += GPT2 ? product * scale + bias : product * scale;
        };
        float x[ROWS][1][4], y[ROWS][1][4];
        {
            Words weights[3][1];
            take_tiles(shared, turn, weights);
            if (l) {
                rows_of(mail.stream, tag - 1, x);
            } else {
#pragma unroll
                for (int i = 0; i < 4 * ROWS; i++) x[i / 4][0][i % 4] = entering(i / 4, i % 4 * (WIDTH / 4) + word);
            }
            times(x, now.first_gain, y);
            products(shared, weights, y, &shared.qkv[warp()][0][0][0]);
            keep_moments(shared, 0, x);
        }
        together();
        if (role.heads) {
            float product = all_warps<4>(&shared.qkv[0][role.what][role.head_row][lane() / 4], 3 * ROWS * OWN);
            Norm norm(shared, 0, role.head_row, step.epsilon);
            float turned = normed(product, norm, now.qkv_scale, now.qkv_of_gain, now.qkv_shift);
            if (!GPT2) turned = turned * cosine + __shfl_xor_sync(~0u, turned, 16) * sine;
            if (lane() % 4 == 0) {
                if (role.what == 0) {
                    hand_on(mail.query + head_at, turned * 0.18033688011112042f, tag);  // 64 ** -0.5, to the base of 2
                } else {
                    u16 kept = rounded(turned);
                    hand_on((role.what == 1 ? mail.key : mail.value) + head_at, widened(kept), tag);
                    now.kept[slot_at] = kept;
                }
            }
        }
        attention.run(turn, mail, parts + rank() % PARTS * (HEAD + 4), tag);
        join_parts(parts, attended, tag);
        {
            Words weights[1][1];
            take_tiles(shared, turn, weights);
            rows_of(mail.attended, tag, x);
            products(shared, weights, x, &shared.own[warp()][0][0]);
        }
        add(now.out_scale, now.out_bias);
        if (role.keeps && threadIdx.x % 8 == 0) hand_on(mail.middle + own_at, residual, tag);
        {
            Words weights[GATED_TILES][1];
            take_tiles(shared, turn, weights);
            rows_of(mail.middle, tag, x);
            times(x, now.second_gain, y);
            products(shared, weights, y, &shared.inner[warp()][0][0][0]);
            keep_moments(shared, 1, x);
        }
        together();
        if (role.activates) {
            constexpr int PER_TILE = GPT2 ? 1 : 2, STRIDE_OF_WARP = GATED_TILES * ROWS * OWN;
            int tile = role.inner_output / OWN * PER_TILE;
            const float *sums = &shared.inner[0][tile][role.inner_row][role.inner_output % OWN];
            Norm norm(shared, 1, role.inner_row, step.epsilon);
            float first = all_warps<4>(sums, STRIDE_OF_WARP);
            float active = activation(normed(first, norm, now.inner_scale, now.inner_of_gain, now.inner_shift));
            if (!GPT2) active *= all_warps<4>(sums + ROWS * OWN, STRIDE_OF_WARP) * now.up_scale * norm.scale;
            u32 both = rounded(active);
            if (ROWS == 2) both |= (u32)rounded(__shfl_xor_sync(~0u, active, 4)) << 16;
            if (threadIdx.x % (4 * ROWS) == 0)
                hand_on(mail.inner + blockIdx.x * INNER_OF_PROCESSOR + role.inner_output, both, tag);
        }
        {
            Words weights[1][INNER_CHUNKS];
            take_tiles(shared, turn, weights);
            u32 numbers[4 * INNER_CHUNKS];
            receive(numbers, tag, [&](int i) { return mail.inner + i % 4 * (INNER / 4) + i / 4 * (WIDTH / 4) + word; });
            float inner[ROWS][INNER_CHUNKS][4];
#pragma unroll
            for (int i = 0; i < 4 * INNER_CHUNKS; i++) {
                inner[0][i / 4][i % 4] = widened(numbers[i]);
                if (ROWS == 2) inner[ROWS - 1][i / 4][i % 4] = __uint_as_float(numbers[i] & 0xffff0000u);
            }
            products(shared, weights, inner, &shared.own[warp()][0][0]);
        }
        add(now.down_scale, now.down_bias);
        if (role.keeps && threadIdx.x % 8 == 0) {
            if (l + 1 < LAYERS) hand_on(mail.stream + own_at, residual, tag);
            else step.stream[own_at] = residual;
        }
    }
    // Every processor has read the tags by now: the last layer's inner activations came from all of them.
    if (blockIdx.x == 0 && threadIdx.x == 0) *step.tags = tag - 1;
}

extern "C" __global__ void __launch_bounds__(32 * (WARPS + 1), 1)
    whole_step(const Layer *layers, const float *numbers, Mail *mail, u32 *tags, const float *embeds,
               const u16 *positions, const u16 *cos, const u16 *sin, const long *position, const long *pads,
               const u8 *valid, float *stream, long capacity, float epsilon, const u8 *ended, int utterances) {
    bool over = utterances > 0;                     // what nobody will hear takes no time
    for (int i = 0; i < utterances; i++) over &= ended[i];
    if (over) return;
    const Step step = {layers, numbers, mail, tags,  embeds, positions, cos,
                       sin,    position, pads, valid, stream, capacity,  epsilon};
    extern __shared__ __align__(128) u8 memory[];
    Shared &shared = *(Shared *)memory;
    u32 tag = *(volatile u32 *)step.tags + 1;
    int filled = (int)*step.position;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&shared.full[i])));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(&shared.empty[i])), "n"(WARPS));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (warp() == WARPS) fetch_all(shared, step, filled);
    else work(shared, step, tag, filled);
}
