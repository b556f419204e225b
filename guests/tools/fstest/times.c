/* When files were changed. */
#include "fstest.h"

#include <time.h>

struct row {
	long atime, atime_ns, mtime, mtime_ns;
};

static const struct row rows[] = {
	{ 0, 0, 0, 0 },
	{ 1, 1, 1000000000, 999999999 },
	{ 1700000000, 123456789, 1, 987654321 },
	{ 0x7fffffff, 0, 0x7fffffff, 0 },
	{ 0x80000000L, 5, 0x100000000L, 6 },
	{ -1, 0, -86400, 0 },
};

static void set(const void *arg)
{
	const struct row *r = arg;
	struct timespec ts[2] = { { r->atime, r->atime_ns }, { r->mtime, r->mtime_ns } };
	static const char *const what[] = { "file", "dir", "link" };

	make("file", 1, 1);
	OK(mkdir("dir", 0755));
	OK(symlink("file", "link"));
	for (size_t i = 0; i < COUNT(what); i++) {
		struct stat st;

		OK(utimensat(AT_FDCWD, what[i], ts, AT_SYMLINK_NOFOLLOW));
		st = look(what[i]);
		CHECK(st.st_atim.tv_sec == r->atime && st.st_atim.tv_nsec == r->atime_ns);
		CHECK(st.st_mtim.tv_sec == r->mtime && st.st_mtim.tv_nsec == r->mtime_ns);
	}
}

static void partly(const void *row)
{
	struct timespec ts[2] = { { 100, 0 }, { 200, 0 } };
	time_t now;
	struct stat st;

	(void)row;
	make("file", 1, 1);
	OK(utimensat(AT_FDCWD, "file", ts, 0));
	ts[0].tv_nsec = UTIME_OMIT;
	ts[1].tv_sec = 300;
	OK(utimensat(AT_FDCWD, "file", ts, 0));
	st = look("file");
	CHECK(st.st_atime == 100 && st.st_mtime == 300);
	ts[1].tv_nsec = UTIME_NOW;
	OK(utimensat(AT_FDCWD, "file", ts, 0));
	st = look("file");
	now = time(NULL);
	/* The host's clock may be another one. */
	CHECK(st.st_atime == 100 && labs(st.st_mtime - now) < 3600);
}

static void old(const char *name)
{
	struct timespec ts[2] = { { 1000, 0 }, { 1000, 0 } };

	OK(utimensat(AT_FDCWD, name, ts, AT_SYMLINK_NOFOLLOW));
	CHECK(look(name).st_mtime == 1000);
}

static void by_changes(const void *row)
{
	struct stat before, after;
	int fd;

	(void)row;
	make("file", 100, 1);
	OK(mkdir("dir", 0755));
	old("file");
	OK(fd = open("file", O_RDWR));
	CHECK(look("file").st_mtime == 1000);
	OK(write(fd, "x", 1));
	OK(fsync(fd));
	CHECK(look("file").st_mtime > 1000);
	old("file");
	OK(ftruncate(fd, 10));
	CHECK(look("file").st_mtime > 1000);
	old("file");
	OK(truncate("file", 10));
	OK(open("file", O_RDWR | O_TRUNC));
	CHECK(look("file").st_mtime > 1000);
	old("file");
	before = look("file");
	OK(chmod("file", 0600));
	after = look("file");
	CHECK(after.st_mtime == 1000 && after.st_ctime >= before.st_ctime);
}

static void of_directories(const void *row)
{
	static const char *const steps[] = { "create", "mkdir", "symlink", "link", "rename", "unlink",
					     "rmdir" };

	(void)row;
	OK(mkdir("dir", 0755));
	make("file", 1, 1);
	for (size_t i = 0; i < COUNT(steps); i++) {
		old("dir");
		switch (i) {
		case 0:
			make("dir/a", 1, 1);
			break;
		case 1:
			OK(mkdir("dir/d", 0755));
			break;
		case 2:
			OK(symlink("x", "dir/s"));
			break;
		case 3:
			OK(link("file", "dir/l"));
			break;
		case 4:
			OK(rename("dir/a", "dir/b"));
			break;
		case 5:
			OK(unlink("dir/b"));
			break;
		case 6:
			OK(rmdir("dir/d"));
			break;
		}
		CHECK(look("dir").st_mtime > 1000);
	}
	old("dir");
	OK(chmod("dir/l", 0600));
	CHECK(look("dir").st_mtime == 1000);
}

static void not_the_owner(const void *row)
{
	struct timespec ts[2] = { { 5, 0 }, { 5, 0 } };

	(void)row;
	make("file", 1, 1);
	OK(chmod("file", 0666));
	ordinary();
	FAILS(utimensat(AT_FDCWD, "file", ts, 0), EPERM);
	OK(utimensat(AT_FDCWD, "file", NULL, 0));
}

void times(void)
{
	for (size_t i = 0; i < COUNT(rows); i++)
		runf(set, &rows[i], "times %ld and %ld", rows[i].atime, rows[i].mtime);
	run("one of both times", partly, NULL);
	run("times of files that change", by_changes, NULL);
	run("times of directories that change", of_directories, NULL);
	if (!option("nouser"))
		run("times of others' files", not_the_owner, NULL);
}
