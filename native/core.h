/* What every C file shares: guest RAM, the access contract, interrupts, the event loop. */
#ifndef VMM_CORE_H
#define VMM_CORE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

/*
 * House rules. Functions are vmm_<noun>_<verb>, return 0 or -errno, and come in create/destroy
 * pairs. What the guest wrote is copied once and validated before use; a dereference of guest
 * memory carries a SAFETY comment. No function here takes the GIL.
 */

/* cdef: begin */

/* ---- guest RAM: one table, bounds-checked ------------------------------------------------ */

struct vmm_mem;

/* Reserve address space with a guard page at each end and map size bytes into it: from fd, or
 * anonymous private memory when fd is -1. NULL with errno set on failure. */
void *vmm_ram_map(int fd, uint64_t offset, uint64_t size);
void vmm_ram_unmap(void *hva, uint64_t size);
/* The same for a whole file, shared, read-only unless writable. */
void *vmm_file_map(int fd, uint64_t size, int writable);
/* madvise(2): 0 or -errno. */
int vmm_madvise(void *addr, uint64_t len, int advice);

struct vmm_mem *vmm_mem_create(void);
void vmm_mem_destroy(struct vmm_mem *mem);
/* Ranges are added before the guest runs; -EEXIST on overlap, -ENOSPC when the table is full. */
int vmm_mem_add(struct vmm_mem *mem, uint64_t gpa, uint64_t size, void *hva);
/* Host address of [gpa, gpa+len), or NULL unless all of it lies in one range. */
void *vmm_mem_at(const struct vmm_mem *mem, uint64_t gpa, uint64_t len);
/* 0 or -EFAULT; nothing is copied on failure. */
int vmm_mem_read(const struct vmm_mem *mem, uint64_t gpa, void *dst, uint64_t len);
int vmm_mem_write(const struct vmm_mem *mem, uint64_t gpa, const void *src, uint64_t len);

/* One range of the table. advice: what gives its memory back to the host, MADV_DONTNEED (private)
 * or MADV_REMOVE (a shared file), in whole pages of `page` bytes; page is 0 while it may not be. */
struct vmm_ram {
	uint64_t gpa, size;
	uint8_t *hva;
	uint32_t page;
	int advice;
};

/* Allow the range that starts at gpa to be given back, before the guest runs; page is a power of
 * two. -ENOENT, -EINVAL. */
int vmm_mem_lend(struct vmm_mem *mem, uint64_t gpa, uint32_t page, int advice);
/* The nr-th range by address, or -ENOENT past the last. */
int vmm_mem_range(const struct vmm_mem *mem, uint32_t nr, struct vmm_ram *out);
/* Give the whole pages within [gpa, gpa+len) back to the host: from now on they read as zeros and
 * cost nothing until they are touched. Bytes given back, 0 for a range that may not be; -EFAULT
 * unless all of it lies in one range, or what madvise(2) said. */
int64_t vmm_mem_discard(const struct vmm_mem *mem, uint64_t gpa, uint64_t len);

/* ---- buses: ranges that C answers without Python ------------------------------------------ */

struct vmm_bus;
struct vmm_dev; /* what can be put on a bus; see struct vmm_dev below */

struct vmm_bus *vmm_bus_create(void);
void vmm_bus_destroy(struct vmm_bus *bus);
/* The device is not owned. -EEXIST on overlap. May be called while vCPUs run. */
int vmm_bus_add(struct vmm_bus *bus, uint64_t base, uint64_t size, struct vmm_dev *dev);
int vmm_bus_remove(struct vmm_bus *bus, uint64_t base);
/* 0 when C answered, 1 when the access is Python's (or nobody's). */
int vmm_bus_access(struct vmm_bus *bus, uint64_t addr, uint32_t size, uint8_t *data, int is_write);
/* The same for one device, whatever bus it is on; data has room for 8 bytes. */
int vmm_dev_access(struct vmm_dev *dev, uint64_t offset, uint32_t size, uint8_t *data,
		   int is_write);

/* ---- interrupts --------------------------------------------------------------------------- */

enum { VMM_IRQ_NONE, VMM_IRQ_LINE, VMM_IRQ_EVENTFD, VMM_IRQ_WATCHED };

/* One interrupt source. LINE: KVM_IRQ_LINE on vm_fd with this gsi, level-triggered.
 * EVENTFD: an eventfd bound by KVM_IRQFD (MSI, or an edge). NONE: counts only (tests).
 * WATCHED: counts, and signals an eventfd at every change of level and every pulse. */
struct vmm_irq;
struct vmm_irq *vmm_irq_create(int kind, int fd, uint32_t gsi); /* fd is borrowed */
/* One more input of a level-triggered line, which is up while any of its inputs is. The line is
 * driven through its inputs only and outlives them. */
struct vmm_irq *vmm_irq_share(struct vmm_irq *line);
void vmm_irq_destroy(struct vmm_irq *irq);
void vmm_irq_set(struct vmm_irq *irq, int level); /* LINE and NONE; EVENTFD: rising edge pulses */
void vmm_irq_pulse(struct vmm_irq *irq);          /* EVENTFD: signal; LINE: raise; NONE: count */
uint64_t vmm_irq_count(const struct vmm_irq *irq); /* rising edges or pulses so far */
int vmm_irq_level(const struct vmm_irq *irq);

/* One GSI route: to an interrupt chip's pin (msi = 0), or a message (msi = 1). */
struct vmm_route {
	uint32_t gsi, msi;
	uint32_t chip, pin;
	uint64_t address;
	uint32_t data, pad;
};

/* KVM_SET_GSI_ROUTING: replaces the whole table. */
int vmm_irq_route(int vm_fd, const struct vmm_route *routes, uint32_t nr);

/* ---- the I/O thread ------------------------------------------------------------------------ */

struct vmm_loop;

struct vmm_loop *vmm_loop_create(void);  /* starts the thread (all signals blocked) */
void vmm_loop_destroy(struct vmm_loop *loop); /* stops and joins it */
/* Returns after everything the loop was doing when called has finished. */
void vmm_loop_barrier(struct vmm_loop *loop);
/* Keeps the thread on one CPU of the host; 0 or -errno. */
int vmm_loop_pin(struct vmm_loop *loop, uint32_t cpu);
/* Before it sleeps the thread looks for work for `us` microseconds, while work keeps coming
 * within that time. 0: it sleeps at once. */
void vmm_loop_poll(struct vmm_loop *loop, uint32_t us);
/* For tests that want devices without a thread: from borrow to return, both of which wait for the
 * loop's thread, the loop runs on the caller's and there only in vmm_loop_step, which serves what
 * is ready until nothing is, having waited for the first of it. Calls from there run at once. */
void vmm_loop_borrow(struct vmm_loop *loop);
void vmm_loop_step(struct vmm_loop *loop, int timeout_ms);
void vmm_loop_return(struct vmm_loop *loop);

/* ---- byte streams: what the guest printed --------------------------------------------------- */

/* A ring that keeps the last `capacity` bytes written, knows how many there ever were, and can
 * look for byte patterns as they pass. Memory never grows with what the guest prints. */
struct vmm_stream;

struct vmm_stream *vmm_stream_create(uint32_t capacity);
void vmm_stream_destroy(struct vmm_stream *s);
int vmm_stream_write(struct vmm_stream *s, const uint8_t *data, uint32_t len);
/* Copies what is still kept from absolute offset `from`; *start gets the offset of the first
 * byte copied (later than `from` if older bytes are gone). Returns the count. */
uint32_t vmm_stream_read(struct vmm_stream *s, uint64_t from, uint8_t *dst, uint32_t len,
			 uint64_t *start);
uint64_t vmm_stream_total(struct vmm_stream *s);
/* Waits until total() > from, the stream is closed, or the timeout; returns total(). */
uint64_t vmm_stream_wait(struct vmm_stream *s, uint64_t from, int timeout_ms);
void vmm_stream_close(struct vmm_stream *s);
/* Up to 8 patterns of up to 63 bytes. When one passes, its bit is set and the eventfd written.
 * Returns the bit's number, or -errno. */
int vmm_stream_watch(struct vmm_stream *s, const char *pattern, int eventfd);
uint32_t vmm_stream_matched(struct vmm_stream *s);
/* No watch writes this eventfd any more. */
void vmm_stream_unwatch(struct vmm_stream *s, int eventfd);
/* Bytes that can be written before a reader (see native/chario.h) loses some; UINT32_MAX without
 * a reader. */
uint32_t vmm_stream_room(struct vmm_stream *s);
/* Writes what there is room for and returns how much that was; a closed stream swallows all. */
uint32_t vmm_stream_offer(struct vmm_stream *s, const uint8_t *data, uint32_t len);

/* cdef: end */

#define VMM_ACCESS_DONE 0
#define VMM_ACCESS_COLD 1 /* the access is Python's */

/* A device answered in C embeds this first. `access` runs on a vCPU thread, several at once:
 * it locks what it must. offset is relative to the base it was added at; size is 1, 2, 4 or 8;
 * offset + size never passes the end of the range. */
struct vmm_dev {
	int (*access)(struct vmm_dev *dev, uint64_t offset, uint32_t size, uint8_t *data,
		      int is_write);
};

/* A file descriptor served by the I/O thread. `ready` runs on that thread only. Embed it, add it,
 * and remove it before the memory goes: removal returns only once no `ready` is running (unless
 * called from the I/O thread itself). */
struct vmm_source {
	int fd;
	void (*ready)(struct vmm_source *src, uint32_t epoll_events);
};

int vmm_loop_add(struct vmm_loop *loop, struct vmm_source *src, uint32_t epoll_events);
int vmm_loop_modify(struct vmm_loop *loop, struct vmm_source *src, uint32_t epoll_events);
void vmm_loop_remove(struct vmm_loop *loop, struct vmm_source *src);
/* Runs fn(arg) on the I/O thread and waits for it; directly if already there. */
void vmm_loop_call(struct vmm_loop *loop, void (*fn)(void *arg), void *arg);

/* Told that something changed: a stream has room again, an input has data. `notify` runs on the
 * thread that made the change, with no lock of the notifier's held that `notify` could need. */
struct vmm_listener {
	void (*notify)(struct vmm_listener *l);
	struct vmm_listener *next; /* the notifier's */
};

/* `notify` after an offer was cut short and at least a quarter of the ring is free again. */
void vmm_stream_listen(struct vmm_stream *s, struct vmm_listener *l);
/* Returns once no `notify` of this listener is running. */
void vmm_stream_unlisten(struct vmm_stream *s, struct vmm_listener *l);

/* Somebody who takes everything the stream is given, in order. Embed it. */
struct vmm_reader {
	uint64_t at;   /* absolute offset of the next byte to take */
	uint64_t lost; /* bytes overwritten before they were taken */
	bool stop;
	struct vmm_reader *next;
};

/* Takes what is written from now on, and what is still kept of the past if `past`. */
void vmm_stream_attach(struct vmm_stream *s, struct vmm_reader *r, bool past);
void vmm_stream_detach(struct vmm_stream *s, struct vmm_reader *r);
/* Waits for bytes and copies up to len of them, from *start on, without taking them; 0 when the
 * stream was closed or the reader stopped, and nothing is left. */
uint32_t vmm_stream_peek(struct vmm_stream *s, struct vmm_reader *r, uint8_t *dst, uint32_t len,
			 uint64_t *start);
void vmm_stream_take(struct vmm_stream *s, struct vmm_reader *r, uint64_t upto);
void vmm_stream_stop(struct vmm_stream *s, struct vmm_reader *r); /* ends a peek that waits */
/* Waits until the reader took all that was written so far; 0 or -ETIMEDOUT. */
int vmm_stream_drain(struct vmm_stream *s, const struct vmm_reader *r, int timeout_ms);
/* Not taken yet, and overwritten before they were taken. */
uint64_t vmm_stream_backlog(struct vmm_stream *s, const struct vmm_reader *r);
uint64_t vmm_stream_lost(struct vmm_stream *s, const struct vmm_reader *r);

/* CLOCK_MONOTONIC, timeout_ms from now. */
struct timespec vmm_deadline(int timeout_ms);
/* A condition variable that waits on CLOCK_MONOTONIC. */
void vmm_cond_init(pthread_cond_t *cond);

/* A thread that never takes a signal: those are for the main thread. 0 or an errno. */
int vmm_thread_start(pthread_t *thread, void *(*main)(void *arg), void *arg);

static inline uint64_t vmm_get_le(const uint8_t *p, uint32_t size)
{
	uint64_t v = 0;

	for (uint32_t i = 0; i < size && i < 8; i++)
		v |= (uint64_t)p[i] << (8 * i);
	return v;
}

static inline void vmm_put_le(uint8_t *p, uint64_t v, uint32_t size)
{
	for (uint32_t i = 0; i < size && i < 8; i++)
		p[i] = (uint8_t)(v >> (8 * i));
}

#endif
