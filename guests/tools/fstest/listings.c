/* Directories, listed. */
#include "fstest.h"

#include <dirent.h>

static void fill(int nr)
{
	char name[64];

	for (int i = 0; i < nr; i++) {
		snprintf(name, sizeof(name), "a file with quite a long name %d", i);
		OK(mknod(name, S_IFREG | 0644, 0));
	}
}

/* How many entries there are besides the dots, each once. */
static int count(DIR *d, uint8_t *seen, int nr)
{
	struct dirent *e;
	int found = 0, dots = 0, i;

	memset(seen, 0, (size_t)nr + 1);
	errno = 0;
	while ((e = readdir(d))) {
		if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) {
			dots++;
			continue;
		}
		found++;
		if (sscanf(e->d_name, "a file with quite a long name %d", &i) == 1)
			CHECK(i < nr && !seen[i]++);
	}
	CHECK(!errno && dots == 2);
	return found;
}

static void all(const void *row)
{
	const int nr = *(const int *)row;
	uint8_t *seen = malloc((size_t)nr + 1);
	DIR *d;

	fill(nr);
	d = opendir(".");
	CHECK(d);
	CHECK(count(d, seen, nr) == nr);
	rewinddir(d);
	CHECK(count(d, seen, nr) == nr);
	make("another", 0, 1);
	rewinddir(d);
	CHECK(count(d, seen, nr) == nr + 1);
	closedir(d);
}

static void removed_meanwhile(const void *row)
{
	const int nr = *(const int *)row;
	struct dirent *e;
	int removed = 0;
	DIR *d;

	fill(nr);
	d = opendir(".");
	CHECK(d);
	while ((e = readdir(d)))
		if (e->d_name[0] != '.') {
			OK(unlink(e->d_name));
			removed++;
		}
	CHECK(removed == nr);
	OK(chdir(".."));
	OK(rmdir("work"));
	OK(mkdir("work", 0755));
}

static void positions(const void *row)
{
	char names[20][64];
	long at[20];
	DIR *d;

	(void)row;
	fill(200);
	d = opendir(".");
	CHECK(d);
	for (int i = 0; i < 100; i++) {
		struct dirent *e;

		if (i % 5 == 0)
			at[i / 5] = telldir(d);
		e = readdir(d);
		CHECK(e);
		if (i % 5 == 0)
			strcpy(names[i / 5], e->d_name);
	}
	for (int i = 19; i >= 0; i--) {
		struct dirent *e;

		seekdir(d, at[i]);
		e = readdir(d);
		CHECK(e && !strcmp(e->d_name, names[i]));
	}
}

static void kinds(const void *row)
{
	static const struct {
		const char *name;
		int type;
	} want[] = { { "file", DT_REG }, { "dir", DT_DIR }, { "link", DT_LNK }, { "fifo", DT_FIFO } };
	struct dirent *e;
	int found = 0;
	DIR *d;

	(void)row;
	make("file", 1, 1);
	OK(mkdir("dir", 0755));
	OK(symlink("x", "link"));
	OK(mkfifo("fifo", 0644));
	d = opendir(".");
	CHECK(d);
	while ((e = readdir(d)))
		for (size_t i = 0; i < COUNT(want); i++)
			if (!strcmp(e->d_name, want[i].name)) {
				CHECK(e->d_type == want[i].type || e->d_type == DT_UNKNOWN);
				CHECK(e->d_ino == look(want[i].name).st_ino);
				found++;
			}
	CHECK(found == 4);
}

static void links_of_dirs(const void *row)
{
	nlink_t before;

	(void)row;
	OK(mkdir("dir", 0755));
	before = look("dir").st_nlink;
	CHECK(before == 2 || before == 1);
	OK(mkdir("dir/a", 0755));
	OK(mkdir("dir/b", 0755));
	CHECK(look("dir").st_nlink == (before == 2 ? 4 : 1));
	OK(rmdir("dir/a"));
	CHECK(look("dir").st_nlink == (before == 2 ? 3 : 1));
}

void listings(void)
{
	static const int sizes[] = { 0, 1, 10, 100, 500 };

	for (size_t i = 0; i < COUNT(sizes); i++)
		runf(all, &sizes[i], "a list of %d", sizes[i]);
	for (size_t i = 0; i + 1 < COUNT(sizes); i++)
		runf(removed_meanwhile, &sizes[i], "a list of %d, removed meanwhile", sizes[i]);
	run("telldir and seekdir", positions, NULL);
	run("kinds of entries", kinds, NULL);
	run("links of directories", links_of_dirs, NULL);
}
