/*
 * hlt_wake: a halted vCPU wakes up. Sleeps three times in hlt; the local APIC's one-shot timer
 * wakes it each time.
 *
 * Prints:	hlt_wake: 3 wakes
 * Exit value:	0
 */
#include "payload.h"

#define WAKES	3
#define VEC	0x41
#define COUNT	2000000		/* some milliseconds, whatever the bus clock is */

	.text
	.globl	main
main:
	call	irq_setup
	mov	$on_timer, %eax
	mov	$VEC, %ebx
	call	irq_gate
	call	lapic_on
	movl	$VEC, LAPIC + 0x320	/* one-shot, not masked */
	movl	$0xb, LAPIC + 0x3e0	/* divide by 1 */

	xor	%ebx, %ebx
1:	inc	%ebx
	movl	$COUNT, LAPIC + 0x380
2:	cli
	cmp	%ebx, wakes
	je	3f
	sti
	hlt
	jmp	2b
3:	cmp	$WAKES, %ebx
	jb	1b
	PRINT	"hlt_wake: "
	mov	wakes, %eax
	call	putdec
	PRINT	" wakes\n"
	EXIT	0

on_timer:
	incl	wakes
	movl	$0, LAPIC + 0xb0
	IRET

	.bss
	.align	4
wakes:	.skip	4
