/* What a file system must do, case by case: `fstest DIR [OPTION...] [GROUP...]`, where an option names
 * what the file system cannot do (noxattr, notmpfile, nouser: nobody is root), and groups of cases
 * are all unless some are named. */
#ifndef FSTEST_H
#define FSTEST_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

/* Runs one case in an empty directory of its own; in a child process, so that whatever it does ends
 * with it. `row` is what a table says of it. */
void run(const char *name, void (*body)(const void *row), const void *row);
/* The same with a name made up. */
void runf(void (*body)(const void *row), const void *row, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
_Noreturn void failed(const char *file, int line, const char *what);
bool option(const char *name);

#define CHECK(x)                                          \
	do {                                              \
		if (!(x))                                 \
			failed(__FILE__, __LINE__, #x);   \
	} while (0)
#define OK(x) CHECK((x) >= 0)
#define FAILS(x, number)                                                              \
	do {                                                                          \
		errno = 0;                                                            \
		if ((x) != -1 || errno != (number))                                   \
			failed(__FILE__, __LINE__, #x " should fail with " #number);  \
	} while (0)

/* A file with `size` bytes of a pattern that starts with `seed`. */
void make(const char *name, size_t size, int seed);
/* That it has exactly these. */
void expect(const char *name, size_t size, int seed);
uint8_t pattern(size_t at, int seed);
/* A child that runs fn(arg) and exits; its status must be 0. */
void child(void (*fn)(const void *arg), const void *arg);
/* Becomes an ordinary user. */
void ordinary(void);
struct stat look(const char *name);

void names(void);
void errors(void);
void renames(void);
void modes(void);
void contents(void);
void maps(void);
void orphans(void);
void locks(void);
void races(void);
void xattrs(void);
void listings(void);
void times(void);

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

#endif
