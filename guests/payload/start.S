/*
 * Where a payload guest starts: 32-bit protected mode, by a multiboot loader (Multiboot-0.6.96
 * §3.2), interrupts off. Sets up segments and a stack and calls main with the loader's eax
 * (magic) and ebx (information). If main returns, eax is the exit value.
 */
#include "payload.h"

#define MB_MAGIC	0x1badb002
#define MB_FLAGS	0x00000003	/* modules page-aligned, memory information */

	.section .multiboot, "a"
	.align	4
	.long	MB_MAGIC, MB_FLAGS, -(MB_MAGIC + MB_FLAGS)

	.text
	.globl	_start
_start:
	cli
	lgdt	gdt_ptr
	ljmp	$CS32, $1f
1:	mov	$DS32, %cx
	mov	%cx, %ds
	mov	%cx, %es
	mov	%cx, %fs
	mov	%cx, %gs
	mov	%cx, %ss
	mov	$stack_top, %esp
	call	main
	jmp	exit

	.data
	.align	8
	.globl	gdt
gdt:	.quad	0
	.quad	0x00cf9b000000ffff	/* CS32: flat code */
	.quad	0x00cf93000000ffff	/* DS32: flat data */
	.quad	0x00af9b000000ffff	/* CS64: long mode code */
gdt_ptr:
	.word	. - gdt - 1
	.long	gdt

	.bss
	.align	16
	.skip	8192
stack_top:
