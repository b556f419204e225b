/* Locks between processes: who holds what, who waits, and when they go. */
#include "fstest.h"

#include <signal.h>
#include <sys/file.h>

static int lock(int fd, int cmd, short type, off_t start, off_t len)
{
	struct flock fl = { .l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = len };

	return fcntl(fd, cmd, &fl);
}

struct row {
	short held, wanted;
	off_t start, len;
	bool granted;
};

static const struct row rows[] = {
	{ F_RDLCK, F_RDLCK, 0, 10, true },	{ F_RDLCK, F_WRLCK, 0, 10, false },
	{ F_WRLCK, F_RDLCK, 0, 10, false },	{ F_WRLCK, F_WRLCK, 0, 10, false },
	{ F_WRLCK, F_WRLCK, 9, 1, false },	{ F_WRLCK, F_WRLCK, 10, 1, true },
	{ F_WRLCK, F_WRLCK, 0, 0, false },	{ F_WRLCK, F_WRLCK, 100, 0, true },
	{ F_RDLCK, F_WRLCK, 5, 100, false },
};

static void other_wants(const void *arg)
{
	const struct row *row = arg;
	const int fd = open("file", O_RDWR);

	OK(fd);
	if (row->granted)
		OK(lock(fd, F_SETLK, row->wanted, row->start, row->len));
	else
		CHECK(lock(fd, F_SETLK, row->wanted, row->start, row->len) == -1 &&
		      (errno == EAGAIN || errno == EACCES));
}

static void conflicts(const void *arg)
{
	const struct row *row = arg;
	int fd;

	make("file", 100, 1);
	OK(fd = open("file", O_RDWR));
	OK(lock(fd, F_SETLK, row->held, 0, 10));
	child(other_wants, row);
	OK(lock(fd, F_SETLK, F_UNLCK, 0, 10));
	child(other_wants, &(struct row){ 0, F_WRLCK, 0, 0, true });
}

static void not_granted(const void *arg)
{
	(void)arg;
	other_wants(&(struct row){ 0, F_WRLCK, 5, 1, false });
	other_wants(&(struct row){ 0, F_WRLCK, 50, 1, true });
}

static void split(const void *row)
{
	int fd;

	(void)row;
	make("file", 100, 1);
	OK(fd = open("file", O_RDWR));
	OK(lock(fd, F_SETLK, F_WRLCK, 0, 0));
	OK(lock(fd, F_SETLK, F_UNLCK, 40, 20));
	child(not_granted, NULL);
	OK(lock(fd, F_SETLK, F_RDLCK, 0, 20));
	child(not_granted, NULL);
}

static void asks(const void *arg)
{
	struct flock fl = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 0 };
	int fd;

	(void)arg;
	OK(fd = open("file", O_RDWR));
	OK(fcntl(fd, F_GETLK, &fl));
	CHECK(fl.l_type == F_WRLCK && fl.l_start == 7 && fl.l_len == 5);
}

static void told(const void *row)
{
	int fd;

	(void)row;
	make("file", 100, 1);
	OK(fd = open("file", O_RDWR));
	OK(lock(fd, F_SETLK, F_WRLCK, 7, 5));
	child(asks, NULL);
}

static void go_with_close(const void *row)
{
	int fd, other;

	(void)row;
	make("file", 100, 1);
	OK(fd = open("file", O_RDWR));
	OK(other = open("file", O_RDONLY));
	OK(lock(fd, F_SETLK, F_WRLCK, 0, 0));
	/* Any descriptor of the file: POSIX. */
	OK(close(other));
	child(other_wants, &(struct row){ 0, F_WRLCK, 0, 0, true });
}

static void waits(const void *row)
{
	const bool whole = *(const int *)row;
	int fd, ready[2], status;
	struct stat st;
	char byte;
	pid_t pid;

	make("file", 0, 1);
	OK(pipe(ready));
	OK(fd = open("file", O_RDWR));
	OK(whole ? flock(fd, LOCK_EX) : lock(fd, F_SETLKW, F_WRLCK, 0, 0));
	pid = fork();
	if (!pid) {
		const int own = open("file", O_RDWR);

		OK(own);
		CHECK((whole ? flock(own, LOCK_EX | LOCK_NB) : lock(own, F_SETLK, F_WRLCK, 0, 0)) ==
		      -1);
		CHECK(write(ready[1], "x", 1) == 1);
		while ((whole ? flock(own, LOCK_EX) : lock(own, F_SETLKW, F_WRLCK, 0, 0)) &&
		       errno == EINTR)
			;
		CHECK(!fstat(own, &st) && st.st_size == 5);
		_exit(0);
	}
	CHECK(read(ready[0], &byte, 1) == 1);
	usleep(50000);
	CHECK(write(fd, "first", 5) == 5);
	OK(fsync(fd));
	OK(whole ? flock(fd, LOCK_UN) : lock(fd, F_SETLK, F_UNLCK, 0, 0));
	CHECK(waitpid(pid, &status, 0) == pid && !status);
}

static void killed(const void *row)
{
	int fd, ready[2];
	char byte;
	pid_t pid;

	(void)row;
	make("file", 10, 1);
	OK(pipe(ready));
	pid = fork();
	if (!pid) {
		OK(fd = open("file", O_RDWR));
		OK(lock(fd, F_SETLK, F_WRLCK, 0, 0));
		OK(flock(fd, LOCK_EX));
		CHECK(write(ready[1], "x", 1) == 1);
		pause();
	}
	CHECK(read(ready[0], &byte, 1) == 1);
	OK(fd = open("file", O_RDWR));
	CHECK(lock(fd, F_SETLK, F_WRLCK, 0, 0) == -1);
	kill(pid, SIGKILL);
	CHECK(waitpid(pid, NULL, 0) == pid);
	for (int i = 0; lock(fd, F_SETLK, F_WRLCK, 0, 0) && i < 100; i++)
		usleep(20000);
	OK(lock(fd, F_SETLK, F_WRLCK, 0, 0));
	for (int i = 0; flock(fd, LOCK_EX | LOCK_NB) && i < 100; i++)
		usleep(20000);
	OK(flock(fd, LOCK_EX | LOCK_NB));
}

static void whole_files(const void *row)
{
	int a, b;

	(void)row;
	make("file", 10, 1);
	OK(a = open("file", O_RDONLY));
	OK(b = open("file", O_RDONLY));
	OK(flock(a, LOCK_SH));
	OK(flock(b, LOCK_SH | LOCK_NB));
	FAILS(flock(b, LOCK_EX | LOCK_NB), EWOULDBLOCK);
	OK(flock(a, LOCK_UN));
	OK(flock(b, LOCK_EX | LOCK_NB));
	FAILS(flock(a, LOCK_SH | LOCK_NB), EWOULDBLOCK);
	OK(flock(b, LOCK_SH));
	OK(flock(a, LOCK_SH | LOCK_NB));
	OK(close(b));
	OK(flock(a, LOCK_EX | LOCK_NB));
}

void locks(void)
{
	static const int kinds[] = { 0, 1 };

	for (size_t i = 0; i < COUNT(rows); i++)
		runf(conflicts, &rows[i], "a lock of type %d against %d from %d", rows[i].wanted,
		     rows[i].held, (int)rows[i].start);
	run("a lock in parts", split, NULL);
	run("F_GETLK", told, NULL);
	run("locks go when the file is closed", go_with_close, NULL);
	for (size_t i = 0; i < COUNT(kinds); i++)
		runf(waits, &kinds[i], "waiting for %s", i ? "flock" : "fcntl");
	run("locks go with their process", killed, NULL);
	run("flock", whole_files, NULL);
}
