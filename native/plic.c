/* PLIC, a platform-level interrupt controller: which source reaches which hart, answered on the
 * vCPU thread.
 *
 * Every source is level-triggered. Its gateway forwards one request and then no more until the
 * handler completes it; a request that was forwarded stays pending when the line falls. */
#include "plic.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define WORDS ((VMM_PLIC_SOURCES + 1) / 32)
#define PRIORITY_MASK 7 /* priorities and thresholds have three bits */

/* plic-v1.0.0 §3 (memory map). */
enum {
	PENDING = 0x1000,
	PENDING_END = PENDING + 4 * WORDS,
	ENABLE = 0x2000,
	ENABLE_STRIDE = 0x80,
	CONTEXT = 0x200000,
	CONTEXT_STRIDE = 0x1000,
	THRESHOLD = 0,
	CLAIM = 4,
};

struct context {
	struct vmm_irq *out;
	uint32_t enable[WORDS];
	uint32_t threshold;
	bool level;
};

struct vmm_plic {
	struct vmm_dev dev;
	pthread_mutex_t lock;
	uint32_t nr_sources, nr_contexts;
	uint8_t priority[VMM_PLIC_SOURCES + 1];
	uint32_t level[WORDS];   /* the lines */
	uint32_t pending[WORDS];
	uint32_t claimed[WORDS]; /* the gateway waits for completion */
	struct context contexts[];
};

static bool test(const uint32_t *words, uint32_t nr)
{
	return words[nr / 32] >> (nr % 32) & 1;
}

static void assign(uint32_t *words, uint32_t nr, bool on)
{
	const uint32_t bit = 1u << (nr % 32);

	words[nr / 32] = on ? words[nr / 32] | bit : words[nr / 32] & ~bit;
}

/* The pending source of the highest priority that a context enables, the lowest number among
 * equals; 0 without one. Priority 0 never interrupts. plic-v1.0.0 §4, §8. */
static uint32_t best(const struct vmm_plic *p, const struct context *c)
{
	uint32_t found = 0;

	for (uint32_t w = 0; w < WORDS; w++) {
		for (uint32_t bits = p->pending[w] & c->enable[w]; bits; bits &= bits - 1) {
			const uint32_t nr = 32 * w + (uint32_t)__builtin_ctz(bits);

			if (p->priority[nr] > p->priority[found])
				found = nr;
		}
	}
	return found;
}

/* priority[0] stays 0, so that no source is as good as none. */
static void update_context(struct vmm_plic *p, struct context *c)
{
	const bool level = p->priority[best(p, c)] > c->threshold;

	if (level == c->level)
		return;
	c->level = level;
	if (c->out)
		vmm_irq_set(c->out, level);
}

static void update(struct vmm_plic *p)
{
	for (uint32_t i = 0; i < p->nr_contexts; i++)
		update_context(p, &p->contexts[i]);
}

/* The gateway: a line that is up becomes a request unless one is on its way. */
static void forward(struct vmm_plic *p, uint32_t nr)
{
	if (test(p->level, nr) && !test(p->claimed, nr))
		assign(p->pending, nr, true);
}

/* ---- registers ------------------------------------------------------------------------------ */

/* Claiming ignores the threshold. plic-v1.0.0 §8. */
static uint32_t claim(struct vmm_plic *p, struct context *c)
{
	const uint32_t nr = best(p, c);

	if (nr) {
		assign(p->pending, nr, false);
		assign(p->claimed, nr, true);
		update(p);
	}
	return nr;
}

/* What the context does not enable is ignored; nothing else is asked of who completes.
 * plic-v1.0.0 §9. */
static void complete(struct vmm_plic *p, struct context *c, uint32_t nr)
{
	if (nr > p->nr_sources || !test(c->enable, nr))
		return;
	assign(p->claimed, nr, false);
	forward(p, nr);
	update(p);
}

/* Bits of a word that sources have. */
static uint32_t existing(const struct vmm_plic *p, uint32_t word)
{
	uint32_t bits = 0;

	for (uint32_t i = 0; i < 32; i++) {
		const uint32_t nr = 32 * word + i;

		if (nr && nr <= p->nr_sources)
			bits |= 1u << i;
	}
	return bits;
}

static struct context *context_at(struct vmm_plic *p, uint64_t offset, uint32_t stride)
{
	const uint64_t nr = offset / stride;

	return nr < p->nr_contexts ? &p->contexts[nr] : NULL;
}

static uint32_t read_register(struct vmm_plic *p, uint64_t offset)
{
	struct context *c;

	if (offset < PENDING)
		return p->priority[offset / 4];
	if (offset < PENDING_END)
		return p->pending[(offset - PENDING) / 4];
	if (offset >= CONTEXT) {
		c = context_at(p, offset - CONTEXT, CONTEXT_STRIDE);
		if (c && (offset & (CONTEXT_STRIDE - 1)) == THRESHOLD)
			return c->threshold;
		if (c && (offset & (CONTEXT_STRIDE - 1)) == CLAIM)
			return claim(p, c);
	} else if (offset >= ENABLE) {
		c = context_at(p, offset - ENABLE, ENABLE_STRIDE);
		if (c)
			return c->enable[(offset & (ENABLE_STRIDE - 1)) / 4];
	}
	return 0;
}

static void write_register(struct vmm_plic *p, uint64_t offset, uint32_t v)
{
	struct context *c;

	if (offset < PENDING) {
		if (offset && offset / 4 <= p->nr_sources)
			p->priority[offset / 4] = v & PRIORITY_MASK;
		update(p);
	} else if (offset >= CONTEXT) {
		c = context_at(p, offset - CONTEXT, CONTEXT_STRIDE);
		if (c && (offset & (CONTEXT_STRIDE - 1)) == THRESHOLD) {
			c->threshold = v & PRIORITY_MASK;
			update_context(p, c);
		} else if (c && (offset & (CONTEXT_STRIDE - 1)) == CLAIM) {
			complete(p, c, v);
		}
	} else if (offset >= ENABLE) {
		c = context_at(p, offset - ENABLE, ENABLE_STRIDE);
		if (c) {
			const uint32_t word = (offset & (ENABLE_STRIDE - 1)) / 4;

			c->enable[word] = v & existing(p, word);
			update_context(p, c);
		}
	}
}

/* Registers are 32 bits wide; another access reads zeros and writes nothing. */
static int plic_access(struct vmm_dev *dev, uint64_t offset, uint32_t size, uint8_t *data,
		       int is_write)
{
	struct vmm_plic *p = (struct vmm_plic *)dev;

	if (size != 4 || offset % 4) {
		if (!is_write)
			memset(data, 0, size);
		return VMM_ACCESS_DONE;
	}
	pthread_mutex_lock(&p->lock);
	if (is_write)
		write_register(p, offset, (uint32_t)vmm_get_le(data, 4));
	else
		vmm_put_le(data, read_register(p, offset), 4);
	pthread_mutex_unlock(&p->lock);
	return VMM_ACCESS_DONE;
}

/* ---- what the world says --------------------------------------------------------------------- */

int vmm_plic_set(struct vmm_plic *p, uint32_t source, int level)
{
	if (!source || source > p->nr_sources)
		return -EINVAL;
	pthread_mutex_lock(&p->lock);
	assign(p->level, source, level != 0);
	forward(p, source);
	update(p);
	pthread_mutex_unlock(&p->lock);
	return 0;
}

struct vmm_plic *vmm_plic_create(uint32_t nr_sources, uint32_t nr_contexts, struct vmm_irq **out)
{
	struct vmm_plic *p;

	if (!nr_sources || nr_sources > VMM_PLIC_SOURCES || !nr_contexts ||
	    nr_contexts > VMM_PLIC_CONTEXTS) {
		errno = EINVAL;
		return NULL;
	}
	p = calloc(1, sizeof(*p) + nr_contexts * sizeof(p->contexts[0]));
	if (!p)
		return NULL;
	p->dev.access = plic_access;
	p->nr_sources = nr_sources;
	p->nr_contexts = nr_contexts;
	pthread_mutex_init(&p->lock, NULL);
	for (uint32_t i = 0; i < nr_contexts; i++)
		p->contexts[i].out = out[i];
	return p;
}

void vmm_plic_destroy(struct vmm_plic *p)
{
	if (!p)
		return;
	pthread_mutex_destroy(&p->lock);
	free(p);
}

void vmm_plic_reset(struct vmm_plic *p)
{
	pthread_mutex_lock(&p->lock);
	memset(p->priority, 0, sizeof(p->priority));
	memset(p->claimed, 0, sizeof(p->claimed));
	memcpy(p->pending, p->level, sizeof(p->pending));
	for (uint32_t i = 0; i < p->nr_contexts; i++) {
		memset(p->contexts[i].enable, 0, sizeof(p->contexts[i].enable));
		p->contexts[i].threshold = 0;
	}
	update(p);
	pthread_mutex_unlock(&p->lock);
}

struct vmm_dev *vmm_plic_dev(struct vmm_plic *p)
{
	return &p->dev;
}
