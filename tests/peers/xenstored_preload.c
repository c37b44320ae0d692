/*
 * Lets an unmodified xenstored run where there is no hypervisor, so that it can stand beside another store.
 *
 * xenstored asks three things of Xen before it serves its socket: the hypervisor interface (is this domain alive?),
 * event channels (dom0's own, and the one that reports dead domains) and dom0's shared page. Here the first says yes
 * to everything, event channels exist and never fire, and the page is anonymous memory. Nothing that a client of the
 * socket can see is changed.
 *
 * With PRELOAD_RINGS=DIR a test may be a guest: the ring page of domain N is the file DIR/ring-N, and any byte written
 * to the FIFO DIR/kick is an event on some channel, upon which xenstored looks at all rings.
 *
 *   gcc -O2 -shared -fPIC xenstored_preload.c -o preload.so -ldl            (headers: libxen-dev)
 *   LD_PRELOAD=./preload.so XENSTORED_RUNDIR=D XENSTORED_ROOTDIR=D xenstored -N --pid-file D/pid
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xenctrl.h>
#include <xenevtchn.h>
#include <xengnttab.h>

enum { PAGE = 4096 };

/* What the handles point to is never looked at by anybody but us. */
static struct { int unused; } hypervisor, grants;
static int channels = -1; /* stands for the event channel device: an eventfd that nobody writes to, or the FIFO */
static int ports;

static const char *ring_file(const char *name, unsigned int domid)
{
    static char path[4096];
    const char *dir = getenv("PRELOAD_RINGS");

    if (!dir || snprintf(path, sizeof(path), name, dir, domid) >= (int)sizeof(path))
        return NULL;
    return path;
}

/* The hypervisor: every domain is there and well. */

xc_interface *xc_interface_open(xentoollog_logger *log, xentoollog_logger *dombuild_log, unsigned flags)
{
    return (xc_interface *)&hypervisor;
}

int xc_interface_close(xc_interface *xch)
{
    return 0;
}

int xc_domain_getinfo(xc_interface *xch, uint32_t first, unsigned int count, xc_dominfo_t *info)
{
    if (count == 0)
        return 0;
    memset(info, 0, sizeof(*info));
    info->domid = first;
    info->running = 1;
    return 1;
}

/* Event channels: bound as often as one likes, and silent but for the FIFO. */

xenevtchn_handle *xenevtchn_open(struct xentoollog_logger *log, unsigned int flags)
{
    const char *fifo = ring_file("%s/kick", 0);

    if (fifo && mkfifo(fifo, 0600) == 0)
        channels = open(fifo, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    else
        channels = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    return channels < 0 ? NULL : (xenevtchn_handle *)&channels;
}

int xenevtchn_fd(xenevtchn_handle *xce)
{
    return channels;
}

xenevtchn_port_or_error_t xenevtchn_bind_virq(xenevtchn_handle *xce, unsigned int virq)
{
    return ++ports;
}

xenevtchn_port_or_error_t xenevtchn_bind_interdomain(xenevtchn_handle *xce, uint32_t domid, evtchn_port_t port)
{
    return ++ports;
}

xenevtchn_port_or_error_t xenevtchn_pending(xenevtchn_handle *xce)
{
    char byte;
    return read(channels, &byte, 1) == 1 ? ports : -1;
}

int xenevtchn_notify(xenevtchn_handle *xce, evtchn_port_t port)
{
    return 0;
}

int xenevtchn_unmask(xenevtchn_handle *xce, evtchn_port_t port)
{
    return 0;
}

int xenevtchn_unbind(xenevtchn_handle *xce, evtchn_port_t port)
{
    return 0;
}

/* Grants: a guest's ring page is a page of zeros, an idle ring, or the file. */

xengnttab_handle *xengnttab_open(struct xentoollog_logger *log, unsigned flags)
{
    return (xengnttab_handle *)&grants;
}

int xengnttab_close(xengnttab_handle *xgt)
{
    return 0;
}

int xengnttab_set_max_grants(xengnttab_handle *xgt, uint32_t count)
{
    return 0;
}

void *xengnttab_map_grant_ref(xengnttab_handle *xgt, uint32_t domid, uint32_t ref, int prot)
{
    const char *file = ring_file("%s/ring-%u", domid);
    int fd = file ? open(file, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
    void *page = MAP_FAILED;

    if (fd < 0)
        page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    else {
        if (ftruncate(fd, PAGE) == 0)
            page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
    }
    return page == MAP_FAILED ? NULL : page;
}

int xengnttab_unmap(xengnttab_handle *xgt, void *start, uint32_t count)
{
    return munmap(start, (size_t)count * PAGE);
}

/* dom0's own port and ring page are files of the kernel's: /dev/xen or /proc/xen, xsd_port and xsd_kva. */

static int stand_in(const char *path)
{
    const char *name = strrchr(path, '/');
    bool port = name && strcmp(name, "/xsd_port") == 0, page = name && strcmp(name, "/xsd_kva") == 0;
    int fd;

    if ((!port && !page) || (fd = memfd_create(name + 1, MFD_CLOEXEC)) < 0)
        return -1;
    if ((port && (write(fd, "1", 1) != 1 || lseek(fd, 0, SEEK_SET) != 0)) || (page && ftruncate(fd, PAGE) != 0)) {
        close(fd);
        return -1;
    }
    return fd;
}

#define REAL_OPEN(name)                                                                   \
    int name(const char *path, int flags, ...)                                            \
    {                                                                                     \
        static int (*next)(const char *, int, ...);                                       \
        int fd = stand_in(path);                                                          \
        mode_t mode = 0;                                                                  \
        if (fd >= 0)                                                                      \
            return fd;                                                                    \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                            \
            va_list more;                                                                 \
            va_start(more, flags);                                                        \
            mode = va_arg(more, mode_t);                                                  \
            va_end(more);                                                                 \
        }                                                                                 \
        if (!next)                                                                        \
            next = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name);              \
        return next(path, flags, mode);                                                   \
    }

REAL_OPEN(open)
REAL_OPEN(open64)
