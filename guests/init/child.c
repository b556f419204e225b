/* The child between fork and exec: streams, terminal, identity, directory, and then the command. */
#define _GNU_SOURCE
#include "init.h"

#include <errno.h>
#include <grp.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
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

/* execvp() says EACCES too when only a directory of PATH may not be searched, which a shell passes
 * over. Whether the command is anywhere. */
static int command_exists(const char *name)
{
	const char *path = getenv("PATH");
	char file[PATH_MAX];

	if (strchr(name, '/') || !path)
		return 1;
	for (const char *end; *path; path = *end ? end + 1 : end) {
		end = strchrnul(path, ':');
		int n = snprintf(file, sizeof(file), "%.*s%s%s", (int)(end - path), path,
				 end == path ? "" : "/", name);

		if (n > 0 && (size_t)n < sizeof(file) && !access(file, F_OK))
			return 1;
	}
	return 0;
}

_Noreturn void child_main(const struct session *given, const int fds[3], int tty, int report)
{
	struct session copy = *given, *s = &copy;
	struct rlimit limit = { given->nofile < NOFILE_MAX ? given->nofile : NOFILE_MAX,
				NOFILE_MAX };
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
	if (s->user && !user_find(s)) {
		dprintf(report, "there is no user %s in the guest", s->user);
		_exit(125);
	}
	if (tty >= 0 && fchown(tty, s->uid, -1) < 0)
		child_fail(report, "cannot give the terminal away", "");
	if (s->nofile > 0)
		setrlimit(RLIMIT_NOFILE, &limit);
	if (setgroups(s->group_count, s->groups) < 0 || setresgid(s->gid, s->gid, s->gid) < 0 ||
	    setresuid(s->uid, s->uid, s->uid) < 0)
		child_fail(report, "cannot become the command's user", "");
	umask(s->umask);
	if (s->cwd && chdir(s->cwd) < 0 && !(s->cwd_optional && chdir("/") == 0))
		child_fail(report, "cannot enter the directory ", s->cwd);
	environ = s->envp;
	execvp(s->argv[0], s->argv);
	int why = errno;

	if (why == EACCES && !command_exists(s->argv[0]))
		why = ENOENT;
	dprintf(2, "vmm: %s: %s\n", s->argv[0],
		why == ENOENT ? "command not found" : strerror(why));
	_exit(why == ENOENT || why == ENOTDIR ? 127 : 126);
}
