/*
 * ring: a virtio device driven by hand. Finds an entropy device among the virtio-mmio slots,
 * negotiates VERSION_1, sets up a split virtqueue of 4 descriptors, offers one 64-byte buffer
 * and polls the used ring; then once more, to see the indices move on.
 * virtio-v1.3 §2.7, §3.1, §4.2, §5.4.
 *
 * Prints:	ring: virtio-rng at ADDRESS
 *		ring: 2 buffers used
 * Exit value:	0; 1..7 the check that failed
 */
#include "payload.h"

#define MMIO_FIRST	0xfeb00000
#define MMIO_END	0xfeb20000
#define MMIO_STEP	0x200

/* Registers. virtio-v1.3 §4.2.2. */
#define MAGIC		0x000
#define VERSION		0x004
#define DEVICE_ID	0x008
#define FEATURES	0x010
#define FEATURES_SEL	0x014
#define DRV_FEATURES	0x020
#define DRV_FEATURES_SEL 0x024
#define QUEUE_SEL	0x030
#define QUEUE_SIZE_MAX	0x034
#define QUEUE_SIZE	0x038
#define QUEUE_READY	0x044
#define QUEUE_NOTIFY	0x050
#define STATUS		0x070
#define QUEUE_DESC	0x080
#define QUEUE_DRIVER	0x090
#define QUEUE_DEVICE	0x0a0

#define S_ACKNOWLEDGE	1
#define S_DRIVER	2
#define S_DRIVER_OK	4
#define S_FEATURES_OK	8

#define ID_RNG		4
#define SIZE		4
#define BUFFER		64
#define F_WRITE		2

	.text
	.globl	main
main:
	mov	$MMIO_FIRST, %ebx
1:	cmpl	$0x74726976, MAGIC(%ebx)	/* "virt" */
	jne	2f
	cmpl	$ID_RNG, DEVICE_ID(%ebx)
	je	3f
2:	add	$MMIO_STEP, %ebx
	cmp	$MMIO_END, %ebx
	jb	1b
	PRINT	"ring: no entropy device\n"
	EXIT	1
3:	PRINT	"ring: virtio-rng at "
	mov	%ebx, %eax
	call	puthex
	PRINT	"\n"
	cmpl	$2, VERSION(%ebx)
	EXPECT	je, 2, "ring: not a modern device"

	call	negotiate
	call	set_up_queue
	movl	$S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK | S_DRIVER_OK, STATUS(%ebx)

	mov	$1, %ecx
	call	one_buffer
	mov	$2, %ecx
	call	one_buffer
	PRINT	"ring: 2 buffers used\n"
	EXIT	0

negotiate:
	movl	$0, STATUS(%ebx)
4:	cmpl	$0, STATUS(%ebx)		/* reset is done when it reads 0 */
	jne	4b
	movl	$S_ACKNOWLEDGE, STATUS(%ebx)
	movl	$S_ACKNOWLEDGE | S_DRIVER, STATUS(%ebx)
	movl	$1, FEATURES_SEL(%ebx)
	mov	FEATURES(%ebx), %eax
	test	$1, %eax			/* VIRTIO_F_VERSION_1 */
	EXPECT	jnz, 3, "ring: no VERSION_1"
	movl	$0, DRV_FEATURES_SEL(%ebx)
	movl	$0, DRV_FEATURES(%ebx)
	movl	$1, DRV_FEATURES_SEL(%ebx)
	movl	$1, DRV_FEATURES(%ebx)
	movl	$S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK, STATUS(%ebx)
	mov	STATUS(%ebx), %eax
	test	$S_FEATURES_OK, %eax
	EXPECT	jnz, 4, "ring: features refused"
	ret

set_up_queue:
	movl	$0, QUEUE_SEL(%ebx)
	mov	QUEUE_SIZE_MAX(%ebx), %eax
	cmp	$SIZE, %eax
	EXPECT	jae, 5, "ring: queue too small"
	movl	$SIZE, QUEUE_SIZE(%ebx)
	movl	$desc, QUEUE_DESC(%ebx)
	movl	$0, QUEUE_DESC + 4(%ebx)
	movl	$avail, QUEUE_DRIVER(%ebx)
	movl	$0, QUEUE_DRIVER + 4(%ebx)
	movl	$used, QUEUE_DEVICE(%ebx)
	movl	$0, QUEUE_DEVICE + 4(%ebx)
	movl	$1, QUEUE_READY(%ebx)
	ret

/* Offers the buffer as the ecx-th and waits for it; the device must have written all of it. */
one_buffer:
	movl	$data, desc
	movl	$0, desc + 4
	movl	$BUFFER, desc + 8
	movw	$F_WRITE, desc + 12
	movw	$0, desc + 14
	mov	%ecx, %edx
	dec	%edx
	and	$SIZE - 1, %edx
	movw	$0, avail + 4(, %edx, 2)	/* ring[(ecx - 1) % SIZE] = descriptor 0 */
	movw	%cx, avail + 2			/* idx; x86 stores stay in order */
	movl	$0, QUEUE_NOTIFY(%ebx)
5:	pause
	cmpw	%cx, used + 2
	jne	5b
	cmpl	$0, used + 4(, %edx, 8)		/* ring[...].id */
	EXPECT	je, 6, "ring: wrong descriptor returned"
	cmpl	$BUFFER, used + 8(, %edx, 8)	/* ring[...].len */
	EXPECT	je, 7, "ring: wrong length returned"
	ret

	.bss
	.align	16
desc:	.skip	16 * SIZE
	.align	2
avail:	.skip	6 + 2 * SIZE
	.align	4
used:	.skip	6 + 8 * SIZE
	.align	16
data:	.skip	BUFFER
