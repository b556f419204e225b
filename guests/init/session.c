/*
 * The session: one command, its streams carried over virtio-serial ports, its end reported.
 *
 * The control port speaks lines. To the host: "started", "exit STATUS OUT ERR TTY" (the bytes sent
 * on each port, so that the host knows when it has them all), "input-closed", "alive" (for
 * "ping"), "fail TEXT", "ready" (for "plan SIZE" and the plan itself). From the host: "eof COUNT" (stdin ends after COUNT bytes),
 * "winch ROWS COLUMNS", "signal N", "close out|err" (nobody reads that stream any more). Where
 * commands follow one another, "fail" is about one of them, and "ready" comes after each.
 */
#define _GNU_SOURCE
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define DRAIN_MS 3000 /* how long killed processes may hold a stream open */

static struct channel channels[STREAM_COUNT];
static int port_fd[STREAM_COUNT] = { -1, -1, -1, -1 };
static uint64_t input_taken;		 /* read from its port, for all commands */
static char ctl_text[1024];		 /* from the host, the last line perhaps not whole */
static size_t ctl_fill;
static int pty_master = -1;
static pid_t child = -1;
static int child_status = -1;

static bool stdio_is(const struct session *s, int i, const char *how)
{
	return strcmp(s->stdio[i], how) == 0;
}

static bool wants_tty(const struct session *s)
{
	return stdio_is(s, 0, "tty") || stdio_is(s, 1, "tty") || stdio_is(s, 2, "tty");
}

void session_open(const char *prefix, char **names, size_t count)
{
	static const char *const known[STREAM_COUNT] = { "in", "out", "err", "tty" };

	ctl_fd = port_open(prefix, "ctl");
	for (size_t i = 0; i < count; i++)
		for (int nr = 0; nr < STREAM_COUNT; nr++)
			if (strcmp(names[i], known[nr]) == 0)
				port_fd[nr] = port_open(prefix, names[i]);
}

/* One stream of the child by pipe: fds[i] is the child's end, the other end is returned. */
static int child_pipe(int fds[3], int i)
{
	int ends[2], ours = i == 0 ? 1 : 0;

	if (pipe2(ends, O_CLOEXEC) < 0)
		die("cannot make a pipe: %s", strerror(errno));
	fcntl(ends[ours], F_SETFL, O_NONBLOCK);
	fcntl(ends[ours], F_SETPIPE_SZ, 4 * CHANNEL_SIZE);
	fds[i] = ends[!ours];
	return ends[ours];
}

static int open_pty(const struct session *s)
{
	struct winsize size = { .ws_row = s->rows, .ws_col = s->cols };
	struct termios mode;
	int slave;

	if (openpty(&pty_master, &slave, NULL, NULL, &size) < 0)
		die("cannot make a terminal: %s", strerror(errno));
	fcntl(pty_master, F_SETFD, FD_CLOEXEC);
	fcntl(slave, F_SETFD, FD_CLOEXEC);
	fcntl(pty_master, F_SETFL, O_NONBLOCK);
	tcgetattr(slave, &mode);
	mode.c_iflag |= IUTF8;
	if (s->tty_cooked)
		mode.c_oflag &= ~OPOST;
	tcsetattr(slave, TCSANOW, &mode);
	return slave;
}

/* What an earlier command did not read is not for this one. */
static void input_skip(uint64_t base)
{
	struct pollfd p = { .fd = port_fd[STREAM_IN], .events = POLLIN };
	char text[4096];

	while (p.fd >= 0 && input_taken < base) {
		uint64_t left = base - input_taken;
		ssize_t got = read(p.fd, text, left < sizeof(text) ? left : sizeof(text));

		if (got > 0)
			input_taken += got;
		else if (poll(&p, 1, -1) > 0 && (p.revents & POLLHUP) && !(p.revents & POLLIN))
			die("the host closed the port of stdin");
	}
}

/* Starts the child; false when it could not start, with the reason in `text`. */
static bool session_spawn(const struct session *s, char *text, size_t size)
{
	int fds[3], report[2], slave = wants_tty(s) ? open_pty(s) : -1;
	ssize_t got;

	for (int i = 0; i < STREAM_COUNT; i++)
		channels[i].from = channels[i].to = -1;
	if (slave >= 0 && port_fd[STREAM_TTY] < 0)
		die("the plan has a terminal and no port for it");
	for (int i = 0; i < 3; i++) {
		if (stdio_is(s, i, "port") && port_fd[i] < 0)
			die("the plan has no port for stream %d", i);
		if (stdio_is(s, i, "tty"))
			fds[i] = slave;
		else if (stdio_is(s, i, "stdout"))
			fds[i] = fds[1];
		else if (stdio_is(s, i, "null"))
			fds[i] = open("/dev/null", O_RDWR | O_CLOEXEC);
		else if (i == 0)
			channel_start(&channels[i], port_fd[i], child_pipe(fds, i), &input_taken);
		else
			channel_start(&channels[i], child_pipe(fds, i), port_fd[i], NULL);
	}
	if (slave >= 0)
		channel_start(&channels[STREAM_TTY], pty_master, port_fd[STREAM_TTY], NULL);
	if (stdio_is(s, 0, "tty"))
		channel_start(&channels[STREAM_IN], port_fd[STREAM_IN], dup(pty_master),
			      &input_taken);
	if (pipe2(report, O_CLOEXEC) < 0)
		die("cannot make a pipe: %s", strerror(errno));
	child = fork();
	if (child < 0)
		die("cannot start a process: %s", strerror(errno));
	if (child == 0)
		child_main(s, fds, slave, report[1]);
	close(report[1]);
	for (int i = 0; i < 3; i++)
		if (fds[i] != slave && (i != 2 || fds[2] != fds[1]))
			close(fds[i]);
	if (slave >= 0)
		close(slave);
	got = read(report[0], text, size - 1); /* ends when exec closes the other end */
	close(report[0]);
	text[got > 0 ? got : 0] = '\0';
	return got <= 0;
}

static void deliver_signal(int signo)
{
	pid_t group = pty_master >= 0 ? tcgetpgrp(pty_master) : -1;

	if (signo <= 0 || signo >= NSIG || child_status >= 0)
		return;
	if (group <= 1 || (signo != SIGINT && signo != SIGQUIT))
		group = child;
	if (kill(-group, signo) < 0)
		kill(child, signo);
}

/*
 * Says that this machine lives, each time from the next CPU: one that is stuck in the kernel keeps
 * us as soon as it is its turn.
 */
static void answer_ping(void)
{
	static int turn;
	cpu_set_t all, one;

	if (sched_getaffinity(0, sizeof(all), &all) < 0)
		return;
	do
		turn = (turn + 1) % CPU_SETSIZE;
	while (!CPU_ISSET(turn, &all));
	CPU_ZERO(&one);
	CPU_SET(turn, &one);
	sched_setaffinity(0, sizeof(one), &one);
	sched_setaffinity(0, sizeof(all), &all);
	ctl_send("alive");
}

static void handle_line(const char *line)
{
	unsigned long long count;
	struct winsize size = { 0 };
	char word[8];
	int signo;

	if (sscanf(line, "eof %llu", &count) == 1) {
		channels[STREAM_IN].end = count;
	} else if (sscanf(line, "winch %hu %hu", &size.ws_row, &size.ws_col) == 2) {
		if (pty_master >= 0)
			ioctl(pty_master, TIOCSWINSZ, &size);
	} else if (sscanf(line, "signal %d", &signo) == 1) {
		deliver_signal(signo);
	} else if (strcmp(line, "ping") == 0) {
		answer_ping();
	} else if (sscanf(line, "close %7s", word) == 1) {
		int i = strcmp(word, "err") == 0 ? STREAM_ERR : STREAM_OUT;

		/* The command's next write shall meet a broken pipe, as it would on the host. */
		if (channel_open(&channels[i]))
			channel_close(&channels[i]);
	}
}

static void read_ctl(void)
{
	ssize_t got = read(ctl_fd, ctl_text + ctl_fill, sizeof(ctl_text) - 1 - ctl_fill);
	char *eol;

	if (got <= 0)
		return;
	ctl_fill += got;
	ctl_text[ctl_fill] = '\0';
	while ((eol = strchr(ctl_text, '\n'))) {
		*eol = '\0';
		handle_line(ctl_text);
		ctl_fill -= eol + 1 - ctl_text;
		memmove(ctl_text, eol + 1, ctl_fill + 1);
	}
	if (ctl_fill == sizeof(ctl_text) - 1)
		ctl_fill = 0; /* no line is that long */
}

/* Buries the dead; when the command itself is among them, ends everything else too. */
static void reap(int signal_fd)
{
	struct signalfd_siginfo info;
	int status;
	pid_t pid;

	while (read(signal_fd, &info, sizeof(info)) > 0)
		;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		if (pid != child)
			continue;
		child_status = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
		kill(-1, SIGKILL);
	}
}

static long now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000L + t.tv_nsec / 1000000;
}

static bool outputs_open(void)
{
	return channel_open(&channels[STREAM_OUT]) || channel_open(&channels[STREAM_ERR]) ||
	       channel_open(&channels[STREAM_TTY]);
}

/* True as long as the host has yet to take something. */
static bool outputs_owed(void)
{
	for (int i = STREAM_OUT; i < STREAM_COUNT; i++)
		if (channel_open(&channels[i]) && channels[i].fill > 0)
			return true;
	return false;
}

static size_t poll_set(struct pollfd *set, int signal_fd)
{
	size_t n = 0;

	set[n++] = (struct pollfd){ .fd = signal_fd, .events = POLLIN };
	set[n++] = (struct pollfd){ .fd = ctl_fd, .events = POLLIN };
	for (int i = 0; i < STREAM_COUNT; i++) {
		struct channel *c = &channels[i];

		if (!channel_open(c))
			continue;
		if (c->fill > 0)
			set[n++] = (struct pollfd){ .fd = c->to, .events = POLLOUT };
		else
			set[n++] = (struct pollfd){ .fd = c->from, .events = POLLIN };
	}
	return n;
}

/* As if no command had been run. */
static void session_reset(void)
{
	for (int i = 0; i < STREAM_COUNT; i++) {
		if (channels[i].buf)
			channel_close(&channels[i]);
		free(channels[i].buf);
		channels[i] = (struct channel){ .from = -1, .to = -1 };
	}
	pty_master = -1;
	child = child_status = -1;
	ctl_fill = 0;
}

/* Until the child has ended and what it wrote is on its way. */
static void session_carry(int signal_fd)
{
	struct pollfd set[2 + STREAM_COUNT];
	long quiet_since = 0;

	while (child_status < 0 || outputs_open()) {
		bool moved = false;

		poll(set, poll_set(set, signal_fd), child_status < 0 ? -1 : 100);
		if (set[1].revents & POLLHUP)
			die("the host closed the control port");
		if (set[0].revents)
			reap(signal_fd);
		if (set[1].revents)
			read_ctl();
		for (int i = 0; i < STREAM_COUNT; i++)
			moved |= channel_step(&channels[i]);
		if (child_status < 0 || moved || outputs_owed())
			quiet_since = now_ms();
		else if (now_ms() - quiet_since > DRAIN_MS)
			break; /* something unkillable holds a stream: its output is over */
	}
}

void session_run(struct session *s, bool again)
{
	char text[256];
	sigset_t mask;
	int signal_fd;

	sigemptyset(&mask);
	sigaddset(&mask, SIGCHLD);
	sigprocmask(SIG_BLOCK, &mask, NULL);
	signal_fd = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signal_fd < 0)
		die("cannot make a signalfd: %s", strerror(errno));
	session_reset();
	input_skip(s->input_base);
	if (!session_spawn(s, text, sizeof(text))) {
		if (!again)
			die("%s", text);
		waitpid(child, NULL, 0);
		close(signal_fd);
		session_reset();
		ctl_send("fail %s", text);
		return;
	}
	ctl_send("started");
	session_carry(signal_fd);
	close(signal_fd);
	sync();
	ctl_send("exit %d %llu %llu %llu", child_status,
		 (unsigned long long)channels[STREAM_OUT].total,
		 (unsigned long long)channels[STREAM_ERR].total,
		 (unsigned long long)channels[STREAM_TTY].total);
	session_reset();
}
