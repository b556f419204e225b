/* Polled printing on COM1, and the end. Every register and the flags' IF are preserved. */
#include "payload.h"

#define LSR_THRE 0x20

	.text

/* Prints the character in al. */
	.globl	putc
putc:
	push	%eax
	push	%edx
	mov	%al, %ah
	mov	$COM1 + 5, %dx
1:	in	%dx, %al
	test	$LSR_THRE, %al
	jz	1b
	mov	%ah, %al
	mov	$COM1, %dx
	out	%al, %dx
	pop	%edx
	pop	%eax
	ret

/* Prints the NUL-terminated string at esi. */
	.globl	puts
puts:
	push	%eax
	push	%esi
1:	movb	(%esi), %al
	inc	%esi
	test	%al, %al
	jz	2f
	call	putc
	jmp	1b
2:	pop	%esi
	pop	%eax
	ret

/* Prints eax as 8 hexadecimal digits. */
	.globl	puthex
puthex:
	push	%eax
	push	%ebx
	push	%ecx
	mov	%eax, %ebx
	mov	$8, %ecx
1:	rol	$4, %ebx
	mov	%bl, %al
	and	$0xf, %al
	add	$'0', %al
	cmp	$'9', %al
	jbe	2f
	add	$'a' - '9' - 1, %al
2:	call	putc
	dec	%ecx
	jnz	1b
	pop	%ecx
	pop	%ebx
	pop	%eax
	ret

/* Prints eax in decimal. */
	.globl	putdec
putdec:
	push	%eax
	push	%ebx
	push	%ecx
	push	%edx
	mov	$10, %ebx
	xor	%ecx, %ecx
1:	xor	%edx, %edx
	div	%ebx
	push	%edx
	inc	%ecx
	test	%eax, %eax
	jnz	1b
2:	pop	%eax
	add	$'0', %al
	call	putc
	dec	%ecx
	jnz	2b
	pop	%edx
	pop	%ecx
	pop	%ebx
	pop	%eax
	ret

/* Ends the guest: the value in al goes to the debug-exit port. */
	.globl	exit
exit:
	mov	$DEBUG_EXIT, %dx
	out	%al, %dx
	cli
1:	hlt
	jmp	1b
