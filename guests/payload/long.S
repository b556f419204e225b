/*
 * long: enters long mode, computes with 64-bit registers, and leaves again.
 *
 * Prints:	long: 64-bit product 0123456789abcdef
 *		long: back in protected mode
 * Exit value:	0; 1 when EFER does not say that long mode was active
 */
#include "payload.h"

#define EFER_LMA 0x400

	.text
	.globl	main
main:
	mov	$compute, %eax
	call	long_call
	testl	$EFER_LMA, efer
	EXPECT	jnz, 1, "long: EFER.LMA was clear"
	PRINT	"long: 64-bit product "
	mov	product + 4, %eax
	call	puthex
	mov	product, %eax
	call	puthex
	PRINT	"\nlong: back in protected mode\n"
	EXIT	0

	.code64
compute:
	mov	$0xc0000080, %ecx
	rdmsr
	mov	$efer, %ebx
	mov	%eax, (%rbx)
	/* 0x0123456789abcdef = 3^2 * 7 * 11 * 13 * 17 * 97 * 433 * 14071, by its two halves. */
	mov	$9 * 7 * 11 * 13 * 17, %r8d
	movabs	$0x0123456789abcdef / (9 * 7 * 11 * 13 * 17), %r15
	mov	%r15, %rax
	mul	%r8
	movabs	$0x0123456789abcdef % (9 * 7 * 11 * 13 * 17), %r9
	add	%r9, %rax
	mov	$product, %ebx
	mov	%rax, (%rbx)
	ret

	.bss
	.align	8
product: .skip	8
efer:	.skip	4
