/* The child between fork and exec: streams, terminal, identity, directory, and then the command. */
#define _GNU_SOURCE
#include "init.h"

#include <errno.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#define NOFILE_MAX 1048576 /* the kernel's own default of fs.nr_open */

/* Says why the command could not be started, on `report` (the host hears it) and gives up. */
_Noreturn static void child_fail(int report, const char *what, const char *which)
{
	dprintf(report, "%s%s: %s", what, which, strerror(errno));
	_exit(125);
}

_Noreturn void child_main(const struct session *s, const int fds[3], int tty, int report)
{
	struct rlimit limit = { s->nofile < NOFILE_MAX ? s->nofile : NOFILE_MAX, NOFILE_MAX };
	sigset_t none;

	setsid();
	if (tty >= 0 && ioctl(tty, TIOCSCTTY, 0) < 0)
		child_fail(report, "cannot take the terminal", "");
	for (int i = 0; i < 3; i++)
		if (dup2(fds[i], i) < 0)
			child_fail(report, "cannot set up the streams", "");
	signal(SIGPIPE, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	if (s->nofile > 0)
		setrlimit(RLIMIT_NOFILE, &limit);
	if (setgroups(s->group_count, s->groups) < 0 || setresgid(s->gid, s->gid, s->gid) < 0 ||
	    setresuid(s->uid, s->uid, s->uid) < 0)
		child_fail(report, "cannot become the calling user", "");
	umask(s->umask);
	if (s->cwd && chdir(s->cwd) < 0)
		child_fail(report, "cannot enter the directory ", s->cwd);
	environ = s->envp;
	execvp(s->argv[0], s->argv);
	int why = errno;

	dprintf(2, "vmm: %s: %s\n", s->argv[0],
		why == ENOENT ? "command not found" : strerror(why));
	_exit(why == ENOENT || why == ENOTDIR ? 127 : 126);
}
