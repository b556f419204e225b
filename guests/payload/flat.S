/*
 * flat: raw 16-bit code at 0x7c00 in real mode, as a boot sector is.
 *
 * Prints:	flat: real mode at 7c00
 * Exit value:	0; 1 when it runs elsewhere
 */
#include "payload.h"

	.code16
	.text
	.globl	_start
_start:
	call	1f
1:	pop	%bx
	sub	$1b - _start, %bx	/* where we really are, in the code segment */
	mov	%cs, %ax
	shl	$4, %ax
	add	%ax, %bx
	mov	$1, %cl
	cmp	$0x7c00, %bx
	jne	4f
	xor	%ax, %ax
	mov	%ax, %ds
	mov	$text, %si
2:	movb	(%si), %al
	inc	%si
	test	%al, %al
	jz	3f
	mov	$COM1, %dx
	out	%al, %dx
	jmp	2b
3:	xor	%cl, %cl
4:	mov	%cl, %al
	mov	$DEBUG_EXIT, %dx
	out	%al, %dx
5:	hlt
	jmp	5b

text:	.asciz	"flat: real mode at 7c00\n"
	.org	510
	.word	0xaa55
