/*
 * adder: the device of examples/devices/adder.py, which begins with 40.
 *
 * Prints:	adder: 40
 *		adder: 42		(two written, in 1 and in 4 bytes)
 *		adder: cleared
 * Exit value:	0; 1 when clearing did not help
 */
#include "payload.h"

#define ADDER 0x520

	.text
	.globl	main
main:
	call	sum
	mov	$ADDER, %dx
	mov	$1, %al
	out	%al, %dx
	mov	$1, %eax
	out	%eax, %dx
	call	sum
	mov	$ADDER + 1, %dx
	out	%al, %dx
	mov	$ADDER, %dx
	in	%dx, %eax
	cmp	$0, %eax
	EXPECT	je, 1, "adder: not cleared"
	PRINT	"adder: cleared\n"
	EXIT	0

sum:
	mov	$ADDER, %dx
	in	%dx, %eax
	PRINT	"adder: "
	call	putdec
	PRINT	"\n"
	ret
