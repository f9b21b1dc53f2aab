// Local memory of a step in one launch, in floats. A phase begins with `scratch`; the normed rows of a layer stay from phase
// 4 to phase 5.

#define SCRATCH_ROWS (SHARED ? TOKENS * 32 : TOKENS * 16 > 32 ? TOKENS * 16 : 32)
#define SCRATCH_SUMS (WAVES * K_LANES * SCRATCH_ROWS)
#define SCRATCH_FACTORS (SHARED ? TOKENS : 0) // behind the sums
#define SCRATCH_NORM (TOKENS * (ITEMS + WAVE))
#define MAX_OF(a, b) ((a) > (b) ? (a) : (b))
#define SCRATCH MAX_OF(MAX_OF(SCRATCH_SUMS + SCRATCH_FACTORS, SCRATCH_NORM), ROUTED_WORDS)
#define QUARTERS 4
#define KEYS (ITEMS / QUARTERS)
#define SLOTS (HEADS * HEAD_DIM / CHUNK)
#define VALUE_LANES (ITEMS / SLOTS)
#define ATTEND_QUERIES ((HEADS + 2) * HEAD_DIM)
#define ATTEND_SCORES (QUARTERS * HEADS * KEYS)
#define ATTEND_SUMS (VALUE_LANES * HEADS * HEAD_DIM)
#if TENSOR_ATTENTION
#define ATTEND_FLOATS (ATTEND_QUERIES + ITEMS + WAVES * ALL_HEADS * (ROOM_WIDTH + 2))
#else
#define ATTEND_FLOATS (ATTEND_QUERIES + MAX_OF(ATTEND_SCORES, ATTEND_SUMS) + HEADS * KEYS + 4 * HEADS + ITEMS)
#endif
#define HEAD_FLOATS (SCRATCH + 4 + TOKENS * HIDDEN)
#define DENSE_FLOATS (DENSE ? SCRATCH + 4 + TOKENS * ATTENDED : 0)
#define LOCAL_FLOATS \
    MAX_OF(MAX_OF(SCRATCH + 4 + 4 * TOKENS * X_OCTETS, ATTEND_FLOATS), MAX_OF(HEAD_FLOATS, DENSE_FLOATS))

#if !TENSOR_ATTENTION && (SLOTS > ITEMS || ITEMS % SLOTS)
#error "the local size must be a multiple of HEADS * HEAD_DIM / 8"
#endif
#if WAVES / GATE_TEAM % 2 && TENSOR
#error "the teams of gate and up must be an even number"
#endif
#if HIDDEN % 16 || INNER % 16 || HEAD_DIM % 32 || ATTENDED % 32
#error "decoder_step.cl: sizes"
#endif
