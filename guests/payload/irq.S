/*
 * irq: interrupts arrive. Ten ticks of the PIT through the PIC, then one interrupt that the
 * local APIC sends to itself.
 *
 * Prints:	irq: 10 ticks
 *		irq: self-IPI
 * Exit value:	0
 */
#include "payload.h"

#define TICKS		10
#define PIT_DIVISOR	1193	/* 1 ms */
#define VEC_TIMER	0x20
#define VEC_IPI		0x40

	.text
	.globl	main
main:
	call	irq_setup
	mov	$on_tick, %eax
	mov	$VEC_TIMER, %ebx
	call	irq_gate
	mov	$on_ipi, %eax
	mov	$VEC_IPI, %ebx
	call	irq_gate

	mov	$0x34, %al		/* counter 0, low then high byte, mode 2 */
	out	%al, $0x43
	mov	$PIT_DIVISOR & 0xff, %al
	out	%al, $0x40
	mov	$PIT_DIVISOR >> 8, %al
	out	%al, $0x40
	mov	$0xfe, %al		/* unmask line 0 */
	out	%al, $0x21

1:	cli
	cmpl	$TICKS, ticks
	jae	2f
	sti				/* takes effect after hlt: no tick is slept over */
	hlt
	jmp	1b
2:	mov	$0xff, %al
	out	%al, $0x21
	mov	$TICKS, %eax
	PRINT	"irq: "
	call	putdec
	PRINT	" ticks\n"

	call	lapic_on
	movl	$0x44000 | VEC_IPI, LAPIC + 0x300	/* fixed, assert, to self */
3:	cli
	cmpl	$0, ipis
	jne	4f
	sti
	hlt
	jmp	3b
4:	PRINT	"irq: self-IPI\n"
	EXIT	0

on_tick:
	incl	ticks
	push	%eax
	mov	$0x20, %al		/* end of interrupt */
	out	%al, $0x20
	pop	%eax
	IRET

on_ipi:
	incl	ipis
	movl	$0, LAPIC + 0xb0
	IRET

	.bss
	.align	4
ticks:	.skip	4
ipis:	.skip	4
