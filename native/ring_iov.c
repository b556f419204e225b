/* Bytes in and out of a chain's buffers. */
#include "ring.h"

#include <string.h>

size_t vmm_iov_read(const struct iovec *iov, uint32_t nr, uint64_t offset, void *dst, size_t len)
{
	size_t done = 0;

	for (uint32_t i = 0; i < nr && done < len; i++) {
		size_t n;

		if (offset >= iov[i].iov_len) {
			offset -= iov[i].iov_len;
			continue;
		}
		n = iov[i].iov_len - offset;
		n = n < len - done ? n : len - done;
		/* SAFETY: iov came from vmm_vq_pop(), which found all of it to be RAM. */
		memcpy((uint8_t *)dst + done, (uint8_t *)iov[i].iov_base + offset, n);
		done += n;
		offset = 0;
	}
	return done;
}

size_t vmm_iov_write(const struct iovec *iov, uint32_t nr, uint64_t offset, const void *src,
		     size_t len)
{
	size_t done = 0;

	for (uint32_t i = 0; i < nr && done < len; i++) {
		size_t n;

		if (offset >= iov[i].iov_len) {
			offset -= iov[i].iov_len;
			continue;
		}
		n = iov[i].iov_len - offset;
		n = n < len - done ? n : len - done;
		/* SAFETY: as vmm_iov_read(). */
		memcpy((uint8_t *)iov[i].iov_base + offset, (const uint8_t *)src + done, n);
		done += n;
		offset = 0;
	}
	return done;
}

void vmm_iov_skip(struct iovec **iov, uint32_t *nr, uint64_t bytes)
{
	while (*nr && bytes >= (*iov)->iov_len) {
		bytes -= (*iov)->iov_len;
		(*iov)++;
		(*nr)--;
	}
	if (*nr && bytes) {
		(*iov)->iov_base = (uint8_t *)(*iov)->iov_base + bytes;
		(*iov)->iov_len -= bytes;
	}
}

void vmm_iov_cut(struct iovec *iov, uint32_t *nr, uint64_t bytes)
{
	while (*nr && bytes >= iov[*nr - 1].iov_len)
		bytes -= iov[--*nr].iov_len;
	if (*nr)
		iov[*nr - 1].iov_len -= bytes;
}
