/* Characters in and out: a sink that empties a stream into a file descriptor, and an input that
 * a terminal, a pipe, a file or Python fills. Shared by every console device. */
#ifndef VMM_CHARIO_H
#define VMM_CHARIO_H

#include "core.h"

/* cdef: begin */

/* ---- sink: stream -> file descriptor ------------------------------------------------------ */

struct vmm_sink;

/* Starts a thread (all signals blocked) that writes to fd what the stream is given, from what it
 * still keeps on. Nobody else ever waits for fd: a reader that stops only makes the stream's room
 * end. fd stays the caller's. After `limit` bytes (0: none) one line says so and the rest is
 * dropped. NULL with errno set on failure. */
struct vmm_sink *vmm_sink_create(struct vmm_stream *stream, int fd, uint64_t limit);
/* Ends the thread, however stuck fd is; what is not written by then is dropped and counted. */
void vmm_sink_destroy(struct vmm_sink *sink);
/* Waits until all that the stream was given so far is written; 0 or -ETIMEDOUT. */
int vmm_sink_flush(struct vmm_sink *sink, int timeout_ms);
/* 0, or the -errno (EPIPE, ENOSPC, EIO ...) after which everything is dropped. */
int vmm_sink_error(const struct vmm_sink *sink);
uint64_t vmm_sink_written(const struct vmm_sink *sink);
uint64_t vmm_sink_dropped(const struct vmm_sink *sink);

/* ---- input: a bounded FIFO of bytes for the guest ------------------------------------------ */

struct vmm_input;

enum {
	VMM_INPUT_QUIT = 1, /* Ctrl-A x */
	VMM_INPUT_HELP = 2, /* Ctrl-A h */
	VMM_INPUT_EOF = 4,  /* the source ended */
};

struct vmm_input *vmm_input_create(uint32_t capacity);
/* The source is taken away first; no consumer may listen any more. */
void vmm_input_destroy(struct vmm_input *in);
/* Accepts as much as there is room for, and returns how much that was. */
uint32_t vmm_input_push(struct vmm_input *in, const uint8_t *data, uint32_t len);
uint32_t vmm_input_pull(struct vmm_input *in, uint8_t *dst, uint32_t len);
uint32_t vmm_input_level(struct vmm_input *in);
/* Waits until there is room, at most timeout_ms; returns the room. */
uint32_t vmm_input_wait(struct vmm_input *in, int timeout_ms);
/* Waits until the consumer took everything; 0 or -ETIMEDOUT. */
int vmm_input_drain(struct vmm_input *in, int timeout_ms);
/* Bytes accepted since creation. */
uint64_t vmm_input_total(struct vmm_input *in);
/* A line break (serial: the line held low). */
void vmm_input_break(struct vmm_input *in);
/* No more input will come. */
void vmm_input_close(struct vmm_input *in);
/* Closed, and everything was pulled. */
int vmm_input_eof(struct vmm_input *in);

/* Feeds the input from fd (tty, pipe, socket, file, /dev/null) on the I/O thread, never faster
 * than the guest takes it. Whatever happens sets a VMM_INPUT_* bit and writes eventfd (or -1).
 * With `escapes`, Ctrl-A is a prefix if fd is a terminal: x quit, h help, b break, a Ctrl-A.
 * fd stays the caller's. 0 or -errno; -EBUSY when there is a source already. */
int vmm_input_source(struct vmm_input *in, struct vmm_loop *loop, int fd, int escapes,
		     int eventfd);
/* Returns once the I/O thread is done with it. */
void vmm_input_unsource(struct vmm_input *in);
/* Makes the source look again: after being moved to the terminal's foreground. Not while another
 * thread sets or takes the source away. */
void vmm_input_kick(struct vmm_input *in);
/* VMM_INPUT_* bits since the last call. */
uint32_t vmm_input_events(struct vmm_input *in);

/* cdef: end */

/* `notify` when bytes came after a pull left none, on a break, and at the end. */
void vmm_input_listen(struct vmm_input *in, struct vmm_listener *l);
/* Returns once no `notify` of this listener is running. */
void vmm_input_unlisten(struct vmm_input *in, struct vmm_listener *l);
/* Puts bytes that were pulled back to the front: at most VMM_INPUT_SPARE over capacity. */
#define VMM_INPUT_SPARE 64
void vmm_input_unpull(struct vmm_input *in, const uint8_t *data, uint32_t len);
/* True once for each vmm_input_break. */
bool vmm_input_take_break(struct vmm_input *in);

/* Writes the eventfd once when half of the FIFO is free; -1 forgets it. */
void vmm_input_want_room(struct vmm_input *in, int eventfd);
void vmm_input_raise(struct vmm_input *in, uint32_t bit, int eventfd);

/* The source of an input: native/feed.c. */
struct vmm_feed;
int vmm_feed_create(struct vmm_feed **feed, struct vmm_input *in, struct vmm_loop *loop, int fd,
		    int escapes, int eventfd);
void vmm_feed_destroy(struct vmm_feed *f);
void vmm_feed_kick(struct vmm_feed *f);

/* How a descriptor that may be shared with other processes is used without ever blocking. */
enum vmm_chan {
	VMM_CHAN_FILE,	   /* regular file: read and write do not wait */
	VMM_CHAN_NONBLOCK, /* EAGAIN says when to wait */
	VMM_CHAN_SOCKET,   /* MSG_DONTWAIT */
	VMM_CHAN_BLOCK,	   /* one byte at a time, after poll */
};

/* Our own descriptor for what fd refers to, and how to use it; access is O_RDONLY or O_WRONLY.
 * Never changes the flags of an open file that somebody else may share. */
int vmm_chan_open(int fd, int access, enum vmm_chan *chan);

#endif
