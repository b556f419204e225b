/*
 * acpi_off: powers off as an OS does. Finds the FADT and the DSDT through the RSDP, reads the
 * sleep type from the \_S5 package and sets SLP_EN in PM1a control. ACPI-6.5 §4.8.3.2, §7.4.2.
 *
 * Prints:	acpi_off: sleeping
 * Ends:	power-off; exit value 1..3 when a table or \_S5 is missing
 */
#include "payload.h"

#define SLP_EN 0x2000

	.text
	.globl	main
main:
	mov	$0x50434146, %eax	/* "FACP" */
	call	acpi_find
	test	%eax, %eax
	EXPECT	jnz, 1, "acpi_off: no FADT"
	mov	%eax, %ebx
	mov	40(%ebx), %esi		/* DSDT */
	test	%esi, %esi
	EXPECT	jnz, 2, "acpi_off: no DSDT"
	mov	4(%esi), %ecx
	add	%esi, %ecx
1:	inc	%esi
	cmp	%ecx, %esi
	EXPECT	jb, 3, "acpi_off: no _S5 in the DSDT"
	cmpl	$0x5f35535f, (%esi)	/* "_S5_" */
	jne	1b
	cmpb	$0x12, 4(%esi)		/* PackageOp, one byte of PkgLength, NumElements */
	jne	1b
	movzbl	7(%esi), %eax		/* ZeroOp, OneOp, or BytePrefix and the value */
	cmp	$0x0a, %al
	jne	2f
	movzbl	8(%esi), %eax
2:	PRINT	"acpi_off: sleeping\n"
	shl	$10, %eax
	or	$SLP_EN, %eax
	mov	64(%ebx), %edx		/* PM1a_CNT_BLK */
	out	%ax, %dx
3:	hlt
	jmp	3b
