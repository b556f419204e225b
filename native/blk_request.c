/* virtio-blk requests: taken apart and checked. virtio-v1.3 §5.2.6. */
#include "blk_queue.h"

#include <endian.h>
#include <linux/virtio_blk.h>

#define SECTOR VMM_BLK_SECTOR
#define HEADER 16
#define ID_BYTES 20
#define SEGMENT 16

static bool driver_gives(uint32_t type)
{
	return type == VIRTIO_BLK_T_OUT || type == VIRTIO_BLK_T_DISCARD ||
	       type == VIRTIO_BLK_T_WRITE_ZEROES;
}

/* The driver may cut header, data and status into buffers as it likes: virtio-v1.3 §2.7.4.2. */
bool vmm_blk_parse(struct vmm_blk_request *r, uint64_t *sector)
{
	struct vmm_chain *c = &r->chain;
	struct iovec *readable = c->iov, *writable = c->iov + c->nr_read;
	uint32_t nr_readable = c->nr_read, nr_writable = c->nr_write;
	struct virtio_blk_outhdr header;
	const struct iovec *last;

	if (c->read_len < HEADER || !c->write_len)
		return false;
	vmm_iov_read(readable, nr_readable, 0, &header, HEADER);
	vmm_iov_skip(&readable, &nr_readable, HEADER);
	last = &writable[nr_writable - 1];
	r->status = (uint8_t *)last->iov_base + last->iov_len - 1;
	vmm_iov_cut(writable, &nr_writable, 1);
	r->type = le32toh(header.type);
	*sector = le64toh(header.sector);
	r->done = 0;
	if (driver_gives(r->type)) {
		r->data = readable;
		r->nr_data = nr_readable;
		r->len = c->read_len - HEADER;
	} else {
		r->data = writable;
		r->nr_data = nr_writable;
		r->len = c->write_len - 1;
	}
	return true;
}

/* Whether these sectors are whole blocks of the disk. */
static bool on_disk(const struct vmm_blk *blk, uint64_t sector, uint64_t count)
{
	const uint32_t block = blk->file.config.block;
	const uint64_t size = __atomic_load_n(&blk->file.size, __ATOMIC_RELAXED);
	const uint64_t sectors = (size + block - 1) / block * (block / SECTOR);

	return !((sector | count) & (block / SECTOR - 1)) && sector <= sectors &&
	       count <= sectors - sector;
}

static int check_data(const struct vmm_blk *blk, struct vmm_blk_request *r, uint64_t sector)
{
	if (r->len % SECTOR || !on_disk(blk, sector, r->len / SECTOR))
		return VIRTIO_BLK_S_IOERR;
	r->offset = sector * SECTOR;
	return VMM_BLK_GO;
}

static int check_segment(const struct vmm_blk *blk, const struct vmm_blk_request *r,
			 const struct virtio_blk_discard_write_zeroes *in,
			 struct vmm_blk_segment *out)
{
	const uint64_t sector = le64toh(in->sector), count = le32toh(in->num_sectors);
	const uint32_t flags = le32toh(in->flags);
	const uint32_t known = r->op == VMM_BLK_ZERO ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0;

	if (flags & ~known)
		return VIRTIO_BLK_S_UNSUPP;
	if (count > VMM_BLK_MAX_DISCARD || !on_disk(blk, sector, count))
		return VIRTIO_BLK_S_IOERR;
	out->offset = sector * SECTOR;
	out->len = count * SECTOR;
	out->unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
	return VMM_BLK_GO;
}

/* All segments are checked before the first is acted upon. */
static int check_segments(const struct vmm_blk *blk, struct vmm_blk_request *r)
{
	struct virtio_blk_discard_write_zeroes in[VMM_BLK_MAX_SEGMENTS];
	int rc = VMM_BLK_GO;

	if (!r->len || r->len % SEGMENT || r->len > sizeof(in))
		return VIRTIO_BLK_S_IOERR;
	vmm_iov_read(r->data, r->nr_data, 0, in, r->len);
	r->nr_segments = (uint32_t)(r->len / SEGMENT);
	for (uint32_t i = 0; i < r->nr_segments && rc == VMM_BLK_GO; i++)
		rc = check_segment(blk, r, &in[i], &r->segments[i]);
	return rc;
}

int vmm_blk_check(const struct vmm_blk *blk, struct vmm_blk_request *r, uint64_t sector)
{
	const struct vmm_blk_config *config = &blk->file.config;

	switch (r->type) {
	case VIRTIO_BLK_T_IN:
		r->op = VMM_BLK_READ;
		return check_data(blk, r, sector);
	case VIRTIO_BLK_T_OUT:
		r->op = VMM_BLK_WRITE;
		return config->read_only ? VIRTIO_BLK_S_IOERR : check_data(blk, r, sector);
	case VIRTIO_BLK_T_FLUSH:
		r->op = VMM_BLK_FLUSH;
		return VMM_BLK_GO;
	case VIRTIO_BLK_T_DISCARD:
	case VIRTIO_BLK_T_WRITE_ZEROES:
		r->op = r->type == VIRTIO_BLK_T_DISCARD ? VMM_BLK_DISCARD : VMM_BLK_ZERO;
		if (config->read_only)
			return VIRTIO_BLK_S_IOERR;
		return config->discard ? check_segments(blk, r) : VIRTIO_BLK_S_UNSUPP;
	case VIRTIO_BLK_T_GET_ID:
		r->done = vmm_iov_write(r->data, r->nr_data, 0, config->serial, ID_BYTES);
		return VIRTIO_BLK_S_OK;
	default:
		return VIRTIO_BLK_S_UNSUPP;
	}
}
