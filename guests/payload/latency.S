/*
 * latency: what one exit, and one request from kick to answer, costs. The command line's last word
 * is how many times and which: `20000p`
 *	p	a write to port 0x80
 *	u	a read of COM1's line status
 *	m	a read of pc-testdev's window
 *	k	a 4 KiB read of a virtio disk: notification, then looking at used.idx
 *	i	the same, but halted until the interrupt: its handler ends the time
 * Each is timed by the time stamp counter; a histogram with sixteen steps to the octave gives the
 * percentiles.
 *
 * Prints:	latency: go
 *		latency: N times, p50 A, p99 B cycles	(each the lower end of its step)
 * Exit value:	0; 1 no disk; 2 no such measurement; 3 a request failed
 */
#include "virtio_pci.h"

#define VEC	0x42
#define BYTES	4096
#define BUFFER	0x400000
#define STEPS	(32 * 16)

	.text
	.globl	main
main:
	call	last_word
	mov	%eax, times
	mov	$measurements, %esi
1:	cmpl	$0, (%esi)
	EXPECT	jne, 2, "latency: the last word is how many times and one of p u m k i"
	cmp	(%esi), %dl
	je	2f
	add	$8, %esi
	jmp	1b
2:	mov	4(%esi), %ebp
	cmp	$'k', %dl
	je	3f
	cmp	$'i', %dl
	jne	4f
3:	call	disk
4:	PRINT	"latency: go\n"
	mov	times, %ecx
5:	push	%ecx
	call	*%ebp			/* leaves the times before and after in begin and eax */
	sub	begin, %eax
	call	count
	pop	%ecx
	dec	%ecx
	jnz	5b
	PRINT	"latency: "
	mov	times, %eax
	call	putdec
	PRINT	" times, p50 "
	mov	times, %eax
	shr	$1, %eax
	call	percentile
	PRINT	", p99 "
	mov	times, %eax
	xor	%edx, %edx
	mov	$100, %ecx
	div	%ecx
	sub	times, %eax
	neg	%eax
	call	percentile
	PRINT	" cycles\n"
	EXIT	0

pio:	call	start
	out	%al, $0x80
	jmp	stop

uart:	mov	$COM1 + 5, %ecx
	call	start
	mov	%ecx, %edx
	in	%dx, %al
	jmp	stop

mmio:	call	start
	mov	TESTDEV_WINDOW, %eax
	jmp	stop

kick:	call	offer
	call	start
	movw	$0, (%edi)
1:	pause
	cmp	vq_used + 2, %cx
	jne	1b
	call	stop
	jmp	check

interrupt:
	call	offer
	movl	$0, messages
	call	start
	movw	$0, (%edi)
1:	cli
	cmpl	$0, messages
	jne	2f
	sti				/* takes effect after hlt: no interrupt is slept over */
	hlt
	jmp	1b
2:	mov	ended, %eax
	jmp	check

on_message:
	push	%eax
	push	%edx
	rdtsc
	mov	%eax, ended
	pop	%edx
	pop	%eax
	incl	messages
	movl	$0, LAPIC + 0xb0
	IRET

/* eax, edx are lost. */
start:	rdtsc
	mov	%eax, begin
	ret

/* The time -> eax. */
stop:	rdtsc
	ret

/* The one request again -> cx = what used.idx becomes, edi = where to notify. */
offer:	movb	$0xff, status
	mov	vq_avail + 2, %cx
	inc	%cx
	mov	%cx, vq_avail + 2
	mov	virtio_notify, %edi
	ret

/* eax is kept. */
check:	cmpb	$0, status
	EXPECT	je, 3, "latency: a request failed"
	ret

/* A disk with one request in its queue, at each place of the ring. */
disk:	push	%edx
	push	%ebp
	mov	$VIRTIO_BLK, %eax
	call	virtio_find
	test	%eax, %eax
	EXPECT	jz, 1, "latency: no disk"
	movl	$header, vq_desc
	movl	$16, vq_desc + 8
	movl	$F_NEXT + (1 << 16), vq_desc + 12
	movl	$BUFFER, vq_desc + 16
	movl	$BYTES, vq_desc + 24
	movl	$F_NEXT + F_WRITE + (2 << 16), vq_desc + 28
	movl	$status, vq_desc + 32
	movl	$1, vq_desc + 40
	movl	$F_WRITE, vq_desc + 44
	pop	%ebp
	pop	%edx
	cmp	$'i', %dl
	je	1f
	movw	$NO_INTERRUPT, vq_avail
	jmp	virtio_start
1:	call	irq_setup
	mov	$on_message, %eax
	push	%ebx
	mov	$VEC, %ebx
	call	irq_gate
	pop	%ebx
	call	lapic_on
	mov	$VEC, %eax
	call	virtio_msix
	jmp	virtio_start

/* eax = cycles: one more in its step, which is 16 times the octave and the 4 bits below its top. */
count:	or	$16, %eax
	bsr	%eax, %ecx
	sub	$4, %ecx
	shr	%cl, %eax
	and	$15, %eax
	shl	$4, %ecx
	or	%ecx, %eax
	incl	steps(, %eax, 4)
	ret

/* eax = how many were as fast: prints the lower end of that step. */
percentile:
	xor	%ecx, %ecx
1:	sub	steps(, %ecx, 4), %eax
	jbe	2f
	inc	%ecx
	cmp	$STEPS - 1, %ecx
	jb	1b
2:	mov	%ecx, %eax
	and	$15, %eax
	or	$16, %eax
	shr	$4, %ecx
	shl	%cl, %eax
	jmp	putdec

	.section .rodata
	.align	4
measurements:
	.long	'p', pio, 'u', uart, 'm', mmio, 'k', kick, 'i', interrupt, 0

	.bss
	.align	16
header:	.skip	16
steps:	.skip	4 * STEPS
times:	.skip	4
begin:	.skip	4
ended:	.skip	4
messages: .skip	4
status:	.skip	1
