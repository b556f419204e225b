/*
 * pmem: memory that a device brought, at 4 GiB, where the machine puts the first. Its registers
 * stay untouched: the memory is there without them.
 *
 * Prints:	pmem: XXXXXXXX		(its first four bytes)
 *		pmem: reads back
 * Exit value:	0; 1 what was written does not read back
 */
#include "payload.h"

#define LARGE_RW	0x83	/* present, writable, 2 MiB */

	.text
	.globl	main
main:
	mov	$access, %eax
	call	long_call
	mov	first, %eax
	PRINT	"pmem: "
	call	puthex
	PRINT	"\n"
	cmpl	$0, failed
	EXPECT	je, 1, "pmem: what was written does not read back"
	PRINT	"pmem: reads back\n"
	EXIT	0

	.code64
access:
	mov	%cr3, %rax		/* one more directory, for what is past the first 4 GiB */
	mov	(%rax), %rax
	and	$~0xfff, %rax
	mov	$directory + 3, %ecx
	mov	%rcx, 32(%rax)
	mov	$1, %eax
	shl	$32, %rax
	mov	%rax, %rbx
	or	$LARGE_RW, %rax
	mov	$directory, %ecx
	mov	%rax, (%rcx)

	mov	(%rbx), %eax
	mov	$first, %ecx
	mov	%eax, (%rcx)
	mov	$0x11223344, %eax
	mov	%eax, 8(%rbx)
	mov	8(%rbx), %edx
	xor	%edx, %eax
	mov	$failed, %ecx
	mov	%eax, (%rcx)
	ret

	.bss
	.align	4096
directory: .skip 4096
first:	.skip	4
failed:	.skip	4
