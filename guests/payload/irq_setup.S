/*
 * Interrupt descriptors and the two interrupt controllers.
 *
 * irq_setup	loads an empty IDT, moves the PICs to vectors 0x20..0x2f and masks them.
 * irq_gate	eax = handler, ebx = vector: a 32-bit interrupt gate.
 * lapic_on	software-enables the local APIC, spurious vector 0xff.
 */
#include "payload.h"

#define PIC1 0x20
#define PIC2 0xa0

	.text
	.globl	irq_setup
irq_setup:
	push	%eax
	mov	$0x11, %al	/* ICW1: edge, cascade, ICW4 follows */
	out	%al, $PIC1
	out	%al, $PIC2
	mov	$0x20, %al	/* ICW2: vectors */
	out	%al, $PIC1 + 1
	mov	$0x28, %al
	out	%al, $PIC2 + 1
	mov	$0x04, %al	/* ICW3: cascade on line 2 */
	out	%al, $PIC1 + 1
	mov	$0x02, %al
	out	%al, $PIC2 + 1
	mov	$0x01, %al	/* ICW4: 8086 mode */
	out	%al, $PIC1 + 1
	out	%al, $PIC2 + 1
	mov	$0xff, %al	/* everything masked */
	out	%al, $PIC1 + 1
	out	%al, $PIC2 + 1
	lidt	idt_ptr
	pop	%eax
	ret

	.globl	irq_gate
irq_gate:
	push	%ecx
	lea	idt(, %ebx, 8), %ecx
	movw	%ax, (%ecx)
	movw	$CS32, 2(%ecx)
	movw	$0x8e00, 4(%ecx)	/* present, ring 0, 32-bit interrupt gate */
	push	%eax
	shr	$16, %eax
	movw	%ax, 6(%ecx)
	pop	%eax
	pop	%ecx
	ret

	.globl	lapic_on
lapic_on:
	movl	$0x1ff, LAPIC + 0xf0
	ret

	.data
idt_ptr:
	.word	256 * 8 - 1
	.long	idt

	.bss
	.align	8
idt:	.skip	256 * 8
