/*
 * hello: what the loader hands over. Checks the multiboot magic, then prints the command line,
 * the upper memory in KiB and the first module as text (Multiboot-0.6.96 §3.3).
 *
 * Prints:	hello: cmdline "..."
 *		hello: upper memory N KiB
 *		hello: module "..."		(only with a module)
 * Exit value:	0; 1 when eax is not the loader's magic; 2 when memory is not told
 */
#include "payload.h"

#define LOADER_MAGIC	0x2badb002
#define HAS_MEM		0x01
#define HAS_CMDLINE	0x04
#define HAS_MODS	0x08

	.text
	.globl	main
main:
	cmp	$LOADER_MAGIC, %eax
	EXPECT	je, 1, "hello: no multiboot loader"
	PRINT	"hello: cmdline \""
	testl	$HAS_CMDLINE, (%ebx)
	jz	1f
	mov	16(%ebx), %esi
	call	puts
1:	PRINT	"\"\n"

	testl	$HAS_MEM, (%ebx)
	EXPECT	jnz, 2, "hello: no memory information"
	PRINT	"hello: upper memory "
	mov	8(%ebx), %eax
	call	putdec
	PRINT	" KiB\n"

	testl	$HAS_MODS, (%ebx)
	jz	4f
	cmpl	$0, 20(%ebx)
	je	4f
	mov	24(%ebx), %edi		/* the first module: start, end, string */
	mov	(%edi), %esi
	mov	4(%edi), %ecx
	PRINT	"hello: module \""
2:	cmp	%ecx, %esi
	jae	3f
	movb	(%esi), %al
	call	putc
	inc	%esi
	jmp	2b
3:	PRINT	"\"\n"
4:	EXIT	0
