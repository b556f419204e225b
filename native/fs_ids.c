/* Whose files are whose: numbers of users on the two sides. */
#define _GNU_SOURCE
#include "fs_impl.h"

#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NOBODY UINT32_MAX

/* The system calls themselves: glibc's wrappers say nothing of failure either. */
static uint32_t become(long which, uint32_t id)
{
	return (uint32_t)syscall(which, id);
}

void fs_ids_back(struct fs_ids *ids)
{
	if (!ids->changed)
		return;
	become(SYS_setfsuid, geteuid());
	become(SYS_setfsgid, getegid());
	ids->changed = false;
}

int fs_ids_as(struct vmm_fs *fs, const struct fs_request *r, struct fs_ids *ids)
{
	ids->changed = false;
	if (fs->config.ids != VMM_FS_PASS || !fs->privileged)
		return 0;
	if (r->in.uid == NOBODY || r->in.gid == NOBODY)
		return -EINVAL;
	if (r->in.uid == fs->uid && r->in.gid == fs->gid)
		return 0;
	ids->changed = true;
	/* The group first: root may do that. Asking for nobody tells who one is. */
	become(SYS_setfsgid, r->in.gid);
	become(SYS_setfsuid, r->in.uid);
	if (become(SYS_setfsgid, NOBODY) == r->in.gid && become(SYS_setfsuid, NOBODY) == r->in.uid)
		return 0;
	fs_ids_back(ids);
	return -EPERM;
}

uint32_t fs_uid_out(const struct vmm_fs *fs, uint32_t uid)
{
	return fs->config.ids == VMM_FS_SQUASH && uid == fs->uid ? 0 : uid;
}

uint32_t fs_gid_out(const struct vmm_fs *fs, uint32_t gid)
{
	return fs->config.ids == VMM_FS_SQUASH && gid == fs->gid ? 0 : gid;
}

/* What one of both ids becomes: kept where the guest sees no difference. */
static int id_in(uint32_t *id, uint32_t now, uint32_t seen, uint32_t own)
{
	if (*id == NOBODY || *id == seen) {
		*id = NOBODY;
		return 0;
	}
	if (*id != 0 && *id != own)
		return -EPERM;
	*id = own == now ? NOBODY : own;
	return 0;
}

int fs_owner_in(const struct vmm_fs *fs, const struct statx *now, uint32_t *uid, uint32_t *gid)
{
	int rc;

	if (fs->config.ids == VMM_FS_PASS)
		return 0;
	rc = id_in(uid, now->stx_uid, fs_uid_out(fs, now->stx_uid), fs->uid);
	return rc ? rc : id_in(gid, now->stx_gid, fs_gid_out(fs, now->stx_gid), fs->gid);
}
