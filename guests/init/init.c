/*
 * /init of vmm's guests: carries out /plan, a list of records made by the host, as process 1.
 *
 * A record is a verb, a decimal count, and that many arguments, each ended by a NUL byte. The
 * verbs are run in order; the table at the end lists them. Built static, needs nothing but the
 * kernel; what it says goes to the console (prefix "vmm-init:") and to the control port.
 */
#define _GNU_SOURCE
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

#define FRESH { .umask = 022, .stdio = { "null", "port", "port" } }

static struct session session = FRESH;
static const char *end_mode = "reboot";

/* One record's arguments; kept, as the session uses some, until its plan is done with. */
struct record {
	struct record *next;
	char *arg[];
};

static struct record *records;

_Noreturn static void machine_end(void)
{
	sync();
	/* "wait": the host ends the machine when it has read everything; not for ever, though. */
	if (strcmp(end_mode, "wait") == 0)
		poll(NULL, 0, 20000);
	reboot(strcmp(end_mode, "poweroff") == 0 ? RB_POWER_OFF : RB_AUTOBOOT);
	for (;;)
		pause();
}

void die(const char *fmt, ...)
{
	char text[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	for (char *c = text; *c; c++)
		if (*c == '\n')
			*c = ' ';
	dprintf(2, "vmm-init: %s\n", text);
	if (ctl_fd >= 0)
		ctl_send("fail %s", text);
	machine_end();
}

/* ports PREFIX NAME...: open the control port and these; from here on errors reach the host */
static void do_ports(char **arg, size_t count)
{
	session_open(arg[0], arg + 1, count - 1);
}

/* end MODE: what follows the command's end: wait (for the host), poweroff, reboot, or another
 * command (again) */
static void do_end(char **arg, size_t count)
{
	(void)count;
	end_mode = arg[0];
}

static void do_argv(char **arg, size_t count)
{
	(void)count;
	session.argv = arg; /* the record's vector ends with NULL */
}

static void do_env(char **arg, size_t count)
{
	(void)count;
	session.envp = arg;
}

/* cwd PATH [optional]: with the second word / will do */
static void do_cwd(char **arg, size_t count)
{
	session.cwd = arg[0];
	session.cwd_optional = count > 1;
}

/* user NAME|NUMBER: who the command runs as, in the guest's words */
static void do_user(char **arg, size_t count)
{
	(void)count;
	session.user = arg[0];
}

/* input COUNT: so many bytes of stdin were for earlier commands; what they left is thrown away */
static void do_input(char **arg, size_t count)
{
	(void)count;
	session.input_base = number(arg[0], 10);
}

/* ids UID GID GROUP... */
static void do_ids(char **arg, size_t count)
{
	session.uid = number(arg[0], 10);
	session.gid = number(arg[1], 10);
	session.group_count = count - 2;
	session.groups = calloc(count - 1, sizeof(gid_t));
	if (!session.groups)
		die("out of memory");
	for (size_t i = 2; i < count; i++)
		session.groups[i - 2] = number(arg[i], 10);
}

/* limits UMASK NOFILE */
static void do_limits(char **arg, size_t count)
{
	(void)count;
	session.umask = number(arg[0], 8);
	session.nofile = number(arg[1], 10);
}

/* stdio IN OUT ERR: each one of port, tty, null; stderr also stdout */
static void do_stdio(char **arg, size_t count)
{
	(void)count;
	for (int i = 0; i < 3; i++)
		session.stdio[i] = arg[i];
}

/* tty ROWS COLUMNS raw|cooked: the terminal at the far end */
static void do_tty(char **arg, size_t count)
{
	(void)count;
	session.rows = number(arg[0], 10);
	session.cols = number(arg[1], 10);
	session.tty_cooked = strcmp(arg[2], "cooked") == 0;
}

static bool takes_more(void)
{
	return strcmp(end_mode, "again") == 0;
}

/* run: start the command and see it to its end; the plan's last record */
static void do_run(char **arg, size_t count)
{
	(void)arg;
	(void)count;
	if (!session.argv || !session.argv[0] || !session.envp)
		die("the plan has no command");
	session_run(&session, takes_more());
	if (!takes_more())
		machine_end();
	free(session.groups);
	session = (struct session)FRESH;
}

static void run_plan(char *at, char *end);

static void forget_records(struct record *until)
{
	while (records != until) {
		struct record *gone = records;

		records = gone->next;
		free(gone);
	}
}

/* await: say "ready" and go on with a plan that comes by the control port, perhaps for ever */
static void do_await(char **arg, size_t count)
{
	size_t size;
	char *plan;

	(void)arg;
	(void)count;
	do {
		struct record *before = records;

		ctl_send("ready");
		plan = ctl_read_plan(&size);
		run_plan(plan, plan + size);
		forget_records(before);
		free(plan);
	} while (takes_more());
}

static const struct {
	const char *verb;
	size_t min_args;
	void (*run)(char **arg, size_t count);
} verbs[] = {
	{ "note", 1, do_note },	      { "module", 2, do_module },   { "mount", 5, do_mount },
	{ "mkdir", 2, do_mkdir },     { "symlink", 2, do_symlink }, { "chmod", 2, do_chmod },
	{ "write", 2, do_write },     { "require", 3, do_require }, { "root", 1, do_root },
	{ "hostname", 1, do_hostname }, { "loopback", 0, do_loopback }, { "ports", 1, do_ports },
	{ "end", 1, do_end },	    { "argv", 1, do_argv },
	{ "env", 0, do_env },	      { "cwd", 1, do_cwd },	    { "ids", 2, do_ids },
	{ "user", 1, do_user },	      { "input", 1, do_input },
	{ "limits", 2, do_limits },   { "stdio", 3, do_stdio },	    { "tty", 3, do_tty },
	{ "clock", 2, do_clock },     { "entropy", 1, do_entropy }, { "await", 0, do_await },
	{ "kvm", 0, do_kvm },	      { "run", 0, do_run },
};

static char *read_plan(const char *path, size_t *size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat st;
	char *text;

	if (fd < 0 || fstat(fd, &st) < 0)
		die("cannot open %s: %s", path, strerror(errno));
	text = malloc(st.st_size + 1);
	if (!text)
		die("out of memory");
	for (*size = 0; *size < (size_t)st.st_size;) {
		ssize_t got = read(fd, text + *size, st.st_size - *size);

		if (got <= 0)
			die("cannot read %s", path);
		*size += got;
	}
	text[*size] = '\0';
	close(fd);
	return text;
}

/* The next NUL-ended string of the plan. */
static char *next_string(char **at, char *end)
{
	char *text = *at;

	if (text >= end)
		die("the plan is cut short");
	*at = text + strlen(text) + 1;
	return text;
}

static void run_plan(char *at, char *end)
{
	while (at < end) {
		const char *verb = next_string(&at, end);
		size_t count = number(next_string(&at, end), 10), i;

		if (count > (size_t)(end - at))
			die("the plan is cut short");
		struct record *rec = calloc(1, sizeof(*rec) + (count + 1) * sizeof(rec->arg[0]));

		if (!rec)
			die("out of memory");
		rec->next = records;
		records = rec;
		for (i = 0; i < count; i++)
			rec->arg[i] = next_string(&at, end);
		for (i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++)
			if (strcmp(verb, verbs[i].verb) == 0)
				break;
		if (i == sizeof(verbs) / sizeof(verbs[0]) || count < verbs[i].min_args)
			die("the plan has a record this /init does not know: %s", verb);
		verbs[i].run(rec->arg, count);
	}
}

int main(int argc, char **argv)
{
	size_t size;
	char *plan;

	if (getpid() != 1 && argc != 2) {
		fprintf(stderr, "usage: %s PLAN (it is meant to be a guest's /init)\n", argv[0]);
		return 2;
	}
	signal(SIGPIPE, SIG_IGN);
	umask(0);
	plan = read_plan(getpid() == 1 ? "/plan" : argv[1], &size);
	run_plan(plan, plan + size);
	die("the plan ends without running a command");
}
