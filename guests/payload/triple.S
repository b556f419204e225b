/*
 * triple: an exception without an IDT, which is a triple fault.
 *
 * Prints:	triple: faulting
 * Ends:	shutdown (some software KVMs report an internal error instead)
 */
#include "payload.h"

	.text
	.globl	main
main:
	PRINT	"triple: faulting\n"
	lidt	no_idt
	ud2
	EXIT	1

	.data
no_idt:	.word	0
	.long	0
