/* The guest's /init: what its parts share. */
#ifndef VMM_GUEST_INIT_H
#define VMM_GUEST_INIT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { STREAM_IN, STREAM_OUT, STREAM_ERR, STREAM_TTY, STREAM_COUNT };

/* How the command starts and how its streams travel; filled by the plan. */
struct session {
	char **argv;
	char **envp;
	const char *cwd;
	uid_t uid;
	gid_t gid;
	gid_t *groups;
	size_t group_count;
	mode_t umask;
	unsigned long nofile;
	/* How each of stdin, stdout, stderr begins: "port", "tty", "null" or (stderr) "stdout". */
	const char *stdio[3];
	unsigned rows, cols;
	bool tty_cooked; /* the far terminal does its own output processing */
	const char *port_prefix;
};

/* Says why on the console and on the control port, then ends the machine. */
_Noreturn void die(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* The control port, or -1 as long as there is none. */
extern int ctl_fd;

void ctl_send(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* Opens the port of this name, once the host's end of it is there; does not return without. */
int port_open(const char *prefix, const char *name);

/*
 * Becomes the command: fds are its standard streams, tty its controlling terminal or -1. What
 * keeps it from starting is written to `report`, which a successful exec closes.
 */
_Noreturn void child_main(const struct session *s, const int fds[3], int tty, int report);

/* Opens the ports named <port_prefix>ctl, in, out, err and tty, those the session needs. */
void session_open(struct session *s);

/* Starts the command, carries its streams, and reports its end on the control port. */
void session_run(struct session *s);

#endif
