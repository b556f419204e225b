/*
 * alarm: the device of examples/devices/alarm.py wakes the guest by interrupt, three times. It is
 * the first device with registers that a user brings: at 0xf0000000, on line 5.
 *
 * Prints:	alarm: 3 alarms
 *		alarm: quiet		(no interrupt but those asked for)
 * Exit value:	0; 1 the device counted otherwise, 2 there were more interrupts
 */
#include "payload.h"

#define ALARM		0xf0000000
#define LINE		5
#define VEC_ALARM	(0x20 + LINE)
#define ALARMS		3

	.text
	.globl	main
main:
	call	irq_setup
	mov	$on_alarm, %eax
	mov	$VEC_ALARM, %ebx
	call	irq_gate
	mov	$~(1 << LINE) & 0xff, %al
	out	%al, $0x21

1:	mov	wakes, %ebx
	movl	$1, ALARM		/* in a millisecond */
2:	cli
	cmp	wakes, %ebx
	jne	3f
	sti				/* takes effect after hlt: no wake is slept over */
	hlt
	jmp	2b
3:	cmpl	$ALARMS, wakes
	jb	1b

	mov	ALARM, %eax
	cmp	$ALARMS, %eax
	EXPECT	je, 1, "alarm: the device counted otherwise"
	PRINT	"alarm: "
	call	putdec
	PRINT	" alarms\n"
	cmpl	$ALARMS, wakes
	EXPECT	je, 2, "alarm: too many interrupts"
	PRINT	"alarm: quiet\n"
	EXIT	0

on_alarm:
	incl	wakes
	movl	$0, ALARM + 4		/* seen: the line goes down */
	push	%eax
	mov	$0x20, %al		/* end of interrupt */
	out	%al, $0x20
	pop	%eax
	IRET

	.bss
	.align	4
wakes:	.skip	4
