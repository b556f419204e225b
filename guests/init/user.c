/* Users by the guest's own files; no name service. */
#define _GNU_SOURCE
#include "init.h"

#include <grp.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct passwd *find_passwd(const char *who)
{
	FILE *file = fopen("/etc/passwd", "re");
	struct passwd *entry;
	char *end;
	unsigned long uid = strtoul(who, &end, 10);
	bool is_number = *who && !*end;

	if (!file)
		return NULL;
	while ((entry = fgetpwent(file)))
		if (is_number ? entry->pw_uid == uid : strcmp(entry->pw_name, who) == 0)
			break;
	fclose(file); /* the entry is the library's own memory */
	return entry;
}

/* The groups that list this user, and its own. */
static void find_groups(struct session *s, const char *name)
{
	FILE *file = fopen("/etc/group", "re");
	struct group *entry;

	s->groups = malloc(sizeof(gid_t));
	s->group_count = 1;
	if (!s->groups)
		die("out of memory");
	s->groups[0] = s->gid;
	while (file && (entry = fgetgrent(file))) {
		for (char **member = entry->gr_mem; *member; member++) {
			gid_t *more;

			if (strcmp(*member, name) != 0)
				continue;
			more = realloc(s->groups, (s->group_count + 1) * sizeof(gid_t));
			if (!more)
				die("out of memory");
			s->groups = more;
			s->groups[s->group_count++] = entry->gr_gid;
			break;
		}
	}
	if (file)
		fclose(file);
}

static bool env_has(char **env, const char *name)
{
	size_t len = strlen(name);

	for (; *env; env++)
		if (strncmp(*env, name, len) == 0 && (*env)[len] == '=')
			return true;
	return false;
}

static void env_add(struct session *s, const char *name, const char *value)
{
	size_t count = 0;
	char **more;

	if (env_has(s->envp, name))
		return;
	while (s->envp[count])
		count++;
	more = calloc(count + 2, sizeof(*more));
	if (!more || asprintf(&more[count], "%s=%s", name, value) < 0)
		die("out of memory");
	memcpy(more, s->envp, count * sizeof(*more));
	s->envp = more;
}

bool user_find(struct session *s)
{
	struct passwd *entry = find_passwd(s->user);
	char *end;
	unsigned long uid = strtoul(s->user, &end, 10);

	if (!entry && (!*s->user || *end) && strcmp(s->user, "root") != 0)
		return false;
	s->uid = entry ? entry->pw_uid : uid; /* root: *end is 'r', uid is 0 */
	s->gid = entry ? entry->pw_gid : uid;
	env_add(s, "HOME", entry && *entry->pw_dir ? entry->pw_dir : "/");
	env_add(s, "SHELL", entry && *entry->pw_shell ? entry->pw_shell : "/bin/sh");
	env_add(s, "USER", entry ? entry->pw_name : s->user);
	env_add(s, "LOGNAME", entry ? entry->pw_name : s->user);
	find_groups(s, entry ? entry->pw_name : s->user);
	return true;
}
