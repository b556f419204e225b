/*
 * spin: never ends; for deadlines, pause and stop.
 *
 * Prints:	spin: spinning
 * Ends:	never
 */
#include "payload.h"

	.text
	.globl	main
main:
	PRINT	"spin: spinning\n"
1:	pause
	jmp	1b
