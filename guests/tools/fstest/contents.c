/* Bytes: written in parts of all sizes, read back, cut, extended, with holes. */
#include "fstest.h"

#include <linux/falloc.h>
#include <sys/sendfile.h>
#include <sys/statfs.h>
#include <sys/uio.h>

#define KIB 1024

static const size_t sizes[] = { 0, 1, 511, 4095, 4096, 4097, 65536, 131073, 1 << 20, (1 << 20) + 1,
				3 << 20 };

static void whole(const void *row)
{
	const size_t size = *(const size_t *)row;

	make("file", size, 5);
	CHECK((size_t)look("file").st_size == size);
	expect("file", size, 5);
	make("file", size / 2, 6);
	expect("file", size / 2, 6);
}

static void in_parts(const void *row)
{
	const size_t part = *(const size_t *)row ? *(const size_t *)row : 17, size = 3 * part + 5;
	uint8_t *data = malloc(size);
	int fd = open("file", O_CREAT | O_RDWR, 0644);

	OK(fd);
	for (size_t i = 0; i < size; i++)
		data[i] = pattern(i, 9);
	/* From the end to the start. */
	for (size_t at = size / part * part;; at -= part) {
		const size_t n = size - at < part ? size - at : part;

		CHECK(pwrite(fd, data + at, n, (off_t)at) == (ssize_t)n);
		if (!at)
			break;
	}
	expect("file", size, 9);
	memset(data, 0, size);
	for (size_t at = 0; at < size; at += part) {
		const size_t n = size - at < part ? size - at : part;

		CHECK(pread(fd, data + at, part, (off_t)at) == (ssize_t)n);
	}
	for (size_t i = 0; i < size; i++)
		CHECK(data[i] == pattern(i, 9));
	CHECK(pread(fd, data, part, (off_t)size) == 0);
	CHECK(pread(fd, data, part, 1 << 30) == 0);
}

static void cut(const void *row)
{
	const size_t size = *(const size_t *)row;
	uint8_t byte;
	int fd;

	make("file", 70000, 3);
	OK(truncate("file", (off_t)size));
	CHECK((size_t)look("file").st_size == size);
	OK(fd = open("file", O_RDWR));
	if (size <= 70000)
		expect("file", size, 3);
	/* What is made longer again reads as zeros. */
	OK(ftruncate(fd, (off_t)size + 5000));
	for (size_t at = size > 70000 ? 70000 : size; at < size + 5000; at += 997) {
		CHECK(pread(fd, &byte, 1, (off_t)at) == 1);
		CHECK(!byte);
	}
}

static void appended(const void *row)
{
	uint8_t data[100];
	int fd, other;

	(void)row;
	for (size_t i = 0; i < sizeof(data); i++)
		data[i] = pattern(i, 1);
	OK(fd = open("file", O_CREAT | O_WRONLY | O_APPEND, 0644));
	OK(other = open("file", O_WRONLY));
	CHECK(write(fd, data, 50) == 50);
	OK(lseek(fd, 0, SEEK_SET));
	CHECK(write(fd, data + 50, 50) == 50);
	expect("file", 100, 1);
	OK(ftruncate(other, 10));
	CHECK(write(fd, data + 10, 90) == 90);
	expect("file", 100, 1);
	CHECK(lseek(fd, 0, SEEK_CUR) == 100);
}

static void vectors(const void *row)
{
	uint8_t a[10], b[5000], c[1];
	struct iovec iov[3] = { { a, sizeof(a) }, { b, sizeof(b) }, { c, sizeof(c) } };
	int fd;

	(void)row;
	make("file", 5011, 4);
	OK(fd = open("file", O_RDWR));
	CHECK(readv(fd, iov, 3) == 5011);
	CHECK(a[9] == pattern(9, 4) && b[0] == pattern(10, 4) && c[0] == pattern(5010, 4));
	CHECK(pwritev(fd, iov, 3, 5011) == 5011);
	CHECK(look("file").st_size == 10022);
}

static void holes(const void *row)
{
	off_t data, hole;
	int fd;

	(void)row;
	OK(fd = open("file", O_CREAT | O_RDWR, 0644));
	CHECK(pwrite(fd, "end", 3, 8 << 20) == 3);
	CHECK(look("file").st_size == (8 << 20) + 3);
	OK(fsync(fd)); /* what a cache holds back need not be found */
	OK(data = lseek(fd, 0, SEEK_DATA));
	OK(hole = lseek(fd, 0, SEEK_HOLE));
	/* A file system need not know of holes, but at its end there is one. */
	CHECK(data <= 8 << 20 && hole <= (8 << 20) + 3);
	CHECK(lseek(fd, (8 << 20) + 1, SEEK_HOLE) == (8 << 20) + 3);
	FAILS(lseek(fd, 9 << 20, SEEK_DATA), ENXIO);
	CHECK(lseek(fd, 0, SEEK_END) == (8 << 20) + 3);
}

static void allocated(const void *row)
{
	uint8_t byte = 1;
	int fd;

	(void)row;
	OK(fd = open("file", O_CREAT | O_RDWR, 0644));
	OK(fallocate(fd, 0, 0, 100 * KIB));
	CHECK(look("file").st_size == 100 * KIB);
	OK(fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 200 * KIB));
	CHECK(look("file").st_size == 100 * KIB);
	make("full", 100 * KIB, 2);
	OK(fd = open("full", O_RDWR));
	OK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 8192, 4096));
	CHECK(pread(fd, &byte, 1, 8192) == 1 && !byte);
	CHECK(pread(fd, &byte, 1, 8191) == 1 && byte == pattern(8191, 2));
	CHECK(pread(fd, &byte, 1, 12288) == 1 && byte == pattern(12288, 2));
	OK(posix_fallocate(fd, 100 * KIB, 10));
	CHECK(look("full").st_size == 100 * KIB + 10);
}

static void copied(const void *row)
{
	const int how = *(const int *)row;
	off_t at = 0, to = 0;
	size_t done = 0;
	ssize_t n;
	int in, out;

	make("from", 300 * KIB, 7);
	OK(in = open("from", O_RDONLY));
	OK(out = open("to", O_CREAT | O_WRONLY, 0644));
	while (done < 300 * KIB) {
		n = how ? sendfile(out, in, &at, 300 * KIB - done)
			: copy_file_range(in, &at, out, &to, 300 * KIB - done, 0);
		CHECK(n > 0);
		done += (size_t)n;
	}
	OK(close(out));
	expect("to", 300 * KIB, 7);
}

static void synced(const void *row)
{
	const int flags = *(const int *)row;
	int fd;

	OK(fd = open("file", O_CREAT | O_RDWR | flags, 0644));
	CHECK(write(fd, "data", 4) == 4);
	OK(fsync(fd));
	OK(fdatasync(fd));
	OK(syncfs(fd));
	OK(fd = open(".", O_RDONLY | O_DIRECTORY));
	OK(fsync(fd));
	CHECK(look("file").st_size == 4);
}

static void direct(const void *row)
{
	uint8_t *data = aligned_alloc(4096, 8192);
	int fd;

	(void)row;
	memset(data, 'd', 8192);
	fd = open("file", O_CREAT | O_RDWR | O_DIRECT, 0644);
	if (fd < 0 && errno == EINVAL)
		return; /* not every file system has it */
	OK(fd);
	CHECK(pwrite(fd, data, 8192, 4096) == 8192);
	memset(data, 0, 8192);
	CHECK(pread(fd, data, 8192, 4096) == 8192 && data[8191] == 'd');
	CHECK(pread(fd, data, 8192, 8192) == 4096);
}

static void space(const void *row)
{
	struct statfs st;

	(void)row;
	OK(statfs(".", &st));
	CHECK(st.f_bsize && st.f_blocks && st.f_bavail <= st.f_blocks && st.f_namelen == 255);
	make("file", 100 * KIB, 1);
	CHECK(look("file").st_blocks * 512 <= 200 * KIB);
}

void contents(void)
{
	static const int ways[] = { 0, 1 }, flags[] = { 0, O_SYNC, O_DSYNC };

	for (size_t i = 0; i < COUNT(sizes); i++) {
		runf(whole, &sizes[i], "%zu bytes at once", sizes[i]);
		runf(in_parts, &sizes[i], "parts of %zu bytes", sizes[i]);
		runf(cut, &sizes[i], "truncated to %zu bytes", sizes[i]);
	}
	run("O_APPEND", appended, NULL);
	run("readv and pwritev", vectors, NULL);
	run("holes", holes, NULL);
	run("fallocate", allocated, NULL);
	for (size_t i = 0; i < COUNT(ways); i++)
		runf(copied, &ways[i], ways[i] ? "sendfile" : "copy_file_range");
	for (size_t i = 0; i < COUNT(flags); i++)
		runf(synced, &flags[i], "sync, flags %#x", flags[i]);
	run("O_DIRECT", direct, NULL);
	run("statfs", space, NULL);
}
