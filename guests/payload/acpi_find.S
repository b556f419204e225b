/*
 * acpi_find: eax = signature of a table (or of nothing there) -> eax = its address, 0 if there
 * is none. Looks for the RSDP where an OS does, follows the XSDT, or the RSDT of an old one.
 * ACPI-6.5 §5.2.5.
 */
#include "payload.h"

	.text
	.globl	acpi_find
acpi_find:
	push	%ebx
	push	%ecx
	push	%edx
	push	%esi
	mov	%eax, %edx
	mov	$0xe0000, %esi
1:	cmpl	$0x20445352, (%esi)	/* "RSD " */
	jne	2f
	cmpl	$0x20525450, 4(%esi)	/* "PTR " */
	je	3f
2:	add	$16, %esi
	cmp	$0x100000, %esi
	jb	1b
	jmp	7f

3:	mov	$8, %ebx		/* bytes per pointer */
	cmpb	$2, 15(%esi)
	jb	4f
	mov	24(%esi), %eax		/* XSDT; below 4 GiB in our machines */
	jmp	5f
4:	mov	$4, %ebx
	mov	16(%esi), %eax		/* RSDT */
5:	mov	4(%eax), %ecx		/* its length */
	add	%eax, %ecx
	lea	36(%eax), %esi
6:	cmp	%ecx, %esi
	jae	7f
	mov	(%esi), %eax
	cmp	%edx, (%eax)
	je	8f
	add	%ebx, %esi
	jmp	6b
7:	xor	%eax, %eax
8:	pop	%esi
	pop	%edx
	pop	%ecx
	pop	%ebx
	ret
