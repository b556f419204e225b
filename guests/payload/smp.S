/*
 * smp: starts every other processor that the MADT lists with INIT and two start-up IPIs. Each
 * one climbs from real mode to protected mode, counts itself and adds its APIC id to a mask.
 * Intel SDM vol 3 §9.4.4.
 *
 * Prints:	smp: N vCPUs, APIC ids M	(M: a hexadecimal mask of ids)
 * Exit value:	0; 1 without a MADT
 *
 * It waits for all of them for ever: the deadline is the runner's.
 */
#include "payload.h"

#define TRAMPOLINE	0x8000
#define ICR		(LAPIC + 0x300)
#define TO_ALL_OTHERS	0xc4000		/* all excluding self, assert */
#define INIT		0x500
#define STARTUP		0x600
#define AP_STACK	1024		/* bytes for each */

	.text
	.globl	main
main:
	mov	$0x43495041, %eax	/* "APIC" */
	call	acpi_find
	test	%eax, %eax
	EXPECT	jnz, 1, "smp: no MADT"
	call	count_enabled

	cld
	mov	$ap_start, %esi
	mov	$TRAMPOLINE, %edi
	mov	$ap_end - ap_start, %ecx
	rep movsb

	call	lapic_on
	call	count_self
	movl	$TO_ALL_OTHERS | INIT, ICR
	call	settle
	movl	$TO_ALL_OTHERS | STARTUP | TRAMPOLINE >> 12, ICR
	call	settle
	movl	$TO_ALL_OTHERS | STARTUP | TRAMPOLINE >> 12, ICR

1:	mov	alive, %eax
	cmp	%ebp, %eax
	je	2f
	pause
	jmp	1b
2:	PRINT	"smp: "
	call	putdec
	PRINT	" vCPUs, APIC ids "
	mov	ids, %eax
	call	puthex
	PRINT	"\n"
	EXIT	0

/* eax = MADT -> ebp = how many processors it enables. ACPI-6.5 §5.2.12. */
count_enabled:
	xor	%ebp, %ebp
	mov	4(%eax), %ecx
	add	%eax, %ecx
	add	$44, %eax
1:	cmp	%ecx, %eax
	jae	4f
	cmpb	$0, (%eax)		/* local APIC: flags at 4 */
	jne	2f
	testb	$1, 4(%eax)
	jz	3f
	inc	%ebp
	jmp	3f
2:	cmpb	$9, (%eax)		/* local x2APIC: flags at 8 */
	jne	3f
	testb	$1, 8(%eax)
	jz	3f
	inc	%ebp
3:	movzbl	1(%eax), %edx
	add	%edx, %eax
	jmp	1b
4:	ret

/* Counts the processor it runs on. Clobbers eax, ecx. */
count_self:
	mov	LAPIC + 0x20, %ecx
	shr	$24, %ecx
	mov	$1, %eax
	shl	%cl, %eax
	lock or	%eax, ids
	lock incl alive
	ret

/* Real hardware wants 10 ms and 200 us here; port 0x80 takes at least a microsecond. */
settle:
	push	%ecx
	mov	$200, %ecx
1:	in	$0x80, %al
	dec	%ecx
	jnz	1b
	pop	%ecx
	ret

/* What the others run: copied to TRAMPOLINE, entered in real mode at its start. */
	.code16
ap_start:
	cli
	xor	%ax, %ax
	mov	%ax, %ds
	lgdtl	TRAMPOLINE + ap_gdt_ptr - ap_start
	mov	%cr0, %eax
	or	$1, %al
	mov	%eax, %cr0
	ljmpl	$CS32, $ap_main
	.align	4
ap_gdt_ptr:
	.word	4 * 8 - 1
	.long	gdt
ap_end:

	.code32
ap_main:
	mov	$DS32, %ax
	mov	%ax, %ds
	mov	%ax, %es
	mov	%ax, %ss
	mov	$AP_STACK, %eax		/* a stack of its own, taken in order of arrival */
	lock xadd %eax, next_stack
	lea	ap_stacks(%eax), %esp
	call	count_self
1:	cli
	hlt
	jmp	1b

	.data
	.align	4
next_stack: .long AP_STACK

	.bss
	.align	16
alive:	.skip	4
ids:	.skip	4
	.align	16
ap_stacks: .skip 257 * AP_STACK
