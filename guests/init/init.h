/* The guest's /init: what its parts share. */
#ifndef VMM_GUEST_INIT_H
#define VMM_GUEST_INIT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { STREAM_IN, STREAM_OUT, STREAM_ERR, STREAM_TTY, STREAM_COUNT };

#define CHANNEL_SIZE 65536

/* One direction of one stream: what came from `from` and is still owed to `to`. */
struct channel {
	int from, to;
	size_t start, fill;
	uint64_t total;		/* bytes taken from `from` */
	uint64_t end;		/* of stdin, once the host has said where it is */
	uint64_t *input_taken;	/* stdin: read from its port, for all commands; else NULL */
	bool to_broken;		/* nobody reads: take and drop */
	char *buf;
};

/* How the command starts and how its streams travel; filled by the plan. */
struct session {
	char **argv;
	char **envp;
	const char *cwd;
	bool cwd_optional; /* without it the command starts in / */
	const char *user;  /* name or number, looked up in the guest; else the ids below */
	uid_t uid;
	gid_t gid;
	gid_t *groups;
	size_t group_count;
	mode_t umask;
	unsigned long nofile;
	/* How each of stdin, stdout, stderr begins: "port", "tty", "null" or (stderr) "stdout". */
	const char *stdio[3];
	uint64_t input_base; /* bytes of input that the host sent for earlier commands */
	unsigned rows, cols;
	bool tty_cooked; /* the far terminal does its own output processing */
};

/* Says why on the console and on the control port, then ends the machine. */
_Noreturn void die(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* A number in a plan; does not return when it is none. */
unsigned long number(const char *text, int base);

/* One action of a plan each: the record's arguments and their count; see actions.c. */
void do_note(char **arg, size_t count);
void do_module(char **arg, size_t count);
void do_mount(char **arg, size_t count);
void do_mkdir(char **arg, size_t count);
void do_symlink(char **arg, size_t count);
void do_chmod(char **arg, size_t count);
void do_write(char **arg, size_t count);
void do_require(char **arg, size_t count);
void do_root(char **arg, size_t count);
void do_hostname(char **arg, size_t count);
void do_loopback(char **arg, size_t count);
void do_clock(char **arg, size_t count);
void do_entropy(char **arg, size_t count);
void do_kvm(char **arg, size_t count);

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

/*
 * Looks s->user up in /etc/passwd and /etc/group: ids, groups, and HOME, USER, LOGNAME and SHELL
 * where the environment lacks them. A number that is in neither is good too. False: no such user.
 */
bool user_find(struct session *s);

/* The plan that the host sends over the control port; as long as it takes, and never freed. */
char *ctl_read_plan(size_t *size);

/* Opens the ports PREFIXctl and PREFIX with each of these names: in, out, err, tty. */
void session_open(const char *prefix, char **names, size_t count);

/* Begins to carry; `input_taken` is for stdin, whose `from` is a port. */
void channel_start(struct channel *c, int from, int to, uint64_t *input_taken);
bool channel_open(const struct channel *c);
/* Closes the command's end. */
void channel_close(struct channel *c);
/* Moves what can be moved without waiting; true when something moved. */
bool channel_step(struct channel *c);

/*
 * Starts the command, carries its streams, and reports its end on the control port. Without
 * `again` a command that cannot be started is the machine's end.
 */
void session_run(struct session *s, bool again);

#endif
