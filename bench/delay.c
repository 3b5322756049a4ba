/* A TCP proxy that delays every byte, each way, by the same time. `delay LISTEN_PORT TARGET_PORT MICROSECONDS`.
 *
 * What is read is kept as a chunk with the time at which it is due, and written then. ppoll waits until the first chunk
 * is due, in nanoseconds; the kernel's timer slack (50 us by default) is turned off. Nothing waits by spinning. A
 * connection is set up without delay, since both ends are on this machine. Its end is delayed as bytes are, and closes both ways.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { SOCKETS = 1024, CHUNK = 1 << 16, QUEUED = 1 << 24 }; /* bytes; beyond QUEUED a socket is not read */

struct chunk { struct chunk *next; long due; size_t size, sent; char bytes[]; }; /* size 0: the end */
struct way { struct chunk *first, *last; size_t queued; int ended; }; /* read from a socket, for its peer */

static struct pollfd fds[SOCKETS]; /* 0 listens; 2n + 1 and 2n + 2 are the two ends of a connection, or -1 */
static struct way ways[SOCKETS];
static long delay;

static long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000L + time.tv_nsec;
}

static int peer(int at) { return at % 2 ? at + 1 : at - 1; }

static void drop(int at) { /* both ends, with what waits */
    for (int end = at, n = 0; n < 2; end = peer(at), n++) {
        close(fds[end].fd);
        fds[end].fd = -1;
        for (struct chunk *chunk = ways[end].first, *next; chunk; chunk = next) next = chunk->next, free(chunk);
        memset(&ways[end], 0, sizeof ways[end]);
    }
}

static void take(int at) { /* read once, from a socket that is readable */
    static char bytes[CHUNK];
    struct way *way = &ways[at];
    ssize_t size = read(fds[at].fd, bytes, CHUNK);
    if (size < 0) {
        if (errno != EAGAIN && errno != EINTR) drop(at);
        return;
    }
    struct chunk *chunk = malloc(sizeof *chunk + size);
    if (!chunk) exit(1);
    *chunk = (struct chunk){.due = now() + delay, .size = size};
    memcpy(chunk->bytes, bytes, size);
    if (way->last) way->last->next = chunk; else way->first = chunk;
    way->last = chunk, way->queued += size, way->ended = size == 0;
}

static void give(int at, long time) { /* write to its peer what is due; a full peer keeps the rest waiting */
    for (struct way *way = &ways[at]; way->first && way->first->due <= time;) {
        struct chunk *chunk = way->first;
        ssize_t size = chunk->size ? write(fds[peer(at)].fd, chunk->bytes + chunk->sent, chunk->size - chunk->sent) : 0;
        if (!chunk->size || (size < 0 && errno != EAGAIN)) { drop(at); return; }
        if (size > 0) chunk->sent += size, way->queued -= size;
        if (chunk->sent < chunk->size) { fds[peer(at)].events |= POLLOUT; return; }
        if (!(way->first = chunk->next)) way->last = NULL;
        free(chunk);
    }
}

static int tcp(void) {
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    return fd;
}

static void meet(struct sockaddr_in target) { /* take a connection and make the one behind it */
    int one = 1, near = accept4(fds[0].fd, NULL, NULL, SOCK_NONBLOCK), far = tcp(), at = 1;
    while (at < SOCKETS - 1 && fds[at].fd >= 0) at += 2;
    if (near < 0 || at >= SOCKETS - 1 || connect(far, (struct sockaddr *)&target, sizeof target)) {
        close(near), close(far);
        return;
    }
    fcntl(far, F_SETFL, O_NONBLOCK);
    setsockopt(near, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(far, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fds[at].fd = near, fds[at + 1].fd = far;
}

int main(int count, char **words) {
    if (count != 4) return 2;
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}, target = here;
    here.sin_port = htons(atoi(words[1])), target.sin_port = htons(atoi(words[2])), delay = atol(words[3]) * 1000;
    signal(SIGPIPE, SIG_IGN), prctl(PR_SET_TIMERSLACK, 1);
    for (int at = 0; at < SOCKETS; at++) fds[at].fd = -1;
    fds[0] = (struct pollfd){tcp(), POLLIN, 0};
    if (bind(fds[0].fd, (struct sockaddr *)&here, sizeof here) || listen(fds[0].fd, 128)) return 1;
    for (;;) {
        long time = now(), next = time + 1000000000L;
        int used = 1;
        for (int at = 1; at < SOCKETS; at++) if (fds[at].fd >= 0) fds[at].events = 0, used = at + 1;
        for (int at = 1; at < used; at++) if (fds[at].fd >= 0) give(at, time);
        for (int at = 1; at < used; at++) {
            if (fds[at].fd < 0) continue;
            if (!ways[at].ended && ways[at].queued < QUEUED) fds[at].events |= POLLIN;
            long due = ways[at].first ? ways[at].first->due : next;
            if (due > time && due < next) next = due; /* what is late waits for POLLOUT */
        }
        struct timespec wait = {(next - time) / 1000000000L, (next - time) % 1000000000L};
        if (ppoll(fds, used, &wait, NULL) <= 0) continue;
        for (int at = 1; at < used; at++)
            if (fds[at].fd >= 0 && fds[at].revents & (POLLERR | POLLHUP)) drop(at);
            else if (fds[at].fd >= 0 && fds[at].revents & POLLIN) take(at);
        if (fds[0].revents & POLLIN) meet(target);
    }
}
