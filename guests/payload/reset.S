/*
 * reset: resets the machine through RESET_REG. ACPI-6.5 §4.8.3.6.
 *
 * Prints:	reset: now
 * Ends:	reset
 */
#include "payload.h"

	.text
	.globl	main
main:
	PRINT	"reset: now\n"
	mov	$RESET_PORT, %dx
	mov	$0x06, %al
	out	%al, %dx
1:	hlt
	jmp	1b
