/*
 * ring_pci: a virtio device on PCI driven by hand, with a message-signalled interrupt. Finds the
 * configuration space by the MCFG and checks that the old ports show the same, finds an entropy
 * device, moves its BARs to addresses of its own choice, points MSI-X vector 0 at this
 * processor, offers one buffer and halts until the interrupt says that it was used.
 * virtio-v1.3 §4.1, PCI-3.0 §6.2.5, §6.8.2.
 *
 * Prints:	ring_pci: virtio-rng in slot N
 *		ring_pci: BARs moved
 *		ring_pci: buffer used, interrupt came
 * Exit value:	0; 1..8 the check that failed
 */
#include "payload.h"

#define BARS		0xd0000000	/* where the BARs go: 1 MiB for each */
#define VEC		0x42
#define SIZE		4
#define BUFFER		64
#define F_WRITE		2

/* Configuration space. */
#define COMMAND		0x04
#define BAR0		0x10
#define CAP_POINTER	0x34
#define CMD_MEM_MASTER	0x06
#define CAP_VENDOR	0x09
#define CAP_MSIX	0x11

/* Where each structure is, as found from the capabilities: virtio-v1.3 §4.1.4. */
#define COMMON_CFG	1
#define NOTIFY_CFG	2

/* Common configuration. virtio-v1.3 §4.1.4.3. */
#define FEATURE_SELECT	0x00
#define FEATURE		0x04
#define DRV_FEATURE_SELECT 0x08
#define DRV_FEATURE	0x0c
#define STATUS		0x14
#define QUEUE_SELECT	0x16
#define QUEUE_SIZE	0x18
#define QUEUE_VECTOR	0x1a
#define QUEUE_ENABLE	0x1c
#define QUEUE_NOTIFY_OFF 0x1e
#define QUEUE_DESC	0x20
#define QUEUE_DRIVER	0x28
#define QUEUE_DEVICE	0x30

	.text
	.globl	main
main:
	mov	$0x4746434d, %eax	/* "MCFG" */
	call	acpi_find
	test	%eax, %eax
	EXPECT	jnz, 1, "ring_pci: no MCFG"
	mov	44(%eax), %ebx		/* ECAM of segment 0, bus 0 */

	mov	$0x80000000, %eax	/* bus 0, slot 0, register 0 by the ports */
	mov	$0xcf8, %dx
	out	%eax, %dx
	mov	$0xcfc, %dx
	in	%dx, %eax
	cmp	%eax, (%ebx)
	EXPECT	je, 2, "ring_pci: ports and memory show different bridges"

	xor	%ecx, %ecx
1:	mov	(%ebx), %eax
	cmp	$0x10441af4, %eax	/* modern entropy device */
	je	2f
	add	$1 << 15, %ebx		/* the next slot */
	inc	%ecx
	cmp	$32, %ecx
	jb	1b
	PRINT	"ring_pci: no entropy device\n"
	EXIT	3
2:	PRINT	"ring_pci: virtio-rng in slot "
	mov	%ecx, %eax
	call	putdec
	PRINT	"\n"

	call	move_bars
	PRINT	"ring_pci: BARs moved\n"
	call	find_structures
	cmpl	$0, common
	EXPECT	jne, 4, "ring_pci: no common configuration"
	cmpl	$0, msix_table
	EXPECT	jne, 5, "ring_pci: no MSI-X"
	call	interrupts_on
	call	negotiate
	call	one_buffer
	PRINT	"ring_pci: buffer used, interrupt came\n"
	EXIT	0

/* ebx = the function. Gives each memory BAR n the address BARS + n MiB. */
move_bars:
	movw	$0, COMMAND(%ebx)
	xor	%ecx, %ecx
1:	lea	BAR0(%ebx, %ecx, 4), %edi
	movl	$-1, (%edi)
	mov	(%edi), %eax
	test	%eax, %eax
	jz	2f			/* not there */
	test	$1, %al
	jnz	2f			/* I/O */
	mov	%ecx, %edx
	shl	$20, %edx
	add	$BARS, %edx
	mov	%edx, (%edi)
	and	$6, %al
	cmp	$4, %al			/* 64 bits: its upper half is the next register */
	jne	2f
	movl	$0, 4(%edi)
	inc	%ecx
2:	inc	%ecx
	cmp	$6, %ecx
	jb	1b
	movw	$CMD_MEM_MASTER, COMMAND(%ebx)
	ret

/* ebx = the function. Fills common, notify, multiplier, msix_table, msix_cap. */
find_structures:
	movzbl	CAP_POINTER(%ebx), %esi
1:	test	%esi, %esi
	jz	5f
	lea	(%ebx, %esi), %edi
	cmpb	$CAP_MSIX, (%edi)
	jne	2f
	mov	%edi, msix_cap
	mov	4(%edi), %eax		/* table: BAR in the low 3 bits, offset in the rest */
	mov	%eax, %edx
	and	$7, %edx
	and	$~7, %eax
	call	in_bar
	mov	%eax, msix_table
2:	cmpb	$CAP_VENDOR, (%edi)
	jne	4f
	movzbl	4(%edi), %edx		/* BAR */
	mov	8(%edi), %eax		/* offset */
	call	in_bar
	cmpb	$COMMON_CFG, 3(%edi)
	jne	3f
	mov	%eax, common
3:	cmpb	$NOTIFY_CFG, 3(%edi)
	jne	4f
	mov	%eax, notify
	mov	16(%edi), %eax
	mov	%eax, multiplier
4:	movzbl	1(%edi), %esi
	jmp	1b
5:	ret

/* eax = offset, edx = BAR -> eax = address. */
in_bar:
	shl	$20, %edx
	lea	BARS(%eax, %edx), %eax
	ret

interrupts_on:
	call	irq_setup
	mov	$on_message, %eax
	push	%ebx
	mov	$VEC, %ebx
	call	irq_gate
	pop	%ebx
	call	lapic_on
	mov	msix_table, %edi	/* entry 0: address, data, unmasked */
	movl	$LAPIC, (%edi)
	movl	$0, 4(%edi)
	movl	$VEC, 8(%edi)
	movl	$0, 12(%edi)
	mov	msix_cap, %edi
	movw	$0x8000, 2(%edi)	/* MSI-X enable */
	ret

negotiate:
	mov	common, %edi
	movb	$0, STATUS(%edi)
1:	cmpb	$0, STATUS(%edi)
	jne	1b
	movb	$1, STATUS(%edi)	/* ACKNOWLEDGE */
	movb	$3, STATUS(%edi)	/* and DRIVER */
	movl	$1, FEATURE_SELECT(%edi)
	mov	FEATURE(%edi), %eax
	test	$1, %al			/* VIRTIO_F_VERSION_1 */
	EXPECT	jnz, 6, "ring_pci: no VERSION_1"
	movl	$0, DRV_FEATURE_SELECT(%edi)
	movl	$0, DRV_FEATURE(%edi)
	movl	$1, DRV_FEATURE_SELECT(%edi)
	movl	$1, DRV_FEATURE(%edi)
	movb	$11, STATUS(%edi)	/* and FEATURES_OK */
	movw	$0, QUEUE_SELECT(%edi)
	movw	$SIZE, QUEUE_SIZE(%edi)
	movw	$0, QUEUE_VECTOR(%edi)
	mov	QUEUE_VECTOR(%edi), %ax
	test	%ax, %ax
	EXPECT	jz, 7, "ring_pci: the vector was refused"
	movl	$desc, QUEUE_DESC(%edi)
	movl	$0, QUEUE_DESC + 4(%edi)
	movl	$avail, QUEUE_DRIVER(%edi)
	movl	$0, QUEUE_DRIVER + 4(%edi)
	movl	$used, QUEUE_DEVICE(%edi)
	movl	$0, QUEUE_DEVICE + 4(%edi)
	movw	$1, QUEUE_ENABLE(%edi)
	movb	$15, STATUS(%edi)	/* and DRIVER_OK */
	ret

one_buffer:
	movl	$data, desc
	movl	$BUFFER, desc + 8
	movw	$F_WRITE, desc + 12
	movw	$1, avail + 2		/* idx: ring[0] = descriptor 0 */
	mov	common, %edi
	movzwl	QUEUE_NOTIFY_OFF(%edi), %eax
	mull	multiplier
	add	notify, %eax
	movw	$0, (%eax)
1:	cli
	cmpl	$0, messages
	jne	2f
	sti
	hlt
	jmp	1b
2:	cmpl	$0x10000, used		/* flags 0, idx 1 */
	jne	3f
	cmpl	$BUFFER, used + 8	/* ring[0].len */
	EXPECT	je, 8, "ring_pci: wrong length returned"
	ret
3:	PRINT	"ring_pci: an interrupt and nothing used\n"
	EXIT	8

on_message:
	incl	messages
	movl	$0, LAPIC + 0xb0
	IRET

	.bss
	.align	16
desc:	.skip	16 * SIZE
	.align	4
avail:	.skip	6 + 2 * SIZE
	.align	4
used:	.skip	6 + 8 * SIZE
	.align	16
data:	.skip	BUFFER
common:	.skip	4
notify:	.skip	4
multiplier: .skip 4
msix_table: .skip 4
msix_cap: .skip	4
messages: .skip	4
