/*
 * A virtio device on PCI, by the configuration ports; one queue, in RAM of its own. What a guest
 * does: virtio_find, then virtio_start, then it fills vq_desc and vq_avail and writes the queue's
 * number to the address in virtio_notify. virtio-v1.3 §4.1.
 *
 * last_word	ebx = multiboot information -> eax = the number that the command line's last word
 *		begins with, dl = the character behind it.
 * virtio_find	eax = device and vendor -> eax = 0, or what is missing: 1 the device, 2 its common
 *		configuration, 3 its notification structure. BARs are moved.
 * virtio_msix	eax = vector: message 0 goes there, and is the queue's. After virtio_find.
 * virtio_start	negotiates INDIRECT_DESC and VERSION_1, starts queue 0.
 */
#include "virtio_pci.h"

#define BARS		0xd0000000	/* where the BARs go: 1 MiB for each */

/* Configuration space. */
#define COMMAND		0x04
#define BAR0		0x10
#define CAP_POINTER	0x34
#define CMD_MEM_MASTER	0x06
#define CAP_VENDOR	0x09
#define CAP_MSIX	0x11
#define COMMON_CFG	1
#define NOTIFY_CFG	2

/* Common configuration. virtio-v1.3 §4.1.4.3. */
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
	.globl	last_word
last_word:
	mov	16(%ebx), %esi
	xor	%eax, %eax
	xor	%edx, %edx
1:	movzbl	(%esi), %ecx
	inc	%esi
	test	%ecx, %ecx
	jz	4f
	cmp	$' ', %ecx
	je	2f
	mov	%cl, %dl
	sub	$'0', %ecx
	cmp	$9, %ecx
	ja	1b
	xor	%edx, %edx
	imul	$10, %eax
	add	%ecx, %eax
	jmp	1b
2:	cmpb	$0, (%esi)		/* a space at the very end is none between words */
	je	1b
	xor	%eax, %eax
	jmp	1b
4:	ret

	.globl	virtio_find
virtio_find:
	mov	%eax, %esi
	mov	$1 << 31, %ebx		/* bus 0, slot 0 */
1:	xor	%ecx, %ecx
	call	config_read
	cmp	%esi, %eax
	je	2f
	add	$1 << 11, %ebx		/* the next slot */
	cmp	$(1 << 31) + (32 << 11), %ebx
	jne	1b
	mov	$1, %eax
	ret
2:	call	move_bars
	call	find_structures
	mov	$2, %eax
	cmpl	$0, common
	je	3f
	mov	$3, %eax
	cmpl	$0, virtio_notify
	je	3f
	xor	%eax, %eax
3:	ret

/* ebx = the function, ecx = the register -> eax. */
config_read:
	lea	(%ebx, %ecx), %eax
	mov	$0xcf8, %dx
	out	%eax, %dx
	mov	$0xcfc, %dx
	in	%dx, %eax
	ret

/* ebx = the function, ecx = the register, eax = the value. */
config_write:
	push	%eax
	lea	(%ebx, %ecx), %eax
	mov	$0xcf8, %dx
	out	%eax, %dx
	pop	%eax
	mov	$0xcfc, %dx
	out	%eax, %dx
	ret

/* ebx = the function. Gives each memory BAR n the address BARS + n MiB. */
move_bars:
	mov	$COMMAND, %ecx
	xor	%eax, %eax
	call	config_write
	xor	%edi, %edi
1:	lea	BAR0(, %edi, 4), %ecx
	mov	$-1, %eax
	call	config_write
	call	config_read
	test	%eax, %eax
	jz	2f			/* not there */
	test	$1, %al
	jnz	2f			/* I/O */
	mov	%eax, %esi
	mov	%edi, %eax
	shl	$20, %eax
	add	$BARS, %eax
	call	config_write
	and	$6, %esi
	cmp	$4, %esi		/* 64 bits: its upper half is the next register */
	jne	2f
	add	$4, %ecx
	xor	%eax, %eax
	call	config_write
	inc	%edi
2:	inc	%edi
	cmp	$6, %edi
	jb	1b
	mov	$COMMAND, %ecx
	mov	$CMD_MEM_MASTER, %eax
	jmp	config_write

/* ebx = the function. Fills common, virtio_notify, multiplier, msix_table. */
find_structures:
	mov	$CAP_POINTER, %ecx
	call	config_read
	movzbl	%al, %esi
1:	test	%esi, %esi
	jz	4f
	mov	%esi, %ecx
	call	config_read
	mov	%eax, %edi		/* id, next, length, type */
	cmp	$CAP_MSIX, %al
	je	5f
	cmp	$CAP_VENDOR, %al
	jne	3f
	add	$4, %ecx
	call	config_read
	movzbl	%al, %ebp		/* BAR */
	shl	$20, %ebp
	add	$4, %ecx
	call	config_read		/* offset */
	lea	BARS(%ebp, %eax), %eax
	mov	%edi, %edx
	shr	$24, %edx
	cmp	$COMMON_CFG, %dl
	jne	2f
	mov	%eax, common
	jmp	3f
2:	cmp	$NOTIFY_CFG, %dl
	jne	3f
	mov	%eax, virtio_notify
	add	$8, %ecx
	call	config_read
	mov	%eax, multiplier
3:	mov	%edi, %esi
	shr	$8, %esi
	and	$0xff, %esi
	jmp	1b
4:	ret
5:	mov	%ecx, msix_cap
	add	$4, %ecx
	call	config_read		/* the table: BAR in the low 3 bits, offset in the rest */
	mov	%eax, %ebp
	and	$7, %ebp
	shl	$20, %ebp
	and	$~7, %eax
	lea	BARS(%ebp, %eax), %eax
	mov	%eax, msix_table
	jmp	3b

	.globl	virtio_msix
virtio_msix:
	mov	msix_table, %edi	/* entry 0: address, data, unmasked */
	movl	$LAPIC, (%edi)
	movl	$0, 4(%edi)
	mov	%eax, 8(%edi)
	movl	$0, 12(%edi)
	movw	$0, vector
	mov	msix_cap, %ecx
	call	config_read
	or	$1 << 31, %eax		/* MSI-X enable */
	jmp	config_write

	.globl	virtio_start
virtio_start:
	mov	common, %edi
	movb	$0, STATUS(%edi)
1:	cmpb	$0, STATUS(%edi)
	jne	1b
	movb	$1, STATUS(%edi)	/* ACKNOWLEDGE */
	movb	$3, STATUS(%edi)	/* and DRIVER */
	movl	$0, DRV_FEATURE_SELECT(%edi)
	movl	$1 << 28, DRV_FEATURE(%edi)	/* INDIRECT_DESC */
	movl	$1, DRV_FEATURE_SELECT(%edi)
	movl	$1, DRV_FEATURE(%edi)	/* VERSION_1 */
	movb	$11, STATUS(%edi)	/* and FEATURES_OK */
	movw	$0, QUEUE_SELECT(%edi)
	movw	$VQ_SIZE, QUEUE_SIZE(%edi)
	mov	vector, %ax
	mov	%ax, QUEUE_VECTOR(%edi)
	movl	$vq_desc, QUEUE_DESC(%edi)
	movl	$0, QUEUE_DESC + 4(%edi)
	movl	$vq_avail, QUEUE_DRIVER(%edi)
	movl	$0, QUEUE_DRIVER + 4(%edi)
	movl	$vq_used, QUEUE_DEVICE(%edi)
	movl	$0, QUEUE_DEVICE + 4(%edi)
	movw	$1, QUEUE_ENABLE(%edi)
	movb	$15, STATUS(%edi)	/* and DRIVER_OK */
	movzwl	QUEUE_NOTIFY_OFF(%edi), %eax
	mull	multiplier
	add	%eax, virtio_notify
	ret

	.data
vector:	.word	0xffff

	.bss
	.globl	vq_desc, vq_avail, vq_used, virtio_notify
	.align	16
vq_desc: .skip	16 * VQ_SIZE
	.align	4
vq_avail: .skip	6 + 2 * VQ_SIZE
	.align	4
vq_used: .skip	6 + 8 * VQ_SIZE
	.align	4
common:	.skip	4
virtio_notify: .skip 4
multiplier: .skip 4
msix_table: .skip 4
msix_cap: .skip	4
