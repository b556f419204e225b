/* Files in memory, and programs that run from them. */
#include "fstest.h"

#include <signal.h>

#define SIZE 100000

static uint8_t *mapped(const char *name, int prot, int flags, size_t size)
{
	const int fd = open(name, prot & PROT_WRITE && flags == MAP_SHARED ? O_RDWR : O_RDONLY);
	uint8_t *p;

	OK(fd);
	p = mmap(NULL, size, prot, flags, fd, 0);
	CHECK(p != MAP_FAILED);
	close(fd);
	return p;
}

static void seen(const void *row)
{
	const int flags = *(const int *)row;
	uint8_t *p;

	make("file", SIZE, 1);
	p = mapped("file", PROT_READ, flags, SIZE);
	for (size_t i = 0; i < SIZE; i++)
		CHECK(p[i] == pattern(i, 1));
	/* Behind the end of the file, the page is zeros. */
	CHECK(!p[SIZE] && !p[(SIZE | 4095) - 1]);
}

static void written(const void *row)
{
	const int way = *(const int *)row;
	uint8_t *p;
	int fd;

	make("file", SIZE, 1);
	OK(fd = open("file", O_RDWR));
	p = mapped("file", PROT_READ | PROT_WRITE, MAP_SHARED, SIZE);
	for (size_t i = 0; i < SIZE; i++)
		p[i] = pattern(i, 2);
	if (way == 0)
		CHECK(!msync(p, SIZE, MS_SYNC));
	if (way == 1)
		CHECK(!munmap(p, SIZE));
	if (way == 2)
		OK(fsync(fd));
	expect("file", SIZE, 2);
	CHECK(look("file").st_size == SIZE);
}

static void both_ways(const void *row)
{
	uint8_t *p, byte;
	int fd;

	(void)row;
	make("file", SIZE, 1);
	OK(fd = open("file", O_RDWR));
	p = mapped("file", PROT_READ | PROT_WRITE, MAP_SHARED, SIZE);
	CHECK(pwrite(fd, "Z", 1, 5000) == 1);
	CHECK(p[5000] == 'Z');
	p[6000] = 'Y';
	CHECK(pread(fd, &byte, 1, 6000) == 1 && byte == 'Y');
}

static void own_copy(const void *row)
{
	uint8_t *p;

	(void)row;
	make("file", SIZE, 1);
	p = mapped("file", PROT_READ | PROT_WRITE, MAP_PRIVATE, SIZE);
	memset(p, 0, SIZE);
	expect("file", SIZE, 1);
}

static void of_unlinked(const void *row)
{
	uint8_t *p;

	(void)row;
	make("file", SIZE, 1);
	p = mapped("file", PROT_READ | PROT_WRITE, MAP_SHARED, SIZE);
	OK(unlink("file"));
	CHECK(p[SIZE - 1] == pattern(SIZE - 1, 1));
	memset(p, 1, SIZE);
	CHECK(!msync(p, SIZE, MS_SYNC));
}

static void appenders_map(const void *row)
{
	uint8_t *p;
	int fd, other;

	(void)row;
	make("file", SIZE, 1);
	OK(fd = open("file", O_RDWR | O_APPEND));
	p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(p != MAP_FAILED);
	p[0] = 'M';
	CHECK(write(fd, "tail", 4) == 4);
	CHECK(!msync(p, SIZE, MS_SYNC));
	/* Written back where it was, not at the end. */
	OK(other = open("file", O_RDONLY));
	CHECK(look("file").st_size == SIZE + 4);
	CHECK(pread(other, p + 1, 1, 0) == 1 && p[1] == 'M');
}

static void beyond(const void *row)
{
	uint8_t *p;
	int status;
	pid_t pid;

	(void)row;
	make("file", 8192, 1);
	p = mapped("file", PROT_READ, MAP_SHARED, 8192);
	CHECK(p[4096] == pattern(4096, 1));
	OK(truncate("file", 4096));
	pid = fork();
	if (!pid) {
		*(volatile uint8_t *)(p + 4096);
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
}

static void copy_self(void)
{
	static char data[4 << 20];
	int in = open("/proc/self/exe", O_RDONLY), out = open("prog", O_CREAT | O_WRONLY, 0755);
	ssize_t n = read(in, data, sizeof(data));

	CHECK(n > 0 && write(out, data, (size_t)n) == n);
	OK(close(out));
	close(in);
}

static void executed(const void *row)
{
	int status;
	pid_t pid;

	(void)row;
	copy_self();
	pid = fork();
	if (!pid) {
		const int null = open("/dev/null", O_WRONLY);

		dup2(null, 2);
		execl("./prog", "./prog", (char *)NULL);
		_exit(99);
	}
	CHECK(waitpid(pid, &status, 0) == pid);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 2); /* its usage */
	OK(chmod("prog", 0644));
	FAILS(execl("./prog", "./prog", (char *)NULL), EACCES);
}

static void busy(const void *row)
{
	int fd;

	(void)row;
	copy_self();
	OK(fd = open("prog", O_WRONLY));
	FAILS(execl("./prog", "./prog", (char *)NULL), ETXTBSY);
	close(fd);
}

void maps(void)
{
	static const int flags[] = { MAP_SHARED, MAP_PRIVATE }, ways[] = { 0, 1, 2, 3 };

	for (size_t i = 0; i < COUNT(flags); i++)
		runf(seen, &flags[i], "mmap %s shows the file", i ? "private" : "shared");
	for (size_t i = 0; i < COUNT(ways); i++)
		runf(written, &ways[i], "mmap writes, way %d", ways[i]);
	run("mmap and write see each other", both_ways, NULL);
	run("a private mapping is a copy", own_copy, NULL);
	run("mmap of an unlinked file", of_unlinked, NULL);
	run("mmap of a file for appending", appenders_map, NULL);
	run("mmap beyond the end", beyond, NULL);
	run("a program runs", executed, NULL);
	run("a program being written does not", busy, NULL);
}
