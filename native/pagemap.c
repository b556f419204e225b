/* A bitmap over guest RAM. */
#include "pagemap.h"

#include <stdlib.h>
#include <string.h>

#define SHIFT 12
#define PAGE (1ULL << SHIFT)

struct area {
	uint64_t gpa, pages;
	uint64_t *bits;
};

struct vmm_pagemap {
	uint32_t nr;
	struct area areas[];
};

static size_t words(uint64_t pages)
{
	return (size_t)((pages + 63) / 64);
}

struct vmm_pagemap *vmm_pagemap_create(const struct vmm_mem *mem)
{
	struct vmm_pagemap *map;
	struct vmm_ram ram;
	uint32_t nr = 0;

	while (!vmm_mem_range(mem, nr, &ram))
		nr++;
	map = calloc(1, sizeof(*map) + nr * sizeof(map->areas[0]));
	if (!map)
		return NULL;
	for (; map->nr < nr && !vmm_mem_range(mem, map->nr, &ram); map->nr++) {
		struct area *a = &map->areas[map->nr];

		a->gpa = ram.gpa;
		a->pages = ram.size / PAGE;
		a->bits = calloc(words(a->pages) + 1, sizeof(a->bits[0]));
		if (!a->bits) {
			vmm_pagemap_destroy(map);
			return NULL;
		}
	}
	return map;
}

void vmm_pagemap_destroy(struct vmm_pagemap *map)
{
	if (!map)
		return;
	for (uint32_t i = 0; i < map->nr; i++)
		free(map->areas[i].bits);
	free(map);
}

void vmm_pagemap_reset(struct vmm_pagemap *map)
{
	for (uint32_t i = 0; i < map->nr; i++)
		memset(map->areas[i].bits, 0, words(map->areas[i].pages) * sizeof(uint64_t));
}

/* The part of [gpa, gpa+len) that this area has, as page indices from..to; false if none. */
static bool clip(const struct area *a, uint64_t gpa, uint64_t len, uint64_t *from, uint64_t *to)
{
	const uint64_t size = a->pages * PAGE;

	if (gpa < a->gpa) {
		if (len <= a->gpa - gpa)
			return false;
		len -= a->gpa - gpa;
		gpa = a->gpa;
	}
	if (gpa - a->gpa >= size)
		return false;
	if (len > size - (gpa - a->gpa))
		len = size - (gpa - a->gpa);
	*from = (gpa - a->gpa + PAGE - 1) >> SHIFT;
	*to = (gpa - a->gpa + len) >> SHIFT;
	return *from < *to;
}

/* The bits of word `w` that lie in from..to. */
static uint64_t mask_of(uint64_t w, uint64_t from, uint64_t to)
{
	uint64_t mask = ~0ULL;

	if (from > w * 64)
		mask &= ~0ULL << (from - w * 64);
	if (to < w * 64 + 64)
		mask &= ~(~0ULL << (to - w * 64));
	return mask;
}

void vmm_pagemap_set(struct vmm_pagemap *map, uint64_t gpa, uint64_t len, bool on)
{
	for (uint32_t i = 0; i < map->nr; i++) {
		struct area *a = &map->areas[i];
		uint64_t from, to;

		if (!clip(a, gpa, len, &from, &to))
			continue;
		for (uint64_t w = from / 64; w * 64 < to; w++) {
			if (on)
				a->bits[w] |= mask_of(w, from, to);
			else
				a->bits[w] &= ~mask_of(w, from, to);
		}
	}
}

bool vmm_pagemap_full(const struct vmm_pagemap *map, uint64_t gpa, uint64_t len)
{
	for (uint32_t i = 0; i < map->nr; i++) {
		const struct area *a = &map->areas[i];
		uint64_t from, to;

		if (!clip(a, gpa, len, &from, &to))
			continue;
		for (uint64_t w = from / 64; w * 64 < to; w++) {
			if (~a->bits[w] & mask_of(w, from, to))
				return false;
		}
		return true;
	}
	return false;
}

/* The first page at or after `at` whose bit is `on`, or the number of pages. */
static uint64_t find(const struct area *a, uint64_t at, bool on)
{
	while (at < a->pages) {
		uint64_t word = a->bits[at / 64];

		word = (on ? word : ~word) >> at % 64;
		if (word) {
			at += (uint64_t)__builtin_ctzll(word);
			break;
		}
		at = (at / 64 + 1) * 64;
	}
	return at < a->pages ? at : a->pages;
}

bool vmm_pagemap_next(const struct vmm_pagemap *map, uint64_t gpa, uint64_t *start, uint64_t *len)
{
	for (uint32_t i = 0; i < map->nr; i++) {
		const struct area *a = &map->areas[i];
		uint64_t at = gpa > a->gpa ? (gpa - a->gpa + PAGE - 1) >> SHIFT : 0;

		at = find(a, at, true);
		if (at >= a->pages)
			continue;
		*start = a->gpa + (at << SHIFT);
		*len = (find(a, at, false) - at) << SHIFT;
		return true;
	}
	return false;
}
