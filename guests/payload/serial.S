/*
 * serial: the 16550 as a driver uses it. Divisor latch, scratch register, modem lines and FIFO
 * in loopback, and text sent by the transmitter-empty interrupt. PC16550D §8.
 *
 * Prints:	serial: registers ok
 *		serial: loopback ok
 *		serial: this line was sent by interrupts
 * Exit value:	0; 1..9 the check that failed
 */
#include "payload.h"

#define VEC_COM1	0x24

/* Registers: offsets from COM1. */
#define RBR	0
#define THR	0
#define DLL	0
#define IER	1
#define DLM	1
#define IIR	2
#define FCR	2
#define LCR	3
#define MCR	4
#define LSR	5
#define MSR	6
#define SCR	7

.macro OUTB reg, value
	mov	$COM1 + \reg, %dx
	mov	$\value, %al
	out	%al, %dx
.endm
.macro INB reg
	mov	$COM1 + \reg, %dx
	in	%dx, %al
.endm

	.text
	.globl	main
main:
	OUTB	SCR, 0x5a
	INB	SCR
	cmp	$0x5a, %al
	EXPECT	je, 1, "serial: scratch register"
	OUTB	LCR, 0x83		/* divisor latch, 8 bits */
	OUTB	DLL, 0x01		/* 115200 baud */
	OUTB	DLM, 0x00
	INB	DLL
	cmp	$0x01, %al
	EXPECT	je, 2, "serial: divisor latch"
	OUTB	LCR, 0x03
	OUTB	FCR, 0x07		/* FIFO on, both cleared */
	INB	IIR
	and	$0xc1, %al
	cmp	$0xc1, %al		/* FIFO there, nothing pending */
	EXPECT	je, 3, "serial: FIFO"
	PRINT	"serial: registers ok\n"

	call	loopback
	PRINT	"serial: loopback ok\n"
	call	by_interrupt
	EXIT	0

loopback:
	OUTB	MCR, 0x1f		/* loop; DTR, RTS, OUT1, OUT2 */
	INB	MSR
	and	$0xf0, %al
	cmp	$0xf0, %al		/* they come back as DSR, CTS, RI, DCD */
	je	1f
	OUTB	MCR, 0			/* or the message goes nowhere */
	PRINT	"serial: modem lines in loopback\n"
	EXIT	4
1:	mov	$16, %ecx		/* fill the FIFO: 'a', 'b', ... */
	mov	$COM1 + THR, %dx
	mov	$'a', %al
2:	out	%al, %dx
	inc	%al
	dec	%ecx
	jnz	2b
	mov	$16, %ecx
	mov	$'a', %bl
3:	mov	$10000, %edi		/* a byte may take its time to arrive */
4:	INB	LSR
	test	$0x01, %al
	jnz	5f
	dec	%edi
	jnz	4b
	OUTB	MCR, 0
	PRINT	"serial: loopback lost bytes\n"
	EXIT	5
5:	INB	RBR
	cmp	%bl, %al
	je	6f
	OUTB	MCR, 0
	PRINT	"serial: loopback changed bytes\n"
	EXIT	6
6:	inc	%bl
	dec	%ecx
	jnz	3b
	INB	LSR
	mov	%al, %bl
	OUTB	MCR, 0x0b		/* loop off; OUT2 lets interrupts out */
	test	$0x01, %bl
	EXPECT	jz, 7, "serial: bytes from nowhere"
	ret

by_interrupt:
	call	irq_setup
	mov	$on_com1, %eax
	mov	$VEC_COM1, %ebx
	call	irq_gate
	mov	$0xef, %al		/* unmask line 4 */
	out	%al, $0x21
	movl	$text, next
	OUTB	IER, 0x02		/* transmitter empty; it is, so this interrupts */
1:	cli
	mov	next, %eax
	cmpb	$0, (%eax)
	je	2f
	sti
	hlt
	jmp	1b
2:	OUTB	IER, 0
	cmpl	$text_end - text, irqs	/* one interrupt for each byte */
	EXPECT	jae, 8, "serial: too few interrupts"
	ret

on_com1:
	push	%eax
	push	%edx
	push	%esi
	INB	IIR
	and	$0x0f, %al
	cmp	$0x02, %al		/* transmitter empty */
	jne	1f
	incl	irqs
	mov	next, %esi
	movb	(%esi), %al
	test	%al, %al
	jz	1f
	inc	%esi
	mov	%esi, next
	mov	$COM1 + THR, %dx
	out	%al, %dx
1:	mov	$0x20, %al
	out	%al, $0x20
	pop	%esi
	pop	%edx
	pop	%eax
	IRET

	.data
text:	.ascii	"serial: this line was sent by interrupts\n"
text_end: .byte	0

	.bss
	.align	4
next:	.skip	4
irqs:	.skip	4
