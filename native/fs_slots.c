/* Numbers for what the guest may name: never pointers, and never the same for something else. */
#include "fs_impl.h"

#include <errno.h>
#include <stdlib.h>

#define FIRST 64

static bool grow(struct fs_slots *s)
{
	const uint32_t nr = s->nr ? s->nr * 2 : FIRST;
	struct fs_slot *slots = realloc(s->slots, nr * sizeof(*slots));

	if (!slots)
		return false;
	for (uint32_t i = nr; i-- > s->nr;) {
		slots[i] = (struct fs_slot){ .next = s->free };
		if (i)
			s->free = i; /* 0 ends the list, and is nobody's number */
	}
	s->slots = slots;
	s->nr = nr;
	return true;
}

uint64_t fs_slots_add(struct fs_slots *s, void *what)
{
	uint32_t i;

	if (s->used >= s->max) {
		errno = ENFILE;
		return 0;
	}
	if (!s->free && !grow(s)) {
		errno = ENOMEM;
		return 0;
	}
	i = s->free;
	s->free = s->slots[i].next;
	s->slots[i].what = what;
	s->used++;
	return (uint64_t)s->slots[i].turn << 32 | i;
}

void *fs_slots_find(const struct fs_slots *s, uint64_t number)
{
	const uint32_t i = (uint32_t)number;

	return i < s->nr && s->slots[i].turn == number >> 32 ? s->slots[i].what : NULL;
}

void fs_slots_remove(struct fs_slots *s, uint64_t number)
{
	const uint32_t i = (uint32_t)number;

	s->slots[i].what = NULL;
	s->slots[i].turn++;
	s->slots[i].next = s->free;
	s->free = i;
	s->used--;
}
