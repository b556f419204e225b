/* A FUSE request's arguments, copied once and checked, and its answer. */
#include "fs_impl.h"

#include <errno.h>
#include <string.h>

#define HEADER sizeof(struct fuse_in_header)

uint32_t fs_left(const struct fs_request *r)
{
	return r->in.len - r->at;
}

bool fs_take(struct fs_request *r, void *to, uint32_t len)
{
	if (fs_left(r) < len)
		return false;
	vmm_iov_read(r->chain.iov, r->chain.nr_read, r->at, to, len);
	r->at += len;
	return true;
}

int fs_take_string(struct fs_request *r, char *to, uint32_t room)
{
	const uint32_t left = fs_left(r), want = left < room ? left : room;
	const char *end;

	vmm_iov_read(r->chain.iov, r->chain.nr_read, r->at, to, want);
	end = memchr(to, 0, want);
	if (!end)
		return want == room ? -ENAMETOOLONG : -EINVAL;
	r->at += (uint32_t)(end - to) + 1;
	return 0;
}

int fs_take_name(struct fs_request *r, char name[FS_NAME])
{
	const int rc = fs_take_string(r, name, FS_NAME);

	if (rc)
		return rc;
	if (!*name || strchr(name, '/') || !strcmp(name, ".") || !strcmp(name, ".."))
		return -EINVAL;
	return 0;
}

int fs_put(struct fs_request *r, const void *from, uint32_t len)
{
	if (r->room - r->out_len < len)
		return -EINVAL;
	vmm_iov_write(r->out, r->nr_out, sizeof(struct fuse_out_header) + r->out_len, from, len);
	r->out_len += len;
	return 0;
}

uint32_t fs_slice(const struct iovec *iov, uint32_t nr, uint64_t offset, uint64_t len,
		  struct iovec *to)
{
	uint32_t got = 0;

	for (uint32_t i = 0; i < nr && len; i++) {
		uint64_t n;

		if (offset >= iov[i].iov_len) {
			offset -= iov[i].iov_len;
			continue;
		}
		n = iov[i].iov_len - offset;
		n = n < len ? n : len;
		to[got].iov_base = (uint8_t *)iov[i].iov_base + offset;
		to[got++].iov_len = n;
		len -= n;
		offset = 0;
	}
	return got;
}
