/* Every kind of file renamed over every kind. */
#include "fstest.h"

#include <sys/syscall.h>

#ifndef RENAME_NOREPLACE
#define RENAME_NOREPLACE 1
#define RENAME_EXCHANGE 2
#endif

enum kind { NOTHING, FILE_, EMPTY, FULL, SYMLINK, FIFO, KINDS };
static const char *const kind_names[] = { "nothing", "file", "empty directory", "full directory",
					  "symlink", "fifo" };

struct row {
	enum kind from, to;
	unsigned int flags;
	bool across;
};

static void build(enum kind kind, const char *name, int seed)
{
	char inside[64];

	switch (kind) {
	case FILE_:
		make(name, 100, seed);
		break;
	case EMPTY:
	case FULL:
		OK(mkdir(name, 0755));
		snprintf(inside, sizeof(inside), "%s/inside", name);
		if (kind == FULL)
			make(inside, 10, seed);
		break;
	case SYMLINK:
		OK(symlink(seed == 1 ? "one" : "two", name));
		break;
	case FIFO:
		OK(mkfifo(name, 0644));
		break;
	default:
		break;
	}
}

static bool is_dir(enum kind kind)
{
	return kind == EMPTY || kind == FULL;
}

static int foretell(const struct row *row)
{
	if (row->from == NOTHING)
		return ENOENT;
	if (row->flags & RENAME_EXCHANGE)
		return row->to == NOTHING ? ENOENT : 0;
	if (row->to == NOTHING)
		return 0;
	if (row->flags & RENAME_NOREPLACE)
		return EEXIST;
	if (is_dir(row->from))
		return row->to == FULL ? ENOTEMPTY : row->to == EMPTY ? 0 : ENOTDIR;
	return is_dir(row->to) ? EISDIR : 0;
}

static ino_t number(const char *name)
{
	struct stat st;

	return lstat(name, &st) ? 0 : st.st_ino;
}

static void over(const void *arg)
{
	const struct row *row = arg;
	const char *from = row->across ? "d1/a" : "a", *to = row->across ? "d2/b" : "b";
	const int error = foretell(row);
	ino_t one, two;
	long rc;

	OK(mkdir("d1", 0755));
	OK(mkdir("d2", 0755));
	build(row->from, from, 1);
	build(row->to, to, 2);
	one = number(from);
	two = number(to);
	rc = syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, row->flags);
	if (error) {
		CHECK(rc == -1 && errno == error);
		CHECK(number(from) == one && number(to) == two);
		return;
	}
	OK(rc);
	CHECK(number(to) == one);
	CHECK(number(from) == (row->flags & RENAME_EXCHANGE ? two : 0));
	if (row->from == FILE_)
		expect(to, 100, 1);
	if (row->from == FULL)
		expect(row->across ? "d2/b/inside" : "b/inside", 10, 1);
}

static void onto_itself(const void *row)
{
	(void)row;
	make("a", 10, 1);
	OK(link("a", "b"));
	OK(rename("a", "a"));
	/* Two names of one file: nothing happens. */
	OK(rename("a", "b"));
	CHECK(look("a").st_nlink == 2);
}

static void keeps_open_files(const void *row)
{
	char byte;
	int fd;

	(void)row;
	make("a", 10, 1);
	OK(fd = open("a", O_RDWR));
	OK(rename("a", "b"));
	make("a", 10, 2);
	OK(pread(fd, &byte, 1, 3));
	CHECK((uint8_t)byte == pattern(3, 1));
	OK(rename("a", "b"));
	OK(pread(fd, &byte, 1, 3));
	CHECK((uint8_t)byte == pattern(3, 1));
	expect("b", 10, 2);
}

static void a_tree(const void *row)
{
	int fd;

	(void)row;
	OK(mkdir("a", 0755));
	OK(mkdir("a/b", 0755));
	make("a/b/c", 10, 1);
	OK(fd = open("a/b", O_RDONLY | O_DIRECTORY));
	OK(mkdir("elsewhere", 0755));
	OK(rename("a", "elsewhere/z"));
	expect("elsewhere/z/b/c", 10, 1);
	CHECK(!faccessat(fd, "c", F_OK, 0));
	OK(openat(fd, "new", O_CREAT | O_RDWR, 0644));
	CHECK(!access("elsewhere/z/b/new", F_OK));
	CHECK(look("elsewhere").st_nlink == 3 || look("elsewhere").st_nlink == 1);
	FAILS(rename("elsewhere", "elsewhere/z/b/x"), EINVAL);
}

void renames(void)
{
	static struct row rows[KINDS * KINDS * 4];
	size_t nr = 0;

	for (int from = 0; from < KINDS; from++)
		for (int to = 0; to < KINDS; to++)
			for (int how = 0; how < 4; how++) {
				struct row *row = &rows[nr++];

				*row = (struct row){
					.from = from,
					.to = to,
					.flags = how == 1   ? RENAME_NOREPLACE
						 : how == 2 ? RENAME_EXCHANGE
							    : 0,
					.across = how == 3,
				};
				runf(over, row, "rename %s over %s%s", kind_names[from],
				     kind_names[to],
				     how == 1	? ", not to replace"
				     : how == 2 ? ", exchanged"
				     : how == 3 ? ", across directories"
						: "");
			}
	run("rename onto itself", onto_itself, NULL);
	run("rename under open files", keeps_open_files, NULL);
	run("rename a tree", a_tree, NULL);
}
