/* Requests at a constant rate, an open loop. `steady PORT RATE SECONDS CONNECTIONS FIRST_ID FILES`.
 *
 * Each request has a time at which it is due, whatever became of the others. Its latency counts from then, so that a
 * stall shows in every request that it delays. The connections take turns. Each request has a new id; what follows the
 * id is read from FILES.first and FILES.second, as users.py writes them. h2load --rps can't do this: each of its
 * connections sends the same list of URIs from the beginning, so that few ids are new, and their timers ring together.
 *
 * Prints: answered ok, failed or unanswered, requests a second, then p50, p99, p99.9 and the slowest in microseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { WAITING = 1024 };     /* requests that may wait on one connection */
#define PATIENCE 3000000000L /* ns that the last answers are waited for */

struct connection { int fd, matched; unsigned sent, answered; long due[WAITING]; };
struct texts { size_t count; char *at[8192]; };

static struct texts first, second;
static long *took, answered, failed;

static long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000L + time.tv_nsec;
}

static void stop(const char *why) {
    fprintf(stderr, "steady: %s\n", why);
    exit(1);
}

static void load(struct texts *texts, const char *stem, const char *suffix) {
    static char path[4096];
    snprintf(path, sizeof path, "%s.%s", stem, suffix);
    FILE *file = fopen(path, "rb");
    size_t room = 0;
    if (!file) stop("no prepared requests");
    while (texts->count < 8192 && getdelim(&texts->at[texts->count], &room, 0, file) > 0) texts->count++, room = 0;
    fclose(file);
}

static void request(struct connection *to, long due, long id) {
    char text[4096];
    int size = snprintf(text, sizeof text, "GET /api/verve/accept?id=%ld%s%s", id, first.at[id % first.count],
                        second.at[id % second.count]);
    if (to->sent - to->answered == WAITING) stop("the answers on a connection are far behind");
    to->due[to->sent++ % WAITING] = due;
    if (write(to->fd, text, size) != size) stop("a connection is full or lost");
}

static void answers(struct connection *from) {
    static char bytes[1 << 16];
    static const char mark[] = "\r\n\r\n"; /* behind it the body: ok or failed */
    long size = read(from->fd, bytes, sizeof bytes), time = now();
    if (size <= 0) stop("a connection is lost");
    for (long at = 0; at < size; at++) {
        if (from->matched < 4) {
            from->matched = bytes[at] == mark[from->matched] ? from->matched + 1 : bytes[at] == '\r';
            continue;
        }
        if (from->answered == from->sent) stop("an answer that was not asked for");
        from->matched = 0;
        if (bytes[at] == 'o') took[answered++] = time - from->due[from->answered % WAITING];
        else failed++;
        from->answered++;
    }
}

static int order(const void *one, const void *other) {
    long difference = *(const long *)one - *(const long *)other;
    return (difference > 0) - (difference < 0);
}

static double at(double share) { return answered ? took[(long)(share * (answered - 1))] / 1e3 : 0; }

static struct connection *connected(int port, long count, int events) {
    struct sockaddr_in server = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct connection *all = calloc(count, sizeof *all);
    server.sin_port = htons(port);
    for (long n = 0; n < count; n++) {
        int one = 1, fd = all[n].fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(fd, (struct sockaddr *)&server, sizeof server)) stop("no connection");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        fcntl(fd, F_SETFL, O_NONBLOCK);
        epoll_ctl(events, EPOLL_CTL_ADD, fd, &(struct epoll_event){EPOLLIN, {.ptr = &all[n]}});
    }
    return all;
}

int main(int count, char **words) {
    if (count != 7) return 2;
    long rate = atol(words[2]), total = rate * atol(words[3]), connections = atol(words[4]), id = atol(words[5]);
    int events = epoll_create1(0);
    load(&first, words[6], "first"), load(&second, words[6], "second");
    struct connection *all = connected(atoi(words[1]), connections, events);
    took = calloc(total, sizeof *took);
    prctl(PR_SET_TIMERSLACK, 1); /* 50 us by default */
    long began = now(), end = began + total * 1000000000L / rate + PATIENCE;
    for (long sent = 0, due = began; answered + failed < total && now() < end;) {
        for (; sent < total && (due = began + sent * 1000000000L / rate) <= now(); sent++)
            request(&all[sent % connections], due, id + sent);
        long left = (sent < total ? due : end) - now();
        struct epoll_event ready[64];
        struct timespec wait = {left > 0 ? left / 1000000000L : 0, left > 0 ? left % 1000000000L : 0};
        int found = epoll_pwait2(events, ready, 64, &wait, NULL);
        for (int n = 0; n < found; n++) answers(ready[n].data.ptr);
    }
    double seconds = (now() - began) / 1e9;
    qsort(took, answered, sizeof *took, order);
    printf("%ld %ld %.0f %.0f %.0f %.0f %.0f\n", answered, total - answered, answered / seconds, at(0.5), at(0.99),
           at(0.999), at(1));
}
