/* PL011: a serial port, answered on the vCPU thread. Arm DDI 0183G.
 *
 * The line is infinitely fast and never garbles: baud rates and framing are kept and mean nothing,
 * and four bytes' time without a byte (the receive timeout) is over at once. Nothing arrives at a
 * receiver that is off, or that nobody listens to. There is no DMA and no IrDA. */
#include "pl011.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Registers. DDI 0183G §3.2. */
enum {
	DR = 0x00,
	RSR_ECR = 0x04,
	FR = 0x18,
	ILPR = 0x20,
	IBRD = 0x24,
	FBRD = 0x28,
	LCR_H = 0x2c,
	CR = 0x30,
	IFLS = 0x34,
	IMSC = 0x38,
	RIS = 0x3c,
	MIS = 0x40,
	ICR = 0x44,
	DMACR = 0x48,
	IDENTITY = 0xfe0,
	SIZE = 0x1000,
};

/* In a received character, and in RSR without the shift. */
enum { DR_BREAK = 1 << 10, DR_OVERRUN = 1 << 11, DR_SHIFT = 8, RSR_MASK = 0xf };
enum { FR_CTS = 1, FR_DSR = 2, FR_DCD = 4, FR_BUSY = 8, FR_RXFE = 0x10, FR_TXFF = 0x20,
       FR_RXFF = 0x40, FR_TXFE = 0x80, FR_RI = 0x100 };
enum { LCR_BREAK = 1, LCR_FIFOS = 0x10, LCR_MASK = 0xff };
enum { CR_ENABLE = 1, CR_LOOP = 0x80, CR_TXE = 0x100, CR_RXE = 0x200, CR_DTR = 0x400,
       CR_RTS = 0x800, CR_OUT1 = 0x1000, CR_OUT2 = 0x2000, CR_MASK = 0xff87 };
enum { INT_RI = 1, INT_CTS = 2, INT_DCD = 4, INT_DSR = 8, INT_RX = 0x10, INT_TX = 0x20, INT_TIMEOUT = 0x40, INT_BREAK = 0x200, INT_OVERRUN = 0x400,
       INT_MASK = 0x7ff };

#define DEPTH 16
/* So many looks at FR in a row with nothing to wait for but input: the guest polls for it. A
 * driver that starts up looks once, and throws away what it finds. */
#define POLLING 16
/* In the FIFO, beside a character and its errors: it came from the far end. */
#define FROM_LINE 0x8000

static const uint8_t identity[] = { 0x11, 0x10, 0x34, 0x00, 0x0d, 0xf0, 0x05, 0xb1 };

struct fifo {
	uint16_t data[DEPTH];
	uint32_t head, len;
};

struct vmm_pl011 {
	struct vmm_dev dev;
	pthread_mutex_t lock;
	struct vmm_stream *out;
	struct vmm_input *in;
	struct vmm_irq *irq;
	struct vmm_listener room, data;
	uint32_t ilpr, ibrd, fbrd, lcr, cr, ifls, imsc, ris, dmacr;
	uint32_t errors; /* RSR */
	uint32_t polls;
	struct fifo rx, tx;
	struct vmm_pl011_stats stats;
};

static uint32_t depth(const struct vmm_pl011 *u)
{
	return u->lcr & LCR_FIFOS ? DEPTH : 1;
}

static void push(struct fifo *f, uint16_t c)
{
	f->data[(f->head + f->len++) % DEPTH] = c;
}

static uint16_t pop(struct fifo *f)
{
	const uint16_t c = f->data[f->head];

	f->head = (f->head + 1) % DEPTH;
	f->len--;
	return c;
}

/* 1/8, 1/4, 1/2, 3/4, 7/8 of the FIFO; what is reserved is taken for the last. DDI 0183G §3.3.9. */
static uint32_t trigger(uint32_t select)
{
	static const uint8_t levels[] = { 2, 4, 8, 12, 14, 14, 14, 14 };

	return levels[select & 7];
}

static void update(struct vmm_pl011 *u)
{
	if (u->irq)
		vmm_irq_set(u->irq, (u->ris & u->imsc) != 0);
}

/* ---- the receiver ---------------------------------------------------------------------------- */

/* DDI 0183G §2.8.2: the receive interrupt is up from its level on, without FIFOs from one byte;
 * the timeout as long as there is something to read. */
static void settle_rx(struct vmm_pl011 *u)
{
	const uint32_t level = u->lcr & LCR_FIFOS ? trigger(u->ifls >> 3) : 1;

	u->ris &= ~(u->rx.len < level ? INT_RX : 0u);
	u->ris &= ~(u->rx.len ? 0u : INT_TIMEOUT);
}

static void receive(struct vmm_pl011 *u, uint16_t c)
{
	if (u->rx.len == depth(u)) {
		/* Only loopback gets here: the far end sends what there is room for. */
		u->errors |= DR_OVERRUN >> DR_SHIFT;
		u->ris |= INT_OVERRUN;
		return;
	}
	push(&u->rx, c);
	if (c & DR_BREAK)
		u->ris |= INT_BREAK;
	u->ris |= INT_TIMEOUT;
	if (u->rx.len >= (u->lcr & LCR_FIFOS ? trigger(u->ifls >> 3) : 1))
		u->ris |= INT_RX;
}

static bool welcome(const struct vmm_pl011 *u)
{
	if ((u->cr & (CR_ENABLE | CR_RXE | CR_LOOP)) != (CR_ENABLE | CR_RXE))
		return false;
	return (u->imsc & (INT_RX | INT_TIMEOUT)) || u->polls >= POLLING;
}

/* Lets the far end send what fits. */
static void refill(struct vmm_pl011 *u)
{
	uint8_t buf[DEPTH];
	uint32_t n = depth(u) - u->rx.len;

	if (!u->in || !n || !welcome(u))
		return;
	if (vmm_input_take_break(u->in)) {
		receive(u, DR_BREAK);
		return;
	}
	n = vmm_input_pull(u->in, buf, n);
	for (uint32_t i = 0; i < n; i++)
		receive(u, buf[i] | FROM_LINE);
}

/* What is thrown away unread goes back to the far end: a driver that starts up loses nothing. */
static void clear_rx(struct vmm_pl011 *u)
{
	uint8_t buf[DEPTH];
	uint32_t n = 0;

	while (u->rx.len) {
		const uint16_t c = pop(&u->rx);

		if (c & FROM_LINE)
			buf[n++] = (uint8_t)c;
	}
	if (n)
		vmm_input_unpull(u->in, buf, n);
}

static uint32_t read_data(struct vmm_pl011 *u)
{
	uint32_t c = 0;

	if (u->rx.len) {
		c = pop(&u->rx) & ~FROM_LINE;
		u->errors = c >> DR_SHIFT & RSR_MASK;
		u->stats.rx++;
		settle_rx(u);
		/* More is as good as a new byte: it raises again what was cleared. */
		if (u->rx.len)
			u->ris |= INT_TIMEOUT;
		else
			refill(u);
	}
	return c;
}

/* ---- the transmitter ------------------------------------------------------------------------- */

/* The interrupt comes when the FIFO passes its level on the way down. DDI 0183G §2.8.3. */
static void sent(struct vmm_pl011 *u, uint32_t before)
{
	const uint32_t level = u->lcr & LCR_FIFOS ? trigger(u->ifls) : 0;

	if (u->tx.len <= level && before > u->tx.len)
		u->ris |= INT_TX;
}

static void transmit(struct vmm_pl011 *u)
{
	const uint32_t before = u->tx.len;
	uint8_t c;

	while (u->tx.len) {
		c = (uint8_t)u->tx.data[u->tx.head];
		if (u->out && !vmm_stream_offer(u->out, &c, 1))
			break;
		pop(&u->tx);
		u->stats.tx++;
	}
	sent(u, before);
}

static void write_data(struct vmm_pl011 *u, uint8_t c)
{
	if ((u->cr & (CR_ENABLE | CR_TXE)) != (CR_ENABLE | CR_TXE)) {
		u->stats.dropped++;
		return;
	}
	if (u->cr & CR_LOOP) {
		if (u->cr & CR_RXE)
			receive(u, c);
		u->ris |= INT_TX;
	} else if (u->lcr & LCR_BREAK) {
		u->ris |= INT_TX; /* the line is held low: nobody sees it */
	} else if (u->tx.len == depth(u)) {
		u->stats.dropped++;
	} else {
		push(&u->tx, c);
		/* Written above the level, and the interrupt is served. */
		if (u->tx.len > (u->lcr & LCR_FIFOS ? trigger(u->ifls) : 0))
			u->ris &= ~INT_TX;
		transmit(u);
	}
}

/* ---- registers ------------------------------------------------------------------------------- */

/* Loopback has the outputs for inputs. DDI 0183G §2.4.4. */
static uint32_t modem_lines(const struct vmm_pl011 *u)
{
	if (!(u->cr & CR_LOOP))
		return FR_CTS | FR_DSR | FR_DCD;
	return (u->cr & CR_RTS ? FR_CTS : 0) | (u->cr & CR_DTR ? FR_DSR : 0) |
	       (u->cr & CR_OUT1 ? FR_DCD : 0) | (u->cr & CR_OUT2 ? FR_RI : 0);
}

static void write_cr(struct vmm_pl011 *u, uint32_t v)
{
	uint32_t changed = modem_lines(u);

	u->cr = v & CR_MASK;
	changed ^= modem_lines(u);
	u->ris |= (changed & FR_RI ? INT_RI : 0) | (changed & FR_CTS ? INT_CTS : 0) |
		  (changed & FR_DCD ? INT_DCD : 0) | (changed & FR_DSR ? INT_DSR : 0);
	refill(u);
}

static uint32_t flags(const struct vmm_pl011 *u)
{
	uint32_t v = modem_lines(u);

	v |= u->rx.len ? 0 : FR_RXFE;
	v |= u->rx.len == depth(u) ? FR_RXFF : 0;
	v |= u->tx.len ? FR_BUSY : FR_TXFE;
	v |= u->tx.len >= depth(u) ? FR_TXFF : 0;
	return v;
}

static void write_lcr(struct vmm_pl011 *u, uint32_t v)
{
	/* Turning the FIFOs on or off empties them, as disabling flushes. DDI 0183G §3.3.7. */
	if ((v ^ u->lcr) & LCR_FIFOS) {
		u->stats.dropped += u->tx.len;
		u->tx.len = 0;
		clear_rx(u);
	}
	u->lcr = v & LCR_MASK;
	settle_rx(u);
	refill(u);
}

static uint32_t read_register(struct vmm_pl011 *u, uint64_t offset)
{
	switch (offset) {
	case DR:
		return read_data(u);
	case RSR_ECR:
		return u->errors;
	case FR:
		u->polls = u->tx.len || u->polls >= POLLING ? u->polls : u->polls + 1;
		refill(u);
		return flags(u);
	case ILPR:
		return u->ilpr;
	case IBRD:
		return u->ibrd;
	case FBRD:
		return u->fbrd;
	case LCR_H:
		return u->lcr;
	case CR:
		return u->cr;
	case IFLS:
		return u->ifls;
	case IMSC:
		return u->imsc;
	case RIS:
		return u->ris;
	case MIS:
		return u->ris & u->imsc;
	case DMACR:
		return u->dmacr;
	default:
		return offset >= IDENTITY ? identity[(offset - IDENTITY) / 4] : 0;
	}
}

static void write_register(struct vmm_pl011 *u, uint64_t offset, uint32_t v)
{
	switch (offset) {
	case DR:
		write_data(u, (uint8_t)v);
		break;
	case RSR_ECR:
		u->errors = 0;
		break;
	case ILPR:
		u->ilpr = v & 0xff;
		break;
	case IBRD:
		u->ibrd = v & 0xffff;
		break;
	case FBRD:
		u->fbrd = v & 0x3f;
		break;
	case LCR_H:
		write_lcr(u, v);
		break;
	case CR:
		write_cr(u, v);
		break;
	case IFLS:
		u->ifls = v & 0x3f;
		settle_rx(u);
		break;
	case IMSC:
		u->imsc = v & INT_MASK;
		refill(u);
		break;
	case ICR:
		u->ris &= ~v;
		break;
	case DMACR:
		u->dmacr = v & 7;
		break;
	default:
		break;
	}
}

/* Registers are 32 bits apart. Narrower accesses to their start are as good as whole ones: early
 * consoles write bytes. Anything else reads zeros and writes nothing. */
static int pl011_access(struct vmm_dev *dev, uint64_t offset, uint32_t size, uint8_t *data,
			int is_write)
{
	struct vmm_pl011 *u = (struct vmm_pl011 *)dev;
	const bool known = offset % 4 == 0 && size <= 4 && offset < SIZE;

	pthread_mutex_lock(&u->lock);
	u->stats.accesses++;
	if (is_write)
		u->polls = 0;
	if (is_write && known)
		write_register(u, offset, (uint32_t)vmm_get_le(data, size));
	else if (!is_write)
		vmm_put_le(data, known ? read_register(u, offset) : 0, size);
	update(u);
	pthread_mutex_unlock(&u->lock);
	return VMM_ACCESS_DONE;
}

/* ---- what the world says --------------------------------------------------------------------- */

static void on_room(struct vmm_listener *l)
{
	struct vmm_pl011 *u = (void *)((char *)l - offsetof(struct vmm_pl011, room));

	pthread_mutex_lock(&u->lock);
	transmit(u);
	update(u);
	pthread_mutex_unlock(&u->lock);
}

static void on_data(struct vmm_listener *l)
{
	struct vmm_pl011 *u = (void *)((char *)l - offsetof(struct vmm_pl011, data));

	pthread_mutex_lock(&u->lock);
	refill(u);
	update(u);
	pthread_mutex_unlock(&u->lock);
}

/* DDI 0183G table 3-1. */
static void to_reset(struct vmm_pl011 *u)
{
	u->ilpr = u->ibrd = u->fbrd = u->lcr = u->imsc = u->ris = u->dmacr = u->errors = 0;
	u->cr = CR_TXE | CR_RXE;
	u->ifls = 0x12;
	u->rx.len = u->tx.len = u->polls = 0;
}

struct vmm_pl011 *vmm_pl011_create(struct vmm_stream *out, struct vmm_input *in,
				   struct vmm_irq *irq)
{
	struct vmm_pl011 *u = calloc(1, sizeof(*u));

	if (!u)
		return NULL;
	u->dev.access = pl011_access;
	u->out = out;
	u->in = in;
	u->irq = irq;
	pthread_mutex_init(&u->lock, NULL);
	to_reset(u);
	u->room.notify = on_room;
	u->data.notify = on_data;
	if (out)
		vmm_stream_listen(out, &u->room);
	if (in)
		vmm_input_listen(in, &u->data);
	return u;
}

void vmm_pl011_destroy(struct vmm_pl011 *u)
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

void vmm_pl011_reset(struct vmm_pl011 *u)
{
	pthread_mutex_lock(&u->lock);
	to_reset(u);
	update(u);
	pthread_mutex_unlock(&u->lock);
}

struct vmm_dev *vmm_pl011_dev(struct vmm_pl011 *u)
{
	return &u->dev;
}

void vmm_pl011_stats(struct vmm_pl011 *u, struct vmm_pl011_stats *stats)
{
	pthread_mutex_lock(&u->lock);
	*stats = u->stats;
	pthread_mutex_unlock(&u->lock);
}
