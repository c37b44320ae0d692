/* Two TAPs of two network namespaces, and nothing between them but this loop: what it reads from one it writes to the
 * other, with the same struct virtio_net_hdr before each packet. So segments (TSO) and blank checksums pass whole.
 *
 *     splice NETNS TAP NETNS TAP
 *
 * says "ready" when both are there, and ends when its standard input does. Nothing here waits but poll().
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { BATCH = 64 };

static void die(const char *what)
{
    fprintf(stderr, "splice: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int open_tap(const char *netns, const char *name)
{
    char path[256];
    struct ifreq request = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
    int fd, there;

    snprintf(path, sizeof path, "/run/netns/%s", netns);
    there = open(path, O_RDONLY | O_CLOEXEC);
    if (there < 0 || setns(there, CLONE_NEWNET))
        die(path);
    close(there);
    fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (fd < 0 || ioctl(fd, TUNSETIFF, &request))
        die(name);
    /* What netfront's TAP and netback's take. */
    if (ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN))
        die("TUNSETOFFLOAD");
    return fd;
}

/* Up to BATCH packets; how many. One that is not taken is lost, as by a TAP that is full. */
static int carry(int from, int to)
{
    static char packet[65536 + 64];
    int n;

    for (n = 0; n < BATCH; n++) {
        ssize_t size = read(from, packet, sizeof packet);
        if (size <= 0)
            break;
        if (write(to, packet, size) < 0 && errno == EBADFD)
            die("write");
    }
    return n;
}

int main(int argc, char **argv)
{
    struct pollfd fds[3] = { { .events = POLLIN }, { .events = POLLIN }, { .fd = 0, .events = POLLIN } };

    if (argc != 5) {
        fprintf(stderr, "usage: splice NETNS TAP NETNS TAP\n");
        return 2;
    }
    fds[0].fd = open_tap(argv[1], argv[2]);
    fds[1].fd = open_tap(argv[3], argv[4]);
    puts("ready");
    fflush(stdout);
    for (;;) {
        if (carry(fds[0].fd, fds[1].fd) + carry(fds[1].fd, fds[0].fd) > 0)
            continue;
        if (poll(fds, 3, -1) < 0 && errno != EINTR)
            die("poll");
        if (fds[2].revents)
            return 0;
    }
}
