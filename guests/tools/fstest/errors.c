/* What must fail, and how. Each case finds the same things: see prepare(). */
#include "fstest.h"

#include <sys/statfs.h>
#include <sys/xattr.h>

static void prepare(void)
{
	make("file", 10, 1);
	OK(mkdir("dir", 0755));
	OK(mkdir("full", 0755));
	make("full/inside", 1, 1);
	OK(symlink("file", "link"));
	OK(symlink("nowhere", "broken"));
	OK(symlink("loop2", "loop1"));
	OK(symlink("loop1", "loop2"));
	OK(mknod("fifo", S_IFIFO | 0644, 0));
}

enum op {
	OPEN_R, OPEN_W, OPEN_EXCL, OPEN_DIR, OPEN_NOFOLLOW, OPEN_TRUNC, MKDIR, RMDIR, UNLINK,
	SYMLINK, READLINK, TRUNCATE, LINK_TO, LINK_FROM, MKFIFO, CHDIR, STAT, RENAME_FROM,
	RENAME_TO, RENAME_DIR_TO, CHMOD, ACCESS,
};

static const char *const op_names[] = {
	"open", "open for write", "open O_EXCL", "open O_DIRECTORY", "open O_NOFOLLOW",
	"open O_TRUNC", "mkdir", "rmdir", "unlink", "symlink", "readlink", "truncate", "link to",
	"link from", "mkfifo", "chdir", "stat", "rename from", "rename to", "rename dir to",
	"chmod", "access",
};

static int carry_out(enum op op, const char *path)
{
	struct stat st;
	char text[10];

	switch (op) {
	case OPEN_R:
		return open(path, O_RDONLY | O_NONBLOCK);
	case OPEN_W:
		return open(path, O_WRONLY | O_NONBLOCK);
	case OPEN_EXCL:
		return open(path, O_CREAT | O_EXCL | O_RDWR, 0644);
	case OPEN_DIR:
		return open(path, O_RDONLY | O_DIRECTORY | O_NONBLOCK);
	case OPEN_NOFOLLOW:
		return open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
	case OPEN_TRUNC:
		return open(path, O_WRONLY | O_TRUNC | O_NONBLOCK);
	case MKDIR:
		return mkdir(path, 0755);
	case RMDIR:
		return rmdir(path);
	case UNLINK:
		return unlink(path);
	case SYMLINK:
		return symlink("x", path);
	case READLINK:
		return (int)readlink(path, text, sizeof(text));
	case TRUNCATE:
		return truncate(path, 5);
	case LINK_TO:
		return link("file", path);
	case LINK_FROM:
		return link(path, "new");
	case MKFIFO:
		return mkfifo(path, 0644);
	case CHDIR:
		return chdir(path);
	case STAT:
		return stat(path, &st);
	case RENAME_FROM:
		return rename(path, "new");
	case RENAME_TO:
		return rename("file", path);
	case RENAME_DIR_TO:
		return rename("dir", path);
	case CHMOD:
		return chmod(path, 0700);
	case ACCESS:
		return access(path, R_OK);
	}
	return 0;
}

static const struct row {
	enum op op;
	const char *path;
	int error; /* 0: it works */
} rows[] = {
	{ OPEN_R, "missing", ENOENT },	     { OPEN_R, "file/x", ENOTDIR },
	{ OPEN_R, "missing/x", ENOENT },     { OPEN_R, "broken", ENOENT },
	{ OPEN_R, "loop1", ELOOP },	     { OPEN_R, "dir", 0 },
	{ OPEN_R, "link", 0 },		     { OPEN_R, "fifo", 0 },
	{ OPEN_R, "file/", ENOTDIR },	     { OPEN_W, "dir", EISDIR },
	{ OPEN_W, "missing", ENOENT },	     { OPEN_W, "loop1", ELOOP },
	{ OPEN_W, "fifo", ENXIO },	     { OPEN_W, "link", 0 },
	{ OPEN_EXCL, "file", EEXIST },	     { OPEN_EXCL, "dir", EEXIST },
	{ OPEN_EXCL, "link", EEXIST },	     { OPEN_EXCL, "broken", EEXIST },
	{ OPEN_EXCL, "fifo", EEXIST },	     { OPEN_EXCL, "new", 0 },
	{ OPEN_EXCL, "missing/x", ENOENT },  { OPEN_EXCL, "file/x", ENOTDIR },
	{ OPEN_DIR, "file", ENOTDIR },	     { OPEN_DIR, "link", ENOTDIR },
	{ OPEN_DIR, "fifo", ENOTDIR },	     { OPEN_DIR, "dir", 0 },
	{ OPEN_NOFOLLOW, "link", ELOOP },    { OPEN_NOFOLLOW, "broken", ELOOP },
	{ OPEN_NOFOLLOW, "file", 0 },	     { OPEN_TRUNC, "dir", EISDIR },
	{ OPEN_TRUNC, "file", 0 },	     { MKDIR, "dir", EEXIST },
	{ MKDIR, "file", EEXIST },	     { MKDIR, "link", EEXIST },
	{ MKDIR, "broken", EEXIST },	     { MKDIR, "fifo", EEXIST },
	{ MKDIR, "missing/x", ENOENT },	     { MKDIR, "file/x", ENOTDIR },
	{ MKDIR, "new/", 0 },		     { RMDIR, "missing", ENOENT },
	{ RMDIR, "file", ENOTDIR },	     { RMDIR, "link", ENOTDIR },
	{ RMDIR, "fifo", ENOTDIR },	     { RMDIR, "full", ENOTEMPTY },
	{ RMDIR, "dir", 0 },		     { RMDIR, "dir/.", EINVAL },
	{ UNLINK, "missing", ENOENT },	     { UNLINK, "dir", EISDIR },
	{ UNLINK, "full", EISDIR },	     { UNLINK, "file/x", ENOTDIR },
	{ UNLINK, "link", 0 },		     { UNLINK, "broken", 0 },
	{ UNLINK, "fifo", 0 },		     { SYMLINK, "file", EEXIST },
	{ SYMLINK, "dir", EEXIST },	     { SYMLINK, "broken", EEXIST },
	{ SYMLINK, "missing/x", ENOENT },    { READLINK, "file", EINVAL },
	{ READLINK, "dir", EINVAL },	     { READLINK, "missing", ENOENT },
	{ READLINK, "loop1", 0 },	     { TRUNCATE, "dir", EISDIR },
	{ TRUNCATE, "missing", ENOENT },     { TRUNCATE, "fifo", EINVAL },
	{ TRUNCATE, "loop1", ELOOP },	     { TRUNCATE, "link", 0 },
	{ LINK_TO, "dir", EEXIST },	     { LINK_TO, "link", EEXIST },
	{ LINK_TO, "missing/x", ENOENT },    { LINK_FROM, "dir", EPERM },
	{ LINK_FROM, "missing", ENOENT },    { LINK_FROM, "fifo", 0 },
	{ LINK_FROM, "broken", 0 },	     { MKFIFO, "file", EEXIST },
	{ MKFIFO, "fifo", EEXIST },	     { MKFIFO, "missing/x", ENOENT },
	{ CHDIR, "file", ENOTDIR },	     { CHDIR, "missing", ENOENT },
	{ CHDIR, "loop1", ELOOP },	     { STAT, "broken", ENOENT },
	{ STAT, "loop1", ELOOP },	     { STAT, "file/x", ENOTDIR },
	{ STAT, "", ENOENT },		     { RENAME_FROM, "missing", ENOENT },
	{ RENAME_FROM, "file/x", ENOTDIR },  { RENAME_FROM, "loop1", 0 },
	{ RENAME_TO, "dir", EISDIR },	     { RENAME_TO, "full", EISDIR },
	{ RENAME_TO, "link", 0 },	     { RENAME_TO, "fifo", 0 },
	{ RENAME_TO, "missing/x", ENOENT },  { RENAME_TO, "fifo/x", ENOTDIR },
	{ RENAME_DIR_TO, "file", ENOTDIR },  { RENAME_DIR_TO, "link", ENOTDIR },
	{ RENAME_DIR_TO, "full", ENOTEMPTY }, { RENAME_DIR_TO, "dir/below", EINVAL },
	{ RENAME_DIR_TO, "full/x", 0 },	     { CHMOD, "missing", ENOENT },
	{ CHMOD, "broken", ENOENT },	     { CHMOD, "fifo", 0 },
	{ ACCESS, "missing", ENOENT },	     { ACCESS, "loop1", ELOOP },
	{ ACCESS, "link", 0 },
};

static void refuse(const void *arg)
{
	const struct row *row = arg;

	prepare();
	if (row->error)
		FAILS(carry_out(row->op, row->path), row->error);
	else
		OK(carry_out(row->op, row->path));
}

static void wrong_way(const void *row)
{
	char byte = 'x';
	int fd;

	(void)row;
	prepare();
	OK(fd = open("file", O_RDONLY));
	FAILS(write(fd, &byte, 1), EBADF);
	FAILS(ftruncate(fd, 0), EINVAL);
	FAILS(lseek(fd, -1, SEEK_SET), EINVAL);
	OK(fd = open("file", O_WRONLY));
	FAILS(read(fd, &byte, 1), EBADF);
	FAILS(pwrite(fd, &byte, 1, -1), EINVAL);
	OK(fd = open("dir", O_RDONLY));
	FAILS(read(fd, &byte, 1), EISDIR);
}

void errors(void)
{
	for (size_t i = 0; i < COUNT(rows); i++)
		runf(refuse, &rows[i], "%s '%s'", op_names[rows[i].op], rows[i].path);
	run("reads and writes the wrong way", wrong_way, NULL);
}
