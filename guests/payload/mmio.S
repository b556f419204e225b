/*
 * mmio: memory-mapped accesses of 1, 2, 4 and 8 bytes in the test device's window, which reads
 * back what was written; then an address that nobody claims. Runs in long mode for the 8 bytes.
 *
 * Prints:	mmio: 1 2 4 8 ok
 *		mmio: unclaimed reads ones
 * Exit value:	0; 1..5 the check that failed (5 on QEMU, where unclaimed memory reads as zeros)
 */
#include "payload.h"

#define UNCLAIMED 0xfd000000

	.text
	.globl	main
main:
	mov	$accesses, %eax
	call	long_call
	mov	failed, %eax
	cmp	$0, %eax
	je	1f
	PRINT	"mmio: check failed: "
	call	putdec
	PRINT	"\n"
	jmp	exit
1:	PRINT	"mmio: 1 2 4 8 ok\n"
	mov	UNCLAIMED, %eax
	cmp	$-1, %eax
	EXPECT	je, 5, "mmio: unclaimed memory does not read as ones"
	PRINT	"mmio: unclaimed reads ones\n"
	EXIT	0

	.code64
accesses:
	mov	$TESTDEV_WINDOW + 0x100, %ebx
	mov	$1, %ecx
	movabs	$0x1122334455667788, %rax
	mov	%rax, (%rbx)
	mov	(%rbx), %rdx
	cmp	%rax, %rdx
	jne	9f
	inc	%ecx			/* 2: 32 bits out of 64 */
	mov	4(%rbx), %edx
	cmp	$0x11223344, %edx
	jne	9f
	inc	%ecx			/* 3: 16 bits into them */
	movw	$0xaabb, 2(%rbx)
	mov	(%rbx), %rdx
	movabs	$0x11223344aabb7788, %rax
	cmp	%rax, %rdx
	jne	9f
	inc	%ecx			/* 4: 8 bits, at the last byte of the window */
	mov	$TESTDEV_WINDOW + 0xffff, %ebx
	movb	$0x5a, (%rbx)
	movzbl	(%rbx), %edx
	cmp	$0x5a, %edx
	jne	9f
	xor	%ecx, %ecx
9:	mov	$failed, %ebx
	mov	%ecx, (%rbx)
	ret

	.bss
	.align	4
failed:	.skip	4
