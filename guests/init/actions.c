/* What a plan can have done to the system: modules, mounts, files, network, clock. */
#define _GNU_SOURCE
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

unsigned long number(const char *text, int base)
{
	char *end;
	unsigned long value = strtoul(text, &end, base);

	if (*text == '\0' || *end != '\0')
		die("bad number in the plan: %s", text);
	return value;
}

/* mkdir -p; what is there already is fine. */
static void make_dirs(const char *path)
{
	char buf[4096];
	size_t len = strlen(path);

	if (len == 0 || len >= sizeof(buf))
		die("bad path in the plan");
	memcpy(buf, path, len + 1);
	for (size_t i = 1; i <= len; i++) {
		if (buf[i] != '/' && buf[i] != '\0')
			continue;
		char keep = buf[i];

		buf[i] = '\0';
		if (mkdir(buf, 0755) < 0 && errno != EEXIST)
			die("cannot make the directory %s: %s", buf, strerror(errno));
		buf[i] = keep;
	}
}

static int kmsg_fd = -1;

/* note TEXT: a line in the kernel's log, with the kernel's clock */
void do_note(char **arg, size_t count)
{
	(void)count;
	if (kmsg_fd < 0)
		kmsg_fd = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
	if (kmsg_fd >= 0)
		dprintf(kmsg_fd, "vmm-init: %s\n", arg[0]);
}

/* module PATH PARAMETERS: load a kernel module; one that is there already is fine */
void do_module(char **arg, size_t count)
{
	int fd = open(arg[0], O_RDONLY | O_CLOEXEC);

	(void)count;
	if (fd < 0)
		die("cannot open the module %s: %s", arg[0], strerror(errno));
	if (syscall(SYS_finit_module, fd, arg[1], 0) < 0 && errno != EEXIST)
		die("the kernel refused the module %s: %s", arg[0], strerror(errno));
	close(fd);
}

static unsigned long mount_flag(const char *word)
{
	static const struct {
		const char *word;
		unsigned long flag;
	} table[] = {
		{ "ro", MS_RDONLY },	 { "nosuid", MS_NOSUID },   { "nodev", MS_NODEV },
		{ "noexec", MS_NOEXEC }, { "noatime", MS_NOATIME }, { "relatime", MS_RELATIME },
		{ "bind", MS_BIND },	 { "rec", MS_REC },	    { "remount", MS_REMOUNT },
		{ "move", MS_MOVE },
	};

	for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++)
		if (strcmp(word, table[i].word) == 0)
			return table[i].flag;
	die("unknown mount flag in the plan: %s", word);
}

/* The option that brings a file system, for a kernel that has it not. */
static const char *config_of(const char *type)
{
	static const char *const table[][2] = {
		{ "virtiofs", " (CONFIG_VIRTIO_FS)" }, { "overlay", " (CONFIG_OVERLAY_FS)" },
		{ "9p", " (CONFIG_9P_FS)" },	       { "tmpfs", " (CONFIG_TMPFS)" },
		{ "devtmpfs", " (CONFIG_DEVTMPFS)" },  { "proc", " (CONFIG_PROC_FS)" },
		{ "sysfs", " (CONFIG_SYSFS)" },
	};

	for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++)
		if (strcmp(type, table[i][0]) == 0)
			return table[i][1];
	return "";
}

/* mount TYPE SOURCE TARGET FLAGS DATA: FLAGS are words with commas; TARGET is made */
void do_mount(char **arg, size_t count)
{
	unsigned long flags = 0;
	char *save = NULL;

	(void)count;
	for (char *w = strtok_r(arg[3], ",", &save); w; w = strtok_r(NULL, ",", &save))
		flags |= mount_flag(w);
	make_dirs(arg[2]);
	if (mount(arg[1], arg[2], arg[0], flags, arg[4]) == 0)
		return;
	if (errno == ENODEV)
		die("the kernel has no %s file system%s", arg[0], config_of(arg[0]));
	else
		die("cannot mount %s (%s) on %s: %s", arg[1], arg[0], arg[2], strerror(errno));
}

/* mkdir PATH MODE */
void do_mkdir(char **arg, size_t count)
{
	(void)count;
	make_dirs(arg[0]);
	if (chmod(arg[0], number(arg[1], 8)) < 0)
		die("cannot set the mode of %s: %s", arg[0], strerror(errno));
}

/* symlink TARGET LINK: a link that is there already stays */
void do_symlink(char **arg, size_t count)
{
	(void)count;
	if (symlink(arg[0], arg[1]) < 0 && errno != EEXIST)
		die("cannot link %s: %s", arg[1], strerror(errno));
}

/* chmod PATH MODE: a path that is not there is skipped */
void do_chmod(char **arg, size_t count)
{
	(void)count;
	if (chmod(arg[0], number(arg[1], 8)) < 0 && errno != ENOENT)
		die("cannot set the mode of %s: %s", arg[0], strerror(errno));
}

/* write PATH TEXT: as for /proc/sys; a path that is not there is skipped */
void do_write(char **arg, size_t count)
{
	int fd = open(arg[0], O_WRONLY | O_CLOEXEC);

	(void)count;
	if (fd < 0) {
		if (errno == ENOENT)
			return;
		die("cannot open %s: %s", arg[0], strerror(errno));
	}
	if (write(fd, arg[1], strlen(arg[1])) < 0)
		die("cannot write to %s: %s", arg[0], strerror(errno));
	close(fd);
}

/* require PATH MILLISECONDS TEXT: wait for a path; TEXT says what its absence means */
void do_require(char **arg, size_t count)
{
	(void)count;
	for (unsigned long left = number(arg[1], 10); access(arg[0], F_OK) < 0; left--) {
		if (left == 0)
			die("%s", arg[2]);
		poll(NULL, 0, 1);
	}
}

/* root PATH: make PATH the root directory */
void do_root(char **arg, size_t count)
{
	(void)count;
	if (chdir(arg[0]) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 ||
	    chdir("/") < 0)
		die("cannot make %s the root: %s", arg[0], strerror(errno));
}

/* hostname NAME */
void do_hostname(char **arg, size_t count)
{
	(void)count;
	if (sethostname(arg[0], strlen(arg[0])) < 0)
		die("cannot set the host name: %s", strerror(errno));
}

/* loopback: bring up lo; a kernel without networking is fine */
void do_loopback(char **arg, size_t count)
{
	struct ifreq ifr = { .ifr_name = "lo" };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	(void)arg;
	(void)count;
	if (fd < 0)
		return;
	if (ioctl(fd, SIOCGIFFLAGS, &ifr) == 0) {
		ifr.ifr_flags |= IFF_UP | IFF_RUNNING;
		ioctl(fd, SIOCSIFFLAGS, &ifr);
	}
	close(fd);
}

/* clock SECONDS NANOSECONDS: set the wall clock */
void do_clock(char **arg, size_t count)
{
	struct timespec now = { .tv_sec = (time_t)number(arg[0], 10),
				.tv_nsec = (long)number(arg[1], 10) };

	(void)count;
	if (clock_settime(CLOCK_REALTIME, &now) < 0)
		die("cannot set the clock: %s", strerror(errno));
}

/* entropy TEXT: make the kernel's random numbers depend on TEXT, which is secret */
void do_entropy(char **arg, size_t count)
{
	size_t size = strlen(arg[0]);
	struct rand_pool_info *pool = malloc(sizeof(*pool) + size);
	int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);

	(void)count;
	if (!pool || fd < 0)
		die("cannot open /dev/urandom: %s", strerror(errno));
	pool->entropy_count = (int)size * 4; /* half of it: the text is hexadecimal */
	pool->buf_size = (int)size;
	memcpy(pool->buf, arg[0], size);
	if (ioctl(fd, RNDADDENTROPY, pool) < 0 || ioctl(fd, RNDRESEEDCRNG) < 0)
		die("cannot seed the random numbers: %s", strerror(errno));
	close(fd);
	free(pool);
}
