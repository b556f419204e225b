/* Guest RAM: reserved mappings with guard pages, one table of ranges, checked access. */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_RANGES 64
/* A huge page on every architecture we know: RAM starts on one so that THP can back it. */
#define RAM_ALIGN (2ULL << 20)

struct vmm_mem {
	uint32_t nr;
	struct vmm_ram ram[MAX_RANGES]; /* sorted by gpa, disjoint */
};

/* The reservation is size rounded up, plus one RAM_ALIGN of guard before and after. */
static uint64_t reserve_size(uint64_t size)
{
	return ((size + RAM_ALIGN - 1) & ~(RAM_ALIGN - 1)) + 2 * RAM_ALIGN;
}

static void *map(int fd, uint64_t offset, uint64_t size, int prot)
{
	const uint64_t total = reserve_size(size);
	uint8_t *base, *ram, *got;
	uint64_t head;

	if (!size || size > UINT64_MAX / 4) {
		errno = EINVAL;
		return NULL;
	}
	base = mmap(NULL, total + RAM_ALIGN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
		    -1, 0);
	if (base == MAP_FAILED)
		return NULL;
	/* Trim to an aligned reservation so that unmap can find it again from hva and size. */
	head = -(uintptr_t)base & (RAM_ALIGN - 1);
	if (head)
		munmap(base, head);
	if (RAM_ALIGN - head)
		munmap(base + head + total, RAM_ALIGN - head);
	base += head;
	ram = base + RAM_ALIGN;
	got = mmap(ram, size, prot,
		   MAP_FIXED | MAP_NORESERVE |
			   (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED),
		   fd, fd < 0 ? 0 : (off_t)offset);
	if (got == MAP_FAILED) {
		const int saved = errno;

		munmap(base, total);
		errno = saved;
		return NULL;
	}
	return got;
}

void *vmm_ram_map(int fd, uint64_t offset, uint64_t size)
{
	return map(fd, offset, size, PROT_READ | PROT_WRITE);
}

void *vmm_file_map(int fd, uint64_t size, int writable)
{
	return map(fd, 0, size, writable ? PROT_READ | PROT_WRITE : PROT_READ);
}

void vmm_ram_unmap(void *hva, uint64_t size)
{
	if (hva)
		munmap((uint8_t *)hva - RAM_ALIGN, reserve_size(size));
}

struct vmm_mem *vmm_mem_create(void)
{
	return calloc(1, sizeof(struct vmm_mem));
}

void vmm_mem_destroy(struct vmm_mem *mem)
{
	free(mem);
}

int vmm_mem_add(struct vmm_mem *mem, uint64_t gpa, uint64_t size, void *hva)
{
	uint32_t at = 0;

	if (!size || gpa + size < gpa || !hva)
		return -EINVAL;
	if (mem->nr == MAX_RANGES)
		return -ENOSPC;
	while (at < mem->nr && mem->ram[at].gpa < gpa)
		at++;
	if (at && mem->ram[at - 1].gpa + mem->ram[at - 1].size > gpa)
		return -EEXIST;
	if (at < mem->nr && gpa + size > mem->ram[at].gpa)
		return -EEXIST;
	memmove(&mem->ram[at + 1], &mem->ram[at], (mem->nr - at) * sizeof(mem->ram[0]));
	mem->ram[at] = (struct vmm_ram){ .gpa = gpa, .size = size, .hva = hva };
	mem->nr++;
	return 0;
}

void *vmm_mem_at(const struct vmm_mem *mem, uint64_t gpa, uint64_t len)
{
	for (uint32_t i = 0; i < mem->nr; i++) {
		const struct vmm_ram *r = &mem->ram[i];

		/* Subtractions only: gpa + len may wrap, these cannot. */
		if (gpa >= r->gpa && gpa - r->gpa < r->size)
			return len <= r->size - (gpa - r->gpa) ? r->hva + (gpa - r->gpa) : NULL;
	}
	return NULL;
}

/* Bytes of [gpa, gpa+len) that lie in gpa's own range, or 0. */
static uint64_t run_length(const struct vmm_mem *mem, uint64_t gpa, uint64_t len)
{
	for (uint32_t i = 0; i < mem->nr; i++) {
		const struct vmm_ram *r = &mem->ram[i];

		if (gpa >= r->gpa && gpa - r->gpa < r->size) {
			const uint64_t left = r->size - (gpa - r->gpa);

			return len < left ? len : left;
		}
	}
	return 0;
}

static int copy(const struct vmm_mem *mem, uint64_t gpa, uint8_t *host, uint64_t len, bool to_guest)
{
	/* First pass proves every byte is RAM, so that failure copies nothing. */
	for (uint64_t done = 0, n; done < len; done += n) {
		if (gpa + done < gpa)
			return -EFAULT;
		n = run_length(mem, gpa + done, len - done);
		if (!n)
			return -EFAULT;
	}
	for (uint64_t done = 0, n; done < len; done += n) {
		uint8_t *p;

		n = run_length(mem, gpa + done, len - done);
		p = vmm_mem_at(mem, gpa + done, n);
		/* SAFETY: the first pass found n bytes of RAM here and ranges never go away. */
		if (to_guest)
			memcpy(p, host + done, n);
		else
			memcpy(host + done, p, n);
	}
	return 0;
}

int vmm_mem_read(const struct vmm_mem *mem, uint64_t gpa, void *dst, uint64_t len)
{
	return copy(mem, gpa, dst, len, false);
}

int vmm_mem_write(const struct vmm_mem *mem, uint64_t gpa, const void *src, uint64_t len)
{
	return copy(mem, gpa, (uint8_t *)(uintptr_t)src, len, true);
}

int vmm_mem_lend(struct vmm_mem *mem, uint64_t gpa, uint32_t page, int advice)
{
	if (!page || (page & (page - 1)))
		return -EINVAL;
	for (uint32_t i = 0; i < mem->nr; i++) {
		struct vmm_ram *r = &mem->ram[i];

		if (r->gpa != gpa)
			continue;
		r->page = page;
		r->advice = advice;
		return 0;
	}
	return -ENOENT;
}

int vmm_mem_range(const struct vmm_mem *mem, uint32_t nr, struct vmm_ram *out)
{
	if (nr >= mem->nr)
		return -ENOENT;
	*out = mem->ram[nr];
	return 0;
}

int64_t vmm_mem_discard(const struct vmm_mem *mem, uint64_t gpa, uint64_t len)
{
	for (uint32_t i = 0; i < mem->nr; i++) {
		const struct vmm_ram *r = &mem->ram[i];
		uint64_t start, end;

		if (gpa < r->gpa || gpa - r->gpa >= r->size)
			continue;
		start = gpa - r->gpa;
		if (len > r->size - start)
			return -EFAULT;
		if (!r->page)
			return 0;
		/* A page that is only partly meant stays: it has somebody else's bytes too. */
		end = (start + len) & ~(uint64_t)(r->page - 1);
		start = (start + r->page - 1) & ~(uint64_t)(r->page - 1);
		if (start >= end)
			return 0;
		/* SAFETY: within the range; nothing is read or written, the kernel drops pages. */
		return madvise(r->hva + start, end - start, r->advice) ? -errno
								       : (int64_t)(end - start);
	}
	return -EFAULT;
}

int vmm_madvise(void *addr, uint64_t len, int advice)
{
	return madvise(addr, len, advice) ? -errno : 0;
}
