/* What every payload guest shares: ports, addresses, and how it prints and ends. */
#ifndef PAYLOAD_H
#define PAYLOAD_H

#define COM1		0x3f8
#define DEBUG_EXIT	0xf4		/* isa-debug-exit: writing v ends with status v << 1 | 1 */
#define RESET_PORT	0xcf9
#define TESTDEV_PORT	0xe0		/* 4 bytes of pc-testdev that read back */
#define TESTDEV_WINDOW	0xff000000	/* 64 KiB of pc-testdev that read back */
#define LAPIC		0xfee00000

/* Selectors of the GDT in start.S. */
#define CS32		0x08
#define DS32		0x10
#define CS64		0x18

/* puts a literal; every register is preserved. */
.macro PRINT text
	.pushsection .rodata
	.Lprint\@: .asciz "\text"
	.popsection
	push	%esi
	mov	$.Lprint\@, %esi
	call	puts
	pop	%esi
.endm

/* Ends the guest with a value; does not return. */
.macro EXIT value
	mov	$\value, %eax
	jmp	exit
.endm

/* Ends the guest with `value` and says why, unless the condition of `jcc` holds. */
.macro EXPECT jcc, value, text
	\jcc	.Lok\@
	PRINT	"\text\n"
	EXIT	\value
.Lok\@:
.endm

/*
 * Returns from an interrupt. Not by iret: the instruction emulator of KVM, which is all that a
 * software KVM has, knows it in real mode only. sti holds interrupts off for one instruction
 * more, and lret drops the saved flags: guests take interrupts only in `sti; hlt`, where the
 * arithmetic flags do not matter.
 */
.macro IRET
	sti
	lret	$4
.endm

#endif
