/*
 * blkload: the device side of virtio-blk under load. Finds a disk on PCI by the configuration
 * ports, sets its queue up once, and then only moves avail.idx: as many rounds as the command
 * line's last word says, each of BATCH reads of 4 KiB behind one notification, waited for by
 * looking at used.idx. Interrupts are off. A guest instruction costs next to nothing of it, so
 * what is timed between the two lines is the VMM's own work. virtio-v1.3 §4.1, §5.2.
 *
 * Prints:	blkload: go
 *		blkload: N rounds, M statuses ok	(M is BATCH when all was well)
 * Exit value:	0; 1..4 the check that failed
 */
#include "payload.h"

#define BARS		0xd0000000	/* where the BARs go: 1 MiB for each */
#define SIZE		256
#define BATCH		128
#define BYTES		4096
#define BUFFERS		0x400000
#define F_NEXT		1
#define F_WRITE		2
#define F_INDIRECT	4
#define NO_INTERRUPT	1

/* Configuration space. */
#define COMMAND		0x04
#define BAR0		0x10
#define CAP_POINTER	0x34
#define CMD_MEM_MASTER	0x06
#define CAP_VENDOR	0x09
#define COMMON_CFG	1
#define NOTIFY_CFG	2

/* Common configuration. virtio-v1.3 §4.1.4.3. */
#define DRV_FEATURE_SELECT 0x08
#define DRV_FEATURE	0x0c
#define STATUS		0x14
#define QUEUE_SELECT	0x16
#define QUEUE_SIZE	0x18
#define QUEUE_ENABLE	0x1c
#define QUEUE_NOTIFY_OFF 0x1e
#define QUEUE_DESC	0x20
#define QUEUE_DRIVER	0x28
#define QUEUE_DEVICE	0x30

	.text
	.globl	main
main:
	call	last_word
	mov	%eax, rounds
	mov	$1 << 31, %ebx		/* bus 0, slot 0 */
1:	xor	%ecx, %ecx
	call	config_read
	cmp	$0x10421af4, %eax	/* modern block device */
	je	2f
	add	$1 << 11, %ebx		/* the next slot */
	cmp	$(1 << 31) + (32 << 11), %ebx
	jne	1b
	PRINT	"blkload: no disk\n"
	EXIT	1
2:	call	move_bars
	call	find_structures
	cmpl	$0, common
	EXPECT	jne, 2, "blkload: no common configuration"
	cmpl	$0, notify
	EXPECT	jne, 3, "blkload: no notification structure"
	call	requests
	call	negotiate
	PRINT	"blkload: go\n"
	call	load
	mov	rounds, %eax
	PRINT	"blkload: "
	call	putdec
	PRINT	" rounds, "
	call	statuses
	call	putdec
	PRINT	" statuses ok\n"
	cmp	$BATCH, %eax
	EXPECT	je, 4, "blkload: a request failed"
	EXIT	0

/* ebx = multiboot information -> eax = the number that is the command line's last word. */
last_word:
	mov	16(%ebx), %esi
	xor	%eax, %eax
1:	movzbl	(%esi), %ecx
	inc	%esi
	test	%ecx, %ecx
	jz	4f
	cmp	$' ', %ecx
	je	2f
	sub	$'0', %ecx
	cmp	$9, %ecx
	ja	1b
	imul	$10, %eax
	add	%ecx, %eax
	jmp	1b
2:	cmpb	$0, (%esi)		/* a space at the very end is none between words */
	je	1b
	xor	%eax, %eax
	jmp	1b
4:	ret

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

/* ebx = the function. Fills common, notify, multiplier. */
find_structures:
	mov	$CAP_POINTER, %ecx
	call	config_read
	movzbl	%al, %esi
1:	test	%esi, %esi
	jz	4f
	mov	%esi, %ecx
	call	config_read
	mov	%eax, %edi		/* id, next, length, type */
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
	mov	%eax, notify
	add	$8, %ecx
	call	config_read
	mov	%eax, multiplier
3:	mov	%edi, %esi
	shr	$8, %esi
	and	$0xff, %esi
	jmp	1b
4:	ret

/* BATCH chains of header, buffer and status, each in an indirect table of its own. */
requests:
	xor	%ecx, %ecx
1:	mov	%ecx, %edi		/* the table: 48 bytes */
	imul	$48, %edi
	add	$tables, %edi
	mov	%ecx, %esi		/* the header: type 0, sector 8n */
	shl	$4, %esi
	add	$headers, %esi
	lea	(, %ecx, 8), %eax
	mov	%eax, 8(%esi)
	mov	%esi, (%edi)
	movl	$16, 8(%edi)
	movl	$F_NEXT + (1 << 16), 12(%edi)
	mov	%ecx, %eax
	imul	$BYTES, %eax
	add	$BUFFERS, %eax
	mov	%eax, 16(%edi)
	movl	$BYTES, 24(%edi)
	movl	$F_NEXT + F_WRITE + (2 << 16), 28(%edi)
	lea	status(%ecx), %eax
	movb	$0xff, (%eax)
	mov	%eax, 32(%edi)
	movl	$1, 40(%edi)
	movl	$F_WRITE, 44(%edi)
	mov	%ecx, %esi
	shl	$4, %esi
	mov	%edi, desc(%esi)
	movl	$48, desc + 8(%esi)
	movl	$F_INDIRECT, desc + 12(%esi)
	mov	%cx, avail + 4(, %ecx, 2)
	mov	%cx, avail + 4 + 2 * BATCH(, %ecx, 2)
	inc	%ecx
	cmp	$BATCH, %ecx
	jb	1b
	movw	$NO_INTERRUPT, avail
	ret

negotiate:
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
	movw	$SIZE, QUEUE_SIZE(%edi)
	movl	$desc, QUEUE_DESC(%edi)
	movl	$0, QUEUE_DESC + 4(%edi)
	movl	$avail, QUEUE_DRIVER(%edi)
	movl	$0, QUEUE_DRIVER + 4(%edi)
	movl	$used, QUEUE_DEVICE(%edi)
	movl	$0, QUEUE_DEVICE + 4(%edi)
	movw	$1, QUEUE_ENABLE(%edi)
	movb	$15, STATUS(%edi)	/* and DRIVER_OK */
	movzwl	QUEUE_NOTIFY_OFF(%edi), %eax
	mull	multiplier
	add	%eax, notify
	ret

load:
	mov	rounds, %ecx
	mov	notify, %edi
	xor	%eax, %eax
	xor	%edx, %edx
	test	%ecx, %ecx
	jz	3f
1:	add	$BATCH, %ax
	mov	%ax, avail + 2
	mov	%dx, (%edi)
2:	pause
	cmp	used + 2, %ax
	jne	2b
	dec	%ecx
	jnz	1b
3:	ret

/* How many requests said OK -> eax. */
statuses:
	xor	%eax, %eax
	xor	%ecx, %ecx
1:	cmpb	$1, status(%ecx)
	adc	$0, %eax
	inc	%ecx
	cmp	$BATCH, %ecx
	jb	1b
	ret

	.bss
	.align	16
desc:	.skip	16 * SIZE
tables:	.skip	48 * BATCH
headers: .skip	16 * BATCH
	.align	4
avail:	.skip	6 + 2 * SIZE
	.align	4
used:	.skip	6 + 8 * SIZE
status:	.skip	BATCH
	.align	4
common:	.skip	4
notify:	.skip	4
multiplier: .skip 4
rounds:	.skip	4
