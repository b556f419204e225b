/* Permissions: what is set, what is checked, what is taken away. */
#include "fstest.h"

static const mode_t all[] = { 0, 0400, 0200, 0100, 0644, 0755, 0777, 0600, 0111, 0222,
			      0444, 01777, 02755, 04755, 06711, 07777 };

static void of_file(const void *row)
{
	const mode_t mode = *(const mode_t *)row;
	int fd = open("new", O_CREAT | O_RDWR, mode);

	OK(fd);
	CHECK(look("new").st_mode == (S_IFREG | mode));
	OK(mkfifo("fifo", mode));
	CHECK(look("fifo").st_mode == (S_IFIFO | mode));
	make("file", 1, 1);
	OK(chmod("file", mode));
	CHECK(look("file").st_mode == (S_IFREG | mode));
	OK(fchmod(fd, 0600));
	CHECK(look("new").st_mode == (S_IFREG | 0600));
}

static void of_dir(const void *row)
{
	const mode_t mode = *(const mode_t *)row;

	OK(mkdir("new", mode & 01777));
	CHECK(look("new").st_mode == (S_IFDIR | (mode & 01777)));
	OK(mkdir("dir", 0755));
	OK(chmod("dir", mode));
	CHECK(look("dir").st_mode == (S_IFDIR | mode));
}

static void masked(const void *row)
{
	const mode_t mask = *(const mode_t *)row & 0777;
	int fd;

	umask(mask);
	OK(fd = open("new", O_CREAT | O_RDWR, 0777));
	CHECK(look("new").st_mode == (S_IFREG | (0777 & ~mask)));
	OK(mkdir("dir", 0777));
	CHECK(look("dir").st_mode == (S_IFDIR | (0777 & ~mask)));
	OK(mknod("node", S_IFREG | 0666, 0));
	CHECK(look("node").st_mode == (S_IFREG | (0666 & ~mask)));
}

/* ---- as an ordinary user ---- */

struct right {
	uid_t uid; /* the file's */
	gid_t gid;
	mode_t mode;
	int may; /* R_OK... of what user 1000 may */
};

static const struct right rights[] = {
	{ 0, 0, 0600, 0 },	    { 0, 0, 0604, R_OK },
	{ 0, 0, 0602, W_OK },	    { 0, 0, 0606, R_OK | W_OK },
	{ 0, 0, 0701, X_OK },	    { 0, 0, 0777, R_OK | W_OK | X_OK },
	{ 0, 1000, 0640, R_OK },    { 0, 1000, 0620, W_OK },
	{ 0, 1000, 0607, 0 },	    { 0, 1000, 0670, R_OK | W_OK | X_OK },
	{ 1000, 0, 0600, R_OK | W_OK }, { 1000, 0, 0400, R_OK },
	{ 1000, 0, 0200, W_OK },    { 1000, 0, 0077, 0 },
	{ 1000, 1000, 0100, X_OK }, { 1000, 1000, 0070, 0 },
};

static void checked(const void *arg)
{
	const struct right *r = arg;

	make("file", 10, 1);
	OK(chown("file", r->uid, r->gid));
	OK(chmod("file", r->mode));
	ordinary();
	for (int right = 1; right <= 4; right *= 2) {
		if (r->may & right)
			OK(access("file", right));
		else
			FAILS(access("file", right), EACCES);
	}
	if (r->may & R_OK)
		OK(open("file", O_RDONLY));
	else
		FAILS(open("file", O_RDONLY), EACCES);
	if (r->may & W_OK)
		OK(open("file", O_WRONLY));
	else
		FAILS(open("file", O_WRONLY | O_TRUNC), EACCES);
	if (r->uid == 1000)
		OK(chmod("file", 0644));
	else
		FAILS(chmod("file", 0644), EPERM);
}

static void in_dir(const void *arg)
{
	const struct right *r = arg;
	const bool enter = r->may & X_OK;

	OK(mkdir("dir", 0755));
	make("dir/inside", 1, 1);
	OK(chown("dir", r->uid, r->gid));
	OK(chmod("dir", r->mode));
	ordinary();
	if (enter)
		OK(access("dir/inside", F_OK));
	else
		FAILS(access("dir/inside", F_OK), EACCES);
	if (enter && r->may & W_OK) {
		OK(mkdir("dir/new", 0755));
		CHECK(look("dir/new").st_uid == 1000);
		OK(unlink("dir/inside"));
	} else {
		FAILS(mkdir("dir/new", 0755), EACCES);
		FAILS(unlink("dir/inside"), EACCES);
	}
	if (r->may & R_OK)
		OK(open("dir", O_RDONLY | O_DIRECTORY));
	else
		FAILS(open("dir", O_RDONLY | O_DIRECTORY), EACCES);
}

static void owned(const void *row)
{
	int fd;

	(void)row;
	OK(chmod(".", 0777));
	ordinary();
	OK(fd = open("new", O_CREAT | O_RDWR, 0644));
	OK(symlink("x", "link"));
	OK(mkfifo("fifo", 0600));
	CHECK(look("new").st_uid == 1000 && look("new").st_gid == 1000);
	CHECK(look("link").st_uid == 1000 && look("fifo").st_uid == 1000);
	FAILS(chown("new", 0, (gid_t)-1), EPERM);
	FAILS(chown("new", (uid_t)-1, 0), EPERM);
	OK(chown("new", 1000, 1000));
}

static void given_away(const void *row)
{
	(void)row;
	make("file", 1, 1);
	OK(chown("file", 12, 34));
	CHECK(look("file").st_uid == 12 && look("file").st_gid == 34);
	OK(chown("file", (uid_t)-1, 56));
	CHECK(look("file").st_uid == 12 && look("file").st_gid == 56);
	OK(symlink("file", "link"));
	OK(lchown("link", 7, 8));
	CHECK(look("link").st_uid == 7 && look("file").st_uid == 12);
}

static void sticky(const void *row)
{
	(void)row;
	OK(mkdir("dir", 01777));
	make("dir/roots", 1, 1);
	OK(chmod("dir/roots", 0666));
	ordinary();
	make("dir/own", 1, 1);
	FAILS(unlink("dir/roots"), EPERM);
	FAILS(rename("dir/roots", "dir/x"), EPERM);
	FAILS(rename("dir/own", "dir/roots"), EPERM);
	OK(unlink("dir/own"));
}

static void group_of_dir(const void *row)
{
	(void)row;
	OK(mkdir("dir", 0755));
	OK(chown("dir", 0, 77));
	OK(chmod("dir", 02775));
	make("dir/file", 1, 1);
	OK(mkdir("dir/sub", 0755));
	CHECK(look("dir/file").st_gid == 77);
	CHECK(look("dir/sub").st_gid == 77 && look("dir/sub").st_mode & S_ISGID);
}

static void suid_goes(const void *row)
{
	const int how = *(const int *)row;
	int fd;

	OK(chmod(".", 0777));
	make("file", 100, 1);
	OK(chown("file", 1000, 1000));
	OK(chmod("file", 06777));
	CHECK(look("file").st_mode == (S_IFREG | 06777));
	if (how == 3) {
		OK(chown("file", 0, 0));
	} else {
		ordinary();
		OK(fd = open("file", how == 2 ? O_WRONLY | O_TRUNC : O_WRONLY));
		if (how == 0)
			OK(write(fd, "x", 1));
		if (how == 1)
			OK(ftruncate(fd, 10));
	}
	CHECK(look("file").st_mode == (S_IFREG | 0777));
}

void modes(void)
{
	static const int ways[] = { 0, 1, 2, 3 };

	for (size_t i = 0; i < COUNT(all); i++) {
		runf(of_file, &all[i], "mode %04o of files", all[i]);
		runf(of_dir, &all[i], "mode %04o of directories", all[i]);
		runf(masked, &all[i], "umask %03o", all[i] & 0777);
	}
	if (option("nouser"))
		return;
	run("the group of a directory", group_of_dir, NULL);
	for (size_t i = 0; i < COUNT(rights); i++) {
		const struct right *r = &rights[i];

		runf(checked, r, "rights %04o of %d:%d on a file", r->mode, r->uid, r->gid);
		runf(in_dir, r, "rights %04o of %d:%d on a directory", r->mode, r->uid, r->gid);
	}
	run("new files are their maker's", owned, NULL);
	run("files given away", given_away, NULL);
	run("a sticky directory", sticky, NULL);
	for (size_t i = 0; i < COUNT(ways); i++)
		runf(suid_goes, &ways[i], "setuid goes, way %d", ways[i]);
}
