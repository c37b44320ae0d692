/*
 * A block frontend in C on the embedded Xen: a guest that owes pvdrivers nothing but the protocol.
 *
 * It joins as a domain, does the xenbus handshake over xenstore's own wire protocol, grants a ring and some pages,
 * reads a whole disk through the ring with Xen's own macros, and prints how many bytes there were and their
 * checksum (FNV-1a, 64 bits). docs/joining.md explains what is done here step by step.
 *
 *     cc -O2 -Wall -Wextra -o blkfront blkfront.c          # needs the headers of libxen-dev
 *     ./blkfront RUN_DIR DOMID TOKEN_IN_HEX DEVID          # e.g. ./blkfront /run/pvdrivers 1 5f3a... 51712
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* Without this the headers are those of Xen 3, which names the barriers otherwise. */
#define __XEN_INTERFACE_VERSION__ 0x00040e00

/* Xen's macros want the barriers of the machine. */
#define xen_mb() __sync_synchronize()
#define xen_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define xen_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)

#include <xen/grant_table.h>
#include <xen/io/blkif.h>
#include <xen/io/protocols.h>
#include <xen/io/xenbus.h>
#include <xen/io/xs_wire.h>

#define PAGE 4096u
#define DEPTH 8u                                   /* requests under way at a time */
#define SEGMENTS BLKIF_MAX_SEGMENTS_PER_REQUEST    /* pages of each */
#define SECTORS_OF_PAGE (PAGE / 512u)
#define PATIENCE_MS 30000

/* Hypercalls: pvdrivers/sim/wire.py. */
enum { HELLO = 1, CLAIM_FRAMES = 7, CLAIM_GREFS = 8, EVTCHN_ALLOC_UNBOUND = 16, EVTCHN_FDS = 20 };
enum { VERSION = 1, WANT_MEMORY = 1, WANT_STORE = 2, PORTS_2L = 4096 };

struct request {
    uint32_t op;
    uint32_t arg[7];
    unsigned char tail[16];
};

struct reply {
    int32_t status; /* 0, or -errno */
    uint32_t value[7];
};

static int hypervisor;
static int store;
static uint8_t *memory;            /* our pages: frame n is at n * PAGE */
static grant_entry_v1_t *grants;   /* our grant table: {flags, domid, frame} */

static void fail(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    fprintf(stderr, "blkfront: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    exit(1);
}

/* ---- hypercalls ---- */

/* One hypercall; the descriptors that come with the answer go to fds. */
static struct reply hypercall(const struct request *request, size_t size, int *fds, unsigned nfds)
{
    struct reply reply;
    char control[CMSG_SPACE(4 * sizeof(int))];
    struct iovec iov = { &reply, sizeof(reply) };
    struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1,
                              .msg_control = control, .msg_controllen = sizeof(control) };
    struct cmsghdr *rights;

    if (send(hypervisor, request, size, 0) != (ssize_t)size)
        fail("hypercall %u: %s", request->op, strerror(errno));
    if (recvmsg(hypervisor, &message, MSG_CMSG_CLOEXEC) < (ssize_t)sizeof(reply))
        fail("hypercall %u: the hypervisor is gone", request->op);
    if (reply.status)
        fail("hypercall %u: %s", request->op, strerror(-reply.status));
    rights = CMSG_FIRSTHDR(&message);
    if (nfds && (!rights || rights->cmsg_len < CMSG_LEN(nfds * sizeof(int))))
        fail("hypercall %u: descriptors are missing", request->op);
    if (nfds)
        memcpy(fds, CMSG_DATA(rights), nfds * sizeof(int));
    return reply;
}

static uint32_t hypercall1(uint32_t op, uint32_t argument)
{
    struct request request = { .op = op, .arg = { argument } };

    return hypercall(&request, 32, NULL, 0).value[0];
}

static void join(const char *run_dir, uint32_t domid, const char *token)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    struct request request = { .op = HELLO, .arg = { VERSION, domid, WANT_MEMORY | WANT_STORE, PORTS_2L } };
    struct reply reply;
    int fds[3];
    unsigned i, byte;

    for (i = 0; i < 16; i++) {
        if (sscanf(token + 2 * i, "%2x", &byte) != 1)
            fail("the token has 32 hexadecimal digits");
        request.tail[i] = (unsigned char)byte;
    }
    snprintf(address.sun_path, sizeof(address.sun_path), "%s/hypervisor", run_dir);
    hypervisor = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (connect(hypervisor, (struct sockaddr *)&address, sizeof(address)))
        fail("%s: %s", address.sun_path, strerror(errno));
    reply = hypercall(&request, sizeof(request), fds, 3);
    memory = mmap(NULL, (size_t)reply.value[1] * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
    grants = mmap(NULL, (size_t)reply.value[2] * sizeof(*grants), PROT_READ | PROT_WRITE, MAP_SHARED, fds[1], 0);
    if (memory == MAP_FAILED || grants == MAP_FAILED)
        fail("mmap: %s", strerror(errno));
    store = fds[2];
}

/* ---- grants ---- */

static void grant(uint32_t gref, uint32_t frame, domid_t to)
{
    grants[gref].frame = frame;
    grants[gref].domid = to;
    xen_wmb(); /* who sees the flags sees the rest */
    __atomic_store_n(&grants[gref].flags, GTF_permit_access, __ATOMIC_RELEASE);
}

/* 0 while somebody has the page mapped. */
static int end_grant(uint32_t gref)
{
    uint16_t flags = __atomic_load_n(&grants[gref].flags, __ATOMIC_ACQUIRE);

    do {
        if (flags & (GTF_reading | GTF_writing))
            return 0;
    } while (!__atomic_compare_exchange_n(&grants[gref].flags, &flags, 0, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return 1;
}

/* ---- xenstore, io/xs_wire.h ---- */

static void exactly(int writing, void *buffer, size_t n)
{
    char *p = buffer;
    ssize_t done;

    for (; n; p += done, n -= (size_t)done) {
        done = writing ? write(store, p, n) : read(store, p, n);
        if (done <= 0)
            fail("xenstore: the connection is lost");
    }
}

/* The next message that is an answer, or a watch event if those are wanted; the payload ends with a NUL. */
static uint32_t receive(char *payload, int want_events)
{
    struct xsd_sockmsg header;

    do {
        exactly(0, &header, sizeof(header));
        if (header.len > XENSTORE_PAYLOAD_MAX)
            fail("xenstore: a message of %u bytes", header.len);
        exactly(0, payload, header.len);
        payload[header.len] = 0;
    } while (header.type == XS_WATCH_EVENT && !want_events); /* whoever waits reads the state anyway */
    return header.type;
}

/* One request with two strings, the second of which (a value) has no NUL at its end; NULL: none. */
static int talk(uint32_t type, const char *path, const char *second, char *answer)
{
    char payload[XENSTORE_PAYLOAD_MAX + 1];
    struct xsd_sockmsg header = { .type = type, .len = (uint32_t)strlen(path) + 1 };

    memcpy(payload, path, header.len);
    if (second) {
        size_t n = strlen(second) + (type == XS_WATCH);

        memcpy(payload + header.len, second, n);
        header.len += (uint32_t)n;
    }
    exactly(1, &header, sizeof(header));
    exactly(1, payload, header.len);
    return receive(answer, 0) == XS_ERROR ? -1 : 0;
}

static char *read_key(const char *directory, const char *key)
{
    static char value[XENSTORE_PAYLOAD_MAX + 1];
    char path[512];

    snprintf(path, sizeof(path), "%s/%s", directory, key);
    return talk(XS_READ, path, NULL, value) ? NULL : value;
}

static void write_key(const char *directory, const char *key, const char *format, ...)
{
    char path[512], value[128], answer[XENSTORE_PAYLOAD_MAX + 1];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(value, sizeof(value), format, arguments);
    va_end(arguments);
    snprintf(path, sizeof(path), "%s/%s", directory, key);
    if (talk(XS_WRITE, path, value, answer))
        fail("xenstore: %s = %s: %s", path, value, answer);
}

static void wait_for_state(const char *backend, int wanted)
{
    char event[XENSTORE_PAYLOAD_MAX + 1];
    const char *state;

    for (;;) {
        struct pollfd fd = { .fd = store, .events = POLLIN };

        state = read_key(backend, "state");
        if (state && atoi(state) >= wanted)
            break;
        if (poll(&fd, 1, PATIENCE_MS) <= 0)
            fail("the backend does not go to state %d, it is in %s", wanted, state ? state : "none");
        receive(event, 1);
    }
    if (atoi(state) != wanted && wanted < XenbusStateClosing)
        fail("the backend went to state %s instead of %d", state, wanted);
}

/* ---- the disk ---- */

static uint64_t checksum = 0xcbf29ce484222325u, total;

static void add_to_checksum(const uint8_t *data, size_t n)
{
    total += n;
    while (n--)
        checksum = (checksum ^ *data++) * 0x100000001b3u;
}

int main(int argc, char **argv)
{
    char frontend[128], backend[256], state[300], answer[XENSTORE_PAYLOAD_MAX + 1];
    uint32_t port, frames, grefs, i, k;
    uint64_t sectors, sector = 0;
    struct request request = { .op = EVTCHN_FDS };
    int event[2]; /* the one to notify with, the one to wait on */
    blkif_front_ring_t ring;
    blkif_sring_t *shared;
    domid_t backend_id;

    if (argc != 5)
        fail("usage: blkfront RUN_DIR DOMID TOKEN_IN_HEX DEVID");
    join(argv[1], (uint32_t)atoi(argv[2]), argv[3]);

    /* Who serves us? The toolstack has written it. */
    snprintf(frontend, sizeof(frontend), "/local/domain/%s/device/vbd/%s", argv[2], argv[4]);
    if (!read_key(frontend, "backend"))
        fail("there is no %s: attach a disk first", frontend);
    snprintf(backend, sizeof(backend), "%s", read_key(frontend, "backend"));
    backend_id = (domid_t)atoi(read_key(frontend, "backend-id"));
    snprintf(state, sizeof(state), "%s/state", backend);
    if (talk(XS_WATCH, state, "state", answer))
        fail("xenstore: cannot watch %s: %s", state, answer);
    wait_for_state(backend, XenbusStateInitWait);

    /* A page for the ring and DEPTH * SEGMENTS for data, each with a grant. */
    frames = hypercall1(CLAIM_FRAMES, 1 + DEPTH * SEGMENTS);
    grefs = hypercall1(CLAIM_GREFS, 1 + DEPTH * SEGMENTS);
    shared = (blkif_sring_t *)(memory + (size_t)frames * PAGE);
    SHARED_RING_INIT(shared);
    FRONT_RING_INIT(&ring, shared, PAGE);
    for (i = 0; i < 1 + DEPTH * SEGMENTS; i++)
        grant(grefs + i, frames + i, backend_id);
    port = hypercall1(EVTCHN_ALLOC_UNBOUND, backend_id);
    request.arg[0] = port;
    hypercall(&request, 32, event, 2);

    write_key(frontend, "ring-ref", "%u", grefs);
    write_key(frontend, "event-channel", "%u", port);
    write_key(frontend, "protocol", "%s", XEN_IO_PROTO_ABI_NATIVE);
    write_key(frontend, "state", "%d", XenbusStateInitialised);
    wait_for_state(backend, XenbusStateConnected);
    sectors = strtoull(read_key(backend, "sectors"), NULL, 10); /* of 512 bytes, always */
    write_key(frontend, "state", "%d", XenbusStateConnected);

    while (sector < sectors) {
        uint64_t bytes[DEPTH] = { 0 };
        uint32_t made, answered = 0;
        int notify, more;

        for (made = 0; made < DEPTH && sector < sectors; made++) {
            blkif_request_t *r = RING_GET_REQUEST(&ring, ring.req_prod_pvt);

            r->operation = BLKIF_OP_READ;
            r->handle = (blkif_vdev_t)atoi(argv[4]);
            r->id = made;
            r->sector_number = sector;
            for (k = 0; k < SEGMENTS && sector < sectors; k++) {
                uint64_t left = sectors - sector;
                uint8_t n = left < SECTORS_OF_PAGE ? (uint8_t)left : SECTORS_OF_PAGE;

                r->seg[k].gref = grefs + 1 + made * SEGMENTS + k;
                r->seg[k].first_sect = 0;
                r->seg[k].last_sect = n - 1;
                bytes[made] += n * 512u;
                sector += n;
            }
            r->nr_segments = (uint8_t)k;
            ring.req_prod_pvt++;
        }
        RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&ring, notify);
        if (notify && write(event[0], &(uint64_t){ 1 }, 8) != 8)
            fail("event channel: %s", strerror(errno));

        while (answered < made) {
            struct pollfd fd = { .fd = event[1], .events = POLLIN };
            uint64_t count;

            while (ring.rsp_cons != ring.sring->rsp_prod) {
                blkif_response_t response;

                xen_rmb();
                response = *RING_GET_RESPONSE(&ring, ring.rsp_cons);
                ring.rsp_cons++;
                if (response.status != BLKIF_RSP_OKAY || response.id >= made)
                    fail("request %" PRIu64 ": status %d", response.id, response.status);
                answered++;
            }
            RING_FINAL_CHECK_FOR_RESPONSES(&ring, more);
            if (more || answered == made)
                continue;
            if (poll(&fd, 1, PATIENCE_MS) <= 0)
                fail("no answer: %u of %u requests", answered, made);
            if (read(event[1], &count, 8) != 8 && errno != EAGAIN)
                fail("event channel: %s", strerror(errno));
        }
        for (i = 0; i < made; i++)
            add_to_checksum(memory + (size_t)(frames + 1 + i * SEGMENTS) * PAGE, bytes[i]);
    }

    /* Close in order; then nobody may have our pages any more. */
    write_key(frontend, "state", "%d", XenbusStateClosing);
    wait_for_state(backend, XenbusStateClosing);
    write_key(frontend, "state", "%d", XenbusStateClosed);
    wait_for_state(backend, XenbusStateClosed);
    for (i = 0; i < 1 + DEPTH * SEGMENTS; i++)
        if (!end_grant(grefs + i))
            fail("grant %u is still mapped", grefs + i);
    printf("%" PRIu64 " bytes fnv1a %016" PRIx64 "\n", total, checksum);
    return 0;
}
