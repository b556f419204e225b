/* Extended attributes. */
#include "fstest.h"

#include <sys/xattr.h>

static const char *const kinds[] = { "file", "dir" };

static void build(const char *kind)
{
	if (!strcmp(kind, "dir"))
		OK(mkdir(kind, 0755));
	else
		make(kind, 1, 1);
}

static void basic(const void *row)
{
	const char *name = *(const char *const *)row;
	char value[100], list[200];

	build(name);
	FAILS((int)getxattr(name, "user.a", value, sizeof(value)), ENODATA);
	OK(setxattr(name, "user.a", "one", 3, 0));
	CHECK(getxattr(name, "user.a", value, sizeof(value)) == 3 && !memcmp(value, "one", 3));
	CHECK(getxattr(name, "user.a", NULL, 0) == 3);
	FAILS((int)getxattr(name, "user.a", value, 2), ERANGE);
	FAILS(setxattr(name, "user.a", "two", 3, XATTR_CREATE), EEXIST);
	FAILS(setxattr(name, "user.b", "two", 3, XATTR_REPLACE), ENODATA);
	OK(setxattr(name, "user.a", "", 0, XATTR_REPLACE));
	CHECK(getxattr(name, "user.a", value, sizeof(value)) == 0);
	OK(setxattr(name, "user.b", "x", 1, 0));
	CHECK(listxattr(name, list, sizeof(list)) == 14);
	CHECK(listxattr(name, NULL, 0) == 14);
	FAILS((int)listxattr(name, list, 5), ERANGE);
	OK(removexattr(name, "user.a"));
	FAILS(removexattr(name, "user.a"), ENODATA);
	CHECK(listxattr(name, list, sizeof(list)) == 7 && !strcmp(list, "user.b"));
}

static void by_descriptor(const void *row)
{
	const char *name = *(const char *const *)row;
	char value[10];
	int fd;

	build(name);
	OK(fd = open(name, O_RDONLY));
	OK(fsetxattr(fd, "user.x", "abc", 3, 0));
	CHECK(fgetxattr(fd, "user.x", value, sizeof(value)) == 3);
	OK(rename(name, "new"));
	CHECK(getxattr("new", "user.x", value, sizeof(value)) == 3);
	OK(fremovexattr(fd, "user.x"));
}

static void large(const void *row)
{
	const int size = *(const int *)row;
	char *value = malloc((size_t)size), *back = malloc((size_t)size);

	memset(value, 'v', (size_t)size);
	make("file", 1, 1);
	if (setxattr("file", "user.large", value, (size_t)size, 0)) {
		CHECK(errno == ENOSPC || errno == E2BIG);
		return;
	}
	CHECK(getxattr("file", "user.large", back, (size_t)size) == size);
	CHECK(!memcmp(value, back, (size_t)size));
}

static void many(const void *row)
{
	char name[32], list[2000];

	(void)row;
	make("file", 1, 1);
	for (int i = 0; i < 30; i++) {
		snprintf(name, sizeof(name), "user.name%02d", i);
		OK(setxattr("file", name, name, strlen(name), 0));
	}
	CHECK(listxattr("file", list, sizeof(list)) == 30 * 12);
	OK(link("file", "second"));
	CHECK(listxattr("second", list, sizeof(list)) == 30 * 12);
}

static void of_links(const void *row)
{
	(void)row;
	make("file", 1, 1);
	OK(symlink("file", "link"));
	OK(setxattr("link", "user.x", "1", 1, 0));
	CHECK(getxattr("file", "user.x", NULL, 0) == 1);
	FAILS(lsetxattr("link", "user.x", "1", 1, 0), EPERM);
	FAILS(setxattr("missing", "user.x", "1", 1, 0), ENOENT);
}

void xattrs(void)
{
	static const int sizes[] = { 1, 100, 1000, 3000, 65536 };

	if (option("noxattr"))
		return;
	for (size_t i = 0; i < COUNT(kinds); i++) {
		runf(basic, &kinds[i], "attributes of a %s", kinds[i]);
		runf(by_descriptor, &kinds[i], "attributes of an open %s", kinds[i]);
	}
	for (size_t i = 0; i < COUNT(sizes); i++)
		runf(large, &sizes[i], "an attribute of %d bytes", sizes[i]);
	run("thirty attributes", many, NULL);
	run("attributes and links", of_links, NULL);
}
