/* The /init of the boot benchmark: says it is there, then ends the machine. */
#include <sys/reboot.h>
#include <termios.h>
#include <unistd.h>

int main(void)
{
	static const char text[] = "\n<<init>>\n";

	if (write(1, text, sizeof(text) - 1) < 0)
		return 1;
	tcdrain(1);
	reboot(RB_AUTOBOOT);
	return 1;
}
