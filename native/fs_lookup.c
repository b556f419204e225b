/* FUSE: names become files, and files are forgotten. */
#define _GNU_SOURCE
#include "fs_impl.h"

#include <errno.h>
#include <fcntl.h>

int fs_lookup_name(struct vmm_fs *fs, struct fs_inode *parent, const char *name,
		   struct fs_inode **out, struct statx *stx)
{
	int rc;

	if (parent->hidden)
		return S_ISDIR(parent->id.type) ? -ENOENT : -ENOTDIR;
	rc = fs_inode_fd(fs, parent);
	if (rc < 0)
		return rc;
	rc = fs_stat_at(rc, name, stx);
	return rc ? rc : fs_inode_intern(fs, parent, name, stx, out);
}

int fs_put_entry(struct vmm_fs *fs, struct fs_request *r, struct fs_inode *inode,
		 const struct statx *stx)
{
	struct fuse_entry_out out;
	int rc;

	fs_entry_of(fs, inode, stx, &out);
	rc = fs_put(r, &out, sizeof(out));
	if (rc)
		fs_inode_forget(fs, inode->nodeid, 1);
	fs_inode_put(fs, inode);
	return rc;
}

FS_HANDLER(lookup)
{
	struct fs_inode *parent, *inode;
	char name[FS_NAME];
	struct statx stx;
	int rc = fs_take_name(r, name);

	if (rc)
		return rc;
	parent = fs_inode_get(fs, r->in.nodeid);
	if (!parent)
		return -ENOENT;
	rc = fs_lookup_name(fs, parent, name, &inode, &stx);
	fs_inode_put(fs, parent);
	if (!rc)
		return fs_put_entry(fs, r, inode, &stx);
	if (rc == -ENOENT && fs->config.cache == VMM_FS_ALWAYS) {
		struct fuse_entry_out none;

		/* Not there, and it will not come. */
		fs_entry_of(fs, NULL, NULL, &none);
		return fs_put(r, &none, sizeof(none));
	}
	return rc;
}

FS_HANDLER(forget)
{
	struct fuse_forget_in in;

	if (fs_take(r, &in, sizeof(in)))
		fs_inode_forget(fs, r->in.nodeid, in.nlookup);
	return FS_SILENT;
}

FS_HANDLER(batch_forget)
{
	struct fuse_batch_forget_in in;
	struct fuse_forget_one one;

	if (!fs_take(r, &in, sizeof(in)))
		return FS_SILENT;
	/* What is there counts, whatever it says. */
	for (uint32_t i = 0; i < in.count && fs_take(r, &one, sizeof(one)); i++)
		fs_inode_forget(fs, one.nodeid, one.nlookup);
	return FS_SILENT;
}
