/* Samples: records as the kernel writes them -> rows of tm_sample. Trusts nothing in a record but its type.
 *
 * The order of a sample's fields is that of perf_output_sample() in the kernel's kernel/events/core.c. A layout becomes
 * a plan once: the words up to the first field of variable length are at fixed offsets and are copied by a table; what
 * follows is walked, field by field. Hardware samples of data addresses have no such field.
 */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define BIT(n) (UINT64_C(1) << (n))
enum { /* bits of sample_type, as positions */
    IP, TID, TIME, ADDR, READ, CALLCHAIN, ID, CPU, PERIOD, STREAM_ID, RAW, BRANCH_STACK, REGS_USER, STACK_USER, WEIGHT,
    DATA_SRC, IDENTIFIER, TRANSACTION, REGS_INTR, PHYS_ADDR, AUX, CGROUP, DATA_PAGE_SIZE, CODE_PAGE_SIZE, WEIGHT_STRUCT,
    BITS
};
#define FORMAT_ENABLED BIT(0)
#define FORMAT_RUNNING BIT(1)
#define FORMAT_ID BIT(2)
#define FORMAT_GROUP BIT(3)
#define FORMAT_LOST BIT(4)
#define FORMATS BIT(5)
#define BRANCH_HW_INDEX BIT(17)
#define BRANCH_COUNTERS BIT(19)
#define RECORD_SAMPLE 9u
#define WORD 8u
#define NOWHERE UINT64_MAX

/* perf_event_header */
typedef struct {
    uint32_t type;
    uint16_t misc, size;
} header;

struct plan;
/* Where a field of variable length ends that begins at `at`; NOWHERE if not before `end`. */
typedef uint64_t skip(const struct plan *plan, const unsigned char *record, uint64_t at, uint64_t end);

struct step {
    skip *skip;   /* or NULL: a word of which `width` bytes go to `to` */
    uint16_t to, width;
};
struct move { /* of a word, or of its low half */
    uint16_t from, to;
};
struct plan {
    tm_layout layout;
    tm_sample blank; /* zeros and the event's index */
    uint32_t head;   /* bytes of the header and the fields at fixed offsets */
    uint32_t words, halves, steps;
    struct move word[BITS], half[2];
    struct step step[BITS];
};

struct slot { /* of a hash table; free while `used` is 0 */
    uint64_t id;
    uint16_t plan;
    uint16_t used;
};
struct tm_decoder {
    uint64_t id_offset; /* of the event's id in its record, where there are several plans */
    struct slot *slots;
    uint64_t mask; /* slots - 1 */
    uint32_t count;
    struct plan plans[];
};

static inline uint64_t word_at(const unsigned char *record, uint64_t at) {
    uint64_t value;
    memcpy(&value, record + at, sizeof value);
    return value;
}

/* --- fields of variable length ---------------------------------------------------------------------------------- */

static uint64_t skip_units(uint64_t at, uint64_t end, uint64_t count, uint64_t unit) {
    return at <= end && count <= (end - at) / unit ? at + count * unit : NOWHERE;
}

/* A count, `between` bytes, and so many units. */
static uint64_t skip_counted(const unsigned char *record, uint64_t at, uint64_t end, uint64_t between, uint64_t unit) {
    if (end - at < WORD) return NOWHERE;
    return skip_units(at + WORD + between, end, word_at(record, at), unit);
}

static uint64_t skip_read(const struct plan *plan, const unsigned char *record, uint64_t at, uint64_t end) {
    uint64_t format = plan->layout.read_format;
    uint64_t times = WORD * (!!(format & FORMAT_ENABLED) + !!(format & FORMAT_RUNNING));
    uint64_t value = WORD * (1 + !!(format & FORMAT_ID) + !!(format & FORMAT_LOST));
    if (format & FORMAT_GROUP) return skip_counted(record, at, end, times, value);
    return skip_units(at, end, times + value, 1);
}

static uint64_t skip_callchain(const struct plan *plan, const unsigned char *record, uint64_t at, uint64_t end) {
    (void)plan;
    return skip_counted(record, at, end, 0, WORD);
}

static uint64_t skip_raw(const struct plan *plan, const unsigned char *record, uint64_t at, uint64_t end) {
    (void)plan;
    uint32_t bytes;
    if (end - at < sizeof bytes) return NOWHERE;
    memcpy(&bytes, record + at, sizeof bytes);
    return skip_units(at + sizeof bytes, end, bytes, 1);
}

static uint64_t skip_branch_stack(const struct plan *plan, const unsigned char *record, uint64_t at, uint64_t end) {
    uint64_t hw_index = plan->layout.branch_sample_type & BRANCH_HW_INDEX ? WORD : 0;
    uint64_t counters = plan->layout.branch_sample_type & BRANCH_COUNTERS ? WORD : 0;
    return skip_counted(record, at, end, hw_index, 3 * WORD + counters);
}

static uint64_t skip_registers(const unsigned char *record, uint64_t at, uint64_t end, uint64_t mask) {
    if (end - at < WORD) return NOWHERE;
    bool any = word_at(record, at) != 0; /* the ABI; 0: the thread had none */
    return skip_units(at + WORD, end, any ? (uint64_t)__builtin_popcountll(mask) : 0, WORD);
}

static uint64_t skip_registers_user(const struct plan *plan, const unsigned char *record, uint64_t at, uint64_t end) {
    return skip_registers(record, at, end, plan->layout.sample_regs_user);
}

static uint64_t skip_registers_intr(const struct plan *plan, const unsigned char *record, uint64_t at, uint64_t end) {
    return skip_registers(record, at, end, plan->layout.sample_regs_intr);
}

static uint64_t skip_stack_user(const struct plan *plan, const unsigned char *record, uint64_t at, uint64_t end) {
    (void)plan;
    uint64_t after = skip_counted(record, at, end, 0, 1);
    if (after == NOWHERE || word_at(record, at) == 0) return after;
    return skip_units(after, end, WORD, 1); /* how much of it is stack */
}

static uint64_t skip_aux(const struct plan *plan, const unsigned char *record, uint64_t at, uint64_t end) {
    (void)plan;
    return skip_counted(record, at, end, 0, 1);
}

/* --- plans ------------------------------------------------------------------------------------------------------ */

#define TO(field) NULL, offsetof(tm_sample, field)
static const struct field {
    uint64_t bit;
    skip *skip;
    uint16_t to, width;
} FIELDS[] = {
    {BIT(IDENTIFIER), TO(id), 8},
    {BIT(IP), TO(ip), 8},
    {BIT(TID), TO(pid), 8}, /* and tid */
    {BIT(TIME), TO(time), 8},
    {BIT(ADDR), TO(addr), 8},
    {BIT(ID), TO(id), 8},
    {BIT(STREAM_ID), TO(stream_id), 8},
    {BIT(CPU), TO(cpu), 4},
    {BIT(PERIOD), TO(period), 8},
    {BIT(READ), skip_read, 0, 0},
    {BIT(CALLCHAIN), skip_callchain, 0, 0},
    {BIT(RAW), skip_raw, 0, 0},
    {BIT(BRANCH_STACK), skip_branch_stack, 0, 0},
    {BIT(REGS_USER), skip_registers_user, 0, 0},
    {BIT(STACK_USER), skip_stack_user, 0, 0},
    {BIT(WEIGHT), TO(weight), 4},
    {BIT(WEIGHT_STRUCT), TO(weight), 8}, /* and weight2, weight3 */
    {BIT(DATA_SRC), TO(data_src), 8},
    {BIT(TRANSACTION), TO(transaction), 8},
    {BIT(REGS_INTR), skip_registers_intr, 0, 0},
    {BIT(PHYS_ADDR), TO(phys_addr), 8},
    {BIT(CGROUP), TO(cgroup), 8},
    {BIT(DATA_PAGE_SIZE), TO(data_page_size), 8},
    {BIT(CODE_PAGE_SIZE), TO(code_page_size), 8},
    {BIT(AUX), skip_aux, 0, 0},
};
_Static_assert(sizeof FIELDS / sizeof *FIELDS == BITS, "every bit of sample_type has its field");
_Static_assert(offsetof(tm_sample, tid) == offsetof(tm_sample, pid) + 4, "TID fills both");
_Static_assert(offsetof(tm_sample, weight3) == offsetof(tm_sample, weight) + 6, "WEIGHT_STRUCT fills three");

static int plan_make(const tm_layout *layout, uint16_t event, struct plan *made) {
    uint64_t weights = BIT(WEIGHT) | BIT(WEIGHT_STRUCT);
    if (layout->sample_type >= BIT(BITS) || layout->read_format >= FORMATS) return -EINVAL;
    if ((layout->sample_type & weights) == weights) return -EINVAL;
    *made = (struct plan){.layout = *layout, .blank.event = event, .head = sizeof(header)};
    for (const struct field *field = FIELDS; field < FIELDS + BITS; field++) {
        if (!(layout->sample_type & field->bit)) continue;
        if (field->skip != NULL || made->steps > 0) {
            made->step[made->steps++] = (struct step){field->skip, field->to, field->width};
            continue;
        }
        struct move move = {(uint16_t)made->head, field->to};
        if (field->width == 8)
            made->word[made->words++] = move;
        else
            made->half[made->halves++] = move;
        made->head += WORD;
    }
    return 0;
}

/* --- decoding --------------------------------------------------------------------------------------------------- */

static bool walk(const struct plan *plan, const unsigned char *record, uint64_t end, tm_sample *row) {
    uint64_t at = plan->head;
    for (const struct step *step = plan->step; step < plan->step + plan->steps; step++) {
        if (step->skip != NULL) {
            at = step->skip(plan, record, at, end);
            if (at == NOWHERE) return false;
        } else {
            if (end - at < WORD) return false;
            memcpy((unsigned char *)row + step->to, record + at, step->width);
            at += WORD;
        }
    }
    return true;
}

static inline bool decode_sample(const struct plan *plan, const unsigned char *record, const header *head,
                                 tm_sample *row) {
    if (head->size < plan->head) return false;
    *row = plan->blank;
    for (uint32_t i = 0; i < plan->words; i++)
        memcpy((unsigned char *)row + plan->word[i].to, record + plan->word[i].from, 8);
    for (uint32_t i = 0; i < plan->halves; i++)
        memcpy((unsigned char *)row + plan->half[i].to, record + plan->half[i].from, 4);
    row->misc = head->misc;
    return plan->steps == 0 || walk(plan, record, head->size, row);
}

static struct slot *slot_of(const tm_decoder *decoder, uint64_t id) {
    uint64_t at = (id * UINT64_C(0x9E3779B97F4A7C15)) >> 32 & decoder->mask;
    while (decoder->slots[at].used && decoder->slots[at].id != id) at = (at + 1) & decoder->mask;
    return &decoder->slots[at];
}

/* NULL where no event is known by the record's id. */
static inline const struct plan *plan_of(const tm_decoder *decoder, const unsigned char *record, const header *head) {
    if (decoder->count == 1) return decoder->plans;
    if (head->size < decoder->id_offset + WORD) return NULL;
    const struct slot *slot = slot_of(decoder, word_at(record, decoder->id_offset));
    return slot->used ? &decoder->plans[slot->plan] : NULL;
}

int tm_decoder_decode(const tm_decoder *decoder, const void *bytes, uint64_t length, tm_sample *samples,
                      uint64_t sample_capacity, tm_record *records, uint64_t record_capacity, uint64_t *used,
                      uint64_t *sample_count, uint64_t *record_count) {
    uint64_t at = 0, rows = 0, others = 0;
    int status = 0;
    while (length - at >= sizeof(header)) {
        const unsigned char *record = (const unsigned char *)bytes + at;
        header head;
        memcpy(&head, record, sizeof head);
        if (head.size < sizeof head) {
            status = TM_E_RANGE;
            break;
        }
        if (head.size > length - at) break;
        const struct plan *plan = head.type == RECORD_SAMPLE ? plan_of(decoder, record, &head) : NULL;
        if (plan != NULL) {
            if (rows == sample_capacity) break;
            if (!decode_sample(plan, record, &head, &samples[rows])) {
                status = TM_E_RANGE;
                break;
            }
            rows++;
        } else {
            if (others == record_capacity) break;
            records[others++] = (tm_record){at, head.type, head.misc, head.size};
        }
        at += head.size;
    }
    *used = at;
    *sample_count = rows;
    *record_count = others;
    return status;
}

/* --- opening ---------------------------------------------------------------------------------------------------- */

static uint64_t id_offset(const tm_layout *layout) {
    if (layout->sample_type & BIT(IDENTIFIER)) return sizeof(header);
    if (!(layout->sample_type & BIT(ID))) return NOWHERE;
    uint64_t before = layout->sample_type & (BIT(IP) | BIT(TID) | BIT(TIME) | BIT(ADDR));
    return sizeof(header) + WORD * (uint64_t)__builtin_popcountll(before);
}

/* pre: the slots are twice as many as the ids, and free */
static int enter_ids(tm_decoder *decoder, const uint64_t *ids, const uint16_t *of, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        struct slot *slot = slot_of(decoder, ids[i]);
        if (slot->used || of[i] >= decoder->count) return -EINVAL;
        *slot = (struct slot){ids[i], of[i], 1};
    }
    return 0;
}

static int plans_make(tm_decoder *decoder, const tm_layout *layouts) {
    decoder->id_offset = id_offset(&layouts[0]);
    if (decoder->count > 1 && decoder->id_offset == NOWHERE) return -EINVAL;
    for (uint32_t i = 0; i < decoder->count; i++) {
        if (decoder->count > 1 && id_offset(&layouts[i]) != decoder->id_offset) return -EINVAL;
        int status = plan_make(&layouts[i], (uint16_t)i, &decoder->plans[i]);
        if (status < 0) return status;
    }
    return 0;
}

int tm_decoder_open(const tm_layout *layouts, uint32_t layout_count, const uint64_t *ids, const uint16_t *of,
                    uint32_t id_count, tm_decoder **decoder) {
    if (layout_count == 0 || layout_count > UINT16_MAX + 1u || id_count > UINT32_C(1) << 28) return -EINVAL;
    uint64_t slots = 2;
    while (slots < 2 * (uint64_t)id_count) slots *= 2;
    tm_decoder *made = calloc(1, sizeof *made + layout_count * sizeof *made->plans);
    if (made == NULL) return -ENOMEM;
    made->count = layout_count;
    made->mask = slots - 1;
    made->slots = calloc(slots, sizeof *made->slots);
    int status = made->slots == NULL ? -ENOMEM : plans_make(made, layouts);
    if (status == 0) status = enter_ids(made, ids, of, id_count);
    if (status < 0) {
        tm_decoder_close(made);
        return status;
    }
    *decoder = made;
    return 0;
}

void tm_decoder_close(tm_decoder *decoder) {
    if (decoder == NULL) return;
    free(decoder->slots);
    free(decoder);
}
