/* Names of all lengths and kinds, as what each kind of file may have. */
#include "fstest.h"

struct name {
	const char *text;
	int len;
};

static const char *spell(const void *row)
{
	static char text[300];
	const struct name *n = row;

	if (n->text)
		return n->text;
	memset(text, 'n', (size_t)n->len);
	text[n->len] = 0;
	return text;
}

static void as_file(const void *row)
{
	const char *name = spell(row);

	make(name, 10, 1);
	expect(name, 10, 1);
	FAILS(open(name, O_CREAT | O_EXCL | O_RDWR, 0600), EEXIST);
	OK(unlink(name));
	FAILS(open(name, O_RDONLY), ENOENT);
}

static void as_dir(const void *row)
{
	const char *name = spell(row);

	OK(mkdir(name, 0755));
	OK(chdir(name));
	make("inside", 3, 1);
	OK(unlink("inside"));
	OK(chdir(".."));
	OK(rmdir(name));
	FAILS(rmdir(name), ENOENT);
}

static void as_link(const void *row)
{
	const char *name = spell(row);
	char text[300];
	ssize_t n;

	OK(symlink(name, "link"));
	n = readlink("link", text, sizeof(text));
	CHECK(n == (ssize_t)strlen(name) && !memcmp(text, name, (size_t)n));
	make(name, 5, 2);
	expect("link", 5, 2);
	OK(unlink(name));
	OK(symlink("target", name));
	OK(link(name, "second"));
	CHECK(look(name).st_nlink == 2);
}

static void as_new_name(const void *row)
{
	const char *name = spell(row);

	make("old", 7, 3);
	OK(rename("old", name));
	expect(name, 7, 3);
	OK(link(name, "again"));
	OK(rename(name, "old"));
	FAILS(open(name, O_RDONLY), ENOENT);
	CHECK(look("old").st_ino == look("again").st_ino);
}

static void too_long(const void *row)
{
	const char *name = spell(row);
	struct stat st;

	make("file", 1, 1);
	FAILS(open(name, O_CREAT | O_RDWR, 0644), ENAMETOOLONG);
	FAILS(mkdir(name, 0755), ENAMETOOLONG);
	FAILS(symlink("x", name), ENAMETOOLONG);
	FAILS(link("file", name), ENAMETOOLONG);
	FAILS(rename("file", name), ENAMETOOLONG);
	FAILS(rename(name, "file"), ENAMETOOLONG);
	FAILS(unlink(name), ENAMETOOLONG);
	FAILS(stat(name, &st), ENAMETOOLONG);
	FAILS(mknod(name, S_IFIFO | 0600, 0), ENAMETOOLONG);
}

static void deep(const void *row)
{
	const int depth = *(const int *)row;
	char name[16];

	for (int i = 0; i < depth; i++) {
		snprintf(name, sizeof(name), "d%d", i);
		OK(mkdir(name, 0755));
		OK(chdir(name));
	}
	make("bottom", 100, 1);
	expect("bottom", 100, 1);
	for (int i = 0; i < depth; i++)
		OK(chdir(".."));
	CHECK(!access("d0/d1/d2", F_OK));
}

static void dots(const void *row)
{
	struct stat here, there;

	(void)row;
	OK(mkdir("d", 0755));
	OK(stat(".", &here));
	OK(stat("d/..", &there));
	CHECK(here.st_ino == there.st_ino && here.st_dev == there.st_dev);
	OK(stat("d/./../d/.", &there));
	CHECK(there.st_ino == look("d").st_ino);
	FAILS(rmdir("."), EINVAL);
	FAILS(mkdir("..", 0755), EEXIST);
	FAILS(unlink("d/.."), EISDIR);
}

void names(void)
{
	static const struct name all[] = {
		{ NULL, 1 },	  { NULL, 2 },	      { NULL, 100 },	 { NULL, 254 },
		{ NULL, 255 },	  { " ", 0 },	      { "new\nline", 0 }, { "...", 0 },
		{ "-rf", 0 },	  { "\xff\xfe", 0 },  { "\x01", 0 },	 { "\xe2\x82\xac", 0 },
		{ "back\\", 0 },  { "trailing ", 0 }, { "a:b", 0 },	 { "*?[", 0 },
	};
	static const struct name longer = { NULL, 256 };
	static const int depths[] = { 3, 20, 60 };

	for (size_t i = 0; i < COUNT(all); i++) {
		const int len = all[i].text ? (int)strlen(all[i].text) : all[i].len;

		runf(as_file, &all[i], "name %zu of %d bytes: file", i, len);
		runf(as_dir, &all[i], "name %zu of %d bytes: directory", i, len);
		runf(as_link, &all[i], "name %zu of %d bytes: links", i, len);
		runf(as_new_name, &all[i], "name %zu of %d bytes: rename", i, len);
	}
	run("a name of 256 bytes", too_long, &longer);
	for (size_t i = 0; i < COUNT(depths); i++)
		runf(deep, &depths[i], "%d directories deep", depths[i]);
	run("dots", dots, NULL);
}
