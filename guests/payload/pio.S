/*
 * pio: port I/O of every width, and string I/O. The four bytes of the test device's port read
 * back what was written, whatever the widths: the access sizes must arrive as they were made.
 *
 * Prints:	pio: widths ok
 *		pio: rep outsb ok		(this line itself goes out by rep outsb)
 *		pio: unclaimed reads ones
 * Exit value:	0; 1..6 the check that failed
 */
#include "payload.h"

#define UNCLAIMED 0x1230

	.text
	.globl	main
main:
	mov	$TESTDEV_PORT, %dx
	mov	$0x12345678, %eax
	out	%eax, %dx
	xor	%eax, %eax
	in	%dx, %eax
	cmp	$0x12345678, %eax
	EXPECT	je, 1, "pio: 32-bit read"
	mov	$TESTDEV_PORT + 2, %dx
	in	%dx, %ax
	cmp	$0x1234, %ax
	EXPECT	je, 2, "pio: 16-bit read"
	mov	$0xab, %al
	mov	$TESTDEV_PORT + 1, %dx
	out	%al, %dx
	mov	$TESTDEV_PORT, %dx
	in	%dx, %eax
	cmp	$0x1234ab78, %eax
	EXPECT	je, 3, "pio: 8-bit write into 32 bits"
	PRINT	"pio: widths ok\n"

	/* Outward: the FIFO takes 16 bytes, so send pieces and wait between them. */
	mov	$COM1 + 2, %dx
	mov	$0x07, %al		/* FIFO on, both cleared */
	out	%al, %dx
	mov	$line, %esi
	mov	$line_end - line, %ebx
	cld
1:	mov	$COM1 + 5, %dx
2:	in	%dx, %al
	test	$0x20, %al
	jz	2b
	mov	$8, %ecx
	cmp	%ecx, %ebx
	cmovb	%ebx, %ecx
	sub	%ecx, %ebx
	mov	$COM1, %dx
	rep outsb
	test	%ebx, %ebx
	jnz	1b
	cmp	$line_end, %esi
	EXPECT	je, 4, "pio: rep outsb left esi wrong"

	/* Inward: four times the same byte. */
	mov	$TESTDEV_PORT + 1, %dx
	mov	$buffer, %edi
	mov	$4, %ecx
	rep insb
	cmpl	$0xabababab, buffer
	EXPECT	je, 5, "pio: rep insb"

	mov	$UNCLAIMED, %dx
	in	%dx, %eax
	cmp	$-1, %eax
	EXPECT	je, 6, "pio: unclaimed port does not read as ones"
	PRINT	"pio: unclaimed reads ones\n"
	EXIT	0

	.data
line:	.ascii	"pio: rep outsb ok\n"
line_end:

	.bss
	.align	4
buffer:	.skip	4
