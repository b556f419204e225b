/* PC16550D: the serial port of a PC.
 *
 * The line is infinitely fast and never garbles, so there are no baud rates, parity or framing to
 * model; word length does not mask data. What is kept is everything a driver can see: FIFOs,
 * interrupt priorities, loopback, modem lines, breaks. The far end honours RTS, as a cable with
 * hardware handshake would: nothing arrives at a port that nobody has opened. */
#include "uart.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { RBR_THR_DLL, IER_DLM, IIR_FCR, LCR, MCR, LSR, MSR, SCR, REGISTERS };

enum { IER_RX = 0x01, IER_TX = 0x02, IER_LINE = 0x04, IER_MODEM = 0x08, IER_MASK = 0x0f };
enum {
	IIR_MODEM = 0x00,
	IIR_NONE = 0x01,
	IIR_TX = 0x02,
	IIR_RX = 0x04,
	IIR_LINE = 0x06,
	IIR_TIMEOUT = 0x0c,
	IIR_FIFOS = 0xc0,
};
enum { FCR_ENABLE = 0x01, FCR_CLEAR_RX = 0x02, FCR_CLEAR_TX = 0x04, FCR_KEPT = 0xc9 };
enum { LCR_BREAK = 0x40, LCR_DLAB = 0x80 };
enum { MCR_DTR = 1, MCR_RTS = 2, MCR_OUT1 = 4, MCR_OUT2 = 8, MCR_LOOP = 0x10, MCR_MASK = 0x1f };
enum {
	LSR_DATA = 0x01,
	LSR_OVERRUN = 0x02,
	LSR_PARITY = 0x04,
	LSR_FRAMING = 0x08,
	LSR_BREAK = 0x10,
	LSR_THRE = 0x20,
	LSR_TEMT = 0x40,
	LSR_FIFO_ERROR = 0x80,
	LSR_ERRORS = LSR_OVERRUN | LSR_PARITY | LSR_FRAMING | LSR_BREAK,
};
enum { MSR_DCTS = 1, MSR_DDSR = 2, MSR_TERI = 4, MSR_DDCD = 8, MSR_DELTAS = 0x0f };
enum { MSR_CTS = 0x10, MSR_DSR = 0x20, MSR_RI = 0x40, MSR_DCD = 0x80 };

#define DEPTH 16
/* So many looks at LSR in a row with nothing else to learn from it: the guest polls for input.
 * A driver that starts up looks twice or thrice, and reads RBR unasked after that. */
#define POLLING 16

/* Among a character's LSR error bits: it came from the far end. */
#define FROM_LINE 0x01

struct fifo {
	uint8_t data[DEPTH], flags[DEPTH];
	uint32_t head, len;
};

struct vmm_uart {
	struct vmm_dev dev;
	pthread_mutex_t lock;
	struct vmm_stream *out;
	struct vmm_input *in;
	struct vmm_irq *irq;
	struct vmm_listener room, data;
	uint8_t ier, fcr, lcr, mcr, msr, scr, dll, dlm;
	uint8_t errors; /* LSR bits that stay until it is read */
	uint8_t last;   /* what RBR held */
	struct fifo rx, tx;
	bool tx_pending; /* the THRE interrupt: raised, and not seen yet */
	bool rts_used;
	uint32_t polls;
	struct vmm_uart_stats stats;
};

static uint32_t depth(const struct vmm_uart *u)
{
	return u->fcr & FCR_ENABLE ? DEPTH : 1;
}

static void fifo_push(struct fifo *f, uint8_t c, uint8_t flags)
{
	const uint32_t i = (f->head + f->len++) % DEPTH;

	f->data[i] = c;
	f->flags[i] = flags;
}

/* ---- interrupts: PC16550D §8.5, §8.7 --------------------------------------------------------- */

static uint32_t trigger(const struct vmm_uart *u)
{
	static const uint8_t levels[] = { 1, 4, 8, 14 };

	return levels[u->fcr >> 6];
}

static uint8_t identify(const struct vmm_uart *u)
{
	const bool fifos = u->fcr & FCR_ENABLE;

	if ((u->ier & IER_LINE) && u->errors)
		return IIR_LINE;
	if ((u->ier & IER_RX) && u->rx.len >= (fifos ? trigger(u) : 1))
		return IIR_RX;
	/* Four character times without a character are over at once on an infinitely fast line. */
	if ((u->ier & IER_RX) && u->rx.len)
		return IIR_TIMEOUT;
	if ((u->ier & IER_TX) && u->tx_pending)
		return IIR_TX;
	if ((u->ier & IER_MODEM) && (u->msr & MSR_DELTAS))
		return IIR_MODEM;
	return IIR_NONE;
}

/* A PC's interrupt line passes through OUT2, which loopback forces off. */
static void update(struct vmm_uart *u)
{
	const bool gate = (u->mcr & (MCR_OUT2 | MCR_LOOP)) == MCR_OUT2;

	if (u->irq)
		vmm_irq_set(u->irq, gate && identify(u) != IIR_NONE);
}

/* ---- the receiver ---------------------------------------------------------------------------- */

static void receive(struct vmm_uart *u, uint8_t c, uint8_t flags)
{
	if (u->rx.len == depth(u)) {
		u->errors |= LSR_OVERRUN;
		u->stats.overruns++;
		/* The FIFO keeps what it has; without one the register is overwritten. */
		if (u->fcr & FCR_ENABLE)
			return;
		u->rx.len = 0;
	}
	fifo_push(&u->rx, c, flags);
	if (u->rx.len == 1)
		u->errors |= flags & LSR_ERRORS;
}

static bool welcome(const struct vmm_uart *u)
{
	if (u->mcr & MCR_LOOP)
		return false;
	if ((u->mcr & MCR_RTS) || u->polls >= POLLING)
		return true;
	return !u->rts_used && (u->ier & IER_RX);
}

/* Lets the far end send what fits. */
static void refill(struct vmm_uart *u)
{
	uint8_t buf[DEPTH];
	uint32_t n = depth(u) - u->rx.len;

	if (!u->in || !n || !welcome(u))
		return;
	if (vmm_input_take_break(u->in)) {
		receive(u, 0, LSR_BREAK | LSR_FRAMING);
		return;
	}
	/* A poller takes one at a time and may clear the FIFO next. */
	if (!(u->mcr & MCR_RTS) && !(u->ier & IER_RX))
		n = u->rx.len ? 0 : 1;
	n = vmm_input_pull(u->in, buf, n);
	for (uint32_t i = 0; i < n; i++)
		receive(u, buf[i], FROM_LINE);
}

static void clear_rx(struct vmm_uart *u)
{
	uint8_t buf[DEPTH];
	uint32_t n = 0;

	/* With RTS off the far end had not sent these: a driver that starts up loses nothing. */
	for (uint32_t i = 0; !(u->mcr & MCR_RTS) && i < u->rx.len; i++)
		if (u->rx.flags[(u->rx.head + i) % DEPTH] & FROM_LINE)
			buf[n++] = u->rx.data[(u->rx.head + i) % DEPTH];
	if (n)
		vmm_input_unpull(u->in, buf, n);
	u->rx.len = 0;
	u->errors &= LSR_OVERRUN;
}

/* Reading clears the timeout, and what an empty FIFO raised. More raises it again at once, but
 * an interrupt controller that waits for an edge must have seen the line fall. */
static void drop_rx_interrupt(struct vmm_uart *u)
{
	const uint32_t len = u->rx.len;

	if (len < trigger(u)) {
		u->rx.len = 0;
		update(u);
		u->rx.len = len;
	}
}

static uint8_t read_rbr(struct vmm_uart *u)
{
	struct fifo *f = &u->rx;

	if (f->len) {
		u->last = f->data[f->head];
		f->head = (f->head + 1) % DEPTH;
		f->len--;
		u->stats.rx++;
		drop_rx_interrupt(u);
		if (f->len)
			u->errors |= f->flags[f->head] & LSR_ERRORS;
		else
			refill(u);
	}
	return u->last;
}

/* ---- the transmitter ------------------------------------------------------------------------- */

static void transmit(struct vmm_uart *u)
{
	struct fifo *f = &u->tx;

	while (f->len) {
		const uint32_t run = DEPTH - f->head < f->len ? DEPTH - f->head : f->len;
		const uint32_t n = u->out ? vmm_stream_offer(u->out, &f->data[f->head], run) : run;

		f->head = (f->head + n) % DEPTH;
		f->len -= n;
		u->stats.tx += n;
		if (n < run)
			return;
		u->tx_pending = !f->len;
	}
}

static void write_thr(struct vmm_uart *u, uint8_t c)
{
	/* Writing clears the interrupt; sent at once, it comes back: an edge in between. */
	u->tx_pending = false;
	update(u);
	if (u->mcr & MCR_LOOP) {
		receive(u, c, 0);
		u->tx_pending = !u->tx.len;
	} else if (u->lcr & LCR_BREAK) {
		u->tx_pending = !u->tx.len; /* SOUT is held low: nobody sees it */
	} else if (u->tx.len == depth(u)) {
		u->stats.dropped++;
	} else {
		fifo_push(&u->tx, c, 0);
		transmit(u);
	}
}

/* ---- control registers ----------------------------------------------------------------------- */

static void set_lines(struct vmm_uart *u)
{
	uint8_t now = MSR_CTS | MSR_DSR | MSR_DCD, was = u->msr, delta;

	if (u->mcr & MCR_LOOP)
		now = (u->mcr & MCR_RTS ? MSR_CTS : 0) | (u->mcr & MCR_DTR ? MSR_DSR : 0) |
		      (u->mcr & MCR_OUT1 ? MSR_RI : 0) | (u->mcr & MCR_OUT2 ? MSR_DCD : 0);
	delta = (now ^ was) >> 4;
	if (now & MSR_RI) /* only the trailing edge counts */
		delta &= ~MSR_TERI;
	u->msr = now | (was & MSR_DELTAS) | delta;
}

static void write_ier(struct vmm_uart *u, uint8_t v)
{
	v &= IER_MASK;
	if ((v & ~u->ier & IER_TX) && !u->tx.len)
		u->tx_pending = true;
	u->ier = v;
	refill(u);
}

static void write_fcr(struct vmm_uart *u, uint8_t v)
{
	const bool toggled = (v ^ u->fcr) & FCR_ENABLE;

	/* Bit 0 must be set for the others to be programmed: PC16550D §8.4. */
	if (!(v & FCR_ENABLE))
		v = 0;
	if (toggled || (v & FCR_CLEAR_RX))
		clear_rx(u);
	if ((toggled || (v & FCR_CLEAR_TX)) && u->tx.len) {
		u->stats.dropped += u->tx.len;
		u->tx.len = 0;
		u->tx_pending = true;
	}
	u->fcr = v & FCR_KEPT;
	refill(u);
}

static void write_mcr(struct vmm_uart *u, uint8_t v)
{
	u->mcr = v & MCR_MASK;
	if ((u->mcr & (MCR_RTS | MCR_LOOP)) == MCR_RTS)
		u->rts_used = true;
	set_lines(u);
	refill(u);
}

static uint8_t read_iir(struct vmm_uart *u)
{
	const uint8_t id = identify(u);

	if (id == IIR_TX)
		u->tx_pending = false;
	return id | (u->fcr & FCR_ENABLE ? IIR_FIFOS : 0);
}

static uint8_t read_lsr(struct vmm_uart *u)
{
	uint8_t v = u->errors | (u->tx.len ? 0 : LSR_THRE | LSR_TEMT);

	if (u->tx.len)
		u->polls = 0; /* it waits for the transmitter */
	else if (u->polls < POLLING)
		u->polls++;
	if (!u->rx.len)
		refill(u);
	v |= u->errors | (u->rx.len ? LSR_DATA : 0);
	for (uint32_t i = 0; (u->fcr & FCR_ENABLE) && i < u->rx.len; i++)
		if (u->rx.flags[(u->rx.head + i) % DEPTH] & LSR_ERRORS)
			v |= LSR_FIFO_ERROR;
	u->errors = 0;
	u->rx.flags[u->rx.head] &= FROM_LINE;
	return v;
}

static uint8_t read_register(struct vmm_uart *u, uint32_t reg)
{
	uint8_t v;

	switch (reg) {
	case RBR_THR_DLL:
		return u->lcr & LCR_DLAB ? u->dll : read_rbr(u);
	case IER_DLM:
		return u->lcr & LCR_DLAB ? u->dlm : u->ier;
	case IIR_FCR:
		return read_iir(u);
	case LCR:
		return u->lcr;
	case MCR:
		return u->mcr;
	case LSR:
		return read_lsr(u);
	case MSR:
		v = u->msr;
		u->msr &= ~MSR_DELTAS;
		return v;
	default:
		return u->scr;
	}
}

static void write_register(struct vmm_uart *u, uint32_t reg, uint8_t v)
{
	switch (reg) {
	case RBR_THR_DLL:
		if (u->lcr & LCR_DLAB)
			u->dll = v;
		else
			write_thr(u, v);
		break;
	case IER_DLM:
		if (u->lcr & LCR_DLAB)
			u->dlm = v;
		else
			write_ier(u, v);
		break;
	case IIR_FCR:
		write_fcr(u, v);
		break;
	case LCR:
		u->stats.breaks += (v & ~u->lcr & LCR_BREAK) != 0;
		u->lcr = v;
		break;
	case MCR:
		write_mcr(u, v);
		break;
	case SCR:
		u->scr = v;
		break;
	default: /* LSR and MSR are not for writing outside a factory */
		break;
	}
}

/* A wider access is one byte after the other, as the bus would split it. */
static int uart_access(struct vmm_dev *dev, uint64_t offset, uint32_t size, uint8_t *data,
		       int is_write)
{
	struct vmm_uart *u = (struct vmm_uart *)dev;

	pthread_mutex_lock(&u->lock);
	u->stats.accesses++;
	for (uint32_t i = 0; i < size; i++) {
		const uint32_t reg = (offset + i) % REGISTERS;

		if (is_write || (reg != LSR && reg != RBR_THR_DLL))
			u->polls = 0;
		if (is_write)
			write_register(u, reg, data[i]);
		else
			data[i] = read_register(u, reg);
		update(u);
	}
	pthread_mutex_unlock(&u->lock);
	return VMM_ACCESS_DONE;
}

/* ---- what the world says --------------------------------------------------------------------- */

static void on_room(struct vmm_listener *l)
{
	struct vmm_uart *u = (void *)((char *)l - offsetof(struct vmm_uart, room));

	pthread_mutex_lock(&u->lock);
	transmit(u);
	update(u);
	pthread_mutex_unlock(&u->lock);
}

static void on_data(struct vmm_listener *l)
{
	struct vmm_uart *u = (void *)((char *)l - offsetof(struct vmm_uart, data));

	pthread_mutex_lock(&u->lock);
	refill(u);
	update(u);
	pthread_mutex_unlock(&u->lock);
}

/* The state after MR, PC16550D §8.0 table I; the scratch and divisor registers survive it. */
static void master_reset(struct vmm_uart *u)
{
	u->ier = u->fcr = u->lcr = u->mcr = u->errors = 0;
	u->rx.len = u->tx.len = 0;
	u->tx_pending = u->rts_used = false;
	u->polls = 0;
	u->msr = MSR_CTS | MSR_DSR | MSR_DCD;
}

struct vmm_uart *vmm_uart_create(struct vmm_stream *out, struct vmm_input *in,
				 struct vmm_irq *irq)
{
	struct vmm_uart *u = calloc(1, sizeof(*u));

	if (!u)
		return NULL;
	u->dev.access = uart_access;
	u->out = out;
	u->in = in;
	u->irq = irq;
	u->dll = 12; /* 9600 baud, as firmware leaves it */
	pthread_mutex_init(&u->lock, NULL);
	master_reset(u);
	u->room.notify = on_room;
	u->data.notify = on_data;
	if (out)
		vmm_stream_listen(out, &u->room);
	if (in)
		vmm_input_listen(in, &u->data);
	return u;
}

void vmm_uart_destroy(struct vmm_uart *u)
{
	if (!u)
		return;
	if (u->out)
		vmm_stream_unlisten(u->out, &u->room);
	if (u->in)
		vmm_input_unlisten(u->in, &u->data);
	pthread_mutex_destroy(&u->lock);
	free(u);
}

void vmm_uart_reset(struct vmm_uart *u)
{
	pthread_mutex_lock(&u->lock);
	master_reset(u);
	update(u);
	pthread_mutex_unlock(&u->lock);
}

struct vmm_dev *vmm_uart_dev(struct vmm_uart *u)
{
	return &u->dev;
}

void vmm_uart_stats(struct vmm_uart *u, struct vmm_uart_stats *stats)
{
	pthread_mutex_lock(&u->lock);
	*stats = u->stats;
	pthread_mutex_unlock(&u->lock);
}
