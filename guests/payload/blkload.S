/*
 * blkload: the device side of virtio-blk under load. Finds a disk on PCI by the configuration
 * ports, sets its queue up once, and then only moves avail.idx: as many rounds as the command
 * line's last word says, each of BATCH reads of 4 KiB behind one notification, waited for by
 * looking at used.idx. Interrupts are off. A guest instruction costs next to nothing of it, so
 * what is timed between the two lines is the VMM's own work. virtio-v1.3 §4.1, §5.2.
 *
 * Prints:	blkload: go
 *		blkload: N rounds, M statuses ok	(M is BATCH when all was well)
 * Exit value:	0; 1..4 the check that failed
 */
#include "virtio_pci.h"

#define BATCH		128
#define BYTES		4096
#define BUFFERS		0x400000

	.text
	.globl	main
main:
	call	last_word
	mov	%eax, rounds
	mov	$VIRTIO_BLK, %eax
	call	virtio_find
	cmp	$1, %eax
	EXPECT	jne, 1, "blkload: no disk"
	cmp	$2, %eax
	EXPECT	jne, 2, "blkload: no common configuration"
	cmp	$3, %eax
	EXPECT	jne, 3, "blkload: no notification structure"
	call	requests
	call	virtio_start
	PRINT	"blkload: go\n"
	call	load
	mov	rounds, %eax
	PRINT	"blkload: "
	call	putdec
	PRINT	" rounds, "
	call	statuses
	call	putdec
	PRINT	" statuses ok\n"
	cmp	$BATCH, %eax
	EXPECT	je, 4, "blkload: a request failed"
	EXIT	0

/* BATCH chains of header, buffer and status, each in an indirect table of its own. */
requests:
	xor	%ecx, %ecx
1:	mov	%ecx, %edi		/* the table: 48 bytes */
	imul	$48, %edi
	add	$tables, %edi
	mov	%ecx, %esi		/* the header: type 0, sector 8n */
	shl	$4, %esi
	add	$headers, %esi
	lea	(, %ecx, 8), %eax
	mov	%eax, 8(%esi)
	mov	%esi, (%edi)
	movl	$16, 8(%edi)
	movl	$F_NEXT + (1 << 16), 12(%edi)
	mov	%ecx, %eax
	imul	$BYTES, %eax
	add	$BUFFERS, %eax
	mov	%eax, 16(%edi)
	movl	$BYTES, 24(%edi)
	movl	$F_NEXT + F_WRITE + (2 << 16), 28(%edi)
	lea	status(%ecx), %eax
	movb	$0xff, (%eax)
	mov	%eax, 32(%edi)
	movl	$1, 40(%edi)
	movl	$F_WRITE, 44(%edi)
	mov	%ecx, %esi
	shl	$4, %esi
	mov	%edi, vq_desc(%esi)
	movl	$48, vq_desc + 8(%esi)
	movl	$F_INDIRECT, vq_desc + 12(%esi)
	mov	%cx, vq_avail + 4(, %ecx, 2)
	mov	%cx, vq_avail + 4 + 2 * BATCH(, %ecx, 2)
	inc	%ecx
	cmp	$BATCH, %ecx
	jb	1b
	movw	$NO_INTERRUPT, vq_avail
	ret

load:
	mov	rounds, %ecx
	mov	virtio_notify, %edi
	xor	%eax, %eax
	xor	%edx, %edx
	test	%ecx, %ecx
	jz	3f
1:	add	$BATCH, %ax
	mov	%ax, vq_avail + 2
	mov	%dx, (%edi)
2:	pause
	cmp	vq_used + 2, %ax
	jne	2b
	dec	%ecx
	jnz	1b
3:	ret

/* How many requests said OK -> eax. */
statuses:
	xor	%eax, %eax
	xor	%ecx, %ecx
1:	cmpb	$1, status(%ecx)
	adc	$0, %eax
	inc	%ecx
	cmp	$BATCH, %ecx
	jb	1b
	ret

	.bss
	.align	16
tables:	.skip	48 * BATCH
headers: .skip	16 * BATCH
status:	.skip	BATCH
	.align	4
rounds:	.skip	4
