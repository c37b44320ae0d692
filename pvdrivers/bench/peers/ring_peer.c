/*
 * The blkif ring between two processes with Xen's own macros: what pvdrivers/bench/ring.py is measured beside.
 *
 *   ring_peer PAGES DEPTH TOTAL MODE CPU_FRONT CPU_BACK TSC_MHZ
 *
 * DEPTH 0 is the whole ring. MODE 0 polls and never notifies; MODE 1 sleeps on eventfds when there is nothing to do.
 * Prints: messages a second, p50 and p99 of the time from request to response in ns, notifications sent by both
 * sides, and CPU time of both processes in ns. Each request is written whole, stamped and checked at the back end;
 * each response is copied out, checked and its latency counted: the same work as pvdrivers/bench/ring_kernels.py.
 *
 * Build: gcc -O3 -march=native ring_peer.c (package libxen-dev).
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <x86intrin.h>
#define xen_mb() __asm__ __volatile__("lock; addl $0, -128(%%rsp)" ::: "memory")
#define xen_rmb() __asm__ __volatile__("" ::: "memory")
#define xen_wmb() __asm__ __volatile__("" ::: "memory")
#define cycles() __rdtsc()
#define relax() _mm_pause()
#elif defined(__aarch64__)
#define xen_mb() __asm__ __volatile__("dmb ish" ::: "memory")
#define xen_rmb() __asm__ __volatile__("dmb ishld" ::: "memory")
#define xen_wmb() __asm__ __volatile__("dmb ishst" ::: "memory")
static inline uint64_t cycles(void)
{
    uint64_t t;
    __asm__ __volatile__("mrs %0, cntvct_el0" : "=r"(t));
    return t;
}
#define relax() __asm__ __volatile__("yield")
#endif

/* Below 3.2.8 ring.h asks for mb() and its kin. */
#define __XEN_INTERFACE_VERSION__ 0x00040d00
#include <xen/xen.h>
#include <xen/io/ring.h>
#include <xen/io/blkif.h>

enum { POLL = 0, SLEEP = 1 };
enum { STAMPS = 1024, BUCKETS = 100000, BUCKET_NS = 10, WARM_UP = 2000 };

struct side {
    int mode;
    int own_event, peer_event;
    uint64_t notified;
};

static void notify_peer(struct side *side)
{
    uint64_t one = 1;

    side->notified++;
    if (write(side->peer_event, &one, sizeof one) != sizeof one)
        abort();
}

static void rest(struct side *side)
{
    uint64_t count;

    if (read(side->own_event, &count, sizeof count) != sizeof count)
        abort();
}

/* Returns the ticks that it took, or -1 for a response that cannot be. */
static __attribute__((noinline)) int64_t
front(blkif_sring_t *sring, size_t bytes, int64_t depth, int64_t total, double ns_per_tick, int64_t *latency,
      struct side *side)
{
    static uint64_t stamp[STAMPS];
    blkif_front_ring_t ring;
    int64_t sent = 0, received = 0;
    uint64_t began;
    int more, notify;

    FRONT_RING_ATTACH(&ring, sring, sring->rsp_prod, bytes);
    if (depth == 0)
        depth = RING_SIZE(&ring);
    began = cycles();
    while (received < total) {
        int64_t room = depth - (int64_t)(uint32_t)(ring.req_prod_pvt - ring.rsp_cons);

        if (room > total - sent)
            room = total - sent;
        if (room > 0) {
            uint64_t now = cycles();

            for (int64_t i = 0; i < room; i++) {
                blkif_request_t *req = RING_GET_REQUEST(&ring, ring.req_prod_pvt);
                uint64_t id = ring.req_prod_pvt & (STAMPS - 1);

                req->operation = BLKIF_OP_READ;
                req->nr_segments = 1;
                req->handle = 51712;
                req->id = id;
                req->sector_number = (sent + i) * 8;
                req->seg[0].gref = id + 8;
                req->seg[0].first_sect = 0;
                req->seg[0].last_sect = 7;
                stamp[id] = now;
                ring.req_prod_pvt++;
            }
            sent += room;
            if (side->mode == POLL) {
                RING_PUSH_REQUESTS(&ring);
            } else {
                RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&ring, notify);
                if (notify)
                    notify_peer(side);
            }
        }

        RING_IDX prod = *(volatile RING_IDX *)&sring->rsp_prod;
        xen_rmb(); /* see the responses that the index promises */
        if (prod == ring.rsp_cons) {
            if (side->mode == POLL) {
                relax();
                continue;
            }
            RING_FINAL_CHECK_FOR_RESPONSES(&ring, more);
            if (!more)
                rest(side);
            continue;
        }
        if (RING_RESPONSE_PROD_OVERFLOW(&ring, prod))
            return -1;
        uint64_t now = cycles();
        while (ring.rsp_cons != prod) {
            blkif_response_t rsp;

            RING_COPY_RESPONSE(&ring, ring.rsp_cons, &rsp);
            if (rsp.status != BLKIF_RSP_OKAY || rsp.id >= STAMPS)
                return -1;
            int64_t at = (int64_t)((now - stamp[rsp.id]) * ns_per_tick) / BUCKET_NS;
            latency[at < BUCKETS ? at : BUCKETS - 1]++;
            ring.rsp_cons++;
            received++;
        }
    }
    return cycles() - began;
}

static __attribute__((noinline)) int
back(blkif_sring_t *sring, size_t bytes, int64_t total, struct side *side)
{
    blkif_back_ring_t ring;
    int64_t done = 0;
    int more, notify;

    BACK_RING_INIT(&ring, sring, bytes);
    while (done < total) {
        RING_IDX prod = *(volatile RING_IDX *)&sring->req_prod;
        xen_rmb(); /* see the requests that the index promises */
        if (prod == ring.req_cons) {
            if (side->mode == POLL) {
                relax();
                continue;
            }
            RING_FINAL_CHECK_FOR_REQUESTS(&ring, more);
            if (!more)
                rest(side);
            continue;
        }
        if (RING_REQUEST_PROD_OVERFLOW(&ring, prod))
            return 1;
        while (ring.req_cons != prod) {
            blkif_request_t req;
            blkif_response_t *rsp;
            int status = BLKIF_RSP_OKAY;

            RING_COPY_REQUEST(&ring, ring.req_cons, &req);
            ring.req_cons++;
            if (req.operation > BLKIF_OP_FLUSH_DISKCACHE || req.nr_segments < 1 ||
                req.nr_segments > BLKIF_MAX_SEGMENTS_PER_REQUEST)
                status = BLKIF_RSP_ERROR;
            for (int i = 0; i < req.nr_segments && i < BLKIF_MAX_SEGMENTS_PER_REQUEST; i++)
                if (req.seg[i].last_sect > 7 || req.seg[i].first_sect > req.seg[i].last_sect)
                    status = BLKIF_RSP_ERROR;
            rsp = RING_GET_RESPONSE(&ring, ring.rsp_prod_pvt);
            rsp->id = req.id;
            rsp->operation = req.operation;
            rsp->status = status;
            ring.rsp_prod_pvt++;
            done++;
        }
        if (side->mode == POLL) {
            RING_PUSH_RESPONSES(&ring);
        } else {
            RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(&ring, notify);
            if (notify)
                notify_peer(side);
        }
    }
    return 0;
}

static void pin(int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) != 0)
        perror("sched_setaffinity");
}

static int64_t percentile(const int64_t *latency, int64_t total, int64_t part)
{
    int64_t seen = 0;

    for (int64_t at = 0; at < BUCKETS; at++) {
        seen += latency[at];
        if (seen * 100 >= total * part)
            return at * BUCKET_NS;
    }
    return -1;
}

static double cpu_ns(int who)
{
    struct rusage usage;

    getrusage(who, &usage);
    return (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1e9 +
           (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e3;
}

int main(int argc, char **argv)
{
    if (argc != 8) {
        fprintf(stderr, "usage: ring_peer PAGES DEPTH TOTAL MODE CPU_FRONT CPU_BACK TSC_MHZ\n");
        return 2;
    }
    size_t bytes = (size_t)atoi(argv[1]) * 4096;
    int64_t depth = atoll(argv[2]), total = atoll(argv[3]);
    int mode = atoi(argv[4]);
    double mhz = atof(argv[7]);
    int memory = memfd_create("ring", 0);

    if (memory < 0 || ftruncate(memory, 1 << 20) != 0)
        return 2;
    char *base = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, memory, 0);
    if (base == MAP_FAILED)
        return 2;
    int to_front = eventfd(0, 0), to_back = eventfd(0, 0);
    volatile uint32_t *ready = (void *)(base + (1 << 19));
    volatile uint64_t *back_notified = (void *)(base + (1 << 19) + 64);
    blkif_sring_t *sring = (void *)base;

    SHARED_RING_INIT(sring);
    pid_t child = fork();
    if (child == 0) {
        struct side side = {mode, to_back, to_front, 0};

        pin(atoi(argv[6]));
        *ready = 1;
        int status = back(sring, bytes, WARM_UP + total, &side);
        *back_notified = side.notified;
        _exit(status);
    }
    struct side side = {mode, to_front, to_back, 0};
    int64_t *latency = calloc(BUCKETS, sizeof *latency);

    pin(atoi(argv[5]));
    while (!*ready)
        relax();
    if (front(sring, bytes, depth, WARM_UP, 1000 / mhz, latency, &side) < 0)
        return 1;
    memset(latency, 0, BUCKETS * sizeof *latency);
    double before = cpu_ns(RUSAGE_SELF);
    int64_t ticks = front(sring, bytes, depth, total, 1000 / mhz, latency, &side);
    double spent = cpu_ns(RUSAGE_SELF) - before;
    int status;
    waitpid(child, &status, 0);
    spent += cpu_ns(RUSAGE_CHILDREN);
    printf("%.0f %ld %ld %lu %.0f\n", total / (ticks / mhz / 1e6), (long)percentile(latency, total, 50),
           (long)percentile(latency, total, 99), (unsigned long)(side.notified + *back_notified), spent);
    return ticks < 0 || status != 0;
}
