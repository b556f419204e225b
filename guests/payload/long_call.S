/*
 * long_call: runs the 64-bit function at eax in long mode and comes back to 32-bit protected
 * mode without paging. The first 4 GiB are mapped one to one by 2 MiB pages. The function may
 * use every register; it returns with ret. Intel SDM vol 3 §10.8.5.
 */
#include "payload.h"

#define CR0_PG	0x80000000
#define CR4_PAE	0x20
#define EFER	0xc0000080
#define EFER_LME 0x100
#define LARGE_RW 0x83		/* present, writable, 2 MiB */

	.text
	.globl	long_call
long_call:
	push	%ebp
	push	%ebx
	push	%esi
	push	%edi
	mov	%eax, %ebp

	mov	$page_dirs, %edi	/* 4 directories of 512 entries, one after the other */
	mov	$LARGE_RW, %eax
	mov	$2048, %ecx
1:	mov	%eax, (%edi)
	movl	$0, 4(%edi)
	add	$8, %edi
	add	$0x200000, %eax
	dec	%ecx
	jnz	1b
	mov	$pdpt, %edi
	mov	$page_dirs + 3, %eax	/* present, writable */
	mov	$4, %ecx
2:	mov	%eax, (%edi)
	add	$8, %edi
	add	$4096, %eax
	dec	%ecx
	jnz	2b
	movl	$pdpt + 3, pml4

	mov	%cr4, %eax
	or	$CR4_PAE, %eax
	mov	%eax, %cr4
	mov	$pml4, %eax
	mov	%eax, %cr3
	mov	$EFER, %ecx
	rdmsr
	or	$EFER_LME, %eax
	wrmsr
	mov	%cr0, %eax
	or	$CR0_PG, %eax
	mov	%eax, %cr0
	ljmp	$CS64, $3f

	.code64
3:	mov	%ebp, %eax		/* zero-extends */
	call	*%rax
	push	$CS32			/* back through compatibility mode */
	mov	$4f, %eax
	push	%rax
	lretq

	.code32
4:	mov	%cr0, %eax
	and	$~CR0_PG, %eax
	mov	%eax, %cr0
	mov	$EFER, %ecx
	rdmsr
	and	$~EFER_LME, %eax
	wrmsr
	pop	%edi
	pop	%esi
	pop	%ebx
	pop	%ebp
	ret

	.bss
	.align	4096
pml4:	.skip	4096
pdpt:	.skip	4096
page_dirs: .skip 4 * 4096
