#include "fstest.h"

#include <ftw.h>
#include <stdarg.h>
#include <time.h>

static int cases, failures;
static char **options;
static const char *current;

bool option(const char *name)
{
	for (char **o = options; *o; o++)
		if (!strcmp(*o, name))
			return true;
	return false;
}

_Noreturn void failed(const char *file, int line, const char *what)
{
	const int number = errno;

	printf("FAIL %s: %s:%d: %s (errno %d, %s)\n", current, file, line, what, number,
	       strerror(number));
	fflush(stdout);
	_exit(1);
}

static int drop(const char *path, const struct stat *st, int what, struct FTW *at)
{
	(void)st;
	(void)at;
	if (what == FTW_DP ? rmdir(path) : unlink(path)) {
		printf("FAIL %s: cannot remove %s: %s\n", current, path, strerror(errno));
		failures++;
	}
	return 0;
}

void run(const char *name, void (*body)(const void *row), const void *row)
{
	int status;
	pid_t pid;

	current = name;
	cases++;
	if (mkdir("work", 0755)) {
		printf("FAIL %s: no directory to work in: %s\n", name, strerror(errno));
		failures++;
		return;
	}
	fflush(stdout);
	pid = fork();
	if (!pid) {
		umask(0);
		alarm(60);
		if (chdir("work"))
			failed(__FILE__, __LINE__, "chdir");
		body(row);
		fflush(stdout);
		_exit(0);
	}
	waitpid(pid, &status, 0);
	if (status) {
		if (WIFSIGNALED(status))
			printf("FAIL %s: signal %d\n", name, WTERMSIG(status));
		failures++;
	}
	nftw("work", drop, 16, FTW_DEPTH | FTW_PHYS);
}

void runf(void (*body)(const void *row), const void *row, const char *format, ...)
{
	char name[400];
	va_list args;

	va_start(args, format);
	vsnprintf(name, sizeof(name), format, args);
	va_end(args);
	run(name, body, row);
}

uint8_t pattern(size_t at, int seed)
{
	return (uint8_t)(at * 31 + (at >> 8) * 7 + (at >> 16) + (size_t)seed);
}

void make(const char *name, size_t size, int seed)
{
	uint8_t *data = malloc(size + 1);
	int fd = open(name, O_CREAT | O_TRUNC | O_WRONLY, 0644);

	CHECK(fd >= 0 && data);
	for (size_t i = 0; i < size; i++)
		data[i] = pattern(i, seed);
	CHECK(write(fd, data, size) == (ssize_t)size);
	CHECK(!close(fd));
	free(data);
}

void expect(const char *name, size_t size, int seed)
{
	uint8_t *data = malloc(size + 1);
	int fd = open(name, O_RDONLY);
	size_t got = 0;
	ssize_t n;

	CHECK(fd >= 0 && data);
	while (got <= size && (n = read(fd, data + got, size + 1 - got)) > 0)
		got += (size_t)n;
	CHECK(got == size);
	for (size_t i = 0; i < size; i++)
		CHECK(data[i] == pattern(i, seed));
	close(fd);
	free(data);
}

void child(void (*fn)(const void *arg), const void *arg)
{
	pid_t pid = fork();
	int status = -1;

	CHECK(pid >= 0);
	if (!pid) {
		fn(arg);
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && !status);
}

void ordinary(void)
{
	OK(setgid(1000));
	OK(setuid(1000));
}

struct stat look(const char *name)
{
	struct stat st;

	CHECK(!lstat(name, &st));
	return st;
}

static const struct {
	const char *name;
	void (*run)(void);
} groups[] = {
	{ "names", names },	{ "errors", errors },	{ "renames", renames },
	{ "modes", modes },	{ "contents", contents }, { "maps", maps },
	{ "orphans", orphans }, { "locks", locks },	{ "races", races },
	{ "xattrs", xattrs },	{ "listings", listings }, { "times", times },
};

int main(int argc, char **argv)
{
	struct timespec t;
	bool some = false;

	if (argc < 2 || chdir(argv[1])) {
		fprintf(stderr, "usage: fstest DIR [noxattr] [notmpfile] [nouser] [GROUP...]\n");
		return 2;
	}
	options = argv + 2;
	umask(0);
	for (size_t i = 0; i < COUNT(groups); i++)
		some |= option(groups[i].name);
	for (size_t i = 0; i < COUNT(groups); i++) {
		if (some && !option(groups[i].name))
			continue;
		groups[i].run();
		clock_gettime(CLOCK_BOOTTIME, &t);
		printf("%s: %d cases so far, up %ld s\n", groups[i].name, cases, (long)t.tv_sec);
		fflush(stdout);
	}
	printf("fstest=%d cases, %d failures\n", cases, failures);
	return failures ? 1 : 0;
}
