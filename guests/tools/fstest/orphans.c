/* Files that are open and have no name (any more). */
#include "fstest.h"

static int orphan(int how)
{
	int fd;

	make("file", 5000, 1);
	OK(fd = open("file", O_RDWR));
	if (how == 0)
		OK(unlink("file"));
	if (how == 1) {
		make("other", 10, 2);
		OK(rename("other", "file"));
	}
	if (how == 2) {
		OK(link("file", "second"));
		OK(unlink("file"));
	}
	return fd;
}

static void works(const void *row)
{
	const int how = *(const int *)row, fd = orphan(how);
	uint8_t data[100];
	struct stat st;

	CHECK(pread(fd, data, 100, 1000) == 100 && data[0] == pattern(1000, 1));
	CHECK(pwrite(fd, "new", 3, 5000) == 3);
	CHECK(!fstat(fd, &st) && st.st_size == 5003 && st.st_nlink == (how == 2));
	OK(ftruncate(fd, 10));
	CHECK(!fstat(fd, &st) && st.st_size == 10);
	OK(fchmod(fd, 0600));
	CHECK(!fstat(fd, &st) && st.st_mode == (S_IFREG | 0600));
	OK(futimens(fd, (struct timespec[2]){ { 100, 0 }, { 200, 0 } }));
	CHECK(!fstat(fd, &st) && st.st_mtime == 200);
	OK(fsync(fd));
	OK(fallocate(fd, 0, 0, 8192));
	CHECK(!fstat(fd, &st) && st.st_size == 8192);
	if (!option("nouser")) {
		OK(fchown(fd, 11, 12));
		CHECK(!fstat(fd, &st) && st.st_uid == 11);
	}
	if (how == 1)
		expect("file", 10, 2);
}

static void reopened(const void *row)
{
	const int fd = orphan(*(const int *)row);
	char path[32];
	uint8_t byte;
	int again;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	OK(again = open(path, O_RDONLY));
	CHECK(pread(again, &byte, 1, 7) == 1 && byte == pattern(7, 1));
}

static void looked_at(const void *row)
{
	struct stat st;
	int fd;

	(void)row;
	make("file", 100, 1);
	OK(fd = open("file", O_PATH));
	OK(unlink("file"));
	CHECK(!fstat(fd, &st) && st.st_nlink == 0 && st.st_size == 100);
}

static void directory(const void *row)
{
	struct stat st;
	int fd;

	(void)row;
	OK(mkdir("dir", 0755));
	OK(fd = open("dir", O_RDONLY | O_DIRECTORY));
	OK(chdir("dir"));
	OK(rmdir("../dir"));
	CHECK(!fstat(fd, &st) && st.st_nlink == 0);
	FAILS(open("new", O_CREAT | O_RDWR, 0644), ENOENT);
	FAILS(mkdir("new", 0755), ENOENT);
	CHECK(!stat(".", &st));
}

static void same_name(const void *row)
{
	uint8_t byte;
	int fds[20];

	(void)row;
	for (int i = 0; i < 20; i++) {
		make("file", 10, i);
		OK(fds[i] = open("file", O_RDONLY));
		OK(unlink("file"));
	}
	for (int i = 0; i < 20; i++)
		CHECK(pread(fds[i], &byte, 1, 3) == 1 && byte == pattern(3, i));
}

static void never_named(const void *row)
{
	char path[32];
	struct stat st;
	int fd;

	(void)row;
	OK(fd = open(".", O_TMPFILE | O_RDWR, 0640));
	CHECK(write(fd, "data", 4) == 4);
	CHECK(!fstat(fd, &st) && st.st_nlink == 0 && st.st_mode == (S_IFREG | 0640));
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	OK(linkat(AT_FDCWD, path, AT_FDCWD, "named", AT_SYMLINK_FOLLOW));
	CHECK(look("named").st_size == 4 && look("named").st_nlink == 1);
	FAILS(linkat(AT_FDCWD, path, AT_FDCWD, "named", AT_SYMLINK_FOLLOW), EEXIST);
	OK(fd = open(".", O_TMPFILE | O_RDWR | O_EXCL, 0640));
	CHECK(pwrite(fd, "more", 4, 4096) == 4);
}

static void hard_links(const void *row)
{
	char name[16];

	(void)row;
	make("file", 10, 1);
	for (int i = 0; i < 50; i++) {
		snprintf(name, sizeof(name), "link%d", i);
		OK(link("file", name));
	}
	CHECK(look("file").st_nlink == 51 && look("link49").st_ino == look("file").st_ino);
	OK(unlink("file"));
	OK(chmod("link3", 0600));
	CHECK(look("link7").st_mode == (S_IFREG | 0600) && look("link7").st_nlink == 50);
	make("link9", 20, 2);
	expect("link0", 20, 2);
}

void orphans(void)
{
	static const int ways[] = { 0, 1, 2 };
	static const char *const how[] = { "unlinked", "replaced", "unlinked, one name left" };

	for (size_t i = 0; i < COUNT(ways); i++) {
		runf(works, &ways[i], "open and %s", how[i]);
		if (i != 1 || !option("noreopen"))
			runf(reopened, &ways[i], "opened again and %s", how[i]);
	}
	run("O_PATH and unlinked", looked_at, NULL);
	run("a directory that is gone", directory, NULL);
	run("twenty files of one name", same_name, NULL);
	if (!option("notmpfile"))
		run("O_TMPFILE", never_named, NULL);
	run("fifty names of one file", hard_links, NULL);
}
